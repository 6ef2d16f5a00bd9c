"""Which stages can be rebuilt, and which of them make a run.

A stage is rebuilt where its cotangent can be pushed forward (`passes.submersion`), how
much errors grow is known, and the bits that sweep R needs are fewer than its state. A
run is as long as the growth of rounding allows: after n stages it is about

    5 eps sqrt(n) prod(A)

with A the amplification of each stage, and a run ends where that would pass most of
`tolerance` (the guard's limit is all of it), or after 128 stages. Source: DESIGN
section 5 (6e-7 in float32). Limits: the estimate is of an average; the guard sees what
is worse.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from mwc.guard import planned_tolerance
from mwc.loops import Loop
from mwc.nodes.moonwalk import Moonwalk
from mwc.nodes.rebuild import Rebuilt, linked
from mwc.rolled import RebuiltLoop, Steps
from mwc.sketches import planned_shape
from mwc.stages import Stage, Straight
from passes import _jax
from passes.declared import Fact
from passes.fixed import Fixed
from passes.flops import eqn_flops
from passes.graph import Graph, Var, is_var, nbytes
from passes.linearise import Linear, is_inexact
from passes.residuals import narrowest, packed_bytes
from passes.sizes import is_symbolic
from passes.submersion import Inverse, Rule, Submersion, run_error, submersion
from passes.widen import is_narrow, widened

_LONGEST = 128  # stages of a run
_SHARE = 0.7  # of the tolerance
_ROUNDING = 5.0  # units in the last place that a stage adds
_TRIES = 3  # arrays with which stages alike cannot be rebuilt: others are not tried


class _Found(NamedTuple):
    """What equal stages share: the derivative that is swept, its inverses, bits."""

    linear: Linear
    submersion: Submersion
    bits: tuple[Var, ...]


class Judge:
    """Judges the stages of one program; equal ones are judged once.

    Args:
      outside: the program's own inputs and what follows from parameters.
      known: what is known of weights.
      fixed: values of what is always the same.
    """

    def __init__(
        self,
        outside: Collection[Var],
        known: Mapping[Var, Fact],
        fixed: Fixed | None = None,
    ):
        self._outside, self._known, self._fixed = outside, known, fixed
        self._found: dict[Any, _Found] = {}
        self._alike: dict[Any, _Found] = {}
        self._failed: collections.Counter[int] = collections.Counter()

    def __call__(self, stage: Stage) -> Rebuilt | str:
        """The stage as one that can be rebuilt, or why it cannot."""
        if not isinstance(stage, Straight):
            return "it is no straight-line code"
        graph, linear = stage.graph, stage.linear
        made = (v for eqn in graph.eqns for v in eqn.outvars)
        ends = (*graph.invars, *made)
        if any(_jax.is_split(v.aval) for v in ends):
            return "it is sharded over Explicit mesh axes, not Auto ones"
        if any(is_symbolic(n) for v in ends for n in getattr(v.aval, "shape", ())):
            return "it has symbolic dimensions, and sketches want numbers"
        pairs = zip(graph.invars, linear.active, strict=True)
        states = [v for v, a in pairs if a and v not in self._outside]
        results = [v for v in graph.outvars if is_var(v) and is_inexact(v)]
        if len(states) != 1 or len(set(results)) != 1:
            return f"it reads {len(states)} states and makes {len(set(results))}"
        if any(eqn.effects for eqn in graph.eqns):
            return "it has effects"
        (state,), result = states, results[0]
        names = dict(zip(graph.invars, linear.fwd.invars, strict=True))
        wide, found, bits = self._judged(stage, names, names[state])
        if not found.can_rebuild:
            return f"{found.verdict.value}: {found.reason}"
        if sum(inverse.claimed for inverse in found.inverses) > 1:
            return "several of its maps rest on claims, and the guard sees them as one"
        if wide is not linear and any(_narrow_only(i) for i in found.inverses):
            return "in less than 32 bits operands tie, and users' rules are not called"
        if wide is not linear and any(_has_rule(eqn) for eqn in graph.eqns):
            return "its cotangents would be widened, and a custom_vjp may round them"
        if sum(packed_bytes(v) for v in bits) >= nbytes(state):
            return "sweep R would keep as much of it as its state"
        swept = dataclasses.replace(stage, bit_vars=bits, linear=wide)
        return Rebuilt(swept, found, state, result)

    def _judged(self, stage: Straight, names: Mapping[Var, Var], state: Var) -> _Found:
        given = {f: self._known[v] for v, f in names.items() if v in self._known}
        same = id(stage.linear)
        key = same, tuple(sorted((str(f), str(x)) for f, x in given.items()))
        look = functools.partial(self._seen, stage, names, state, given)
        if key not in self._found:
            self._found[key] = look({})
        found = self._found[key]
        if found.submersion.can_rebuild or self._failed[same] >= _TRIES:
            return found
        # Only now: what is looked at is looked at anew for each array.
        fixed = {} if self._fixed is None else self._fixed(names)
        if not fixed:
            return found
        values = {names[v]: x for v, x in fixed.items()}
        key = *key, tuple((str(f), id(x)) for f, x in values.items())
        if key not in self._found:
            again = look(values)
            can = again.submersion.can_rebuild
            self._failed[same] += not can
            ways = tuple(i.way for i in again.submersion.inverses)
            # With the same inverses it is the same step, whatever the values.
            self._found[key] = (
                self._alike.setdefault((same, ways), again) if can else found
            )
        return self._found[key]

    def _seen(
        self,
        stage: Straight,
        names: Mapping[Var, Var],
        state: Var,
        given: dict[Var, Fact],
        values: dict[Var, Any],
    ) -> _Found:
        linear = wide = stage.linear
        found = submersion(linear, state, given, values)
        if found.can_rebuild and _is_narrow(found):
            wide = widened(linear) or linear
        if wide is not linear:
            found = submersion(wide, state, given, values)
        bits = self._bits(stage.graph, wide, names) if found.can_rebuild else ()
        return _Found(wide, found, bits)

    def _bits(
        self, graph: Graph, linear: Linear, names: Mapping[Var, Var]
    ) -> tuple[Var, ...]:
        """The least that determines h_in from h_out, the state not at hand."""
        states = [f for v, f in names.items() if v not in self._outside]
        moving = [v for v, a in zip(graph.invars, linear.active, strict=True) if a]
        pairs = zip(moving, linear.bwd.outvars, strict=True)
        outs = [ct for v, ct in pairs if v not in self._outside]
        read = linear.bwd.inputs_of(outs)
        both = zip(linear.residuals, linear.residual_inputs, strict=True)
        need = [r for r, v in both if v in read]
        return narrowest(
            linear.fwd, need, states, lambda e: eqn_flops(e).matrix, at_hand=False
        )


def _is_narrow(found: Submersion) -> bool:
    """Whether the cotangent is rounded to less than 32 bits on its way."""
    eqns = [e for inverse in found.inverses for e in inverse.link.eqns]
    path = (found.state, *(v for e in eqns for v in (*e.invars, *e.outvars)))
    return any(is_narrow(v.aval) for v in path)


def _has_rule(eqn: Any) -> bool:
    """Whether a user's backward is in an equation, or in a program inside of it."""
    inner = (e for body in _jax.sub_jaxprs(eqn) for e in body.eqns)
    return "custom_vjp" in eqn.primitive.name or any(map(_has_rule, inner))


