"""Planner: what each stage costs, and the schedule of least memory within the time.

Costs come from the jaxprs: matrix FLOPs (all FLOPs where there are no matrices), the
bytes of states, of kept residuals and of a leaf's own temporaries. Limits: a leaf's
temporaries are estimated, the compiler decides them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from mwc._build import matrix_cost
from mwc.branches import Branches
from mwc.chained import Chained
from mwc.errors import MoonwalkUnsupportedError
from mwc.loops import Loop
from mwc.nodes.checkpoint import store_all
from mwc.nodes.moonwalk import Moonwalk
from mwc.nodes.rebuild import Rebuilt
from mwc.rolled import RebuiltLoop
from mwc.stages import Stage, Straight
from passes import _jax
from passes.binomial import again, least_slots
from passes.flops import eqn_flops
from passes.graph import Graph, Var, nbytes
from passes.residuals import packed_bytes
from passes.schedule import Costs, Schedule, plan


@dataclasses.dataclass(frozen=True)
class Decision:
    """What was decided.

    Attributes:
      stages: the stages, loops settled.
      schedule: of all of them.
      costs: of each.
      peak: bytes at the predicted peak.
      again: forward passes that the backward runs.
      why: stages that are not rebuilt, and why not.
    """

    stages: tuple[Stage, ...]
    schedule: Schedule | None
    costs: tuple[Costs, ...]
    peak: int
    again: float
    why: Mapping[Stage, str] = dataclasses.field(default_factory=dict)


_SERVED = ("moonwalk", "checkpoint", "stored")
SLACK = 0.1  # of a forward pass, DESIGN section 4


def allowed(strategies: Collection[str] | None, guarded: bool) -> set[str]:
    """The strategies that there are, of those that the user allows.

    Args:
      strategies: what the user allows, None for all.
      guarded: whether stages may be rebuilt where this is asked.

    Raises:
      MoonwalkUnsupportedError: none is left.
    """
    found = set(strategies or _SERVED) & set(_SERVED)
    found -= set() if guarded else {"moonwalk"}
    if not found:
        raise MoonwalkUnsupportedError(
            f"no stage can be served by strategies={strategies!r}",
            expected=f"at least one of {', '.join(map(repr, _SERVED))}",
            remedy="add 'checkpoint', which serves every stage",
        )
    return found


def schedule(
    stages: Sequence[Stage],
    crossing: Sequence[tuple[Var, ...]],
    extra: float,
    strategies: Collection[str],
) -> Decision:
    """Schedules a chain whose loops are settled.

    Args:
      stages: the stages.
      crossing: the variables alive before each stage.
      extra: the most extra forward passes.
      strategies: what may be used.

    Returns:
      The decision.
    """
    stages = tuple(stages)
    costs = tuple(stage_costs(stages, crossing))
    total = sum(c.forward for c in costs)
    if not {"checkpoint", "stored"} & {*strategies}:
        _refuse_others(stages)
    if "checkpoint" not in strategies:
        leaves = [i for i, s in enumerate(stages) if isinstance(s, Moonwalk)]
        more = sum(costs[i].leaf for i in leaves) / total if total else 0.0
        at = store_all(len(stages), leaves)
        peak = _stored_peak(costs) + bit_bytes(stages)
        return Decision(stages, at, costs, peak, more)
    limit = math.inf if math.isinf(extra) else (1 + extra + SLACK) * total
    found = plan(costs, limit, store_first="stored" in strategies)
    bits = bit_bytes(stages)
    more = max(0.0, found.cost / total - 1) if total else 0.0
    return Decision(stages, found.schedule, costs, found.memory + bits, more)


def _stored_peak(costs: Sequence[Costs]) -> int:
    """Bytes at the peak where all is stored, runs apart.

    A stage goes back when what stages after it kept is gone, its own still there.
    """
    kept = peak = 0
    for one in costs:
        peak = max(peak, kept + one.local)
        kept += one.kept + sum(size for size, _ in one.born)
    return max(peak, kept)


def _refuse_others(stages: Sequence[Stage]) -> None:
    """Raises where a stage is not rebuilt and nothing else is allowed."""
    for stage in stages:
        if not isinstance(stage, Moonwalk | RebuiltLoop):
            eqn = max(stage.graph.eqns, key=matrix_cost, default=None)
            raise MoonwalkUnsupportedError(
                "strategies=('moonwalk',) leaves a stage that cannot be rebuilt",
                expected="'checkpoint' or 'stored' besides, for such stages",
                remedy="print(plan) without strategies says why it cannot",
                source=_jax.source_line(eqn) if eqn is not None else None,
            )


def stage_costs(
    stages: Sequence[Stage], crossing: Sequence[tuple[Var, ...]]
) -> list[Costs]:
    """Costs of each stage."""
    last: dict[Var, int] = {}
    for i, names in enumerate(crossing):
        last.update(dict.fromkeys(names, i))
    matrices = any(matrix_cost(eqn) > 0 for stage in stages for eqn in stage.graph.eqns)
    outside = {v for s in stages for v in s.graph.invars} - set(last)
    return [_costs(s, last, outside, matrices) for s in stages]


def forward_cost(graph: Graph, matrices: bool) -> float:
    """FLOPs of one run; a little for the rest, so that ties prefer less work."""
    count = [eqn_flops(eqn) for eqn in graph.eqns]
    rest = sum(c.elementwise for c in count)
    return sum(c.matrix for c in count) + 1e-3 * rest if matrices else rest


def _costs(
    stage: Stage, last: dict[Var, int], outside: Collection[Var], matrices: bool
) -> Costs:
    forward = forward_cost(stage.graph, matrices)
    born = tuple((nbytes(v), last[v]) for v in stage.graph.outvars if v in last)
    around = (*stage.graph.invars, *stage.graph.outvars)
    # The program's own inputs are there anyway; a cotangent is as large as its value.
    through = sum(nbytes(v) for v in around if v not in outside)
    if isinstance(stage, Loop):
        both = forward * (1 + loop_extra(stage))
        kept = loop_kept(stage)
        return Costs(forward, both, both, kept, kept + stage.leaf_bytes + through, born)
    if isinstance(stage, Branches):
        both = forward * stage.leaf_forwards
        return Costs(forward, both, both, 0, stage.leaf_bytes + through, born)
    if isinstance(stage, Moonwalk):
        return _rebuilt_costs(stage, forward, born, matrices)
    assert isinstance(stage, Straight)
    kept = sum(packed_bytes(v) for v in stage.kept_vars)
    rerun = stage.rerun if matrices else forward
    # With JAX's derivative a choice makes what every branch needs, kept or not.
    conds = [e for e in stage.linear.fwd.eqns if e.primitive.name == "cond"]
    made = sum(nbytes(v) for eqn in conds for v in eqn.outvars)
    local = max(kept, made) + through
    return Costs(forward, min(rerun, forward), forward, kept, local, born)


def _rebuilt_costs(
    run: Moonwalk, forward: float, born: tuple[tuple[int, int], ...], matrices: bool
) -> Costs:
    """Sweep V advances, pushes, and reruns what gradients need; stored it is not."""
    pushed = sum(push_cost(one, matrices) for one in run.stages)
    last = forward_cost(run.stages[-1].stage.graph, matrices)
    # State, cotangent, the product's operand and result.
    local = 4 * max(nbytes(one.state) for one in run.stages)
    return Costs(forward, forward - last + pushed, math.inf, 0, local, born)


def push_cost(one: Rebuilt, matrices: bool) -> float:
    """FLOPs of rebuilding a cotangent, and of what its gradients run again."""
    eqns = (e for inverse in one.found.inverses for e in inverse.link.eqns)
    count = [eqn_flops(e) for e in eqns]
    pushed = sum(c.matrix if matrices else c.elementwise for c in count)
    return pushed + one.stage.rerun


def bit_bytes(stages: Iterable[Stage]) -> int:
    """Bytes of small residuals that the first pass keeps.

    Those of a run share memory with its gradients, none of which is written before
    sweep V has used the bits [DESIGN section 6].
    """
    total = 0
    for stage in stages:
        if isinstance(stage, Straight):
            total += sum(packed_bytes(v) for v in stage.bit_vars)
        elif isinstance(stage, Moonwalk):
            bits = sum(packed_bytes(v) for s in stage.stages for v in s.stage.bit_vars)
            grads = sum(
                nbytes(v) for v in stage.graph.invars if v is not stage.stages[0].state
            )
            total += max(0, bits - grads)
    return total


def branches(stage: Straight, found: Sequence[tuple[Chained, Decision]]) -> Branches:
    """A choice with its branches as chains; it takes the time of the slowest."""
    matrices = any(matrix_cost(eqn) > 0 for eqn in stage.graph.eqns)
    work = [(1 + d.again) * forward_cost(c.graph, matrices) for c, d in found]
    whole = forward_cost(stage.graph, matrices)
    return Branches(
        stage.graph,
        tuple(chained for chained, _ in found),
        plain=stage,
        leaf_forwards=max(work) / whole if whole else 1.0,
        leaf_bytes=max(decision.peak for _, decision in found),
    )


def rank(decision: Decision, extra: float) -> tuple[bool, int, float]:
    """Within the time before others, then by memory, then by time."""
    return decision.again > extra + SLACK, decision.peak, decision.again


def carry_bytes(loop: Loop) -> int:
    """Bytes of a loop's carry."""
    return sum(nbytes(v) for v in loop.body.graph.invars[loop.carries])


