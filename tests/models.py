"""Small models of public libraries, for the tests that decorate them unchanged.

Each builder returns a `Case`: `loss(model, x, rest)` with its arguments. Build them in
float64 mode.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

KEY = jax.random.key(7)


@dataclasses.dataclass
class Case:
    """A loss with its arguments.

    Attributes:
      loss: of (model, x, rest).
      args: those three.
      has_aux: whether it returns (value, aux).
      rtol: of the largest entry of each leaf.
    """

    loss: Callable[..., Any]
    args: tuple[Any, Any, Any]
    has_aux: bool = False
    rtol: float = 1e-9


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape))


def doubles(tree):
    """Flax makes float32 parameters whatever the mode."""

    def wide(x):
        return x.astype(jnp.float64) if x.dtype == jnp.float32 else x

    return jax.tree.map(wide, tree)


# flax.linen ---------------------------------------------------------------------


class Mlp(nn.Module):
    @nn.compact
    def __call__(self, x):
        for width in (9, 11, 8, 10, 9, 7):
            x = nn.Dropout(0.3, deterministic=False)(nn.relu(nn.Dense(width)(x)))
        return nn.Dense(3)(x)


def linen_mlp_dropout():
    model, x = Mlp(), normal(12, 5)
    params = doubles(jax.jit(model.init)({"params": KEY, "dropout": KEY}, x))

    def loss(params, x, rest):
        labels, key = rest
        logits = model.apply(params, x, rngs={"dropout": key})
        chosen = jnp.take_along_axis(nn.log_softmax(logits), labels[:, None], -1)
        return -jnp.mean(chosen)

    return Case(loss, (params, x, (jnp.arange(12) % 3, jax.random.key(3))))


class Cnn(nn.Module):
    @nn.compact
    def __call__(self, x):
        for i, width in enumerate((4, 6, 6, 5)):
            x = nn.Conv(width, (3, 3), padding="SAME")(x)
            x = nn.relu(nn.BatchNorm(use_running_average=False)(x))
            if i % 2:
                x = nn.max_pool(x, (2, 2), strides=(2, 2))
        return nn.Dense(3)(x.mean((1, 2)))


def linen_cnn_batch_norm():
    model, x = Cnn(), normal(5, 8, 8, 2)
    variables = doubles(jax.jit(model.init)(KEY, x))

    def loss(params, x, stats):
        both = {"params": params, "batch_stats": stats}
        logits, updated = model.apply(both, x, mutable=["batch_stats"])
        return jnp.mean(logits**2), (updated, logits)

    args = variables["params"], x, variables["batch_stats"]
    return Case(loss, args, has_aux=True)


class Recurrent(nn.Module):
    cell: Any

    @nn.compact
    def __call__(self, x):
        for width in (6, 5):
            x = nn.RNN(self.cell(width))(x)
        return x


def linen_rnn(cell):
    model, x = (
        Recurrent(functools.partial(cell, param_dtype=jnp.float64)),
        normal(3, 20, 4),
    )
    params = doubles(jax.jit(model.init)(KEY, x))
    return Case(lambda p, x, _: jnp.mean(model.apply(p, x) ** 2), (params, x, None))


class Block(nn.Module):
    rate: float = 0.2

    @nn.compact
    def __call__(self, x):
        width = x.shape[-1]
        mask = nn.make_causal_mask(x[..., 0])
        attention = nn.MultiHeadDotProductAttention(
            2, dropout_rate=self.rate, deterministic=False
        )
        x = x + attention(nn.LayerNorm()(x), mask=mask)
        h = nn.Dense(width)(nn.gelu(nn.Dense(3 * width)(nn.LayerNorm()(x))))
        return x + nn.Dropout(self.rate, deterministic=False)(h)


class Transformer(nn.Module):
    block: Any = Block

    @nn.compact
    def __call__(self, x):
        for _ in range(3):
            x = self.block()(x)
        return nn.LayerNorm()(x)


def linen_transformer(block=Block):
    model, x = Transformer(block), normal(3, 6, 8)
    params = doubles(jax.jit(model.init)({"params": KEY, "dropout": KEY}, x))

    def loss(params, x, key):
        return jnp.mean(jnp.sin(model.apply(params, x, rngs={"dropout": key})))

    return Case(loss, (params, x, jax.random.key(1)))


class Tied(nn.Module):
    @nn.compact
    def __call__(self, tokens, x):
        embed = nn.Embed(11, 6)
        shared = nn.Dense(6)
        h = embed(tokens) + x
        for _ in range(6):
            h = h + jnp.tanh(shared(h))
        return embed.attend(h)


def linen_tied_weights():
    model, tokens, x = Tied(), jnp.arange(12).reshape(2, 6) % 11, normal(2, 6, 6)
    params = doubles(jax.jit(model.init)(KEY, tokens, x))

    def loss(params, x, tokens):
        logits = nn.log_softmax(model.apply(params, tokens, x))
        return -jnp.mean(jnp.take_along_axis(logits, tokens[..., None], -1))

    return Case(loss, (params, x, tokens))


def scanned_transformer():
    """Parameters stacked over layers, with dropout keys as a per-step input."""
    block, x, depth = Block(), normal(3, 6, 8), 8

    def one(key):
        return block.init({"params": key, "dropout": key}, x)

    params = doubles(jax.vmap(one)(jax.random.split(KEY, depth)))

    def loss(params, x, keys):
        def layer(h, given):
            weights, key = given
            return block.apply(weights, h, rngs={"dropout": key}), jnp.mean(h)

        h, means = lax.scan(layer, x, (params, keys))
        return jnp.mean(jnp.sin(h)) + jnp.sum(means**2), means

    args = params, x, jax.random.split(jax.random.key(2), depth)
    return Case(loss, args, has_aux=True)


def linen_scan():
    """`nn.scan`, flax's own way to write a scan over layers."""

    class Layer(nn.Module):
        @nn.compact
        def __call__(self, h, _):
            return nn.relu(nn.Dense(h.shape[-1])(h)), None

    class Deep(nn.Module):
        @nn.compact
        def __call__(self, x):
            lift = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
            return nn.scan(Layer, length=9, **lift)()(x, None)[0]

    model, x = Deep(), normal(5, 6)
    params = doubles(jax.jit(model.init)(KEY, x))
    return Case(lambda p, x, _: jnp.mean(model.apply(p, x) ** 2), (params, x, None))


