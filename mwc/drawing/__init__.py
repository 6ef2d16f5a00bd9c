"""Drawings of a plan: what is kept, for which stage, and in which sweep it is used.

    graph      stages and values as a networkx graph, attributes documented
    repeats    which stretches of a chain repeat
    sheet      the graph with repeats as one card each: what is drawn
    card       a card's text, a table of its sweeps
    dot        the sheet as DOT, with a caption and a legend
    render     DOT to SVG, PNG and PDF

`mwc.Plan` calls `to_networkx`, `to_dot`, `svg` and `draw`.
"""

from mwc.drawing.dot import to_dot
from mwc.drawing.graph import to_networkx
from mwc.drawing.render import draw, svg

__all__ = ["draw", "svg", "to_dot", "to_networkx"]
