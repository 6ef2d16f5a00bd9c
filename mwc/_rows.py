"""The rows of a plan: one record a stage, a loop's body and a choice's branches inside.

Every row says what is kept and why. A run of rebuilt stages has a row a stage. Limits:
the work of a run is spread over its stages evenly.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from mwc import _planner
from mwc._backprop import backprop_bytes, step_bytes, unrolled
from mwc._build import matrix_cost
from mwc._plan import INPUT, Body, StageRecord, Value
from mwc._values import Label, derived, flowing, inner_labels, kept_for
from mwc.branches import Branches
from mwc.chained import Chained
from mwc.loops import Loop
from mwc.nodes.checkpoint import Checkpoint
from mwc.nodes.moonwalk import Moonwalk
from mwc.nodes.rebuild import Rebuilt
from mwc.rolled import RebuiltLoop, Steps
from mwc.stages import Stage, Straight
from passes import _jax
from passes.graph import Var, is_var
from passes.schedule import Costs, Leaf, Schedule, Split, Store


@dataclasses.dataclass(frozen=True, eq=False)
class _Row:
    """A stage with its place in the node.

    Attributes:
      stage: the stage.
      at: its place in the node, or that of its run.
      stored: whether the first pass keeps it whole.
      run: the run that it is part of, or None.
      one: how it is rebuilt there; None of the run's lead.
    """

    stage: Stage
    at: int
    stored: bool
    run: Moonwalk | None = None
    one: Rebuilt | None = None


def described(
    chained: Chained,
    costs: Sequence[Costs],
    labels: Mapping[Var, Label],
    why: Mapping[Stage, str],
    carry: Collection[Var] = (),
) -> tuple[tuple[StageRecord, ...], tuple[Value, ...]]:
    """The rows and the values of a chain.

    Args:
      chained: the chain.
      costs: of each stage of its node.
      labels: names of its inputs.
      why: stages that are not rebuilt, and why not.
      carry: those of its inputs that are states.

    Returns:
      Records in order, and values: those that flow, then those kept for a stage.
    """
    node = chained.node
    rows, flat = _rows(node), unrolled(node)
    data = () if carry else {v for v, x in labels.items() if x.kind == "data"}
    labels = {**labels, **derived(chained.prologue.graph, labels)}
    _, kept = node.spine
    results = {v for v in chained.graph.outvars if is_var(v)}
    values = flowing(flat, labels, kept, results)
    again = _again(node.schedule, costs)
    plain = backprop_bytes(flat, carry, data)
    read: list[list[Value]] = [[] for _ in rows]
    state_bytes = [0] * len(rows)
    for v in values:
        for i in v.readers if v.maker != INPUT else ():
            read[i].append(v)
        if v.kept:
            state_bytes[v.readers[0] if v.readers else v.maker] += v.bytes
    records: list[StageRecord] = []
    for i, row in enumerate(rows):
        own = kept_for(row.stage, i, row.stored, row.one is not None)
        forward = costs[row.at].forward
        record = StageRecord(
            *_place(row.stage),
            strategy=_strategy(row),
            storage=_storage(row, own, read[i]),
            bits=sum(math.prod(v.shape) for v in own if v.kind == "bits"),
            residual_bytes=sum(v.bytes for v in own),
            state_bytes=state_bytes[i],
            backprop_bytes=plain[i],
            extra_flops=again[row.at] / (len(row.run.straight) if row.run else 1),
            runs_again=again[row.at] / forward if forward else 0.0,
            amplification=_amplification(row),
            reason=_reason(row, own, why),
            bodies=_bodies(row.stage, labels),
        )
        records.append(record)
        values += own
    return tuple(records), tuple(values)


def _rows(node: Checkpoint) -> list[_Row]:
    stored, _ = node.spine
    rows: list[_Row] = []
    for i, stage in enumerate(node.stages):
        if isinstance(stage, Moonwalk):
            rows += [_Row(stage.lead, i, False, stage)] if stage.lead else []
            rows += [_Row(one.stage, i, False, stage, one) for one in stage.stages]
        else:
            rows.append(_Row(stage, i, i in stored))
    return rows


def _place(stage: Stage) -> tuple[str, str, str]:
    """Name, source and kind of a stage: those of its dearest equation."""
    eqn = max(stage.graph.eqns, key=matrix_cost, default=None)
    if eqn is None:
        return "", "", "nothing"
    source = _jax.source_line(eqn)
    return str(eqn.source_info.name_stack) or source, source, _kind(stage, eqn)


def _kind(stage: Stage, eqn: Any) -> str:
    if eqn.primitive.name == "scan":
        return f"scan[{eqn.params['length']}]"
    if eqn.primitive.name == "cond":
        return f"cond[{len(eqn.params['branches'])}]"
    if matrix_cost(eqn) > 0 or len(stage.graph.eqns) == 1:
        return eqn.primitive.name
    return "elementwise"


def _strategy(row: _Row) -> str:
    if row.run is not None or isinstance(row.stage, RebuiltLoop):
        return "moonwalk"
    whole = row.stored and isinstance(row.stage, Straight)
    return "stored" if whole else "checkpoint"


def _storage(row: _Row, own: Sequence[Value], read: Sequence[Value]) -> str:
    """What is kept, of `STORAGE`, from what is kept for it and the states it reads."""
    if row.stored and isinstance(row.stage, Straight):
        return "full value"
    kinds = {v.kind for v in own}
    if "bits" in kinds:
        return "bits"
    if "residual" in kinds:
        return "full value"
    if "carries" in kinds:
        return "kept state"
    if isinstance(row.stage, Loop) or not all(v.kept for v in read):
        return "recomputed"
    return "kept state" if read else "nothing"


def _amplification(row: _Row) -> float | None:
    run = row.stage.stages if isinstance(row.stage, RebuiltLoop) else [row.one]
    found = [one.found.amplification for one in run if one is not None]
    known = [x for x in found if x is not None]
    return math.prod(known) if known and len(known) == len(found) else None


def _reason(row: _Row, own: Sequence[Value], why: Mapping[Stage, str]) -> str:
    if row.one is not None:
        return _rebuilt(row.one)
    if row.run is not None:
        return "its gradients are the first of sweep V, which starts here"
    reason = _treated(row, own)
    if row.stage in why and _strategy(row) != "moonwalk":
        return f"{reason}; {why[row.stage]}"
    return reason


def _rebuilt(one: Rebuilt) -> str:
    found = one.found
    return f"its cotangent is rebuilt: {found.verdict.value}, {found.reason}"


def _treated(row: _Row, own: Sequence[Value]) -> str:
    """Why a stage outside runs is treated so."""
    stage = row.stage
    if isinstance(stage, RebuiltLoop):
        found = [one.found for one in stage.stages]
        how = f"{found[0].verdict.value}, {found[0].reason}"
        how = how if len(found) == 1 else f"its {len(found)} stages can be"
        return (
            f"every step's cotangent is rebuilt: {how}; "
            f"one kept every {stage.every} steps"
        )
    if isinstance(stage, Branches):
        return (
            "its backward runs the branch taken again, a chain of its own, "
            f"{stage.leaf_forwards:.2f} times"
        )
    if isinstance(stage, Loop):
        if not isinstance(stage.body, Straight):
            how = f"each step a chain run again {stage.leaf_forwards:.2f} times"
        elif stage.pruned:
            how = "each step read from its carry and its bits"
        else:
            how = f"leaves of {stage.group} steps run again and stored; "
            how += stage.body.why
        again = _planner.loop_extra(stage)
        return f"{stage.slots} carries kept, {again:.2f} runs again; {how}"
    assert isinstance(stage, Straight)
    if row.stored:
        return "its residuals fit, so nothing of it runs again"
    if stage.rerun:
        return "its backward runs it again: " + stage.why
    return f"its backward reads its input {'and these bits' if own else 'alone'}"


def _bodies(stage: Stage, labels: Mapping[Var, Label]) -> tuple[Body, ...]:
    """What is inside a loop or a choice."""

    def named(outer: Any) -> Label | None:
        return labels.get(outer) if is_var(outer) else None

    if isinstance(stage, Branches):
        found = []
        for n, chained in enumerate(stage.chains):
            inner = inner_labels(stage.eqn, chained.graph, named, None)
            found.append(_body(f"branch {n}", 1, chained, inner, ()))
        return tuple(found)
    if not isinstance(stage, Loop):
        return ()
    graph = stage.body.graph
    inner = inner_labels(stage.eqn, graph, named, stage)
    carry = graph.invars[stage.carries]
    if isinstance(stage.body, Chained):
        return (_body("step", stage.length, stage.body, inner, carry),)
    return (_steps(stage, inner),)


def _body(
    label: str,
    times: int,
    chained: Chained,
    labels: Mapping[Var, Label],
    carry: Collection[Var],
) -> Body:
    node = chained.node
    costs = _planner.stage_costs(node.stages, node.crossing)
    return Body(label, times, *described(chained, costs, labels, {}, carry))


def _steps(loop: Loop, labels: Mapping[Var, Label]) -> Body:
    """The body of a loop whose step is one stage, or several that are rebuilt."""
    body = loop.body
    ones = loop.stages if isinstance(loop, RebuiltLoop) else [None]
    flat = body.stages if isinstance(body, Steps) else [body]
    carry = body.graph.invars[loop.carries]
    several = len(flat) > 1
    plain = backprop_bytes(flat, carry) if several else [step_bytes(loop)]
    results = {v for v in body.graph.outvars if is_var(v)}
    values = flowing(flat, labels, (), results)
    records: list[StageRecord] = []
    for n, (stage, one) in enumerate(zip(flat, ones, strict=True)):
        assert isinstance(stage, Straight)
        own = kept_for(stage, n, False, one is not None) if loop.pruned else []
        bits = sum(math.prod(v.shape) for v in own if v.kind == "bits")
        records.append(
            StageRecord(
                *_place(stage),
                strategy=_strategy(_Row(loop, 0, True)),
                storage="bits" if bits else "recomputed",
                bits=bits,
                residual_bytes=sum(v.bytes for v in own),
                state_bytes=0,
                backprop_bytes=plain[n],
                extra_flops=0.0,
                runs_again=_planner.loop_extra(loop),
                amplification=_amplification(_Row(stage, 0, False, one=one)),
                reason=_rebuilt(one) if one and several else "a step of the loop",
            )
        )
        values += own
    return Body("step", loop.length, tuple(records), tuple(values))


def _again(schedule: Schedule | None, costs: Sequence[Costs]) -> list[float]:
    """FLOPs that each stage runs after the first pass."""
    again = [0.0] * len(costs)

    def walk(at: Schedule | None, first: bool) -> None:
        if isinstance(at, Leaf):
            again[at.stage] += costs[at.stage].leaf
        elif isinstance(at, Store):
            cost = costs[at.stage]
            again[at.stage] += cost.store - (cost.forward if first else 0.0)
            walk(at.rest, first)
        elif isinstance(at, Split):
            if not first:
                for i in range(at.start, at.middle):
                    again[i] += costs[i].forward
            walk(at.right, first)
            walk(at.left, False)

    walk(schedule, True)
    return again
