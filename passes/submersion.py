"""Submersion: can the cotangent of a stage's result be rebuilt from its input's?

A stage's backward is a linear program from one cotangent to the other. It is cut where
a single value passes on (*links*), and each link is inverted by itself, the last one
first. Only the linear program is looked at, never the primal one: `stop_gradient` and
custom rules are what JAX made of them. Three ways to invert a link P, a linear map
h_out -> h_in whose transpose is the pushforward J:

- TRANSPOSE: P^T P = c I (*coisometric*): h_out = J(h_in) / c;
- DIVIDE: P is diagonal: h_out = h_in / P(1);
- TRIANGULAR: P multiplies by a unit triangular matrix: a triangular solve.

That a link is one of these is read off a table (reshapes, padding, sums), told by the
user (`passes.declared`), or found by running it once on random values
(`passes.probe`). A stage's verdict says for which parameters it is surjective; its
amplification how much rebuilding magnifies rounding, None where nothing is known.

Source: DESIGN sections 2, 4, 5. Limits: one state in, one result out; a sum of two
branches (x + F(x)) is one link, and none of the three.
"""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from passes import _jax
from passes.declared import Fact, declared_p, weight_fact
from passes.flops import eqn_flops
from passes.graph import Graph, Var, is_var, numbers, size
from passes.linearise import Linear
from passes.probe import Probed, probe

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


