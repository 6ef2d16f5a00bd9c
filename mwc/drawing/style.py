"""How things look: colours of Okabe and Ito, each with a line style and a mark.

No meaning rests on colour alone: a storage has a fill, a border style and a mark, a
kept value a thick solid line and one that is not a thin dashed one. Source: Okabe and
Ito, "Color universal design" (2008). The font's widths are those of DejaVu Sans, the
widest that viewers put in its place, so that no text leaves its box.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

FONT = "Verdana"
PANEL = "#f6f8fa"
INK, PALE, LINE = "#1a1a1a", "#5f6b76", "#9aa5b1"


@dataclasses.dataclass(frozen=True)
class Look:
    """How a storage is drawn.

    Attributes:
      mark: one character.
      fill: of its box.
      bar: of the bar in it, where bytes are compared.
      line: of its border.
      style: of its border.
    """

    mark: str
    fill: str
    bar: str
    line: str
    style: str


LOOKS = {
    "full value": Look("■", "#fbe0ac", "#f5b945", "#b36b00", "solid"),
    "fragment": Look("◧", "#f3d9e8", "#d98bb5", "#a8467d", "dashed"),
    "bits": Look("▚", "#cfe8f9", "#7cc0ee", "#0072b2", "dashed"),
    "kept state": Look("●", "#9fdcc5", "#4dbb95", "#00785a", "solid"),
    "recomputed": Look("↻", "#f1f3f5", "#c3cad2", "#6b7785", "dotted"),
    "nothing": Look("○", "#ffffff", "#ffffff", "#9aa5b1", "dotted"),
}
KEPT, RECOMPUTED, ARGUMENT = "#00785a", "#6b7785", "#5f6b76"
SWEEPS = {"R": "#b34700", "V": "#6a3d9a"}


def size(count: float) -> str:
    """Bytes in the largest unit that gives at least one."""
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    power = min(max(int(count).bit_length() - 1, 0) // 10, len(units) - 1)
    number = count / 1024**power
    digits = 0 if number >= 100 or number == int(number) else 1
    return f"{number:.{digits}f} {units[power]}"


def shape(value: Any) -> str:
    """Type of a value as JAX prints it: "float32[4096,512]"."""
    return f"{value['dtype']}[{','.join(map(str, value['shape']))}]"


def beginning(text: str, most: int) -> str:
    """A text with its end left out where it is long."""
    return text if len(text) <= most else f"{text[: most - 1]}…"


def ending(text: str, most: int) -> str:
    """A text with its beginning left out where it is long."""
    return text if len(text) <= most else f"…{text[1 - most :]}"


def place(source: str) -> str:
    """A user's place without the functions that its function is inside of."""
    return re.sub(r"\(.*<locals>\.", "(", source)


def path(name: str) -> str:
    """An argument's path with its keys as a path: "params/dense/kernel"."""
    return re.sub(r"\['([^']*)'\]", r"/\1", name)
