"""Widen: a backward in which nothing is narrower than float32.

In bfloat16 every cotangent is rounded to eight bits, and a rebuilt one would carry the
rounding of all stages before it. Parameters and states may stay narrow: the cotangents
alone are carried in float32, from residuals that are widened where they are read. A
weight that was orthogonal before it was rounded is then mended like any other that has
moved a little. Source: mixed-precision training keeps sums in float32 (Micikevicius et
al., 2018). Limits: straight-line code; equations with programs inside are not widened.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from passes import _jax
from passes.graph import Graph, evaluate, read
from passes.linearise import Linear, hoisted

# What they do depends on the type of their operands.
_TYPED = {"bitcast_convert_type", "ffi_call", "io_callback", "pure_callback"}
_DTYPES = ("new_dtype", "preferred_element_type", "dtype")


def widened(linear: Linear) -> Linear | None:
    """A derivative whose `bwd` takes, makes and gives float32 for narrower types.

    Args:
      linear: the derivative of a stage.

    Returns:
      The same `fwd` with a `bwd` whose inputs and results of less than 32 bits are
      float32; `linear` itself where there is nothing to widen, None where it cannot be.
    """
    bwd = linear.bwd
    atoms = [*bwd.invars, *(v for e in bwd.eqns for v in (*e.invars, *e.outvars))]
    if not any(is_narrow(v.aval) for v in atoms):
        return linear
    consts = {v: _wide(x) for v, x in linear.consts.items()}

    def backward(*args: Any) -> list[Any]:
        env = consts | dict(zip(bwd.invars, args, strict=True))
        for eqn in bwd.eqns:
            values = [_wide(read(env, v)) for v in eqn.invars]
            made = _jax.bind(_wide_eqn(eqn), values)
            for v, x in zip(eqn.outvars, made, strict=True):
                if x.shape != v.aval.shape or is_narrow(x):
                    raise TypeError(f"{eqn.primitive} gives {x.dtype}{x.shape}")
                env[v] = x
        return [_wide(read(env, v)) for v in bwd.outvars]

    avals = [
        v.aval.update(dtype=jnp.dtype(np.float32)) if is_narrow(v.aval) else v.aval
        for v in bwd.invars
    ]
    try:
        wide, more = hoisted(jax.make_jaxpr(backward)(*avals))
    except (NotImplementedError, TypeError, ValueError):
        return None
    both = linear.consts | more
    return dataclasses.replace(linear, bwd=wide, consts=both, waits={})


def is_narrow(x: Any) -> bool:
    """Whether an array or type is of floating numbers with less than 32 bits."""
    dtype = getattr(x, "dtype", None)
    real = dtype is not None and jnp.issubdtype(dtype, np.floating)
    return real and jnp.finfo(dtype).bits < 32


def _wide(x: Any) -> Any:
    return jnp.asarray(x, np.float32) if is_narrow(x) else x


def _wide_eqn(eqn: Any) -> Any:
    ends = (*eqn.invars, *eqn.outvars)
    if not any(is_narrow(v.aval) for v in ends):
        return eqn
    if eqn.primitive.name in _TYPED:
        raise TypeError(f"{eqn.primitive} of less than 32 bits")
    params = dict(eqn.params)
    for key in _DTYPES:
        dtype = params.get(key)
        if dtype is not None and is_narrow(jax.ShapeDtypeStruct((), dtype)):
            params[key] = jnp.dtype(np.float32)
    if params.get("update_jaxpr") is not None:  # of a scatter: how two numbers meet
        update = _wide_program(params["update_jaxpr"], params["update_consts"])
        params |= {"update_jaxpr": update, "update_consts": ()}
    elif _jax.sub_jaxprs(eqn):
        raise TypeError(f"{eqn.primitive} has a program inside")
    return eqn.replace(params=params)


def _wide_program(jaxpr: Any, consts: Sequence[Any]) -> Any:
    """A program of two narrow numbers, of two of float32."""
    body, more = _jax.opened(jaxpr)
    given = dict(zip(body.constvars, [*more, *consts], strict=True))
    graph = Graph(tuple(body.invars), tuple(body.outvars), tuple(body.eqns))

    def run(*numbers: Any) -> list[Any]:
        env = given | dict(zip(graph.invars, numbers, strict=True))
        return evaluate(graph, env, graph.outvars)

    number = jax.ShapeDtypeStruct((), np.float32)
    wide, consts = _jax.opened(jax.make_jaxpr(run)(number, number))
    if consts or any(v.aval.dtype != np.float32 for v in wide.outvars):
        raise TypeError("it does not give float32")
    return wide
