"""Links: the derivative of a stage is the same, and each kind is traced once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from passes.graph import evaluate
from passes.inline import inline
from passes.linearise import is_inexact, linearise
from passes.repeats import Repeats

pytestmark = pytest.mark.usefixtures("x64", "quick")


def chain(act, skip, count=12):
    def fun(x, *ws):
        early = x
        for i, w in enumerate(ws):
            x = act(x @ w) * 1.5
            if skip and i == 3:
                early = x
        return x + early if skip else x

    draw = np.random.default_rng(0)
    ws = [jnp.asarray(draw.standard_normal((5, 5)) / 2) for _ in range(count)]
    return fun, (jnp.asarray(draw.standard_normal((3, 5))), *ws)


def maxmin(z):
    a, b = z[:, :2], z[:, 2:4]
    return jnp.concatenate([jnp.maximum(a, b), jnp.minimum(a, b), z[:, 4:]], 1)


def looped(z):
    return lax.scan(lambda c, _: (jnp.sin(c), None), z, None, length=3)[0]


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("act", [jnp.tanh, jax.nn.relu, maxmin, looped])
def test_same_derivative(act, skip):
    fun, args = chain(act, skip)
    graph = inline(jax.make_jaxpr(fun)(*args))
    active = tuple(map(is_inexact, graph.invars))
    repeats = Repeats(graph)
    plain, linked = linearise(graph, active), linearise(graph, active, repeats.evaluate)
    assert 1 < len(repeats._calls) <= 4

    def pulled(linear):
        env = {**linear.consts, **dict(zip(linear.fwd.invars, args, strict=True))}
        found = evaluate(linear.fwd, env, linear.fwd.outvars)
        outs = found[: len(linear.outs)]
        back = {**linear.consts, **dict(zip(linear.ct_inputs, outs, strict=True))}
        residuals = found[len(outs) :]
        back.update(zip(linear.residual_inputs, residuals, strict=True))
        return [*outs, *evaluate(linear.bwd, back, linear.bwd.outvars)]

    for mine, true in zip(pulled(linked), pulled(plain), strict=True):
        np.testing.assert_allclose(mine, true, rtol=1e-14, atol=0)
    count = lambda linear: len(linear.fwd.eqns) + len(linear.bwd.eqns)  # noqa: E731
    assert count(linked) == count(plain)


def test_only_what_is_asked_runs():
    fun, args = chain(jnp.tanh, False)
    graph = inline(jax.make_jaxpr(lambda *a: (fun(*a), a[0] * 2))(*args))
    env = dict(zip(graph.invars, args, strict=True))
    (double,) = Repeats(graph).evaluate(graph, env, graph.outvars[1:])
    assert np.array_equal(double, 2 * args[0])
    assert graph.outvars[0] not in env


def test_unlike_products_are_no_repeats():
    def fun(x, *ws):
        for w in ws:
            x = jnp.tanh(x @ w)
        return x

    ws = [jnp.ones((k, k + 1)) for k in range(2, 9)]
    graph = inline(jax.make_jaxpr(fun)(jnp.ones((3, 2)), *ws))
    repeats = Repeats(graph)
    env = dict(zip(graph.invars, (jnp.ones((3, 2)), *ws), strict=True))
    repeats.evaluate(graph, env, graph.outvars)
    assert not repeats._calls
