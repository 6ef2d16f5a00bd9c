"""The guard: sketches that show whether a rebuilt cotangent is the one it replaces.

Sweep R takes a sketch s of every cotangent that sweep V will rebuild
(`mwc.sketches`); sweep V takes the same sums s' of what it rebuilt. The reading is
|s - s'| / |s|. One above `tolerance` is a *trip*; NaN trips as well.

Source: DESIGN section 5, whose limit is three times this one in float32: over 6,000
perturbed runs readings between the two came with gradients that were off by up to four
tolerances, and no reading below this one with more than one tolerance. Where products
of float32 are rounded to TF32 the limit is as there: rounding alone reads 4.1e-4
sqrt(n) after n exact layers (emulated; 64 of them on an H100 read up to 3.9e-3 in 100
steps of training), and gradients are off by 0.8 of a reading at most. Limits: those of
`mwc.sketches`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mwc._tie import barrier
from passes import _jax

Array = Any

_VANISHED = 1e5  # smallest numbers: more than all squares of a sketch that vanish


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


def selects(passes: Array, x: Array) -> bool:
    """Whether x is on each device what it is selected by: neither varies more."""
    return _jax.varying(passes) <= _jax.varying(x)


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
