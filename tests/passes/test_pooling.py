"""The derivative of pools is JAX's to the bit, from a few bits a window."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from mwc import moonwalk_compile
from mwc._build import matrix_cost, residuals_of
from passes.inline import inline
from passes.linearise import linearise
from passes.residuals import narrowest, packed_bytes

pytestmark = pytest.mark.usefixtures("x64")


def pool(x, window, strides=None, padding="VALID", op=lax.max):
    start = -jnp.inf if op is lax.max else jnp.inf
    return lax.reduce_window(
        x, np.array(start, x.dtype), op, window, strides or window, padding
    )


# Operand, window, strides, padding.
SHAPES = {
    "nhwc": ((2, 4, 6, 3), (1, 2, 2, 1), None, "VALID"),
    "nchw": ((2, 3, 4, 6), (1, 1, 2, 2), None, "VALID"),
    "odd": ((2, 5, 7, 3), (1, 2, 2, 1), None, "VALID"),
    "same": ((2, 5, 7, 3), (1, 2, 3, 1), None, "SAME"),
    "padded": ((1, 5, 4, 1), (1, 3, 2, 1), None, [(0, 0), (2, 3), (1, 1), (0, 0)]),
    "line": ((7, 3), (4, 1), None, "SAME"),
    "volume": ((1, 4, 3, 5, 2), (1, 2, 2, 2, 1), None, "SAME"),
    "gaps": ((8, 9), (2, 1), (3, 2), "VALID"),
    "one": ((3, 4), (1, 1), None, "VALID"),
    "all": ((6, 5), (6, 5), None, "VALID"),
    "outside": ((2, 3), (1, 2), None, [(0, 0), (4, 3)]),
    "empty": ((0, 4), (1, 2), None, "VALID"),
    # JAX's own derivative, of the operand:
    "overlap": ((2, 6, 7), (1, 3, 3), (1, 2, 2), "SAME"),
    "large": ((2, 130), (1, 65), None, "VALID"),
}
OWN = {"overlap", "large", "empty"}


def draw(shape, dtype, seed=0):
    """Few values, so that most windows have ties; NaN and infinities among them."""
    values = [-np.inf, -1, -0.0, 0, 1, 1, 2, np.inf, np.nan]
    odds = np.array([6, 4, 3, 3, 4, 4, 2, 1, 3])
    random = np.random.default_rng(seed)
    return jnp.asarray(random.choice(values, shape, p=odds / odds.sum()), dtype)


def weighted(f):
    """A loss of a pool whose cotangents differ in each window."""

    def loss(x):
        y = f(x)
        return jnp.sum(y * jnp.cos(jnp.arange(1.0, y.size + 1)).reshape(y.shape))

    return loss


def same(found, true):
    assert (found.shape, found.dtype) == (true.shape, true.dtype)
    wide = [np.asarray(a.astype(jnp.float64)) for a in (found, true)]  # NaN is NaN
    np.testing.assert_array_equal(*wide)


def compare(name, dtype="float32", op=lax.max):
    """Ties, NaN and infinities in every window: cotangents are JAX's."""
    shape, window, strides, padding = SHAPES[name]
    f = functools.partial(pool, window=window, strides=strides, padding=padding, op=op)
    fun = moonwalk_compile(f)
    pulls = [jax.jit(lambda x, ct, g=g: jax.vjp(g, x)[1](ct)[0]) for g in (fun, f)]
    for seed in range(4):
        x = draw(shape, dtype, seed)
        y = f(x)
        ct = jnp.cos(jnp.arange(1.0, y.size + 1)).reshape(y.shape).astype(dtype)
        same(fun(x), y)
        same(*(pull(x, ct) for pull in pulls))


@pytest.mark.parametrize("name", SHAPES)
def test_gradients_are_backpropagation_s(name):
    compare(name)


@pytest.mark.parametrize("op", [lax.max, lax.min])
@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
@pytest.mark.parametrize("name", ["same", "volume"])
def test_precisions_and_minima(name, dtype, op):
    compare(name, dtype, op)


@pytest.mark.parametrize("name", SHAPES)
def test_what_is_kept(name):
    shape, window, strides, padding = SHAPES[name]
    f = functools.partial(pool, window=window, strides=strides, padding=padding)
    x = draw(shape, "float32")
    linear = linearise(inline(jax.make_jaxpr(f)(x)), (True,))
    kept = residuals_of(linear, linear.bwd.outvars)
    if name in OWN:
        assert [v.aval.dtype for v in kept] == ["float32"]
    else:
        y = jax.eval_shape(f, x)
        assert {(v.aval.shape, str(v.aval.dtype)) for v in kept} <= {(y.shape, "bool")}
        assert len(kept) == (int(np.prod(window)) - 1).bit_length()
    names = {e.primitive.name for e in linear.bwd.eqns}
    assert ("select_and_scatter_add" in names) == (name in OWN)


