"""Planner: what each stage costs, and the schedule of least memory within the time.

Costs come from the jaxprs: matrix FLOPs (all FLOPs where there are no matrices), the
bytes of states, of kept residuals and of a leaf's own temporaries. Limits: a leaf's
temporaries are estimated, the compiler decides them.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any

from mwc._build import matrix_cost, rerun_cost
from mwc.nodes.checkpoint import store_all
from mwc.stages import Stage, Straight
from passes.flops import eqn_flops
from passes.graph import Graph, Var, nbytes
from passes.residuals import packed_bytes
from passes.schedule import Costs, Planned, plan

SLACK = 0.1  # of a forward pass, DESIGN section 4


def schedule(
    stages: Sequence[Stage],
    crossing: Sequence[tuple[Var, ...]],
    learned: Collection[Var],
    options: Any,
) -> Planned:
    """The schedule of a chain.

    Args:
      stages: the stages.
      crossing: the variables alive before each stage.
      learned: the variables that depend on a parameter.
      options: `extra_forwards` and `strategies` are read.

    Returns:
      The schedule with its cost and memory.
    """
    costs = stage_costs(stages, crossing)
    total = sum(c.forward for c in costs)
    allowed = set(options.strategies or ("stored", "checkpoint"))
    if "checkpoint" not in allowed:
        kept = sum(c.kept for c in costs)
        return Planned(store_all(len(stages)), total, kept)
    extra = 2.0 if options.extra_forwards is None else options.extra_forwards
    limit = math.inf if math.isinf(extra) else (1 + extra + SLACK) * total
    return plan(costs, limit, store_first="stored" in allowed)


def stage_costs(
    stages: Sequence[Stage], crossing: Sequence[tuple[Var, ...]]
) -> list[Costs]:
    """Costs of each stage."""
    last: dict[Var, int] = {}
    for i, names in enumerate(crossing):
        last.update(dict.fromkeys(names, i))
    matrices = any(matrix_cost(eqn) > 0 for stage in stages for eqn in stage.graph.eqns)
    return [_costs(s, last, matrices) for s in stages]


def forward_cost(graph: Graph, matrices: bool) -> float:
    """FLOPs of one run; a little for the rest, so that ties prefer less work."""
    count = [eqn_flops(eqn) for eqn in graph.eqns]
    rest = sum(c.elementwise for c in count)
    return sum(c.matrix for c in count) + 1e-3 * rest if matrices else rest


def _costs(stage: Stage, last: dict[Var, int], matrices: bool) -> Costs:
    forward = forward_cost(stage.graph, matrices)
    born = tuple((nbytes(v), last[v]) for v in stage.graph.outvars if v in last)
    assert isinstance(stage, Straight)
    kept = sum(packed_bytes(v) for v in stage.kept_vars)
    again = rerun_cost(stage.linear, stage.bit_vars) if matrices else forward
    through = sum(nbytes(v) for v in (*stage.graph.invars, *stage.graph.outvars))
    return Costs(forward, min(again, forward), forward, kept, kept + through, born)
