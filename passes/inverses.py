"""Inverses: how a link of a backward is undone, and what is known of doing it.

Ways to invert a link P, a linear map h_out -> h_in with the pushforward J as transpose:

- TRANSPOSE: P^T P = c I (*coisometric*): h_out = J(h_in) / c;
- DIVIDE: P is diagonal: h_out = h_in / P(1);
- TRIANGULAR: P multiplies by a unit triangular matrix: a triangular solve;
- CUSTOM: the user's own rule.

That a link is one of these is `told` by a table (reshapes, padding, sums) and by the
user (`passes.declared`), or `tried` by running it on random values (`passes.probe`).
Source: DESIGN section 2.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Hashable, Iterable
from typing import Any

import jax.numpy as jnp
import numpy as np

from passes import _jax
from passes.declared import Fact, weight_fact
from passes.flops import eqn_flops
from passes.graph import Var, is_var, size
from passes.linearise import Linear
from passes.links import Link, side_of
from passes.probe import probe, rounded

Eqn = Any


class Verdict(enum.Enum):
    """For which parameters a stage's Jacobian is surjective."""

    STRUCTURAL = "structural"  # for all
    GENERIC = "generic"  # for almost all
    NEVER = "never"


class Rule(enum.Enum):
    """How a link is inverted."""

    TRANSPOSE = "transpose"
    DIVIDE = "divide"
    TRIANGULAR = "triangular"
    CUSTOM = "custom"


@dataclasses.dataclass(frozen=True, eq=False)
class Inverse:
    """What is known of a link.

    Attributes:
      link: the link.
      verdict: for which parameters it can be inverted.
      rule: how, or None where it cannot or no way is known.
      scale: c of a coisometric link.
      amplification: growth of errors, None where unknown.
      reason: why, for the plan.
      fact: what is known of the weight, where the rule needs it.
      ties: whether operands that tie make it lose what the inverse cannot give back.
    """

    link: Link
    verdict: Verdict
    rule: Rule | None
    scale: float
    amplification: float | None
    reason: str
    fact: Fact | None = None
    ties: bool = False

    @property
    def claimed(self) -> bool:
        """Whether the rule rests on what the user says of a map."""
        return self.rule is not None and self.verdict is Verdict.GENERIC

    @property
    def way(self) -> Hashable:
        """All but where it is: equal for links that are inverted alike."""
        way = self.verdict, self.rule, self.scale, self.amplification, self.reason
        return *way, self.fact, self.ties


# Linear maps that only move numbers: P^T P = I.
MOVES = frozenset(
    {"transpose", "reshape", "rev", "squeeze", "expand_dims", "copy", "copy_p", "neg"}
    | {"pad", "convert_element_type", "reduce_precision", "mwc_declared"}
)


def told(linear: Linear, link: Link, given: dict[Var, Fact]) -> Inverse | None:
    """What is known of a link without running it, None if it must be run.

    Args:
      linear: the derivative of its stage.
      link: a link of `linear.bwd`.
      given: what is known of inputs of `linear.fwd` that are weights.
    """

    def found(
        verdict: Verdict,
        reason: str,
        rule: Rule | None = None,
        scale: float = 1.0,
        amplification: float | None = None,
        fact: Fact | None = None,
    ) -> Inverse:
        return Inverse(link, verdict, rule, scale, amplification, reason, fact)

    wide, narrow = _numbers(link.target), _numbers(link.source)
    name = _name(link)
    head = link.eqns[0]
    if narrow > wide:
        return found(Verdict.NEVER, f"{name} widens: {wide} numbers to {narrow}")
    if side_of(head) == "out" and side_of(link.eqns[-1]) == "in":
        rule, lanes = head.params["rule"], link.eqns[-1].params["lanes"]
        # Mapped over its weights alone, it is no longer the map that was declared.
        if len(lanes) == len(head.params["lanes"]):
            if rule is None:
                scale = _settled(link, head.params["scale"])
                why = "declared coisometric"
                return found(Verdict.GENERIC, why, Rule.TRANSPOSE, scale, 1.0)
            why = f"{rule.name} has a rule of its own"
            return found(Verdict(rule.verdict), why, Rule.CUSTOM, 1.0, 1.0)
    if len(link.eqns) == 1:
        scale = moved(head)
        if scale is not None:
            return found(Verdict.STRUCTURAL, name, Rule.TRANSPOSE, scale, 1.0)
    if len(link.eqns) == 1 and head.primitive.name == "dot_general":
        fact = _weight(linear, link, given)
        if fact is not None and fact.what == "orthonormal":
            why = "its weight is orthonormal"
            return found(Verdict.STRUCTURAL, why, Rule.TRANSPOSE, fact.scale, 1.0)
        if fact is not None and fact.what == "unit_triangular":
            why = "its weight is unit triangular and bounded"
            rule, grows = Rule.TRIANGULAR, fact.amplification
            return found(Verdict.STRUCTURAL, why, rule, 1.0, grows, fact)
    if _free_weight(linear, link):
        if len(link.eqns) == 1:
            why = f"{name} with a weight of unknown conditioning"
            return found(Verdict.GENERIC, why)
        return found(Verdict.NEVER, f"{name} adds up several paths with free weights")
    return None


