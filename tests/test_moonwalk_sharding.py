"""Rebuilt chains on eight host devices; see `test_sharding` for how they are had."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax, shard_map
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from mwc import coisometric, guard, moonwalk_compile
from mwc._tie import CPU_DROPS_BARRIERS
from mwc.constraints import orthogonal, unit_triangular
from tests.eight import eight, outer, run_on_eight
from tests.submersive import (
    chain,
    data,
    isometry,
    layer,
    layers,
    mean_square,
    over_layers,
    rows,
    weights,
)

pytestmark = pytest.mark.usefixtures("quick")

ALL = P()


@outer
def test_on_eight_devices():
    run_on_eight(__file__)


def case(loop, harm=False, kink="abs", count=16):
    """The loss, parameters and a batch."""
    params, batch = jax.tree.map(
        np.float32, (weights(4) if loop else layers(4), data(count))
    )
    if harm:
        leaf = params[0] if loop else params[1][0]
        leaf[...] *= 2
    return (over_layers(kink) if loop else chain(kink)), params, batch


def same(mine, true):
    for one, two in zip(jax.tree.leaves(mine), jax.tree.leaves(true), strict=True):
        assert one.sharding.is_equivalent_to(two.sharding, one.ndim)
        np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-5)


def both(make, loss, *args, rebuilt=True):
    """Gradients, and whether the plan that the function has there rebuilds."""
    ours = moonwalk_compile(loss, strategies=("moonwalk", "stored"))
    seen = []

    def watched(f):
        def call(params, batch):
            if f is ours:
                seen.append(ours.plan(params, batch))
            return f(params, batch)

        return call

    same(make(watched(ours))(*args), make(loss)(*args))
    assert [rows(plan) > 0 for plan in seen] == [rebuilt] * len(seen)
    assert seen


def own_mesh():
    return jax.make_mesh((8,), ("i",), axis_types=(AxisType.Auto,))


def mapped(f, check_vma, mesh=own_mesh):
    """In shard_map, on a mesh of its own unless there is one in force."""
    return jax.jit(
        shard_map(
            lambda p, b: jax.tree.map(
                lambda g: lax.pmean(g, "i"), f(jax.tree.map(_varying(check_vma), p), b)
            ),
            mesh=mesh(),
            in_specs=(P(), P("i")),
            out_specs=P(),
            check_vma=check_vma,
        )
    )


def _varying(check_vma):
    if check_vma:
        return functools.partial(lax.pcast, axis_name="i", to="varying")
    return lambda x: x


@eight
@pytest.mark.parametrize(
    ("loop", "kink"), [(False, "abs"), (True, "max-min"), (False, "leaky 0.9")]
)
@pytest.mark.parametrize("check_vma", [True, False])
def test_inside_shard_map(loop, kink, check_vma):
    loss, *args = case(loop, kink=kink)
    both(lambda f: mapped(jax.grad(f), check_vma), loss, *args)


@eight
def test_turned_products_inside_shard_map():
    """Of 256 rows on each device, and layers as wide."""
    rotate = coisometric(lambda h, w: h @ w)

    def loss(ws, x):
        for w in ws:
            x = jnp.abs(rotate(x, w) + 0.1)
        return jnp.mean(x**3)

    draw = np.random.default_rng(0)
    ws = [np.float32(isometry(256, 256)) for _ in range(3)]
    x = np.float32(draw.standard_normal((8 * 256, 256)))
    both(lambda f: mapped(jax.grad(f), True), loss, ws, x)
    ours = moonwalk_compile(loss, strategies=("moonwalk", "stored"))
    text = mapped(jax.grad(ours), True).lower(ws, x).as_text()
    assert ("turned_product" in text) == (not CPU_DROPS_BARRIERS)


@eight
@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto])
def test_inside_shard_map_on_the_mesh_in_force(kind):
    loss, params, batch = case(False)
    mesh = jax.make_mesh((8,), ("i",), axis_types=(kind,))
    with jax.set_mesh(mesh):
        params = jax.device_put(params, NamedSharding(mesh, P()))
        batch = jax.device_put(batch, NamedSharding(mesh, P("i")))
        both(lambda f: mapped(jax.grad(f), False, lambda: None), loss, params, batch)


@eight
@pytest.mark.parametrize("build", [orthogonal, unit_triangular])
def test_built_weights(build):
    """What is known of a weight outlives that it is copied to the devices."""
    _, *args = case(False)

    def loss(params, batch):
        x, y = batch
        for w, b in params:
            x = abs(x @ build(w) + b)
        return mean_square(x, y)

    both(lambda f: mapped(jax.grad(f), True), loss, *args)
    both(lambda f: summed(jax.grad(lambda *a: lax.pmean(f(*a), "i"))), loss, *args)


@eight
@pytest.mark.parametrize("check_vma", [True, False])
def test_collectives_between_layers(check_vma):
    """No device can run one by itself, to see what it does."""
    _, *args = case(False)
    ring = [(i, (i + 1) % 8) for i in range(8)]

    def loss(params, batch):
        x, y = batch
        for i, (w, b) in enumerate(params):
            x = lax.ppermute(x, "i", ring) if i % 2 else x + lax.pmean(x, "i")
            x = abs(layer(x, w) + b)
        return mean_square(x, y)

    both(lambda f: mapped(jax.grad(f), check_vma), loss, *args, rebuilt=False)


@eight
@pytest.mark.parametrize("loop", [False, True])
def test_summed_by_the_transpose(loop):
    """Parameters that do not vary over the mesh: JAX sums their cotangents."""
    loss, *args = case(loop)

    def make(f):
        return summed(jax.grad(lambda p, b: lax.pmean(f(p, b), "i")))

    both(make, loss, *args)


def summed(f, out_specs=ALL):
    """Gradients of parameters that do not vary over the mesh, summed by JAX."""
    return jax.jit(
        shard_map(f, mesh=own_mesh(), in_specs=(P(), P("i")), out_specs=out_specs)
    )


@eight
@pytest.mark.parametrize("loop", [False, True])
def test_a_trip_on_every_device(loop):
    """Devices do not part ways: the gradients are NaN and nothing hangs."""
    loss, *args = case(loop, harm=True)
    ours = moonwalk_compile(loss, strategies=("moonwalk", "stored"))
    for make in (lambda f: mapped(f, False), summed):
        found = make(jax.grad(ours))(*args)
        assert any(np.isnan(g).all() for g in jax.tree.leaves(found))


@eight
def test_a_trip_on_one_device():
    """What was summed over devices is NaN on all, and is still what was summed."""

    def trip(w, x):
        passes = lax.axis_index("i") != 3
        return tuple(guard.nan_unless(passes, [w, x]))

    w, x = jnp.ones(4), jnp.ones((8, 4))
    one, two = summed(trip, (P(), P("i")))(w, x)
    assert np.isnan(one).all()
    np.testing.assert_array_equal(np.isnan(two), np.arange(8)[:, None] == [3] * 4)


@eight
@pytest.mark.parametrize("loop", [False, True])
def test_readings_of_every_device(loop):
    loss, *args = case(loop)
    ours = moonwalk_compile(loss, strategies=("moonwalk", "stored"))

    def both_of(params, batch):
        _, grads, drift = ours.value_and_grad(params, batch, with_drift=True)
        return grads, jax.tree.map(lambda x: x[None], drift)

    grads, drift = summed(both_of, (P(), P("i")))(*args)
    same(grads, summed(jax.grad(loss))(*args))
    assert drift.worst.shape == (8,)
    assert not drift.tripped.any()


def placed(kind, params, batch):
    mesh = jax.make_mesh((8,), ("i",), axis_types=(kind,))
    params = jax.device_put(params, NamedSharding(mesh, P()))
    return mesh, params, jax.device_put(batch, NamedSharding(mesh, P("i")))


@eight
@pytest.mark.parametrize("loop", [False, True])
@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto])
def test_sharded_batch(loop, kind):
    loss, params, batch = case(loop, count=64)
    mesh, params, batch = placed(kind, params, batch)
    with jax.set_mesh(mesh):
        both(lambda f: jax.jit(jax.grad(f, (0, 1))), loss, params, batch)
        ours = moonwalk_compile(loss, strategies=("moonwalk", "stored"))
        true = jax.jit(jax.value_and_grad(loss))(params, batch)
        same(jax.value_and_grad(ours)(params, batch), true)
        value, grads, drift = ours.value_and_grad(params, batch, with_drift=True)
        same((value, grads), true)
        assert not drift.tripped
        assert jax.tree.map(jax.typeof, grads) == jax.tree.map(jax.typeof, true[1])
        assert ours.check(params, batch, batch_axis=0).ok
        other = moonwalk_compile(case(loop, kink="max-min")[0], strategies="stored")
        assert other.plan(params, batch).stages  # Made with Explicit axes in force.
    both(lambda f: jax.jit(jax.grad(f)), loss, params, batch)


@eight
def test_a_loop_of_a_sharded_batch_needs_as_little_on_explicit_axes():
    loss, params, batch = case(True, count=4096)
    params = jax.tree.map(lambda p: np.concatenate([p] * 16), params)
    found = []
    for kind in (AxisType.Explicit, AxisType.Auto):
        mesh, *args = placed(kind, params, batch)
        with jax.set_mesh(mesh):
            report = moonwalk_compile(loss).memory(*args, target="cpu")
            temp = {row.method: row.temp_bytes for row in report.rows}
            assert temp["moonwalk"] < temp["backprop"] / 3
            found.append(temp["moonwalk"])
    assert found[0] <= 1.1 * found[1]


@eight
@pytest.mark.parametrize("kept", ["type", "array"])
def test_what_asks_for_explicit_axes_keeps_its_own_derivative(kept):
    """Its shardings, or an array that it captured, are on the explicit mesh alone."""
    inner, params, batch = case(False, count=64)
    mesh, params, batch = placed(AxisType.Explicit, params, batch)
    with jax.set_mesh(mesh):
        other = 2 * batch[0]

        def loss(params, batch):
            x, y = batch
            x = other if kept == "array" else jax.sharding.reshard(x, P("i"))
            return inner(params, (x, y))

        ours = moonwalk_compile(loss)
        true = jax.jit(jax.grad(loss))(params, batch)
        same(jax.jit(jax.grad(ours))(params, batch), true)
        same(jax.grad(ours)(params, batch), true)
        reasons = " ".join(stage.reason for stage in ours.plan(params, batch).stages)
        assert "sharded over Explicit mesh axes" in reasons


@eight
@pytest.mark.skipif(CPU_DROPS_BARRIERS, reason="JAX 0.10 batches no scalars there")
@pytest.mark.parametrize("loop", [False, True])
def test_inside_vmap_over_an_explicit_axis(loop):
    loss, params, batch = case(loop, count=64)
    batch = jax.tree.map(lambda x: x[:, None], batch)
    mesh, params, batch = placed(AxisType.Explicit, params, batch)
    with jax.set_mesh(mesh):
        ours = moonwalk_compile(loss, strategies=("moonwalk", "stored"))

        def mapped(f):
            return jax.jit(jax.vmap(jax.grad(f), (None, 0)))(params, batch)

        same(mapped(ours), mapped(loss))
