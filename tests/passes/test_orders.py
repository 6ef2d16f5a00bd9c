"""Orders: what a sort keeps is narrow, and its derivative is JAX's own."""

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from mwc import moonwalk_compile
from passes.graph import evaluate, from_jaxpr
from passes.linearise import linearise
from passes.residuals import narrowest, packed_bytes
from tests.submersive import FORCED, isometry, layer

pytestmark = pytest.mark.usefixtures("quick")


def pairs(x):
    return jnp.sort(x.reshape(*x.shape[:-1], -1, 2), -1).reshape(x.shape)


# Each with the bytes that a row of 24 entries needs.
SORTS = {
    "pairs": (pairs, 12 / 8),
    "pairs, far apart": (lambda x: jnp.sort(x.reshape(-1, 2, 12), 1), 12 / 8),
    "pairs, descending": (
        lambda x: jnp.sort(x.reshape(-1, 12, 2), -1, descending=True),
        12 / 8,
    ),
    "groups": (lambda x: jnp.sort(x.reshape(-1, 6, 4), -1), 24 * 2 / 8),
    "rows": (lambda x: jnp.sort(x, -1), 24 * 5 / 8),
    "columns": (lambda x: jnp.sort(x, 0), 24 * 9 / 8),
    "with another": (lambda x: lax.sort((x, jnp.cos(x)), num_keys=1)[1], None),
}
ROWS = 300


@pytest.mark.parametrize("name", SORTS)
def test_what_is_kept(name):
    fun, most = SORTS[name]
    x = np.random.default_rng(0).integers(-9, 9, (ROWS, 24)).astype(np.float32)
    graph = from_jaxpr(jax.make_jaxpr(fun)(x))
    linear = linearise(graph, (True,))
    need, state = list(linear.residuals), linear.fwd.invars
    kept = narrowest(linear.fwd, need, state, lambda eqn: 0.0, at_hand=False)
    if most is not None:
        assert sum(map(packed_bytes, kept)) == ROWS * most
    y, pull = jax.vjp(fun, x)
    ct = np.random.default_rng(1).standard_normal(y.shape).astype(np.float32)
    outs = evaluate(linear.fwd, {linear.fwd.invars[0]: x}, linear.residuals)
    env = dict(zip(linear.residual_inputs, outs, strict=True))
    env |= dict(zip(linear.ct_inputs, [ct], strict=True))
    (found,) = evaluate(linear.bwd, env, linear.bwd.outvars)
    np.testing.assert_array_equal(found, pull(ct)[0])


def test_orders_that_are_results():
    """They are what they were, with ties and NaN."""
    x = np.random.default_rng(0).integers(-3, 3, (7, 24)).astype(np.float32)
    x[0, 0] = np.nan
    for group in (2, 3, 24):
        rows = x.reshape(7, -1, group)
        linear = linearise(from_jaxpr(jax.make_jaxpr(jnp.argsort)(rows)), (True,))
        found = evaluate(linear.fwd, {linear.fwd.invars[0]: rows}, linear.outs)[0]
        assert found.dtype == jnp.argsort(rows).dtype
        np.testing.assert_array_equal(found, jnp.argsort(rows))


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.float32, jnp.uint8])
def test_indices_of_the_user(dtype):
    """What is sorted beside is a result as well, of any dtype."""
    x = np.random.default_rng(0).integers(-3, 3, (5, 24)).astype(np.float32)

    def fun(x):
        return lax.sort((x, lax.broadcasted_iota(dtype, x.shape, 1)), num_keys=1)

    linear = linearise(from_jaxpr(jax.make_jaxpr(fun)(x)), (True,))
    found = evaluate(linear.fwd, {linear.fwd.invars[0]: x}, linear.outs)
    for mine, true in zip(found, fun(x), strict=True):
        assert mine.dtype == true.dtype
        np.testing.assert_array_equal(mine, true)


def test_symbolic_sizes():
    """Along an axis whose size is a symbol, the order stays as it is."""

    def loss(w, x):
        return jnp.sum(jnp.sort(jnp.sort(pairs(x @ w), 0), 1) ** 3)

    ours = jax.jit(jax.grad(moonwalk_compile(loss)))
    spec = jax.ShapeDtypeStruct(jax.export.symbolic_shape("b, 24"), jnp.float32)
    w = np.float32(isometry(24, 24))
    exported = jax.export.export(ours)(w, spec)
    x = np.random.default_rng(0).standard_normal((9, 24)).astype(np.float32)
    true = jax.grad(loss)(w, x)
    np.testing.assert_allclose(exported.call(w, x), true, rtol=0, atol=1e-4)


def test_sorted_pairs_are_rebuilt_from_bits():
    weights = [np.float32(isometry(24, 24)) for _ in range(6)]
    x = np.random.default_rng(0).standard_normal((64, 24)).astype(np.float32)

    def loss(ws, x):
        for w in ws:
            x = pairs(layer(x, w))
        return jnp.mean((x - 1) ** 2)

    ours = moonwalk_compile(loss, strategies=FORCED)
    plan = ours.plan(weights, x)
    rebuilt = [row for row in plan.stages if row.strategy == "moonwalk"]
    assert len(rebuilt) >= 5
    assert sum(row.bits for row in rebuilt) == 5 * 64 * 12
    grads = jax.grad(ours)(weights, x), jax.grad(loss)(weights, x)
    for mine, true in zip(*grads, strict=True):
        np.testing.assert_allclose(mine, true, rtol=0, atol=1e-5 * np.abs(true).max())
