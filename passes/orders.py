"""Orders: what a sort keeps of where its entries came from, in few bits.

JAX's derivative of a sort sorts the indices along its axis too, and keeps them: four
bytes an entry, as much as the entry itself. An index below n needs log2(n) bits. The
graph is rewritten so that the indices follow from planes of bools, one a bit; of pairs,
which a sort swaps or leaves, from one bool a pair. A minimum cut then keeps those,
packed. Limits: axes of at most 65,536 entries, in numbers.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import lax

from passes import _jax
from passes.graph import Graph, Var, is_var, read
from passes.inline import rewritten
from passes.sizes import is_symbolic

Array = Any
Eqn = Any

_MOST = 16  # bits of an index


def few_orders(graph: Graph) -> Graph:
    """Rewrites sorts that sort the indices along their axis as well.

    Args:
      graph: any program; nothing else of it changes.

    Returns:
      The graph itself where there is no such sort, else one with new variables.
    """
    found = {i: at for i, eqn in enumerate(graph.eqns) if (at := _orders(graph, eqn))}
    if not found:
        return graph

    def bind(i: int, eqn: Eqn, env: dict[Var, Any]) -> list[Any]:
        outs = _jax.bind(eqn, [read(env, v) for v in eqn.invars])
        for k in found.get(i, []):
            outs[k] = _narrowed(outs[k], eqn.params["dimension"])
        return outs

    return rewritten(graph, bind)


def _orders(graph: Graph, eqn: Eqn) -> list[int]:
    """Which results of an equation are indices along the axis that it sorts."""
    if eqn.primitive.name != "sort" or any(_jax.is_split(v.aval) for v in eqn.outvars):
        return []
    axis = eqn.params["dimension"]
    found = []
    for k, v in enumerate(eqn.invars):
        made = graph.producer.get(v) if is_var(v) else None
        if made is None or graph.eqns[made].primitive.name != "iota":
            continue
        along = graph.eqns[made].params["dimension"] == axis
        wide = v.aval.dtype.kind in "iu" and 8 * v.aval.dtype.itemsize > _MOST
        count = v.aval.shape[axis]
        if along and wide and not is_symbolic(count) and 1 < count <= 2**_MOST:
            found.append(k)
    return found


def _narrowed(order: Array, axis: int) -> Array:
    """The same indices, from as few bits as they need."""
    count = order.shape[axis]
    if count == 2:
        swapped = lax.index_in_dim(order, 0, axis) != 0
        first = swapped.astype(order.dtype)
        return jnp.concatenate([first, 1 - first], axis)
    found = jnp.zeros_like(order)
    for bit in range((count - 1).bit_length()):
        plane = (order & (1 << bit)) != 0
        found += plane.astype(order.dtype) << bit
    return found
