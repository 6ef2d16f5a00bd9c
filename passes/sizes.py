"""Sizes in numbers, where a dimension may be a symbol.

Under shape-polymorphic `jax.export` a dimension is an expression of symbols, and to
compare two of them may be impossible. Costs take a nominal number instead, the same
for each symbol; what has to hold at every size asks `has_elements`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from jax.export import is_symbolic_dim as is_symbolic

from passes import _jax

NOMINAL = 1024  # what a symbol counts as


def nominal(size: Any) -> int:
    """A size in numbers."""
    return _jax.evaluated(size, NOMINAL) if is_symbolic(size) else size


def has_elements(shape: Iterable[Any]) -> bool:
    """Whether a shape has elements for sure: a symbol alone is never zero."""
    return all(str(n).isidentifier() if is_symbolic(n) else n > 0 for n in shape)
