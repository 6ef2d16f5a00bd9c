"""`mwc.coisometric`: a map that the user declares to be a multiple of an isometry.

The declared map is the function itself with two identities around it
(`passes.declared`), so values and derivatives are JAX's own, and the compiler knows
that J J^T = scale I: its vijp is the pushforward over `scale`, without a solve. What
cannot be so whatever the weights are (a map that is not affine, one that makes more
numbers than it gets) is an error; what the weights break is seen by the guard.
Source: DESIGN sections 2 and 4.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mwc import _trace
from mwc.errors import MoonwalkTypeError, MoonwalkValueError
from passes import _jax
from passes.declared import declare

Array = Any


def coisometric(fun: Callable[..., Any], scale: float = 1.0) -> Callable[..., Any]:
    """Declares `fun(h, *params)` to have J J^T = scale I in h.

    The claim is about the Jacobian J of the result with respect to h: an orthogonal
    matrix, one with orthonormal columns (h @ Q), a permutation, a shift. Training can
    break it; then the guard turns the gradients into NaN, never into wrong numbers.
    `mwc.constraints.retract` brings weights back, `mwc.constraints.orthogonal` keeps
    them there.

    Args:
      fun: affine in h, an array of shape [..., n] or any other; it returns one array
        of at most as many numbers.
      scale: c in J J^T = c I, positive.

    Returns:
      A function with the same values and gradients.

    Raises:
      MoonwalkValueError: the scale is not a positive number.
      MoonwalkTypeError: when called, h or the result is not one inexact array, the
        result has more numbers than h, or the map is not affine in h.
    """
    good = isinstance(scale, (int, float)) and not isinstance(scale, bool)
    if not good or not math.isfinite(scale) or scale <= 0:
        raise MoonwalkValueError(
            f"coisometric was given scale={scale!r}",
            expected="a positive number, c in J J^T = c I",
        )
    signature = _trace.signature_of(fun, (), ())
    seen: set[Any] = set()

    @functools.wraps(fun, updated=())
    def declared(h: Array, *params: Any, **named: Any) -> Array:
        leaves, tree = jax.tree.flatten((params, named))
        key = (*(jax.typeof(x) for x in (h, *leaves) if _trace.is_array(x)), tree)
        if key not in seen:
            _check(functools.partial(fun, **named), signature, h, params)
            seen.add(key)
        inside = declare(jnp.asarray(h), side="in", scale=float(scale))
        return declare(fun(inside, *params, **named), side="out", scale=float(scale))

    return declared


def _check(
    fun: Callable[..., Any], signature: Any, h: Array, params: tuple[Any, ...]
) -> None:
    """Raises what no weights can mend."""

    def wrong(found: str, expected: str, remedy: str) -> MoonwalkTypeError:
        name = f"{signature.name}, declared coisometric,"
        return MoonwalkTypeError(
            f"{name} {found}",
            expected=expected,
            remedy=remedy,
            source=signature.source,
        )

    if not _trace.is_array(h) or not jnp.issubdtype(jnp.result_type(h), jnp.inexact):
        remedy = "cast h, and pass what is not a state after it"
        raise wrong(f"was called with {h!r}", "one floating-point array h", remedy)
    out = jax.eval_shape(lambda h: fun(h, *params), h)
    if not hasattr(out, "shape") or not jnp.issubdtype(out.dtype, jnp.inexact):
        remedy = "declare the map that makes the state alone"
        raise wrong(f"returned {out!r}", "one floating-point array", remedy)
    if math.prod(out.shape) > math.prod(jnp.shape(h)):
        raise wrong(
            f"takes shape {jnp.shape(h)} to {out.shape}, which has more numbers",
            "a result of at most as many numbers: J J^T = c I needs full row rank",
            "leave this layer undeclared: its plan is then another",
        )

    def tangent(h: Array, t: Array) -> Array:
        return jax.jvp(lambda h: fun(h, *params), (h,), (t,))[1]

    # Loops too: dead code leaves their carries of tangents alone.
    if _jax.dead_code(jax.make_jaxpr(tangent)(h, h), [True])[1][0]:
        raise wrong(
            "is not affine in h: its Jacobian depends on h",
            "a linear map plus a bias",
            "declare the linear layer alone, without its activation",
        )
