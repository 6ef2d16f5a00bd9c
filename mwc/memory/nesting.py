"""A scan with checkpoints: as a scan over segments of its trips, each checkpointed.

With `sizes` (s,) what is kept is the carry every s trips, and what s trips make; with
(s, r) the carry every s trips, every r trips within one segment, and what r trips
make. A size of 1 checkpoints the body alone.

Limits: trips that fill no segment are a checkpointed scan of their own; a scan inside
the body is left as it is.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from mwc.memory.segments import Loop
from passes import _jax
from passes.graph import is_var

Array = Any
Sizes = tuple[int, ...]
Body = Callable[[list[Array], list[Array]], tuple[list[Array], list[Array]]]

# Inside a loop nothing can be merged with the first pass.
_remat = functools.partial(jax.checkpoint, prevent_cse=False)


def nested_scan(eqn: Any, operands: Sequence[Array], sizes: Sizes) -> list[Array]:
    """Evaluates a scan's equation with checkpoints.

    Args:
      eqn: the equation.
      operands: its operands.
      sizes: trips of a segment at each level, outermost first.

    Returns:
      What the scan returns.
    """
    n_consts, n_carry = _jax.scan_layout(eqn)
    body, body_consts = _jax.opened(eqn.params["jaxpr"])
    consts = list(operands[:n_consts])
    carry = list(operands[n_consts : n_consts + n_carry])
    xs = list(operands[n_consts + n_carry :])

    def step(carry: list[Array], xs: list[Array]) -> tuple[list[Array], list[Array]]:
        env = dict(zip(body.constvars, body_consts, strict=True))
        env.update(zip(body.invars, [*consts, *carry, *xs], strict=True))
        evaluate(body.eqns, env)
        out = [read(env, v) for v in body.outvars]
        return out[:n_carry], out[n_carry:]

    length, reverse = eqn.params["length"], eqn.params["reverse"]
    carry, ys = _scan(step, carry, xs, length, reverse, sizes)
    return [*carry, *ys]


def _scan(
    step: Body,
    carry: list[Array],
    xs: list[Array],
    length: int,
    reverse: bool,
    sizes: Sizes,
) -> tuple[list[Array], list[Array]]:
    if not sizes or sizes[0] == 1:
        body = _remat(step) if sizes else step
        return lax.scan(body, carry, xs, length=length, reverse=reverse)
    size = sizes[0]
    whole, rest = divmod(length, size)

    def segment(carry: list[Array], xs: list[Array], length: int = size) -> Any:
        return _scan(step, carry, xs, length, reverse, sizes[1:])

    head = [x[: whole * size].reshape(whole, size, *x.shape[1:]) for x in xs]
    tail = [x[whole * size :] for x in xs]
    outs: dict[str, list[Array]] = {}
    if rest and reverse:
        run = jax.checkpoint(functools.partial(segment, length=rest))
        carry, outs["tail"] = run(carry, tail)
    carry, ys = lax.scan(_remat(segment), carry, head, length=whole, reverse=reverse)
    ys = [y.reshape(whole * size, *y.shape[2:]) for y in ys]
    if rest and not reverse:
        run = jax.checkpoint(functools.partial(segment, length=rest))
        carry, outs["tail"] = run(carry, tail)
    if rest:
        ys = [jnp.concatenate(pair) for pair in zip(ys, outs["tail"], strict=True)]
    return carry, ys


def best_sizes(loop: Loop, levels: int, weight: float) -> Sizes:
    """The sizes that keep fewest bytes when a byte made in a trip counts `weight`."""
    return min(
        _candidates(loop.trips, levels),
        key=lambda sizes: predicted(loop, sizes, weight),
    )


def predicted(loop: Loop, sizes: Sizes, weight: float = 1.0) -> float:
    """Bytes of the carries kept at each level and made in an innermost segment."""
    kept, trips = 0, loop.trips
    for size in sizes:
        kept += math.ceil(trips / size) * loop.carry
        trips = size
    return kept + weight * trips * loop.body


def _candidates(trips: int, levels: int) -> Iterator[Sizes]:
    for size in _sizes(trips):
        if levels == 1:
            yield (size,)
        else:
            yield from ((size, *inner) for inner in _candidates(size, levels - 1))


def _sizes(trips: int) -> list[int]:
    """Segment sizes worth trying: divisors, or a geometric grid if there are few."""
    most = max(1, trips // 2)
    divisors = [s for s in range(1, most + 1) if trips % s == 0]
    steps = range(math.ceil(4 * math.log2(most)) + 1)
    grid = sorted({min(most, round(2 ** (e / 4))) for e in steps})
    return divisors if 2 * len(divisors) >= math.log2(trips) else grid


def evaluate(eqns: Sequence[Any], env: dict[Any, Array]) -> None:
    """Evaluates equations one after another in an environment."""
    for eqn in eqns:
        out = _jax.bind(eqn, [read(env, v) for v in eqn.invars])
        env.update(zip(eqn.outvars, out, strict=True))


def read(env: dict[Any, Array], atom: Any) -> Array:
    """The value of a variable or literal."""
    return env[atom] if is_var(atom) else atom.val
