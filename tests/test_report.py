"""The HTML report: structure, what it says, escaping, size, charts and colours."""

import html.parser
import json
import pathlib
import re
import time

import jax
import jax.numpy as jnp
import pytest

import mwc
from mwc.drawing.style import INK, LOOKS, SWEEPS, size
from mwc.memory import Timeline
from mwc.memory.alive import Peak
from mwc.memory.timeline import Series
from mwc.report import charts
from mwc.report import html as page
from mwc.report.colours import DARK
from tests import programs
from tests.drawn import decorated, plan_of
from tests.reported import memory, one_machine, report_of, timeline  # noqa: F401

SOME = ("moonwalk", "nested", "transformer", "unet")
EMPTY = {"meta", "link", "br", "hr", "img", "input"}
EVIL = "</script><script>window.evil=1</script><img src=x onerror='window.evil=2'>"

pytestmark = pytest.mark.usefixtures("one_machine")


class Node:
    """An element of a page."""

    def __init__(self, tag, given, parent):
        self.tag, self.given, self.parent = tag, dict(given), parent
        self.inside = []

    @property
    def text(self):
        return "".join(x if isinstance(x, str) else x.text for x in self.inside)

    def all(self, tag, **given):
        """Elements inside, in order."""
        for node in (x for x in self.inside if isinstance(x, Node)):
            names = {k.rstrip("_").replace("_", "-"): v for k, v in given.items()}
            if node.tag == tag and names.items() <= node.given.items():
                yield node
            yield from node.all(tag, **given)

    def one(self, tag, **given):
        (found,) = self.all(tag, **given)
        return found


class Reader(html.parser.HTMLParser):
    """A page as a tree; every element must be closed by its own end."""

    def __init__(self, text):
        super().__init__()
        self.root = self.at = Node("", {}, None)
        self.feed(text)
        assert self.at is self.root

    def handle_starttag(self, tag, given):
        self.handle_startendtag(tag, given)
        if tag not in EMPTY:
            self.at = self.at.inside[-1]

    def handle_startendtag(self, tag, given):
        self.at.inside.append(Node(tag, given, self.at))

    def handle_endtag(self, tag):
        assert tag == self.at.tag, f"</{tag}> closes <{self.at.tag}>"
        self.at = self.at.parent

    def handle_data(self, text):
        self.at.inside.append(text)


def read(text):
    return Reader(text).root


# The text -----------------------------------------------------------------------


@pytest.mark.parametrize("name", SOME)
def test_every_stage_has_a_row_with_a_reason(name):
    plan = plan_of(name)
    table = read(report_of(name)).one("table", class_="stages")
    rows = [tr for tr in table.all("tr") if [*tr.all("td")]]
    assert all(len([*tr.all("td")]) == 8 for tr in rows)
    assert all(tr.one("td", data_label="Why").text.strip() for tr in rows)
    said = {
        (tr.one("th").one("small").text.split(" · ")[0], p.text)
        for tr in rows
        for p in tr.one("td", data_label="Why").all("p")
    }
    for i, stage in enumerate(plan.stages):
        assert (f"stage {i}", stage.reason) in said


def test_rows_of_a_loop_show_what_a_step_does():
    table = read(report_of("nested")).one("table", class_="stages")
    inner = [tr for tr in table.all("tr", class_="inside")]
    assert len(inner) == len(plan_of("nested").stages[0].bodies[0].stages)
    assert inner[0].one("em").text == "step ×16"


def test_blocks_of_several_stages_have_a_title():
    table = read(report_of("transformer")).one("table", class_="stages")
    (group,) = table.all("tbody", class_="group")
    assert "Encoder/Block_0…3 ×4" in group.text


def test_summary_has_the_plans_figures():
    plan = plan_of("moonwalk")
    text = read(report_of("moonwalk")).one("section", id="summary").text
    assert size(plan.residual_bytes) in text
    assert size(plan.backprop_bytes) in text
    assert size(plan.peak_bytes) in text
    assert f"{plan.extra_forwards:.2f}" in text


@pytest.mark.parametrize("name", SOME)
def test_ids_and_references(name):
    root = read(report_of(name))
    nodes = [node for tag in _tags(root) for node in root.all(tag)]
    ids = [node.given["id"] for node in nodes if "id" in node.given]
    assert len(ids) == len(set(ids))
    for node in nodes:
        for key in ("aria-labelledby", "href", "data-opens"):
            for target in node.given.get(key, "").removeprefix("#").split():
                assert target in ids, (key, target)
    cards = json.loads(root.one("script", id="data").text)["cards"]
    boxes = [node.given["data-card"] for node in nodes if "data-card" in node.given]
    assert set(boxes) == set(cards)


