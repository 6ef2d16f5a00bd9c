"""Mutable arrays, checks, inf and NaN: what is not a function of arrays alone."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

import mwc
from mwc import moonwalk_compile
from tests.frontend import W, same

pytestmark = pytest.mark.usefixtures("program", "quick")


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
