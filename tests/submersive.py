"""Stages that tests rebuild, and pieces of chains that can be rebuilt."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import mwc
from mwc._build import Builder
from mwc._rebuilding import Judge
from mwc.constraints import orthogonal, unit_triangular
from passes.declared import facts
from passes.depend import carries_tangent
from passes.inline import inline
from passes.linearise import is_inexact
from passes.submersion import submersion

DRAW = np.random.default_rng(0)


def normal(*shape):
    return np.asarray(DRAW.standard_normal(shape))


def isometry(*shape):
    return np.linalg.qr(DRAW.standard_normal(shape))[0]


class Case:
    """A stage fun(x, *params), with its verdict and as it would be rebuilt."""

    def __init__(self, fun, x, *params):
        x, *params = map(jnp.asarray, (x, *params))
        self.fun, self.x, self.params = fun, x, params
        graph = inline(jax.make_jaxpr(fun)(x, *params))
        moving = [v for v in graph.invars if is_inexact(v)]
        outside = {*graph.invars[1:]}
        builder = Builder(outside, carries_tangent(graph, moving, is_inexact), graph)
        self.stage = builder.straight(graph)
        known = facts(graph)
        linear = self.stage.linear
        pairs = zip(graph.invars, linear.fwd.invars, strict=True)
        given = {f: known[v] for v, f in pairs if v in known}
        self.found = submersion(linear, linear.fwd.invars[0], given)
        self.rebuilt = Judge(outside, known)(self.stage)

    def error(self):
        """max |J R - I|, R from the bits and the parameters alone."""
        fun, x, params = self.fun, self.x, self.params
        invars = self.stage.graph.invars
        rebuilt = self.rebuilt
        assert not isinstance(rebuilt, str), rebuilt

        @jax.jit
        def run(x, *params):
            values = dict(zip(invars, (x, *params), strict=True))
            bits = rebuilt.stage.first(dict(values), False, False)
            del values[invars[0]]
            y, jacobian = jax.vjp(lambda x: fun(x, *params), x)
            units = jnp.eye(y.size, dtype=y.dtype)
            if jnp.iscomplexobj(y):
                units = jnp.concatenate([units, 1j * units])
            units = units.reshape(-1, *y.shape)

            def back(h):
                pulled, ties = rebuilt.pull(values, bits, h)
                # Without what is kept of ties: it would mend a wrong inverse too.
                none = [jnp.zeros_like(x) for x in ties]
                known = rebuilt.push(values, bits, jacobian(h)[0], none)
                return pulled, known[rebuilt.last]

            pulled, pushed = jax.vmap(back)(units)
            same = jnp.max(jnp.abs(pulled - jax.vmap(jacobian)(units)[0]))
            return same, jnp.max(jnp.abs(pushed - units))

        assert rebuilt.found.can_rebuild
        return max(float(e) for e in run(x, *params))


def halves(x):
    return jnp.split(x, 2, -1)


def max_min(x):
    a, b = halves(x)
    return jnp.concatenate([jnp.maximum(a, b), jnp.minimum(a, b)], -1)


def max_min_strided(x):
    a, b = x[..., ::2], x[..., 1::2]
    both = jnp.stack([jnp.maximum(a, b), jnp.minimum(a, b)], -1)
    return both.reshape(x.shape)


def max_min_where(x):
    a, b = halves(x)
    swap = a > b
    return jnp.concatenate([jnp.where(swap, a, b), jnp.where(swap, b, a)], -1)


def max_min_reduced(x):
    pairs = x.reshape(*x.shape[:-1], -1, 2)
    return jnp.stack([pairs.max(-1), pairs.min(-1)], -1).reshape(x.shape)


def space_to_depth(x):
    rows, columns = x.shape[0] // 2, x.shape[1] // 2
    blocks = x.reshape(rows, 2, columns, 2).transpose(0, 2, 1, 3)
    return blocks.reshape(rows, columns, 4)


@mwc.coisometric
def layer(h, w):
    return h @ w


@functools.partial(mwc.coisometric, scale=9.0)
def tripled(h, w, b):
    return 3 * (h @ w) + b


# Chains

DEPTH, WIDTH, BATCH = 16, 6, 4
FORCED = ("moonwalk", "stored")

KINKS = {
    "abs": jnp.abs,
    "leaky 0.9": lambda x: jax.nn.leaky_relu(x, 0.9),
    "leaky 0.5": lambda x: jax.nn.leaky_relu(x, 0.5),
    "max-min": max_min,
    "sort": lambda x: jnp.sort(x.reshape(*x.shape[:-1], -1, 2), -1).reshape(x.shape),
}
LAYERS = {
    "declared": lambda x, w: layer(x, w),
    "orthogonal": lambda x, w: x @ orthogonal(w),
    "triangular": lambda x, w: x @ unit_triangular(w, 0.3).T,
}


def numbers(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


def weights(depth=DEPTH, width=WIDTH):
    """Orthogonal matrices and biases of a chain, stacked."""
    draw = np.random.default_rng(depth)
    made = np.linalg.qr(draw.standard_normal((depth, width, width)))[0]
    return made, 0.1 * draw.standard_normal((depth, width))


def data(batch=BATCH, width=WIDTH):
    return numbers(1, batch, width), numbers(2, batch, width)


def mean_square(x, y):
    return jnp.mean(jnp.abs(x - y) ** 2)


def chain(kink="abs", kind="declared"):
    """A loss of [(w, b), ...] and (x, y)."""

    def loss(params, batch):
        x, y = batch
        for w, b in params:
            x = KINKS[kink](LAYERS[kind](x, w) + b)
        return mean_square(x, y)

    return loss


def layers(depth=DEPTH, width=WIDTH):
    return [*zip(*weights(depth, width), strict=True)]


def over_layers(kink="abs", reverse=False):
    def loss(params, batch):
        def step(x, p):
            w, b = p
            return KINKS[kink](layer(x, w) + b), None

        x, y = batch
        return mean_square(lax.scan(step, x, params, reverse=reverse)[0], y)

    return loss


def rows(plan):
    """How many stages are rebuilt."""
    return sum(stage.strategy == "moonwalk" for stage in plan.stages)
