"""The guard's limit where a GPU rounds products of float32 to TF32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import mwc
from mwc import guard, moonwalk_compile
from tests.submersive import isometry

pytestmark = pytest.mark.usefixtures("quick")

FORCED = ("moonwalk", "stored")


def test_products_that_a_gpu_rounds_do_not_trip():
    """In TF32 rounding alone reads 4e-4 of each layer; the limit there knows it."""

    def limit():
        return guard.tolerance(jnp.float32, exact=False, asked=None)

    traced = jax.jit(limit).trace()
    found = {
        platform: traced.lower(lowering_platforms=(platform,)).as_text()
        for platform in ("cpu", "cuda")
    }
    assert "9.99999974E-6" in found["cpu"]
    assert "6.000000e-03" in found["cuda"].lower()

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
