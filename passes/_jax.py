"""The only module that touches what JAX does not promise.

Every other module of `passes` and `mwc` reads jaxprs through the names defined
here. Each helper says which versions differ and is pinned by `tests/test_jax_contracts`.
"""

from __future__ import annotations

from typing import Any

from jax.extend import core, source_info_util
from jax.extend.core import Literal, Var

__all__ = [
    "Literal",
    "Var",
    "bind",
    "call_body",
    "closed",
    "is_drop",
    "nest_source",
    "opened",
    "scan_layout",
    "source_line",
]

Eqn = Any
Jaxpr = Any


def opened(jaxpr: Jaxpr) -> tuple[Jaxpr, list[Any]]:
    """The open jaxpr and the constants of a closed one.

    JAX 0.11 merged `ClosedJaxpr` into `Jaxpr`, whose `.jaxpr` is itself.
    """
    if hasattr(jaxpr, "consts"):
        return jaxpr.jaxpr, list(jaxpr.consts)
    return jaxpr, []


def is_drop(var: Any) -> bool:
    """Whether an output variable is never read."""
    return isinstance(var, core.DropVar)


def bind(eqn: Eqn, values: list[Any]) -> list[Any]:
    """Evaluates one equation under its own source lines, name scopes and context."""
    source = eqn.source_info
    stack = source_info_util.current_name_stack() + source.name_stack
    params = eqn.primitive.get_bind_params(eqn.params)
    with (
        source_info_util.user_context(source.traceback, name_stack=stack),
        eqn.ctx.manager,
    ):
        out = eqn.primitive.bind(*values, **params)
    return list(out) if eqn.primitive.multiple_results else [out]


# Calls that are nothing but their body: `jit` (named `pjit` before 0.7) and the
# call primitives that JAX's own transformations leave behind.
_INLINE = frozenset({"jit", "pjit", "closed_call", "core_call", "core_closed_call"})


def call_body(eqn: Eqn) -> Jaxpr | None:
    """The body of a call that may be inlined, or None.

    A `jit` that asks for shardings, layouts or compiler options of its own is kept.
    """
    if eqn.primitive.name not in _INLINE:
        return None
    params = eqn.params
    for key in ("in_shardings", "out_shardings"):
        if any("Unspecified" not in type(s).__name__ for s in params.get(key, ())):
            return None
    for key in ("in_layouts", "out_layouts"):
        if any(layout is not None for layout in params.get(key, ())):
            return None
    if params.get("compiler_options_kvs"):
        return None
    return params.get("jaxpr", params.get("call_jaxpr"))


def nest_source(eqn: Eqn, outer: Eqn) -> Any:
    """The source of an inlined equation: the call's name scopes, then its own."""
    stack = outer.source_info.name_stack + eqn.source_info.name_stack
    return eqn.source_info.replace(name_stack=stack)


def source_line(eqn: Eqn) -> str:
    """The user's place of an equation: "file.py:12 (function)"."""
    text = source_info_util.summarize(eqn.source_info)
    place, _, name = text.partition(" ")
    parts = place.replace("\\", "/").rsplit("/", 1)[-1].split(":")
    return ":".join(parts[:2]) + (f" {name}" if name else "")


def scan_layout(eqn: Eqn) -> tuple[int, int]:
    """Numbers of constants and carries of a scan, which come first in its operands.

    JAX 0.11 replaced `num_consts` and `num_carry` by a tree, `ft_in`.
    """
    params = eqn.params
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].unpack()
    return len(list(consts)), len(list(carry))


def closed(invars: list[Var], outvars: list[Any], eqns: list[Eqn]) -> Jaxpr:
    """A closed jaxpr without constants."""
    effects = core.no_effects
    for eqn in eqns:
        effects = effects | eqn.effects
    jaxpr = core.Jaxpr([], invars, outvars, eqns, effects)
    maker = getattr(core, "ClosedJaxpr", None)
    return jaxpr if maker is None or maker is core.Jaxpr else maker(jaxpr, [])
