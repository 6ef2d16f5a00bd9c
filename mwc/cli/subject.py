"""What a command is about: a decorated function and the arguments of one call.

The function is the user's: one that is decorated keeps its options, except those on
the command line; a plain one is decorated with these.

Arguments are, in this order of preference: texts (`--arg`), what a function returns
(`--inputs`), what the function `<function>_inputs` or `inputs` of the same module does.
Shapes are enough, except to check gradients: there they are filled with random numbers.

JAX's backend: what needs shapes alone runs on the CPU, so that a GPU in use elsewhere
is left alone; `JAX_PLATFORMS` overrides that. The commands that do use a GPU (`check`,
and `memory` and `timeline` for the attached one) do not reserve its memory.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import click

from mwc.cli.loading import Named, load
from mwc.cli.running import Numbers, Words, json_option, progress, traceback_option
from mwc.errors import MoonwalkValueError


@dataclasses.dataclass(frozen=True)
class Subject:
    """A decorated function and the arguments of one call.

    Attributes:
      loss: the decorated function.
      args: arrays, or `jax.ShapeDtypeStruct`s.
      kwargs: the same.
    """

    loss: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def filled(self, seed: int) -> Subject:
        """The same with random numbers for what has only a shape."""
        args, kwargs = filled((self.args, self.kwargs), seed)
        return dataclasses.replace(self, args=args, kwargs=kwargs)

    def plan(self) -> Any:
        """The plan, with progress."""
        with progress("planning"):
            return self.loss.plan(*self.args, **self.kwargs)

    def check(self, batch_axis: int | None = None) -> Any:
        """Compares gradients, with progress."""
        with progress("comparing gradients"):
            options = {"batch_axis": batch_axis, **self.kwargs}
            return self.loss.check(*self.args, **options)

    def memory(
        self,
        target: str | None,
        methods: Sequence[str] = (),
        bounds: Sequence[float] = (),
    ) -> Any:
        """Compiled memory, with progress; no methods are all of them."""
        from mwc.memory.subject import METHODS

        rows = len(methods) or len(METHODS) + len(bounds)
        with progress(compiling(target), rows) as step:
            return self.loss.memory(
                *self.args,
                target=target,
                extra_forwards=bounds,
                methods=methods or None,
                progress=step,
                **self.kwargs,
            )


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


def compiling(target: str | None) -> str:
    """What progress says while programs are compiled."""
    return f"compiling for {target}" if target else "compiling"


def make(
    function: str,
    given: Sequence[str] = (),
    inputs: str | None = None,
    **asked: Any,
) -> Subject:
    """Imports a function, decorates it, and makes its arguments.

    Args:
      function: as `loading.load` takes it.
      given: texts of arguments, as `shapes.read` takes them.
      inputs: a function that returns the arguments; None looks for one by name.
      **asked: options of `moonwalk_compile`; None is one that was not given.

    Returns:
      The subject.

    Raises:
      MoonwalkError: a name, a text or an option is wrong, or there are no arguments.
    """
    if given and inputs:
        raise click.UsageError("--arg and --inputs exclude each other")
    with progress("importing"):
        named = load(function)
        loss = _decorated(named.function, asked)
    if given:
        return Subject(loss, *_read(given))
    with progress("making the arguments"):
        return Subject(loss, *_made(named, inputs))


def _decorated(function: Callable[..., Any], asked: dict[str, Any]) -> Any:
    """Applies the options of the command line."""
    from mwc._compile import Compiled, moonwalk_compile

    chosen = {name: value for name, value in asked.items() if value is not None}
    if isinstance(function, Compiled):
        return function.with_options(**chosen) if chosen else function
    return moonwalk_compile(function, **chosen)


def _read(given: Sequence[str]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    from mwc.cli import shapes

    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    for text in given:
        name, value = shapes.read(text)
        if name is None:
            args.append(value)
        else:
            kwargs[name] = value
    return tuple(args), kwargs


def _made(named: Named, inputs: str | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments that a function of the user's returns."""
    own = named.name.rsplit(".", 1)[-1]
    defaults = [name for name in (f"{own}_inputs", "inputs") if named.has(name)]
    parameters = _parameters(named.function)
    if inputs is None and not defaults:
        if not parameters:
            return (), {}
        raise MoonwalkValueError(
            f"{own} takes {', '.join(parameters)} and was given no arguments",
            expected=f"a function {own}_inputs or inputs in {named.where} that returns "
            "them",
            remedy="name one with --inputs, or give shapes: --arg 'f32[64,512]' once "
            "for each",
        )
    maker = named.beside(inputs or defaults[0])
    found = maker.function()
    if type(found) is not tuple:
        return (found,), {}
    if len(found) == 2 and type(found[0]) is tuple and type(found[1]) is dict:
        args, kwargs = found
        # Else they are two arguments that happen to be a tuple and a dictionary.
        if kwargs.keys() <= set(parameters):
            return args, kwargs
    return found, {}


def _parameters(function: Callable[..., Any]) -> list[str]:
    try:
        return list(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return []


def filled(tree: Any, seed: int) -> Any:
    """Random numbers for each `jax.ShapeDtypeStruct` of a tree.

    Floats are normal, with a variance of one over the last dimension but one, so that
    products keep their size from layer to layer; integers are 0 or 1, fit for labels
    and indices.

    Args:
      tree: any tree; other leaves stay as they are.
      seed: of the random numbers.

    Returns:
      The tree with arrays.
    """
    import jax
    import numpy as np

    draw = np.random.default_rng(seed)

    def fill(leaf: Any) -> Any:
        if not isinstance(leaf, jax.ShapeDtypeStruct):
            return leaf
        return _random(draw, leaf.shape, leaf.dtype)

    return jax.tree.map(fill, tree)


def _random(draw: Any, shape: tuple[int, ...], dtype: Any) -> Any:
    import jax
    import jax.numpy as jnp

    if jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return jax.random.split(jax.random.key(int(draw.integers(2**31))), shape)
    if not jnp.issubdtype(dtype, jnp.inexact):
        return jnp.asarray(draw.integers(2, size=shape), dtype)
    value = draw.standard_normal(shape)
    if jnp.issubdtype(dtype, jnp.complexfloating):
        value = value + 1j * draw.standard_normal(shape)
    fan = shape[-2] if len(shape) > 1 else 1
    return jnp.asarray(value / max(fan, 1) ** 0.5, dtype)
