"""`Loop`: a scan as a stage that keeps its loop form in every sweep.

The first pass keeps the carry at the steps that a binomial schedule names, in a
buffer of `slots` states, and the body's sign bits for every step. The backward is a
loop over *leaves*, last first: it advances from a kept carry (an inner loop, which
may fill freed slots on its way), then pulls through the leaf. A leaf is

- one step, pulled from its carry and its bits without running it, where the body's
  input cotangent needs small residuals only (`group` = 1, `pruned`);
- `group` steps, run again with their residuals stored;
- one step whose body is a chain under a schedule of its own (`mwc.chained`).

Per-step inputs are indexed in their full stacks, gradients of stacked weights are
written in place, and the schedule is a table (`passes.binomial`), so the code does
not grow with the number of steps. Source: DESIGN section 4 and 7. Limits: loops
with effects keep JAX's own derivative.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from mwc import _stacks as stacks
from mwc.stages import Stage, Straight, Values
from passes import _jax
from passes.binomial import Instructions, instructions
from passes.graph import Graph, Var, evaluate, is_var, read
from passes.linearise import is_inexact

Array = Any


@dataclasses.dataclass(frozen=True, eq=False)
class Loop:
    """A scan.

    Attributes:
      graph: one equation, the scan, in the chain's variables.
      body: its body as a stage; constants, carries and per-step inputs, in order.
      group: steps of a leaf.
      slots: states that are kept.
      pruned: whether a leaf starts from bits.
      leaf_forwards: forward passes that the leaves run, over those of the loop.
      leaf_bytes: what a leaf keeps while it runs.
    """

    graph: Graph
    body: Stage
    group: int
    slots: int
    pruned: bool
    leaf_forwards: float = 0.0
    leaf_bytes: int = 0

    @property
    def eqn(self) -> Any:
        """The scan."""
        return self.graph.eqns[0]

    @property
    def bits(self) -> int:
        """A loop has no leaf but its own."""
        return 0

    @property
    def bit_vars(self) -> tuple[Var, ...]:
        """What every step of the first pass keeps, in variables of derivatives."""
        if self.pruned and isinstance(self.body, Straight):
            return self.body.bit_vars
        return ()

    @property
    def kept(self) -> int:
        """Slots of each carry, and stacks of bits."""
        carries = self.counts[1] if self.slots else 0
        return carries + (self.body.bits if self.pruned else 0)

    @property
    def entry(self) -> tuple[Var, ...]:
        """See `Stage`."""
        return self.graph.invars

    @property
    def holds(self) -> bool:
        """See `Stage`."""
        return False

    @property
    def guards(self) -> int:
        """One reading, the worst of all steps, if the body has a guard."""
        return min(1, self.body.guards)

    @property
    def names(self) -> tuple[Var, ...]:
        """All operands."""
        return tuple(dict.fromkeys(v for v in self.eqn.invars if is_var(v)))

    @functools.cached_property
    def plan(self) -> Instructions:
        """The schedule, counted in leaves."""
        return instructions(-(-self.length // self.group), self.slots)

    @property
    def length(self) -> int:
        """Steps."""
        return self.eqn.params["length"]

    @property
    def carries(self) -> slice:
        """Where the carries stand among the body's inputs."""
        consts, carries, _, _ = self.counts
        return slice(consts, consts + carries)

    @functools.cached_property
    def counts(self) -> tuple[int, int, int, int]:
        """Numbers of constants, carries, per-step inputs and per-step outputs."""
        consts, carries = _jax.scan_layout(self.eqn)
        inputs = len(self.eqn.invars) - consts - carries
        return consts, carries, inputs, len(self.eqn.outvars) - carries

    def run(self, values: Values, effects: bool = False) -> None:
        """Binds the results in `values`: the user's own scan."""
        env = {v: values[v] for v in self.graph.invars}
        outs = evaluate(self.graph, env, self.graph.outvars, effects)
        values.update(zip(self.graph.outvars, outs, strict=True))

    def first(self, values: Values, store: bool, effects: bool) -> list[Array]:
        """Binds the results in `values` and returns what is kept."""
        if not store:
            self.run(values, effects)
            return []
        return self.sweeps(values).first(values)

    def pull(
        self,
        values: Values,
        saved: Sequence[Array],
        stored: bool,
        cts: Mapping[Var, Array],
        wanted: Collection[Var],
    ) -> Values:
        """Cotangents of those inputs that are in `wanted`."""
        if not stored:
            saved = self.first(dict(values), store=True, effects=False)
        return self.sweeps(values).pull(saved, cts, wanted)

    def sweeps(self, values: Values) -> Sweeps:
        """The loops that it emits."""
        return Sweeps(self, values)


