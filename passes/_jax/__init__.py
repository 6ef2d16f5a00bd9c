"""The only package that touches what JAX does not promise.

Every other module of `passes` and `mwc` reads jaxprs through the names defined
here. Each helper says which versions differ; `tests/test_jax_contracts` pins them.
"""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Sequence
from typing import Any

import jax
from jax._src import config, debugging, effects
from jax._src.ad_util import Zero
from jax._src.core import AbstractValue, InternalMutableArrayEffect
from jax._src.interpreters import ad, batching
from jax._src.interpreters import partial_eval as pe
from jax._src.source_info_util import user_frames
from jax._src.state.discharge import discharge_state
from jax._src.state.types import AbstractRef
from jax.extend import core, source_info_util
from jax.extend.core import Literal, Var

from passes._jax.meshes import (
    PLACING,
    is_split,
    match_aval,
    off_mesh,
    varying,
    zeros,
)
from passes._jax.rules import identity_primitive, new_primitive, register_rules

# Re-exported; helpers follow.
__all__ = ["AbstractValue", "Literal", "Var", "Zero"]
__all__ += ["identity_primitive", "new_primitive", "register_rules"]
__all__ += ["PLACING", "is_split", "match_aval", "off_mesh", "varying", "zeros"]

Eqn = Any
Jaxpr = Any

_INSTALLED = tuple(sysconfig.get_path(name) + os.sep for name in ("purelib", "platlib"))


def opened(jaxpr: Jaxpr) -> tuple[Jaxpr, list[Any]]:
    """The open jaxpr and the constants of a closed one.

    JAX 0.11 merged `ClosedJaxpr` into `Jaxpr`, whose `.jaxpr` is itself.
    """
    if hasattr(jaxpr, "consts"):
        return jaxpr.jaxpr, list(jaxpr.consts)
    return jaxpr, []


def evaluated(size: Any, value: int) -> int:
    """A symbolic size of `jax.export` where each of its symbols has one value."""
    return int(size._evaluate(dict.fromkeys(size._get_vars(), value)))


def has_no_reverse(eqn: Eqn) -> bool:
    """Whether JAX has no reverse mode of an equation, or of one inside of it."""
    if eqn.primitive.name in ("while", "pure_callback", "io_callback"):
        return True
    return any(has_no_reverse(e) for j in sub_jaxprs(eqn) for e in opened(j)[0].eqns)


def is_drop(var: Any) -> bool:
    """Whether an output variable is never read."""
    return isinstance(var, core.DropVar)


def bind(eqn: Eqn, values: list[Any], instead: Any = None) -> list[Any]:
    """Evaluates one equation under its own source lines, name scopes and context.

    Or what is run `instead` of it, a function that returns the list of results.
    """
    source = eqn.source_info
    stack = source_info_util.current_name_stack() + source.name_stack
    params = eqn.primitive.get_bind_params(eqn.params)
    with (
        source_info_util.user_context(source.traceback, name_stack=stack),
        eqn.ctx.manager,
    ):
        if instead is not None:
            return instead(*values)
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
    shardings = (*params.get("in_shardings", ()), *params.get("out_shardings", ()))
    layouts = (*params.get("in_layouts", ()), *params.get("out_layouts", ()))
    own = any("Unspecified" not in type(s).__name__ for s in shardings)
    own = own or any(layout is not None for layout in layouts)
    if own or params.get("compiler_options_kvs"):
        return None
    return params.get("jaxpr", params.get("call_jaxpr"))


def nest_source(eqn: Eqn, outer: Eqn) -> Any:
    """The source of an inlined equation: the call's name scopes, then its own."""
    stack = outer.source_info.name_stack + eqn.source_info.name_stack
    return eqn.source_info.replace(name_stack=stack)


def source_line(eqn: Eqn) -> str:
    """The user's place of an equation: "file.py:12 (function)".

    It is the innermost line outside JAX and outside what is installed, such as the
    user's call of a library's layer; without one the innermost outside JAX.
    """
    frames = [*user_frames(eqn.source_info.traceback)]
    if not frames:
        return "unknown"
    own = (f for f in frames if not f.file_name.startswith(_INSTALLED))
    frame = next(own, frames[0])
    name = frame.file_name.replace("\\", "/").rsplit("/", 1)[-1]
    return f"{name}:{frame.start_line} ({frame.function_name})"