def tried(linear: Linear, link: Link) -> Inverse:
    """What running a link on random values shows."""
    name = _name(link)
    seen = probe(linear, link.eqns, link.source, link.target)

    def found(
        verdict: Verdict,
        reason: str,
        rule: Rule | None = None,
        scale: float = 1.0,
        amplification: float | None = None,
    ) -> Inverse:
        return Inverse(link, verdict, rule, scale, amplification, reason)

    if seen is None:
        why = f"{name} was not run to see: too large, a collective, or not for the CPU"
        return found(Verdict.NEVER, why)
    if seen.scale is not None:
        why = f"{name} moves numbers" if seen.steady else f"{name} is coisometric"
        inverse = found(Verdict.STRUCTURAL, why, Rule.TRANSPOSE, seen.scale, 1.0)
        return dataclasses.replace(inverse, ties=seen.ties)
    if seen.diagonal and seen.zeros:
        return found(Verdict.NEVER, f"{name} is flat at some units")
    if seen.diagonal and seen.steady:
        why = f"{name} has slopes that are known"
        grows = seen.amplification
        return found(Verdict.STRUCTURAL, why, Rule.DIVIDE, amplification=grows)
    if seen.diagonal:
        return found(Verdict.GENERIC, f"{name} has unknown slopes", Rule.DIVIDE)
    return found(Verdict.NEVER, f"{name} has no rule to be inverted")


def _numbers(v: Var) -> int:
    """Real numbers of a value: a complex one is two."""
    return size(v) * (2 if np.issubdtype(v.aval.dtype, np.complexfloating) else 1)


def _name(link: Link) -> str:
    """The equation that stands for a link, as the plan names it."""
    eqn = max(link.eqns, key=lambda e: eqn_flops(e).matrix)
    if eqn_flops(eqn).matrix > 0 or len(link.eqns) == 1:
        return f"{eqn.primitive.name} ({_jax.source_line(eqn)})"
    return f"the activation ({_jax.source_line(eqn)})"


def moved(eqn: Eqn) -> float | None:
    """C of an equation that moves numbers, or None."""
    name, params = eqn.primitive.name, eqn.params
    if name == "pad":
        low = min((min(a, b, c) for a, b, c in params["padding_config"]), default=0)
        return 1.0 if low >= 0 else None
    if name == "broadcast_in_dim":
        return size(eqn.outvars[0]) / max(1, size(eqn.invars[0]))
    if name == "reduce_sum":
        return 1.0 if size(eqn.outvars[0]) == size(eqn.invars[0]) else None
    return 1.0 if name in MOVES else None


def factor(link: Link) -> float:
    """What numbers beside the only product of a link multiply by.

    As they are rounded; 0 where anything else is beside it, or part of a matrix.
    """
    found = 1.0
    products = 0
    for eqn in link.eqns:
        name, (first, *rest) = eqn.primitive.name, eqn.invars
        number = rest[0] if rest and not is_var(rest[0]) else first
        if eqn_flops(eqn).matrix > 0:
            products += 1
        elif name in ("mul", "div") and not is_var(number):
            if np.issubdtype(number.aval.dtype, np.complexfloating):
                return 0.0
            value = float(np.asarray(number.val, number.aval.dtype))
            if (name == "div" and number is first) or not value:
                return 0.0
            found *= value if name == "mul" else 1 / value
        elif name == "pad" or moved(eqn) != 1:
            return 0.0
    return found if products <= 1 else 0.0


def _settled(link: Link, scale: float) -> float:
    """The scale that a user declares, where numbers in the program say it better."""
    beside = factor(link)
    if beside in (0, 1):
        return scale
    eps = float(jnp.finfo(link.source.aval.dtype).eps)
    return beside**2 * rounded(scale / beside**2, eps)


def _operands(link: Link) -> Iterable[tuple[Eqn, Any]]:
    """What the equations of a link read besides the cotangent."""
    path = {link.source, *(v for e in link.eqns for v in e.outvars)}
    for eqn in link.eqns:
        for v in eqn.invars:
            if is_var(v) and v not in path:
                yield eqn, v


def _weight(linear: Linear, link: Link, given: dict[Var, Fact]) -> Fact | None:
    """What is known of the weight of a product, if it fits the side contracted."""
    (eqn,) = link.eqns
    ((_, weight),) = list(_operands(link)) or [(None, None)]
    if weight is None or weight not in linear.residual_inputs:
        return None
    residual = linear.residuals[linear.residual_inputs.index(weight)]
    left = eqn.invars[0] is weight
    contract = eqn.params["dimension_numbers"][0][0 if left else 1]
    batch = eqn.params["dimension_numbers"][1][0 if left else 1]
    if len(contract) != 1:
        return None
    return weight_fact(linear.fwd, residual, given, contract[0], tuple(batch))


def _free_weight(linear: Linear, link: Link) -> bool:
    """Whether a product of the link reads an input of the stage that may change."""
    inputs = {*linear.fwd.invars} - {*linear.consts}
    residual = dict(zip(linear.residual_inputs, linear.residuals, strict=True))
    plain = {"transpose", "reshape", "convert_element_type", "squeeze", "rev", "copy"}
    for eqn, v in _operands(link):
        if eqn_flops(eqn).matrix == 0:
            continue
        atom = residual.get(v)
        while is_var(atom) and atom in linear.fwd.producer:
            made = linear.fwd.eqns[linear.fwd.producer[atom]]
            if made.primitive.name not in plain:
                break
            atom = made.invars[0]
        if atom is None or (is_var(atom) and atom in inputs):
            return True
    return False
