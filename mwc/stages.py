"""Stages: what a schedule may ask of a stretch of the program.

A stage reads and writes *values*, a dict from the chain's variables to arrays. It can

- `run`: results from inputs (*advance*);
- `first`: results, and what is kept for the backward: nothing but small residuals
  (*bits*), or all that the backward needs (*kept*);
- `pull`: cotangents of inputs from cotangents of results (*leaf*), given the inputs
  and the bits, or what was kept.

`Straight` is a stage of straight-line code, derived by JAX (`passes.linearise`).
Loops are in `mwc.loops`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Protocol

from mwc import packing
from mwc._tie import barrier
from passes import _jax
from passes.graph import Graph, Var, astype, evaluate, is_var
from passes.linearise import Linear

Array = Any
Values = dict[Var, Array]

# Stands among the wanted variables for the readings of guards: its "cotangent" is a
# vector, one entry a guarded stage, as fractions of the limit.
DRIFT: Var = "drift"


class Stage(Protocol):
    """See the module docstring.

    Attributes:
      graph: the stage in the chain's variables.
      bits: number of arrays that `first` keeps for a leaf.
      kept: number of arrays that `first` keeps for a stored stage.
      names: inputs and results that a stored stage needs besides; they are kept
        under their own names, so that an array is kept once.
      guards: readings that `pull` gives for `DRIFT`, where it is wanted.
      entry: the inputs from which all that is run again follows.
      holds: whether it holds back by itself what comes out of `first`, and what `pull`
        reads besides `entry`.
    """

    @property
    def graph(self) -> Graph:
        """The stage in the chain's variables."""
        ...

    @property
    def bits(self) -> int:
        """Arrays kept for a leaf."""
        ...

    @property
    def kept(self) -> int:
        """Arrays kept for a stored stage."""
        ...

    @property
    def names(self) -> tuple[Var, ...]:
        """See the class."""
        ...

    @property
    def guards(self) -> int:
        """See the class."""
        ...

    @property
    def entry(self) -> tuple[Var, ...]:
        """See the class."""
        ...

    @property
    def holds(self) -> bool:
        """See the class."""
        ...

    def run(self, values: Values, effects: bool = False) -> None:
        """Binds the results in `values`."""
        ...

    def first(self, values: Values, store: bool, effects: bool) -> list[Array]:
        """Binds the results in `values` and returns what is kept."""
        ...

    def pull(
        self,
        values: Values,
        saved: Sequence[Array],
        stored: bool,
        cts: Mapping[Var, Array],
        wanted: Collection[Var],
    ) -> Values:
        """Cotangents of those inputs that are in `wanted`.

        Args:
          values: the inputs; of a stored stage those in `names` or of the program.
          saved: what `first` kept.
          stored: whether that was with `store`.
          cts: cotangents of results; a missing one is zero.
          wanted: the variables whose cotangents are asked for.
        """
        ...


class Whole:
    """What stages of several parts have in common: no schedule stores them whole."""

    @property
    def bits(self) -> int:
        """See `Stage`."""
        return 0

    @property
    def kept(self) -> int:
        """See `Stage`."""
        return 0

    @property
    def names(self) -> tuple[Var, ...]:
        """See `Stage`."""
        return ()

    @property
    def entry(self: Stage) -> tuple[Var, ...]:
        """See `Stage`."""
        return self.graph.invars

    @property
    def holds(self) -> bool:
        """See `Stage`."""
        return False


