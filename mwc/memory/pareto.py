"""The memory that extra time buys: plans from least time to least memory.

A function is planned for several bounds of `extra_forwards`; a plan that needs more
than another and takes no less time is dropped. Beside the curve are the usual ways:
backpropagation and `jax.checkpoint`. Nothing is compiled unless a target is asked for:
bytes are then those of the compiled programs (temporaries), else the plans' own
predictions and the byte counts that checkpoints are placed by (`mwc.memory.segments`).

Extra time is in forward passes beyond backpropagation's three, in matrix operations
(in all where there are none), counted on the programs as traced.

Limits: predictions of checkpoints are of the placement with equal weights; compiled
ones are searched.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import rich.box
import rich.table

from mwc.memory import compiling, nesting, segments, targets
from mwc.memory.printing import plain
from mwc.memory.subject import BASELINES, Subject, level

BOUNDS = (0.0, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0)
"""The extra forward passes that are asked for by default."""


@dataclasses.dataclass(frozen=True)
class Point:
    """One way to differentiate, its time and its memory.

    Attributes:
      method: "moonwalk", or one of "backprop", "checkpoint", "checkpoint-2".
      extra_forwards: forward passes beyond backpropagation's.
      peak_bytes: predicted temporaries at the peak.
      temp_bytes: compiled temporaries; None if nothing was compiled.
      asked: the bound of `extra_forwards` that a plan was made for, else None.
      plan: the plan, else None.
    """

    method: str
    extra_forwards: float
    peak_bytes: int
    temp_bytes: int | None = None
    asked: float | None = None
    plan: Any = None

    @property
    def bytes(self) -> int:
        """Compiled bytes where there are any, else predicted ones."""
        return self.peak_bytes if self.temp_bytes is None else self.temp_bytes


@dataclasses.dataclass(frozen=True)
class Pareto:
    """Plans from least time to least memory, and other methods; prints as a table.

    Attributes:
      points: the plans, none of which is beaten by another.
      others: backpropagation and checkpoints, to compare with.
      target: what was compiled for; None if bytes are predicted.
    """

    points: tuple[Point, ...]
    others: tuple[Point, ...]
    target: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The points as plain data, ready for JSON; plans are left out."""
        points, others = map(_plain, (self.points, self.others))
        return {
            "target": self.target,
            "jax": jax.__version__,
            "points": points,
            "others": others,
        }

    def plot(self, path: Any) -> None:
        """Draws the plans as a curve and the other methods as points beside it.

        Args:
          path: where to, ".png", ".svg" or ".pdf" by suffix, or a binary file.
        """
        from mwc.memory import plots

        plots.save(plots.trade(self), path)

    def __rich__(self) -> rich.table.Table:
        how = "predicted" if self.target is None else f"compiled for {self.target}"
        table = rich.table.Table(
            title=f"extra time and memory, {how}",
            title_justify="left",
            box=rich.box.SIMPLE,
            pad_edge=False,
        )
        table.add_column("method", no_wrap=True)
        columns = ["asked", "extra forwards", "predicted MiB"]
        columns += ["compiled MiB"] if self.target else []
        for name in columns:
            table.add_column(name, justify="right")
        for p in (*self.points, *self.others):
            cells = ["–" if p.asked is None else f"{p.asked:g}"]
            cells += [f"{p.extra_forwards:.2f}", _mib(p.peak_bytes)]
            table.add_row(
                p.method, *cells, *([_mib(p.temp_bytes)] if self.target else [])
            )
        return table

    def __str__(self) -> str:
        return plain(self)


def pareto(
    subject: Subject,
    bounds: Sequence[float],
    target: str | targets.Target | None = None,
    progress: Callable[[str], None] | None = None,
) -> Pareto:
    """Plans for several bounds of the extra time, and the usual methods beside them.

    Args:
      subject: the function, with one decorated function a bound, in their order.
      bounds: the extra forward passes that they were decorated with.
      target: compile for it too; None compiles nothing.
      progress: called with the name of each row as it begins.

    Returns:
      The curve.

    Raises:
      MoonwalkTargetError: the target is unknown or cannot be compiled for.
    """
    place = None if target is None else targets.resolve(target)
    if place is not None:
        compiling.check(place)

    def compiled(method: str) -> int | None:
        if place is None:
            return None
        return subject.figures(method, place)[0]["temp_bytes"]

    points = []
    for label, asked in zip(subject.ours, bounds, strict=True):
        if progress is not None:
            progress(label)
        plan = subject.plan(label)
        known = {p.plan for p in points}
        if plan not in known:
            extra = plan.extra_forwards
            found = extra, plan.peak_bytes, compiled(label), asked, plan
            points.append(Point("moonwalk", *found))
    others = []
    for method in BASELINES:
        if progress is not None:
            progress(method)
        predicted = _predicted(subject, method, points[0].plan)
        extra = subject.extra_forwards(method)
        others.append(Point(method, extra, predicted, compiled(method)))
    name = None if place is None else place.name
    return Pareto(_unbeaten(points), tuple(others), name)


def _unbeaten(points: Iterable[Point]) -> tuple[Point, ...]:
    """The points that no other beats, least time first."""
    kept: list[Point] = []
    for p in sorted(points, key=lambda p: (p.extra_forwards, p.bytes)):
        if not kept or p.bytes < kept[-1].bytes:
            kept.append(p)
    return tuple(kept)


def _predicted(subject: Subject, method: str, plan: Any) -> int:
    """Most bytes alive by the byte counts that checkpoints are placed by."""
    if method == "backprop":
        return plan.backprop_bytes
    layout = subject.layout(method)
    known = subject.form.costs
    inner = layout.inner if level(method) == 2 else None
    flat = segments.predicted(known, 1.0, layout.outer, inner)
    sized = zip(known.loops, layout.sizes, strict=True)
    loops = [nesting.predicted(loop, sizes) for loop, sizes in sized]
    # A loop is a segment of its own: it is pulled back alone.
    return round(max([flat, *loops]))


def _plain(points: Iterable[Point]) -> list[dict[str, Any]]:
    names = [f.name for f in dataclasses.fields(Point) if f.name != "plan"]
    return [{name: getattr(p, name) for name in names} for p in points]


def _mib(count: int | None) -> str:
    return "–" if count is None else f"{count / 2**20:,.1f}"
