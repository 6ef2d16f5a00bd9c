"""Ties: what a pairwise maximum and minimum lose where both operands are equal.

JAX splits the cotangent of a maximum in half where its operands tie, and that of the
minimum too, so of h_max and h_min only the sum is left: a *fragment*, their difference,
is lost. In float32 a tie is rare, but a deep network sees one in every few dozen steps.
Sweep R therefore looks at what the inverse of such a link would give, and keeps the two
largest entries of what it misses, with their places; sweep V adds them back. That is
exact for one tie in a stage; where more tie at once, the guard trips.

Source: DESIGN section 2, "Ties and flat points". Limits: two numbers a link.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

Array = Any

_KEPT = 2  # one pair


def missed(h: Array, rebuilt: Array) -> list[Array]:
    """Places and values of the largest entries of h - rebuilt.

    Args:
      h: a cotangent.
      rebuilt: what the inverse of the link makes of its image; mostly equal to h.

    Returns:
      int32 places in the flat array, and values.
    """
    gap = (h - rebuilt).ravel()
    size = jnp.abs(gap)
    places: list[Array] = []
    for _ in range(min(_KEPT, gap.size)):
        places.append(jnp.argmax(size).astype(jnp.int32))
        size = jnp.where(jnp.arange(gap.size) == places[-1], -1, size)
    at = jnp.stack(places) if places else jnp.zeros(0, jnp.int32)
    return [at, gap[at]]


def mended(h: Array, kept: list[Array]) -> Array:
    """A rebuilt cotangent with what was missed added back."""
    at, values = kept
    return h.ravel().at[at].add(values).reshape(h.shape)
