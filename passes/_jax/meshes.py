"""Types on meshes: what a value varies or is split over, and equations off their mesh.

Inside `shard_map` (manual axes) a type says over which axes its values may differ; on
explicit axes it says how an array is split. Both are in `aval`s, contexts and
parameters of equations, under names that JAX does not promise.
"""

from __future__ import annotations

from typing import Any

import jax
from jax._src.core import AbstractValue, JaxprEqnContext
from jax._src.lax.lax import _convert_element_type
from jax.extend import core
from jax.extend.core import primitives

Eqn = Any

# What places a value on a mesh and leaves its numbers as they are.
PLACING = frozenset({"pvary", "pcast", "reshard", "sharding_constraint", "mesh_cast"})


def off_mesh(eqn: Eqn) -> Eqn:
    """An equation that runs on one device, on numbers of its own.

    Raises:
      NotImplementedError: it has a body that may be placed on the mesh as well.
    """
    context = JaxprEqnContext()
    if eqn.primitive.name in PLACING:
        return eqn.replace(primitive=primitives.copy_p, params={}, ctx=context)
    types = {*eqn.ctx.cur_abstract_mesh.axis_types, *_axis_types(eqn)}
    if not types:
        return eqn
    if any(core.jaxprs_in_params(eqn.params)):
        if types == {jax.sharding.AxisType.Auto}:
            return eqn
        raise NotImplementedError(f"{eqn.primitive} on a mesh of {types}")
    unplaced = {k: None for k in ("sharding", "out_sharding") if k in eqn.params}
    return eqn.replace(params={**eqn.params, **unplaced}, ctx=context)


def _axis_types(eqn: Eqn) -> set[Any]:
    """The kinds of mesh axes that the values of an equation are placed on."""
    shardings = (getattr(v.aval, "sharding", None) for v in (*eqn.invars, *eqn.outvars))
    meshes = (getattr(sharding, "mesh", None) for sharding in shardings)
    return {kind for mesh in meshes for kind in getattr(mesh, "axis_types", ())}


def _varying(aval: Any) -> frozenset[Any]:
    return frozenset(getattr(getattr(aval, "mat", None), "varying", ()))


def varying(value: Any) -> frozenset[Any]:
    """The manual mesh axes over which an array, or one of a type, differs."""
    return _varying(value if isinstance(value, AbstractValue) else jax.typeof(value))


def zeros(shape: tuple[int, ...], dtype: Any, like: Any) -> Any:
    """Zeros that vary over the same mesh axes as the aval `like`, for loop carries."""
    # A scalar by itself is on no mesh: a loop over an explicit axis of `vmap` fails.
    found, axes = jax.numpy.zeros((1, *shape), dtype)[0], tuple(_varying(like))
    return jax.lax.pcast(found, axes, to="varying") if axes else found


def is_split(value: Any) -> bool:
    """Whether an array, or one of a type, lies in parts on an explicit mesh."""
    aval = value if isinstance(value, AbstractValue) else jax.typeof(value)
    spec = getattr(getattr(aval, "sharding", None), "spec", ())
    return any(axis is not None for axis in spec)


def match_aval(value: Any, aval: Any) -> Any:
    """Gives a cotangent the type that JAX expects for an argument of type `aval`.

    One that varies over more axes of a manual mesh than its argument is summed over
    them, as the transpose of an implicit broadcast.
    """
    has, wants = _varying(jax.typeof(value)), _varying(aval)
    if has - wants:
        value = jax.lax.psum(value, tuple(has - wants))
    if wants - has:
        value = jax.lax.pcast(value, tuple(wants - has), to="varying")
    now = jax.typeof(value)
    if now.dtype != aval.dtype or now.weak_type != aval.weak_type:
        value = _convert_element_type(value, aval.dtype, aval.weak_type)
    return value