def test_a_pool_of_integers_has_no_derivative():
    def f(x):
        least = jnp.iinfo(int).min
        places = jnp.arange(8)
        return x * lax.reduce_window(places, least, lax.max, (2,), (2,), "VALID")

    x = draw((3, 4), "float32")
    same(jax.grad(weighted(moonwalk_compile(f)))(x), jax.grad(weighted(f))(x))


def test_vmap_and_higher_derivatives():
    f = functools.partial(pool, window=(2, 3), padding="SAME")
    fun = moonwalk_compile(f)
    xs = draw((4, 5, 7), "float64")
    for axis in range(3):
        found = jax.vmap(jax.grad(weighted(fun)), in_axes=axis)(xs)
        true = jax.vmap(jax.grad(weighted(f)), in_axes=axis)(xs)
        same(found, true)
        inside = moonwalk_compile(jax.vmap(f, in_axes=axis))
        true = jax.grad(weighted(jax.vmap(f, in_axes=axis)))(xs)
        same(jax.grad(weighted(inside))(xs), true)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((4, 6)))
    hessians = [jax.hessian(lambda x, g=g: weighted(g)(x) ** 2)(x) for g in (fun, f)]
    np.testing.assert_allclose(*hessians, rtol=1e-12)


def test_a_pool_behind_a_product_keeps_bits():
    def layer(x, w):
        return pool(jax.nn.relu(x @ w), (1, 4, 1))

    x, w = jnp.ones((3, 8, 16), jnp.float32), jnp.ones((16, 8), jnp.float32)
    linear = linearise(inline(jax.make_jaxpr(layer)(x, w)), (True, True))
    wanted = residuals_of(linear, linear.bwd.outvars)
    state = linear.fwd.invars[:1]
    kept = narrowest(linear.fwd, wanted, state, matrix_cost, at_hand=True)
    # One bit an element of the ReLU, two bits a window of the pool.
    assert sum(map(packed_bytes, kept)) == 3 * 8 * 8 // 8 + 2 * (3 * 2 * 8 // 8)


def test_what_the_plan_keeps():
    """Convolution, ReLU and pool: the pool's result and bits, not its operand."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            for _ in range(2):
                x = nn.max_pool(nn.relu(nn.Conv(8, (3, 3))(x)), (2, 2), (2, 2))
            return jnp.mean(x**2)

    x = jnp.ones((2, 32, 32, 3), jnp.float32)
    params = Net().init(jax.random.key(0), x)
    plan = moonwalk_compile(Net().apply, strategies=["stored"]).plan(params, x)
    operand, result = 2 * 16 * 16 * 8, 2 * 8 * 8 * 8  # of the last pool, elements
    bits = operand + 2 * result
    first = 4 * operand + 2 * operand  # of the first pool
    assert [stage.bits for stage in plan.stages if stage.bits] == [first, bits]
    assert plan.residual_bytes == 4 * operand + (first + bits) // 8 + 4 * result
    # With the operands of JAX's derivative the last pool alone had 36,864 bytes.
    assert plan.backprop_bytes == 122_880


@pytest.mark.parametrize("check_vma", [True, False])
def test_inside_shard_map(check_vma):
    mesh = jax.make_mesh((1,), ("d",), axis_types=(AxisType.Auto,))
    specs = {"in_specs": P("d"), "out_specs": P("d"), "check_vma": check_vma}
    f = functools.partial(pool, window=(1, 2, 3), padding="SAME")

    def gradient(g):
        return jax.grad(weighted(jax.shard_map(g, mesh=mesh, **specs)))

    x = draw((2, 5, 7), "float32")
    same(jax.jit(gradient(moonwalk_compile(f)))(x), jax.jit(gradient(f))(x))


@pytest.mark.parametrize("spec", [P("d"), P(None, "d")])
def test_explicit_sharding(spec):
    """Each rewritten equation has a sharding that JAX can name."""
    mesh = jax.sharding.AbstractMesh((2,), ("d",), axis_types=(AxisType.Explicit,))
    with jax.sharding.use_abstract_mesh(mesh):
        sharded = NamedSharding(mesh, spec)
        x = jax.ShapeDtypeStruct((8, 8, 6, 4), jnp.float32, sharding=sharded)
        jaxpr = jax.make_jaxpr(lambda x: pool(x, (1, 2, 2, 1)))(x)
        linear = linearise(inline(jaxpr), (True,))
    (out,) = linear.bwd.outvars
    assert out.aval.sharding.spec[: len(spec)] == tuple(spec)
    assert all(
        v.aval.sharding.spec[: len(spec)] == tuple(spec) for v in linear.residuals[1:]
    )
