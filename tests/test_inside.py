"""Decorated functions in control flow, and what may be inside of one."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from mwc import moonwalk_compile
from tests.transforming import SECOND_ORDER, arrays, both, loss, same

pytestmark = pytest.mark.usefixtures("x64", "either_program", "quick")


def scanned(f, w, xs):
    def step(carry, x):
        return jnp.tanh(carry + 0.1 * w), f(carry, x[None])

    return lax.scan(step, w, xs)


CONTROL = {
    "scan": lambda f: lambda w, xs: jnp.sum(scanned(f, w, xs)[1]),
    "scan of carry": lambda f: (
        lambda w, xs: jnp.sum(
            lax.scan(lambda c, x: (c - 0.1 * jax.grad(f)(c, x[None]), None), w, xs)[0]
            ** 2
        )
    ),
    "fori": lambda f: (
        lambda w, xs: lax.fori_loop(0, 3, lambda i, c: c + f(w, xs + 0.1 * c), 0.0)
    ),
    "cond": lambda f: (
        lambda w, xs: lax.cond(
            jnp.sum(xs) > 1e6, lambda w: jnp.sum(w), lambda w: f(w, xs), w
        )
    ),
    "switch": lambda f: (
        lambda w, xs: lax.switch(1, [lambda w: jnp.sum(w), lambda w: f(w, xs)], w)
    ),
    "map": lambda f: lambda w, xs: jnp.sum(lax.map(lambda x: f(w, x[None]), xs)),
    "nested jit": lambda f: lambda w, xs: jax.jit(lambda w: jax.jit(f)(w, xs))(w),
    "checkpointed scan": lambda f: (
        lambda w, xs: jnp.sum(scanned(jax.checkpoint(f), w, xs)[1])
    ),
}


@pytest.mark.parametrize("name", sorted(CONTROL))
@pytest.mark.parametrize("order", ["grad", "hvp", "jvp"])
def test_control_flow(name, order):
    def make(f):
        g = CONTROL[name](f)
        if order == "grad":
            return jax.jit(jax.value_and_grad(g, argnums=(0, 1)))
        if order == "jvp":
            return jax.jit(lambda w, x: jax.jvp(g, (w, x), (w, x)))
        return jax.jit(lambda w, x: jax.jvp(jax.grad(g), (w, x), (w, x)))

    both(make, *arrays((2, 3), (4, 2)))


def test_while_in_forward_mode():
    def make(f):
        def run(w, x):
            grow = lambda c: (c[0] + 1, c[1] + f(w, x) * 0.1)  # noqa: E731
            return lax.while_loop(lambda c: c[0] < 3, grow, (0, jnp.array(0.0)))[1]

        return lambda w, x: jax.jvp(run, (w, x), (w, x))

    both(make, *arrays((2, 3), (4, 2)))


BODIES = {
    "scan inside": lambda w, x: jnp.sum(
        lax.scan(lambda c, r: (jnp.tanh(c + r), c * r), w[:, 0], x)[1]
    ),
    "cond inside": lambda w, x: lax.cond(
        jnp.sum(x) > 0, lambda a: jnp.sum(a @ w), lambda a: jnp.sum(jnp.sin(a @ w)), x
    ),
    "checkpoint inside": lambda w, x: jnp.sum(
        jax.checkpoint(lambda w: jnp.sin(jnp.sin(x @ w)))(w)
    ),
    "decorated inside": lambda w, x: moonwalk_compile(loss)(w, x) ** 2,
    "vmap inside": lambda w, x: jnp.sum(jax.vmap(lambda r: jnp.sin(r @ w))(x) ** 2),
    "gradient inside": lambda w, x: jnp.sum(jax.grad(loss)(w, x) ** 2),
}


@pytest.mark.parametrize("name", sorted(BODIES))
def test_what_may_be_inside(name):
    args = arrays((2, 3), (4, 2))
    both(lambda f: jax.grad(f, argnums=(0, 1)), *args, fun=BODIES[name])
    both(SECOND_ORDER["hvp forward over reverse"], *args, fun=BODIES[name])


def test_decorated_twice():
    both(
        lambda f: jax.grad(moonwalk_compile(moonwalk_compile(f))),
        *arrays((2, 3), (4, 2)),
    )


def test_recursion_through_static_depth():
    @partial(moonwalk_compile, static_argnums=2)
    def deep(w, x, n):
        return loss(w, x) if n == 0 else jnp.sin(deep(w, x, n - 1)) + jnp.sum(w)

    def plain(w, x, n):
        return loss(w, x) if n == 0 else jnp.sin(plain(w, x, n - 1)) + jnp.sum(w)

    w, x = arrays((2, 3), (4, 2))
    same(jax.grad(lambda w: deep(w, x, 2))(w), jax.grad(lambda w: plain(w, x, 2))(w))


def test_closed_over_tracers_are_differentiable():
    def make(wrap):
        def outer(w, x):
            scale = jnp.sum(w**2)
            return wrap(lambda v: jnp.sum(jnp.sin(v @ w) * scale))(x)

        return outer

    args = arrays((2, 3), (4, 2))
    mine, true = make(moonwalk_compile), make(lambda f: f)
    for change in (
        lambda f: f,
        lambda f: jax.grad(f, argnums=(0, 1)),
        lambda f: jax.jit(jax.grad(f)),
        jax.hessian,
        lambda f: jax.vmap(f, (None, 0)),
        lambda f: jax.grad(lambda w, x: jnp.sum(jax.vmap(f, (None, 0))(w, x))),
    ):
        same(change(mine)(*args), change(true)(*args))


def test_captured_arrays():
    table = np.arange(6.0).reshape(2, 3)
    bias = jnp.ones(3)
    both(
        jax.grad,
        *arrays((2, 3)),
        fun=lambda w: jnp.sum(jnp.sin(w * table + bias)),
    )


@pytest.mark.parametrize("shape", [(0, 3), (1, 3)])
def test_small_sizes(shape):
    w, x = arrays((3, 4), shape)
    both(lambda f: jax.value_and_grad(f, argnums=(0, 1)), w, x)
    both(lambda f: jax.vmap(jax.grad(f), (None, 0)), w, x[:, None])


def test_jaxprs_print_and_check():
    w, x = arrays((3, 4), (5, 3))
    f = moonwalk_compile(loss)
    assert "moonwalk_call" in str(jax.make_jaxpr(f)(w, x))
    text = str(jax.make_jaxpr(jax.grad(f))(w, x))
    assert "moonwalk_forward" in text
    assert "moonwalk_backward" in text
    assert "moonwalk_linear" not in text
    with jax.enable_checks(True):
        same(jax.grad(f)(w, x), jax.grad(loss)(w, x))
