"""What is said of a card: one record, shown beside the drawing and as a table's row.

A record speaks of one stage, or of all stages at one place of repeated blocks; reasons
and values that differ in numbers only are one line with a count. All of it is plain
text: whatever the user's source contains is escaped where it is put into the page.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import networkx as nx

from mwc.drawing.card import again, name_of, places
from mwc.drawing.dot import box_id
from mwc.drawing.sheet import Attributes, Card, Sheet, pattern, ranged
from mwc.drawing.style import LOOKS, path, place, shape, size

_LINES = 12  # values that are named under one heading


@dataclasses.dataclass(frozen=True)
class Facts:
    """What is said of a card.

    Attributes:
      key: the card's name, with a star if it stands for several stages.
      name: the end of the user's scope, or the source line.
      times: how many stages the card stands for, times the steps of their loop.
      where: "stages 0…88 by 8".
      source: the user's place, or "".
      kind: the primitive that dominates.
      strategy: "moonwalk", "checkpoint" or "stored"; several if stages differ.
      storages: (storage, number of stages), those of most stages first.
      bits: bools kept as bits, in all.
      kept: bytes kept between the passes for these stages, states left out.
      states: bytes of kept states that they are the first to read.
      backprop: bytes that `jax.vjp` would keep for them.
      again: how often they run again, as text.
      growth: error growth of rebuilt stages, as text.
      reasons: why they are treated so.
      values: headings, each with a line a value.
    """

    key: str
    name: str
    times: int
    where: str
    source: str
    kind: str
    strategy: str
    storages: tuple[tuple[str, int], ...]
    bits: int
    kept: int
    states: int
    backprop: int
    again: str
    growth: str
    reasons: tuple[str, ...]
    values: tuple[tuple[str, tuple[str, ...]], ...]

    @property
    def title(self) -> str:
        """Name and number of repeats."""
        return self.name + (f" ×{self.times}" if self.times > 1 else "")

    @property
    def storage(self) -> str:
        """How the stages are kept, in one line."""
        many = len(self.storages) > 1
        return ", ".join(
            f"{LOOKS[s].mark} {s}" + (f" ×{count}" if many else "")
            for s, count in self.storages
        )

    @property
    def box(self) -> str:
        """The id of its first box in a drawing."""
        return box_id(self.key.removesuffix("*"), "F")

    def panel(self) -> dict[str, Any]:
        """What the page's script shows of it, as plain data."""
        rows = {
            "where": self.where,
            "source": self.source,
            "kind": self.kind,
            "strategy": self.strategy,
            "storage": self.storage,
            "kept for it": size(self.kept) if self.kept else "",
            "bits": f"{self.bits:,}" if self.bits else "",
            "kept states": size(self.states) if self.states else "",
            "backpropagation": f"keeps {size(self.backprop)}" if self.backprop else "",
            "runs again": self.again,
            "error growth": self.growth,
        }
        shown = [[label, text] for label, text in rows.items() if text]
        values = [[heading, [*lines]] for heading, lines in self.values]
        one = {"title": self.title, "facts": shown, "reasons": [*self.reasons]}
        return one | {"values": values}


def facts(graph: nx.MultiDiGraph, card: Card) -> Facts:
    """What is said of a card.

    Args:
      graph: the plan's graph.
      card: one of the cards of its sheet.

    Returns:
      The record.
    """
    members, first = card.members, card.members[0]
    counts: dict[str, int] = {}
    for m in members:
        counts[m["storage"]] = counts.get(m["storage"], 0) + 1
    growth = [m["amplification"] for m in members if m["amplification"] is not None]
    return Facts(
        key=key_of(card),
        name=name_of(members) or first["kind"],
        times=len(members) * first["steps"],
        where=places(members),
        source=place(first["source"]),
        kind=first["kind"],
        strategy=", ".join(dict.fromkeys(m["strategy"] for m in members)),
        storages=tuple(sorted(counts.items(), key=lambda pair: -pair[1])),
        bits=sum(m["bits"] for m in members),
        kept=sum(m["residual_bytes"] for m in members),
        states=sum(m["state_bytes"] for m in members),
        backprop=sum(m["backprop_bytes"] for m in members),
        again=again(members),
        growth=f"{max(growth):.3g}×" if growth else "",
        reasons=tuple(_reasons(members)),
        values=tuple(_values(graph, card)),
    )


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of the table, with the rows that it opens into.

    Attributes:
      facts: of its card.
      inside: rows of the stages that it stands for, or of the body that it runs, each
        with its depth and the body's title if it is the first there.
    """

    facts: Facts
    inside: tuple[tuple[int, str, Facts], ...]


def rows(blocks: Sheet, every: Sheet, of: Mapping[str, Facts]) -> Iterator[Row]:
    """The table: a row a card, inside of it a row a stage.

    Args:
      blocks: the sheet with repeats as one card.
      every: the sheet with every stage.
      of: the records of the cards of both by their keys.
    """
    for card in blocks.cards:
        several = len(card.members) > 1
        single = [every.cards[m["index"]] for m in card.members]
        inside = [*_inside(single, of)] if several else [*_bodies(single[0], of)]
        yield Row(of[key_of(card)], tuple(inside))


def key_of(card: Card) -> str:
    """The key of a card's record: a card of several has the name of its first."""
    return card.name + ("*" if len(card.members) > 1 else "")


