"""Compiled memory of a function's gradient under each way to differentiate it.

What is measured is the program `jax.value_and_grad(f)`, compiled for the target and
asked what it needs (XLA's buffer assignment); nothing is run. Operations are counted
on the program as traced (`passes.flops`). The rows:

- "backprop": the undecorated function;
- "checkpoint", "checkpoint-2": the best that a search over `jax.checkpoint` finds
  with one and two levels (`mwc.memory.baselines`);
- "moonwalk": the decorated function.

A method that cannot be compiled has a row that says why. Limits: one device.
"""

from __future__ import annotations

import dataclasses
import io
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import rich.box
import rich.console
import rich.table

from mwc.errors import MoonwalkError, MoonwalkValueError
from mwc.memory import baselines, compiling, targets
from mwc.memory.emitted import emitted
from mwc.memory.inputs import FlatCall
from passes.flops import flops

METHODS = ("backprop", "checkpoint", "checkpoint-2", "moonwalk")


@dataclasses.dataclass(frozen=True)
class Row:
    """What one method needs; None where the compiler says nothing.

    Attributes:
      method: one of `METHODS`, or a label given to `measure`.
      argument_bytes: the arguments that the program reads.
      output_bytes: its results.
      temp_bytes: everything that it allocates besides.
      peak_bytes: the most that is alive at once, arguments and results included.
      generated_code_bytes: its code.
      flops: operations by the program's trip counts.
      compile_seconds: time that the compiler took.
      trace_seconds: time that tracing and planning took.
      note: how checkpoints were placed, or why there are no figures.
    """

    method: str
    argument_bytes: int | None = None
    output_bytes: int | None = None
    temp_bytes: int | None = None
    peak_bytes: int | None = None
    generated_code_bytes: int | None = None
    flops: int | None = None
    compile_seconds: float | None = None
    trace_seconds: float | None = None
    note: str = ""


