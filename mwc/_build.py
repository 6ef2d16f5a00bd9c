"""From a piece of the chain to a stage: linearise it, choose what is kept.

Stages that look alike (the same equations on the same shapes) share one derivative:
a deep network is linearised once a kind of layer. What is kept:

- for a leaf, from its input: residuals of the *input* cotangent that lie behind a
  matrix product or a loop, where they are small (bits); otherwise nothing, and the
  leaf runs the stage again;
- for a stored stage: the narrowest residuals of all cotangents.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from mwc.loops import Loop
from mwc.stages import Stage, Straight
from passes import _jax
from passes.alike import key_of
from passes.chain import is_loop
from passes.declared import Fact
from passes.flops import eqn_flops
from passes.graph import Graph, Var, is_var, nbytes
from passes.inline import inline
from passes.linearise import Linear, linearise
from passes.order import parameters_first
from passes.repeats import Repeats
from passes.residuals import narrowest, packed_bytes
from passes.vijps import marked

_SMALL = 1 / 8  # of the bytes of the stage's state: what counts as bits
_FREE = 0.1  # of a loop body's matrix products: what a leaf may run again


@dataclasses.dataclass(frozen=True, eq=False)
class _Kind:
    """What equal stages share."""

    linear: Linear
    bits: tuple[Var, ...]
    kept: tuple[Var, ...]
    rerun: float
    why: str


class Builder:
    """Makes the stages of one program.

    Args:
      outside: the program's own inputs and the prologue's results, always at hand.
      tangents: the variables that may carry a tangent.
      program: what the stages are pieces of.
      data: the program's own inputs that are no parameters.
    """

    def __init__(
        self,
        outside: Collection[Var],
        tangents: Collection[Var],
        program: Graph,
        data: Collection[Var] = (),
    ):
        self._outside, self._tangents, self._data = outside, tangents, data
        self._repeats = Repeats(program)
        self._kinds: dict[Any, _Kind] = {}

    def stage(self, graph: Graph) -> Stage:
        """The stage of a piece: a loop, or straight-line code."""
        if len(graph.eqns) == 1 and is_loop(graph.eqns[0]):
            return self._loop(graph) or self.straight(graph)
        return self.straight(graph)

    def _loop(self, graph: Graph) -> Loop | None:
        """A scan as a loop.

        None where its body has arrays of its own, and where arrays are split on an
        explicit mesh, which wants to know the sharding of every stack.
        """
        eqn = graph.eqns[0]
        if _jax.opened(eqn.params["jaxpr"])[1]:
            return None
        if any(_jax.is_split(v.aval) for v in (*eqn.invars, *eqn.outvars)):
            return None
        body = marked(inline(eqn.params["jaxpr"]))
        moving = self.moving_vars(eqn, body)
        inner = Builder({*body.invars} - state_of(eqn, body, moving), moving, body)
        stage = inner.straight(body)
        whole = sum(matrix_cost(e) for e in body.eqns)
        pruned = rerun_cost(stage.linear, stage.bit_vars) <= _FREE * whole
        return Loop(graph, stage, group=1, slots=0, pruned=pruned)

    def moving_vars(self, eqn: Any, body: Graph) -> set[Var]:
        """The inputs of a scan's body that may carry a tangent."""
        consts, carries = _jax.scan_layout(eqn)
        # A carry that starts without a tangent gets one from the step before.
        outer = [*eqn.invars[:consts], *eqn.outvars[:carries]]
        outer += eqn.invars[consts + carries :]
        pairs = zip(body.invars, outer, strict=True)
        return {v for v, o in pairs if is_var(o) and o in self._tangents}

    def inner_facts(
        self, eqn: Any, graph: Graph, known: Mapping[Var, Fact]
    ) -> dict[Var, Fact]:
        """What is known of the inputs of a scan's body, from that of its operands."""
        consts, carries = _jax.scan_layout(eqn)
        found: dict[Var, Fact] = {}
        pairs = zip(graph.invars, eqn.invars, strict=True)
        for i, (inner, outer) in enumerate(pairs):
            fact = known.get(outer) if is_var(outer) else None
            if fact is None or consts <= i < consts + carries:
                continue
            if i < consts:
                found[inner] = fact
            elif 0 not in fact.axes:
                rows, columns = fact.axes
                found[inner] = dataclasses.replace(fact, axes=(rows - 1, columns - 1))
        return found

    def straight(self, graph: Graph) -> Straight:
        """The stage of straight-line code."""
        active = tuple(v in self._tangents for v in graph.invars)
        state = tuple(v not in self._outside for v in graph.invars)
        data = tuple(v in self._data for v in graph.invars)
        key = (key_of(graph), active, state, data)
        if key not in self._kinds:
            self._kinds[key] = _kind(graph, active, state, data, self._repeats)
        kind = self._kinds[key]
        stage = Straight(
            graph, kind.linear, kind.bits, kind.kept, (), kind.rerun, kind.why
        )
        # An input or result among the residuals is kept under its chain name.
        chain = stage.chain_names()
        names = tuple(chain[v] for v in kind.kept if v in chain)
        own = tuple(v for v in kind.kept if v not in chain)
        return dataclasses.replace(stage, kept_vars=own, names=names)


