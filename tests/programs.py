"""The programs of the memory table, shared by the benchmark and the tests.

Each builder gives a `Program`: a loss of (params, batch), its parameters and batch as
`ShapeDtypeStruct`s (`concrete` draws numbers for them), and whether it returns
auxiliary results. Sizes are arguments: the defaults are those of the table.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import mwc

WIDTH, BATCH = 512, 4096


@dataclasses.dataclass(frozen=True)
class Program:
    loss: Callable[..., Any]
    params: Any
    batch: Any
    has_aux: bool = False

    def concrete(self, seed: int = 0, scale: float | None = None):
        """Parameters and batch with numbers in them."""
        draw = np.random.default_rng(seed)

        def fill(path, leaf):
            # Running variances are positive; scales of normalisation are near one.
            name = jax.tree_util.keystr(path)
            if not jnp.issubdtype(leaf.dtype, np.floating):
                return jnp.asarray(draw.integers(0, 10, leaf.shape), leaf.dtype)
            noise = draw.standard_normal(leaf.shape)
            if "var" in name or "scale" in name:
                return jnp.asarray(1 + 0.1 * np.abs(noise), leaf.dtype)
            if leaf.ndim == 1:
                return jnp.asarray(0.1 * noise, leaf.dtype)
            fan_in = math.prod(leaf.shape[:-1]) if leaf.ndim == 4 else leaf.shape[-2]
            return jnp.asarray(noise * (scale or 1.4 / fan_in**0.5), leaf.dtype)

        params = jax.tree_util.tree_map_with_path(fill, self.params)
        batch = jax.tree_util.tree_map_with_path(fill, self.batch)
        if jax.tree.structure(batch) == jax.tree.structure(0) and scale is None:
            batch = jnp.asarray(draw.standard_normal(batch.shape), batch.dtype)
        return params, batch


def spec(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def relu(z):
    return jax.nn.relu(z)


def leaky(z):
    return jax.nn.leaky_relu(z, 0.1)


def maxmin(z):
    a, b = jnp.split(z, 2, axis=-1)
    return jnp.concatenate([jnp.maximum(a, b), jnp.minimum(a, b)], axis=-1)


def leaky9(z):
    return jax.nn.leaky_relu(z, 0.9)


def product(h, w):
    return h @ w


# Weights that the user says are orthogonal, and weights that are by construction.
rotate = mwc.coisometric(product)


def built(h, w):
    return h @ mwc.constraints.orthogonal(w)


def dense(act=relu, depth=64, width=WIDTH, batch=BATCH, layer=product):
    """Dense layers in a Python loop, mean square loss."""
    return funnel(act, [width] * (depth + 1), batch, layer)


def funnel(act, widths, batch=BATCH, layer=rotate):
    """Dense layers of given widths in a Python loop."""

    def loss(params, x):
        for w, b in params:
            x = act(layer(x, w) + b)
        return jnp.mean(x**2, dtype=jnp.promote_types(x.dtype, jnp.float32))

    params = [(spec(m, n), spec(n)) for m, n in itertools.pairwise(widths)]
    return Program(loss, params, spec(batch, widths[0]))


def halved(program):
    """The same with parameters and data in bfloat16."""

    def half(s):
        return spec(*s.shape, dtype=jnp.bfloat16)

    params, batch = jax.tree.map(half, (program.params, program.batch))
    return dataclasses.replace(program, params=params, batch=batch)


def scanned(act=relu, depth=64, width=WIDTH, batch=BATCH, product=product):
    """Dense layers in `lax.scan` over stacked weights."""

    def loss(params, x):
        def layer(h, layer_params):
            w, b = layer_params
            return act(product(h, w) + b), None

        return jnp.mean(lax.scan(layer, x, params)[0] ** 2)

    params = (spec(depth, width, width), spec(depth, width))
    return Program(loss, params, spec(batch, width))


def pairs(act=jnp.abs, depth=32, width=WIDTH, batch=BATCH):
    """Two orthogonal layers in each step of `lax.scan`."""

    def loss(params, x):
        def step(h, two):
            for w, b in two:
                h = act(rotate(h, w) + b)
            return h, None

        return jnp.mean(lax.scan(step, x, params)[0] ** 2)

    layer_params = spec(depth, width, width), spec(depth, width)
    return Program(loss, (layer_params, layer_params), spec(batch, width))


def recurrent(steps=512, hidden=512, batch=4096, inputs=64):
    """An orthogonal recurrent net over time; the loss reads the last state."""

    def loss(params, xs):
        w, u, b = params

        def cell(h, x):
            return jnp.abs(rotate(h, w) + x @ u + b), None

        start = jnp.ones((xs.shape[1], w.shape[0]), xs.dtype)
        return jnp.mean(lax.scan(cell, start, xs)[0] ** 2)

    params = (spec(hidden, hidden), spec(inputs, hidden), spec(hidden))
    return Program(loss, params, spec(steps, batch, inputs))


def lstm(steps=1024, hidden=512, batch=256):
    """An LSTM over time in `lax.scan`; the loss reads the last state."""

    def loss(params, xs):
        w_x, w_h, b = params

        def cell(carry, x):
            h, c = carry
            gates = x @ w_x + h @ w_h + b
            i, f, g, o = jnp.split(gates, 4, axis=-1)
            c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            return (jax.nn.sigmoid(o) * jnp.tanh(c), c), None

        zero = jnp.zeros((xs.shape[1], w_h.shape[0]), xs.dtype)
        (h, _), _ = lax.scan(cell, (zero, zero), xs)
        return jnp.mean(h**2)

    params = (spec(hidden, 4 * hidden), spec(hidden, 4 * hidden), spec(4 * hidden))
    return Program(loss, params, spec(steps, batch, hidden))


class Block(nn.Module):
    """A pre-LN transformer encoder block."""

    heads: int

    @nn.compact
    def __call__(self, x):
        width = x.shape[-1]
        h = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=self.heads)(h, h)
        h = nn.Dense(4 * width)(nn.LayerNorm()(x))
        return x + nn.Dense(width)(nn.gelu(h))


class Encoder(nn.Module):
    depth: int
    heads: int

    @nn.compact
    def __call__(self, x):
        for _ in range(self.depth):
            x = Block(self.heads)(x)
        return nn.LayerNorm()(x)


def transformer(depth=12, width=512, heads=8, batch=16, tokens=512):
    """A flax encoder of pre-LN blocks on embedded tokens."""
    model = Encoder(depth, heads)
    x = spec(batch, tokens, width)
    params = jax.eval_shape(model.init, jax.random.key(0), x)

    def loss(params, x):
        return jnp.mean(model.apply(params, x) ** 2)

    return Program(loss, params, x)


class Residual(nn.Module):
    """The basic block of a ResNet."""

    features: int
    stride: int

    @nn.compact
    def __call__(self, x):
        conv = functools.partial(nn.Conv, self.features, use_bias=False)
        norm = functools.partial(nn.BatchNorm, use_running_average=False)
        strides = (self.stride, self.stride)
        h = nn.relu(norm()(conv((3, 3), strides=strides)(x)))
        h = norm()(conv((3, 3))(h))
        if x.shape != h.shape:
            x = norm()(conv((1, 1), strides=strides)(x))
        return nn.relu(x + h)


class ResNet(nn.Module):
    widths: tuple[int, ...]
    blocks: int
    classes: int

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(self.widths[0], (7, 7), strides=(2, 2), use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=False)(x))
        for i, width in enumerate(self.widths):
            for j in range(self.blocks):
                x = Residual(width, 2 if i and not j else 1)(x)
        return nn.Dense(self.classes)(jnp.mean(x, axis=(1, 2)))


def resnet(batch=64, size=128, widths=(64, 128, 256, 512), blocks=2, classes=1000):
    """A flax ResNet-18 without max-pool; running statistics are its aux."""
    model = ResNet(tuple(widths), blocks, classes)
    images, labels = spec(batch, size, size, 3), spec(batch, dtype=jnp.int32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    statistics = variables["batch_stats"]

    def loss(params, batch):
        images, labels, stats = batch
        logits, updated = model.apply(
            {"params": params, "batch_stats": stats}, images, mutable=["batch_stats"]
        )
        chosen = jnp.take_along_axis(nn.log_softmax(logits), labels[:, None], axis=-1)
        return -jnp.mean(chosen), updated

    return Program(loss, variables["params"], (images, labels, statistics), True)


TABLE: dict[str, Callable[[], Program]] = {
    "dense-relu-64": functools.partial(dense, relu, 64),
    "dense-leaky-64": functools.partial(dense, leaky, 64),
    "dense-relu-256": functools.partial(dense, relu, 256),
    "dense-leaky-256": functools.partial(dense, leaky, 256),
    "maxmin-64": functools.partial(dense, maxmin, 64),
    "scan-relu-64": functools.partial(scanned, relu, 64),
    "scan-relu-256": functools.partial(scanned, relu, 256),
    "lstm-1024": lstm,
    "transformer-12": transformer,
    "resnet-18": resnet,
}
"""The rows of the table by name."""

_FUNNEL = [round(w / 8) * 8 for w in np.linspace(1024, 256, 49).tolist()]

SUBMERSIVE: dict[str, Callable[[], Program]] = {
    "abs-64": functools.partial(dense, jnp.abs, 64, layer=rotate),
    "abs-256": functools.partial(dense, jnp.abs, 256, layer=rotate),
    "abs-64-bfloat16": lambda: halved(dense(jnp.abs, 64, layer=rotate)),
    "abs-64-batch-512": functools.partial(dense, jnp.abs, 64, 512, 512, rotate),
    "leaky9-64": functools.partial(dense, leaky9, 64, layer=rotate),
    "maxmin-64-orthogonal": functools.partial(dense, maxmin, 64, layer=rotate),
    "funnel-48": functools.partial(funnel, jnp.abs, _FUNNEL),
    "scan-abs-64": functools.partial(scanned, jnp.abs, 64, product=rotate),
    "scan-abs-64-batch-512": functools.partial(
        scanned, jnp.abs, 64, batch=512, product=rotate
    ),
    "scan-pairs-32": pairs,
    "recurrent-512": recurrent,
    "abs-64-built": functools.partial(dense, jnp.abs, 64, layer=built),
}
"""The rows of chains whose weights are orthogonal, declared or built."""

ROWS = TABLE | SUBMERSIVE
