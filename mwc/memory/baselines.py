"""The best that `jax.checkpoint` does with a function in which nothing is marked.

The user's function is traced once and evaluated in pieces under `jax.checkpoint`:

- *one level*: contiguous segments of equations; a long scan becomes a scan over
  segments of its trips, each a checkpointed scan (`mwc.memory.nesting`).
- *two levels*: the same within each segment of a coarser cut, and a scan of segments
  of segments.

What is searched: the cuts with the lowest peak by byte counts (`mwc.memory.segments`),
under several weights for what a segment makes, and the sizes of a scan's segments.
Both start at the value that the byte counts favour and go on to the neighbours of what
has the fewest compiled temporary bytes, for at most `tries` compilations a level. A
person who places checkpoints by hand may find better in a program of unlike parts.

Limits: a scan inside a scan's body is not cut; `while` and `cond` are one equation.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax

from mwc.memory import segments
from mwc.memory.nesting import Sizes, best_sizes, evaluate, nested_scan, read
from passes import _jax
from passes.graph import Graph, is_var
from passes.inline import inline

Array = Any
Flat = Callable[..., list[Array]]
Cuts = tuple[int, ...]

# How much more or less a byte made within a segment may count than estimated.
_WEIGHTS = tuple(2 ** (e / 2) for e in range(-4, 5))

# Sizes that differ by less are the same plateau of the search.
_EQUAL = 1.01


@dataclasses.dataclass(frozen=True)
class Layout:
    """One way to place checkpoints.

    Attributes:
      outer: positions of the cuts, the two ends included.
      inner: the finer cuts of two levels; equal to `outer` for one.
      sizes: for each long scan, the trips of its segments (`mwc.memory.nesting`).
      levels: 1 or 2.
    """

    outer: Cuts
    inner: Cuts
    sizes: tuple[Sizes, ...]
    levels: int

    def __str__(self) -> str:
        parts = []
        if len(self.outer) > 2 or not self.sizes:
            parts.append(f"{len(self.outer) - 1} segments")
        if self.levels == 2 and len(self.inner) > len(self.outer):
            parts.append(f"{len(self.inner) - 1} within them")
        parts += ["scan by " + " of ".join(map(str, sizes)) for sizes in self.sizes]
        return "; ".join(parts)


class Checkpointed:
    """The checkpointed forms of one traced function.

    Args:
      fun: the undecorated function, from flat arrays to a list of flat arrays.
      specs: its arguments' `ShapeDtypeStruct`s.

    Attributes:
      graph: the function without calls.
      costs: its byte counts.
    """

    def __init__(self, fun: Flat, specs: Sequence[Any]):
        traced = jax.jit(fun).trace(*specs)
        self._consts = _jax.captured(traced)
        graph = inline(_jax.hoisted(traced))
        self.graph: Graph = graph
        self.costs = segments.costs(graph)

    def fun(self, layout: Layout) -> Flat:
        """The function with its checkpoints placed."""

        def checkpointed(*args: Array) -> list[Array]:
            values = [*self._consts, *args]
            env = dict(zip(self.graph.invars, values, strict=True))
            for start, stop in itertools.pairwise(layout.outer):
                self._segment(layout, start, stop, env)
            return [read(env, v) for v in self.graph.outvars]

        return checkpointed

    def layouts(self, levels: int) -> tuple[list[list[Layout]], tuple[int, int]]:
        """The layouts to search, a grid of (cut, scan) settings, and where to start.

        The cuts come from few segments to many.
        """
        weighed = [self._cuts(levels, weight) for weight in _WEIGHTS]
        cuts = _distinct(weighed)
        sized = [self._sizes(levels, weight) for weight in _WEIGHTS]
        scans = _distinct(sized)
        grid = [[Layout(c[0], c[1], t, levels) for t in scans] for c in cuts]
        start = _WEIGHTS.index(1.0)
        return grid, (cuts.index(weighed[start]), scans.index(sized[start]))

    def _cuts(self, levels: int, weight: float) -> tuple[Cuts, Cuts]:
        """The best outer and inner cuts when a byte made counts `weight`."""
        known = self.costs
        if levels == 1:
            outer = segments.lowest(known, weight)
            return outer, outer
        pairs = [(segments.lowest(known, weight, inner), inner) for inner in self._fine]
        return min(pairs, key=lambda p: segments.predicted(known, weight, *p))

    @functools.cached_property
    def _fine(self) -> list[Cuts]:
        counts = [round(2 ** (e / 2)) for e in range(4, 17)]
        return _distinct([segments.even(self.costs, k) for k in counts])

    def _sizes(self, levels: int, weight: float) -> tuple[Sizes, ...]:
        """The best sizes of each long scan's segments, likewise."""
        loops = self.costs.loops
        return tuple(best_sizes(loop, levels, weight) for loop in loops)

    def _segment(
        self, layout: Layout, start: int, stop: int, env: dict[Any, Array]
    ) -> None:
        """Evaluates the equations of one segment under a checkpoint."""
        loops = {loop.index: s for loop, s in self._loops(layout)}
        eqns = self.graph.eqns[start:stop]
        if stop - start == 1 and start in loops:
            operands = [read(env, v) for v in eqns[0].invars]
            out = nested_scan(eqns[0], operands, loops[start])
            env.update(zip(eqns[0].outvars, out, strict=True))
            return
        reads, writes = self._interface(start, stop)

        def run(*values: Array) -> list[Array]:
            local = dict(zip(reads, values, strict=True))
            for low, high in _nested(layout, start, stop):
                if (low, high) == (start, stop):
                    evaluate(eqns, local)
                else:
                    self._segment(_flat(layout), low, high, local)
            return [local[v] for v in writes]

        out = jax.checkpoint(run)(*(env[v] for v in reads))
        env.update(zip(writes, out, strict=True))

    def _loops(self, layout: Layout) -> Sequence[tuple[segments.Loop, Sizes]]:
        return list(zip(self.costs.loops, layout.sizes, strict=True))

    def _interface(self, start: int, stop: int) -> tuple[list[Any], list[Any]]:
        """The variables that a segment reads from outside and others read from it."""
        graph = self.graph
        made = [v for eqn in graph.eqns[start:stop] for v in eqn.outvars]
        own = set(made)
        read = [v for eqn in graph.eqns[start:stop] for v in eqn.invars if is_var(v)]
        reads = list(dict.fromkeys(v for v in read if v not in own))
        last = self._last_use
        writes = [v for v in made if last.get(v, -1) >= stop]
        return reads, writes

    @functools.cached_property
    def _last_use(self) -> dict[Any, int]:
        graph = self.graph
        last: dict[Any, int] = {}
        for i, eqn in enumerate(graph.eqns):
            last.update((v, i) for v in eqn.invars if is_var(v))
        last.update((v, len(graph.eqns)) for v in graph.outvars if is_var(v))
        return last


