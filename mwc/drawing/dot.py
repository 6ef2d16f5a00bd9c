"""A plan's sheet as DOT: columns of boxes, wires between them, caption and legend."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import Any

import graphviz

from mwc._plan import Plan
from mwc.drawing.card import Box, Frame, boxes
from mwc.drawing.graph import to_networkx
from mwc.drawing.sheet import Card, End, Sheet, Wire, every_card, sheet
from mwc.drawing.style import (
    ARGUMENT,
    FONT,
    INK,
    KEPT,
    LOOKS,
    PALE,
    PANEL,
    RECOMPUTED,
    SWEEPS,
    ending,
    path,
    shape,
    size,
)
from mwc.errors import MoonwalkValueError

_DIRECTIONS = ("LR", "TB")
_WIDE = 4  # cards that are drawn left to right unless asked otherwise


def to_dot(
    plan: Plan,
    *,
    direction: str | None = None,
    expand: bool = False,
    compare: bool = False,
    caption: bool = True,
) -> str:
    """The drawing of a plan as DOT text.

    Args:
      plan: the plan.
      direction: "LR" (left to right) or "TB" (top to bottom); None chooses by length.
      expand: whether repeats, and the bodies of loops and branches, are drawn in full.
      compare: whether what backpropagation would keep is drawn beside it.
      caption: whether the totals and a legend are drawn.

    Returns:
      DOT text.

    Raises:
      MoonwalkValueError: the direction is unknown.
    """
    if direction not in (*_DIRECTIONS, None):
        raise MoonwalkValueError(
            f"direction is {direction!r}", expected="'LR', 'TB' or None"
        )
    drawn = sheet(to_networkx(plan), expand)
    if direction is None:
        direction = "LR" if len(drawn.cards) <= _WIDE else "TB"
    frame = _frame(drawn, direction == "LR", compare)
    dot = graphviz.Digraph("plan")
    dot.attr(
        "graph",
        rankdir=direction,
        newrank="true",
        nodesep="0.14",
        ranksep="0.35",
        pad="0.3",
        label=_caption(plan) if caption else "",
        labelloc="t",
        labeljust="l",
        bgcolor="white",
        fontname=FONT,
        fontsize="13",
        fontcolor=INK,
    )
    text = {"fontname": FONT, "fontsize": "10", "fontcolor": INK}
    dot.attr("node", shape="box", style="filled", margin="0.08,0.05", **text)
    dot.attr("edge", arrowsize="0.7", **text)
    _Drawing(dot, frame).draw(drawn)
    if caption:
        _legend(dot, drawn)
    return dot.source


def box_id(card: str, lane: str) -> str:
    """The id in the SVG of a card's box: "stage-3-F"."""
    return re.sub(r"[^\w-]+", "-", _node(card, lane))


def _frame(drawn: Sheet, across: bool, compare: bool) -> Frame:
    cards = [*every_card(drawn)]
    keys = ("residual_bytes", "state_bytes"), ("backprop_bytes",)
    bytes_ = [sum(m[k] for m in c.members for k in ks) for c in cards for ks in keys]
    rebuilt = any("V" in m["sweeps"] for card in cards for m in card.members)
    return Frame(across, compare, rebuilt, max(bytes_, default=0))


class _Drawing:
    """Draws sheets into a Graphviz graph."""

    def __init__(self, dot: graphviz.Digraph, frame: Frame):
        self._dot, self._frame = dot, frame
        self._lanes: dict[str, list[str]] = {}

    def draw(self, drawn: Sheet, into: graphviz.Digraph | None = None) -> None:
        """Draws a chain."""
        dot = into or self._dot
        grouped = {name for group in drawn.groups for name in group.cards}
        for group in drawn.groups:
            label = f"{group.title or 'block'}  ×{group.times}"
            with _panel(dot, group.cards[0], label, INK) as part:
                for card in drawn.cards:
                    if card.name in group.cards:
                        self._card(part, card)
        for card in drawn.cards:
            if card.name not in grouped:
                self._card(dot, card)
        for name, end in drawn.ends.items():
            _end(dot, name, end)
        for wire in drawn.wires:
            self._wire(dot, wire)
        for before, after in itertools.pairwise(drawn.cards):
            self._sweeps(dot, before.name, after.name)
            for inner in before.inside:
                dot.edge(_last(inner), _node(after.name, "F"), style="invis")

    def _card(self, dot: graphviz.Digraph, card: Card) -> None:
        column = [*boxes(card, self._frame)]
        self._lanes[card.name] = [box.lane for box in column]
        for box in column:
            self._box(dot, card, box)
        _stack(dot, [_node(card.name, box.lane) for box in column])
        for inner in card.inside:
            first = card.members[0]
            label = f"{inner.title}, inside stage {first['index']}"
            with _panel(dot, f"{card.name} {inner.title}", label, PALE) as body:
                self.draw(inner, body)
            look = {"style": "dotted", "arrowhead": "none", "color": PALE}
            dot.edge(_node(card.name, "F"), _first(inner), **look)

    def _box(self, dot: graphviz.Digraph, card: Card, box: Box) -> None:
        first = card.members[0]
        tip = f"{first['name']}\n{first['source']}\n{first['reason']}"
        name = _node(card.name, box.lane)
        look = {"tooltip": tip, "id": box_id(card.name, box.lane), "group": box.lane}
        look |= box.attributes
        dot.node(name, box.text, **look)

    def _wire(self, dot: graphviz.Digraph, wire: Wire) -> None:
        value = wire.value
        within = wire.tail in self._lanes and wire.head in self._lanes
        tail = _node(wire.tail, "F") if wire.tail in self._lanes else _id(wire.tail)
        head = _node(wire.head, "F") if wire.head in self._lanes else _id(wire.head)
        look, label = {"color": ARGUMENT}, ""
        if within:
            lines = [shape(value), size(value["bytes"])]
            look = {"color": RECOMPUTED, "style": "dashed"}
            if wire.kept:
                look = {"color": KEPT, "penwidth": "3"}
                some = f" in {wire.kept} of {wire.count}"
                lines.append("kept" + (some if wire.kept < wire.count else ""))
            # A margin: the label stands close to its line.
            lines += [""] if self._frame.across else []
            label = "\n".join(f" {line} " for line in lines)
        tip = f"{value['name']} {shape(value)}, {size(value['bytes'])}"
        tip += f"\n{value['source']}"
        label = "" if wire.again else label
        weight = "1" if value["skip"] or not within else "20"
        tips = {"tooltip": tip, "labeltooltip": tip}
        dot.edge(tail, head, label, weight=weight, **tips, **look)

    def _sweeps(self, dot: graphviz.Digraph, before: str, after: str) -> None:
        """The order of the sweeps, from card to card."""
        arrows = {
            "R": {"dir": "back", "arrowtail": "vee", "color": SWEEPS["R"]},
            "V": {"arrowhead": "normal", "color": SWEEPS["V"]},
            "backprop": {"penwidth": "3", "color": LOOKS["full value"].line},
        }
        for lane, look in arrows.items():
            if lane in self._lanes[before] and lane in self._lanes[after]:
                a, b = _node(before, lane), _node(after, lane)
                dot.edge(a, b, weight="10", **look)


