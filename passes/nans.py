"""NaN throughout: the values that have no other entry where some inputs have none.

A gradient that must not be used is NaN. To select each costs a pass over it; a state
that is read anyway, once it is NaN, makes NaN of what is found here. Source: IEEE 754,
an operation on NaN gives NaN. Limits: only operations for which that holds of every
entry on every platform, `max` and `exp` not being among them; what is not in the table
is not found.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import jax.numpy as jnp

from passes.graph import Eqn, Graph, Var, extents, is_var

_ANY = frozenset({"abs", "add", "add_any", "div", "mul", "neg", "square", "sub"})
_MOVED = frozenset(
    {"broadcast_in_dim", "convert_element_type", "copy", "expand_dims", "mwc_declared"}
    | {"reshape", "rev", "slice", "squeeze", "transpose"}
)


def all_nan(
    graph: Graph, given: Collection[Var], known: Collection[Var] = ()
) -> set[Var]:
    """The variables all of whose entries are NaN if those of `given` are.

    Args:
      graph: the program.
      given: some of its variables.
      known: others, whose values come from elsewhere and are anything.
    """
    found = {v for v in given if _has_nan(v)}
    for eqn in graph.eqns:
        if _spreads(eqn, found):
            found.update(v for v in eqn.outvars if _has_nan(v) and v not in known)
    return found


def _has_nan(v: Var) -> bool:
    """Whether a value is of a type that has NaN: some of 8 bits and less have not."""
    dtype: Any = v.aval.dtype
    return jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits >= 16


def _spreads(eqn: Eqn, found: Collection[Var]) -> bool:
    """Whether the result of an equation is NaN throughout."""
    name, reads = eqn.primitive.name, [is_var(v) and v in found for v in eqn.invars]
    if name in _ANY:
        return any(reads)
    if name in _MOVED:
        return reads[0]
    if name == "select_n":
        return all(reads[1:])
    if name == "reduce_sum":
        shape = extents(eqn.invars[0])
        return reads[0] and math.prod(shape[a] for a in eqn.params["axes"]) > 0
    if name == "dot_general":
        (axes, _), _ = eqn.params["dimension_numbers"]
        shape = extents(eqn.invars[0])
        return any(reads) and math.prod(shape[a] for a in axes) > 0
    return False
