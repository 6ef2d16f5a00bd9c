"""Rows: does the leading axis pass through a linear map row by row?

A guard that weighs rows by their size needs to know that row b of one cotangent is made
of row b of the other alone. Limits: a table of operations; what is not in it does not
keep rows.
"""

from __future__ import annotations

from typing import Any

from passes.graph import is_var
from passes.links import Link

Eqn = Any

_ROWWISE = frozenset(
    {"neg", "mul", "div", "add", "sub", "add_any", "select_n", "copy", "copy_p"}
    | {"convert_element_type", "mwc_declared", "reduce_precision"}
)


def keeps_rows(link: Link) -> bool:
    """Whether the leading axis passes through a link row by row."""
    path = {link.source}
    for eqn in link.eqns:
        read = [n for n, v in enumerate(eqn.invars) if is_var(v) and v in path]
        if not all(_row_by_row(eqn, n) for n in read):
            return False
        path.update(eqn.outvars)
    return True


def _row_by_row(eqn: Eqn, operand: int) -> bool:
    name, params = eqn.primitive.name, eqn.params
    shape = eqn.invars[operand].aval.shape
    out = eqn.outvars[0].aval.shape
    if not shape or not out or out[0] != shape[0]:
        return False
    if name in _ROWWISE:
        return True
    if name == "dot_general":
        (contract, batch) = params["dimension_numbers"]
        if batch[operand]:
            return batch[operand][0] == 0
        return operand == 0 and 0 not in contract[0]
    if name == "transpose":
        return params["permutation"][0] == 0
    if name == "broadcast_in_dim":
        return params["broadcast_dimensions"][:1] == (0,)
    if name == "pad":
        return params["padding_config"][0] == (0, 0, 0)
    if name == "rev":
        return 0 not in params["dimensions"]
    if name == "concatenate":
        return params["dimension"] != 0
    if name == "split":
        return params["axis"] != 0
    if name in ("squeeze", "reduce_sum"):
        return 0 not in (params.get("dimensions") or params.get("axes") or ())
    return name in ("reshape", "slice", "expand_dims")
