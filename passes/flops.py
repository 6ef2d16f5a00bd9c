"""Floating-point operations of a jaxpr, with the trip counts of its loops.

The compiler's own count ignores trip counts and is missing for an absent device, so
the operations are counted on the program as traced. One multiply-add is two
operations, as in XLA's cost analysis (`HloCostAnalysis`); a complex one is eight.

- *Matrix* operations are exact for `dot_general` and convolutions: a tap that falls
  in the padding or on a zero that dilation put in is not counted, so a convolution
  and its two gradients cost the same. Dense factorisations count their leading term.
- *Elementwise* operations are one for each element that arithmetic yields (for each
  element read, in reductions), whatever the function; moving data is free.

Limits: a `while_loop`'s trip count is unknown, so its body counts once; of a `cond`
the dearest branch counts. `Flops.exact` says whether either happened to a matrix
product. Symbolic dimensions count as a nominal one (`passes.graph.extents`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from passes.graph import extents, size
from passes.sizes import nominal

Expand = Callable[[Any], "list[tuple[Any, int]] | None"]


@dataclasses.dataclass(frozen=True, slots=True)
class Flops:
    """Operation counts of a program.

    Attributes:
      matrix: operations of matrix products, convolutions and factorisations.
      elementwise: operations of everything else.
      exact: False where `matrix` rests on an unknown trip count or branch.
    """

    matrix: int = 0
    elementwise: int = 0
    exact: bool = True

    @property
    def total(self) -> int:
        """All operations."""
        return self.matrix + self.elementwise

    def __add__(self, other: Flops) -> Flops:
        return Flops(
            self.matrix + other.matrix,
            self.elementwise + other.elementwise,
            self.exact and other.exact,
        )

    def times(self, trips: int) -> Flops:
        """The count of `trips` runs."""
        return Flops(self.matrix * trips, self.elementwise * trips, self.exact)


def flops(jaxpr: Any, expand: Expand | None = None) -> Flops:
    """Counts the operations of one run of a jaxpr.

    Args:
      jaxpr: a jaxpr, closed or not.
      expand: for primitives whose program is not a parameter: the (jaxpr, trips)
        pairs that an equation runs, or None to count it as any other.

    Returns:
      The counts.
    """
    return _Counter(expand).jaxpr(jaxpr)


def eqn_flops(eqn: Any, expand: Expand | None = None) -> Flops:
    """Counts the operations of one equation; see `flops`."""
    return _Counter(expand).eqn(eqn)


def is_product(eqn: Any) -> bool:
    """Whether an equation is a matrix product, a convolution or a factorisation."""
    return eqn.primitive.name in _MATRIX


class _Counter:
    """One count; a jaxpr that is called many times is counted once."""

    def __init__(self, expand: Expand | None):
        self._expand = expand
        self._seen: dict[int, tuple[Any, Flops]] = {}

    def jaxpr(self, jaxpr: Any) -> Flops:
        inner = _open(jaxpr)
        # The jaxpr itself is kept in the table: its id must not be used again.
        if id(inner) not in self._seen:
            total = sum((self.eqn(eqn) for eqn in inner.eqns), Flops())
            self._seen[id(inner)] = inner, total
        return self._seen[id(inner)][1]

    def eqn(self, eqn: Any) -> Flops:
        runs = self._expand(eqn) if self._expand else None
        if runs is not None:
            return sum((self.jaxpr(j).times(n) for j, n in runs), Flops())
        name, params = eqn.primitive.name, eqn.params
        if name in _MATRIX:
            return Flops(matrix=_MATRIX[name](eqn) * _complex_factor(eqn))
        if name in _FREE:
            return Flops()
        if name in _COMBINERS or name.startswith(("reduce_", "arg", "cum")):
            read = max((size(v) for v in eqn.invars), default=0)
            return Flops(elementwise=read)
        if name == "scan":
            return self.jaxpr(params["jaxpr"]).times(nominal(params["length"]))
        if name == "while":
            once = self.jaxpr(params["cond_jaxpr"]) + self.jaxpr(params["body_jaxpr"])
            return _inexact(once)
        if name == "cond":
            counts = [self.jaxpr(branch) for branch in params["branches"]]
            dearest = max(counts, key=lambda c: (c.matrix, c.elementwise))
            same = all(c.matrix == dearest.matrix for c in counts)
            return dearest if same else _inexact(dearest)
        if name == "custom_linear_solve":
            return self.jaxpr(params["jaxprs"].solve)
        if name == "shard_map":
            return self.jaxpr(params["jaxpr"]).times(_shards(params))
        inner = list(_sub_jaxprs(params.values()))
        if inner:
            total = sum((self.jaxpr(j) for j in inner), Flops())
            return _inexact(total) if name == "pallas_call" else total
        return Flops(elementwise=max((size(v) for v in eqn.outvars), default=0))


def _inexact(count: Flops) -> Flops:
    return dataclasses.replace(count, exact=count.exact and not count.matrix)


def _open(jaxpr: Any) -> Any:
    return jaxpr if hasattr(jaxpr, "eqns") and hasattr(jaxpr, "invars") else jaxpr.jaxpr


def _sub_jaxprs(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, list | tuple):
            yield from _sub_jaxprs(value)
        elif isinstance(value, str | int | float | type(None)):
            continue  # most parameters: many equations are counted
        elif hasattr(value, "eqns") or hasattr(getattr(value, "jaxpr", None), "eqns"):
            yield value


def _shards(params: dict[str, Any]) -> int:
    """Devices that run a `shard_map` body: its shapes are those of one shard."""
    sizes = dict(params["mesh"].shape)
    manual = params.get("manual_axes", sizes)
    return math.prod(size for axis, size in sizes.items() if axis in manual)


def _complex_factor(eqn: Any) -> int:
    return 4 if _dtype(eqn.outvars[0]).kind == "c" else 1


def _dtype(var: Any) -> Any:
    return np.dtype(getattr(var.aval, "dtype", np.float32))


def _dot_general(eqn: Any) -> int:
    (contract, _), _ = eqn.params["dimension_numbers"]
    shape = extents(eqn.invars[0])
    return 2 * size(eqn.outvars[0]) * math.prod(shape[axis] for axis in contract)


def _ragged_dot(eqn: Any) -> int:
    # Every row of the left operand meets one group's matrix: [m, k] x [g, k, n].
    rows, columns = extents(eqn.invars[0]), extents(eqn.outvars[0])
    return 2 * math.prod(rows) * columns[-1]


def _conv(eqn: Any) -> int:
    lhs, rhs, out = map(extents, (*eqn.invars[:2], eqn.outvars[0]))
    params, dims = eqn.params, eqn.params["dimension_numbers"]
    taps = 1
    for axis in range(len(params["window_strides"])):
        taps *= _valid_taps(
            size=lhs[dims.lhs_spec[2 + axis]],
            kernel=rhs[dims.rhs_spec[2 + axis]],
            out=out[dims.out_spec[2 + axis]],
            stride=params["window_strides"][axis],
            low=nominal(params["padding"][axis][0]),
            lhs_dilation=params["lhs_dilation"][axis],
            rhs_dilation=params["rhs_dilation"][axis],
        )
    # The kernel's own input features are those of one group.
    features = out[dims.out_spec[1]] * rhs[dims.rhs_spec[1]]
    return 2 * out[dims.out_spec[0]] * features * taps


def _valid_taps(
    size: int,
    kernel: int,
    out: int,
    stride: int,
    low: int,
    lhs_dilation: int,
    rhs_dilation: int,
) -> int:
    """(output, tap) pairs of one axis that read an element of the input."""
    starts = np.arange(out, dtype=np.int64) * stride - low
    at = starts[:, None] + np.arange(kernel, dtype=np.int64)[None] * rhs_dilation
    inside = (at >= 0) & (at < (size - 1) * lhs_dilation + 1)
    return int((inside & (at % lhs_dilation == 0)).sum())


def _triangular_solve(eqn: Any) -> int:
    shape = extents(eqn.invars[0])
    return size(eqn.outvars[0]) * (shape[-1] if shape else 0)


def _factorisation(cubic: float) -> Callable[[Any], int]:
    """Leading term of a factorisation of [..., m, n]: cubic x m n min(m, n)."""

    def count(eqn: Any) -> int:
        shape = extents(eqn.invars[0])
        return round(cubic * math.prod(shape) * min(shape[-2:]))

    return count


_MATRIX: dict[str, Callable[[Any], int]] = {
    "dot_general": _dot_general,
    "ragged_dot": _ragged_dot,
    "ragged_dot_general": _ragged_dot,
    "conv_general_dilated": _conv,
    "triangular_solve": _triangular_solve,
    "cholesky": _factorisation(1 / 3),
    "lu": _factorisation(2 / 3),
    "geqrf": _factorisation(4 / 3),
    "qr": _factorisation(8 / 3),
    "householder_product": _factorisation(4 / 3),
    "eigh": _factorisation(9.0),
    "svd": _factorisation(12.0),
}

# Primitives that move or rename data.
_FREE = frozenset(
    {
        *("bitcast_convert_type", "broadcast_in_dim", "concatenate"),
        *("convert_element_type", "copy", "copy_p", "create_token", "device_put"),
        *("dynamic_slice", "dynamic_update_slice", "empty", "expand_dims", "gather"),
        *("iota", "layout_constraint", "name", "optimization_barrier", "pad"),
        *("pbroadcast", "pvary", "random_unwrap", "random_wrap", "real_to_complex"),
        *("reshape", "rev", "scatter", "select_and_gather", "sharding_constraint"),
        *("slice", "split", "squeeze", "stop_gradient", "transpose"),
    }
)

# Primitives whose sub-jaxpr combines two scalars: one operation an element read.
_COMBINERS = frozenset(
    {
        *("reduce", "reduce_window", "select_and_scatter"),
        *("select_and_scatter_add", "sort", "top_k", "scatter_apply"),
        *("scatter_add", "scatter_mul", "scatter_min", "scatter_max", "scatter_sub"),
        *("scatter-add", "scatter-mul", "scatter-min", "scatter-max", "scatter-sub"),
    }
)
