"""Bytes alive at each step of a compiled program, and what they are at the peak.

Values that share bytes of an allocation (updated in place, carried by a loop) count
once: what is alive is the union of byte ranges, from XLA's own buffer assignment
(`mwc.memory.buffers`). Arguments and constants are left out, results are counted from
when they are first written.

Limits: a result's allocation may hold other values before, which count as they are.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

_COUNTED = ("temporary", "result")
_WRAPPED = re.compile(r"\b(?:jit|pjit|jvp|transpose|vmap|remat)\(([^()]*)\)")
_NOISE = frozenset(
    {*("", "call", "program", "call_exported", "eval_jaxpr", "closed_call", "body")}
)


class Value(NamedTuple):
    """One value of a compiled program, as `buffers.read` gives it."""

    name: str
    scope: str
    shape: str
    kind: str
    allocation: int
    offset: int
    size: int
    first: int
    last: int
    filled: bool

    @property
    def place(self) -> tuple[int, int, int]:
        """The bytes that it is in."""
        return self.allocation, self.offset, self.size


@dataclasses.dataclass(frozen=True)
class Alive:
    """Alike values that are alive at one step.

    Attributes:
      label: the user's name scopes and the primitive; "backward" ones say so.
      shape: of one of them, as XLA writes it.
      bytes: of all of them.
      count: how many.
      kind: "temporary" or "result".
    """

    label: str
    shape: str
    bytes: int
    count: int
    kind: str


@dataclasses.dataclass(frozen=True)
class Peak:
    """The step at which most bytes are alive.

    Attributes:
      step: its place in the order.
      bytes: how many are alive.
      values: what they are, largest first.
    """

    step: int
    bytes: int
    values: tuple[Alive, ...]


class Live:
    """The live ranges of one compiled program.

    Args:
      found: what `buffers.read` gives.
    """

    def __init__(self, found: dict[str, Any]):
        self.steps: list[str] = found["steps"]
        values = [Value(*row) for row in found["values"]]
        self.values = [v for v in values if v.kind in _COUNTED]

    @functools.cached_property
    def bytes(self) -> np.ndarray:
        """int64[steps]: bytes alive at each step, arguments and constants left out."""
        return self._alive(self.values)

    @functools.cached_property
    def temp(self) -> np.ndarray:
        """int64[steps]: those of them that are not in the results' allocations."""
        return self._alive([v for v in self.values if v.kind == "temporary"])

    @functools.cached_property
    def turn(self) -> int | None:
        """The last step of the forward pass, None where no step is differentiated.

        XLA moves a few instructions across it; it is where most forward ones are
        before and most backward ones after.
        """
        sides = [is_forward(s) - is_backward(s) for s in self.steps]
        if not any(sides):
            return None
        ahead = np.cumsum(sides)
        return len(sides) - 1 - int(np.argmax(ahead[::-1]))

    @property
    def kept_bytes(self) -> int | None:
        """Bytes of the forward pass that are alive at its end, for the backward one.

        Zeros that gradients will be added to are not the forward pass's.
        """
        if self.turn is None:
            return None
        kept = [
            v
            for v in self.values
            if v.first <= self.turn < v.last
            and not (v.filled or is_backward(self._scope(v)))
        ]
        return int(self._alive(kept)[self.turn])

    @functools.cached_property
    def peak(self) -> Peak:
        """Where most bytes are alive."""
        step = int(np.argmax(self.bytes)) if len(self.bytes) else 0
        most = int(self.bytes[step]) if len(self.bytes) else 0
        return Peak(step, most, self.at(step))

    def at(self, step: int) -> tuple[Alive, ...]:
        """What is alive at a step, alike values together, largest first."""
        groups: dict[Any, list[Value]] = defaultdict(list)
        for value in self._distinct(step):
            pattern = re.sub(r"\d+", "*", self._text(value))
            groups[pattern, value.shape, value.kind].append(value)
        found = []
        for (pattern, shape, kind), same in groups.items():
            texts = set(map(self._text, same))
            text = texts.pop() if len(texts) == 1 else pattern
            found.append(Alive(text, shape, sum(v.size for v in same), len(same), kind))
        return tuple(sorted(found, key=lambda group: -group.bytes))

    def _distinct(self, step: int) -> Iterator[Value]:
        """Values alive at a step, one for each range of bytes, larger ones first."""
        alive = [v for v in self.values if v.first <= step <= v.last]
        taken: dict[int, list[tuple[int, int]]] = defaultdict(list)
        for v in sorted(alive, key=lambda v: (-v.size, not v.scope, -v.first)):
            end = v.offset + v.size
            ranges = taken[v.allocation]
            if all(end <= low or high <= v.offset for low, high in ranges):
                ranges.append((v.offset, end))
                yield v

    def _text(self, value: Value) -> str:
        if value.filled:
            return "one number throughout"
        named = label(self._scope(value))
        return named or ("a result" if value.kind == "result" else value.name)

    def _scope(self, value: Value) -> str:
        """Where a value comes from; a loop's carry is what was put in its place."""
        return value.scope or self._placed.get((*value.place, value.shape), "")

    @functools.cached_property
    def _placed(self) -> dict[Any, str]:
        named = (v for v in reversed(self.values) if v.scope)
        return {(*v.place, v.shape): v.scope for v in named}

    def _alive(self, values: Sequence[Value]) -> np.ndarray:
        total = np.zeros(len(self.steps), np.int64)
        allocations: dict[int, list[Value]] = defaultdict(list)
        for v in values:
            allocations[v.allocation].append(v)
        for group in allocations.values():
            edges = {e for v in group for e in (v.offset, v.offset + v.size)}
            places = {e: i for i, e in enumerate(sorted(edges))}
            used = np.zeros((len(places), len(total)), bool)
            for v in group:
                rows = slice(places[v.offset], places[v.offset + v.size])
                used[rows, v.first : v.last + 1] = True
            total += np.diff(list(places), append=max(places)) @ used
        return total


def is_forward(scope: str) -> bool:
    """Whether an instruction belongs to the forward pass of a derivative."""
    return "jvp(" in scope and not is_backward(scope)


def is_backward(scope: str) -> bool:
    """Whether an instruction belongs to the backward pass of a derivative."""
    return "transpose(" in scope


def label(scope: str) -> str:
    """A name scope as a user reads it: transformations and JAX's own parts left out."""
    text, before = scope, ""
    while text != before:
        before, text = text, _WRAPPED.sub(r"\1", text)
    parts = [part for part in text.split("/") if part not in _NOISE]
    return ("backward: " if is_backward(scope) else "") + "/".join(parts)
