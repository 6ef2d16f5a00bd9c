"""Weights made of smaller parameters: made where they are read, not kept."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mwc import moonwalk_compile

WIDTH, COUNT = 128, 16

MADE = {
    "low rank": (lambda a, b: a @ b.T, ((WIDTH, 4), (WIDTH, 4))),
    "low rank, mapped": (lambda a, b: jnp.tanh(a @ b.T), ((WIDTH, 4), (WIDTH, 4))),
    "kron": (jnp.kron, ((16, 16), (8, 8))),
    "broadcast": (lambda a, b: a[:, None] * jnp.eye(WIDTH) + b, ((WIDTH,), (WIDTH,))),
}


def program(make, shapes, dtype, count=COUNT):
    def loss(params, x):
        weights = [make(*p) for p in params]
        for w in (*weights, *weights):
            x = jax.nn.relu(x @ w)
        return jnp.mean(x**2)

    draw = np.random.default_rng(0)
    leaf = lambda s: jnp.asarray(draw.standard_normal(s) / 4, dtype)  # noqa: E731
    return loss, [tuple(map(leaf, shapes)) for _ in range(count)], leaf((WIDTH, WIDTH))


@pytest.mark.usefixtures("x64", "quick")
@pytest.mark.parametrize("extra", [0, 1, 2])
@pytest.mark.parametrize("name", MADE)
def test_gradients(name, extra):
    loss, params, x = program(*MADE[name], jnp.float64, count=3)
    found = jax.jit(jax.grad(moonwalk_compile(loss, extra_forwards=extra)))(params, x)
    true = jax.jit(jax.grad(loss))(params, x)
    for mine, other in zip(jax.tree.leaves(found), jax.tree.leaves(true), strict=True):
        scale = float(jnp.max(jnp.abs(other)))
        assert float(jnp.max(jnp.abs(mine - other))) <= 1e-12 * scale


@pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="the CPU of JAX 0.10 drops barriers"
)
@pytest.mark.parametrize("name", ["low rank", "kron"])
def test_made_weights_are_not_kept(name):
    loss, params, x = program(*MADE[name], jnp.float32)
    grad = jax.grad(moonwalk_compile(loss, extra_forwards=2))
    compiled = jax.jit(grad).lower(params, x).compile()
    # 16 weights, each read twice, would be 16 of them and as many cotangents.
    weights = compiled.memory_analysis().temp_size_in_bytes / x.nbytes
    assert weights < 24
