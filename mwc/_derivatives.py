"""Derivatives and transposes of the primitives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax

from mwc._lanes import gradient_lane, linear_lane, through_vjp_lane
from mwc._levels import FIRST, SHARED, Level, apply, transposed
from mwc._site import (
    Site,
    backward_p,
    call_p,
    choose,
    filled,
    forward_p,
    is_float,
    linear_p,
    narrowed,
)
from mwc._spec import Mask, Spec
from passes import _jax


def _is_moving(tangent: Any) -> bool:
    if type(tangent) is _jax.Zero:
        return False
    return jax.typeof(tangent).dtype != jax.dtypes.float0


def _moving_results(spec: Spec, moving: Mask) -> Mask:
    reached = spec.depends.reached(moving)
    floats = [is_float(aval) for aval in spec.out_avals]
    return tuple(a and b for a, b in zip(reached, floats, strict=True))


def _with_zeros(outs: Sequence[Any], mask: Mask, tangents: Sequence[Any]) -> list[Any]:
    zeros = [_jax.as_zero(x) for x in outs]
    return filled(mask, tangents, zeros)


def _forward_site(site: Site, active: Mask) -> Site:
    """The forward sweep under the levels of a call (or of another forward sweep)."""
    spec, results = site.spec, len(site.spec.out_avals)
    depends = spec.saved_depends(active)

    def change(level: Level) -> Level:
        mapped = depends.mapped([p != SHARED for p in level.ins], level.name)
        saved = [0 if one else SHARED for one in mapped[results:]]
        return level.with_places(level.ins, (*level.outs[:results], *saved))

    kept = (True,) * len(spec.saved_avals(active))
    return site.relevel(change, active=active, kept=kept)


def _linear_site(site: Site, moving: Mask, results: Mask) -> Site:
    """The derivative at the place of a forward sweep."""
    count = len(site.spec.out_avals)

    def change(level: Level) -> Level:
        tangents = choose(moving, level.ins)
        outs = choose(results, level.outs[:count])
        # The same tangent in every lane: one lane's, so that its transpose counts once.
        lone = [FIRST if p == SHARED else p for p in outs]
        return level.with_places((*level.ins, *level.outs[count:], *tangents), lone)

    return site.relevel(change, moving=moving, results=results)


def call_jvp(
    primals: Sequence[Any], tangents: Sequence[Any], *, site: Site, jaxpr: Any
) -> tuple[list[Any], list[Any]]:
    moving = tuple(_is_moving(t) for t in tangents)
    results = _moving_results(site.spec, moving)
    if not any(results):
        outs = call_p.bind(*primals, site=site, jaxpr=jaxpr)
        return outs, [_jax.as_zero(x) for x in outs]
    forward = _forward_site(site, moving)
    both = forward_p.bind(*primals, site=forward, jaxpr=jaxpr)
    count = len(site.spec.out_avals)
    outs, saved = both[:count], both[count:]
    found = linear_p.bind(
        *primals,
        *saved,
        *choose(moving, tangents),
        site=_linear_site(forward, moving, results),
        jaxpr=jaxpr,
    )
    return outs, _with_zeros(outs, results, found)


def forward_jvp(
    primals: Sequence[Any], tangents: Sequence[Any], *, site: Site, jaxpr: Any
) -> tuple[list[Any], list[Any]]:
    both = forward_p.bind(*primals, site=site, jaxpr=jaxpr)
    count = len(site.spec.out_avals)
    outs, saved = both[:count], both[count:]
    still = [_jax.as_zero(x) for x in saved]
    moving = tuple(_is_moving(t) for t in tangents)
    results = _moving_results(site.spec, moving)
    if not any(results):
        return both, [*(_jax.as_zero(x) for x in outs), *still]
    if site.spec.has_custom_rule:
        # Reverse mode ran what the custom rule computes besides its derivative, and
        # the code of that is what is differentiated now.
        found = _plain_jvp(through_vjp_lane, _call_site(site), primals, tangents)
        return both, [*_with_zeros(outs, results, choose(results, found)), *still]
    whole = _forward_site(site, moving)
    if whole != site:
        saved = forward_p.bind(*primals, site=whole, jaxpr=jaxpr)[count:]
    found = linear_p.bind(
        *primals,
        *saved,
        *choose(moving, tangents),
        site=_linear_site(whole, moving, results),
        jaxpr=jaxpr,
    )
    return both, [*_with_zeros(outs, results, found), *still]


def _call_site(site: Site) -> Site:
    """The results of a forward sweep without its saved values."""
    count = len(site.spec.out_avals)
    return site.relevel(lambda v: v.with_places(v.ins, v.outs[:count]))


def _plain_jvp(
    lane: Callable[[Site], Any],
    site: Site,
    primals: Sequence[Any],
    tangents: Sequence[Any],
) -> list[Any]:
    """Tangents by JAX's own rules, recomputing everything if transposed."""
    moving = [_is_moving(t) for t in tangents]
    fun = apply(site.levels, lane(site))

    @jax.checkpoint
    def moved(*some: Any) -> list[Any]:
        return fun(*filled(moving, some, primals))

    return jax.jvp(moved, choose(moving, primals), choose(moving, tangents))[1]


