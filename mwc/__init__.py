"""The Moonwalk compiler: exact gradients of any JAX function in less memory.

Names are imported when they are first used, so that the command line can answer
`--help` and `--version` without importing JAX.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mwc import constraints, errors, memory
    from mwc._check import CheckReport
    from mwc._coisometric import coisometric
    from mwc._compile import Compiled, moonwalk_compile
    from mwc._drift import Drift
    from mwc._plan import Plan
    from mwc._trace import MoonwalkConcretizationError, MoonwalkTracerError
    from mwc._vijp import custom_vijp, register_vijp
    from mwc.errors import (
        MoonwalkDriftError,
        MoonwalkError,
        MoonwalkTargetError,
        MoonwalkTypeError,
        MoonwalkUnsupportedError,
        MoonwalkValueError,
    )

__all__ = [
    "CheckReport",
    "Compiled",
    "Drift",
    "MoonwalkConcretizationError",
    "MoonwalkDriftError",
    "MoonwalkError",
    "MoonwalkTargetError",
    "MoonwalkTracerError",
    "MoonwalkTypeError",
    "MoonwalkUnsupportedError",
    "MoonwalkValueError",
    "Plan",
    "coisometric",
    "constraints",
    "custom_vijp",
    "errors",
    "memory",
    "moonwalk_compile",
    "register_vijp",
]

# The module of each name that is not in `errors`.
_HOMES = {
    "CheckReport": "_check",
    "Compiled": "_compile",
    "Drift": "_drift",
    "MoonwalkConcretizationError": "_trace",
    "MoonwalkTracerError": "_trace",
    "Plan": "_plan",
    "coisometric": "_coisometric",
    "custom_vijp": "_vijp",
    "moonwalk_compile": "_compile",
    "register_vijp": "_vijp",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in ("constraints", "errors", "memory"):
        return importlib.import_module(f"{__name__}.{name}")
    home = importlib.import_module(f"{__name__}.{_HOMES.get(name, 'errors')}")
    found = globals()[name] = getattr(home, name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
