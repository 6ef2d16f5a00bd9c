"""Fixed: values that are the same at every call.

An array that the function captured is an input to the passes, as parameters are. But
which entries a permutation moves, or where a vector of signs is -1, does not change,
and decides whether a stage can be rebuilt. So its value is looked up, of those that
are small, and of what follows from them alone. A captured matrix is measured: fixed
orthonormal weights are as good as those that `passes.declared` knows of.

Limits: no values of tracers, of arrays on other hosts, and of what is stacked for a
loop. A value that the user changes in place later is not seen to change; the guard sees
what was rebuilt with it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from passes.apart import apart
from passes.declared import Fact
from passes.graph import Graph, Var, evaluate, size
from passes.probe import rounded, sharp
from passes.sizes import is_symbolic

_MOST = 2**20  # numbers of an array that is looked up
_MATRIX = 2**22  # numbers of one that is measured
_CLOSE = 2, 1e-12  # units in the last place, or so little: nothing polishes these


class Fixed:
    """Values of variables of a program, looked up when they are asked for.

    Args:
      graph: the program.
      captured: inputs that are the same array at every call, with that array.
    """

    def __init__(self, graph: Graph, captured: Mapping[Var, Any]):
        self._graph = graph
        self._given = {v: x for v, x in captured.items() if _is_small(v)}
        self._found: dict[Var, Any] = {}
        self._same: dict[Any, Any] = {}

    def __call__(self, wanted: Iterable[Var]) -> dict[Var, Any]:
        """Those of `wanted` that are fixed; equal arrays are one object."""
        found: dict[Var, Any] = {}
        for v in wanted:
            if v not in self._found:
                self._found[v] = self._looked_up(v)
            if self._found[v] is not None:
                found[v] = self._found[v]
        return found

    def _looked_up(self, var: Var) -> Any:
        graph, given = self._graph, self._given
        eqns = [graph.eqns[i] for i in graph.needed([var], given)]
        made = [v for eqn in eqns for v in eqn.outvars]
        known = graph.inputs_of([var], given) <= {*given}
        if not known or not all(map(_is_small, made)) or any(e.effects for e in eqns):
            return None
        env = {v: given[v] for v in graph.inputs_of([var], given)}
        try:
            key, value = apart(lambda: _read(evaluate(graph, env, [var])[0]))
        except (NotImplementedError, RuntimeError, ValueError, TypeError):
            return None  # on another host, deleted, or a kernel of another platform
        return self._same.setdefault(key, value)


def measured(captured: Mapping[Var, Any]) -> dict[Var, Fact]:
    """Matrices, or stacks of them, with orthonormal rows or columns up to a scale."""
    found: dict[Var, Fact] = {}
    for v, x in captured.items():
        shape, dtype = v.aval.shape, v.aval.dtype
        whole = len(shape) in (2, 3) and min(shape[-2:]) > 1 and shape[0]
        real = jnp.issubdtype(dtype, np.floating) and jnp.finfo(dtype).bits >= 32
        if not whole or not real or math.prod(shape) > _MATRIX:
            continue
        try:
            matrices = apart(lambda x=x: np.asarray(x, np.float64))
        except (RuntimeError, TypeError, ValueError):
            continue  # on another host, deleted, or no array yet
        rows, columns = len(shape) - 2, len(shape) - 1
        axes = (rows, columns) if shape[rows] >= shape[columns] else (columns, rows)
        scale = _scale(np.moveaxis(matrices, axes, (-2, -1)), dtype)
        if scale is not None:
            found[v] = Fact("orthonormal", axes, scale)
    return found


def _scale(tall: np.ndarray, dtype: Any) -> float | None:
    """C where Q^T Q = c I for all matrices of a stack, else None.

    Seen on one random vector (Freivalds): c = |Q x|^2 / |x|^2 if Q^T Q x = c x.
    """
    x = np.random.default_rng(0).standard_normal(tall.shape[-1])
    image = tall @ x
    again = np.squeeze(image[..., None, :] @ tall, -2)
    eps = float(jnp.finfo(dtype).eps)
    scale = float(np.mean(np.sum(image**2, -1)) / np.sum(x**2))
    if not math.isfinite(scale):
        return None
    scale = rounded(scale, sharp(eps))
    lost = np.linalg.norm(again - scale * x, axis=-1).max()
    close = max(_CLOSE[0] * eps, _CLOSE[1]) * scale * np.linalg.norm(x)
    return scale if lost < close else None


def _is_small(var: Var) -> bool:
    """Whether a value is worth looking up: indices, masks, signs, keys; no weights."""
    shape = getattr(var.aval, "shape", None)
    if shape is None or any(map(is_symbolic, shape)) or size(var) > _MOST:
        return False
    flat = size(var) == max(shape, default=1)
    return flat or not jnp.issubdtype(var.aval.dtype, np.inexact)


def _read(x: Any) -> tuple[Any, Any]:
    """What is equal for equal arrays, and the array."""
    key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    data = np.asarray(jax.random.key_data(x) if key else x)
    whole = hashlib.sha256(np.ascontiguousarray(data).tobytes()).digest()
    return (str(x.dtype), x.shape, whole), x if key else data
