"""Code that is called and not inlined: where, and what of."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from mwc._once import compiled_once

LATE = "xla_late"


def lowered(args, platform):
    """A program of 3 calls."""

    @compiled_once
    def layer(given):
        return {"h": jnp.tanh(given["h"] @ given["w"]), "w": given["w"]}

    def network(h, w):
        given = {"h": h, "w": w}
        for _ in range(3):
            given = layer(given)
        return given["h"]

    text = jax.jit(network).trace(*args).lower(lowering_platforms=(platform,))
    return text.as_text()


def specs(sharding=None):
    spec = jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=sharding)
    return spec, jax.ShapeDtypeStruct((8, 8), jnp.float32)


@pytest.mark.skipif(not hasattr(jax, "Inline"), reason="JAX 0.10 inlines all calls")
def test_calls_stay_on_a_cpu():
    here, there = (lowered(specs(), platform) for platform in ("cpu", "cuda"))
    assert LATE in here
    assert LATE not in there
    # Either way it is there as often as there are types of arguments, not as calls.
    assert here.count("stablehlo.tanh") < 3 > there.count("stablehlo.tanh")


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_what_may_be_split_is_inlined(kind):
    mesh = AbstractMesh((4,), ("d",), axis_types=(kind,))
    sharding = NamedSharding(mesh, PartitionSpec())
    assert LATE not in lowered(specs(sharding), "cpu")


def test_values():
    draw = np.random.default_rng(0)
    h, w = (jnp.asarray(draw.standard_normal((8, 8)), jnp.float32) for _ in range(2))
    twice = compiled_once(lambda h: [jnp.tanh(h @ w), None])
    found, nothing = jax.jit(lambda h: twice(twice(h)[0]))(h)
    assert nothing is None
    np.testing.assert_allclose(found, jnp.tanh(jnp.tanh(h @ w) @ w), rtol=1e-6)
