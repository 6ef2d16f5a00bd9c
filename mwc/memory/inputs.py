"""Arguments of any structure as a flat list of arrays, and back.

Leaves that are not traced (functions and numbers in an equinox module, strings) are
static: they stay inside the function. Arrays are taken by shape, dtype and, on a mesh,
sharding alone.
"""

from __future__ import annotations

import functools
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from mwc._trace import unwrap, wrap
from mwc.errors import MoonwalkTypeError


class FlatCall:
    """One call of a function, flattened.

    Args:
      args: positional arguments: arrays, `ShapeDtypeStruct`s, or static leaves.
      kwargs: keyword arguments.
      argnums: the positional arguments to differentiate in.
      has_aux: whether the function returns (loss, auxiliary results).
      static_argnums: positional arguments that stay inside the function.
      static_argnames: keyword arguments that do.

    Attributes:
      specs: the `ShapeDtypeStruct`s of the flat arrays.
      wanted: which of them are differentiated in.
    """

    def __init__(
        self,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        argnums: int | Sequence[int],
        has_aux: bool,
        static_argnums: Sequence[int] = (),
        static_argnames: Sequence[str] = (),
    ):
        positions = {argnums} if isinstance(argnums, int) else set(argnums)
        for n in positions:
            if not -len(args) <= n < len(args):
                raise MoonwalkTypeError(
                    f"argnums names argument {n}, and there are {len(args)}"
                )
        positions = {n % len(args) for n in positions}
        call = tuple(map(wrap, args)), {k: wrap(x) for k, x in kwargs.items()}
        paths, self._tree = jax.tree_util.tree_flatten_with_path(call)
        self._leaves = [leaf for _, leaf in paths]
        static = {n % len(args) for n in static_argnums if n < len(args)}
        names = set(static_argnames)
        self._dynamic = [
            i
            for i, (path, leaf) in enumerate(paths)
            if is_array(leaf) and not _within(path, static, names)
        ]
        self._has_aux = has_aux
        arrays = [self._leaves[i] for i in self._dynamic]
        shapes = jax.eval_shape(lambda xs: xs, arrays)
        self.specs: list[Any] = list(map(_placed, shapes, arrays))
        self.wanted = tuple(
            n
            for n, i in enumerate(self._dynamic)
            if _within(paths[i][0], positions, set())
        )

    def bind(self, fun: Callable[..., Any]) -> Callable[..., list[Any]]:
        """The function of the flat arrays: [loss, *auxiliary arrays]."""

        @functools.wraps(fun, updated=())
        def flat(*arrays: Any) -> list[Any]:
            leaves = list(self._leaves)
            for i, array in zip(self._dynamic, arrays, strict=True):
                leaves[i] = array
            args, kwargs = unwrap(jax.tree.unflatten(self._tree, leaves))
            out = fun(*args, **kwargs)
            loss, aux = out if self._has_aux else (out, None)
            if not is_array(loss):
                raise MoonwalkTypeError(
                    f"the function returned a loss of type {type(loss).__name__}",
                    expected="a scalar array",
                    remedy="for a function that returns (loss, aux) give has_aux=True",
                )
            return [loss, *filter(is_array, jax.tree.leaves(aux))]

        return flat

    def gradient(
        self, flat: Callable[..., list[Any]], value: bool
    ) -> Callable[..., list[Any]]:
        """The program that is measured: gradients, auxiliary results and the value."""

        def split(*arrays: Any) -> tuple[Any, list[Any]]:
            loss, *aux = flat(*arrays)
            return loss, aux

        differentiated = jax.value_and_grad(split, argnums=self.wanted, has_aux=True)

        def program(*arrays: Any) -> list[Any]:
            (loss, aux), grads = differentiated(*arrays)
            return [*([loss] if value else []), *aux, *grads]

        return program


def _placed(spec: Any, array: Any) -> Any:
    sharding = getattr(array, "sharding", None)
    if not isinstance(sharding, NamedSharding):
        sharding = None
    return jax.ShapeDtypeStruct(
        spec.shape, spec.dtype, weak_type=spec.weak_type, sharding=sharding
    )


def _within(path: tuple[Any, ...], positions: set[int], names: set[str]) -> bool:
    """Whether a path in (args, kwargs) is within one of some arguments."""
    part, place = path[0].idx, path[1]
    return place.idx in positions if part == 0 else place.key in names


def is_array(leaf: Any) -> bool:
    """Whether JAX would trace a leaf."""
    if isinstance(leaf, np.ndarray | np.generic):
        return leaf.dtype.kind not in "OSUmM"
    known = isinstance(leaf, jax.Array | jax.ShapeDtypeStruct | numbers.Number)
    return known and not isinstance(leaf, bool)