@dataclasses.dataclass(frozen=True, eq=False)
class Straight:
    """A stage of straight-line code.

    Attributes:
      graph: the stage in the chain's variables.
      linear: its derivative, in variables of its own; equal stages share it.
      bit_vars: small residuals from which, with the inputs, the state cotangents
        follow; empty where the stage is not pruned.
      kept_vars: residuals from which, with `names`, all cotangents follow.
      names: see `Stage`.
      rerun: matrix FLOPs that a leaf runs again.
      why: what it runs them for, for the plan.
    """

    graph: Graph
    linear: Linear
    bit_vars: tuple[Var, ...]
    kept_vars: tuple[Var, ...]
    names: tuple[Var, ...]
    rerun: float
    why: str

    @property
    def bits(self) -> int:
        """Number of arrays that `first` keeps for a leaf."""
        return len(self.bit_vars)

    @property
    def kept(self) -> int:
        """Number of arrays that `first` keeps for a stored stage."""
        return len(self.kept_vars)

    @property
    def guards(self) -> int:
        """Nothing is rebuilt."""
        return 0

    @property
    def entry(self) -> tuple[Var, ...]:
        """See `Stage`."""
        return self.graph.invars

    @property
    def holds(self) -> bool:
        """See `Stage`."""
        return False

    def run(self, values: Values, effects: bool = False) -> None:
        """Binds the results in `values`; one that is there is not run for."""
        ends = (*self.graph.invars, *self.graph.outvars)
        env = {v: values[v] for v in ends if v in values}
        outs = evaluate(self.graph, env, self.graph.outvars, effects)
        values.update(zip(self.graph.outvars, outs, strict=True))

    def first(self, values: Values, store: bool, effects: bool) -> list[Array]:
        """Binds the results in `values` and returns what is kept, bools as bits."""
        keep = self.kept_vars if store else self.bit_vars
        if not keep or (effects and any(e.effects for e in self.graph.eqns)):
            self.run(values, effects)
        env = self._inputs(values)
        pairs = zip(self.graph.outvars, self.linear.outs, strict=True)
        todo = [(v, f) for v, f in pairs if v not in values]
        found = evaluate(self.linear.fwd, env, [*(f for _, f in todo), *keep])
        values.update(zip((v for v, _ in todo), found, strict=False))
        return [packing.pack(x) for x in found[len(todo) :]]

    def pull(
        self,
        values: Values,
        saved: Sequence[Array],
        stored: bool,
        cts: Mapping[Var, Array],
        wanted: Collection[Var],
    ) -> Values:
        """Cotangents of those inputs that are in `wanted`."""
        linear = self.linear
        chosen = self.chosen(wanted)
        outs = [atom for _, atom in chosen]
        read = linear.bwd.inputs_of(outs)
        back = self.residuals(values, saved, stored, read)
        results = [
            v for v, f in zip(self.graph.outvars, linear.inexact, strict=True) if f
        ]
        # A result that is named twice has one cotangent, which must count once.
        due = dict(cts)
        for v, ct in zip(results, linear.ct_inputs, strict=True):
            given = due.pop(v, None) if is_var(v) else None
            if ct in read:
                aval = ct.aval
                zeros = _jax.zeros(aval.shape, aval.dtype, aval)
                back[ct] = zeros if given is None else given

        def before(i: int) -> None:
            wait = linear.waits.get(i)
            done = [v for v in wait.done if v in back] if wait else []
            if wait and done:
                held = [*done, *wait.reads]
                back.update(zip(held, barrier([back[v] for v in held]), strict=True))

        grads = evaluate(linear.bwd, back, outs, before=before)
        return dict(zip((v for v, _ in chosen), grads, strict=True))

    def residuals(
        self,
        values: Values,
        saved: Sequence[Array],
        stored: bool,
        read: Collection[Var],
    ) -> Values:
        """Those residuals that are in `read`, by their names in `linear.bwd`."""
        linear, env = self.linear, self._with(values, saved, stored)
        pairs = zip(linear.residuals, linear.residual_inputs, strict=True)
        need = [(r, v) for r, v in pairs if v in read]
        found = evaluate(linear.fwd, env, [r for r, _ in need])
        # A widened derivative reads narrow residuals as float32.
        pairs = ((v, astype(x, v)) for (_, v), x in zip(need, found, strict=True))
        return linear.consts | dict(pairs)

    def results(self, values: Values, bits: Sequence[Array]) -> list[Array]:
        """The results from the inputs and the bits, which say how it branches."""
        env = self._with(values, bits, False)
        return evaluate(self.linear.fwd, env, self.linear.outs)

    def _with(self, values: Values, saved: Sequence[Array], stored: bool) -> Values:
        """Inputs and what `first` kept, in the derivative's variables."""
        env = self._inputs(values)
        keep = self.kept_vars if stored else self.bit_vars
        pairs = zip(keep, saved, strict=True)
        return env | {v: packing.unpack(x, v.aval) for v, x in pairs}

    def chosen(self, wanted: Collection[Var]) -> list[tuple[Var, Any]]:
        """The wanted inputs, each with its cotangent in `linear.bwd`."""
        active = zip(self.graph.invars, self.linear.active, strict=True)
        inputs = [v for v, a in active if a]
        pairs = zip(inputs, self.linear.bwd.outvars, strict=True)
        return [(v, atom) for v, atom in pairs if v in wanted]

    def chain_names(self) -> Values:
        """Inputs and results: from the derivative's variables to the chain's."""
        return {f: v for v, f in self._pairs()}

    def _inputs(self, values: Values) -> Values:
        env = dict(self.linear.consts)
        for v, f in self._pairs():
            if v in values:
                env[f] = values[v]
        return env

    def _pairs(self) -> Iterator[tuple[Var, Var]]:
        """Inputs and results, each in the chain and in the derivative."""
        yield from zip(self.graph.invars, self.linear.fwd.invars, strict=True)
        outs = zip(self.graph.outvars, self.linear.outs, strict=True)
        yield from ((v, f) for v, f in outs if is_var(f))
