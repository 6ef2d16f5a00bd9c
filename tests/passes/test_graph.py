"""The lazy evaluator runs what is asked, from whatever is given."""

import jax
import jax.numpy as jnp
import numpy as np

from passes.graph import evaluate, from_jaxpr, nbytes, size, to_jaxpr


def chain_of_three(x, w):
    a = jnp.sin(x)
    b = a @ w
    c = jnp.cos(b)
    return a, c


def graph_of(fun, *args):
    return from_jaxpr(jax.make_jaxpr(fun)(*args))


ARGS = jnp.ones((2, 3)), jnp.full((3, 5), 0.1)


def test_needed_stops_at_what_is_given():
    graph = graph_of(chain_of_three, *ARGS)
    (a,), (b,), (c,) = (e.outvars for e in graph.eqns)
    assert graph.needed([c]) == [0, 1, 2]
    assert graph.needed([c], given=[b]) == [2]
    assert graph.needed([a]) == [0]
    assert graph.needed([c], given=[c]) == []
    assert graph.inputs_of([a]) == {graph.invars[0]}
    assert graph.inputs_of([c]) == set(graph.invars)
    assert graph.inputs_of([c], given=[a]) == {a, graph.invars[1]}
    assert graph.inputs_of([graph.invars[1]]) == {graph.invars[1]}


def test_evaluation_is_lazy_and_extends_the_environment():
    graph = graph_of(chain_of_three, *ARGS)
    (a,), (b,), (c,) = (e.outvars for e in graph.eqns)
    seen = []

    def before(i):
        seen.append(graph.eqns[i].primitive.name)

    env = {b: jnp.zeros((2, 5))}
    (found,) = evaluate(graph, env, [c], before=before)
    assert seen == ["cos"]
    np.testing.assert_array_equal(found, np.ones((2, 5)))
    assert set(env) == {b, c}
    env = dict(zip(graph.invars, ARGS, strict=True))
    evaluate(graph, env, [a], before=before)
    assert seen == ["cos", "sin"]


def test_literals_and_inputs_as_results():
    graph = graph_of(lambda x: (x, 2.0, x), jnp.ones(3))
    outs = evaluate(graph, {graph.invars[0]: jnp.arange(3.0)}, graph.outvars)
    np.testing.assert_array_equal(outs[0], np.arange(3.0))
    assert outs[1] == 2.0


def test_jaxpr_and_back():
    graph = graph_of(chain_of_three, *ARGS)
    again = from_jaxpr(to_jaxpr(graph))
    assert (again.invars, again.outvars) == (graph.invars, graph.outvars)
    assert len(again.eqns) == 3


def test_bytes_and_elements():
    def fun(*xs):
        return xs

    args = (
        jnp.ones((2, 3)),
        jnp.ones((0, 7)),
        jnp.ones((), jnp.bfloat16),
        jnp.ones(5, bool),
    )
    graph = graph_of(fun, *args, jax.random.key(0))
    assert [nbytes(v) for v in graph.invars] == [24, 0, 2, 5, 8]
    assert [size(v) for v in graph.invars] == [6, 0, 1, 5, 1]
