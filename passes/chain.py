"""Chain: cut the state graph where few bytes cross.

The state equations, in program order, are cut once between each two *heavy* ones
(matrix products with a share of the arithmetic, loops, choices between branches), at
the narrowest place, and of equally narrow ones at the first. Long stretches without a
heavy equation are cut by length. A stage is what lies between two cuts, together with
the parameter-side and constant equations that it alone reads. Of those that several
stages read, each makes again what is larger than its parameters and cheap; the rest
forms the prologue.

So a stage has one heavy equation: residual blocks, attention, U-Net skips and plain
layers come out alike, and which cuts are used is the schedule's choice, for a cut
costs what crosses it. The first place is right behind the product, so the activation
belongs to the *next* stage, whose backward reads it off the kept state: a stage
`activation, product` needs nothing but its input, not even sign bits, whatever the
activation. A map that the user declared as one (`passes.declared`) is not cut. Limits:
program order is taken as it is.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
from collections.abc import Callable, Collection, Sequence
from typing import Any

from passes import _jax
from passes.alike import subchains
from passes.depend import Side, last_reads, reached
from passes.flops import eqn_flops, is_product
from passes.graph import Graph, Var, is_var, nbytes
from passes.inline import inline
from passes.links import side_of
from passes.sizes import is_symbolic

_LIGHT = 24  # light equations in one stage, at most about twice this many
_STEPS = 4  # shorter loops are one equation like others
_MANY, _FEW = 256, 64  # stages of a chain, of equal and of unlike ones
_KINDS = 32  # sizes of stages up to which a chain counts as one of equal ones, and
_UNLIKE = 2**14  # unlike stretches of them: the schedule solves each by itself
_CHEAP = 1 / 16  # of a stage's arithmetic: what it makes again of its parameters
_SHARE = 1 / 2000  # of the program's arithmetic makes an equation heavy, or
_SIZE = 1 / 100  # of the arithmetic of the heaviest one


@dataclasses.dataclass(frozen=True, eq=False)
class Piece:
    """One stage of the chain.

    Attributes:
      graph: its equations; inputs are what it reads from outside, results what is
        read outside.
      crossing: the variables that are alive before it and bound by earlier stages.
      made_from: what it reads only to make large parameter-side values of it.
    """

    graph: Graph
    crossing: tuple[Var, ...]
    made_from: tuple[Var, ...] = ()


@dataclasses.dataclass(frozen=True, eq=False)
class Chain:
    """A program as a prologue and a chain of stages.

    Attributes:
      prologue: parameter-side equations that several stages read.
      pieces: the stages, in order.
    """

    prologue: Graph
    pieces: tuple[Piece, ...]


def chain(graph: Graph, sides: Sequence[Side], pinned: Collection[Var] = ()) -> Chain:
    """Cuts a program into stages.

    Args:
      graph: the program.
      sides: the side of each equation (`passes.depend`).
      pinned: variables that stages shall name among their results.

    Returns:
      The chain; evaluating prologue and pieces in order is evaluating the graph.
    """
    state = [i for i, side in enumerate(sides) if side is Side.STATE]
    cuts = _cuts(graph, state)
    bounds = [0, *cuts, len(state)]
    groups = [state[a:b] for a, b in itertools.pairwise(bounds)]
    if not state:
        groups = [[]]
    alone = {
        n for n, g in enumerate(groups) if len(g) == 1 and is_whole(graph.eqns[g[0]])
    }
    shared, own = _sink(graph, sides, groups, alone)
    stages = [sorted(o + g) for o, g in zip(own, groups, strict=True)]
    return _assemble(graph, sorted(shared), stages, {*pinned})


def _cuts(graph: Graph, state: list[int]) -> list[int]:
    """Positions of `state` before which the chain is cut."""
    count = len(state)
    widths = _widths(graph, state)
    counts = [eqn_flops(graph.eqns[i]) for i in state]
    # Elementwise work is light, unless there is nothing else.
    matrices = any(c.matrix for c in counts)
    costs = [c.matrix if matrices else c.elementwise for c in counts]
    floor = min(_SHARE * sum(costs), _SIZE * max(costs, default=0))
    whole = [p for p in range(count) if is_whole(graph.eqns[state[p]])]
    heavy = [p for p in range(count) if costs[p] > floor or p in set(whole)]
    cuts: list[int] = []
    inside = _inside(graph, state)
    for before, after in itertools.pairwise(heavy):
        places = [c for c in range(before + 1, after + 1) if c not in inside]
        cuts += [min(places, key=lambda c: widths[c])] if places else []
    if heavy and heavy[-1] + 1 < count:
        # The head of the loss is a stage of its own.
        behind = range(heavy[-1] + 1, count)
        cuts += [c for c in behind if c not in inside][:1]
    if heavy:
        lead = range(1, heavy[0] + 1)
        cuts += [min(lead, key=lambda c: (widths[c], -c))] if len(lead) > _LIGHT else []
    cuts = _split_long(sorted(set(cuts)), count, widths)
    cuts = [c for c in cuts if c not in inside]
    most = _MANY if len(set(_sizes(cuts, count, costs, widths))) <= _KINDS else _FEW
    kept = _thinned(cuts, widths, most)
    while most > _FEW and len(kept) > _FEW:
        stretches = subchains(_sizes(kept, count, costs, widths))[1]
        if len(stretches) <= _UNLIKE:
            break
        most //= 2
        kept = _thinned(cuts, widths, most)
    return sorted({*kept, *(c for p in whole for c in (p, p + 1) if 0 < c < count)})


def _sizes(
    cuts: list[int], count: int, costs: list[int], widths: list[int]
) -> list[tuple[int, int, int]]:
    """What tells the stages between cuts apart, roughly."""
    return [
        (costs[a:b].count(0), sum(costs[a:b]), widths[a])
        for a, b in zip([0, *cuts], [*cuts, count], strict=True)
    ]


def _inside(graph: Graph, state: list[int]) -> set[int]:
    """Positions within a map that the user declared as one."""
    found, depth = set(), 0
    for position, i in enumerate(state):
        if depth > 0:
            found.add(position)
        side = side_of(graph.eqns[i])
        depth += (side == "in") - (side == "out")
    return found


def _thinned(cuts: list[int], widths: list[int], most: int) -> list[int]:
    """At most `most` cuts: the narrowest of each run of neighbours."""
    run = -(-len(cuts) // most)
    if run <= 1:
        return cuts
    windows = [cuts[k : k + run] for k in range(0, len(cuts), run)]
    return [min(w, key=lambda c: (widths[c], c)) for w in windows]


def _split_long(cuts: list[int], count: int, widths: list[int]) -> list[int]:
    """Cuts stretches of more than two `_LIGHT`s at their narrowest places."""
    found = []
    for start, stop in zip([0, *cuts], [*cuts, count], strict=True):
        if start:
            found.append(start)
        while stop - start > 2 * _LIGHT:
            window = range(start + _LIGHT // 2, start + _LIGHT * 3 // 2)
            start = min(window, key=lambda c: (widths[c], -c))
            found.append(start)
    return found


def is_loop(eqn: Any) -> bool:
    """Whether an equation is a stage of its own that keeps its loop form."""
    if eqn.primitive.name != "scan" or eqn.effects:
        return False
    # The schedule of a loop is a table, which needs a number of steps.
    length = eqn.params["length"]
    if is_symbolic(length) or not length:
        return False
    return length >= _STEPS or _deep(eqn.params["jaxpr"])


def is_choice(eqn: Any) -> bool:
    """Whether an equation is a stage of its own with a chain in some branch."""
    if eqn.primitive.name != "cond" or eqn.effects:
        return False
    branches = eqn.params["branches"]
    return not any(_jax.opened(b)[1] for b in branches) and any(map(_deep, branches))


def _deep(branch: Any) -> bool:
    """Whether a branch has several products, or stages of their own."""
    eqns = inline(branch).eqns
    return sum(eqn_flops(e).matrix > 0 for e in eqns) > 1 or any(map(is_whole, eqns))


def is_whole(eqn: Any) -> bool:
    """Whether an equation is a stage of its own."""
    return is_loop(eqn) or is_choice(eqn)


def _widths(graph: Graph, state: list[int]) -> list[int]:
    """Bytes of state values that cross each cut position."""
    delta = [0] * (len(state) + 2)
    last = last_reads(graph, state)
    for position, i in enumerate(state):
        for v in graph.eqns[i].outvars:
            end = last.get(v, position)
            delta[position + 1] += nbytes(v)
            delta[end + 1] -= nbytes(v)
    widths, total = [], 0
    for d in delta[:-1]:
        total += d
        widths.append(total)
    return widths


def _sink(
    graph: Graph, sides: Sequence[Side], groups: list[list[int]], alone: set[int]
) -> tuple[set[int], list[list[int]]]:
    """Gives each parameter-side equation to the only stage that reads it.

    Constant equations go to every stage that reads them, and so do those whose
    results are better made again than kept for all (`_Expanded`). Stages in `alone`
    take none.
    """
    outside = -1
    expanded = _Expanded(graph, groups)
    readers: dict[Var, set[int]] = {}
    for v in graph.outvars:
        if is_var(v):
            readers.setdefault(v, set()).add(outside)
    for stage, group in enumerate(groups):
        for i in group:
            for v in graph.eqns[i].invars:
                if is_var(v):
                    reader = outside if stage in alone else stage
                    readers.setdefault(v, set()).add(reader)
    shared: set[int] = set()
    own: list[list[int]] = [[] for _ in groups]
    for i in reversed(range(len(graph.eqns))):
        eqn, side = graph.eqns[i], sides[i]
        if side is Side.STATE:
            continue
        stages = set().union(*(readers.get(v, set()) for v in eqn.outvars))
        single = len(stages) == 1 and outside not in stages
        copy = outside not in stages and (side is Side.CONST or expanded(i, stages))
        if not single and not copy:
            shared.add(i)
            stages = {outside}
        else:
            for stage in stages:
                own[stage].append(i)
        for v in eqn.invars:
            if is_var(v):
                readers.setdefault(v, set()).update(stages)
    return shared, own


class _Expanded:
    """Which parameter-side equations are made again at every stage that reads them.

    Those whose results are larger than the parameters they follow from (a product
    of low rank, a cast to more bits), if that is cheap beside every such stage. Their
    cotangents then add up where they are small, in the parameters.
    """

    def __init__(self, graph: Graph, groups: list[list[int]]):
        self._graph, self._groups = graph, groups
        self._flops = functools.cache(lambda i: eqn_flops(graph.eqns[i]).total)

    def __call__(self, i: int, stages: Collection[int]) -> bool:
        graph, outs = self._graph, self._graph.eqns[i].outvars
        if sum(map(nbytes, outs)) <= sum(map(nbytes, graph.inputs_of(outs))):
            return False
        cost = sum(map(self._flops, graph.needed(outs)))
        least = min(sum(map(self._flops, self._groups[s])) for s in stages)
        return cost <= _CHEAP * least


def _assemble(
    graph: Graph, shared: list[int], stages: list[list[int]], pinned: set[Var]
) -> Chain:
    # An equation that is copied to its readers never crosses a cut.
    times = collections.Counter(i for indices in stages for i in indices)
    copied = {v for i, n in times.items() if n > 1 for v in graph.eqns[i].outvars}

    def piece(indices: list[int], wanted: Callable[[Var], bool]) -> Graph:
        eqns = [graph.eqns[i] for i in indices]
        bound = {v for e in eqns for v in e.outvars}
        reads = dict.fromkeys(v for e in eqns for v in e.invars if is_var(v))
        invars = tuple(v for v in reads if v not in bound)
        outs = dict.fromkeys(
            v for e in eqns for v in e.outvars if wanted(v) and v not in copied
        )
        return Graph(invars, tuple(outs), tuple(eqns))

    results = {v for v in graph.outvars if is_var(v)} | pinned
    place: dict[Var, int] = {}
    for stage, indices in enumerate(stages):
        for i in indices:
            for v in graph.eqns[i].invars:
                if is_var(v):
                    place[v] = max(place.get(v, -1), stage)
    prologue = piece(shared, lambda v: v in place or v in results)
    alive: dict[Var, int] = {}  # crossing variables and the last stage that reads them
    pieces = []
    for stage, indices in enumerate(stages):
        alive = {v: last for v, last in alive.items() if last >= stage}
        leaves = functools.partial(_leaves, place, results, stage)
        body = piece(indices, leaves)
        pieces.append(Piece(body, tuple(alive), _made_from(body, tuple(alive))))
        alive |= {v: place[v] for v in body.outvars if place.get(v, -1) > stage}
    return Chain(prologue, tuple(pieces))


def _made_from(body: Graph, state: Collection[Var]) -> tuple[Var, ...]:
    """The inputs of a stage that grow, without the state, into operands of products.

    What else grows is fused where it is read, and is never there as a whole.
    """
    moving = reached(body, state)
    products = [e for e in body.eqns if is_product(e)]
    operands = {v for e in products for v in e.invars if is_var(v)} - moving
    found: set[Var] = set()
    for v in operands & body.producer.keys():
        roots = body.inputs_of([v])
        if nbytes(v) > sum(map(nbytes, roots)):
            found |= roots
    return tuple(v for v in body.invars if v in found)


def _leaves(
    place: dict[Var, int], results: Collection[Var], stage: int, var: Var
) -> bool:
    """Whether a variable is read behind its stage."""
    return place.get(var, -1) > stage or var in results
