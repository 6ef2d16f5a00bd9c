"""The command line: `mwc`, also `python -m mwc`.

    mwc target install     fetch the compiler for GPUs that are not there
    mwc target list        the targets and whether they can be compiled for
    mwc target remove      delete what `install` fetched

Bad input is one line on standard error and exit code 2.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import click
import rich.box
import rich.console
import rich.table

from mwc.errors import MoonwalkError


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="mwc", prog_name="mwc")
def main() -> None:
    r"""The Moonwalk compiler: exact gradients of any JAX function in less memory.

    \b
    Examples:
      mwc target install
      mwc target list --json
    """


@main.group()
def target() -> None:
    r"""Machines that memory can be measured for.

    \b
    Example, for a GPU that is not there:
      mwc target install
      python -c 'import mwc; print(mwc.moonwalk_compile(f).memory(x, target="h200"))'
    """


@target.command()
@click.option("--no-check", is_flag=True, help="Do not compile a small program.")
def install(no_check: bool) -> None:
    """Fetch the compiler for GPUs that are not there (about 180 MB, no CUDA).

    The two wheels go to a private folder, not into this environment; MWC_TARGET_DIR
    overrides where. Running it again does nothing.
    """
    from mwc.memory import plugin, targets

    with _reported():
        if plugin.in_environment():
            click.echo("this environment has JAX's CUDA plugin: nothing to install")
        else:
            with _status(f"fetching {' and '.join(plugin.WHEELS)} {plugin.version()}"):
                place = plugin.install()
            click.echo(f"installed in {place}")
        if no_check:
            return
        for name in targets.ABSENT:
            with _status(f"compiling a small program for {name}"):
                plugin_works(name)
        click.echo("compiled a small program for " + ", ".join(targets.ABSENT))


@target.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_targets(as_json: bool) -> None:
    """List the targets and whether they can be compiled for here."""
    from mwc.memory import plugin, targets

    rows = []
    for name in targets.NAMES:
        try:
            found = targets.resolve(name)
            if found.config is not None:
                plugin.search_path()
            rows.append((name, True, "attached" if found.attached else "compiled for"))
        except MoonwalkError as error:
            rows.append((name, False, " ".join(str(error).split())))
    if as_json:
        keys = ("target", "available", "how")
        click.echo(json.dumps([dict(zip(keys, row, strict=True)) for row in rows]))
        return
    table = rich.table.Table("target", "available", "how", box=rich.box.SIMPLE)
    for name, available, how in rows:
        table.add_row(name, "yes" if available else "no", how)
    rich.console.Console().print(table)


@target.command()
def remove() -> None:
    """Delete what `install` fetched for the installed jaxlib."""
    from mwc.memory import plugin

    removed = plugin.remove()
    click.echo(f"removed {plugin.folder()}" if removed else "nothing was installed")


def plugin_works(name: str) -> None:
    """Compiles a small program for a target; raises what goes wrong."""
    import jax
    import jax.numpy as jnp

    from mwc.memory import compiling, targets

    small = jax.ShapeDtypeStruct((8, 8), jnp.float32)
    place = targets.resolve(name)
    compiling.compile_for(place, lambda x: jnp.sin(x @ x), [small], fresh=True)


@contextmanager
def _status(text: str) -> Iterator[None]:
    """A spinner on standard error, on a terminal alone."""
    with rich.console.Console(stderr=True).status(text):
        yield


@contextmanager
def _reported() -> Iterator[None]:
    """Turns an error of ours into one line and exit code 2."""
    try:
        yield
    except MoonwalkError as error:
        click.echo("mwc: " + " ".join(str(error).split()), err=True)
        sys.exit(2)


if __name__ == "__main__":
    main(prog_name="mwc")
