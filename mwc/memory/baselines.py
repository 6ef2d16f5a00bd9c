"""The best that `jax.checkpoint` does with a function in which nothing is marked.

The user's function is traced once and evaluated in pieces under `jax.checkpoint`:

- *one level*: contiguous segments of equations; a long scan becomes a scan over
  segments of its trips, each a checkpointed scan, or a scan whose body is
  checkpointed, whichever is smaller.
- *two levels*: the same within each segment of a coarser cut; in a long scan the body
  of the inner scan is checkpointed as well.

What is searched: the cuts with the lowest peak by byte counts (`mwc.memory.segments`),
under several weights for what a segment makes, and the length of a scan's segments.
Both start at the value that the byte counts favour and go on to the neighbours of what
has the fewest compiled temporary bytes, for at most `tries` compilations a level. A
person who places checkpoints by hand may find better in a program of unlike parts.

Limits: a scan inside a scan's body is not cut; `while` and `cond` are one equation.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from mwc.memory import segments
from passes import _jax
from passes.graph import Graph, is_var
from passes.inline import inline

Array = Any
Flat = Callable[..., list[Array]]
Cuts = tuple[int, ...]

# How much more or less a byte made within a segment may count than estimated.
_WEIGHTS = tuple(2 ** (e / 2) for e in range(-4, 5))


@dataclasses.dataclass(frozen=True)
class Layout:
    """One way to place checkpoints.

    Attributes:
      outer: positions of the cuts, the two ends included.
      inner: the finer cuts of two levels; equal to `outer` for one.
      trips: for each long scan, the trips of a segment; 1 checkpoints the body alone.
      levels: 1 or 2.
    """

    outer: Cuts
    inner: Cuts
    trips: tuple[int, ...]
    levels: int

    def __str__(self) -> str:
        parts = []
        if len(self.outer) > 2 or not self.trips:
            parts.append(f"{len(self.outer) - 1} segments")
        if self.levels == 2 and len(self.inner) > len(self.outer):
            parts.append(f"{len(self.inner) - 1} within them")
        if self.trips:
            parts.append("scans by " + ", ".join(map(str, self.trips)))
        return "; ".join(parts)


class Checkpointed:
    """The checkpointed forms of one traced function.

    Args:
      fun: the undecorated function, from flat arrays to a list of flat arrays.
      specs: its arguments' `ShapeDtypeStruct`s.
    """

    def __init__(self, fun: Flat, specs: Sequence[Any]):
        traced = jax.jit(fun).trace(*specs)
        self._consts = _jax.captured(traced)
        graph = inline(_jax.hoisted(traced))
        self._graph: Graph = graph
        self._costs = segments.costs(graph)

    def fun(self, layout: Layout) -> Flat:
        """The function with its checkpoints placed."""

        def checkpointed(*args: Array) -> list[Array]:
            values = [*self._consts, *args]
            env = dict(zip(self._graph.invars, values, strict=True))
            for start, stop in itertools.pairwise(layout.outer):
                self._segment(layout, start, stop, env)
            return [_read(env, v) for v in self._graph.outvars]

        return checkpointed

    def layouts(self, levels: int) -> tuple[list[list[Layout]], tuple[int, int]]:
        """The layouts to search, a grid of (cut, scan) settings, and where to start.

        The cuts come from few segments to many.
        """
        weighed = [self._cuts(levels, weight) for weight in _WEIGHTS]
        cuts = _distinct(weighed)
        scans = _distinct(self._trips(levels))
        grid = [[Layout(c[0], c[1], t, levels) for t in scans] for c in cuts]
        loops = [self._predicted_trips(levels, t) for t in scans]
        start = cuts.index(weighed[_WEIGHTS.index(1.0)])
        return grid, (start, loops.index(min(loops)))

    def _cuts(self, levels: int, weight: float) -> tuple[Cuts, Cuts]:
        """The best outer and inner cuts when a byte made counts `weight`."""
        known = self._costs
        if levels == 1:
            outer = segments.lowest(known, weight)
            return outer, outer
        pairs = [(segments.lowest(known, weight, inner), inner) for inner in self._fine]
        return min(pairs, key=lambda p: segments.predicted(known, weight, *p))

    @functools.cached_property
    def _fine(self) -> list[Cuts]:
        counts = [round(2 ** (e / 2)) for e in range(4, 17)]
        return _distinct([segments.even(self._costs, k) for k in counts])

    def _trips(self, levels: int) -> list[tuple[int, ...]]:
        loops = self._costs.loops
        if not loops:
            return [()]
        scales = [2 ** (e / 2) for e in range(-6, 7)]
        found = [
            tuple(_segment_trips(loop, levels, scale) for loop in loops)
            for scale in scales
        ]
        ones = [tuple(1 for _ in loops)] if levels == 1 else []
        return [*ones, *found]

    def _predicted_trips(self, levels: int, trips: tuple[int, ...]) -> float:
        pairs = zip(self._costs.loops, trips, strict=True)
        return sum(_predicted_loop(loop, levels, s) for loop, s in pairs)

    def _segment(
        self, layout: Layout, start: int, stop: int, env: dict[Any, Array]
    ) -> None:
        """Evaluates the equations of one segment under a checkpoint."""
        loops = {loop.index: s for loop, s in self._loops(layout)}
        eqns = self._graph.eqns[start:stop]
        if stop - start == 1 and start in loops:
            operands = [_read(env, v) for v in eqns[0].invars]
            out = nested_scan(eqns[0], operands, loops[start], layout.levels)
            env.update(zip(eqns[0].outvars, out, strict=True))
            return
        reads, writes = self._interface(start, stop)

        def run(*values: Array) -> list[Array]:
            local = dict(zip(reads, values, strict=True))
            for low, high in _nested(layout, start, stop):
                if (low, high) == (start, stop):
                    _evaluate(eqns, local)
                else:
                    self._segment(_flat(layout), low, high, local)
            return [local[v] for v in writes]

        out = jax.checkpoint(run)(*(env[v] for v in reads))
        env.update(zip(writes, out, strict=True))

    def _loops(self, layout: Layout) -> Sequence[tuple[segments.Loop, int]]:
        return list(zip(self._costs.loops, layout.trips, strict=True))

    def _interface(self, start: int, stop: int) -> tuple[list[Any], list[Any]]:
        """The variables that a segment reads from outside and others read from it."""
        graph = self._graph
        made = [v for eqn in graph.eqns[start:stop] for v in eqn.outvars]
        own = set(made)
        read = [v for eqn in graph.eqns[start:stop] for v in eqn.invars if is_var(v)]
        reads = list(dict.fromkeys(v for v in read if v not in own))
        last = self._last_use
        writes = [v for v in made if last.get(v, -1) >= stop]
        return reads, writes

    @functools.cached_property
    def _last_use(self) -> dict[Any, int]:
        graph = self._graph
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
        fronts = [at for at, figures in found.items() if figures["temp_bytes"] == best]
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


def nested_scan(
    eqn: Any, operands: Sequence[Array], trips: int, levels: int
) -> list[Array]:
    """A scan over segments of `trips` trips, each a checkpointed scan.

    Trips that fill no segment are a checkpointed scan of their own. With one trip a
    segment, the body is checkpointed and the loop is left as it is.

    Args:
      eqn: the scan's equation.
      operands: its operands.
      trips: trips of a segment.
      levels: 2 checkpoints the body of the inner scan as well.

    Returns:
      What the scan returns.
    """
    n_consts, n_carry = _jax.scan_layout(eqn)
    total, reverse = eqn.params["length"], eqn.params["reverse"]
    body, body_consts = _jax.opened(eqn.params["jaxpr"])
    consts = list(operands[:n_consts])
    carry = list(operands[n_consts : n_consts + n_carry])
    xs = list(operands[n_consts + n_carry :])

    def step(carry: list[Array], xs: list[Array]) -> tuple[list[Array], list[Array]]:
        env = dict(zip(body.constvars, body_consts, strict=True))
        env.update(zip(body.invars, [*consts, *carry, *xs], strict=True))
        _evaluate(body.eqns, env)
        out = [_read(env, v) for v in body.outvars]
        return out[:n_carry], out[n_carry:]

    # Inside a loop nothing can be merged with the first pass.
    remat = functools.partial(jax.checkpoint, prevent_cse=False)
    if trips == 1:
        carry, ys = lax.scan(remat(step), carry, xs, length=total, reverse=reverse)
        return [*carry, *ys]
    inner_step = remat(step) if levels == 2 else step

    def run(carry: list[Array], xs: list[Array], length: int) -> Any:
        return lax.scan(inner_step, carry, xs, length=length, reverse=reverse)

    whole, rest = divmod(total, trips)
    head = [x[: whole * trips].reshape(whole, trips, *x.shape[1:]) for x in xs]
    tail = [x[whole * trips :] for x in xs]
    parts: dict[str, list[Array]] = {}
    for part in ("tail", "head") if reverse else ("head", "tail"):
        if part == "head":
            segment = remat(functools.partial(run, length=trips))
            carry, ys = lax.scan(segment, carry, head, length=whole, reverse=reverse)
            ys = [y.reshape(whole * trips, *y.shape[2:]) for y in ys]
        elif rest:
            carry, ys = jax.checkpoint(functools.partial(run, length=rest))(carry, tail)
        else:
            continue
        parts[part] = ys
    if rest:
        ys = [
            jnp.concatenate(p) for p in zip(parts["head"], parts["tail"], strict=True)
        ]
        return [*carry, *ys]
    return [*carry, *parts["head"]]


def _evaluate(eqns: Sequence[Any], env: dict[Any, Array]) -> None:
    for eqn in eqns:
        out = _jax.bind(eqn, [_read(env, v) for v in eqn.invars])
        env.update(zip(eqn.outvars, out, strict=True))


def _read(env: dict[Any, Array], atom: Any) -> Array:
    return env[atom] if is_var(atom) else atom.val


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


def _predicted_loop(loop: segments.Loop, levels: int, trips: int) -> float:
    kept = math.ceil(loop.trips / trips) * loop.carry
    if trips == 1:
        return kept + loop.body
    if levels == 2:
        return kept + trips * loop.carry + loop.body
    return kept + trips * loop.body


def _segment_trips(loop: segments.Loop, levels: int, scale: float) -> int:
    """Trips of a segment near the best by byte count, a divisor where one is near."""
    unit = loop.carry / loop.body if levels == 1 else 1.0
    wish = scale * math.sqrt(loop.trips * max(unit, 1e-9))
    wish = min(max(2, round(wish)), loop.trips // 2)
    near = [s for s in range(2, loop.trips // 2 + 1) if 0.75 <= s / wish <= 1.34]
    divisors = [s for s in near if loop.trips % s == 0]
    return min(divisors or [wish], key=lambda s: abs(s - wish))
