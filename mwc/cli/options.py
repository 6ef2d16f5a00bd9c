"""Options that commands share, and what can be written for them."""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import click

from mwc.cli.running import TRACEBACK, choose_backend
from mwc.cli.subject import make


class Output(click.ParamType):
    """A file name to write to, refused before anything is computed."""

    name = "path"

    def __init__(self, *suffixes: str):
        self.suffixes = suffixes

    def convert(self, value: Any, param: Any, ctx: Any) -> pathlib.Path:
        """The path, if its folder is there and its suffix one of these."""
        path = pathlib.Path(value)
        if path.suffix.lower() not in self.suffixes:
            wanted = ", ".join(self.suffixes)
            self.fail(f"{value!r} does not end in one of {wanted}", param, ctx)
        if not path.parent.is_dir():
            self.fail(f"there is no folder {str(path.parent)!r}", param, ctx)
        return path


PICTURE = Output(".svg", ".png", ".pdf")


class Numbers(click.ParamType):
    """Whole numbers with commas between them."""

    name = "n,..."

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[int, ...]:
        """The numbers."""
        try:
            return tuple(map(int, str(value).split(",")))
        except ValueError:
            self.fail(f"{value!r} is not whole numbers, as in 0,2", param, ctx)


class Words(click.ParamType):
    """Words with commas between them."""

    name = "word,..."

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[str, ...]:
        """The words."""
        return tuple(part.strip() for part in str(value).split(","))


def traceback_option(command: Any) -> Any:
    """Adds `--traceback`."""

    def remember(ctx: click.Context, _param: Any, value: bool) -> None:
        ctx.meta[TRACEBACK] = ctx.meta.get(TRACEBACK) or value

    return click.option(
        "--traceback",
        is_flag=True,
        envvar="MWC_TRACEBACK",
        expose_value=False,
        callback=remember,
        help="Show where an error was raised.",
    )(command)


def json_option(command: Any) -> Any:
    """Adds `--json`."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON.")(command)


_OPTIONS = (
    click.argument("function", metavar="FILE_OR_MODULE:FUNCTION"),
    click.option(
        "--arg",
        "given",
        multiple=True,
        metavar="SHAPE",
        help="An argument, as 'f32[64,512]' or 'train=True'; once for each. "
        "`mwc --help` shows more.",
    ),
    click.option(
        "--inputs",
        metavar="FUNCTION",
        help="A function that returns the arguments, or (arguments, keyword "
        "arguments). Default: FUNCTION_inputs or inputs in the same module.",
    ),
    click.option(
        "--argnums", type=Numbers(), help="The arguments that are parameters [0]."
    ),
    click.option(
        "--has-aux/--no-has-aux",
        default=None,
        help="Whether the function returns (value, aux).",
    ),
    click.option("--static-argnums", type=Numbers(), help="As in jax.jit."),
    click.option("--static-argnames", type=Words(), help="As in jax.jit."),
    click.option(
        "--strategies",
        type=Words(),
        help="What plans may use, of moonwalk, checkpoint and stored.",
    ),
    click.option(
        "--tolerance", type=float, help="The error that rebuilding may add, relative."
    ),
    click.option(
        "--strict",
        is_flag=True,
        default=None,
        help="Refuse primitives without a rule.",
    ),
)

_DECORATOR = ("argnums", "has_aux", "static_argnums", "static_argnames")
_DECORATOR += ("strategies", "tolerance", "strict", "extra_forwards")

extra_forwards = click.option(
    "--extra-forwards",
    type=float,
    help="The most forward passes beyond backpropagation's [2].",
)


def on_subject(
    needs_device: Callable[[dict[str, Any]], bool],
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a command a `Subject`, and the options that make it.

    Args:
      needs_device: whether, with the command's own options, it needs the backend that
        JAX would choose.

    Returns:
      A decorator of commands; they also get `--json` and `--traceback`.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def run(
            function: str, given: Sequence[str], inputs: str | None, **others: Any
        ) -> None:
            asked = {name: others.pop(name, None) for name in _DECORATOR}
            choose_backend(needs_device(others))
            command(make(function, given, inputs, **asked), **others)

        for option in reversed((*_OPTIONS, json_option, traceback_option)):
            run = option(run)
        return run

    return decorate
