"""The engine: a jaxpr in, a program that can be run forwards and backwards out.

    trace -> normalise -> activity -> chain -> residuals -> schedule -> emit

Each arrow is a pass (`passes`) or a class of `mwc`; this module only calls them in
order. Differentiating an emitted program gives wrong numbers: that is the business of
`mwc._primitives`, which uses the mathematical derivative.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from mwc._build import Builder
from mwc._describe import describe
from mwc._plan import Plan
from mwc._planner import schedule
from mwc._policy import pins
from mwc.nodes.checkpoint import Checkpoint
from mwc.stages import Stage
from passes.chain import chain
from passes.depend import carries_tangent, sides
from passes.flops import eqn_flops
from passes.graph import Graph, Var, is_var, read
from passes.inline import inline
from passes.linearise import is_inexact

Array = Any


def build(jaxpr: Any, roles: Sequence[str], options: Any) -> Emitted:
    """Compiles a function.

    Args:
      jaxpr: a closed jaxpr without constants.
      roles: "parameter" or "data" for each of its inputs.
      options: the decorator's options (`mwc._options.Options`).

    Returns:
      The program with its plan.
    """
    graph = inline(jaxpr)
    cost = lambda eqn: eqn_flops(eqn).total
    parameters = [
        v for v, r in zip(graph.invars, roles, strict=True) if r == "parameter"
    ]
    pinned = pins(graph, options.policy)
    cut = chain(graph, sides(graph, parameters, cost), pinned)
    tangents = carries_tangent(graph, graph.invars, is_inexact)
    outside = {*graph.invars, *cut.prologue.outvars}
    builder = Builder(outside, tangents)
    stages = tuple(builder.stage(piece.graph) for piece in cut.pieces)
    prologue = builder.straight(cut.prologue)
    crossing = tuple(p.crossing for p in cut.pieces)
    decision = schedule(stages, crossing, builder, options)
    bound = {v for s in decision.stages for v in s.graph.outvars}
    pinned = tuple(v for v in pinned if v in bound)
    node = Checkpoint(decision.stages, crossing, decision.schedule, pinned)
    plan = describe(node, decision, graph, options.strict)
    return Emitted(jaxpr, graph, prologue, node, plan)


@dataclasses.dataclass(frozen=True, eq=False)
class Emitted:
    """A compiled function; see `mwc._program.Program`."""

    jaxpr: Any
    graph: Graph
    prologue: Stage
    node: Checkpoint
    plan: Plan

    def forward(
        self, active: tuple[bool, ...], args: Sequence[Array]
    ) -> tuple[list[Array], list[Array]]:
        """Results and saved values."""
        values = dict(zip(self.graph.invars, args, strict=True))
        self.prologue.run(values, effects=True)
        saved = self.node.forward(values, self._reached(active))
        return [read(values, v) for v in self.graph.outvars], saved

    def backward(
        self,
        active: tuple[bool, ...],
        wanted: tuple[bool, ...],
        args: Sequence[Array],
        saved: Sequence[Array],
        cts: Sequence[Array | None],
    ) -> list[Array]:
        """Cotangents of the wanted arguments."""
        values = dict(zip(self.graph.invars, args, strict=True))
        asked = self._reached(wanted)
        due: dict[Var, Array] = {}
        for v, ct in zip(self.graph.outvars, cts, strict=True):
            if ct is not None and is_var(v) and v in asked:
                due[v] = due[v] + ct if v in due else ct
        self.prologue.run(values)
        self.node.backward(values, saved, self._reached(active), asked, due)
        outs = self.prologue.graph.outvars
        last = {v: due.pop(v) for v in outs if v in due}
        if last:
            found = self.prologue.pull(values, [], False, last, asked)
            for v, ct in found.items():
                due[v] = due[v] + ct if v in due else ct
        return [
            due[v] if v in due else jnp.zeros(v.aval.shape, v.aval.dtype)
            for v, w in zip(self.graph.invars, wanted, strict=True)
            if w
        ]

    def _reached(self, flags: tuple[bool, ...]) -> set[Var]:
        sources = [v for v, f in zip(self.graph.invars, flags, strict=True) if f]
        return carries_tangent(self.graph, sources, is_inexact)
