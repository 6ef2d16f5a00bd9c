"""What the drawing's colours become on a dark ground.

Graphviz writes colours into the picture; style sheets may replace them by value, which
leaves the picture itself as it is for light screens and for paper. Text keeps a
contrast of 4.5 to 1 on every fill that it stands on, in both (WCAG 2.2, 1.4.3).
"""

from __future__ import annotations

from mwc.drawing.card import PARAMETERS
from mwc.drawing.style import (
    ARGUMENT,
    INK,
    KEPT,
    LINE,
    LOOKS,
    PALE,
    PANEL,
    RECOMPUTED,
    SWEEPS,
)

# Fill, bar and border of each storage.
_LOOKS = {
    "full value": ("#4d3a12", "#8a5e0c", "#e8a33d"),
    "fragment": ("#46283a", "#7b3f62", "#dd8bb8"),
    "bits": ("#123a55", "#1f6a9c", "#58b4f0"),
    "kept state": ("#10463a", "#14725a", "#3fc79c"),
    "recomputed": ("#222a33", "#3b4651", "#97a4b1"),
    "nothing": ("#12171d", "#12171d", "#7d8a97"),
}


DARK: dict[str, str] = {
    "white": "#12171d",
    INK: "#e6edf3",
    PALE: "#97a4b1",
    LINE: "#7d8a97",
    PANEL: "#171d25",
    ARGUMENT: "#97a4b1",
    RECOMPUTED: "#97a4b1",
    KEPT: "#3fc79c",
    SWEEPS["R"]: "#f0955c",
    SWEEPS["V"]: "#bda0f0",
    PARAMETERS["fillcolor"]: "#26230f",
    PARAMETERS["color"]: "#8f8040",
} | {
    light: dark
    for name, look in LOOKS.items()
    for light, dark in zip((look.fill, look.bar, look.line), _LOOKS[name], strict=True)
}
"""Dark counterparts of the drawing's colours."""
