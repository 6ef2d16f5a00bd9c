"""Schedule: which states to keep, which stages to store, what to run again.

A schedule of stages [i, j), whose input is at hand, is one of

- `Leaf(i)`: one stage, its backward from its input and its bits;
- `Store(i, rest)`: run stage i keeping its residuals, then the rest; its backward last;
- `Split(i, k, right, left)`: advance to k keeping the state there, do [k, j), drop
  the state, do [i, k).

`cheapest` finds the one of least cost for every memory level by dynamic programming,
`plan` the one of least memory for a given cost. With equal stages and no `Store` this
is the binomial schedule (Griewank and Walther, "Algorithm 799: revolve", 2000); with
both it is that of Beaumont et al., "Optimal checkpointing for heterogeneous chains"
(2019), except that a state shared by several cuts (a skip) is charged once.

Limits: memory is rounded up to levels; sub-chains that look alike are solved once,
which is what makes deep networks cheap to plan.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Costs:
    """What the schedule needs to know of one stage; bytes and FLOPs.

    Attributes:
      forward: cost of running the stage.
      leaf: cost of its backward from its input, beyond backpropagation's own.
      store: cost of running it with its residuals kept.
      kept: bytes of those residuals, the stage's inputs left out.
      local: bytes that a leaf needs while it runs.
      born: (bytes, last) of each state it binds: needed until before stage `last` + 1.
    """

    forward: float
    leaf: float
    store: float
    kept: int
    local: int
    born: tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True)
class Leaf:
    """The backward of one stage from its input."""

    stage: int


@dataclasses.dataclass(frozen=True)
class Store:
    """One stage run with its residuals kept, then the rest."""

    stage: int
    rest: Schedule | None


@dataclasses.dataclass(frozen=True)
class Split:
    """Advance from `start` to `middle`, keep the state, right part, left part."""

    start: int
    middle: int
    right: Schedule
    left: Schedule


_LEVELS, _MOST = 64, 1024  # memory levels at first, and at most
_REFINED, _MOST_REFINED = 2, 6  # times that the range is narrowed to what was found

Schedule = Leaf | Store | Split


@dataclasses.dataclass(frozen=True)
class Planned:
    """A schedule with what it costs.

    Attributes:
      schedule: the schedule of all stages, or None of none.
      cost: FLOPs of all forward runs, the first included.
      memory: bytes kept or needed at the peak.
    """

    schedule: Schedule | None
    cost: float
    memory: int


def plan(stages: Sequence[Costs], limit: float, store_first: bool = True) -> Planned:
    """The schedule of least memory whose cost is within a limit.

    Args:
      stages: the chain.
      limit: the most FLOPs of all forward runs, the first included.
      store_first: whether the first pass may keep residuals of whole stages.

    Returns:
      The schedule; the cheapest one where none is within the limit.
    """
    if not stages:
        return Planned(None, 0.0, 0)
    top = sum(s.kept + sum(b for b, _ in s.born) for s in stages)
    top += max(s.local for s in stages)
    sizes = sorted(b for s in stages for b, _ in s.born)
    # Rounding up must not swell the state that is kept most often.
    common = max(1, sizes[len(sizes) // 2] if sizes else top)
    top = max(1, top)
    best: tuple[_Table, int] | None = None
    levels, refined = _LEVELS, 0
    while True:
        unit = max(1, math.ceil(top / levels))
        if unit < common:
            unit = math.ceil(common / (common // unit))
        elif refined and top <= _MOST * common:
            unit = common
        table = _Table(stages, unit, math.ceil(top / unit) + 1, store_first)
        level = table.least(limit)
        if level is not None:
            best, top, refined = (table, level), max(1, level * unit), refined + 1
            fine = refined >= _REFINED and unit <= common
            if fine or refined == _MOST_REFINED:
                break
        elif best is None and levels < _MOST:
            levels *= 4  # rounding alone may have put the limit out of reach
        else:
            break
    if best is None:
        # Nothing is within the limit: the cheapest, with room for rounding up.
        unit = math.ceil(top / _LEVELS)
        table = _Table(stages, unit, _LEVELS + 2 * len(stages) + 2, store_first)
        best = table, table.cheapest()
    table, level = best
    return Planned(table.build(level), table.first[0][level], level * table.unit)


class _Table:
    """Least cost of every sub-chain at every memory level."""

    def __init__(
        self, stages: Sequence[Costs], unit: int, levels: int, store_first: bool
    ):
        self.stages, self.unit, self.levels = stages, unit, levels
        self.count = len(stages)
        self._store_first = store_first
        classes: dict[Any, int] = {}
        # Births are compared by distance, so that equal blocks look equal.
        look = [
            (*dataclasses.astuple(s)[:-1], tuple((b, e - i) for b, e in s.born))
            for i, s in enumerate(stages)
        ]
        ids = [classes.setdefault(key, len(classes)) for key in look]
        self._ids = np.array(ids, np.int32)
        self._sum = np.concatenate([[0.0], np.cumsum([s.forward for s in stages])])
        self._holds = [self._held(i) for i in range(self.count)]
        self._solved: dict[bytes, tuple[np.ndarray, np.ndarray]] = {}
        for length in range(1, self.count + 1):
            for i in range(self.count - length + 1):
                self._solve(i, i + length)
        self._spine()

    def _held(self, i: int) -> np.ndarray:
        """Levels that keeping the state at k costs while the one at i is held."""
        held = np.zeros(self.count + 1, np.int64)
        for b in range(i, self.count):
            for size, last in self.stages[b].born:
                held[b + 1 : last + 1] += size
        return np.ceil(held / self.unit).astype(np.int64)

    def _levels(self, size: int) -> int:
        return math.ceil(size / self.unit)

    def _key(self, i: int, j: int) -> bytes:
        return self._ids[i:j].tobytes()

    def _shift(self, costs: np.ndarray, by: np.ndarray) -> np.ndarray:
        """Costs [n, levels] with `by` [n] levels less memory."""
        at = np.arange(self.levels)[None] - by[:, None]
        found = np.take_along_axis(costs, np.maximum(at, 0), axis=1)
        return np.where(at < 0, np.inf, found)

    def _options(self, i: int, j: int, rest: list[np.ndarray]) -> np.ndarray:
        """Costs of the choices [leaf, store, split at i+1, ...] by level.

        `rest[k]` is the cost of [k, j) for k from i+1 on.
        """
        stage, levels = self.stages[i], np.arange(self.levels)
        leaf = np.full(self.levels, np.inf)
        if j == i + 1:
            leaf[levels >= self._levels(stage.local)] = stage.leaf
        kept = self._levels(stage.kept)
        after = rest[0] if rest else np.zeros(self.levels)
        by = np.array([kept + (self._holds[i][i + 1] if rest else 0)])
        store = stage.store + self._shift(after[None], by)[0]
        store[levels < self._levels(stage.local)] = np.inf
        choices = [leaf[None], store[None]]
        if rest:
            middles = np.arange(i + 1, j)
            right = self._shift(np.stack(rest), self._holds[i][middles])
            left = np.stack([self._cost(i, k) for k in range(i + 1, j)])
            moved = (self._sum[middles] - self._sum[i])[:, None]
            choices.append(right + left + moved)
        return np.concatenate(choices)

    def _solve(self, i: int, j: int) -> None:
        key = self._key(i, j)
        if key not in self._solved:
            rest = [self._cost(k, j) for k in range(i + 1, j)]
            options = self._options(i, j, rest)
            pick = options.argmin(axis=0)
            self._solved[key] = np.take_along_axis(options, pick[None], 0)[0], pick

    def _cost(self, i: int, j: int) -> np.ndarray:
        return self._solved[self._key(i, j)][0]

    def _spine(self) -> None:
        """The first pass: it runs every stage, and may not store where it must not."""
        last = self.count
        self.first: dict[int, np.ndarray] = {}
        self._first_pick: dict[int, np.ndarray] = {}
        for i in reversed(range(last)):
            rest = [self.first[k] for k in range(i + 1, last)]
            options = self._options(i, last, rest)
            options[0] += self.stages[i].forward
            if not self._store_first:
                options[1] = np.inf
            pick = options.argmin(axis=0)
            self.first[i] = np.take_along_axis(options, pick[None], 0)[0]
            self._first_pick[i] = pick

    def least(self, limit: float) -> int | None:
        """The lowest level whose cost is within the limit."""
        cost = self.first[0]
        good = np.flatnonzero((cost <= limit) & np.isfinite(cost))
        return int(good[0]) if good.size else None

    def cheapest(self) -> int:
        """The lowest level of the lowest cost."""
        return int(self.first[0].argmin())

    def build(self, level: int) -> Schedule:
        """The schedule behind a level's cost."""
        return self._build_first(0, level)

    def _build_first(self, i: int, level: int) -> Schedule:
        pick = int(self._first_pick[i][level])
        if pick == 0:
            return Leaf(i)
        if pick == 1:
            if i == self.count - 1:
                return Store(i, None)
            after = (
                level - self._levels(self.stages[i].kept) - int(self._holds[i][i + 1])
            )
            return Store(i, self._build_first(i + 1, after))
        k = i + pick - 1
        right = self._build_first(k, level - int(self._holds[i][k]))
        return Split(i, k, right, self._build(i, k, level))

    def _build(self, i: int, j: int, level: int) -> Schedule:
        pick = int(self._solved[self._key(i, j)][1][level])
        if pick == 0:
            return Leaf(i)
        if pick == 1:
            if j == i + 1:
                return Store(i, None)
            after = (
                level - self._levels(self.stages[i].kept) - int(self._holds[i][i + 1])
            )
            return Store(i, self._build(i + 1, j, after))
        k = i + pick - 1
        right = self._build(k, j, level - int(self._holds[i][k]))
        return Split(i, k, right, self._build(i, k, level))
