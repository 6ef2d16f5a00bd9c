"""The `Checkpoint` node: any schedule of keeping, storing and running again.

The forward pass walks the right spine of the schedule: it keeps the states and the
residuals that lie on it, and the bits of every pruned stage. The backward pass walks
the tree. Whatever is run again starts from values tied to the cotangent that is due
(`mwc._tie`), and every stage's gradients leave it together with the next cotangent;
otherwise XLA would merge the passes and nothing would be saved. `Stored` is the
schedule that stores every stage.

Source: `passes.schedule`. Limits: one cotangent a variable is live at a time; the
order of the backward is fixed by the schedule.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import jax.numpy as jnp

from mwc._tie import barrier, tie
from mwc.stages import DRIFT, Stage, Values
from passes.graph import Var
from passes.schedule import Leaf, Schedule, Split, Store
from passes.sizes import has_elements

Array = Any


@dataclasses.dataclass(frozen=True, eq=False)
class Checkpoint:
    """A run of stages with their schedule.

    Attributes:
      stages: the stages in order.
      crossing: for each stage, the variables alive before it that earlier stages
        bind; `values` always has the program's own inputs besides.
      schedule: of all stages, or None of none.
      pinned: results that the first pass keeps whatever the schedule says.
      made_from: for each stage, what it makes large parameter-side values of.
    """

    stages: tuple[Stage, ...]
    crossing: tuple[tuple[Var, ...], ...]
    schedule: Schedule | None
    pinned: tuple[Var, ...] = ()
    made_from: tuple[tuple[Var, ...], ...] = ()

    @functools.cached_property
    def spine(self) -> tuple[frozenset[int], tuple[Var, ...]]:
        """Stages that the first pass stores, and variables that it keeps.

        Each variable is kept once, however many states it belongs to.
        """
        stored: set[int] = set()
        kept: dict[Var, None] = {}
        at = self.schedule
        while at is not None:
            if isinstance(at, Split):
                kept.update(dict.fromkeys(self.crossing[at.start]))
                kept.update(dict.fromkeys(self.crossing[at.middle]))
                at = at.right
            elif isinstance(at, Store):
                stored.add(at.stage)
                names = self.stages[at.stage].names
                kept.update(dict.fromkeys(v for v in names if v in self.bound))
                at = at.rest
            else:
                kept.update(dict.fromkeys(self.crossing[at.stage]))
                at = None
        return frozenset(stored), tuple(dict.fromkeys((*kept, *self.pinned)))

    @functools.cached_property
    def bound(self) -> frozenset[Var]:
        """What the stages bind; everything else is the program's own input."""
        return frozenset(v for s in self.stages for v in s.graph.outvars)

    def forward(self, values: Values, tangents: Collection[Var]) -> list[Array]:
        """Runs all stages, binding their results in `values`.

        Args:
          values: the inputs.
          tangents: the variables through which tangents flow.

        Returns:
          What is saved: the states kept, then for each stage its residuals.
        """
        stored, names = self.spine
        saved: list[Array] = []
        for i, stage in enumerate(self.stages):
            residuals = []
            with self.apart(i, values):
                if self._live(i, tangents):
                    residuals = stage.first(values, store=i in stored, effects=True)
                else:
                    stage.run(values, effects=True)
            if residuals and i not in stored and not stage.holds:
                self._pin(stage, values, residuals)
            saved += residuals
        return [*(values[v] for v in names), *saved]

    @contextlib.contextmanager
    def apart(self, i: int, values: Values) -> Iterator[None]:
        """While stage i runs, what it makes of parameters waits for its state.

        XLA would make it early, and once for all stages, and keep it until then.
        """
        names = self.made_from[i] if self.made_from and self.crossing[i] else ()
        shared = [values[v] for v in names]
        if shared:
            held = barrier([*shared, values[self.crossing[i][0]]])
            values.update(zip(names, held, strict=False))
        yield
        values.update(zip(names, shared, strict=True))

    def _pin(self, stage: Stage, values: Values, residuals: list[Array]) -> None:
        """Packs now: results and residuals leave the stage together."""
        outs = stage.graph.outvars
        both = barrier([*(values[v] for v in outs), *residuals])
        values.update(zip(outs, both, strict=False))
        residuals[:] = both[len(outs) :]

    def _live(self, i: int, tangents: Collection[Var]) -> bool:
        return any(v in tangents for v in self.stages[i].graph.outvars)

    def backward(
        self,
        values: Values,
        saved: Sequence[Array],
        tangents: Collection[Var],
        wanted: Collection[Var],
        cts: Values,
    ) -> None:
        """Pulls cotangents through all stages.

        Args:
          values: the program's own inputs.
          saved: what `forward` saved.
          tangents: as in `forward`.
          wanted: the variables whose cotangents lead to something asked for.
          cts: cotangents of results; extended to every wanted variable.
        """
        stored, names = self.spine
        rest = list(saved)
        states = dict(zip(names, rest, strict=False))
        rest = rest[len(names) :]
        residuals: list[list[Array]] = []
        for i, stage in enumerate(self.stages):
            number = stage.kept if i in stored else stage.bits
            number = number if self._live(i, tangents) else 0
            residuals.append(rest[:number])
            rest = rest[number:]
        values = values | {v: states[v] for v in self.pinned}
        if self.schedule is not None:
            sweep = _Sweep(self, values, states, residuals, wanted, cts)
            sweep.reverse(self.schedule, {}, first=True)
            if DRIFT in wanted:
                cts[DRIFT] = self._drift(sweep.drift)

    def _drift(self, seen: dict[int, Array]) -> Array:
        """The readings of all guards, in the order of stages; 0 where none ran."""
        counts = [stage.guards for stage in self.stages]
        rows = [
            seen[i] if i in seen else jnp.zeros(n, jnp.float32)
            for i, n in enumerate(counts)
        ]
        rows = [
            jnp.pad(row, (0, n - row.shape[0]))
            for row, n in zip(rows, counts, strict=True)
        ]
        return jnp.concatenate(rows) if rows else jnp.zeros(0, jnp.float32)