def linear_jvp(
    primals: Sequence[Any], tangents: Sequence[Any], *, site: Site, jaxpr: Any
) -> tuple[list[Any], list[Any]]:
    outs = linear_p.bind(*primals, site=site, jaxpr=jaxpr)
    return outs, _two_slot_jvp(
        linear_p, linear_lane, site, jaxpr, primals, tangents, outs
    )


def backward_jvp(
    primals: Sequence[Any], tangents: Sequence[Any], *, site: Site, jaxpr: Any
) -> tuple[list[Any], list[Any]]:
    outs = backward_p.bind(*primals, site=site, jaxpr=jaxpr)
    return outs, _two_slot_jvp(
        backward_p, gradient_lane, site, jaxpr, primals, tangents, outs
    )


def _two_slot_jvp(
    primitive: Any,
    lane: Callable[[Site], Any],
    site: Site,
    jaxpr: Any,
    primals: Sequence[Any],
    tangents: Sequence[Any],
    outs: Sequence[Any],
) -> list[Any]:
    """The JVP of a function linear in its last operands, and not in the arguments."""
    count, start = len(site.spec.in_avals), site.start
    tangents = [
        *tangents[:count],
        *(_jax.as_zero(x) for x in primals[count:start]),
        *tangents[start:],
    ]
    moving = [_is_moving(t) for t in tangents]
    if any(moving[:count]):
        return _plain_jvp(lane, site, primals, tangents)
    late = moving[start:]
    if not any(late):
        return [_jax.as_zero(x) for x in outs]
    some = _fewer_last(primitive, site, late)
    ins = [*primals[:start], *choose(late, tangents[start:])]
    return primitive.bind(*ins, site=some, jaxpr=jaxpr)


def _fewer_last(primitive: Any, site: Site, flags: Sequence[bool]) -> Site:
    """The same with only some of the tangents or cotangents."""
    start = site.start

    def change(level: Level) -> Level:
        last = choose(flags, level.ins[start:])
        return level.with_places((*level.ins[:start], *last), level.outs)

    name = "moving" if primitive is linear_p else "results"
    return site.relevel(change, **{name: narrowed(getattr(site, name), flags)})


def transpose_of(linear: bool) -> Callable[..., list[Any]]:
    def transpose(cts: Sequence[Any], *ins: Any, site: Site, jaxpr: Any) -> list[Any]:
        start = site.start
        open_ = [_jax.is_undefined(x) for x in ins[start:]]
        given = [type(ct) is not _jax.Zero for ct in cts]
        none = [None] * start
        if not any(given):
            last = [
                _jax.Zero(x.aval) if u else None
                for x, u in zip(ins[start:], open_, strict=True)
            ]
            return [*none, *last]

        def change(level: Level) -> Level:
            new = [transposed(p) for p in choose(given, level.outs)]
            outs = [transposed(p) for p in choose(open_, level.ins[start:])]
            return level.with_places((*level.ins[:start], *new), outs)

        if linear:
            masks = {
                "moving": narrowed(site.moving, open_),
                "results": narrowed(site.results, given),
            }
        else:
            masks = {
                "moving": narrowed(site.moving, given),
                "results": narrowed(site.results, open_),
            }
        other = site.relevel(change, **masks)
        new = [*ins[:start], *choose(given, cts)]
        if not linear and site.spec.has_custom_vjp:
            outs = _transposed_gradient(site, ins, cts, open_)
        else:
            outs = (backward_p if linear else linear_p).bind(
                *new, site=other, jaxpr=jaxpr
            )
        return [*none, *filled(open_, outs, [None] * len(open_))]

    return transpose


def _transposed_gradient(
    site: Site, ins: Sequence[Any], cts: Sequence[Any], open_: Sequence[bool]
) -> list[Any]:
    """The transpose of a gradient that a custom rule defines, instead of J."""
    start = site.start
    some = _fewer_last(backward_p, site, open_)
    fun = apply(some.levels, gradient_lane(some))
    shapes = [x.aval for x in choose(open_, ins[start:])]
    pull = jax.linear_transpose(lambda *last: fun(*ins[:start], *last), *shapes)
    return list(pull([_jax.instantiated(ct) for ct in cts]))
