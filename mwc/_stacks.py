"""Buffers with one row a step, as loops carry them: read and written in place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from mwc import packing
from passes import _jax
from passes.graph import Var

Array = Any


def take(stack: Array, at: Array) -> Array:
    """The row of a step."""
    return lax.dynamic_index_in_dim(stack, at, 0, keepdims=False)


def put(stack: Array, row: Array, at: Array) -> Array:
    """The buffer with the row of a step replaced."""
    row = row if row.dtype == stack.dtype else row.astype(stack.dtype)
    return lax.dynamic_update_index_in_dim(stack, row, at, 0)


def write(rows: Sequence[Array], at: Array, _: Array, stacks: Any) -> list[Array]:
    """Several buffers with a row replaced: the body of a loop of one trip."""
    return [put(b, x, at) for b, x in zip(stacks, rows, strict=True)]


def repeat(row: Array, count: int) -> Array:
    """A buffer of equal rows, of any dtype, PRNG keys included."""
    return jnp.broadcast_to(row[None], (count, *row.shape))


def packed(v: Var) -> Any:
    """Shape and dtype of a value as it is kept, bools as bits."""
    aval = jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype)
    return jax.eval_shape(packing.pack, aval)


def zeros(count: int | None, aval: Any, like: Var) -> Array:
    """Zeros of a shape and dtype, with `count` rows unless it is None."""
    shape = aval.shape if count is None else (count, *aval.shape)
    return _jax.zeros(shape, aval.dtype, like.aval)
