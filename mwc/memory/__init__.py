"""Compiled memory: what a gradient needs, here or on a GPU that is not there."""

from mwc.memory.depth import Depths, depth_at
from mwc.memory.pareto import Pareto
from mwc.memory.report import MemoryReport, Row, measure
from mwc.memory.targets import Target
from mwc.memory.timeline import Timeline

__all__ = [
    "Depths",
    "MemoryReport",
    "Pareto",
    "Row",
    "Target",
    "Timeline",
    "depth_at",
    "measure",
]
