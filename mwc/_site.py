"""One use of a primitive: which function, which masks, which levels of `vmap`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp

from mwc._levels import Level
from mwc._spec import Mask, Spec
from passes import _jax

call_p = _jax.new_primitive("moonwalk_call")
forward_p = _jax.new_primitive("moonwalk_forward")
linear_p = _jax.new_primitive("moonwalk_linear")
backward_p = _jax.new_primitive("moonwalk_backward")


@dataclass(frozen=True)
class Site:
    """What one use of a primitive knows, apart from its operands.

    Attributes:
      spec: the function, shared by all uses.
      active: the arguments that `forward` knew to carry tangents.
      kept: the saved values that are passed on.
      moving: arguments with a tangent (`linear`), or wanted (`backward`).
      results: results asked for (`linear`), or with a cotangent (`backward`).
      levels: the levels of `vmap` around it, innermost first.
    """

    spec: Spec
    active: Mask = ()
    kept: Mask = ()
    moving: Mask = ()
    results: Mask = ()
    levels: tuple[Level, ...] = ()

    @property
    def start(self) -> int:
        """Number of operands before tangents or cotangents."""
        return len(self.spec.in_avals) + sum(self.kept)

    def relevel(self, change: Callable[[Level], Level], **fields: Any) -> Site:
        """Another site whose levels are changed one by one."""
        return replace(self, levels=tuple(change(v) for v in self.levels), **fields)


def choose(mask: Sequence[bool], values: Sequence[Any]) -> list[Any]:
    """The values at the True places of a mask."""
    return [v for v, one in zip(values, mask, strict=True) if one]


def narrowed(mask: Mask, flags: Sequence[bool]) -> Mask:
    """A mask with only those of its True places left whose flag is set."""
    rest = iter(flags)
    return tuple(one and next(rest) for one in mask)


def filled(mask: Sequence[bool], some: Sequence[Any], base: Sequence[Any]) -> list[Any]:
    rest = iter(some)
    return [next(rest) if one else old for one, old in zip(mask, base, strict=True)]


def merged(mask: Sequence[bool], yes: Sequence[Any], no: Sequence[Any]) -> list[Any]:
    """Undoes a split of values by a mask."""
    first, second = iter(yes), iter(no)
    return [next(first) if one else next(second) for one in mask]


def is_float(aval: Any) -> bool:
    """Whether values of a type have tangents of the same type."""
    return jnp.issubdtype(aval.dtype, jnp.inexact)
