"""Inlining keeps values, effects, name scopes and lines, and drops what is dead."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from passes import _jax
from passes.graph import evaluate
from passes.inline import inline


def graph_of(fun, *args):
    return inline(_jax.hoisted(jax.jit(fun).trace(*args)))


def run(graph, *args):
    return evaluate(graph, dict(zip(graph.invars, args, strict=True)), graph.outvars)


@jax.jit
def inner(x, y):
    with jax.named_scope("inner"):
        unused = jnp.exp(x)
        del unused
        return jnp.sin(x) * y, x


@jax.jit
def outer(x, y):
    with jax.named_scope("outer"):
        a, b = inner(x, y)
        c, _ = inner(a, b)
        return c + a, 3.0, y


@pytest.mark.parametrize(
    "shapes", [((2, 3), (3,)), ((0, 3), (1, 3)), ((1,), ()), ((), ())]
)
def test_values_of_nested_calls(shapes):
    args = [jnp.full(s, 0.5 + i) for i, s in enumerate(shapes)]
    graph = graph_of(outer, *args)
    assert not {"jit", "pjit"} & {e.primitive.name for e in graph.eqns}
    assert not any(e.primitive.name == "exp" for e in graph.eqns)
    for found, true in zip(run(graph, *args), outer(*args), strict=True):
        np.testing.assert_array_equal(found, true)


def test_a_call_that_runs_twice_binds_fresh_variables():
    graph = graph_of(outer, jnp.ones(3), jnp.ones(3))
    bound = [v for e in graph.eqns for v in e.outvars]
    assert len(bound) == len(set(bound))
    assert sum(e.primitive.name == "sin" for e in graph.eqns) == 2


def test_name_scopes_and_lines_stay():
    graph = graph_of(lambda x: outer(x, x), jnp.ones(3))
    (first, second) = [e for e in graph.eqns if e.primitive.name == "sin"]
    for eqn in (first, second):
        assert "outer" in str(eqn.source_info.name_stack)
        assert "inner" in str(eqn.source_info.name_stack)
        assert _jax.source_line(eqn).startswith("test_inline.py:")


def test_effects_stay_and_run_in_order():
    seen = []

    def loud(x):
        jax.debug.callback(lambda v: seen.append(float(v)), x, ordered=True)
        jax.jit(
            lambda y: jax.debug.callback(
                lambda v: seen.append(float(v)), y, ordered=True
            )
        )(x + 1)
        return x * 2

    graph = graph_of(loud, jnp.float32(1))
    assert sum(bool(e.effects) for e in graph.eqns) == 2

    def play(x):
        return evaluate(graph, {graph.invars[0]: x}, graph.outvars, effects=True)

    jax.jit(play)(jnp.float32(1))
    jax.effects_barrier()
    assert seen == [1.0, 2.0]


def test_custom_rules_loops_and_branches_stay_whole():
    @jax.custom_jvp
    def mine(x):
        return jnp.sin(x)

    mine.defjvp(lambda p, t: (mine(*p), 7 * t[0]))

    def fun(x):
        x = jax.checkpoint(jnp.cos)(mine(x))
        x, _ = jax.lax.scan(lambda c, _: (c * 2, None), x, None, length=3)
        return jax.lax.cond(x[0] > 0, jnp.sin, jnp.cos, x)

    names = [e.primitive.name for e in graph_of(fun, jnp.ones(2)).eqns]
    assert {"custom_jvp_call", "scan", "cond"} <= set(names)
    assert "cos" not in names


def test_dead_code_goes():
    def fun(x, y):
        jnp.linalg.inv(y)
        return x + 1

    graph = graph_of(fun, jnp.ones(2), jnp.ones((3, 3)))
    assert [e.primitive.name for e in graph.eqns] == ["add"]
    assert len(graph.invars) == 2
