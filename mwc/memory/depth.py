"""How many repeats of a block fit a byte budget, measured or estimated.

*Measured* (`depth_at`): the user's function of a depth is compiled at a few depths,
each chosen from the bytes of the ones before, until the deepest that fits and the
shallowest that does not are close. What is reported was compiled and found to fit.

*Estimated* (`estimate`, from the report of one program): temporaries are taken to grow
with depth L as L for backpropagation, as the square root of L for one level of
checkpoints and as its cube root for two; of what a plan keeps, bits and stored values
as L and kept states as the square root (as L in a plan of less than one extra forward
pass, which cannot do with fewer), and the rest not at all.

Limits: an estimate knows nothing of what stays as it is whatever the depth (an
embedding, a loss over a vocabulary), and a plan may have more in hand; measure before
you buy. The measured bytes need not grow with depth at every step.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import rich.box
import rich.table

from mwc.errors import MoonwalkTypeError
from mwc.memory.budget import in_bytes
from mwc.memory.printing import plain
from mwc.memory.subject import BASELINES, level
from mwc.memory.targets import Target

if TYPE_CHECKING:
    from mwc.memory.report import Row

# Two depths that differ by less are close enough.
_CLOSE = 1 / 64


@dataclasses.dataclass(frozen=True)
class DepthRow:
    """How deep one method goes.

    Attributes:
      method: as in a memory report.
      depth: repeats of the block that fit; None where nothing is known.
      bytes: what was compiled needs at that depth; None in an estimate.
      over: the least depth that was compiled and does not fit, or None.
      note: what an estimate rests on, or why there is none.
    """

    method: str
    depth: int | None
    bytes: int | None = None
    over: int | None = None
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Depths:
    """How many repeats of a block fit a budget under each method; prints as a table.

    Attributes:
      budget: bytes.
      target: what was compiled for.
      rows: one for each method.
      measured: whether the depths were compiled, or estimated from one report.
    """

    budget: int
    target: str
    rows: tuple[DepthRow, ...]
    measured: bool

    def __getitem__(self, method: str) -> int | None:
        for row in self.rows:
            if row.method == method:
                return row.depth
        raise KeyError(method)

    def to_dict(self) -> dict[str, Any]:
        """The depths as plain data, ready for JSON."""
        return dataclasses.asdict(self)

    def __rich__(self) -> rich.table.Table:
        how = "compiled" if self.measured else "estimated from one report"
        title = f"repeats within {self.budget / 2**20:,.0f} MiB, {self.target}, {how}"
        table = rich.table.Table(
            title=title, title_justify="left", box=rich.box.SIMPLE, pad_edge=False
        )
        table.add_column("method", no_wrap=True)
        table.add_column("repeats", justify="right")
        if self.measured:
            table.add_column("MiB there", justify="right")
            table.add_column("too many", justify="right")
        table.add_column("note", overflow="fold")
        for row in self.rows:
            cells = [row.method, "–" if row.depth is None else f"{row.depth:,}"]
            if self.measured:
                cells += [
                    "–" if row.bytes is None else f"{row.bytes / 2**20:,.1f}",
                    "–" if row.over is None else f"{row.over:,}",
                ]
            table.add_row(*cells, row.note)
        return table

    def __str__(self) -> str:
        return plain(self)


def estimate(
    rows: Sequence[Row],
    target: str,
    budget: int | float | str,
    repeats: int,
    whole: bool,
) -> Depths:
    """Depths from the rows of one report; see the module for what they rest on."""
    limit = in_bytes(budget)
    found = tuple(_estimated(row, limit, repeats, whole) for row in rows)
    return Depths(limit, target, found, measured=False)


def _estimated(row: Row, limit: int, repeats: int, whole: bool) -> DepthRow:
    if not row.temp_bytes:
        return DepthRow(row.method, None, note="nothing was compiled")
    fixed = growing = root = cube = 0.0
    if row.method in BASELINES:
        shares = [0.0, 0.0, 0.0]
        shares[level(row.method)] = row.temp_bytes
        growing, root, cube = shares
        note = ("as L", "as √L", "as ∛L")[level(row.method)]
    elif row.kept_bytes and row.growing_bytes is not None:
        kept = min(row.kept_bytes, row.temp_bytes)
        growing = row.growing_bytes * kept / row.kept_bytes
        root, fixed = kept - growing, row.temp_bytes - kept
        note = "as L" if root <= 0 else "bits as L, kept states as √L"
    else:
        return DepthRow(row.method, None, note="its plan is not known")
    if whole:
        # The results are the gradients, and as large as the weights; the rest of the
        # arguments is data.
        weights, held = row.output_bytes or 0, row.argument_bytes or 0
        growing += weights + min(weights, held)
        fixed += max(held - weights, 0)

    def need(ratio: float) -> float:
        return fixed + growing * ratio + root * ratio**0.5 + cube * ratio ** (1 / 3)

    low, high = 0, 1
    while need(high / repeats) <= limit and high < 2**40:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if need(middle / repeats) <= limit else (low, middle)
    return DepthRow(row.method, low, note=note)


def depth_at(
    make: Callable[[int], Sequence[Any]],
    budget: int | float | str,
    *,
    target: str | Target | None = None,
    methods: Sequence[str] = ("backprop", "checkpoint", "moonwalk"),
    start: int = 4,
    tries: int = 8,
    whole: bool = True,
    progress: Callable[[str], None] | None = None,
) -> Depths:
    """The most repeats of a block that fit a budget, by compiling at several depths.

    Args:
      make: gives for a number of repeats the decorated function and its positional
        arguments (arrays or `ShapeDtypeStruct`s): `lambda n: (loss, params(n), batch)`.
      budget: bytes, or text such as "8GiB", for the compiled `value_and_grad` on one
        device.
      target: as in `loss.memory`.
      methods: as in `loss.memory`; "checkpoint" costs a search at every depth.
      start: the depth compiled first.
      tries: most depths compiled for each method.
      whole: whether arguments and results count, as on a device that holds nothing
        else; False is the budget of the temporaries alone.
      progress: called with the method and depth as each begins.

    Returns:
      For each method the deepest program compiled that fits, and the shallowest that
      does not.

    Raises:
      MoonwalkTypeError: `make` gives no decorated function with its arguments.
    """
    limit = in_bytes(budget)
    rows, name = [], ""
    for method in methods:
        known: dict[int, int] = {}
        depth: int | None = start
        while depth is not None and len(known) < tries:
            if progress is not None:
                progress(f"{method}, {depth} repeats")
            known[depth], name = _needed(make, depth, method, target, whole)
            depth = _next(known, limit)
        fits = max((d for d, need in known.items() if need <= limit), default=0)
        over = min((d for d, need in known.items() if need > limit), default=None)
        rows.append(DepthRow(method, fits, known.get(fits), over))
    return Depths(limit, name, tuple(rows), measured=True)


def _needed(
    make: Callable[[int], Sequence[Any]],
    depth: int,
    method: str,
    target: str | Target | None,
    whole: bool,
) -> tuple[int, str]:
    """Bytes that a method needs at a depth, and the target's name."""
    made = make(depth)
    if not isinstance(made, Sequence) or not hasattr(made[0], "memory"):
        raise MoonwalkTypeError(
            f"make({depth}) gave {type(made).__name__}",
            expected="a tuple of a function under moonwalk_compile and its arguments",
        )
    report = made[0].memory(*made[1:], target=target, methods=[method])
    row = report[method]
    held = (row.argument_bytes + row.output_bytes) if whole else 0
    return row.temp_bytes + held, report.target


def _next(known: Mapping[int, int], limit: int) -> int | None:
    """The depth to compile next; None once the answer is close enough."""
    fits = max((d for d, need in known.items() if need <= limit), default=0)
    over = min((d for d, need in known.items() if need > limit), default=0)
    if over and over - fits <= max(1, fits * _CLOSE):
        return None
    # Each depth narrows the interval, whatever the law says: bytes may be flat.
    guess, gap = _crossing(known, limit), (over or 3 * fits) - fits
    least = fits + max(1, gap // 8)
    return max(least, min(over - max(1, gap // 8) if over else 8 * fits, guess))


def _crossing(known: Mapping[int, int], limit: int) -> int:
    """Where a power law through the two depths nearest the limit meets it."""
    near = sorted(known, key=lambda d: abs(math.log(max(known[d], 1) / limit)))[:2]
    low, high = min(near), max(near)
    rise = math.log(max(known[high], 1) / max(known[low], 1)) if high > low else 0.0
    power = rise / math.log(high / low) if rise > 0 else 1.0
    # A flat curve says little about where it ends.
    power = max(power, 0.2)
    base = near[0]
    return int(min(base * (limit / max(known[base], 1)) ** (1 / power), 2**40))