def _inside(
    cards: Iterable[Card], of: Mapping[str, Facts], depth: int = 1, title: str = ""
) -> Iterator[tuple[int, str, Facts]]:
    for i, card in enumerate(cards):
        yield depth, "" if i else title, of[card.name]
        yield from _bodies(card, of, depth + 1)


def _bodies(
    card: Card, of: Mapping[str, Facts], depth: int = 1
) -> Iterator[tuple[int, str, Facts]]:
    for sheet in card.inside:
        yield from _inside(sheet.cards, of, depth, sheet.title)


def _reasons(members: Sequence[Attributes]) -> Iterator[str]:
    """Reasons, those of most stages first."""
    alike: dict[str, list[str]] = {}
    for m in members:
        alike.setdefault(pattern(m["reason"]), []).append(m["reason"])
    for same in sorted(alike.values(), key=len, reverse=True):
        times = f" (×{len(same)})" if len(alike) > 1 else ""
        yield ranged(same) + times


def _values(
    graph: nx.MultiDiGraph, card: Card
) -> Iterator[tuple[str, tuple[str, ...]]]:
    """What the stages read, make and keep."""
    names = [_node(m) for m in card.members]
    came = [(t, v) for n in names for t, _, v in graph.in_edges(n, data=True)]
    states = [v for t, v in came if graph.nodes[t]["role"] == "stage"]
    given = {t: graph.nodes[t] for t, _ in came if graph.nodes[t]["role"] != "stage"}
    data = [v for v in given.values() if v["kind"] not in ("parameter", "derived")]
    made = [{v["value"]: v for _, _, v in graph.out_edges(n, data=True)} for n in names]
    kept = [dataclasses.asdict(v) for m in card.members for v in m["saved"]]
    headings = {
        "parameters": card.parameters,
        "arguments": data,
        "states read": states,
        "states made": [v for values in made for v in values.values()],
        "kept for it": [{**v, "name": v["kind"], "kept": False} for v in kept],
    }
    for heading, values in headings.items():
        if values:
            lines = [*_lines(values)]
            more = [f"and {len(lines) - _LINES} more"] if len(lines) > _LINES else []
            yield heading, (*lines[:_LINES], *more)


def _lines(values: Iterable[Attributes]) -> Iterator[str]:
    """A line for values that differ in numbers of their names only."""
    alike: dict[Hashable, list[Attributes]] = {}
    for v in values:
        key = pattern(v["name"]), v["shape"], v["dtype"]
        alike.setdefault(key, []).append(v)
    for same in alike.values():
        count = sum(v.get("count", 1) for v in same)
        text = path(ranged([v["name"] for v in same]))
        line = f"{text}{f' ×{count}' if count > 1 else ''}  {shape(same[0])}, "
        line += size(same[0]["bytes"]) + (" each" if count > 1 else "")
        kept = sum(bool(v.get("kept")) for v in same)
        some = f" {kept} of {count}" if kept < count else ""
        yield line + (f", kept{some}" if kept else "")


def _node(member: Attributes) -> str:
    """The graph's name of a stage."""
    inside = f"{member['parent']}/{member['body']}/" if member["parent"] else ""
    return f"{inside}stage {member['index']}"
