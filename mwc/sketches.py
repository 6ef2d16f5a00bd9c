"""Sketches: a few signed sums of a cotangent, for the guard to compare.

At most 1,024 of them. With rows b in K buckets, features j in G groups, sigma and E of
+-1,

    t[k, j] = sum over b = k mod K of sigma_b w_b h[b, j]
    s[g] = sum over k, and j in g, of E[k, j] t[k, j]

where features are few, 16 sums over some of the buckets stand for one over all. Rows
are the entries of all leading axes that pass through the run by themselves (samples,
tokens, members of an ensemble). The weight w_b is a power of two that brings the
largest entry of row b of the last cotangent near 1: a corrupted row of tiny scale
counts as much as any other. On a CPU, where a product of a few rows costs less than a
signed sum, feature j has row j mod 8 of one matrix of signs in place of E[b mod K, j].

Source: DESIGN section 5. Limits: an error that the signs cancel is missed with the
probability that all sums cancel at once; features of one row are not told apart, so an
error in some whose cotangents are tiny beside the others' counts as little as they do.
What is off alike in all features is seen in 8 sums by the product, in 16 by buckets.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mwc._tie import barrier
from passes import _jax
from passes.graph import Var

Array = Any

_FEW, _BUCKETS, _LONG, _SUMS = 64, 16, 256, 1024
_FEATURES = 8  # at least, of a row of several axes
_WHOLE = 32  # a longer axis a compiler for CPUs sums up in two kernels
_MIXED, _DEEP = 8, 8192  # rows of signs of a product, and the most that it sums up


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["signs", "weights", "mixers"],
    meta_fields=["rows"],
)
@dataclasses.dataclass(frozen=True)
class Sketcher:
    """Takes sketches of cotangents of one run.

    Attributes:
      signs: for each shape (buckets, features) an array of +-1.
      weights: one factor a row, sign included; None where rows are not told apart.
      mixers: for some counts of rows their weights with eight rows of signs.
      rows: how many leading axes are those of rows.
    """

    signs: dict[tuple[int, int], Array]
    weights: Array | None
    mixers: dict[int, Array]
    rows: int

    def __call__(self, h: Array) -> Array:
        """The sketch, [buckets, ...], in float32 or float64."""
        count, features = _flat(h, self.rows)
        signs = self.signs[_buckets(count), features]
        mixer = self.mixers.get(count) if _mixes(h, self.rows) else None
        return _sketch(h, signs, self.weights, mixer, self.rows)


@functools.partial(jax.jit, static_argnames="rows")
def _sketch(
    h: Array, signs: Array, weights: Array | None, mixer: Array | None, rows: int
) -> Array:
    (count, features), shape = _flat(h, rows), sketch_shape(h, rows)
    if jnp.iscomplexobj(h):
        h = jnp.stack([h.real, h.imag], axis=-1)
    flat = h.reshape(count, features).astype(_wide(h))
    summed = functools.partial(_summed, shape=shape)
    if mixer is None or _jax.is_split(flat):
        return summed(flat, signs, weights)
    return lax.platform_dependent(
        *(flat, signs, weights, mixer),
        cpu=lambda flat, _signs, _weights, mixer: _mixed(flat, mixer, shape),
        default=lambda flat, signs, weights, _mixer: summed(flat, signs, weights),
    )


def _mixed(flat: Array, mixer: Array, shape: tuple[int, ...]) -> Array:
    """The sketch by a product of the mixer and all rows."""
    features = flat.shape[1]
    sums = lax.dot(mixer.astype(flat.dtype), flat, precision=lax.Precision.HIGHEST)
    # Of several rows for each feature some signs would add up to nothing.
    own = np.arange(_MIXED)[:, None] == np.arange(features) % _MIXED
    each = (sums * own.astype(flat.dtype)).sum(0)
    groups = math.prod(shape)
    size = -(-features // groups)
    return jnp.pad(each, (0, groups * size - features)).reshape(*shape, size).sum(-1)


def _summed(
    flat: Array, signs: Array, weights: Array | None, shape: tuple[int, ...]
) -> Array:
    """The sketch by sums of rows in buckets."""
    (count, features), buckets = flat.shape, len(signs)
    (kept, *axes), wide = shape, flat.dtype
    each = None if weights is None else weights.astype(wide)
    deep, rest = divmod(count, buckets)
    if rest or deep > _WHOLE:
        # XLA multiplies apart from a long sum, and writes the product: two of them.
        if each is not None:
            flat, each = flat * lax.broadcast_in_dim(each, flat.shape, (0,)), None
        whole, last = flat[: count - rest], flat[count - rest :]
        flat = whole.reshape(-1, buckets, features).sum(0)
        if rest:
            flat = flat + jnp.pad(last, ((0, buckets - rest), (0, 0)))
    parts = flat.reshape(-1, buckets, features)
    # Where rows are alike, one sum for all features may vanish by its signs.
    factors = lax.broadcast_in_dim(signs.astype(wide), parts.shape, (1, 2))
    if each is not None:
        # In the shape of the sum: of any other a compiler for CPUs makes a slow loop.
        each = each.reshape(-1, buckets)
        factors = factors * lax.broadcast_in_dim(each, parts.shape, (0, 1))
    signed = parts * factors
    groups = math.prod(axes)
    size = -(-features // groups)
    if short := groups * size - features:
        signed = jnp.pad(signed, ((0, 0), (0, 0), (0, short)))
    split = signed.reshape(-1, buckets // kept, kept, groups, size)
    found = split.sum((0, 1, -1))
    return found if _jax.is_split(signed) else found.reshape(kept, *axes)


def sketch_shape(ct: Any, rows: int) -> tuple[int, ...]:
    """Buckets of rows, if they are kept, and groups of features, in short axes.

    Args:
      ct: the cotangent, or what has its shape and dtype.
      rows: how many leading axes are those of rows.
    """
    count, features = _flat(ct, rows)
    kept = min(_BUCKETS, count) if features < _FEW else 1
    return kept, *_short(min(_SUMS, features))


def _short(size: int) -> list[int]:
    """Axes of so many entries, none too long if that can be."""
    if size <= _WHOLE:
        return [size]
    axis = next((n for n in range(_WHOLE, 1, -1) if size % n == 0), size)
    return [axis, *_short(size // axis)] if axis < size else [size]


def planned_shape(ct: Var, kept: int) -> tuple[int, ...]:
    """`sketch_shape` of a variable by itself."""
    return sketch_shape(ct.aval, row_axes([ct.aval], kept))


def row_axes(cts: Sequence[Any], kept: int) -> int:
    """How many of the leading axes that are kept are told apart as rows.

    The first, and more as long as their weights are few against each cotangent.
    """
    axes = min([kept, *(len(ct.shape) for ct in cts)])
    while axes > 1 and any(_flat(ct, axes)[1] < _FEATURES for ct in cts):
        axes -= 1
    return axes


def _flat(ct: Any, rows: int) -> tuple[int, int]:
    """Rows and features, real and imaginary parts apart."""
    count = math.prod(ct.shape[:rows])
    parts = 2 if jnp.issubdtype(ct.dtype, jnp.complexfloating) else 1
    return count, parts * math.prod(ct.shape) // max(1, count)


def _wide(ct: Any) -> Any:
    """The dtype of a sketch."""
    return jnp.float64 if jnp.finfo(ct.dtype).bits > 32 else jnp.float32


def _mixes(ct: Any, rows: int) -> bool:
    """Whether a CPU takes the sketch by a product: not of few, and summed once."""
    count, features = _flat(ct, rows)
    return ct.dtype == _wide(ct) and features >= _FEW <= count <= _DEEP


def _buckets(count: int) -> int:
    """Of at most `_LONG` rows, and a multiple of `_BUCKETS` if there are as many."""
    if count <= _BUCKETS:
        return count
    return _BUCKETS * -(-count // (_BUCKETS * _LONG))


def sketcher(last: Array, cts: Sequence[Any], kept: int) -> Sketcher:
    """The sketcher of a run.

    Args:
      last: the cotangent that enters sweep R.
      cts: all cotangents of the run, or what has their shapes and dtypes.
      kept: how many leading axes are those of rows throughout.
    """
    weights = None
    rows = row_axes([last, *cts], kept)
    count = math.prod(last.shape[:rows])
    if rows:
        size = jnp.abs(last.reshape(count, -1)).max(-1).astype(jnp.float32)
        fine = (size > 0) & jnp.isfinite(size)
        # A row of zeros has nothing to compare; a row that is not finite must trip.
        scale = jnp.where(fine, _inverse_power(size), 1)
        scale = jnp.where(size == 0, 0, scale)
        weights = scale * _signs((count,), 1)
    wanted = set()
    for ct in cts:
        count, features = _flat(ct, rows)
        wanted.add((_buckets(count), features))
    made = sorted(wanted)
    signs = [_signs(shape, 2) for shape in made]
    # Made once: fused into every sketch they would be made in every stage.
    held = barrier([*signs, *([] if weights is None else [weights])])
    found = dict(zip(made, held, strict=False))
    if weights is None:
        return Sketcher(found, None, {}, rows)
    counts = {_flat(ct, rows)[0] for ct in cts if _mixes(ct, rows)}
    # By themselves: what no platform asks for is not made.
    mixers = {n: barrier([_signs((_MIXED, n), 3) * weights])[0] for n in counts}
    return Sketcher(found, held[-1], mixers, rows)


def _inverse_power(size: Array) -> Array:
    """2^-k of float32 between 2^k and 2^(k+1), from the bits of its exponent."""
    exponent = lax.bitcast_convert_type(size, np.int32) >> 23
    # Neither infinite nor subnormal.
    turned = 254 - jnp.clip(exponent, 1, 253)
    return lax.bitcast_convert_type(turned << 23, np.float32)


def _signs(shape: tuple[int, ...], seed: int) -> Array:
    """Pseudo-random +-1 from a hash of the index."""
    index = lax.iota(np.uint32, math.prod(shape)) + np.uint32(seed * 0x9E3779B9 % 2**32)
    for factor in (0x7FEB352D, 0x846CA68B):
        index = (index ^ (index >> np.uint32(16))) * np.uint32(factor)
    index = index ^ (index >> np.uint32(15))
    return (1 - 2 * (index & np.uint32(1)).astype(jnp.float32)).reshape(shape)
