"""Where a person who knew the byte counts would put `jax.checkpoint`.

A flat program is cut between equations into contiguous segments. What is kept are the
values that cross a cut; when a segment is pulled back, those before it are alive, and
what it makes when it is run again. The cuts with the lowest such peak are found by
halving: for a given peak, the cuts that fewest bytes cross are a shortest path over cut
positions.

Limits: what a segment makes is an estimate (`Costs.made`); the caller tries several
weights for it. Of more than 256 places to cut the narrowest in each 256th of the
program are considered.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from passes import _jax
from passes.flops import eqn_flops
from passes.graph import Graph, is_var

_MAX_PLACES = 256
_HALVINGS = 12
_MIN_TRIPS = 4
_VIEWS = frozenset(
    {
        *("broadcast_in_dim", "reshape", "squeeze", "expand_dims", "transpose"),
        *("convert_element_type", "copy", "name", "stop_gradient", "iota"),
    }
)


@dataclasses.dataclass(frozen=True)
class Loop:
    """A scan that is long enough to be cut itself.

    Attributes:
      index: its equation.
      trips: its length.
      carry: bytes of the carry.
      body: bytes that one trip makes.
    """

    index: int
    trips: int
    carry: int
    body: int


@dataclasses.dataclass(frozen=True)
class Costs:
    """Byte counts of a flat program.

    Attributes:
      crossing: at each position 0..n, bytes that a cut before that equation keeps.
      made: running sum of the bytes that the equations before a position make.
      loops: the scans that are cut themselves; they count nothing in `made`.
      places: the positions where a cut is considered, the two ends included.
    """

    crossing: tuple[int, ...]
    made: tuple[int, ...]
    loops: tuple[Loop, ...]
    places: tuple[int, ...]

    def within(self, start: int, stop: int) -> int:
        """Bytes that the equations of a segment make."""
        return self.made[stop] - self.made[start]


def costs(graph: Graph) -> Costs:
    """Counts the bytes of a program."""
    sizes = _made(graph.eqns)
    loops = [
        Loop(i, eqn.params["length"], *_loop_bytes(eqn))
        for i, eqn in enumerate(graph.eqns)
        if eqn.primitive.name == "scan" and eqn.params["length"] >= _MIN_TRIPS
    ]
    straight = sum(sizes) - sum(sizes[loop.index] for loop in loops)
    weigh = [loop for loop in loops if 10 * loop.trips * loop.body >= straight]
    for loop in weigh:
        sizes[loop.index] = 0
    crossing = _crossing(graph)
    made = (0, *itertools.accumulate(sizes))
    forced = {p for loop in weigh for p in (loop.index, loop.index + 1)}
    places = _places(crossing, made, forced)
    return Costs(crossing, made, tuple(weigh), places)


def even(known: Costs, pieces: int) -> tuple[int, ...]:
    """Narrow cuts into pieces that make at most a `pieces`-th of all bytes each.

    Args:
      known: the byte counts.
      pieces: how many there would be if all were equal.

    Returns:
      The positions of the cuts in order, the two ends included.
    """
    # Some slack, so that equal blocks do not miss the bound by their rims; what cannot
    # be cut smaller must fit.
    least = max(itertools.starmap(known.within, itertools.pairwise(known.places)))
    bound = max(1.1 * known.made[-1] / pieces, least)
    cuts = _shortest(known, known.places, lambda _, inner: inner <= bound, 1.0)
    assert cuts is not None
    return cuts


def lowest(
    known: Costs, weight: float, leaves: Sequence[int] | None = None
) -> tuple[int, ...]:
    """The cuts with the lowest predicted peak.

    Args:
      known: the byte counts.
      weight: what a byte made within a segment counts.
      leaves: finer cuts, for two levels: only they are chosen from, and a segment
        keeps what crosses those inside it and makes what its largest piece makes.

    Returns:
      The positions of the cuts in order, the two ends included.
    """
    places = known.places if leaves is None else leaves
    nested = leaves is not None
    low, high = 0.0, float(weight * known.made[-1] + sum(known.crossing))
    best = (places[0], places[-1])
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        fits = functools.partial(_fits, middle)
        found = _shortest(known, places, fits, weight, nested)
        if found is None:
            low = middle
        else:
            high, best = middle, found
    return best


def predicted(
    known: Costs,
    weight: float,
    outer: Sequence[int],
    inner: Sequence[int] | None = None,
) -> float:
    """Most bytes alive while one segment after another is pulled back."""
    kept, worst = 0, 0.0
    for start, stop in itertools.pairwise(outer):
        kept += known.crossing[start]
        if inner is None:
            within = weight * known.within(start, stop)
        else:
            points = [p for p in inner if start <= p <= stop]
            within = predicted(known, weight, points) - known.crossing[start]
        worst = max(worst, kept + within)
    return worst


def _fits(peak: float, kept: float, inner: float) -> bool:
    return kept + inner <= peak


def _shortest(
    known: Costs,
    places: Sequence[int],
    fits: Callable[[float, float], bool],
    weight: float,
    nested: bool = False,
) -> tuple[int, ...] | None:
    """The cuts that fewest bytes cross, of those whose every segment fits.

    `fits` is asked with the bytes kept before a segment and those alive within it.
    Loops are segments of their own. None if there are no such cuts.
    """
    alone = {loop.index + edge for loop in known.loops for edge in (0, 1)}
    best, back = [0.0], [0]
    for j in range(1, len(places)):
        choice, source = math.inf, j - 1
        kept, top = 0, 0
        for i in range(j - 1, -1, -1):
            if i < j - 1 and places[i + 1] in alone:
                break
            if nested:
                kept += known.crossing[places[i + 1]] if i < j - 1 else 0
                top = max(top, known.within(places[i], places[i + 1]))
            else:
                top = known.within(places[i], places[j])
            inner = kept + weight * top
            if not fits(0, inner) and i < j - 1:
                break
            if best[i] < choice and fits(best[i], inner):
                choice, source = best[i], i
        best.append(choice + known.crossing[places[j]])
        back.append(source)
    if math.isinf(best[-1]):
        return None
    chosen, j = [places[-1]], len(places) - 1
    while j > 0:
        j = back[j]
        chosen.append(places[j])
    return tuple(reversed(chosen))


def _made(eqns: Sequence[Any]) -> list[int]:
    """Bytes that each equation leaves for a backward pass.

    Compilers fuse elementwise operations and make them again where they are needed,
    so what stays is what matrix products read and yield; a program without any is
    counted by all its results that are no views.
    """
    heavy = [eqn_flops(eqn).matrix > 0 for eqn in eqns]
    if not any(heavy):
        bare = [eqn.primitive.name not in _VIEWS for eqn in eqns]
        return [kept * _result(eqn) for kept, eqn in zip(bare, eqns, strict=True)]
    read = {
        v
        for eqn, is_heavy in zip(eqns, heavy, strict=True)
        for v in eqn.invars
        if is_heavy and is_var(v)
    }
    return [
        _result(eqn) if is_heavy else sum(nbytes(v) for v in eqn.outvars if v in read)
        for eqn, is_heavy in zip(eqns, heavy, strict=True)
    ]


def _result(eqn: Any) -> int:
    return sum(map(nbytes, eqn.outvars))


def _loop_bytes(eqn: Any) -> tuple[int, int]:
    inner, _ = _jax.opened(eqn.params["jaxpr"])
    consts, carries = _jax.scan_layout(eqn)
    carry = sum(map(nbytes, inner.invars[consts : consts + carries]))
    return carry, max(1, sum(_made(inner.eqns)))


def nbytes(atom: Any) -> int:
    """Bytes of a variable's array; what has no size (keys, tokens) counts 0."""
    aval = atom.aval
    itemsize = getattr(getattr(aval, "dtype", None), "itemsize", 0)
    return math.prod(getattr(aval, "shape", ())) * itemsize


