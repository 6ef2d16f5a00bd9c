"""The page: a plan, and what was measured of it, in the template.

The template escapes every text (jinja2, autoescape); what its script reads is JSON in
which no tag can begin. The content security policy names the one script by its hash.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import itertools
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import jinja2

from mwc._plan import Plan, StageRecord
from mwc.drawing import to_networkx
from mwc.drawing.sheet import every_card, sheet
from mwc.drawing.style import KEPT, LOOKS, RECOMPUTED, size
from mwc.errors import MoonwalkError, MoonwalkTypeError, MoonwalkValueError
from mwc.memory.report import MemoryReport
from mwc.memory.timeline import Timeline
from mwc.report import charts, picture
from mwc.report.colours import DARK
from mwc.report.facts import facts, key_of, rows

_SUFFIXES = (".html", ".htm")


def write(
    plan: Plan,
    path: str | os.PathLike[str],
    memory: MemoryReport | None = None,
    timeline: Timeline | None = None,
) -> None:
    """Writes the page to a file; see `mwc.Plan.report`."""
    place = check_path(path)
    text = html(plan, memory, timeline)
    try:
        place.write_text(text, encoding="utf-8")
    except OSError as error:
        raise MoonwalkError(
            f"the report cannot be written: {error}",
            expected="a file in a directory that exists and may be written to",
        ) from error


def check_path(path: str | os.PathLike[str]) -> pathlib.Path:
    """Where a report goes, told before anything is compiled for it.

    Raises:
      MoonwalkValueError: the name does not end in ".html".
      MoonwalkError: there is no such directory.
    """
    place = pathlib.Path(path)
    if place.suffix.lower() not in _SUFFIXES:
        raise MoonwalkValueError(
            f"the report's name is {place.name!r}",
            expected="a file name that ends in .html",
        )
    if not place.parent.is_dir():
        raise MoonwalkError(
            f"there is no directory {str(place.parent)!r}",
            expected="a file in a directory that exists and may be written to",
        )
    return place


def html(
    plan: Plan, memory: MemoryReport | None = None, timeline: Timeline | None = None
) -> str:
    """The page as text.

    Args:
      plan: the plan.
      memory: what the compiled programs need; None leaves the bars out.
      timeline: bytes alive over their schedules; None leaves the curves out.

    Returns:
      HTML with all that it needs inside.

    Raises:
      MoonwalkTypeError: `memory` or `timeline` is something else.
    """
    _check("memory", memory, MemoryReport)
    _check("timeline", timeline, Timeline)
    graph = to_networkx(plan)
    blocks, every = sheet(graph, expand=False), sheet(graph, expand=True)
    cards = {key_of(c): c for c in (*every_card(every), *blocks.cards)}
    of = {key: facts(graph, card) for key, card in cards.items()}
    drawn = [*picture.views(plan, blocks, every, of)]
    plot = charts.plot(timeline) if timeline is not None else None
    script = _asset("script.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    data: dict[str, Any] = {"cards": {key: one.panel() for key, one in of.items()}}
    if plot is not None:
        data["curves"] = [[c.method, c.points] for c in plot.curves]
    return _template().render(
        plan=plan,
        name=plan.name or "plan",
        views=drawn,
        groups={f"{group.cards[0]}*": group for group in blocks.groups},
        rows=[*rows(blocks, every, of)],
        unfolds=picture.unfolds(blocks, every),
        hidden=picture.too_many(every) and picture.unfolds(blocks, every),
        strip=[*_strip(plan.stages)],
        legend=[*_legend(plan.stages)],
        lines=_LINES,
        memory=memory,
        bars=charts.bars(memory) if memory is not None else (),
        plot=plot,
        data=data,
        dark=DARK,
        looks=LOOKS,
        style=_asset("style.css"),
        script=script,
        digest=digest,
        jax=jax.__version__,
        size=size,
        times=charts.times,
    )


# How wires are drawn: what they say, their colour, their width, their dashes.
_LINES = (
    ("a value kept between the passes", KEPT, 3, ""),
    ("a value made again, or not needed", RECOMPUTED, 1, "5 2"),
)


def _check(name: str, found: Any, kind: type) -> None:
    if found is not None and not isinstance(found, kind):
        raise MoonwalkTypeError(
            f"{name} is {type(found).__name__}",
            expected=f"a {kind.__name__}, what loss.{name}(...) gives, or None",
        )


def _strip(stages: tuple[StageRecord, ...]) -> Iterator[tuple[int, int, str]]:
    """The chain as runs of stages that are kept alike: (first, number, storage)."""
    first = 0
    for storage, run in itertools.groupby(stage.storage for stage in stages):
        count = len([*run])
        yield first, count, storage
        first += count


def _legend(stages: tuple[StageRecord, ...]) -> Iterator[tuple[str, int, int]]:
    """What the stages keep: (storage, number of stages, bytes)."""
    for storage in LOOKS:
        alike = [stage for stage in stages if stage.storage == storage]
        if alike:
            yield (
                storage,
                len(alike),
                sum(s.residual_bytes + s.state_bytes for s in alike),
            )


_LOADER = jinja2.PackageLoader("mwc.report")


@functools.cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=_LOADER,
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html")


def _asset(name: str) -> str:
    """The text of a file beside the template."""
    return _LOADER.get_source(jinja2.Environment(autoescape=True), name)[0]
