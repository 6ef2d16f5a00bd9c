"""Compiled memory: what a gradient needs, here or on a GPU that is not there."""

from mwc.memory.report import MemoryReport, Row, measure
from mwc.memory.targets import Target

__all__ = ["MemoryReport", "Row", "Target", "measure"]
