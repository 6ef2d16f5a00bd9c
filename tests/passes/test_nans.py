"""NaN throughout: what is found has no other entry, and what layers need is found."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from passes.graph import from_jaxpr
from passes.inline import inline
from passes.nans import all_nan

pytestmark = pytest.mark.usefixtures("quick")

B = jnp.asarray([[0.0, 1, -2], [jnp.inf, 0, 4]], jnp.float32)

# Of x, 2 x 3 and NaN throughout, and y of numbers; and whether that is found.
FOUND = {
    "layer": lambda x, y: jnp.abs(x + y) @ y.T,
    "other side": lambda x, y: y.T @ x,
    "batches": lambda x, y: lax.dot_general(
        x[None], y[None], (((2,), (2,)), ((0,), (0,)))
    ),
    "leaky": lambda x, y: lax.select_n(y > 0, -x, x / 3),
    "sign of itself": lambda x, y: jnp.where(x > 0, x * y, x - y),
    "times zero": lambda x, y: 0 * x,
    "over infinity": lambda x, y: x / jnp.float32(jnp.inf),
    "sums": lambda x, y: jnp.sum(x, 0),
    "moved": lambda x, y: jnp.broadcast_to(x.T[::-1].reshape(6)[1:3], (4, 2)),
    "narrower": lambda x, y: x.astype(jnp.bfloat16).astype(jnp.float32),
    "square": lambda x, y: jnp.square(x),
}
OPEN = {
    "other": lambda x, y: jnp.abs(y),
    "some": lambda x, y: jnp.where(y > 0, x, y),
    "part": lambda x, y: jnp.concatenate([x, y]),
    "padded": lambda x, y: jnp.pad(x, 1),
    "power": lambda x, y: x**0 + y * 0,
    "largest": lambda x, y: jnp.maximum(x, y),
    "no number": lambda x, y: (x > 0).astype(jnp.float32),
    "integer": lambda x, y: x.astype(jnp.int32),
    "of eight bits": lambda x, y: x.astype(jnp.float8_e4m3fn),
    "empty sum": lambda x, y: jnp.sum(x[:0], 0),
    "empty product": lambda x, y: x[:0].T @ y[:0],
    "window": lambda x, y: lax.reduce_window(x, 0.0, lax.add, (2, 2), (1, 1), "SAME"),
}


def result(fun):
    """Whether its result is found, and what it is."""
    graph = inline(jax.make_jaxpr(fun)(B, B).jaxpr)
    found = all_nan(graph, graph.invars[:1]) & {*graph.outvars}
    return bool(found), jax.jit(fun)(jnp.full_like(B, jnp.nan), B)


@pytest.mark.parametrize("name", FOUND)
def test_what_is_found_is_nan_throughout(name):
    found, x = result(FOUND[name])
    assert found
    assert x.size
    assert np.isnan(x).all()


@pytest.mark.parametrize("name", OPEN)
def test_what_may_be_something_else_is_not_found(name):
    found, _ = result(OPEN[name])
    assert not found


def test_what_is_known_is_anything():
    graph = from_jaxpr(jax.make_jaxpr(lambda x: jnp.abs(x) + 1)(B).jaxpr)
    (middle,) = graph.eqns[0].outvars
    assert all_nan(graph, graph.invars) == {*graph.invars, middle, *graph.outvars}
    assert all_nan(graph, graph.invars, [middle]) == {*graph.invars}
