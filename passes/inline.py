"""Normalise: one flat list of equations, calls inlined, dead code dropped.

A `jit` inside the user's function is only a name scope to us; its equations join
the list under that scope. Functions with a derivative rule of their own
(`custom_jvp`, `custom_vjp`), checkpointed regions, loops and branches stay single
equations. Limits: a `jit` with its own shardings or compiler options is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from passes import _jax
from passes.graph import Graph, Var, is_var, read


def inline(jaxpr: Any) -> Graph:
    """Inlines calls and drops what no result and no effect needs.

    Args:
      jaxpr: a jaxpr without constants.

    Returns:
      A graph whose inputs are the jaxpr's own variables.
    """
    inner, consts = _jax.opened(jaxpr)
    assert not consts, "constants are hoisted to inputs before this point"
    eqns: list[Any] = []
    outs = _emit(inner, list(inner.invars), None, eqns)
    return prune(Graph(tuple(inner.invars), tuple(outs), tuple(eqns)))


def _emit(jaxpr: Any, operands: list[Any], outer: Any, into: list[Any]) -> list[Any]:
    env: dict[Any, Any] = dict(zip(jaxpr.invars, operands, strict=True))

    def look(atom: Any) -> Any:
        return env.get(atom, atom) if is_var(atom) else atom

    top = outer is None
    for eqn in jaxpr.eqns:
        invars = [look(v) for v in eqn.invars]
        source = eqn.source_info if top else _jax.nest_source(eqn, outer)
        body = _jax.call_body(eqn)
        inner, consts = (None, []) if body is None else _jax.opened(body)
        if inner is not None and not consts and not inner.constvars:
            call = eqn if top else eqn.replace(source_info=source)
            results = _emit(inner, invars, call, into)
            env.update(zip(eqn.outvars, results, strict=True))
            continue
        outvars = list(eqn.outvars)
        if not top:
            # The body of a call that runs twice binds fresh variables each time.
            outvars = [v if _jax.is_drop(v) else type(v)(v.aval) for v in outvars]
            env.update(zip(eqn.outvars, outvars, strict=True))
        into.append(eqn.replace(invars=invars, outvars=outvars, source_info=source))
    return [look(v) for v in jaxpr.outvars]


def rewritten(
    graph: Graph, bind: Callable[[int, Any, dict[Var, Any]], list[Any]]
) -> Graph:
    """The graph with other equations in place of its own, in new variables.

    Args:
      graph: any program.
      bind: gives the results of an equation from its place, itself, and the values of
        variables so far; called once for each.

    Returns:
      The graph itself where the new one would have arrays of its own.
    """

    def run(*args: Any) -> list[Any]:
        env = dict(zip(graph.invars, args, strict=True))
        for i, eqn in enumerate(graph.eqns):
            env.update(zip(eqn.outvars, bind(i, eqn, env), strict=True))
        return [read(env, v) for v in graph.outvars]

    made = jax.make_jaxpr(run)(*[v.aval for v in graph.invars])
    jaxpr, consts = _jax.opened(made)
    if consts:
        return graph
    return inline(_jax.closed(jaxpr.invars, jaxpr.outvars, jaxpr.eqns))


def prune(graph: Graph) -> Graph:
    """Drops the equations that neither a result nor an effect needs."""
    loud = [v for eqn in graph.eqns if eqn.effects for v in eqn.invars]
    keep = set(graph.needed([*graph.outvars, *loud]))
    eqns = [e for i, e in enumerate(graph.eqns) if i in keep or e.effects]
    return Graph(graph.invars, graph.outvars, tuple(eqns))
