"""Draws what two plans keep, into examples/pictures or a folder that is named.

    python examples/draw_plans.py [FOLDER]

A chain of 64 orthogonal layers, whose cotangents are rebuilt from one bit a unit, with
what backpropagation would keep on the same scale; and a U-Net, in which a value that
two stages read is kept once. Nothing is run: shapes are enough.
"""

import pathlib
import sys

import jax
import jax.numpy as jnp
from jax import lax

import mwc

HERE = pathlib.Path(__file__).parent / "pictures"

rotate = mwc.coisometric(lambda h, w: h @ w)


@mwc.moonwalk_compile
def chain(weights, batch):
    """Orthogonal layers with abs."""
    h = batch
    for w in weights:
        h = jnp.abs(rotate(h, w))
    return jnp.mean(h**2)


def conv(x, w, stride=1):
    """A convolution of images, [batch, height, width, channels], and a ReLU."""
    numbers = ("NHWC", "HWIO", "NHWC")
    y = lax.conv_general_dilated(x, w, (stride, stride), "SAME", None, None, numbers)
    return jax.nn.relu(y)


def beside(x, skip):
    """An image at twice its size beside the one that was kept."""
    batch, height, width, _ = skip.shape
    wide = jax.image.resize(x, (batch, height, width, x.shape[-1]), "nearest")
    return jnp.concatenate([wide, skip], axis=-1)


@mwc.moonwalk_compile
def unet(params, images, targets):
    """Three levels; the scopes name the stages."""
    skips, h = [], images
    for i, kernel in enumerate(params["down"]):
        with jax.named_scope(f"down{i}"):
            h = conv(h, kernel, 1 if i == 0 else 2)
            skips.append(h)
    for i, kernel in enumerate(params["up"]):
        with jax.named_scope(f"up{i}"):
            h = conv(beside(h, skips[-2 - i]), kernel)
    return jnp.mean((h - targets) ** 2)


def shape(*sizes):
    """An array of that shape."""
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


def main(folder):
    """Draws both."""
    folder.mkdir(parents=True, exist_ok=True)
    plan = chain.plan([shape(512, 512)] * 64, shape(4096, 512))
    plan.draw(folder / "moonwalk.svg", compare=True)
    down = [shape(3, 3, 3, 32), shape(3, 3, 32, 64), shape(3, 3, 64, 128)]
    up = [shape(3, 3, 192, 64), shape(3, 3, 96, 2)]
    images, targets = shape(16, 128, 128, 3), shape(16, 128, 128, 2)
    plan = unet.plan({"down": down, "up": up}, images, targets)
    plan.draw(folder / "unet.svg", direction="TB")
    print(f"drew moonwalk.svg and unet.svg in {folder}")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else HERE)
