"""From the variables of a chain to the values of a plan."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from mwc._plan import INPUT, Value
from mwc.loops import Loop
from mwc.packing import is_packed
from mwc.rolled import RebuiltLoop, Steps
from mwc.sketches import planned_shape
from mwc.stages import Stage, Straight
from passes import _jax
from passes.graph import Graph, Var, extents, is_var, nbytes
from passes.linearise import is_inexact
from passes.residuals import packed_bytes


@dataclasses.dataclass(frozen=True)
class Label:
    """What a variable is called that no stage makes."""

    name: str
    kind: str


def flowing(
    stages: Sequence[Stage],
    labels: Mapping[Var, Label],
    kept: Collection[Var],
    results: Collection[Var],
) -> list[Value]:
    """The values that stages read or make, each once.

    Args:
      stages: the chain, runs unrolled.
      labels: names of what no stage makes.
      kept: the variables that the first pass keeps.
      results: those that the chain returns.

    Returns:
      Arguments in their order, then states in the order in which they are made.
    """
    graphs = [stage.graph for stage in stages]
    readers: dict[Var, list[int]] = {v: [] for v in labels}
    maker: dict[Var, int] = {}
    for i, graph in enumerate(graphs):
        for v in dict.fromkeys(filter(is_var, graph.invars)):
            readers.setdefault(v, []).append(i)
        for v in filter(is_var, graph.outvars):
            maker.setdefault(v, i)
            readers.setdefault(v, [])
    found: list[Value] = []
    for v in sorted(readers, key=lambda v: maker.get(v, INPUT)):
        at = maker.get(v, INPUT)
        if at == INPUT:
            label = labels.get(v, Label("", "state"))
            name, kind, source = label.name, label.kind, ""
        else:
            name, source = _made(graphs[at], v)
            kind = "state"
        dead = not readers[v] and v not in results and v not in kept
        if not hasattr(v.aval, "shape") or (at != INPUT and dead):
            continue
        value = Value(
            name,
            kind,
            extents(v),
            str(v.aval.dtype),
            nbytes(v),
            at,
            tuple(readers[v]),
            v in kept,
            v in results,
            source,
        )
        found.append(value)
    return found


def kept_for(stage: Stage, i: int, stored: bool, rebuilt: bool) -> list[Value]:
    """What the first pass keeps for a stage, besides states.

    Args:
      stage: the stage.
      i: its place.
      stored: whether it is kept whole.
      rebuilt: whether its cotangent is, in a run.
    """
    if isinstance(stage, Loop):
        return [*_kept_of_loop(stage, i)] if stored else []
    found: list[Value] = []
    if isinstance(stage, Straight):
        fwd = stage.linear.fwd
        keep = stage.kept_vars if stored else stage.bit_vars
        found += [_residual(fwd, v, i) for v in keep]
    if rebuilt:
        (result,) = {v for v in stage.graph.outvars if is_var(v) and is_inexact(v)}
        found.append(_sketch(i, result, 1))
    return found


def _kept_of_loop(loop: Loop, i: int) -> list[Value]:
    found: list[Value] = []
    carries = loop.body.graph.invars[loop.carries]
    if loop.slots:
        found += [_stack("carry", "carries", v, loop.slots, i) for v in carries]
    stages = loop.body.stages if isinstance(loop.body, Steps) else (loop.body,)
    straight = [s for s in stages if loop.pruned and isinstance(s, Straight)]
    for stage in straight:
        for v in stage.bit_vars:
            one = _residual(stage.linear.fwd, v, i)
            shape, bytes_ = (loop.length, *one.shape), loop.length * one.bytes
            found.append(dataclasses.replace(one, shape=shape, bytes=bytes_))
    if isinstance(loop, RebuiltLoop):
        # Cotangents kept at stops are made on the way back: they count at the peak.
        rows = min(one.found.rows for one in loop.stages)
        steps = (loop.length,)
        found += [_sketch(i, one.result, rows, steps) for one in loop.stages]
    return found


def _stack(name: str, kind: str, v: Var, count: int, i: int) -> Value:
    shape, dtype = (count, *extents(v)), str(v.aval.dtype)
    return Value(name, kind, shape, dtype, count * nbytes(v), i, (i,), True)


def _residual(fwd: Graph, v: Var, i: int) -> Value:
    name, source = _made(fwd, v)
    kind = "bits" if is_packed(v.aval) else "residual"
    dtype = str(v.aval.dtype)
    bytes_ = packed_bytes(v)
    return Value(name, kind, extents(v), dtype, bytes_, i, (i,), True, source=source)


def _sketch(i: int, ct: Var, kept: int, steps: tuple[int, ...] = ()) -> Value:
    shape = (*steps, *planned_shape(ct, kept))
    bytes_ = 4 * math.prod(shape)
    return Value("sketch", "sketch", shape, "float32", bytes_, i, (i,), True)


def _made(graph: Graph, v: Var) -> tuple[str, str]:
    """The primitive that makes a value, and the user's line."""
    index = graph.producer.get(v)
    if index is None:
        return "input", ""
    eqn = graph.eqns[index]
    return eqn.primitive.name, _jax.source_line(eqn)


def derived(prologue: Graph, labels: Mapping[Var, Label]) -> dict[Var, Label]:
    """Names for what is made of arguments alone, before the first stage."""
    found: dict[Var, Label] = {}
    for v in filter(is_var, prologue.outvars):
        if v not in labels:
            name, _ = _made(prologue, v)
            given = prologue.inputs_of([v])
            known = [labels[u].name for u in prologue.invars if u in given & {*labels}]
            more = ", ..." if len(known) > 2 else ""
            of = f"({', '.join(known[:2])}{more})" if known else ""
            found[v] = Label(name + of, "derived")
    return found


def inner_labels(
    eqn: Any, graph: Graph, named: Callable[[Any], Label | None], loop: Loop | None
) -> dict[Var, Label]:
    """Names for what the body of a loop or a branch reads.

    Args:
      eqn: the loop or choice.
      graph: its body.
      named: the name of an operand, None for a state or a literal.
      loop: the loop, or None of a choice, whose operands follow an index.
    """
    operands = eqn.invars if loop is not None else eqn.invars[1:]
    found: dict[Var, Label] = {}
    for i, (inner, outer) in enumerate(zip(graph.invars, operands, strict=True)):
        label = named(outer) or Label("", "state")
        if loop is not None and loop.carries.start <= i < loop.carries.stop:
            label = Label("carry", "state")
        elif loop is not None and i >= loop.carries.stop:
            label = Label(f"{label.name or 'input'}[step]", label.kind)
        found[inner] = label
    return found