def function_names(jaxpr: Jaxpr) -> tuple[str, list[str]]:
    """The name of a traced function, and the user's paths of its inputs.

    What the function captured comes first and has no path.
    """
    info = opened(jaxpr)[0].debug_info
    count = len(jaxpr.in_avals)
    names = info.arg_names if info.arg_names is not None else ()
    names = (*names, *[""] * (count - len(names)))[:count]
    paths = [name or f"captured[{i}]" for i, name in enumerate(names)]
    return info.func_src_info.partition(" ")[0], paths


def scan_layout(eqn: Eqn) -> tuple[int, int]:
    """Numbers of constants and carries of a scan, which come first in its operands."""
    # JAX 0.11 replaced `num_consts` and `num_carry` by a tree, `ft_in`.
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
    # No names: what is built here is never shown to users.
    debug = core.DebugInfo("moonwalk", "stage", None, None)
    jaxpr = core.Jaxpr([], invars, outvars, eqns, effects, debug)
    maker = getattr(core, "ClosedJaxpr", None)
    return jaxpr if maker is None or maker is core.Jaxpr else maker(jaxpr, [])


# What follows serves the differentiation primitives and the decorator of `mwc`.


def exclude_frames(prefix: str) -> None:
    """Hides files whose path starts with `prefix` from user-facing tracebacks."""
    source_info_util.register_exclusion(prefix)


def trace_context() -> Any:
    """A hashable key of all ambient settings that change what tracing gives."""
    return config.trace_context()


def hoisted(traced: Any) -> Jaxpr:
    """The jaxpr of a `jax.stages.Traced` with what it captured as leading inputs.

    Mutable arrays that live and die inside become pure values.
    """
    jaxpr = pe.close_jaxpr(pe.convert_constvars_jaxpr(opened(traced.jaxpr)[0]))
    if any(isinstance(e, InternalMutableArrayEffect) for e in jaxpr.effects):
        jaxpr = discharge_state(jaxpr)
    return jaxpr


def jit_disabled() -> bool:
    """Whether `jax.disable_jit` holds; the public attribute has no type on 0.10."""
    return bool(config.disable_jit.value)


def outlives(traced: Any) -> str | None:
    """What of a traced function has a life outside it, None if there is nothing.

    A mutable array passed in or captured, or a check that `checkify` has yet to find.
    """
    avals = (jax.typeof(x) for x in captured(traced))
    if any(isinstance(a, AbstractRef) for a in (*traced.jaxpr.in_avals, *avals)):
        return "a mutable array (jax.Ref) that it was given or captured"
    if any(type(effect).__name__ == "ErrorEffect" for effect in traced.jaxpr.effects):
        return "a check of jax.experimental.checkify"
    return None


def captured(traced: Any) -> list[Any]:
    """The values of the leading inputs that `hoisted` makes: arrays, then tracers."""
    # Tracers are leading inputs from the start, and only `_consts` has them.
    return [*constants(traced), *traced._consts]


def constants(traced: Any) -> list[Any]:
    """Those that are arrays: the same at every call of this trace."""
    return opened(traced.jaxpr)[1]


def dead_code(jaxpr: Jaxpr, used: Sequence[bool]) -> tuple[Jaxpr, list[bool]]:
    """Drops what the `used` outputs do not need; also says which inputs remain."""
    body, consts = opened(jaxpr)
    if consts:
        # Constants stay leading inputs while dead code is removed.
        body = pe.convert_constvars_jaxpr(body)
    small, live = pe.dce_jaxpr(body, list(used), instantiate=False)
    if not consts:
        return pe.close_jaxpr(small), live
    count = len(consts)
    kept = [c for c, alive in zip(consts, live[:count], strict=True) if alive]
    return _closed_over(small, kept), live[count:]


def _closed_over(jaxpr: Jaxpr, consts: list[Any]) -> Jaxpr:
    """Turns the leading inputs of a jaxpr into constants."""
    if not consts:
        return pe.close_jaxpr(jaxpr)
    if hasattr(jaxpr, "with_consts"):  # 0.11 and later
        return jaxpr.with_consts(consts)
    count = len(consts)
    body = jaxpr.replace(constvars=jaxpr.invars[:count], invars=jaxpr.invars[count:])
    maker: Any = core.ClosedJaxpr  # pyright: ignore[reportPrivateImportUsage]
    return maker(body, consts)


