"""`mwc.constraints`: orthonormal and triangular maps, and the way back to them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mwc
from mwc import constraints
from mwc.constraints import orthogonal, retract, retraction, unit_triangular

SHAPES = [(8, 8), (9, 5), (5, 9), (1, 1), (1, 4), (4, 1), (2, 3, 6, 4)]


def raw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def nearest(x):
    """The polar factor, by singular values."""
    u, _, v = np.linalg.svd(np.asarray(x, np.float64), full_matrices=False)
    return u @ v


def defect(q):
    """|Q^T Q - I| / sqrt(n) over the shorter side, in float64; the worst matrix."""
    q = np.asarray(q, np.float64)
    q = q if q.shape[-2] >= q.shape[-1] else np.swapaxes(q, -1, -2)
    n = q.shape[-1]
    gap = np.swapaxes(q, -1, -2) @ q - np.eye(n)
    return np.max(np.linalg.norm(gap, axis=(-2, -1)), initial=0) / np.sqrt(max(n, 1))


@pytest.mark.parametrize("shape", SHAPES)
def test_nearest_orthonormal_matrix(x64, shape):
    x = raw(*shape)
    q = orthogonal(jnp.asarray(x))
    np.testing.assert_allclose(q, nearest(x), rtol=0, atol=1e-10)
    assert defect(q) <= 1e-14
    np.testing.assert_allclose(orthogonal(q), q, rtol=0, atol=1e-13)


@pytest.mark.parametrize("shape", [*SHAPES, (96, 96), (256, 64), (64, 256)])
def test_float32(shape):
    q = orthogonal(np.float32(raw(*shape)))
    assert q.dtype == np.float32
    assert defect(q) <= 3e-7


@pytest.mark.parametrize("size", [1e-2, 3e-2, 0.1, 0.3, 0.6])
def test_an_error_in_one_direction_goes_too(size):
    """As an optimizer's first step makes: small in every entry, large in that one."""
    near, v = nearest(raw(512, 512)), np.full(512, 512**-0.5)
    moved = near - size * np.outer(near @ v, v)
    q = np.asarray(orthogonal(np.float32(moved)), np.float64)
    assert np.linalg.norm(q.T @ q - np.eye(512), 2) <= 1e-6


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e3, 1e30])
def test_scale_does_not_matter(scale):
    x = np.float32(raw(12, 8))
    q = orthogonal(x * np.float32(scale))
    np.testing.assert_allclose(q, nearest(x), rtol=0, atol=1e-5)
    assert defect(q) <= 3e-7


@pytest.mark.parametrize("condition", [1e2, 1e4])
def test_badly_conditioned(condition):
    u, v = nearest(raw(16, 16)), nearest(raw(16, 16, seed=1))
    q = orthogonal(np.float32(u * np.geomspace(1, 1 / condition, 16) @ v))
    assert defect(q) <= 3e-7
    np.testing.assert_allclose(q, u @ v, rtol=0, atol=1e-6 * condition)


@pytest.mark.parametrize("shape", [(0, 0), (3, 0), (0, 3), (0, 4, 4)])
def test_empty(shape):
    x = np.zeros(shape, np.float32)
    assert orthogonal(x).shape == shape
    grad = jax.grad(lambda x: jnp.sum(orthogonal(x)))(x)
    assert grad.shape == shape


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_comes_back_in_float32(dtype):
    q = orthogonal(jnp.asarray(raw(6, 4), dtype))
    assert q.dtype == np.float32
    assert defect(q) <= 3e-7


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("shape", [(5, 5), (7, 4), (4, 7), (1, 1), (2, 5, 3)])
def test_derivative_of_orthogonal(shape):
    x, d, c = (jnp.asarray(raw(*shape, seed=s)) for s in range(3))
    size = 1e-5
    ahead, behind = nearest(x + size * d), nearest(x - size * d)
    q, push = jax.jvp(orthogonal, (x,), (d,))
    np.testing.assert_allclose(push, (ahead - behind) / (2 * size), atol=1e-8)
    pull = jax.vjp(orthogonal, x)[1](c)[0]
    np.testing.assert_allclose(jnp.vdot(pull, d), jnp.vdot(c, push), atol=1e-10)
    # Q does not change along itself.
    np.testing.assert_allclose(jax.jvp(orthogonal, (x,), (q,))[1] * 0, 0 * q)


@pytest.mark.usefixtures("x64")
def test_second_derivative_of_orthogonal():
    x, c = jnp.asarray(raw(3, 2)), jnp.asarray(raw(3, 2, seed=2))
    grad = jax.jit(jax.grad(lambda x: jnp.sum(c * orthogonal(x))))
    hessian = jax.jit(jax.jacfwd(grad))(x).reshape(6, 6)
    assert np.all(np.isfinite(hessian))
    for i, unit in enumerate(np.eye(6).reshape(6, 3, 2)):
        gap = (grad(x + 1e-5 * unit) - grad(x - 1e-5 * unit)) / 2e-5
        np.testing.assert_allclose(hessian[i], gap.ravel(), atol=1e-7)


@pytest.mark.usefixtures("x64")
def test_vmap_of_orthogonal():
    x = jnp.asarray(raw(3, 5, 4))
    np.testing.assert_allclose(jax.vmap(orthogonal)(x), orthogonal(x), atol=1e-13)
    grads = [
        jax.grad(lambda x, f=f: jnp.sum(jnp.sin(f(x))))(x)
        for f in (orthogonal, jax.vmap(orthogonal))
    ]
    np.testing.assert_allclose(*grads, atol=1e-11)


