"""Random numbers in place of shapes, for what has to run."""

from __future__ import annotations

from typing import Any


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
