"""From a Python call to a jaxpr: leaves, static values, captured arrays, errors.

`jax.jit(fun).trace` does the tracing, which gives pytrees, weak types, static
arguments and one jaxpr for repeated calls. Leaves that are not arrays (functions
and strings in an equinox module, `self` of a method) travel in the tree structure
as `Static` nodes, which compare by equality, so that jit's cache distinguishes them.

Limits: as under `jax.jit`, values that the function finds in globals or in a static
object are read when it is traced.
"""

from __future__ import annotations

import contextlib
import inspect
import numbers
import os
import traceback
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mwc.errors import MoonwalkError, MoonwalkTypeError, MoonwalkValueError
from passes import _jax, graph

# A Python bool is static: modules keep modes in them, and branch on them.
_ARRAYS = (jax.Array, np.ndarray, np.generic, int, float, complex)


class MoonwalkConcretizationError(
    MoonwalkTypeError, jax.errors.ConcretizationTypeError
):
    """Python needed the value of an array while the function was being traced."""

    def __init__(self, found: str, **parts: Any):
        # JAX's class wants a tracer, and would write the message itself.
        Exception.__init__(self, str(MoonwalkError(found, **parts)))
        self.source = parts.get("source")


class MoonwalkTracerError(MoonwalkError, jax.errors.UnexpectedTracerError):
    """A value of a finished transformation was used after it had ended."""

    def __init__(self, found: str, **parts: Any):
        Exception.__init__(self, str(MoonwalkError(found, **parts)))
        self.source = parts.get("source")


@jax.tree_util.register_pytree_node_class
class Static:
    """A leaf that is not an array, as part of the tree structure."""

    def __init__(self, value: Any):
        self.value = value

    def tree_flatten(self) -> tuple[tuple[()], Any]:
        """No children: the value is structure."""
        return (), _Equal(self.value)

    @classmethod
    def tree_unflatten(cls, aux: Any, _children: Any) -> Static:
        """Back from the structure."""
        return cls(aux.value)


class _Equal:
    """A value with its type, so that 1, 1.0 and True are three values."""

    def __init__(self, value: Any):
        self.value = value

    def __eq__(self, other: Any) -> bool:
        same = isinstance(other, _Equal) and type(self.value) is type(other.value)
        return same and bool(self.value == other.value)

    def __hash__(self) -> int:
        return hash((type(self.value), self.value))

    def __repr__(self) -> str:
        return repr(self.value)


def is_array(leaf: Any) -> bool:
    """Whether a leaf is traced; everything else is static."""
    known = isinstance(leaf, _ARRAYS) and not isinstance(leaf, bool)
    return known or hasattr(leaf, "dtype")


def is_differentiable(leaf: Any) -> bool:
    """Whether a leaf can have a gradient."""
    return is_array(leaf) and jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)


def is_number(leaf: Any) -> bool:
    """Whether a leaf is a Python number: traced, but static inside a module."""
    return isinstance(leaf, (int, float, complex)) and not isinstance(leaf, np.generic)


def _is_module(node: Any) -> bool:
    """Whether a node is an equinox module, whose numbers are hyperparameters."""
    return any(c.__module__.split(".")[0] == "equinox" for c in type(node).__mro__)


def wrap(tree: Any) -> Any:
    """Makes leaves that are not arrays part of the structure.

    Inside an equinox module so are Python numbers, as for `equinox.filter_jit`: the
    pooling layers keep the start of a reduction in one.
    """

    def inside(leaf: Any) -> Any:
        return leaf if is_array(leaf) and not is_number(leaf) else Static(leaf)

    def outside(part: Any) -> Any:
        if _is_module(part):
            return jax.tree.map(inside, part)
        return part if is_array(part) else Static(part)

    return jax.tree.map(outside, tree, is_leaf=_is_module)


def unwrap(tree: Any) -> Any:
    """Undoes `wrap`."""
    found = lambda x: isinstance(x, Static)  # noqa: E731
    return jax.tree.map(lambda x: x.value if found(x) else x, tree, is_leaf=found)


def without_static(tree: Any) -> Any:
    """None where `wrap` found something that is not an array: it has no gradient."""
    found = lambda x: isinstance(x, Static)  # noqa: E731
    return jax.tree.map(lambda x: None if found(x) else x, tree, is_leaf=found)


def has_static(tree: Any) -> bool:
    """Whether a tree structure holds values that are not arrays."""
    leaves = jax.tree.unflatten(tree, [0] * tree.num_leaves)
    found = lambda x: isinstance(x, Static)  # noqa: E731
    return any(map(found, jax.tree.leaves(leaves, is_leaf=found)))


