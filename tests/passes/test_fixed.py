"""What is known of arrays that a function captured."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from passes.fixed import Fixed, measured
from passes.inline import inline
from tests.submersive import isometry, normal

ORDER = np.random.default_rng(0).permutation(6)


def made(fun, *captured):
    """The graph of a function, and what `Fixed` says of its result."""
    graph = inline(jax.make_jaxpr(fun)(*captured))
    pairs = zip(graph.invars, captured, strict=True)
    return graph, Fixed(graph, dict(pairs))(graph.outvars)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "fun",
    [
        lambda order: order[::-1],
        lambda order: jnp.where(order > 2, order, 5 - order),
        lambda order: jax.random.permutation(jax.random.key(0), order),
        lambda order: jnp.roll(jnp.arange(6), order[0]),
    ],
)
def test_what_follows_from_captured_arrays(fun):
    graph, found = made(fun, jnp.asarray(ORDER))
    np.testing.assert_array_equal(found[graph.outvars[0]], fun(jnp.asarray(ORDER)))


def test_keys():
    key = jax.random.key(3)
    _, found = made(lambda key: jax.random.permutation(key, 6), key)
    (order,) = found.values()
    np.testing.assert_array_equal(order, jax.random.permutation(key, 6))


def test_what_is_not_looked_up():
    def fun(order, weight, x):
        return order + x, weight * 2, order * 2

    graph = inline(jax.make_jaxpr(fun)(ORDER, normal(3, 3), np.int64(1)))
    captured = dict(zip(graph.invars, (ORDER, normal(3, 3)), strict=False))
    assert [*Fixed(graph, captured)(graph.outvars)] == [graph.outvars[2]]


def test_what_cannot_be_read():
    order = jnp.asarray(ORDER)
    graph = inline(jax.make_jaxpr(lambda x: x + 1)(order))
    order.delete()
    assert not Fixed(graph, {graph.invars[0]: order})(graph.outvars)


def test_equal_arrays_are_one_object():
    def fun(a, b, c):
        return a, b, c

    graph, found = made(fun, ORDER, ORDER.copy(), ORDER[::-1].copy())
    a, b, c = (found[v] for v in graph.outvars)
    assert a is b
    assert a is not c


def fact_of(matrix):
    graph = inline(jax.make_jaxpr(lambda w: w)(matrix))
    return measured({graph.invars[0]: matrix}).get(graph.invars[0])


@pytest.mark.parametrize("shape", [(6, 6), (9, 4), (4, 9)])
@pytest.mark.parametrize("scale", [1.0, 0.25, 3.7])
def test_orthonormal_matrices(shape, scale):
    tall = isometry(*sorted(shape, reverse=True)) * np.sqrt(scale)
    matrix = np.float32(tall if tall.shape == shape else tall.T)
    fact = fact_of(matrix)
    assert fact is not None
    turned = np.transpose(matrix, fact.axes).astype(np.float64)
    np.testing.assert_allclose(
        turned.T @ turned, fact.scale * np.eye(min(shape)), atol=1e-6 * scale
    )
    assert fact.scale == pytest.approx(scale, rel=1e-6)


def test_scales_are_not_rounded_away():
    """What a number is rounded to is near a ratio, and not it."""
    scale = np.float64(np.float32(np.sqrt(15 / 8))) ** 2
    exact = np.eye(4, dtype=np.float32)[[1, 0, 3, 2]]
    assert fact_of(exact * np.float32(np.sqrt(15 / 8))).scale == pytest.approx(
        scale, rel=1e-12
    )
    assert fact_of(exact).scale == 1


def test_in_double_precision(x64):
    """A factorisation in float64 is off by more units in the last place."""
    assert fact_of(isometry(64, 64)) is not None


def test_stacks():
    both = np.float32(np.stack([isometry(5, 3), isometry(5, 3)]))
    assert fact_of(both).axes == (1, 2)
    assert fact_of(both * np.float32([[[1]], [[2]]])) is None


@pytest.mark.parametrize(
    "matrix",
    [
        normal(6, 6),
        np.zeros((6, 6)),
        isometry(6, 6) + np.diag([0, 0, 0, 0, 0, 1e-5]),
        isometry(6, 6) * np.array([1, 1, 1, 1, 1, 1 + 1e-5]),
        np.full((6, 6), np.nan),
        np.full((6, 6), np.inf),
        np.diag([1, 1, 1, 1, 1, 0]),
        isometry(6, 6)[:, :1],
    ],
)
def test_other_matrices(matrix):
    with np.errstate(invalid="ignore"):
        assert fact_of(np.float32(matrix)) is None
