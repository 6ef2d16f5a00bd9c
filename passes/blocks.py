"""Which stretches of a chain repeat: runs of equal links, and blocks of several.

Found greedily from the front: of all periods at a place the one whose repeats cover the
most, the shortest of those. Drawings show what reads alike once, memory reports count
how often a block is there; `passes.repeats` shares the derivatives of repeated layers.
Limits: blocks inside blocks are not sought.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Block:
    """`times` repeats of `period` links from `start` on."""

    start: int
    period: int
    times: int

    @property
    def stop(self) -> int:
        """One past its last link."""
        return self.start + self.period * self.times

    def members(self, position: int) -> range:
        """The links at a position of every repeat."""
        return range(self.start + position, self.stop, self.period)


def blocks(keys: Sequence[Hashable]) -> list[Block]:
    """A chain as blocks, in order, all links in one of them.

    Args:
      keys: one for each link; links with equal keys are alike.

    Returns:
      Blocks; a link that does not repeat is one of period 1 and times 1.
    """
    names: dict[Hashable, int] = {}
    ids = np.array([names.setdefault(key, len(names)) for key in keys], np.int64)
    found: list[Block] = []
    start = 0
    while start < len(ids):
        found.append(_longest(ids, start))
        start = found[-1].stop
    return found


def _longest(ids: np.ndarray, start: int) -> Block:
    best = Block(start, 1, 1)
    rest = ids[start:]
    same = np.flatnonzero(rest[1 : len(rest) // 2 + 1] == rest[0])
    for period in (same + 1).tolist():
        unlike = np.flatnonzero(rest[period:] != rest[:-period])
        alike = int(unlike[0]) if unlike.size else len(rest) - period
        block = Block(start, period, 1 + alike // period)
        if block.times > 1 and block.stop > best.stop:
            best = block
    return best
