"""Bools as bits: eight elements a byte, in one axis, by a few operations.

The axis is the last one that eight divides, so that nothing is padded; without one
the axis with the least padding. Other axes keep their shape, and with it their
sharding. Limits: at most seven elements of padding a row; symbolic dimensions are not
packed, and a bool that has no other stays as it is.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from passes.sizes import is_symbolic

Array = Any


def axis_of(shape: tuple[Any, ...]) -> int | None:
    """The axis that is packed, None where there is none."""
    sizes = {axis: n for axis, n in enumerate(shape) if not is_symbolic(n)}
    if not sizes or 0 in sizes.values():
        return None
    return min(
        sizes, key=lambda axis: (math.ceil(sizes[axis] / 8) / sizes[axis], -axis)
    )


def is_packed(x: Any) -> bool:
    """Whether a value (array or aval) is kept as bits."""
    return str(x.dtype) == "bool" and axis_of(x.shape) is not None


def pack(x: Array) -> Array:
    """A bool array as uint8 with its packed axis divided by eight; others as is."""
    if not is_packed(x):
        return x
    axis = axis_of(x.shape)
    assert axis is not None
    if short := -x.shape[axis] % 8:
        x = lax.pad(x, False, [(0, short * (n == axis), 0) for n in range(x.ndim)])
    split = (*x.shape[:axis], x.shape[axis] // 8, 8, *x.shape[axis + 1 :])
    shifted = jnp.left_shift(x.reshape(split).astype(np.uint8), _places(axis, x.ndim))
    # Not `jnp.packbits`, which adds up 32 bits: they are what a CPU would keep. A sum,
    # for the compiler has no "or" across devices.
    return shifted.sum(axis + 1, dtype=np.uint8)


def unpack(bits: Array, like: Any) -> Array:
    """The array that `pack` packed; `like` has its shape and dtype."""
    return _unpack(bits, like.shape) if is_packed(like) else bits


@functools.partial(jax.jit, static_argnames="shape")
def _unpack(bits: Array, shape: tuple[Any, ...]) -> Array:
    axis = axis_of(shape)
    assert axis is not None
    split = (*bits.shape[: axis + 1], 8, *bits.shape[axis + 1 :])
    others = [n for n in range(bits.ndim + 1) if n != axis + 1]
    spread = lax.broadcast_in_dim(bits, split, others)
    # An iota is one array that all stages read, whose readers XLA for GPUs compares
    # pair by pair: 256 layers compile in 37 s instead of 28. A table makes the CPU
    # eight times slower.
    masks = lax.platform_dependent(
        cpu=lambda: np.uint8(128) >> lax.broadcasted_iota(np.uint8, split, axis + 1),
        default=lambda: jnp.broadcast_to(1 << _places(axis, bits.ndim), split),
    )
    flat = lax.collapse((spread & masks) == masks, axis, axis + 2)
    return lax.slice_in_dim(flat, 0, shape[axis], axis=axis)


def _places(axis: int, ndim: int) -> np.ndarray:
    """How far each of eight elements is shifted, along the axis after `axis`."""
    places = np.arange(7, -1, -1, dtype=np.uint8)
    return places.reshape(*[1] * (axis + 1), 8, *[1] * (ndim - 1 - axis))