class _Sweep:
    """One backward pass over a schedule."""

    def __init__(
        self,
        node: Checkpoint,
        values: Values,
        states: Values,
        residuals: list[list[Array]],
        wanted: Collection[Var],
        cts: Values,
    ):
        self._node, self._values, self._wanted = node, values, wanted
        self._states, self._residuals, self._cts = states, residuals, cts
        self._token: Array | None = None
        self.drift: dict[int, Array] = {}
        for ct in cts.values():
            self._note(ct)

    def _note(self, ct: Array) -> None:
        """The newest cotangent is the token that later work waits for."""
        if has_elements(ct.shape):
            self._token = ct

    def reverse(self, at: Schedule, state: Values, first: bool) -> None:
        """Pulls through the stages of a schedule from their input state."""
        if isinstance(at, Split):
            if self._wants(at.middle, at.right):
                middle = (
                    self._pick(self._states, at.middle)
                    if first
                    else self._advance(state, at.start, at.middle)
                )
                self.reverse(at.right, middle, first)
            if first:
                state = self._pick(self._states, at.start)
            self.reverse(at.left, state, first=False)
        elif isinstance(at, Store):
            self._store(at, state, first)
        elif self._due(at.stage):
            if first:
                state = self._pick(self._states, at.stage)
            self._leaf(at.stage, state)

    def _wants(self, start: int, at: Schedule) -> bool:
        """Whether any stage from `start` to the schedule's end leads somewhere."""
        return any(self._due(i) for i in range(start, _stop(at)))

    def _due(self, i: int) -> bool:
        graph = self._node.stages[i].graph
        return any(v in self._wanted for v in graph.invars)

    def _pick(self, source: Values, k: int) -> Values:
        return {v: source[v] for v in self._node.crossing[k]}

    def _tied(
        self, state: Values, start: int, stop: int, pulled: bool = False
    ) -> Values:
        """Inputs for running stages again: not available before the cotangent is.

        A stage that is `pulled` may hold back the rest itself.
        """
        stages = self._node.stages[start:stop]
        reads = (s.entry if pulled and s.holds else s.graph.invars for s in stages)
        read = dict.fromkeys(v for names in reads for v in names)
        own = {v: state[v] for v in read if v in state}
        if not own:
            entry = stages[0].entry
            own = {v: self._values[v] for v in entry if v in self._values}
        held = dict(zip(own, tie([*own.values()], self._token), strict=True))
        return {**self._values, **state, **held, **self._given(read, {**state, **own})}

    def _given(self, read: Iterable[Var], other: Collection[Var]) -> Values:
        """The program's own inputs that are read; not before the cotangent is."""
        given = [v for v in read if v in self._values and v not in other]
        token = [] if self._token is None else [self._token]
        held = barrier([*(self._values[v] for v in given), *token])
        return dict(zip(given, held, strict=False))

    def _advance(self, state: Values, start: int, stop: int) -> Values:
        values = self._tied(state, start, stop)
        for i in range(start, stop):
            stage = self._node.stages[i]
            with self._node.apart(i, values):
                stage.run(values)
            outs = stage.graph.outvars
            values.update(zip(outs, barrier([values[v] for v in outs]), strict=True))
        return self._pick(values, stop)

    def _leaf(self, i: int, state: Values) -> None:
        values = self._tied(state, i, i + 1, pulled=True)
        self._pull(i, values, self._residuals[i], stored=False)

    def _store(self, at: Store, state: Values, first: bool) -> None:
        i = at.stage
        stage = self._node.stages[i]
        after: Values = {}
        if first:
            saved, held = self._residuals[i], self._states
        else:
            held = self._tied(state, i, i + 1)
            saved = stage.first(held, store=True, effects=False)
            if at.rest is not None:
                after = self._pick(held, i + 1)
        held = {v: held[v] for v in stage.names if v in held}
        if at.rest is not None:
            self.reverse(at.rest, after, first)
        if self._due(i):
            again = tie([*held.values(), *saved], self._token)
            given = self._given(stage.graph.invars, held)
            values = self._values | given | dict(zip(held, again, strict=False))
            self._pull(i, values, again[len(held) :], stored=True)

    def _pull(
        self, i: int, values: Values, saved: Sequence[Array], stored: bool
    ) -> None:
        stage = self._node.stages[i]
        outs = stage.graph.outvars
        due = {v: self._cts.pop(v) for v in outs if v in self._cts}
        if not due:
            return
        found = stage.pull(values, saved, stored, due, self._wanted)
        if DRIFT in found:
            self.drift[i] = found.pop(DRIFT)
        for v, ct in found.items():
            found[v] = self._cts[v] + ct if v in self._cts else ct
        passed = [v for v in found if v in self._node.crossing[i]]
        if passed:
            held = barrier(list(found.values()))
            found = dict(zip(found, held, strict=True))
        self._cts.update(found)
        for v in passed:
            self._note(found[v])


def _stop(at: Schedule) -> int:
    """One past the last stage of a schedule."""
    while True:
        if isinstance(at, Split):
            at = at.right
        elif isinstance(at, Store) and at.rest is not None:
            at = at.rest
        else:
            return at.stage + 1


def store_all(count: int, leaves: Collection[int] = ()) -> Schedule | None:
    """The schedule of the `Stored` strategy; `leaves` start from their input."""
    at: Schedule | None = None
    for i in reversed(range(count)):
        if i not in leaves:
            at = Store(i, at)
        else:
            at = Leaf(i) if at is None else Split(i, i + 1, at, Leaf(i))
    return at


__all__ = ["Checkpoint", "Leaf", "store_all"]
