"""From a graph to a chain of stages under a schedule: the passes, in order.

    activity -> chain -> residuals -> schedule

A loop whose body holds several products is assembled twice: as a stage whose steps
are stored in groups, and as a chain with a schedule of its own, at a few bounds of
extra time; the planner takes what needs least. So are choices between branches.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from mwc import _planner
from mwc._build import Builder, matrix_cost, state_of
from mwc._policy import pins
from mwc._rebuilding import Judge, merged, rebuilt_loop, runs
from mwc.chained import Chained
from mwc.loops import Loop
from mwc.nodes.checkpoint import Checkpoint
from mwc.nodes.rebuild import Rebuilt
from mwc.rolled import RebuiltLoop
from mwc.stages import Stage, Straight
from passes import _jax
from passes.alike import key_of
from passes.chain import chain, is_choice
from passes.declared import Fact, facts
from passes.depend import carries_tangent, sides
from passes.fixed import Fixed
from passes.graph import Graph, Var, is_var
from passes.inline import inline
from passes.linearise import is_inexact
from passes.vijps import marked

_Decided = tuple[_planner.Decision, tuple[tuple[Var, ...], ...]]
_STEPS = (0.0, 0.5, 1.0, 2.0, 3.0, 5.0)  # extra forward passes that bodies may take


class Assembly:
    """A graph as stages, to be put under schedules.

    Args:
      graph: the program.
      parameters: its inputs that are parameters.
      sources: its inputs that may carry a tangent.
      options: the decorator's options.
      known: what is known of inputs that are weights.
      captured: inputs that are the same array at every call, with that array.
      guarded: whether readings of guards have a way out: not from a loop's body.
    """

    def __init__(
        self,
        graph: Graph,
        parameters: Collection[Var],
        sources: Collection[Var],
        options: Any,
        known: Mapping[Var, Fact] | None = None,
        captured: Mapping[Var, Any] | None = None,
        guarded: bool = True,
    ):
        self.graph, self._options = graph, options
        self.tangents = carries_tangent(graph, sources, is_inexact)
        self._pinned = pins(graph, options.policy)
        cut = chain(graph, sides(graph, parameters), self._pinned)
        self._crossing = tuple(p.crossing for p in cut.pieces)
        self._made_from = tuple(p.made_from for p in cut.pieces)
        outside = {*graph.invars, *cut.prologue.outvars}
        data = {*graph.invars} - {*parameters}
        self._builder = Builder(outside, self.tangents, graph, data)
        self._prologue = self._builder.straight(cut.prologue)
        self._stages = [self._builder.stage(p.graph) for p in cut.pieces]
        self._known = facts(graph, dict(known or {}))
        self._fixed = Fixed(graph, captured or {})
        self._judge = Judge(outside, self._known, self._fixed)
        self._given = {*parameters, *cut.prologue.outvars}
        self._bodies: dict[int, Assembly] = {}
        self._rolled: dict[int, RebuiltLoop | str] = {}
        self._branches: dict[Any, Assembly] = {}
        self._guarded = guarded

    @property
    def has_schedules(self) -> bool:
        """Whether there is more than one way to run it."""
        loops = any(isinstance(stage, Loop) for stage in self._stages)
        return loops or len(self._stages) > 1

    def schedule(self, extra: float) -> tuple[Chained, _planner.Decision]:
        """The chain under the schedule of least memory for a bound of extra time."""
        allowed = _planner.allowed(self._options.strategies, self._guarded)
        stages = [
            self._settled(i, stage, extra, allowed)
            for i, stage in enumerate(self._stages)
        ]
        found = [
            self._decided([*self._chosen(stages, more)], extra, allowed)
            for more in self._bounds(extra, allowed)
        ]
        decision, crossing = min(found, key=lambda f: _planner.rank(f[0], extra))
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
    ) -> _Decided:
        """Runs rebuilt or not, whichever needs less memory within the time."""
        why: dict[Stage, str] = {}
        rebuilt = None
        if "moonwalk" in allowed:
            judged = [self._judged(i, stage) for i, stage in enumerate(stages)]
            pairs = zip(stages, judged, strict=True)
            why = {s: f"not rebuilt: {j}" for s, j in pairs if isinstance(j, str)}
            rebuilt = self._with_runs(stages, judged, extra, allowed, why)
        within = rebuilt and rebuilt[0].again <= extra + _planner.SLACK
        forced = not {"checkpoint", "stored"} & {*allowed}
        if rebuilt and (forced or (within and "checkpoint" not in allowed)):
            return rebuilt
        plain = _planner.schedule(stages, self._crossing, extra, allowed)
        if rebuilt and within:
            if rebuilt[0].peak <= plain.peak:
                return rebuilt
            why = {
                s: why.get(s, "rebuilding it would need more memory") for s in stages
            }
        elif rebuilt:
            why = {s: why.get(s, "rebuilding it would take more time") for s in stages}
        return dataclasses.replace(plain, why=why), self._crossing

    def _with_runs(
        self,
        stages: Sequence[Stage],
        judged: Sequence[Rebuilt | str],
        extra: float,
        allowed: Collection[str],
        why: Mapping[Stage, str],
    ) -> _Decided | None:
        """The chain with its runs rebuilt, if there is one.

        When sweep R begins, the state and the cotangent of the very last stage are
        still at hand: stored, it has its gradients there and then, and neither is made
        again in sweep V. Where that needs no more memory, it is.
        """
        tolerance = self._options.tolerance
        ends = {*filter(is_var, self.graph.outvars), *self._pinned}
        spans = runs(judged, self._crossing, ends, tolerance)
        if not spans:
            return None

        def decided(
            spans: Sequence[tuple[int, int]], why: Mapping[Stage, str]
        ) -> _Decided:
            run, alive = merged(stages, judged, self._crossing, ends, spans, tolerance)
            found = _planner.schedule(run, alive, extra, allowed)
            return dataclasses.replace(found, why=why), tuple(alive)

        tries = [decided(spans, why)]
        *others, (start, stop) = spans
        if "stored" in allowed and stop - start > 2:
            last = {stages[stop - 1]: "not rebuilt: state and cotangent are at hand"}
            tries.append(decided([*others, (start, stop - 1)], {**why, **last}))
        return min(tries, key=lambda found: _planner.rank(found[0], extra))

    def _judged(self, i: int, stage: Stage) -> Rebuilt | str:
        """A stage as one of a run, or why it is not; a loop is none."""
        found = self._rolled.get(i)
        if found is None:
            return self._judge(stage)
        return found if isinstance(found, str) else "another way needs less memory"

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
            if i not in self._rolled:
                self._rolled[i] = self._rebuilt(i, stage)
            found = self._rolled[i]
            choices += [] if isinstance(found, str) else [found]
        return _planner.settle(choices, extra) or self._builder.straight(stage.graph)

    def _bounds(self, extra: float, allowed: Collection[str]) -> list[float | None]:
        """Extra time of the chains in branches; None leaves them to JAX."""
        choices = any(_choice(stage) is not None for stage in self._stages)
        if not choices or "checkpoint" not in allowed:
            return [None]
        return [None, *(m for m in _STEPS if 1 + m <= extra + _planner.SLACK)]

    def _chosen(self, stages: Sequence[Stage], more: float | None) -> Iterator[Stage]:
        """The stages, choices with their branches as chains; equal branches are one."""
        found: dict[Assembly, tuple[Chained, _planner.Decision]] = {}
        for stage in stages:
            eqn = _choice(stage)
            if more is None or eqn is None or not isinstance(stage, Straight):
                yield stage
                continue
            branches = [self._branch(eqn, b) for b in eqn.params["branches"]]
            for branch in {*branches} - {*found}:
                found[branch] = branch.schedule(more)
            yield _planner.branches(stage, [found[b] for b in branches])

    def _branch(self, eqn: Any, branch: Any) -> Assembly:
        """A branch as a chain."""
        graph = marked(inline(branch))
        pairs = [*zip(graph.invars, eqn.invars[1:], strict=True)]
        given = [v for v, o in pairs if not is_var(o) or o in self._given]
        sources = [v for v, o in pairs if is_var(o) and o in self.tangents]
        known = {v: self._known[o] for v, o in pairs if is_var(o) and o in self._known}
        place = {v: i for i, v in enumerate(graph.invars)}
        facts = tuple((place[v], str(fact)) for v, fact in known.items())
        sides = tuple(tuple(place[v] for v in side) for side in (given, sources))
        key = key_of(graph), sides, facts
        if key not in self._branches:
            made = Assembly(
                graph, given, sources, self._options, known, guarded=self._guarded
            )
            self._branches[key] = made
        return self._branches[key]

    def _rebuilt(self, i: int, loop: Loop) -> RebuiltLoop | str:
        """The loop with its steps rebuilt, or why they cannot be."""
        graph, body = loop.body.graph, loop.body
        outside = {*graph.invars} - {*graph.invars[loop.carries]}
        known = self._builder.inner_facts(loop.eqn, graph, self._known)
        fixed = Fixed(graph, self._unmoved(loop.eqn, graph))
        one = Judge(outside, known, fixed)(body)
        run = one if isinstance(one, str) else [one]
        if isinstance(run, str) and sum(matrix_cost(eqn) > 0 for eqn in graph.eqns) > 1:
            run = self._inside(i, loop).run(outside)
        if isinstance(run, str):
            return f"a step of it: {run}"
        return rebuilt_loop(loop, run, self._options.tolerance)

    def run(self, outside: Collection[Var]) -> list[Rebuilt] | str:
        """Its stages as one run, or why they are none; `outside` are not states."""
        if self._prologue.graph.eqns:
            return "several of its stages read what is made of parameters"
        builder = Builder(outside, self.tangents, self.graph)
        judge = Judge(outside, self._known, self._fixed)
        found: list[Rebuilt] = []
        for stage in self._stages:
            one = judge(builder.straight(stage.graph))
            if isinstance(one, str):
                return one
            found.append(one)
        if runs(found, self._crossing, (), self._options.tolerance) != [
            (0, len(found))
        ]:
            return "its stages together round too much for the tolerance"
        return found

    def _unmoved(self, eqn: Any, body: Graph) -> dict[Var, Any]:
        """Inputs of a loop's body that are always the same, with their values."""
        count, _ = _jax.scan_layout(eqn)
        outer = [v for v in eqn.invars[:count] if is_var(v)]
        values = self._fixed(outer)
        pairs = zip(body.invars, eqn.invars[:count], strict=False)
        return {i: values[o] for i, o in pairs if is_var(o) and o in values}

    def _inside(self, i: int, loop: Loop) -> Assembly:
        """The body of a loop as a chain."""
        if i not in self._bodies:
            graph = loop.body.graph
            moving = self._builder.moving_vars(loop.eqn, graph)
            state = state_of(loop.eqn, graph, moving)
            given = [v for v in graph.invars if v not in state]
            sources = [v for v in graph.invars if v in moving]
            known = self._builder.inner_facts(loop.eqn, graph, self._known)
            fixed = self._unmoved(loop.eqn, graph)
            self._bodies[i] = Assembly(
                graph, given, sources, self._options, known, fixed, guarded=False
            )
        return self._bodies[i]

    def _nested(self, i: int, loop: Loop, extra: float) -> Iterator[Loop]:
        """The loop with its body as a chain."""
        graph = loop.body.graph
        products = sum(matrix_cost(eqn) > 0 for eqn in graph.eqns)
        choices = any(is_choice(eqn) for eqn in graph.eqns)
        inner = choices or any(eqn.primitive.name == "scan" for eqn in graph.eqns)
        if loop.pruned or (products < 2 and not inner):
            return
        body = self._inside(i, loop)
        if not choices and not body.has_schedules:
            return
        for more in _STEPS:
            if 1 + more <= extra + _planner.SLACK:
                chained, decision = body.schedule(more)
                forwards = 1 + decision.again
                yield dataclasses.replace(
                    loop,
                    body=chained,
                    group=1,
                    leaf_forwards=forwards,
                    leaf_bytes=decision.peak,
                )


def _choice(stage: Stage) -> Any:
    """The equation of a stage that is a choice between chains, or None."""
    eqns = stage.graph.eqns
    return eqns[0] if len(eqns) == 1 and is_choice(eqns[0]) else None
