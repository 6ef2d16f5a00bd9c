"""What `jax.jit` does, a decorated function does: caches, export, settings, names."""

from __future__ import annotations

import gc
import sys
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mwc import moonwalk_compile
from tests.frontend import W, X, loss, same

pytestmark = pytest.mark.usefixtures("program", "quick")


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
    """In calls of functions, which do not depend on what else the machine does."""
    fun = moonwalk_compile(loss)
    fun(W, X)
    calls = []
    before = sys.getprofile()
    sys.setprofile(lambda frame, event, _: calls.append(event))
    try:
        fun(W, X)
    finally:
        sys.setprofile(before)
    # 262 on JAX 0.10.2 and 0.12.0.1.
    assert sum(event in ("call", "c_call") for event in calls) <= 400


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
    assert fun.plan(*shapes) == fun.plan(W, X)
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
    assert "frontend.py" in text


def test_named_axis_and_spmd_name():
    fun = moonwalk_compile(loss)
    mapped = jax.vmap(jax.grad(fun), (None, 0), axis_name="b")
    same(
        mapped(W, jnp.stack([X, X])),
        jax.vmap(jax.grad(loss), (None, 0))(W, jnp.stack([X, X])),
    )
