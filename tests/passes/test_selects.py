"""Selects: what JAX selects in two parts is selected once, and is the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from passes.graph import Graph, evaluate, from_jaxpr
from passes.inline import inline
from passes.linearise import linearise
from passes.selects import one_select

pytestmark = pytest.mark.usefixtures("quick")


def names(graph):
    return [eqn.primitive.name for eqn in graph.eqns]


def pulled(fun, x, ct):
    """What the rewritten derivative of a function gives, and its operations."""
    linear = linearise(from_jaxpr(jax.make_jaxpr(fun)(x)), (True,))
    outs = evaluate(linear.fwd, {linear.fwd.invars[0]: x}, linear.residuals)
    env = dict(zip(linear.residual_inputs, outs, strict=True))
    env |= dict(zip(linear.ct_inputs, [ct], strict=True))
    (found,) = evaluate(linear.bwd, env, linear.bwd.outvars)
    return found, names(linear.bwd)


ONCE = {
    "abs": jnp.abs,
    "leaky": lambda x: jnp.where(x > 0, x, 0.9 * x),
    "both scaled": lambda x: jnp.where(x > 0, -2.0 * x, 0.5 * -x),
    "through bfloat16": lambda x: jnp.where(
        x > 0, x.astype(jnp.bfloat16).astype(x.dtype), x
    ),
}
TWICE = {
    # Zero times what may be infinite is no zero.
    "infinite slope": lambda x: jnp.where(
        x > 0, x, jax.lax.stop_gradient(jnp.exp(x[0, 0] ** 2 + 1e3)) * x
    ),
    "two cotangents": lambda x: jnp.where(x > 0, x, 0.0) + jnp.where(x > 1, 0.0, x),
    "one branch": lambda x: jnp.where(x > 0, x, 1.0),
}
VALUES = [0.0, -0.0, 1.5, -1.5, np.inf, -np.inf, np.nan, 3e38]


@pytest.mark.parametrize("name", [*ONCE, *TWICE])
def test_the_derivative_is_jaxs(name):
    fun = (ONCE | TWICE)[name]
    draw = np.random.default_rng(0)
    x = jnp.asarray(np.float32(draw.standard_normal((8, len(VALUES)))))
    ct = jnp.asarray(np.float32(draw.choice(VALUES, x.shape)))
    found, ops = pulled(fun, x, ct)
    (expected,) = jax.vjp(fun, x)[1](ct)
    np.testing.assert_array_equal(found, expected)
    if name in ONCE:
        assert ops.count("select_n") == 1
        assert "add_any" not in ops


MASK = jnp.arange(4) > 1


def twice(x):
    return jax.vjp(lambda x: x * jnp.sin(x), x)[1](x)


(SUM,) = {
    eqn.primitive
    for eqn in inline(jax.make_jaxpr(twice)(1.0)).eqns
    if eqn.primitive.name == "add_any"
}


def traced(fun, summed=True):
    """A program of a mask and a cotangent, as it is and rewritten.

    Its sums are those of a transpose, if they are to be.
    """
    graph = inline(jax.make_jaxpr(fun)(MASK, jnp.ones(4)))
    eqns = tuple(
        eqn.replace(primitive=SUM) if summed and eqn.primitive.name == "add" else eqn
        for eqn in graph.eqns
    )
    graph = Graph(graph.invars, graph.outvars, eqns)
    return graph, one_select(graph)


def of(mask, h):
    return jnp.where(mask, h, 0.0)


def beside(mask, h):
    return jnp.where(mask, 0.0, h)


OTHERS = {
    "opposite masks": lambda c, h: of(c, h) + of(~c, h) * 2,
    "one side twice": lambda c, h: of(c, h) + of(c, h) * 2,
    "ones elsewhere": lambda c, h: jnp.where(c, h, 1.0) + beside(c, h) * 2,
    "times infinity": lambda c, h: of(c, h) * np.inf + beside(c, h),
    "two cotangents": lambda c, h: of(c, h) + beside(c, h + 1),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_sum_of_two_parts_stays(name):
    graph, made = traced(OTHERS[name])
    assert made is graph


def read_twice(c, h):
    one = of(c, h)
    return one + -beside(c, h), jnp.sin(one)


def test_a_part_that_others_read_is_kept():
    fun = read_twice
    graph, made = traced(fun)
    assert made is not graph
    h = jnp.arange(1.0, 5.0)
    env = dict(zip(made.invars, (MASK, h), strict=True))
    found = evaluate(made, env, made.outvars)
    for one, expected in zip(found, fun(MASK, h), strict=True):
        np.testing.assert_array_equal(one, expected)


def test_a_sum_of_the_user_stays():
    """Of two zeros of which one is negative it is positive; a select is not."""
    graph, made = traced(read_twice, summed=False)
    assert made is graph
