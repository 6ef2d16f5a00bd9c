"""From nodes and schedules to the plan that the user reads."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

from mwc._build import matrix_cost
from mwc._plan import Plan, StageRecord
from mwc._planner import Decision, loop_extra, loop_kept
from mwc.branches import Branches
from mwc.chained import Chained
from mwc.errors import MoonwalkUnsupportedError
from mwc.guard import SKETCH_BYTES
from mwc.loops import Loop
from mwc.nodes.checkpoint import Checkpoint
from mwc.nodes.moonwalk import Moonwalk
from mwc.packing import is_packed
from mwc.rolled import RebuiltLoop
from mwc.stages import Stage, Straight
from passes import _jax
from passes.depend import reached
from passes.graph import Graph, Var, is_var, nbytes, size
from passes.linearise import Linear
from passes.residuals import packed_bytes
from passes.schedule import Leaf, Schedule, Split, Store
from passes.sizes import NOMINAL, is_symbolic
from passes.table import is_unknown


def describe(node: Checkpoint, decision: Decision, graph: Graph, strict: bool) -> Plan:
    """The plan of a program.

    Args:
      node: its stages with their schedule.
      decision: what the planner knows of it.
      graph: the program, for what no table has.
      strict: whether a primitive without a rule is an error.

    Returns:
      The plan.

    Raises:
      MoonwalkUnsupportedError: with `strict`, what the plan would note.
    """
    notes = _unknown(graph)
    if notes and strict:
        raise MoonwalkUnsupportedError(notes[0], remedy="leave strict=True out")
    notes += _symbolic(graph)
    stored, names = node.spine
    again = _again(node, decision)
    states = {v: nbytes(v) for v in names}
    rows = []
    for i, stage in enumerate(node.stages):
        here = sum(states.pop(v, 0) for v in node.crossing[i])
        if isinstance(stage, Moonwalk):
            rows += _rebuilt_rows(len(rows), stage, here, again[i])
            continue
        row = _row(len(rows), stage, i in stored, here, again[i])
        if stage in decision.why and row.strategy != "moonwalk":
            reason = f"{row.reason}; {decision.why[stage]}"
            row = dataclasses.replace(row, reason=reason)
        rows.append(row)
    residual = sum(r.residual_bytes + r.state_bytes for r in rows) + sum(
        states.values()
    )
    total = sum(c.forward for c in decision.costs) or 1.0
    return Plan(
        stages=tuple(rows),
        extra_forwards=sum(again) / total,
        peak_bytes=decision.peak,
        residual_bytes=residual,
        state_bytes=0,
        backprop_bytes=_backprop(node),
        notes=notes,
    )


def guarded_rows(node: Checkpoint) -> tuple[int, ...]:
    """The plan's row of each reading of a guard."""
    found: list[int] = []
    row = 0
    for stage in node.stages:
        if isinstance(stage, Moonwalk):
            row += stage.lead is not None
            found += range(row, row + stage.guards)
            row += len(stage.stages)
        else:
            found += [row] * stage.guards
            row += 1
    return tuple(found)


def _rebuilt_rows(
    first: int, run: Moonwalk, state: int, again: float
) -> list[StageRecord]:
    """One row a stage of a run; what is kept are its bits and a sketch."""
    rows = []
    if run.lead is not None:
        row = _row(first, run.lead, False, 0, again / len(run.straight))
        reason = "its gradients are the first of sweep V, which starts here"
        rows.append(dataclasses.replace(row, strategy="moonwalk", reason=reason))
    for i, one in enumerate(run.stages):
        row = _row(first + len(rows), one.stage, False, 0 if i else state, again)
        found = one.found
        reason = f"its cotangent is rebuilt: {found.verdict.value}, {found.reason}"
        kept = row.residual_bytes + SKETCH_BYTES
        row = dataclasses.replace(
            row,
            strategy="moonwalk",
            residual_bytes=kept,
            extra_flops=again / len(run.straight),
            amplification=found.amplification,
            reason=reason,
        )
        rows.append(row)
    return rows


def _row(i: int, stage: Stage, stored: bool, state: int, again: float) -> StageRecord:
    eqn = max(stage.graph.eqns, key=matrix_cost, default=None)
    name = str(eqn.source_info.name_stack) if eqn is not None else ""
    bits, kept, strategy, reason = _kept(stage, stored)
    return StageRecord(
        name=name or f"stage {i}",
        source=_jax.source_line(eqn) if eqn is not None else "",
        kind=_kind(stage, eqn),
        strategy=strategy,
        bits=bits,
        residual_bytes=kept,
        state_bytes=state,
        extra_flops=again,
        amplification=_amplification(stage),
        reason=reason,
    )


def _amplification(stage: Stage) -> float | None:
    one = stage.one if isinstance(stage, RebuiltLoop) else None
    return one.found.amplification if one is not None else None


