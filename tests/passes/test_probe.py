"""What running a linear map on random values shows of it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from passes import probe as module
from passes.probe import probe
from tests.submersive import Case, max_min, normal

pytestmark = pytest.mark.usefixtures("x64", "quick")


def probed(fun, x, *params):
    """The probe of a whole stage, from its result to its state."""
    linear = Case(fun, x, *params).stage.linear
    return probe(linear, linear.bwd.eqns, linear.ct_inputs[0], linear.bwd.outvars[0])


def rotation(x, t):
    a, b = x[:, :2], x[:, 2:]
    c, s = jnp.cos(t), jnp.sin(t)
    return jnp.concatenate([c * a - s * b, s * a + c * b], -1)


# Function, parameters, scale, diagonal, zeros, steady.
SEEN = {
    "abs": (jnp.abs, (), 1, True, False, True),
    "max-min": (max_min, (), 1, False, False, True),
    "times three": (lambda x: 3 * x, (), 9, True, False, True),
    "divided": (lambda x: x / jnp.sqrt(2.0), (), 1 / 2, True, False, True),
    "mean of three": (lambda x: x[:, :3].mean(-1), (), 1 / 3, False, False, True),
    "leaky": (lambda x: jax.nn.leaky_relu(x, 0.5), (), None, True, False, True),
    "relu": (jax.nn.relu, (), None, True, True, True),
    "tanh": (jnp.tanh, (), None, True, False, False),
    "rotation": (rotation, (0.3,), 1, False, False, False),
    "cumsum": (lambda x: jnp.cumsum(x, -1), (), None, False, False, True),
}


@pytest.mark.parametrize("name", sorted(SEEN))
def test_what_is_seen(name):
    fun, params, scale, diagonal, zeros, steady = SEEN[name]
    seen = probed(fun, normal(3, 4), *params)
    assert seen.scale == scale
    assert (seen.diagonal, seen.steady) == (diagonal, steady)
    assert not diagonal or seen.zeros is zeros


def test_amplification_of_slopes():
    seen = probed(lambda x: jax.nn.leaky_relu(x, 0.5), normal(8, 64))
    np.testing.assert_allclose(seen.amplification, 1.25, rtol=1e-2)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (2, 1)])
def test_few_numbers_are_drawn_again(shape):
    """One number times any slope is an isometry of one number."""
    seen = probed(lambda x: jax.nn.leaky_relu(x, 0.5), normal(*shape))
    assert seen.scale is None
    np.testing.assert_allclose(seen.amplification, 1.25, rtol=0.1)
    assert probed(jax.nn.relu, normal(*shape)).zeros


def test_float32():
    x = normal(3, 8).astype(np.float32)
    assert probed(max_min, x).scale == 1
    assert probed(jnp.tanh, x).scale is None


def test_what_is_too_large_is_not_run(monkeypatch):
    monkeypatch.setattr(module, "_MOST_BYTES", 100)
    assert probed(max_min, normal(3, 40)) is None
    assert probed(jnp.abs, normal(3, 40)).scale == 1


def test_where_a_value_is_placed_says_nothing(monkeypatch):
    monkeypatch.setattr(module, "_MOST_BYTES", 100)
    mesh = jax.sharding.Mesh(jax.devices()[:1], ("data",))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    seen = probed(
        lambda x: jnp.abs(jax.lax.with_sharding_constraint(x, rows)), normal(3, 40)
    )
    assert seen.scale == 1


def test_under_a_trace():
    """A plan is made while JAX traces; the probe runs all the same."""

    @jax.jit
    def outer(x):
        assert probed(jnp.abs, np.ones((3, 4))).scale == 1
        return x

    outer(jnp.ones(2))


def test_numbers_of_nothing():
    assert probed(jnp.abs, normal(0, 3)).scale == 1


@pytest.mark.usefixtures("quick")
def test_what_overflows_does_not_hide_a_branch():
    """Products of large numbers in float16: all are NaN, and none is positive."""
    draw = np.random.default_rng(0)
    x, q = (jnp.asarray(draw.standard_normal(s), jnp.float16) for s in ((4, 8), (8, 8)))

    def stage(x, q):
        return jax.nn.leaky_relu(x + (q.sum(0) @ q) @ q, 0.5)

    seen = probed(stage, x, q)
    assert seen.scale is None
    assert seen.diagonal
    assert seen.steady
