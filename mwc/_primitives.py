"""The four primitives through which a decorated function meets JAX.

    call       arguments                         ->  results
    forward    arguments                         ->  results, saved values
    linear     arguments, saved, tangents        ->  tangents of results
    backward   arguments, saved, cotangents      ->  cotangents of arguments

The JVP of `call` is `forward`, then `linear`; `linear` and `backward` are each
other's transpose. `linear` is lowered as JAX's ordinary JVP of the function, and
`backward` as the sweeps of its `Program`: reverse mode reaches the sweeps because
it transposes `linear`. Saved values are functions of the arguments, which are
inputs as well: their tangents are already accounted for and are dropped. The
derivative of `backward` is that of the mathematical gradient, never of the sweeps,
which round. The scheme is that of `jax.custom_derivatives.linear_call`, made
complete (batching, dead code, higher derivatives, forward mode).

Limits: differentiating `linear` in the arguments (grad of jvp) is JAX's own
derivative, checkpointed as a whole. A scan stacks the arguments as residuals; XLA
removes the stack where the sweeps ignore them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from mwc._levels import FIRST, SHARED, Level, apply, places, transposed
from mwc._spec import Mask, Spec
from passes import _jax


@dataclass(frozen=True)
class Site:
    """What one use of a primitive knows, apart from its operands.

    Attributes:
      spec: the function, shared by all uses.
      active: the arguments that `forward` knew to carry tangents.
      kept: the saved values that are passed on.
      moving: arguments with a tangent (`linear`), or wanted (`backward`).
      results: results asked for (`linear`), or with a cotangent (`backward`).
      levels: the levels of `vmap` around it, innermost first.
    """

    spec: Spec
    active: Mask = ()
    kept: Mask = ()
    moving: Mask = ()
    results: Mask = ()
    levels: tuple[Level, ...] = ()

    @property
    def start(self) -> int:
        """Number of operands before tangents or cotangents."""
        return len(self.spec.in_avals) + sum(self.kept)

    def relevel(self, change: Callable[[Level], Level], **fields: Any) -> Site:
        """Another site whose levels are changed one by one."""
        return replace(self, levels=tuple(change(v) for v in self.levels), **fields)


def choose(mask: Sequence[bool], values: Sequence[Any]) -> list[Any]:
    """The values at the True places of a mask."""
    return [v for v, one in zip(values, mask, strict=True) if one]


def narrowed(mask: Mask, flags: Sequence[bool]) -> Mask:
    """A mask with only those of its True places left whose flag is set."""
    rest = iter(flags)
    return tuple(one and next(rest) for one in mask)


# --- The functions that the primitives stand for, at the shapes of one lane ---


def _call_lane(site: Site) -> Callable[..., list[Any]]:
    return partial(_jax.run_jaxpr, site.spec.jaxpr)


def _forward_lane(site: Site) -> Callable[..., list[Any]]:
    keep = (True,) * len(site.spec.out_avals) + site.kept

    def fun(*args: Any) -> list[Any]:
        jaxpr = site.spec.forward(site.active, [jax.typeof(x) for x in args])
        return choose(keep, _jax.run_jaxpr(jaxpr, *args))

    return fun


def _linear_lane(site: Site) -> Callable[..., list[Any]]:
    """The plain JVP, which needs no saved values."""
    count = len(site.spec.in_avals)

    def fun(*ins: Any) -> list[Any]:
        args, tangents = ins[:count], ins[site.start :]

        def moved(*some: Any) -> list[Any]:
            outs = _jax.run_jaxpr(site.spec.pure, *_filled(site.moving, some, args))
            return choose(site.results, outs)

        return jax.jvp(moved, choose(site.moving, args), list(tangents))[1]

    return fun


def _backward_lane(site: Site) -> Callable[..., list[Any]]:
    """The sweeps."""
    spec, count = site.spec, len(site.spec.in_avals)

    def fun(*ins: Any) -> list[Any]:
        args, cts = ins[:count], ins[site.start :]
        saved = _filled(
            site.kept, ins[count : site.start], spec.saved_avals(site.active)
        )
        everything = [*args, *saved, *cts]
        avals = [x if _is_aval(x) else jax.typeof(x) for x in everything]
        jaxpr, live = spec.backward(site.active, site.moving, site.results, avals)
        return _jax.run_jaxpr(jaxpr, *choose(live, everything))

    return fun


def _gradient_lane(site: Site) -> Callable[..., list[Any]]:
    """The mathematical gradient, which `backward` computes and is differentiated as."""
    count = len(site.spec.in_avals)

    def fun(*ins: Any) -> list[Any]:
        args, cts = ins[:count], ins[site.start :]

        def moved(*some: Any) -> list[Any]:
            outs = _jax.run_jaxpr(site.spec.pure, *_filled(site.moving, some, args))
            return choose(site.results, outs)

        asked = choose(site.moving, args)
        outs = jax.vjp(moved, *asked)[1](list(cts))
        return [
            _jax.match_aval(g, jax.typeof(x)) for g, x in zip(outs, asked, strict=True)
        ]

    return fun


def _through_vjp_lane(site: Site) -> Callable[..., list[Any]]:
    """The results as reverse mode computes them: a custom rule runs its forward."""
    floats = [_is_float(aval) for aval in site.spec.out_avals]

    def fun(*args: Any) -> list[Any]:
        def both(*some: Any) -> tuple[list[Any], list[Any]]:
            outs = _jax.run_jaxpr(site.spec.pure, *_filled(site.active, some, args))
            return choose(floats, outs), choose([not f for f in floats], outs)

        moving, _, still = jax.vjp(both, *choose(site.active, args), has_aux=True)
        return merged(floats, moving, still)

    return fun


def _filled(
    mask: Sequence[bool], some: Sequence[Any], base: Sequence[Any]
) -> list[Any]:
    rest = iter(some)
    return [next(rest) if one else old for one, old in zip(mask, base, strict=True)]


def merged(mask: Sequence[bool], yes: Sequence[Any], no: Sequence[Any]) -> list[Any]:
    """Undoes a split of values by a mask."""
    first, second = iter(yes), iter(no)
    return [next(first) if one else next(second) for one in mask]


def _is_aval(x: Any) -> bool:
    return isinstance(x, _jax.AbstractValue)


def _is_float(aval: Any) -> bool:
    return jnp.issubdtype(aval.dtype, jnp.inexact)


def _evaluator(lane: Callable[[Site], Callable[..., list[Any]]]) -> Callable[..., Any]:
    """What a primitive is lowered as: one trace, shared with abstract evaluation."""

    def emit(*args: Any, site: Site, jaxpr: Any) -> list[Any]:
        del jaxpr
        avals = [jax.typeof(x) for x in args]
        return _jax.run_jaxpr(_whole(lane, site, avals), *args)

    return emit


def _whole(lane: Callable[[Site], Any], site: Site, avals: Sequence[Any]) -> Any:
    fun = apply(site.levels, lane(site))
    return site.spec.trace((lane, replace(site, spec=None)), fun, avals)  # pyright: ignore


def _runner(lane: Callable[[Site], Callable[..., list[Any]]]) -> Callable[..., Any]:
    """Evaluation on arrays: compiled once for each site."""

    def run(*args: Any, site: Site, jaxpr: Any) -> list[Any]:
        del jaxpr
        key = (lane, replace(site, spec=None))  # pyright: ignore
        if key not in site.spec.compiled:
            fun = apply(site.levels, lane(site))
            site.spec.compiled[key] = jax.jit(_named(fun, site.spec.name))
        return site.spec.compiled[key](*args)

    return run


def _named(fun: Callable[..., Any], name: str) -> Callable[..., Any]:
    def evaluate(*args: Any) -> Any:
        return fun(*args)

    evaluate.__name__ = evaluate.__qualname__ = name
    return evaluate


def _typed(lane: Callable[[Site], Callable[..., list[Any]]]) -> Callable[..., Any]:
    """Output types and effects, from the trace."""

    def avals(*ins: Any, site: Site, jaxpr: Any) -> tuple[list[Any], Any]:
        del jaxpr
        whole = _whole(lane, site, ins)
        return list(whole.out_avals), whole.effects

    return avals


def _linear_types(*ins: Any, site: Site, jaxpr: Any) -> tuple[list[Any], Any]:
    """A tangent has its result's type.

    Tracing the JVP would say the same, but a rule for reverse mode alone inside the
    function refuses forward mode, which `linear` may never be evaluated in.
    """
    del jaxpr

    def lane(at: Site) -> Callable[..., list[Any]]:
        count = len(at.spec.in_avals)
        return lambda *ins: choose(
            at.results, _jax.run_jaxpr(at.spec.pure, *ins[:count])
        )

    whole = site.spec.trace(
        ("tangents", replace(site, spec=None)),  # pyright: ignore
        apply(site.levels, lane(site)),
        ins,
    )
    return [aval.to_tangent_aval() for aval in whole.out_avals], whole.effects


# --- Differentiation ---


def _is_moving(tangent: Any) -> bool:
    if type(tangent) is _jax.Zero:
        return False
    return jax.typeof(tangent).dtype != jax.dtypes.float0


def _moving_results(spec: Spec, moving: Mask) -> Mask:
    reached = spec.depends.reached(moving)
    floats = [_is_float(aval) for aval in spec.out_avals]
    return tuple(a and b for a, b in zip(reached, floats, strict=True))


def _with_zeros(outs: Sequence[Any], mask: Mask, tangents: Sequence[Any]) -> list[Any]:
    zeros = [_jax.as_zero(x) for x in outs]
    return _filled(mask, tangents, zeros)


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


def _call_jvp(
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


def _forward_jvp(
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
    if site.spec.has_custom_vjp:
        # Reverse mode ran the forward of the custom rule, whose code is what is
        # differentiated now; forward mode would refuse the rule.
        found = _plain_jvp(_through_vjp_lane, _call_site(site), primals, tangents)
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
        return fun(*_filled(moving, some, primals))

    return jax.jvp(moved, choose(moving, primals), choose(moving, tangents))[1]


def _linear_jvp(
    primals: Sequence[Any], tangents: Sequence[Any], *, site: Site, jaxpr: Any
) -> tuple[list[Any], list[Any]]:
    outs = linear_p.bind(*primals, site=site, jaxpr=jaxpr)
    return outs, _two_slot_jvp(
        linear_p, _linear_lane, site, jaxpr, primals, tangents, outs
    )


def _backward_jvp(
    primals: Sequence[Any], tangents: Sequence[Any], *, site: Site, jaxpr: Any
) -> tuple[list[Any], list[Any]]:
    outs = backward_p.bind(*primals, site=site, jaxpr=jaxpr)
    return outs, _two_slot_jvp(
        backward_p, _gradient_lane, site, jaxpr, primals, tangents, outs
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


def _transpose_of(linear: bool) -> Callable[..., list[Any]]:
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
        return [*none, *_filled(open_, outs, [None] * len(open_))]

    return transpose


def _transposed_gradient(
    site: Site, ins: Sequence[Any], cts: Sequence[Any], open_: Sequence[bool]
) -> list[Any]:
    """The transpose of a gradient that a custom rule defines: of that rule, not of J."""
    start = site.start
    some = _fewer_last(backward_p, site, open_)
    fun = apply(some.levels, _gradient_lane(some))
    shapes = [x.aval for x in choose(open_, ins[start:])]
    pull = jax.linear_transpose(lambda *last: fun(*ins[:start], *last), *shapes)
    full = [
        jnp.zeros(ct.aval.shape, ct.aval.dtype) if type(ct) is _jax.Zero else ct
        for ct in cts
    ]
    return list(pull(full))


# --- Batching ---


def _batch_of(
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


def _call_outputs(site: Site, axis: Any, dims: Sequence[int | None]) -> list[Any]:
    name, _ = _jax.spell_axis(axis)
    mapped = [dim is not None for dim in dims]
    if name is not None and name in _jax.named_axes(site.spec.jaxpr):
        # A sum over the axis is the same in every lane: only batching can tell.
        lane = [0 if one else None for one in mapped]
        flags = _jax.batched_outputs(site.spec.jaxpr, axis, lane)
    else:
        flags = site.spec.depends.mapped(mapped, name)
    return [0 if one else SHARED for one in flags]


def _forward_outputs(site: Site, axis: Any, dims: Sequence[int | None]) -> list[Any]:
    results = _call_outputs(site, axis, dims)
    name, _ = _jax.spell_axis(axis)
    depends = site.spec.saved_depends(site.active)
    flags = depends.mapped([dim is not None for dim in dims], name)
    saved = choose(site.kept, flags[len(results) :])
    return [*results, *(0 if one else SHARED for one in saved)]


def _linear_outputs(site: Site, axis: Any, dims: Sequence[int | None]) -> list[Any]:
    count = len(site.spec.in_avals)
    moved = _filled(site.moving, dims[site.start :], [None] * count)
    mapped = [a is not None or b is not None for a, b in zip(dims, moved, strict=False)]
    name, _ = _jax.spell_axis(axis)
    flags = site.spec.depends.mapped(mapped, name)
    return [0 if one else FIRST for one in choose(site.results, flags)]


def _backward_outputs(site: Site, axis: Any, dims: Sequence[int | None]) -> list[Any]:
    depends, count = site.spec.depends, len(site.spec.in_avals)
    name, _ = _jax.spell_axis(axis)
    by_args = depends.mapped([dim is not None for dim in dims[:count]], name)
    given = _filled(site.results, dims[site.start :], [None] * len(by_args))
    bits = 0
    for own, flag, has, dim in zip(
        depends.inputs, by_args, site.results, given, strict=True
    ):
        if has and (flag or dim is not None):
            bits |= own
    flags = [bool(bits >> i & 1) for i in range(count)]
    return [0 if one else FIRST for one in choose(site.moving, flags)]


# --- Dead code ---


def _forward_dce(used: Sequence[bool], eqn: Any) -> tuple[list[bool], Any]:
    site, count = eqn.params["site"], len(eqn.params["site"].spec.out_avals)
    every = [True] * len(eqn.invars)
    if not any(used) and not _jax.keeps_effects(eqn):
        return [False] * len(eqn.invars), None
    if all(used[count:]):
        return every, eqn
    keep = [*[True] * count, *used[count:]]
    small = site.relevel(
        lambda v: v.with_places(v.ins, choose(keep, v.outs)),
        kept=narrowed(site.kept, used[count:]),
    )
    primitive = forward_p if any(small.kept) else call_p
    params = dict(eqn.params, site=small)
    outvars = choose(keep, eqn.outvars)
    # Unused results stay: they cost nothing, and XLA drops them.
    return every, eqn.replace(primitive=primitive, params=params, outvars=outvars)


def _linear_dce(used: Sequence[bool], eqn: Any) -> tuple[list[bool], Any]:
    site, spec = eqn.params["site"], eqn.params["site"].spec
    if not any(used):
        return [False] * len(eqn.invars), None
    results = narrowed(site.results, used)
    bits = 0
    for own, asked in zip(spec.depends.inputs, results, strict=True):
        bits |= own if asked else 0
    flags = [bool(bits >> i & 1) for i in range(len(spec.in_avals))]
    moving = tuple(a and b for a, b in zip(site.moving, flags, strict=True))
    live = choose(site.moving, flags)
    return _shrunk(eqn, used, moving, results, live)


def _backward_dce(used: Sequence[bool], eqn: Any) -> tuple[list[bool], Any]:
    site, spec = eqn.params["site"], eqn.params["site"].spec
    if not any(used):
        return [False] * len(eqn.invars), None
    moving = narrowed(site.moving, used)
    flags = spec.depends.reached(moving)
    results = tuple(a and b for a, b in zip(site.results, flags, strict=True))
    live = choose(site.results, flags)
    return _shrunk(eqn, used, moving, results, live)


def _shrunk(
    eqn: Any, used: Sequence[bool], moving: Mask, results: Mask, live: Sequence[bool]
) -> tuple[list[bool], Any]:
    """Drops outputs, the last operands they need not, and saved values not read."""
    site, count = eqn.params["site"], len(eqn.params["site"].spec.in_avals)
    if all(used) and all(live):
        return [True] * len(eqn.invars), eqn
    kept = [True] * sum(site.kept)
    if not _jax.named_axes(eqn):
        # Where mapped axes are named the sweeps may be untraceable here.
        with eqn.ctx.manager:
            kept = choose(site.kept, site.spec.needed(site.active, moving, results))
    keep = [*[True] * count, *kept, *live]
    small = site.relevel(
        lambda v: v.with_places(choose(keep, v.ins), choose(used, v.outs)),
        kept=narrowed(site.kept, kept),
        moving=moving,
        results=results,
    )
    params = dict(eqn.params, site=small)
    invars, outvars = choose(keep, eqn.invars), choose(used, eqn.outvars)
    return keep, eqn.replace(params=params, invars=invars, outvars=outvars)


# --- The primitives ---

call_p = _jax.define_primitive(
    "moonwalk_call",
    run=_runner(_call_lane),
    avals=_typed(_call_lane),
    emit=_evaluator(_call_lane),
    jvp=_call_jvp,
    batch=_batch_of(_call_outputs),
)

forward_p = _jax.define_primitive(
    "moonwalk_forward",
    run=_runner(_forward_lane),
    avals=_typed(_forward_lane),
    emit=_evaluator(_forward_lane),
    jvp=_forward_jvp,
    batch=_batch_of(_forward_outputs),
    dce=_forward_dce,
)

linear_p = _jax.define_primitive(
    "moonwalk_linear",
    run=_runner(_linear_lane),
    avals=_linear_types,
    emit=_evaluator(_linear_lane),
    jvp=_linear_jvp,
    batch=_batch_of(_linear_outputs),
    dce=_linear_dce,
    transpose=_transpose_of(linear=True),
)

backward_p = _jax.define_primitive(
    "moonwalk_backward",
    run=_runner(_backward_lane),
    avals=_typed(_backward_lane),
    emit=_evaluator(_backward_lane),
    jvp=_backward_jvp,
    batch=_batch_of(_backward_outputs),
    dce=_backward_dce,
    transpose=_transpose_of(linear=False),
)
