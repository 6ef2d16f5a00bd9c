"""The guard's limit where a GPU rounds products of float32 to TF32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import mwc
from mwc import moonwalk_compile
from tests.submersive import FORCED, isometry

pytestmark = pytest.mark.usefixtures("quick")


TF32 = "6.000000e-03"


def limited(loss, params, batch, platform):
    """The program of a gradient, with the limit of its guard."""
    grad = jax.jit(jax.grad(moonwalk_compile(loss, strategies=FORCED)))
    return grad.trace(params, batch).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize(
    ("precision", "platform", "rounds"),
    [
        (None, "cuda", True),
        (None, "cpu", False),
        (lax.Precision.HIGHEST, "cuda", False),
        (lax.DotAlgorithmPreset.F32_F32_F32, "cuda", False),
    ],
)
def test_the_limit_is_that_of_the_products(precision, platform, rounds):
    layer = mwc.coisometric(lambda h, w: jnp.dot(h, w, precision=precision))

    def loss(params, h):
        for w in params:
            h = jnp.abs(layer(h, w))
        return jnp.mean(h**2)

    params = [jnp.asarray(isometry(8, 8), jnp.float32) for _ in range(4)]
    text = limited(loss, params, jnp.ones((4, 8)), platform).lower()
    assert (TF32 in text) == rounds
    assert ("9.999999" in text or "1.000000e-05" in text) or rounds


def test_rounding_alone_does_not_trip():
    """In TF32 it reads 4e-4 of each layer."""

    def tf32(x):
        return lax.reduce_precision(x, exponent_bits=8, mantissa_bits=10)

    def loss(params, batch):
        h, y = batch
        for w in params:
            h = jnp.abs(mwc.coisometric(lambda h, w: tf32(h) @ tf32(w))(h, w))
        return jnp.mean((h - y) ** 2)

    draw = np.random.default_rng(0)
    params = [jnp.asarray(isometry(32, 32), jnp.float32) for _ in range(64)]
    batch = tuple(jnp.asarray(draw.standard_normal((2, 64, 32)), jnp.float32))
    ours = moonwalk_compile(loss, strategies=FORCED, tolerance=0.1)
    _, grads, drift = ours.value_and_grad(params, batch, with_drift=True)
    assert 6e-4 < 0.1 * drift.worst < 5e-3
    for ours_, plain in zip(grads, jax.grad(loss)(params, batch), strict=True):
        assert np.linalg.norm(ours_ - plain) < 6e-3 * np.linalg.norm(plain)
