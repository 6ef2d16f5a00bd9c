"""Steps: stages alike share code; what a stage has of its own it keeps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.test_moonwalk_edges import DEPTH, WIDTH, arguments, check, rotate

pytestmark = pytest.mark.usefixtures("x64", "quick")


@pytest.mark.parametrize("own", ["array", "number", "random", "roll"])
def test_stages_that_differ_by_what_is_in_the_code(own):
    """Layers that draw random numbers hang XLA where a call of them is not inlined."""
    arrays = np.random.default_rng(1).standard_normal((DEPTH, WIDTH))
    key = jax.random.key(0)

    def loss(weights, x):
        for i, w in enumerate(weights):
            x = rotate(jnp.abs(x), w)
            if own == "array":
                x = x + arrays[i]
            elif own == "number":
                x = jnp.where(x > 0, x, (0.9 + 0.01 * i) * x)
            elif own == "random":
                x = x + jax.random.normal(jax.random.fold_in(key, i), (WIDTH,))
            else:
                x = jnp.roll(x, i, axis=1)
        return jnp.mean(x**3)

    assert check(loss, *arguments()) >= DEPTH - 2
