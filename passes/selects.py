"""Selects: a cotangent that JAX selects in two parts is selected once.

The transpose of select(c, f(x), g(x)) is a sum, f'(select(c, h, 0)) + g'(select(c, 0,
h)). Where f' and g' take zero to zero and act on each entry by itself, that is
select(c, f'(h), g'(h)): three operations less in every sweep past an absolute value,
and compile time goes with them. Nothing changes but the sign of a zero, which in what
a user adds up may matter. Limits: sums that JAX's transposes make; f' and g' of
negations, conversions and factors that are finite numbers of the program.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from passes.graph import Graph, Var, is_var
from passes.inline import prune

Eqn = Any

_LINEAR = {"neg", "mul", "convert_element_type", "copy"}
_SPREAD = {"broadcast_in_dim", "convert_element_type", "pvary", "pcast", "reshard"}


class _Part(NamedTuple):
    """One operand of such a sum.

    Attributes:
      select: between a cotangent and zeros.
      side: where the cotangent is among its operands.
      chain: what is done to the result, in order.
    """

    select: Eqn
    side: int
    chain: list[Eqn]

    @property
    def ct(self) -> Var:
        """The cotangent."""
        return self.select.invars[self.side]


def one_select(graph: Graph) -> Graph:
    """Rewrites the sums of two parts of one cotangent.

    Args:
      graph: any program; nothing else of it changes.

    Returns:
      The graph itself where there is no such sum.
    """
    found = [_parts(graph, eqn) for eqn in graph.eqns]
    if not any(found):
        return graph
    eqns: list[Eqn] = []
    for eqn, parts in zip(graph.eqns, found, strict=True):
        if not parts:
            eqns.append(eqn)
            continue
        cases = []
        for part in parts:
            old, new = part.select.outvars[0], part.ct
            for link in part.chain:
                operands = [new if v is old else v for v in link.invars]
                (old,) = link.outvars
                new = type(old)(old.aval)
                eqns.append(link.replace(invars=operands, outvars=[new]))
            cases.append(new)
        select = parts[0].select
        operands = [select.invars[0], *cases]
        eqns.append(select.replace(invars=operands, outvars=eqn.outvars))
    return prune(Graph(graph.invars, graph.outvars, tuple(eqns)))


def _parts(graph: Graph, eqn: Eqn) -> list[_Part]:
    """Those of a sum in the order of the select's operands; none if it is another."""
    if eqn.primitive.name != "add_any":
        return []
    found = [_part(graph, v) for v in eqn.invars]
    parts = sorted((p for p in found if p is not None), key=lambda p: p.side)
    if [p.side for p in parts] != [1, 2]:
        return []
    one, two = parts
    same = one.ct is two.ct and one.select.invars[0] is two.select.invars[0]
    return parts if same and is_var(one.ct) else []


def _part(graph: Graph, atom: Any) -> _Part | None:
    """What an operand of a sum is, if it is such a part."""
    chain: list[Eqn] = []
    while (eqn := _made_by(graph, atom)) is not None:
        if eqn.primitive.name == "select_n":
            sides = [i for i, v in enumerate(eqn.invars) if i and not _zero(graph, v)]
            few = len(eqn.invars) == 3 and len(sides) == 1
            return _Part(eqn, sides[0], chain[::-1]) if few else None
        moving = [v for v in eqn.invars if not _finite(v)]
        if eqn.primitive.name not in _LINEAR or len(moving) != 1:
            return None
        chain.append(eqn)
        (atom,) = moving
    return None


def _made_by(graph: Graph, atom: Any) -> Eqn | None:
    index = graph.producer.get(atom) if is_var(atom) else None
    return None if index is None else graph.eqns[index]


def _finite(atom: Any) -> bool:
    return not is_var(atom) and bool(np.all(np.isfinite(atom.val)))


def _zero(graph: Graph, atom: Any) -> bool:
    """Whether it is zeros, spread or as they are."""
    while (eqn := _made_by(graph, atom)) is not None:
        if eqn.primitive.name not in _SPREAD:
            return False
        atom = eqn.invars[0]
    return not is_var(atom) and bool(np.all(np.equal(atom.val, 0)))
