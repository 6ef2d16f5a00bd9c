"""Models of `flax.linen`, unchanged."""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from tests.models.case import KEY, Case, doubles, normal


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
