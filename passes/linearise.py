"""Linearise a stage: JAX's own derivative of it as two graphs.

`fwd` computes the stage's results and every residual that JAX's linearisation asks
for; `bwd` takes residuals and cotangents to the cotangents of the active inputs.
Both are made by tracing `jax.vjp` once, so rules of JAX, of libraries and of users
(`custom_jvp`, `custom_vjp`) are honoured by construction and the gradient is
backpropagation's. What is kept of the residuals is decided elsewhere
(`passes.residuals`): the graphs are evaluated lazily, from whatever is given.

Source: `jax.vjp` returns its residuals as a pytree (JAX documentation, "Autodiff
cookbook"). Limits: reverse-mode must exist for what is inside, as for `jax.vjp`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from passes import _jax
from passes.compare import few_masks
from passes.graph import Graph, Var, evaluate
from passes.inline import inline
from passes.order import Wait
from passes.orders import few_orders
from passes.pooling import by_position
from passes.selects import one_select


@dataclasses.dataclass(frozen=True, eq=False)
class Linear:
    """The derivative of one stage.

    Attributes:
      fwd: inputs are the stage's inputs; results are the stage's results followed by
        the residuals.
      bwd: inputs are the residuals followed by the cotangents of the stage's inexact
        results; results are the cotangents of the active inputs.
      active: one flag an input of `fwd`: whether `bwd` gives its cotangent.
      inexact: one flag a result of the stage: whether `bwd` takes its cotangent.
      consts: values of the graphs' constant variables.
      waits: what equations of `bwd` wait for, by index.
      jaxs: how many of the residuals JAX has, the first; others are ours, narrower.
    """

    fwd: Graph
    bwd: Graph
    active: tuple[bool, ...]
    inexact: tuple[bool, ...]
    consts: dict[Var, Any]
    jaxs: int
    waits: Mapping[int, Wait] = dataclasses.field(default_factory=dict)

    @property
    def outs(self) -> tuple[Any, ...]:
        """The stage's results in `fwd`."""
        return self.fwd.outvars[: len(self.inexact)]

    @property
    def residuals(self) -> tuple[Any, ...]:
        """The residuals in `fwd`, in the order of `bwd`'s inputs."""
        return self.fwd.outvars[len(self.inexact) :]

    @property
    def residual_inputs(self) -> tuple[Var, ...]:
        """The residuals as `bwd` reads them."""
        return self.bwd.invars[: len(self.residuals)]

    @property
    def ct_inputs(self) -> tuple[Var, ...]:
        """The result cotangents as `bwd` reads them."""
        return self.bwd.invars[len(self.residuals) :]


def is_inexact(atom: Any) -> bool:
    """Whether a value has a tangent space: floating or complex."""
    dtype = getattr(atom.aval, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, np.inexact)


def linearise(
    graph: Graph,
    active: tuple[bool, ...],
    run: Callable[..., list[Any]] = evaluate,
) -> Linear:
    """Traces JAX's derivative of a graph.

    Args:
      graph: the stage; its effects are left out of both results.
      active: the inputs, all inexact, whose cotangents `bwd` shall give.
      run: runs the graph, as `evaluate` does.

    Returns:
      The two graphs.
    """
    inexact = tuple(is_inexact(v) for v in graph.outvars)
    trees: list[Any] = []

    def forward(*args: Any) -> tuple[list[Any], list[Any]]:
        def fun(*primals: Any) -> tuple[list[Any], list[Any]]:
            given = iter(primals)
            pairs = zip(active, args, strict=True)
            values = [next(given) if a else x for a, x in pairs]
            env = dict(zip(graph.invars, values, strict=True))
            outs = list(zip(inexact, run(graph, env, graph.outvars), strict=True))
            return [x for f, x in outs if f], [x for f, x in outs if not f]

        primals = [x for a, x in zip(active, args, strict=True) if a]
        moving, pull, fixed = jax.vjp(fun, *primals, has_aux=True)
        moving, fixed = iter(moving), iter(fixed)
        leaves, tree = jax.tree.flatten(pull)
        trees.append(tree)
        return [next(moving) if f else next(fixed) for f in inexact], leaves

    def backward(leaves: list[Any], cts: list[Any]) -> tuple[Any, ...]:
        return jax.tree.unflatten(trees[-1], leaves)(cts)

    fwd = jax.make_jaxpr(forward)(*[v.aval for v in graph.invars])
    fwd, consts = hoisted(fwd)
    residuals = [v.aval for v in fwd.outvars[len(inexact) :]]
    cts = [
        v.aval.to_tangent_aval()
        for v, f in zip(graph.outvars, inexact, strict=True)
        if f
    ]
    bwd, more = hoisted(jax.make_jaxpr(backward)(residuals, cts))
    consts |= more
    narrow = by_position(fwd, bwd, consts, len(residuals))
    if narrow is not None:
        (fwd, consts), (bwd, more) = map(hoisted, narrow)
        consts |= more
    return Linear(fwd, bwd, active, inexact, consts, len(residuals))


def hoisted(jaxpr: Any) -> tuple[Graph, dict[Var, Any]]:
    """A graph of a closed jaxpr, and the values of its constants."""
    inner, consts = _jax.opened(jaxpr)
    bare = _jax.closed([*inner.constvars, *inner.invars], inner.outvars, inner.eqns)
    graph = one_select(few_masks(few_orders(inline(bare))))
    values = dict(zip(graph.invars, consts, strict=False))
    return Graph(graph.invars[len(consts) :], graph.outvars, graph.eqns), values