def state_of(eqn: Any, body: Graph, moving: Collection[Var]) -> set[Var]:
    """The inputs of a scan's body that are its state.

    Those are its carries; where none of them may carry a tangent (`lax.map`), what each
    step reads of its own.
    """
    consts, carries = _jax.scan_layout(eqn)
    carry = {*body.invars[consts : consts + carries]}
    if carry & {*moving}:
        return carry
    return carry | {*body.invars[consts + carries :]}


def matrix_cost(eqn: Any) -> float:
    """Matrix FLOPs of an equation."""
    return eqn_flops(eqn).matrix


def residuals_of(linear: Linear, cotangents: Iterable[Any]) -> list[Any]:
    """The residuals that some of `bwd`'s results are computed from."""
    read = linear.bwd.inputs_of(cotangents)
    pairs = zip(linear.residuals, linear.residual_inputs, strict=True)
    return [r for r, v in pairs if v in read]


def rerun_cost(linear: Linear, given: Collection[Var]) -> float:
    """Matrix FLOPs of computing all residuals from the inputs and `given`."""
    wanted = residuals_of(linear, linear.bwd.outvars)
    eqns = linear.fwd.eqns
    return sum(matrix_cost(eqns[i]) for i in linear.fwd.needed(wanted, given))


def _kind(
    graph: Graph,
    active: tuple[bool, ...],
    state: tuple[bool, ...],
    data: tuple[bool, ...],
    repeats: Repeats,
) -> _Kind:
    linear = linearise(graph, active, repeats.evaluate)
    fwd, bwd = linear.fwd, linear.bwd
    names = [v for v, s in zip(fwd.invars, state, strict=True) if s]
    moving = [s for s, a in zip(state, active, strict=True) if a]
    to_state = [ct for ct, s in zip(bwd.outvars, moving, strict=True) if s]
    bwd, waits = parameters_first(bwd, linear.ct_inputs, to_state, matrix_cost)
    linear = dataclasses.replace(linear, bwd=bwd, waits=waits)
    bits = narrowest(
        fwd, residuals_of(linear, to_state), names, matrix_cost, at_hand=True
    )
    allowed = _SMALL * sum(nbytes(v) for v in names)
    why = ""
    if sum(packed_bytes(v) for v in bits) > allowed:
        why = _why(fwd, max(bits, key=packed_bytes))
        bits = ()
    rerun = rerun_cost(linear, bits)
    if bits and rerun >= rerun_cost(linear, ()):
        bits = ()
    given = [v for v, d in zip(fwd.invars, data, strict=True) if d]
    asked = residuals_of(linear, bwd.outvars)
    kept = narrowest(fwd, asked, names, matrix_cost, at_hand=False, data=given)
    return _Kind(linear, bits, kept, rerun, why or "of several products it has")


def _why(fwd: Graph, var: Var) -> str:
    """The residual that keeps a stage from being pruned."""
    index = fwd.producer.get(var)
    name = "its input" if index is None else fwd.eqns[index].primitive.name
    return f"the cotangent needs {var.aval.str_short()} of {name}"