@dataclasses.dataclass(frozen=True)
class MemoryReport:
    """Rows of compiled memory; prints as a table.

    Attributes:
      target: what was compiled for.
      rows: one for each method, in the order asked for.
    """

    target: str
    rows: tuple[Row, ...]

    def __getitem__(self, method: str) -> Row:
        for row in self.rows:
            if row.method == method:
                return row
        raise KeyError(method)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data, ready for JSON."""
        rows = [dataclasses.asdict(row) for row in self.rows]
        return {"target": self.target, "jax": jax.__version__, "rows": rows}

    def __rich__(self) -> rich.table.Table:
        title = f"compiled memory in MiB, {self.target}, jax {jax.__version__}"
        table = rich.table.Table(
            title=title, title_justify="left", box=rich.box.SIMPLE, pad_edge=False
        )
        table.add_column("method", no_wrap=True)
        names = ("arguments", "outputs", "temp", "peak", "code", "GFLOP", "compile s")
        for name in names:
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("note", overflow="fold")
        for row in self.rows:
            sizes = (
                *(row.argument_bytes, row.output_bytes, row.temp_bytes),
                *(row.peak_bytes, row.generated_code_bytes),
            )
            table.add_row(
                row.method,
                *(_number(size, 2**20) for size in sizes),
                _number(row.flops, 1e9),
                _number(row.compile_seconds, 1),
                row.note,
            )
        return table

    def __str__(self) -> str:
        stream = io.StringIO()
        console = rich.console.Console(file=stream, width=100, color_system=None)
        console.print(self)
        return "\n".join(map(str.rstrip, stream.getvalue().rstrip().splitlines()))


def _number(value: float | None, unit: float) -> str:
    if value is None:
        return "–"
    scaled = value / unit
    digits = 0 if scaled >= 100 else 1 if scaled >= 10 else 3
    return f"{scaled:,.{digits}f}"


def measure(
    fun: Callable[..., Any],
    decorated: Callable[..., Any] | Mapping[str, Callable[..., Any]] | None,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    *,
    target: str | targets.Target | None = None,
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    methods: Sequence[str] | None = None,
    value: bool = True,
    static_argnums: Sequence[int] = (),
    static_argnames: Sequence[str] = (),
    tries: int = 6,
    progress: Callable[[str], None] | None = None,
) -> MemoryReport:
    """Compiles the gradient under each method and reports what it needs.

    Args:
      fun: the undecorated function.
      decorated: the decorated one, or several by the label of their row; None to
        leave it out.
      args: arrays or `ShapeDtypeStruct`s; leaves that are neither are static.
      kwargs: keyword arguments, likewise.
      target: a name or `Target`; None is the current backend.
      argnums: the arguments to differentiate in.
      has_aux: whether the function returns (loss, auxiliary results).
      methods: the rows wanted; all that there are by default.
      value: False measures `jax.grad` in place of `jax.value_and_grad`.
      static_argnums: positional arguments that stay inside the function.
      static_argnames: keyword arguments that do.
      tries: most compilations for each level of checkpoints.
      progress: called with the name of each method as it begins.

    Returns:
      The report.

    Raises:
      MoonwalkTargetError: the target is unknown or cannot be compiled for.
      MoonwalkValueError: an unknown method.
      Exception: what every single method raised, if all failed alike.
    """
    place = targets.resolve(target)
    compiling.check(place)
    if decorated is None:
        ours: dict[str, Callable[..., Any]] = {}
    elif isinstance(decorated, Mapping):
        ours = dict(decorated)
    else:
        ours = {"moonwalk": decorated}
    wanted = list(methods) if methods is not None else [*METHODS[:3], *ours]
    unknown = [m for m in wanted if m not in (*METHODS[:3], *ours)]
    if unknown:
        raise MoonwalkValueError(
            f"the method {unknown[0]!r} is unknown",
            expected="some of " + ", ".join(map(repr, (*METHODS[:3], *ours))),
        )
    static = static_argnums, static_argnames
    call = FlatCall(args, kwargs or {}, argnums, has_aux, *static)
    meter = _Meter(call, place, value)
    rows: list[Row] = []
    failures: list[Exception] = []
    form: baselines.Checkpointed | None = None
    for method in wanted:
        if progress is not None:
            progress(method)
        try:
            if method in ours:
                rows.append(meter.row(method, meter.call.bind(ours[method])))
            elif method == "backprop":
                rows.append(meter.row(method, meter.call.bind(fun)))
            else:
                form = form or baselines.Checkpointed(
                    meter.call.bind(fun), meter.call.specs
                )
                rows.append(meter.searched(method, form, tries))
        except Exception as error:  # the other rows are worth having
            failures.append(error)
            rows.append(Row(method, note=_reason(error)))
    if failures and len(failures) == len(wanted):
        raise failures[0]
    return MemoryReport(place.name, tuple(rows))


class _Meter:
    """Differentiates flat functions, compiles them and fills rows."""

    def __init__(self, call: FlatCall, target: targets.Target, value: bool):
        self.call = call
        self._target = target
        self._value = value

    def row(self, method: str, flat: baselines.Flat, note: str = "") -> Row:
        """The row of one differentiated function."""
        return Row(method, note=note, **self.compiled(flat))

    def searched(self, method: str, form: baselines.Checkpointed, tries: int) -> Row:
        """The row of the best placement of checkpoints."""
        levels = 2 if method == "checkpoint-2" else 1
        layout, figures = baselines.search(form, levels, self.compiled, tries)
        return Row(method, note=str(layout), **figures)

    def compiled(self, flat: baselines.Flat) -> dict[str, Any]:
        """Figures of the gradient of a flat function."""
        start = time.perf_counter()
        jitted = jax.jit(self.call.gradient(flat, self._value))
        jaxpr = jitted.trace(*self.call.specs).jaxpr
        traced = time.perf_counter() - start
        count = flops(jaxpr, emitted)
        found = compiling.compile_for(self._target, jitted, self.call.specs)
        return {**found, "flops": count.total, "trace_seconds": traced}


def _reason(error: Exception) -> str:
    text = str(error).strip().splitlines()
    first = text[0] if text else ""
    return (
        first
        if isinstance(error, MoonwalkError)
        else f"{type(error).__name__}: {first}"
    )
