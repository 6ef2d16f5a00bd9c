"""Links: a stage's backward, cut wherever a single value passes on.

A backward is a linear program from the cotangent of a result to that of an input. In
program order, wherever one value alone is alive on the paths between the two, all of
the backward passes through it; what lies between two such values is a *link*, and a
linear map. What the user declared as one map (`passes.declared`) is one link. Source:
articulation points, here of a graph in topological order.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from passes.declared import declared_p
from passes.graph import Graph, Var, is_var

Eqn = Any


@dataclasses.dataclass(frozen=True, eq=False)
class Link:
    """A stretch of a backward between two values that all of it passes through.

    Attributes:
      eqns: its equations in the backward graph.
      source: the cotangent nearer to the results.
      target: the cotangent nearer to the inputs.
    """

    eqns: tuple[Eqn, ...]
    source: Var
    target: Var


def links_between(bwd: Graph, source: Var, target: Any) -> list[Link] | None:
    """The links from one cotangent to another, in order; None without a path."""
    if target is source:
        return []
    path: set[Var] = {source}
    chosen = []
    for i in bwd.needed([target]):
        eqn = bwd.eqns[i]
        if any(is_var(v) and v in path for v in eqn.invars):
            path.update(eqn.outvars)
            chosen.append(eqn)
    if target not in path:
        return None
    last = {v: n for n, e in enumerate(chosen) for v in e.invars if is_var(v)}
    last[target] = len(chosen)
    links: list[Link] = []
    alive, start, eqns = {source}, source, []
    for n, eqn in enumerate(chosen):
        eqns.append(eqn)
        alive = {v for v in alive if last[v] > n}
        alive |= {v for v in eqn.outvars if last.get(v, -1) > n}
        if len(alive) == 1:
            (end,) = alive
            links.append(Link(tuple(eqns), start, end))
            start, eqns = end, []
    return _joined(links)


def _joined(links: list[Link]) -> list[Link]:
    """What the user declared as one map is one link.

    A mark without its partner (a loop inside such a map is a stage of its own) says
    nothing.
    """
    found: list[Link] = []
    opened: list[int] = []  # places of marks whose partner is still to come
    for link in links:
        found.append(link)
        side = side_of(link.eqns[-1])
        if side == "out":
            opened.append(len(found) - 1)
        elif side == "in" and opened:
            start = opened.pop()
            parts = found[start:]
            eqns = tuple(eqn for part in parts for eqn in part.eqns)
            found[start:] = [Link(eqns, parts[0].source, link.target)]
    return found


def side_of(eqn: Eqn) -> str:
    """Which end of a map an equation marks, "in" or "out"; else an empty text."""
    return eqn.params["side"] if eqn.primitive is declared_p else ""
