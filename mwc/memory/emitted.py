"""The programs behind the primitives of a decorated function, for counting them.

A moonwalk primitive carries the user's function; the sweeps that it is lowered as come
from tracing its evaluation.
"""

from __future__ import annotations

from typing import Any

import jax

from passes import _jax

_PREFIX = "moonwalk_"


def emitted(eqn: Any) -> list[tuple[Any, int]] | None:
    """The (jaxpr, trips) that an equation runs, None if it is no primitive of ours."""
    if not eqn.primitive.name.startswith(_PREFIX):
        return None

    def run(*args: Any) -> Any:
        return eqn.primitive.impl(*args, **eqn.params)

    def evaluate(*args: Any) -> Any:
        return _jax.bind(eqn, list(args), instead=run)

    return [(jax.make_jaxpr(evaluate)(*(v.aval for v in eqn.invars)), 1)]
