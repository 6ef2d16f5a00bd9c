"""Pictures of memory reports, timelines and curves, by matplotlib.

Figures are made without pyplot, so that neither the caller's backend nor its open
figures change. Colours are the same for one method in every picture (a palette that
colour-blind readers can tell apart: Okabe and Ito, 2008).
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from mwc.errors import MoonwalkUnsupportedError, MoonwalkValueError
from mwc.memory.timeline import MIB, Series, Timeline

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from mwc.memory.pareto import Pareto
    from mwc.memory.report import MemoryReport

_COLOURS = {
    "backprop": "#D55E00",
    "checkpoint": "#E69F00",
    "checkpoint-2": "#8C6D1F",
    "moonwalk": "#0072B2",
}
_FURTHER = ("#56B4E9", "#009E73", "#CC79A7", "#5B4A9E")
_GREYS = ("#B9BEC6", "#DDE0E5")
_INK = "#3A3F47"
_SUFFIXES = (".png", ".svg", ".pdf")


def save(figure: Figure, path: Any) -> None:
    """Writes a figure.

    Args:
      figure: what to write.
      path: a file name with one of the suffixes .png, .svg, .pdf, or a binary file
        (which gets SVG).

    Raises:
      MoonwalkValueError: another suffix.
    """
    if not isinstance(path, str | os.PathLike):
        figure.savefig(path, format="svg")
        return
    suffix = os.path.splitext(path)[1].lower()
    if suffix not in _SUFFIXES:
        raise MoonwalkValueError(
            f"the picture's name is {os.fspath(path)!r}",
            expected="a name that ends in " + ", ".join(_SUFFIXES),
        )
    figure.savefig(path, dpi=150)


def bars(report: MemoryReport) -> Figure:
    """A bar for each method: temporaries, then results and arguments."""
    rows = [row for row in report.rows if row.temp_bytes is not None]
    figure = _figure(8.0, 1.6 + 0.55 * max(len(rows), 1))
    axes = figure.add_subplot()
    colours = _colours([row.method for row in rows])
    longest = 0.0
    for place, row in enumerate(rows):
        parts = [row.temp_bytes or 0, row.output_bytes or 0, row.argument_bytes or 0]
        shades = (colours[row.method], *_GREYS)
        left = 0.0
        for size, shade in zip(parts, shades, strict=True):
            axes.barh(place, size / MIB, left=left, color=shade, height=0.62)
            left += size / MIB
        longest = max(longest, left)
        axes.annotate(
            f"{_short(parts[0])} + {_short(parts[1] + parts[2])}",
            (left, place),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
            color=_INK,
        )
        if row.predicted_bytes is not None:
            spot = row.predicted_bytes / MIB
            axes.plot([spot, spot], [place - 0.4, place + 0.4], color="black", lw=1.8)
            longest = max(longest, spot)
    axes.set_yticks(range(len(rows)), [row.method for row in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(0, 1.22 * (longest or 1))
    axes.set_xlabel("MiB" + (" on each device" if report.devices > 1 else ""))
    _titled(axes, f"memory of the compiled gradient, {_where(report)}")
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    marks: list[Any] = [
        Patch(color=_COLOURS["moonwalk"], label="temporaries (in colour)"),
        Patch(color=_GREYS[0], label="results"),
        Patch(color=_GREYS[1], label="arguments"),
    ]
    if any(row.predicted_bytes is not None for row in rows):
        line = {"color": "black", "lw": 1.8, "label": "temporaries as planned"}
        marks.append(Line2D([], [], **line))
    figure.legend(
        handles=marks, loc="outside lower center", ncols=4, frameon=False, fontsize=9
    )
    return figure


def curves(timeline: Timeline) -> Figure:
    """Bytes alive over the schedules, the peaks with what is alive there."""
    texts = [f"peak of {one}".splitlines() for one in timeline.series]
    lines = sum(map(len, texts)) + 0.6 * len(texts)
    below = 0.17 * lines
    figure = _figure(9.0, 4.4 + below)
    grid = figure.add_gridspec(2, 1, height_ratios=(4.0, below))
    axes = figure.add_subplot(grid[0])
    colours = _colours([s.method for s in timeline.series])
    for one in timeline.series:
        _curve(axes, one, colours[one.method])
    axes.plot([], [], color=_INK, lw=0.9, ls=":", label="end of the forward pass")
    axes.set_xlim(0, 100)
    top = max(s.peak.bytes for s in timeline.series) / MIB
    axes.set_ylim(0, 1.1 * top if top else 1)
    axes.set_xlabel("% of the schedule that has run (a loop's body is there once)")
    axes.set_ylabel("MiB alive, arguments left out")
    place = {"loc": "lower right", "bbox_to_anchor": (1.0, 1.0)}
    axes.legend(frameon=False, fontsize=9, ncols=len(timeline.series) + 1, **place)
    _titled(axes, f"live bytes, {timeline.target}")
    box = figure.add_subplot(grid[1])
    box.set_axis_off()
    height = 0.0
    for one, text in zip(timeline.series, texts, strict=True):
        clipped = [line if len(line) < 112 else line[:110] + "…" for line in text]
        style = {"transform": box.transAxes, "va": "top", "fontsize": 8}
        style |= {"family": "monospace"}
        at = 0, 1 - height / lines
        box.text(*at, clipped[0], color=colours[one.method], weight="bold", **style)
        box.text(*at, "\n" + "\n".join(clipped[1:]), color=_INK, **style)
        height += len(text) + 0.6
    return figure


def _curve(axes: Any, one: Series, colour: str) -> None:
    from matplotlib.patheffects import withStroke

    count = max(len(one.bytes) - 1, 1)
    places = [100 * i / count for i in range(len(one.bytes))]
    heights = [size / MIB for size in one.bytes]
    planned = one.source == "plan"
    label = f"{one.method} (from the plan)" if planned else one.method
    style = {"color": colour, "lw": 1.6, "ls": "--" if planned else "-"}
    axes.step(places, heights, where="post", label=label, **style)
    axes.fill_between(places, heights, step="post", color=colour, alpha=0.10, lw=0)
    spot = 100 * one.peak.step / count, one.peak.bytes / MIB
    axes.plot(*spot, "o", color=colour, ms=5)
    left = spot[0] > 80
    axes.annotate(
        f"{one.peak.bytes / MIB:,.0f}",
        spot,
        xytext=(-5 if left else 5, 4),
        textcoords="offset points",
        ha="right" if left else "left",
        fontsize=9,
        color=colour,
        weight="bold",
        path_effects=[withStroke(linewidth=2.5, foreground="white")],
    )
    if one.turn is not None and one.source == "compiler":
        turn = 100 * one.turn / count
        axes.plot([turn, turn], [0, heights[one.turn]], color=colour, lw=0.8, ls=":")


def trade(pareto: Pareto) -> Figure:
    """The plans as a curve over extra time, the other methods as points."""
    figure = _figure(7.0, 4.4)
    axes = figure.add_subplot()
    places = [p.extra_forwards for p in pareto.points]
    heights = [p.bytes / MIB for p in pareto.points]
    colours = _colours(["moonwalk", *(p.method for p in pareto.others)])
    blue = colours["moonwalk"]
    axes.step(places, heights, where="post", color=blue, lw=1.2, alpha=0.6)
    axes.plot(places, heights, "o", color=blue, ms=6, label="moonwalk")
    for place, height in zip(places, heights, strict=True):
        _noted(axes, place, height, blue)
    for marker, p in zip("sD^", pareto.others, strict=False):
        height = p.bytes / MIB
        style = {"color": colours[p.method], "ms": 7, "label": p.method}
        axes.plot([p.extra_forwards], [height], marker, **style)
        _noted(axes, p.extra_forwards, height, colours[p.method])
    every = [*heights, *(p.bytes / MIB for p in pareto.others)]
    if min(every) > 0 and max(every) > 8 * min(every):
        from matplotlib.ticker import LogLocator, NullFormatter

        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter("{x:,.0f}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_ylim(0, 1.15 * max(every))
    axes.margins(x=0.12)
    axes.set_xlabel("extra forward passes")
    how = "predicted" if pareto.target is None else f"compiled for {pareto.target}"
    axes.set_ylabel("MiB of temporaries")
    axes.legend(frameon=False, fontsize=9)
    _titled(axes, f"memory against extra time, {how}")
    return figure


def _noted(axes: Any, place: float, height: float, colour: str) -> None:
    axes.annotate(
        f"{height:,.0f}",
        (place, height),
        xytext=(6, 5),
        textcoords="offset points",
        fontsize=8.5,
        color=colour,
    )


def _figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MoonwalkUnsupportedError(
            "a plot needs matplotlib, which is not installed",
            remedy="pip install matplotlib; to_dict() has the same numbers",
        ) from error
    return Figure(figsize=(width, height), layout="constrained")


def _titled(axes: Any, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=9)


def _colours(methods: list[str]) -> dict[str, str]:
    """A colour for each method: its own, or one of the further ones."""
    others = iter(_FURTHER * len(methods))
    return {m: _COLOURS.get(m) or next(others) for m in dict.fromkeys(methods)}


def _where(report: MemoryReport) -> str:
    many = f", each of {report.devices} devices" if report.devices > 1 else ""
    return report.target + many


def _short(count: int) -> str:
    size = count / MIB
    return f"{size:,.0f}" if size >= 10 else f"{size:.2g}"
