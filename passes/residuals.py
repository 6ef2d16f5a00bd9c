"""Residuals: the narrowest set of values that a stage's backward can start from.

JAX's linearisation keeps what is convenient: float masks for max, clip and pooling,
both the probabilities and the scores of a softmax. Each of them is computed from
narrower values by a few cheap equations. The narrowest place is a minimum cut in the
graph that computes the residuals, where a value costs its bytes, a bool an eighth of
a byte, and what follows from parameters or keys alone nothing: masks of piecewise
linear functions come out as bits, dropout masks are redrawn, and no rule per
primitive is needed. Equations that are dear to run again (matrix products, loops)
lie before the cut, and so do reductions to few numbers.

Source: min-cut rematerialisation as in AOTAutograd (He and Yu, "Transcending
runtime-memory tradeoffs in checkpointing by being fusion aware", MLSys 2023), here
over bits. Limits: bytes only, the time of the cheap equations counts as zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable
from typing import Any

import networkx as nx

from passes.graph import Graph, Var, is_var, nbytes, size

# What must not run again in a backward pass; `cost` finds the matrix products.
_DEAR = frozenset(
    {"scan", "while", "cond", "custom_vjp_call", "custom_vjp_call_jaxpr", "sort"}
    | {"fft", "cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp", "scatter"}
    | {"scatter-add", "scatter_add", "gather", "top_k", "pallas_call", "ffi_call"}
    | {"reduce_window", "reduce_window_sum", "reduce_window_max", "shard_map"}
    | {"pure_callback", "rng_uniform", "custom_linear_solve", "checkpoint", "remat"}
    | {"psum", "all_gather", "all_to_all", "ppermute", "psum_invariant", "psum2"}
    | {"select_and_gather_add", "linear_solve", "reduce_precision"}
)
_FEW = 16  # a reduction to this fraction of what it reads is always kept


def packed_bytes(var: Var) -> int:
    """Bytes of a value as we keep it: bools as bits, the rest as it is."""
    if _is_bool(var):
        return math.ceil(size(var) / 8)
    return nbytes(var)


def _is_bool(var: Var) -> bool:
    return str(getattr(var.aval, "dtype", "")) == "bool"


def narrowest(
    fwd: Graph,
    residuals: Iterable[Any],
    state: Collection[Var],
    cost: Callable[[Any], float],
    at_hand: bool,
) -> tuple[Var, ...]:
    """The cheapest values from which `residuals` follow without dear equations.

    Args:
      fwd: computes the residuals from the stage's inputs.
      residuals: the atoms of `fwd` that are needed.
      state: the inputs of `fwd` that depend on the state; the rest is always at hand.
      cost: matrix FLOPs of an equation.
      at_hand: whether `state` is at hand too (a leaf of a schedule) or not (a stored
        stage).

    Returns:
      Variables of `fwd`, in program order; given them and the inputs at hand, every
      residual follows by cheap equations.
    """
    wanted = [v for v in residuals if is_var(v)]
    tainted = set() if at_hand else set(state)
    reads_state = set(state)
    for i in (chosen := fwd.needed(wanted)):
        eqn = fwd.eqns[i]
        if any(is_var(v) and v in reads_state for v in eqn.invars):
            reads_state.update(eqn.outvars)
            dear = _is_dear(eqn, cost)
            if dear or any(is_var(v) and v in tainted for v in eqn.invars):
                tainted.update(eqn.outvars)
    wanted = [v for v in wanted if v in tainted]
    if not wanted:
        return ()
    net = nx.DiGraph()
    source, sink = "source", "sink"

    def node(var: Var) -> None:
        if (var, 0) not in net:
            # The 1 breaks ties towards fewer values.
            net.add_edge((var, 0), (var, 1), capacity=packed_bytes(var) + 1)

    for v in wanted:
        node(v)
        net.add_edge((v, 1), sink)
    for i in chosen:
        eqn = fwd.eqns[i]
        if not any(v in tainted for v in eqn.outvars):
            continue
        reads = [v for v in eqn.invars if is_var(v) and v in tainted]
        read = max((size(v) for v in reads), default=0)
        dear = _is_dear(eqn, cost) or not reads
        for out in eqn.outvars:
            node(out)
            if dear or (size(out) * _FEW <= read and not _is_key(out)):
                net.add_edge(source, (out, 0))
                continue
            for v in reads:
                node(v)
                net.add_edge((v, 1), (out, 0))
    for v in state:
        if (v, 0) in net:
            net.add_edge(source, (v, 0))
    _, (before, _) = nx.minimum_cut(net, source, sink)
    cut = [
        n[0]
        for n in before
        if isinstance(n, tuple) and n[1] == 0 and (n[0], 1) not in before
    ]
    order = {v: -1 for v in fwd.invars} | fwd.producer
    return tuple(sorted(cut, key=lambda v: (order[v], str(v.aval))))


def _is_dear(eqn: Any, cost: Callable[[Any], float]) -> bool:
    return eqn.primitive.name in _DEAR or cost(eqn) > 0


def _is_key(var: Var) -> bool:
    return not hasattr(getattr(var.aval, "dtype", None), "itemsize")
