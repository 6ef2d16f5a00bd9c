"""`RebuiltLoop`: a scan whose steps are swept back and then forward, in loop form.

The first pass keeps each step's bits in stacks. The backward is a loop over all steps
from the last to the first (sweep R: pull, keep a sketch) and one from the first to the
last (sweep V: push, compare, emit gradients, advance), as `mwc.nodes.moonwalk` does for
unrolled stages. A full cotangent is kept every `every` steps, and sweep V goes on from
it, so that rounding grows over `every` steps at most.

Source: DESIGN sections 4 and 5. Limits: one carry with a tangent, no cotangents of
per-step outputs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax

from mwc import _stacks as stacks
from mwc import guard
from mwc._tie import barrier, tie
from mwc.loops import Loop, Sweeps
from mwc.nodes.polish import Claim, gap_of, most_polished, polished
from mwc.nodes.rebuild import Rebuilt
from mwc.stages import DRIFT, Values
from passes import _jax
from passes.graph import Var, astype, is_var, nbytes

Array = Any


@dataclasses.dataclass(frozen=True, eq=False)
class RebuiltLoop(Loop):
    """A scan over a stage that can be rebuilt.

    Attributes:
      one: its body.
      every: steps between two cotangents that are kept.
      exact: whether its products ask for full matrix precision.
      tolerance: the user's own, or None.
    """

    one: Rebuilt | None = None
    every: int = 0
    exact: bool = False
    tolerance: float | None = None

    @property
    def guards(self) -> int:
        """One reading, the worst of all steps."""
        return 1

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
        assert loop.one is not None
        self._rebuilt, self._one = loop, loop.one
        self._place = self.carry_vars.index(self._one.state)

    def pull(
        self, saved: Sequence[Array], cts: Mapping[Var, Array], wanted: Collection[Var]
    ) -> Values:
        """Cotangents of the wanted operands."""
        bits = list(saved)
        eqn = self._rebuilt.eqn
        aval = self._one.result.aval
        h = cts.get(eqn.outvars[self._place])
        h = stacks.zeros(None, aval, self._one.result) if h is None else h
        h = astype(h, self._one.last)
        ask = self.asked(wanted)
        c_vars = [v for v in self.const_vars if v in ask]
        x_vars = [v for v in self.x_vars if v in ask]
        take = guard.sketcher(h, [aval], self._one.found.rows)
        h, marks, ties, stops = self._back(h, bits, take)
        found: Values = {self._one.state: astype(h, self._one.state)}
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

    def _bits(self, bits: Sequence[Array], i: Array) -> list[Array]:
        return [stacks.take(b, self.at(i)) for b in bits]

    def _given(self, i: Array) -> Values:
        """What a step reads besides its carry."""
        values = self.inputs(i, self._init)
        return {v: x for v, x in values.items() if v not in self.carry_vars}

    def _polished(
        self, claims: Sequence[Claim], h: Array, values: Values, bits: Sequence[Array]
    ) -> Values:
        made: Values = {}
        for of in claims:
            stack = self._one.weight(of, values, bits)[None]
            (made[of.var],) = polished(stack, of, gap_of([stack], of, h))
        return made

    def _back(
        self, h: Array, bits: Sequence[Array], take: guard.Sketcher
    ) -> tuple[Array, Array, list[Array], list[Array]]:
        """Sweep R: h before the first step; of all steps sketches, ties, stops."""
        one, loop = self._one, self._rebuilt
        mark = take(h)
        marks = _jax.zeros((loop.length, *mark.shape), mark.dtype, one.result.aval)
        stops = [stacks.zeros(loop.stops, h, one.state)] if loop.stops else []
        counts = sum(inverse.ties for inverse in one.found.inverses)
        pair = _jax.zeros((loop.length, 2), jnp.int32, one.result.aval)
        ties: list[Array] = []
        for _ in range(counts):
            ties += [pair, _jax.zeros((loop.length, 2), h.dtype, one.result.aval)]

        def step(n: Array, state: Any) -> Any:
            h, marks, ties, stops = state
            i = loop.length - 1 - n
            marks = stacks.put(marks, take(h), i)
            h, kept = one.pull(self._given(i), self._bits(bits, i), h)
            ties = [stacks.put(b, x, i) for b, x in zip(ties, kept, strict=True)]
            h, marks, *ties = barrier([h, marks, *ties])
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
        kept: tuple[Sequence[Array], Array, Sequence[Array], Sequence[Array]],
        take: guard.Sketcher,
        c_vars: Sequence[Var],
        x_vars: Sequence[Var],
        wanted: Collection[Var],
    ) -> Values:
        """Sweep V: gradients of constants and per-step inputs, checked."""
        one, loop = self._one, self._rebuilt
        bits, marks, ties, stops = kept
        groups = [self._init, self._consts, self._xs, bits, [marks], ties, stops]
        held = iter(tie([x for group in groups for x in group], h))
        groups = [[next(held) for _ in group] for group in groups]
        self._init, self._consts, self._xs, bits, (marks,), ties, stops = groups
        ask = {*c_vars, *x_vars}
        g_consts = [stacks.zeros(None, v.aval, v) for v in c_vars]
        g_xs = [stacks.zeros(loop.length, v.aval, v) for v in x_vars]
        worst = _jax.zeros((), jnp.float32, one.result.aval)

        once = [of for of in one.claims if one.made_of(of) <= {*self.const_vars}]
        always = dict(zip(self.const_vars, self._consts, strict=True))
        settled = self._polished(once, h, always, self._bits(bits, jnp.int32(0)))
        each = [of for of in one.claims if of not in once]
        large = [of for of in each if nbytes(of.var) > most_polished(one.state)]
        small = [of for of in each if of not in large]

        def step(i: Array, state: Any) -> Any:
            carry, h, worst, g_consts, g_xs = state
            if stops:
                # Not what was rebuilt: rounding starts anew.
                at = jnp.maximum(i // loop.every - 1, 0)
                (h,) = lax.fori_loop(
                    0, self._stop(i), lambda *_: [stacks.take(stops[0], at)], [h]
                )
            values, kept = self.inputs(i, carry), self._bits(bits, i)
            weights = settled | self._polished(small, h, values, kept)
            lost = [stacks.take(t, i) for t in ties]
            times = dict.fromkeys(of.var for of in large)
            known = one.push(values, kept, h, lost, weights, times)
            # Or XLA makes one product of this one and the state's, and copies of both.
            h, values[one.state] = barrier([known[one.last], values[one.state]])
            known[one.last] = h
            seen = guard.reading(stacks.take(marks, i), take(h))
            grads = one.gradients(values, kept, known, ask)
            g_consts = [
                g + grads[v] if v in grads else g
                for g, v in zip(g_consts, c_vars, strict=True)
            ]
            g_xs = [
                stacks.put(b, grads[v], self.at(i)) if v in grads else b
                for b, v in zip(g_xs, x_vars, strict=True)
            ]
            # What the next state is made of waits for the gradients, or both are alive.
            fresh = (one.state, *self.x_vars)
            held = barrier([*(values[v] for v in fresh), *g_consts, *g_xs])
            values.update(zip(fresh, held, strict=False))
            rest = iter(held[len(fresh) :])
            g_consts, g_xs = ([next(rest) for _ in g] for g in (g_consts, g_xs))
            outs = one.stage.results(values, kept)[: len(self._init)]
            # A reading that is NaN stays: jnp.maximum passes it on.
            return outs, h, jnp.maximum(worst, seen), g_consts, g_xs

        state = (self._init, h, worst, g_consts, g_xs)
        _, _, worst, g_consts, g_xs = lax.fori_loop(0, loop.length, step, state)
        limit = guard.tolerance(one.result.aval.dtype, loop.exact, loop.tolerance)
        passes = worst <= limit
        grads = guard.nan_unless(passes, [*g_consts, *g_xs])
        found = dict(zip((*c_vars, *x_vars), grads, strict=True))
        if DRIFT in wanted:
            found[DRIFT] = guard.drift(worst, passes, limit)[None]
        return found