def _kept(stage: Stage, stored: bool) -> tuple[int, int, str, str]:
    """Bits, bytes, strategy and reason of a stage."""
    if isinstance(stage, RebuiltLoop):
        assert stage.one is not None
        found = stage.one.found
        bits = stage.length * sum(
            size(v) for v in stage.one.stage.bit_vars if is_packed(v.aval)
        )
        kept = loop_kept(stage) + stage.length * SKETCH_BYTES
        kept += stage.stops * nbytes(stage.one.state)
        reason = f"every step's cotangent is rebuilt: {found.verdict.value}, "
        reason += f"{found.reason}; one kept every {stage.every} steps"
        return bits, kept, "moonwalk", reason
    if isinstance(stage, Branches):
        reason = "its backward runs the branch taken again, a chain of its own, "
        reason += f"{stage.leaf_forwards:.2f} times"
        return 0, 0, "checkpoint", reason
    if isinstance(stage, Loop):
        body = stage.body
        bits = 0
        if not isinstance(body, Straight):
            how = f"each step a chain run again {stage.leaf_forwards:.2f} times"
        elif stage.pruned:
            how = "each step read from its carry and its bits"
            bits = stage.length * sum(
                size(v) for v in body.bit_vars if is_packed(v.aval)
            )
        else:
            how = f"leaves of {stage.group} steps run again and stored; " + body.why
        reason = (
            f"{stage.slots} carries kept, {loop_extra(stage):.2f} runs again; {how}"
        )
        return bits, loop_kept(stage), "checkpoint", reason
    assert isinstance(stage, Straight)
    if stored:
        kept = stage.kept_vars
        bytes_ = sum(packed_bytes(v) for v in kept)
        reason = "its residuals fit, so nothing of it runs again"
    else:
        kept = stage.bit_vars
        bytes_ = sum(packed_bytes(v) for v in kept)
        if stage.rerun:
            reason = "its backward runs it again: " + stage.why
        elif kept:
            reason = "its backward reads its input and these bits"
        else:
            reason = "its backward reads its input alone"
    bits = sum(size(v) for v in kept if is_packed(v.aval))
    return bits, bytes_, "stored" if stored else "checkpoint", reason


def _kind(stage: Stage, eqn: Any) -> str:
    if eqn is None:
        return "nothing"
    if eqn.primitive.name == "scan":
        return f"scan[{eqn.params['length']}]"
    if eqn.primitive.name == "cond":
        return f"cond[{len(eqn.params['branches'])}]"
    if matrix_cost(eqn) > 0 or len(stage.graph.eqns) == 1:
        return eqn.primitive.name
    return "elementwise"


def _again(node: Checkpoint, decision: Decision) -> list[float]:
    """FLOPs that each stage runs after the first pass."""
    costs = decision.costs
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

    walk(node.schedule, True)
    return again


def _backprop(node: Checkpoint, carry: Collection[Var] = ()) -> int:
    """Bytes of the residuals that `jax.vjp` keeps, each value once.

    What follows from inputs outside `carry` alone is left out.
    """
    seen: set[Var] = set()
    total = 0
    bound = {*node.bound, *carry}
    flat: list[Stage] = []
    for stage in node.stages:
        flat += stage.straight if isinstance(stage, Moonwalk) else [stage]
    bound.update(v for stage in flat for v in stage.graph.outvars)
    for stage in flat:
        if isinstance(stage, Branches):
            stage = stage.plain
        if isinstance(stage, Loop):
            total += stage.length * _body_residuals(stage)
            continue
        assert isinstance(stage, Straight)
        fwd, chain = stage.linear.fwd, stage.chain_names()
        moving = reached(fwd, [f for f in fwd.invars if chain[f] in bound])
        for v in set(filter(is_var, _own(stage.linear))) & moving:
            name = chain.get(v)
            if name is None or name not in seen:
                seen.update({name} - {None})
                total += nbytes(v)
    return total


def _body_residuals(loop: Loop) -> int:
    """Bytes of the residuals of one step, per-step inputs and constants left out."""
    body = loop.body
    if not isinstance(body, Straight):
        assert isinstance(body, Chained)
        return _backprop(body.node, body.graph.invars[loop.carries])
    linear = body.linear
    outer = set(linear.fwd.invars) - set(linear.fwd.invars[loop.carries])
    moving = reached(linear.fwd, linear.fwd.invars[loop.carries])
    rows = {v for v in _own(linear) if is_var(v) and v not in outer}
    return sum(nbytes(v) for v in rows & moving)


def _own(linear: Linear) -> tuple[Any, ...]:
    """The residuals that JAX has."""
    return linear.residuals[: linear.jaxs]


def _unknown(graph: Graph) -> tuple[str, ...]:
    found: dict[str, str] = {}
    for eqn in graph.eqns:
        name = eqn.primitive.name
        if is_unknown(eqn, matrix_cost) and name not in found:
            kept = sum(nbytes(v) for v in eqn.outvars)
            found[name] = (
                f"no rule for primitive {name!r} at {_jax.source_line(eqn)}: its stage "
                f"keeps JAX's own derivative and its result ({kept} bytes) counts as "
                "dear to run again; wrap it in jax.custom_vjp to choose its residuals, "
                "or add its name to passes/table.py"
            )
    return tuple(found.values())


def _symbolic(graph: Graph) -> tuple[str, ...]:
    sizes = [n for v in graph.invars for n in getattr(v.aval, "shape", ())]
    names = sorted({str(n) for n in sizes if is_symbolic(n)})
    if not names:
        return ()
    return (
        f"the sizes {', '.join(names)} are planned and counted as if each symbol were "
        f"{NOMINAL}; bools are packed along other dimensions only",
    )
