"""Probe: is a linear map diagonal, or a multiple of an isometry? Run it once and see.

A pairwise (max, min) written with slices, where and concatenate moves numbers, and so
does sorting; a Cayley map of a parameter is orthogonal; a leaky ReLU multiplies by one
of two slopes. None of this is seen from the equations one by one, but all of it shows
when the map is run on random values: for random residuals and random h,

    coisometric:  J(P(h)) = c h        diagonal:  P(h) = P(1) h

hold to rounding, or fail by far (these are polynomial identities in h, so a random h
that satisfies one by chance has probability zero). Residuals come from running the
stage's own forward on random inputs, which meets every branch of a kink many times.
What is found is *steady* if it rests on nothing but constants and on which branch was
taken, so that it holds for every parameter and every input; slopes that depend on
values do not. Source: Schwartz-Zippel, as in Freivalds' check of matrix products.
Limits: branches that random inputs never take are not seen; whoever rebuilds with what
was found checks the result.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from passes import _jax
from passes.flops import eqn_flops
from passes.graph import Graph, Var, evaluate, is_var, nbytes, size
from passes.linearise import Linear

_MOST_BYTES = 2**28  # of the values that a probe makes
_MOST_FLOPS = 2e10
_LEAST = 64  # numbers that are looked at


@dataclasses.dataclass(frozen=True)
class Probed:
    """What was seen.

    Attributes:
      scale: c where P^T P = c I, else None.
      diagonal: whether P is diagonal.
      zeros: whether some of the diagonal is zero.
      amplification: root mean square of the diagonal times that of its inverse.
      steady: whether the map depends on constants and branches alone.
    """

    scale: float | None
    diagonal: bool
    zeros: bool
    amplification: float
    steady: bool


def probe(
    linear: Linear, eqns: Sequence[Any], source: Var, target: Var
) -> Probed | None:
    """Runs a stretch of a backward on random values.

    Args:
      linear: the derivative of a stage.
      eqns: equations of `linear.bwd`.
      source: the cotangent that they read.
      target: the cotangent that they make of it.

    Returns:
      What was seen; None where it is too large or cannot be run by itself.
    """
    if not size(source):
        # On no numbers every map is an isometry.
        return Probed(1.0, True, False, 1.0, True)
    fwd, bwd = linear.fwd, linear.bwd
    read = bwd.inputs_of([target], [source]) - {source}
    pairs = zip(linear.residuals, linear.residual_inputs, strict=True)
    need = [(r, v) for r, v in pairs if v in read]
    atoms = [r for r, _ in need]
    todo = [*(fwd.eqns[i] for i in fwd.needed(atoms)), *eqns]
    inputs = [v for v in fwd.inputs_of(atoms) if v not in linear.consts]
    bytes_ = sum(nbytes(v) for e in todo for v in e.outvars) + sum(map(nbytes, inputs))
    work = sum(eqn_flops(e).total for e in todo)
    if any(_on_mesh(v) for e in todo for v in e.outvars):
        return None
    if bytes_ > _MOST_BYTES or work > _MOST_FLOPS or any(e.effects for e in todo):
        return None

    def run(made: list[Any], h: Any) -> tuple[Any, ...]:
        env = {**linear.consts, **dict(zip(inputs, made, strict=True))}
        values = evaluate(fwd, env, atoms)
        back = {
            **linear.consts,
            **{v: x for (_, v), x in zip(need, values, strict=True)},
        }

        def pull(ct: Any) -> Any:
            return evaluate(bwd, {**back, source: ct}, [target])[0]

        out, push = jax.vjp(pull, h)
        # The adjoint: JAX's transpose of a complex map does not conjugate.
        again = jnp.conj(push(jnp.conj(out))[0])
        ones = pull(jnp.ones_like(h))
        scale = jnp.real(jnp.vdot(h, again)) / jnp.real(jnp.vdot(h, h))
        lost = jnp.max(jnp.abs(again - scale * h)) / jnp.max(jnp.abs(h))
        if ones.shape != h.shape:
            return scale, lost, jnp.inf, 0.0, 0.0, 0.0
        apart = jnp.max(jnp.abs(out - ones * h)) / jnp.maximum(
            jnp.max(jnp.abs(out)), 1e-30
        )
        square = jnp.abs(ones) ** 2
        return (
            scale,
            lost,
            apart,
            jnp.mean(square),
            jnp.mean(1 / square),
            jnp.min(square),
        )

    rng = np.random.default_rng(zlib.crc32(b"probe"))
    # A single number is a multiple of an isometry whatever its slope: draw more.
    draws = max(1, -(-_LEAST // size(source)))
    with jax.ensure_compile_time_eval():
        compiled = jax.jit(run)
        rows = []
        for _ in range(draws):
            made = [_random(rng, v.aval) for v in inputs]
            rows.append([float(x) for x in compiled(made, _random(rng, source.aval))])
    columns = [np.asarray(column) for column in zip(*rows, strict=True)]
    scales, lost, apart, square, inverse, least = columns
    eps = float(jnp.finfo(source.aval.dtype).eps)
    fine = max(64 * eps, 1e-12)
    scale = float(scales[0])
    same = np.max(np.abs(scales - scale)) <= fine * scale
    known = bool(same and np.max(lost) <= fine and scale > 0)
    diagonal = bool(np.max(apart) <= fine)
    zeros = bool(np.min(least) == 0)
    growth = math.inf if zeros else math.sqrt(np.mean(square) * np.mean(inverse))
    kept = _rounded(scale) if known else None
    return Probed(kept, diagonal, zeros, growth, _steady(fwd, atoms))


def _on_mesh(var: Var) -> bool:
    """Whether an equation that makes it cannot run by itself, off its mesh."""
    mesh = getattr(getattr(var.aval, "sharding", None), "mesh", None)
    explicit = jax.sharding.AxisType.Explicit in getattr(mesh, "axis_types", ())
    return explicit or bool(_jax.varying(var.aval))


def _rounded(scale: float) -> float:
    """A ratio of small integers that a sum of random products came close to."""
    for bottom in (1, 2, 3, 4, 6, 8, 9, 12, 16):
        top = round(scale * bottom)
        if top and abs(scale * bottom / top - 1) < 1e-4:
            return top / bottom
    return scale


def _steady(fwd: Graph, atoms: Sequence[Any]) -> bool:
    """Whether values depend on inputs through bools and integers alone."""
    branches = [
        v
        for eqn in fwd.eqns
        for v in eqn.outvars
        if not jnp.issubdtype(v.aval.dtype, jnp.inexact)
    ]
    left = fwd.inputs_of([a for a in atoms if is_var(a)], branches) - {*branches}
    return not any(v in {*fwd.invars} for v in left)


def _random(rng: np.random.Generator, aval: Any) -> Any:
    shape, dtype = aval.shape, aval.dtype
    if jnp.issubdtype(dtype, jax.dtypes.prng_key):
        keys = jax.random.split(jax.random.key(0), max(1, math.prod(shape)))
        return keys.reshape(shape)
    if jnp.issubdtype(dtype, jnp.complexfloating):
        both = rng.standard_normal((2, *shape))
        return jnp.asarray(both[0] + 1j * both[1], dtype)
    if jnp.issubdtype(dtype, jnp.inexact):
        return jnp.asarray(rng.standard_normal(shape, np.float32), dtype)
    if dtype == jnp.bool_:
        return jnp.asarray(rng.integers(0, 2, shape, np.int8), bool)
    return jnp.zeros(shape, dtype)
