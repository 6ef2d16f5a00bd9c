"""`loss.value_and_grad`: gradients of the differentiable leaves, jitted.

Leaves that cannot have a gradient (integers, keys, functions) get None in its place,
as equinox does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from mwc import _trace
from mwc._drift import no_drift, raise_if_tripped, swept
from mwc._shared import Shared
from mwc._trace import (
    is_array,
    is_differentiable,
    unwrap,
    without_static,
    wrap,
)
from mwc.errors import MoonwalkTypeError


class Gradients:
    """Value and gradients of the differentiable leaves of some arguments."""

    def __init__(self, shared: Shared, bound: int, fun: Callable[..., Any]):
        self.shared = shared
        self.bound = bound
        self.fun = fun

    def with_drift(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Returns (value or (value, aux), gradients, drift)."""
        self._chosen(args)
        found = swept(self.shared, args, kwargs, self.bound, self._split)
        if found is None:
            return *self(args, kwargs), no_drift()
        out, grads, drift = found
        value, aux = self._split(out)
        return (value, aux) if self.shared.has_aux else value, grads, drift

    def _chosen(self, args: tuple[Any, ...]) -> tuple[list[int], list[Any]]:
        """Positions and values of the arguments to differentiate."""
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
        return indices, chosen

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Returns (value or (value, aux), gradients)."""
        argnums = self.shared.argnums
        indices, chosen = self._chosen(args)
        leaves, tree = jax.tree.flatten(wrap(chosen))
        flags = [is_differentiable(leaf) for leaf in leaves]

        def loss(moving: list[Any]) -> Any:
            rest = iter(moving)
            pairs = zip(leaves, flags, strict=True)
            new = [next(rest) if f else x for x, f in pairs]
            new = unwrap(jax.tree.unflatten(tree, new))
            full = list(args)
            for index, value in zip(indices, new, strict=True):
                full[index] = value
            out = self.fun(*full, **kwargs)
            return self._split(out)

        moving = [x for x, f in zip(leaves, flags, strict=True) if f]
        (value, aux), found = jax.value_and_grad(loss, has_aux=True)(moving)
        rest = iter(found)
        grads = jax.tree.unflatten(tree, [next(rest) if f else None for f in flags])
        grads = without_static(grads)
        result = (value, aux) if self.shared.has_aux else value
        return result, grads[0] if isinstance(argnums, int) else tuple(grads)

    def _split(self, out: Any) -> tuple[Any, Any]:
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
        return out, aux

    def _check_arguments(self, chosen: Sequence[Any]) -> None:
        signature, argnums = self.shared.signature, self.shared.argnums
        nums = [argnums] if isinstance(argnums, int) else list(argnums)
        for num, arg in zip(nums, chosen, strict=True):
            leaves = jax.tree.leaves(arg)
            if not leaves or any(map(is_differentiable, leaves)):
                continue
            kinds = sorted({_describe(leaf) for leaf in leaves})
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

    def __init__(self, shared: Shared, bound: tuple[Any, ...]):
        self._shared = shared
        self._bound = bound

    def _jitted(self, drift: bool = False) -> Any:
        shared, count = self._shared, len(self._bound)
        if (count, drift) not in shared.gradients:
            inner = Gradients(shared, count, lambda *a, **k: shared(a, k, count))
            call = inner.with_drift if drift else inner

            def run(*args: Any, **kwargs: Any) -> Any:
                return wrap(call(*unwrap((args, kwargs))))

            shared.gradients[count, drift] = shared.jit(run)
        return shared.gradients[count, drift]

    def __call__(self, *args: Any, with_drift: bool = False, **kwargs: Any) -> Any:
        """Returns (value, gradients), or (value, gradients, drift).

        Raises:
          MoonwalkDriftError: a guard tripped, with `on_drift="raise"`, outside of
            other transformations.
        """
        shared = self._shared
        full, named, _ = shared.prepared((*self._bound, *args), kwargs)
        strict = shared.options.on_drift == "raise"
        inside = any(isinstance(x, Tracer) for x in jax.tree.leaves((full, named)))
        if not with_drift and (not strict or inside):
            return unwrap(self._jitted()(*full, **named))
        value, grads, drift = unwrap(self._jitted(drift=True)(*full, **named))
        if strict and not inside:
            count = len(self._bound)
            raise_if_tripped(drift, shared.spec((*self._bound, *args), kwargs, count))
        return (value, grads, drift) if with_drift else (value, grads)

    def lower(self, *args: Any, **kwargs: Any) -> Any:
        """JAX's own `Lowered` object of the jitted function."""
        full, named, _ = self._shared.prepared((*self._bound, *args), kwargs)
        return self._jitted().lower(*full, **named)
