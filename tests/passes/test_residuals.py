"""The narrowest residuals: bits for piecewise linear functions, nothing where free."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mwc._build import matrix_cost, residuals_of
from passes.graph import evaluate
from passes.inline import inline
from passes.linearise import linearise
from passes.residuals import narrowest, packed_bytes

ROWS, WIDTH = 6, 4


def maxmin(z):
    a, b = jnp.split(z, 2, axis=-1)
    return jnp.concatenate([jnp.maximum(a, b), jnp.minimum(a, b)], axis=-1)


ACTIVATIONS = {
    "relu": jax.nn.relu,
    "abs": jnp.abs,
    "leaky": lambda z: jax.nn.leaky_relu(z, 0.1),
    "where": lambda z: jnp.where(z > 0.5, z, 3 * z),
    "clip": lambda z: jnp.clip(z, -1, 1),
    "relu6": jax.nn.relu6,
    "max": lambda z: jnp.maximum(z, 0),
    "min": lambda z: jnp.minimum(z, 0.3),
    "maxmin": maxmin,
}


def stage(fun, *args, at_hand=True, of=(0,)):
    """The residuals kept for the cotangents of the inputs `of`, the state first."""
    graph = inline(jax.make_jaxpr(fun)(*args))
    active = tuple(jnp.issubdtype(x.dtype, np.inexact) for x in args)
    linear = linearise(graph, active)
    to = [linear.bwd.outvars[i] for i in of]
    wanted = residuals_of(linear, to)
    state = linear.fwd.invars[:1]
    kept = narrowest(linear.fwd, wanted, state, matrix_cost, at_hand=at_hand)
    return linear, kept, wanted


X, W = jnp.ones((ROWS, WIDTH)), jnp.ones((WIDTH, WIDTH)) * 0.3


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("rows", [1, ROWS])
def test_bits_behind_a_product(name, rows):
    act = ACTIVATIONS[name]
    _, kept, _ = stage(lambda x, w: act(x @ w), X[:rows], W)
    assert 1 <= len(kept) <= (8 if name == "maxmin" else 4)
    assert all(v.aval.dtype == bool for v in kept)
    assert all(np.prod(v.aval.shape) <= rows * WIDTH for v in kept)


@pytest.mark.parametrize("name", [*ACTIVATIONS, "tanh", "gelu"])
def test_nothing_where_the_product_comes_last(name):
    act = {**ACTIVATIONS, "tanh": jnp.tanh, "gelu": jax.nn.gelu}[name]
    _, kept, _ = stage(lambda x, w: act(x) @ w, X, W)
    assert kept == ()


@pytest.mark.parametrize("name", ["tanh", "gelu"])
def test_a_smooth_function_behind_a_product_needs_numbers(name):
    act = {"tanh": jnp.tanh, "gelu": jax.nn.gelu}[name]
    _, kept, _ = stage(lambda x, w: act(x @ w), X, W)
    assert [v.aval.dtype for v in kept] == [X.dtype]


def test_dropout_masks_are_drawn_again():
    def layer(x, w, key):
        keep = jax.random.bernoulli(key, 0.5, (ROWS, WIDTH))
        return jnp.where(keep, jax.nn.relu(x @ w) / 0.5, 0)

    linear, kept, _ = stage(layer, X, W, jax.random.key(0))
    assert [v.aval.dtype for v in kept] == [bool]
    made = {linear.fwd.eqns[linear.fwd.producer[v]].primitive.name for v in kept}
    assert made <= {"gt", "ge", "lt", "le", "eq", "ne"}


def test_prelu_needs_bits_and_its_slope():
    def layer(x, w, slope):
        z = x @ w
        return jnp.where(z > 0, z, slope * z)

    _, kept, _ = stage(layer, X, W, jnp.full(WIDTH, 0.2))
    assert [v.aval.dtype for v in kept] == [bool]


@pytest.mark.parametrize("at_hand", [True, False])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_residuals_follow_from_what_is_kept(name, at_hand):
    act = ACTIVATIONS[name]

    def fun(x, w):
        return act(jnp.sin(x) @ w) * 2

    draw = np.random.default_rng(0)
    x, w = jnp.asarray(draw.standard_normal((2, ROWS, WIDTH)), jnp.float32)
    w = w[:WIDTH]
    linear, kept, wanted = stage(fun, x, w, at_hand=at_hand, of=(0, 1))
    env = {**linear.consts, **dict(zip(linear.fwd.invars, (x, w), strict=True))}
    known = evaluate(linear.fwd, dict(env), [*wanted, *kept])
    some = {v: env[v] for v in linear.fwd.invars[(0 if at_hand else 1) :]}
    some |= linear.consts
    some.update(zip(kept, known[len(wanted) :], strict=True))
    names = []

    def before(i):
        names.append(linear.fwd.eqns[i].primitive.name)

    found = evaluate(linear.fwd, some, wanted, before=before)
    assert "dot_general" not in names
    for a, b in zip(found, known, strict=False):
        np.testing.assert_array_equal(a, b)


def test_a_stored_stage_keeps_no_more_than_jax():
    def block(x, w):
        p = jax.nn.softmax(x @ w, axis=-1)
        return p @ x

    x = jnp.ones((WIDTH, WIDTH))
    _, kept, wanted = stage(block, x, W, at_hand=False, of=(0, 1))
    assert sum(map(packed_bytes, kept)) <= sum(packed_bytes(v) for v in set(wanted))
    assert len([v for v in kept if v.aval.shape == (WIDTH, WIDTH)]) <= 2


def test_reductions_are_kept_not_run_again():
    def layer(x, w):
        z = x @ w
        return z / jnp.sum(z**2)

    x = jnp.ones((64, WIDTH))
    linear, kept, _ = stage(layer, x, W, at_hand=False, of=(0, 1))
    made = {
        linear.fwd.eqns[linear.fwd.producer[v]].primitive.name
        for v in kept
        if v in linear.fwd.producer
    }
    assert "reduce_sum" in made or any(v.aval.shape == () for v in kept)


def test_packed_bytes():
    graph = inline(
        jax.make_jaxpr(lambda *a: a)(
            *(jnp.ones((3, 5), bool), jnp.ones((0, 5), bool), jnp.ones(5))
        )
    )
    assert [packed_bytes(v) for v in graph.invars] == [2, 0, 20]


def test_max_pool_keeps_no_floats_of_its_input_size():
    def layer(x, w):
        z = (x @ w).reshape(ROWS // 2, 2, WIDTH)
        return jnp.max(z, axis=1)

    _, kept, _ = stage(layer, X, W)
    assert sum(map(packed_bytes, kept)) < X.size * 4
