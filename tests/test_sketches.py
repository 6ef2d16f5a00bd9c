"""Sketches: a cotangent that is off reads off, whatever its shape."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mwc import guard

pytestmark = pytest.mark.usefixtures("quick")


def compare(expected, found, limit=1.0, unit=None):
    return guard.compare(expected, found, limit, unit)


def reading(expected, found):
    return guard.reading(compare(expected, found))


def test_one_row_of_a_tiny_scale_counts():
    """Sums over rows would hide a row of 1e-9; weights of rows do not."""
    draw = np.random.default_rng(5)
    h = np.float32(draw.standard_normal((64, 32)))
    h[7] *= 1e-9
    off = h.copy()
    off[7] *= 1.5
    take = guard.sketcher(jnp.asarray(h), [h], 1)
    blind = guard.sketcher(jnp.asarray(h), [h], 0)
    assert reading(take(h), take(off)) > 1e-2
    assert reading(blind(h), blind(off)) < 1e-7


def test_a_member_of_a_tiny_scale_counts():
    """Each token, or member of an ensemble, is a row where they do not mix."""
    draw = np.random.default_rng(5)
    h = np.float32(draw.standard_normal((16, 3, 8)))
    h[:, 2] *= 1e-9
    off = h.copy()
    off[:, 2] *= 1.5
    take, blind = (guard.sketcher(jnp.asarray(h), [h], kept) for kept in (2, 1))
    assert reading(take(h), take(off)) > 1e-2
    assert reading(blind(h), blind(off)) < 1e-7


def test_rows_are_few_against_their_features():
    shapes = [(4, 5, 16), (4, 5, 8)]
    cts = [np.zeros(shape, np.float32) for shape in shapes]
    assert [guard.row_axes(cts, kept) for kept in range(4)] == [0, 1, 2, 2]
    assert guard.row_axes([*cts, np.zeros((4, 5, 7))], 2) == 1
    assert guard.row_axes([np.zeros(3)], 1) == 1


SHAPES = [(64, 32), (7, 5), (1, 1), (17, 3, 4), (5,), (), (9000, 3), (5000, 70)]
SHAPES += [(3, 2000)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kept", [0, 1, 3])
@pytest.mark.parametrize("narrow", [False, True])
def test_sketches(shape, kept, narrow):
    draw = np.random.default_rng(6)
    h = jnp.asarray(np.float32(draw.standard_normal(shape)))
    take = guard.sketcher(h, [h], kept, narrow)
    assert take(h).shape == guard.sketch_shape(h, take.rows, narrow)
    assert take(h).size <= max(1024, 0 if narrow else h.size / 512)
    assert reading(take(h), take(h)) == 0
    noise = np.float32(1e-3 * draw.standard_normal(shape))
    seen = float(reading(take(h), take(h * (1 + noise))))
    assert 1e-5 < seen < 1e-2
    for bad in (np.nan, np.inf):
        spoiled = h.at[(0,) * h.ndim].set(bad)
        assert not compare(take(h), take(spoiled)).fine
        assert not compare(take(spoiled), take(h)).fine
    zeros = compare(take(0 * h), take(0 * h), 1e-5)
    assert zeros.fine
    assert guard.reading(zeros) == 0
    assert not compare(take(0 * h), take(h), 1e-5).fine


def test_every_entry_is_in_a_sketch():
    """Whatever the shape: a change of any one entry reads."""
    for shape in [(7, 5), (3, 2000), (1025, 64), (1300, 3)]:
        h = jnp.asarray(np.random.default_rng(8).standard_normal(shape), jnp.float32)
        for narrow in (False, True):
            take = guard.sketcher(h, [h], 1, narrow)
            sums, pull = jax.vjp(take, h)
            (slopes,) = pull(sums)
            assert np.all(slopes != 0), (shape, narrow)


def test_what_comes_after_a_trip_does_not_pass():
    """However well it agrees."""
    a, b = jnp.ones((1, 8)), 2 * jnp.ones((1, 8))
    assert compare(a, a, 1e-5, compare(a, a, 1e-5).unit).fine
    tripped = compare(a, b, 1e-5)
    assert not tripped.fine
    after = compare(a, a, 1e-5, tripped.unit)
    assert not after.fine
    assert not compare(a, a, 1e-5, after.unit).fine


@pytest.mark.parametrize("unit", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("scale", [1e-30, 1e-22, 1e22, 1e30])
def test_a_reading_does_not_depend_on_scale(scale, unit):
    """Squares of tiny sums would vanish, and those of large ones overflow."""
    draw = np.random.default_rng(7)
    a, b = np.float32(draw.standard_normal((2, 1, 64)))
    seen = reading(jnp.asarray(a), jnp.asarray(b))
    a, b = (jnp.asarray(np.float32(scale) * x) for x in (a, b))
    for size in (None, jnp.float32(unit * scale)):
        found = compare(a, b, seen, size)
        np.testing.assert_allclose(guard.reading(found), seen, rtol=1e-5)
        assert compare(a, b, 1.01 * seen, size).fine
        assert not compare(a, b, 0.99 * seen, size).fine
        assert not compare(a, 0 * b, 0.5, size).fine


@pytest.mark.parametrize("unit", [1e-38, 1e-25, 1e25, 1e38])
def test_squares_that_vanish_do_not_pass(unit):
    """The stage before was of another size altogether: no number is trusted."""
    a = jnp.ones((1, 8))
    for found in (a, 0 * a, 2 * a):
        assert not compare(a, found, 0.5, jnp.float32(unit)).fine


@pytest.mark.parametrize("limit", [1e-5, 2e-2, 6e-3])
def test_drift_is_above_one_where_a_gradient_is_nan(limit):
    """Also for readings that differ from the limit by rounding."""
    ones = jnp.ones((1, 1))
    verdicts = []
    for n in range(-64, 65):
        near = np.float32(1 + limit * (1 + n * 2**-12))
        one = compare(ones, near * ones, np.float32(limit))
        over = guard.drift(guard.reading(one), one.fine, np.float32(limit))
        assert (over > 1) == ~one.fine
        verdicts.append(bool(one.fine))
    assert {*verdicts} == {True, False}
    for bad in (np.nan, np.inf):
        one = compare(ones, jnp.full((1, 1), bad), limit)
        assert not one.fine
        assert not guard.drift(guard.reading(one), one.fine, limit) <= 1
