"""Registered inverses: primitives whose derivative the user knows how to invert.

`marked` puts the two marks of `passes.declared` around every equation whose primitive
is in the table, with the rule and what it reads. Limits: one result; the state is the
first operand; residuals come from operands and parameters: where a rule's read an array
of its own, no rule is used in that program and its stages are not rebuilt.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from passes import _jax
from passes.declared import Vijp, declare
from passes.graph import Graph, read
from passes.inline import inline


@dataclasses.dataclass(frozen=True, eq=False)
class Rule:
    """A user's rule for a primitive.

    Attributes:
      vijp: (h_in, residuals, **params) -> h_out.
      residuals: (*operands, **params) -> residuals, or None.
      verdict: "structural" or "generic".
      check: raises where (name, found, expected, source) has types that differ.
    """

    vijp: Callable[..., Any]
    residuals: Callable[..., Any] | None
    verdict: str
    check: Callable[[str, Any, Any, str], None]


_TABLE: dict[Any, Rule] = {}


def register(primitive: Any, rule: Rule) -> None:
    """Enters a rule; the last one counts."""
    _TABLE[primitive] = rule


def marked(graph: Graph) -> Graph:
    """The graph with marks around registered primitives; itself without any."""
    if not any(eqn.primitive in _TABLE for eqn in graph.eqns):
        return graph

    def run(*args: Any) -> list[Any]:
        env = dict(zip(graph.invars, args, strict=True))
        for eqn in graph.eqns:
            values = [read(env, v) for v in eqn.invars]
            rule = _TABLE.get(eqn.primitive)
            outs = (
                _jax.bind(eqn, values)
                if rule is None
                else [_between(eqn, rule, values)]
            )
            env.update(zip(eqn.outvars, outs, strict=True))
        return [read(env, v) for v in graph.outvars]

    jaxpr, consts = _jax.opened(jax.make_jaxpr(run)(*[v.aval for v in graph.invars]))
    if consts:
        return graph
    return inline(_jax.closed(jaxpr.invars, jaxpr.outvars, jaxpr.eqns))


def _between(eqn: Any, rule: Rule, values: list[Any]) -> Any:
    x = declare(values[0], side="in", what="vijp")
    (y,) = _jax.bind(eqn, [x, *values[1:]])
    kept = (
        () if rule.residuals is None else rule.residuals(x, *values[1:], **eqn.params)
    )
    flat, tree = jax.tree.flatten(kept)
    flat = [jax.lax.stop_gradient(r) for r in flat]

    def rebuild(residuals: list[Any], h_in: Any) -> Any:
        return rule.vijp(h_in, jax.tree.unflatten(tree, residuals), **eqn.params)

    name = eqn.primitive.name
    found = jax.eval_shape(rebuild, flat, x)
    rule.check(name, found, jax.typeof(y), _jax.source_line(eqn))
    made = Vijp(rebuild, rule.verdict, name)
    return declare(y, side="out", what="vijp", rule=made, residuals=flat)
