"""Binomial schedules for loops: equal steps, a fixed number of kept states.

With s kept states beside the first one, l steps are run backward with t(l, s)
forward steps, the first pass included:

    t(l, s) = min over j of j + t(j, s) + t(l - j, s - 1),  t(1, s) = 0

whose closed form is r l - C(s + 1 + r, s + 2), r the least number with
C(s + 1 + r, r) >= l (Griewank and Walther, "Algorithm 799: revolve", ACM TOMS 2000,
which counts the first state as one of the kept). A loop cannot branch on a tree, so
the schedule is a list of instructions that a loop of fixed code reads.
"""

from __future__ import annotations

import dataclasses
import math


def steps(length: int, slots: int) -> int:
    """t(length, slots): forward steps, the first pass included."""
    if length <= 1:
        return 0
    r = _repeats(length, slots + 1)
    return r * length - math.comb(slots + 1 + r, slots + 2)


def _repeats(length: int, states: int) -> int:
    r = 0
    while math.comb(states + r, states) < length:
        r += 1
    return r


def split(length: int, slots: int) -> int:
    """A step j that attains t(length, slots)."""
    states = slots + 1
    r = _repeats(length, states)
    goal = steps(length, slots)
    some = [math.comb(states + k, states) for k in (r - 1, r - 2) if k >= 0]
    more = [length - math.comb(states - 1 + k, states - 1) for k in (r, r - 1)]
    for j in (*some, *more):
        if 1 <= j < length and (
            j + steps(j, slots) + steps(length - j, slots - 1) == goal
        ):
            return j
    costs = (
        (j + steps(j, slots) + steps(length - j, slots - 1), j)
        for j in range(1, length)
    )
    return min(costs)[1]


def again(length: int, slots: int) -> int:
    """Forward steps that the backward pass runs, after a first pass of its own."""
    start, free = 0, slots
    while free and length - start > 1:
        start, free = start + split(length - start, free), free - 1
    return steps(length, slots) - start


def least_slots(length: int, most: float) -> int | None:
    """The fewest kept states with again(length, slots) <= most, or None."""
    low, high = 0, max(length - 1, 0)
    if again(length, high) > most:
        return None
    while low < high:
        middle = (low + high) // 2
        if again(length, middle) <= most:
            high = middle
        else:
            low = middle + 1
    return low


@dataclasses.dataclass(frozen=True)
class Instructions:
    """A schedule as tables. Slot 0 is the first state, given from outside.

    Attributes:
      spine: steps before which the first pass keeps the state, in slots 1, 2, ...
      advances: (source slot, from, to, target slot): run steps and keep the state.
      leaves: (source slot, from, step, first advance, last advance + 1): do these
        advances, run from the source's step to the leaf's, and do its backward.
      slots: kept states beside the first.
    """

    spine: tuple[int, ...]
    advances: tuple[tuple[int, int, int, int], ...]
    leaves: tuple[tuple[int, int, int, int, int], ...]
    slots: int


def instructions(length: int, slots: int) -> Instructions:
    """The instructions that run `length` steps backward."""
    spine: list[int] = []
    advances: list[tuple[int, int, int, int]] = []
    leaves: list[tuple[int, int, int, int, int]] = []
    done = 0

    def leaf(source: int, start: int, step: int) -> None:
        nonlocal done
        leaves.append((source, start, step, done, len(advances)))
        done = len(advances)

    # (from, to, slot of the state at `from`, first free slot, first pass?)
    todo = [(0, length, 0, 1, True)] if length else []
    while todo:
        start, stop, source, free, first = todo.pop()
        if stop - start == 1:
            leaf(source, start, start)
        elif free > slots:
            for step in reversed(range(start, stop)):
                leaf(source, start, step)
        else:
            middle = start + split(stop - start, slots - free + 1)
            if first:
                spine.append(middle)
            else:
                # Runs when its right part is reached, which is next.
                advances.append((source, start, middle, free))
            todo.append((start, middle, source, free, False))
            todo.append((middle, stop, free, free + 1, first))
    return Instructions(tuple(spine), tuple(advances), tuple(leaves), slots)
