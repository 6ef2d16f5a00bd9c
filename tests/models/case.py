"""A small model with its loss.

Build models in float64 mode.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

KEY = jax.random.key(7)


@dataclasses.dataclass
class Case:
    """A loss with its arguments.

    Attributes:
      loss: of (model, x, rest).
      args: those three.
      has_aux: whether it returns (value, aux).
      rtol: of the largest entry of each leaf.
    """

    loss: Callable[..., Any]
    args: tuple[Any, Any, Any]
    has_aux: bool = False
    rtol: float = 1e-9


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape))


def doubles(tree):
    """Flax makes float32 parameters whatever the mode."""

    def wide(x):
        return x.astype(jnp.float64) if x.dtype == jnp.float32 else x

    return jax.tree.map(wide, tree)