def sub_jaxprs(eqn: Eqn) -> list[Jaxpr]:
    """The jaxprs among the parameters of an equation, open."""
    return list(core.jaxprs_in_params(eqn.params))


def refused_effects(jaxpr: Jaxpr) -> set[Any]:
    """The effects that `jax.checkpoint` refuses to differentiate."""
    return set(effects.remat_allowed_effects.filter_not_in(jaxpr.effects))


def named_axes(item: Any) -> frozenset[Any]:
    """Names of the mapped axes that a jaxpr or equation talks about."""
    names = (getattr(e, "name", None) for e in item.effects)
    return frozenset(name for name in names if name is not None)


_DEBUG = (debugging.DebugEffect, debugging.OrderedDebugEffect)


def _undebugged(found: Any) -> Any:
    return frozenset(e for e in found if not isinstance(e, _DEBUG))


def without_debug(jaxpr: Jaxpr) -> Jaxpr:
    """A closed jaxpr without its debug callbacks, also in the bodies it calls."""
    body, _ = opened(jaxpr)
    small = _undebug_body(body)
    if small is body:
        return jaxpr
    return small if body is jaxpr else jaxpr.replace(jaxpr=small)


def _undebug_body(body: Jaxpr) -> Jaxpr:
    if _undebugged(body.effects) == frozenset(body.effects):
        return body
    eqns = []
    for eqn in body.eqns:
        left = _undebugged(eqn.effects)
        if left == frozenset(eqn.effects):
            eqns.append(eqn)
        elif sub_jaxprs(eqn):
            params = {k: _undebug_param(v) for k, v in eqn.params.items()}
            eqns.append(eqn.replace(params=params, effects=set(left)))
    return body.replace(eqns=eqns, effects=set(_undebugged(body.effects)))


def _undebug_param(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_undebug_param(v) for v in value)
    if isinstance(value, (core.Jaxpr, getattr(core, "ClosedJaxpr", core.Jaxpr))):
        return without_debug(value)
    return value


def spell_axis(axis: Any) -> tuple[Any, Any]:
    """Name (None where there is none) and SPMD name of a level of `vmap`."""
    return None if type(axis.name) is object else axis.name, axis.spmd_name


def batched_outputs(jaxpr: Jaxpr, axis: Any, dims: Sequence[int | None]) -> list[bool]:
    """Which outputs depend on a level of `vmap`, found by batching the jaxpr."""
    rule = [batching.zero_if_mapped] * len(jaxpr.out_avals)
    return list(batching.batch_jaxpr_axes(jaxpr, axis, tuple(dims), rule)[1])


def as_zero(value: Any) -> Zero:
    """The symbolic zero tangent of a value."""
    return Zero(jax.typeof(value).to_tangent_aval())


def instantiated(cotangent: Any) -> Any:
    """A cotangent with a symbolic zero made an array."""
    return ad.instantiate_zeros(cotangent)


is_undefined = ad.is_undefined_primal


def run_jaxpr(jaxpr: Jaxpr, *args: Any) -> list[Any]:
    """Evaluates a closed jaxpr, keeping source lines and name scopes."""
    return list(core.jaxpr_as_fun(jaxpr)(*args))


def keeps_effects(eqn: Eqn) -> bool:
    """Whether an equation must stay though none of its outputs is used."""
    return any(not pe.dceable_effects.contains(effect) for effect in eqn.effects)


def rule_of(eqn: Eqn) -> Any:
    """The rule of a `custom_jvp_call`, to compare two of them; None where unknown.

    JAX wraps the user's rule anew at each call. The rule itself is found in the
    closure of the wrapper, and trusted only where the wrapper is the plain one.
    """
    try:
        names = eqn.params["jvp_jaxpr_fun"].f
        cells = dict(zip(names.__code__.co_freevars, names.__closure__, strict=True))
        inner = cells["fn"].cell_contents
        cells = dict(zip(inner.__code__.co_freevars, inner.__closure__, strict=True))
        rule = cells["jvp"].cell_contents
        ((wrapper, (_, _, tree, _)),) = rule.transforms
    except (AttributeError, KeyError, TypeError, ValueError):
        return None
    if wrapper.__name__ != "_flatten_jvp":
        return None
    return rule.f, tree, bool(eqn.params["symbolic_zeros"])
