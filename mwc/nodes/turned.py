"""Turned products: what XLA for CPUs sums over rows, it sums faster over columns.

The gradient of a weight is x^T h, a sum over rows. XLA for CPUs multiplies by a matrix
that it has to read down its columns more slowly than by one that is transposed first:
by 10 to 25 % from 256 rows and columns on, by 45 % in float64 (jaxlib 0.12, two cores).
So there the operand is transposed, and what is alive is one operand more. Elsewhere
nothing changes.

Limits: products of two matrices; jaxlib before 0.11.2, whose CPU backend drops the
barrier between the two, gains nothing and is left alone.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import jax
from jax import lax

from mwc._tie import CPU_DROPS_BARRIERS
from passes import _jax
from passes.graph import Graph, extents, is_var

Array = Any
Eqn = Any

_SMALL = 256  # rows or columns that do not pay for it
_ROWS = ((0,), (0,)), ((), ())


def turned(graph: Graph) -> Graph:
    """The graph with such products by a transposed operand, where that is faster."""
    if CPU_DROPS_BARRIERS:
        return graph
    reads = Counter(v for eqn in graph.eqns for v in eqn.invars if is_var(v))
    reads.update(v for v in graph.outvars if is_var(v))
    swapped = {
        eqn.invars[0]
        for eqn in graph.eqns
        if eqn.primitive.name == "transpose"
        and eqn.params["permutation"] == (1, 0)
        and reads[eqn.invars[0]] == 1
    }
    eqns = [
        _turned(eqn, eqn.outvars[0] in swapped) if _sums_rows(eqn) else eqn
        for eqn in graph.eqns
    ]
    return dataclasses.replace(graph, eqns=tuple(eqns))


def _sums_rows(eqn: Eqn) -> bool:
    """Whether an equation is a sum over the rows of two matrices, not small ones."""
    if eqn.primitive.name != "dot_general" or eqn.params["dimension_numbers"] != _ROWS:
        return False
    shapes = [extents(v) for v in eqn.invars]
    plain = all(len(s) == 2 and min(s) >= _SMALL for s in shapes)
    return plain and not any(_jax.is_split(v.aval) for v in eqn.invars)


def _turned(eqn: Eqn, swapped: bool) -> Eqn:
    """The same product as one equation.

    Args:
      eqn: a^T b.
      swapped: whether its transpose, b^T a, is what is wanted: b is turned then.
    """
    params = {**eqn.params, "dimension_numbers": (((1,), (0,)), ((), ()))}

    @jax.jit
    def turned_product(a: Array, b: Array) -> Array:
        if swapped:
            a, b = b, a
        a = lax.platform_dependent(a, cpu=_transposed, default=lambda x: x.T)
        found = eqn.primitive.bind(a, b, **params)
        return found.T if swapped else found

    avals = [v.aval for v in eqn.invars]
    (call,) = jax.make_jaxpr(turned_product)(*avals).jaxpr.eqns
    return call.replace(invars=eqn.invars, outvars=eqn.outvars)


def _transposed(x: Array) -> Array:
    # Or what makes it runs once more for its transpose.
    x = lax.optimization_barrier(x)
    # Or XLA makes the product of the matrix as it was. Two axes alone it would turn
    # twice: in name, for a layout of its own choice, and then in memory.
    rows, columns = x.shape
    turned = x.reshape(rows, columns, 1).transpose(1, 2, 0).reshape(columns, rows)
    return lax.optimization_barrier(turned)
