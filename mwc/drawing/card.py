"""A card: a column of small boxes, one for each sweep that a stage takes part in.

    F            the stage in the first pass, and what it keeps
    R            the sweep back: what it runs again and pulls
    V            the sweep forward, where a cotangent is rebuilt
    backprop     on request, what backpropagation would keep
    parameters   what it reads besides states

The fill of an F box shows where in its repeats what is kept, one stripe a stretch; to
compare, it is a bar as long as the bytes are many, on one scale with backpropagation's.
Boxes are plain Graphviz nodes: not every build of it knows tables in labels.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence

from mwc.drawing.sheet import Attributes, Card, ranged
from mwc.drawing.style import (
    LOOKS,
    SWEEPS,
    beginning,
    ending,
    path,
    place,
    shape,
    size,
)

LANES = ("F", "backprop", "R", "V", "parameters")
PARAMETERS = {"fillcolor": "#fffdf0", "color": "#c8b45a"}  # the box of parameters
_LINES = 3  # parameters that are named
_STRIPE = 0.012  # of a box, the least that a stretch is wide


@dataclasses.dataclass(frozen=True)
class Frame:
    """What all cards of a drawing share.

    Attributes:
      across: whether the chain runs left to right.
      compare: whether there is a box of backpropagation.
      rebuilt: whether there is one of sweep V.
      most: bytes of the longest bar.
    """

    across: bool
    compare: bool
    rebuilt: bool
    most: int


@dataclasses.dataclass(frozen=True)
class Box:
    """One box of a card.

    Attributes:
      lane: "F", "backprop", "R", "V" or "parameters".
      text: its lines.
      attributes: of the Graphviz node.
    """

    lane: str
    text: str
    attributes: dict[str, str]


def boxes(card: Card, frame: Frame) -> Iterator[Box]:
    """The boxes of a card, in the order of lanes.

    The first is at the edge, where there is room for wires that pass over stages.
    """
    members = card.members
    yield _first(members, frame)
    if frame.compare:
        total = sum(m["backprop_bytes"] for m in members)
        look = LOOKS["full value" if total else "nothing"]
        text = f"keeps {size(total)}" if total else "keeps nothing"
        bar = _bar(total, look.bar, look.fill, frame) | {"color": look.line}
        yield _box("backprop", ["backpropagation", text], bar)
    gives = ", gives dθ" if card.parameters else ""
    yield _box("R", ["R  sweep back", *_back(members, gives)], _sweep("R"))
    if frame.rebuilt and _rebuilt(members):
        lines = [*_again(members), f"rebuilds h{gives}"]
        yield _box("V", ["V  sweep forward", *lines], _sweep("V"))
    if card.parameters:
        yield _box("parameters", _parameters(card.parameters), PARAMETERS)


def _box(lane: str, lines: Iterable[str], look: dict[str, str]) -> Box:
    text = "".join(line.replace("\\", "\\\\") + r"\l" for line in lines)
    return Box(lane, text, look)


def _title(members: Sequence[Attributes]) -> list[str]:
    """Name, number of repeats, place."""
    first = members[0]
    times = len(members) * first["steps"]
    name = ending(name_of(members), 30) or first["kind"]
    lines = [name + (f"  ×{times}" if times > 1 else "")]
    lines.append(f"{places(members)} · {first['kind']}")
    if first["source"] and first["source"] != first["name"]:
        lines.append(beginning(place(first["source"]), 32))
    return lines


def places(members: Sequence[Attributes]) -> str:
    """Where in the chain: "stages 0…88 by 8"."""
    first, count = members[0], len(members)
    if count == 1:
        return f"stage {first['index']}"
    step = members[1]["index"] - first["index"]
    span = f"stages {first['index']}…{members[-1]['index']}"
    return span + (f" by {step}" if step > 1 else "")


def name_of(members: Sequence[Attributes]) -> str:
    """The name on a card: the end of the scope, or the source line."""
    if members[0]["name"] == members[0]["source"]:
        return place(members[0]["name"])
    return ranged([str(m["name"]).split("/")[-1] for m in members])


def _parameters(parameters: Sequence[Attributes]) -> Iterator[str]:
    for p in parameters[:_LINES]:
        times = f" ×{p['count']}" if p["count"] > 1 else ""
        yield ending(path(p["name"]), 28) + times
        yield f"   {shape(p)} · {size(p['bytes'])}"
    rest = parameters[_LINES:]
    if rest:
        more = sum(p["bytes"] * p["count"] for p in rest)
        yield f"and {len(rest)} more · {size(more)}"


def _first(members: Sequence[Attributes], frame: Frame) -> Box:
    """What the first pass keeps, a line for each kind of storage."""
    counts: dict[str, int] = dict.fromkeys(LOOKS, 0)
    bytes_: dict[str, int] = dict.fromkeys(LOOKS, 0)
    for m in members:
        counts[m["storage"]] += 1
        bytes_[m["storage"]] += m["residual_bytes"]
        bytes_["kept state"] += m["state_bytes"]
    lines = _title(members)
    for storage in (s for s in LOOKS if counts[s] or bytes_[s]):
        line = f"{LOOKS[storage].mark} {storage}"
        line += f" ×{counts[storage]}" if len(members) > 1 and counts[storage] else ""
        lines.append(line + (f" · {size(bytes_[storage])}" if bytes_[storage] else ""))
    look, total = LOOKS[max(LOOKS, key=lambda s: counts[s])], sum(bytes_.values())
    if frame.compare:
        most = LOOKS[max(LOOKS, key=lambda s: bytes_[s])]
        fill = _bar(total, most.bar, look.fill, frame)
    else:
        fill = _stripes(members)
    style = f"{fill.pop('style')},{look.style}"
    border = {"color": look.line, "penwidth": "2" if total else "1.2", "style": style}
    return _box("F", lines, fill | border)


def _bar(bytes_: int, bar: str, rest: str, frame: Frame) -> dict[str, str]:
    """A fill as long as the bytes are many; a sliver for anything at all."""
    part = bytes_ / frame.most if frame.most else 0
    part = max(part, _STRIPE if bytes_ else 0)
    if not 0 < part < 1 - 1e-3:
        return {"style": "filled", "fillcolor": bar if part else rest}
    return {"style": "striped", "fillcolor": f"{bar};{part:.4f}:{rest}"}


def _stripes(members: Sequence[Attributes]) -> dict[str, str]:
    """Where in the repeats what is kept: a stripe for each run of equal ones."""
    runs = [
        (s, len([*run])) for s, run in itertools.groupby(m["storage"] for m in members)
    ]
    if len(runs) == 1:
        return {"style": "filled", "fillcolor": LOOKS[runs[0][0]].fill}
    spare = max(0.0, 1 - _STRIPE * len(runs))
    parts = [_STRIPE + spare * count / len(members) for _, count in runs]
    scale = sum(parts) * 1.0001
    stripes = [
        f"{LOOKS[s].fill};{part / scale:.5f}"
        for (s, _), part in zip(runs, parts, strict=True)
    ]
    return {"style": "striped", "fillcolor": ":".join(stripes)}


def _sweep(lane: str) -> dict[str, str]:
    return {"color": SWEEPS[lane], "fontcolor": SWEEPS[lane], "fillcolor": "#ffffff"}


def again(members: Sequence[Attributes]) -> str:
    """How often sweeps run stages again: "", "2.0×", "1.0–3.0×" or "up to 3.0×"."""
    least = min(m["runs_again"] for m in members)
    most = max(m["runs_again"] for m in members)
    if most < 0.05:
        return ""
    span = f"{most:.1f}" if most - least < 0.05 else f"{least:.1f}–{most:.1f}"
    return f"{span if least >= 0.05 else f'up to {most:.1f}'}×"


def _again(members: Sequence[Attributes]) -> list[str]:
    return [f"runs again {times}"] if (times := again(members)) else []


def _rebuilt(members: Sequence[Attributes]) -> bool:
    return any("V" in m["sweeps"] for m in members)


def _back(members: Sequence[Attributes], gives: str) -> list[str]:
    if _rebuilt(members):
        return ["pulls h, keeps a sketch"]
    return [*_again(members), f"pulls h{gives}"]
