"""New primitives, entered in all of JAX's rule tables.

Limits: JAX calls these tables internal; `tests/test_jax_contracts` pins them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
from jax._src.ad_util import Zero
from jax._src.interpreters import ad, batching, mlir
from jax._src.interpreters import partial_eval as pe
from jax.extend import core


def new_primitive(name: str) -> Any:
    """A primitive with several results and no rules yet."""
    primitive = core.Primitive(name)
    primitive.multiple_results = True
    return primitive


def register_rules(
    primitive: Any,
    *,
    run: Callable[..., list[Any]],
    avals: Callable[..., tuple[list[Any], Any]],
    emit: Callable[..., list[Any]],
    jvp: Callable[..., Any],
    batch: Callable[..., Any],
    dce: Callable[..., Any] | None = None,
    transpose: Callable[..., list[Any]] | None = None,
) -> None:
    """Enters a primitive in all of JAX's rule tables.

    `run` evaluates it on arrays, `avals` gives output avals and effects, `emit` is the
    traceable function that it is lowered as. `batch` is a "fancy" batching rule, given
    the primitive first, and called for every `vmap` around, mapped or not. `dce` is
    called with (used outputs, equation). `transpose` is None where the primitive is
    not linear.
    """
    primitive.def_impl(run)
    primitive.def_effectful_abstract_eval(avals)
    mlir.register_lowering(primitive, mlir.lower_fun(emit, multiple_results=True))
    # Where a jaxpr holds primitives of user-defined types, the emitted code takes
    # this primitive's place, and theirs are lowered in it.
    primitive.to_lojax = emit
    ad.primitive_jvps[primitive] = jvp
    batching.fancy_primitive_batchers[primitive] = partial(batch, primitive)
    if transpose is not None:
        ad.primitive_transposes[primitive] = transpose
    if dce is not None:
        pe.dce_rules[primitive] = lambda used, *rest: dce(used, rest[-1])


def identity_primitive(
    name: str,
    linear: Callable[[dict[str, Any]], bool],
    moved: Callable[[dict[str, Any], Sequence[int | None]], dict[str, Any]],
) -> Any:
    """A primitive that returns its first operand, for what the others and it say.

    `linear` tells from its parameters whether tangents pass through it too, `moved`
    gives those that change when each operand has a batch axis at a place.
    """
    primitive = core.Primitive(name)
    primitive.def_impl(lambda x, *rest, **params: x)
    primitive.def_abstract_eval(lambda x, *rest, **params: x)
    mlir.register_lowering(primitive, lambda _, x, *rest, **params: [x])

    def jvp(primals: Any, tangents: Any, **params: Any) -> Any:
        (x, *rest), t = primals, tangents[0]
        passes = linear(params) and not isinstance(t, Zero)
        out = primitive.bind(x, *rest, **params)
        return out, primitive.bind(t, *rest, **params) if passes else t

    def batch(values: Any, dims: Any, **params: Any) -> Any:
        (x, *rest), (at, *others) = values, dims
        if at is None:
            pairs = zip(rest, others, strict=True)
            (size,) = {r.shape[d] for r, d in pairs if d is not None}
            x, at = jax.numpy.broadcast_to(x, (size, *x.shape)), 0
        params |= moved(params, (at, *others))
        return primitive.bind(x, *rest, **params), at

    ad.primitive_jvps[primitive] = jvp
    ad.primitive_transposes[primitive] = lambda ct, x, *rest, **params: [
        ct if isinstance(ct, Zero) else primitive.bind(ct, *rest, **params),
        *(None for _ in rest),
    ]
    batching.primitive_batchers[primitive] = batch
    return primitive
