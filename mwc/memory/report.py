"""Compiled memory of a function's gradient under each way to differentiate it.

What is measured is the program `jax.value_and_grad(f)`, compiled for the target and
asked what it needs (XLA's buffer assignment); nothing is run. Operations are counted
on the program as traced (`passes.flops`). The rows:

- "backprop": the undecorated function;
- "checkpoint", "checkpoint-2": the best that a search over `jax.checkpoint` finds
  with one and two levels (`mwc.memory.baselines`);
- "moonwalk": the decorated function.

The rows of decorated functions also say what their plans predict, and the ratio.
A method that cannot be compiled has a row that says why.

Limits: arguments on a mesh are measured a device, and plans are about whole programs:
rows of several devices have no prediction.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import rich.box
import rich.table

from mwc.errors import MoonwalkError, MoonwalkValueError
from mwc.memory import compiling, targets
from mwc.memory.depth import Depths, estimate
from mwc.memory.printing import plain
from mwc.memory.repeats import Repeats, repeats
from mwc.memory.subject import Subject


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
      compile_seconds: time that the compiler took, now or when the cache was filled.
      trace_seconds: time that tracing and planning took.
      note: how checkpoints were placed, or why there are no figures.
      predicted_bytes: what the plan says of `temp_bytes`; None where there is no plan,
        and for several devices.
      kept_bytes: what the plan says is kept between its sweeps, likewise.
      growing_bytes: those of them that grow with depth in proportion: bits and stored
        values, and kept states of a plan that runs less than once again.
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
    predicted_bytes: int | None = None
    kept_bytes: int | None = None
    growing_bytes: int | None = None

    @property
    def ratio(self) -> float | None:
        """Predicted over compiled temporaries; None where either is missing."""
        if self.predicted_bytes is None or not self.temp_bytes:
            return None
        return self.predicted_bytes / self.temp_bytes


@dataclasses.dataclass(frozen=True)
class MemoryReport:
    """Rows of compiled memory; prints as a table.

    Attributes:
      target: what was compiled for.
      rows: one for each method, in the order asked for.
      devices: how many the arguments are sharded over; bytes are those of one.
      repeats: the block that the program repeats, None if it repeats none.
    """

    target: str
    rows: tuple[Row, ...]
    devices: int = 1
    repeats: Repeats | None = None

    def __getitem__(self, method: str) -> Row:
        for row in self.rows:
            if row.method == method:
                return row
        raise KeyError(method)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data, ready for JSON."""
        rows = [{**dataclasses.asdict(row), "ratio": row.ratio} for row in self.rows]
        plain = {"target": self.target, "devices": self.devices}
        return {**plain, "jax": jax.__version__, "rows": rows}

    def depth_at(
        self,
        budget: int | float | str,
        *,
        repeats: int | None = None,
        whole: bool = True,
    ) -> Depths:
        """An estimate of how many repeats of the program's block fit a budget.

        `mwc.memory.depth_at` measures what is estimated here, given a function of the
        depth.

        Args:
          budget: bytes, or text such as "8GiB", on one device.
          repeats: how often the block is in this program; None is what was found.
          whole: whether arguments and results count, as on a device that holds nothing
            else; False is the budget of the temporaries alone.

        Returns:
          Repeats for each method.

        Raises:
          MoonwalkValueError: the budget cannot be read, or nothing repeats.
        """
        count = self.repeats.count if repeats is None and self.repeats else repeats
        if count is None:
            raise MoonwalkValueError(
                "the program repeats no block",
                remedy="say how often it does: depth_at(budget, repeats=12)",
            )
        return estimate(self.rows, self.target, budget, count, whole)

    def plot(self, path: Any) -> None:
        """Draws a bar for each method.

        Args:
          path: where to, ".png", ".svg" or ".pdf" by suffix, or a binary file.
        """
        from mwc.memory import plots

        plots.save(plots.bars(self), path)

    def __rich__(self) -> rich.table.Table:
        title = f"compiled memory in MiB, {self.target}, jax {jax.__version__}"
        if self.devices > 1:
            title += f", each of {self.devices} devices"
        table = rich.table.Table(
            title=title, title_justify="left", box=rich.box.SIMPLE, pad_edge=False
        )
        table.add_column("method", no_wrap=True)
        names = ("arguments", "outputs", "temp", "peak", "code", "GFLOP", "compile s")
        planned = any(row.kept_bytes is not None for row in self.rows)
        for name in (*names, *(("predicted", "ratio", "keeps") if planned else ())):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("note", overflow="fold", min_width=20)
        for row in self.rows:
            sizes = (
                *(row.argument_bytes, row.output_bytes, row.temp_bytes),
                *(row.peak_bytes, row.generated_code_bytes),
            )
            plan = (
                _number(row.predicted_bytes, 2**20),
                "–" if row.ratio is None else f"{row.ratio:.2f}",
                _number(row.kept_bytes, 2**20),
            )
            table.add_row(
                row.method,
                *(_number(size, 2**20) for size in sizes),
                _number(row.flops, 1e9),
                _number(row.compile_seconds, 1),
                *(plan if planned else ()),
                row.note,
            )
        return table

    def __str__(self) -> str:
        return plain(self, width=140)


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
    if not isinstance(decorated, Mapping):
        decorated = {} if decorated is None else {"moonwalk": decorated}
    static = tuple(static_argnums), tuple(static_argnames)
    subject = Subject(
        *(fun, decorated, args, kwargs or {}, argnums, has_aux, *static, value, tries)
    )
    return table(subject, place, methods, progress)


def table(
    subject: Subject,
    target: targets.Target,
    methods: Sequence[str] | None = None,
    progress: Callable[[str], None] | None = None,
) -> MemoryReport:
    """The report of a subject; `measure` says what is in it."""
    wanted = subject.chosen(methods)
    rows: list[Row] = []
    failures: list[Exception] = []
    for method in wanted:
        if progress is not None:
            progress(method)
        try:
            rows.append(_row(subject, method, target))
        except Exception as error:  # the other rows are worth having
            failures.append(error)
            rows.append(Row(method, note=_reason(error)))
    if failures and len(failures) == len(wanted):
        raise failures[0]
    return MemoryReport(target.name, tuple(rows), subject.devices(), _repeats(subject))


def _row(subject: Subject, method: str, target: targets.Target) -> Row:
    figures, note = subject.figures(method, target)
    row = Row(method, note=note, **figures)
    plan = subject.plan(method)
    if plan is None:
        return row
    kept = plan.residual_bytes + plan.state_bytes
    # A plan is about the whole program: it says nothing about one of many devices.
    alone = subject.devices() == 1
    return dataclasses.replace(
        row,
        predicted_bytes=plan.peak_bytes if alone else None,
        kept_bytes=kept if alone else None,
        growing_bytes=_growing(plan) if alone else None,
    )


def _growing(plan: Any) -> int:
    """Bytes kept that grow with depth in proportion."""
    if plan.extra_forwards < 0.95:  # a slot for every few stages, however many
        return plan.residual_bytes + plan.state_bytes
    total = 0
    for stage in plan.stages:
        states = stage.strategy == "checkpoint"
        total += math.ceil(stage.bits / 8) if states else stage.residual_bytes
    return total


def _repeats(subject: Subject) -> Repeats | None:
    try:
        return repeats(subject.form.graph)
    except Exception:  # a function that cannot be traced has rows that say so
        return None


def _reason(error: Exception) -> str:
    text = str(error).strip().splitlines()
    first = text[0] if text else ""
    return (
        first
        if isinstance(error, MoonwalkError)
        else f"{type(error).__name__}: {first}"
    )