def _tags(root):
    found = set()
    for node in (x for x in root.inside if isinstance(x, Node)):
        found |= {node.tag} | _tags(node)
    return found


def test_landmarks_and_names():
    root = read(report_of("moonwalk"))
    assert root.one("html").given["lang"] == "en"
    for landmark in ("header", "main", "nav", "footer", "h1", "title"):
        root.one(landmark)
    for section in root.all("section"):
        title = section.one("h2")
        assert section.given["aria-labelledby"] == title.given["id"]
    for box in root.all("g", role="button"):
        assert box.given["aria-label"]
    for button in root.all("button"):
        assert button.text.strip() or button.given["aria-label"]
    for table in root.all("table"):
        assert table.one("caption").text


def test_nothing_is_asked_of_the_network():
    text = report_of("moonwalk")
    assert "://" not in text
    root = read(text)
    assert not [*root.all("link"), *root.all("img"), *root.all("iframe")]
    assert not [node for tag in _tags(root) for node in root.all(tag, src="")]
    policy = root.one("meta", http_equiv="Content-Security-Policy").given["content"]
    assert "default-src 'none'" in policy


def test_what_was_not_measured_is_one_line_that_says_how():
    root = read(page(plan_of("unet")))
    for name in ("memory", "timeline"):
        section = root.one("section", id=name)
        assert f"{name}=loss.{name}(…)" in section.one("p").text
        assert not [*section.all("table")]


def test_memory_and_timeline():
    root = read(report_of("moonwalk"))
    section = root.one("section", id="memory")
    assert "each of 2 devices" in section.text
    rows = section.one("table", class_="figures").text
    assert "512 MiB" in rows
    assert "ValueError: <no> & never" in rows
    assert "16× less" in section.text
    curves = root.one("section", id="timeline")
    assert "backprop: 999 KiB" in curves.text
    assert "moonwalk (from the plan)" in curves.text
    assert "<2048>" in curves.text
    assert "<1>" not in curves.text  # the largest are named
    assert "2 others" in curves.text


def test_names_are_escaped():
    def loss(params, x):
        for w in params.values():
            with jax.named_scope(EVIL):
                x = jnp.tanh(x @ w)
        return jnp.sum(x)

    params = {EVIL: programs.spec(4, 4)}
    plan = mwc.moonwalk_compile(loss).plan(params, programs.spec(8, 4))
    note = (f"no rule for {EVIL}",)
    plan = mwc.Plan(**{**vars(plan), "notes": note, "name": EVIL})
    text = page(plan)
    assert EVIL not in text
    root = read(text)
    assert root.one("h1").text == EVIL
    assert note[0] in root.one("section", id="summary").text
    assert len([*root.all("script")]) == 2
    cards = json.loads(root.one("script", id="data").text)["cards"]
    assert any(
        EVIL in line for _, lines in cards["stage 0"]["values"] for line in lines
    )


@pytest.mark.parametrize("fun", [lambda x: 1.0, jnp.sin])
def test_small_functions(fun):
    plan = mwc.moonwalk_compile(fun).plan(programs.spec())
    root = read(page(plan))
    assert "Every stage" not in root.one("section", id="drawing").text


def test_two_hundred_layers_in_time_and_under_two_megabytes(tmp_path):
    program = programs.dense(programs.relu, 200, 64, 256)
    plan = mwc.moonwalk_compile(program.loss).plan(program.params, program.batch)
    start = time.process_time()
    plan.report(tmp_path / "report.html", memory=memory(), timeline=timeline())
    assert time.process_time() - start < 10
    assert (tmp_path / "report.html").stat().st_size < 2e6
    root = read((tmp_path / "report.html").read_text(encoding="utf-8"))
    drawn = {g.given.get("id") for g in root.all("g", class_="node")}
    assert {f"stages-stage-{i}-F" for i in range(201)} <= drawn


def test_longer_chains_have_a_table_and_say_what_draws_them():
    plan = plan_of("dense")
    long = mwc.Plan(**{**vars(plan), "stages": plan.stages[1:2] * 400, "values": ()})
    root = read(page(long))
    assert "expand=True" in root.one("section", id="drawing").text
    assert len([*root.all("tr", class_="inside")]) == 400


# Charts -------------------------------------------------------------------------


