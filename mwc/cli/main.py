"""`mwc`: the list of commands, and the help that shows how they are used."""

from __future__ import annotations

import importlib.metadata
from typing import Any

import click

from mwc.cli import functions
from mwc.cli.demo import demo
from mwc.cli.options import traceback_option
from mwc.cli.running import Group
from mwc.cli.target import target


def _version(ctx: click.Context, _param: Any, asked: bool) -> None:
    if not asked or ctx.resilient_parsing:
        return
    try:
        found = importlib.metadata.version("mwc")
    except importlib.metadata.PackageNotFoundError:
        found = "(not installed)"
    click.echo(f"mwc {found}")
    ctx.exit()


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_version,
    help="Print the version.",
)
@traceback_option
def main() -> None:
    """The Moonwalk compiler: exact gradients of any JAX function in less memory.

    \b
    Examples:
      mwc demo
      mwc plan net.py:loss
      mwc memory net.py:loss --target h200 --plot memory.svg
      mwc draw net.py:loss -o saved.svg
      mwc check package.net:Model.loss --inputs small_inputs
      mwc target install

    A function is named by its file or module; it may be decorated with
    moonwalk_compile, and then keeps its options. Its arguments come from the function
    that --inputs names, else from FUNCTION_inputs or inputs beside it: no parameters,
    returns a tuple of arguments, or (tuple of arguments, dictionary of keyword
    arguments). They may be jax.ShapeDtypeStructs.

    \b
    Or they are written as shapes, each with --arg:
      f32[64,512]   bf16[8]   i32[]   bool[16]     an array, by dtype and shape
      key   key[8]                                 PRNG keys
      64*f32[512,512]                              a list of 64
      [f32[8,512], 62*f32[512,512], f32[512,2]]    a list of 64, in another way
      {"w": f32[512,512], "b": f32[512]}           a dictionary; (..., ...) a tuple
      0.5   3   "relu"   True   None               numbers and static values
      train=True                                   a keyword argument

    \b
    What needs shapes alone runs on the CPU; JAX_PLATFORMS overrides that.
    Exit codes: 0 fine, 1 a negative result (gradients differ), 2 bad input.
    """  # noqa: D301


for _command in (*functions.COMMANDS, demo, target):
    main.add_command(_command)
