"""Gradients together with what the guards read.

A cotangent has no place for readings, so `value_and_grad(..., with_drift=True)` does
not go through `jax.grad`: it runs the program's two sweeps itself, on the flat
arguments of the call. Source: DESIGN sections 5 and 9. Limits: first derivatives only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mwc import _trace
from mwc._shared import Entry, Shared
from mwc._spec import Spec
from mwc._trace import is_differentiable, without_static
from mwc.errors import MoonwalkDriftError


class Drift(NamedTuple):
    """What the guards of a plan read; a pytree.

    Attributes:
      tripped: bool, whether a limit was passed; the gradients are then NaN.
      worst: float32, the worst reading as a fraction of its limit; if any tripped,
        that of the first, after which a run is not measured.
      stage: int32, its stage in `plan.stages`, -1 where no stage has a guard.
    """

    tripped: Any
    worst: Any
    stage: Any


def no_drift() -> Drift:
    """The drift of a plan that rebuilds nothing."""
    return Drift(jnp.array(False), jnp.float32(0), jnp.int32(-1))


def drift_of(readings: jax.Array, rows: Sequence[int]) -> Drift:
    """The drift of some readings, fractions of the limit, and their stages."""
    if not len(rows):
        return no_drift()
    sick = ~jnp.isfinite(readings)
    worst = jnp.where(sick, jnp.inf, readings)
    trips = ~(readings <= 1)
    at = jnp.where(jnp.any(trips), jnp.argmax(trips), jnp.argmax(worst))
    stage = jnp.asarray(rows, jnp.int32)[at]
    return Drift(jnp.any(trips), worst[at], stage)


def swept(
    shared: Shared,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    bound: int,
    check: Callable[[Any], Any],
) -> tuple[Any, Any, Drift] | None:
    """Results, gradients and drift of a call; None where the function has no plan.

    Args:
      shared: the decorated function.
      args: its positional arguments, bound ones first.
      kwargs: its keyword arguments.
      bound: the number of bound arguments.
      check: raises where results of some types have no gradient.

    Returns:
      The results as the function gives them, gradients as `Gradients` does, the drift.
    """
    full, named, leaves = shared.prepared(args, kwargs)
    indices = _trace.positions(shared.argnums, args, shared.signature, bound)
    roles = shared.roles(full, named, {*indices})
    moving = [
        role == "parameter" and is_differentiable(x)
        for role, x in zip(roles, leaves, strict=True)
    ]

    def sweep(entry: Entry, flat: Sequence[Any]) -> list[Any]:
        spec = entry.spec
        types = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in spec.out_avals]
        check(jax.tree.unflatten(entry.out_tree, types))
        captured = (False,) * (len(flat) - len(moving))
        outs, grads, readings = spec.swept((*captured, *moving), flat)
        return [*outs, *grads, *drift_of(readings, spec.program.guarded)]

    def more(spec: Spec) -> list[Any]:
        own = spec.in_avals[len(spec.in_avals) - len(moving) :]
        return [*(a for a, m in zip(own, moving, strict=True) if m), None, None, None]

    entry, flat = shared.used(full, named, leaves, bound, sweep, more)
    if entry.site is None:
        return None
    found = iter(flat)
    out = [next(found) for _ in entry.spec.out_avals]
    out = jax.tree.unflatten(entry.out_tree, out)
    rows = iter([next(found) if m else None for m in moving])
    counts = {n % len(args) for n in shared.signature.static_nums if n < len(args)}
    trees = []
    for index, arg in enumerate(full):
        if index in counts:
            trees.append(None)
            continue
        given, tree = jax.tree.flatten(arg)
        trees.append(jax.tree.unflatten(tree, [next(rows) for _ in given]))
    chosen = [without_static(trees[i]) for i in indices]
    result = chosen[0] if isinstance(shared.argnums, int) else tuple(chosen)
    return out, result, Drift(*found)


def raise_if_tripped(drift: Drift, spec: Any) -> None:
    """Waits for the device, and raises where a guard tripped.

    Raises:
      MoonwalkDriftError: names the stage and its reading.
    """
    if not bool(drift.tripped):
        return
    row = spec.program.plan.stages[int(drift.stage)]
    where = f"at stage {int(drift.stage)}, {row.name}"
    if not np.isfinite(drift.worst):
        raise MoonwalkDriftError(
            f"a rebuilt cotangent of {spec.name} is not finite {where}",
            expected="numbers in the data, in the parameters and in the loss",
            remedy="look where they come from with jax.config.update('jax_debug_nans', "
            "True) on the undecorated function; a weight that is zero does it too",
            source=row.source,
        )
    raise MoonwalkDriftError(
        f"a rebuilt cotangent of {spec.name} was off by {float(drift.worst):.3g} times "
        f"the limit {where}",
        expected="weights that are what they were declared to be",
        remedy="bring them back with mwc.constraints.retract, build them with "
        "mwc.constraints.orthogonal, or leave 'moonwalk' out of strategies; a "
        "tolerance of your own below 6e-3 needs float32 products on a GPU",
        source=row.source,
    )
