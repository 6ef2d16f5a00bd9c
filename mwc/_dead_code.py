"""Dead code: unused outputs shrink the masks, and saved values that nobody reads go.

Arguments are kept: derivatives of every order are functions of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mwc._site import call_p, choose, forward_p, narrowed
from mwc._spec import Mask
from passes import _jax


def forward_dce(used: Sequence[bool], eqn: Any) -> tuple[list[bool], Any]:
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


def linear_dce(used: Sequence[bool], eqn: Any) -> tuple[list[bool], Any]:
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


def backward_dce(used: Sequence[bool], eqn: Any) -> tuple[list[bool], Any]:
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
