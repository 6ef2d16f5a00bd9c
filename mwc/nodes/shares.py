"""Shares: which array keeps the bits of which stage of a run.

XLA keeps bits where no memory is lost, in the buffer of a gradient that is not written
yet: one array in each buffer, whatever its size. The first bits are placed first, and
take the buffers that are written last; so of as many arrays as there are gradients the
second half finds no buffer that is free for long enough. Two stages of a long run share
an array, and all have a place. Source: DESIGN section 6, where all bits were expected
to hide; `BufferAssigner` of XLA. Limits: stages next to each other with bits alike; a
run whose bits are little against its states is left alone, for a shared array is
a kernel more to compile.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from passes.graph import Var
from passes.residuals import packed_bytes

_LITTLE = 2.0  # of a state


class Share(NamedTuple):
    """Where the bits of a stage are kept.

    Attributes:
      at: the arrays, among those of the run.
      place: 0 or 1, the stage's place in them; None where they are its own.
    """

    at: slice
    place: int | None


def shares(bits: Sequence[Sequence[Var]], state: int) -> tuple[Share, ...]:
    """Those of a run.

    Args:
      bits: the bits of each stage.
      state: bytes of a state.
    """
    many = sum(packed_bytes(v) for one in bits for v in one) > _LITTLE * state
    found: list[Share] = []
    start = 0
    for i, one in enumerate(bits):
        if found and found[-1].place == 0:
            found.append(Share(found[-1].at, 1))
            continue
        pair = many and i + 1 < len(bits) and _alike(one, bits[i + 1])
        found.append(Share(slice(start, start + len(one)), 0 if pair else None))
        start += len(one)
    return tuple(found)


def _alike(a: Sequence[Var], b: Sequence[Var]) -> bool:
    types = [[(v.aval.shape, v.aval.dtype) for v in one] for one in (a, b)]
    return bool(a) and types[0] == types[1]
