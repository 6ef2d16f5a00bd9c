"""What a trip of the guard does, and what is reported of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mwc
from mwc import moonwalk_compile
from tests.harmed import damaged, exact, programs, samples
from tests.submersive import FORCED, chain, isometry, layer, mean_square

pytestmark = pytest.mark.usefixtures("quick")


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
    assert all(spoiled[first:-3])
    assert not any(spoiled[-3:])
    for one, two in zip(mine[:first], true[:first], strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-6)


def test_gradients_that_do_not_read_a_state_are_nan_after_a_trip():
    """A state that is NaN would leave them as they are: slopes of no entry, signs."""

    def loss(params, batch):
        x, y = batch
        for w, slope, gain in params:
            x = layer(x, w)
            x = jnp.where(x >= -100, x, slope * x) + gain * jnp.sign(x)
        return mean_square(x, y)

    draw = np.random.default_rng(1)
    (w, _), batch = exact(draw), samples(draw)
    w[2] *= 2
    params = [(one, np.float32(0.5), np.float32(0)) for one in w]
    ours = moonwalk_compile(loss, strategies=FORCED)
    assert "moonwalk" in {s.strategy for s in ours.plan(params, batch).stages}
    _, grads, drift = ours.value_and_grad(params, batch, with_drift=True)
    assert drift.tripped
    assert not np.isnan(grads[0][0]).any()
    for grad in grads[3:-2]:
        assert all(np.isnan(g).all() for g in grad)


def test_a_loop_that_ends_for_numbers_alone_ends():
    """It would not for a state that is NaN: such states are left as they are."""

    def halved(x):
        """No part of the gradient: the largest entry, halved until it is small."""
        size = jax.lax.stop_gradient(jnp.max(jnp.abs(x)))
        return jax.lax.while_loop(lambda s: ~(s <= 1), lambda s: s / 2, size)

    def loss(params, batch):
        x, y = batch
        for w in params:
            x = jnp.abs(layer(x, w))
            x = x * (1 + 0 * halved(x))
        return mean_square(x, y)

    draw = np.random.default_rng(1)
    (w, _), batch = exact(draw), samples(draw)
    w[2] *= 2
    ours = moonwalk_compile(loss, strategies=FORCED)
    grads, true = ours.value_and_grad([*w], batch)[1], jax.grad(loss)([*w], batch)
    assert any(np.isnan(one).all() for one in grads)
    for one, two in zip(grads, true, strict=True):
        assert np.isnan(one).all() or np.allclose(one, two, atol=1e-6)


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
    params, batch = harmed(0.05)
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
