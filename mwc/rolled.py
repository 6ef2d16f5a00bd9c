"""`RebuiltLoop`: a scan whose steps are swept back and then forward, in loop form.

The first pass keeps each step's bits in stacks. The backward is a loop over all steps
from the last to the first (sweep R: pull, keep a sketch) and one from the first to the
last (sweep V: push, compare, emit gradients, advance), as `mwc.nodes.moonwalk` does for
unrolled stages; a step may be several stages. A full cotangent is kept every `every`
steps, and sweep V goes on from it, so that rounding grows over `every` steps at most.

Source: DESIGN sections 4 and 5. Limits: one carry with a tangent, and no other where a
step has several stages; no cotangents of per-step outputs.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax

from mwc import _stacks as stacks
from mwc import guard, sketches
from mwc._tie import barrier, tie
from mwc.loops import Loop, Sweeps
from mwc.nodes.claims import Claim
from mwc.nodes.polish import gap_of, most_polished, polished
from mwc.nodes.rebuild import Rebuilt
from mwc.stages import DRIFT, Straight, Values, Whole
from passes import _jax
from passes.graph import Graph, Var, astype, is_var, nbytes

Array = Any


@dataclasses.dataclass(frozen=True, eq=False)
class Steps(Whole):
    """A loop's body as several stages, each reading the result of the one before.

    Attributes:
      graph: the body.
      stages: the stages; the first reads the carry, the last makes the next one.
    """

    graph: Graph
    stages: tuple[Straight, ...]

    @property
    def bits(self) -> int:
        """Arrays that a step keeps."""
        return sum(stage.bits for stage in self.stages)

    @property
    def guards(self) -> int:
        """Its loop has the guard."""
        return 0

    def run(self, values: Values, effects: bool = False) -> None:
        """Binds the results in `values`."""
        for stage in self.stages:
            stage.run(values, effects)

    def first(self, values: Values, store: bool, effects: bool) -> list[Array]:
        """Binds the results in `values` and returns the bits."""
        assert not store, "steps that are rebuilt are not stored"
        return [x for stage in self.stages for x in stage.first(values, False, effects)]

    def pull(
        self,
        values: Values,
        saved: Sequence[Array],
        stored: bool,
        cts: Mapping[Var, Array],
        wanted: Collection[Var],
    ) -> Values:
        """Its loop sweeps back in another way."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, eq=False)
class RebuiltLoop(Loop):
    """A scan over stages that can be rebuilt.

    Attributes:
      stages: those of a step; `body` is the stage itself where there is one.
      every: steps between two cotangents that are kept.
      exact: whether its products ask for full matrix precision.
      tolerance: the user's own, or None.
    """

    stages: tuple[Rebuilt, ...] = ()
    every: int = 0
    exact: bool = False
    tolerance: float | None = None

    @property
    def guards(self) -> int:
        """One reading, the worst of all steps."""
        return 1

    @property
    def bit_vars(self) -> tuple[Var, ...]:
        """What every step of the first pass keeps, in variables of derivatives."""
        return tuple(v for one in self.stages for v in one.stage.bit_vars)

    @property
    def stops(self) -> int:
        """Cotangents that are kept on the way."""
        return (self.length - 1) // self.every

    def sweeps(self, values: Values) -> Sweeps:
        """Sweeps R and V."""
        return _Rebuilding(self, values)


