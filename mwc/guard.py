"""The guard: sketches that show whether a rebuilt cotangent is the one it replaces.

Sweep R takes a sketch of every cotangent that sweep V will rebuild, sums over its rows
with pseudo-random signs; sweep V takes the same sums of what it rebuilt. With rows b in
K buckets of at most 1,024 and features j,

    s[k, j] = sum over b = k mod K of sigma_b w_b h[b, j],    sigma of +-1

and the reading is |s - s'| / |s|. Where features are many against the rows, signed sums
over 1,024 groups of them stand for all; a loop, which keeps the sketches of all its
steps, adds up its buckets. Rows are the entries of all leading axes that
pass through the run by themselves (samples, tokens, members of an ensemble). The weight
w_b is a power of two that brings the largest entry of row b of the last cotangent near
1: a corrupted row of tiny scale counts as much as any other. A reading above
`tolerance` is a *trip*; NaN trips as well.

Source: DESIGN section 5, which adds up the buckets everywhere; not to do so saves two
kernels a stage for a thousandth of a state. Its limit is three times this one in
float32: over 6,000 perturbed runs readings between the two came with gradients that
were off by up to four tolerances, and no reading below this one with more than one
tolerance. Where products of float32 are rounded to TF32 the limit is as there: rounding
alone reads 4.1e-4 sqrt(n) after n exact layers (emulated), and gradients are off by 0.8
of a reading at most. Limits: an error that the signs cancel is missed with the
probability that all sums cancel at once; features of one row are not told apart, so an
error in some whose cotangents are tiny beside the others' counts as little as they do.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mwc._tie import barrier
from passes import _jax
from passes.graph import Var

Array = Any

_FEW, _BUCKETS = 64, 16  # with few features at least as many buckets
_LONG = 1024  # rows in a bucket: XLA multiplies apart from a longer sum
_SUMS = 1024  # of one bucket
_FEATURES = 8  # at least, of a row of several axes


@dataclasses.dataclass(frozen=True)
class Sketcher:
    """Takes sketches of cotangents of one run.

    Attributes:
      signs: +-1 of each feature, by their number, where they are summed in groups.
      weights: one factor a row, sign included; None where rows are not told apart.
      rows: how many leading axes are those of rows.
      narrow: whether buckets are summed, where sketches of all steps are kept.
    """

    signs: dict[int, Array]
    weights: Array | None
    rows: int
    narrow: bool = False

    def __call__(self, h: Array) -> Array:
        """The sketch, [buckets, sums], in float32 or float64."""
        _, features = _flat(h, self.rows)
        found = _sketch(h, self.signs.get(features), self.weights, self.rows)
        if sketch_shape(h, self.rows, self.narrow)[0] == len(found):
            return found
        # Signs, or XLA makes one sum of two, and that is too long.
        return (found * _signs((len(found), 1), 3)).sum(0, keepdims=True)


@functools.partial(jax.jit, static_argnames="rows")
def _sketch(h: Array, signs: Array | None, weights: Array | None, rows: int) -> Array:
    wide = jnp.promote_types(jnp.finfo(h.dtype).dtype, jnp.float32)
    (count, features), (buckets, sums) = _flat(h, rows), sketch_shape(h, rows)
    if jnp.iscomplexobj(h):
        h = jnp.stack([h.real, h.imag], axis=-1)
    flat = h.reshape(count, features).astype(wide)
    if weights is not None:
        flat = flat * weights.astype(wide)[:, None]
    whole = count // buckets * buckets
    summed = flat[:whole].reshape(-1, buckets, features).sum(0)
    if whole < count:
        rest = flat[whole:]
        summed = summed + jnp.pad(rest, ((0, whole + buckets - count), (0, 0)))
    if signs is None:
        return summed
    size = -(-features // sums)
    signed = jnp.pad(summed * signs.astype(wide), ((0, 0), (0, sums * size - features)))
    return signed.reshape(buckets, sums, size).sum(2)


def sketch_shape(ct: Any, rows: int, narrow: bool = False) -> tuple[int, int]:
    """Buckets of rows, and sums over each, of a sketch.

    Args:
      ct: the cotangent, or what has its shape and dtype.
      rows: how many leading axes are those of rows.
      narrow: see `Sketcher`.
    """
    count, features = _flat(ct, rows)
    if count >= _LONG:
        # Of the cotangent that is at most one sum for 512 of its entries.
        if features < _FEW:
            return max(-(-count // _LONG), _BUCKETS), features
        return 1 if narrow else -(-count // _LONG), features
    buckets = min(_BUCKETS, count) if features < _FEW else 1
    return buckets, min(_SUMS, features)


def planned_shape(ct: Var, kept: int, narrow: bool = False) -> tuple[int, int]:
    """`sketch_shape` of a variable by itself."""
    return sketch_shape(ct.aval, row_axes([ct.aval], kept), narrow)


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


def sketcher(
    last: Array, cts: Sequence[Any], kept: int, narrow: bool = False
) -> Sketcher:
    """The sketcher of a run.

    Args:
      last: the cotangent that enters sweep R.
      cts: all cotangents of the run, or what has their shapes and dtypes.
      kept: how many leading axes are those of rows throughout.
      narrow: see `Sketcher`.
    """
    weights = None
    rows = row_axes([last, *cts], kept)
    count = math.prod(last.shape[:rows])
    if rows:
        size = jnp.abs(last.reshape(count, -1)).max(-1).astype(jnp.float32)
        fine = (size > 0) & jnp.isfinite(size)
        power = jnp.floor(jnp.log2(jnp.where(fine, size, 1)))
        # A row of zeros has nothing to compare; a row that is not finite must trip.
        scale = jnp.where(fine, jnp.exp2(-jnp.clip(power, -126, 126)), 1)
        scale = jnp.where(size == 0, 0, scale)
        weights = scale * _signs((count,), 1)
    grouped = {_flat(ct, rows)[1] for ct in cts if _is_grouped(ct, rows)}
    made = sorted(grouped)
    signs = [_signs((features,), 2) for features in made]
    # Made once: fused into every sketch they would be made in every stage.
    held = barrier([*signs, *([] if weights is None else [weights])])
    found = dict(zip(made, held, strict=False))
    return Sketcher(found, None if weights is None else held[-1], rows, narrow)


def _is_grouped(ct: Any, rows: int) -> bool:
    """Whether features are summed in groups."""
    return sketch_shape(ct, rows)[1] < _flat(ct, rows)[1]


def _signs(shape: tuple[int, ...], seed: int) -> Array:
    """Pseudo-random +-1 from a hash of the index."""
    index = lax.iota(np.uint32, math.prod(shape)) + np.uint32(seed * 0x9E3779B9 % 2**32)
    for factor in (0x7FEB352D, 0x846CA68B):
        index = (index ^ (index >> np.uint32(16))) * np.uint32(factor)
    index = index ^ (index >> np.uint32(15))
    return (1 - 2 * (index & np.uint32(1)).astype(jnp.float32)).reshape(shape)


class Comparison(NamedTuple):
    """Of two sketches.

    Attributes:
      over: |s - s'|^2 - limit^2 |s|^2 in one sum, over the square of the unit.
      gap: |s - s'|^2, over the same.
      size: |s|^2, over the same.
      top: the largest of s, by its size.
    """

    over: Array
    gap: Array
    size: Array
    top: Array

    @property
    def fine(self) -> Array:
        """Whether it passes: squares that vanish or overflow do not; zeros do."""
        return (self.over < (self.top == 0)) & (self.over > -jnp.inf)

    @property
    def unit(self) -> Array:
        """For the next stage, which does not pass either where this one does not.

        The unit of a stage by itself would be a kernel a stage. And a condition in the
        sum is computed once: where barriers are dropped, a chain of conditions beside
        it is computed again, whole, for every gradient that reads it.
        """
        return jnp.where(self.fine, _unit(self.top), jnp.nan)


def _unit(top: Array) -> Array:
    return jnp.where(top == 0, 1, top)


@jax.jit
def compare(
    expected: Array, found: Array, limit: Array | float, unit: Array | None = None
) -> Comparison:
    """Compares two sketches.

    Args:
      expected: s, of the cotangent that was.
      found: s', of the one that was rebuilt.
      limit: the largest reading that passes.
      unit: of the stage before; None for the largest of s. Without one squares of what
        is tiny would vanish.
    """
    top = jnp.max(jnp.abs(expected))
    unit = _unit(top) if unit is None else unit
    gap, size = ((expected - found) / unit) ** 2, (expected / unit) ** 2
    over = gap - limit * limit * size
    return Comparison(jnp.sum(over), jnp.sum(gap), jnp.sum(size), top)


def reading(one: Comparison) -> Array:
    """|s - s'| / |s|; not finite where either is not."""
    return jnp.sqrt(jnp.where(one.gap == 0, 0, one.gap / one.size)).astype(jnp.float32)


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
    real = jnp.finfo(dtype).dtype
    if real in (jnp.bfloat16, jnp.float16):
        return _TOLERANCE["bfloat16"]
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
