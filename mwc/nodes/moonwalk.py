"""The `Moonwalk` node: a run of submersive stages, swept back and then forward.

It is one stage to the schedule around it. Its first pass keeps small residuals of every
stage (*bits*) and nothing else. Its backward is two sweeps:

    R   from the last stage to the first: pull the cotangent, keep a sketch of each
    V   from the first stage to the last: with x and h_in of a stage, rebuild h_out
        (`push`), compare sketches, emit the stage's parameter gradients, advance x

so what is alive is one state, one cotangent, the bits and the gradients so far. Where
the stage before the run reads no state (the first layer), it is the run's `lead`: sweep
V starts with its gradients and runs it again, and no state is kept at all. A trip of
the guard turns the gradients of its stage and of all later ones into NaN, those that it
can by way of their state (`passes.nans`): those before it came of cotangents that
passed, and the cotangent of the run's input is sweep R's and always right. Sweep V
stops at the last stage that has a wanted gradient.

Source: DESIGN sections 2, 5 and 7 (where barriers must stand). Limits: no cotangent of
the run may enter or leave between its ends.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from mwc import guard, sketches
from mwc._tie import after, barrier, relay, tie
from mwc.nodes.claims import Group, batches, together
from mwc.nodes.looks import Looks
from mwc.nodes.polish import gap_of, most_polished, polished
from mwc.nodes.rebuild import Rebuilt
from mwc.nodes.shares import Share, shares
from mwc.nodes.steps import Check, Inputs, Steps, back, first, forth, inputs_of
from mwc.stages import DRIFT, Straight, Values, Whole
from passes import _jax
from passes.graph import Graph, Var, astype, nbytes

Array = Any

_MEASURED = 4, 3, 5  # stages whose sketches are compared in one unit, best first


@dataclasses.dataclass(frozen=True, eq=False)
class Moonwalk(Whole):
    """A run of stages whose cotangents are rebuilt.

    Attributes:
      stages: the stages, each reading the result of the one before.
      lead: the stage that makes the first one's state from the program's inputs.
      exact: whether their products ask for full matrix precision.
      tolerance: the user's own, or None.
    """

    stages: tuple[Rebuilt, ...]
    lead: Straight | None
    exact: bool
    tolerance: float | None

    @functools.cached_property
    def straight(self) -> tuple[Straight, ...]:
        """All its stages, the lead included."""
        lead = () if self.lead is None else (self.lead,)
        return (*lead, *(one.stage for one in self.stages))

    @property
    def graph(self) -> Graph:
        """The run as one program."""
        return self._graph

    @functools.cached_property
    def _graph(self) -> Graph:
        bound: set[Var] = set()
        eqns = []
        for eqn in (eqn for stage in self.straight for eqn in stage.graph.eqns):
            # An equation on constants may have a copy in several stages.
            if not bound.issuperset(eqn.outvars):
                eqns.append(eqn)
                bound.update(eqn.outvars)
        reads = dict.fromkeys(v for s in self.straight for v in s.graph.invars)
        invars = tuple(v for v in reads if v not in bound)
        return Graph(invars, (self.stages[-1].result,), tuple(eqns))

    @property
    def entry(self) -> tuple[Var, ...]:
        """What its first stage reads."""
        return self.straight[0].graph.invars

    @property
    def holds(self) -> bool:
        """The sweeps hold back the rest themselves."""
        return True

    @functools.cached_property
    def shares(self) -> tuple[Share, ...]:
        """Where the bits of each stage are kept."""
        bits = [one.stage.bit_vars for one in self.stages]
        return shares(bits, nbytes(self.stages[0].state))

    @property
    def bits(self) -> int:
        """Arrays that the first pass keeps."""
        return self.shares[-1].at.stop

    @property
    def guards(self) -> int:
        """One reading a stage."""
        return len(self.stages)

    @property
    def rows(self) -> int:
        """How many leading axes are those of rows from end to end."""
        return min(s.found.rows for s in self.stages)

    def run(self, values: Values, effects: bool = False) -> None:
        """Binds the results in `values`."""
        for stage in self.straight:
            stage.run(values, effects)

    def first(self, values: Values, store: bool, effects: bool) -> list[Array]:
        """Binds the results in `values` and returns the bits."""
        assert not store, "a run of rebuilt stages is not stored"
        kept: list[Array] = []
        if self.lead is not None:
            self.lead.run(values, effects)
        mate: list[Array] = []
        steps = Steps()
        for i, one in enumerate(self.stages):
            state = values[one.state]
            held = tie([values[v] for v in one.sources], state)
            given = {**self._given(i, held, values), one.state: state}
            result, bits = steps(first, one)(inputs_of(one, given))
            place = self.shares[i].place
            if place == 1:
                bits = [jnp.stack(pair) for pair in zip(mate, bits, strict=True)]
            # Packs now, not when the backward asks for it.
            values[one.result], *bits = barrier([result, *bits])
            mate = bits
            kept += [] if place == 0 else bits
        return kept

    def pull(
        self,
        values: Values,
        saved: Sequence[Array],
        stored: bool,
        cts: Mapping[Var, Array],
        wanted: Collection[Var],
    ) -> Values:
        """Cotangents of those inputs that are in `wanted`."""
        count = len(self.stages)
        last = max((i for i in range(count) if self._asks(i, wanted)), default=-1)
        h = astype(cts[self.stages[-1].result], self.stages[-1].last)
        checked = [one.result.aval for one in self.stages[: last + 1]]
        take = sketches.sketcher(h, checked, self.rows) if checked else None
        looks = self._looks(last)
        h, marks, ties = self._back(values, saved, h, last, take, looks)
        found: Values = {}
        if self.lead is not None:
            # Before sweep V, in which its cotangent would have to stay alive.
            found = self._led(values, h, wanted)
        elif self.stages[0].state in wanted:
            found = {self.stages[0].state: astype(h, self.stages[0].state)}
        if take is not None:
            saved = saved[: self.shares[last].at.stop]
            values, saved, h = self._tied(values, saved, h, found)
            often = looks.times
            more = self._forth(values, saved, h, marks, ties, take, wanted, often)
            found |= _added(found, more)
        return found

    def _led(self, values: Values, h: Array, wanted: Collection[Var]) -> Values:
        """Cotangents of the lead's inputs."""
        assert self.lead is not None
        if not self.lead.chosen(wanted):
            return {}
        state = self.stages[0].state
        return self.lead.pull(values, [], False, {state: astype(h, state)}, wanted)

    def _tied(
        self, values: Values, saved: Sequence[Array], h: Array, found: Values
    ) -> tuple[Values, list[Array], Array]:
        """What sweep V reads, not available before sweep R has ended."""
        if self.lead is not None and found:
            h, *held = barrier([h, *found.values()])
            found.update(zip(found, held, strict=True))
        first = self.entry
        read = dict.fromkeys(v for s in self.straight for v in s.graph.invars)
        names = [v for v in first if v in values]
        others = [v for v in read if v in values and v not in first]
        held = tie([values[v] for v in names], h)
        # A tie may cost a copy: what later stages read is tied when it is their turn.
        later = barrier([h, *(values[v] for v in others), *saved])[1:]
        values = dict(zip([*names, *others], [*held, *later], strict=False))
        if self.lead is not None:
            self.lead.run(values)
        return values, later[len(others) :], h

    def _asks(self, i: int, wanted: Collection[Var]) -> bool:
        """Whether a stage has a wanted gradient besides its state's."""
        one = self.stages[i]
        asked = {v for v, _ in one.stage.chosen(wanted)}
        return bool(asked - {one.state})

    @functools.cached_property
    def _spoils(self) -> bool:
        """Whether states may become NaN: a loop on what is NaN might never end."""
        eqns = (e for one in self.stages for e in one.stage.linear.fwd.eqns)
        return not any(map(_jax.sub_jaxprs, eqns))

    def _waiting(
        self, i: int, values: Values, saved: Sequence[Array], turn: int
    ) -> list[Array]:
        """What a stage must not read before its turn.

        What is made of these alone, such as an orthogonal matrix of its parameters or
        what is unpacked of bits, would be made for all stages at once.

        Args:
          i: the stage.
          values: its inputs.
          saved: what the first pass kept.
          turn: the place of the stage that comes first of those that share an array.
        """
        at, place = self.shares[i]
        bits = saved[at] if place in (None, turn) else []
        return [*(values[v] for v in self.stages[i].sources), *bits]

    def _given(self, i: int, held: Sequence[Array], values: Values) -> Values:
        """The inputs of a stage, its state left out, those that waited from `held`."""
        one = self.stages[i]
        given = {v: values[v] for v in one.stage.graph.invars if v in values}
        given.pop(one.state, None)
        return given | dict(zip(one.sources, held, strict=False))

    def _bits(self, i: int, held: Sequence[Array], saved: list[Array]) -> list[Array]:
        """The bits of a stage, those that waited from `held` and put into `saved`."""
        at, place = self.shares[i]
        if waited := held[len(self.stages[i].sources) :]:
            saved[at] = waited
        return saved[at] if place is None else [x[place] for x in saved[at]]

    @property
    def _most(self) -> int:
        """Bytes of the weights that are polished at once."""
        return most_polished(self.stages[0].state)

    def _refined(self, group: Group) -> bool:
        """Whether it is one weight that is not small beside a state."""
        return len(group) == 1 and nbytes(group[0][1].var) > self._most

    def _groups(self, last: int) -> list[Group]:
        """Weights that are treated at once, of the stages up to `last`."""
        claims = [one.claims for one in self.stages[: last + 1]]
        return together(claims, self._most)

    def _looks(self, last: int) -> Looks:
        """The looks at those that are refined and cost nothing to look at."""
        found = batches(self._groups(last))
        return Looks([b for b in found if self._refined(b[0]) and b[0][0][1].given])

    def _polish(
        self,
        group: Group,
        h: Array,
        values: Values,
        saved: Sequence[Array],
    ) -> dict[int, Values]:
        """What takes the place of the weights of a group, by stage.

        It waits for h, or the compiler would polish all groups first, and keep them.

        Args:
          group: its weights.
          h: the newest cotangent.
          values: the inputs of all stages.
          saved: what the first pass kept.
        """
        sources = [*dict.fromkeys(v for i, _ in group for v in self.stages[i].sources)]
        held = tie([values[v] for v in sources], h)
        values = values | dict(zip(sources, held, strict=True))
        weights = [
            self.stages[i].weight(of, values, self._bits(i, [], [*saved]))
            for i, of in group
        ]
        stack, of = jnp.stack(tie(weights, h)), group[0][1]
        made: dict[int, Values] = {}
        loose = guard.is_loose(self.stages[0].result.aval.dtype, self.tolerance)
        inverses = polished(stack, of, gap_of(stack, of, h, loose))
        for (i, one), weight in zip(group, inverses, strict=True):
            made.setdefault(i, {})[one.var] = weight
        return made

    def _back(
        self,
        values: Values,
        saved: Sequence[Array],
        h: Array,
        last: int,
        take: sketches.Sketcher | None,
        looks: Looks,
    ) -> tuple[Array, list[Array], list[list[Array]]]:
        """Sweep R: the cotangent of the first state; sketches and ties up to `last`."""
        marks: list[Array] = []
        ties: list[list[Array]] = []
        saved = list(saved)
        count = len(self.stages)
        steps = Steps()
        held = tie(self._waiting(count - 1, values, saved, 1), h)
        for i in reversed(range(count)):
            one = self.stages[i]
            given = inputs_of(one, self._given(i, held, values))
            rows = looks.rows(i, one.claims, h)
            at = Inputs(given, self._bits(i, held, saved), h, rows=rows)
            below, mark, kept, rows = steps(back, one)(at, take if i <= last else None)
            looks.passed(i, one.claims, rows)
            waiting = self._waiting(i - 1, values, saved, 1) if i else []
            held = [*waiting, *looks.flying]
            (h, *both), held = relay([below, *mark, *kept], held)
            held, looks.flying = held[: len(waiting)], held[len(waiting) :]
            marks += both[: len(mark)]
            ties += [both[len(mark) :]] if mark else []
        return h, marks[::-1], ties[::-1]

    def _forth(
        self,
        values: Values,
        saved: Sequence[Array],
        h: Array,
        marks: Sequence[Array],
        ties: Sequence[Sequence[Array]],
        take: sketches.Sketcher,
        wanted: Collection[Var],
        often: Mapping[tuple[int, Var], Array],
    ) -> Values:
        """Sweep V: the wanted gradients of parameters, checked."""
        stages = self.stages[: len(marks)]
        found: Values = {}
        turns: dict[int, list[Group]] = {}
        for group in self._groups(len(stages) - 1):
            turns.setdefault(group[0][0], []).append(group)
        weights: dict[int, Values] = {}
        dtype = stages[0].result.aval.dtype
        limit = guard.tolerance(dtype, self.exact, self.tolerance)
        drifts: list[Array] = []
        saved, steps = list(saved), Steps()
        fine = guard.unbroken(marks[0])
        # As many each time, if they can be: fewer are a kernel more.
        count = next((n for n in _MEASURED if len(marks) % n == 0), _MEASURED[0])
        held = tie(self._waiting(0, values, saved, 0), h)
        for i, one in enumerate(stages):
            given = self._given(i, held, values) | {one.state: values.pop(one.state)}
            bits = self._bits(i, held, saved)
            for group in turns.get(i, []):
                if self._refined(group):
                    continue
                for j, made in self._polish(group, h, values, saved).items():
                    weights[j] = weights.get(j, {}) | made
            if i % count == 0:
                unit = guard.unit_of(marks[i : i + count])
            polished = weights.pop(i, {})
            at = Inputs(
                *(inputs_of(one, given), bits, h, ties[i]),
                [polished.get(of.var) for of in one.claims],
                [often.get((i, of.var)) for of in one.claims],
            )
            asked = tuple(v in wanted for v in one.stage.graph.invars)
            more = i + 1 < len(stages)
            check = Check(take, marks[i], limit, unit, fine)
            h, fine, seen, safe, end = steps(forth, one, asked, more, self._spoils)(
                at, check
            )
            if DRIFT in wanted:
                reading = guard.reading(marks[i], seen)
                drifts.append(guard.drift(reading, fine, limit))
            pairs = zip(one.stage.graph.invars, safe, strict=True)
            grads = _added(found, {v: ct for v, ct in pairs if ct is not None})
            ends, waiting = [], []
            if more:
                token = next(iter(grads.values()), h)
                ends = after([end], token)
                waiting = self._waiting(i + 1, values, saved, 0)
            # The gradients leave together with the next state, or XLA puts them off.
            (h, *both), held = relay([h, *grads.values(), *ends], waiting)
            found.update(zip(grads, both, strict=False))
            if ends:
                values[one.result] = both[-1]
        if DRIFT in wanted:
            found[DRIFT] = jnp.stack(drifts)
        return found


def _added(found: Values, more: Values) -> Values:
    """Cotangents of `more`, those of `found` added where both have one."""
    return {v: found[v] + ct if v in found else ct for v, ct in more.items()}