# flax.nnx -----------------------------------------------------------------------


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


# equinox ------------------------------------------------------------------------


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


# Plain JAX ----------------------------------------------------------------------


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


CASES = {
    "linen-mlp-dropout": linen_mlp_dropout,
    "linen-cnn-batch-norm": linen_cnn_batch_norm,
    "linen-lstm": functools.partial(linen_rnn, nn.LSTMCell),
    "linen-gru": functools.partial(linen_rnn, nn.GRUCell),
    "linen-transformer": linen_transformer,
    "linen-transformer-remat": functools.partial(linen_transformer, nn.remat(Block)),
    "linen-tied-weights": linen_tied_weights,
    "linen-scan": linen_scan,
    "scanned-transformer": scanned_transformer,
    "nnx-batch-norm": nnx_batch_norm,
    "eqx-mlp": eqx_mlp,
    "eqx-cnn": eqx_cnn,
    "eqx-unet": eqx_unet,
    "eqx-lstm": functools.partial(eqx_scan, eqx.nn.LSTMCell),
    "eqx-gru": functools.partial(eqx_scan, eqx.nn.GRUCell),
    "mixed-precision": mixed_precision,
    "weight-maps": weight_maps,
    "nested-jit": nested_jit,
    "cond": with_cond,
    "custom-vjp": with_custom_vjp,
    "gated-residual": gated_residual,
}
