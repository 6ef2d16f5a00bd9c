"""Links: a stage's backward, cut wherever a single value passes on.

A backward is a linear program from the cotangent of a result to that of an input. In
program order, wherever one value alone is alive on the paths between the two, all of
the backward passes through it; what lies between two such values is a *link*, and a
linear map. What the user declared as one map (`passes.declared`) is one link. Source:
articulation points, here of a graph in topological order.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from passes import _jax
from passes.declared import declared_p
from passes.graph import Graph, Var, evaluate, is_var
from passes.linearise import hoisted

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

    @functools.cached_property
    def reads(self) -> tuple[Var, ...]:
        """What it reads besides the cotangent."""
        made = {self.source, *(v for eqn in self.eqns for v in eqn.outvars)}
        read = (v for eqn in self.eqns for v in eqn.invars if is_var(v))
        return tuple(v for v in dict.fromkeys(read) if v not in made)

    @functools.cached_property
    def adjoint(self) -> tuple[Graph, dict[Var, Any]]:
        """P^H, from `reads` and a value like `target` to one like `source`.

        With the values of its constants. Traced once for all stages that are equal.
        """
        graph = Graph((self.source, *self.reads), (self.target,), self.eqns)
        aval = self.source.aval

        def fun(reads: list[Any], h: Any) -> Any:
            env = dict(zip(self.reads, reads, strict=True))

            def pull(ct: Any) -> Any:
                return evaluate(graph, {**env, self.source: ct}, [self.target])[0]

            _, push = jax.vjp(pull, _jax.zeros(aval.shape, aval.dtype, aval))
            # JAX's transpose of a complex map does not conjugate.
            return jnp.conj(push(jnp.conj(h))[0])

        reads = [v.aval for v in self.reads]
        return hoisted(jax.make_jaxpr(fun)(reads, self.target.aval))


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
