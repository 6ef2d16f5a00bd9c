"""Scans whose steps are several stages: rebuilt in loop form, like those of one."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import mwc
from mwc import moonwalk_compile
from tests.submersive import FORCED, isometry, layer, max_min, numbers, rows

pytestmark = pytest.mark.usefixtures("quick")

STEPS, BATCH, TOKENS, WIDTH = 7, 5, 6, 8


@mwc.coisometric
def mix(h, w):
    return jnp.einsum("btd,tu->bud", h, w)


def turns(size):
    return np.stack([isometry(size, size) for _ in range(STEPS)])


def mixer(kink=jnp.abs, reverse=False):
    """Tokens, then features: the step that a mixer has."""

    def loss(params, batch):
        def step(x, p):
            w, v, b = p
            return kink(layer(kink(mix(x, w)), v) + b), None

        x, y = batch
        return jnp.mean((lax.scan(step, x, params, reverse=reverse)[0] - y) ** 2)

    params = turns(TOKENS), turns(WIDTH), numbers(1, STEPS, WIDTH)
    return loss, params, numbers(2, 2, BATCH, TOKENS, WIDTH)


def shared():
    """A weight of all steps, and weights of a step that two of its stages read."""

    def loss(params, batch):
        always, *each = params

        def step(x, p):
            w, b = p
            x = jnp.abs(layer(x, w) + b)
            x = jax.nn.leaky_relu(layer(x, always), 0.9)
            return jnp.abs(layer(x, w) - 2 * b), None

        x, y = batch
        return jnp.mean((lax.scan(step, x, tuple(each))[0] - y) ** 2)

    params = isometry(WIDTH, WIDTH), turns(WIDTH), numbers(1, STEPS, WIDTH)
    return loss, params, numbers(2, 2, 12, WIDTH)


PROGRAMS = {
    "abs": mixer,
    "max-min": functools.partial(mixer, max_min),
    "reverse": functools.partial(mixer, reverse=True),
    "shared": shared,
}


def worst(mine, true):
    """The largest error of a leaf over its largest entry."""
    pairs = zip(jax.tree.leaves(mine), jax.tree.leaves(true), strict=True)
    return max(float(np.max(np.abs(a - b)) / np.max(np.abs(b))) for a, b in pairs)


def the_loop(plan):
    (found,) = (stage for stage in plan.stages if stage.kind.startswith("scan"))
    return found


@pytest.mark.parametrize("name", PROGRAMS)
def test_gradients(name, x64):
    loss, *args = PROGRAMS[name]()
    ours = moonwalk_compile(loss, strategies=FORCED)
    both = functools.partial(jax.grad, argnums=(0, 1))
    assert worst(jax.jit(both(ours))(*args), jax.jit(both(loss))(*args)) <= 1e-9
    loop = the_loop(ours.plan(*args))
    assert loop.strategy == "moonwalk"
    (body,) = loop.bodies
    assert len(body.stages) > 1
    assert {row.strategy for row in body.stages} == {"moonwalk"}
    assert sum(row.bits for row in body.stages) * STEPS == loop.bits


def test_under_transformations(x64):
    loss, params, batch = mixer()
    ours = moonwalk_compile(loss, strategies=FORCED)
    assert rows(ours.plan(params, batch)) == 1
    many = np.stack([batch, batch[::-1], 2 * batch])
    batched = [jax.vmap(jax.grad(f), (None, 0))(params, many) for f in (ours, loss)]
    assert worst(*batched) <= 1e-9
    along = jax.tree.map(jnp.ones_like, params)
    second = [
        jax.jvp(lambda p, f=f: jax.grad(f)(p, batch), (params,), (along,))[1]
        for f in (ours, loss)
    ]
    assert worst(*second) <= 1e-9


@pytest.mark.parametrize("name", ["abs", "shared"])
@pytest.mark.parametrize(("size", "off"), [(0, False), (3e-3, False), (1.0, True)])
def test_weights_that_have_moved(name, size, off):
    loss, params, batch = PROGRAMS[name]()
    draw = np.random.default_rng(3)
    signs = [np.sign(draw.standard_normal(np.shape(p))) for p in params[:-1]]
    moved = [p + size * s for p, s in zip(params, signs, strict=False)]
    args = (*map(np.float32, moved), np.float32(params[-1])), np.float32(batch)
    ours = moonwalk_compile(loss, strategies=FORCED)
    _, grads, drift = ours.value_and_grad(*args, with_drift=True)
    assert bool(drift.tripped) is off
    if off:
        assert all(np.isnan(g).all() for g in jax.tree.leaves(grads))
    else:
        assert worst(grads, jax.grad(loss)(*args)) <= 1e-5


def test_one_weight_of_the_last_step_trips():
    """Whichever of the step's stages it is in."""
    loss, params, batch = mixer()
    for at in (0, 1):
        args = jax.tree.map(np.float32, (params, batch))
        args[0][at][-1, 0, 0] += 0.5
        ours = moonwalk_compile(loss, strategies=FORCED)
        assert ours.value_and_grad(*args, with_drift=True)[2].tripped


def skipping(x, w, v):
    y = jnp.abs(layer(x, w))
    return layer(y, v) + 0.1 * y


def prepared(x, w, v):
    scale = jnp.exp(jnp.mean(w))
    return layer(jnp.abs(layer(x, w) * scale), v) * scale


def curved(x, w, v):
    return jnp.tanh(layer(jnp.abs(layer(x, w)), v))


@pytest.mark.parametrize(
    ("step", "said"),
    [
        (skipping, "reads 1 states and makes 2"),
        (prepared, "what is made of parameters"),
        (curved, "slopes"),
    ],
)
def test_what_is_not_rebuilt_says_why(step, said, x64):
    """And has its gradients all the same."""

    def loss(params, batch):
        x, y = batch
        return jnp.mean(
            (lax.scan(lambda x, p: (step(x, *p), None), x, params)[0] - y) ** 2
        )

    args = (turns(WIDTH), turns(WIDTH)), numbers(2, 2, 12, WIDTH)
    ours = moonwalk_compile(loss)
    assert worst(jax.grad(ours)(*args), jax.grad(loss)(*args)) <= 1e-9
    loop = the_loop(ours.plan(*args))
    assert loop.strategy != "moonwalk"
    assert said in loop.reason


def test_steps_that_make_more_than_their_carry(x64):
    def loss(params, batch):
        def step(carry, p):
            x, n = carry
            x = jnp.abs(layer(jnp.abs(layer(x, p[0])), p[1]))
            return (x, n + 1), jnp.sum(x)

        (x, n), sums = lax.scan(step, (batch, 0), params)
        return jnp.mean(x**2) + n * jnp.mean(sums)

    args = (turns(WIDTH), turns(WIDTH)), numbers(2, 12, WIDTH)
    ours = moonwalk_compile(loss)
    assert worst(jax.grad(ours)(*args), jax.grad(loss)(*args)) <= 1e-9
    assert rows(ours.plan(*args)) == 0
