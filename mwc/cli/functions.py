"""Commands about one function: plan, memory, timeline, pareto, draw, report, check."""

from __future__ import annotations

import dataclasses
import pathlib
import sys
from typing import Any

import click

from mwc.cli.options import PICTURE, Output, extra_forwards, on_subject
from mwc.cli.running import NEGATIVE, progress, show, show_json
from mwc.cli.subject import Subject, compiling

_target = click.option(
    "--target",
    help="cpu, gpu (the attached one), a100, h100, h200, b200, or the file of a "
    "GpuTargetConfigProto; by default what JAX uses here.",
)
_methods = click.option(
    "--method",
    "methods",
    multiple=True,
    help="A row to measure: backprop, checkpoint, checkpoint-2, moonwalk; may be "
    "repeated.",
)


def _plot(what: str) -> Any:
    return click.option(
        "--plot", type=PICTURE, help=f"Draw {what} to .svg, .png or .pdf."
    )


def _compiles_here(options: dict[str, Any]) -> bool:
    """Whether what is compiled for is the attached device."""
    return options["target"] in (None, "gpu")


@click.command()
@extra_forwards
@on_subject(needs_device=lambda _: False)
def plan(subject: Subject, as_json: bool) -> None:
    """Print what differentiating FUNCTION keeps, and why.

    \b
    Examples:
      mwc plan net.py:loss
      mwc plan net.py:loss --inputs small_inputs --extra-forwards 1
      mwc plan package.net:loss --arg '64*f32[512,512]' --arg 'f32[4096,512]'
    """  # noqa: D301
    found = subject.plan()
    if as_json:
        click.echo(found.to_json())
    else:
        show(found)


@click.command()
@_target
@_methods
@click.option(
    "--extra-forwards",
    "bounds",
    type=float,
    multiple=True,
    help="Add the row of a plan bound to so many extra forward passes; may be "
    "repeated.",
)
@_plot("the rows")
@on_subject(needs_device=_compiles_here)
def memory(
    subject: Subject,
    target: str | None,
    methods: tuple[str, ...],
    bounds: tuple[float, ...],
    plot: pathlib.Path | None,
    as_json: bool,
) -> None:
    """Compile FUNCTION's gradient and print what it needs, method by method.

    \b
    Examples:
      mwc memory net.py:loss
      mwc memory net.py:loss --target h200 --extra-forwards 1 --plot memory.svg
      mwc memory net.py:loss --method backprop --method moonwalk --json
    """  # noqa: D301
    report = subject.memory(target, methods, bounds)
    _finish(report, plot, as_json)


@click.command()
@_target
@_methods
@extra_forwards
@_plot("the bytes alive over the schedule")
@on_subject(needs_device=_compiles_here)
def timeline(
    subject: Subject,
    target: str | None,
    methods: tuple[str, ...],
    plot: pathlib.Path | None,
    as_json: bool,
) -> None:
    """Print what is alive at the peak of FUNCTION's compiled gradient.

    \b
    Example:
      mwc timeline net.py:loss --target h200 --plot timeline.svg
    """  # noqa: D301
    methods = methods or ("backprop", "checkpoint", "moonwalk")
    with progress(compiling(target), len(methods)) as step:
        found = subject.loss.timeline(
            *subject.args,
            target=target,
            methods=methods,
            progress=step,
            **subject.kwargs,
        )
    _finish(found, plot, as_json)


@click.command()
@click.option(
    "--target", help="Compile all of them for it; by default bytes are predicted."
)
@click.option(
    "--extra-forwards",
    "bounds",
    type=float,
    multiple=True,
    help="A bound to plan for; may be repeated.",
)
@_plot("the curve")
@on_subject(needs_device=lambda options: options["target"] == "gpu")
def pareto(
    subject: Subject,
    target: str | None,
    bounds: tuple[float, ...],
    plot: pathlib.Path | None,
    as_json: bool,
) -> None:
    """Print what memory extra time buys: plans from least time to least memory.

    \b
    Examples:
      mwc pareto net.py:loss --plot curve.svg
      mwc pareto net.py:loss --extra-forwards 0.5 --extra-forwards 1 --target h200
    """  # noqa: D301
    from mwc.memory.pareto import BOUNDS

    asked = bounds or BOUNDS
    with progress("planning", len(asked) + 3) as step:
        found = subject.loss.pareto(
            *subject.args,
            target=target,
            extra_forwards=asked,
            progress=step,
            **subject.kwargs,
        )
    _finish(found, plot, as_json)


