"""What backpropagation would keep for each stage: the residuals that JAX has.

Each value is counted once, at the first stage whose derivative reads it; a function's
own arguments, and what follows from them without the state, are left out. It is what
`jax.vjp` of the undecorated function holds on to. Limits: the compiler keeps less of
it where it fuses (DESIGN section 7).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from mwc.branches import Branches
from mwc.chained import Chained
from mwc.loops import Loop
from mwc.nodes.checkpoint import Checkpoint
from mwc.nodes.moonwalk import Moonwalk
from mwc.rolled import Steps
from mwc.stages import Stage, Straight
from passes.declared import declared_p
from passes.depend import reached
from passes.graph import Graph, Var, is_var, nbytes
from passes.linearise import Linear


def unrolled(node: Checkpoint) -> list[Stage]:
    """The stages of a chain, those of runs one by one."""
    flat: list[Stage] = []
    for stage in node.stages:
        flat += stage.straight if isinstance(stage, Moonwalk) else [stage]
    return flat


def backprop_bytes(
    flat: Sequence[Stage], carry: Collection[Var] = (), data: Collection[Var] = ()
) -> list[int]:
    """Bytes of the residuals that `jax.vjp` keeps, of each stage.

    Args:
      flat: the stages of a chain (`unrolled`).
      carry: inputs of the chain that are states as well.
      data: inputs that are neither states nor parameters.

    Returns:
      Bytes, one number a stage.
    """
    bound = {*carry, *(v for stage in flat for v in stage.graph.outvars)}
    seen: set[Var] = set()
    found: list[int] = []
    for stage in flat:
        if isinstance(stage, Branches):
            stage = stage.plain
        if isinstance(stage, Loop):
            found.append(stage.length * step_bytes(stage))
            continue
        assert isinstance(stage, Straight)
        fwd, chain = stage.linear.fwd, stage.chain_names()
        sources = [f for f in fwd.invars if chain[f] in bound or chain[f] in data]
        moving = reached(fwd, sources)
        total = 0
        for v in set(filter(is_var, _own(stage.linear))) & moving:
            name = chain.get(_unmarked(fwd, v))
            if name not in data and (name is None or name not in seen):
                seen.update({name} - {None})
                total += nbytes(v)
        found.append(total)
    return found


def _unmarked(fwd: Graph, v: Var) -> Var:
    """What a declaration was put around: the mark is an identity."""
    while v in fwd.producer and fwd.eqns[fwd.producer[v]].primitive is declared_p:
        (v,) = fwd.eqns[fwd.producer[v]].invars[:1]
    return v


def step_bytes(loop: Loop) -> int:
    """Bytes of the residuals of one step, per-step inputs and constants left out."""
    body = loop.body
    if isinstance(body, Steps):
        return sum(backprop_bytes(body.stages, body.graph.invars[loop.carries]))
    if not isinstance(body, Straight):
        assert isinstance(body, Chained)
        carry = body.graph.invars[loop.carries]
        data = () if carry else body.graph.invars[loop.carries.stop :]
        return sum(backprop_bytes(unrolled(body.node), carry, data))
    linear = body.linear
    carry = linear.fwd.invars[loop.carries]
    outer = set(linear.fwd.invars) - set(carry)
    moving = reached(linear.fwd, carry or linear.fwd.invars[loop.carries.stop :])
    rows = {v for v in _own(linear) if is_var(v) and v not in outer}
    return sum(nbytes(v) for v in rows & moving)


def _own(linear: Linear) -> tuple[Any, ...]:
    """The residuals that JAX has."""
    return linear.residuals[: linear.jaxs]
