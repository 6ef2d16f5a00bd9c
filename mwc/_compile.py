"""The decorator: tracing, the cache of programs, and the object that users hold."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mwc import _trace
from mwc._check import CheckReport, check
from mwc._options import Options, make_options
from mwc._primitives import call_p
from mwc._site import Site
from mwc._spec import Spec
from mwc._trace import Signature, is_array, is_differentiable, unwrap, wrap
from mwc.errors import MoonwalkTypeError
from passes import _jax

# More shapes than this for one function, and the programs are made again.
_MOST_SPECS = 256


class Drift(NamedTuple):
    """What the guards of a plan read.

    Attributes:
      tripped: whether a limit was passed.
      worst: the worst reading as a fraction of its limit.
      stage: the stage of the worst reading, -1 where no stage has a guard.
    """

    tripped: Any
    worst: Any
    stage: Any


class _Shared:
    """What a decorated function and its bound methods have in common."""

    def __init__(
        self,
        fun: Callable[..., Any],
        signature: Signature,
        options: Options,
        argnums: int | tuple[int, ...],
        has_aux: bool,
    ):
        self.fun = fun
        self.signature = signature
        self.options = options
        self.argnums = argnums
        self.has_aux = has_aux
        self.specs: dict[Any, Spec] = {}
        self.jitted = self.jit(lambda *a, **k: wrap(fun(*unwrap(a), **unwrap(k))))
        self.gradients: dict[int, Any] = {}

    def jit(self, fun: Callable[..., Any]) -> Any:
        return jax.jit(
            functools.wraps(self.fun, updated=())(fun),
            static_argnums=self.signature.static_nums or None,
            static_argnames=self.signature.static_names or None,
        )

    def prepared(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any], list[Any]]:
        """Arguments fit for jit, and the leaves that it traces."""
        signature = self.signature
        dynamic = args, kwargs
        if signature.static_nums or signature.static_names:
            signature.check_static(args, kwargs)
            dynamic = signature.dynamic(args, kwargs)
        leaves = jax.tree.leaves(dynamic)
        if all(map(is_array, leaves)):
            return args, kwargs, leaves
        for leaf in leaves:
            if not is_array(leaf):
                signature.check_hashable("a leaf of the arguments", leaf)
        nums = {n % len(args) for n in signature.static_nums if n < len(args)}
        args = tuple(a if i in nums else wrap(a) for i, a in enumerate(args))
        names = signature.static_names
        kwargs = {k: v if k in names else wrap(v) for k, v in kwargs.items()}
        return args, kwargs, [leaf for leaf in leaves if is_array(leaf)]

    def spec(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], bound: int
    ) -> tuple[Spec, Any, list[Any]]:
        """The spec of a call, jit's trace of it, and its captured values."""
        traced = _trace.traced(self.jitted, self.signature, args, kwargs)
        key = traced.jaxpr
        if key not in self.specs:
            indices = _trace.positions(self.argnums, args, self.signature, bound)
            if len(self.specs) >= _MOST_SPECS:
                self.specs.clear()
            jaxpr = _jax.hoisted(traced)
            roles = ["data"] * len(_jax.captured(traced))
            roles += self._roles(args, kwargs, {*range(bound), *indices})
            build = functools.partial(_build, jaxpr, tuple(roles), self.options)
            name, source = self.signature.name, self.signature.source
            # The key is kept by the spec's entry, so that its identity stays its own.
            self.specs[key] = Spec(jaxpr, build, name=name, source=source)
        return self.specs[key], traced, _jax.captured(traced)

    def _roles(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], indices: set[int]
    ) -> list[str]:
        static = {n % len(args) for n in self.signature.static_nums if n < len(args)}
        roles = []
        for index, arg in enumerate(args):
            if index not in static:
                role = "parameter" if index in indices else "data"
                roles += [role] * len(jax.tree.leaves(arg))
        _, dynamic = self.signature.dynamic(args, kwargs)
        return roles + ["data"] * len(jax.tree.leaves(dynamic))

    def __call__(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], bound: int
    ) -> Any:
        if jax.config.jax_disable_jit:
            # As jit does then: plain Python, in which values can be looked at.
            return self.fun(*args, **kwargs)
        args, kwargs, leaves = self.prepared(args, kwargs)
        spec, traced, captured = self.spec(args, kwargs, bound)
        leaves = [x if isinstance(x, jax.Array) else jnp.asarray(x) for x in leaves]
        outs = call_p.bind(*captured, *leaves, site=Site(spec), jaxpr=spec.jaxpr)
        return unwrap(jax.tree.unflatten(traced.out_tree, outs))


