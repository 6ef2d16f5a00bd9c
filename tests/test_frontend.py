"""The decorator as users meet it: options, leaves, caches, JAX's other front doors."""

from __future__ import annotations

import gc
import timeit
import weakref
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

import mwc
from mwc import moonwalk_compile

pytestmark = pytest.mark.usefixtures("program", "quick")

W = jnp.arange(6.0).reshape(2, 3) / 7
X = jnp.arange(8.0).reshape(4, 2) / 5


def loss(w, x):
    """Adds up sines."""
    return jnp.sum(jnp.sin(x @ w))


def same(mine, true, rtol=1e-5):
    assert jax.tree.structure(mine) == jax.tree.structure(true)
    for one, two in zip(jax.tree.leaves(mine), jax.tree.leaves(true), strict=True):
        np.testing.assert_allclose(one, two, rtol=rtol, atol=1e-6)


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


def test_no_retracing_and_no_replanning(program):
    traces = []

    @moonwalk_compile
    def fun(w, x):
        traces.append(w.shape)
        return loss(w, x)

    for k in range(5):
        fun(W + k, X)
        jax.grad(fun)(W + k, X)
        jax.vmap(jax.grad(fun), (None, 0))(W, jnp.stack([X, X]))
        fun.value_and_grad(W + k, X)
        fun(jax.grad(fun)(W, X), X)
    assert len(traces) == 1
    assert len(program) == 1
    fun(W[:, :2], X)
    assert len(traces) == 2
    assert len(program) == 1


def test_plain_calls_never_plan(program):
    fun = moonwalk_compile(loss)
    fun(W, X)
    jax.jit(fun)(W, X)
    assert program == []


def test_eager_call_costs_little_more_than_jit():
    fun, plain = moonwalk_compile(loss), jax.jit(loss)
    fun(W, X), plain(W, X)

    def best(f):
        return min(timeit.repeat(lambda: f(W, X), number=50, repeat=9)) / 50

    assert best(fun) - best(plain) < 100e-6


def test_programs_are_freed_with_the_function():
    fun = moonwalk_compile(lambda w: jnp.sum(w**2))
    jax.grad(fun)(W)
    watch = weakref.ref(fun._shared)
    del fun
    jax.clear_caches()
    gc.collect()
    assert watch() is None


def test_abstract_front_doors():
    fun = moonwalk_compile(loss)
    shapes = (
        jax.ShapeDtypeStruct(W.shape, W.dtype),
        jax.ShapeDtypeStruct(X.shape, X.dtype),
    )
    assert jax.eval_shape(fun, *shapes).shape == ()
    assert jax.eval_shape(jax.grad(fun), *shapes).shape == W.shape
    assert fun.plan(*shapes) is None
    assert fun.plan(W, X) is None
    compiled = fun.value_and_grad.lower(*shapes).compile()
    same(compiled(W, X), jax.value_and_grad(loss)(W, X))
    same(jax.jit(jax.grad(fun)).lower(W, X).compile()(W, X), jax.grad(loss)(W, X))


def test_export():
    fun = jax.jit(jax.grad(moonwalk_compile(loss)))
    data = jax.export.export(fun)(W, X).serialize()
    same(jax.export.deserialize(data).call(W, X), jax.grad(loss)(W, X))
    value = jax.export.export(jax.jit(moonwalk_compile(loss)))(W, X)
    again = jax.export.deserialize(value.serialize(vjp_order=1))
    same(jax.grad(again.call)(W, X), jax.grad(loss)(W, X))


def test_donation_by_an_outer_jit():
    fun = moonwalk_compile(loss)
    step = jax.jit(lambda w, x: w - jax.grad(fun)(w, x), donate_argnums=0)
    before = jnp.array(W)
    same(step(before, X), W - jax.grad(loss)(W, X))
    assert before.is_deleted()


def test_disable_jit_shows_python_values():
    seen = []

    @moonwalk_compile
    def fun(w, x):
        seen.append(isinstance(w, jax.core.Tracer))
        return loss(w, x)

    with jax.disable_jit():
        fun(W, X)
        same(jax.grad(fun)(W, X), jax.grad(loss)(W, X))
    assert seen[0] is False


def test_other_settings_trace_again():
    fun = moonwalk_compile(loss)
    assert fun(W, X).dtype == jnp.float32
    with jax.enable_x64(True):
        wide = jax.grad(fun)(np.asarray(W, np.float64), np.asarray(X, np.float64))
        assert wide.dtype == jnp.float64
    assert jax.grad(fun)(np.asarray(W, np.float64), X).dtype == jnp.float32


