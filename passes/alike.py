"""Alike: what a deep program repeats is planned once.

`key_of` tells graphs apart by what they compute, whatever their variables are called.
`subchains` does so for the stretches of a chain. Limits: a parameter of an equation
that cannot be compared counts as equal to itself alone.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

from passes import _jax
from passes.graph import Graph, Var, is_var


def subchains(keys: Sequence[Hashable]) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """The classes of equal stretches of a chain.

    Args:
      keys: one for each link of the chain.

    Returns:
      [i, j] the class of the stretch [i, j), and the first stretch of each class;
      shorter ones come first.
    """
    count = len(keys)
    names: dict[Hashable, int] = {}
    ids = [names.setdefault(key, len(names)) for key in keys]
    alike = np.zeros((count + 1, count + 1), np.int64)
    found: dict[tuple[int, int], int] = {}
    first: list[tuple[int, int]] = []
    rests = [-1] * count  # the class of [i + 1, j)
    for length in range(1, count + 1):
        for i in range(count - length + 1):
            key = ids[i], rests[i]
            if key not in found:
                found[key] = len(found)
                first.append((i, i + length))
            rests[i] = alike[i, i + length] = found[key]
        del rests[0]
    return alike, first


def key_of(graph: Graph) -> Any:
    """A key that is equal for graphs that differ in the names of variables only.

    It holds identities of what the graph holds: keep the one as long as the other.
    """
    number: dict[Var, int] = {v: i for i, v in enumerate(graph.invars)}

    def atom(a: Any) -> Any:
        if is_var(a):
            return number[a]
        if not hasattr(a.aval.dtype, "itemsize"):
            return "literal", id(a.val), str(a.aval)  # a PRNG key
        # Bytes, not digits: printed arrays are rounded.
        value = np.asarray(a.val)
        return "literal", value.tobytes(), str(value.dtype), str(a.aval)

    rows = []
    for eqn in graph.eqns:
        reads = tuple(atom(a) for a in eqn.invars)
        for v in eqn.outvars:
            number[v] = len(number)
        params = eqn.params
        rule = _jax.rule_of(eqn) if eqn.primitive.name == "custom_jvp_call" else None
        if rule is not None:
            params = {"rule": rule, "body": params["call_jaxpr"]}
        params = tuple((k, _frozen(params[k])) for k in sorted(params))
        avals = tuple(_aval(v) for v in eqn.outvars)
        rows.append((eqn.primitive.name, params, reads, avals))
    ins = tuple(_aval(v) for v in graph.invars)
    return ins, tuple(rows), tuple(atom(v) for v in graph.outvars)


def _aval(v: Any) -> tuple[str, bool, str]:
    aval = v.aval
    weak = bool(getattr(aval, "weak_type", False))
    return aval.str_short(), weak, str(getattr(aval, "sharding", ""))


def _frozen(value: Any) -> Hashable:
    """A parameter for comparison: itself where equality means sameness."""
    if isinstance(value, str | int | float | bool | type(None)):
        return repr(value)
    if isinstance(value, list | tuple):
        return tuple(map(_frozen, value))
    if isinstance(value, np.generic | np.ndarray) and not value.dtype.hasobject:
        return str(value.dtype), value.shape, value.tobytes()
    if hasattr(value, "eqns"):
        inner, consts = _jax.opened(value)
        if not consts and not inner.constvars:
            return key_of(
                Graph(tuple(inner.invars), tuple(inner.outvars), tuple(inner.eqns))
            )
    elif (
        type(value).__hash__ is not object.__hash__
        and not callable(value)
        and not type(value).__module__.startswith("numpy")
        and not hasattr(value, "shape")
        and not hasattr(value, "mesh")
    ):
        return f"{type(value).__name__}:{value!r}"
    return f"@{id(value)}"
