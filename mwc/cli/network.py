"""The network of `mwc demo`: a deep classifier, in plain JAX, with nothing marked."""

import jax
import jax.numpy as jnp

DEPTH, WIDTH, BATCH = 32, 256, 2048


def loss(params, batch):
    """Cross-entropy of a deep network with leaky ReLUs."""
    with jax.named_scope("entry"):
        h = batch["x"] @ params["entry"]
    for i, layer in enumerate(params["layers"]):
        with jax.named_scope(f"layer{i}"):
            h = jax.nn.leaky_relu(h @ layer["w"] + layer["b"])
    with jax.named_scope("classifier"):
        scores = jax.nn.log_softmax(h @ params["classifier"])
    return -jnp.mean(jnp.sum(scores * jax.nn.one_hot(batch["y"], 10), axis=1))


def inputs():
    """Shapes are enough to plan and to measure."""

    def shape(*sizes, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(sizes, dtype)

    layer = {"w": shape(WIDTH, WIDTH), "b": shape(WIDTH)}
    params = {
        "entry": shape(64, WIDTH),
        "layers": [layer] * DEPTH,
        "classifier": shape(WIDTH, 10),
    }
    return params, {"x": shape(BATCH, 64), "y": shape(BATCH, dtype=jnp.int32)}
