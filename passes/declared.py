"""Declared: what the user knows of a map or a weight, as identities in the program.

A traced program shows shapes, not values. `mwc_declared` is an identity that says more:

- around a map, `side` "in" and "out": affine and coisometric, J J^T = scale I, or a
  map with a `rule` that inverts its derivative. It is linear, so the derivative has it
  too, with the sides in reverse order, and with it what the rule reads: its further
  operands are residuals like others;
- on a weight: it is orthonormal over two of its axes, or unit triangular with a bounded
  condition. Its derivative is the plain identity.

Source: DESIGN section 4, "what is known about a weight". Limits: a declaration is a
claim; whoever builds on it checks its results.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from passes import _jax
from passes.graph import Graph, Var, is_var

Lanes = tuple[tuple[int | None, ...], ...]


def _moved(params: dict[str, Any], dims: Sequence[int | None]) -> dict[str, Any]:
    axis = dims[0]
    assert axis is not None
    if params["side"]:
        return {"lanes": (*params["lanes"], tuple(dims))}
    return {"axes": tuple(a + (a >= axis) for a in params["axes"])}


declared_p = _jax.identity_primitive(
    "mwc_declared", linear=lambda params: params["side"] != "", moved=_moved
)


@dataclasses.dataclass(frozen=True, eq=False)
class Vijp:
    """How to invert the derivative of a map.

    Attributes:
      fun: h_out from (residuals, a list of arrays; h_in).
      verdict: "structural" or "generic".
      name: of the map, for messages.
    """

    fun: Callable[[list[Any], Any], Any]
    verdict: str
    name: str

    def over(self, inside: Lanes, outside: Lanes) -> Callable[[list[Any], Any], Any]:
        """`fun` under the levels of `vmap` that the two ends of the map have seen."""
        found = self.fun
        for (x, *_), (y, *rest) in zip(inside, outside, strict=True):
            found = jax.vmap(found, in_axes=(list(rest), x), out_axes=y)
        return found


@dataclasses.dataclass(frozen=True)
class Fact:
    """What is known of a weight.

    Attributes:
      what: "orthonormal" or "unit_triangular".
      axes: its rows and columns; other axes count matrices.
      scale: Q^T Q = scale I.
      amplification: growth of errors in a solve.
      lower: whether a triangle is below the diagonal.
    """

    what: str
    axes: tuple[int, int]
    scale: float = 1.0
    amplification: float = 1.0
    lower: bool = False


def declare(
    x: Any,
    *,
    what: str = "coisometric",
    side: str = "",
    axes: tuple[int, int] | tuple[()] = (),
    scale: float = 1.0,
    amplification: float = 1.0,
    lower: bool = False,
    rule: Vijp | None = None,
    residuals: Sequence[Any] = (),
) -> Any:
    """The value itself, with what is known of it; see the module docstring."""
    params = {"what": what, "side": side, "axes": axes, "scale": scale}
    more = {"amplification": amplification, "lower": lower, "rule": rule, "lanes": ()}
    return declared_p.bind(x, *residuals, **params, **more)


def facts(graph: Graph, given: dict[Var, Fact] | None = None) -> dict[Var, Fact]:
    """What is known of the values of a program.

    Args:
      graph: the program.
      given: what is known of its inputs.

    Returns:
      Facts by variable, the given ones included.
    """
    known = dict(given or {})
    for eqn in graph.eqns:
        name, params = eqn.primitive.name, eqn.params
        if eqn.primitive is declared_p and not params["side"]:
            keys = ("what", "axes", "scale", "amplification", "lower")
            known[eqn.outvars[0]] = Fact(*(params[k] for k in keys))
            continue
        source = eqn.invars[0] if eqn.invars else None
        if source is None or not is_var(source) or source not in known:
            continue
        fact = known[source]
        if name in {"convert_element_type", "copy", "copy_p", *_jax.PLACING}:
            if fact.what != "orthonormal" or _as_fine(eqn.outvars[0], source):
                known[eqn.outvars[0]] = fact
        elif name == "transpose":
            order = list(params["permutation"])
            axes = tuple(order.index(a) for a in fact.axes)
            known[eqn.outvars[0]] = dataclasses.replace(fact, axes=axes)
        elif name == "squeeze" and not set(params["dimensions"]) & {*fact.axes}:
            drop = params["dimensions"]
            axes = tuple(a - sum(d < a for d in drop) for a in fact.axes)
            known[eqn.outvars[0]] = dataclasses.replace(fact, axes=axes)
        elif name in ("slice", "dynamic_slice") and _whole(eqn, fact):
            known[eqn.outvars[0]] = fact
    return known


def _as_fine(made: Var, source: Var) -> bool:
    """Whether a value has no digits that its source has not, and is no integer."""
    dtype = made.aval.dtype
    if not jnp.issubdtype(dtype, jnp.inexact):
        return False
    return bool(jnp.finfo(dtype).eps >= jnp.finfo(source.aval.dtype).eps)


def _whole(eqn: Any, fact: Fact) -> bool:
    """Whether a slice leaves the matrices as they are."""
    before, after = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    return all(before[a] == after[a] for a in fact.axes)


def weight_fact(
    fwd: Graph, atom: Any, given: dict[Var, Fact], contract: int, batch: tuple[int, ...]
) -> Fact | None:
    """What is known of a weight whose axis `contract` is contracted with h_out.

    Returns:
      The fact, if multiplying by the weight can be undone by it, else None.
    """
    fact = facts(fwd, given).get(atom) if is_var(atom) else None
    if fact is None or contract not in fact.axes:
        return None
    (other,) = (a for a in fact.axes if a != contract)
    shape = atom.aval.shape
    if {*range(len(shape))} - {*fact.axes} != {*batch}:
        return None
    if fact.what == "unit_triangular" and shape[contract] != shape[other]:
        return None
    # Orthonormal columns if the matrix is tall: the contracted side is the short one.
    return fact if shape[contract] <= shape[other] else None
