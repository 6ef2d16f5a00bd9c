"""Polish: a right inverse for a declared weight that training has moved a little.

A declared weight M, [n, k] with M^T M = c I, has the right inverse M / c. Once an
optimizer has moved it, R = M / c is off by E = M^T R - I, and Newton steps
R <- R (2 I - M^T R) square E each: three serve |E| up to 5e-2. They cost n^3, nothing
per sample. A weight that is large beside a state stays as it is: what it makes is
refined instead, up to seven times, which comes to the same. Nothing is done where a
weight is exact: of eight orthogonal rows S of signs, S M^T M S^T is c S S^T then, and
so it is of a product of square weights.

Where the weight is of less than 32 bits and the tolerance is bfloat16's, nobody looks:
a few terms, R = M (I + F + F^2 + F^3) / c with F = I - M^T M / c, serve |E| up to 0.1.
They are no loop, whose condition a GPU would wait for, and do with TF32, in which M is
exact and F alone is rounded.
Source: DESIGN section 2. Limits: those of `mwc.nodes.claims`; errors of weights in a
row that undo each other, as factors 1.001 and 0.999, look exact. What is not mended is
seen by the guard.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from jax import lax

from mwc._tie import barrier
from mwc.nodes.claims import Claim, Layout
from passes.graph import Var, nbytes

Array = Any

_STEPS, _ROWS = 3, 8
_MOST = 2**_STEPS - 1  # refinements, which do as much
_SHARE = 0.4  # of a state: weights that are polished at once
_LESS = np.int32(-1)  # `- 1` is a constant that XLA moves out of loops and in again
_EXACT = 9.0  # units in the last place: an error that QR in float32 explains
_WORST = 32  # gaps: the square of the error of one weight at most


def most_polished(state: Var) -> int:
    """Bytes of weights that are polished at once; what a larger one makes is refined.

    Args:
      state: that of which the weights' products are made.
    """
    # Its cotangent is no narrower than float32.
    return int(_SHARE * max(nbytes(state), 4 * math.prod(state.aval.shape)))


def gap_of(stack: Array, of: Claim, token: Array, loose: bool = False) -> Array | None:
    """How far weights alike are from their claim, as a scalar for `polished`.

    Args:
      stack: the weights.
      of: the claim of each.
      token: what must be there before they are looked at.
      loose: `guard.is_loose`.

    Returns:
      The scalar; None where it does not matter.
    """
    if of.rounded and loose:
        return None
    return _gap(through(signs_of(of, token), stack, of), of.sizes[1], 1)


def signs_of(of: Claim, token: Array) -> Array:
    """Rows of signs, to go through weights alike once there is a token: [8, k]."""
    wide = jnp.float64 if jnp.finfo(of.var.aval.dtype).bits > 32 else jnp.float32
    return barrier([token, jnp.asarray(_signs(of.sizes[1]), wide)])[1]


def through(rows: Array, weight: Array, of: Claim) -> Array:
    """Rows times a weight, or each of a stack of them, as long as before if exact.

    Args:
      rows: [8, k], or [..., 8, k] of as many matrices; k is n if it is not the first.
      weight: with the axes of the claim, or a stack.
      of: the claim.
    """
    return _through(rows, weight, of.layout, of.scale, of.square)


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _through(
    rows: Array, weight: Array, layout: Layout, scale: float, square: bool
) -> Array:
    m = layout.matrices(weight).astype(rows.dtype)
    rows = jnp.broadcast_to(rows, (*m.shape[:-2], *rows.shape[-2:]))
    # Of a square one either axis will do: a sum over the second one is faster.
    rows = _dot(rows, 1, m, 1 if square else layout.axis)
    return rows if scale == 1 else rows / math.sqrt(scale)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _gap(rows: Array, columns: int, count: int) -> Array:
    """A mean square of what rows of signs are off, by their k and what they passed."""
    signs = _signs(columns)
    # Errors of entries add up at random off the diagonal, all of them on it.
    weights = np.full((_ROWS, _ROWS), 1 / (_ROWS - 1))
    np.fill_diagonal(weights, 1 / columns)
    off = _dot(rows, 1, rows, 1) - (signs @ signs.T).astype(rows.dtype)
    return jnp.sum(off**2 * weights.astype(rows.dtype)) / (
        _ROWS * count * math.prod(rows.shape[:-2])
    )


def _signs(count: int) -> np.ndarray:
    """Rows of +-1, orthogonal as far as that can be."""
    many = np.tile(scipy.linalg.hadamard(_ROWS), -(-count // _ROWS))[:, :count]
    return many * np.random.default_rng(0).choice([-1.0, 1.0], count)


def polished(stack: Array, of: Claim, gap: Array | None) -> list[Array]:
    """C times right inverses of weights alike, of their shape and dtype.

    Args:
      stack: as many weights as are alive at once.
      of: the claim of each.
      gap: of `gap_of`; without one all are mended alike. What is exact stays; NaN
        stays as well, and what is far off is not mended: the guard trips.
    """
    if gap is None:
        return _series(stack, of.layout, of.scale)
    return _polished(stack, gap, of.layout, of.scale)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _series(stack: Array, layout: Layout, scale: float) -> list[Array]:
    m, axis = layout.matrices(stack).astype(jnp.float32), layout.axis
    dot = functools.partial(_dot, precision=lax.Precision.DEFAULT)
    gram = dot(m, 1 - axis, m, 1 - axis) / scale
    f = jnp.eye(gram.shape[-1], dtype=gram.dtype) - gram
    square = dot(f, 1, f, 0)
    terms = f + square + dot(f, 1, square, 0)
    r = m + (dot(m, 1, terms, 0) if axis else dot(terms, 0, m, 0))
    made = layout.weight(r, stack).astype(stack.dtype)
    return [made[i] for i in range(len(stack))]


@functools.partial(jax.jit, static_argnums=(2, 3))
def _polished(stack: Array, gap: Array, layout: Layout, scale: float) -> list[Array]:
    # There is a loop of these in the code of every sweep, so few operations, and
    # several weights at once: they are compiled as often. Traced once.
    m, axis = layout.matrices(stack).astype(gap.dtype), layout.axis

    def more(state: tuple[Array, Array]) -> Array:
        return (state[0] > 0) & (gap > _limit(gap.dtype, m.shape[axis - 2]))

    def step(state: tuple[Array, Array]) -> tuple[Array, Array]:
        left, r = state
        return left + _LESS, _step(m, r, axis, scale)

    _, r = lax.while_loop(more, step, (jnp.int32(_STEPS), m))
    made = layout.weight(r, stack).astype(stack.dtype)
    return [made[i] for i in range(len(stack))]


def times_of(rows: Array, of: Claim, count: int = 1) -> Array:
    """How often `refined` refines what weights alike make; 0 where none is off.

    Args:
      rows: of `through`.
      of: the claim of each weight.
      count: how many they went through.
    """
    return _times(_gap(rows, of.sizes[1], count), of.sizes[1])


@functools.partial(jax.jit, static_argnums=1)
def _times(gap: Array, columns: int) -> Array:
    # The fewest n with E^n below eps; two at least, as E is above it where it is off.
    eps, least = float(jnp.finfo(gap.dtype).eps), _limit(gap.dtype, columns)
    larger = (max(least, eps ** (2 / n) / _WORST) for n in range(2, _MOST))
    above = gap > np.asarray([least, least, *larger], gap.dtype)
    return jnp.sum(above, dtype=jnp.int32)


def refined(
    h: Array,
    h_in: Array,
    times: Array,
    pull: Callable[[Array], Array],
    push: Callable[[Array], Array],
) -> Array:
    """h_out of h_in = h_out J, where the weight of J may be off by E.

    What is missed is pushed as well, h <- h + (h_in - h J) R, and what is missed then
    is E times less. Unlike `polished` it copies no weight where nothing is to be done,
    and costs less where rows are few.

    Args:
      h: h_in R, of the weight as it is.
      h_in: the cotangent that is known.
      times: of `times_of`.
      pull: times J.
      push: times R.
    """

    def more(state: tuple[Array, Array]) -> Array:
        return state[0] > 0

    def step(state: tuple[Array, Array]) -> tuple[Array, Array]:
        left, h = state
        return left + _LESS, h + push(h_in - pull(h))

    return lax.while_loop(more, step, (times, h))[1]


def _limit(dtype: Any, columns: int) -> float:
    """The gap of exact weights at most."""
    # The eps of the wide type: a rounded weight is not exact.
    return (_EXACT * float(jnp.finfo(dtype).eps)) ** 2 * columns


def _step(m: Array, r: Array, axis: int, scale: float) -> Array:
    """A Newton step of one weight or of a stack."""
    gram = _dot(m, 1 - axis, r, 1 - axis)  # c M^T R, whatever the layout
    gram = gram if scale == 1 else gram / scale
    return r + r - (_dot(r, 1, gram, 0) if axis else _dot(gram, 0, r, 0))


def _dot(
    a: Array, i: int, b: Array, j: int, precision: Any = lax.Precision.HIGHEST
) -> Array:
    """The product over axes i and j of matrices, or of stacks of them."""
    batch = tuple(range(a.ndim - 2))
    dims = ((i + len(batch),), (j + len(batch),)), (batch, batch)
    return lax.dot_general(a, b, dims, precision=precision)
