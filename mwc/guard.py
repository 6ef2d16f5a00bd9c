"""The guard: sketches that show whether a rebuilt cotangent is the one it replaces.

Sweep R takes a sketch of every cotangent that sweep V will rebuild, at most 1,024 sums
with pseudo-random signs; sweep V takes the same sums of what it rebuilt. With rows b in
K buckets, features j in G groups, sigma and E of +-1,

    t[k, j] = sum over b = k mod K of sigma_b w_b h[b, j]
    s[g] = sum over k, and j in g, of E[k, j] t[k, j]

and the reading is |s - s'| / |s|; where features are few, 16 sums over some of the
buckets stand for one over all. Rows are the entries of all leading axes that pass
through the run by themselves (samples, tokens, members of an ensemble). The weight w_b
is a power of two that brings the largest entry of row b of the last cotangent near 1: a
corrupted row of tiny scale counts as much as any other. A reading above `tolerance` is
a *trip*; NaN trips as well.

Source: DESIGN section 5, whose limit is three times this one in float32: over 6,000
perturbed runs readings between the two came with gradients that were off by up to four
tolerances, and no reading below this one with more than one tolerance. Where products
of float32 are rounded to TF32 the limit is as there: rounding alone reads 4.1e-4
sqrt(n) after n exact layers (emulated; 64 of them on an H100 read up to 3.9e-3 in 100
steps of training), and gradients are off by 0.8 of a reading at most. Limits: an error
that the signs cancel is missed with the probability that all sums cancel at once;
features of one row are not told apart, so an error in some whose cotangents are tiny
beside the others' counts as little as they do.
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
_VANISHED = 1e5  # smallest numbers: more than all squares of a sketch that vanish


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["signs", "weights"],
    meta_fields=["rows"],
)
@dataclasses.dataclass(frozen=True)
class Sketcher:
    """Takes sketches of cotangents of one run.

    Attributes:
      signs: for each shape (buckets, features) an array of +-1.
      weights: one factor a row, sign included; None where rows are not told apart.
      rows: how many leading axes are those of rows.
    """

    signs: dict[tuple[int, int], Array]
    weights: Array | None
    rows: int

    def __call__(self, h: Array) -> Array:
        """The sketch, [buckets, ...], in float32 or float64."""
        count, features = _flat(h, self.rows)
        signs = self.signs[_buckets(count), features]
        return _sketch(h, signs, self.weights, self.rows)


@functools.partial(jax.jit, static_argnames="rows")
def _sketch(h: Array, signs: Array, weights: Array | None, rows: int) -> Array:
    wide = jnp.float64 if jnp.finfo(h.dtype).bits > 32 else jnp.float32
    (count, features), (kept, *axes) = _flat(h, rows), sketch_shape(h, rows)
    if jnp.iscomplexobj(h):
        h = jnp.stack([h.real, h.imag], axis=-1)
    flat, buckets = h.reshape(count, features).astype(wide), _buckets(count)
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
    return Sketcher(found, None if weights is None else held[-1], rows)


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


@jax.jit
def unit_of(sketches: Sequence[Array]) -> Array:
    """What sketches of a few stages are measured in; that of each is a kernel more.

    Returns:
      One over the largest entry of all of them, a scalar. One that is not finite makes
      all comparisons trip.
    """
    # Of all that are alike at once: a largest entry of each is a kernel more.
    alike: dict[Any, Array] = {}
    for s in map(jnp.abs, sketches):
        kind = s.shape, s.dtype
        alike[kind] = jnp.maximum(alike[kind], s) if kind in alike else s
    top = functools.reduce(jnp.maximum, map(jnp.max, alike.values()))
    return 1 / jnp.maximum(top, jnp.finfo(top.dtype).tiny)


def unbroken(sketch: Array) -> Array:
    """`before` of the first comparison: not a constant, or that is a kernel more.

    Args:
      sketch: that of any cotangent of the run.
    """
    (below,) = barrier([jnp.full((), -1, sketch.dtype)])
    return _passes(below)


def _passes(over: Array) -> Array:
    """Whether a sum is negative, and not of squares that vanish."""
    return over < -_VANISHED * jnp.finfo(over.dtype).tiny


@jax.jit
def compare(
    expected: Array,
    found: Array,
    limit: Array | float,
    unit: Array,
    before: Array | bool = True,
) -> Array:
    """Whether |s - s'| < limit |s|, or both are zero.

    What is not finite does not pass, nor do squares that vanish: those of an s that is
    1e12 times smaller than the largest in its unit.

    Args:
      expected: s, of the cotangent that was.
      found: s', of the one that was rebuilt.
      limit: the largest reading that passes.
      unit: of s and of those of a few other stages.
      before: whether the comparisons before it pass; if not, this one does not.
    """
    # One sum for all that is asked, for each is a kernel of every stage. Those before
    # are in it, too: where barriers are dropped, a chain of conditions beside it is
    # computed again, whole, for every gradient that reads it.
    scale = jnp.where(before, unit, jnp.nan).astype(expected.dtype)
    # The smallest number lets zeros pass where all in the unit are zeros.
    whole = expected + jnp.finfo(expected.dtype).tiny
    off, size = (expected - found) * scale, whole * (limit * scale)
    over = jnp.sum(off * off - size * size)
    return _passes(over)


@jax.jit
def reading(expected: Array, found: Array) -> Array:
    """|s - s'| / |s| of two sketches; not finite where either is not."""
    # Squares of what is tiny would vanish. What is not finite divided by itself is NaN.
    top = jnp.maximum(jnp.max(jnp.abs(expected)), jnp.finfo(expected.dtype).tiny)
    gap = jnp.sum(((expected - found) / top) ** 2)
    size = jnp.sum((expected / top) ** 2)
    return jnp.sqrt(jnp.where(gap == 0, 0, gap / size)).astype(jnp.float32)


