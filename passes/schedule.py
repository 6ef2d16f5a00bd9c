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

from passes.alike import subchains


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
    chain = _Chain(stages)
    best: tuple[_Table, int] | None = None
    levels, refined = _LEVELS, 0
    while True:
        unit = max(1, math.ceil(top / levels))
        if unit < common:
            unit = math.ceil(common / (common // unit))
        elif refined and top <= _MOST * common:
            unit = common
        table = _Table(chain, unit, math.ceil(top / unit) + 1, store_first)
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
        table = _Table(chain, unit, _LEVELS + 2 * len(stages) + 2, store_first)
        best = table, table.cheapest()
    table, level = best
    return Planned(table.build(level), float(table.costs[level]), level * table.unit)


class _Chain:
    """What the tables of one chain share, whatever their levels.

    Attributes:
      stages: the chain.
      alike: [i, j] the class of sub-chain [i, j); equal ones are of one class.
      first: the first sub-chain of each class; shorter ones have lower classes.
      run: [i] FLOPs of running the stages before i.
      held: [i, k] bytes that keeping the state at k costs while that at i is held.
    """

    def __init__(self, stages: Sequence[Costs]):
        self.stages, count = stages, len(stages)
        # Births are compared by distance, so that equal blocks look equal.
        look = [
            (*dataclasses.astuple(s)[:-1], tuple((b, e - i) for b, e in s.born))
            for i, s in enumerate(stages)
        ]
        self.alike, self.first = subchains(look)
        self.run = np.concatenate([[0.0], np.cumsum([s.forward for s in stages])])
        self.held = np.zeros((count, count + 1), np.int64)
        for b, stage in enumerate(stages):
            for size, last in stage.born:
                self.held[: b + 1, b + 1 : last + 1] += size


class _Table:
    """Least cost of every sub-chain at every memory level."""

    def __init__(self, chain: _Chain, unit: int, levels: int, store_first: bool):
        self.stages, self.unit, self.levels = chain.stages, unit, levels
        self.count = len(chain.stages)
        self._chain, self._store_first = chain, store_first
        self._holds = np.ceil(chain.held / unit).astype(np.int64)
        self._solved = _Rows(len(chain.first), levels)
        for row, (i, j) in enumerate(chain.first):
            self._solved.fill(row, _least(self._options(i, j)))
        # The first pass runs every stage, and may not store where it must not.
        self._spine = _Rows(self.count, levels)
        for i in reversed(range(self.count)):
            self._spine.fill(i, _least(self._options(i, self.count, first=True)))
        self.costs = self._spine.at([0], np.array([0]))[0]

    def _levels(self, size: int) -> int:
        return math.ceil(size / self.unit)

    def _options(self, i: int, j: int, first: bool = False) -> list[np.ndarray]:
        """Costs by level of the choices for [i, j): [leaf], [store], [split, ...]."""
        stage, chain, levels = self.stages[i], self._chain, np.arange(self.levels)
        middles = np.arange(i + 1, j)
        rest = middles if first else chain.alike[i + 1 : j, j]
        right = self._spine if first else self._solved
        local, kept = self._levels(stage.local), self._levels(stage.kept)
        leaf, store = np.full((2, 1, self.levels), np.inf)
        if j == i + 1:
            leaf[:, local:] = stage.leaf + (stage.forward if first else 0.0)
        if self._store_first or not first:
            after = np.where(levels < kept, np.inf, 0.0)
            if len(middles):
                after = right.at(rest[:1], kept + self._holds[i, middles[:1]])[0]
            store[:, local:] = stage.store + after[local:]
        if not len(middles):
            return [leaf, store]
        splits = right.at(rest, self._holds[i, middles])
        splits += self._solved.at(chain.alike[i, middles], 0 * middles)
        splits += (chain.run[middles] - chain.run[i])[:, None]
        return [leaf, store, splits]

    def least(self, limit: float) -> int | None:
        """The lowest level whose cost is within the limit."""
        good = np.flatnonzero((self.costs <= limit) & np.isfinite(self.costs))
        return int(good[0]) if good.size else None

    def cheapest(self) -> int:
        """The lowest level of the lowest cost."""
        return int(self.costs.argmin())

    def build(self, level: int) -> Schedule:
        """The schedule behind a level's cost."""
        return self._build(0, self.count, level, first=True)

    def _build(self, i: int, j: int, level: int, first: bool = False) -> Schedule:
        # Which choice was the cheapest is asked so seldom that it is found again, for
        # the sub-chain that the costs are of: others may differ in rounding.
        a, b = (i, j) if first else self._chain.first[self._chain.alike[i, j]]
        options = self._options(a, b, first)
        pick = int(np.concatenate([o[:, level] for o in options]).argmin())
        if pick == 0:
            return Leaf(i)
        if pick == 1:
            if j == i + 1:
                return Store(i, None)
            after = (
                level - self._levels(self.stages[i].kept) - int(self._holds[i, i + 1])
            )
            return Store(i, self._build(i + 1, j, after, first))
        k = i + pick - 1
        right = self._build(k, j, level - int(self._holds[i, k]), first)
        return Split(i, k, right, self._build(i, k, level))


def _least(options: list[np.ndarray]) -> np.ndarray:
    """The least cost of any choice, by level."""
    return np.minimum.reduce([o.min(axis=0) for o in options])


class _Rows:
    """Costs by memory level, one row each; below level 0 they are infinite."""

    def __init__(self, rows: int, levels: int):
        self._levels = levels
        self._padded = np.full((rows, 2 * levels), np.inf)
        # [row, start] is a view of a whole row of levels: copied as one block.
        self._windows = np.lib.stride_tricks.sliding_window_view(
            self._padded, levels, axis=1
        )

    def fill(self, row: int, costs: np.ndarray) -> None:
        """Sets a row."""
        self._padded[row, self._levels :] = costs

    def at(self, rows: Any, less: np.ndarray) -> np.ndarray:
        """A copy of some rows, each with `less` levels less memory."""
        return self._windows[rows, self._levels - np.minimum(less, self._levels)]
