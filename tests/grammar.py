"""A grammar of random programs: a list of names is a loss of (params, x, extras).

The state is a matrix h. Each rule maps it to another, with a block of parameters of
its own; `Env` holds what rules share: the data, integers, a key, tied weights, a stack
of skips. What a rule draws depends on its place in the list alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Array = Any
STEPS = 5


@dataclasses.dataclass
class Env:
    """What the rules of one program share."""

    x: Array
    tied: Array
    index: Array
    flag: Array
    key: Array
    place: int = 0
    skips: list[Array] = dataclasses.field(default_factory=list)
    losses: list[Array] = dataclasses.field(default_factory=list)


@jax.custom_jvp
def halved(x):
    return jnp.sin(x)


@halved.defjvp
def _halved_jvp(primals, tangents):
    (x,), (t,) = primals, tangents
    return halved(x), 0.5 * t * jnp.cos(x)


@jax.custom_vjp
def straight_through(x, w):
    return jnp.round(x * 2) @ w


straight_through.defvjp(
    lambda x, w: (straight_through(x, w), (x, w)),
    lambda saved, ct: (2 * ct @ saved[1].T, saved[0].T @ ct),
)


def _dense(h, p, env):
    return h @ p["w"] + p["b"]


def _prelu(h, p, env):
    return jnp.where(h > 0, h, p["b"] * h)


def _maxmin(h, p, env):
    a, b = h[:, ::2], h[:, 1::2]
    n = b.shape[1]
    pair = [jnp.maximum(a[:, :n], b), jnp.minimum(a[:, :n], b), a[:, n:]]
    return jnp.concatenate(pair, axis=1)


def _residual(h, p, env):
    return h + jax.nn.relu(h @ p["w"] + p["b"]) @ p["v"]


def _push(h, p, env):
    env.skips.append(h)
    return jnp.tanh(h @ p["w"])


def _pop(h, p, env):
    if not env.skips:
        return h - env.x
    return jnp.concatenate([h, env.skips.pop()], axis=1) @ p["wide"]


def _split(h, p, env):
    a, b = jnp.split(h, [1], axis=1)
    return jnp.concatenate([jnp.sin(b), a * 0.5], axis=1)


def _norm(h, p, env):
    h = h - h.mean(axis=1, keepdims=True)
    return h * lax.rsqrt((h**2).mean(axis=1, keepdims=True) + 0.1) * (1 + p["b"])


def _batch_norm(h, p, env):
    mean = h.mean(axis=0)
    env.losses.append(0.01 * jnp.sum(mean))
    return (h - mean) / jnp.sqrt(1 + h.var(axis=0))


def _attention(h, p, env):
    scores = (h @ p["w"]) @ (h @ p["v"]).T
    return jax.nn.softmax(scores, axis=-1) @ h + h


def _triu(h, p, env):
    return h @ (0.5 * jnp.triu(p["w"], 1) + jnp.eye(h.shape[1], dtype=h.dtype))


def _cayley(h, p, env):
    a = p["w"] - p["w"].T
    eye = jnp.eye(h.shape[1], dtype=h.dtype)
    return h @ jnp.linalg.solve(eye + a, eye - a)


def _weight_norm(h, p, env):
    w = p["w"] / jnp.sqrt(1 + jnp.sum(p["w"] ** 2, axis=0))
    return jax.nn.relu(h @ w)


def _scan_layers(h, p, env):
    def layer(h, row):
        w, b = row
        return jax.nn.relu(h @ w + b), None

    return lax.scan(layer, h, (p["ws"], p["bs"]))[0]


def _scan_smooth(h, p, env):
    def layer(h, w):
        return h + jnp.tanh(h @ w) * jnp.sin(h), None

    return lax.scan(layer, h, p["ws"])[0]


def _scan_time(h, p, env):
    """States returned at every step, an integer carried, constants, either way."""

    def step(carry, row):
        s, n = carry
        s = jnp.tanh(s @ p["w"] + row * (n % 3)) + 0.1 * env.tied[0]
        return (s, n + 1), s

    start = jnp.zeros(h.shape[1], h.dtype), jnp.int32(0)
    (_, count), states = lax.scan(step, start, h, reverse=env.place % 2 == 1)
    return states + count


def _scan_twice(h, p, env):
    """One variable returned twice, a carry that stays, results that are dropped."""

    def step(carry, row):
        s, still = carry
        out = jax.nn.relu(s @ p["w"] + row * still)
        return (out, still), (out, out, jnp.sum(out), row)

    (s, still), (a, b, sums, _) = lax.scan(step, (p["b"], env.x[0]), h)
    env.losses.append(jnp.sum(sums))
    return a + 2 * b + s * still


def _scan_swap(h, p, env):
    """Carries that change places, weights read by several and by none."""

    def step(carry, row):
        a, b, c = carry
        return (b, jnp.maximum(a @ row, a) * 0.5, c), a

    start = h, jnp.cos(h), h
    (a, b, c), _ = lax.scan(step, start, p["ws"], reverse=True)
    return a - b + c @ p["ws"][1]


def _scan_nested(h, p, env):
    def outer(h, w):
        def inner(s, b):
            return jnp.sin(s @ w + b), None

        return lax.scan(inner, h, p["bs"])[0], jnp.max(h)

    h, tops = lax.scan(outer, h, p["ws"])
    env.losses.append(jnp.sum(tops * jnp.arange(STEPS)))
    return h


def _scan_random(h, p, env):
    def layer(h, row):
        key, w = row
        keep = jax.random.bernoulli(key, 0.7, h.shape)
        return jnp.where(keep, jax.nn.relu(h @ w) / 0.7, 0), None

    keys = jax.random.split(jax.random.fold_in(env.key, env.place), STEPS)
    return lax.scan(layer, h, (keys, p["ws"]))[0]


def _fori(h, p, env):
    def body(i, h):
        return jnp.tanh(h @ p["w"] + p["bs"][i])

    return lax.fori_loop(0, STEPS, body, h)


def _cond(h, p, env):
    def bend(h, w):
        return jax.nn.relu(h @ w)

    return lax.cond(env.flag, bend, lambda h, w: jnp.sin(h), h, p["w"])


def _switch(h, p, env):
    branches = [jnp.sin, lambda h: h @ p["w"], lambda h: jnp.abs(h @ p["v"])]
    return lax.switch(env.index[0] % 3, branches, h)


def _jit(h, p, env):
    @jax.jit
    def twice(h, w):
        return jax.nn.relu(h @ w)

    return twice(twice(h, p["w"]), p["w"])


def _stop(h, p, env):
    # Half of it: else the slope, tanh + sign, cancels to the rounding of tanh near -1.
    return h * lax.stop_gradient(0.5 * jnp.tanh(h @ p["w"])) + jnp.abs(h)


def _dropout(h, p, env):
    keep = jax.random.bernoulli(jax.random.fold_in(env.key, env.place), 0.8, h.shape)
    return jnp.where(keep, h @ p["w"] / 0.8, 0)


def _gather(h, p, env):
    return jnp.take(h, env.index, axis=0) + p["ws"][env.index % STEPS, 0]


def _scatter(h, p, env):
    return h.at[env.index].add(jnp.sin(h)) * 0.5


def _checkpoint(h, p, env):
    return jax.checkpoint(lambda h, w: jax.nn.silu(h @ w) @ w)(h, p["w"])


def _top(h, p, env):
    return h - jnp.max(h, axis=1, keepdims=True) + jnp.min(h, axis=0)


def _fft(h, p, env):
    z = jnp.fft.fft(h @ p["w"], axis=1)
    return 0.3 * jnp.real(z * jnp.exp(1j * h))


def _aside(h, p, env):
    env.losses.append(jnp.mean(jnp.abs(h)))
    return h @ p["w"]


_SIMPLE: dict[str, Callable[[Array], Array]] = {
    "tanh": jnp.tanh,
    "silu": jax.nn.silu,
    "gelu": jax.nn.gelu,
    "relu": jax.nn.relu,
    "leaky": lambda h: jax.nn.leaky_relu(h, 0.1),
    "abs": jnp.abs,
    "clip": lambda h: jnp.clip(h, -0.5, 1.0),
    "relu6": jax.nn.relu6,
    "max": lambda h: jnp.maximum(h, 0),
    "min": lambda h: jnp.minimum(h, 1),
    "halved": halved,
    "sort": lambda h: jnp.sort(h, axis=1),
    "cumsum": lambda h: jnp.cumsum(h, axis=1) * 0.5,
    "reverse": lambda h: h[:, ::-1],
}

RULES: dict[str, Callable[..., Array]] = {
    **{k: (lambda h, p, env, f=f: f(h)) for k, f in _SIMPLE.items()},
    "dense": _dense,
    "prelu": _prelu,
    "maxmin": _maxmin,
    "residual": _residual,
    "push": _push,
    "pop": _pop,
    "split": _split,
    "norm": _norm,
    "batch-norm": _batch_norm,
    "attention": _attention,
    "tied": lambda h, p, env: h @ env.tied,
    "tied-both": lambda h, p, env: jax.nn.relu(h @ env.tied) @ env.tied.T,
    "triu": _triu,
    "cayley": _cayley,
    "weight-norm": _weight_norm,
    "scan-layers": _scan_layers,
    "scan-smooth": _scan_smooth,
    "scan-time": _scan_time,
    "scan-twice": _scan_twice,
    "scan-swap": _scan_swap,
    "scan-nested": _scan_nested,
    "scan-random": _scan_random,
    "fori": _fori,
    "cond": _cond,
    "switch": _switch,
    "jit": _jit,
    "stop": _stop,
    "custom-vjp": lambda h, p, env: straight_through(h, p["w"]),
    "dropout": _dropout,
    "gather": _gather,
    "scatter": _scatter,
    "checkpoint": _checkpoint,
    "top": _top,
    "fft": _fft,
    "aside": _aside,
}


def states(names, params, x, env) -> Iterator[Array]:
    """What each of a list of rules makes."""
    h = x
    for place, (name, p) in enumerate(zip(names, params["blocks"], strict=True)):
        env.place = place
        h = RULES[name](h, p, env)
        yield h


def loss_of(names: Sequence[str]) -> Callable[..., Array]:
    """The loss that a list of rules stands for."""

    def loss(params, x, extras):
        env = Env(x, params["tied"], *extras)
        *_, h = x, *states(names, params, x, env)
        return jnp.mean(h**2) + jnp.sum(h[0]) * 0.1 + sum(env.losses)

    return loss


def cancels(names, params, x, extras) -> bool:
    """Whether a state is zero but for rounding, whose sign is then anybody's."""
    for h in states(names, params, x, Env(x, params["tied"], *extras)):
        size = np.abs(np.asarray(h))
        if np.any((size > 0) & (size < 1e-13 * np.max(size, initial=0))):
            return True
    return False


def values(count: int, rows=4, width=5, seed=0, kind="normal", dtype=np.float64):
    """Parameters, data and extras for a program of `count` rules."""
    draw = np.random.default_rng(seed)

    def some(*shape):
        numbers = draw.standard_normal(shape)
        if kind == "ties":
            numbers = np.round(numbers)
        return jnp.asarray(numbers, dtype)

    # Ties of sums survive rounding where products and sums are exact.
    scale = jnp.asarray(0.5 if kind == "ties" else width**-0.5, dtype)

    def block():
        return {
            "w": some(width, width) * scale,
            "v": some(width, width) * scale,
            "b": some(width),
            "wide": some(2 * width, width) * scale,
            "ws": some(STEPS, width, width) * scale,
            "bs": some(STEPS, width),
        }

    blocks = [block() for _ in range(count)]
    params = {"tied": some(width, width) * scale, "blocks": blocks}
    x = some(rows, width)
    if kind == "ties" and rows:
        x = x.at[-1].set(0)
    index = jnp.asarray(draw.integers(0, max(rows, 1), rows), jnp.int32)
    flag = jnp.asarray(bool(draw.integers(2)))
    return params, x, (index, flag, jax.random.key(seed))