def drift(readings: Array, passes: Array, limit: Array | float) -> Array:
    """Readings over the limit: above 1 where one does not pass, and nowhere else."""
    over = readings / limit
    above = jnp.maximum(over, np.nextafter(np.float32(1), np.float32(2)))
    return jnp.where(passes, jnp.minimum(over, 1), above)


def nan_unless(passes: Array, grads: Sequence[Array]) -> list[Array]:
    """The gradients, or NaN in their place: the compiler selects in place.

    One that is the same on all devices of a manual mesh, for it was summed over them,
    is NaN on all where the guard trips on any; it must not seem to differ, or it would
    be summed again.
    """
    everywhere: dict[tuple[Any, ...], Array] = {(): passes}
    found = []
    for g in grads:
        axes = tuple(sorted(_jax.varying(passes) - _jax.varying(g)))
        if axes not in everywhere:
            everywhere[axes] = lax.psum(jnp.where(passes, 0, 1), axes) == 0
        found.append(jnp.where(everywhere[axes], g, jnp.nan))
    return found


# The error that rebuilding may add, by dtype; DESIGN section 9.
_TOLERANCE = {"float64": 1e-9, "float32": 1e-5, "bfloat16": 2e-2}
# Of float32 whose products the platform rounds: three times DESIGN's.
_ROUNDED = {"tf32": 6e-3, "bfloat16": 6e-2}


def planned_tolerance(dtype: Any, asked: float | None) -> float:
    """The error that a plan counts on: that of the dtype's own precision."""
    if asked is not None:
        return asked
    real = jnp.finfo(dtype).dtype
    return _TOLERANCE.get(real.name, _TOLERANCE["bfloat16"])


def is_loose(dtype: Any, asked: float | None) -> bool:
    """Whether `tolerance` is that of bfloat16, on every platform."""
    return asked is None and jnp.finfo(dtype).dtype in (jnp.bfloat16, jnp.float16)


def tolerance(dtype: Any, exact: bool, asked: float | None) -> Array | float:
    """The error that rebuilding may add.

    Args:
      dtype: of the cotangents.
      exact: whether all products ask for full precision, or there are none.
      asked: the user's own tolerance.

    Returns:
      A number, or a scalar that is known when the program is lowered: products of
      float32 are rounded to TF32 on recent GPUs, and to bfloat16 on TPUs.
    """
    if asked is not None:
        return asked
    if is_loose(dtype, asked):
        return _TOLERANCE["bfloat16"]
    real = jnp.finfo(dtype).dtype
    if real == jnp.float64:
        return _TOLERANCE["float64"]
    full = np.float32(_TOLERANCE["float32"])
    if exact:
        return full
    return lax.platform_dependent(
        cpu=lambda: jnp.float32(full),
        tpu=lambda: jnp.float32(_ROUNDED["bfloat16"]),
        default=lambda: jnp.float32(_ROUNDED["tf32"]),
    )