def search(
    form: Checkpointed,
    levels: int,
    compiled: Callable[[Flat], dict[str, Any]],
    tries: int = 6,
) -> tuple[Layout, dict[str, Any]]:
    """The layout with the smallest compiled temporary bytes.

    Args:
      form: the function.
      levels: 1 or 2.
      compiled: compiles the gradient of a checkpointed form; gives its figures.
      tries: most compilations.

    Returns:
      The layout and its figures.
    """
    grid, place = form.layouts(levels)
    found: dict[tuple[int, int], dict[str, Any]] = {
        place: compiled(form.fun(_at(grid, place)))
    }
    while len(found) < tries:
        # Among equals every one is a place to go on from: plateaus are common.
        best = min(figures["temp_bytes"] for figures in found.values())
        fronts = [
            at
            for at, figures in found.items()
            if figures["temp_bytes"] <= _EQUAL * best
        ]
        steps = [
            (at[0] + down, at[1] + right)
            for at in fronts
            for down, right in ((0, 1), (0, -1), (1, 0), (-1, 0))
        ]
        fresh = [
            at
            for at in steps
            if at not in found
            and at[0] in range(len(grid))
            and at[1] in range(len(grid[0]))
        ]
        if not fresh:
            break
        found[fresh[0]] = compiled(form.fun(_at(grid, fresh[0])))
    place = min(found, key=lambda at: found[at]["temp_bytes"])
    return _at(grid, place), found[place]


def _at(grid: list[list[Layout]], place: tuple[int, int]) -> Layout:
    return grid[place[0]][place[1]]


def _nested(layout: Layout, start: int, stop: int) -> list[tuple[int, int]]:
    """The pieces of a segment: itself, or those of the finer cut."""
    if layout.levels == 1:
        return [(start, stop)]
    points = [p for p in layout.inner if start <= p <= stop]
    return list(itertools.pairwise(points))


def _flat(layout: Layout) -> Layout:
    return dataclasses.replace(layout, levels=1)


def _distinct(items: list[Any]) -> list[Any]:
    return list(dict.fromkeys(items))
