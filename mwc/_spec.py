"""One traced function: its program, and every trace made of it, kept once.

A `Spec` belongs to a decorated function at one set of shapes. It builds the
program when a derivative is first asked for, and turns the program's methods into
jaxprs (one for each combination of masks and input types), so that abstract
evaluation, dead code elimination and lowering share one trace of the emitted code.
Engine code therefore never sees a batching or differentiation tracer: it is called
once under a fresh trace, at the shapes of one lane, and JAX transforms the result.

Debug callbacks run where the function itself is evaluated (`call`, `forward`) and
are taken out of everything else: a recomputation must not print again.

Limits: a spec keeps its traces as long as it lives, and lives as long as the
decorated function does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp

from mwc._levels import Dependence
from mwc._program import Program
from mwc.errors import MoonwalkUnsupportedError
from passes import _jax

Mask = tuple[bool, ...]


class Spec:
    """A closed jaxpr without constants and what differentiates it.

    Attributes:
      jaxpr: the function as traced.
      name: the user's name of it.
      source: the user's place of it, "file.py:12 (function)".
    """

    def __init__(
        self,
        jaxpr: Any,
        build: Callable[[], Program],
        *,
        name: str = "function",
        source: str | None = None,
    ):
        self.jaxpr = jaxpr
        self.name = name
        self.source = source
        self._build = build
        self._mesh = jax.sharding.get_abstract_mesh()
        self._traces: dict[Any, Any] = {}
        self._layout: dict[Mask, Any] = {}
        self.compiled: dict[Any, Callable[..., list[Any]]] = {}

    def __repr__(self) -> str:
        return f"Spec({self.name})"

    @cached_property
    def program(self) -> Program:
        """The sweeps; built, and the effects judged, at the first derivative."""
        refused = _jax.refused_effects(self.jaxpr)
        if refused:
            names = ", ".join(sorted(str(effect) for effect in refused))
            raise MoonwalkUnsupportedError(
                f"{self.name} has side effects that cannot be differentiated: {names}",
                expected="a function whose only side effects are debug callbacks",
                remedy="return the values and act on them outside, or use jax.debug",
                source=self._effect_source(refused),
            )
        if self._mesh.empty or self._mesh == jax.sharding.get_abstract_mesh():
            return self._build()
        # A plan may be asked for where other axes are in force than the types have.
        with jax.sharding.use_abstract_mesh(self._mesh):
            return self._build()

    def _effect_source(self, refused: set[Any]) -> str | None:
        body, _ = _jax.opened(self.jaxpr)
        for eqn in body.eqns:
            if refused & set(eqn.effects):
                return _jax.source_line(eqn)
        return self.source

    @cached_property
    def pure(self) -> Any:
        """The function without its debug callbacks."""
        return _jax.without_debug(self.jaxpr)

    @cached_property
    def depends(self) -> Dependence:
        """Which arguments each result depends on."""
        return Dependence(self.jaxpr)

    @cached_property
    def has_custom_vjp(self) -> bool:
        """Whether a rule for reverse mode alone is somewhere inside."""
        return any("custom_vjp" in name for name in self._names)

    @cached_property
    def has_custom_rule(self) -> bool:
        """Whether a derivative inside is declared by the user."""
        return any("custom_" in name for name in self._names)

    @cached_property
    def _names(self) -> set[str]:
        return _primitive_names(self.jaxpr)

    @property
    def in_avals(self) -> Sequence[Any]:
        """Types of the arguments."""
        return self.jaxpr.in_avals

    @property
    def out_avals(self) -> Sequence[Any]:
        """Types of the results."""
        return self.jaxpr.out_avals

    def trace(self, key: Any, fun: Callable[..., list[Any]], avals: Sequence[Any]):
        """The jaxpr of a flat function at input types, from the cache if it is known.

        Args:
          key: what `fun` is, apart from its input types and the ambient settings.
          fun: the function.
          avals: its input types.
        """
        full_key = (key, tuple(avals), _jax.trace_context())
        if full_key not in self._traces:
            self._traces[full_key] = jax.make_jaxpr(fun)(*avals)
        return self._traces[full_key]

    def forward(self, active: Mask, avals: Sequence[Any] | None = None) -> Any:
        """The jaxpr of the program's forward sweep: results, then saved values."""

        def fun(*args: Any) -> list[Any]:
            outs, saved = self.program.forward(active, args)
            return [*outs, *saved]

        jaxpr = self.trace(("forward", active), fun, avals or self.in_avals)
        self._layout.setdefault(active, jaxpr)
        return jaxpr

    def _any_forward(self, active: Mask) -> Any:
        # What is saved depends on the masks alone, so that any trace will do; the
        # ambient settings of the caller (dead code elimination, say) may be others
        # than those under which the function can be traced.
        return self._layout.get(active) or self.forward(active)

    def saved_avals(self, active: Mask) -> list[Any]:
        """Types of the saved values."""
        return list(self._any_forward(active).out_avals[len(self.out_avals) :])

    def saved_depends(self, active: Mask) -> Dependence:
        """Which arguments each result and each saved value depends on."""
        key = ("depends", active)
        if key not in self._traces:
            self._traces[key] = Dependence(self._any_forward(active))
        return self._traces[key]

    def backward(
        self,
        active: Mask,
        wanted: Mask,
        given: Mask,
        avals: Sequence[Any] | None = None,
    ) -> tuple[Any, list[bool]]:
        """The jaxpr of the program's backward sweep, dead code removed.

        Args:
          active: the arguments that `forward` knew to carry tangents.
          wanted: the arguments whose cotangents are asked for.
          given: the results that have a cotangent.
          avals: types of the arguments, all saved values, and given cotangents.

        Returns:
          A jaxpr of the inputs that are needed, and which those are.
        """
        count, saved = len(self.in_avals), len(self.saved_avals(active))

        def fun(*ins: Any) -> list[Any]:
            args, kept, some = (
                ins[:count],
                ins[count : count + saved],
                ins[count + saved :],
            )
            rest = iter(some)
            cts = [next(rest) if has else None for has in given]
            asked = [x for x, want in zip(args, wanted, strict=True) if want]
            if not any(given):
                return [jnp.zeros_like(x) for x in asked]
            outs = self.program.backward(active, wanted, args, kept, cts)
            pairs = zip(outs, asked, strict=True)
            return [_jax.match_aval(ct, jax.typeof(x)) for ct, x in pairs]

        if avals is None:
            cts = [
                a.to_tangent_aval()
                for a, has in zip(self.out_avals, given, strict=True)
                if has
            ]
            avals = [*self.in_avals, *self.saved_avals(active), *cts]
        key = ("backward", active, wanted, given)
        jaxpr = self.trace(key, fun, avals)
        small = ("live", jaxpr)
        if small not in self._traces:
            pure = _jax.without_debug(jaxpr)
            self._traces[small] = _jax.dead_code(pure, [True] * sum(wanted))
        return self._traces[small]

    def swept(
        self, active: Mask, args: Sequence[Any]
    ) -> tuple[list[Any], list[Any], Any]:
        """Results, cotangents of active arguments, and readings of the guards.

        Args:
          active: the arguments that carry tangents; all of them are asked for.
          args: the flat arguments. The first result is what is differentiated.
        """
        count = len(self.in_avals)
        forward = self.forward(active, [jax.typeof(x) for x in args])
        both = _jax.run_jaxpr(forward, *args)
        outs, saved = both[: len(self.out_avals)], both[len(self.out_avals) :]

        def fun(*ins: Any) -> list[Any]:
            args, kept, ct = ins[:count], ins[count:-1], ins[-1]
            cts = [ct, *(None for _ in self.out_avals[1:])]
            found = self.program.backward(active, active, args, kept, cts, drift=True)
            asked = (jax.typeof(x) for x, a in zip(args, active, strict=True) if a)
            pairs = zip(found[:-1], asked, strict=True)
            return [*(_jax.match_aval(ct, aval) for ct, aval in pairs), found[-1]]

        one = jnp.ones((), self.out_avals[0].dtype)
        inputs = [*args, *saved, _jax.match_aval(one, jax.typeof(outs[0]))]
        avals = [jax.typeof(x) for x in inputs]
        jaxpr = _jax.without_debug(self.trace(("swept", active), fun, avals))
        *grads, readings = _jax.run_jaxpr(jaxpr, *inputs)
        return outs, grads, readings

    def needed(self, active: Mask, wanted: Mask, given: Mask) -> Mask:
        """The saved values that a backward sweep with these masks reads."""
        _, live = self.backward(active, wanted, given)
        count = len(self.in_avals)
        return tuple(live[count : count + len(self.saved_avals(active))])


def _primitive_names(jaxpr: Any) -> set[str]:
    body, _ = _jax.opened(jaxpr)
    names = {eqn.primitive.name for eqn in body.eqns}
    for eqn in body.eqns:
        for inner in _jax.sub_jaxprs(eqn):
            names |= _primitive_names(inner)
    return names
