"""`Rebuilt`: a stage whose result's cotangent can be rebuilt from its input's.

A `Straight` stage with what `passes.submersion` found. It can, besides what every
stage can,

- `pull` the cotangent of its result back to its state from parameters and small
  residuals (*bits*) alone, without the state: sweep R;
- `push` the cotangent of its state forward again, from the same bits: sweep V. This is
  the vijp (vector-inverse-Jacobian product), h_out = h_in R with J R = I.

Both sweeps use the bits of the first pass, never signs computed again. Source: DESIGN
section 2. Limits: those of `passes.submersion`.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Collection, Hashable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax

from mwc._tie import barrier, tie
from mwc.nodes.claims import Claim, claim
from mwc.nodes.polish import refined, signs_of, through, times_of
from mwc.nodes.ties import mended, missed
from mwc.nodes.turned import turned
from mwc.stages import Straight, Values
from passes import _jax
from passes.depend import reached
from passes.flops import eqn_flops
from passes.graph import Graph, Var, astype, evaluate, is_var, nbytes, read
from passes.linearise import is_inexact
from passes.links import Link
from passes.nans import all_nan
from passes.submersion import Inverse, Rule, Submersion

Array = Any

_FEW = 8  # times smaller than a state is what may wait beside it


@dataclasses.dataclass(frozen=True, eq=False)
class Rebuilt:
    """A stage that can be swept in both directions.

    Attributes:
      stage: the stage; its `bit_vars` are all that `pull` needs of the state.
      found: its links with their inverses.
      state: the state it reads, in the chain's variables.
      result: the state it makes.
    """

    stage: Straight
    found: Submersion
    state: Var
    result: Var

    def pull(
        self, values: Values, bits: Sequence[Array], h_out: Array, ties: bool = True
    ) -> tuple[Array, list[Array]]:
        """h_in from h_out; `values` need not have the state.

        Also, with `ties`, what `push` would miss where operands tie.
        """
        bwd = self.stage.linear.bwd
        read = bwd.inputs_of([self._target])
        env = self.stage.residuals(values, bits, False, read)
        cts = env | {self.last: h_out}
        (h_in,) = evaluate(bwd, cts, [self._target])
        kept: list[Array] = []
        for inverse in self.found.inverses if ties else ():
            if inverse.ties:
                link = inverse.link
                again = _invert(bwd, inverse, env, cts[link.target])
                kept += missed(cts[link.source], again)
        return h_in, kept

    def push(
        self,
        values: Values,
        bits: Sequence[Array],
        h_in: Array,
        kept: Sequence[Array] = (),
        weights: Values | None = None,
        times: Mapping[Var, Array | None] | None = None,
    ) -> Values:
        """The cotangents between its links, from h_in to h_out.

        They are named as in the stage's derivative; h_out is `last`.

        Args:
          values: the inputs; the state need not be there.
          bits: of the first pass.
          h_in: the cotangent of the state.
          kept: what `pull` kept of ties.
          weights: what was made of those of `claims`.
          times: of other claims, `times_of`; None where that is still to be found.
        """
        lost = list(kept)
        bwd = self.stage.linear.bwd
        links = [inverse.link for inverse in self.found.inverses]
        need: set[Var] = set()
        for link in links:
            need |= bwd.inputs_of([link.target], [link.source]) - {link.source}
        env = self.stage.residuals(values, bits, False, need) | (weights or {})
        often: Values = dict(times or {})
        for of in self.claims:
            if of.var in often and often[of.var] is None:
                # Or the compiler looks at all weights first, and keeps what it sees.
                env[of.var] = tie([env[of.var]], h_in)[0]
                rows = through(signs_of(of, h_in), env[of.var], of)
                often[of.var] = times_of(rows, of)
        known = {self._target: h_in}
        pairs = zip(self.found.inverses, self._claimed, strict=True)
        for inverse, of in reversed([*pairs]):
            link = inverse.link
            push = functools.partial(_invert, bwd, inverse, env)
            h = push(known[link.target])
            if of is not None and of.var in often:
                pull = functools.partial(_pulled, bwd, link, env)
                h = refined(h, known[link.target], often[of.var], pull, push)
            if inverse.ties:
                h, lost = mended(h, lost[-2:]), lost[:-2]
            known[link.source] = h
        return known

    @functools.cached_property
    def claims(self) -> tuple[Claim, ...]:
        """Weights that `push` must not take to be what they are claimed to be."""
        return tuple({of.var: of for of in self._claimed if of is not None}.values())

    @functools.cached_property
    def _claimed(self) -> tuple[Claim | None, ...]:
        """The claim that each inverse rests on."""
        linear = self.stage.linear
        read = dict(zip(linear.residual_inputs, linear.residuals, strict=True))
        turned = [e for e in linear.bwd.eqns if e.primitive.name == "rev"]
        plain = {e.outvars[0]: e.invars[0] for e in turned}
        inputs = {*linear.fwd.invars}
        return tuple(claim(one, read, plain, inputs) for one in self.found.inverses)

    def weight(self, of: Claim, values: Values, bits: Sequence[Array]) -> Array:
        """That of a claim, as it is."""
        return self.stage.residuals(values, bits, False, [of.var])[of.var]

    def made_of(self, of: Claim) -> set[Var]:
        """The stage's inputs that the weight of a claim is made of."""
        linear, names = self.stage.linear, self.stage.chain_names()
        read = linear.residuals[linear.residual_inputs.index(of.var)]
        return {names[v] for v in linear.fwd.inputs_of([read]) if v in names}

    @functools.cached_property
    def sources(self) -> tuple[Var, ...]:
        """Inputs of what costs matrix products and does not need the state."""
        graph = self.stage.graph
        moving = reached(graph, [self.state])
        dear = [
            v
            for e in graph.eqns
            if eqn_flops(e).matrix and not moving & {*e.outvars}
            for v in e.outvars
        ]
        need = graph.inputs_of(dear)
        return tuple(v for v in graph.invars if v in need)

    @functools.cached_property
    def eps(self) -> float:
        """The coarsest relative rounding on the way through its backward."""
        eqns = [e for inverse in self.found.inverses for e in inverse.link.eqns]
        path = [self.last, *(v for e in eqns for v in (*e.invars, *e.outvars))]
        found = [float(jnp.finfo(v.aval.dtype).eps) for v in path if is_inexact(v)]
        return max(found + [_rounding(e) for e in eqns])

    @functools.cached_property
    def spoiled(self) -> frozenset[Var]:
        """Inputs whose gradients have no entry but NaN where the state has none.

        As `gradients` makes them: from the bits of a first pass that was right.
        """
        linear, names = self.stage.linear, self.stage.chain_names()
        states = [v for v in linear.fwd.invars if names.get(v) is self.state]
        made = all_nan(linear.fwd, states, self.stage.bit_vars)
        pairs = zip(linear.residual_inputs, linear.residuals, strict=True)
        read = [v for v, r in pairs if is_var(r) and r in made]
        pushed = {self._target, *(one.link.source for one in self.found.inverses)}
        found = all_nan(linear.bwd, read, pushed)
        chosen = self.stage.chosen(self.stage.graph.invars)
        return frozenset(v for v, ct in chosen if is_var(ct) and ct in found)

    @property
    def kind(self) -> Hashable:
        """Equal for stages alike: those with the same derivative and inverses."""
        return id(self.stage.linear), id(self.found), self.stage.bit_vars

    @property
    def last(self) -> Var:
        """The cotangent of the result, in the derivative's variables."""
        return self.stage.linear.ct_inputs[0]

    @property
    def _target(self) -> Var:
        """The cotangent of the state, in the derivative's variables."""
        if self.found.inverses:
            return self.found.inverses[-1].link.target
        return self.last

    def advance(self, values: Values, bits: Sequence[Array]) -> Array:
        """The result from the state, branching as the bits say.

        The activation is then the one that the gradients read, and is made once.
        """
        return self.stage.results(values, bits)[0]

    def gradients(
        self,
        values: Values,
        bits: Sequence[Array],
        known: Values,
        wanted: Collection[Var],
    ) -> Values:
        """Cotangents of the wanted inputs, the state left out.

        They start from what `push` gave, so that no product runs a second time.
        """
        bwd = self._emitting
        chosen = [(v, ct) for v, ct in self.stage.chosen(wanted) if v is not self.state]
        outs = [ct for _, ct in chosen]
        read = bwd.inputs_of(outs, known) - {*known}
        env = self.stage.residuals(values, bits, False, read)
        found = evaluate(bwd, {**env, **known}, outs)
        pairs = zip((v for v, _ in chosen), found, strict=True)
        return {v: astype(ct, v) for v, ct in pairs}

    def summed(
        self,
        values: Values,
        bits: Sequence[Array],
        h_in: Array,
        wanted: Collection[Var],
    ) -> tuple[Array, Values]:
        """H_in to be pushed, and those `gradients` that are small sums of it alone.

        They, as a bias's, are made before it is pushed, or XLA for GPUs makes one
        kernel of both, which takes ten times as long (63 us, not 6 and 3, for 4,096
        rows of 512 on an H100).
        """
        found = [v for v in wanted if v in self._summed]
        if not found:
            return h_in, {}
        grads = self.gradients(values, bits, {self._target: h_in}, found)
        h_in, *held = barrier([h_in, *grads.values()])
        return h_in, dict(zip(grads, held, strict=True))

    @functools.cached_property
    def _summed(self) -> set[Var]:
        bwd, given = self.stage.linear.bwd, {self._target}
        return {
            v
            for v, ct in self.stage.chosen(self.stage.graph.invars)
            if v is not self.state
            and bwd.inputs_of([ct], given) == given
            and _FEW * nbytes(v) <= nbytes(self.state)
        }

    @functools.cached_property
    def _emitting(self) -> Graph:
        """The backward as `gradients` runs it."""
        return turned(self.stage.linear.bwd)


