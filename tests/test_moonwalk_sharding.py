"""Rebuilt chains on eight host devices; see `test_sharding` for how they are had."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest
from jax import lax, shard_map
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from mwc import moonwalk_compile
from tests.eight import eight, outer, run_on_eight
from tests.submersive import chain, data, layers, over_layers, weights

pytestmark = pytest.mark.usefixtures("quick")


@outer
def test_on_eight_devices():
    run_on_eight(__file__)


def case(loop, harm=False):
    """The loss, parameters and a batch of 16 rows."""
    params, batch = jax.tree.map(
        np.float32, (weights(4) if loop else layers(4), data(16))
    )
    if harm:
        leaf = params[0] if loop else params[1][0]
        leaf[...] *= 2
    return (over_layers() if loop else chain()), params, batch


def same(mine, true):
    for one, two in zip(jax.tree.leaves(mine), jax.tree.leaves(true), strict=True):
        assert one.sharding.is_equivalent_to(two.sharding, one.ndim)
        np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-5)


def both(make, loss, *args):
    ours = moonwalk_compile(loss, strategies=("moonwalk", "stored"))
    same(make(ours)(*args), make(loss)(*args))


def mapped(f, check_vma):
    return jax.jit(
        shard_map(
            lambda p, b: jax.tree.map(
                lambda g: lax.pmean(g, "i"), f(jax.tree.map(_varying(check_vma), p), b)
            ),
            mesh=jax.make_mesh((8,), ("i",), axis_types=(AxisType.Auto,)),
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
@pytest.mark.parametrize("loop", [False, True])
@pytest.mark.parametrize("check_vma", [True, False])
def test_inside_shard_map(loop, check_vma):
    loss, *args = case(loop)
    both(lambda f: mapped(jax.grad(f), check_vma), loss, *args)


@eight
@pytest.mark.parametrize("loop", [False, True])
def test_summed_by_the_transpose(loop):
    """Parameters that do not vary over the mesh: JAX sums their cotangents."""
    loss, *args = case(loop)

    def make(f):
        return jax.jit(
            shard_map(
                jax.grad(lambda p, b: lax.pmean(f(p, b), "i")),
                mesh=jax.make_mesh((8,), ("i",), axis_types=(AxisType.Auto,)),
                in_specs=(P(), P("i")),
                out_specs=P(),
            )
        )

    both(make, loss, *args)


@eight
@pytest.mark.parametrize("loop", [False, True])
def test_a_trip_on_every_device(loop):
    """Devices do not part ways: the gradients are NaN and nothing hangs."""
    loss, *args = case(loop, harm=True)
    ours = moonwalk_compile(loss, strategies=("moonwalk", "stored"))
    found = mapped(jax.grad(ours), False)(*args)
    assert any(np.isnan(g).all() for g in jax.tree.leaves(found))


@eight
@pytest.mark.parametrize("loop", [False, True])
@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto])
def test_sharded_batch(loop, kind):
    loss, params, batch = case(loop)
    mesh = jax.make_mesh((8,), ("i",), axis_types=(kind,))
    with jax.set_mesh(mesh):
        params = jax.device_put(params, NamedSharding(mesh, P()))
        batch = jax.device_put(batch, NamedSharding(mesh, P("i")))
        both(lambda f: jax.jit(jax.grad(f)), loss, params, batch)
