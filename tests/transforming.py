"""What the tests of transformations share: functions, and how two results compare."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from mwc import moonwalk_compile

KEY = jax.random.key(0)


def arrays(*shapes):
    keys = jax.random.split(KEY, len(shapes))
    return [0.5 * jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True)]


def same(mine, true):
    assert jax.tree.structure(mine) == jax.tree.structure(true)
    for one, two in zip(jax.tree.leaves(mine), jax.tree.leaves(true), strict=True):
        assert (jnp.shape(one), jnp.result_type(one)) == (
            jnp.shape(two),
            jnp.result_type(two),
        )
        np.testing.assert_allclose(one, two, rtol=1e-9, atol=1e-12)


def loss(w, x):
    return jnp.sum(jnp.tanh(x @ w) ** 2) + jnp.sum(w**3)


def vector(w, x):
    return jnp.tanh(x @ w).sum(0), jnp.sum(w**2)


@jax.custom_vjp
def doubled(x):
    return jnp.sin(x)


doubled.defvjp(lambda x: (jnp.sin(x), x), lambda x, ct: (2.0 * jnp.cos(x) * ct,))


def with_custom(w, x):
    return jnp.sum(doubled(x @ w) ** 2)


@jax.custom_jvp
def tripled(x):
    return jnp.sin(x)


tripled.defjvp(lambda p, t: (jnp.sin(p[0]), 3.0 * jnp.cos(p[0]) * t[0]))


def with_jvp_rule(w, x):
    return jnp.sum(tripled(x @ w) ** 2)


def both(make, *args, fun=loss):
    same(make(moonwalk_compile(fun))(*args), make(fun)(*args))


SECOND_ORDER = {
    "hessian": jax.hessian,
    "jit of hessian": lambda f: jax.jit(jax.hessian(f)),
    "hvp forward over reverse": lambda f: (
        lambda w, x: jax.jvp(lambda w: jax.grad(f)(w, x), (w,), (jnp.sin(w),))
    ),
    "hvp reverse over reverse": lambda f: (
        lambda w, x: jax.grad(lambda w: jnp.sum(jax.grad(f)(w, x) * jnp.sin(w)))(w)
    ),
    "hvp reverse over forward": lambda f: (
        lambda w, x: jax.grad(
            lambda w: jax.jvp(lambda w: f(w, x), (w,), (jnp.sin(w),))[1]
        )(w)
    ),
    "gradient penalty": lambda f: jax.grad(
        lambda w, x: f(w, x) + jnp.sum(jax.grad(f, argnums=1)(w, x) ** 2)
    ),
    "value of value_and_grad": lambda f: jax.grad(
        lambda w, x: jax.value_and_grad(f)(w, x)[0]
    ),
    "grad of vmapped grad": lambda f: jax.grad(
        lambda w, x: jnp.sum(
            jax.vmap(jax.grad(f, argnums=1), (None, 0))(w, x[:, None]) ** 2
        )
    ),
    "cotangent alone": lambda f: (
        lambda w, x: jax.grad(lambda c: jnp.sum(jax.vjp(f, w, x)[1](c)[0] ** 2))(
            jnp.array(0.7)
        )
    ),
}