def linked(a: Rebuilt, b: Rebuilt) -> bool:
    """Whether one stage reads the result of another as its state."""
    return is_var(a.result) and a.result is b.state


def _rounding(eqn: Any) -> float:
    """What an equation rounds to though its types do not show it, relative."""
    if (bits := eqn.params.get("mantissa_bits")) is not None:
        return 2.0**-bits
    # A product of float32 by one pass in a narrower type, of a `DotAlgorithmPreset`.
    asked = re.search(r"\b(BF16|F16)_\1_\w+", str(eqn.params.get("precision")))
    if asked is None or "_X" in asked[0]:
        return 0.0
    return float(jnp.finfo(jnp.bfloat16 if asked[1] == "BF16" else jnp.float16).eps)


def _invert(bwd: Graph, inverse: Inverse, env: Values, h: Array) -> Array:
    """h_out of a link from its h_in."""
    link = inverse.link
    if inverse.rule is Rule.TRANSPOSE:
        graph, consts = link.adjoint
        given = [*evaluate(bwd, env, link.reads), h]
        args = dict(zip(graph.invars, given, strict=True))
        (found,) = evaluate(graph, consts | args, graph.outvars)
        return found if inverse.scale == 1 else found / inverse.scale
    if inverse.rule is Rule.DIVIDE:
        aval = link.source.aval
        ones = _jax.zeros(aval.shape, aval.dtype, aval) + 1
        return h / evaluate(bwd, {**env, link.source: ones}, [link.target])[0]
    if inverse.rule is Rule.CUSTOM:
        head, tail = link.eqns[0], link.eqns[-1]
        rule = head.params["rule"].over(tail.params["lanes"], head.params["lanes"])
        return rule([read(env, v) for v in head.invars[1:]], h)
    assert inverse.rule is Rule.TRIANGULAR, inverse.reason
    return _solve(inverse, env, h)


