"""Polish: a right inverse for a declared weight that training has moved a little.

A declared weight M, [n, k] with M^T M = c I, has the right inverse M / c. Once an
optimizer has moved it, R = M / c is off by E = M^T R - I, and Newton steps
R <- R (2 I - M^T R) square E each: three serve |E| up to 5e-2. They cost n^3, nothing
per sample. A weight that is large beside a state stays as it is: what it makes is
refined instead, up to seven times, which comes to the same. Nothing is done where a
weight is exact: four random rows tell. Where the weight is of less than 32 bits and the
tolerance is bfloat16's, nobody looks: a few terms, R = M (I + F + F^2 + F^3) / c with
F = I - M^T M / c, serve |E| up to 0.1. They are no loop, whose condition a GPU would
wait for, and do with TF32, in which M is exact and F alone is rounded.
Source: DESIGN section 2. Limits: a map with one product by a matrix, as a convolution
of windows side by side is too; others rely on the claim alone. What the steps cannot
mend is seen by the guard.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mwc._tie import barrier
from passes.flops import eqn_flops
from passes.graph import Eqn, Var, is_var, nbytes
from passes.inverses import Inverse, Rule, Verdict, factor
from passes.widen import is_narrow

Array = Any

_STEPS, _ROWS = 3, 4
_MOST = 2**_STEPS - 1  # refinements, which do as much
_CHECKED = 8, 7, 6, 9, 10, 5  # weights that are checked at once, best first
_SHARE = 0.4  # of a state: weights that are polished at once
_LESS = np.int32(-1)  # `- 1` is a constant that XLA moves out of loops and in again
_EXACT = 8.0  # units in the last place: an error that rounding explains


class Layout(NamedTuple):
    """The axes of a weight.

    Attributes:
      batch: those that count matrices.
      rows: those that are n of a matrix M, [n, k].
      columns: those that are k.
    """

    batch: tuple[int, ...]
    rows: tuple[int, ...]
    columns: tuple[int, ...]

    @property
    def axis(self) -> int:
        """Which of the two axes of `matrices` is k: what comes first stays first."""
        return int(self.rows < self.columns)

    @property
    def _halves(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        if self.axis:
            return self.rows, self.columns
        return self.columns, self.rows

    def _order(self, lead: int) -> tuple[int, ...]:
        """The axes as `matrices` has them, `lead` others before them."""
        own = *self.batch, *self._halves[0], *self._halves[1]
        return *range(lead), *(lead + a for a in own)

    def matrices(self, x: Array) -> Array:
        """A weight, or a stack of weights, as [..., n, k] or [..., k, n]."""
        lead = x.ndim - sum(map(len, self))
        turned = _transposed(x, self._order(lead))
        kept, first = lead + len(self.batch), len(self._halves[0])
        shape = turned.shape
        sizes = math.prod(shape[kept : kept + first]), math.prod(shape[kept + first :])
        return turned.reshape(*shape[:kept], *sizes)

    def weight(self, matrices: Array, like: Array) -> Array:
        """The inverse: what has the shape of `like`."""
        order = self._order(like.ndim - sum(map(len, self)))
        turned = matrices.reshape(*(like.shape[a] for a in order))
        return _transposed(turned, tuple(map(order.index, range(like.ndim))))


def _transposed(x: Array, order: tuple[int, ...]) -> Array:
    return x if order == (*range(x.ndim),) else jnp.transpose(x, order)


@dataclasses.dataclass(frozen=True)
class Claim:
    """A weight that is claimed to be coisometric, and may be so no longer.

    Attributes:
      var: the weight M among the residuals.
      layout: its axes.
      scale: c in M^T M = c I.
      given: whether it is an argument as it is, which costs nothing to look at.
      rounded: whether its entries are of less than 32 bits.
    """

    var: Var
    layout: Layout
    scale: float
    given: bool = False
    rounded: bool = False

    def alike(self, other: Claim) -> bool:
        """Whether both can be polished at once."""
        a, b = self.var.aval, other.var.aval
        same = (a.shape, a.dtype) == (b.shape, b.dtype)
        return same and self._kind == other._kind

    @property
    def _kind(self) -> tuple[Layout, float, bool, bool]:
        return self.layout, self.scale, self.given, self.rounded


Group = list[tuple[int, Claim]]


def claim(
    inverse: Inverse,
    residuals: Mapping[Var, Any],
    plain: Mapping[Var, Var],
    inputs: Collection[Var],
) -> Claim | None:
    """The weight on whose claim a link is inverted; None where there is none to polish.

    Args:
      inverse: of the link.
      residuals: what the backward reads of the stage, as the forward makes it.
      plain: what is one of these with its entries in another order.
      inputs: of the stage.
    """
    products = [e for e in inverse.link.eqns if eqn_flops(e).matrix > 0]
    if inverse.rule is not Rule.TRANSPOSE or len(products) != 1:
        return None
    (eqn,) = products
    read = ((n, plain.get(v, v)) for n, v in enumerate(eqn.invars) if is_var(v))
    weights = [(n, v) for n, v in read if v in residuals]
    if len(weights) != 1:
        return None
    ((side, v),) = weights
    layout = _layout(eqn, side, v)
    # What is orthogonal by construction is so no longer once it is rounded.
    narrow, beside = is_narrow(residuals[v].aval), factor(inverse.link)
    if not beside or not (narrow or inverse.verdict is Verdict.GENERIC):
        return None
    if layout is None or not jnp.issubdtype(v.aval.dtype, jnp.floating):
        return None
    made = residuals[v]
    given = is_var(made) and made in inputs and made.aval.dtype == v.aval.dtype
    given = given and not is_narrow(v.aval)
    return Claim(v, layout, inverse.scale / beside**2, given, narrow)


def _layout(eqn: Eqn, side: int, weight: Var) -> Layout | None:
    """The axes of an operand of a product; None where it is no matrix."""
    shape, params = weight.aval.shape, eqn.params
    if eqn.primitive.name == "dot_general":
        contract, batch = (axes[side] for axes in params["dimension_numbers"])
        free = tuple(a for a in range(len(shape)) if a not in (*contract, *batch))
        layout = Layout(tuple(batch), free, tuple(sorted(contract)))
        return layout if free and contract else None
    if eqn.primitive.name != "conv_general_dilated" or side != 1:
        return None
    # Of a backward: windows that are as far apart as they are long, or farther.
    out, into, *window = params["dimension_numbers"].rhs_spec
    groups = params["feature_group_count"], params["batch_group_count"]
    pairs = zip(window, params["lhs_dilation"], params["rhs_dilation"], strict=True)
    apart = all(shape[a] <= far and (shape[a] == 1 or n == 1) for a, far, n in pairs)
    if groups != (1, 1) or not apart:
        return None
    return Layout((), (out, *window), (into,))


def most_polished(state: Var) -> int:
    """Bytes of weights that are polished at once; what a larger one makes is refined.

    Args:
      state: that of which the weights' products are made.
    """
    # Its cotangent is no narrower than float32.
    return int(_SHARE * max(nbytes(state), 4 * math.prod(state.aval.shape)))


def together(claims: Sequence[Sequence[Claim]], most: int) -> list[Group]:
    """Claims of stages in a row that are treated at once.

    Args:
      claims: of each stage.
      most: bytes of the weights of one group.

    Returns:
      Groups in the order of their first stages: pairs of a stage and a claim of it.
    """
    groups: list[Group] = []
    for pair in ((i, one) for i, found in enumerate(claims) for one in found):
        last = groups[-1] if groups else []
        fits = (len(last) + 1) * nbytes(pair[1].var) <= most
        if last and fits and pair[1].alike(last[0][1]):
            last.append(pair)
        else:
            groups.append([pair])
    return groups


def batches(groups: Sequence[Group]) -> list[list[Group]]:
    """Groups in a row whose weights are checked at once.

    Those of one weight, if it is an argument: a check of each is a few kernels more.
    """
    runs: list[list[Group]] = []
    for group in groups:
        one, last = group[0][1], runs[-1] if runs else []
        joins = last and len(group) == len(last[0]) == 1
        if joins and one.given and one.alike(last[0][0][1]):
            last.append(group)
        else:
            runs.append([group])
    found: list[list[Group]] = []
    for run in runs:
        # As many each time, if they can be: fewer are a kernel more.
        size = next((n for n in _CHECKED if len(run) % n == 0), _CHECKED[0])
        found += [run[i : i + size] for i in range(0, len(run), size)]
    return found


def gap_of(
    stacks: Sequence[Array], of: Claim, token: Array, loose: bool = False
) -> Array | None:
    """How far weights alike are from their claim, as a scalar for `polished`.

    Args:
      stacks: weights, or stacks of them, all of one shape.
      of: the claim of each.
      token: what must be there before they are looked at.
      loose: `guard.is_loose`.

    Returns:
      The scalar; None where it does not matter.
    """
    if of.rounded and loose:
        return None
    return _gap(list(stacks), token, of.layout, of.scale)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _gap(stacks: list[Array], token: Array, layout: Layout, scale: float) -> Array:
    wide = jnp.float64 if jnp.finfo(stacks[0].dtype).bits > 32 else jnp.float32
    matrices = [layout.matrices(stack).astype(wide) for stack in stacks]
    axis, like = layout.axis, matrices[0]
    shape = _ROWS, like.shape[axis - 2]
    signs = np.random.default_rng(0).choice([-1.0, 1.0], shape)
    rows = jnp.broadcast_to(jnp.asarray(signs, wide), (*like.shape[:-2], *shape))
    gap = jnp.zeros_like(rows)
    for m in matrices:
        # Products that share an operand are one to XLA, of a copy of all the others.
        token, rows = barrier([token, rows])
        image = _dot(_dot(rows, 1, m, axis), 1, m, 1 - axis)
        token = gap = jnp.maximum(gap, jnp.abs(image - scale * rows))
    return jnp.sum(gap**2)


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
        return (state[0] > 0) & _off(gap, m.shape[axis - 2], scale)

    def step(state: tuple[Array, Array]) -> tuple[Array, Array]:
        left, r = state
        return left + _LESS, _step(m, r, axis, scale)

    _, r = lax.while_loop(more, step, (jnp.int32(_STEPS), m))
    made = layout.weight(r, stack).astype(stack.dtype)
    return [made[i] for i in range(len(stack))]


def times_of(weights: Sequence[Array], of: Claim, token: Array) -> Array:
    """How often `refined` refines what weights alike make; 0 where none is off.

    Args:
      weights: all of one shape.
      of: the claim of each.
      token: what must be there before they are looked at.
    """
    count = math.prod(of.var.aval.shape[a] for a in of.layout.columns)
    gap = _gap(list(weights), token, of.layout, of.scale)
    return _times(gap, count, of.scale)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _times(gap: Array, count: int, scale: float) -> Array:
    # The fewest n with E^n below eps; two at least, as E is above it where it is off.
    eps, least = float(jnp.finfo(gap.dtype).eps), _limit(gap.dtype, count, scale)
    larger = (max(least, (scale * eps ** (1 / n)) ** 2) for n in range(2, _MOST))
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


def _off(gap: Array, count: int, scale: float) -> Array:
    return gap > _limit(gap.dtype, count, scale)


def _limit(dtype: Any, count: int, scale: float) -> float:
    """The gap of exact weights at most."""
    # The eps of the wide type: a rounded weight is not exact.
    return (_EXACT * float(jnp.finfo(dtype).eps) * scale) ** 2 * _ROWS * count


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
