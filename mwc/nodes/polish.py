"""Polish: a right inverse for a declared weight that training has moved a little.

A declared weight M, [n, k] with M^T M = c I, has the right inverse M / c. Once an
optimizer has moved it, R = M / c is off by E = M^T R - I, and Newton steps
R <- R (2 I - M^T R) square E each: three serve |E| up to 5e-2. They cost n^3, nothing
per sample, and none is made for an exact weight: four random rows tell.
Source: DESIGN section 2. Limits: a map with one product by a matrix; others rely on the
claim alone. What the steps cannot mend is seen by the guard.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from passes.flops import eqn_flops
from passes.graph import Var, is_var, nbytes
from passes.inverses import MOVES, Inverse, Rule, Verdict
from passes.widen import is_narrow

Array = Any

_STEPS, _ROWS = 3, 4
_PLAIN = MOVES - {"pad"}
_EXACT = 8.0  # units in the last place: an error that rounding explains


@dataclasses.dataclass(frozen=True)
class Claim:
    """A weight that is claimed to be coisometric, and may be so no longer.

    Attributes:
      var: the weight M among the residuals, [n, k] with `axis` 1, or transposed with 0.
      axis: that of k.
      scale: c in M^T M = c I.
    """

    var: Var
    axis: int
    scale: float

    def alike(self, other: Claim) -> bool:
        """Whether both can be polished at once."""
        a, b = self.var.aval, other.var.aval
        same = (a.shape, a.dtype) == (b.shape, b.dtype)
        return same and (self.axis, self.scale) == (other.axis, other.scale)


Group = list[tuple[int, Claim]]


def claim(inverse: Inverse, residuals: Mapping[Var, Any]) -> Claim | None:
    """The weight on whose claim a link is inverted; None where there is none to polish.

    Args:
      inverse: of the link.
      residuals: what the backward reads of the stage, as the forward makes it.
    """
    products = [e for e in inverse.link.eqns if eqn_flops(e).matrix > 0]
    if inverse.rule is not Rule.TRANSPOSE or len(products) != 1:
        return None
    (eqn,) = products
    weights = [(n, v) for n, v in enumerate(eqn.invars) if is_var(v) and v in residuals]
    if eqn.primitive.name != "dot_general" or len(weights) != 1:
        return None
    # A factor beside the weight, or a part of its columns: the claim is not of it.
    if any(e is not eqn and e.primitive.name not in _PLAIN for e in inverse.link.eqns):
        return None
    ((side, v),) = weights
    # What is orthogonal by construction is so no longer once it is rounded.
    exact = inverse.verdict is not Verdict.GENERIC
    if exact and not is_narrow(residuals[v].aval):
        return None
    contract, batch = eqn.params["dimension_numbers"]
    real = jnp.issubdtype(v.aval.dtype, jnp.floating)
    if v.aval.ndim != 2 or len(contract[side]) != 1 or batch[side] or not real:
        return None
    return Claim(v, contract[side][0], inverse.scale)


def together(claims: Sequence[tuple[Claim, ...]], most: int) -> dict[int, list[Group]]:
    """Claims of stages in a row that are polished at once.

    Args:
      claims: of each stage.
      most: bytes of the weights of one group.

    Returns:
      By its first stage, each group: pairs of a stage and a claim of it.
    """
    groups: list[Group] = []
    for pair in ((i, one) for i, found in enumerate(claims) for one in found):
        last = groups[-1] if groups else []
        fits = (len(last) + 1) * nbytes(pair[1].var) <= most
        if last and fits and pair[1].alike(last[0][1]):
            last.append(pair)
        else:
            groups.append([pair])
    found: dict[int, list[Group]] = {}
    for group in groups:
        found.setdefault(group[0][0], []).append(group)
    return found


def polished(weights: Sequence[Array], of: Claim) -> list[Array]:
    """C times right inverses of weights alike, of their shape and dtype."""
    return _polished(list(weights), of.axis + 1, of.scale)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _polished(weights: list[Array], axis: int, scale: float) -> list[Array]:
    # There is a loop of these in the code of every sweep, so few operations, and
    # several weights at once: they are compiled as often. Traced once.
    stacked = jnp.stack(weights)
    m = stacked.astype(jnp.promote_types(stacked.dtype, jnp.float32))
    # The eps of the weight itself: a rounded weight is not exact.
    limit = _EXACT * float(jnp.finfo(m.dtype).eps)
    shape = len(weights), _ROWS, m.shape[axis]
    signs = np.random.default_rng(0).choice([-1.0, 1.0], shape[1:])
    rows = jnp.broadcast_to(jnp.asarray(signs, m.dtype), shape)
    product = functools.partial(lax.dot_general, precision=lax.Precision.HIGHEST)

    def dot(a: Array, i: int, b: Array, j: int) -> Array:
        return product(a, b, (((i,), (j,)), ((0,), (0,))))

    def step(_: Array, r: Array) -> Array:
        gram = dot(m, 3 - axis, r, 3 - axis)  # M^T R, whatever the layout
        return 2 * r - (dot(r, 2, gram, 1) if axis == 2 else dot(gram, 1, r, 1))

    r = m if scale == 1 else m / scale
    gap = dot(dot(rows, 2, m, axis), 2, r, 3 - axis) - rows
    # Of all, by one sum. NaN and what is far off are not mended: the guard trips.
    off = jnp.sum(gap**2) > limit**2 * _ROWS * shape[2]
    r = lax.fori_loop(0, jnp.where(off, _STEPS, 0), step, r)
    made = (r if scale == 1 else r * scale).astype(stacked.dtype)
    return [made[i] for i in range(len(weights))]
