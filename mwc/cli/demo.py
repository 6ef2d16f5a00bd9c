"""`mwc demo`: the commands, one after another, on a small deep network.

The network is written to a folder, as a file of the user's would be, so that each
command shown can be repeated and changed. The compiler for absent GPUs is offered where
it is missing; nothing is asked where nobody can answer.
"""

from __future__ import annotations

import dataclasses
import importlib.resources
import pathlib
import sys
import tempfile
from typing import Any

import click

from mwc.cli.options import json_option, traceback_option
from mwc.cli.running import choose_backend, fail, progress, show, show_json
from mwc.cli.subject import Subject, make
from mwc.cli.target import fetch
from mwc.errors import MoonwalkTargetError

GPU = "h200"
METHODS = ("backprop", "checkpoint", "moonwalk")
NETWORK = "network.py"


@click.command()
@click.option(
    "--folder",
    type=click.Path(file_okay=False, path_type=pathlib.Path),
    help="Where the network and its picture go; by default a new temporary folder.",
)
@json_option
@traceback_option
def demo(folder: pathlib.Path | None, as_json: bool) -> None:
    """Plan, draw, check and measure a small deep network: a short tour.

    \b
    Examples:
      mwc demo
      mwc demo --folder tour
    """  # noqa: D301
    choose_backend(needs_device=False)
    if folder is None:
        folder = pathlib.Path(tempfile.mkdtemp(prefix="mwc-demo-"))
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / NETWORK
    file.write_text(_network())
    subject = make(f"{file}:loss")
    tour = _Tour(f"{file}:loss", as_json)
    found = {
        "network": str(file),
        "plan": tour.plan(subject),
        "drawing": tour.draw(subject, folder / "saved.svg"),
        "check": tour.check(subject),
        "memory": [tour.memory(subject, "cpu"), *tour.absent(subject)],
    }
    if as_json:
        show_json(found)
    tour.tell("\nNow name a function of your own; `mwc --help` says how.")
    if tour.wrong:
        fail("; ".join(tour.wrong))


def _network() -> str:
    return importlib.resources.files("mwc.cli").joinpath(NETWORK).read_text()


class _Tour:
    """The stops of the tour; each returns its result as plain data.

    Attributes:
      wrong: what came out otherwise than it should.
    """

    def __init__(self, function: str, quiet: bool):
        self.function = function
        self.quiet = quiet
        self.wrong: list[str] = []

    def tell(self, text: str) -> None:
        if not self.quiet:
            click.echo(text)

    def stop(self, words: str, command: str, options: str = "") -> None:
        self.tell(f"\n{words}\n\n$ mwc {command} {self.function}{options}\n")

    def show(self, result: Any) -> None:
        if not self.quiet:
            show(result)

    def plan(self, subject: Subject) -> dict[str, Any]:
        self.tell(f"A deep classifier in plain JAX is now in {self.function[:-5]}.")
        self.stop("What its backward pass keeps of each layer, and why:", "plan")
        plan = subject.plan()
        self.show(plan)
        return {"stages": len(plan.stages), "residual_bytes": plan.residual_bytes}

    def draw(self, subject: Subject, picture: pathlib.Path) -> str:
        self.stop("The same as a picture:", "draw", f" -o {picture} --compare")
        plan = subject.plan()
        with progress("drawing"):
            plan.draw(picture, compare=True)
        self.tell(f"drew {len(plan.stages)} stages to {picture}")
        return str(picture)

    def check(self, subject: Subject) -> dict[str, Any]:
        self.stop("Its gradients are those of backpropagation:", "check")
        report = subject.filled(seed=0).check()
        self.show(report)
        if not report.ok:
            self.wrong.append("the gradients differ from backpropagation's")
        return dataclasses.asdict(report)

    def memory(self, subject: Subject, target: str) -> dict[str, Any]:
        words = "".join(f" --method {name}" for name in METHODS)
        self.stop(
            f"What the compiled programs need (temp is what they allocate), {target}:",
            "memory",
            f" --target {target}{words}",
        )
        report = subject.memory(target, METHODS)
        self.show(report)
        plain, checkpoint, ours = (report[name].temp_bytes for name in METHODS)
        if None not in (plain, checkpoint) and checkpoint >= plain:
            self.tell(
                f"(This compiler for {target} undoes jax.checkpoint, as that of JAX "
                "0.10 for the CPU does.)"
            )
        if ours is None or (plain is not None and ours >= plain):
            self.wrong.append(f"the plan saves no memory for {target}")
        return report.to_dict()

    def absent(self, subject: Subject) -> list[dict[str, Any]]:
        """The same for a GPU that is not there, if its compiler is or is wanted."""
        from mwc.memory import plugin

        try:
            plugin.search_path()
        except MoonwalkTargetError:
            self.tell(f"\nThe same can be measured for an {GPU} that is not here.")
            asks = not self.quiet and sys.stdin.isatty() and sys.stdout.isatty()
            if not asks or not click.confirm("Fetch its compiler (about 180 MB)?"):
                self.tell(
                    f"Its compiler is fetched by `mwc target install`; then run\n"
                    f"`mwc memory {self.function} --target {GPU}`."
                )
                return []
            fetch()
        return [self.memory(subject, GPU)]
