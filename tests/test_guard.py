"""The guard: a rebuilt gradient is within `tolerance`, or NaN; exact chains pass."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import mwc
from mwc import moonwalk_compile
from tests.submersive import (
    FORCED,
    KINKS,
    chain,
    isometry,
    layer,
    mean_square,
    over_layers,
)

pytestmark = pytest.mark.usefixtures("quick")

DEPTH, WIDTH, BATCH = 6, 8, 12
# With few rows what weights make is refined, with many they are polished themselves.
ROWS = BATCH, 40
# Of float32: the tolerance.
LIMIT = 1e-5

quick_profile = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
long_profile = settings(quick_profile, max_examples=500, derandomize=False)


def loss_of(kink, loop):
    return over_layers(kink) if loop else chain(kink)


@functools.cache
def programs(kink, loop, depth=DEPTH):
    """Gradients rebuilt and by backpropagation, compiled."""
    del depth  # each is compiled for itself
    loss = loss_of(kink, loop)
    ours = moonwalk_compile(loss, strategies=FORCED)
    return ours, jax.jit(jax.grad(loss))


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


def exact(draw, depth=DEPTH):
    """Weights that are orthonormal to rounding, and biases."""
    w = np.linalg.qr(draw.standard_normal((depth, WIDTH, WIDTH)))[0]
    return np.float32(w), np.float32(0.1 * draw.standard_normal((depth, WIDTH)))


def samples(draw, batch=BATCH):
    return tuple(np.float32(draw.standard_normal((2, batch, WIDTH))))


def damaged(draw, w, how, size):
    """Weights as training may leave them."""
    at = draw.integers(len(w))
    w = w.copy()
    if how == "signs":
        w += size * np.sign(draw.standard_normal(w.shape))
    elif how == "rank one":
        u, v = np.sign(draw.standard_normal((2, len(w), WIDTH)))
        w += size * u[:, :, None] * v[:, None, :]
    elif how == "one weight":
        w[at] += size * np.sign(draw.standard_normal(w[at].shape))
    elif how == "one entry":
        w[at, 0, 0] += size
    elif how == "scaled":
        w *= 1 + size
    elif how == "zero":
        w[at] = 0
    elif how == "rank-deficient":
        w[at, :, 1] = w[at, :, 0]
    elif how == "permutations":
        w = np.stack([np.eye(WIDTH)[draw.permutation(WIDTH)] for _ in w])
    return np.float32(w)


def odd(draw, x, how, scale):
    """Data with rows of other sizes, ties, and what is no number."""
    x = x.copy()
    if how == "a row scaled":
        x[draw.integers(len(x))] *= scale
    elif how == "rows scaled":
        x *= 10.0 ** draw.uniform(-12, 2, (len(x), 1))
    elif how == "all scaled":
        x *= scale
    elif how == "zero rows":
        x[:3] = 0
    elif how == "ties":
        x = np.round(x)
    elif how in ("nan", "inf"):
        x[draw.integers(len(x)), draw.integers(WIDTH)] = float(how)
    return np.float32(x)


HARM = ("none", "signs", "rank one", "one weight", "one entry", "scaled")
HARM += ("zero", "rank-deficient", "permutations")
DATA = ("normal", "a row scaled", "rows scaled", "all scaled", "zero rows", "ties")
DATA += ("nan", "inf")
cases = st.tuples(
    st.integers(0, 2**20),
    st.sampled_from(["abs", "max-min"]),
    st.booleans(),
    st.sampled_from(ROWS),
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
    seed, kink, loop, rows, harm, size, kind, scale = case
    draw = np.random.default_rng(seed)
    w, b = exact(draw)
    x, y = samples(draw, rows)
    w, x = damaged(draw, w, harm, 10.0**size), odd(draw, x, kind, 10.0**scale)
    if kind == "ties" or harm == "permutations":
        b = np.zeros_like(b)
    ours, backprop = programs(kink, loop)
    args = arranged((w, b), loop), (x, y)
    _, grads, drift = ours.value_and_grad(*args, with_drift=True)
    mine, true = (stacks(g, loop) for g in (grads, backprop(*args)))
    if drift.tripped:
        # A loop is NaN; of an unrolled run what comes after the trip. Its stages begin
        # with the bias of the layer before, so the last bias is in none.
        ends = [np.isnan(g).reshape(len(g), -1).all(1) for g in mine]
        assert ends[0][-1]
        for one in (ends[0], ends[1][:-1]):
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


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("loop", [False, True])
@pytest.mark.parametrize("harm", ["signs", "scaled", "one weight", "one entry"])
def test_what_is_a_little_wrong_is_mended(harm, loop, rows):
    draw = np.random.default_rng(0)
    w, b = exact(draw)
    batch = samples(draw, rows)
    ours, _ = programs("abs", loop)
    args = arranged((damaged(draw, w, harm, 3e-3), b), loop), batch
    _, grads, drift = ours.value_and_grad(*args, with_drift=True)
    assert not drift.tripped
    assert ours.check(*args).max_error < 1e-5
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("loop", [False, True])
@pytest.mark.parametrize("harm", ["zero", "rank-deficient", "signs", "scaled"])
def test_what_is_badly_wrong_trips(harm, loop, rows):
    draw = np.random.default_rng(0)
    w, b = exact(draw)
    w = damaged(draw, w, harm, 1.0)
    ours, _ = programs("abs", loop)
    args = arranged((w, b), loop), samples(draw, rows)
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


# Options and reports ---------------------------------------------------------------


def harmed(size):
    draw = np.random.default_rng(1)
    w, b = exact(draw)
    return [*zip(damaged(draw, w, "rank one", size), b, strict=True)], samples(draw)


def test_drift_names_the_first_stage_that_trips():
    ours, _ = programs("abs", False)
    params, batch = harmed(0)
    params[3] = (params[3][0] * np.float32(2), params[3][1])
    value, grads, drift = ours.value_and_grad(params, batch, with_drift=True)
    assert np.isfinite(value)
    assert drift.tripped
    rows = ours.plan(params, batch).stages
    assert rows[int(drift.stage)].strategy == "moonwalk"
    assert int(drift.stage) == 3
    assert 1 < drift.worst < np.inf
    leaves = jax.tree.leaves(drift)
    assert [np.asarray(x).shape for x in leaves] == [(), (), ()]
    assert np.isnan(grads[-2][0]).all()


def test_gradients_before_a_trip_are_right():
    """Their cotangents passed; those of the tripped stage and later are NaN."""
    ours, backprop = programs("abs", False)
    params, batch = harmed(0)
    params[3] = (params[3][0] * np.float32(2), params[3][1])
    _, grads, drift = ours.value_and_grad(params, batch, with_drift=True)
    assert drift.tripped
    mine, true = (jax.tree.leaves(g) for g in (grads, backprop(params, batch)))
    spoiled = [np.isnan(g).all() for g in mine]
    first = spoiled.index(True)
    # A stage may begin with the bias of the layer before; the last layer is none.
    assert first in (5, 6)
    assert all(spoiled[first:-2])
    for one, two in zip(mine[:first], true[:first], strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-6)


def test_drift_without_a_guard():
    params, batch = harmed(0)
    ours = moonwalk_compile(chain(), strategies=("stored",))
    _, _, drift = ours.value_and_grad(params, batch, with_drift=True)
    assert not drift.tripped
    assert int(drift.stage) == -1


def test_raise_is_an_error_outside_and_nan_inside():
    ours = moonwalk_compile(chain(), strategies=FORCED, on_drift="raise")
    good, batch = harmed(0)
    value, _ = ours.value_and_grad(good, batch)
    assert np.isfinite(value)
    bad, _ = harmed(0.3)
    with pytest.raises(mwc.MoonwalkDriftError, match=r"(?s)times the limit.*retract"):
        ours.value_and_grad(bad, batch)
    inside = jax.jit(lambda p: ours.value_and_grad(p, batch)[1])(bad)
    assert np.isnan(inside[-2][0]).all()
    assert np.isnan(jax.jit(jax.grad(ours))(bad, batch)[-2][0]).all()


def test_data_that_are_no_numbers_are_not_blamed_on_weights():
    ours = moonwalk_compile(chain(), strategies=FORCED, on_drift="raise")
    params, (x, y) = harmed(0)
    with pytest.raises(mwc.MoonwalkDriftError, match=r"(?s)not finite.*debug_nans"):
        ours.value_and_grad(params, (jnp.asarray(x).at[0, 0].set(jnp.nan), y))


def test_recompute_says_that_it_is_not_there():
    with pytest.raises(mwc.MoonwalkError, match=r"(?s)recompute.*remedy.*raise"):
        moonwalk_compile(chain(), on_drift="recompute")


@pytest.mark.parametrize("wrong", ["off", 3])
def test_other_values_are_errors(wrong):
    with pytest.raises(mwc.MoonwalkError, match="on_drift"):
        moonwalk_compile(chain(), on_drift=wrong)


def test_tolerance_moves_the_limit():
    params, batch = harmed(0.02)
    for tolerance, trips in [(1e-5, True), (1e-1, False)]:
        ours = moonwalk_compile(chain(), strategies=FORCED, tolerance=tolerance)
        drift = ours.value_and_grad(params, batch, with_drift=True)[2]
        assert bool(drift.tripped) is trips
    # What rounding alone would break is not rebuilt.
    plan = moonwalk_compile(chain(), tolerance=1e-8).plan(params, batch)
    assert all(stage.strategy != "moonwalk" for stage in plan.stages)


def test_check_reads_the_guard():
    ours, _ = programs("abs", False)
    report = ours.check(*harmed(0))
    assert report.ok
    assert report.headroom > 2
    assert "headroom" in str(report)
    assert "stage" in report.worst_stage
    worse = ours.check(*harmed(0.3))
    assert not worse.ok
    assert worse.headroom < 1


def test_two_isometries_of_other_shapes():
    """A narrowing run takes sketches of every width that occurs."""
    ws = [np.float32(isometry(m, n)) for m, n in [(12, 9), (9, 7), (7, 4)]]
    draw = np.random.default_rng(7)
    batch = np.float32(draw.standard_normal((5, 12))), np.zeros((5, 4), np.float32)

    def loss(ws, batch):
        x, y = batch
        for w in ws:
            x = jnp.abs(layer(x, w))
        return mean_square(x, y)

    ours = moonwalk_compile(loss, strategies=FORCED)
    assert not ours.value_and_grad(ws, batch, with_drift=True)[2].tripped
    ws[1][:, 1] = ws[1][:, 0]
    assert ours.value_and_grad(ws, batch, with_drift=True)[2].tripped
