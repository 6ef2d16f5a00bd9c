"""Batching: a rule pushes one level of `vmap` and binds the primitive again.

What a rule decides is which outputs are the same in every lane. It errs towards
"mapped", except for the results of a function that sums over a named axis, which are
found by batching its jaxpr.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from mwc._levels import FIRST, SHARED, Level, places
from mwc._site import Site, choose, filled
from passes import _jax


def batch_of(
    outputs: Callable[[Site, Any, Sequence[int | None]], list[Any]],
) -> Callable[..., Any]:
    def batch(
        primitive: Any,
        axis: Any,
        args: Sequence[Any],
        dims: Sequence[int | None],
        *,
        site: Site,
        jaxpr: Any,
    ) -> tuple[list[Any], list[int | None]]:
        name, spmd_name = _jax.spell_axis(axis)
        inside = name is not None and name in _jax.named_axes(jaxpr)
        if all(dim is None for dim in dims) and not inside:
            outs = primitive.bind(*args, site=site, jaxpr=jaxpr)
            return outs, [None] * len(outs)
        found = outputs(site, axis, dims)
        level = Level(axis.size, name, spmd_name, places(dims), tuple(found))
        mapped = replace(site, levels=(*site.levels, level))
        outs = primitive.bind(*args, site=mapped, jaxpr=jaxpr)
        return outs, [p if isinstance(p, int) else None for p in found]

    return batch


def call_outputs(site: Site, axis: Any, dims: Sequence[int | None]) -> list[Any]:
    name, _ = _jax.spell_axis(axis)
    mapped = [dim is not None for dim in dims]
    if name is not None and name in _jax.named_axes(site.spec.jaxpr):
        # A sum over the axis is the same in every lane: only batching can tell.
        lane = [0 if one else None for one in mapped]
        flags = _jax.batched_outputs(site.spec.jaxpr, axis, lane)
    else:
        flags = site.spec.depends.mapped(mapped, name)
    return [0 if one else SHARED for one in flags]


def forward_outputs(site: Site, axis: Any, dims: Sequence[int | None]) -> list[Any]:
    results = call_outputs(site, axis, dims)
    name, _ = _jax.spell_axis(axis)
    depends = site.spec.saved_depends(site.active)
    flags = depends.mapped([dim is not None for dim in dims], name)
    saved = choose(site.kept, flags[len(results) :])
    return [*results, *(0 if one else SHARED for one in saved)]


def linear_outputs(site: Site, axis: Any, dims: Sequence[int | None]) -> list[Any]:
    count = len(site.spec.in_avals)
    moved = filled(site.moving, dims[site.start :], [None] * count)
    mapped = [a is not None or b is not None for a, b in zip(dims, moved, strict=False)]
    name, _ = _jax.spell_axis(axis)
    flags = site.spec.depends.mapped(mapped, name)
    return [0 if one else FIRST for one in choose(site.results, flags)]


def backward_outputs(site: Site, axis: Any, dims: Sequence[int | None]) -> list[Any]:
    depends, count = site.spec.depends, len(site.spec.in_avals)
    name, _ = _jax.spell_axis(axis)
    by_args = depends.mapped([dim is not None for dim in dims[:count]], name)
    given = filled(site.results, dims[site.start :], [None] * len(by_args))
    bits = 0
    for own, flag, has, dim in zip(
        depends.inputs, by_args, site.results, given, strict=True
    ):
        if has and (flag or dim is not None):
            bits |= own
    flags = [bool(bits >> i & 1) for i in range(count)]
    return [0 if one else FIRST for one in choose(site.moving, flags)]
