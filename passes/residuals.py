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

import numpy as np
from scipy import sparse
from scipy.sparse import csgraph

from passes.graph import Graph, Var, is_var, nbytes, size
from passes.table import is_dear

_LARGE = 2**28  # bytes are scaled to add up to at most this
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
    data: Collection[Var] = (),
) -> tuple[Var, ...]:
    """The cheapest values from which `residuals` follow without dear equations.

    Args:
      fwd: computes the residuals from the stage's inputs.
      residuals: the atoms of `fwd` that are needed.
      state: the inputs of `fwd` that depend on the state; the rest is always at hand.
      cost: matrix FLOPs of an equation.
      at_hand: whether `state` is at hand too (a leaf of a schedule) or not (a stored
        stage).
      data: inputs at hand that are no parameters: what dear equations make of them is
        not made again.

    Returns:
      Variables of `fwd`, in program order; given them and the inputs at hand, every
      residual follows by cheap equations.
    """
    wanted = [v for v in residuals if is_var(v)]
    tainted = set() if at_hand else set(state)
    reads_state = {*state, *data}
    for i in (chosen := fwd.needed(wanted)):
        eqn = fwd.eqns[i]
        if any(is_var(v) and v in reads_state for v in eqn.invars):
            reads_state.update(eqn.outvars)
            dear = is_dear(eqn, cost)
            if dear or any(is_var(v) and v in tainted for v in eqn.invars):
                tainted.update(eqn.outvars)
    wanted = [v for v in wanted if v in tainted]
    if not wanted:
        return ()
    net = _Network()
    for v in wanted:
        net.must_follow(v)
    for i in chosen:
        eqn = fwd.eqns[i]
        if not any(v in tainted for v in eqn.outvars):
            continue
        reads = [v for v in eqn.invars if is_var(v) and v in tainted]
        read = max((size(v) for v in reads), default=0)
        dear = is_dear(eqn, cost) or not reads
        for out in eqn.outvars:
            if dear or (size(out) * _FEW <= read and not _is_key(out)):
                net.must_precede(out)
            else:
                for v in reads:
                    net.follows(v, out)
    if not at_hand:
        for v in state:
            net.must_precede(v)
    order = {v: -1 for v in fwd.invars} | fwd.producer
    return tuple(sorted(net.cut(), key=lambda v: (order[v], str(v.aval))))


class _Network:
    """A flow network in which each variable is an edge that costs its bytes."""

    def __init__(self) -> None:
        self._index: dict[Var, int] = {}
        self._edges: list[tuple[int, int]] = []  # between halves of variables

    def _node(self, var: Var) -> int:
        """A variable enters at node 2i + 2 and leaves at 2i + 3; 0 and 1 are ends."""
        return 2 * self._index.setdefault(var, len(self._index)) + 2

    def must_precede(self, var: Var) -> None:
        """The cut is at this variable or behind it."""
        self._edges.append((0, self._node(var)))

    def must_follow(self, var: Var) -> None:
        """The cut is at this variable or before it."""
        self._edges.append((self._node(var) + 1, 1))

    def follows(self, before: Var, after: Var) -> None:
        """`after` is computed from `before` by a cheap equation."""
        self._edges.append((self._node(before) + 1, self._node(after)))

    def cut(self) -> list[Var]:
        """The variables of a minimum cut."""
        names = list(self._index)
        size = 2 * len(names) + 2
        # The solver counts in 32 bits; the 1 breaks ties towards fewer values.
        costs = [packed_bytes(v) for v in names]
        scale = max(1, sum(costs) // _LARGE)
        capacity = [c // scale + 1 for c in costs]
        inner = [(2 * i + 2, 2 * i + 3) for i in range(len(names))]
        edges = dict.fromkeys(self._edges)
        rows, columns = zip(*inner, *edges, strict=True)
        data = np.array([*capacity, *[2 * _LARGE] * len(edges)], np.int32)
        graph = sparse.csr_array((data, (rows, columns)), shape=(size, size))
        flow = csgraph.maximum_flow(graph, 0, 1).flow
        left = graph - flow
        left.data = np.maximum(left.data, 0)
        left.eliminate_zeros()
        reached = set(csgraph.breadth_first_order(left, 0, return_predecessors=False))
        return [
            v
            for v, (a, b) in zip(names, inner, strict=True)
            if a in reached and b not in reached
        ]


def _is_key(var: Var) -> bool:
    return not hasattr(getattr(var.aval, "dtype", None), "itemsize")
