"""What a command is about: a decorated function and the arguments of one call.

The function is the user's: one that is decorated keeps its options, except those on
the command line; a plain one is decorated with these.

Arguments are, in this order of preference: texts (`--arg`), what a function returns
(`--inputs`), what the function `<function>_inputs` or `inputs` of the same module does.
Shapes are enough, except to check gradients: there they are filled with random numbers.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import click

from mwc.cli.filling import filled
from mwc.cli.loading import Named, load
from mwc.cli.running import progress
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