def _narrow_only(inverse: Inverse) -> bool:
    """Whether a link cannot be inverted for a state of less than 32 bits.

    Entries of such a state tie often, and a user's rule expects cotangents like it.
    """
    return inverse.ties or inverse.rule is Rule.CUSTOM


def runs(
    judged: Sequence[Rebuilt | str],
    crossing: Sequence[tuple[Var, ...]],
    results: Collection[Var],
    tolerance: float | None,
) -> list[tuple[int, int]]:
    """Runs of at least two stages, as (start, stop).

    Args:
      judged: every stage.
      crossing: the variables alive before each stage.
      results: the program's results and pinned variables, which no run may hide.
      tolerance: the user's own, or None.
    """
    found: list[tuple[int, int]] = []
    start = 0
    for i in range(len(judged) + 1):
        one = judged[i] if i < len(judged) else ""
        if start < i and not _continues(judged, crossing, results, start, i, tolerance):
            if i - start > 1:
                found.append((start, i))
            start = i
        if isinstance(one, str):
            start = i + 1
    return found


def _continues(
    judged: Sequence[Rebuilt | str],
    crossing: Sequence[tuple[Var, ...]],
    results: Collection[Var],
    start: int,
    i: int,
    tolerance: float | None,
) -> bool:
    if i >= len(judged) or i - start >= _LONGEST:
        return False
    before, here = judged[i - 1], judged[i]
    if isinstance(before, str) or isinstance(here, str) or not linked(before, here):
        return False
    if before.result in (*results, *_alive(crossing, i + 1)):
        return False
    # Sweep V makes one array of a stage: masks and counters would be lost.
    if any({*one.stage.graph.outvars} != {one.result} for one in (before, here)):
        return False
    run = [one for one in judged[start : i + 1] if isinstance(one, Rebuilt)]
    most = _SHARE * planned_tolerance(before.result.aval.dtype, tolerance)
    return growth(run) <= most


