"""How commands run and end: exit codes, errors as one line, progress, output.

Exit codes: 0 is fine, 1 a negative result (gradients differ), 2 bad input, 130 an
interruption. Bad input is whatever raises, our errors and those of the user's own code:
each is one line on standard error; `--traceback` or `MWC_TRACEBACK=1` shows the rest.

Standard output holds results alone. Progress goes to standard error, on a terminal
only; what the user's code prints while it is imported or traced goes there too.

What needs shapes alone runs on the CPU, so that a GPU in use elsewhere is left alone;
`JAX_PLATFORMS` overrides that. The commands that do use a GPU (`check`, and those that
compile for the attached one) do not reserve its memory.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import click

from mwc.errors import MoonwalkError

NEGATIVE, BAD_INPUT, INTERRUPTED = 1, 2, 130

TRACEBACK = "mwc.traceback"
_ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
_PARTS = tuple(os.path.join(_ROOT, name) + os.sep for name in ("mwc", "passes"))
_INSTALLED = tuple(sysconfig.get_path(n) for n in ("stdlib", "purelib", "platlib"))


class Group(click.Group):
    """Commands whose errors are one line and exit code 2."""

    def invoke(self, ctx: click.Context) -> Any:
        """Runs the command that was asked for."""
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, BrokenPipeError):
            raise  # click knows what to do
        except (KeyboardInterrupt, click.Abort):
            sys.exit(INTERRUPTED)
        except Exception as error:
            if ctx.meta.get(TRACEBACK):
                traceback.print_exc()
            click.echo(f"mwc: {line(error)}", err=True)
            sys.exit(BAD_INPUT)


def line(error: BaseException) -> str:
    """An error as one line: what was found, what was expected, what to do, where."""
    lines = [s.rstrip() for s in str(error).splitlines() if s.strip()]
    first = lines[0].strip() if lines else ""
    if isinstance(error, MoonwalkError):
        parts = ("  expected: ", "  remedy: ", "  at: ")
        return "; ".join([first, *(s.strip() for s in lines if s.startswith(parts))])
    at = place(error)
    said = f"{type(error).__name__}: {first}" if first else type(error).__name__
    return f"{said}; at: {at}" if at else said


def place(error: BaseException) -> str | None:
    """The innermost line of the user's own code, "net.py:12 (loss)"."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{os.path.basename(error.filename)}:{error.lineno}"
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not frame.filename.startswith(("<", *_PARTS, *_INSTALLED)):
            return f"{os.path.basename(frame.filename)}:{frame.lineno} ({frame.name})"
    return None


def fail(found: str) -> NoReturn:
    """Ends with a negative result, said on standard error."""
    click.echo(f"mwc: {found}", err=True)
    sys.exit(NEGATIVE)


@contextlib.contextmanager
def progress(text: str, steps: int = 1) -> Iterator[Callable[[str], None]]:
    """Shows what is being done, and for how long, while standard error is a terminal.

    Args:
      text: what is done, such as "compiling for h200".
      steps: how many steps it has.

    Yields:
      A function to call with the name of each step as it begins.
    """
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    shown = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    begun = 0

    # Standard output is for results.
    with (
        contextlib.redirect_stdout(sys.stderr),
        Progress(
            *shown, console=console, transient=True, disable=not console.is_terminal
        ) as bar,
    ):
        task = bar.add_task(text, total=None)

        def step(name: str) -> None:
            nonlocal begun
            begun += 1
            bar.update(task, description=f"{text}: {name} ({begun} of {steps})")

        yield step


def show(result: Any) -> None:
    """Prints a result: in the terminal's width where it fits, else as its text is."""
    from rich.console import Console

    console = Console()
    wide = console.options.update(max_width=10_000)
    if (
        console.is_terminal
        and hasattr(result, "__rich__")
        and console.measure(result, options=wide).minimum <= console.width
    ):
        console.print(result)
    else:
        click.echo(str(result))


def show_json(value: Any) -> None:
    """Prints plain data as JSON; numbers that are not finite are null there."""
    click.echo(json.dumps(_finite(value), allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def choose_backend(needs_device: bool) -> None:
    """Sets JAX's backend for this process, before JAX is imported.

    Args:
      needs_device: whether to use the one that JAX would choose.
    """
    if "jax" in sys.modules:
        return
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if not needs_device:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
