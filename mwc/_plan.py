"""The plan: what is kept, why, and what it costs, as records and as a table.

A plan is plain data: stages in order, and the values that flow between them or are kept
for them. Tables, drawings (`mwc.drawing`), JSON (`mwc._plan_json`) and reports are made
from it alone, so that a plan read back from a file does all that a fresh one does.
"""

from __future__ import annotations

import dataclasses
import io
import os
from typing import Any

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

MIB = 2**20

INPUT = -1  # the maker of the function's own arguments

# What a stage keeps, the most first.
STORAGE = ("full value", "fragment", "bits", "kept state", "recomputed", "nothing")

FLOWING = ("parameter", "data", "derived", "state")  # kinds of values between stages
SAVED = ("bits", "residual", "carries", "sketch")  # kinds kept for one stage


@dataclasses.dataclass(frozen=True)
class Value:
    """A value that flows between stages, or that is kept for one of them.

    Attributes:
      name: an argument's path, as "params['w'][0]"; else the primitive that makes it.
      kind: "parameter" and "data" are arguments, "derived" follows from arguments
        alone and is made before the first stage, "state" is made by a stage and read by
        others. The rest is kept for its stage and read by its backward alone: "bits"
        (bools, eight a byte), "residual" (other values), "carries" (states of a loop's
        steps), "sketch" (sums that check a rebuilt cotangent).
      shape: its dimensions; symbolic ones count as a nominal size.
      dtype: its element type by name.
      bytes: what keeping it takes.
      maker: the stage that makes it, `INPUT` for arguments and what is derived.
      readers: the stages that read it, in order.
      kept: whether it is kept between the two passes.
      result: whether it is a result of the function.
      source: the user's place where it is made, "file.py:12 (function)", or "".
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int
    maker: int
    readers: tuple[int, ...] = ()
    kept: bool = False
    result: bool = False
    source: str = ""


@dataclasses.dataclass(frozen=True)
class Body:
    """What a loop runs at each step, or a choice in one of its branches.

    Attributes:
      label: "step", or "branch 0".
      times: steps; 1 of a branch.
      stages: its stages; costs and bytes are those of one step.
      values: its values; `kept` says what one step keeps while its backward runs.
    """

    label: str
    times: int
    stages: tuple[StageRecord, ...]
    values: tuple[Value, ...]


@dataclasses.dataclass(frozen=True)
class StageRecord:
    """One stage of the plan.

    Attributes:
      name: the user's name scope, or the source line.
      source: the user's place, "file.py:12 (function)".
      kind: the primitive that dominates it; "scan[64]" is a loop of 64 steps.
      strategy: "moonwalk", "checkpoint" or "stored" ("invert" is not there yet).
      storage: one of `STORAGE`, the first that fits. "full value": its residuals are
        kept. "bits": bits are. "kept state": all states that it reads are.
        "recomputed": one of them is made again. "nothing": it reads arguments alone.
      bits: bools that the first pass keeps as bits.
      residual_bytes: all that the first pass keeps for it, kept state excluded.
      state_bytes: bytes of the states that it is the first to read and that the first
        pass keeps.
      backprop_bytes: the residuals that `jax.vjp` would keep for it.
      extra_flops: matrix FLOPs that its backward runs again, with its advances.
      runs_again: the same in runs of the stage.
      amplification: error growth of a rebuilt stage; None where nothing is rebuilt.
      reason: why it is treated so.
      bodies: what is inside a loop or a choice.
    """

    name: str
    source: str
    kind: str
    strategy: str
    storage: str
    bits: int
    residual_bytes: int
    state_bytes: int
    backprop_bytes: int
    extra_flops: float
    runs_again: float
    amplification: float | None
    reason: str
    bodies: tuple[Body, ...] = ()


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
      name: of the function.
      values: what flows between the stages, and what is kept for them.
    """

    stages: tuple[StageRecord, ...]
    extra_forwards: float
    peak_bytes: int
    residual_bytes: int
    state_bytes: int
    backprop_bytes: int
    notes: tuple[str, ...] = ()
    name: str = ""
    values: tuple[Value, ...] = ()

    def to_json(self) -> str:
        """The plan as JSON text, which `from_json` reads."""
        from mwc import _plan_json

        return _plan_json.dump(self)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The plan that `to_json` wrote.

        Args:
          text: the JSON text.

        Returns:
          A plan equal to the one written.

        Raises:
          MoonwalkValueError: the text is no JSON, no plan, or a plan of another format.
        """
        from mwc import _plan_json

        return _plan_json.load(text)

    def to_networkx(self) -> Any:
        """Stages and arguments as a `networkx.MultiDiGraph`; `mwc.drawing.graph`."""
        from mwc import drawing

        return drawing.to_networkx(self)

    def to_dot(
        self,
        *,
        direction: str | None = None,
        expand: bool = False,
        compare: bool = False,
    ) -> str:
        """The drawing as Graphviz's DOT text; the options are those of `draw`."""
        from mwc import drawing

        return drawing.to_dot(self, direction=direction, expand=expand, compare=compare)

    def draw(
        self,
        path: str | os.PathLike[str],
        *,
        direction: str | None = None,
        expand: bool = False,
        compare: bool = False,
    ) -> None:
        """Draws the plan to a file.

        Args:
          path: where to; ".svg", ".png" or ".pdf" says what.
          direction: "LR" (left to right) or "TB" (top to bottom); None chooses by the
            number of cards.
          expand: whether repeats are drawn one by one, and the bodies of loops and
            branches with them.
          compare: whether what backpropagation would keep is drawn beside it.

        Raises:
          MoonwalkError: the suffix or the direction is unknown, the file cannot be
            written, or nothing is installed that makes such a file.
        """
        from mwc import drawing

        options = {"direction": direction, "expand": expand, "compare": compare}
        drawing.draw(self, path, **options)

    def report(
        self,
        path: str | os.PathLike[str],
        *,
        memory: Any = None,
        timeline: Any = None,
    ) -> None:
        """Writes one HTML file that shows the plan and needs no network.

        It has the summary, a row and a reason for every stage, the drawing, and what
        was measured. `loss.report` measures by itself.

        Args:
          path: where to; a name that ends in ".html".
          memory: what `loss.memory` gave, for a bar a method; None leaves them out.
          timeline: what `loss.timeline` gave, for the bytes alive over the schedule.

        Raises:
          MoonwalkError: the name has another suffix, the file cannot be written, or
            `memory` or `timeline` is something else.
        """
        from mwc import report

        report.write(self, path, memory, timeline)

    def _repr_svg_(self) -> str:
        """The picture in a notebook."""
        from mwc import drawing

        return drawing.svg(self)

    def __rich__(self) -> Group:
        return Group(self._table(), Text("\n".join(self._totals())))

    def __str__(self) -> str:
        out = io.StringIO()
        Console(file=out, width=118, force_terminal=False).print(self._table())
        return out.getvalue() + "\n".join(self._totals())

    def _table(self) -> Table:
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
        return table

    def _totals(self) -> list[str]:
        return [
            f"{len(self.stages)} stages, "
            f"{self.extra_forwards:.2f} extra forward passes",
            f"kept between the passes {_mib(self.residual_bytes)} MiB "
            f"(backpropagation {_mib(self.backprop_bytes)}), "
            f"predicted peak {_mib(self.peak_bytes)} MiB",
            *self.notes,
        ]


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
    # What the table does not show does not part rows.
    blank = {"name": "", "extra_flops": 0.0, "runs_again": 0.0}
    blank |= {"storage": "", "backprop_bytes": 0, "bodies": ()}
    return dataclasses.replace(a, **blank) == dataclasses.replace(b, **blank)