def loop_bits(loop: Loop) -> int:
    """Bytes of a step's bits."""
    return sum(packed_bytes(v) for v in loop.bit_vars)


def loop_kept(loop: Loop) -> int:
    """Bytes that the first pass of a loop keeps."""
    return loop.slots * carry_bytes(loop) + loop.length * loop_bits(loop)


def loop_extra(loop: Loop) -> float:
    """Forward passes that a loop's backward runs again."""
    if isinstance(loop, RebuiltLoop) or not loop.counts[1]:
        return loop.leaf_forwards
    leaves = -(-loop.length // loop.group)
    return again(leaves, loop.slots) / leaves + loop.leaf_forwards


def grouped(loop: Loop, whole: int) -> Iterator[Loop]:
    """The loop with leaves of every length worth trying, without slots.

    `whole` is what one step needs when run and stored as a chain; without the
    chain's order the compiler was seen to need about a quarter more.
    """
    body = loop.body
    assert isinstance(body, Straight)
    if loop.pruned:
        # Steps are run again on the way to a leaf: the carry read, and that made.
        yield dataclasses.replace(loop, leaf_bytes=2 * carry_bytes(loop))
        return
    carry = body.graph.invars[loop.carries]
    names = [v for v in body.names if v in carry or v in body.graph.producer]
    step = sum(packed_bytes(v) for v in (*body.kept_vars, *names))
    length, group = loop.length, 1
    while group <= length:
        size = (group - 1) * step + max(step, whole * 5 // 4)
        yield dataclasses.replace(loop, group=group, leaf_forwards=1.0, leaf_bytes=size)
        # All small ones, then steps of a twelfth, then the whole loop.
        more = max(group + 1, group * 13 // 12)
        group = length if group < length < more else more


def settle(choices: Iterable[Loop], extra: float) -> Loop | None:
    """The choice of least memory, with its slots, or None within the time."""
    best: tuple[int, Loop] | None = None
    for loop in choices:
        leaves = -(-loop.length // loop.group)
        most = extra + SLACK - loop.leaf_forwards
        if isinstance(loop, RebuiltLoop) or not loop.counts[1]:
            leaves = 1  # no carry is kept but the first
        slots = least_slots(leaves, most * leaves) if most >= 0 else None
        if slots is None:
            continue
        found = dataclasses.replace(loop, slots=slots)
        need = loop_kept(found) + found.leaf_bytes
        if best is None or need < best[0]:
            best = need, found
    return best[1] if best else None
