"""Byte budgets as users write them: a number, or text such as "8GiB"."""

from __future__ import annotations

import math
import re

from mwc.errors import MoonwalkTypeError, MoonwalkValueError

_UNITS = {
    **{"": 1, "b": 1},
    **{f"{p}ib": 2 ** (10 * i) for i, p in enumerate("kmgt", 1)},
    **{f"{p}b": 10 ** (3 * i) for i, p in enumerate("kmgt", 1)},
}


def in_bytes(budget: int | float | str) -> int:
    """A budget in bytes.

    Args:
      budget: bytes, or a number with a unit: "B", "KiB", "MiB", "GiB", "TiB" (powers
        of 1024) or "kB", "MB", "GB", "TB" (powers of 1000), in either case.

    Returns:
      Bytes.

    Raises:
      MoonwalkTypeError: it is neither a number nor text.
      MoonwalkValueError: the text cannot be read, or the budget is not positive.
    """
    expected = 'bytes, or text such as "8GiB" or "512 MB"'
    if isinstance(budget, bool) or not isinstance(budget, int | float | str):
        raise MoonwalkTypeError(f"the budget is {budget!r}", expected=expected)
    count = float(budget) if not isinstance(budget, str) else _parsed(budget)
    if not math.isfinite(count) or count <= 0:
        raise MoonwalkValueError(f"the budget is {budget!r}", expected=expected)
    return int(count)


def _parsed(text: str) -> float:
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([a-zA-Z]*)\s*", text)
    unit = _UNITS.get(found[2].lower()) if found else None
    return float(found[1]) * unit if found and unit else math.nan
