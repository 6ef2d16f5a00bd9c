"""The engine: a jaxpr in, a program that can be run forwards and backwards out.

    trace -> normalise -> activity -> chain -> residuals -> schedule -> emit

Each arrow is a pass (`passes`) or a class of `mwc`; `mwc._assemble` calls them in
order. Differentiating an emitted program gives wrong numbers: that is the business of
`mwc._primitives`, which uses the mathematical derivative.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from mwc._assemble import Assembly
from mwc._describe import describe, guarded_rows
from mwc._plan import Plan
from mwc.chained import Chained
from mwc.errors import MoonwalkUnsupportedError
from mwc.stages import DRIFT
from passes import _jax
from passes.depend import carries_tangent
from passes.fixed import measured
from passes.graph import Graph, Var, is_var, read
from passes.inline import inline
from passes.linearise import is_inexact
from passes.vijps import marked

Array = Any


def build(
    jaxpr: Any, roles: Sequence[str], options: Any, captured: Sequence[Any] = ()
) -> Emitted:
    """Compiles a function.

    Args:
      jaxpr: a closed jaxpr without constants.
      roles: "parameter" or "data" for each of its inputs.
      options: the decorator's options (`mwc._options.Options`).
      captured: the arrays that its first inputs are at every call.

    Returns:
      The program with its plan.
    """
    graph = marked(inline(jaxpr))
    parameters = [
        v for v, r in zip(graph.invars, roles, strict=True) if r == "parameter"
    ]
    same = dict(zip(graph.invars, captured, strict=False))
    assembly, still = _assembled(graph, parameters, options, same)
    extra = 2.0 if options.extra_forwards is None else options.extra_forwards
    chained, decision = assembly.schedule(extra)
    plan = describe(chained, decision, jaxpr, roles, options.strict)
    return Emitted(jaxpr, chained, plan, guarded_rows(chained.node), still)


def _assembled(
    graph: Graph, parameters: Sequence[Var], options: Any, captured: dict[Var, Any]
) -> tuple[Assembly, dict[Var, Any]]:
    """The program, and inputs that it cannot be differentiated in.

    Those are data that reach an equation without a reverse mode, each with that
    equation, where the program cannot be differentiated in all of its inputs.
    """
    more = options, measured(captured), captured
    try:
        return Assembly(graph, parameters, graph.invars, *more), {}
    except (NotImplementedError, TypeError, ValueError):
        stuck = [eqn for eqn in graph.eqns if _jax.has_no_reverse(eqn)]
        still: dict[Var, Any] = {}
        for v in graph.invars:
            moving = carries_tangent(graph, [v], is_inexact)
            ends = [
                e for e in stuck if any(is_var(x) and x in moving for x in e.invars)
            ]
            if ends and v not in parameters:
                still[v] = ends[0]
        if not still:
            raise
        sources = [v for v in graph.invars if v not in still]
        return Assembly(graph, parameters, sources, *more), still


@dataclasses.dataclass(frozen=True, eq=False)
class Emitted:
    """A compiled function; see `mwc._program.Program`."""

    jaxpr: Any
    chained: Chained
    plan: Plan
    guarded: tuple[int, ...]
    still: dict[Var, Any]

    def forward(
        self, active: tuple[bool, ...], args: Sequence[Array]
    ) -> tuple[list[Array], list[Array]]:
        """Results and saved values."""
        graph = self.chained.graph
        values = dict(zip(graph.invars, args, strict=True))
        saved = self.chained.forward(values, self._reached(active))
        return [read(values, v) for v in graph.outvars], saved

    def backward(
        self,
        active: tuple[bool, ...],
        wanted: tuple[bool, ...],
        args: Sequence[Array],
        saved: Sequence[Array],
        cts: Sequence[Array | None],
        drift: bool = False,
    ) -> list[Array]:
        """Cotangents of the wanted arguments, then readings of the guards."""
        graph = self.chained.graph
        for v, w in zip(graph.invars, wanted, strict=True):
            if w and v in self.still:
                self._refuse(self.still[v])
        values = dict(zip(graph.invars, args, strict=True))
        asked = self._reached(wanted) | ({DRIFT} if drift else set())
        due: dict[Var, Array] = {}
        for v, ct in zip(graph.outvars, cts, strict=True):
            if ct is not None and is_var(v) and v in asked:
                due[v] = due[v] + ct if v in due else ct
        self.chained.backward(values, saved, self._reached(active), asked, due)
        found = [
            due[v] if v in due else _jax.zeros(v.aval.shape, v.aval.dtype, v.aval)
            for v, w in zip(graph.invars, wanted, strict=True)
            if w
        ]
        readings = due.get(DRIFT, jnp.zeros(len(self.guarded), jnp.float32))
        return [*found, readings] if drift else found

    def _refuse(self, eqn: Any) -> None:
        raise MoonwalkUnsupportedError(
            f"{eqn.primitive} has no reverse mode, and a gradient is asked for that "
            "leads through it",
            expected="gradients of arguments that do not reach it",
            remedy="stop_gradient what enters it, or use jax.lax.fori_loop or scan",
            source=_jax.source_line(eqn),
        )

    def _reached(self, flags: tuple[bool, ...]) -> set[Var]:
        pairs = zip(self.chained.graph.invars, flags, strict=True)
        return self.chained.reached([v for v, f in pairs if f])
