"""Sketches: a cotangent that is off reads off, whatever its shape."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mwc import guard, sketches

pytestmark = pytest.mark.usefixtures("quick")


reading = guard.reading


def passes(expected, found, limit, **options):
    return guard.compare(expected, found, limit, guard.unit_of([expected]), **options)


def taken(h, by_product):
    """The sketcher of h alone: as a CPU has it, or as other platforms have it."""
    take = sketches.sketcher(jnp.asarray(h), [h], 1)
    return take if by_product else dataclasses.replace(take, mixers={})


def test_one_row_of_a_tiny_scale_counts():
    """Sums over rows would hide a row of 1e-9; weights of rows do not."""
    draw = np.random.default_rng(5)
    h = np.float32(draw.standard_normal((64, 32)))
    h[7] *= 1e-9
    off = h.copy()
    off[7] *= 1.5
    take = sketches.sketcher(jnp.asarray(h), [h], 1)
    blind = sketches.sketcher(jnp.asarray(h), [h], 0)
    assert reading(take(h), take(off)) > 1e-2
    assert reading(blind(h), blind(off)) < 1e-7


def test_a_member_of_a_tiny_scale_counts():
    """Each token, or member of an ensemble, is a row where they do not mix."""
    draw = np.random.default_rng(5)
    h = np.float32(draw.standard_normal((16, 3, 8)))
    h[:, 2] *= 1e-9
    off = h.copy()
    off[:, 2] *= 1.5
    take, blind = (sketches.sketcher(jnp.asarray(h), [h], kept) for kept in (2, 1))
    assert reading(take(h), take(off)) > 1e-2
    assert reading(blind(h), blind(off)) < 1e-7


def test_rows_are_few_against_their_features():
    shapes = [(4, 5, 16), (4, 5, 8)]
    cts = [np.zeros(shape, np.float32) for shape in shapes]
    assert [sketches.row_axes(cts, kept) for kept in range(4)] == [0, 1, 2, 2]
    assert sketches.row_axes([*cts, np.zeros((4, 5, 7))], 2) == 1
    assert sketches.row_axes([np.zeros(3)], 1) == 1


SHAPES = [(64, 32), (7, 5), (1, 1), (17, 3, 4), (5,), (), (9000, 3), (5000, 70)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kept", [0, 1, 3])
def test_sketches(shape, kept):
    draw = np.random.default_rng(6)
    h = jnp.asarray(np.float32(draw.standard_normal(shape)))
    take = sketches.sketcher(h, [h], kept)
    assert take(h).shape == sketches.sketch_shape(h, take.rows)
    assert take(h).size <= 1024
    assert reading(take(h), take(h)) == 0
    noise = np.float32(1e-3 * draw.standard_normal(shape))
    seen = float(reading(take(h), take(h * (1 + noise))))
    assert 1e-5 < seen < 1e-2
    for bad in (np.nan, np.inf):
        spoiled = h.at[(0,) * h.ndim].set(bad)
        assert not passes(take(h), take(spoiled), 1.0)
        assert not passes(take(spoiled), take(h), 1.0)
        assert not reading(take(h), take(spoiled)) <= 1.0
    zero = take(0 * h)
    assert reading(zero, zero) == 0
    assert passes(zero, zero, 1e-5)
    assert not passes(zero, take(h), 1e-5)
    # What comes after a trip passes it on, however well it agrees.
    assert passes(take(h), take(h), 1e-5)
    assert not passes(take(h), take(h), 1e-5, before=jnp.asarray(False))


@pytest.mark.parametrize("by_product", [False, True])
@pytest.mark.parametrize(
    "shape", [(7, 5), (3, 2000), (1025, 64), (70, 1500), (1300, 3)]
)
def test_every_entry_is_in_a_sketch(shape, by_product):
    """A change of any one entry reads, whatever the shape."""
    h = jnp.asarray(np.random.default_rng(8).standard_normal(shape), jnp.float32)
    sums, pull = jax.vjp(taken(h, by_product), h)
    (slopes,) = pull(sums)
    assert np.all(slopes != 0)


@pytest.mark.parametrize("by_product", [False, True])
@pytest.mark.parametrize("count", [64, 256, 1023, 4096])
def test_rows_alike_do_not_cancel(count, by_product):
    """Of a mean over samples, say: noise must not read as much more than it is."""
    draw = np.random.default_rng(9)
    row = np.float32(draw.standard_normal(64))
    h = jnp.broadcast_to(row, (count, 64))
    off = h + np.float32(1e-3 * draw.standard_normal((count, 64)))
    take = taken(h, by_product)
    assert 3e-4 < reading(take(h), take(off)) < 3e-3


@pytest.mark.parametrize("scale", [1e-30, 1e-22, 1e22, 1e36])
def test_a_reading_does_not_depend_on_scale(scale):
    """Squares of tiny sums would vanish, and those of large ones overflow."""
    draw = np.random.default_rng(7)
    a, b = np.float32(draw.standard_normal((2, 1, 64)))
    seen = reading(jnp.asarray(a), jnp.asarray(b))
    scaled = [jnp.asarray(np.float32(scale) * x) for x in (a, b)]
    np.testing.assert_allclose(reading(*scaled), seen, rtol=1e-5)
    assert passes(*scaled, 1.01 * seen)
    assert not passes(*scaled, 0.99 * seen)


@pytest.mark.parametrize("scale", [1.0, 1e-9, 1e-11, 1e-13, 1e-25, 0.0])
def test_what_vanishes_beside_others_does_not_pass(scale):
    """Sketches are measured in the largest of a few; squares of tiny ones vanish."""
    s = jnp.asarray(np.float32(np.random.default_rng(8).standard_normal((1, 64))))
    tiny = np.float32(scale) * s
    unit = guard.unit_of([s, tiny])
    for factor in (1 + 2e-5, 1.1):
        assert not guard.compare(tiny, np.float32(factor) * tiny, 1e-5, unit)
    assert guard.compare(tiny, tiny, 1e-5, unit) == (scale >= 1e-11)
    assert not guard.compare(s, s, 1e-5, guard.unit_of([s, np.nan * s]))
    assert not guard.compare(s, s, 1e-5, guard.unit_of([s, np.inf * s]))


def test_zeros_pass_and_nothing_else_in_their_place():
    s = jnp.zeros((1, 64), jnp.float32)
    assert passes(s, s, 1e-5)
    for off in (1e-37, 1e-30, 1.0, np.inf, np.nan):
        assert not passes(s, s.at[0, 3].set(off), 1e-5)
        assert not passes(s.at[0, 3].set(off), s, 1e-5)


def test_sketches_unlike_share_a_unit():
    a, b = np.float32(np.random.default_rng(8).standard_normal((2, 1, 64)))
    unit = guard.unit_of([jnp.asarray(a), jnp.asarray(7 * b[:, :5])])
    top = max(np.abs(a).max(), np.abs(7 * b[:, :5]).max())
    np.testing.assert_allclose(unit, 1 / top, rtol=1e-6)


@pytest.mark.parametrize("limit", [1e-5, 2e-2, 6e-3])
def test_drift_is_above_one_where_a_gradient_is_nan(limit):
    """Also for readings that differ from the limit by rounding."""
    near = np.float32(limit) * (1 + np.arange(-64, 65) * np.float32(2**-24))
    one = jnp.asarray([[1, 0]], jnp.float32)
    found = jnp.stack([jnp.ones(len(near)), jnp.asarray(near)], axis=1)[:, None]
    fine = jax.vmap(lambda s: passes(one, s, np.float32(limit)))(found)
    assert fine.any()
    assert not fine.all()
    seen = jax.vmap(lambda s: reading(one, s))(found)
    over = guard.drift(seen, fine, np.float32(limit))
    np.testing.assert_array_equal(over > 1, ~fine)
    for bad in (np.nan, np.inf):
        fine = passes(one, bad * one, limit)
        assert not fine
        assert not guard.drift(reading(one, bad * one), fine, limit) <= 1
