"""A plan as a networkx graph.

Nodes, named by text, have an attribute `role`:

- "stage", named "stage 3": `index`, and all fields of `mwc._plan.StageRecord` but
  `bodies`: `name`, `source`, `kind`, `strategy`, `storage`, `bits`, `residual_bytes`,
  `state_bytes`, `backprop_bytes`, `extra_flops`, `runs_again`, `amplification`,
  `reason`. Besides `saved`, the `Value`s kept for it alone, and `sweeps`, those that it
  takes part in: "forward", "R" (backward), "V" (the forward sweep that rebuilds), and
  `steps`, those of a loop, else 1.
- "argument", named "argument params['w']": `name`, `kind` ("parameter", "data",
  "derived"; "state" for what a body reads), `shape`, `dtype`, `bytes`.
- "result", named "result": what the function returns.

The stages of a loop's body and of branches are nodes too, named after the stage that
they are inside of ("stage 3/step/stage 0"). Every node has `parent`, that stage's name
or None, and `body`, the label of the body or None; a stage has `times`, how often its
body runs, 1 outside of bodies. No edge leads into a body.

Edges are values that flow, from what makes them to what reads them, one an edge:
`value` (equal on all edges of one value), `name`, `kind`, `shape`, `dtype`, `bytes`,
`kept` (between the two passes), `skip` (whether it passes over a stage), `source`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import networkx as nx

from mwc._plan import INPUT, SAVED, Plan, StageRecord, Value


def to_networkx(plan: Plan) -> nx.MultiDiGraph:
    """Stages, arguments and values of a plan; see the module for the attributes.

    Args:
      plan: the plan.

    Returns:
      The graph; its own attributes are the totals of the plan by their names.
    """
    totals = ("name", "extra_forwards", "peak_bytes", "residual_bytes")
    totals += ("backprop_bytes", "notes")
    graph = nx.MultiDiGraph(**{key: getattr(plan, key) for key in totals})
    _add(graph, "", plan.stages, plan.values, parent=None, body=None, times=1)
    return graph


def _add(
    graph: nx.MultiDiGraph,
    prefix: str,
    stages: Sequence[StageRecord],
    values: Sequence[Value],
    **place: Any,
) -> None:
    """Adds a chain, whose nodes' names begin with `prefix`."""
    saved: list[list[Value]] = [[] for _ in stages]
    for value in values:
        if value.kind in SAVED:
            saved[value.maker].append(value)
    for i, stage in enumerate(stages):
        name = f"{prefix}stage {i}"
        fields = {f.name: getattr(stage, f.name) for f in dataclasses.fields(stage)}
        bodies = fields.pop("bodies")
        loop = re.fullmatch(r"scan\[(\d+)\]", stage.kind)
        steps = int(loop[1]) if loop else 1
        more = {"saved": tuple(saved[i]), "sweeps": _sweeps(stage), "steps": steps}
        graph.add_node(name, role="stage", index=i, **fields, **more, **place)
        for body in bodies:
            inside = {"parent": name, "body": body.label, "times": body.times}
            inner = f"{name}/{body.label}/"
            _add(graph, inner, body.stages, body.values, **inside)
    place.pop("times")
    if any(value.result for value in values):
        graph.add_node(f"{prefix}result", role="result", **place)
    for n, value in enumerate(values):
        if value.kind in SAVED:
            continue
        maker = f"{prefix}stage {value.maker}"
        if value.maker == INPUT:
            maker = f"{prefix}argument {value.name}"
            maker += f" #{n}" if maker in graph else ""
            keys = ("name", "kind", "shape", "dtype", "bytes")
            fields = {key: getattr(value, key) for key in keys}
            graph.add_node(maker, role="argument", **fields, **place)
        ends = [(f"{prefix}stage {i}", i - value.maker > 1) for i in value.readers]
        ends += [(f"{prefix}result", False)] if value.result else []
        for end, skip in ends:
            keys = ("name", "kind", "shape", "dtype", "bytes", "kept", "source")
            fields = {key: getattr(value, key) for key in keys}
            skip = skip and value.maker != INPUT
            graph.add_edge(maker, end, value=n, skip=skip, **fields)


def _sweeps(stage: StageRecord) -> tuple[str, ...]:
    return ("forward", "R", "V") if stage.strategy == "moonwalk" else ("forward", "R")
