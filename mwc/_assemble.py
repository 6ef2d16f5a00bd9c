"""From a graph to a chain of stages under a schedule: the passes, in order.

    activity -> chain -> residuals -> schedule

A loop whose body holds several products is assembled twice: as a stage whose steps
are stored in groups, and as a chain with a schedule of its own, at a few bounds of
extra time; the planner takes what needs least.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from mwc import _planner
from mwc._build import Builder, matrix_cost
from mwc._policy import pins
from mwc._rebuilding import Judge, merged, rebuilt_loop, runs
from mwc.chained import Chained
from mwc.loops import Loop
from mwc.nodes.checkpoint import Checkpoint
from mwc.stages import Stage
from passes.chain import chain
from passes.declared import Fact, facts
from passes.depend import carries_tangent, sides
from passes.graph import Graph, Var, is_var
from passes.linearise import is_inexact

_STEPS = (0.0, 0.5, 1.0, 2.0, 3.0, 5.0)  # extra forward passes that bodies may take


class Assembly:
    """A graph as stages, to be put under schedules.

    Args:
      graph: the program.
      parameters: its inputs that are parameters.
      sources: its inputs that may carry a tangent.
      options: the decorator's options.
      known: what is known of inputs that are weights.
    """

    def __init__(
        self,
        graph: Graph,
        parameters: Collection[Var],
        sources: Collection[Var],
        options: Any,
        known: Mapping[Var, Fact] | None = None,
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
        self._known = facts(graph, dict(known or {}))
        self._judge = Judge(outside, self._known)
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
        decision, crossing = self._decided(stages, extra, allowed)
        bound = {v for s in decision.stages for v in s.graph.outvars}
        pinned = tuple(v for v in self._pinned if v in bound)
        made = {id(s): m for s, m in zip(stages, self._made_from, strict=True)}
        node = Checkpoint(
            decision.stages,
            crossing,
            decision.schedule,
            pinned,
            tuple(made.get(id(stage), ()) for stage in decision.stages),
        )
        tangents = frozenset(self.tangents)
        return Chained(self.graph, self._prologue, node, tangents), decision

    def _decided(
        self, stages: Sequence[Stage], extra: float, allowed: Collection[str]
    ) -> tuple[_planner.Decision, tuple[tuple[Var, ...], ...]]:
        """Runs rebuilt or not, whichever needs less memory within the time."""
        tolerance = self._options.tolerance
        why: dict[Stage, str] = {}
        rebuilt = None
        if "moonwalk" in allowed:
            judged = [self._judge(stage) for stage in stages]
            pairs = zip(stages, judged, strict=True)
            why = {s: f"not rebuilt: {j}" for s, j in pairs if isinstance(j, str)}
            ends = {*filter(is_var, self.graph.outvars), *self._pinned}
            spans = runs(judged, self._crossing, ends, tolerance)
            if spans:
                run, alive = merged(stages, judged, self._crossing, spans, tolerance)
                found = _planner.schedule(run, alive, extra, allowed)
                rebuilt = dataclasses.replace(found, why=why), tuple(alive)
                within = found.again <= extra + _planner.SLACK
                if "checkpoint" not in allowed or (within and "stored" not in allowed):
                    return rebuilt
        plain = _planner.schedule(stages, self._crossing, extra, allowed)
        if rebuilt and rebuilt[0].again <= extra + _planner.SLACK:
            if rebuilt[0].peak <= plain.peak:
                return rebuilt
            why = {
                s: why.get(s, "rebuilding it would need more memory") for s in stages
            }
        elif rebuilt:
            why = {s: why.get(s, "rebuilding it would take more time") for s in stages}
        return dataclasses.replace(plain, why=why), self._crossing

    def _settled(
        self, i: int, stage: Stage, extra: float, allowed: Collection[str]
    ) -> Stage:
        """A loop with its best setting, or as a stage like others."""
        if not isinstance(stage, Loop):
            return stage
        choices: list[Loop] = []
        if "checkpoint" in allowed:
            nested = list(self._nested(i, stage, extra))
            whole = max((n.leaf_bytes for n in nested), default=0)
            choices = [*_planner.grouped(stage, whole), *nested]
        if "moonwalk" in allowed:
            choices += self._rebuilt(stage)
        return _planner.settle(choices, extra) or self._builder.straight(stage.graph)

    def _rebuilt(self, loop: Loop) -> list[Loop]:
        """The loop with its steps rebuilt, if they can be."""
        graph, body = loop.body.graph, loop.body
        outside = {*graph.invars} - {*graph.invars[loop.carries]}
        known = self._builder.inner_facts(loop.eqn, graph, self._known)
        one = Judge(outside, known)(body)
        if isinstance(one, str):
            return []
        return [rebuilt_loop(loop, one, self._options.tolerance)]

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
            known = self._builder.inner_facts(loop.eqn, graph, self._known)
            self._bodies[i] = Assembly(graph, given, sources, self._options, known)
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