def growth(run: Sequence[Rebuilt]) -> float:
    """The rounding that rebuilding a run is expected to add.

    Every cotangent on the way counts: a product of bfloat16 rounds a float32 one.
    """
    eps = max(one.eps for one in run)
    return _ROUNDING * eps * run_error([one.found.amplification or 1.0 for one in run])


def rebuilt_loop(
    loop: Loop, run: Sequence[Rebuilt], tolerance: float | None
) -> RebuiltLoop | str:
    """A loop whose steps are rebuilt, with a cotangent kept as often as it must be.

    Or why there is none.

    Args:
      loop: the loop.
      run: the stages of a step, one or those of `runs`.
      tolerance: the user's own, or None.
    """
    graph, last = loop.body.graph, run[-1]
    nexts, carries = graph.outvars, graph.invars[loop.carries]
    place = carries.index(run[0].state)
    if [v for v in nexts if is_inexact(v)] != [nexts[place]]:
        return "its steps make more than the carry that the next step reads"
    if len(run) > 1 and nexts != (last.result,):
        return "its steps have several stages, and make more than one carry"
    most = _SHARE * planned_tolerance(last.result.aval.dtype, tolerance)
    every = max(1, min(_LONGEST // len(run), loop.length))
    while every > 1 and growth([*run] * every) > most:
        every -= 1
    if growth(run) > most:
        return "one step alone rounds too much for the tolerance"
    eqns = [
        e for one in run for inverse in one.found.inverses for e in inverse.link.eqns
    ]
    work = [eqn_flops(eqn) for eqn in graph.eqns]
    push = [eqn_flops(eqn) for eqn in eqns]
    matrices = any(count.matrix for count in work)

    def total(counts: Sequence[Any]) -> float:
        return sum(c.matrix if matrices else c.elementwise for c in counts)

    stops = (loop.length - 1) // every
    rows = min(one.found.rows for one in run)
    marks = sum(math.prod(planned_shape(one.result, rows)) for one in run)
    largest = max(nbytes(one.last) for one in run)
    stages = tuple(one.stage for one in run)
    again = total(push) + sum(stage.rerun for stage in stages)
    return RebuiltLoop(
        loop.graph,
        stages[0] if len(run) == 1 else Steps(graph, stages),
        group=1,
        slots=0,
        pruned=True,
        # Sweep V runs every step, pushes, and reruns what gradients need.
        leaf_forwards=1 + again / max(1.0, total(work)),
        leaf_bytes=stops * nbytes(last.last) + 3 * largest + 4 * loop.length * marks,
        stages=tuple(run),
        every=every,
        exact=_exact(run),
        tolerance=tolerance,
    )


def merged(
    stages: Sequence[Stage],
    judged: Sequence[Rebuilt | str],
    crossing: Sequence[tuple[Var, ...]],
    results: Collection[Var],
    spans: Sequence[tuple[int, int]],
    tolerance: float | None,
) -> tuple[list[Stage], list[tuple[Var, ...]]]:
    """The chain with each run as one stage."""
    out: list[Stage] = []
    alive: list[tuple[Var, ...]] = []
    starts = dict(spans)
    i = 0
    while i < len(stages):
        alive.append(crossing[i])
        if i in starts:
            run = tuple(
                one for one in judged[i : starts[i]] if isinstance(one, Rebuilt)
            )
            lead = _lead(out, run[0], (*results, *_alive(crossing, i + 1)))
            if lead is not None:
                out.pop()
                alive.pop()
            out.append(Moonwalk(run, lead, _exact(run), tolerance))
            i = starts[i]
        else:
            out.append(stages[i])
            i += 1
    return out, alive


def _alive(crossing: Sequence[tuple[Var, ...]], i: int) -> tuple[Var, ...]:
    """The variables alive before a stage, of which there may be none."""
    return crossing[i] if i < len(crossing) else ()


def _lead(
    before: Sequence[Stage], first: Rebuilt, elsewhere: Collection[Var]
) -> Straight | None:
    """The stage before a run, if all it reads is the program's own inputs.

    What it makes must be read by the run's first stage alone: a cotangent that came
    from `elsewhere` would not reach it.
    """
    if first.state in elsewhere:
        return None
    stage = before[-1] if before else None
    if not isinstance(stage, Straight) or stage.bits or len(before) > 1:
        return None
    results = [v for v in stage.graph.outvars if is_var(v)]
    effects = any(eqn.effects for eqn in stage.graph.eqns)
    return stage if results == [first.state] and not effects else None


def _exact(run: Sequence[Rebuilt]) -> bool:
    """Whether all products of float32 ask for full precision."""
    asked = [
        str(eqn.params.get("precision"))
        for one in run
        for eqn in one.stage.graph.eqns
        if eqn_flops(eqn).matrix > 0
    ]
    return all("HIGHEST" in text or "F32_F32_F32" in text for text in asked)
