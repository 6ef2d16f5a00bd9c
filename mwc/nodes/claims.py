"""Claims: weights that are said to be coisometric, and which are looked at together.

Where a link is inverted on a user's word, or its weight is rounded, the inverse is
right as far as the weight M keeps M^T M = c I. `mwc.nodes.polish` mends what is off;
here is which weights that concerns, their axes, and which of them are treated at once.
Source: DESIGN section 2. Limits: a map with one product by a matrix, as a convolution
of windows side by side is too; others rely on the claim alone.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from passes.flops import eqn_flops
from passes.graph import Eqn, Var, is_var, nbytes
from passes.inverses import Inverse, Rule, Verdict, factor
from passes.widen import is_narrow

Array = Any

_CHECKED = 8, 7, 6, 9, 10, 5  # weights that are checked at once, best first


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
    def sizes(self) -> tuple[int, int]:
        """N and k."""
        n, k = (math.prod(self.var.aval.shape[a] for a in x) for x in self.layout[1:])
        return n, k

    @property
    def square(self) -> bool:
        """Whether n is k."""
        return self.sizes[0] == self.sizes[1]

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
    The rows of signs go through all of them, so they are square, and in turn: those of
    a stage are apart.
    """
    runs: list[list[Group]] = []
    for group in groups:
        one, last = group[0][1], runs[-1] if runs else []
        joins = (
            last and len(group) == len(last[0]) == 1 and group[0][0] > last[-1][0][0]
        )
        if joins and one.given and one.square and one.alike(last[0][0][1]):
            last.append(group)
        else:
            runs.append([group])
    found: list[list[Group]] = []
    for run in runs:
        # As many each time, if they can be: fewer are a kernel more.
        size = next((n for n in _CHECKED if len(run) % n == 0), _CHECKED[0])
        found += [run[i : i + size] for i in range(0, len(run), size)]
    return found