def test_bars_are_shares_of_the_longest():
    found = charts.bars(memory())
    assert [bar.method for bar in found] == ["backprop", "checkpoint", "moonwalk"]
    assert sum(share for _, share, _ in found[0].parts) == pytest.approx(100)
    temp = found[2].parts[0][1]
    assert found[2].planned == pytest.approx(temp * 30 / 32)


def test_curves_keep_their_peaks():
    plot = charts.plot(timeline())
    first, second = plot.curves
    assert len(first.points) == charts.POINTS
    assert max(first.points) == 999 * 1024
    assert first.turn == pytest.approx(49.95)
    assert second.planned
    assert second.turn is None
    assert abs(first.label - second.label) > 6
    ups = [up for up, _ in plot.ticks]
    assert ups == sorted(ups)
    assert 3 <= len(ups) <= 6
    assert plot.ticks[1][1] == "256 KiB"


@pytest.mark.parametrize("most", [0, 1, 5, 1023, 1024, 999 * 2**20, 3 * 2**40])
def test_ticks_of_any_size(most):
    one = Series("a", "compiler", (most,), (most,), Peak(0, most, ()), None, None, None)
    plot = charts.plot(Timeline("cpu", (one,)))
    assert 2 <= len(plot.ticks) <= 6
    assert all(0 <= up <= 100 for up, _ in plot.ticks)


# Colours ------------------------------------------------------------------------


def contrast(a, b):
    """WCAG's ratio of two colours."""

    def light(colour):
        parts = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
        linear = (
            c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts
        )
        return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    high, low = sorted((light(a), light(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_every_colour_of_the_drawing_has_a_dark_one():
    for name in SOME:
        for view in read(report_of(name)).all("svg", class_="picture"):
            shapes = [s for tag in _tags(view) for s in view.all(tag)]
            for shape in shapes:
                used = {shape.given.get("fill"), shape.given.get("stroke")}
                assert used - {None, "none"} <= {*DARK}, name


def test_text_can_be_read_on_every_fill():
    fills = [f for look in LOOKS.values() for f in (look.fill, look.bar)]
    for fill in fills:
        assert contrast(INK, fill) >= 4.5
        assert contrast(DARK[INK], DARK[fill]) >= 4.5
    for colour in SWEEPS.values():
        assert contrast(colour, "#ffffff") >= 4.5
        assert contrast(DARK[colour], DARK["white"]) >= 4.5


def test_text_of_the_page_can_be_read():
    style = pathlib.Path(charts.__file__).parent / "templates" / "style.css"
    text = style.read_text()
    light, dark = (
        dict(re.findall(r"--([\w-]+): (#\w{6})", part))
        for part in (text[: text.index("@media")], text[text.index("@media") :])
    )
    for colours in (light, dark):
        further = [f"further-{i}" for i in range(4)]
        methods = ["backprop", "checkpoint", "checkpoint-2", "moonwalk", *further]
        for name in ("ink", "pale", "accent", *methods):
            assert contrast(colours[name], colours["ground"]) >= 4.5, name
        assert contrast(colours["pale"], colours["surface"]) >= 4.5
        assert contrast(colours["on-accent"], colours["accent"]) >= 4.5


# Errors -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["report", "report.pdf", "no/report.html"])
def test_files_that_cannot_be(tmp_path, name):
    loss, program = decorated("unet")
    with pytest.raises(mwc.MoonwalkError, match=r"ends in \.html|no directory"):
        plan_of("unet").report(tmp_path / name)
    with pytest.raises(mwc.MoonwalkError, match=r"ends in \.html|no directory"):
        loss.report(tmp_path / name, program.params, program.batch, target="nowhere")
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(mwc.MoonwalkError, match="cannot be written"):
        plan_of("dense").report(tmp_path / "folder.html")


def test_other_things_than_reports():
    with pytest.raises(mwc.MoonwalkTypeError, match="memory is list"):
        page(plan_of("dense"), memory=[])
    with pytest.raises(mwc.MoonwalkTypeError, match=r"loss\.timeline"):
        page(plan_of("dense"), timeline=memory())


def test_a_function_measures_and_reports(tmp_path):
    loss, program = decorated("dense")
    path = tmp_path / "report.html"
    methods = ["backprop", "moonwalk"]
    loss.report(path, program.params, program.batch, methods=methods)
    root = read(path.read_text(encoding="utf-8"))
    figures = root.one("table", class_="figures")
    assert [th.text for th in figures.one("tbody").all("th")] == methods
    assert [*root.all("details")]
