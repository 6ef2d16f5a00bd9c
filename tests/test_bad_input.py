"""Bad input: the gradient that backpropagation would give, or an error that helps.

Every error names the user's place and what to do about it.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import io_callback

import mwc
from mwc import moonwalk_compile

pytestmark = pytest.mark.usefixtures("program")

W = jnp.arange(6.0).reshape(2, 3)


def square(w):
    return jnp.sum(w**2)


def refused(kind, *words):
    """An error of ours that has every one of the words, in any order."""
    pattern = "".join(f"(?=[\\s\\S]*{word})" for word in words)
    return pytest.raises(kind, match=pattern)


@pytest.mark.parametrize("bad", [-1, -0.5, math.nan])
def test_extra_forwards_out_of_range(bad):
    with refused(mwc.MoonwalkValueError, "extra_forwards", "not negative"):
        moonwalk_compile(square, extra_forwards=bad)


@pytest.mark.parametrize("bad", ["two", True, [1]])
def test_extra_forwards_of_a_wrong_type(bad):
    with refused(mwc.MoonwalkTypeError, "extra_forwards", "a number"):
        moonwalk_compile(square, extra_forwards=bad)


def test_strategies():
    with refused(mwc.MoonwalkValueError, "unknown strategy 'storing'", "'stored'"):
        moonwalk_compile(square, strategies=("checkpoint", "storing"))
    with refused(mwc.MoonwalkValueError, "empty"):
        moonwalk_compile(square, strategies=())


@pytest.mark.parametrize(
    "option",
    [
        {"memory_budget": "8GiB"},
        {"plan": object()},
        {"on_drift": "recompute"},
    ],
)
def test_options_for_later(option):
    with refused(mwc.MoonwalkUnsupportedError, next(iter(option)), "not implemented"):
        moonwalk_compile(square, **option)


def test_options_of_a_wrong_kind():
    with refused(mwc.MoonwalkValueError, "on_drift", "'nan'"):
        moonwalk_compile(square, on_drift="explode")
    with refused(mwc.MoonwalkTypeError, "policy"):
        moonwalk_compile(square, policy=3)
    with refused(mwc.MoonwalkTypeError, "strict"):
        moonwalk_compile(square, strict="yes")
    for bad in ("w", 1.5, (), (True,)):
        with refused(mwc.MoonwalkTypeError, "argnums"):
            moonwalk_compile(square, argnums=bad)
    for option, bad in {"static_argnums": "w", "static_argnames": 3}.items():
        with refused(mwc.MoonwalkTypeError, option, repr(bad)):
            moonwalk_compile(square, **{option: bad})
    with refused(mwc.MoonwalkTypeError, "strategies", "'stored'"):
        moonwalk_compile(square, strategies=3)
    with refused(mwc.MoonwalkTypeError, "no option 'extra'", "extra_forwards"):
        moonwalk_compile(square).with_options(extra=1)
    with refused(mwc.MoonwalkTypeError, "keyword-only"):
        moonwalk_compile(3)
    moonwalk_compile(square, on_drift="nan")


def test_a_loss_that_is_not_a_scalar():
    vector = moonwalk_compile(lambda w: w**2)
    with refused(mwc.MoonwalkTypeError, r"float32\[2, 3\]", "test_bad_input.py"):
        vector.value_and_grad(W)
    with pytest.raises(TypeError, match="scalar-output"):
        jax.grad(vector)(W)
    with refused(mwc.MoonwalkTypeError, "dict", "has_aux"):
        moonwalk_compile(lambda w: {"loss": square(w)}).value_and_grad(W)
    with refused(mwc.MoonwalkTypeError, "pair"):
        moonwalk_compile(square, has_aux=True).value_and_grad(W)


def test_an_integer_loss():
    counts = moonwalk_compile(lambda w: jnp.sum(w > 0))
    with refused(mwc.MoonwalkTypeError, "int32", "cast", "test_bad_input.py"):
        counts.value_and_grad(W)
    with pytest.raises(TypeError, match="int32"):
        jax.grad(counts)(W)


def test_argnums_naming_an_integer():
    def fun(n, w):
        return square(w) * n

    decorated = moonwalk_compile(fun)
    with refused(mwc.MoonwalkTypeError, "argument 0", "int32", "test_bad_input.py"):
        decorated.value_and_grad(jnp.arange(3)[1], W)
    with pytest.raises(TypeError, match="int32"):
        jax.grad(decorated)(jnp.arange(3)[1], W)
    assert jax.grad(decorated, argnums=1)(jnp.arange(3)[1], W).shape == W.shape


@pytest.mark.parametrize("argnums", [2, -3, (0, 5)])
def test_argnums_out_of_range(argnums):
    def fun(w, x):
        return square(w) + square(x)

    decorated = moonwalk_compile(fun, argnums=argnums)
    for run in (decorated, decorated.value_and_grad, decorated.plan):
        with refused(mwc.MoonwalkValueError, "argnums", "2 positional", "fun"):
            run(W, W)


def test_reports_of_what_is_not_there():
    with refused(mwc.MoonwalkError, "target is 3", "'cpu'"):
        moonwalk_compile(square).memory(W, target=3)
    with refused(mwc.MoonwalkValueError, "'backpropagation' is unknown", "'backprop'"):
        moonwalk_compile(square).memory(W, methods="backpropagation")


@pytest.mark.parametrize("argnums", [(0, 0), (0, -2)])
def test_argnums_naming_an_argument_twice(argnums):
    decorated = moonwalk_compile(lambda w, x: square(w), argnums=argnums)
    with refused(mwc.MoonwalkValueError, "argnums", "twice"):
        decorated.value_and_grad(W, W)


def test_argnums_naming_a_keyword_argument():
    with refused(mwc.MoonwalkTypeError, "positionally"):
        moonwalk_compile(square).value_and_grad(w=W)


def test_no_differentiable_leaf():
    with refused(mwc.MoonwalkTypeError, "bool", "str"):
        moonwalk_compile(lambda tree: jnp.array(1.0)).value_and_grad([True, "a"])


def test_a_group_without_parameters():
    decorated = moonwalk_compile(lambda w, more: square(w), argnums=(0, 1))
    _, (grad, none) = decorated.value_and_grad(W, {})
    np.testing.assert_allclose(grad, 2 * W)
    assert none == {}


def test_a_gradient_that_is_zero_is_no_error():
    constant = moonwalk_compile(lambda w: jnp.array(1.0))
    assert not jax.grad(constant)(W).any()
    assert not constant.value_and_grad(W)[1].any()


def test_data_dependent_python_control_flow():
    @moonwalk_compile
    def fun(w):
        if jnp.sum(w) > 0:
            return square(w)
        return jnp.sum(w)

    for run in (fun, jax.grad(fun), jax.jit(fun), fun.value_and_grad):
        with refused(mwc.MoonwalkError, "lax.cond", r"test_bad_input.py:\d+ \(fun\)"):
            run(W)
    with pytest.raises(jax.errors.ConcretizationTypeError, match="argument w"):
        fun(W)


def test_an_escaped_tracer():
    leaked = []
    jax.make_jaxpr(lambda w: leaked.append(w) or w)(W)
    fun = moonwalk_compile(lambda w: square(w) + jnp.sum(leaked[0]))
    with refused(mwc.MoonwalkError, "has ended", "test_bad_input.py"):
        fun(W)
    with pytest.raises(jax.errors.UnexpectedTracerError):
        moonwalk_compile(square)(leaked[0])


def test_unhashable_static_values():
    def fun(w, sizes):
        return square(w) * len(sizes)

    decorated = moonwalk_compile(fun, static_argnums=1)
    for run in (decorated, decorated.value_and_grad):
        with refused(mwc.MoonwalkTypeError, "unhashable", "argument 1", "tuple", "fun"):
            run(W, [1, 2])
    by_name = moonwalk_compile(fun, static_argnames="sizes")
    with refused(mwc.MoonwalkTypeError, "unhashable", "sizes"):
        by_name(W, sizes=[1, 2])
    with refused(mwc.MoonwalkTypeError, "unhashable", "set"):
        moonwalk_compile(fun)(W, {1, 2})
    assert decorated(W, (1, 2)) == 2 * square(W)


@pytest.mark.parametrize("ordered", [False, True])
def test_effects_that_cannot_be_differentiated(ordered):
    @moonwalk_compile
    def fun(w):
        io_callback(lambda v: None, None, w[0, 0], ordered=ordered)
        return square(w)

    assert fun(W) == square(W)
    for run in (jax.grad(fun), jax.jit(jax.grad(fun)), fun.value_and_grad):
        with refused(mwc.MoonwalkUnsupportedError, "IO", "jax.debug", "test_bad_input"):
            run(W)


def test_ordered_debug_effects_run_once():
    seen = []

    @moonwalk_compile
    def fun(w):
        jax.debug.callback(lambda v: seen.append(float(v)), w[0, 1], ordered=True)
        return square(w)

    jax.block_until_ready(jax.jit(jax.grad(fun))(W))
    jax.effects_barrier()
    assert seen == [1.0]


def test_check_under_a_transformation():
    fun = moonwalk_compile(square)
    with refused(mwc.MoonwalkTypeError, "concrete"):
        jax.jit(lambda w: fun.check(w).max_error)(W)


def test_errors_of_the_function_pass_unchanged():
    @moonwalk_compile
    def fun(w):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        fun(W)
