"""XLA's buffer assignment: where each value of a compiled program is, and how long.

XLA writes it as text when it is told to (`xla_dump_to`): the allocations with the
values in them, the order in which the instructions run, and for each value the first
and last of them that it is alive at. A value that is updated in place, carried by a
loop or passed on shares the bytes of its allocation with the values that it comes
from, so that what is alive is a union of byte ranges, not a sum.

Source: `BufferAssignment::ToString`, `HloLiveRange::ToString` of openxla/xla.
Limits: XLA runs a loop's body at one place of the order, whatever its trips; the text
is XLA's own format, which nothing promises (a test holds it for the versions of jaxlib
that we support).
"""

from __future__ import annotations

import pathlib
import re
from typing import Any

_ALLOCATION = re.compile(r"allocation (\d+): size \d+(.*)")
_VALUE = re.compile(
    r" value: <\d+ (?P<name>[^ {]+)(?P<index>\{[\d,]*\})?( \(phi\))? @\d+>"
    r" \(size=(?P<size>\d+),offset=(?P<offset>\d+)\): (?P<shape>[^({][^{]*)"
)
_RANGE = re.compile(r"    (?P<name>[^ ]+\{[\d,]*\}):(?P<first>\d+)-(?P<last>\d+)")
_STEP = re.compile(r"    (\d+):(\S+)")
_SCOPE = re.compile(
    r'^\s*(?:ROOT )?%?(?P<name>[\w.\-]+) = .*?op_name="(?P<scope>(?:[^"\\]|\\.)*)"',
    re.MULTILINE,
)
_FILLED = re.compile(
    r"^\s*(?:ROOT )?%?([\w.\-]+) = (?:\(.*?\)|\S+)"
    r" (?:fusion|broadcast)\((?:%?constant[\w.\-]*)?\)",
    re.MULTILINE,
)


def read(place: pathlib.Path) -> dict[str, Any] | None:
    """Reads what XLA wrote about one program.

    Args:
      place: the folder that XLA was told to write to.

    Returns:
      None if there is nothing to read, else plain data: "steps", for each instruction
      in order the name scope and primitive that it comes from ("" where XLA made it);
      "values", a list of (name, scope, shape, kind, allocation, offset, bytes, first
      step, last step, filled), kind one of "argument", "constant", "result",
      "temporary", filled whether it is one number throughout (zeros to add to), which
      XLA may make long before it is read. Tables of pointers are left out.
    """
    texts = [
        _text(place, f"*after_optimizations{suffix}.txt")
        for suffix in ("-buffer-assignment", "-live-range", "")
    ]
    assigned, ranges, module = texts
    if not assigned or not ranges:
        return None
    scopes = {m["name"]: m["scope"] for m in _SCOPE.finditer(module)}
    filled = set(_FILLED.findall(module))
    order, alive = _ranges(ranges)
    values = []
    for name, shape, kind, allocation, offset, size in _values(assigned):
        if name in alive and kind:
            base = name.partition("{")[0]
            where = allocation, offset, size, *alive[name]
            found = base, scopes.get(base, ""), shape, kind
            values.append((*found, *where, base in filled))
    return {"steps": [scopes.get(name, "") for name in order], "values": values}


def _text(place: pathlib.Path, pattern: str) -> str:
    # The name holds a serial number: the last one is the program itself.
    found = sorted(place.glob(pattern))
    return found[-1].read_text(errors="replace") if found else ""


def _ranges(text: str) -> tuple[list[str], dict[str, tuple[int, int]]]:
    """The instructions in order, and the first and last step of each value."""
    head, _, rest = text.partition("BufferLiveRange:")
    order = [m[2] for m in map(_STEP.fullmatch, head.splitlines()) if m]
    found = (_RANGE.fullmatch(line) for line in rest.splitlines())
    return order, {m["name"]: (int(m["first"]), int(m["last"])) for m in found if m}


def _values(text: str) -> list[tuple[str, str, str, int, int, int]]:
    """Each value's name with its index, shape, kind, and bytes of an allocation."""
    found, allocation, kind = [], 0, ""
    for line in text.splitlines():
        head = _ALLOCATION.match(line)
        if head:
            allocation, kind = int(head[1]), _kind(head[2])
            continue
        if not line.startswith(" value"):
            continue
        m = _VALUE.match(line)
        if m:
            name = m["name"] + (m["index"] or "{}")
            where = allocation, int(m["offset"]), int(m["size"])
            found.append((name, m["shape"], kind, *where))
    return found


def _kind(attributes: str) -> str:
    """What an allocation is for; "" for what is outside the program's own memory."""
    for mark, kind in (
        ("thread-local", ""),
        ("parameter", "argument"),
        ("constant", "constant"),
        ("maybe-live-out", "result"),
    ):
        if mark in attributes:
            return kind
    return "temporary"
