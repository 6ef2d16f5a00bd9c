"""`mwc.coisometric`: the same values and gradients; what cannot be so is an error."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mwc
from mwc import coisometric

W = np.linalg.qr(np.random.default_rng(0).standard_normal((6, 4)))[0]
X = np.random.default_rng(1).standard_normal((3, 6))


def affine(h, w, b):
    return 2 * h @ w + b


@pytest.mark.usefixtures("x64", "quick")
def test_values_and_derivatives_are_the_functions_own():
    declared = coisometric(affine, scale=4.0)
    args = jnp.asarray(X), jnp.asarray(W), jnp.ones(4)

    def both(make):
        return [make(f)(*args) for f in (affine, declared)]

    def total(f):
        return lambda *args: jnp.sum(jnp.sin(f(*args)))

    makers = [
        lambda f: f,
        lambda f: jax.jit(f),
        lambda f: jax.grad(total(f), (0, 1, 2)),
        lambda f: lambda *a: jax.jvp(f, a, a),
        lambda f: jax.vmap(f, (0, None, None)),
        lambda f: jax.hessian(total(f), 1),
    ]
    for make in makers:
        one, two = both(make)
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


def test_it_reads_like_the_function():
    assert coisometric(affine).__name__ == "affine"

    class Layer:
        def __call__(self, h, w):
            return h @ w

    assert coisometric(Layer())(X, W).shape == (3, 4)


@pytest.mark.parametrize("shape", [(6,), (1, 6), (2, 3, 6), (0, 6)])
def test_shapes(shape):
    h = np.ones(shape, np.float32)
    layer = coisometric(lambda h, w: h @ w)
    assert layer(h, np.float32(W)).shape == (*shape[:-1], 4)


def test_what_is_not_an_array_is_a_parameter():
    layer = coisometric(lambda h, w, name: h @ w[name])
    assert layer(X, {"first": W}, "first").shape == (3, 4)


def test_parameters_by_name():
    layer = coisometric(lambda h, w, *, flip: h[:, ::-1] @ w if flip else h @ w)

    def loss(w, h):
        for flip in (True, False, True):
            h = jnp.abs(layer(h, w=w, flip=flip))
        return jnp.sum(h**3)

    w = jnp.asarray(np.linalg.qr(np.ones((6, 6)) + np.eye(6))[0])
    ours = mwc.moonwalk_compile(loss, strategies=("moonwalk", "stored"))
    assert sum(s.strategy == "moonwalk" for s in ours.plan(w, X).stages) == 3
    found, true = jax.grad(ours)(w, X), jax.grad(loss)(w, X)
    np.testing.assert_allclose(found, true, rtol=1e-4, atol=1e-4)


def test_parameters_may_enter_as_they_like():
    """Affine in h is all that is asked; the map may depend on w in any way."""
    layer = coisometric(lambda h, t: h * jnp.exp(1j * jnp.tanh(t)))
    assert layer(np.ones(3, np.complex64), 0.3).dtype == np.complex64


@pytest.mark.parametrize(
    "scale", [0, 0.0, -1.0, float("nan"), float("inf"), True, "1", None, 1j]
)
def test_scales_that_cannot_be(scale):
    with pytest.raises(mwc.MoonwalkValueError, match=r"(?s)scale=.*positive number"):
        coisometric(affine, scale=scale)


def bent(h, w):
    return jnp.abs(h @ w)


def squared(h):
    return h * h


def doubled(h):
    return jnp.concatenate([h, h], -1)


def pair(h):
    return h, h


def counted(h):
    return jnp.argsort(h)


WRONG = {
    "not affine": (bent, (X, W), "not affine in h"),
    "a square": (squared, (X,), "not affine in h"),
    "widens": (doubled, (X,), re.escape("(3, 6) to (3, 12)")),
    "two results": (pair, (X,), "returned"),
    "integer result": (counted, (X,), "returned"),
    "integers": (squared, (np.arange(3),), "was called with"),
    "no array": (squared, ("h",), "was called with"),
    "a pytree": (squared, ((X, X),), "was called with"),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors_name_the_line_and_the_remedy(name):
    fun, args, found = WRONG[name]
    with pytest.raises(mwc.MoonwalkTypeError, match=found) as caught:
        coisometric(fun)(*args)
    text = str(caught.value)
    assert fun.__name__ in text
    assert "remedy: " in text
    assert "test_coisometric.py:" in text


def test_errors_under_jit():
    with pytest.raises(mwc.MoonwalkTypeError, match="not affine"):
        jax.jit(coisometric(bent))(X, W)


def test_a_broken_claim_is_no_error_but_nan():
    """What weights make wrong is seen at run time alone."""
    layer = coisometric(lambda h, w: h @ w)

    def loss(ws, x):
        for w in ws:
            x = jnp.abs(layer(x, w))
        return jnp.sum(x**2)

    ws = [np.float32(np.eye(6)) * s for s in (1, 2, 0.5, 1)]
    ours = mwc.moonwalk_compile(loss, strategies=("moonwalk", "stored"))
    value, grads = ours.value_and_grad(ws, np.float32(X))
    np.testing.assert_allclose(value, loss(ws, np.float32(X)), rtol=1e-6)
    assert np.isnan(grads[1]).all()


def test_a_declaration_is_nothing_that_backpropagation_keeps():
    """Also around data, which are there anyway."""
    weights = [np.linalg.qr(np.eye(6) + i)[0] for i in range(3)]

    def kept(layer):
        def loss(weights, x):
            for w in weights:
                x = jnp.abs(layer(x, w))
            return jnp.mean(x)

        return mwc.moonwalk_compile(loss).plan(weights, X).backprop_bytes

    assert kept(coisometric(lambda x, w: x @ w)) == kept(lambda x, w: x @ w) > 0


TOKENS, HEADS, SIZE = 3, 2, 4


def blocks(h):
    return h.reshape(*h.shape[:2], HEADS, SIZE)


def windows(h, w, spec="WIO"):
    """A convolution of windows side by side."""
    numbers = ("NWC", spec, "NWC")
    step = w.shape[spec.index("W")]
    return jax.lax.conv_general_dilated(
        h, w, (step,), "VALID", dimension_numbers=numbers
    )


# Orthogonal matrices, the weight that they are as, and a map that it makes coisometric.
MAPS = {
    "transposed": ((8, 8), (8, 8), lambda h, w: h @ w.T),
    "scaled": ((8, 8), (8, 8), lambda h, w: 3 * (h @ w) / 3),
    "heads": (
        (HEADS, SIZE, SIZE),
        (HEADS, SIZE, SIZE),
        lambda h, w: jnp.einsum("bthi,hij->bthj", blocks(h), w).reshape(h.shape),
    ),
    "sums over heads": (
        (8, 8),
        (HEADS, SIZE, 8),
        lambda h, w: jnp.einsum("bthi,hid->btd", blocks(h), w),
    ),
    "spreads to heads": (
        (8, 8),
        (8, HEADS, SIZE),
        lambda h, w: jnp.einsum("btd,dhi->bthi", h, w).reshape(h.shape),
    ),
    "of one row": ((8, 8), (8, 8), lambda h, w: (h[:, :, None] @ w)[:, :, 0]),
    "tokens": (
        (TOKENS, TOKENS),
        (TOKENS, TOKENS),
        lambda h, w: jnp.einsum("btd,ts->bsd", h, w),
    ),
    "convolution": ((8, 8), (1, 8, 8), windows),
    "its other way round": ((8, 8), (8, 8, 1), lambda h, w: windows(h, w, "OIW")),
    "windows": (
        (8, 8),
        (2, 4, 8),
        lambda h, w: windows(h.reshape(len(h), 2 * TOKENS, 4), w),
    ),
}


@pytest.mark.usefixtures("x64", "quick")
@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("off", [0.0, 1e-3])
@pytest.mark.parametrize("rows", [5, 20])
def test_weights_of_all_shapes_are_mended(name, off, rows):
    """Gradients of weights that were moved are exact, not NaN, many rows or few."""
    matrices, shape, fun = MAPS[name]
    layer, draw = coisometric(fun), np.random.default_rng(0)
    exact = [np.linalg.qr(draw.standard_normal(matrices))[0] for _ in range(4)]
    moved = [w + off * draw.standard_normal(matrices) for w in exact]
    weights = [jnp.asarray(w.reshape(shape)) for w in moved]
    x = jnp.asarray(draw.standard_normal((rows, TOKENS, 8)))

    def loss(weights, x):
        for w in weights:
            x = layer(jnp.abs(x), w)
        return jnp.mean(x**3)

    ours = mwc.moonwalk_compile(loss, strategies=("moonwalk", "stored"))
    rows = ours.plan(weights, x).stages
    assert sum(row.strategy == "moonwalk" for row in rows) >= 3
    found = jax.jit(jax.grad(ours))(weights, x)
    for a, b in zip(found, jax.grad(loss)(weights, x), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("number", [0.53, 1.06, 1.9])
def test_numbers_are_what_they_are_rounded_to(number):
    """In float32 they are not what the scale says: 1e-7 a layer adds up."""
    layer = coisometric(lambda h, w: number * (h @ w), scale=number**2)
    draw = np.random.default_rng(0)
    weights = [np.linalg.qr(draw.standard_normal((16, 16)))[0] for _ in range(120)]

    def loss(weights, x):
        step = lambda h, w: (jnp.abs(layer(h, w)) / number, None)  # noqa: E731
        return jnp.sum(jnp.sin(jax.lax.scan(step, x, weights)[0]))

    args = jnp.asarray(weights, jnp.float32), jnp.ones((8, 16), jnp.float32)
    ours = mwc.moonwalk_compile(loss, strategies=("moonwalk", "stored"))
    assert ours.plan(*args).stages[0].strategy == "moonwalk"
    found, true = (jax.jit(jax.grad(f))(*args) for f in (ours, loss))
    assert np.linalg.norm(found - true) <= 1e-5 * np.linalg.norm(true)


@pytest.mark.usefixtures("x64", "quick")
@pytest.mark.parametrize("number", [1j, 0.6 + 0.8j, 2.0])
def test_complex_numbers_beside_the_product(number):
    layer = coisometric(lambda h, w: number * (h @ w), scale=abs(number) ** 2)
    draw = np.random.default_rng(0)
    weights = [
        jnp.asarray(np.linalg.qr(draw.standard_normal((6, 6)))[0]) for _ in range(5)
    ]
    x = jnp.asarray(draw.standard_normal((3, 6)) + 1j * draw.standard_normal((3, 6)))

    def loss(weights, x):
        for w in weights:
            x = layer(x[:, ::-1], w)
        return jnp.mean(jnp.abs(x + 1) ** 3)

    ours = mwc.moonwalk_compile(loss, strategies=("moonwalk", "stored"))
    rows = ours.plan(weights, x).stages
    assert sum(row.strategy == "moonwalk" for row in rows) >= 3
    found, true = (jax.jit(jax.grad(f))(weights, x) for f in (ours, loss))
    for a, b in zip(found, true, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)
