"""A widened backward is the same linear map, in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from passes.graph import astype, evaluate
from passes.inline import inline
from passes.linearise import linearise
from passes.widen import is_narrow, widened

pytestmark = pytest.mark.usefixtures("quick")


def stage(h, w):
    y = jnp.dot(h, w, preferred_element_type=jnp.float32).astype(h.dtype)
    return jax.nn.leaky_relu(y + jnp.arange(-1, 2).astype(h.dtype), 0.25)[:, ::-1] * 2


def arrays(dtype):
    draw = np.random.default_rng(0)
    made = draw.standard_normal((4, 5)), draw.standard_normal((5, 3))
    return [jnp.asarray(x, jnp.bfloat16).astype(dtype) for x in made]


def linear_of(fun, *args):
    return linearise(inline(jax.make_jaxpr(fun)(*args)), (True,) * len(args))


def pulled(linear, args, ct):
    env = {**linear.consts, **dict(zip(linear.fwd.invars, args, strict=True))}
    found = evaluate(linear.fwd, env, linear.residuals)
    pairs = zip(linear.residual_inputs, found, strict=True)
    back = {**linear.consts, **{v: astype(x, v) for v, x in pairs}}
    (ct_var,) = linear.ct_inputs
    return evaluate(linear.bwd, {**back, ct_var: ct}, linear.bwd.outvars)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_the_same_map_in_float32(dtype):
    linear = linear_of(stage, *arrays(dtype))
    wide = widened(linear)
    assert wide is not None
    assert wide.fwd is linear.fwd
    ends = [v for e in wide.bwd.eqns for v in (*e.invars, *e.outvars)]
    assert not any(is_narrow(v.aval) for v in (*wide.bwd.invars, *ends))
    ct = jnp.asarray(np.random.default_rng(1).standard_normal((4, 3)), jnp.float32)
    found = pulled(wide, arrays(dtype), ct)
    _, pull = jax.vjp(lambda h, w: stage(h, w), *arrays(jnp.float32))
    for one, true in zip(found, pull(ct), strict=True):
        assert one.dtype == jnp.float32
        np.testing.assert_allclose(one, true, rtol=1e-6, atol=1e-6)
    narrow = pulled(linear, arrays(dtype), ct.astype(dtype))
    assert all(x.dtype == dtype for x in narrow)


def test_nothing_to_widen():
    linear = linear_of(stage, *arrays(jnp.float32))
    assert widened(linear) is linear


def test_programs_inside_are_not_widened():
    def fun(h, w):
        return lax.cond(h[0, 0] > 0, lambda: h @ w, lambda: -h @ w)

    assert widened(linear_of(fun, *arrays(jnp.bfloat16))) is None


def test_what_is_gathered():
    """The sum of a scatter is a program of two numbers inside of the equation."""

    def stage(h, table):
        return h + jnp.sort(table[jnp.arange(8, 4, -1) // 3], axis=0)

    args = [x[:, :3] for x in arrays(jnp.bfloat16)]
    linear = linear_of(stage, *args)
    wide = widened(linear)
    assert wide is not None
    assert any(e.primitive.name == "scatter-add" for e in wide.bwd.eqns)
    ct = jnp.asarray(np.random.default_rng(1).standard_normal((4, 3)), jnp.float32)
    found = jax.jit(lambda ct: pulled(wide, args, ct))(ct)
    wider = [x.astype(jnp.float32) for x in args]
    for one, true in zip(found, jax.vjp(stage, *wider)[1](ct), strict=True):
        np.testing.assert_allclose(one, true, rtol=1e-6, atol=1e-6)


def test_what_depends_on_types_is_not_widened():
    """A callback gets the type that its user wrote it for."""

    @jax.custom_vjp
    def same(h):
        return h

    def bwd(_, ct):
        like = jax.ShapeDtypeStruct(ct.shape, jnp.float32)
        return (jax.pure_callback(np.float32, like, ct).astype(ct.dtype),)

    same.defvjp(lambda h: (h, None), bwd)
    (h, _) = arrays(jnp.bfloat16)
    assert widened(linear_of(same, h)) is None