def test_debug_callbacks_run_once():
    seen = []

    @moonwalk_compile
    def fun(w):
        def step(c, r):
            jax.debug.callback(lambda c: seen.append(float(c)), jnp.sum(c))
            return jnp.tanh(c + r), None

        jax.debug.callback(lambda v: seen.append(float(v)), jnp.sum(w))
        out = jax.jit(lambda w: jax.lax.scan(step, w[0], w[1:])[0])(w)
        return jnp.sum(out**2)

    def count(run):
        seen.clear()
        jax.block_until_ready(run())
        jax.effects_barrier()
        return len(seen)

    assert count(lambda: fun(W)) == 2
    assert count(lambda: jax.grad(fun)(W)) == 2
    assert count(lambda: jax.jit(jax.grad(fun))(W)) == 2
    assert count(lambda: jax.jit(lambda w: jax.jvp(fun, (w,), (w,)))(W)) == 2
    assert count(lambda: jax.jvp(jax.grad(fun), (W,), (W,))) == 2
    assert count(lambda: jax.jit(jax.hessian(fun))(W)) == 2
    assert count(lambda: fun.value_and_grad(W)) == 2


def test_source_lines_and_scopes_reach_the_compiler():
    @moonwalk_compile
    def fun(w, x):
        with jax.named_scope("my_scope"):
            return loss(w, x)

    lowered = jax.jit(jax.grad(fun)).lower(W, X)
    text = lowered.as_text(debug_info=True)
    assert "my_scope" in text
    assert "test_frontend.py" in text


def test_named_axis_and_spmd_name():
    fun = moonwalk_compile(loss)
    mapped = jax.vmap(jax.grad(fun), (None, 0), axis_name="b")
    same(
        mapped(W, jnp.stack([X, X])),
        jax.vmap(jax.grad(loss), (None, 0))(W, jnp.stack([X, X])),
    )


def test_check():
    fun = moonwalk_compile(loss, argnums=(0, 1))
    report = fun.check(W, X)
    assert report.ok
    assert report.max_error < 1e-5
    assert report.headroom is None
    assert report.worst_stage is None
    assert "agree" in str(report)


@pytest.mark.usefixtures("wrong_program")
def test_check_finds_a_wrong_gradient():
    report = moonwalk_compile(loss, argnums=(0, 1)).check(W, X)
    assert not report.ok
    assert report.worst_leaf == "['gradient'][0]"
    assert "DIFFER" in str(report)


def test_mutable_arrays_inside_are_values():
    def fun(w):
        total = jax.new_ref(jnp.zeros(()))

        def add(i, carry):
            total[...] += jnp.sum(jnp.sin(w[i])) * carry
            return carry * 2.0

        jax.lax.fori_loop(0, 2, add, 1.0)
        return total[...]

    decorated = moonwalk_compile(fun)
    same(decorated(W), fun(W))
    same(jax.grad(decorated)(W), jax.grad(fun)(W))
    assert jax.grad(decorated)(W).any()
    same(jax.jit(jax.grad(decorated))(W), jax.grad(fun)(W))


def count_in(counter, w):
    counter[...] += 1.0
    return jnp.sum(w**2)


def test_mutable_arrays_from_outside_leave_the_function_as_it_is():
    counter = jax.new_ref(jnp.zeros(()))
    given = moonwalk_compile(count_in, argnums=1)
    captured = moonwalk_compile(lambda w: count_in(counter, w))
    given(counter, W)
    captured(W)
    same(jax.jit(captured)(W), jnp.sum(W**2))
    assert counter[...] == 3.0
    for fun, args in ((given, (counter, W)), (captured, (W,))):
        with pytest.raises(mwc.MoonwalkUnsupportedError, match="no plan"):
            fun.plan(*args)
    strict = moonwalk_compile(count_in, argnums=1, strict=True)
    with pytest.raises(mwc.MoonwalkUnsupportedError, match=r"jax\.Ref"):
        strict(counter, W)


def test_checkify():
    def fun(w):
        checkify.check(jnp.sum(w) < 100.0, "too large")
        return jnp.sum(w**2)

    run = checkify.checkify(jax.grad(moonwalk_compile(fun)))
    error, grads = run(W)
    error.throw()
    same(grads, 2 * W)
    with pytest.raises(checkify.JaxRuntimeError, match="too large"):
        run(W * 1000)[0].throw()


def test_inf_and_nan_are_where_backpropagation_has_them():
    def fun(w):
        return jnp.sum(jnp.log(w)) + jnp.sum(jnp.sqrt(w))

    w = jnp.array([0.0, -1.0, 2.0, jnp.inf, jnp.nan])
    decorated = moonwalk_compile(fun)
    np.testing.assert_array_equal(jax.grad(decorated)(w), jax.grad(fun)(w))
    assert decorated.check(w).ok