class Sweeps:
    """The loops that a `Loop` emits, for given operands."""

    def __init__(self, loop: Loop, values: Values):
        self._loop, self._body = loop, loop.body
        consts, carries, _, _ = loop.counts
        operands = [read(values, v) for v in loop.eqn.invars]
        self._consts = operands[:consts]
        self._init = [jnp.asarray(x) for x in operands[consts : consts + carries]]
        self._xs = operands[consts + carries :]
        invars, outvars = loop.body.graph.invars, loop.body.graph.outvars
        self.const_vars = invars[:consts]
        self.carry_vars = invars[consts : consts + carries]
        self.x_vars = invars[consts + carries :]
        self._next_vars = outvars[:carries]
        self._y_vars = outvars[carries:]
        self._length = loop.length

    # One step -----------------------------------------------------------------

    def at(self, step: Array) -> Array:
        """The index of a step in the stacks."""
        return self._length - 1 - step if self._loop.eqn.params["reverse"] else step

    def inputs(self, step: Array, carry: Sequence[Array]) -> Values:
        """What the body reads at a step."""
        at = self.at(step)
        values = dict(zip(self.const_vars, self._consts, strict=True))
        values.update(zip(self.carry_vars, carry, strict=True))
        values.update(
            (v, stacks.take(x, at)) for v, x in zip(self.x_vars, self._xs, strict=True)
        )
        return values

    def _outputs(self, values: Values, atoms: Sequence[Any]) -> list[Array]:
        return [read(values, v) for v in atoms]

    def _advance(self, carry: Sequence[Array], start: Array, stop: Array):
        """The carry before `stop` from the one before `start`."""

        def step(i: Array, carry: list[Array]) -> list[Array]:
            values = self.inputs(i, carry)
            return evaluate(self._body.graph, values, self._next_vars)

        return lax.fori_loop(start, stop, step, list(carry))

    # The first pass -----------------------------------------------------------

    def first(self, values: Values) -> list[Array]:
        """Runs the loop, keeping slots and bits; binds its results."""
        loop, body = self._loop, self._body
        marks = np.full(self._length + 1, -1, np.int32)
        for slot, leaf in enumerate(loop.plan.spine):
            marks[leaf * loop.group] = slot
        table = jnp.asarray(marks)
        bit_vars = loop.bit_vars
        slots = [stacks.repeat(x, loop.slots) for x in self._init] if loop.slots else []
        bits = [stacks.zeros(self._length, stacks.packed(v), v) for v in bit_vars]
        results = loop.eqn.outvars[loop.counts[1] :]
        used = [not _jax.is_drop(v) for v in results]
        ys = [
            stacks.zeros(self._length, v.aval, v)
            for v, u in zip(self._y_vars, used, strict=True)
            if u
        ]
        y_vars = [v for v, u in zip(self._y_vars, used, strict=True) if u]

        def step(i: Array, state: Any) -> Any:
            carry, slots, bits, ys = state
            if slots:
                # Zero or one trip: a conditional would copy the slots.
                write = functools.partial(stacks.write, carry, table[i])
                slots = lax.fori_loop(
                    0, (table[i] >= 0).astype(jnp.int32), write, slots
                )
            values = self.inputs(i, carry)
            kept = body.first(values, store=False, effects=False)
            kept = kept if loop.pruned else []
            at = self.at(i)
            bits = [stacks.put(b, x, at) for b, x in zip(bits, kept, strict=True)]
            out = self._outputs(values, y_vars)
            ys = [stacks.put(b, x, at) for b, x in zip(ys, out, strict=True)]
            return self._outputs(values, self._next_vars), slots, bits, ys

        state = (self._init, slots, bits, ys)
        carry, slots, bits, ys = lax.fori_loop(0, self._length, step, state)
        given = iter(ys)
        outs = [*carry, *(next(given) if u else None for u in used)]
        for v, x in zip(loop.eqn.outvars, outs, strict=True):
            if not _jax.is_drop(v):
                values[v] = x
        return [*slots, *bits]

    # The backward pass --------------------------------------------------------

    def pull(
        self, saved: Sequence[Array], cts: Mapping[Var, Array], wanted: Collection[Var]
    ) -> Values:
        """Cotangents of the wanted operands."""
        loop, body = self._loop, self._body
        carries = loop.counts[1] if loop.slots else 0
        slots, bits = list(saved[:carries]), list(saved[carries:])
        ask = self.asked(wanted)
        c_vars = [v for v in self.const_vars if v in ask]
        h_vars = [v for v in self.carry_vars if v in ask]
        x_vars = [v for v in self.x_vars if v in ask]
        nexts = dict(zip(self.carry_vars, self._next_vars, strict=True))
        results = dict(zip(self.carry_vars, loop.eqn.outvars, strict=False))
        g_consts = [stacks.zeros(None, v.aval, v) for v in c_vars]
        g_xs = [stacks.zeros(self._length, v.aval, v) for v in x_vars]
        g_carry = [
            cts[results[v]] if results[v] in cts else stacks.zeros(None, v.aval, v)
            for v in h_vars
        ]
        names = zip(self._y_vars, loop.eqn.outvars[loop.counts[1] :], strict=True)
        y_cts = [(v, cts[r]) for v, r in names if r in cts and is_var(v)]

        def pull_step(i: Array, carry: Any, kept: Any, stored: bool, grads: Any) -> Any:
            g_carry, g_consts, g_xs = grads
            at = self.at(i)
            due: Values = {}
            pairs = [(nexts[v], g) for v, g in zip(h_vars, g_carry, strict=True)]
            for v, ct in (*pairs, *((v, stacks.take(ct, at)) for v, ct in y_cts)):
                if is_var(v):
                    due[v] = due[v] + ct if v in due else ct
            values = self.inputs(i, carry)
            found = body.pull(values, kept, stored, due, ask)
            g_xs = [
                stacks.put(b, found[v], at) if v in found else b
                for b, v in zip(g_xs, x_vars, strict=True)
            ]
            g_consts = [
                g + found[v] if v in found else g
                for g, v in zip(g_consts, c_vars, strict=True)
            ]
            g_carry = [
                found[v] if v in found else stacks.zeros(None, v.aval, v)
                for v in h_vars
            ]
            return g_carry, g_consts, g_xs

        leaf = self._pruned_leaf if loop.pruned else self._stored_leaf
        grads = self._leaves(slots, bits, (g_carry, g_consts, g_xs), leaf, pull_step)
        g_carry, g_consts, g_xs = grads
        operand = dict(zip(body.graph.invars, loop.eqn.invars, strict=True))
        found: Values = {}
        names = (*h_vars, *c_vars, *x_vars)
        pairs = zip(names, (*g_carry, *g_consts, *g_xs), strict=True)
        for v, g in pairs:
            outer = operand[v]
            if is_var(outer) and outer in wanted:
                found[outer] = found[outer] + g if outer in found else g
        return found

    def asked(self, wanted: Collection[Var]) -> set[Var]:
        """The body's inputs whose cotangents lead to a wanted operand."""
        body, eqn = self._body, self._loop.eqn
        pairs = zip(body.graph.invars, eqn.invars, strict=True)
        found = {v for v, o in pairs if is_var(o) and o in wanted and is_inexact(v)}
        carries = zip(self.carry_vars, eqn.outvars, strict=False)
        found |= {v for v, o in carries if o in wanted and is_inexact(v)}
        return found

    def _leaves(
        self, slots: Any, bits: Any, grads: Any, leaf: Callable, pull_step: Callable
    ) -> Any:
        """The loop over leaves, with the advances that each one asks for."""
        loop, plan = self._loop, self._loop.plan
        scale = np.array([1, loop.group, loop.group, 1], np.int32)
        advances = np.array(plan.advances or [(0, 0, 0, 1)], np.int32) * scale
        scale = np.array([1, loop.group, loop.group, 1, 1], np.int32)
        leaves = jnp.asarray(np.array(plan.leaves, np.int32) * scale)
        advances = jnp.asarray(advances)

        def load(slots: Any, source: Array) -> list[Array]:
            if not slots:
                return self._init
            at = jnp.maximum(source - 1, 0)
            given = zip(slots, self._init, strict=True)
            return [jnp.where(source == 0, x, stacks.take(b, at)) for b, x in given]

        def advance(a: Array, slots: Any) -> Any:
            source, start, stop, target = (advances[a, k] for k in range(4))
            carry = self._advance(load(slots, source), start, stop)
            return [
                stacks.put(b, x, target - 1) for b, x in zip(slots, carry, strict=True)
            ]

        def step(n: Array, state: Any) -> Any:
            slots, grads = state
            source, start, stop, low, high = (leaves[n, k] for k in range(5))
            if slots and plan.advances:
                slots = lax.fori_loop(low, high, advance, slots)
            carry = self._advance(load(slots, source), start, stop)
            return slots, leaf(stop, carry, bits, grads, pull_step)

        _, grads = lax.fori_loop(0, len(plan.leaves), step, (slots, grads))
        return grads

    def _pruned_leaf(
        self, i: Array, carry: Any, bits: Any, grads: Any, pull_step: Callable
    ) -> Any:
        kept = [stacks.take(b, self.at(i)) for b in bits]
        return pull_step(i, carry, kept, False, grads)

    def _stored_leaf(
        self, i: Array, carry: Any, bits: Any, grads: Any, pull_step: Callable
    ) -> Any:
        """Runs the steps of a leaf with their residuals stored, then pulls."""
        loop, body = self._loop, self._body
        if loop.group == 1 or not isinstance(body, Straight):
            kept = body.first(self.inputs(i, carry), store=False, effects=False)
            return pull_step(i, carry, kept, False, grads)
        stop = jnp.minimum(i + loop.group, self._length)
        held = [v for v in body.names if v in self.carry_vars]
        outs = [v for v in body.names if v in body.graph.producer]
        rows = [stacks.zeros(loop.group, v.aval, v) for v in (*held, *outs)]
        rows += [stacks.zeros(loop.group, stacks.packed(v), v) for v in body.kept_vars]

        def forward(k: Array, state: Any) -> Any:
            carry, rows = state
            values = self.inputs(k, carry)
            kept = body.first(values, store=True, effects=False)
            new = (*(values[v] for v in (*held, *outs)), *kept)
            rows = [stacks.put(b, x, k - i) for b, x in zip(rows, new, strict=True)]
            return self._outputs(values, self._next_vars), rows

        _, kept = lax.fori_loop(i, stop, forward, (carry, rows))

        def backward(k: Array, grads: Any) -> Any:
            k = stop - 1 - (k - i)
            rows = [stacks.take(b, k - i) for b in kept]
            names = dict(zip((*held, *outs), rows, strict=False))
            given = zip(self.carry_vars, carry, strict=True)
            past = [names.get(v, x) for v, x in given]
            return pull_step(k, past, rows[len(names) :], True, grads)

        return lax.fori_loop(i, stop, backward, grads)
