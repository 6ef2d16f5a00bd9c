"""Order: parameters' gradients before the cotangent that goes on.

A product y = x w sends its cotangent c two ways: x and c give the gradient of w, c
alone goes on to the state. Left to itself the compiler may go on first, or fuse the
last reader of x with what comes after it, and x stays alive all the while. So the
backward graph is put in an order in which whatever is ready and leads to parameters
alone comes first, and each product on the way to the state *waits* for the products
before it that do not lie there.

Limits: only products are waited for; what is cheap is the compiler's to place.
"""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Callable, Iterable

from passes.depend import reached
from passes.graph import Atom, Eqn, Graph, Var, is_var


@dataclasses.dataclass(frozen=True)
class Wait:
    """What an equation waits for.

    Attributes:
      reads: the cotangents that it reads.
      done: the results that must be there first.
    """

    reads: tuple[Var, ...]
    done: tuple[Var, ...]


def parameters_first(
    bwd: Graph,
    cts: Iterable[Var],
    state: Iterable[Atom],
    cost: Callable[[Eqn], float],
) -> tuple[Graph, dict[int, Wait]]:
    """Orders a backward graph.

    Args:
      bwd: takes residuals and cotangents to cotangents.
      cts: its inputs that are cotangents.
      state: its results that are the state's.
      cost: matrix FLOPs of an equation.

    Returns:
      The same equations in the new order, and what some of them wait for, by index.
    """
    moving, ahead = reached(bwd, set(cts)), set(bwd.needed(state))
    product = [cost(eqn) > 0 for eqn in bwd.eqns]
    readers: list[list[int]] = [[] for _ in bwd.eqns]
    missing = [0] * len(bwd.eqns)
    for i, eqn in enumerate(bwd.eqns):
        bound = [v for v in eqn.invars if is_var(v) and v in bwd.producer]
        for k in {bwd.producer[v] for v in bound}:
            readers[k].append(i)
            missing[i] += 1
    ready = [(product[i] and i in ahead, i) for i, n in enumerate(missing) if not n]
    heapq.heapify(ready)
    order: list[Eqn] = []
    waits: dict[int, Wait] = {}
    done: list[Var] = []
    while ready:
        late, i = heapq.heappop(ready)
        eqn = bwd.eqns[i]
        if late and done:
            cotangents = [v for v in eqn.invars if is_var(v) and v in moving]
            waits[len(order)] = Wait(tuple(dict.fromkeys(cotangents)), tuple(done))
            done = []
        elif product[i] and i not in ahead:
            done += eqn.outvars
        order.append(eqn)
        for k in readers[i]:
            missing[k] -= 1
            if not missing[k]:
                heapq.heappush(ready, (product[k] and k in ahead, k))
    return dataclasses.replace(bwd, eqns=tuple(order)), waits