def _crossing(graph: Graph) -> tuple[int, ...]:
    """Bytes alive at each position, arguments and results left out."""
    last: dict[Any, int] = {}
    for i, eqn in enumerate(graph.eqns):
        last.update((v, i) for v in eqn.invars if is_var(v))
    change = [0] * (len(graph.eqns) + 1)
    for i, eqn in enumerate(graph.eqns):
        for v in eqn.outvars:
            if v in last:
                change[i + 1] += nbytes(v)
                change[last[v] + 1] -= nbytes(v)
    return tuple(itertools.accumulate(change))


def _places(
    crossing: Sequence[int], made: Sequence[int], forced: Iterable[int]
) -> tuple[int, ...]:
    """Positions that are locally narrowest, thinned to a bounded number."""
    end = len(crossing) - 1
    keep = {0, end, *forced}
    narrow = [
        p
        for p in range(1, end)
        if crossing[p] <= crossing[p - 1] and crossing[p] <= crossing[p + 1]
    ]
    if len(narrow) > _MAX_PLACES:
        share = max(1, made[-1] / _MAX_PLACES)
        buckets: dict[int, int] = {}
        for p in narrow:
            bucket = int(made[p] / share)
            rival = buckets.get(bucket)
            if rival is None or crossing[p] < crossing[rival]:
                buckets[bucket] = p
        narrow = list(buckets.values())
    return tuple(sorted({*keep, *narrow}))
