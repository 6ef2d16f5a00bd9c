"""A program as a list of equations between variables, and its lazy evaluator.

`Graph` is an open jaxpr without constants: JAX's own equations and variables, in
program order. `evaluate` is the only interpreter of the project. It runs no more
than what the asked outputs need, and stops at every value that is given; so one
graph serves to advance a stage, to rerun its interior up to a residual, and to pull
only those cotangents that somebody wants.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from passes import _jax
from passes.sizes import nominal

Var = Any
Atom = Any
Eqn = Any


@dataclasses.dataclass(frozen=True, eq=False)
class Graph:
    """Equations in program order.

    Attributes:
      invars: the inputs.
      outvars: the results, variables or literals.
      eqns: the equations; each variable is bound once.
    """

    invars: tuple[Var, ...]
    outvars: tuple[Atom, ...]
    eqns: tuple[Eqn, ...]

    @functools.cached_property
    def producer(self) -> dict[Var, int]:
        """Index of the equation that binds a variable."""
        return {
            v: i
            for i, eqn in enumerate(self.eqns)
            for v in eqn.outvars
            if not _jax.is_drop(v)
        }

    def needed(self, outputs: Iterable[Atom], given: Iterable[Var] = ()) -> list[int]:
        """Indices of the equations that `outputs` need when `given` are known."""
        given, producer, eqns = set(given), self.producer, self.eqns
        found: set[int] = set()
        stack = [v for v in outputs if is_var(v) and v not in given]
        while stack:
            index = producer.get(stack.pop())
            if index is not None and index not in found:
                found.add(index)
                stack += [v for v in eqns[index].invars if is_var(v) and v not in given]
        return sorted(found)

    def inputs_of(self, outputs: Iterable[Atom], given: Iterable[Var] = ()) -> set[Var]:
        """The inputs, given ones included, that `outputs` are computed from."""
        outputs, given = list(outputs), set(given)
        read = {v for v in outputs if is_var(v)}
        for i in self.needed(outputs, given):
            read.update(v for v in self.eqns[i].invars if is_var(v))
        return {v for v in read if v in given or v not in self.producer}


def is_var(atom: Atom) -> bool:
    """Whether an atom is a variable, not a literal."""
    return not isinstance(atom, _jax.Literal)


def from_jaxpr(jaxpr: Any) -> Graph:
    """The graph of a jaxpr that has no constants."""
    inner, consts = _jax.opened(jaxpr)
    assert not consts, "constants are hoisted to inputs before this point"
    return Graph(tuple(inner.invars), tuple(inner.outvars), tuple(inner.eqns))


def to_jaxpr(graph: Graph) -> Any:
    """The closed jaxpr of a graph."""
    return _jax.closed(list(graph.invars), list(graph.outvars), list(graph.eqns))


def read(env: Mapping[Var, Any], atom: Atom) -> Any:
    """The value of an atom."""
    return env[atom] if is_var(atom) else atom.val


def astype(x: Any, var: Var) -> Any:
    """A value in the dtype of a variable."""
    dtype = getattr(var.aval, "dtype", None)
    return x if dtype in (None, x.dtype) else x.astype(dtype)


def evaluate(
    graph: Graph,
    env: dict[Var, Any],
    outputs: Sequence[Atom],
    effects: bool = False,
    before: Callable[[int], None] | None = None,
) -> list[Any]:
    """Runs what `outputs` need, from the values in `env`, which it extends.

    Args:
      graph: the program.
      env: values of variables; whatever is in it is not computed again.
      outputs: the atoms asked for.
      effects: also run equations that have effects, in order.
      before: called with the index of each equation that is run, before it is; it
        may replace values in `env`.

    Returns:
      The values of `outputs`.
    """
    needed = graph.needed(outputs, env)
    if effects:
        loud = [i for i, eqn in enumerate(graph.eqns) if eqn.effects]
        asked = [v for i in loud for v in graph.eqns[i].invars]
        needed = sorted({*needed, *loud, *graph.needed(asked, env)})
    for i in needed:
        eqn = graph.eqns[i]
        if before is not None:
            before(i)
        results = _jax.bind(eqn, [read(env, v) for v in eqn.invars])
        for var, value in zip(eqn.outvars, results, strict=True):
            if not _jax.is_drop(var):
                env.setdefault(var, value)
    return [read(env, v) for v in outputs]


def extents(atom: Atom) -> tuple[int, ...]:
    """The shape of a value in numbers: symbolic dimensions count as a nominal one."""
    shape = getattr(atom.aval, "shape", ())
    return tuple(max(0, nominal(n)) for n in shape)


def size(atom: Atom) -> int:
    """Elements of a value; see `extents`."""
    return max(0, nominal(math.prod(getattr(atom.aval, "shape", ()))))


def nbytes(atom: Atom) -> int:
    """Bytes of a value; PRNG keys count their key data."""
    if not hasattr(atom.aval, "shape"):
        return 0
    item = getattr(atom.aval.dtype, "itemsize", None)
    return size(atom) * (item if item is not None else 8)
