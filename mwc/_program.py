"""What the differentiation primitives need to know of one traced function.

A `Program` is the compiled form of one function at one set of shapes. The four
primitives (`mwc._primitives`) know programs, never stages; the engine
(`mwc._engine`) builds programs, and knows nothing of transformations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

Array = Any  # a jax.Array or a tracer


class Program(Protocol):
    """A flat function with the sweeps that differentiate it.

    Attributes:
      jaxpr: a closed jaxpr without constants; its invars are the flat arguments
        (closed-over values first), its outvars the flat results.
      plan: what is kept and why (`mwc.Plan`).
      guarded: the rows of `plan.stages` whose cotangents are checked.
    """

    jaxpr: Any
    plan: Any
    guarded: tuple[int, ...]

    def forward(
        self, active: tuple[bool, ...], args: Sequence[Array]
    ) -> tuple[list[Array], list[Array]]:
        """Evaluates the function and keeps what `backward` will need.

        Args:
          active: one flag an argument, True where it carries a tangent.
          args: the flat arguments.

        Returns:
          The flat results and the saved values, whose number, shapes and dtypes
          depend on `active` and the arguments' avals alone.
        """
        ...

    def backward(
        self,
        active: tuple[bool, ...],
        wanted: tuple[bool, ...],
        args: Sequence[Array],
        saved: Sequence[Array],
        cts: Sequence[Array | None],
        drift: bool = False,
    ) -> list[Array]:
        """Pulls cotangents of the results back to arguments.

        Args:
          active: the flags that `forward` was called with.
          wanted: the arguments whose cotangents are asked for; implies `active`.
          args: the flat arguments.
          saved: what `forward` saved.
          cts: one cotangent a result, None where it is a symbolic zero.
          drift: whether the readings of guards are asked for too.

        Returns:
          One cotangent for each True of `wanted`, in order, of the argument's
          shape and dtype; with `drift`, then a vector with one entry for each of
          `guarded`, its reading as a fraction of its limit.
        """
        ...
