"""Maps from free parameters to weights that the compiler knows how to invert.

    orthogonal(raw)        the nearest matrix with orthonormal rows or columns
    unit_triangular(raw)   unit diagonal, a strict triangle of bounded norm
    retract(params)        outside the loss: brings weights back after an optimizer step

`orthogonal` is the polar factor Q of raw = Q P, found by Newton-Schulz iterations,
which are matrix products alone (Higham, "Functions of Matrices", 2008, chapter 8). Its
derivative is exact, not that of the iteration: dQ = Q W + (I - Q Q^T) d P^-1 with the
skew W that solves P W + W P = Q^T d - d^T Q (ibid.), by conjugate gradients. All of it
is on the parameter side: n^3 a matrix, nothing per sample. Limits: a matrix that is
rank-deficient has no nearest one, and no derivative.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from mwc.errors import MoonwalkTypeError, MoonwalkValueError
from passes import _jax
from passes.declared import declare

Array = Any

_POWER = 8  # steps that estimate the largest singular value
_BLOCK = 64  # rows of a partial sum
_MOST = 64  # Newton-Schulz steps: enough for a condition of 1e9


def orthogonal(raw: Array) -> Array:
    """The nearest matrix with orthonormal columns (tall) or rows (wide).

    Args:
      raw: [..., m, n], floating-point, of full rank. Float16 and bfloat16 are
        computed in float32 and stay float32: rounded, they would not be orthonormal.

    Returns:
      Q of the same shape, with |Q^T Q - I|_F / sqrt(n) <= 3e-7 in float32. The
      compiler knows that it is coisometric.
    """
    raw = _matrix(raw, "orthogonal")
    if raw.dtype in (jnp.bfloat16, jnp.float16):
        raw = raw.astype(jnp.float32)
    found = _polar(raw)
    return declare(found, what="orthonormal", axes=(raw.ndim - 2, raw.ndim - 1))


def unit_triangular(raw: Array, bound: float = 0.5) -> Array:
    """The identity plus the strict lower triangle of `raw`, scaled down to a norm.

    The Frobenius norm of the strict part is at most `bound`, so the condition is at
    most (1 + bound) / (1 - bound), and the root mean square growth of a solve is near
    1 whatever the size is.

    Args:
      raw: [..., n, n].
      bound: in (0, 1).

    Returns:
      A lower unit triangular matrix; use its transpose for an upper one.
    """
    raw = _matrix(raw, "unit_triangular")
    if not 0 < bound < 1:
        raise MoonwalkValueError(
            f"unit_triangular was given bound={bound!r}", expected="0 < bound < 1"
        )
    n = raw.shape[-1]
    if raw.shape[-2] != n:
        raise MoonwalkTypeError(
            f"unit_triangular was given shape {raw.shape}", expected="[..., n, n]"
        )
    strict = jnp.tril(raw, -1)
    square = jnp.sum(strict**2, axis=(-2, -1), keepdims=True)
    over = square > bound**2
    # The inner where keeps the derivative of the root finite at zero.
    size = jnp.sqrt(jnp.where(over, square, 1))
    found = jnp.where(over, strict * (bound / size), strict) + jnp.eye(
        n, dtype=raw.dtype
    )
    inverse = bound / (1 - bound)
    growth = math.sqrt((1 + bound**2 / n) * (1 + inverse**2 / n))
    axes = (raw.ndim - 2, raw.ndim - 1)
    what = "unit_triangular"
    return declare(found, what=what, axes=axes, amplification=growth, lower=True)


def retract(params: Any, where: Any = None) -> Any:
    """Brings weights back to orthonormal, for use outside the loss.

    Args:
      params: a pytree of arrays.
      where: which leaves: a pytree of bools, or a function of a leaf's path (as
        `jax.tree_util.keystr` writes it) and the leaf; None is every floating-point
        leaf of at least two axes.

    Returns:
      The pytree with the nearest orthonormal matrices in their place.

    Raises:
      MoonwalkTypeError: `where` chooses a leaf that is no matrix; the error names it.
    """

    def back(path: Any, x: Any, flag: bool) -> Any:
        if flag and not _is_matrix(x):
            name = jax.tree_util.keystr(path) or "what it was given"
            kind = f"{jnp.result_type(x)}{list(jnp.shape(x))}"
            raise MoonwalkTypeError(
                f"retract was to bring back {name}, {kind}",
                expected="floating-point arrays of at least two axes",
                remedy="leave it out with `where`",
            )
        return orthogonal(x).astype(x.dtype) if flag else x

    flags = _chosen(params, where)
    return jax.tree_util.tree_map_with_path(back, params, flags)


class Retraction(NamedTuple):
    """An optax gradient transformation; the last of a chain."""

    init: Callable[[Any], Any]
    update: Callable[..., Any]


def retraction(where: Any = None) -> Retraction:
    """`retract` as an optax transformation: the last of an `optax.chain`.

    Args:
      where: as in `retract`.

    Returns:
      A transformation whose updates lead to retracted parameters. Its `update` needs
      the parameters.
    """

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        if params is None:
            raise MoonwalkTypeError(
                "the retraction was not given the parameters",
                expected="update(updates, state, params)",
            )
        moved = jax.tree.map(lambda p, u: p + u.astype(p.dtype), params, updates)
        back = retract(moved, where)
        return jax.tree.map(lambda b, p: b - p, back, params), state

    return Retraction(lambda params: (), update)


def _chosen(params: Any, where: Any) -> Any:
    if where is None:
        return jax.tree.map(_is_matrix, params)
    if callable(where):
        return jax.tree_util.tree_map_with_path(
            lambda path, x: bool(where(jax.tree_util.keystr(path), x)), params
        )
    return where


def _is_matrix(x: Any) -> bool:
    return jnp.ndim(x) >= 2 and jnp.issubdtype(jnp.result_type(x), jnp.floating)


def _matrix(raw: Array, name: str) -> Array:
    raw = jnp.asarray(raw)
    if not _is_matrix(raw):
        raise MoonwalkTypeError(
            f"{name} was given {raw.dtype}{list(raw.shape)}",
            expected="a floating-point array of at least two axes",
        )
    return raw


# The polar factor ---------------------------------------------------------------


def _dot(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


def _t(a: Array) -> Array:
    return jnp.swapaxes(a, -1, -2)


@jax.custom_jvp
@jax.jit
def _polar(raw: Array) -> Array:
    """The orthonormal polar factor of [..., m, n]."""
    if raw.shape[-2] < raw.shape[-1]:
        return _t(_polar(_t(raw)))
    if 0 in raw.shape:
        return raw
    n = raw.shape[-1]
    eye = jnp.eye(n, dtype=raw.dtype)
    limit = jnp.sqrt(jnp.finfo(raw.dtype).eps)

    def again(state: tuple[Array, Array, Array]) -> Array:
        _, now, count = state
        return (now > limit) & (count < _MOST)

    def step(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        q, _, count = state
        error = _gram(q) - eye
        # Not the largest entry: an error in one direction is small in each of them.
        return q - _dot(q, error) / 2, jnp.max(_norm(error)), count + 1

    # Squares of entries far from 1 would overflow or vanish.
    size = jnp.max(jnp.abs(raw), axis=(-2, -1), keepdims=True)
    raw = raw / jnp.maximum(size, jnp.finfo(raw.dtype).tiny)
    like = jax.typeof(raw)
    worst = _jax.zeros((), raw.dtype, like) + jnp.inf
    start = raw / _largest(raw), worst, _jax.zeros((), jnp.int32, like)
    # The last step squared an error of sqrt(eps); one more leaves that of rounding.
    return step(lax.while_loop(again, step, start))[0]


def _gram(q: Array) -> Array:
    """Q^T Q, summed in blocks of rows: its diagonal rounds several times less."""
    m, n = q.shape[-2:]
    blocks = -(-m // _BLOCK)
    rows = [(0, 0)] * (q.ndim - 2) + [(0, blocks * _BLOCK - m), (0, 0)]
    parts = jnp.pad(q, rows).reshape(*q.shape[:-2], blocks, _BLOCK, n)
    return _dot(_t(parts), parts).sum(-3)


def _largest(raw: Array) -> Array:
    """The largest singular value, or a little less: steps converge up to sqrt(3)."""
    shape = (*raw.shape[:-2], raw.shape[-1], 1)
    v = _jax.zeros(shape, raw.dtype, jax.typeof(raw)) + 1

    def step(_: Any, v: Array) -> Array:
        v = _dot(_t(raw), _dot(raw, v))
        return v / jnp.maximum(_norm(v), jnp.finfo(raw.dtype).tiny)

    # Away from any symmetry of the weights.
    v = v + jnp.sin(jnp.arange(raw.shape[-1], dtype=raw.dtype))[:, None]
    v = lax.fori_loop(0, _POWER, step, v / _norm(v))
    return jnp.maximum(_norm(_dot(raw, v)), jnp.finfo(raw.dtype).tiny)


def _norm(v: Array) -> Array:
    return jnp.sqrt(jnp.sum(v**2, axis=(-2, -1), keepdims=True))


@_polar.defjvp
def _polar_jvp(primals: Any, tangents: Any) -> Any:
    (raw,), (d,) = primals, tangents
    if raw.shape[-2] < raw.shape[-1]:
        q, dq = jax.jvp(_polar, (_t(raw),), (_t(d),))
        return _t(q), _t(dq)
    q = _polar(raw)
    p = _dot(_t(q), raw)
    p = (p + _t(p)) / 2
    right = _dot(_t(q), d)
    skew = _solve(lambda w: _dot(p, w) + _dot(w, p), right - _t(right))
    beside = d - _dot(q, right)
    return q, _dot(q, skew) + _t(_solve(lambda y: _dot(p, y), _t(beside)))


def _solve(operator: Callable[[Array], Array], b: Array) -> Array:
    """X with operator(x) = b, for a symmetric positive operator."""
    eps, most = float(jnp.finfo(b.dtype).eps), 8 * b.shape[-2]

    # Inside, where its start at zero is no part of what is transposed.
    def iterate(operator: Callable[[Array], Array], b: Array) -> Array:
        return jax.scipy.sparse.linalg.cg(operator, b, tol=eps, maxiter=most)[0]

    return lax.custom_linear_solve(operator, b, iterate, symmetric=True)
