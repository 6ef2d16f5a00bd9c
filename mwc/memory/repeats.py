"""The block that a program repeats: a scan's body, or a run of alike layers.

Layers in a Python loop are found by their matrix products, in order (`passes.blocks`).
A scan's body repeats by its trips. Of all such blocks the one that most operations are
in counts.

Limits: products of one shape count as alike, whatever is between them.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from passes.blocks import blocks
from passes.flops import eqn_flops
from passes.graph import Graph


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
    made = [0, *itertools.accumulate(eqn_flops(eqn).matrix for eqn in heavy)]
    for block in blocks([_signature(eqn) for eqn in heavy]):
        if block.times > 1:
            noun = "product" if block.period == 1 else "products"
            what = f"{block.times} blocks of {block.period} matrix {noun}"
            yield made[block.stop] - made[block.start], Repeats(block.times, what)


def _signature(eqn: Any) -> tuple[str, ...]:
    avals = [v.aval for v in (*eqn.invars, *eqn.outvars)]
    return eqn.primitive.name, *map(str, avals)
