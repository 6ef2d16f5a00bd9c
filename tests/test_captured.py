"""Arrays that a function captured: what they are decides what can be rebuilt."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from mwc import moonwalk_compile
from tests.submersive import FORCED, isometry
from tests.test_moonwalk_edges import DEPTH, WIDTH, arguments, check, rotate

pytestmark = pytest.mark.usefixtures("x64", "quick")

DRAW = np.random.default_rng(1)
ORDERS = [DRAW.permutation(WIDTH) for _ in range(DEPTH)]
SIGNS = [DRAW.choice([-1.0, 1.0], WIDTH) for _ in range(DEPTH)]
TURNS = [isometry(WIDTH, WIDTH) for _ in range(DEPTH)]
KEY = jax.random.key(0)

REBUILT = {
    "permutation": lambda x, i: x[:, ORDERS[i]],
    "the same one": lambda x, i: x[:, ORDERS[0]],
    "take": lambda x, i: jnp.take(x, jnp.asarray(ORDERS[i]), axis=1),
    "inverse": lambda x, i: x[:, np.argsort(ORDERS[i])],
    "scattered": lambda x, i: jnp.zeros_like(x).at[:, ORDERS[i]].set(x),
    "of a key": lambda x, i: x[:, jax.random.permutation(KEY, WIDTH)],
    "signs": lambda x, i: x * SIGNS[i],
    "mask": lambda x, i: jnp.where(SIGNS[i] > 0, x, -x),
    "slopes": lambda x, i: x * (1 + 0.3 * SIGNS[i]),
    "slopes of a kink": lambda x, i: jnp.where(x > 0, x, x * (1 + 0.3 * SIGNS[i])),
    "matrix": lambda x, i: x @ TURNS[i],
    "transposed matrix": lambda x, i: x @ TURNS[i].T,
    "scaled matrix": lambda x, i: x @ (1.5 * TURNS[i]),
}


WIDE = [DRAW.permutation(32) for _ in range(DEPTH)]


def deep(layer):
    """Each layer has something of its own between a kink and a rotation."""

    def loss(weights, x):
        for i, w in enumerate(weights):
            x = rotate(layer(jnp.abs(x), i), w)
        return jnp.mean(x**3)

    return loss


@pytest.mark.parametrize("kind", REBUILT)
def test_layers_with_captured_arrays(kind):
    assert check(deep(REBUILT[kind]), *arguments()) >= DEPTH - 2


LEFT = {
    "entries twice": lambda x, i: x[:, [0, 0, 1, 2, 3, 4]],
    "a zero slope": lambda x, i: x * np.array([1, 1, 1, 1, 1, 0.0]),
    "a free matrix": lambda x, i: x @ (TURNS[i] + 0.1),
    "a wild slope": lambda x, i: x * np.array([1, 1, 1, 1, 1, 1e-9]),
}


@pytest.mark.parametrize("kind", LEFT)
def test_layers_that_are_not_rebuilt(kind):
    assert check(deep(LEFT[kind]), *arguments()) == 0


def test_one_layer_of_many_is_not_a_permutation():
    """Layers alike but for their arrays are judged each by itself."""
    orders = [*ORDERS]
    orders[2] = np.zeros_like(orders[2])
    loss = deep(lambda x, i: x[:, orders[i]])
    assert check(loss, *arguments()) == 2
    ours = moonwalk_compile(loss, strategies=FORCED)
    rows = ours.plan(*arguments()).stages
    assert "never" in rows[2].reason


def test_an_array_that_is_an_argument_is_not_known():
    def loss(weights, x, order):
        for w in weights:
            x = rotate(jnp.abs(x)[:, order], w)
        return jnp.mean(x**3)

    order = jnp.asarray(ORDERS[0])
    assert check(loss, *arguments(), order) == 0
    ours = moonwalk_compile(loss, strategies=FORCED)
    # Nor where the caller's jit has it: the same trace serves every order.
    weights, x = arguments()

    @jax.jit
    def both(order):
        inner = moonwalk_compile(lambda w, x: loss(w, x, order), strategies=FORCED)
        return jax.grad(inner)(weights, x), jax.grad(ours)(weights, x, order)

    for other in ORDERS:
        true = jax.grad(loss)(weights, x, jnp.asarray(other))
        for mine in both(jnp.asarray(other)):
            for a, b in zip(mine, true, strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)


def test_steps_of_a_loop():
    """What the loop captured is the same at every step."""
    width, depth = 32, 16
    order, signs = DRAW.permutation(width), DRAW.choice([-1.0, 1.0], width)
    turn = isometry(width, width)

    def loss(weights, x):
        def step(x, w):
            return rotate((jnp.abs(x)[:, order] * signs) @ turn, w), None

        return jnp.mean(lax.scan(step, x, weights)[0] ** 3)

    weights = jnp.stack([jnp.asarray(isometry(width, width)) for _ in range(depth)])
    x = jnp.asarray(DRAW.standard_normal((64, width)))
    assert check(loss, weights, x, extra_forwards=3) == 1


def test_batched_and_twice_differentiated():
    loss = deep(REBUILT["permutation"])
    weights, x = arguments()
    ours = moonwalk_compile(loss, strategies=FORCED)
    xs = jnp.stack([x, 2 * x, -x])
    mine = jax.vmap(jax.grad(ours), (None, 0))(weights, xs)
    true = jax.vmap(jax.grad(loss), (None, 0))(weights, xs)
    for a, b in zip(mine, true, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)

    def slope(fun):
        return jax.grad(lambda x: jnp.sum(jax.grad(fun)(weights, x)[0] ** 2))(x)

    np.testing.assert_allclose(slope(ours), slope(loss), rtol=1e-9, atol=1e-12)


def test_narrow_numbers():
    loss = deep(lambda x, i: x[:, WIDE[i]])
    weights, x = jax.tree.map(lambda t: t.astype(jnp.bfloat16), arguments(width=32))
    ours = moonwalk_compile(loss, strategies=FORCED)
    rows = ours.plan(weights, x).stages
    assert sum(row.strategy == "moonwalk" for row in rows) >= DEPTH - 2
    mine = jax.jit(jax.grad(ours))(weights, x)
    true = jax.grad(loss)(*jax.tree.map(lambda t: t.astype(jnp.float64), (weights, x)))
    theirs = jax.jit(jax.grad(loss))(weights, x)
    for a, b, c in zip(mine, true, theirs, strict=True):
        off, plain = (np.linalg.norm(np.float64(g) - b) for g in (a, c))
        assert off <= 2 * plain + 1e-3 * np.linalg.norm(b)


def test_stages_alike_share_their_code():
    """What tells them apart is an input, so that a layer more is a call more."""
    weights, x = arguments(16)
    signs = DRAW.choice([-1.0, 1.0], (16, WIDTH))

    def lines(depth):
        loss = deep(lambda x, i: x * signs[i])
        ours = jax.jit(jax.grad(moonwalk_compile(loss, strategies=FORCED)))
        return ours.lower(weights[:depth], x).as_text().count("\n")

    assert lines(16) - lines(12) < 4 * 20


def test_slopes_that_are_not_finite():
    """They are looked at without a warning, and not rebuilt."""
    slopes = np.array([1.0, np.inf, 1, 1, np.nan, 1])
    loss = deep(lambda x, i: x * slopes)
    ours = moonwalk_compile(loss, strategies=FORCED)
    assert not any(r.strategy == "moonwalk" for r in ours.plan(*arguments()).stages)


def test_strict_settings():
    args = arguments()
    loss = deep(lambda x, i: x * SIGNS[i][None])
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        mine = jax.jit(jax.grad(moonwalk_compile(loss, strategies=FORCED)))(*args)
    for a, b in zip(mine, jax.grad(loss)(*args), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)


def test_a_matrix_of_less_precision():
    """What is orthonormal in float32 is not so in float64: it is no longer known."""
    turn = isometry(WIDTH, WIDTH).astype(np.float32)
    assert (
        check(deep(lambda x, i: x @ jnp.asarray(turn).astype(x.dtype)), *arguments())
        == 0
    )
    assert check(deep(lambda x, i: x @ turn), *arguments()) == 0
