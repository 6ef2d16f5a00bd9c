"""The decorator: tracing, the cache of programs, and the object that users hold."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax

from mwc import _trace
from mwc._check import CheckReport, check, first_part
from mwc._gradients import Gradients, ValueAndGrad
from mwc._options import make_options
from mwc._shared import Shared
from mwc._trace import unwrap, wrap
from mwc.errors import MoonwalkTypeError


class Compiled:
    """A function whose gradients need less memory; its values are unchanged.

    Made by `moonwalk_compile`. Calling it is calling the function, and every
    transformation of JAX applies.
    """

    def __init__(self, shared: Shared, bound: tuple[Any, ...] = ()):
        functools.update_wrapper(self, shared.fun, updated=())
        self._shared = shared
        self._bound = bound

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._shared((*self._bound, *args), kwargs, len(self._bound))

    def __get__(self, instance: Any, owner: type | None = None) -> Compiled:
        if instance is None:
            return self
        return Compiled(self._shared, (*self._bound, instance))

    def __repr__(self) -> str:
        return f"<moonwalk_compile of {self._shared.signature.name}>"

    @property
    def value_and_grad(self) -> ValueAndGrad:
        """The value and the gradients for `argnums`, jitted."""
        return ValueAndGrad(self._shared, self._bound)

    def plan(self, *args: Any, **kwargs: Any) -> Any:
        """What differentiating would keep and why; nothing is run.

        Args:
          *args: arrays or `jax.ShapeDtypeStruct`s.
          **kwargs: the same.

        Returns:
          The plan (`mwc.Plan`).
        """
        bound = self._bound
        return self._shared.spec((*bound, *args), kwargs, len(bound)).program.plan

    def check(
        self, *args: Any, batch_axis: int | None = None, **kwargs: Any
    ) -> CheckReport:
        """Compares the gradients with backpropagation through the plain function.

        The reference is checkpointed as a whole. Where it would not fit all the same,
        `batch_axis` compares on a part of the batch: both gradients are then those of
        the first eighth of the data (at least two entries) along that axis. Data is
        every array outside `argnums`; one is cut if it has the axis, with the size that
        most of the data has there, and others are passed whole.

        Args:
          *args: concrete arrays.
          batch_axis: the axis along which the data is cut, None to take all of it.
          **kwargs: the same.

        Returns:
          A report with `.ok` and the worst leaf.

        Raises:
          MoonwalkValueError: no data has the axis.
        """
        if batch_axis is not None:
            args, kwargs = self._part(args, kwargs, batch_axis)
        full = (*self._bound, *args)
        return check(self, lambda: self._reference(full, kwargs), args, kwargs)

    def _part(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], axis: int
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with a part of the batch."""
        shared, bound = self._shared, len(self._bound)
        signature, full = shared.signature, (*self._bound, *args)
        whole = {*range(bound), *(n % len(full) for n in signature.static_nums)}
        whole.update(_trace.positions(shared.argnums, full, signature, bound))
        data = {i: x for i, x in enumerate(full) if i not in whole}
        named = {k: x for k, x in kwargs.items() if k not in signature.static_names}
        data, named = first_part((data, named), axis, signature)
        full = tuple(data.get(i, x) for i, x in enumerate(full))
        return full[bound:], kwargs | named

    def memory(
        self,
        *args: Any,
        target: Any = None,
        extra_forwards: float | Sequence[float] = (),
        methods: Sequence[str] | None = None,
        progress: Callable[[str], None] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Compiled memory of this function and of the usual alternatives.

        Args:
          *args: arrays or `jax.ShapeDtypeStruct`s; shardings on a mesh are kept, and
            bytes are then those of one device.
          target: None for the current backend, the name of a device, or a description
            of one (`mwc.memory.targets.resolve`).
          extra_forwards: bounds of the extra time to plan for besides; each adds a row
            such as "moonwalk extra_forwards=1".
          methods: the rows wanted; all by default.
          progress: called with the name of each row as it begins.
          **kwargs: the same.

        Returns:
          A report (`mwc.memory.MemoryReport`).
        """
        asked = target, extra_forwards, methods, progress
        return self._measured(args, kwargs, *asked)[1]

    def _measured(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        target: Any,
        extra_forwards: float | Sequence[float],
        methods: Sequence[str] | None,
        progress: Callable[[str], None] | None,
    ) -> tuple[Any, Any]:
        """What was measured, and the report."""
        from mwc.memory import compiling, report, targets

        place = targets.resolve(target)
        compiling.check(place)
        one = isinstance(extra_forwards, int | float)
        bounds = (extra_forwards,) if one else extra_forwards
        ours = {"moonwalk": self, **self._bounded(bounds)}
        subject = self._subject(ours, args, kwargs)
        return subject, report.table(subject, place, methods, progress)

    def timeline(
        self,
        *args: Any,
        target: Any = None,
        methods: Sequence[str] = ("backprop", "checkpoint", "moonwalk"),
        progress: Callable[[str], None] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Bytes alive over the compiled program's schedule, and what they are.

        Args:
          *args: arrays or `jax.ShapeDtypeStruct`s.
          target: as in `memory`.
          methods: as in `memory`.
          progress: as in `memory`.
          **kwargs: the same.

        Returns:
          A timeline (`mwc.memory.Timeline`).
        """
        from mwc.memory.timeline import timeline

        subject = self._subject({"moonwalk": self}, args, kwargs)
        return timeline(subject, target, methods, progress)

    def pareto(
        self,
        *args: Any,
        target: Any = None,
        extra_forwards: Sequence[float] | None = None,
        progress: Callable[[str], None] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Plans from least time to least memory; nothing is compiled.

        Args:
          *args: arrays or `jax.ShapeDtypeStruct`s.
          target: compile all of them for it, as in `memory`; None predicts bytes.
          extra_forwards: the bounds of the extra time to plan for.
          progress: as in `memory`.
          **kwargs: the same.

        Returns:
          The curve (`mwc.memory.Pareto`).
        """
        from mwc.memory.pareto import BOUNDS, pareto

        bounds = BOUNDS if extra_forwards is None else tuple(extra_forwards)
        subject = self._subject(self._bounded(bounds), args, kwargs)
        return pareto(subject, bounds, target, progress)

    def report(
        self,
        path: str | os.PathLike[str],
        *args: Any,
        target: Any = None,
        extra_forwards: float | Sequence[float] = (),
        methods: Sequence[str] | None = None,
        progress: Callable[[str], None] | None = None,
        **kwargs: Any,
    ) -> None:
        """Plans, compiles under each method, and writes `Plan.report`'s HTML file.

        Args:
          path: where to; a name that ends in ".html".
          *args: arrays or `jax.ShapeDtypeStruct`s.
          target: as in `memory`.
          extra_forwards: as in `memory`.
          methods: as in `memory`; the timeline has those of them that `timeline` has.
          progress: as in `memory` and `timeline`.
          **kwargs: the same.

        Raises:
          MoonwalkError: as in `memory` and `Plan.report`.
        """
        from mwc import report
        from mwc.memory.timeline import timeline

        report.check_path(path)
        asked = target, extra_forwards, methods, progress
        subject, memory = self._measured(args, kwargs, *asked)
        compiled = [row.method for row in memory.rows if row.temp_bytes is not None]
        drawn = [m for m in ("backprop", "checkpoint", "moonwalk") if m in compiled]
        live = timeline(subject, target, drawn, progress) if drawn else None
        report.write(self.plan(*args, **kwargs), path, memory, live)

    def _bounded(self, bounds: Sequence[float]) -> dict[str, Compiled]:
        """The same function planned for other bounds of the extra time, by label."""
        return {
            f"moonwalk extra_forwards={bound:g}": self.with_options(
                extra_forwards=bound
            )
            for bound in bounds
        }

    def with_options(
        self,
        *,
        argnums: int | Sequence[int] | None = None,
        has_aux: bool | None = None,
        static_argnums: Sequence[int] | None = None,
        static_argnames: Sequence[str] | None = None,
        **options: Any,
    ) -> Compiled:
        """The same function, decorated with some options changed.

        Args:
          argnums: as in `moonwalk_compile`; here and below None leaves what it is.
          has_aux: likewise.
          static_argnums: likewise; with `static_argnames` they replace both.
          static_argnames: likewise.
          **options: the other options of `moonwalk_compile`, taken as they are.

        Returns:
          A decorated function.

        Raises:
          MoonwalkError: an option is wrong, or not implemented yet.
        """
        shared, signature = self._shared, self._shared.signature
        if static_argnums is not None or static_argnames is not None:
            bound = len(self._bound)
            nums = [n if n < 0 else n + bound for n in static_argnums or ()]
            signature = _trace.signature_of(shared.fun, nums, static_argnames or ())
        known = vars(shared.options) | options
        other = Shared(
            shared.fun,
            signature,
            make_options(**known),
            shared.argnums if argnums is None else _check_argnums(argnums),
            shared.has_aux if has_aux is None else has_aux,
        )
        return Compiled(other, self._bound)

    def _subject(
        self, ours: dict[str, Compiled], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """What the memory side measures (`mwc.memory.subject.Subject`)."""
        from mwc.memory.subject import Subject

        shared, bound = self._shared, self._bound
        return Subject(
            functools.partial(shared.fun, *bound) if bound else shared.fun,
            ours,
            args,
            kwargs,
            argnums=shared.argnums,
            has_aux=shared.has_aux,
            static_argnums=tuple(n - len(bound) for n in shared.signature.static_nums),
            static_argnames=shared.signature.static_names,
        )

    def _reference(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        shared = self._shared
        plain = Gradients(shared, len(self._bound), shared.checkpointed)
        return unwrap(jax.jit(lambda: wrap(plain(args, kwargs)))())


def moonwalk_compile(
    fun: Callable[..., Any] | None = None,
    *,
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    extra_forwards: float | None = None,
    memory_budget: int | str | None = None,
    strategies: Sequence[str] | None = None,
    policy: Callable[..., Any] | None = None,
    tolerance: float | None = None,
    on_drift: str | None = None,
    strict: bool = False,
    static_argnums: int | Sequence[int] = (),
    static_argnames: str | Sequence[str] = (),
    plan: Any = None,
) -> Any:
    """Compiles a function so that differentiating it needs less memory.

    Values and gradients are the function's own, to rounding. Usable bare, with
    options, and through `functools.partial`. A `jax.checkpoint_name` inside is not
    seen by a policy outside: pass `policy` here.

    Args:
      fun: the function; None returns a decorator.
      argnums: which arguments the plan treats as parameters, and
        `value_and_grad` differentiates; `jax.grad` may ask for any.
      has_aux: whether the function returns (value, aux).
      extra_forwards: the most time to spend, in forward passes beyond
        backpropagation's; None is 2.
      memory_budget: bytes that the plan must fit in.
      strategies: node kinds that the plan may use, None for all.
      policy: one of `jax.checkpoint_policies`, whose saves are forced.
      tolerance: the most error that rebuilding may add.
      on_drift: what a tripped guard gives.
      strict: whether an equation that has no rule is an error.
      static_argnums: as in `jax.jit`.
      static_argnames: as in `jax.jit`.
      plan: a plan made earlier.

    Returns:
      The decorated function, with `value_and_grad`, `plan`, `check`, `memory`,
      `timeline`, `pareto` and `report`.

    Raises:
      MoonwalkError: an option is wrong, or not implemented yet.
    """
    options = make_options(
        strategies,
        extra_forwards=extra_forwards,
        memory_budget=memory_budget,
        policy=policy,
        tolerance=tolerance,
        on_drift=on_drift,
        strict=strict,
        plan=plan,
    )
    nums = _check_argnums(argnums)

    def decorate(function: Callable[..., Any]) -> Compiled:
        if not callable(function):
            raise MoonwalkTypeError(
                f"moonwalk_compile was given {type(function).__name__}",
                expected="a function",
                remedy="options are keyword-only: moonwalk_compile(fun, argnums=1)",
            )
        signature = _trace.signature_of(function, static_argnums, static_argnames)
        return Compiled(Shared(function, signature, options, nums, has_aux))

    return decorate if fun is None else decorate(fun)


def _check_argnums(argnums: Any) -> int | tuple[int, ...]:
    nums = (argnums,) if isinstance(argnums, int) else argnums
    good = isinstance(nums, Sequence) and not isinstance(nums, str) and len(nums) > 0
    if not good or any(isinstance(n, bool) or not isinstance(n, int) for n in nums):
        raise MoonwalkTypeError(
            f"argnums is {argnums!r}", expected="an integer or a sequence of integers"
        )
    return argnums if isinstance(argnums, int) else tuple(argnums)