@dataclass(frozen=True)
class Signature:
    """What is known of the user's function without calling it.

    Attributes:
      name: its name.
      source: where it is defined, "file.py:12 (function)".
      static_nums: positions of static arguments.
      static_names: names of static arguments.
      most: the most positional arguments it takes, None if any number.
    """

    name: str
    source: str | None
    static_nums: tuple[int, ...]
    static_names: tuple[str, ...]
    most: int | None

    def dynamic(
        self, args: Sequence[Any], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments that are traced."""
        nums = {n % len(args) for n in self.static_nums if -len(args) <= n < len(args)}
        kept = tuple(a for i, a in enumerate(args) if i not in nums)
        return kept, {k: v for k, v in kwargs.items() if k not in self.static_names}

    def check_static(self, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        """Static values are keys of the trace cache, and must be hashable."""
        named = [(f"argument {n}", args[n]) for n in self.static_nums if n < len(args)]
        named += [(k, kwargs[k]) for k in self.static_names if k in kwargs]
        for label, value in named:
            self.check_hashable(label, value)

    def check_hashable(self, label: str, value: Any) -> None:
        """Refuses a static value that cannot be a key."""
        try:
            hash(value)
        except TypeError:
            raise MoonwalkTypeError(
                f"{self.name} has an unhashable static value, {label}: "
                f"{type(value).__name__}",
                expected="values with __hash__ and __eq__",
                remedy="pass a tuple instead of a list, or make the value an array",
                source=self.source,
            ) from None


def signature_of(fun: Callable[..., Any], nums: Any = (), names: Any = ()) -> Signature:
    """Reads a function's signature, inferring static names from positions and back."""
    nums = _several("static_argnums", nums, numbers.Integral, "positions of arguments")
    names = _several("static_argnames", names, str, "names of arguments")
    most, positional = None, []
    try:
        parameters = list(inspect.signature(fun).parameters.values())
    except (TypeError, ValueError):
        parameters = None
    if parameters is not None:
        kinds = (
            inspect.Parameter.POSITIONAL_ONLY,
            inspect.Parameter.POSITIONAL_OR_KEYWORD,
        )
        positional = [p.name for p in parameters if p.kind in kinds]
        if all(p.kind is not inspect.Parameter.VAR_POSITIONAL for p in parameters):
            most = len(positional)
    by_num = {n: positional[n] for n in nums if -len(positional) <= n < len(positional)}
    all_names = dict.fromkeys((*names, *by_num.values()))
    found = [positional.index(n) for n in names if n in positional]
    all_nums = dict.fromkeys((*nums, *found))
    name = getattr(fun, "__name__", type(fun).__name__)
    return Signature(name, _definition(fun), tuple(all_nums), tuple(all_names), most)


def _several(option: str, given: Any, kind: type, what: str) -> tuple[Any, ...]:
    """One value or several, as a tuple."""
    if isinstance(given, kind):
        return (given,)
    found = tuple(given or ()) if isinstance(given or (), Collection) else (given,)
    if isinstance(given, str) or not all(isinstance(x, kind) for x in found):
        raise MoonwalkTypeError(f"{option} is {given!r}", expected=what)
    return found


def _definition(fun: Callable[..., Any]) -> str | None:
    code = getattr(inspect.unwrap(fun), "__code__", None)
    if code is None:
        return None
    return (
        f"{os.path.basename(code.co_filename)}:{code.co_firstlineno} ({code.co_name})"
    )


@contextlib.contextmanager
def explained(signature: Signature) -> Iterator[None]:
    """Turns JAX's errors about tracers into ours, which add place and remedy."""
    try:
        with unescaped(signature):
            yield
    except MoonwalkError:
        raise
    except jax.errors.ConcretizationTypeError as error:
        raise MoonwalkConcretizationError(
            f"{signature.name} needs the value of an array that is being traced:\n"
            f"{error}",
            remedy="use jax.lax.cond, jnp.where or jax.lax.while_loop, or name the "
            "argument in static_argnums or static_argnames",
            source=_user_frame(error) or signature.source,
        ) from error


@contextlib.contextmanager
def unescaped(signature: Signature) -> Iterator[None]:
    """The same for tracers of a transformation that has ended."""
    try:
        yield
    except MoonwalkError:
        raise
    except jax.errors.UnexpectedTracerError as error:
        raise MoonwalkTracerError(
            f"{signature.name} was given, or uses, a value of a transformation that "
            f"has ended:\n{error}",
            remedy="return values instead of storing them in globals or attributes",
            source=_user_frame(error) or signature.source,
        ) from error


_OURS, _PASSES, _JAX = (
    os.path.dirname(os.path.abspath(path)) + os.sep
    for path in (__file__, graph.__file__, jax.__file__)
)

# Tracebacks and source lines show the user's frames, not ours.
_jax.exclude_frames(_OURS)
_jax.exclude_frames(_PASSES)


def _user_frame(error: BaseException) -> str | None:
    """The innermost line of a traceback that is neither ours nor JAX's."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not os.path.abspath(frame.filename).startswith((_OURS, _PASSES, _JAX)):
            return f"{os.path.basename(frame.filename)}:{frame.lineno} ({frame.name})"
    return None


def positions(
    argnums: int | Sequence[int], args: Sequence[Any], signature: Signature, bound: int
) -> list[int]:
    """The positional arguments that `argnums` names; it counts after bound ones."""
    found = []
    nums = (argnums,) if isinstance(argnums, int) else argnums
    given = len(args) - bound
    for num in nums:
        index = num + given if num < 0 else num
        most = None if signature.most is None else signature.most - bound
        if index < 0 or (index >= given and (most is None or index >= most)):
            raise MoonwalkValueError(
                f"argnums={argnums!r} names an argument that {signature.name} has not: "
                f"it was called with {given} positional arguments",
                expected=f"numbers from 0 to {max(given - 1, 0)}",
                remedy="count positional arguments from 0, as in jax.grad",
                source=signature.source,
            )
        found.append(index + bound)
    if len(set(found)) < len(found):
        raise MoonwalkValueError(
            f"argnums={argnums!r} names an argument of {signature.name} twice",
            expected="each argument at most once",
            remedy="count negative numbers from the last positional argument",
            source=signature.source,
        )
    return found
