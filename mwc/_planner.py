"""Planner: what each stage costs, and the schedule of least memory within the time.

Costs come from the jaxprs: matrix FLOPs (all FLOPs where there are no matrices), the
bytes of states, of kept residuals and of a leaf's own temporaries. Limits: a leaf's
temporaries are estimated, the compiler decides them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Sequence
from typing import Any

from mwc._build import Builder, matrix_cost
from mwc.errors import MoonwalkUnsupportedError
from mwc.loops import Loop
from mwc.nodes.checkpoint import store_all
from mwc.stages import Stage, Straight
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
    """

    stages: tuple[Stage, ...]
    schedule: Schedule | None
    costs: tuple[Costs, ...]
    peak: int


_SERVED = ("checkpoint", "stored")
SLACK = 0.1  # of a forward pass, DESIGN section 4


def schedule(
    stages: Sequence[Stage],
    crossing: Sequence[tuple[Var, ...]],
    builder: Builder,
    options: Any,
) -> Decision:
    """Settles the loops and schedules the chain.

    Args:
      stages: the stages.
      crossing: the variables alive before each stage.
      builder: what made them.
      options: `extra_forwards` and `strategies` are read.

    Returns:
      The decision.
    """
    allowed = set(options.strategies or _SERVED) & set(_SERVED)
    if not allowed:
        raise MoonwalkUnsupportedError(
            f"no stage can be served by strategies={options.strategies!r}",
            expected=f"at least one of {', '.join(map(repr, _SERVED))}",
            remedy="add 'checkpoint', which serves every stage",
        )
    extra = 2.0 if options.extra_forwards is None else options.extra_forwards
    stages = tuple(_settled(s, builder, extra, allowed) for s in stages)
    costs = stage_costs(stages, crossing)
    total = sum(c.forward for c in costs)
    if "checkpoint" not in allowed:
        kept = sum(c.kept + sum(b for b, _ in c.born) for c in costs)
        return Decision(stages, store_all(len(stages)), tuple(costs), kept)
    limit = math.inf if math.isinf(extra) else (1 + extra + SLACK) * total
    found = plan(costs, limit, store_first="stored" in allowed)
    bits = sum(packed_bytes(v) for s in stages for v in getattr(s, "bit_vars", ()))
    return Decision(stages, found.schedule, tuple(costs), found.memory + bits)


def _settled(
    stage: Stage, builder: Builder, extra: float, allowed: Collection[str]
) -> Stage:
    if not isinstance(stage, Loop):
        return stage
    found = settle(stage, extra) if "checkpoint" in allowed else None
    return found or builder.straight(stage.graph)


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
        return Costs(forward, both, both, kept, kept + loop_leaf(stage) + through, born)
    assert isinstance(stage, Straight)
    kept = sum(packed_bytes(v) for v in stage.kept_vars)
    rerun = stage.rerun if matrices else forward
    return Costs(forward, min(rerun, forward), forward, kept, kept + through, born)


def loop_bytes(loop: Loop) -> tuple[int, int, int]:
    """Bytes of a carry, of a step's bits, and of a step's stored residuals."""
    body = loop.body
    carry = body.graph.invars[loop.carries]
    names = [v for v in body.names if v in carry or v in body.graph.producer]
    return (
        sum(nbytes(v) for v in carry),
        sum(packed_bytes(v) for v in body.bit_vars) if loop.pruned else 0,
        sum(packed_bytes(v) for v in (*body.kept_vars, *names)),
    )


def loop_kept(loop: Loop) -> int:
    """Bytes that the first pass of a loop keeps."""
    carry, bits, _ = loop_bytes(loop)
    return loop.slots * carry + loop.length * bits


def loop_leaf(loop: Loop) -> int:
    """Bytes that a leaf of a loop stores."""
    return 0 if loop.pruned else loop.group * loop_bytes(loop)[2]


def loop_extra(loop: Loop) -> float:
    """Forward passes that a loop's backward runs again."""
    leaves = -(-loop.length // loop.group)
    return again(leaves, loop.slots) / leaves + (0 if loop.pruned else 1)


def settle(loop: Loop, extra: float) -> Loop | None:
    """The loop with the slots and leaf length of least memory, or None."""
    limit = extra + SLACK
    best: tuple[int, Loop] | None = None
    for group in [1] if loop.pruned else _groups(loop.length):
        leaves = -(-loop.length // group)
        most = limit if loop.pruned else limit - 1
        slots = least_slots(leaves, most * leaves)
        if slots is None:
            continue
        found = dataclasses.replace(loop, group=group, slots=slots)
        need = loop_kept(found) + loop_leaf(found)
        if best is None or need < best[0]:
            best = need, found
    return best[1] if best else None


def _groups(length: int) -> list[int]:
    """Leaf lengths to try: all small ones, then steps of a twelfth."""
    found, g = [], 1
    while g < length:
        found.append(g)
        g = max(g + 1, g * 13 // 12)
    return [*found, length]
