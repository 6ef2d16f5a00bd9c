"""The decorator as users meet it: options, leaves, methods, results."""

from __future__ import annotations

from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest

import mwc
from mwc import moonwalk_compile
from tests.frontend import W, X, loss, same

pytestmark = pytest.mark.usefixtures("program", "quick")


def test_ways_to_decorate():
    expected = jax.grad(loss)(W, X)
    for decorated in (
        moonwalk_compile(loss),
        moonwalk_compile()(loss),
        moonwalk_compile(extra_forwards=1)(loss),
        partial(moonwalk_compile, strategies=("checkpoint",))(loss),
        moonwalk_compile(loss, argnums=(0, 1)),
        mwc.moonwalk_compile(partial(loss, x=X)),
    ):
        args = (W,) if "partial" in repr(decorated) else (W, X)
        same(jax.grad(decorated)(*args), expected)


def test_wraps():
    decorated = moonwalk_compile(loss)
    assert decorated.__name__ == "loss"
    assert decorated.__doc__ == "Adds up sines."
    assert decorated.__wrapped__ is loss


def test_value_keeps_types_and_structure():
    def fun(tree, n, flag):
        return {
            "weak": 2.0 * n,
            "none": None,
            "int": tree["i"] + 1,
            "bool": jnp.logical_not(flag),
            "half": tree["h"] * 2,
            "float": 3.5,
        }

    tree = {"i": jnp.arange(3), "h": jnp.ones(2, jnp.bfloat16)}
    mine = moonwalk_compile(fun)(tree, 1.0, True)
    true = jax.jit(fun)(tree, 1.0, True)
    assert jax.tree.structure(mine) == jax.tree.structure(true)
    for one, two in zip(jax.tree.leaves(mine), jax.tree.leaves(true), strict=True):
        assert (one.dtype, one.weak_type) == (two.dtype, two.weak_type)


def test_weakly_typed_gradients():
    decorated = moonwalk_compile(lambda x: x**2)
    mine, true = jax.grad(decorated)(3.0), jax.grad(lambda x: x**2)(3.0)
    assert (mine.dtype, mine.weak_type, float(mine)) == (true.dtype, True, 6.0)
    half = jnp.ones(3, jnp.bfloat16)
    assert (
        jax.grad(moonwalk_compile(lambda x: jnp.sum(x * 2.0)))(half).dtype == half.dtype
    )


@pytest.mark.parametrize("make_key", [jax.random.key, jax.random.PRNGKey])
def test_leaves_without_gradients(make_key):
    def fun(tree, key):
        noise = jax.random.normal(key, tree["w"].shape)
        return jnp.sum((tree["w"] + noise) ** 2) * jnp.sum(tree["n"])

    tree = {"w": W, "n": jnp.arange(3), "none": None, "flag": True}
    key = make_key(1)
    decorated = moonwalk_compile(fun)
    value, grads = decorated.value_and_grad(tree, key)
    same(grads["w"], jax.grad(lambda w: fun({**tree, "w": w}, key))(W))
    assert (grads["n"], grads["none"], grads["flag"]) == (None, None, None)
    same(value, fun(tree, key))
    allowed = jax.grad(decorated, allow_int=True)(tree, key)
    assert allowed["n"].dtype == jax.dtypes.float0
    mapped = jax.vmap(jax.grad(lambda w, k: decorated({**tree, "w": w}, k)), (None, 0))
    keys = jax.random.split(key, 3)
    true = jax.grad(lambda w: fun({**tree, "w": w}, keys[1]))(W)
    same(mapped(W, keys)[1], true)


def test_keyword_arguments_and_defaults():
    def fun(w, *, x, scale=2.0):
        return loss(w, x) * scale

    decorated = moonwalk_compile(fun)
    same(jax.grad(decorated)(W, x=X), jax.grad(fun)(W, x=X))
    same(decorated(W, scale=3.0, x=X), fun(W, x=X, scale=3.0))
    same(decorated.value_and_grad(W, x=X), jax.value_and_grad(fun)(W, x=X))
    same(moonwalk_compile(loss)(w=W, x=X), loss(W, X))


