"""Which stages can be rebuilt, why, and that the right inverse is one: J R = I."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from mwc.constraints import orthogonal, unit_triangular
from passes.graph import is_var
from passes.submersion import Rule, run_error
from tests.submersive import (
    Case,
    halves,
    isometry,
    layer,
    max_min,
    max_min_reduced,
    max_min_strided,
    max_min_where,
    normal,
    space_to_depth,
    tripled,
)

pytestmark = pytest.mark.usefixtures("x64", "quick")


def cayley(raw):
    skew, eye = raw - raw.T, jnp.eye(raw.shape[0])
    return jnp.linalg.solve(eye + skew, eye - skew)


def rotation(x, angle):
    a, b = halves(x)
    c, s = jnp.cos(angle), jnp.sin(angle)
    return jnp.concatenate([c * a - s * b, s * a + c * b], -1)


X = normal(3, 6)

# Stages that can be rebuilt: function, arguments, amplification, part of the reason.
MOVES = {
    "identity": (lambda x: x, "the identity"),
    "bias": (lambda x: x + 1, "the identity"),
    "reshape": (lambda x: x.reshape(2, 9), "reshape"),
    "transpose": (lambda x: x.T, "transpose"),
    "rev": (lambda x: x[::-1, ::-1], "rev"),
    "slice": (lambda x: x[1:, 2:5], "pad"),
    "strided slice": (lambda x: x[::2, ::3], "pad"),
    "negative pad": (
        lambda x: lax.pad(x, x.dtype.type(0), ((0, 0, 0), (-1, -2, 0))),
        "pad",
    ),
    "dynamic slice": (lambda x: lax.dynamic_slice(x, (1, 0), (1, 6)), "moves"),
    "index": (lambda x: x[1], ""),
    "new axes": (lambda x: x[:, None, :, None], ""),
    "concatenate": (lambda x: jnp.concatenate([x[:, 3:], x[:, :3]], -1), "moves"),
    "split": (lambda x: jnp.concatenate(jnp.split(x, 2, -1), 0), "moves"),
    "roll": (lambda x: jnp.roll(x, 1, -1), "moves"),
    "mean": (lambda x: x.mean(-1), "moves"),
    "mean over all": (lambda x: x.mean(), "moves"),
    "mean over groups": (lambda x: x.reshape(3, 2, 3).mean(1), "moves"),
    "sum": (lambda x: x.sum(0), "broadcast_in_dim"),
    "space to depth": (lambda x: space_to_depth(x[:2]), ""),
    "scaled": (lambda x: -3 * x + 1, ""),
    "abs": (jnp.abs, "moves"),
    "two kinks": (lambda x: jnp.abs(jnp.abs(x) - 0.5), "moves"),
    "max-min": (max_min, "moves"),
    "max-min, strided": (max_min_strided, ""),
    "max-min by where": (max_min_where, "moves"),
    "max-min by reductions": (max_min_reduced, ""),
    "sort": (lambda x: jnp.sort(x, -1), "moves"),
    "sort in groups": (lambda x: jnp.sort(x.reshape(3, 2, 3), -1), ""),
    "abs, cut": (lambda x: jnp.abs(x)[:, :3], "pad"),
    "straight-through": (lambda x: x + lax.stop_gradient(jnp.round(x) - x), "identity"),
    "gradient reversal": (lambda x: lax.stop_gradient(2 * x) - x, "neg"),
    "outside the tangent": (lambda x: x + lax.stop_gradient(jnp.tanh(x)), "identity"),
}


@pytest.mark.parametrize("name", sorted(MOVES))
def test_moves_are_structural_and_coisometric(name):
    fun, reason = MOVES[name]
    case = Case(fun, X)
    assert case.found.verdict.value == "structural"
    assert case.found.amplification == 1
    assert reason in case.found.reason
    assert all(i.rule is Rule.TRANSPOSE for i in case.found.inverses)
    assert case.error() <= 1e-10


SLOPES = {
    "leaky 0.5": (lambda x: jax.nn.leaky_relu(x, 0.5), (1, 0.5)),
    "leaky 0.9": (lambda x: jax.nn.leaky_relu(x, 0.9), (1, 0.9)),
    "where": (lambda x: jnp.where(x > 0.0, 2 * x, -x), (2, 1)),
    "where, masked": (lambda x: jnp.where(x > 0.0, x, 0.25 * x), (1, 0.25)),
}


@pytest.mark.parametrize("name", sorted(SLOPES))
def test_known_slopes_are_divided_by(name):
    fun, slopes = SLOPES[name]
    case = Case(fun, normal(3, 40))
    assert case.found.verdict.value == "structural"
    assert "slopes that are known" in case.found.reason
    assert [i.rule for i in case.found.inverses] == [Rule.DIVIDE]
    square = np.asarray(slopes, float) ** 2
    expected = np.sqrt(square.mean() * (1 / square).mean())
    np.testing.assert_allclose(case.found.amplification, expected, rtol=0.1)
    assert case.error() <= 1e-10


def test_known_slopes_one_for_each_feature():
    case = Case(lambda x: x * jnp.arange(1.0, 7.0), X)
    assert case.found.verdict.value == "structural"
    assert case.error() <= 1e-10


def einsum(spec, make):
    return lambda x, w: jnp.einsum(spec, x, make(w))


# Function, x, weight, amplification, verdict; k <= n in all of them.
PRODUCTS = {
    "tall": (lambda x, w: x @ orthogonal(w), X, normal(6, 4)),
    "square": (lambda x, w: x @ orthogonal(w), X, normal(6, 6)),
    "transposed": (lambda x, w: x @ orthogonal(w).T, X, normal(4, 6)),
    "from the left": (lambda x, w: orthogonal(w) @ x, normal(6, 3), normal(4, 6)),
    "one by one": (lambda x, w: x @ orthogonal(w), normal(3, 1), normal(1, 1)),
    "one row": (lambda x, w: x @ orthogonal(w), normal(1, 6), normal(6, 4)),
    "a vector": (lambda x, w: x @ orthogonal(w), normal(6), normal(6, 4)),
    "two free axes": (lambda x, w: x @ orthogonal(w), normal(2, 3, 6), normal(6, 4)),
    "a batch axis": (
        einsum("bhi,hij->bhj", orthogonal),
        normal(3, 2, 4),
        normal(2, 4, 3),
    ),
    "two batch axes": (
        einsum("abci,abij->bcaj", orthogonal),
        normal(2, 2, 3, 4),
        normal(2, 2, 4, 3),
    ),
    "declared": (layer, X, isometry(6, 4)),
    "declared, scaled": (lambda x, w: tripled(x, w, jnp.ones(4)), X, isometry(6, 4)),
    "declared, complex": (
        layer,
        normal(3, 4) + 1j * normal(3, 4),
        np.linalg.qr(normal(4, 3) + 1j * normal(4, 3))[0],
    ),
    "declared, broadcast": (
        lambda x, w: layer(x, w) + jnp.ones((3, 4)),
        X,
        isometry(6, 4),
    ),
    "Cayley map": (lambda x, w: x @ cayley(w), X, normal(6, 6)),
    "rotation": (rotation, X, normal()),
}


@pytest.mark.parametrize("name", sorted(PRODUCTS))
def test_orthonormal_weights(name):
    case = Case(*PRODUCTS[name])
    declared = "declared" in name
    assert case.found.verdict.value == ("generic" if declared else "structural")
    assert case.found.amplification == 1
    assert not case.rebuilt.stage.bits
    assert case.error() <= 1e-10


TRIANGLES = {
    "lower": (lambda x, w: x @ unit_triangular(w), X, normal(6, 6)),
    "upper": (lambda x, w: x @ unit_triangular(w).T, X, normal(6, 6)),
    "from the left": (lambda x, w: unit_triangular(w) @ x, normal(6, 3), normal(6, 6)),
    "upper, left": (lambda x, w: unit_triangular(w).T @ x, normal(6, 3), normal(6, 6)),
    "one by one": (lambda x, w: x @ unit_triangular(w), normal(3, 1), normal(1, 1)),
    "a vector": (lambda x, w: x @ unit_triangular(w), normal(6), normal(6, 6)),
    "a batch axis": (
        einsum("bhi,hij->bhj", unit_triangular),
        normal(3, 2, 4),
        normal(2, 4, 4),
    ),
    "a batch axis, weight first": (
        lambda x, w: jnp.einsum("hij,bchj->hbci", unit_triangular(w), x),
        normal(3, 2, 2, 4),
        normal(2, 4, 4),
    ),
}


@pytest.mark.parametrize("name", sorted(TRIANGLES))
def test_unit_triangular_weights(name):
    case = Case(*TRIANGLES[name])
    assert case.found.verdict.value == "structural"
    assert "unit triangular" in case.found.reason
    assert 1 <= case.found.amplification < 1.6
    assert case.error() <= 1e-10


# Never, or of unknown conditioning: nothing is assumed, so nothing is rebuilt.
LEFT = {
    "dense": ("generic", "unknown conditioning", lambda x, w: x @ w, X, normal(6, 4)),
    "dense, square": ("generic", "unknown", lambda x, w: x @ w, X, normal(6, 6)),
    "dense, batch axes": (
        "generic",
        "unknown conditioning",
        lambda x, w: jnp.einsum("abci,aij->bacj", x, w),
        normal(2, 3, 2, 4),
        normal(2, 4, 3),
    ),
    "dense, two": (
        "generic",
        "unknown conditioning",
        lambda x, w, v: jnp.abs(x @ w) @ v,
        *(X, normal(6, 4), normal(4, 4)),
    ),
    "widening": ("never", "widens: 18", lambda x, w: x @ w, X, normal(6, 7)),
    "widening, orthonormal": (
        "never",
        "widens: 18 numbers to 24",
        lambda x, w: x @ orthogonal(w),
        *(X, normal(6, 8)),
    ),
    "padding": ("never", "widens", lambda x: jnp.pad(x, 1), X),
    "broadcast": ("never", "widens", lambda x: jnp.broadcast_to(x, (2, 3, 6)), X),
    "real to complex": ("never", "widens", lambda x: x * (1 + 0j), X),
    "free scaling": ("generic", "unknown slopes", lambda x, b: x * b, X, normal(6)),
    "PReLU": (
        "generic",
        "unknown slopes",
        lambda x, a: jnp.where(x > 0, x, a * x),
        *(X, normal(6)),
    ),
    "tanh": ("generic", "unknown slopes", jnp.tanh, X),
    "softplus": ("generic", "unknown slopes", jax.nn.softplus, X),
    "gated by itself": (
        "generic",
        "unknown slopes",
        lambda x: x * lax.stop_gradient(jax.nn.sigmoid(x)),
        X,
    ),
    "ReLU": ("never", "flat", jax.nn.relu, X),
    "max with 0": ("never", "flat", lambda x: jnp.maximum(x, 0), X),
    "clip": ("never", "flat", lambda x: jnp.clip(x, -1, 1), X),
    "dropout": (
        "never",
        "flat",
        lambda x, n: jnp.where(
            jax.random.bernoulli(jax.random.key(n), 0.5, x.shape), 2 * x, 0
        ),
        *(X, 7),
    ),
    "residual branch": (
        "never",
        "several paths",
        lambda x, w: x + jnp.tanh(x @ w),
        *(X, normal(6, 6)),
    ),
    "two products": (
        "never",
        "several paths",
        lambda x, w, v: x @ w + x @ v,
        *(X, normal(6, 4), normal(6, 4)),
    ),
    "softmax": ("never", "no rule", lambda x: jax.nn.softmax(x, -1), X),
    "stopped": ("never", "does not depend", lambda x: lax.stop_gradient(x), X),
}


@pytest.mark.parametrize("name", sorted(LEFT))
def test_what_is_not_rebuilt(name):
    verdict, reason, *rest = LEFT[name]
    case = Case(*rest)
    assert case.found.verdict.value == verdict
    assert reason in case.found.reason
    assert case.found.amplification is None
    assert isinstance(case.rebuilt, str)


@pytest.mark.parametrize("shape", [(1, 1), (3, 2), (2, 3, 4), (6,), ()])
def test_shapes(shape):
    def fun(x):
        x = jax.nn.leaky_relu(jnp.abs(x) - 0.5, 0.5)
        return max_min(x) if shape and shape[-1] % 2 == 0 else x

    case = Case(fun, normal(*shape))
    assert case.found.amplification == pytest.approx(1.25, rel=0.1)
    assert case.error() <= 1e-10


def test_nothing_to_rebuild_is_no_error():
    assert Case(jnp.abs, normal(0, 6)).found.verdict.value == "structural"
    assert Case(layer, normal(0, 6), isometry(6, 4)).found.verdict.value == "generic"


@pytest.mark.parametrize("name", ["conjugate", "real part", "phase"])
def test_complex_moves(name):
    fun = {"conjugate": jnp.conj, "real part": jnp.real, "phase": lambda z: z * 1j}
    case = Case(fun[name], normal(3, 4) + 1j * normal(3, 4))
    assert case.found.verdict.value == "structural"
    assert case.error() <= 1e-10


T = normal(3, 2, 4)
LEADING = {
    "abs": (2, jnp.abs, X),
    "max-min": (1, max_min, X),
    "mean": (1, lambda x: x.mean(-1), X),
    "features": (1, lambda x: x[:, ::-1].reshape(3, 2, 3), X),
    "product": (1, layer, X, np.eye(6)),
    "transpose": (0, lambda x: x.T, X),
    "rev": (0, lambda x: x[::-1], X),
    "sum": (0, lambda x: x.sum(0), X),
    "left product": (0, lambda x, w: w @ x, X, np.eye(3)),
    "left product, same size": (0, lambda x, w: layer(x[:, :3].T, w), X, np.eye(3)),
    "tokens": (2, layer, T, np.eye(4)),
    "tokens that mix": (
        1,
        lambda x, w: jnp.einsum("btf,ts->bsf", x, w),
        *(T, np.eye(2)),
    ),
    "members": (
        2,
        lambda x, w: jnp.einsum("bmi,mij->bmj", x, w),
        *(T, np.stack([np.eye(4)] * 2)),
    ),
    "members, moved": (
        0,
        lambda x, w: jnp.einsum("bmi,mij->mbj", x, w),
        *(T, np.stack([np.eye(4)] * 2)),
    ),
    "tokens, turned and back": (3, lambda x: jnp.abs(x.T).T, T),
    "tokens in one": (1, lambda x: x.reshape(3, 8), T),
}


@pytest.mark.parametrize("name", sorted(LEADING))
def test_leading_axes(name):
    kept, fun, x, *params = LEADING[name]
    assert Case(fun, x, *params).found.rows == kept


def test_a_declared_map_is_one_link():
    case = Case(lambda x, w: jnp.abs(tripled(x, w, 1.0)), X, isometry(6, 4))
    kinds = [(i.rule, i.scale) for i in case.found.inverses]
    assert kinds == [(Rule.TRANSPOSE, 1.0), (Rule.TRANSPOSE, 9.0)]
    assert all(is_var(i.link.target) for i in case.found.inverses)


def test_bits_are_bits():
    x = normal(4, 64)
    for fun, most in [(jnp.abs, 32), (lambda x: jax.nn.leaky_relu(x, 0.9), 32)]:
        stage = Case(fun, x).rebuilt.stage
        bits = stage.first({stage.graph.invars[0]: x}, False, False)
        assert sum(b.nbytes for b in bits) == most


def test_growth_of_a_run():
    assert run_error([1.0] * 16) == 4
    np.testing.assert_allclose(run_error([2.0, 3.0]), 6 * np.sqrt(2))
