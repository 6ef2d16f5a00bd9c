"""Every transformation of JAX, against the same transformation of the plain function.

The program saves everything and reads what it saved; where little is tested by that,
another that saves nothing runs too. The reference is always JAX's own derivative.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from mwc import moonwalk_compile
from tests.transforming import (
    SECOND_ORDER,
    arrays,
    both,
    loss,
    vector,
    with_custom,
    with_jvp_rule,
)

pytestmark = pytest.mark.usefixtures("x64", "either_program", "quick")


FIRST_ORDER = {
    "value": lambda f: f,
    "jit": jax.jit,
    "grad": jax.grad,
    "grad of data": lambda f: jax.grad(f, argnums=1),
    "grad of both": lambda f: jax.grad(f, argnums=(0, 1)),
    "jit of grad": lambda f: jax.jit(jax.grad(f)),
    "grad of jit": lambda f: jax.grad(jax.jit(f)),
    "value and grad": jax.value_and_grad,
    "jvp": lambda f: lambda w, x: jax.jvp(f, (w, x), (x.T @ x @ w, jnp.cos(x))),
    "jvp of one": lambda f: lambda w, x: jax.jvp(lambda w: f(w, x), (w,), (w * w,)),
    "linearize": lambda f: lambda w, x: jax.linearize(f, w, x)[1](w, 2 * x),
    "vjp": lambda f: lambda w, x: jax.vjp(f, w, x)[1](jnp.array(2.0)),
    "transpose of linearize": lambda f: (
        lambda w, x: jax.linear_transpose(jax.linearize(f, w, x)[1], w, x)(
            jnp.array(3.0)
        )
    ),
    "transpose of vjp": lambda f: (
        lambda w, x: jax.linear_transpose(jax.vjp(f, w, x)[1], jnp.array(0.0))((w, x))
    ),
    "checkpoint around": lambda f: jax.grad(jax.checkpoint(f)),
    "checkpoint with policy": lambda f: jax.grad(
        jax.checkpoint(f, policy=jax.checkpoint_policies.everything_saveable)
    ),
    "dots saved": lambda f: jax.jit(
        jax.grad(jax.checkpoint(f, policy=jax.checkpoint_policies.dots_saveable))
    ),
}


@pytest.mark.usefixtures("each_program")
@pytest.mark.parametrize("name", sorted(FIRST_ORDER))
def test_first_order(name):
    both(FIRST_ORDER[name], *arrays((3, 4), (5, 3)))


@pytest.mark.parametrize("fun", [with_custom, with_jvp_rule])
@pytest.mark.parametrize("name", ["value", "grad of both", "jit of grad", "vjp"])
def test_custom_rule_inside(name, fun):
    both(FIRST_ORDER[name], *arrays((3, 4), (5, 3)), fun=fun)


def test_forward_mode_of_a_custom_vjp_is_refused_as_by_jax():
    w, x = arrays((3, 4), (5, 3))
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(moonwalk_compile(with_custom), (w, x), (w, x))


MODES = {"fwd": jax.jacfwd, "rev": jax.jacrev}


@pytest.mark.parametrize("outer", sorted(MODES))
@pytest.mark.parametrize("inner", sorted(MODES))
@pytest.mark.parametrize("fun", [loss, vector])
def test_second_order(outer, inner, fun):
    outer, inner = MODES[outer], MODES[inner]
    both(
        lambda f: outer(inner(f, argnums=(0, 1)), argnums=(0, 1)),
        *arrays((2, 3), (4, 2)),
        fun=fun,
    )


@pytest.mark.parametrize("name", sorted(SECOND_ORDER))
def test_second_order_uses(name):
    both(SECOND_ORDER[name], *arrays((2, 3), (4, 2)))


@pytest.mark.parametrize("fun", [with_custom, with_jvp_rule])
@pytest.mark.parametrize(
    "name",
    [
        "hvp forward over reverse",
        "hvp reverse over reverse",
        "gradient penalty",
        "value of value_and_grad",
        "cotangent alone",
    ],
)
def test_second_order_of_a_custom_rule(name, fun):
    both(SECOND_ORDER[name], *arrays((2, 3), (4, 2)), fun=fun)


@pytest.mark.parametrize("orders", ["ffr", "frf", "rff", "rrr"])
def test_third_order(orders):
    def make(f):
        for one in reversed(orders):
            f = {"f": jax.jacfwd, "r": jax.jacrev}[one](f)
        return f

    both(make, *arrays((2, 2), (3, 2)))


VMAPS = {
    "data": lambda f: jax.vmap(f, (None, 0)),
    "parameters": lambda f: jax.vmap(f, (0, None)),
    "other axes": lambda f: jax.vmap(f, (2, 1)),
    "data, parameters": lambda f: jax.vmap(jax.vmap(f, (None, 0)), (0, None)),
    "named": lambda f: jax.vmap(f, (None, 0), axis_name="rows"),
}


VMAP_SHAPES = {
    "data": ((3, 4), (6, 5, 3)),
    "parameters": ((6, 3, 4), (5, 3)),
    "other axes": ((3, 4, 6), (5, 6, 3)),
    "data, parameters": ((2, 3, 4), (6, 5, 3)),
    "named": ((3, 4), (6, 5, 3)),
}


@pytest.mark.parametrize("name", sorted(VMAPS))
def test_vmap(name):
    args = arrays(*VMAP_SHAPES[name])
    mapped = VMAPS[name]
    both(mapped, *args)
    both(lambda f: mapped(jax.grad(f, argnums=(0, 1))), *args)
    both(lambda f: jax.grad(lambda *a: jnp.sum(mapped(f)(*a) ** 2), (0, 1)), *args)


@pytest.mark.parametrize("name", ["data, parameters", "other axes"])
def test_vmap_of_jvp_and_hvp(name):
    args = arrays(*VMAP_SHAPES[name])
    mapped = VMAPS[name]
    both(lambda f: mapped(lambda w, x: jax.jvp(f, (w, x), (w, jnp.sin(x)))), *args)
    both(lambda f: mapped(lambda w, x: jax.jvp(jax.grad(f), (w, x), (w, x))), *args)
    both(lambda f: lambda *a: jax.jvp(mapped(f), a, a), *args)


def two_results(w, x):
    """The first result is the same in every lane of a vmap over x."""
    return jnp.sum(w**3), jnp.sum(jnp.tanh(x @ w))


def test_vmap_keeps_unmapped_results_unmapped():
    w, x = arrays((3, 4), (6, 5, 3))
    mapped = lambda f: jax.vmap(f, (None, 0), out_axes=(None, 0))  # noqa: E731
    both(mapped, w, x, fun=two_results)
    both(lambda f: lambda *a: jax.jvp(mapped(f), a, a), w, x, fun=two_results)


@pytest.mark.parametrize("out_axes", [(None, 0), (0, 0)])
def test_shared_cotangents_count_once(out_axes):
    w, x = arrays((3, 4), (6, 5, 3))

    def make(f):
        def total(w, x):
            one, many = jax.vmap(f, (None, 0), out_axes=out_axes)(w, x)
            return jnp.sum(one) * 3.0 + jnp.sum(many**2)

        return jax.grad(total, argnums=(0, 1))

    both(make, w, x, fun=two_results)
    both(lambda f: jax.jit(make(f)), w, x, fun=two_results)
    both(lambda f: lambda *a: jax.jvp(make(f), a, a), w, x, fun=two_results)


@pytest.mark.parametrize("out_axes", [None, 0])
def test_collective_over_a_named_axis(out_axes):
    w, x = arrays((3, 4), (6, 5, 3))

    def f(w, x):
        return lax.psum(jnp.sum(jnp.tanh(x @ w)), "i") ** 2

    def mapped(f):
        return jax.vmap(f, (None, 0), out_axes=out_axes, axis_name="i", axis_size=6)

    both(mapped, w, x, fun=f)
    both(lambda f: jax.grad(lambda *a: jnp.sum(mapped(f)(*a)), (0, 1)), w, x, fun=f)
    if out_axes == 0:
        both(lambda f: mapped(jax.grad(f, argnums=(0, 1))), w, x, fun=f)


def test_axis_index_maps_though_no_input_is_mapped():
    (w,) = arrays((3,))

    def f(w):
        return jnp.sum(w**2) * lax.axis_index("i")

    def mapped(f):
        return lambda w: jax.vmap(f, None, axis_name="i", axis_size=4)(w)

    both(mapped, w, fun=f)
    both(lambda f: jax.grad(lambda w: jnp.sum(mapped(f)(w) ** 2)), w, fun=f)
