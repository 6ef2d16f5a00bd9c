"""What the compiler says about a program: bytes by kind, and how long it took.

Asked for the live ranges, it also writes its buffer assignment down, which
`mwc.memory.buffers` reads. A program that JAX's own compilation cache answers for is
not compiled, and a TPU's compiler writes nothing: then there are no live ranges.
"""

from __future__ import annotations

import pathlib
import tempfile
import time
from typing import Any

from mwc.memory import buffers

FIGURES = {
    "argument_bytes": "argument_size_in_bytes",
    "output_bytes": "output_size_in_bytes",
    "temp_bytes": "temp_size_in_bytes",
    "peak_bytes": "peak_memory_in_bytes",
    "generated_code_bytes": "generated_code_size_in_bytes",
}


def figures(lowered: Any, platform: str, live: bool = False) -> dict[str, Any]:
    """Compiles and asks the compiler what the program needs.

    Args:
      lowered: a `jax.stages.Lowered`.
      platform: what it is lowered for.
      live: whether to ask for the live range of every value too.

    Returns:
      The byte counts by the names of a report's row, None where the compiler says
      nothing, and the seconds that XLA took; with `live` also "live", what
      `buffers.read` gives, or None.
    """
    if not live:
        return _compiled(lowered, platform, None)
    with tempfile.TemporaryDirectory(prefix="mwc-") as place:
        options = {"xla_dump_to": place, "xla_dump_hlo_as_text": True}
        found = _compiled(lowered, platform, options)
        return {**found, "live": buffers.read(pathlib.Path(place))}


def _compiled(
    lowered: Any, platform: str, options: dict[str, Any] | None
) -> dict[str, Any]:
    start = time.perf_counter()
    stats = lowered.compile(compiler_options=options).memory_analysis()
    found: dict[str, Any] = {"compile_seconds": time.perf_counter() - start}
    for name, attribute in FIGURES.items():
        found[name] = getattr(stats, attribute, None)
    # XLA says 0 bytes of code where it does not know, and its CPU compiler gives a
    # peak that leaves the temporaries out.
    if not found["generated_code_bytes"]:
        found["generated_code_bytes"] = None
    if platform == "cpu" or not found["peak_bytes"]:
        found["peak_bytes"] = None
    return found
