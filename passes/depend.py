"""Activity: what each equation's results depend on.

- CONST: on nothing (iota, zeros): recomputed wherever it is read.
- PARAMETER: on parameters alone (triu(W)+I, weight norm, casts): *parameter-side*,
  recomputed and differentiated at the stage that reads it, outside the chain.
- STATE: on data, captured arrays, random draws: the chain.

A program most of whose arithmetic is one computation on parameters has no chain of that
kind (the "parameter" is what flows, as in `grad(f)(x)`); there every value is STATE.
Source: DESIGN section 4. Limits: dependence is by data flow, so `stop_gradient` counts.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Collection, Sequence
from typing import Any

from passes.flops import eqn_flops
from passes.graph import Graph, Var, is_var


class Side(enum.IntEnum):
    """What a value depends on; the join of two is the larger."""

    CONST = 0
    PARAMETER = 1
    STATE = 2


def sides(graph: Graph, parameters: Collection[Var]) -> list[Side]:
    """The side of every equation.

    Args:
      graph: the program.
      parameters: the inputs that are parameters.

    Returns:
      One side an equation.
    """
    found = _propagate(graph, parameters)
    costs = [eqn_flops(eqn).total for eqn in graph.eqns]
    flows = 2 * _largest_map(graph, found, costs) > sum(costs)
    return _propagate(graph, ()) if flows else found


def _largest_map(graph: Graph, found: list[Side], costs: Sequence[float]) -> float:
    """The cost of the largest connected computation on parameters."""
    root: dict[Var, Var] = {}

    def find(v: Var) -> Var:
        while root[v] is not v:
            root[v] = root[root[v]]
            v = root[v]
        return v

    total: dict[Var, float] = {}
    for eqn, side, cost in zip(graph.eqns, found, costs, strict=True):
        if side is not Side.PARAMETER:
            continue
        reads = {find(v) for v in eqn.invars if is_var(v) and v in root}
        top = eqn.outvars[0]
        root.update((v, top) for v in (*eqn.outvars, *reads))
        total[top] = cost + sum(total.pop(v) for v in reads)
    return max(total.values(), default=0.0)


def _propagate(graph: Graph, parameters: Collection[Var]) -> list[Side]:
    known = {v: Side.STATE for v in graph.invars}
    known |= {v: Side.PARAMETER for v in parameters}
    found = []
    for eqn in graph.eqns:
        reads = [known[v] for v in eqn.invars if is_var(v)]
        side = max(reads, default=Side.CONST)
        # An effect or a draw without a key happens once, in the chain.
        if eqn.effects or eqn.primitive.name == "rng_uniform":
            side = Side.STATE
        known.update(dict.fromkeys(eqn.outvars, side))
        found.append(side)
    return found


def reached(graph: Graph, sources: Collection[Var]) -> set[Var]:
    """The variables that depend on any of `sources`, themselves included."""
    found = set(sources)
    for eqn in graph.eqns:
        if any(is_var(v) and v in found for v in eqn.invars):
            found.update(eqn.outvars)
    return found


def carries_tangent(
    graph: Graph, sources: Collection[Var], inexact: Callable[[Any], bool]
) -> set[Var]:
    """The variables through which a tangent of `sources` may flow.

    Only inexact values carry tangents, and `stop_gradient` does not appear: JAX
    removes it by a `custom_jvp`-like rule when tracing. An over-estimate is harmless
    (the cotangent found is zero), an under-estimate would lose gradients.
    """
    found = {v for v in sources if inexact(v)}
    for eqn in graph.eqns:
        if any(is_var(v) and v in found for v in eqn.invars):
            found.update(v for v in eqn.outvars if inexact(v))
    return found


def last_reads(graph: Graph, order: Sequence[int]) -> dict[Var, int]:
    """For each variable, the last position of `order` whose equation reads it."""
    last: dict[Var, int] = {}
    for position, index in enumerate(order):
        for v in graph.eqns[index].invars:
            if is_var(v):
                last[v] = position
    return last
