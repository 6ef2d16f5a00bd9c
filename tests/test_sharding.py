"""Meshes of eight host devices: manual (`shard_map`), explicit and automatic axes.

XLA fixes the number of host devices when it starts, so that the cases run in a
process of their own, which `test_on_eight_devices` starts.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax, shard_map
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from mwc import _shared, moonwalk_compile
from tests.eight import eight, outer, run_on_eight

pytestmark = pytest.mark.usefixtures("either_program")


@outer
def test_on_eight_devices(request):
    # Those of the same program.
    chosen = ("-k", request.node.callspec.id, "-m", "slow or not slow")
    run_on_eight(__file__, *chosen)


W = np.linspace(-1, 1, 12).reshape(4, 3)
X = np.linspace(-2, 1, 64).reshape(16, 4)


def loss(w, x):
    return jnp.mean(jnp.tanh(x @ w) ** 2) + jnp.sum(w**3)


def same(mine, true):
    assert jax.tree.structure(mine) == jax.tree.structure(true)
    for one, two in zip(jax.tree.leaves(mine), jax.tree.leaves(true), strict=True):
        assert one.sharding.is_equivalent_to(two.sharding, one.ndim), (
            one.sharding,
            two.sharding,
        )
        np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-6)


def both(make, *args, fun=loss):
    same(make(moonwalk_compile(fun))(*args), make(fun)(*args))


def hvp(f):
    return lambda w, x: jax.jvp(jax.grad(f), (w, x), (w, x))[1]


def mesh_of(kind, shape=(8,), names=("i",)):
    return jax.make_mesh(shape, names, axis_types=(kind,) * len(names))


INSIDE = {
    "grad": lambda f: jax.grad(f),
    "grad of both": lambda f: lambda w, x: jax.grad(f, (0, 1))(w, x)[0],
    "hvp": hvp,
    "jvp": lambda f: lambda w, x: jax.jvp(f, (w, x), (w, x))[1] * w,
    "scan": lambda f: (
        lambda w, x: jax.grad(
            lambda w: lax.scan(lambda c, r: (c + f(w, r[None]), None), f(w, x), x)[0]
        )(w)
    ),
    "vmap": lambda f: (
        lambda w, x: jnp.sum(jax.vmap(jax.grad(f), (None, 0))(w, x[:, None]), 0)
    ),
}


@eight
@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("name", sorted(INSIDE))
def test_inside_shard_map(name, check_vma):
    mesh = mesh_of(AxisType.Auto)

    def make(f):
        def body(w, x):
            # Under `check_vma` the transpose of an implicit broadcast has summed, and
            # the result is the same everywhere; adding x makes it vary again.
            return lax.pmean(INSIDE[name](f)(w, x) + 0.0 * jnp.sum(x), "i")

        mapped = shard_map(
            body,
            mesh=mesh,
            in_specs=(P(), P("i")),
            out_specs=P(),
            check_vma=check_vma,
        )
        return jax.jit(mapped)

    both(make, W, X)


class ByHand:
    """Sweeps for sum(x @ w) in which nobody thought of manual axes."""

    plan = None

    def forward(self, active, args):
        w, x = args
        return [jnp.sum(x @ w)], [x]

    def backward(self, active, wanted, args, saved, cts):
        ones = jnp.ones((args[1].shape[0], args[0].shape[1])) * cts[0]
        both = [saved[0].T @ ones, ones @ args[0].T]
        return [ct for ct, want in zip(both, wanted, strict=True) if want]


@eight
def test_sweeps_written_by_hand_are_summed_over_manual_axes(monkeypatch):
    monkeypatch.setattr(_shared, "_build", lambda *_: ByHand())

    def make(f):
        body = lambda w, x: jax.grad(f, argnums=(0, 1))(w, x)  # noqa: E731
        mapped = shard_map(
            body,
            mesh=mesh_of(AxisType.Auto),
            in_specs=(P(), P("i")),
            out_specs=(P(), P("i")),
        )
        return jax.jit(mapped)

    both(make, W, X, fun=lambda w, x: jnp.sum(x @ w))


@eight
@pytest.mark.parametrize("check_vma", [True, False])
def test_collective_inside(check_vma):
    mesh = mesh_of(AxisType.Auto)

    def total(w, x):
        return lax.pmean(loss(w, x), "i")

    def make(f):
        mapped = shard_map(
            f, mesh=mesh, in_specs=(P(), P("i")), out_specs=P(), check_vma=check_vma
        )
        return jax.jit(jax.value_and_grad(mapped, argnums=(0, 1)))

    both(make, W, X, fun=total)
    both(lambda f: jax.jit(hvp(lambda w, x: make(f)(w, x)[0])), W, X, fun=total)


@eight
@pytest.mark.parametrize("check_vma", [True, False])
def test_eager_shard_map(check_vma):
    mesh = mesh_of(AxisType.Auto)

    def make(f):
        return shard_map(
            lambda w, x: (
                lax.pmean(jax.grad(f)(lax.pcast(w, "i", to="varying"), x), "i")
                if check_vma
                else lax.pmean(jax.grad(f)(w, x), "i")
            ),
            mesh=mesh,
            in_specs=(P(), P("i")),
            out_specs=P(),
            check_vma=check_vma,
        )

    both(make, W, X)


@eight
@pytest.mark.parametrize("check_vma", [True, False])
def test_a_deep_chain_inside_shard_map(check_vma):
    """What is judged by running it cannot be run outside."""
    mesh = mesh_of(AxisType.Auto)

    def deep(w, x):
        for _ in range(4):
            x = jnp.tanh(x @ w)
        return jnp.sum(x**2)

    def make(f):
        sharded = jax.shard_map(
            lambda w, x: lax.pmean(f(w, x), "i"),
            mesh=mesh,
            in_specs=(P(), P("i")),
            out_specs=P(),
            check_vma=check_vma,
        )
        return jax.jit(jax.grad(sharded))

    w = jax.random.normal(jax.random.key(0), (3, 3))
    x = jax.random.normal(jax.random.key(1), (8, 3))
    same(make(moonwalk_compile(deep))(w, x), make(deep)(w, x))


@eight
def test_shard_map_inside_the_function():
    mesh = mesh_of(AxisType.Auto)

    def sharded(w, x):
        mapped = shard_map(
            lambda w, x: lax.pmean(loss(w, x), "i"),
            mesh=mesh,
            in_specs=(P(), P("i")),
            out_specs=P(),
        )
        return mapped(w, x)

    both(lambda f: jax.jit(jax.value_and_grad(f)), W, X, fun=sharded)
    both(lambda f: jax.value_and_grad(f), W, X, fun=sharded)
    both(lambda f: jax.jit(hvp(f)), W, X, fun=sharded)


@eight
@pytest.mark.parametrize("jit", [True, False])
@pytest.mark.parametrize("name", ["value", "grad", "grad of both", "hvp"])
def test_explicit_axes(name, jit):
    make = {
        "value": lambda f: f,
        "grad": jax.grad,
        "grad of both": lambda f: jax.grad(f, (0, 1)),
        "hvp": hvp,
    }[name]
    mesh = mesh_of(AxisType.Explicit, (4, 2), ("i", "j"))
    with jax.set_mesh(mesh):
        w = jax.device_put(W[:, :2], NamedSharding(mesh, P(None, "j")))
        x = jax.device_put(X, NamedSharding(mesh, P("i", None)))
        both(lambda f: jax.jit(make(f)) if jit else make(f), w, x)


@eight
@pytest.mark.parametrize("jit", [True, False])
def test_vmap_over_an_explicit_axis(jit):
    mesh = mesh_of(AxisType.Explicit)
    with jax.set_mesh(mesh):
        w = jax.device_put(W, NamedSharding(mesh, P()))
        x = jax.device_put(X.reshape(8, 2, 4), NamedSharding(mesh, P("i")))

        def make(f):
            mapped = jax.vmap(jax.value_and_grad(f), (None, 0))
            return jax.jit(mapped) if jit else mapped

        both(make, w, x)
        both(lambda f: jax.grad(lambda w, x: jax.vmap(f, (None, 0))(w, x).sum()), w, x)


@eight
def test_automatic_axes_and_spmd_names():
    mesh = mesh_of(AxisType.Auto)
    w = jax.device_put(W, NamedSharding(mesh, P()))
    x = jax.device_put(X.reshape(8, 2, 4), NamedSharding(mesh, P("i")))

    def constrained(w, x):
        hidden = lax.with_sharding_constraint(x @ w, NamedSharding(mesh, P(None, None)))
        return jnp.sum(jnp.tanh(hidden))

    def make(f):
        return jax.jit(jax.vmap(jax.grad(f), (None, 0), spmd_axis_name="i"))

    both(make, w, x, fun=constrained)
    both(lambda f: jax.jit(jax.grad(f)), w, x.reshape(16, 4))
    both(lambda f: jax.grad(f), w, x.reshape(16, 4))
