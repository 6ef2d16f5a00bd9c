"""Data dependencies that the compiler may not remove.

Recomputation saves memory only if XLA does not merge it with the first computation,
and only if it runs when it is due. `lax.optimization_barrier` says both; the CPU
backend of jaxlib before 0.11.2 drops barriers, so there the value is also selected by
a condition on the token that is never true, inf and NaN included. A select may be a
copy.
"""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from passes import _jax
from passes.sizes import has_elements

Array = Any

_JAXLIB = re.findall(r"\d+", importlib.metadata.version("jaxlib"))[:3]
CPU_DROPS_BARRIERS = tuple(map(int, _JAXLIB)) < (0, 11, 2)


def _is_key(x: Array) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def barrier(values: Sequence[Array]) -> list[Array]:
    """Values that become available together; typed keys pass as they are.

    Inside `shard_map` those that vary over the same mesh axes do: a barrier of JAX
    0.10 makes all its values vary over the axes of any.
    """
    values = list(values)
    groups: dict[frozenset[Any], list[int]] = {}
    for i, x in enumerate(values):
        if not _is_key(x):
            groups.setdefault(_jax.varying(x), []).append(i)
    for at in groups.values():
        held = lax.optimization_barrier([values[i] for i in at])
        for i, x in zip(at, held, strict=True):
            values[i] = x
    return values


def tie(values: Sequence[Array], token: Array | None) -> list[Array]:
    """`values`, not available before `token` is.

    Args:
      values: arrays of any dtype.
      token: an inexact array, or None where nothing has been computed yet.

    Returns:
      The same values, which no compiler can merge with what they were made from.
    """
    values = list(values)
    if not values:
        return values
    if token is None or not has_elements(token.shape):
        return barrier(values)
    *held, token = barrier([*values, token])
    return after(held, token)


def relay(values: Sequence[Array], waiting: Sequence[Array]) -> list[list[Array]]:
    """`barrier` of `values`, and `tie` of those `waiting` to the first, in one."""
    held = barrier([*values, *waiting])
    here, later = held[: len(values)], held[len(values) :]
    return [here, after(later, here[0])]


def after(values: Sequence[Array], token: Array) -> list[Array]:
    """The part of `tie` that is left where barriers are dropped.

    Args:
      values: arrays that pass a barrier besides, together with the token or with what
        is made of it.
      token: an inexact array.
    """
    held = list(values)
    if not CPU_DROPS_BARRIERS or not has_elements(token.shape):
        return held
    if _jax.is_split(token):
        # No entry of it can be read by itself.
        return held
    axes = _jax.varying(token)
    # Inside shard_map a value would take over the axes that the token varies over.
    at = [
        i
        for i, x in enumerate(held)
        if not _is_key(x) and has_elements(x.shape) and axes == _jax.varying(x)
    ]
    for i, x in zip(at, _selected(token, [held[i] for i in at]), strict=True):
        held[i] = x
    return held


@jax.jit  # Traced once for all stages alike.
def _selected(token: Array, values: list[Array]) -> list[Array]:
    """The values, on a CPU selected by a condition on the token."""

    def select(token: Array, *values: Array) -> list[Array]:
        never = _never(token)
        return [jnp.where(never, jnp.zeros_like(x), x) for x in values]

    return lax.platform_dependent(
        token, *values, cpu=select, default=lambda _, *values: list(values)
    )


def _never(token: Array) -> Array:
    """A scalar that is False for every value of the token."""
    first = lax.slice(token, (0,) * token.ndim, (1,) * token.ndim).reshape(())
    if jnp.iscomplexobj(first):
        first = first.real
    # The CPU compilers that drop barriers do not see through it.
    return (first == first) & (first != first)