@click.command()
@click.option(
    "-o",
    "--output",
    required=True,
    type=PICTURE,
    help="Where to: .svg, .png or .pdf says what.",
)
@click.option(
    "--direction",
    type=click.Choice(["LR", "TB"], case_sensitive=False),
    help="Left to right or top to bottom; by default what fits.",
)
@click.option("--expand", is_flag=True, help="Draw repeats and loops one by one.")
@click.option("--compare", is_flag=True, help="Draw backpropagation beside it.")
@extra_forwards
@on_subject(needs_device=lambda _: False)
def draw(
    subject: Subject,
    output: pathlib.Path,
    direction: str | None,
    expand: bool,
    compare: bool,
    as_json: bool,
) -> None:
    """Draw what differentiating FUNCTION keeps.

    \b
    Examples:
      mwc draw net.py:loss -o saved.svg
      mwc draw net.py:loss -o saved.png --compare --direction TB
    """  # noqa: D301
    found = subject.plan()
    with progress("drawing"):
        found.draw(output, direction=direction, expand=expand, compare=compare)
    size = output.stat().st_size
    if as_json:
        show_json({"path": str(output), "bytes": size, "stages": len(found.stages)})
    else:
        click.echo(f"drew {len(found.stages)} stages to {output} ({size:,} bytes)")


@click.command()
@click.option(
    "-o", "--output", required=True, type=Output(".html"), help="Where to: .html."
)
@_target
@_methods
@extra_forwards
@on_subject(needs_device=_compiles_here)
def report(
    subject: Subject,
    output: pathlib.Path,
    target: str | None,
    methods: tuple[str, ...],
    as_json: bool,
) -> None:
    """Write plan, drawing, memory and timeline of FUNCTION to one HTML file.

    \b
    Examples:
      mwc report net.py:loss -o report.html
      mwc report net.py:loss -o report.html --target h200
    """  # noqa: D301
    rows = len(methods) or 4
    with progress(compiling(target), 2 * rows - 1) as step:
        subject.loss.report(
            output,
            *subject.args,
            target=target,
            methods=methods or None,
            progress=step,
            **subject.kwargs,
        )
    size = output.stat().st_size
    if as_json:
        show_json({"path": str(output), "bytes": size})
    else:
        click.echo(f"wrote {output} ({size:,} bytes)")


@click.command()
@click.option(
    "--seed",
    default=0,
    show_default=True,
    help="Of the numbers that fill what has only a shape.",
)
@click.option(
    "--batch-axis",
    type=int,
    help="Compare on the first eighth of the data along this axis.",
)
@extra_forwards
@on_subject(needs_device=lambda _: True)
def check(subject: Subject, seed: int, batch_axis: int | None, as_json: bool) -> None:
    """Compare FUNCTION's gradients with backpropagation's; exit code 1 if they differ.

    \b
    Examples:
      mwc check net.py:loss
      mwc check net.py:loss --arg '8*f32[64,64]' --arg 'f32[32,64]' --seed 3
    """  # noqa: D301
    report = subject.filled(seed).check(batch_axis)
    if as_json:
        show_json(dataclasses.asdict(report))
    else:
        show(report)
    if not report.ok:
        sys.exit(NEGATIVE)


COMMANDS = (plan, memory, timeline, pareto, draw, report, check)


def _finish(result: Any, plot: pathlib.Path | None, as_json: bool) -> None:
    """Prints a report, and draws it if that was asked for."""
    if plot is not None:
        with progress("drawing"):
            result.plot(plot)
    if as_json:
        show_json(result.to_dict())
    else:
        show(result)
