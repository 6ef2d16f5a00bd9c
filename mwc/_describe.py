"""From nodes and schedules to the plan that the user reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mwc._build import matrix_cost
from mwc._plan import Plan
from mwc._planner import Decision
from mwc._rows import described
from mwc._values import Label
from mwc.chained import Chained
from mwc.errors import MoonwalkUnsupportedError
from mwc.nodes.checkpoint import Checkpoint
from mwc.nodes.moonwalk import Moonwalk
from passes import _jax
from passes.graph import Graph, nbytes
from passes.sizes import NOMINAL, is_symbolic
from passes.table import is_unknown


def describe(
    chained: Chained, decision: Decision, jaxpr: Any, roles: Sequence[str], strict: bool
) -> Plan:
    """The plan of a program.

    Args:
      chained: the program, its stages with their schedule.
      decision: what the planner knows of it.
      jaxpr: the function as traced, for its name and those of its arguments.
      roles: "parameter" or "data" for each of its inputs.
      strict: whether a primitive without a rule is an error.

    Returns:
      The plan.

    Raises:
      MoonwalkUnsupportedError: with `strict`, what the plan would note.
    """
    graph = chained.graph
    notes = _unknown(graph)
    if notes and strict:
        raise MoonwalkUnsupportedError(notes[0], remedy="leave strict=True out")
    name, arguments = _jax.function_names(jaxpr)
    inputs = zip(graph.invars, arguments, roles, strict=True)
    labels = {v: Label(path, role) for v, path, role in inputs}
    stages, values = described(chained, decision.costs, labels, decision.why)
    total = sum(c.forward for c in decision.costs) or 1.0
    shares = [s.extra_flops for s in stages]
    return Plan(
        stages=stages,
        extra_forwards=sum(shares) / total,
        peak_bytes=decision.peak,
        residual_bytes=sum(v.bytes for v in values if v.kept),
        state_bytes=0,
        backprop_bytes=sum(s.backprop_bytes for s in stages),
        notes=notes + _symbolic(graph),
        name=name,
        values=values,
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
