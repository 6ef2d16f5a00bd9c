"""Submersion: can the cotangent of a stage's result be rebuilt from its input's?

A stage's backward is a linear program; it is cut into links (`passes.links`), and each
link is inverted by itself, the last one first (`passes.inverses`). Only the linear
program is looked at, never the primal one: `stop_gradient` and custom rules are what
JAX made of them. A stage's verdict says for which parameters its Jacobian is
surjective; its amplification how much rebuilding magnifies rounding, None where nothing
is known.

Source: DESIGN sections 2, 4, 5. Limits: one state in, one result out; a sum of two
branches (x + F(x)) is one link, and has no rule.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from passes.declared import Fact
from passes.graph import Var
from passes.inverses import Inverse, Rule, Verdict, told, tried
from passes.linearise import Linear
from passes.links import Link, links_between
from passes.rows import kept_axes

__all__ = ["Inverse", "Link", "Rule", "Submersion", "Verdict", "submersion"]

_TOGETHER = 3  # links that are tried as one


@dataclasses.dataclass(frozen=True, eq=False)
class Submersion:
    """What is known of a stage.

    Attributes:
      state: the input whose cotangent is at hand, in the derivative's variables.
      verdict: the weakest of its links'.
      inverses: its links, from the result to the input.
      amplification: the product of its links'.
      rows: how many leading axes of the state are those of the result, no row of
        which depends on another.
      reason: of the weakest link.
    """

    state: Var
    verdict: Verdict
    inverses: tuple[Inverse, ...]
    amplification: float | None
    rows: int
    reason: str

    @property
    def can_rebuild(self) -> bool:
        """Whether every link has a rule and a known amplification."""
        known = self.amplification is not None
        return known and all(i.rule is not None for i in self.inverses)


def submersion(
    linear: Linear,
    state: Var,
    given: dict[Var, Fact] | None = None,
    fixed: dict[Var, Any] | None = None,
) -> Submersion:
    """Judges a stage.

    Args:
      linear: its derivative.
      state: the active input of `linear.fwd` that is the state.
      given: what is known of inputs of `linear.fwd` that are weights
        (`passes.declared`).
      fixed: values of inputs of `linear.fwd` that are always the same
        (`passes.fixed`).

    Returns:
      The verdict with its links.
    """
    linear = dataclasses.replace(linear, consts=linear.consts | (fixed or {}))
    cts = linear.ct_inputs
    active = [v for v, a in zip(linear.fwd.invars, linear.active, strict=True) if a]
    target = linear.bwd.outvars[active.index(state)]
    if len(cts) != 1:
        return _never(state, f"it has {len(cts)} results with cotangents")
    links = links_between(linear.bwd, cts[0], target)
    if links is None:
        return _never(state, "its result does not depend on the state before it")
    inverses = _judged(linear, links, given or {})
    weakest = min(inverses, key=_strength, default=None)
    verdict = weakest.verdict if weakest else Verdict.STRUCTURAL
    amplification: float | None = 1.0
    for found in inverses:
        if found.amplification is None or amplification is None:
            amplification = None
        else:
            amplification *= found.amplification
    rows = kept_axes(links) if links else cts[0].aval.ndim
    reason = weakest.reason if weakest else "the identity"
    return Submersion(state, verdict, inverses, amplification, rows, reason)


def _judged(
    linear: Linear, links: Sequence[Link], given: dict[Var, Fact]
) -> tuple[Inverse, ...]:
    """The links with their inverses; some have one only together."""
    known = [told(linear, link, given) for link in links]
    lost = [one for one in known if one is not None and one.rule is None]
    if lost:
        # Nothing is run for a stage that cannot be rebuilt anyway.
        return tuple(one for one in known if one is not None)
    found: list[Inverse] = []
    for link, one in zip(links, known, strict=True):
        found.append(_seen(linear, link, one) or tried(linear, link))
        for count in range(2, min(_TOGETHER, len(found)) + 1):
            if found[-1].rule is not None:
                break
            # A maximum over groups spreads its cotangent, then picks one of each.
            last = [one.link for one in found[-count:]]
            eqns = tuple(eqn for part in last for eqn in part.eqns)
            whole = tried(linear, Link(eqns, last[0].source, link.target))
            if whole.rule is not None:
                found[-count:] = [whole]
    return tuple(found)


def _seen(linear: Linear, link: Link, one: Inverse | None) -> Inverse | None:
    """What is known of a link; a claim about a map without weights is run to see."""
    if one is None or one.rule is not Rule.TRANSPOSE or not one.claimed:
        return one
    made = dict(zip(linear.residual_inputs, linear.residuals, strict=True))
    read = linear.bwd.inputs_of(link.reads)
    roots = linear.fwd.inputs_of(made[v] for v in read if v in made)
    if roots & ({*linear.fwd.invars} - {*linear.consts}):
        return one
    seen = tried(linear, link)
    return one if seen.rule is None else seen


def _never(state: Var, why: str) -> Submersion:
    return Submersion(state, Verdict.NEVER, (), None, 0, why)


def _strength(found: Inverse) -> tuple[int, bool, bool]:
    order = (Verdict.NEVER, Verdict.GENERIC, Verdict.STRUCTURAL)
    known = found.amplification is not None
    return order.index(found.verdict), known, found.amplification == 1.0


def run_error(amplifications: Sequence[float]) -> float:
    """Growth of rounding in a run of stages: the square root of its length times ΠA."""
    return math.sqrt(len(amplifications)) * math.prod(amplifications)
