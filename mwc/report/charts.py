"""Memory bars and timelines as shares of a plot: per cents, which fit any screen.

The page draws bars and labels as boxes of text, and curves as paths that are stretched
to the plot; so text stays readable on narrow screens and on paper. A series has at most
`POINTS` points, each the most of the steps that it stands for: its peak is exact.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence

from mwc.drawing.style import size
from mwc.memory.alive import Alive
from mwc.memory.report import MemoryReport, Row
from mwc.memory.timeline import Series, Timeline

POINTS = 400

_METHODS = ("backprop", "checkpoint", "checkpoint-2", "moonwalk")
_FURTHER = 4  # colours of other methods
_LABEL = 7.0  # per cent of the plot's height that a line of text takes
_TICKS = 5  # most of them
_ALIVE = 10  # values at a peak that are named


@dataclasses.dataclass(frozen=True)
class Bar:
    """What one method needs.

    Attributes:
      method: its name.
      colour: the name of its colour in the style sheet.
      parts: temporaries, results and arguments: (kind, per cent of the plot, text).
      planned: where temporaries as planned end, in per cent, or None.
      text: temporaries, and the factor against backpropagation's.
      row: the report's own row.
    """

    method: str
    colour: str
    parts: tuple[tuple[str, float, str], ...]
    planned: float | None
    text: str
    row: Row


@dataclasses.dataclass(frozen=True)
class Curve:
    """One series.

    Attributes:
      method: its name.
      colour: the name of its colour in the style sheet.
      planned: whether it is the plan's and not the compiler's.
      path: of the line, on a plot of 1000 × 1000, the origin top left.
      area: of what is under it.
      points: bytes, the most of equal shares of the schedule.
      across: of the peak, per cent from the left.
      up: of the peak, per cent from the bottom.
      label: of the peak's text, per cent from the bottom.
      turn: the end of the forward pass, per cent from the left, or None.
      peak: the bytes there, as text.
      alive: what is alive there, the largest first: (bytes, count and shape, where it
        comes from).
    """

    method: str
    colour: str
    planned: bool
    path: str
    area: str
    points: tuple[int, ...]
    across: float
    up: float
    label: float
    turn: float | None
    peak: str
    alive: tuple[tuple[str, str, str], ...]


@dataclasses.dataclass(frozen=True)
class Plot:
    """A timeline.

    Attributes:
      target: what was compiled for.
      ticks: (per cent from the bottom, text).
      curves: one for each series.
    """

    target: str
    ticks: tuple[tuple[float, str], ...]
    curves: tuple[Curve, ...]


def bars(report: MemoryReport) -> tuple[Bar, ...]:
    """A bar for each row with figures, temporaries first."""
    rows = [row for row in report.rows if row.temp_bytes is not None]
    ends = [max(sum(_parts(row)), row.predicted_bytes or 0) for row in rows]
    most = max(ends, default=0) or 1
    plain = next((r.temp_bytes for r in rows if r.method == "backprop"), None)
    colours = _colours([row.method for row in rows])
    return tuple(_bar(row, colours[row.method], most, plain) for row in rows)


def _bar(row: Row, colour: str, most: int, plain: int | None) -> Bar:
    kinds = ("temporaries", "results", "arguments")
    parts = tuple(
        (kind, 100 * count / most, f"{kind} {size(count)}")
        for kind, count in zip(kinds, _parts(row), strict=True)
    )
    text, temp = size(row.temp_bytes or 0), row.temp_bytes
    if plain and temp and row.method != "backprop":
        text += f" · {times(plain, temp)}"
    spot = row.predicted_bytes
    planned = None if spot is None else 100 * spot / most
    return Bar(row.method, colour, parts, planned, text, row)


def _parts(row: Row) -> tuple[int, int, int]:
    return row.temp_bytes or 0, row.output_bytes or 0, row.argument_bytes or 0


def times(plain: int, ours: int) -> str:
    """How many times less, or more: "16× less"."""
    low, high = sorted((plain, ours))
    ratio = high / low if low else 1.0
    if ratio < 1.05:
        return "the same"
    digits = 0 if ratio >= 10 else 1
    return f"{ratio:.{digits}f}× {'less' if ours < plain else 'more'}"


def plot(timeline: Timeline) -> Plot:
    """The series of a timeline on one scale."""
    series = [s for s in timeline.series if s.bytes]
    most = max((s.peak.bytes for s in series), default=0) or 1
    top = 1.1 * most
    heights = [100 * s.peak.bytes / top for s in series]
    colours = _colours([s.method for s in series])
    curves = (
        _curve(s, colours[s.method], top, height, label)
        for s, height, label in zip(series, heights, _apart(heights), strict=True)
    )
    return Plot(timeline.target, tuple(_ticks(top)), tuple(curves))


def _curve(one: Series, colour: str, top: float, up: float, label: float) -> Curve:
    points = tuple(_thinned(one.bytes))
    across = [1000 * i / len(points) for i in range(len(points) + 1)]
    heights = [1000 - 1000 * b / top for b in points]
    steps = (
        f"V{h:.1f}H{right:.1f}" for h, right in zip(heights, across[1:], strict=True)
    )
    start = f"M0,{heights[0]:.1f}"
    path = start + "".join(steps)
    count = len(one.bytes)
    turn = None
    if one.turn is not None and one.source == "compiler":
        turn = 100 * one.turn / count
    alive = tuple(_alive(one.peak.values))
    spot = 100 * (one.peak.step + 0.5) / count
    shapes = path, f"{path}V1000H0Z", points
    place = min(spot, 100.0), up, label, turn
    planned = one.source == "plan"
    text = size(one.peak.bytes)
    return Curve(one.method, colour, planned, *shapes, *place, text, alive)


def _alive(values: Sequence[Alive]) -> Iterator[tuple[str, str, str]]:
    for v in values[:_ALIVE]:
        times = f"{v.count} × " if v.count > 1 else ""
        yield size(v.bytes), times + v.shape, v.label
    rest = values[_ALIVE:]
    if rest:
        count = sum(v.count for v in rest)
        yield size(sum(v.bytes for v in rest)), f"{count} others", ""


def _thinned(steps: Sequence[int]) -> Iterator[int]:
    """The most of each of at most `POINTS` equal stretches."""
    count = min(len(steps), POINTS)
    edges = [i * len(steps) // count for i in range(count + 1)]
    return (max(steps[a:b]) for a, b in itertools.pairwise(edges))


def _apart(heights: Sequence[float]) -> list[float]:
    """Heights of labels that are a line of text apart, the lowest kept in place."""
    found = [0.0] * len(heights)
    least = 0.0
    for i in sorted(range(len(heights)), key=heights.__getitem__):
        found[i] = max(heights[i], least)
        least = found[i] + _LABEL
    return found


def _ticks(top: float) -> Iterator[tuple[float, str]]:
    """Powers of two and their multiples, from nothing to the top."""
    step = 1
    while top / step >= _TICKS:
        step *= 2
    for i in range(int(top / step) + 1):
        yield 100 * i * step / top, size(i * step) if i else "0"


def _colours(methods: Iterable[str]) -> dict[str, str]:
    """The colour of each method: its own, or one of the further ones."""
    further = (f"further-{i % _FURTHER}" for i in itertools.count())
    named = dict.fromkeys(methods)
    return {m: m if m in _METHODS else next(further) for m in named}
