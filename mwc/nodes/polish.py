"""Polish: a right inverse for a declared weight that training has moved a little.

A declared weight M, [n, k] with M^T M = c I, has the right inverse M / c. Once an
optimizer has moved it, R = M / c is off by E = M^T R - I, and Newton steps
R <- R (2 I - M^T R) square E each: three serve |E| up to 5e-2. They cost n^3, nothing
per sample, and none is made for an exact weight: sixteen random rows tell.
Source: DESIGN section 2. Limits: a map with one product by a matrix; others rely on the
claim alone. What the steps cannot mend is seen by the guard.
"""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from mwc._tie import barrier
from mwc.stages import Values
from passes.flops import eqn_flops
from passes.graph import is_var
from passes.inverses import Inverse, Rule, Verdict

Array = Any

_STEPS, _ROWS = 3, 16
_EXACT = 8.0  # units in the last place: an error that rounding explains


def polished(inverse: Inverse, env: Values, h: Array) -> tuple[Values, Array]:
    """The residuals with a declared weight replaced by c times its right inverse.

    Args:
      inverse: of the link.
      env: the residuals that the link reads.
      h: the cotangent that the link waits for; without it the compiler would make the
        inverses of all stages first, and keep them.
    """
    claimed = inverse.rule is Rule.TRANSPOSE and inverse.verdict is Verdict.GENERIC
    products = [e for e in inverse.link.eqns if eqn_flops(e).matrix > 0]
    if not claimed or len(products) != 1:
        return env, h
    (eqn,) = products
    weights = [(n, v) for n, v in enumerate(eqn.invars) if is_var(v) and v in env]
    if eqn.primitive.name != "dot_general" or len(weights) != 1:
        return env, h
    ((side, v),) = weights
    contract, batch = eqn.params["dimension_numbers"]
    weight = env[v]
    real = jnp.issubdtype(weight.dtype, jnp.floating)
    if weight.ndim != 2 or len(contract[side]) != 1 or batch[side] or not real:
        return env, h
    weight, h = barrier([weight, h])
    return env | {v: _newton(weight, contract[side][0], inverse.scale)}, h


def _newton(weight: Array, axis: int, scale: float) -> Array:
    """C times a right inverse, of the weight's shape and dtype.

    There is a loop of these in every stage, so few operations: they are compiled as
    often.

    Args:
      weight: M, [n, k] with `axis` 1; its transpose with 0.
      axis: that of k.
      scale: c.
    """
    m = weight.astype(jnp.promote_types(weight.dtype, jnp.float32))
    # The eps of the weight itself: a rounded weight is not exact.
    limit = _EXACT * float(jnp.finfo(m.dtype).eps)
    shape = _ROWS, m.shape[axis]
    signs = np.random.default_rng(0).choice([-1.0, 1.0], shape)
    rows = jnp.asarray(signs, m.dtype)
    product = functools.partial(lax.dot_general, precision=lax.Precision.HIGHEST)

    def dot(a: Array, i: int, b: Array, j: int) -> Array:
        return product(a, b, (((i,), (j,)), ((), ())))

    def step(_: Array, r: Array) -> Array:
        gram = dot(m, 1 - axis, r, 1 - axis)  # M^T R, whatever the layout
        return 2 * r - (dot(r, 1, gram, 0) if axis else dot(gram, 0, r, 0))

    r = m if scale == 1 else m / scale
    gap = dot(dot(rows, 1, m, axis), 1, r, 1 - axis) - rows
    error = jnp.sum(gap**2)
    # NaN and far errors are not mended: the guard trips.
    off = (error > limit**2 * rows.size) & (error < 0.25 * rows.size)
    r = lax.fori_loop(0, jnp.where(off, _STEPS, 0), step, r)
    return (r if scale == 1 else r * scale).astype(weight.dtype)
