"""Explicit mesh axes: what is split over them is planned and swept on Auto axes.

On an explicit mesh, which `jax.make_mesh` gives by default, types say how arrays are
split, and every operation must say how its result is. The sweeps do not: they stack,
pack and sum what the user's operations never see. So the call runs inside
`jax.sharding.auto_axes`: arguments enter with their places known to XLA alone, results
leave with the types that the function gives them on the explicit mesh, and cotangents
take the same way back. Limits: a function that asks for shardings itself (`reshard`,
`out_sharding=`) cannot run so, and is differentiated as a whole where it is split.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from passes import _jax

Array = Any


class NotOnAutoAxes(Exception):
    """The function cannot be traced there."""


def mesh_of(avals: Sequence[Any]) -> AbstractMesh | None:
    """The explicit mesh over which some of the types are split, if any."""
    return next((a.sharding.mesh for a in avals if _jax.is_split(a)), None)


def on_auto_axes(
    mesh: AbstractMesh,
    fun: Callable[[list[Array]], list[Array]],
    args: Sequence[Array],
    like: Sequence[Any],
) -> list[Array]:
    """`fun` of arrays, where the explicit axes of a mesh are Auto.

    Args:
      mesh: where the arrays are.
      fun: takes and returns arrays.
      args: its arguments.
      like: for each result a type that tells how it is split; None where it is not.

    Raises:
      NotOnAutoAxes: what `fun` raises to say so.
    """
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    axes = tuple(name for name, kind in kinds if kind == AxisType.Explicit)
    shardings = (getattr(a, "sharding", None) for a in like)
    places = [getattr(s, "spec", PartitionSpec()) for s in shardings]
    run: Any = jax.sharding.auto_axes(fun, axes=axes, out_sharding=places)
    with jax.sharding.use_abstract_mesh(mesh):
        return run(list(args))
