"""`mwc target`: machines that memory can be measured for, and their compiler."""

from __future__ import annotations

import json

import click

from mwc.cli.options import json_option, traceback_option
from mwc.cli.running import choose_backend, progress
from mwc.errors import MoonwalkError


@click.group()
def target() -> None:
    """Machines that memory can be measured for.

    \b
    Example, for a GPU that is not there:
      mwc target install
      mwc memory net.py:loss --target h200
    """  # noqa: D301


@target.command()
@click.option("--no-check", is_flag=True, help="Do not compile a small program.")
@traceback_option
def install(no_check: bool) -> None:
    """Fetch the compiler for GPUs that are not there (about 180 MB, no CUDA).

    The two wheels go to a private folder, not into this environment; MWC_TARGET_DIR
    overrides where. Running it again does nothing.
    """
    choose_backend(needs_device=False)
    from mwc.memory import plugin, targets

    if plugin.in_environment():
        click.echo("this environment has JAX's CUDA plugin: nothing to install")
    else:
        fetch()
    if no_check:
        return
    with progress("compiling a small program", len(targets.ABSENT)) as step:
        for name in targets.ABSENT:
            step(name)
            plugin_works(name)
    click.echo("compiled a small program for " + ", ".join(targets.ABSENT))


@target.command("list")
@json_option
@traceback_option
def list_targets(as_json: bool) -> None:
    """List the targets and whether they can be compiled for here."""
    choose_backend(needs_device=True)
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
    import rich.box
    from rich.console import Console
    from rich.table import Table

    table = Table("target", "available", "how", box=rich.box.SIMPLE)
    for name, available, how in rows:
        table.add_row(name, "yes" if available else "no", how)
    Console().print(table)


@target.command()
@traceback_option
def remove() -> None:
    """Delete what `install` fetched for the installed jaxlib."""
    from mwc.memory import plugin

    removed = plugin.remove()
    click.echo(f"removed {plugin.folder()}" if removed else "nothing was installed")


def fetch() -> None:
    """Fetches the compiler and says where it is."""
    from mwc.memory import plugin

    with progress(f"fetching {' and '.join(plugin.WHEELS)} {plugin.version()}"):
        place = plugin.install()
    click.echo(f"installed in {place}")


def plugin_works(name: str) -> None:
    """Compiles a small program for a target; raises what goes wrong."""
    import jax
    import jax.numpy as jnp

    from mwc.memory import compiling, targets

    small = jax.ShapeDtypeStruct((8, 8), jnp.float32)
    place = targets.resolve(name)
    compiling.compile_for(place, lambda x: jnp.sin(x @ x), [small], fresh=True)
