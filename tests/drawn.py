"""Small programs whose plans are drawn and written, each with its decorator."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

import mwc
from tests import programs
from tests.programs import Program, spec


def conv(x, w, stride=1):
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, w, (stride, stride), "SAME", None, None, numbers)


def unet(size=16, width=8):
    """Two levels of a U-Net under name scopes; what `outer` makes is read twice."""

    def loss(params, batch):
        images, targets = batch
        with jax.named_scope("outer"):
            a = jax.nn.relu(conv(images, params["outer"]))
        with jax.named_scope("down"):
            b = jax.nn.relu(conv(a, params["down"], 2))
        with jax.named_scope("middle"):
            c = jax.nn.relu(conv(b, params["middle"]))
        with jax.named_scope("up"):
            wide = jax.image.resize(c, a.shape[:3] + c.shape[3:], "nearest")
            d = jax.nn.relu(conv(jnp.concatenate([wide, a], -1), params["up"]))
        with jax.named_scope("head"):
            found = conv(d, params["head"])
        return jnp.mean((found - targets) ** 2)

    n = width
    params = {
        "outer": spec(3, 3, 3, n),
        "down": spec(3, 3, n, 2 * n),
        "middle": spec(3, 3, 2 * n, 2 * n),
        "up": spec(3, 3, 3 * n, n),
        "head": spec(1, 1, n, 2),
    }
    return Program(loss, params, (spec(4, size, size, 3), spec(4, size, size, 2)))


def choosing(depth=4, width=8):
    """A choice between two branches of several layers."""

    def deep(act, weights, x):
        for w in weights:
            x = act(x @ w)
        return x

    def loss(params, batch):
        x, index = batch
        branches = [functools.partial(deep, act) for act in (jnp.tanh, jnp.sin)]
        return jnp.sum(lax.switch(index, branches, params, x) ** 2)

    params = [spec(width, width)] * depth
    return Program(loss, params, (spec(64, width), spec(dtype=jnp.int32)))


def nested(steps=16, width=16):
    """A loop over transformer blocks: a chain inside a scan."""

    def loss(params, x):
        def block(x, p):
            h = jax.nn.gelu(x @ p["wide"]) @ p["narrow"]
            return jnp.tanh(x + h) @ p["out"], None

        return jnp.mean(lax.scan(block, x, params)[0] ** 2)

    params = {
        "wide": spec(steps, width, 4 * width),
        "narrow": spec(steps, 4 * width, width),
        "out": spec(steps, width, width),
    }
    return Program(loss, params, spec(64, width))


REBUILT = {"strategies": ("moonwalk", "stored")}

PROGRAMS = {
    "dense": (programs.dense(programs.relu, 12, 16, 64), {}),
    "stored": (programs.dense(programs.relu, 6, 16, 64), {"extra_forwards": 0}),
    "moonwalk": (programs.dense(jnp.abs, 12, 32, 512, programs.rotate), REBUILT),
    "scan": (programs.scanned(programs.relu, 12, 16, 64), {}),
    "scan rebuilt": (programs.recurrent(16, 32, 256, 8), REBUILT),
    "lstm": (programs.lstm(16, 8, 4), {}),
    "transformer": (programs.transformer(4, 32, 2, 2, 16), {}),
    "nested": (nested(), {}),
    "branches": (choosing(), {"extra_forwards": 3}),
    "unet": (unet(), {}),
    "resnet": (programs.resnet(2, 16, (8, 16), 1, 10), {}),
}


def decorated(name):
    program, options = PROGRAMS[name]
    options = {"has_aux": program.has_aux, **options}
    return mwc.moonwalk_compile(program.loss, **options), program


@functools.cache
def plan_of(name):
    loss, program = decorated(name)
    return loss.plan(program.params, program.batch)
