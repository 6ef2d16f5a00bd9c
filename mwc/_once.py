"""Code that is called in many places and compiled once.

JAX traces and lowers a jitted function once for all calls alike, but XLA inlines them
first and optimizes each. On a CPU the call can stay (`jax.Inline`, where JAX has it):
64 layers compile in half of the time. On a GPU it is inlined: XLA would clone what is
called before it optimizes, and compiles longer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax import lax


def compiled_once(fun: Callable[..., Any]) -> Callable[..., Any]:
    """A function of pytrees of arrays whose code is shared by all its calls alike."""
    inlined = jax.jit(fun)
    inline = getattr(jax, "Inline", None)  # JAX 0.12 has it, 0.10 has not
    if inline is None:
        return inlined
    called = jax.jit(fun, inline=inline.XLA_LATE)

    def call(*args: Any) -> Any:
        return lax.platform_dependent(*args, cpu=called, default=inlined)

    return call
