"""Weights as training leaves them, data as users have them, and what runs on both."""

from __future__ import annotations

import functools

import jax
import numpy as np

from mwc import moonwalk_compile
from tests.submersive import FORCED, chain, over_layers

DEPTH, WIDTH, BATCH = 6, 8, 12


def loss_of(kink, loop):
    return over_layers(kink) if loop else chain(kink)


@functools.cache
def programs(kink, loop, depth=DEPTH):
    """Gradients rebuilt and by backpropagation, compiled."""
    del depth  # each is compiled for itself
    loss = loss_of(kink, loop)
    ours = moonwalk_compile(loss, strategies=FORCED)
    return ours, jax.jit(jax.grad(loss))


def exact(draw, depth=DEPTH, width=WIDTH):
    """Weights that are orthonormal to rounding, and biases."""
    w = np.linalg.qr(draw.standard_normal((depth, width, width)))[0]
    return np.float32(w), np.float32(0.1 * draw.standard_normal((depth, width)))


def samples(draw, batch=BATCH, width=WIDTH):
    return tuple(np.float32(draw.standard_normal((2, batch, width))))


def damaged(draw, w, how, size):
    """Weights as training may leave them."""
    at, width = draw.integers(len(w)), w.shape[-1]
    w = w.copy()
    if how == "signs":
        w += size * np.sign(draw.standard_normal(w.shape))
    elif how == "rank one":
        u, v = np.sign(draw.standard_normal((2, len(w), width)))
        w += size * u[:, :, None] * v[:, None, :]
    elif how == "one weight":
        w[at] += size * np.sign(draw.standard_normal(w[at].shape))
    elif how == "one entry":
        w[at, 0, 0] += size
    elif how == "scaled":
        w *= 1 + size
    elif how == "zero":
        w[at] = 0
    elif how == "rank-deficient":
        w[at, :, 1] = w[at, :, 0]
    elif how == "permutations":
        w = np.stack([np.eye(width)[draw.permutation(width)] for _ in w])
    return np.float32(w)


def odd(draw, x, how, scale):
    """Data with rows of other sizes, ties, and what is no number."""
    x = x.copy()
    if how == "a row scaled":
        x[draw.integers(len(x))] *= scale
    elif how == "rows scaled":
        x *= 10.0 ** draw.uniform(-12, 2, (len(x), 1))
    elif how == "all scaled":
        x *= scale
    elif how == "zero rows":
        x[:3] = 0
    elif how == "ties":
        x = np.round(x)
    elif how in ("nan", "inf"):
        x[draw.integers(len(x)), draw.integers(x.shape[1])] = float(how)
    return np.float32(x)