def _panel(dot: graphviz.Digraph, name: str, label: str, colour: str) -> Any:
    """A cluster, as a context."""
    look = {"label": label, "labelloc": "t", "labeljust": "l", "fontsize": "14"}
    look |= {"style": "rounded,dashed", "color": colour, "bgcolor": PANEL}
    return _part(dot, name=f"cluster {name}", graph_attr={"margin": "10", **look})


def _part(dot: graphviz.Digraph, **options: Any) -> Any:
    """A subgraph, as a context."""
    return dot.subgraph(**options)


def _first(drawn: Sheet) -> str:
    """The node where a chain begins: an argument, or its first card."""
    heads = (wire.tail for wire in drawn.wires if wire.tail in drawn.ends)
    return next(map(_id, heads), _node(drawn.cards[0].name, "F"))


def _last(drawn: Sheet) -> str:
    """The node where a chain ends: its result, or its last card."""
    results = (name for name, end in drawn.ends.items() if end.result)
    return next(map(_id, results), _node(drawn.cards[-1].name, "F"))


def _node(card: str, lane: str) -> str:
    return _id(f"{card} {lane}")


def _id(name: str) -> str:
    """A node's name for DOT, where a colon would begin a port."""
    return name.replace(":", "·")


def _end(dot: graphviz.Digraph, name: str, end: End) -> None:
    what = "result" if end.result else "argument"
    value, count = end.values[0], len(end.values)
    if count == 1:
        title = what if end.result else ending(path(value["name"] or what), 30)
        text = f"{title}\n{shape(value)}\n{size(value['bytes'])}"
    else:
        total = sum(v["bytes"] for v in end.values)
        text = f"{count} {what}s\n{size(total)}"
    tip = "\n".join(f"{v['name']} {shape(v)}" for v in end.values)
    look = {"style": "rounded,filled", "fillcolor": "#ffffff", "color": ARGUMENT}
    dot.node(_id(name), text, tooltip=tip, **look)


def _caption(plan: Plan) -> str:
    count = len(plan.stages)
    lines = [
        f"{plan.name or 'plan'}: {count} stage{'' if count == 1 else 's'}",
        f"kept between the passes {size(plan.residual_bytes)}   "
        f"(backpropagation {size(plan.backprop_bytes)})",
        f"{plan.extra_forwards:.2f} extra forward passes   predicted peak "
        f"{size(plan.peak_bytes)}",
    ]
    return "".join(line + r"\l" for line in lines)


def _legend(dot: graphviz.Digraph, drawn: Sheet) -> None:
    """A sample of every look that there is, before the first node of the chain."""
    found = {m["storage"] for card in every_card(drawn) for m in card.members}
    found |= {"kept state"} if any(wire.kept for wire in drawn.wires) else set()
    with _part(dot) as part:
        names: list[str] = []
        for storage, look in LOOKS.items():
            if storage in found:
                names.append(f"legend {storage}")
                border = {"color": look.line, "style": f"filled,{look.style}"}
                text = f"{look.mark} {storage}"
                part.node(names[-1], text, fillcolor=look.fill, **border)
        _stack(part, names)
        plain = {"shape": "plain", "style": ""}
        words = [f"legend {i}" for i, _ in enumerate(_WORDS)]
        for name, (text, colour) in zip(words, _WORDS, strict=True):
            part.node(name, text, fontcolor=colour, **plain)
        _stack(part, words)
        part.edge(names[0], words[0], style="invis")
    dot.edge(words[0], _first(drawn), style="invis")


_WORDS = (
    ("━━━ value kept between the passes", KEPT),
    ("╌╌╌ value made again, or not needed", RECOMPUTED),
    ("h  cotangent of a state,  dθ  gradients", INK),
)


def _stack(dot: graphviz.Digraph, names: Sequence[str]) -> None:
    """Nodes of one rank, in their order."""
    with _part(dot) as rank:
        rank.attr(rank="same")
        for name in names:
            rank.node(name)
        for a, b in itertools.pairwise(names):
            rank.edge(a, b, style="invis")
