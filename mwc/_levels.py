"""Levels of `vmap` that a primitive of ours is under, as data.

Batching one of our primitives does not rewrite it: the rule pushes a `Level` on a
stack and binds the same primitive again; whoever evaluates it maps the function
that it stands for. A level says for each input and output where its mapped axis
is, or which of these it is instead (the second row is the transpose of the first,
so that a linear primitive and its transpose share one notation):

    input    axis    SHARED (every lane reads it)     FIRST (lane 0 reads it, others 0)
    output   axis    SHARED's transpose: SUM          FIRST's: lane 0's value

Outputs of a function that is not linear use SHARED for "the same in every lane".
FIRST is what keeps a cotangent from being counted once a lane where a result
does not depend on the mapped inputs.

Limits: what depends on what is found equation by equation, loops being taken as a
whole; an output may be called mapped though it is not, never the other way round.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from passes import _jax

SHARED = "shared"
SUM = "sum"
FIRST = "first"

Place = int | str

_TRANSPOSED = {SHARED: SUM, SUM: SHARED, FIRST: FIRST}


@dataclass(frozen=True)
class Level:
    """One `vmap`: its size, names, and the place of the axis in each value."""

    size: Any
    name: Any
    spmd_name: Any
    ins: tuple[Place, ...]
    outs: tuple[Place, ...]

    def with_places(self, ins: Sequence[Place], outs: Sequence[Place]) -> Level:
        """The same `vmap` around another function."""
        return replace(self, ins=tuple(ins), outs=tuple(outs))


def transposed(place: Place) -> Place:
    """An output's place when it becomes an input of the transpose, and back."""
    return place if isinstance(place, int) else _TRANSPOSED[place]


def places(dims: Sequence[int | None]) -> tuple[Place, ...]:
    """Places of inputs from the axes that a batching rule is given."""
    return tuple(SHARED if dim is None else dim for dim in dims)


def apply(levels: Sequence[Level], fun: Callable[..., list[Any]]) -> Callable:
    """Maps a flat function over all levels, innermost first."""
    for level in levels:
        fun = _mapped(fun, level)
    return fun


def _mapped(fun: Callable[..., list[Any]], level: Level) -> Callable[..., list[Any]]:
    in_axes = [_axis(place, SHARED) for place in level.ins]
    out_axes = [_axis(place, SHARED) for place in level.outs]
    inner = jax.vmap(
        lambda *args: list(fun(*args)),
        in_axes=tuple(in_axes),
        out_axes=out_axes,
        axis_size=level.size,
        axis_name=level.name,
        spmd_axis_name=level.spmd_name,
    )

    def outer(*args: Any) -> list[Any]:
        first = zip(args, level.ins, strict=True)
        outs = inner(
            *(_in_lane_0(x, level.size) if p == FIRST else x for x, p in first)
        )
        last = zip(outs, level.outs, strict=True)
        return [_lane_sum(x, p) for x, p in last]

    return outer


def _axis(place: Place, unmapped: str) -> int | None:
    if isinstance(place, int):
        return place
    return None if place == unmapped else 0


def _in_lane_0(value: Any, size: Any) -> Any:
    padding = [(0, size - 1, 0)] + [(0, 0, 0)] * jnp.ndim(value)
    return lax.pad(value[None], jnp.zeros((), value.dtype), padding)


def _lane_sum(value: Any, place: Place) -> Any:
    if place == SUM:
        return jnp.sum(value, axis=0, dtype=value.dtype)
    # A sum rather than an index, which an axis of size 0 does not have.
    return jnp.sum(value[:1], axis=0, dtype=value.dtype) if place == FIRST else value


class Dependence:
    """Which inputs, and which named axes, each output of a jaxpr depends on.

    Attributes:
      inputs: one bit set an output (bit i for input i).
      names: one set of axis names an output.
    """

    def __init__(self, jaxpr: Any):
        count = len(jaxpr.in_avals)
        found = _spread(jaxpr, [(1 << i, frozenset()) for i in range(count)])
        self.inputs = [bits for bits, _ in found]
        self.names = [names for _, names in found]

    def reached(self, mask: Sequence[bool]) -> list[bool]:
        """The outputs that some input of the mask reaches."""
        bits = as_bits(mask)
        return [bool(own & bits) for own in self.inputs]

    def mapped(self, mask: Sequence[bool], name: Any) -> list[bool]:
        """The outputs that differ between lanes if the inputs of the mask do."""
        by_name = [name is not None and name in names for names in self.names]
        reached = self.reached(mask)
        return [a or b for a, b in zip(reached, by_name, strict=True)]


def as_bits(mask: Sequence[bool]) -> int:
    """A mask as a bit set."""
    return sum(1 << i for i, one in enumerate(mask) if one)


_Facts = tuple[int, frozenset[Any]]


def _spread(jaxpr: Any, facts: list[_Facts]) -> list[_Facts]:
    body, _ = _jax.opened(jaxpr)
    known: dict[Any, _Facts] = dict(zip(body.invars, facts, strict=True))
    nothing: _Facts = (0, frozenset())

    def read(atom: Any) -> _Facts:
        return nothing if isinstance(atom, _jax.Literal) else known.get(atom, nothing)

    for eqn in body.eqns:
        ins = [read(atom) for atom in eqn.invars]
        inner = _jax.call_body(eqn)
        if inner is not None:
            outs = _spread(inner, ins)
        else:
            bits, names = 0, _jax.named_axes(eqn)
            for own_bits, own_names in ins:
                bits, names = bits | own_bits, names | own_names
            outs = [(bits, names)] * len(eqn.outvars)
        known.update(zip(eqn.outvars, outs, strict=True))
    return [read(atom) for atom in body.outvars]
