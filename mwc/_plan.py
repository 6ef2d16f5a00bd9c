"""What is kept and why: the plan as records, and as a table."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Plan:
    """PLACEHOLDER."""

    schedule: Any
    peak: int


def describe(node: Any, prologue: Any, chosen: Any, graph: Any, options: Any) -> Plan:
    """PLACEHOLDER."""
    return Plan(chosen.schedule, chosen.memory)