def test_static_arguments():
    def fun(w, mode, x, *, power):
        out = jnp.sin(x @ w) if mode == "sin" else jnp.cos(x @ w)
        return jnp.sum(out**power)

    decorated = moonwalk_compile(fun, static_argnums=1, static_argnames="power")
    for mode in ("sin", "cos"):
        same(
            jax.grad(decorated)(W, mode, X, power=2),
            jax.grad(fun)(W, mode, X, power=2),
        )
    same(
        decorated.value_and_grad(W, "sin", X, power=3),
        jax.value_and_grad(fun)(W, "sin", X, power=3),
    )


def test_leaves_that_are_not_arrays_are_static():
    def fun(tree, x):
        return jnp.sum(tree["act"](x @ tree["w"])) + (tree["name"] == "b")

    decorated = moonwalk_compile(fun)
    tree = {"w": W, "act": jnp.tanh, "name": "a"}
    for change in ({}, {"act": jnp.sin}, {"name": "b"}):
        now = {**tree, **change}
        same(decorated(now, X), fun(now, X))
        value, grads = decorated.value_and_grad(now, X)
        same(grads["w"], jax.grad(lambda w, t=now: fun({**t, "w": w}, X))(W))
        assert grads["act"] is None
        same(value, fun(now, X))


def test_results_that_are_not_arrays():
    def fun(w):
        return jnp.sum(w), {"name": "sum", "call": jnp.sin}

    value, info = moonwalk_compile(fun)(W)
    assert info == {"name": "sum", "call": jnp.sin}
    result = moonwalk_compile(fun, has_aux=True).value_and_grad(W)
    assert result[0][1]["name"] == "sum"
    same(value, jnp.sum(W))


def test_equinox_module():
    model = eqx.nn.MLP(2, 3, 4, 2, key=jax.random.key(0))

    def fun(model, x):
        return jnp.mean(jax.vmap(model)(x) ** 2)

    decorated = moonwalk_compile(fun)
    value, grads = decorated.value_and_grad(model, X)
    true_value, true_grads = eqx.filter_value_and_grad(fun)(model, X)
    same(value, true_value)
    same(grads, true_grads)
    same(eqx.filter_grad(decorated)(model, X), true_grads)


class Model:
    def __init__(self, scale):
        self.scale = scale

    @moonwalk_compile
    def loss(self, w, x):
        return self.scale * loss(w, x)


class Layer(eqx.Module):
    w: jax.Array

    @moonwalk_compile
    def loss(self, x):
        return loss(self.w, x)


def test_methods():
    one, two = Model(2.0), Model(3.0)
    for model in (one, two):
        same(jax.grad(model.loss)(W, X), model.scale * jax.grad(loss)(W, X))
        value, grads = model.loss.value_and_grad(W, X)
        same((value, grads), (model.scale * loss(W, X), jax.grad(model.loss)(W, X)))
    same(Model.loss(one, W, X), 2.0 * loss(W, X))
    layer = Layer(W)
    same(layer.loss(X), loss(W, X))
    same(jax.grad(layer.loss)(X), jax.grad(loss, argnums=1)(W, X))
    same(eqx.filter_grad(lambda m: m.loss(X))(layer).w, jax.grad(loss)(W, X))


def test_has_aux_and_several_argnums():
    def fun(w, x):
        return loss(w, x), {"mean": jnp.mean(x), "count": 4}

    decorated = moonwalk_compile(fun, argnums=(0, 1), has_aux=True)
    mine = decorated.value_and_grad(W, X)
    true = jax.value_and_grad(fun, argnums=(0, 1), has_aux=True)(W, X)
    same(mine, true)
    (value, aux), grads, drift = decorated.value_and_grad(W, X, with_drift=True)
    same(((value, aux), grads), true)
    assert not bool(drift.tripped)


def test_roles_and_negative_argnums(program):
    table = jnp.ones(3)

    @partial(moonwalk_compile, argnums=-1)
    def fun(x, tree):
        return loss(tree["w"], x) + jnp.sum(tree["b"] * table)

    fun.value_and_grad(X, {"w": W, "b": jnp.ones(3)})
    # The captured table, x, then the leaves of the tree: its keys in order.
    assert program == [("data", "data", "parameter", "parameter")]
