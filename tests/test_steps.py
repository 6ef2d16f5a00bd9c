"""Steps: stages alike share code; what a stage has of its own it keeps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.submersive import Case, isometry, normal
from tests.test_moonwalk_edges import DEPTH, WIDTH, arguments, check, rotate

pytestmark = pytest.mark.usefixtures("x64", "quick")


@pytest.mark.parametrize("own", ["array", "number", "random", "roll"])
def test_stages_that_differ_by_what_is_in_the_code(own):
    """Layers that draw random numbers hang XLA where a call of them is not inlined."""
    arrays = np.random.default_rng(1).standard_normal((DEPTH, WIDTH))
    key = jax.random.key(0)

    def loss(weights, x):
        for i, w in enumerate(weights):
            x = rotate(jnp.abs(x), w)
            if own == "array":
                x = x + arrays[i]
            elif own == "number":
                x = jnp.where(x > 0, x, (0.9 + 0.01 * i) * x)
            elif own == "random":
                x = x + jax.random.normal(jax.random.fold_in(key, i), (WIDTH,))
            else:
                x = jnp.roll(x, i, axis=1)
        return jnp.mean(x**3)

    assert check(loss, *arguments()) >= DEPTH - 2


def test_sums_of_a_cotangent_are_there_before_it_is_pushed():
    """A bias's gradient, not what is as large as a state or needs another cotangent."""

    def stage(x, bias, skip, w):
        return rotate(jnp.abs(x + skip + bias), w)

    args = normal(16, 8), normal(8), normal(16, 8), isometry(8, 8)
    one = Case(stage, *args).rebuilt
    _, bias, skip, w = names = one.stage.graph.invars
    values = dict(zip(names, map(jnp.asarray, args), strict=True))
    bits = one.stage.first(dict(values), False, False)

    def summed(h):
        h, grads = one.summed(values, bits, h, [bias, skip, w])
        assert [*grads] == [bias]
        return h, grads[bias]

    h = normal(16, 8)
    for mine, true in zip(summed(h), (h, h.sum(0)), strict=True):
        np.testing.assert_allclose(mine, true, rtol=1e-12)
    jaxpr = jax.make_jaxpr(summed)(h).jaxpr
    (held,) = (e for e in jaxpr.eqns if e.primitive.name == "optimization_barrier")
    assert [*held.outvars] == [*jaxpr.outvars]
    assert held.invars[0] is jaxpr.invars[0]


@pytest.mark.parametrize("state", [jnp.float32, jnp.bfloat16])
def test_rounded_weights_are_mended_as_the_tolerance_asks(state):
    """Beside a float32 state to its precision, by steps; else by a few terms."""

    def stage(x, w):
        return rotate(jnp.abs(x), w.astype(x.dtype))

    weight = jnp.asarray(isometry(8, 8), jnp.bfloat16)
    one = Case(stage, jnp.asarray(normal(16, 8), state), weight).rebuilt
    (of,) = one.claims
    assert of.rounded is (state == jnp.bfloat16)