def _pulled(bwd: Graph, link: Link, env: Values, h: Array) -> Array:
    """h_in of a link from its h_out."""
    return evaluate(bwd, {**env, link.source: h}, [link.target])[0]


def _solve(inverse: Inverse, env: Values, h: Array) -> Array:
    """h_out of a product with a unit triangular weight, by substitution."""
    (eqn,), fact = inverse.link.eqns, inverse.fact
    assert fact is not None
    contract, batch = eqn.params["dimension_numbers"]
    side = 1 if eqn.invars[0] is inverse.link.source else 0
    weight, ct = env[eqn.invars[side]], inverse.link.source.aval
    (c,), (ct_axis,) = contract[side], contract[1 - side]
    (f,) = {*fact.axes} - {c}
    lead = len(batch[side])
    matrix = jnp.moveaxis(weight, (*batch[side], f, c), range(weight.ndim))
    # h_in: axes of the batch, then the free ones of the left and of the right operand.
    rows = jnp.moveaxis(h, h.ndim - 1 if side else lead, -1)
    flat = rows.reshape(*rows.shape[:lead], -1, rows.shape[-1])
    found = lax.linalg.triangular_solve(
        *(matrix, jnp.swapaxes(flat, -1, -2)),
        left_side=True,
        lower=fact.lower == (fact.axes == (f, c)),
        unit_diagonal=True,
    )
    found = jnp.swapaxes(found, -1, -2).reshape(rows.shape)
    free = [a for a in range(ct.ndim) if a != ct_axis and a not in batch[1 - side]]
    return jnp.moveaxis(found, range(ct.ndim), (*batch[1 - side], *free, ct_axis))
