"""The Moonwalk compiler: exact gradients of any JAX function in less memory."""

from __future__ import annotations

import os

from mwc import constraints
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
from passes import _jax, graph

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
    "moonwalk_compile",
    "register_vijp",
]

# Tracebacks and source lines show the user's frames, not ours.
for _path in (__file__, graph.__file__):
    _jax.exclude_frames(os.path.dirname(os.path.abspath(_path)) + os.sep)
