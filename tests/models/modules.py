"""Models of `flax.nnx` and of equinox, which hold their parameters, unchanged."""

from __future__ import annotations

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from tests.models.case import KEY, Case, normal


class Net(nnx.Module):
    def __init__(self, rngs):
        make = functools.partial(nnx.Linear, param_dtype=jnp.float64, rngs=rngs)
        self.layers = nnx.List([make(6, 6) for _ in range(6)])
        self.norm = nnx.BatchNorm(6, param_dtype=jnp.float64, rngs=rngs)
        for statistic in (self.norm.mean, self.norm.var):
            statistic.set_value(statistic.get_value().astype(jnp.float64))
        self.last = make(6, 2)

    def __call__(self, x):
        for layer in self.layers:
            x = x + nnx.gelu(layer(x))
        return self.last(self.norm(x))


def nnx_batch_norm():
    graph, params, stats = nnx.split(Net(nnx.Rngs(0)), nnx.Param, ...)

    def loss(params, x, stats):
        model = nnx.merge(graph, params, stats, copy=True)
        value = jnp.mean(model(x) ** 2)
        return value, nnx.state(model, nnx.BatchStat)

    return Case(loss, (params, normal(7, 6), stats), has_aux=True)


def eqx_mlp():
    """The module as it is: its activations are leaves that are functions."""
    model = eqx.nn.MLP(4, 2, 9, depth=7, activation=jax.nn.softplus, key=KEY)

    def loss(model, x, _):
        return jnp.mean(jax.vmap(model)(x) ** 2)

    return Case(loss, (model, normal(8, 4), None))


def eqx_cnn():
    keys = jax.random.split(KEY, 4)
    layers = [
        eqx.nn.Conv2d(2, 4, 3, padding=1, key=keys[0]),
        eqx.nn.Lambda(jax.nn.hard_tanh),
        eqx.nn.Conv2d(4, 5, 3, stride=2, key=keys[1]),
        eqx.nn.Lambda(jax.nn.leaky_relu),
        eqx.nn.MaxPool2d(2, 1),
        eqx.nn.Conv2d(5, 4, 2, key=keys[2]),
        eqx.nn.Lambda(jax.nn.relu6),
        eqx.nn.Lambda(jnp.ravel),
        eqx.nn.Dropout(0.25),
        eqx.nn.Linear(4, 3, key=keys[3]),
    ]

    def loss(model, x, keys):
        return jnp.mean(jax.vmap(lambda x, k: model(x, key=k))(x, keys) ** 2)

    keys = jax.random.split(jax.random.key(2), 5)
    return Case(loss, (eqx.nn.Sequential(layers), normal(5, 2, 8, 8), keys))


class UNet(eqx.Module):
    down: list
    up: list
    norms: list
    last: eqx.nn.Conv2d

    def __init__(self, key):
        k = jax.random.split(key, 7)
        conv = functools.partial(eqx.nn.Conv2d, kernel_size=3, padding=1)
        self.down = [conv(2, 4, key=k[0]), conv(4, 6, key=k[1]), conv(6, 8, key=k[2])]
        up = functools.partial(eqx.nn.ConvTranspose2d, kernel_size=2, stride=2)
        self.up = [up(8, 6, key=k[3]), up(12, 4, key=k[4])]
        self.norms = [eqx.nn.GroupNorm(2, n) for n in (4, 6, 8)]
        self.last = conv(8, 1, key=k[5])

    def __call__(self, x):
        skips = []
        for conv, norm in zip(self.down, self.norms, strict=True):
            x = jax.nn.silu(norm(conv(x)))
            skips.append(x)
            x = x.reshape(len(x), x.shape[1] // 2, 2, -1, 2).mean((2, 4))
        x = skips.pop()
        for conv in self.up:
            x = jnp.concatenate([conv(x), skips.pop()])
        return self.last(x)


def eqx_unet():
    def loss(model, x, _):
        return jnp.mean(jax.vmap(model)(x) ** 2)

    return Case(loss, (UNet(KEY), normal(2, 2, 8, 8), None))


def eqx_scan(cell):
    """A recurrent cell of equinox in `lax.scan`, backward in time."""
    model = cell(3, 5, key=KEY)

    def loss(model, x, init):
        def step(carry, x):
            carry = model(x, carry)
            return carry, jax.tree.leaves(carry)[0]

        last, all_of_them = lax.scan(step, init, x, reverse=True)
        return jnp.mean(all_of_them**2) + sum(map(jnp.sum, jax.tree.leaves(last)))

    state = normal(5, seed=2)
    init = (state, 2 * state) if cell is eqx.nn.LSTMCell else state
    return Case(loss, (model, normal(20, 3), init))
