"""Tables as plain text: what `print` shows of a report."""

from __future__ import annotations

import io
from typing import Any

import rich.console


def plain(table: Any, width: int = 100) -> str:
    """A `rich` table without colours or trailing blanks.

    Args:
      table: whatever `rich` can print.
      width: columns.
    """
    stream = io.StringIO()
    rich.console.Console(file=stream, width=width, color_system=None).print(table)
    return "\n".join(map(str.rstrip, stream.getvalue().rstrip().splitlines()))
