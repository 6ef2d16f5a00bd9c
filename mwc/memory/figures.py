"""What the compiler says about a program: bytes by kind, and how long it took."""

from __future__ import annotations

import time
from typing import Any

FIGURES = {
    "argument_bytes": "argument_size_in_bytes",
    "output_bytes": "output_size_in_bytes",
    "temp_bytes": "temp_size_in_bytes",
    "peak_bytes": "peak_memory_in_bytes",
    "generated_code_bytes": "generated_code_size_in_bytes",
}
# XLA says 0 where it does not know: a program has code, and a peak.
_UNKNOWN_IF_ZERO = ("peak_bytes", "generated_code_bytes")


def figures(lowered: Any) -> dict[str, Any]:
    """Compiles and asks the compiler what the program needs.

    Args:
      lowered: a `jax.stages.Lowered`.

    Returns:
      The byte counts by the names of a report's row, None where the compiler says
      nothing, and the seconds that XLA took.
    """
    start = time.perf_counter()
    stats = lowered.compile().memory_analysis()
    found: dict[str, Any] = {"compile_seconds": time.perf_counter() - start}
    for name, attribute in FIGURES.items():
        value = getattr(stats, attribute, None)
        found[name] = None if value == 0 and name in _UNKNOWN_IF_ZERO else value
    return found
