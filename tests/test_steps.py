"""Steps: stages alike share code; what a stage has of its own it keeps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mwc
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

    def stage(x, bias, skip, w, late):
        return rotate(jnp.abs(x + skip + bias), w) + late

    args = normal(16, 8), normal(8), normal(16, 8), isometry(8, 8), normal(8)
    one = Case(stage, *args).rebuilt
    _, bias, *others = names = one.stage.graph.invars
    values = dict(zip(names, map(jnp.asarray, args), strict=True))
    bits = one.stage.first(dict(values), False, False)

    def summed(h):
        h, grads = one.summed(values, bits, h, [bias, *others])
        assert [*grads] == [bias]
        return h, grads[bias]

    h = normal(16, 8)
    for mine, true in zip(summed(h), (h, h.sum(0)), strict=True):
        np.testing.assert_allclose(mine, true, rtol=1e-12)
    jaxpr = jax.make_jaxpr(summed)(h).jaxpr
    (held,) = (e for e in jaxpr.eqns if e.primitive.name == "optimization_barrier")
    assert [*held.outvars] == [*jaxpr.outvars]
    assert held.invars[0] is jaxpr.invars[0]


@pytest.mark.parametrize("tolerance", [None, 1e-3])
def test_rounded_weights_are_mended_as_the_tolerance_asks(tolerance):
    """By a few terms, without a loop; to a stricter tolerance by Newton steps."""

    def loss(weights, x):
        for w in weights:
            x = jnp.abs(rotate(x, w))
        return jnp.mean(x**2, dtype=jnp.float32)

    weights, x = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), arguments())
    x = jnp.tile(x, (4, 1))  # a state is large beside a weight
    asked = {"strategies": ("moonwalk", "stored"), "tolerance": tolerance}
    grad = jax.jit(jax.grad(mwc.moonwalk_compile(loss, **asked)))
    assert ("stablehlo.while" in grad.lower(weights, x).as_text()) is bool(tolerance)
    true = jax.grad(loss)(*jax.tree.map(jnp.float32, (weights, x)))
    for mine, one in zip(grad(weights, x), true, strict=True):
        gap = np.linalg.norm(np.float32(mine) - one)
        assert gap <= 2e-2 * np.linalg.norm(one)
