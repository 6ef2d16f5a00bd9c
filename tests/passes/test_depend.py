"""Sides of equations, and the variables through which tangents flow."""

import jax
import jax.numpy as jnp
import pytest

from passes.depend import Side, carries_tangent, last_reads, reached, sides
from passes.inline import inline
from passes.linearise import is_inexact


def graph_of(fun, *args):
    return inline(jax.make_jaxpr(fun)(*args))


def sides_of(fun, *args, parameters=1):
    graph = graph_of(fun, *args)
    found = sides(graph, graph.invars[:parameters])
    return [(e.primitive.name, s) for e, s in zip(graph.eqns, found, strict=True)]


W = jnp.ones((4, 4))


@pytest.mark.parametrize("rows", [0, 1, 64])
def test_parameter_constant_and_state(rows):
    def fun(w, x):
        return x @ (w * jnp.eye(4)) + jnp.sin(x)

    found = sides_of(fun, W, jnp.ones((rows, 4)))
    by_name = dict(found)
    if rows:
        assert by_name["mul"] is Side.PARAMETER
        assert by_name["iota"] is Side.CONST
    assert by_name["dot_general"] is Side.STATE
    assert by_name["sin"] is Side.STATE


def test_a_program_of_parameters_alone_is_a_chain():
    def fun(w):
        for _ in range(3):
            w = jnp.tanh(w @ w)
        return jnp.sum(w)

    found = sides_of(fun, W)
    assert {side for _, side in found} == {Side.STATE}


def test_effects_happen_once_in_the_chain():
    def fun(w, x):
        jax.debug.print("{}", w.sum())
        return x @ w

    found = dict(sides_of(fun, W, jnp.ones((64, 4))))
    assert found["reduce_sum"] is Side.PARAMETER
    loud = [side for name, side in found.items() if name.startswith("debug")]
    assert loud == [Side.STATE]


def test_captured_arrays_and_random_draws_are_state():
    def fun(w, key, x):
        return x @ w * jax.random.uniform(key, (4,))

    found = sides_of(fun, W, jax.random.key(0), jnp.ones((64, 4)))
    assert {s for n, s in found if n.startswith("random")} == {Side.STATE}


def test_tangents_pass_inexact_values_alone():
    def fun(w, x):
        index = jnp.argmax(x)
        mask = x > 0
        return jnp.where(mask, x @ w, 0).sum() + w[index, 0]

    graph = graph_of(fun, W, jnp.ones(4))
    moving = carries_tangent(graph, graph.invars[:1], is_inexact)
    assert graph.invars[0] in moving
    assert graph.invars[1] not in moving
    assert all(is_inexact(v) for v in moving)
    assert graph.outvars[0] in moving
    masks = {v for e in graph.eqns if e.primitive.name == "gt" for v in e.outvars}
    assert masks
    assert not masks & carries_tangent(graph, graph.invars, is_inexact)
    assert masks <= reached(graph, graph.invars[1:])


def test_integer_sources_carry_nothing():
    graph = graph_of(lambda n, x: x * n, jnp.int32(2), jnp.ones(3))
    assert carries_tangent(graph, graph.invars[:1], is_inexact) == set()


def test_last_reads():
    graph = graph_of(lambda x: jnp.sin(x) * x + x, jnp.ones(3))
    last = last_reads(graph, range(len(graph.eqns)))
    assert last[graph.invars[0]] == len(graph.eqns) - 1
    assert graph.outvars[0] not in last
