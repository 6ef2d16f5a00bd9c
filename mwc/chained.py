"""`Chained`: a program as a prologue and a chain under a schedule.

It is what the engine emits for the user's function, and, inside a loop, a stage: the
body of a scan over transformer blocks is a chain too, and a leaf of the loop is that
chain's forward and backward under a schedule of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from mwc.nodes.checkpoint import Checkpoint
from mwc.stages import DRIFT, Stage, Values, Whole
from passes.depend import carries_tangent
from passes.graph import Graph, Var, evaluate, is_var
from passes.linearise import is_inexact

Array = Any


@dataclasses.dataclass(frozen=True, eq=False)
class Chained(Whole):
    """A program that can be run forwards and backwards.

    Attributes:
      graph: the program.
      prologue: parameter-side equations that several stages read.
      node: the chain.
      tangents: the variables through which tangents flow, where it is a stage.
    """

    graph: Graph
    prologue: Stage
    node: Checkpoint
    tangents: frozenset[Var] = frozenset()

    # A program ----------------------------------------------------------------

    def forward(self, values: Values, tangents: Collection[Var]) -> list[Array]:
        """Binds the results in `values` and returns what is saved."""
        self.prologue.run(values, effects=True)
        return self.node.forward(values, tangents)

    def backward(
        self,
        values: Values,
        saved: Sequence[Array],
        tangents: Collection[Var],
        wanted: Collection[Var],
        cts: Values,
    ) -> None:
        """Pulls cotangents of results to inputs; see `Checkpoint.backward`."""
        self.prologue.run(values)
        self.node.backward(values, saved, tangents, wanted, cts)
        outs = self.prologue.graph.outvars
        last = {v: cts.pop(v) for v in outs if v in cts}
        if last:
            found = self.prologue.pull(values, [], False, last, wanted)
            for v, ct in found.items():
                cts[v] = cts[v] + ct if v in cts else ct

    def reached(self, sources: Collection[Var]) -> set[Var]:
        """The variables through which tangents of some inputs flow."""
        return carries_tangent(self.graph, sources, is_inexact)

    # A stage ------------------------------------------------------------------

    @property
    def guards(self) -> int:
        """Readings of the guards inside."""
        return sum(stage.guards for stage in self.node.stages)

    def run(self, values: Values, effects: bool = False) -> None:
        """Binds the results in `values`."""
        env = {v: values[v] for v in self.graph.invars}
        outs = evaluate(self.graph, env, self.graph.outvars, effects)
        pairs = zip(self.graph.outvars, outs, strict=True)
        values.update((v, x) for v, x in pairs if is_var(v))

    def first(self, values: Values, store: bool, effects: bool) -> list[Array]:
        """Binds the results in `values`; keeps nothing."""
        assert not store, "a chain inside a loop is run again, not stored"
        self.run(values, effects)
        return []

    def pull(
        self,
        values: Values,
        saved: Sequence[Array],
        stored: bool,
        cts: Mapping[Var, Array],
        wanted: Collection[Var],
    ) -> Values:
        """Cotangents of those inputs that are in `wanted`: both passes."""
        asked = self.reached([v for v in self.graph.invars if v in wanted])
        asked |= {DRIFT} & {*wanted}
        due = {v: ct for v, ct in cts.items() if v in asked}
        inputs = {v: values[v] for v in self.graph.invars}
        saved = self.forward(dict(inputs), self.tangents)
        self.backward(inputs, saved, self.tangents, asked, due)
        found = {v: due[v] for v in self.graph.invars if v in wanted and v in due}
        return found | ({DRIFT: due[DRIFT]} if DRIFT in due else {})