@dataclasses.dataclass(frozen=True, eq=False)
class Link:
    """A stretch of a backward between two values that all of it passes through.

    Attributes:
      eqns: its equations in the backward graph.
      source: the cotangent nearer to the results.
      target: the cotangent nearer to the inputs.
    """

    eqns: tuple[Eqn, ...]
    source: Var
    target: Var


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
    """

    link: Link
    verdict: Verdict
    rule: Rule | None
    scale: float
    amplification: float | None
    reason: str
    fact: Fact | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Submersion:
    """What is known of a stage.

    Attributes:
      state: the input whose cotangent is at hand, in the derivative's variables.
      verdict: the weakest of its links'.
      inverses: its links, from the result to the input.
      amplification: the product of its links'.
      rows: whether the leading axis of the state is the leading axis of the result,
        and no row depends on another.
      reason: of the weakest link.
    """

    state: Var
    verdict: Verdict
    inverses: tuple[Inverse, ...]
    amplification: float | None
    rows: bool
    reason: str

    @property
    def can_rebuild(self) -> bool:
        """Whether every link has a rule and a known amplification."""
        known = self.amplification is not None
        return known and all(i.rule is not None for i in self.inverses)


def submersion(
    linear: Linear, state: Var, given: dict[Var, Fact] | None = None
) -> Submersion:
    """Judges a stage.

    Args:
      linear: its derivative.
      state: the active input of `linear.fwd` that is the state.
      given: what is known of inputs of `linear.fwd` that are weights
        (`passes.declared`).

    Returns:
      The verdict with its links.
    """
    cts = linear.ct_inputs
    active = [v for v, a in zip(linear.fwd.invars, linear.active, strict=True) if a]
    target = linear.bwd.outvars[active.index(state)]
    if len(cts) != 1:
        return _never(state, f"it has {len(cts)} results with cotangents")
    links = _links(linear.bwd, cts[0], target)
    if links is None:
        return _never(state, "its result does not depend on the state before it")
    inverses = tuple(_judge(linear, link, given or {}) for link in links)
    weakest = min(inverses, key=_strength, default=None)
    verdict = weakest.verdict if weakest else Verdict.STRUCTURAL
    amplification: float | None = 1.0
    for found in inverses:
        if found.amplification is None or amplification is None:
            amplification = None
        else:
            amplification *= found.amplification
    rows = all(_keeps_rows(link) for link in links)
    reason = weakest.reason if weakest else "the identity"
    return Submersion(state, verdict, inverses, amplification, rows, reason)


def _never(state: Var, why: str) -> Submersion:
    return Submersion(state, Verdict.NEVER, (), None, False, why)


def _strength(found: Inverse) -> tuple[int, bool, bool]:
    order = (Verdict.NEVER, Verdict.GENERIC, Verdict.STRUCTURAL)
    known = found.amplification is not None
    return order.index(found.verdict), known, found.amplification == 1.0


# Links ------------------------------------------------------------------------


def _links(bwd: Graph, source: Var, target: Any) -> list[Link] | None:
    """Cuts the paths from one cotangent to another where one value is alive."""
    if target is source:
        return []
    path: set[Var] = {source}
    chosen = []
    for i in bwd.needed([target]):
        eqn = bwd.eqns[i]
        if any(is_var(v) and v in path for v in eqn.invars):
            path.update(eqn.outvars)
            chosen.append(eqn)
    if target not in path:
        return None
    last = {v: n for n, e in enumerate(chosen) for v in e.invars if is_var(v)}
    last[target] = len(chosen)
    links: list[Link] = []
    alive, start, eqns = {source}, source, []
    for n, eqn in enumerate(chosen):
        eqns.append(eqn)
        alive = {v for v in alive if last[v] > n}
        alive |= {v for v in eqn.outvars if last.get(v, -1) > n}
        if len(alive) == 1:
            (end,) = alive
            links.append(Link(tuple(eqns), start, end))
            start, eqns = end, []
    return _joined(links)


def _joined(links: list[Link]) -> list[Link]:
    """What the user declared as one map is one link."""
    found: list[Link] = []
    inside = 0
    for link in links:
        if inside:
            before = found.pop()
            link = Link((*before.eqns, *link.eqns), before.source, link.target)
        found.append(link)
        for eqn in link.eqns[-1:]:
            side = eqn.params["side"] if eqn.primitive is declared_p else ""
            inside += (side == "out") - (side == "in")
    return found


# Judging a link ---------------------------------------------------------------

# Linear maps that only move numbers: P^T P = I.
_MOVES = frozenset(
    {"transpose", "reshape", "rev", "squeeze", "expand_dims", "copy", "copy_p", "neg"}
    | {"pad", "convert_element_type", "reduce_precision", "mwc_declared"}
)


def _judge(linear: Linear, link: Link, given: dict[Var, Fact]) -> Inverse:
    def found(
        verdict: Verdict,
        reason: str,
        rule: Rule | None = None,
        scale: float = 1.0,
        amplification: float | None = None,
        fact: Fact | None = None,
    ) -> Inverse:
        return Inverse(link, verdict, rule, scale, amplification, reason, fact)

    wide, narrow = numbers(link.target), numbers(link.source)
    name = _name(link)
    head = link.eqns[0]
    if head.primitive is declared_p and head.params["side"] == "out":
        scale = head.params["scale"]
        why = "declared coisometric"
        return found(Verdict.GENERIC, why, Rule.TRANSPOSE, scale, 1.0)
    if narrow > wide:
        return found(Verdict.NEVER, f"{name} widens: {wide} numbers to {narrow}")
    if len(link.eqns) == 1:
        scale = _moved(head)
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
    seen = probe(linear, link.eqns, link.source, link.target)
    if seen is None:
        return found(
            Verdict.NEVER, f"{name} was not run to see: too large, or on a mesh"
        )
    return _by_probe(found, seen, name)


def _by_probe(found: Callable[..., Inverse], seen: Probed, name: str) -> Inverse:
    if seen.scale is not None:
        why = f"{name} moves numbers" if seen.steady else f"{name} is coisometric"
        return found(Verdict.STRUCTURAL, why, Rule.TRANSPOSE, seen.scale, 1.0)
    if seen.diagonal and seen.zeros:
        return found(Verdict.NEVER, f"{name} is flat at some units")
    if seen.diagonal and seen.steady:
        why = f"{name} has slopes that are known"
        grows = seen.amplification
        return found(Verdict.STRUCTURAL, why, Rule.DIVIDE, amplification=grows)
    if seen.diagonal:
        return found(Verdict.GENERIC, f"{name} has unknown slopes", Rule.DIVIDE)
    return found(Verdict.NEVER, f"{name} has no rule to be inverted")


def _name(link: Link) -> str:
    """The equation that stands for a link, as the plan names it."""
    eqn = max(link.eqns, key=lambda e: eqn_flops(e).matrix)
    if eqn_flops(eqn).matrix > 0 or len(link.eqns) == 1:
        return f"{eqn.primitive.name} ({_jax.source_line(eqn)})"
    return f"the activation ({_jax.source_line(eqn)})"


def _moved(eqn: Eqn) -> float | None:
    """C of an equation that moves numbers, or None."""
    name, params = eqn.primitive.name, eqn.params
    if name == "pad":
        low = min((min(a, b, c) for a, b, c in params["padding_config"]), default=0)
        return 1.0 if low >= 0 else None
    if name == "broadcast_in_dim":
        return size(eqn.outvars[0]) / max(1, size(eqn.invars[0]))
    if name == "reduce_sum":
        return 1.0 if size(eqn.outvars[0]) == size(eqn.invars[0]) else None
    return 1.0 if name in _MOVES else None


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
    """Whether a product of the link reads an input of the stage as it is."""
    inputs = set(linear.fwd.invars)
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
        if atom is None or atom in inputs:
            return True
    return False


# Rows -------------------------------------------------------------------------

_ROWWISE = frozenset(
    {"neg", "mul", "div", "add", "sub", "add_any", "select_n", "copy", "copy_p"}
    | {"convert_element_type", "mwc_declared", "reduce_precision"}
)


def _keeps_rows(link: Link) -> bool:
    """Whether the leading axis passes through a link row by row."""
    path = {link.source}
    for eqn in link.eqns:
        read = [n for n, v in enumerate(eqn.invars) if is_var(v) and v in path]
        if not all(_row_by_row(eqn, n) for n in read):
            return False
        path.update(eqn.outvars)
    return True


def _row_by_row(eqn: Eqn, operand: int) -> bool:
    name, params = eqn.primitive.name, eqn.params
    shape = eqn.invars[operand].aval.shape
    out = eqn.outvars[0].aval.shape
    if not shape or not out or out[0] != shape[0]:
        return False
    if name in _ROWWISE:
        return True
    if name == "dot_general":
        (contract, batch) = params["dimension_numbers"]
        if batch[operand]:
            return batch[operand][0] == 0
        return operand == 0 and 0 not in contract[0]
    if name == "transpose":
        return params["permutation"][0] == 0
    if name == "broadcast_in_dim":
        return params["broadcast_dimensions"][:1] == (0,)
    if name == "pad":
        return params["padding_config"][0] == (0, 0, 0)
    if name == "rev":
        return 0 not in params["dimensions"]
    if name == "concatenate":
        return params["dimension"] != 0
    if name == "split":
        return params["axis"] != 0
    if name in ("squeeze", "reduce_sum"):
        return 0 not in (params.get("dimensions") or params.get("axes") or ())
    return name in ("reshape", "slice", "expand_dims")


def run_error(amplifications: Sequence[float]) -> float:
    """Growth of rounding in a run of stages: the square root of its length times ΠA."""
    return math.sqrt(len(amplifications)) * math.prod(amplifications)
