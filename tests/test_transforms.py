"""Every transformation of JAX, against the same transformation of the plain function.

The program saves everything and reads what it saved; where little is tested by that,
another that saves nothing runs too. The reference is always JAX's own derivative.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from mwc import moonwalk_compile
from passes import _jax

pytestmark = pytest.mark.usefixtures("x64", "either_program", "quick")

KEY = jax.random.key(0)


def arrays(*shapes):
    keys = jax.random.split(KEY, len(shapes))
    return [0.5 * jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True)]


def same(mine, true):
    assert jax.tree.structure(mine) == jax.tree.structure(true)
    for one, two in zip(jax.tree.leaves(mine), jax.tree.leaves(true), strict=True):
        assert (jnp.shape(one), jnp.result_type(one)) == (
            jnp.shape(two),
            jnp.result_type(two),
        )
        np.testing.assert_allclose(one, two, rtol=1e-9, atol=1e-12)


def loss(w, x):
    return jnp.sum(jnp.tanh(x @ w) ** 2) + jnp.sum(w**3)


def vector(w, x):
    return jnp.tanh(x @ w).sum(0), jnp.sum(w**2)


@jax.custom_vjp
def doubled(x):
    return jnp.sin(x)


doubled.defvjp(lambda x: (jnp.sin(x), x), lambda x, ct: (2.0 * jnp.cos(x) * ct,))


def with_custom(w, x):
    return jnp.sum(doubled(x @ w) ** 2)


@jax.custom_jvp
def tripled(x):
    return jnp.sin(x)


tripled.defjvp(lambda p, t: (jnp.sin(p[0]), 3.0 * jnp.cos(p[0]) * t[0]))


def with_jvp_rule(w, x):
    return jnp.sum(tripled(x @ w) ** 2)


def both(make, *args, fun=loss):
    same(make(moonwalk_compile(fun))(*args), make(fun)(*args))


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


SECOND_ORDER = {
    "hessian": jax.hessian,
    "jit of hessian": lambda f: jax.jit(jax.hessian(f)),
    "hvp forward over reverse": lambda f: (
        lambda w, x: jax.jvp(lambda w: jax.grad(f)(w, x), (w,), (jnp.sin(w),))
    ),
    "hvp reverse over reverse": lambda f: (
        lambda w, x: jax.grad(lambda w: jnp.sum(jax.grad(f)(w, x) * jnp.sin(w)))(w)
    ),
    "hvp reverse over forward": lambda f: (
        lambda w, x: jax.grad(
            lambda w: jax.jvp(lambda w: f(w, x), (w,), (jnp.sin(w),))[1]
        )(w)
    ),
    "gradient penalty": lambda f: jax.grad(
        lambda w, x: f(w, x) + jnp.sum(jax.grad(f, argnums=1)(w, x) ** 2)
    ),
    "value of value_and_grad": lambda f: jax.grad(
        lambda w, x: jax.value_and_grad(f)(w, x)[0]
    ),
    "grad of vmapped grad": lambda f: jax.grad(
        lambda w, x: jnp.sum(
            jax.vmap(jax.grad(f, argnums=1), (None, 0))(w, x[:, None]) ** 2
        )
    ),
    "cotangent alone": lambda f: (
        lambda w, x: jax.grad(lambda c: jnp.sum(jax.vjp(f, w, x)[1](c)[0] ** 2))(
            jnp.array(0.7)
        )
    ),
}


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


def scanned(f, w, xs):
    def step(carry, x):
        return jnp.tanh(carry + 0.1 * w), f(carry, x[None])

    return lax.scan(step, w, xs)


CONTROL = {
    "scan": lambda f: lambda w, xs: jnp.sum(scanned(f, w, xs)[1]),
    "scan of carry": lambda f: (
        lambda w, xs: jnp.sum(
            lax.scan(lambda c, x: (c - 0.1 * jax.grad(f)(c, x[None]), None), w, xs)[0]
            ** 2
        )
    ),
    "fori": lambda f: (
        lambda w, xs: lax.fori_loop(0, 3, lambda i, c: c + f(w, xs + 0.1 * c), 0.0)
    ),
    "cond": lambda f: (
        lambda w, xs: lax.cond(
            jnp.sum(xs) > 1e6, lambda w: jnp.sum(w), lambda w: f(w, xs), w
        )
    ),
    "switch": lambda f: (
        lambda w, xs: lax.switch(1, [lambda w: jnp.sum(w), lambda w: f(w, xs)], w)
    ),
    "map": lambda f: lambda w, xs: jnp.sum(lax.map(lambda x: f(w, x[None]), xs)),
    "nested jit": lambda f: lambda w, xs: jax.jit(lambda w: jax.jit(f)(w, xs))(w),
    "checkpointed scan": lambda f: (
        lambda w, xs: jnp.sum(scanned(jax.checkpoint(f), w, xs)[1])
    ),
}


@pytest.mark.parametrize("name", sorted(CONTROL))
@pytest.mark.parametrize("order", ["grad", "hvp", "jvp"])
def test_control_flow(name, order):
    def make(f):
        g = CONTROL[name](f)
        if order == "grad":
            return jax.jit(jax.value_and_grad(g, argnums=(0, 1)))
        if order == "jvp":
            return jax.jit(lambda w, x: jax.jvp(g, (w, x), (w, x)))
        return jax.jit(lambda w, x: jax.jvp(jax.grad(g), (w, x), (w, x)))

    both(make, *arrays((2, 3), (4, 2)))


def test_while_in_forward_mode():
    def make(f):
        def run(w, x):
            grow = lambda c: (c[0] + 1, c[1] + f(w, x) * 0.1)  # noqa: E731
            return lax.while_loop(lambda c: c[0] < 3, grow, (0, jnp.array(0.0)))[1]

        return lambda w, x: jax.jvp(run, (w, x), (w, x))

    both(make, *arrays((2, 3), (4, 2)))


BODIES = {
    "scan inside": lambda w, x: jnp.sum(
        lax.scan(lambda c, r: (jnp.tanh(c + r), c * r), w[:, 0], x)[1]
    ),
    "cond inside": lambda w, x: lax.cond(
        jnp.sum(x) > 0, lambda a: jnp.sum(a @ w), lambda a: jnp.sum(jnp.sin(a @ w)), x
    ),
    "checkpoint inside": lambda w, x: jnp.sum(
        jax.checkpoint(lambda w: jnp.sin(jnp.sin(x @ w)))(w)
    ),
    "decorated inside": lambda w, x: moonwalk_compile(loss)(w, x) ** 2,
    "vmap inside": lambda w, x: jnp.sum(jax.vmap(lambda r: jnp.sin(r @ w))(x) ** 2),
    "gradient inside": lambda w, x: jnp.sum(jax.grad(loss)(w, x) ** 2),
}


@pytest.mark.parametrize("name", sorted(BODIES))
def test_what_may_be_inside(name):
    args = arrays((2, 3), (4, 2))
    both(lambda f: jax.grad(f, argnums=(0, 1)), *args, fun=BODIES[name])
    both(SECOND_ORDER["hvp forward over reverse"], *args, fun=BODIES[name])


def test_decorated_twice():
    both(
        lambda f: jax.grad(moonwalk_compile(moonwalk_compile(f))),
        *arrays((2, 3), (4, 2)),
    )


def test_recursion_through_static_depth():
    @partial(moonwalk_compile, static_argnums=2)
    def deep(w, x, n):
        return loss(w, x) if n == 0 else jnp.sin(deep(w, x, n - 1)) + jnp.sum(w)

    def plain(w, x, n):
        return loss(w, x) if n == 0 else jnp.sin(plain(w, x, n - 1)) + jnp.sum(w)

    w, x = arrays((2, 3), (4, 2))
    same(jax.grad(lambda w: deep(w, x, 2))(w), jax.grad(lambda w: plain(w, x, 2))(w))


def test_closed_over_tracers_are_differentiable():
    def make(wrap):
        def outer(w, x):
            scale = jnp.sum(w**2)
            return wrap(lambda v: jnp.sum(jnp.sin(v @ w) * scale))(x)

        return outer

    args = arrays((2, 3), (4, 2))
    mine, true = make(moonwalk_compile), make(lambda f: f)
    for change in (
        lambda f: f,
        lambda f: jax.grad(f, argnums=(0, 1)),
        lambda f: jax.jit(jax.grad(f)),
        jax.hessian,
        lambda f: jax.vmap(f, (None, 0)),
        lambda f: jax.grad(lambda w, x: jnp.sum(jax.vmap(f, (None, 0))(w, x))),
    ):
        same(change(mine)(*args), change(true)(*args))


def test_captured_arrays():
    table = np.arange(6.0).reshape(2, 3)
    bias = jnp.ones(3)
    both(
        jax.grad,
        *arrays((2, 3)),
        fun=lambda w: jnp.sum(jnp.sin(w * table + bias)),
    )


@pytest.mark.parametrize("shape", [(0, 3), (1, 3)])
def test_small_sizes(shape):
    w, x = arrays((3, 4), shape)
    both(lambda f: jax.value_and_grad(f, argnums=(0, 1)), w, x)
    both(lambda f: jax.vmap(jax.grad(f), (None, 0)), w, x[:, None])


def test_jaxprs_print_and_check():
    w, x = arrays((3, 4), (5, 3))
    f = moonwalk_compile(loss)
    assert "moonwalk_call" in str(jax.make_jaxpr(f)(w, x))
    text = str(jax.make_jaxpr(jax.grad(f))(w, x))
    assert "moonwalk_forward" in text
    assert "moonwalk_backward" in text
    assert "moonwalk_linear" not in text
    with jax.enable_checks(True):
        same(jax.grad(f)(w, x), jax.grad(loss)(w, x))


def has_aux_loss(w, x):
    hidden = jnp.tanh(x @ w)
    return jnp.sum(hidden**2), (hidden, jnp.argmax(hidden), None)


def saved_and_read(jaxpr):
    """Numbers of saved values that a forward sweep keeps and a backward reads."""
    small, _ = _jax.dead_code(jaxpr, [True] * len(jaxpr.out_avals))
    found = {
        e.primitive.name: sum(e.params["site"].kept)
        for e in small.eqns
        if "site" in e.params
    }
    return found["moonwalk_forward"], found["moonwalk_backward"]


def chain_of_two(w, v, x):
    hidden = jnp.tanh(x @ w)
    return jnp.sum(hidden), jnp.sum(jnp.sin(x @ v)), hidden


@pytest.mark.usefixtures("program")
def test_dead_code_shrinks_what_is_saved():
    args = arrays((3, 4), (3, 2), (5, 3))
    f = moonwalk_compile(chain_of_two)

    def run(fun):
        return jax.grad(lambda *a: fun(*a)[0], argnums=(0, 1))

    # The program saves 3 arguments and 3 results, and reads the active arguments; of
    # those only w has to do with the result that is differentiated.
    assert saved_and_read(jax.make_jaxpr(run(f))(*args)) == (1, 1)
    same(run(f)(*args), run(chain_of_two)(*args))
    # Nothing needs the saved values once no cotangent is asked for.
    dead = jax.make_jaxpr(lambda *a: jax.vjp(f, *a)[0])(*args)
    small, _ = _jax.dead_code(dead, [True] * 3)
    assert [e.primitive.name for e in small.eqns] == ["moonwalk_call"]


def test_has_aux():
    both(
        lambda f: jax.value_and_grad(f, argnums=(0, 1), has_aux=True),
        *arrays((3, 4), (5, 3)),
        fun=has_aux_loss,
    )
    both(
        lambda f: jax.jit(jax.grad(f, has_aux=True)),
        *arrays((3, 4), (5, 3)),
        fun=has_aux_loss,
    )


def test_unused_outputs():
    both(
        lambda f: jax.jit(jax.grad(lambda w, x: jnp.sum(f(w, x)[0]))),
        *arrays((3, 4), (5, 3)),
        fun=vector,
    )
    both(
        lambda f: jax.jit(lambda w, x: jax.vjp(f, w, x)[1]((jnp.ones(4), 1.0))[1]),
        *arrays((3, 4), (5, 3)),
        fun=vector,
    )
