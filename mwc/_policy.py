"""`policy=`: values that the user wants saved, as for `jax.checkpoint`.

A policy of `jax.checkpoint_policies` is asked about every equation of the program,
as JAX asks it; what it calls saveable is kept by the first pass and never run again.
So `checkpoint_name` inside with `save_only_these_names` outside is a forced save, on
top of the plan. Limits: names inside loops, branches and custom derivative rules are
not seen; host offload is not supported.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mwc.errors import MoonwalkUnsupportedError
from passes import _jax
from passes.graph import Graph, Var


def pins(graph: Graph, policy: Callable[..., Any] | None) -> tuple[Var, ...]:
    """The variables that a policy saves.

    Raises:
      MoonwalkUnsupportedError: the policy asks for host offload.
    """
    if policy is None:
        return ()
    found: list[Var] = []
    for eqn in graph.eqns:
        avals = [v.aval for v in eqn.invars]
        answer = policy(eqn.primitive, *avals, **eqn.params)
        if hasattr(answer, "dst"):
            raise MoonwalkUnsupportedError(
                "the policy asks for offload to host memory",
                expected="a policy that saves or recomputes",
                remedy="use save_only_these_names, or jax.checkpoint for offload",
                source=_jax.source_line(eqn),
            )
        if answer is True or type(answer).__name__ == "SaveableType":
            found += [v for v in eqn.outvars if not _jax.is_drop(v)]
    return tuple(found)
