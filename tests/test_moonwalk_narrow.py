"""States, weights and products in bfloat16 or float16, rebuilt in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mwc import moonwalk_compile
from mwc.constraints import orthogonal
from tests.submersive import (
    FORCED,
    KINKS,
    chain,
    data,
    layer,
    layers,
    mean_square,
    over_layers,
    rows,
    weights,
)

pytestmark = pytest.mark.usefixtures("quick")


def assert_no_worse(loss, best, args):
    """Against `best` in float64: at most twice the error of backpropagation.

    Entries cannot be compared: JAX itself rounds differently in eager mode and in jit.
    """
    ours = moonwalk_compile(loss, strategies=FORCED)
    _, mine, drift = ours.value_and_grad(*args, with_drift=True)
    assert 0 < drift.worst < 0.5
    theirs = jax.jit(jax.grad(loss))(*args)
    wide = jax.tree.map(lambda x: np.asarray(x).astype(np.float64), args)
    with jax.enable_x64(True):
        true = jax.tree.map(np.asarray, jax.jit(jax.grad(best))(*wide))
    for one, other, exact in zip(
        *map(jax.tree.leaves, (mine, theirs, true)), strict=True
    ):
        assert one.dtype == other.dtype
        errors = [
            np.linalg.norm(np.asarray(x, np.float64) - exact) for x in (one, other)
        ]
        assert errors[0] <= 2 * errors[1] < np.linalg.norm(exact)
    return rows(ours.plan(*args))


@pytest.mark.parametrize("loop", [False, True])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_states(dtype, loop):
    """Cotangents are float32."""
    loss = (over_layers if loop else chain)("leaky 0.9")
    params = weights(16, 16) if loop else layers(16, 16)
    args = jax.tree.map(lambda x: jnp.asarray(x, dtype), (params, data(64, 16)))
    assert assert_no_worse(loss, loss, args) == (1 if loop else 15)


def test_weights_that_are_rounded_after_they_were_made():
    """Orthogonal by construction, but not in bfloat16."""

    def loss(params, batch):
        x, y = batch
        x = x.astype(jnp.bfloat16)
        for w, b in params:
            rounded = orthogonal(w).astype(jnp.bfloat16)
            x = KINKS["leaky 0.9"](x @ rounded + b.astype(jnp.bfloat16))
        return mean_square(x.astype(y.dtype), y)

    args = jax.tree.map(np.float32, (layers(12, 8), data(32, 8)))
    ours = moonwalk_compile(loss, strategies=FORCED)
    assert rows(ours.plan(*args)) >= 11
    _, _, drift = ours.value_and_grad(*args, with_drift=True)
    assert drift.worst < 1e-3
    assert_no_worse(loss, chain("leaky 0.9", "orthogonal"), args)


def test_narrow_products():
    """The state is float32, a product of bfloat16 in between."""

    def loss(params, batch):
        x, y = batch
        for w, b in params:
            h = layer(x.astype(jnp.bfloat16), w.astype(jnp.bfloat16))
            x = KINKS["leaky 0.9"](h.astype(jnp.float32) + b)
        return mean_square(x, y)

    args = jax.tree.map(np.float32, (layers(16, 16), data(64, 16)))
    assert assert_no_worse(loss, chain("leaky 0.9"), args) == 15


def test_narrow_states_that_tie():
    """Entries of bfloat16 tie often, and what ties is not rebuilt."""
    args = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), (layers(8), data()))
    plan = moonwalk_compile(chain("max-min"), strategies=FORCED).plan(*args)
    assert rows(plan) == 0


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("where", ["parameter", "state"])
def test_a_rule_that_rounds_its_cotangent(dtype, where):
    """What a custom_vjp rounds is rounded: it is the user's gradient."""

    @jax.custom_vjp
    def rounds(x):
        return x

    def bwd(_, ct):
        return (ct.astype(jnp.float8_e4m3fn).astype(ct.dtype),)

    rounds.defvjp(lambda x: (x, None), bwd)
    draw = np.random.default_rng(0)
    maps = [np.linalg.qr(draw.standard_normal((16, 16)))[0] for _ in range(6)]
    biases = draw.standard_normal((6, 16))

    def loss(params, x):
        for w, b in zip(*params, strict=True):
            h = layer(x, w)
            x = jnp.abs(rounds(h + b) if where == "state" else h + rounds(b))
        return jnp.sum(x.astype(jnp.float32) ** 2)

    params = [jnp.asarray(w, dtype) for w in maps], jnp.asarray(biases, dtype)
    x = jnp.asarray(draw.standard_normal((8, 16)), dtype)
    ours = moonwalk_compile(loss, strategies=FORCED)
    kinds = [row.strategy for row in ours.plan(params, x).stages]
    rebuilt = kinds.count("moonwalk")
    assert (rebuilt > 3) == (dtype == jnp.float32 and where == "parameter")
    found, true = (jax.jit(jax.grad(f))(params, x) for f in (ours, loss))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(true), strict=True):
        a, b = np.float64(a), np.float64(b)
        assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(b)
