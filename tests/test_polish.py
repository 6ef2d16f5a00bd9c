"""Polish: weights that have moved a little get right inverses, others stay."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mwc.nodes.claims import Claim, Layout, batches, together
from mwc.nodes.looks import Looks
from mwc.nodes.polish import gap_of, polished, refined, signs_of, through, times_of
from tests.submersive import isometry

pytestmark = pytest.mark.usefixtures("quick")


def a_claim(*shape, axis=1, scale=1.0, given=True, rounded=False):
    (var,) = jax.make_jaxpr(lambda w: w)(jnp.zeros(shape, jnp.float32)).jaxpr.invars
    return Claim(var, Layout((), (1 - axis,), (axis,)), scale, given, rounded)


def mended(weights, of):
    stack = jnp.stack(weights)
    return polished(stack, of, gap_of(stack, of, stack))


def times_off(weights, of):
    """`times_of` weights that are looked at together."""
    rows = signs_of(of, weights[0])
    for weight in weights:
        rows = through(rows, weight, of)
    return times_of(rows, of, len(weights))


def refinements(weights, of, h_in):
    """What each weight M makes of h_in, refined; all are checked at once."""
    times = times_off(weights, of)
    found = []
    for m in weights:
        pull, push = functools.partial(jnp.matmul, m), lambda h, m=m: m.T @ h / of.scale
        found.append(refined(push(h_in), h_in, times, pull, push))
    return int(times), found


def assert_right_inverse(weight, found, axis, scale, atol):
    m, r = (np.asarray(x if axis else x.T, np.float64) for x in (weight, found))
    np.testing.assert_allclose(m.T @ r / scale, np.eye(m.shape[1]), rtol=0, atol=atol)


def moved_weights(n, k, scale, axis, sizes, dtype):
    """Of [n, k] or turned, off by so much in each entry."""
    noise = np.random.default_rng(0).standard_normal((len(sizes), n, k))
    moved = isometry(n, k) + np.array(sizes)[:, None, None] * noise
    return jnp.asarray(np.sqrt(scale) * moved, dtype).swapaxes(1, 1 if axis else 2)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_newton_steps(axis, scale):
    n, k = 12, 7
    given = moved_weights(n, k, scale, axis, [0, 1e-4, 1e-2], jnp.float32)
    made = mended(list(given), a_claim(*given[0].shape, axis=axis, scale=scale))
    for weight, found in zip(given, made, strict=True):
        assert_right_inverse(weight, found, axis, scale, atol=3e-6)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_rounded_weights(axis, scale):
    """Without a look at them: what the terms leave is E^4."""
    n, k = 12, 7
    given = moved_weights(n, k, scale, axis, [0, 1e-3, 1e-2], jnp.bfloat16)
    of = a_claim(*given[0].shape, axis=axis, scale=scale, rounded=True)
    assert gap_of(given, of, given, loose=True) is None
    assert gap_of(given, of, given) is not None
    made = polished(given.astype(jnp.float32), of, None)
    for weight, found in zip(given, made, strict=True):
        tall = np.asarray(weight if axis else weight.T, np.float64)
        error = np.linalg.norm(tall.T @ tall / scale - np.eye(k), 2)
        assert 1e-3 < error < 0.15
        assert_right_inverse(weight, found, axis, scale, atol=error**4 + 1e-6)


@pytest.mark.parametrize("scale", [1.0, 4.0])
@pytest.mark.parametrize("size", [0, 1e-6, 1e-4, 1e-2])
@pytest.mark.parametrize(("many", "n"), [(1, 12), (3, 7)])
def test_refined(many, n, size, scale):
    """As little work as the error needs, and h J is what it was."""
    k = 7
    draw = np.random.default_rng(0)
    exact = np.stack([isometry(n, k) for _ in range(many)])
    moved = exact + size * draw.standard_normal(exact.shape)
    weights = jnp.asarray(np.sqrt(scale) * np.swapaxes(moved, 1, 2), jnp.float32)
    h_in = jnp.asarray(draw.standard_normal((k, 5)), jnp.float32)
    times, found = refinements(weights, a_claim(k, n, axis=0, scale=scale), h_in)
    assert times == 0 if size == 0 else 2 <= times <= 7
    assert times <= 2 or size > 1e-6
    for weight, h in zip(np.asarray(weights, np.float64), found, strict=True):
        np.testing.assert_allclose(weight @ h, h_in, atol=3e-6)


@pytest.mark.parametrize("scale", [1.0, 4.0, 1e-3])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(("n", "k"), [(8, 8), (20, 20), (128, 128), (160, 96)])
def test_exact_and_moved_weights_are_told_apart(n, k, axis, scale):
    """Rounding is no error; that of one weight of eight is, also of one row alone."""
    of = a_claim(*((n, k) if axis else (k, n)), axis=axis, scale=scale)
    many = 8 if n == k else 1
    draw = np.random.default_rng(1)
    for _ in range(20):
        exact = np.stack([isometry(n, k) for _ in range(many)])
        at = draw.integers(many), draw.integers(n)
        row, some, all_ = exact.copy(), exact.copy(), exact.copy()
        row[at] *= 1 + 2e-5 * np.sqrt(k)
        some[at[0]] += 6e-6 / np.sqrt(n) * draw.standard_normal((n, k))
        all_ *= 1 + 1e-6
        for given, moved in ((exact, False), (row, True), (some, True), (all_, True)):
            turned = np.sqrt(scale) * given.swapaxes(1, 1 if axis else 2)
            weights = list(jnp.asarray(turned, jnp.float32))
            assert bool(times_off(weights, of)) == moved


def test_each_weight_of_a_run_is_looked_at_once():
    """In turn from the last: some are not square, two of them are of one stage."""
    draw = np.random.default_rng(2)
    shapes = [(9, 9)] * 7 + [(9, 6), (6, 6), (6, 6)]
    claims = [[a_claim(*shape)] for shape in shapes]
    claims[3] = [claims[3][0], a_claim(9, 9)]
    off = {(1, 0), (3, 1), (7, 0)}
    weights = {
        (i, j): isometry(*shapes[i]) + 1e-4 * ((i, j) in off) * draw.normal(size=())
        for i, own in enumerate(claims)
        for j in range(len(own))
    }
    found = batches(together(claims, 1))
    looks = Looks(found)
    for i in reversed(range(len(claims))):
        rows = looks.rows(i, claims[i], jnp.zeros(()))
        assert all(r is not None for r in rows)
        passed = [
            through(r, jnp.asarray(weights[i, j], jnp.float32), of)
            for j, (r, of) in enumerate(zip(rows, claims[i], strict=True))
        ]
        looks.passed(i, claims[i], passed)
    assert len(looks.times) == len(weights)
    for batch in found:
        pairs = [(i, claims[i].index(of)) for ((i, of),) in batch]
        times = {int(looks.times[i, claims[i][j].var]) for i, j in pairs}
        assert times != {0} if off & {*pairs} else times == {0}


def test_refined_leaves_what_is_far_off():
    h_in = jnp.ones((4, 2))
    for fill in (0, np.nan, 3):
        weight = jnp.full((4, 5), fill, jnp.float32)
        times, (h,) = refinements([weight], a_claim(4, 5, axis=0), h_in)
        assert times == (0 if np.isnan(fill) else 7)
        assert not np.max(np.abs(weight @ h - h_in)) < 0.5


def test_exact_weights_stay():
    weights = [jnp.asarray(isometry(9, 9), jnp.float32) for _ in range(2)]
    for one, found in zip(weights, mended(weights, a_claim(9, 9)), strict=True):
        np.testing.assert_array_equal(one, found)


def test_what_is_far_off_is_left_to_the_guard():
    for fill in (0, np.nan):
        (found,) = mended([jnp.full((5, 4), fill, jnp.float32)], a_claim(5, 4))
        np.testing.assert_array_equal(found, fill)
    moved = isometry(5, 4) + 1e-3
    far, near = mended([3 * jnp.ones((5, 4)), jnp.asarray(moved)], a_claim(5, 4))
    assert not np.max(np.abs(3 * np.ones((4, 5)) @ far - np.eye(4))) < 0.5
    np.testing.assert_allclose(moved.T @ near, np.eye(4), atol=3e-6)


LAYOUTS = [
    Layout((0,), (1,), (2,)),
    Layout((1,), (2,), (0,)),
    Layout((), (0, 2), (1,)),
    Layout((), (1,), (0, 2)),
    Layout((), (2,), (0, 1)),
]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_of_more_axes(layout):
    """As matrices and back; what is mended is right for each matrix."""
    shape = np.zeros(3, int)
    shape[[*layout.batch]] = 3
    shape[[*layout.rows]] = 6 if len(layout.rows) == 1 else 3
    shape[[*layout.columns]] = 4 if len(layout.columns) == 1 else 2
    n, k = (int(np.prod(shape[[*axes]])) for axes in layout[1:])
    weight = jnp.zeros(shape)
    many = layout.matrices(weight).shape[:-2]
    exact = np.stack([isometry(n, k) for _ in range(3)])[: math.prod(many) or 1]
    noise = 1e-3 * np.random.default_rng(0).standard_normal(exact.shape)
    exact = (exact + noise).reshape(*many, n, k)
    tall = exact if layout.axis else np.swapaxes(exact, -1, -2)
    weights = [layout.weight(jnp.asarray(tall, jnp.float32), weight)] * 2
    assert weights[0].shape == weight.shape
    np.testing.assert_allclose(layout.matrices(weights[0]), tall, rtol=1e-6)
    (var,) = jax.make_jaxpr(lambda w: w)(weight).jaxpr.invars
    of = Claim(var, layout, 1.0, True)
    for found in (*mended(weights, of), *polished(jnp.stack(weights), of, None)):
        right = layout.matrices(found)
        right = right if layout.axis else np.swapaxes(right, -1, -2)
        product = np.swapaxes(exact, -1, -2) @ np.asarray(right, np.float64)
        np.testing.assert_allclose(
            product, np.broadcast_to(np.eye(k), product.shape), atol=3e-6
        )


def test_groups_have_every_claim():
    square, tall = a_claim(4, 4), a_claim(6, 4)
    claims = [(square, tall), (square,), (square,), (), (a_claim(4, 4, scale=2.0),)]
    groups = together(claims, most=2 * 4 * 16)
    found = [pair for group in groups for pair in group]
    assert found == [(i, one) for i, some in enumerate(claims) for one in some]
    assert [len(group) for group in groups] == [1, 1, 2, 1]


def test_batches_have_every_group():
    """Square arguments by themselves are checked together; others are not."""
    made, given = a_claim(4, 4, given=False), a_claim(4, 4)
    tall = a_claim(6, 4)
    claims = [(one,) for one in [given] * 14 + [made] * 2 + [tall] * 2]
    groups = together(claims, most=4 * 16)
    found = batches(groups)
    assert [group for some in found for group in some] == groups
    assert [len(some) for some in found] == [7, 7, 1, 1, 1, 1]
    pairs = together(claims, most=2 * 4 * 16)
    assert [len(some) for some in batches(pairs)] == [1] * len(pairs)
