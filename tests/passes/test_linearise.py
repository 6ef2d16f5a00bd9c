"""The two graphs of a stage are `jax.vjp`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from passes.graph import evaluate
from passes.inline import inline
from passes.linearise import is_inexact, linearise
from tests import grammar

pytestmark = pytest.mark.usefixtures("x64", "quick")


def graph_of(fun, *args):
    return inline(jax.make_jaxpr(fun)(*args))


def compare(fun, args, active=None):
    """Checks both graphs of a function of arrays; returns them."""
    graph = graph_of(fun, *args)
    active = active or tuple(is_inexact(v) for v in graph.invars)
    linear = linearise(graph, active)

    @jax.jit
    def ours(*args):
        env = {**linear.consts, **dict(zip(linear.fwd.invars, args, strict=True))}
        found = evaluate(linear.fwd, env, linear.fwd.outvars)
        outs, residuals = found[: len(linear.outs)], found[len(linear.outs) :]
        flags = zip(outs, linear.inexact, strict=True)
        cts = [tangent(jnp.asarray(y)) for y, f in flags if f]
        assert [v.aval.shape for v in linear.ct_inputs] == [ct.shape for ct in cts]
        back = dict(linear.consts)
        back.update(zip(linear.residual_inputs, residuals, strict=True))
        back.update(zip(linear.ct_inputs, cts, strict=True))
        return outs, evaluate(linear.bwd, back, linear.bwd.outvars)

    @jax.jit
    def jaxs(*args):
        def moved(*some):
            rest = iter(some)
            pairs = zip(active, args, strict=True)
            return fun(*[next(rest) if a else x for a, x in pairs])

        some = [x for a, x in zip(active, args, strict=True) if a]
        outs, pull = jax.vjp(moved, *some)
        return jax.tree.leaves(outs), list(pull(jax.tree.map(tangent, outs)))

    for found, true in zip(ours(*args), jaxs(*args), strict=True):
        assert_close(found, true)
    return linear


def tangent(y):
    y = jnp.asarray(y)
    if not jnp.issubdtype(y.dtype, np.inexact):
        return np.zeros(y.shape, jax.dtypes.float0)
    return jnp.cos(jnp.arange(y.size) + 1.0).reshape(y.shape).astype(y.dtype)


def assert_close(found, true):
    for a, b in zip(found, true, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        limit = 1e-12 * np.max(np.abs(b), initial=1)
        np.testing.assert_allclose(a, b, rtol=0, atol=limit)


@pytest.mark.parametrize("shape", [(4, 5), (1, 1), (0, 3), (3, 1)])
def test_products_broadcasts_and_masks(shape):
    rows, width = shape
    draw = np.random.default_rng(0)
    x = jnp.asarray(np.round(draw.standard_normal((rows, width)), 1))
    w, b = jnp.asarray(draw.standard_normal((width, 2))), jnp.ones(2)

    def fun(x, w, b):
        h = jax.nn.relu(x @ w + b)
        return jnp.abs(h), jnp.sum(jnp.maximum(h, b), axis=0), h > 0

    compare(fun, (x, w, b))


@pytest.mark.parametrize("name", sorted(grammar.RULES))
def test_rules(name):
    leaves, tree = jax.tree.flatten(grammar.values(2))
    loss = grammar.loss_of(["push", name])
    compare(lambda *xs: loss(*jax.tree.unflatten(tree, xs)), leaves)


def test_some_active_inputs():
    args = jnp.ones((2, 3)), jnp.ones((3, 4)), jnp.int32(2)

    def fun(x, w, n):
        return jnp.sin(x @ w) * n

    for active in [(True, False, False), (False, True, False), (True, True, False)]:
        linear = compare(fun, args, active)
        assert len(linear.bwd.outvars) == sum(active)


def test_rules_of_the_user_are_theirs():
    @jax.custom_vjp
    def odd(x):
        return jnp.sin(x)

    odd.defvjp(lambda x: (odd(x), None), lambda _, ct: (7 * ct,))
    compare(lambda x: odd(x) * x, (jnp.ones(3),))


def test_results_that_are_inputs_or_integers_or_twice_the_same():
    def fun(x, y):
        s = jnp.sin(x)
        return x, s, s, y, 2.0

    compare(fun, (jnp.ones(3), jnp.int32(1)))


def test_loops_and_branches():
    def fun(x, w):
        h, ys = lax.scan(lambda h, _: (jnp.tanh(h @ w), h[0]), x, None, length=5)
        return lax.cond(h[0, 0] > 0, jnp.sin, jnp.cos, h), ys

    compare(fun, (jnp.ones((2, 3)) * 0.1, jnp.ones((3, 3)) * 0.2))


def test_complex_values():
    def fun(z):
        return jnp.abs(z * 1j) ** 2, z @ z

    compare(fun, (jnp.asarray([[1 + 2j, 0.5], [0.1j, 2 - 1j]]),))


def test_backward_reads_only_what_each_cotangent_needs():
    graph = graph_of(lambda x, w: x @ w, jnp.ones((2, 3)), jnp.ones((3, 4)))
    linear = linearise(graph, (True, True))
    to_x, to_w = linear.bwd.outvars
    assert [len(linear.bwd.inputs_of([ct])) for ct in (to_x, to_w)] == [2, 2]
