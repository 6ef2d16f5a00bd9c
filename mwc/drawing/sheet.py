"""What is drawn of a graph: cards, what they read from outside, and wires between them.

Stages that repeat are one card, or one block of cards, with the number of repeats. Two
stages are alike if their scopes differ in numbers only, they stand on one source line
and are of one kind, their largest results and parameters have one type, and both are
rebuilt or neither: what is kept of them may differ, and a card says of how many.
Arguments that one card alone reads are one end of a wire, and so are all results that
it makes. Expanded, every stage is a card of its own and bodies of loops and branches
are sheets inside.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import networkx as nx

from passes.blocks import Block, blocks

Attributes = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Card:
    """One drawn box: a stage, or all stages at one place of repeated blocks.

    Attributes:
      name: the node's name.
      members: attributes of its stages.
      parameters: attributes of the arguments at its side, with the `count` of them.
      inside: sheets of what its stage runs, if it is expanded.
    """

    name: str
    members: tuple[Attributes, ...]
    parameters: tuple[Attributes, ...] = ()
    inside: tuple[Sheet, ...] = ()


@dataclasses.dataclass(frozen=True)
class Group:
    """Cards that repeat together.

    Attributes:
      title: what their scopes have in common.
      times: how often.
      cards: their names.
    """

    title: str
    times: int
    cards: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class End:
    """Arguments, or results, at the end of a wire.

    Attributes:
      result: whether they are results.
      values: attributes of each.
    """

    result: bool
    values: tuple[Attributes, ...]


@dataclasses.dataclass(frozen=True)
class Wire:
    """A value from one node to another.

    Attributes:
      tail: the node that makes it.
      head: the node that reads it.
      value: attributes of the edge.
      kept: how many of the edges that it stands for are of kept values.
      count: how many it stands for.
      again: whether the value has a wire to a nearer reader.
    """

    tail: str
    head: str
    value: Attributes
    kept: int
    count: int
    again: bool


@dataclasses.dataclass(frozen=True)
class Sheet:
    """A chain as it is drawn.

    Attributes:
      title: of a body, how often it runs.
      cards: in order.
      groups: of several cards.
      ends: arguments that are no parameters, and results, by the names of their nodes.
      wires: between cards and ends.
    """

    title: str
    cards: tuple[Card, ...]
    groups: tuple[Group, ...]
    ends: Mapping[str, End]
    wires: tuple[Wire, ...]


def sheet(graph: nx.MultiDiGraph, expand: bool) -> Sheet:
    """The sheet of a plan's graph.

    Args:
      graph: the graph.
      expand: whether every stage, and what is inside of it, is drawn.

    Returns:
      The sheet of the function itself; those of bodies are inside its cards.
    """
    chains: dict[Any, list[str]] = {}
    for name, node in graph.nodes.items():
        chains.setdefault((node["parent"], node["body"]), []).append(name)
    bodies: dict[str, list[str]] = {}
    for parent, body in chains:
        bodies.setdefault(parent, []).append(body)

    def drawn(parent: str | None, body: str | None) -> Sheet:
        nodes = chains.get((parent, body), [])
        stages = [name for name in nodes if graph.nodes[name]["role"] == "stage"]
        inside = {
            name: tuple(drawn(name, label) for label in bodies.get(name, ()))
            for name in (stages if expand else ())
        }
        return _sheet(graph, body, nodes, stages, inside)

    return drawn(None, None)


def every_card(drawn: Sheet) -> Iterator[Card]:
    """The cards of a sheet and of those inside, in order."""
    for card in drawn.cards:
        yield card
        for inner in card.inside:
            yield from every_card(inner)


def _sheet(
    graph: nx.MultiDiGraph,
    body: str | None,
    nodes: Sequence[str],
    stages: Sequence[str],
    inside: Mapping[str, tuple[Sheet, ...]],
) -> Sheet:
    """The sheet of one chain; every stage is a card where some are expanded."""
    alone = [Block(i, 1, 1) for i in range(len(stages))]
    found = alone if inside else blocks([_key(graph, name) for name in stages])
    card_of: dict[str, str] = {}
    cards: list[Card] = []
    groups: list[Group] = []
    for block in found:
        first = len(cards)
        for position in range(block.period):
            names = [stages[i] for i in block.members(position)]
            card_of.update(dict.fromkeys(names, names[0]))
            members = tuple(graph.nodes[name] for name in names)
            given = tuple(_parameters(graph, names))
            cards.append(Card(names[0], members, given, inside.get(names[0], ())))
        if block.period > 1:
            held = cards[first:]
            title = common([m["name"] for card in held for m in card.members])
            group = Group(title, block.times, tuple(card.name for card in held))
            groups.append(group)
    ends: dict[str, End] = {}
    end_of: dict[str, str] = {}
    for readers, names in _arguments(graph, nodes, card_of).items():
        several = [names] if len(readers) == 1 else [[name] for name in names]
        for row in several:
            end_of.update(dict.fromkeys(row, row[0]))
            ends[row[0]] = End(False, tuple(graph.nodes[name] for name in row))
    for card, results in _results(graph, card_of).items():
        ends[f"results of {card}"] = End(True, tuple(results))
    wires = tuple(_wires(graph, card_of, end_of))
    times = graph.nodes[stages[0]]["times"] if stages else 1
    title = "" if body is None else f"{body} ×{times}" if times > 1 else body
    return Sheet(title, tuple(cards), tuple(groups), ends, wires)


def _key(graph: nx.MultiDiGraph, name: str) -> Hashable:
    node = graph.nodes[name]
    made = (value for _, _, value in graph.out_edges(name, data=True))
    given = (graph.nodes[tail] for tail, _ in graph.in_edges(name))
    types = _largest(made), _largest(filter(_is_parameter, given))
    what = node["source"], node["kind"], node["strategy"] == "moonwalk"
    return pattern(node["name"]), *what, *types


def _largest(values: Iterable[Attributes]) -> Hashable:
    """The type of the largest value; of small ones, blocks at the ends have fewer."""
    types = ((v["bytes"], v["shape"], v["dtype"]) for v in values)
    return max(types, default=None)


def pattern(text: str) -> str:
    """A name with its numbers left out."""
    return re.sub(r"\d+", "*", text)


def common(names: Sequence[str]) -> str:
    """What scopes have in common, numbers that run as a range: "Net/Block_0…11"."""
    parts = [name.split("/") for name in names]
    shared: list[str] = []
    for level in zip(*parts, strict=False):
        if len({pattern(part) for part in level}) > 1:
            break
        shared.append(ranged(level))
    return "/".join(shared)


def ranged(texts: Sequence[str]) -> str:
    """Texts that differ in numbers as one, the numbers that run as "0…11"."""
    rows = [re.split(r"(\d+)", text) for text in texts]
    columns = zip(*rows, strict=True)
    return "".join(_span(column) for column in columns)


def _span(column: Sequence[str]) -> str:
    if len(set(column)) == 1:
        return column[0]
    numbers = sorted(map(int, column))
    return f"{numbers[0]}…{numbers[-1]}"


def _is_parameter(node: Attributes) -> bool:
    return node["role"] == "argument" and node["kind"] in ("parameter", "derived")


def _parameters(
    graph: nx.MultiDiGraph, names: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """The parameters of stages, those of repeats that differ in numbers as one."""
    rows: dict[Hashable, list[Attributes]] = {}
    for name in names:
        for tail, _ in graph.in_edges(name):
            node = graph.nodes[tail]
            if _is_parameter(node):
                key = pattern(node["name"]), node["shape"], node["dtype"]
                rows.setdefault(key, []).append(node)
    for row in rows.values():
        unique = {node["name"]: node for node in row}
        name = ranged([*unique])
        yield {**row[0], "name": name, "count": len(unique)}


def _arguments(
    graph: nx.MultiDiGraph, nodes: Sequence[str], card_of: Mapping[str, str]
) -> dict[tuple[str, ...], list[str]]:
    """Arguments that are no parameters, by the cards that read them."""
    found: dict[tuple[str, ...], list[str]] = {}
    for name in nodes:
        node = graph.nodes[name]
        if node["role"] == "argument" and not _is_parameter(node):
            heads = [card_of[h] for _, h in graph.out_edges(name) if h in card_of]
            if heads:
                found.setdefault(tuple(dict.fromkeys(heads)), []).append(name)
    return found


def _results(
    graph: nx.MultiDiGraph, card_of: Mapping[str, str]
) -> dict[str, list[Attributes]]:
    """Results, by the cards that make them."""
    found: dict[str, list[Attributes]] = {}
    for name, card in card_of.items():
        for _, head, value in graph.out_edges(name, data=True):
            if graph.nodes[head]["role"] == "result":
                found.setdefault(card, []).append(value)
    return found


def _wires(
    graph: nx.MultiDiGraph, card_of: Mapping[str, str], end_of: Mapping[str, str]
) -> Iterator[Wire]:
    order = {name: i for i, name in enumerate(dict.fromkeys(card_of.values()))}
    bundles: dict[tuple[Any, ...], list[Attributes]] = {}
    for tail in (*end_of, *card_of):
        for _, head, value in graph.out_edges(tail, data=True):
            key: tuple[Any, ...]
            if head not in card_of:
                key = card_of.get(tail), f"results of {card_of.get(tail)}"
            elif tail in end_of:
                key = end_of[tail], card_of[head]
            else:
                key = card_of[tail], card_of[head], value["shape"], value["dtype"]
                # From one repeat to the next: the card itself stands for it.
                if order[card_of[tail]] >= order[card_of[head]]:
                    continue
            if key[0] is not None:
                bundles.setdefault(key, []).append(value)
    nearest: dict[Hashable, int] = {}
    for (a, b, *_), values in bundles.items():
        value = a, values[0]["value"]
        at = order.get(b, len(order))
        nearest[value] = min(at, nearest.get(value, at))
    for (a, b, *_), values in bundles.items():
        kept = sum(value["kept"] for value in values)
        again = order.get(b, len(order)) > nearest[a, values[0]["value"]]
        yield Wire(a, b, values[0], kept, len(values), again)
