"""Bytes alive over a program's schedule, under several ways to differentiate it.

Each method's gradient is compiled for the target; XLA says in what order the
instructions run and when each value is alive (`mwc.memory.buffers`), so that a series
is the compiled program's own. Where the compiler writes nothing down (a TPU's, or JAX's
compilation cache answered) the series is the plan's: what it keeps, stage after stage
on the way out and back again; then `Series.source` says "plan", and so do the plot and
the text.

Limits: a loop's body is run at one place of the order, whatever its trips, and so is
the loop that fills results with NaN if a guard trips (a dip near the end). Of a plan
alone there are no temporaries within a stage, and no series for checkpoints.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax

from mwc.errors import MoonwalkTargetError
from mwc.memory import compiling, targets
from mwc.memory.alive import Alive, Live, Peak
from mwc.memory.subject import Subject

MIB = 2**20

# Values that the text and the plot name at a peak.
SHOWN = 5


@dataclasses.dataclass(frozen=True)
class Series:
    """Bytes alive over the schedule of one method's gradient.

    Attributes:
      method: as in a memory report.
      source: "compiler" for the compiled program's schedule, "plan" for the plan's.
      bytes: alive at each step, temporaries and results; arguments left out.
      temp: of the temporaries alone.
      peak: the step with most bytes, and the values that are alive there.
      turn: the last step of the forward pass, or None.
      kept_bytes: what the forward pass made that is alive after it, or None.
      temp_bytes: what the compiler allots for temporaries, or None.
    """

    method: str
    source: str
    bytes: tuple[int, ...]
    temp: tuple[int, ...]
    peak: Peak
    turn: int | None
    kept_bytes: int | None
    temp_bytes: int | None

    @property
    def ratio(self) -> float | None:
        """The most temporaries alive at once over those that the compiler allots.

        What is missing to 1 are holes: bytes free at the peak, but not in one piece.
        """
        if not self.temp_bytes or not self.temp:
            return None
        return max(self.temp) / self.temp_bytes

    def __str__(self) -> str:
        lines = [
            f"{self.method} ({self.source}): {self.peak.bytes / MIB:,.1f} MiB at step "
            f"{self.peak.step} of {len(self.bytes)}"
        ]
        lines += [f"  {described(value)}" for value in self.peak.values[:SHOWN]]
        rest = self.peak.values[SHOWN:]
        if rest:
            more = sum(v.bytes for v in rest) / MIB
            lines.append(f"  {more:8,.1f}  {sum(v.count for v in rest)} others")
        return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class Timeline:
    """Bytes alive over the schedule, for each method; prints its peaks.

    Attributes:
      target: what was compiled for.
      series: one for each method, in the order asked for.
    """

    target: str
    series: tuple[Series, ...]

    def __getitem__(self, method: str) -> Series:
        for one in self.series:
            if one.method == method:
                return one
        raise KeyError(method)

    @property
    def peak(self) -> dict[str, Peak]:
        """The peak of each method."""
        return {one.method: one.peak for one in self.series}

    def to_dict(self) -> dict[str, Any]:
        """The timeline as plain data, ready for JSON."""
        series = [{**dataclasses.asdict(s), "ratio": s.ratio} for s in self.series]
        return {"target": self.target, "jax": jax.__version__, "series": series}

    def plot(self, path: Any) -> None:
        """Draws all series over the share of their schedules that has run.

        Args:
          path: where to, ".png", ".svg" or ".pdf" by suffix, or a binary file.
        """
        from mwc.memory import plots

        plots.save(plots.curves(self), path)

    def __str__(self) -> str:
        title = f"bytes alive at the peak, MiB, {self.target}, jax {jax.__version__}"
        return "\n\n".join([title, *map(str, self.series)])


def described(value: Alive) -> str:
    """One line about alike values: MiB, count, shape, and where they come from."""
    times = f"{value.count} × " if value.count > 1 else ""
    return f"{value.bytes / MIB:8,.1f}  {times}{value.shape}  {value.label}"


def timeline(
    subject: Subject,
    target: str | targets.Target | None = None,
    methods: Sequence[str] = ("backprop", "checkpoint", "moonwalk"),
    progress: Callable[[str], None] | None = None,
) -> Timeline:
    """Compiles the gradient under each method and follows its bytes.

    Args:
      subject: the function with its arguments.
      target: as in `measure`.
      methods: the series wanted.
      progress: called with the name of each method as it begins.

    Returns:
      The timeline.

    Raises:
      MoonwalkTargetError: the target is unknown or cannot be compiled for, or neither
        the compiler nor a plan says anything.
      MoonwalkValueError: an unknown method.
    """
    place = targets.resolve(target)
    compiling.check(place)
    series = []
    for method in subject.chosen(methods):
        if progress is not None:
            progress(method)
        figures, _ = subject.figures(method, place, live=True)
        if figures["live"] is not None:
            series.append(_compiled(method, figures))
        else:
            series += _planned(subject, method, figures["temp_bytes"])
    if not series:
        raise MoonwalkTargetError(
            f"the compiler for {place.name} writes no schedule, and none of "
            f"{', '.join(methods)} has a plan",
            remedy='ask for "moonwalk" too, or for another target',
        )
    return Timeline(place.name, tuple(series))


def _compiled(method: str, figures: dict[str, Any]) -> Series:
    live = Live(figures["live"])
    return Series(
        method,
        "compiler",
        bytes=tuple(live.bytes.tolist()),
        temp=tuple(live.temp.tolist()),
        peak=live.peak,
        turn=live.turn,
        kept_bytes=live.kept_bytes,
        temp_bytes=figures["temp_bytes"],
    )


def _planned(subject: Subject, method: str, temp_bytes: int | None) -> list[Series]:
    """What a plan keeps, out and back; none for a method that no plan speaks of."""
    plans = {label: subject.plan(label) for label in subject.ours}
    plan = next((p for p in plans.values() if p is not None), None)
    if method in plans:
        plan = plans[method]
    if plan is None or method not in (*plans, "backprop"):
        return []
    stages = plan.stages
    if method == "backprop":
        share, rest = divmod(plan.backprop_bytes, max(len(stages), 1))
        kept = [share + (i < rest) for i in range(len(stages))]
    else:
        kept = [stage.residual_bytes + stage.state_bytes for stage in stages]
    out = list(itertools.accumulate(kept, initial=0))
    top = tuple(
        Alive(f"{stage.name} ({stage.strategy})", stage.kind, size, 1, "temporary")
        for stage, size in sorted(
            zip(stages, kept, strict=True), key=lambda pair: -pair[1]
        )
        if size
    )
    alive = tuple([*out, *reversed(out)])
    peak = Peak(len(kept), out[-1], top)
    return [Series(method, "plan", alive, alive, peak, len(kept), out[-1], temp_bytes)]
