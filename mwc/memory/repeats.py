"""The block that a program repeats: a scan's body, or a run of alike layers.

Layers in a Python loop are found by their matrix products, in order: the stretch that
equals itself shifted by a period, longest in operations. A scan's body repeats by its
trips. Of all such blocks the one that most operations are in counts.

Limits: products of one shape count as alike, whatever is between them; blocks of more
than 128 products are not found.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from passes.flops import eqn_flops
from passes.graph import Graph

_LONGEST = 128


@dataclasses.dataclass(frozen=True)
class Repeats:
    """A repeated block.

    Attributes:
      count: how often it is there.
      what: what it is, in words.
    """

    count: int
    what: str


def repeats(graph: Graph) -> Repeats | None:
    """The repeated block with most matrix operations, None if nothing repeats.

    Args:
      graph: a program without calls (`passes.inline`).

    Returns:
      The block.
    """
    heavy = [eqn for eqn in graph.eqns if eqn_flops(eqn).matrix > 0]
    found = [*_loops(heavy), *_runs(heavy)]
    if not found:
        return None
    return max(found, key=lambda pair: pair[0])[1]


def _loops(heavy: Sequence[Any]) -> Iterator[tuple[int, Repeats]]:
    for eqn in heavy:
        if eqn.primitive.name == "scan" and eqn.params["length"] > 1:
            length = eqn.params["length"]
            yield eqn_flops(eqn).matrix, Repeats(length, f"scan of {length} trips")


def _runs(heavy: Sequence[Any]) -> Iterator[tuple[int, Repeats]]:
    """The longest run of each period, short periods first."""
    alike = [_signature(eqn) for eqn in heavy]
    made = [0, *itertools.accumulate(eqn_flops(eqn).matrix for eqn in heavy)]
    for period in range(1, min(_LONGEST, len(heavy) // 2) + 1):
        start = 0
        for i in range(period, len(heavy) + 1):
            if i < len(heavy) and alike[i] == alike[i - period]:
                continue
            first, start = start, i - period + 1
            count = (i - first) // period
            if count > 1:
                work = made[first + count * period] - made[first]
                noun = "product" if period == 1 else "products"
                yield work, Repeats(count, f"{count} blocks of {period} matrix {noun}")


def _signature(eqn: Any) -> tuple[str, ...]:
    avals = [v.aval for v in (*eqn.invars, *eqn.outvars)]
    return eqn.primitive.name, *map(str, avals)
