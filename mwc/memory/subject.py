"""One function, its arguments, and every way to differentiate it, ready to compile.

What tables, timelines, curves and depths have in common: a method's name in, the
differentiated program or the compiler's figures of it out. Placements of checkpoints
that a search found for a target are kept.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from mwc.errors import MoonwalkValueError
from mwc.memory import baselines, compiling, targets
from mwc.memory.emitted import emitted
from mwc.memory.inputs import FlatCall
from passes import flops

BASELINES = ("backprop", "checkpoint", "checkpoint-2")
METHODS = (*BASELINES, "moonwalk")


@dataclasses.dataclass(frozen=True)
class Subject:
    """A function with its arguments, and the ways to differentiate it.

    Attributes:
      fun: the undecorated function.
      ours: decorated ones by the label of their row.
      args: arrays or `ShapeDtypeStruct`s, with shardings or without; leaves that are
        neither are static.
      kwargs: keyword arguments, likewise.
      argnums: the arguments to differentiate in.
      has_aux: whether the function returns (loss, auxiliary results).
      static_argnums: positional arguments that stay inside the function.
      static_argnames: keyword arguments that do.
      value: False takes `jax.grad` in place of `jax.value_and_grad`.
      tries: most compilations for each level of checkpoints.
    """

    fun: Callable[..., Any]
    ours: Mapping[str, Callable[..., Any]]
    args: Sequence[Any]
    kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    argnums: int | Sequence[int] = 0
    has_aux: bool = False
    static_argnums: Sequence[int] = ()
    static_argnames: Sequence[str] = ()
    value: bool = True
    tries: int = 6

    def chosen(self, methods: Sequence[str] | None) -> list[str]:
        """The methods wanted, all that there are for None.

        Raises:
          MoonwalkValueError: an unknown method.
        """
        known = (*BASELINES, *self.ours)
        methods = (methods,) if isinstance(methods, str) else methods
        wanted = list(known if methods is None else methods)
        unknown = [m for m in wanted if m not in known]
        if unknown:
            raise MoonwalkValueError(
                f"the method {unknown[0]!r} is unknown",
                expected="some of " + ", ".join(map(repr, known)),
            )
        return wanted

    @functools.cached_property
    def call(self) -> FlatCall:
        """The call, flattened."""
        static = self.static_argnums, self.static_argnames
        return FlatCall(self.args, self.kwargs, self.argnums, self.has_aux, *static)

    @functools.cached_property
    def form(self) -> baselines.Checkpointed:
        """The checkpointed forms of the function."""
        return baselines.Checkpointed(self.call.bind(self.fun), self.call.specs)

    @functools.cached_property
    def _layouts(self) -> dict[tuple[str, targets.Target], baselines.Layout]:
        return {}

    def devices(self) -> int:
        """How many devices the arguments are sharded over."""
        found = [s.sharding.mesh.size for s in self.call.specs if s.sharding]
        return max(found, default=1)

    def figures(
        self, method: str, target: targets.Target, live: bool = False
    ) -> tuple[dict[str, Any], str]:
        """The compiler's figures of one method, and how checkpoints were placed."""
        if method in BASELINES[1:]:
            return self._checkpointed(method, target, live)
        fun = self.ours.get(method, self.fun)
        return self._compiled(self.call.bind(fun), target, live), ""

    def _checkpointed(
        self, method: str, target: targets.Target, live: bool
    ) -> tuple[dict[str, Any], str]:
        layout = self._layouts.get((method, target))
        if layout is None:
            compiled = functools.partial(self._compiled, target=target, live=False)
            found = baselines.search(self.form, level(method), compiled, self.tries)
            layout, figures = found
            self._layouts[method, target] = layout
            if not live:
                return figures, str(layout)
        return self._compiled(self.form.fun(layout), target, live), str(layout)

    def _compiled(
        self, flat: baselines.Flat, target: targets.Target, live: bool
    ) -> dict[str, Any]:
        start = time.perf_counter()
        jitted = jax.jit(self.call.gradient(flat, self.value))
        jaxpr = jitted.trace(*self.call.specs).jaxpr
        traced = time.perf_counter() - start
        count = flops.flops(jaxpr, emitted)
        found = compiling.compile_for(target, jitted, self.call.specs, live)
        return {**found, "flops": count.total, "trace_seconds": traced}

    def layout(self, method: str) -> baselines.Layout:
        """The placement of checkpoints that byte counts alone favour."""
        grid, (row, column) = self.form.layouts(level(method))
        return grid[row][column]

    def extra_forwards(self, method: str) -> float:
        """Forward passes beyond backpropagation's three, for a baseline."""
        plain = self.call.bind(self.fun)
        flat = plain if method == "backprop" else self.form.fun(self.layout(method))
        one = self._flops(plain)
        whole = self._flops(self.call.gradient(flat, self.value))
        return (whole / one if one else 3.0) - 3.0

    def _flops(self, flat: baselines.Flat) -> int:
        count = flops.flops(jax.jit(flat).trace(*self.call.specs).jaxpr)
        return count.matrix or count.total

    def plan(self, method: str) -> Any:
        """The plan behind a method; None if it has none."""
        planned = getattr(self.ours.get(method), "plan", None)
        return planned(*self.args, **self.kwargs) if planned else None


def level(method: str) -> int:
    """How many levels of checkpoints a method has."""
    return BASELINES.index(method)
