"""What the tests of the decorator share."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

W = jnp.arange(6.0).reshape(2, 3) / 7


X = jnp.arange(8.0).reshape(4, 2) / 5


def loss(w, x):
    """Adds up sines."""
    return jnp.sum(jnp.sin(x @ w))


def same(mine, true, rtol=1e-5):
    assert jax.tree.structure(mine) == jax.tree.structure(true)
    for one, two in zip(jax.tree.leaves(mine), jax.tree.leaves(true), strict=True):
        np.testing.assert_allclose(one, two, rtol=rtol, atol=1e-6)
