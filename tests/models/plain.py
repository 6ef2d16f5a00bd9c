"""Models in plain JAX: mixed precision, maps of weights, branches, rules, gates."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from tests.models.case import Case, normal


def stack(depth, width):
    return [normal(width, width, seed=i) / width**0.5 for i in range(depth)]


def mixed_precision():
    """Float32 masters, bfloat16 inside: the two may round in different fusions."""

    def loss(params, x, _):
        h = x.astype(jnp.bfloat16)
        for w in params:
            h = jax.nn.relu(h @ w.astype(jnp.bfloat16))
        return jnp.mean(h.astype(jnp.float32) ** 2)

    params = [w.astype(jnp.float32) for w in stack(8, 8)]
    return Case(loss, (params, normal(16, 8).astype(jnp.float32), None), rtol=2e-2)


def weight_maps():
    """Cayley maps and triangular masks: computed from parameters alone."""

    def orthogonal(raw):
        skew, eye = raw - raw.T, jnp.eye(raw.shape[0])
        return jnp.linalg.solve(eye + skew, eye - skew)

    def loss(params, x, _):
        for i, raw in enumerate(params):
            unit = jnp.triu(raw, 1) + jnp.eye(raw.shape[0])
            x = jnp.abs(x @ (unit if i % 2 else orthogonal(raw)))
        return jnp.mean(x**3)

    return Case(loss, (stack(8, 6), normal(24, 6), None))


def nested_jit():
    @jax.jit
    def layer(x, w):
        return jax.jit(jax.nn.elu)(x @ w)

    @jax.jit
    def half(params, x):
        return functools.reduce(layer, params, x)

    def loss(params, x, _):
        return jnp.sum(half(params[4:], half(params[:4], x)) ** 2)

    return Case(loss, (stack(8, 6), normal(9, 6), None))


def with_cond():
    def loss(params, x, switch):
        for i, w in enumerate(params):
            heavy, light = lambda h, w: jnp.tanh(h @ w), lambda h, w: h * w[0]
            x = lax.cond(switch[i], heavy, light, x, w)
            x = lax.switch(i % 2 + switch[0], [jnp.sin, jnp.cos, jnp.abs], x)
        return jnp.mean(x**2)

    args = stack(6, 6), normal(9, 6), jnp.array([True, False, True] * 2)
    return Case(loss, args)


def with_custom_vjp():
    """A straight-through estimator, and a gradient that is clipped on its way."""

    @jax.custom_vjp
    def rounded(x):
        return jnp.round(x)

    rounded.defvjp(lambda x: (jnp.round(x), None), lambda _, ct: (ct,))

    @jax.custom_vjp
    def clipped(x, limit):
        return x

    clipped.defvjp(
        lambda x, limit: (x, limit),
        lambda limit, ct: (jnp.clip(ct, -limit, limit), jnp.zeros_like(limit)),
    )

    def loss(params, x, limit):
        for w in params:
            x = clipped(jnp.tanh(x @ w) + rounded(2 * x) / 4, limit)
        return jnp.sum(x**2)

    return Case(loss, (stack(8, 6), normal(9, 6), jnp.asarray(0.3)))


def gated_residual():
    """Couplings, a skip over everything, stop_gradient, an unused output."""

    def loss(params, x, _):
        a, b = jnp.split(x, 2, axis=-1)
        for w, v in zip(params[::2], params[1::2], strict=True):
            a = a + jax.nn.relu(b @ w)
            b = b * jax.nn.sigmoid(lax.stop_gradient(a) @ v) + a
        h = jnp.concatenate([a, b], -1) + x
        return jnp.mean(h * jnp.sort(h)), jnp.argmax(h, -1)

    return Case(loss, (stack(8, 4), normal(9, 8), None), has_aux=True)
