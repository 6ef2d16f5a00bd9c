"""Pooling: the derivative of max and min pools from positions, not from operands.

JAX's derivative of `reduce_window_max` selects in the operand once more, so that
backpropagation keeps all of it. Where windows do not overlap, the position of what
was selected in each window says as much, in log2(window) bits: planes of bools that
follow from the operand by comparisons, so that a minimum cut keeps them, packed. The
backward compares each place of a window with the position; nothing is scattered.

The position is found as XLA's SelectAndScatter finds it, a window's elements in
row-major order: what is held stays while `held >= next`. So the first maximum wins,
padding (-inf) takes part, and a NaN gives way to what follows it. Source: StableHLO,
"select_and_scatter"; JAX's derivative on CPU and GPU, to the bit. Limits: windows of
at most 64 elements (the search is unrolled); other pools keep JAX's own.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from passes import _jax
from passes.graph import Graph, Var, evaluate, is_var, read, size

Array = Any

_MOST = 64  # elements of a window


def by_position(
    fwd: Graph, bwd: Graph, consts: Mapping[Var, Any], residuals: int
) -> tuple[Any, Any] | None:
    """Rewrites a derivative so that its pools are pulled through from positions.

    Args:
      fwd: the residuals are its last results.
      bwd: the residuals are its first inputs.
      consts: values of constant variables of both.
      residuals: how many there are.

    Returns:
      Closed jaxprs of `fwd`, with the positions after its results, and of `bwd`, with
      the positions after its residuals; None where there is no such pool.
    """
    last = fwd.outvars[len(fwd.outvars) - residuals :]
    made = dict(zip(bwd.invars, last, strict=False))
    pools = {i: pool for i, eqn in enumerate(bwd.eqns) if (pool := _pool(eqn, made))}
    if not pools:
        return None

    def forward(*args: Array) -> list[Array]:
        env = {**consts, **dict(zip(fwd.invars, args, strict=True))}
        outs = evaluate(fwd, env, fwd.outvars)
        for pool in pools.values():
            x = read(env, made[pool.eqn.invars[1]])
            outs += _jax.bind(pool.eqn, [x], instead=pool.positions)
        return outs

    def backward(*args: Array) -> list[Array]:
        own, planes = list(args[:residuals]), list(args[residuals:])
        given = {i: [planes.pop(0) for _ in range(p.bits)] for i, p in pools.items()}
        env = {**consts, **dict(zip(bwd.invars, [*own, *planes], strict=True))}
        for i, eqn in enumerate(bwd.eqns):
            values = [read(env, v) for v in eqn.invars]
            if i in pools:
                spread = functools.partial(pools[i].spread, given[i])
                outs = _jax.bind(eqn, values[:1], instead=spread)
            else:
                outs = _jax.bind(eqn, values)
            env.update(zip(eqn.outvars, outs, strict=True))
        return [read(env, v) for v in bwd.outvars]

    at = [v.aval for p in pools.values() for v in [p.eqn.invars[0]] * p.bits]
    bits = [a.update(dtype=np.dtype(bool), weak_type=False) for a in at]
    types = [v.aval for v in bwd.invars]
    types[residuals:residuals] = bits
    return (
        jax.make_jaxpr(forward)(*[v.aval for v in fwd.invars]),
        jax.make_jaxpr(backward)(*types),
    )


def _pool(eqn: Any, residuals: Collection[Var]) -> _Pool | None:
    """The pool whose derivative an equation is; None where it stays as it is."""
    if eqn.primitive.name != "select_and_scatter_add":
        return None
    ct, x = eqn.invars
    window, strides = eqn.params["window_dimensions"], eqn.params["window_strides"]
    overlap = any(k > s for k, s in zip(window, strides, strict=True))
    infinite = x.aval.dtype.itemsize > 1  # what has no infinity has one byte
    large = math.prod(window) > _MOST
    if not is_var(x) or x not in residuals or overlap or large or not infinite:
        return None
    return _Pool(eqn) if size(ct) else None


@dataclasses.dataclass(frozen=True, eq=False)
class _Pool:
    """A pool over windows that do not overlap, by the equation of its derivative."""

    eqn: Any

    @property
    def bits(self) -> int:
        """How many planes there are."""
        return (math.prod(self.eqn.params["window_dimensions"]) - 1).bit_length()

    def positions(self, x: Array) -> list[Array]:
        """The place in each window that is selected, in binary: planes of bools."""
        params, count = self.eqn.params, self.eqn.invars[0].aval.shape
        window, strides = params["window_dimensions"], params["window_strides"]
        stays = params["select_prim"].bind
        least = -np.inf if params["select_prim"] is lax.ge_p else np.inf
        pads = [(low, high, 0) for low, high in params["padding"]]
        x = lax.pad(x, np.array(least, x.dtype), pads)
        held, found = None, np.uint8(0)
        for place, start in enumerate(itertools.product(*map(range, window))):
            axes = zip(start, count, strides, strict=True)
            stop = [at + (n - 1) * stride + 1 for at, n, stride in axes]
            here = lax.slice(x, start, stop, strides)
            if held is None:
                held = here
            else:
                kept = stays(held, here)
                held = lax.select(kept, held, here)
                found = jnp.where(kept, found, np.uint8(place))
        return [found >> i & 1 == 1 for i in range(self.bits)]

    def spread(self, planes: Sequence[Array], ct: Array) -> list[Array]:
        """The operand's cotangent: those of the windows, each at its position."""
        params, zero = self.eqn.params, np.zeros((), ct.dtype)
        window, strides = params["window_dimensions"], params["window_strides"]
        shape: list[int] = []  # each axis of windows, then of what is in one, if more
        outer: list[int] = []
        inner: list[int] = []
        gaps: list[tuple[int, int, int]] = []
        for n, k, stride in zip(ct.shape, window, strides, strict=True):
            outer.append(len(shape))
            shape.append(n)
            gaps.append((0, 0, 0))
            if stride > 1:
                inner.append(len(shape))
                shape.append(k)
                gaps.append((0, stride - k, 0))
        places = lax.iota(np.uint8, math.prod(window))
        places = lax.reshape(places, [shape[axis] for axis in inner])
        places = lax.broadcast_in_dim(places, shape, inner)
        found = jnp.zeros(ct.shape, np.uint8)
        for i, plane in enumerate(planes):
            found |= plane.astype(np.uint8) << i
        chosen = places == lax.broadcast_in_dim(found, shape, outer)
        ct = jnp.where(chosen, lax.broadcast_in_dim(ct, shape, outer), zero)
        # Windows side by side, with the gaps between them, then without the padding.
        # One axis after another: explicit shardings follow that.
        ct = lax.pad(ct, zero, gaps)
        for axis in reversed(inner):
            both = math.prod(ct.shape[axis - 1 : axis + 1])
            ct = lax.reshape(ct, (*ct.shape[: axis - 1], both, *ct.shape[axis + 1 :]))
        operand = self.eqn.invars[1].aval.shape
        axes = zip(operand, params["padding"], ct.shape, strict=True)
        cut = [(-low, low + n - end, 0) for n, (low, _), end in axes]
        return [lax.pad(ct, zero, cut)]
