"""The guard: a rebuilt gradient is within `tolerance`, or NaN; exact chains pass."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.harmed import BATCH, WIDTH, damaged, exact, odd, programs, samples
from tests.submersive import KINKS, mean_square

pytestmark = pytest.mark.usefixtures("quick")

# Rows and features. With few rows what weights make is refined, with many they are
# polished themselves; of many of both a CPU takes sketches by products.
SIZES = (BATCH, WIDTH), (40, WIDTH), (64, 64)
# Of float32: the tolerance.
LIMIT = 1e-5

quick_profile = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
long_profile = settings(quick_profile, max_examples=500, derandomize=False)


@functools.cache
def natural(kink):
    """Compiled: what each gradient sums, by its size; see `tolerance`."""

    def taps(params, zeros, batch):
        x, y = batch
        states = []
        for w, b, zero in zip(*params, zeros, strict=True):
            states.append(x)
            x = KINKS[kink](x @ w + b + zero)
        return mean_square(x, y), states

    def sizes(params, batch):
        zeros = jnp.zeros((len(params[0]), *batch[0].shape), batch[0].dtype)
        hs, states = jax.grad(taps, 1, has_aux=True)(params, zeros, batch)
        h, x = jnp.linalg.norm(hs, axis=-1), jnp.linalg.norm(jnp.stack(states), axis=-1)
        return jnp.sum(x * h, -1), jnp.sum(h, -1)

    return jax.jit(sizes)


HARM = ("none", "signs", "rank one", "one weight", "one entry", "scaled")
HARM += ("zero", "rank-deficient", "permutations")
DATA = ("normal", "a row scaled", "rows scaled", "all scaled", "zero rows", "ties")
DATA += ("nan", "inf")
cases = st.tuples(
    st.integers(0, 2**20),
    st.sampled_from(["abs", "max-min"]),
    st.booleans(),
    st.sampled_from(SIZES),
    st.sampled_from(HARM),
    st.floats(-7, -2),
    st.sampled_from(DATA),
    st.floats(-12, 2),
)


def arranged(params, loop):
    return params if loop else [*zip(*params, strict=True)]


def stacks(grads, loop):
    return grads if loop else tuple(np.stack(g) for g in zip(*grads, strict=True))


def worst(case):
    """The largest error of a gradient over the size of what it sums; 0 for NaN."""
    seed, kink, loop, (rows, width), harm, size, kind, scale = case
    draw = np.random.default_rng(seed)
    w, b = exact(draw, width=width)
    x, y = samples(draw, rows, width)
    w, x = damaged(draw, w, harm, 10.0**size), odd(draw, x, kind, 10.0**scale)
    if kind == "ties" or harm == "permutations":
        b = np.zeros_like(b)
    ours, backprop = programs(kink, loop)
    args = arranged((w, b), loop), (x, y)
    _, grads, drift = ours.value_and_grad(*args, with_drift=True)
    mine, true = (stacks(g, loop) for g in (grads, backprop(*args)))
    if drift.tripped:
        # A loop is NaN; of an unrolled run what comes after the trip. The last layer is
        # in none, nor is the bias before it: a stage begins with that of another layer.
        ends = [np.isnan(g).reshape(len(g), -1).all(1) for g in mine]
        if not loop:
            ends = [ends[0][:-1], ends[1][:-2]]
        assert ends[0][-1]
        for one in ends:
            assert np.all(np.diff(one.astype(int)) >= 0)
            assert not loop or one.all()
    with jax.enable_x64(True):
        wide = jax.tree.map(np.float64, ((w, b), (x, y)))
        sums = [np.asarray(s) for s in natural(kink)(*wide)]
    found = 0.0
    for one, two, total in zip(mine, true, sums, strict=True):
        for g, t, s in zip(np.float64(one), np.float64(two), total, strict=True):
            spoiled = np.isnan(g)
            assert np.all(spoiled | np.isfinite(t) | (g == t)), case
            fine = ~spoiled & np.isfinite(t) & np.isfinite(s)
            gap = np.linalg.norm(np.where(fine, g - t, 0))
            found = max(found, gap / s if gap and s else gap)
    return found


@quick_profile
@given(cases)
def test_within_tolerance_or_nan(case):
    assert worst(case) <= LIMIT, case


@pytest.mark.slow
@long_profile
@given(cases)
def test_within_tolerance_or_nan_at_length(case):
    assert worst(case) <= LIMIT, case


@pytest.mark.parametrize(("rows", "width"), SIZES)
@pytest.mark.parametrize("loop", [False, True])
@pytest.mark.parametrize("harm", ["signs", "scaled", "one weight", "one entry"])
def test_what_is_a_little_wrong_is_mended(harm, loop, rows, width):
    draw = np.random.default_rng(0)
    w, b = exact(draw, width=width)
    batch = samples(draw, rows, width)
    ours, _ = programs("abs", loop)
    args = arranged((damaged(draw, w, harm, 3e-3), b), loop), batch
    _, grads, drift = ours.value_and_grad(*args, with_drift=True)
    assert not drift.tripped
    assert ours.check(*args).max_error < 1e-5
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


@pytest.mark.parametrize(("rows", "width"), SIZES)
@pytest.mark.parametrize("loop", [False, True])
@pytest.mark.parametrize("harm", ["zero", "rank-deficient", "signs", "scaled"])
def test_what_is_badly_wrong_trips(harm, loop, rows, width):
    draw = np.random.default_rng(0)
    w, b = exact(draw, width=width)
    w = damaged(draw, w, harm, 1.0)
    ours, _ = programs("abs", loop)
    args = arranged((w, b), loop), samples(draw, rows, width)
    _, grads, drift = ours.value_and_grad(*args, with_drift=True)
    assert drift.tripped
    assert drift.worst > 1
    assert any(np.isnan(g).all() for g in jax.tree.leaves(grads))


@pytest.mark.parametrize("kink", ["abs", "max-min", "leaky 0.9"])
@pytest.mark.parametrize("depth", [3, 40])
def test_exact_chains_do_not_trip(kink, depth):
    """200 chains in all."""
    ours, backprop = programs(kink, True, depth)
    for seed in range(34):
        draw = np.random.default_rng(seed)
        args = exact(draw, depth), samples(draw)
        _, grads, drift = ours.value_and_grad(*args, with_drift=True)
        assert not drift.tripped, (seed, float(drift.worst))
        assert drift.worst < 0.5
        for mine, true in zip(grads, backprop(*args), strict=True):
            limit = 1e-4 * np.max(np.abs(true))
            np.testing.assert_allclose(mine, true, rtol=0, atol=limit)


@pytest.mark.parametrize("loop", [False, True])
@pytest.mark.parametrize("kink", ["abs", "leaky 0.9"])
def test_padded_rows(kink, loop):
    """Rows of zeros stay at the kink; their targets may or may not be zero."""
    draw = np.random.default_rng(3)
    w, b = exact(draw)
    ours, backprop = programs(kink, loop)
    for count in (3, BATCH):
        for blank in (False, True):
            x, y = (z.copy() for z in samples(draw))
            x[:count] = 0
            y[:count] *= not blank
            args = arranged((w, 0 * b), loop), (x, y)
            _, grads, drift = ours.value_and_grad(*args, with_drift=True)
            assert not drift.tripped
            pairs = zip(*map(jax.tree.leaves, (grads, backprop(*args))), strict=True)
            for mine, true in pairs:
                np.testing.assert_allclose(mine, true, rtol=0, atol=1e-5)
