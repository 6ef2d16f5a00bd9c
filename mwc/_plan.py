"""The plan: what is kept, why, and what it costs, as records and as a table."""

from __future__ import annotations

import dataclasses
import io

from rich.console import Console
from rich.table import Table

MIB = 2**20


@dataclasses.dataclass(frozen=True)
class StageRecord:
    """One stage of the plan.

    Attributes:
      name: the user's name scope, or the stage's number.
      source: the user's place, "file.py:12 (function)".
      kind: the primitive that dominates it; "scan[64]" is a loop of 64 steps.
      strategy: "stored", "checkpoint" ("moonwalk" and "invert" are not there yet).
      bits: bools that the first pass keeps as bits.
      residual_bytes: all that the first pass keeps for it, kept state excluded.
      state_bytes: bytes of the state before it that the first pass keeps, else 0.
      extra_flops: matrix FLOPs that its backward runs again, with its advances.
      amplification: error growth of a rebuilt stage; None where nothing is rebuilt.
      reason: why it is treated so.
    """

    name: str
    source: str
    kind: str
    strategy: str
    bits: int
    residual_bytes: int
    state_bytes: int
    extra_flops: float
    amplification: float | None
    reason: str


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a function is differentiated. It prints as a table.

    Attributes:
      stages: one record a stage, in order.
      extra_forwards: forward passes run beyond backpropagation's, in matrix FLOPs
        (in all FLOPs where there are no matrix products).
      peak_bytes: predicted temporaries at the peak; the compiler decides them.
      residual_bytes: all that is kept between the two passes.
      state_bytes: boundary states of nodes apart; 0, the program is one node.
      backprop_bytes: the residuals that `jax.vjp` keeps, arguments left out.
      notes: primitives without a rule, and what to do about them; what symbolic
        dimensions (`jax.export`) were counted as.
    """

    stages: tuple[StageRecord, ...]
    extra_forwards: float
    peak_bytes: int
    residual_bytes: int
    state_bytes: int
    backprop_bytes: int
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        table = Table(title=None, box=None, pad_edge=False, header_style="")
        for title in ("stage", "source", "kind", "strategy"):
            table.add_column(title, overflow="fold")
        for title in ("bits", "kept MiB", "state MiB"):
            table.add_column(title, justify="right")
        table.add_column("reason", overflow="fold")
        for first, last, row in _grouped(self.stages):
            times = last - first + 1
            table.add_row(
                str(first) if times == 1 else f"{first}-{last}",
                row.source,
                row.kind,
                row.strategy,
                str(row.bits) if row.bits else "-",
                _mib(row.residual_bytes),
                _mib(row.state_bytes),
                row.reason,
            )
        lines = [
            f"{len(self.stages)} stages, "
            f"{self.extra_forwards:.2f} extra forward passes",
            f"kept between the passes {_mib(self.residual_bytes)} MiB "
            f"(backpropagation {_mib(self.backprop_bytes)}), "
            f"predicted peak {_mib(self.peak_bytes)} MiB",
            *self.notes,
        ]
        out = io.StringIO()
        Console(file=out, width=118, force_terminal=False).print(table)
        return out.getvalue() + "\n".join(lines)


def _mib(count: int) -> str:
    if not count:
        return "-"
    return f"{count / MIB:.2f}" if count < 10 * MIB else f"{count / MIB:.0f}"


def _grouped(stages: tuple[StageRecord, ...]) -> list[tuple[int, int, StageRecord]]:
    """Runs of stages that read the same are one row."""
    rows: list[tuple[int, int, StageRecord]] = []
    for i, stage in enumerate(stages):
        if rows and _same(rows[-1][2], stage):
            rows[-1] = rows[-1][0], i, stage
        else:
            rows.append((i, i, stage))
    return rows


def _same(a: StageRecord, b: StageRecord) -> bool:
    blank = {"name": "", "extra_flops": 0.0}
    return dataclasses.replace(a, **blank) == dataclasses.replace(b, **blank)
