"""Steps: what the passes do at one stage, made once for all stages alike.

A deep network repeats its layers. What is done at a stage is a function of arrays
alone, and stages with the same derivative have the same: it is traced and lowered
once, and a layer more is a call more.

Limits: XLA inlines calls before it optimizes. Calls that stay (`jax.Inline.XLA_LATE`)
halve the time of the CPU compiler of jaxlib 0.12, but it hangs on some, of layers that
draw random numbers, and they are not partitioned over devices. Metadata of what is
compiled names the first of stages alike for all of them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import jax

from mwc import guard, sketches
from mwc._tie import barrier
from mwc.nodes.polish import through
from mwc.nodes.rebuild import Rebuilt
from mwc.stages import Values

Array = Any
Step = Callable[..., Any]


class Steps:
    """Steps of stages, those that were made for the stages of one trace."""

    def __init__(self) -> None:
        self._made: dict[Hashable, Step] = {}

    def __call__(self, step: Step, one: Rebuilt, *fixed: Any) -> Step:
        """`step` with its stage and what is no array bound.

        Args:
          step: a function of this module.
          one: a stage.
          fixed: hashable arguments after the stage.
        """
        key = step, one.kind, fixed
        if key not in self._made:
            self._made[key] = jax.jit(functools.partial(step, one, *fixed))
        return self._made[key]


class Inputs(NamedTuple):
    """What a sweep has at a stage.

    Attributes:
      given: its inputs in the order of its graph, None for those not at hand.
      bits: its bits.
      h: the newest cotangent.
      ties: what sweep R kept of its ties.
      weights: for each of its claims what takes the place of the weight, if anything.
      times: for each of the others how often it is refined, if that is known.
      rows: for each claim what goes through its weight, if anything.
    """

    given: list[Array | None]
    bits: Sequence[Array]
    h: Array
    ties: Sequence[Array] = ()
    weights: Sequence[Array | None] = ()
    times: Sequence[Array | None] = ()
    rows: Sequence[Array | None] = ()


class Check(NamedTuple):
    """What the guard compares; see `guard.compare`."""

    take: sketches.Sketcher
    expected: Array
    limit: Array | float
    unit: Array
    before: Array


def inputs_of(one: Rebuilt, values: Values) -> list[Array | None]:
    """The inputs of a stage in the order of its graph, from a dict of them."""
    return [values.get(v) for v in one.stage.graph.invars]


def first(one: Rebuilt, given: list[Array | None]) -> tuple[Array, list[Array]]:
    """The first pass: the result and the bits."""
    values = _named(one, given)
    bits = one.stage.first(values, False, False)
    return values[one.result], bits


def back(
    one: Rebuilt, at: Inputs, take: sketches.Sketcher | None
) -> tuple[Array, list[Array], list[Array], list[Array | None]]:
    """Sweep R: h_in; the sketch of h_out and what ties lose, if wanted; the rows."""
    mark = [] if take is None else [take(at.h)]
    values = _named(one, at.given)
    h, ties = one.pull(values, at.bits, at.h, ties=take is not None)
    rows = [
        None if r is None else through(r, one.weight(of, values, at.bits), of)
        for of, r in zip(one.claims, at.rows, strict=False)
    ]
    return h, mark, ties, rows


def forth(
    one: Rebuilt,
    asked: tuple[bool, ...],
    more: bool,
    spoils: bool,
    at: Inputs,
    check: Check,
) -> tuple[Array, Array, Array, list[Array | None], Array | None]:
    """Sweep V: from h_in and the state to h_out and the next state.

    Args:
      one: the stage.
      asked: for each of its inputs whether its gradient is wanted.
      more: whether a stage comes after it.
      spoils: whether its state may become NaN, and those of all stages after it.
      at: its inputs, the state among them.
      check: of h_out.

    Returns:
      h_out, whether it passes, its sketch, the gradients, and the result if there is
      `more`.
    """
    values = _named(one, at.given)
    claimed = [*zip(one.claims, at.weights, at.times, strict=True)]
    weights = {of.var: w for of, w, _ in claimed if w is not None}
    times = {of.var: n for of, w, n in claimed if w is None}
    wanted = [v for v, a in zip(one.stage.graph.invars, asked, strict=True) if a]
    h, grads = one.summed(values, at.bits, at.h, wanted)
    known = one.push(values, at.bits, h, at.ties, weights, times)
    # Or XLA makes one product of this one and the state's, and copies of both.
    h, values[one.state] = barrier([known[one.last], values[one.state]])
    known[one.last] = h
    found = check.take(h)
    passes = guard.compare(check.expected, found, check.limit, check.unit, check.before)
    wanted = [v for v in wanted if v not in grads]
    spoiled = one.spoiled & {*wanted} if spoils else frozenset()
    if spoiled and guard.selects(passes, values[one.state]):
        # In a pass that reads the state anyway: that over a weight's gradient is saved.
        (values[one.state],) = guard.nan_unless(passes, [values[one.state]])
    else:
        spoiled = frozenset()
    made = one.gradients(values, at.bits, known, wanted)
    grads |= {v: ct for v, ct in made.items() if v not in spoiled}
    # Now, not at the end: selected then, each would be kept beside its result.
    safe = dict(zip(grads, guard.nan_unless(passes, [*grads.values()]), strict=True))
    safe |= {v: ct for v, ct in made.items() if v in spoiled}
    result = one.advance(values, at.bits) if more else None
    return h, passes, found, [safe.get(v) for v in one.stage.graph.invars], result


def _named(one: Rebuilt, given: list[Array | None]) -> Values:
    pairs = zip(one.stage.graph.invars, given, strict=True)
    return {v: x for v, x in pairs if x is not None}
