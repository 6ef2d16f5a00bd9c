"""Drawings of a plan made ready for a page: what scripts and style sheets hold on to.

Graphviz writes a file of its own; inside of a page ids must be unique in all of it,
fonts and colours come from the page's style, and what is shown of a box comes from the
page's script. So each drawing is parsed, and written again with

- ids that begin with the view's name: "blocks-stage-3-F";
- `data-card` on each box, the key of its record;
- a name and a role on the first box of a card, and on arguments and results, which the
  script gives the focus; `data-opens` where another drawing has the stages apart;
- `data-tip`, the drawing's own tooltip, on arguments, results and wires.

Limits: a drawing of more than `MOST` stages is left out; the table has them all.
"""

from __future__ import annotations

import dataclasses
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Mapping

from mwc._plan import Plan
from mwc.drawing import svg
from mwc.drawing.card import LANES
from mwc.drawing.dot import box_id
from mwc.drawing.sheet import Card, Sheet, every_card
from mwc.report.facts import Facts, key_of

MOST = 300

_SVG, _XLINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}"
_SHAPES = ("polygon", "path", "polyline", "ellipse", "text")
_TEXT = "10.00"  # the size of most text, said once
_USUAL = {"font-size": _TEXT, "text-anchor": "start"}
_LEFT_OUT = ("font-family", "{http://www.w3.org/XML/1998/namespace}space")


@dataclasses.dataclass(frozen=True)
class View:
    """One drawing in the page.

    Attributes:
      name: "blocks", "stages" or "compare".
      label: what the page calls it.
      markup: the SVG.
    """

    name: str
    label: str
    markup: str


def views(
    plan: Plan, blocks: Sheet, every: Sheet, of: Mapping[str, Facts]
) -> Iterator[View]:
    """The drawings of a plan.

    Args:
      plan: the plan.
      blocks: its sheet with repeats as one card.
      every: its sheet with every stage.
      of: the records of the cards of both by their keys.
    """
    opens = unfolds(blocks, every) and not too_many(every)
    kinds = [("blocks", "Blocks" if opens else "Kept", blocks)]
    kinds += [("stages", "Every stage", every)] if opens else []
    kinds += [("compare", "Beside backpropagation", blocks)]
    for name, label, drawn in kinds:
        looks = {"expand": name == "stages", "compare": name == "compare"}
        picture = ET.fromstring(svg(plan, caption=False, **looks))
        markup = prepared(picture, name, drawn, of, opens and name != "stages")
        yield View(name, label, markup)


def unfolds(blocks: Sheet, every: Sheet) -> bool:
    """Whether a drawing of every stage shows more than one of blocks."""
    inside = any(card.inside for card in every.cards)
    return inside or len(blocks.cards) < len(every.cards)


def too_many(every: Sheet) -> bool:
    """Whether there are too many stages for a drawing of each."""
    return len([*every_card(every)]) > MOST


def prepared(
    picture: ET.Element, view: str, drawn: Sheet, of: Mapping[str, Facts], opens: bool
) -> str:
    """A drawing as markup for a page; the module says what is changed.

    Args:
      picture: the SVG that Graphviz wrote.
      view: the view's name.
      drawn: what was drawn.
      of: the records of its cards by their keys.
      opens: whether cards of several stages, and of loops, can be opened.
    """
    cards = {
        box_id(card.name, lane): card for card in every_card(drawn) for lane in LANES
    }
    box = picture.get("viewBox", "0 0 0 0")
    width, height = box.split()[2:]
    size = {"viewBox": box, "width": width, "height": height, "font-size": _TEXT}
    named = {"role": "group", "aria-label": f"drawing: {len(drawn.cards)} boxes"}
    root = ET.Element("svg", {"class": "picture", **size, **named})
    whole = picture.find(f"{_SVG}g")
    if whole is None:
        raise ValueError("Graphviz wrote no graph")
    place = {"transform": whole.get("transform", "")}
    inner = ET.SubElement(root, "g", place)
    for group in whole.findall(f"{_SVG}g"):
        kind, name = group.get("class", ""), group.get("id", "")
        look = {"class": kind}
        if kind == "edge":
            look |= {"aria-hidden": "true"} | _tip(group)
        elif kind == "node":
            look |= {"id": f"{view}-{name}"}
            look |= _box(cards[name], name, of, opens) if name in cards else _end(group)
        part = ET.SubElement(inner, "g", look)
        part.extend(map(_shape, _shapes(group)))
    return ET.tostring(root, encoding="unicode")


def _box(card: Card, name: str, of: Mapping[str, Facts], opens: bool) -> dict[str, str]:
    facts = of[key_of(card)]
    look = {"data-card": facts.key}
    if name != box_id(card.name, "F"):
        return look
    text = f"{facts.title}, {facts.where}, {facts.storage}"
    opens = opens and facts.times > 1
    look |= {"data-opens": f"stages-{name}"} if opens else {}
    return look | {"role": "button" if opens else "img", "aria-label": text}


def _end(group: ET.Element) -> dict[str, str]:
    words = (text.text or "" for text in group.iter(f"{_SVG}text"))
    return _tip(group) | {"role": "img", "aria-label": ", ".join(words)}


def _tip(group: ET.Element) -> dict[str, str]:
    tips = (link.get(f"{_XLINK}title") for link in group.iter(f"{_SVG}a"))
    return {"data-tip": tip} if (tip := next(tips, None)) else {}


def _shapes(group: ET.Element) -> Iterator[ET.Element]:
    return (e for e in group.iter() if e.tag.removeprefix(_SVG) in _SHAPES)


def _shape(old: ET.Element) -> ET.Element:
    kept = {
        key: value
        for key, value in old.attrib.items()
        if key not in _LEFT_OUT and _USUAL.get(key) != value
    }
    new = ET.Element(old.tag.removeprefix(_SVG), kept)
    new.text = old.text
    return new
