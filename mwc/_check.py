"""Comparing gradients with backpropagation, on the user's own data."""

from __future__ import annotations

import collections
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from mwc._explicit import mesh_of, on_auto_axes
from mwc._trace import Signature, is_array
from mwc.errors import (
    MoonwalkTypeError,
    MoonwalkUnsupportedError,
    MoonwalkValueError,
)

# Rounding of a gradient that another fusion computes, by dtype: sums of many terms
# differ by more than one unit in the last place.
_LIMITS = {"float64": 1e-9, "float32": 1e-3, "bfloat16": 1e-1, "float16": 3e-2}


@dataclass(frozen=True)
class CheckReport:
    """How far the gradients are from those of backpropagation.

    Attributes:
      ok: whether every leaf agrees to rounding.
      max_error: largest difference in a leaf over the largest entry of the leaf,
        the worst over leaves.
      worst_leaf: the path of that leaf.
      headroom: the guard's limit over its worst reading, None without a guard.
      worst_stage: the stage of that reading, None without a guard.
    """

    ok: bool
    max_error: float
    worst_leaf: str
    headroom: float | None = None
    worst_stage: str | None = None

    def __str__(self) -> str:
        word = "agree with" if self.ok else "DIFFER from"
        lines = [f"gradients {word} backpropagation"]
        lines.append(f"  largest error {self.max_error:.2e}, in {self.worst_leaf}")
        if self.headroom is not None:
            lines.append(f"  headroom {self.headroom:.2g}, at {self.worst_stage}")
        return "\n".join(lines)


def check(
    loss: Any,
    reference: Callable[[], Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> CheckReport:
    """Runs the decorated function and the reference, and compares gradients.

    Args:
      loss: the decorated function.
      reference: gives backpropagation's value and gradients.
      args: concrete arguments.
      kwargs: the same.

    Returns:
      The report.
    """
    if any(isinstance(x, Tracer) for x in jax.tree.leaves((args, kwargs))):
        raise MoonwalkTypeError(
            "check was called under a JAX transformation",
            expected="concrete arrays",
            remedy="call it outside jit, grad and vmap",
        )
    value, grads = loss.value_and_grad(*args, **kwargs)
    true_value, true_grads = reference()
    mine = jax.tree_util.tree_leaves_with_path({"value": value, "gradient": grads})
    true = jax.tree.leaves({"value": true_value, "gradient": true_grads})
    worst, where, ok = 0.0, "none", True
    for (path, leaf), right in zip(mine, true, strict=True):
        error, fine = _compare(leaf, right)
        ok = ok and fine
        if error >= worst:
            worst, where = error, jax.tree_util.keystr(path)
    return CheckReport(ok, worst, where, *_guard(loss, args, kwargs))


def _guard(
    loss: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[float | None, str | None]:
    """The headroom of the guard and its stage, if the plan rebuilds anything."""
    try:
        rows = loss.plan(*args, **kwargs).stages
    except MoonwalkUnsupportedError:  # it is differentiated as if undecorated
        return None, None
    if all(row.strategy != "moonwalk" for row in rows):
        return None, None
    drift = loss.value_and_grad(*args, with_drift=True, **kwargs)[-1]
    headroom = float(1 / drift.worst) if drift.worst > 0 else float("inf")
    at = int(drift.stage)
    return headroom, f"stage {at}, {rows[at].source}"


def first_part(data: Any, axis: int, signature: Signature) -> Any:
    """The first eighth of a batch, at least two entries of it.

    Args:
      data: a tree of arguments; a leaf is cut if it is an array that has the axis, with
        the size that most leaves have there.
      axis: the axis of the batch.
      signature: whose arguments they are, for the error.

    Returns:
      The tree with its leaves cut.

    Raises:
      MoonwalkValueError: no leaf has the axis.
    """
    sizes = collections.Counter(
        leaf.shape[axis] for leaf in jax.tree.leaves(data) if _has_axis(leaf, axis)
    )
    if not sizes:
        raise MoonwalkValueError(
            f"batch_axis={axis} is an axis that no data argument of {signature.name} "
            "has",
            expected="an axis of an array outside argnums",
            remedy="leave batch_axis out to compare on all of the data",
            source=signature.source,
        )
    ((size, _),) = sizes.most_common(1)
    part = min(size, max(2, size // 8))

    def cut(leaf: Any) -> Any:
        if not _has_axis(leaf, axis) or leaf.shape[axis] != size:
            return leaf
        at = [slice(None)] * leaf.ndim
        at[axis] = slice(part)
        mesh = mesh_of([jax.typeof(leaf)])
        if mesh is None:
            return leaf[tuple(at)]
        # A part of what is split has no place on an explicit mesh: it is everywhere.
        return on_auto_axes(mesh, lambda x: [x[0][tuple(at)]], [leaf], [None])[0]

    return jax.tree.map(cut, data)


def _has_axis(leaf: Any, axis: int) -> bool:
    return -np.ndim(leaf) <= axis < np.ndim(leaf) if is_array(leaf) else False


def _compare(leaf: Any, right: Any) -> tuple[float, bool]:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf, right = jax.random.key_data(leaf), jax.random.key_data(right)
    name = str(leaf.dtype)
    wide = np.complex128 if name.startswith("complex") else np.float64
    one, two = np.asarray(leaf).astype(wide), np.asarray(right).astype(wide)
    # NaN and infinities must be where backpropagation has them.
    finite = np.isfinite(two)
    if not np.array_equal(one[~finite], two[~finite], equal_nan=True):
        return float("inf"), False
    gap = np.max(np.abs(one[finite] - two[finite]), initial=0.0)
    size = np.max(np.abs(two[finite]), initial=0.0)
    error = float(gap / size) if size > 0 else float(gap)
    return error, error <= _LIMITS.get(name, 1e-9)
