"""`mwc.custom_vijp` and `mwc.register_vijp`: the user's own inverses.

Both put the user's map between two marks (`passes.declared`) that carry the rule and
what it reads, so the compiler finds it wherever the map stands, under `vmap` and in
loops as well. Without the compiler nothing changes: the marks are identities. What a
rule returns is checked by the guard like any rebuilt cotangent. Source: DESIGN
section 9. Limits: the state is the first argument; a custom function has no forward
mode of its own, as `jax.custom_vjp` has none.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from mwc import _trace
from mwc.errors import MoonwalkTypeError, MoonwalkValueError
from passes import vijps
from passes.declared import Vijp, declare

Array = Any


class CustomVijp:
    """A function with its own vector-inverse-Jacobian product; see `custom_vijp`."""

    def __init__(self, fun: Callable[..., Array]):
        functools.update_wrapper(self, fun, updated=())
        self._fun = fun
        self._signature = _trace.signature_of(fun)
        self._rules: tuple[Callable[..., Any], ...] | None = None
        self._seen: set[Any] = set()

    def defvijp(
        self,
        fwd: Callable[..., Any],
        vjp: Callable[..., Array],
        vijp: Callable[..., Array],
    ) -> None:
        """Gives the rules; params is the tuple of the further arguments.

        Args:
          fwd: (x, *params) -> (y, residuals), residuals a pytree of arrays.
          vjp: (residuals, params, h_out) -> h_in, of x's shape and dtype.
          vijp: (residuals, params, h_in) -> h_out, of y's shape and dtype, with
            vjp(residuals, params, h_out) = h_in for every h_in that vjp can give.
        """
        self._rules = fwd, vjp, vijp
        self._seen.clear()

    def __call__(self, x: Array, *params: Any) -> Array:
        """The function's value."""
        if self._rules is None:
            raise MoonwalkValueError(
                f"{self._signature.name} has no rules yet",
                remedy="call .defvijp(fwd, vjp, vijp) before it is used",
                source=self._signature.source,
            )
        fwd, vjp, vijp = self._rules
        x = jnp.asarray(x)
        leaves, tree = jax.tree.flatten(params)
        key = (*map(jax.typeof, (x, *leaves)), tree)
        if key not in self._seen:
            self._check(x, params)
            self._seen.add(key)
        inside = declare(x, side="in", what="vijp")
        y, kept = _differentiated(self._fun, fwd, vjp)(inside, *params)
        held, shape = jax.tree.flatten((kept, params))
        held = [lax.stop_gradient(r) for r in held]

        def rebuild(flat: list[Array], h_in: Array) -> Array:
            residuals, given = jax.tree.unflatten(shape, flat)
            return vijp(residuals, given, h_in)

        rule = Vijp(rebuild, "generic", self._signature.name)
        return declare(y, side="out", what="vijp", rule=rule, residuals=held)

    def _check(self, x: Array, params: tuple[Any, ...]) -> None:
        """Raises where a rule returns what it must not."""
        assert self._rules is not None
        fwd, vjp, vijp = self._rules
        y = jax.eval_shape(self._fun, x, *params)
        found, kept = jax.eval_shape(fwd, x, *params)
        self._same("fwd", found, y)
        self._same("vjp", jax.eval_shape(vjp, kept, params, y), x)
        self._same("vijp", jax.eval_shape(vijp, kept, params, x), y)

    def _same(self, rule: str, found: Any, expected: Any) -> None:
        _same(
            f"the {rule} rule of {self._signature.name}", found, expected, self.source
        )

    @property
    def source(self) -> str | None:
        """The user's place of the function."""
        return self._signature.source


def custom_vijp(fun: Callable[..., Array]) -> CustomVijp:
    """A function of a state and parameters whose backward the user inverts.

    Args:
      fun: (x, *params) -> y, arrays; differentiated by JAX in the params.

    Returns:
      A function with `.defvijp(fwd, vjp, vijp)`.
    """
    return CustomVijp(fun)


def register_vijp(
    primitive: Any,
    vijp: Callable[..., Array],
    *,
    residuals: Callable[..., Any] | None = None,
    verdict: str | None = None,
) -> None:
    """Tells the compiler how to invert the derivative of a primitive.

    Args:
      primitive: a `jax.extend.core.Primitive` with one result, differentiated with
        respect to its first operand.
      vijp: (h_in, residuals, **params) -> h_out, of the result's shape and dtype.
      residuals: (*operands, **params) -> a pytree of arrays; None keeps nothing.
      verdict: "structural" if the Jacobian has full row rank for every parameter,
        None or "generic" if for almost every one.

    Raises:
      MoonwalkTypeError: the primitive is none, or has several results.
      MoonwalkValueError: the verdict is unknown.
    """
    if not hasattr(primitive, "bind") or getattr(primitive, "multiple_results", True):
        raise MoonwalkTypeError(
            f"register_vijp was given {primitive!r}",
            expected="a jax.extend.core.Primitive with one result",
        )
    if verdict not in (None, "structural", "generic"):
        raise MoonwalkValueError(
            f"register_vijp was given verdict={verdict!r}",
            expected="'structural', 'generic' or None",
        )

    def check(name: str, found: Any, expected: Any, source: str) -> None:
        _same(f"the vijp rule of primitive {name!r}", found, expected, source)

    vijps.register(primitive, vijps.Rule(vijp, residuals, verdict or "generic", check))


def _same(what: str, found: Any, expected: Any, source: str | None) -> None:
    one = getattr(found, "shape", None), getattr(found, "dtype", None)
    if one != (expected.shape, expected.dtype):
        raise MoonwalkTypeError(
            f"{what} returned {_show(found)}",
            expected=_show(expected),
            remedy="a cotangent has the shape and dtype of its value",
            source=source,
        )


def _show(x: Any) -> str:
    if hasattr(x, "shape"):
        return f"{x.dtype}{list(x.shape)}"
    return type(x).__name__


@functools.lru_cache(maxsize=256)
def _differentiated(
    fun: Callable[..., Array], fwd: Callable[..., Any], vjp: Callable[..., Array]
) -> Callable[..., Any]:
    """(y, residuals) with the user's cotangent of x and JAX's of the params."""

    @jax.custom_vjp
    def both(x: Array, *params: Any) -> Any:
        return fwd(x, *params)

    def forward(x: Array, *params: Any) -> Any:
        y, kept = fwd(x, *params)
        return (y, kept), (kept, x, params)

    def backward(saved: Any, cts: Any) -> Any:
        (kept, x, params), h_out = saved, cts[0]
        _, pull = jax.vjp(lambda *p: fun(x, *p), *params)
        return vjp(kept, params, h_out), *pull(h_out)

    both.defvjp(forward, backward)
    return both
