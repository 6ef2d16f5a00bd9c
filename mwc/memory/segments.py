"""Where a person who knew the byte counts would put `jax.checkpoint`.

A flat program is cut between equations into contiguous segments. What is kept are the
values that cross a cut; what is alive besides is what one segment makes when it is run
again. So for a bound on the bytes made within a segment the cuts are those that fewest
bytes cross (a shortest path over cut positions), and the bound is left to a search.

Limits: a byte count is that of the equations' results, views left out; what the
compiler fuses away is counted, which only shifts the best bound. Of more than 400
places to cut the narrowest in each 400th of the program are considered.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any

from passes import _jax
from passes.graph import Graph, is_var

_MAX_PLACES = 400
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
    sizes = [_made(eqn) for eqn in graph.eqns]
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


def cut(
    known: Costs, bound: float, places: Sequence[int] | None = None
) -> tuple[int, ...]:
    """The narrowest cuts that leave no segment with more than `bound` bytes made.

    A segment that no cut can make smaller may exceed the bound.

    Args:
      known: the byte counts.
      bound: most bytes that the equations of a segment may make.
      places: the positions to choose from; `known.places` by default.

    Returns:
      The positions of the cuts in order, the two ends included.
    """
    places = known.places if places is None else places
    alone = {loop.index + edge for loop in known.loops for edge in (0, 1)}
    best, back = [0.0], [0]
    for j in range(1, len(places)):
        choice, source = math.inf, j - 1
        for i in range(j - 1, -1, -1):
            too_much = known.within(places[i], places[j]) > bound
            if i < j - 1 and (too_much or places[i + 1] in alone):
                break
            if best[i] < choice:
                choice, source = best[i], i
        best.append(choice + known.crossing[places[j]])
        back.append(source)
    chosen, j = [places[-1]], len(places) - 1
    while j > 0:
        j = back[j]
        chosen.append(places[j])
    return tuple(reversed(chosen))


def predicted(known: Costs, cuts: Sequence[int]) -> int:
    """Bytes kept at the cuts and made in the largest segment."""
    kept = sum(known.crossing[p] for p in cuts[1:-1])
    return kept + max(map(known.within, cuts, cuts[1:]), default=0)


def _made(eqn: Any) -> int:
    return 0 if eqn.primitive.name in _VIEWS else sum(map(nbytes, eqn.outvars))


def _loop_bytes(eqn: Any) -> tuple[int, int]:
    inner, _ = _jax.opened(eqn.params["jaxpr"])
    consts, carries = _jax.scan_layout(eqn)
    carry = sum(map(nbytes, inner.invars[consts : consts + carries]))
    return carry, max(1, sum(map(_made, inner.eqns)))


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
