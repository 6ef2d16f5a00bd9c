"""Comparisons: few bits for all the masks that ties need.

JAX's derivatives of max, min and clip compare in both directions and for equality;
a pairwise (max, min) asks six or eight masks of one pair of values. All of them
follow from two, a >= b and a <= b, NaN included (both are then false):

    a > b  is  ge and not le        a == b  is  ge and le
    a < b  is  le and not ge        a != b  is  not (ge and le)

JAX 0.10 compares with the result instead: a == max(a, b) is ge, a == min(a, b) is le.
Where a pair is compared more than twice, the graph is rewritten in terms of
these two, so that a minimum cut keeps two bits. Limits: operands of equal shapes.
"""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import Any

from jax import lax

from passes import _jax
from passes.graph import Graph, Var, is_var, read
from passes.inline import rewritten

Pair = tuple[Any, Any]

# Each comparison from ge = (a >= b) and le = (a <= b).
_FROM_TWO: dict[str, Callable[[Any, Any], Any]] = {
    "ge": lambda ge, le: ge,
    "le": lambda ge, le: le,
    "gt": lambda ge, le: ge & ~le,
    "lt": lambda ge, le: le & ~ge,
    "eq": lambda ge, le: ge & le,
    "ne": lambda ge, le: ~(ge & le),
}
_MIRRORED = {"ge": "le", "le": "ge", "gt": "lt", "lt": "gt", "eq": "eq", "ne": "ne"}


def few_masks(graph: Graph) -> Graph:
    """Rewrites the pairs that are compared more than twice.

    Args:
      graph: any program; nothing else of it changes.

    Returns:
      The graph itself where there is no such pair, else one with new variables.
    """
    found = _comparisons(graph)
    times = collections.Counter(pair for pair, _ in found.values())
    many = {i: f for i, f in found.items() if times[f[0]] > 2}
    if not many:
        return graph

    masks: dict[Pair, tuple[Any, Any]] = {}

    def bind(i: int, eqn: Any, env: dict[Var, Any]) -> list[Any]:
        if i not in many:
            return _jax.bind(eqn, [read(env, v) for v in eqn.invars])
        pair, name = many[i]
        if pair not in masks:
            a, b = (read(env, v) for v in pair)
            masks[pair] = lax.ge(a, b), lax.le(a, b)
        return [_FROM_TWO[name](*masks[pair])]

    return rewritten(graph, bind)


def _comparisons(graph: Graph) -> dict[int, tuple[Pair, str]]:
    """Equations that compare two values: the pair, oriented, and how."""
    found: dict[int, tuple[Pair, str]] = {}
    oriented: dict[frozenset[Any], Pair] = {}
    for i, eqn in enumerate(graph.eqns):
        name = eqn.primitive.name
        if name not in _FROM_TWO or not all(map(is_var, eqn.invars)):
            continue
        a, b = eqn.invars
        if name == "eq":
            a, b, name = _with_result(graph, a, b)
        if a is b or a.aval.shape != b.aval.shape:
            continue
        pair = oriented.setdefault(frozenset((a, b)), (a, b))
        found[i] = pair, name if pair == (a, b) else _MIRRORED[name]
    return found


def _with_result(graph: Graph, a: Any, b: Any) -> tuple[Any, Any, str]:
    """`x == max(x, y)` as a comparison of x and y; others as they are."""
    for x, m in ((a, b), (b, a)):
        index = graph.producer.get(m)
        if index is None:
            continue
        eqn = graph.eqns[index]
        ends = list(eqn.invars)
        if eqn.primitive.name in ("max", "min") and x in filter(is_var, ends):
            y = ends[1] if ends[0] is x else ends[0]
            if is_var(y):
                return x, y, "ge" if eqn.primitive.name == "max" else "le"
    return a, b, "eq"
