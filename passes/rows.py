"""Rows: how many leading axes pass through a linear map row by row?

A guard that weighs rows by their size needs to know that row b of one cotangent is made
of row b of the other alone. Where tokens or the members of an ensemble pass by
themselves as well, each of them is a row. Limits: a table of operations; what is not in
it does not keep rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from passes.graph import is_var
from passes.links import Link

Eqn = Any

_ROWWISE = frozenset(
    {"neg", "mul", "div", "add", "sub", "add_any", "select_n", "copy", "copy_p"}
    | {"convert_element_type", "mwc_declared", "reduce_precision"}
)


def kept_axes(links: Sequence[Link]) -> int:
    """How many leading axes pass through links, one after the other, row by row."""
    source, target = links[0].source, links[-1].target
    rank = source.aval.ndim
    # Of each value on the way, the place of each axis of the source; None once lost.
    places: dict[Any, list[int | None]] = {source: [*range(rank)]}
    for eqn in (eqn for link in links for eqn in link.eqns):
        seen = []
        for n, v in enumerate(eqn.invars):
            if is_var(v) and v in places:
                moved = _moved(eqn, n)
                seen.append([None if a is None else moved[a] for a in places[v]])
        if seen:
            agreed = [
                one[0] if len({*one}) == 1 else None for one in zip(*seen, strict=True)
            ]
            places.update((v, agreed) for v in eqn.outvars)
    found = places[target]
    return next((a for a, at in enumerate(found) if at != a), rank)


def _moved(eqn: Eqn, operand: int) -> list[int | None]:
    """Where the result has each axis of an operand; None where entries mix."""
    name, params = eqn.primitive.name, eqn.params
    shape, out = eqn.invars[operand].aval.shape, eqn.outvars[0].aval.shape
    axes = range(len(shape))
    lost: list[int | None] = [None] * len(shape)
    if name in _ROWWISE and shape == out:
        return [*axes]
    if name == "dot_general":
        return _placed(eqn, operand)
    if name == "transpose":
        return [params["permutation"].index(a) for a in axes]
    if name == "broadcast_in_dim":
        at = params["broadcast_dimensions"]
        return [at[a] if out[at[a]] == shape[a] else None for a in axes]
    if name in ("squeeze", "reduce_sum"):
        gone = {a % len(shape) for a in params.get("dimensions", params.get("axes"))}
        return [None if a in gone else a - sum(g < a for g in gone) for a in axes]
    if name == "expand_dims":
        new = {a % len(out) for a in params["dimensions"]}
        return [a for a in range(len(out)) if a not in new]
    if name in ("pad", "rev", "concatenate", "split", "slice"):
        changed = {
            "pad": lambda: [a for a in axes if any(params["padding_config"][a])],
            "rev": lambda: params["dimensions"],
            "concatenate": lambda: [params["dimension"]],
            "split": lambda: [params["axis"]],
            "slice": lambda: [a for a in axes if shape[a] != out[a]],
        }[name]()
        return [None if a in changed else a for a in axes]
    if name == "reshape":
        same = (n for n, (a, b) in enumerate(zip(shape, out, strict=False)) if a != b)
        count = next(same, min(len(shape), len(out)))
        return [*range(count), *lost[count:]]
    return lost


def _placed(eqn: Eqn, operand: int) -> list[int | None]:
    """The same for a product."""
    contract, batch = eqn.params["dimension_numbers"]
    free = [
        [a for a in range(v.aval.ndim) if a not in (*contract[n], *batch[n])]
        for n, v in enumerate(eqn.invars)
    ]
    start = len(batch[0]) + (len(free[0]) if operand else 0)
    made = {a: n for n, a in enumerate(batch[operand])}
    made |= {a: start + n for n, a in enumerate(free[operand])}
    return [made.get(a) for a in range(eqn.invars[operand].aval.ndim)]