class _Rebuilding(Sweeps):
    """Sweeps R and V as loops."""

    def __init__(self, loop: RebuiltLoop, values: Values):
        super().__init__(loop, values)
        self._rebuilt, self._stages = loop, loop.stages
        self._state, self._result = loop.stages[0].state, loop.stages[-1].result
        self._place = self.carry_vars.index(self._state)

    def pull(
        self, saved: Sequence[Array], cts: Mapping[Var, Array], wanted: Collection[Var]
    ) -> Values:
        """Cotangents of the wanted operands."""
        bits = list(saved)
        eqn = self._rebuilt.eqn
        h = cts.get(eqn.outvars[self._place])
        h = stacks.zeros(None, self._result.aval, self._result) if h is None else h
        h = astype(h, self._stages[-1].last)
        ask = self.asked(wanted)
        c_vars = [v for v in self.const_vars if v in ask]
        x_vars = [v for v in self.x_vars if v in ask]
        results = [one.result.aval for one in self._stages]
        rows = min(one.found.rows for one in self._stages)
        take = sketches.sketcher(h, results, rows)
        h, marks, ties, stops = self._back(h, bits, take)
        found: Values = {self._state: astype(h, self._state)}
        if c_vars or x_vars:
            held = (bits, marks, ties, stops)
            found |= self._forth(h, held, take, c_vars, x_vars, wanted)
        operand = dict(zip(self._body.graph.invars, eqn.invars, strict=True))
        given: Values = {DRIFT: found.pop(DRIFT)} if DRIFT in found else {}
        for v, ct in found.items():
            outer = operand[v]
            if is_var(outer) and outer in wanted:
                given[outer] = given[outer] + ct if outer in given else ct
        return given

    def _each(self, rows: Sequence[Array], counts: Sequence[int]) -> list[list[Array]]:
        """What belongs to each stage, of which each has so many."""
        given = iter(rows)
        return [[*itertools.islice(given, n)] for n in counts]

    def _bits(self, bits: Sequence[Array], i: Array) -> list[list[Array]]:
        """Those of a step, by stage."""
        rows = [stacks.take(b, self.at(i)) for b in bits]
        return self._each(rows, [one.stage.bits for one in self._stages])

    @property
    def _ties(self) -> list[int]:
        """Arrays that each stage keeps of its ties."""
        found = [one.found.inverses for one in self._stages]
        return [2 * sum(inverse.ties for inverse in some) for some in found]

    def _given(self, i: Array) -> Values:
        """What a step reads besides its carry."""
        values = self.inputs(i, self._init)
        return {v: x for v, x in values.items() if v not in self.carry_vars}

    def _polished(
        self,
        one: Rebuilt,
        claims: Sequence[Claim],
        h: Array,
        values: Values,
        bits: Sequence[Array],
    ) -> Values:
        made: Values = {}
        loose = guard.is_loose(self._result.aval.dtype, self._rebuilt.tolerance)
        for of in claims:
            stack = one.weight(of, values, bits)[None]
            (made[of.var],) = polished(stack, of, gap_of(stack, of, h, loose))
        return made

    def _back(
        self, h: Array, bits: Sequence[Array], take: sketches.Sketcher
    ) -> tuple[Array, list[Array], list[Array], list[Array]]:
        """Sweep R: h before the first step; of all steps sketches, ties, stops."""
        loop, result = self._rebuilt, self._result.aval
        marks: list[Array] = []
        for one in self._stages:
            mark = take(stacks.zeros(None, one.last.aval, one.result))
            shape = loop.length, *mark.shape
            marks.append(_jax.zeros(shape, mark.dtype, one.result.aval))
        stops = [stacks.zeros(loop.stops, h, self._state)] if loop.stops else []
        pair = _jax.zeros((loop.length, 2), jnp.int32, result)
        ties: list[Array] = []
        for _ in range(sum(self._ties) // 2):
            ties += [pair, _jax.zeros((loop.length, 2), h.dtype, result)]

        def step(n: Array, state: Any) -> Any:
            h, marks, ties, stops = state
            i = loop.length - 1 - n
            given, every, kept = self._given(i), self._bits(bits, i), []
            marks = list(marks)
            for j, one in reversed([*enumerate(self._stages)]):
                marks[j] = stacks.put(marks[j], take(h), i)
                h, lost = one.pull(given, every[j], h)
                h, marks[j], *lost = barrier([h, marks[j], *lost])
                kept = [*lost, *kept]
            ties = [stacks.put(b, x, i) for b, x in zip(ties, kept, strict=True)]
            h = astype(h, self._stages[-1].last)
            if stops:

                def write(_: Array, kept: list[Array]) -> list[Array]:
                    return [stacks.put(kept[0], h, i // loop.every - 1)]

                stops = lax.fori_loop(0, self._stop(i), write, stops)
            return h, marks, ties, stops

        return lax.fori_loop(0, loop.length, step, (h, marks, ties, stops))

    def _stop(self, i: Array) -> Array:
        """One where a cotangent is kept before a step, or zero.

        It is the trips of a loop: a conditional would copy what it writes to.
        """
        return ((i % self._rebuilt.every == 0) & (i > 0)).astype(jnp.int32)

    def _forth(
        self,
        h: Array,
        kept: tuple[Sequence[Array], Sequence[Array], Sequence[Array], Sequence[Array]],
        take: sketches.Sketcher,
        c_vars: Sequence[Var],
        x_vars: Sequence[Var],
        wanted: Collection[Var],
    ) -> Values:
        """Sweep V: gradients of constants and per-step inputs, checked."""
        loop, last, asked = self._rebuilt, self._stages[-1], [*c_vars, *x_vars]
        groups = [self._init, self._consts, self._xs, *kept]
        held = iter(tie([x for group in groups for x in group], h))
        groups = [[next(held) for _ in group] for group in groups]
        self._init, self._consts, self._xs, bits, marks, ties, stops = groups
        g_consts = [stacks.zeros(None, v.aval, v) for v in c_vars]
        g_xs = [stacks.zeros(loop.length, v.aval, v) for v in x_vars]
        worst = _jax.zeros((), jnp.float32, last.result.aval)
        always = dict(zip(self.const_vars, self._consts, strict=True))
        first = self._bits(bits, jnp.int32(0))
        settled: list[Values] = []
        for one, some in zip(self._stages, first, strict=True):
            once = [of for of in one.claims if one.made_of(of) <= {*self.const_vars}]
            settled.append(self._polished(one, once, h, always, some))

        def step(i: Array, state: Any) -> Any:
            carry, h, worst, g_consts, g_xs = state
            if stops:
                # Not what was rebuilt: rounding starts anew.
                at = jnp.maximum(i // loop.every - 1, 0)
                (h,) = lax.fori_loop(
                    0, self._stop(i), lambda *_: [stacks.take(stops[0], at)], [h]
                )
            values, every = self.inputs(i, carry), self._bits(bits, i)
            lost = self._each([stacks.take(t, i) for t in ties], self._ties)
            for j, one in enumerate(self._stages):
                weights, times = self._weights(one, settled[j], h, values, every[j])
                h, grads = one.summed(values, every[j], h, asked)
                known = one.push(values, every[j], h, lost[j], weights, times)
                # Or XLA makes one product of this one and the state's, and copies.
                h, values[one.state] = barrier([known[one.last], values[one.state]])
                known[one.last] = h
                # A reading that is NaN stays: jnp.maximum passes it on.
                seen = guard.reading(stacks.take(marks[j], i), take(h))
                worst = jnp.maximum(worst, seen)
                others = [v for v in asked if v not in grads]
                grads |= one.gradients(values, every[j], known, others)
                g_consts = [
                    g + grads[v] if v in grads else g
                    for g, v in zip(g_consts, c_vars, strict=True)
                ]
                g_xs = [
                    self._added(b, grads[v], i, v, j) if v in grads else b
                    for b, v in zip(g_xs, x_vars, strict=True)
                ]
                # What the next state is made of waits for the gradients and for the
                # reading, or what they are made of is alive as well.
                fresh = (one.state, *self.x_vars)
                held = [*(values[v] for v in fresh), worst, *g_consts, *g_xs]
                held = barrier(held)
                values.update(zip(fresh, held, strict=False))
                worst, *rest = held[len(fresh) :]
                rest = iter(rest)
                g_consts, g_xs = ([next(rest) for _ in g] for g in (g_consts, g_xs))
                if one is not last:
                    values[one.result] = one.advance(values, every[j])
            outs = last.stage.results(values, every[-1])[: len(self._init)]
            return outs, astype(h, last.last), worst, g_consts, g_xs

        state = (self._init, h, worst, g_consts, g_xs)
        _, _, worst, g_consts, g_xs = lax.fori_loop(0, loop.length, step, state)
        limit = guard.tolerance(last.result.aval.dtype, loop.exact, loop.tolerance)
        passes = worst <= limit
        grads = guard.nan_unless(passes, [*g_consts, *g_xs])
        found = dict(zip((*c_vars, *x_vars), grads, strict=True))
        if DRIFT in wanted:
            found[DRIFT] = guard.drift(worst, passes, limit)[None]
        return found

    def _weights(
        self,
        one: Rebuilt,
        settled: Values,
        h: Array,
        values: Values,
        bits: Sequence[Array],
    ) -> tuple[Values, dict[Var, None]]:
        """Weights polished, and those whose products are refined instead."""
        most = most_polished(one.state)
        each = [of for of in one.claims if of.var not in settled]
        small = [of for of in each if nbytes(of.var) <= most]
        made = self._polished(one, small, h, values, bits)
        return settled | made, dict.fromkeys(of.var for of in each if of not in small)

    def _added(self, stack: Array, grad: Array, i: Array, v: Var, j: int) -> Array:
        """The gradients of a per-step input with that of a stage."""
        at, before = self.at(i), self._stages[:j]
        if any(v in one.stage.graph.invars for one in before):
            grad = grad + stacks.take(stack, at)
        return stacks.put(stack, grad, at)