def _build(jaxpr: Any, roles: tuple[str, ...], options: Options) -> Any:
    # The engine imports much that a function never differentiated does not need.
    from mwc import _engine

    return _engine.build(jaxpr, roles, options)


class Compiled:
    """A function whose gradients need less memory; its values are unchanged.

    Made by `moonwalk_compile`. Calling it is calling the function, and every
    transformation of JAX applies.
    """

    def __init__(self, shared: _Shared, bound: tuple[Any, ...] = ()):
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
        full, named, _ = self._shared.prepared((*self._bound, *args), kwargs)
        spec, _, _ = self._shared.spec(full, named, len(self._bound))
        return spec.program.plan

    def check(
        self, *args: Any, batch_axis: int | None = None, **kwargs: Any
    ) -> CheckReport:
        """Compares the gradients with backpropagation through the plain function.

        Args:
          *args: concrete arrays.
          batch_axis: not used while the reference, which is checkpointed, fits.
          **kwargs: the same.

        Returns:
          A report with `.ok` and the worst leaf.
        """
        del batch_axis
        full = (*self._bound, *args)
        return check(self, lambda: self._reference(full, kwargs), args, kwargs)

    def memory(self, *args: Any, target: Any = None, **kwargs: Any) -> Any:
        """Compiled memory of this function and of the usual alternatives.

        Args:
          *args: arrays or `jax.ShapeDtypeStruct`s.
          target: None for the current backend, or the name of a device.
          **kwargs: the same.

        Returns:
          A report (`mwc.memory.MemoryReport`).
        """
        from mwc import memory

        plain = functools.partial(self._shared.fun, *self._bound)
        return memory.measure(plain, self, args, kwargs, target=target)

    def _reference(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        shared = self._shared
        plain = Gradients(shared, len(self._bound), jax.checkpoint(shared.fun))
        return unwrap(jax.jit(lambda: wrap(plain(args, kwargs)))())


class Gradients:
    """Value and gradients of the differentiable leaves of some arguments."""

    def __init__(self, shared: _Shared, bound: int, fun: Callable[..., Any]):
        self.shared = shared
        self.bound = bound
        self.fun = fun

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Returns (value or (value, aux), gradients)."""
        signature, argnums = self.shared.signature, self.shared.argnums
        indices = _trace.positions(argnums, args, signature, self.bound)
        missing = [i for i in indices if i >= len(args)]
        if missing:
            raise MoonwalkTypeError(
                f"argnums={argnums!r} names an argument of {signature.name} that was "
                "not given positionally",
                remedy="pass what is differentiated by position, as for jax.grad",
                source=signature.source,
            )
        chosen = [args[i] for i in indices]
        self._check_arguments(chosen)
        leaves, tree = jax.tree.flatten(chosen)
        flags = [is_differentiable(leaf) for leaf in leaves]

        def loss(moving: list[Any]) -> Any:
            rest = iter(moving)
            pairs = zip(leaves, flags, strict=True)
            new = jax.tree.unflatten(tree, [next(rest) if f else x for x, f in pairs])
            full = list(args)
            for index, value in zip(indices, new, strict=True):
                full[index] = value
            out = self.fun(*full, **kwargs)
            return self._split(out)

        moving = [x for x, f in zip(leaves, flags, strict=True) if f]
        value, found = jax.value_and_grad(loss, has_aux=True)(moving)
        rest = iter(found)
        grads = jax.tree.unflatten(tree, [next(rest) if f else None for f in flags])
        result = value if self.shared.has_aux else value[0]
        return result, grads[0] if isinstance(argnums, int) else tuple(grads)

    def _split(self, out: Any) -> tuple[Any, tuple[Any, Any]]:
        signature, aux = self.shared.signature, None
        if self.shared.has_aux:
            if not (isinstance(out, (tuple, list)) and len(out) == 2):
                raise MoonwalkTypeError(
                    f"{signature.name} returned {type(out).__name__}",
                    expected="a pair (value, aux), because has_aux=True",
                    source=signature.source,
                )
            out, aux = out
        shape = [getattr(x, "shape", ()) for x in jax.tree.leaves(out)]
        if not is_array(out) or shape != [()]:
            raise MoonwalkTypeError(
                f"{signature.name} returned {_describe(out)}",
                expected="one scalar to differentiate",
                remedy="reduce it with a sum or mean; return anything else as aux, "
                "with has_aux=True",
                source=signature.source,
            )
        if not jnp.issubdtype(jnp.result_type(out), jnp.floating):
            raise MoonwalkTypeError(
                f"{signature.name} returned a scalar of type {jnp.result_type(out)}",
                expected="a real floating-point scalar",
                remedy="cast the loss, for example with .astype(float)",
                source=signature.source,
            )
        return out, (out, aux)

    def _check_arguments(self, chosen: Sequence[Any]) -> None:
        signature, argnums = self.shared.signature, self.shared.argnums
        nums = [argnums] if isinstance(argnums, int) else list(argnums)
        for num, arg in zip(nums, chosen, strict=True):
            leaves = jax.tree.leaves(arg)
            if any(map(is_differentiable, leaves)):
                continue
            kinds = sorted({_describe(leaf) for leaf in leaves}) or ["nothing"]
            raise MoonwalkTypeError(
                f"argument {num} of {signature.name}, named by argnums, has no "
                f"differentiable leaf: it holds {', '.join(kinds)}",
                expected="at least one floating-point array",
                remedy="name the parameters in argnums, or cast them",
                source=signature.source,
            )


def _describe(value: Any) -> str:
    if is_array(value):
        return f"{jnp.result_type(value)}{list(jnp.shape(value))}"
    return type(value).__name__


class ValueAndGrad:
    """`loss.value_and_grad`: jitted value and gradients, with `.lower`."""

    def __init__(self, shared: _Shared, bound: tuple[Any, ...]):
        self._shared = shared
        self._bound = bound

    def _jitted(self) -> Any:
        shared, count = self._shared, len(self._bound)
        if count not in shared.gradients:
            inner = Gradients(shared, count, lambda *a, **k: shared(a, k, count))

            def run(*args: Any, **kwargs: Any) -> Any:
                return wrap(inner(*unwrap((args, kwargs))))

            shared.gradients[count] = shared.jit(run)
        return shared.gradients[count]

    def __call__(self, *args: Any, with_drift: bool = False, **kwargs: Any) -> Any:
        """Returns (value, gradients), or (value, gradients, drift)."""
        full, named, _ = self._shared.prepared((*self._bound, *args), kwargs)
        value, grads = unwrap(self._jitted()(*full, **named))
        if not with_drift:
            return value, grads
        return value, grads, Drift(jnp.array(False), jnp.array(0.0), jnp.array(-1))

    def lower(self, *args: Any, **kwargs: Any) -> Any:
        """JAX's own `Lowered` object of the jitted function."""
        full, named, _ = self._shared.prepared((*self._bound, *args), kwargs)
        return self._jitted().lower(*full, **named)


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
      The decorated function, with `value_and_grad`, `plan`, `check` and `memory`.

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
        return Compiled(_Shared(function, signature, options, nums, has_aux))

    return decorate if fun is None else decorate(fun)


def _check_argnums(argnums: Any) -> int | tuple[int, ...]:
    nums = (argnums,) if isinstance(argnums, int) else argnums
    good = isinstance(nums, Sequence) and not isinstance(nums, str) and len(nums) > 0
    if not good or any(isinstance(n, bool) or not isinstance(n, int) for n in nums):
        raise MoonwalkTypeError(
            f"argnums is {argnums!r}", expected="an integer or a sequence of integers"
        )
    return argnums if isinstance(argnums, int) else tuple(argnums)
