"""Operation counts against hand counts, and against JAX's own gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from passes.flops import Flops, eqn_flops, flops


def count(fun, *args):
    return flops(jax.make_jaxpr(fun)(*args))


def with_jvp(fun):
    fun = jax.custom_jvp(fun)
    fun.defjvp(lambda primals, tangents: jax.jvp(fun, primals, tangents))
    return fun


def with_vjp(fun):
    wrapped = jax.custom_vjp(fun)
    wrapped.defvjp(lambda *args: jax.vjp(fun, *args), lambda pull, ct: pull(ct))
    return wrapped


def spec(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def test_dot_general_counts_two_operations_a_multiply_add():
    assert count(jnp.dot, spec(3, 5), spec(5, 7)).matrix == 2 * 3 * 5 * 7
    batched = count(jnp.matmul, spec(2, 3, 5), spec(2, 5, 7))
    assert batched.matrix == 2 * 2 * 3 * 5 * 7
    assert count(jnp.dot, spec(0, 5), spec(5, 7)).matrix == 0
    z = spec(3, 5, dtype=jnp.complex64)
    assert count(jnp.dot, z, spec(5, 7, dtype=jnp.complex64)).matrix == 8 * 3 * 5 * 7


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("groups", [1, 2])
def test_conv_and_its_gradients_cost_the_same(stride, groups):
    def conv(x, w):
        return lax.conv_general_dilated(
            x, w, (stride, stride), "SAME", feature_group_count=groups
        )

    x, w = spec(2, 4, 9, 8), spec(6, 4 // groups, 3, 3)
    forward = count(conv, x, w).matrix

    def brute():
        total = 0
        n_h, n_w = -(-9 // stride), -(-8 // stride)
        lo = [max((n - 1) * stride + 3 - s, 0) // 2 for n, s in ((n_h, 9), (n_w, 8))]
        for a in range(n_h * 3):
            for b in range(n_w * 3):
                i = (a // 3) * stride + a % 3 - lo[0]
                j = (b // 3) * stride + b % 3 - lo[1]
                total += 0 <= i < 9 and 0 <= j < 8
        return 2 * 2 * 6 * (4 // groups) * total

    assert forward == brute()

    def loss(x, w):
        return conv(x, w).sum()

    assert count(jax.value_and_grad(loss, (0, 1)), x, w).matrix == 3 * forward


def test_loops_multiply_and_unknown_trips_are_said():
    def scanned(h, ws):
        return lax.scan(lambda h, w: (jnp.tanh(h @ w), None), h, ws)[0]

    one = 2 * 3 * 4 * 4
    got = count(scanned, spec(3, 4), spec(10, 4, 4))
    assert (got.matrix, got.elementwise, got.exact) == (10 * one, 10 * 12, True)

    def loop(h, w):
        return lax.while_loop(lambda h: h[0, 0] < 1, lambda h: h @ w, h)

    got = count(loop, spec(3, 4), spec(4, 4))
    assert (got.matrix, got.exact) == (one, False)


def test_branches_count_the_dearest():
    def branch(p, h, w):
        return lax.cond(p, lambda h: h @ w @ w, lambda h: h @ w, h)

    got = count(branch, True, spec(3, 4), spec(4, 4))
    assert (got.matrix, got.exact) == (2 * 2 * 3 * 4 * 4, False)


@pytest.mark.parametrize(
    "wrap", [jax.jit, jax.checkpoint, with_jvp, with_vjp, jax.vmap]
)
def test_calls_count_what_they_call(wrap):
    def fun(h, w):
        return jnp.maximum(h @ w, 0)

    h, w = (
        (spec(2, 3, 4), spec(2, 4, 5)) if wrap is jax.vmap else (spec(6, 4), spec(4, 5))
    )
    assert count(wrap(fun), h, w).matrix == 2 * 6 * 4 * 5


def test_backpropagation_is_three_forward_passes():
    def loss(ws, x):
        for w in ws:
            x = jax.nn.relu(x @ w)
        return jnp.mean(x**2)

    ws, x = [spec(8, 8)] * 4, spec(3, 8)
    forward = count(loss, ws, x).matrix
    assert count(jax.grad(loss, (0, 1)), ws, x).matrix == 3 * forward


def test_expand_supplies_a_hidden_program():
    inner = jax.make_jaxpr(jnp.dot)(spec(3, 5), spec(5, 7))
    (eqn,) = jax.make_jaxpr(jnp.sin)(np.float32(1)).jaxpr.eqns
    assert eqn_flops(eqn) == Flops(elementwise=1)
    assert (
        eqn_flops(eqn, lambda e: [(inner, 3)] if e is eqn else None).matrix
        == 3 * 2 * 3 * 5 * 7
    )


def test_reductions_read_and_movement_is_free():
    got = count(lambda x: x.reshape(4, 3).T.sum(0), spec(12))
    assert (got.matrix, got.elementwise) == (0, 12)
    pooled = count(
        lambda x: lax.reduce_window(x, 0.0, lax.add, (2,), (2,), "VALID"), spec(8)
    )
    assert pooled.elementwise == 8
