"""The functions that the primitives stand for, and their evaluation.

A *lane* is the function at the shapes of one element of all levels of `vmap`; the
whole is the lane under the levels. Types, lowering and evaluation all come from one
trace of the whole, which the spec keeps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax

from mwc._levels import apply
from mwc._site import Site, choose, filled, is_float, merged
from passes import _jax


def call_lane(site: Site) -> Callable[..., list[Any]]:
    return partial(_jax.run_jaxpr, site.spec.jaxpr)


def forward_lane(site: Site) -> Callable[..., list[Any]]:
    keep = (True,) * len(site.spec.out_avals) + site.kept

    def fun(*args: Any) -> list[Any]:
        jaxpr = site.spec.forward(site.active, [jax.typeof(x) for x in args])
        return choose(keep, _jax.run_jaxpr(jaxpr, *args))

    return fun


def linear_lane(site: Site) -> Callable[..., list[Any]]:
    """The plain JVP, which needs no saved values."""
    count = len(site.spec.in_avals)

    def fun(*ins: Any) -> list[Any]:
        args, tangents = ins[:count], ins[site.start :]

        def moved(*some: Any) -> list[Any]:
            outs = _jax.run_jaxpr(site.spec.pure, *filled(site.moving, some, args))
            return choose(site.results, outs)

        return jax.jvp(moved, choose(site.moving, args), list(tangents))[1]

    return fun


def backward_lane(site: Site) -> Callable[..., list[Any]]:
    """The sweeps."""
    spec, count = site.spec, len(site.spec.in_avals)

    def fun(*ins: Any) -> list[Any]:
        args, cts = ins[:count], ins[site.start :]
        saved = filled(
            site.kept, ins[count : site.start], spec.saved_avals(site.active)
        )
        everything = [*args, *saved, *cts]
        avals = [x if _is_aval(x) else jax.typeof(x) for x in everything]
        jaxpr, live = spec.backward(site.active, site.moving, site.results, avals)
        return _jax.run_jaxpr(jaxpr, *choose(live, everything))

    return fun


def gradient_lane(site: Site) -> Callable[..., list[Any]]:
    """The mathematical gradient, which `backward` computes and is differentiated as."""
    count = len(site.spec.in_avals)

    def fun(*ins: Any) -> list[Any]:
        args, cts = ins[:count], ins[site.start :]

        def moved(*some: Any) -> list[Any]:
            outs = _jax.run_jaxpr(site.spec.pure, *filled(site.moving, some, args))
            return choose(site.results, outs)

        asked = choose(site.moving, args)
        outs = jax.vjp(moved, *asked)[1](list(cts))
        return [
            _jax.match_aval(g, jax.typeof(x)) for g, x in zip(outs, asked, strict=True)
        ]

    return fun


def through_vjp_lane(site: Site) -> Callable[..., list[Any]]:
    """The results as reverse mode computes them: a custom rule runs its forward."""
    floats = [is_float(aval) for aval in site.spec.out_avals]

    def fun(*args: Any) -> list[Any]:
        def both(*some: Any) -> tuple[list[Any], list[Any]]:
            outs = _jax.run_jaxpr(site.spec.pure, *filled(site.active, some, args))
            return choose(floats, outs), choose([not f for f in floats], outs)

        moving, _, still = jax.vjp(both, *choose(site.active, args), has_aux=True)
        return merged(floats, moving, still)

    return fun


def _is_aval(x: Any) -> bool:
    return isinstance(x, _jax.AbstractValue)


def evaluator(lane: Callable[[Site], Callable[..., list[Any]]]) -> Callable[..., Any]:
    """What a primitive is lowered as: one trace, shared with abstract evaluation."""

    def emit(*args: Any, site: Site, jaxpr: Any) -> list[Any]:
        del jaxpr
        avals = [jax.typeof(x) for x in args]
        return _jax.run_jaxpr(_whole(lane, site, avals), *args)

    return emit


def _whole(lane: Callable[[Site], Any], site: Site, avals: Sequence[Any]) -> Any:
    fun = apply(site.levels, lane(site))
    return site.spec.trace((lane, site), fun, avals)


def runner(lane: Callable[[Site], Callable[..., list[Any]]]) -> Callable[..., Any]:
    """Evaluation on arrays: compiled once for each site."""

    def run(*args: Any, site: Site, jaxpr: Any) -> list[Any]:
        del jaxpr
        key = (lane, site)
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


def typed(lane: Callable[[Site], Callable[..., list[Any]]]) -> Callable[..., Any]:
    """Output types and effects, from the trace."""

    def avals(*ins: Any, site: Site, jaxpr: Any) -> tuple[list[Any], Any]:
        del jaxpr
        whole = _whole(lane, site, ins)
        return list(whole.out_avals), whole.effects

    return avals


def linear_types(*ins: Any, site: Site, jaxpr: Any) -> tuple[list[Any], Any]:
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
        ("tangents", site),
        apply(site.levels, lane(site)),
        ins,
    )
    return [aval.to_tangent_aval() for aval in whole.out_avals], whole.effects
