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
        found[name] = getattr(stats, attribute, None)
    # XLA says 0 bytes of code where it does not know, and on the CPU it gives a peak
    # that leaves the temporaries out.
    if not found["generated_code_bytes"]:
        found["generated_code_bytes"] = None
    if (found["peak_bytes"] or 0) <= (found["temp_bytes"] or 0):
        found["peak_bytes"] = None
    return found
