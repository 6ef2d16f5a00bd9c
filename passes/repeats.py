"""Repeats: a long stage run as calls of the stretches that it repeats.

A chain of thousands of layers has stages of dozens, no two of which need be alike,
though the layers are of few kinds. Where products repeat, `Repeats.evaluate` runs a
stage product by product, each stretch as a `jit` that is shared by all stretches that
are alike: JAX then derives each kind once, not each layer, and `passes.inline` makes
one list of the result. Source: JAX's own caches, by the identity of a jitted
function. Limits: stretches are alike only where every shape is; the derivative of all
of a kind carries the name scopes of the first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax

from passes.alike import key_of
from passes.flops import is_product
from passes.graph import Atom, Graph, Var, evaluate, is_var, read

_FEW = 4  # products in a stage that is run as it is


class Repeats:
    """The stretches of one program's stages.

    Args:
      program: the whole program, which tells whether products repeat in it.
    """

    def __init__(self, program: Graph):
        products = [eqn for eqn in program.eqns if is_product(eqn)]
        kinds = {tuple(v.aval for v in (*e.invars, *e.outvars)) for e in products}
        # A call that is never shared costs more than it saves.
        self._repeat = 2 * len(kinds) <= len(products)
        self._calls: dict[Any, Callable[..., list[Any]]] = {}

    def evaluate(
        self, graph: Graph, env: dict[Var, Any], outputs: Sequence[Atom]
    ) -> list[Any]:
        """Runs what `outputs` need; see `passes.graph.evaluate`."""
        ends = [i + 1 for i, eqn in enumerate(graph.eqns) if is_product(eqn)]
        if not self._repeat or len(ends) <= _FEW:
            return evaluate(graph, env, outputs)
        ends[-1:] = [len(graph.eqns)]
        needed = graph.needed(outputs, env)
        last = {v: len(graph.eqns) for v in outputs if is_var(v)}
        for i in reversed(needed):
            for v in filter(is_var, graph.eqns[i].invars):
                last.setdefault(v, i)
        for start, end in zip([0, *ends], ends, strict=False):
            eqns = tuple(graph.eqns[i] for i in needed if start <= i < end)
            bound = dict.fromkeys(v for eqn in eqns for v in eqn.outvars)
            reads = dict.fromkeys(v for e in eqns for v in e.invars if is_var(v))
            ins = tuple(v for v in reads if v not in bound)
            outs = tuple(v for v in bound if last.get(v, -1) >= end)
            found = self._call(Graph(ins, outs, eqns))(*(env[v] for v in ins))
            env.update(zip(outs, found, strict=True))
        return [read(env, v) for v in outputs]

    def _call(self, part: Graph) -> Callable[..., list[Any]]:
        key = key_of(part)
        if key not in self._calls:

            @jax.jit
            def run(*args: Any) -> list[Any]:
                env = dict(zip(part.invars, args, strict=True))
                return evaluate(part, env, part.outvars)

            self._calls[key] = run
        return self._calls[key]
