"""Polish: a right inverse for a declared weight that training has moved a little.

A declared weight M, [n, k] with M^T M = c I, has the right inverse M / c. Once an
optimizer has moved it, R = M / c is off by E = M^T R - I, and Newton steps
R <- R (2 I - M^T R) square E each: two serve |E| up to 5e-3, three 5e-2. They cost n^3,
nothing per sample, and none is made for an exact weight: sixteen random rows tell.
Source: DESIGN section 2. Limits: a map with one product by a matrix; others rely on the
claim alone. What the steps cannot mend is seen by the guard.
"""

from __future__ import annotations

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
    tall = contract[side][0] == 1
    found = _newton(weight if tall else weight.T, inverse.scale)
    return env | {v: found if tall else found.T}, h


def _newton(weight: Array, scale: float) -> Array:
    """C times a right inverse of [n, k], of the same shape and dtype."""
    m = weight.astype(jnp.promote_types(weight.dtype, jnp.float32))
    k = m.shape[1]
    # The eps of the weight itself: a rounded weight is not exact.
    limit = _EXACT * float(jnp.finfo(m.dtype).eps)
    draw = np.random.default_rng(0).choice([-1.0, 1.0], (_ROWS, k))
    rows = jnp.asarray(draw, m.dtype)

    def dot(a: Array, b: Array) -> Array:
        return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)

    def gap(r: Array) -> Array:
        return jnp.sqrt(jnp.mean((dot(dot(rows, m.T), r) - rows) ** 2))

    def again(state: tuple[Array, Array]) -> Array:
        r, count = state
        error = gap(r)
        # NaN and far errors are not mended: the guard trips.
        return (error > limit) & (error < 0.5) & (count < _STEPS)

    def step(state: tuple[Array, Array]) -> tuple[Array, Array]:
        r, count = state
        return 2 * r - dot(r, dot(m.T, r)), count + 1

    r, _ = lax.while_loop(again, step, (m / scale, jnp.int32(0)))
    return (r * scale).astype(weight.dtype)
