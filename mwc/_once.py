"""Code that is called in many places and compiled once.

JAX traces and lowers a jitted function once for all calls alike, but XLA inlines them
first and optimizes each. On a CPU the call can stay (`jax.Inline`, where JAX has it):
64 layers compile in half of the time. On a GPU it is inlined: there XLA would clone
what is called before it optimizes, and compile for longer.

Limits: what is called is not partitioned. Where there are several devices, or a mesh,
it is inlined.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax import lax

from passes import _jax


def compiled_once(fun: Callable[..., Any]) -> Callable[..., Any]:
    """A function of pytrees of arrays whose code is shared by all its calls alike."""
    inlined = jax.jit(fun)
    inline = getattr(jax, "Inline", None)  # JAX 0.12 has it, 0.10 has not
    if inline is None:
        return inlined
    called = jax.jit(fun, inline=inline.XLA_LATE)

    @jax.jit
    def call(*args: Any) -> Any:
        if _may_be_split(args):
            return inlined(*args)
        return lax.platform_dependent(*args, cpu=called, default=inlined)

    return call


def _may_be_split(args: Any) -> bool:
    """Whether a program that has these arrays may run on several devices."""
    try:
        alone = len(jax.devices("cpu")) == 1
    except RuntimeError:  # JAX was told to have no CPU
        return True
    meshes = not jax.sharding.get_abstract_mesh().empty
    return not alone or meshes or any(map(_jax.on_mesh, jax.tree.leaves(args)))
