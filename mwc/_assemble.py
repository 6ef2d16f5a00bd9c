"""From a graph to a chain of stages under a schedule: the passes, in order.

    activity -> chain -> residuals -> schedule

A loop whose body holds several products is assembled twice: as a stage whose steps
are stored in groups, and as a chain with a schedule of its own, at a few bounds of
extra time; the planner takes what needs least.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator
from typing import Any

from mwc import _planner
from mwc._build import Builder, matrix_cost
from mwc._policy import pins
from mwc.chained import Chained
from mwc.loops import Loop
from mwc.nodes.checkpoint import Checkpoint
from mwc.stages import Stage
from passes.chain import chain
from passes.depend import carries_tangent, sides
from passes.graph import Graph, Var
from passes.linearise import is_inexact

_STEPS = (0.0, 0.5, 1.0, 2.0, 3.0, 5.0)  # extra forward passes that bodies may take


class Assembly:
    """A graph as stages, to be put under schedules.

    Args:
      graph: the program.
      parameters: its inputs that are parameters.
      sources: its inputs that may carry a tangent.
      options: the decorator's options.
    """

    def __init__(
        self,
        graph: Graph,
        parameters: Collection[Var],
        sources: Collection[Var],
        options: Any,
    ):
        self.graph, self._options = graph, options
        self.tangents = carries_tangent(graph, sources, is_inexact)
        self._pinned = pins(graph, options.policy)
        cut = chain(graph, sides(graph, parameters), self._pinned)
        self._crossing = tuple(p.crossing for p in cut.pieces)
        self._made_from = tuple(p.made_from for p in cut.pieces)
        outside = {*graph.invars, *cut.prologue.outvars}
        self._builder = Builder(outside, self.tangents, graph)
        self._prologue = self._builder.straight(cut.prologue)
        self._stages = [self._builder.stage(p.graph) for p in cut.pieces]
        self._bodies: dict[int, Assembly] = {}

    def __len__(self) -> int:
        return len(self._stages)

    def schedule(self, extra: float) -> tuple[Chained, _planner.Decision]:
        """The chain under the schedule of least memory for a bound of extra time."""
        allowed = _planner.allowed(self._options.strategies)
        stages = [
            self._settled(i, stage, extra, allowed)
            for i, stage in enumerate(self._stages)
        ]
        decision = _planner.schedule(stages, self._crossing, extra, allowed)
        bound = {v for s in decision.stages for v in s.graph.outvars}
        pinned = tuple(v for v in self._pinned if v in bound)
        node = Checkpoint(
            decision.stages, self._crossing, decision.schedule, pinned, self._made_from
        )
        tangents = frozenset(self.tangents)
        return Chained(self.graph, self._prologue, node, tangents), decision

    def _settled(
        self, i: int, stage: Stage, extra: float, allowed: Collection[str]
    ) -> Stage:
        """A loop with its best setting, or as a stage like others."""
        if not isinstance(stage, Loop):
            return stage
        found = None
        if "checkpoint" in allowed:
            nested = list(self._nested(i, stage, extra))
            whole = max((n.leaf_bytes for n in nested), default=0)
            choices = [*_planner.grouped(stage, whole), *nested]
            found = _planner.settle(choices, extra)
        return found or self._builder.straight(stage.graph)

    def _nested(self, i: int, loop: Loop, extra: float) -> Iterator[Loop]:
        """The loop with its body as a chain."""
        graph = loop.body.graph
        products = sum(matrix_cost(eqn) > 0 for eqn in graph.eqns)
        inner = any(eqn.primitive.name == "scan" for eqn in graph.eqns)
        if loop.pruned or (products < 2 and not inner):
            return
        if i not in self._bodies:
            carry = set(graph.invars[loop.carries])
            given = [v for v in graph.invars if v not in carry]
            pairs = zip(
                graph.invars, self._builder.moving(loop.eqn, graph), strict=True
            )
            sources = [v for v, moves in pairs if moves]
            self._bodies[i] = Assembly(graph, given, sources, self._options)
        body = self._bodies[i]
        for more in _STEPS:
            if 1 + more <= extra + _planner.SLACK and len(body) > 1:
                chained, decision = body.schedule(more)
                forwards = 1 + decision.again
                yield dataclasses.replace(
                    loop,
                    body=chained,
                    group=1,
                    leaf_forwards=forwards,
                    leaf_bytes=decision.peak,
                )