@pytest.mark.parametrize("size", [1, 2, 16, 128])
@pytest.mark.parametrize("bound", [0.1, 0.5, 0.9])
def test_unit_triangular(x64, size, bound):
    for scale in (1e-3, 1.0, 1e3):
        w = np.asarray(unit_triangular(jnp.asarray(scale * raw(size, size)), bound))
        np.testing.assert_array_equal(np.diagonal(w), 1)
        np.testing.assert_array_equal(np.triu(w, 1), 0)
        assert np.linalg.norm(np.tril(w, -1)) <= bound * (1 + 1e-12)
        assert np.linalg.cond(w) <= (1 + bound) / (1 - bound) * (1 + 1e-9)


def test_unit_triangular_leaves_what_is_small(x64):
    x = jnp.asarray(0.01 * raw(4, 4))
    expected = np.tril(x, -1) + np.eye(4)
    np.testing.assert_allclose(unit_triangular(x), expected, atol=1e-15)
    for y in (x, 100 * x, 0 * x):
        grad = jax.grad(lambda y: jnp.sum(jnp.sin(unit_triangular(y))))(y)
        assert np.all(np.isfinite(grad))
        size = 1e-6
        d = jnp.asarray(raw(4, 4, seed=3))
        gap = [jnp.sum(jnp.sin(unit_triangular(y + s * size * d))) for s in (1, -1)]
        np.testing.assert_allclose(
            jnp.vdot(grad, d), (gap[0] - gap[1]) / (2 * size), rtol=1e-6, atol=1e-8
        )


def test_retract():
    params = {
        "w": np.float32(raw(6, 4)),
        "stack": np.float32(raw(2, 3, 5)),
        "b": np.ones(4, np.float32),
        "half": jnp.asarray(raw(4, 4), jnp.bfloat16),
        "count": np.arange(4).reshape(2, 2),
    }
    back = retract(params)
    assert jax.tree.structure(back) == jax.tree.structure(params)
    for name in ("w", "stack"):
        np.testing.assert_allclose(back[name], nearest(params[name]), atol=1e-5)
    for name in ("b", "count"):
        np.testing.assert_array_equal(back[name], params[name])
    assert back["half"].dtype == jnp.bfloat16


def test_retract_where():
    params = {"a": np.float32(raw(4, 4)), "b": np.float32(raw(4, 4))}
    chosen = [
        {"a": True, "b": False},
        lambda path, leaf: "a" in path and leaf.ndim == 2,
    ]
    for where in chosen:
        back = retract(params, where)
        np.testing.assert_array_equal(back["b"], params["b"])
        assert defect(back["a"]) <= 3e-7
    assert defect(jax.jit(retract)(params)["b"]) <= 3e-7


def test_retraction_ends_an_optax_chain():
    params = {"w": orthogonal(np.float32(raw(6, 4))), "b": np.zeros(4, np.float32)}
    optimizer = optax.chain(optax.adam(1e-2), retraction())
    state = optimizer.init(params)
    x, y = np.float32(raw(9, 6)), np.float32(raw(9, 4))

    @jax.jit
    def step(params, state):
        def loss(p):
            return jnp.mean((x @ p["w"] + p["b"] - y) ** 2)

        value, grads = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    values = []
    for _ in range(30):
        params, state, value = step(params, state)
        values.append(float(value))
        assert defect(params["w"]) <= 6e-7
    assert values[-1] < values[0]
    assert np.any(params["b"] != 0)


def test_retraction_leaves_the_others_alone():
    params = {"w": np.float32(raw(4, 4)), "b": np.float32(raw(4))}
    updates = jax.tree.map(np.ones_like, params)
    where = {"w": False, "b": False}
    change = retraction(where)
    moved, _ = change.update(updates, change.init(params), params)
    for one, two in zip(*map(jax.tree.leaves, (moved, updates)), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-6)


WRONG = {
    "a vector": (lambda: orthogonal(np.ones(3)), "two axes"),
    "integers": (lambda: orthogonal(np.eye(3, dtype=np.int32)), "floating-point"),
    "complex": (lambda: orthogonal(np.eye(3) * 1j), "floating-point"),
    "a chosen vector": (
        lambda: retract({"norm": {"scale": np.ones(3)}}, lambda path, _: True),
        r"\['norm'\]\['scale'\]",
    ),
    "a number": (lambda: unit_triangular(1.0), "two axes"),
    "not square": (lambda: unit_triangular(np.ones((3, 2))), r"\[..., n, n\]"),
    "bound of 0": (lambda: unit_triangular(np.eye(3), 0.0), "bound"),
    "bound of 1": (lambda: unit_triangular(np.eye(3), 1.0), "bound"),
    "bound of NaN": (lambda: unit_triangular(np.eye(3), float("nan")), "bound"),
    "no parameters": (lambda: retraction().update({}, ()), "parameters"),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors(name):
    call, text = WRONG[name]
    with pytest.raises(mwc.MoonwalkError, match=text):
        call()


def test_called_again_it_is_not_traced_again(monkeypatch):
    """Outside jit its loops would be compiled at every call: 0.3 s a weight."""
    x = jnp.asarray(raw(5, 4))
    orthogonal(x)
    traced = []
    largest = constraints._largest

    def counted(x):
        traced.append(x.shape)
        return largest(x)

    monkeypatch.setattr(constraints, "_largest", counted)
    orthogonal(2 * x)
    assert not traced
    orthogonal(x[:, :3])
    assert traced == [(5, 3)]
