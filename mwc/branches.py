"""`Branches`: a choice (`lax.cond`, `lax.switch`) as a stage, each branch a chain.

JAX's derivative of a choice keeps residuals of every branch, whichever is taken. Here
the first pass runs the user's own choice and keeps nothing but its operands; the
backward is a choice between the branches' own sweeps (`mwc.chained`), each forward and
back under a schedule of its own. Where the index is mapped, JAX runs every branch and
selects, forwards as backwards. Limits: choices with effects, and those whose branches
are cheap, keep JAX's own derivative.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax

from mwc.chained import Chained
from mwc.stages import DRIFT, Straight, Values, Whole
from passes.graph import Graph, Var, evaluate, is_var, read

Array = Any


@dataclasses.dataclass(frozen=True, eq=False)
class Branches(Whole):
    """A choice.

    Attributes:
      graph: one equation, the choice, in the chain's variables.
      chains: its branches.
      plain: the stage that it is with JAX's own derivative.
      leaf_forwards: forward passes that a backward runs, of the dearest branch.
      leaf_bytes: what a backward keeps while it runs.
    """

    graph: Graph
    chains: tuple[Chained, ...]
    plain: Straight
    leaf_forwards: float
    leaf_bytes: int

    @property
    def eqn(self) -> Any:
        """The choice: an index, then the operands of every branch."""
        return self.graph.eqns[0]

    @property
    def guards(self) -> int:
        """One reading, the worst in the branch taken, if a branch has a guard."""
        return min(1, max(chained.guards for chained in self.chains))

    @property
    def names(self) -> tuple[Var, ...]:
        """Index and operands."""
        return tuple(dict.fromkeys(v for v in self.eqn.invars if is_var(v)))

    def run(self, values: Values, effects: bool = False) -> None:
        """Binds the results in `values`: the user's own choice."""
        env = {v: values[v] for v in self.graph.invars}
        outs = evaluate(self.graph, env, self.graph.outvars, effects)
        values.update(zip(self.graph.outvars, outs, strict=True))

    def first(self, values: Values, store: bool, effects: bool) -> list[Array]:
        """Binds the results in `values`; keeps nothing."""
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
        """Cotangents of the wanted operands, pulled through the branch taken."""
        index, *operands = (read(values, v) for v in self.eqn.invars)
        outer = self.eqn.invars[1:]
        asked = [i for i, v in enumerate(outer) if is_var(v) and v in wanted]
        guarded = DRIFT in wanted and self.guards > 0
        results = [v for v in self.eqn.outvars if v in cts]
        pulls = [
            functools.partial(self._pull, chained, results, asked, guarded)
            for chained in self.chains
        ]
        found = lax.switch(index, pulls, operands, [cts[v] for v in results])
        given: Values = {DRIFT: found.pop()} if guarded else {}
        for i, ct in zip(asked, found, strict=True):
            v = outer[i]
            given[v] = given[v] + ct if v in given else ct
        return given

    def _pull(
        self,
        chained: Chained,
        results: Sequence[Var],
        asked: Sequence[int],
        guarded: bool,
        operands: Sequence[Array],
        cts: Sequence[Array],
    ) -> list[Array]:
        """Pulls through one branch; zeros for operands that it does not read."""
        graph, known = chained.graph, dict(zip(results, cts, strict=True))
        due: Values = {}
        for v, outer in zip(graph.outvars, self.eqn.outvars, strict=True):
            if is_var(v) and outer in known:
                due[v] = due[v] + known[outer] if v in due else known[outer]
        values = dict(zip(graph.invars, operands, strict=True))
        inner = [graph.invars[i] for i in asked]
        wanted = {*inner, DRIFT} if guarded else {*inner}
        found = chained.pull(values, [], False, due, wanted)
        outs = [found[v] if v in found else jnp.zeros_like(values[v]) for v in inner]
        if guarded:
            readings = found.get(DRIFT, jnp.zeros(0, jnp.float32))
            outs.append(jnp.max(readings, keepdims=True, initial=0.0))
        return outs
