"""What users see of memory: predictions, curves, depths, meshes and pictures."""

import dataclasses
import io
import json
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

import mwc
from mwc import moonwalk_compile
from mwc.errors import (
    MoonwalkTargetError,
    MoonwalkTypeError,
    MoonwalkUnsupportedError,
    MoonwalkValueError,
)
from mwc.memory import MemoryReport, Row, compiling, depth, measure, plugin, targets
from mwc.memory.budget import in_bytes
from mwc.memory.pareto import Point, _unbeaten, pareto
from mwc.memory.repeats import repeats
from mwc.memory.subject import Subject
from passes import _jax
from passes.inline import inline
from tests import programs

MIB = 2**20


@pytest.fixture(scope="module", autouse=True)
def _end_workers():
    yield
    compiling.close_workers()


def scan(trips=12):
    return programs.scanned(jnp.abs, trips, 32, 256, product=programs.rotate)


@pytest.fixture(scope="module")
def report():
    program = scan()
    bounds = {"moonwalk": None, "moonwalk extra_forwards=0": 0}
    ours = {
        k: moonwalk_compile(program.loss, extra_forwards=e) for k, e in bounds.items()
    }
    return measure(program.loss, ours, (program.params, program.batch), tries=1)


@pytest.fixture(scope="module")
def curve():
    program = scan()
    ours = moonwalk_compile(program.loss)
    return ours.pareto(program.params, program.batch, extra_forwards=(0, 1, 2, 2.001))


def row(method, temp, **others):
    return Row(method, temp_bytes=temp, argument_bytes=40, output_bytes=30, **others)


def test_rows_of_plans_say_what_was_predicted(report):
    assert [r.method for r in report.rows] == [
        *("backprop", "checkpoint", "checkpoint-2", "moonwalk"),
        "moonwalk extra_forwards=0",
    ]
    least, fast = report["moonwalk"], report["moonwalk extra_forwards=0"]
    assert least.ratio == least.predicted_bytes / least.temp_bytes
    assert 0.6 < least.ratio < 1.4
    assert fast.growing_bytes == fast.kept_bytes
    assert fast.kept_bytes > 2 * least.kept_bytes
    assert fast.flops < least.flops
    assert report["backprop"].ratio is None
    assert all(r.peak_bytes is None for r in report.rows)  # the CPU's is no peak
    text = str(report)
    assert "predicted" in text
    assert f"{least.ratio:.2f}" in text
    plain = json.loads(json.dumps(report.to_dict()))
    assert plain["rows"][3]["ratio"] == least.ratio


def test_the_plan_predicts_what_it_says(report):
    program = scan()
    plan = moonwalk_compile(program.loss).plan(program.params, program.batch)
    assert report["moonwalk"].predicted_bytes == plan.peak_bytes
    assert report["moonwalk"].kept_bytes == plan.residual_bytes + plan.state_bytes


def test_one_bound_and_chosen_methods():
    program = scan(4)
    ours = moonwalk_compile(program.loss)
    name = "moonwalk extra_forwards=0.5"
    args = program.params, program.batch
    found = ours.memory(*args, extra_forwards=0.5, methods=[name])
    assert [r.method for r in found.rows] == [name]
    with pytest.raises(MoonwalkValueError, match="'best' is unknown"):
        ours.memory(*args, methods=["best"])


def test_the_curve_goes_from_least_time_to_least_memory(curve):
    extras = [p.extra_forwards for p in curve.points]
    sizes = [p.peak_bytes for p in curve.points]
    assert len(sizes) >= 3
    assert extras == sorted(extras)
    assert sizes == sorted(sizes, reverse=True)
    assert curve.points[0].plan.peak_bytes == sizes[0]
    others = {p.method: p for p in curve.others}
    assert others["backprop"].extra_forwards == pytest.approx(0, abs=0.1)
    assert others["checkpoint"].extra_forwards == pytest.approx(1, abs=0.1)
    assert others["checkpoint-2"].extra_forwards == pytest.approx(2, abs=0.1)
    assert others["checkpoint"].peak_bytes < others["backprop"].peak_bytes
    plain = json.loads(json.dumps(curve.to_dict()))
    assert len(plain["points"]) == len(curve.points)
    assert plain["target"] is None
    text = str(curve)
    assert "predicted" in text
    assert "checkpoint-2" in text


def test_a_plan_that_is_beaten_is_left_out():
    points = [Point("moonwalk", x, y) for x, y in ((0, 9), (2, 5), (1, 5), (1, 7))]
    kept = _unbeaten(points)
    assert [(p.extra_forwards, p.bytes) for p in kept] == [(0, 9), (1, 5)]
    measured = dataclasses.replace(points[0], temp_bytes=3)
    assert measured.bytes == 3


def test_the_curve_can_be_compiled(report):
    program = scan()
    args = program.params, program.batch
    ours = {"moonwalk": moonwalk_compile(program.loss)}
    found = pareto(Subject(program.loss, ours, args, tries=1), (2,), "cpu")
    assert found.target == "cpu"
    assert found.points[0].bytes == report["moonwalk"].temp_bytes
    assert found.others[0].temp_bytes == report["backprop"].temp_bytes
    assert "compiled MiB" in str(found)


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        *((1024, 1024), (1.5e3, 1500), ("8GiB", 8 * 2**30), (" 512 MB ", 512 * 10**6)),
        *(("0.5kib", 512), ("77", 77), ("3 tB", 3 * 10**12)),
    ],
)
def test_budgets_in_bytes(budget, expected):
    assert in_bytes(budget) == expected


@pytest.mark.parametrize("budget", ["", "GiB", "8 GiBs", "-1MB", "1e3", 0, -5, "inf"])
def test_budgets_that_are_none(budget):
    with pytest.raises(MoonwalkValueError, match="the budget is"):
        in_bytes(budget)


@pytest.mark.parametrize("budget", [None, True, [1]])
def test_budgets_of_another_type(budget):
    with pytest.raises(MoonwalkTypeError, match="the budget is"):
        in_bytes(budget)


@pytest.mark.parametrize(
    ("program", "count"),
    [
        (lambda: programs.dense(programs.relu, 9, 8, 16), 9),
        (lambda: programs.scanned(programs.relu, 11, 8, 16), 11),
        (lambda: programs.transformer(3, 16, 2, 2, 6), 3),
        (lambda: programs.lstm(13, 8, 4), 13),
    ],
)
def test_the_repeated_block_is_found(program, count):
    made = program()
    traced = jax.jit(made.loss).trace(made.params, made.batch)
    found = repeats(inline(_jax.hoisted(traced)))
    assert found.count == count
    assert str(count) in found.what


def test_nothing_repeats():
    traced = jax.jit(lambda x: jnp.sum(x @ x)).trace(jnp.ones((3, 3)))
    assert repeats(inline(_jax.hoisted(traced))) is None


def test_estimates_follow_their_laws():
    rows = (row("backprop", 100), row("checkpoint", 100), row("checkpoint-2", 100))
    ours = row("moonwalk", 100, kept_bytes=80, growing_bytes=20)
    plain = row("other", 100)
    made = MemoryReport("cpu", (*rows, ours, plain, Row("failed")))
    with pytest.raises(MoonwalkValueError, match="repeats no block"):
        made.depth_at(400)
    found = made.depth_at(400, repeats=10)
    assert [r.depth for r in found.rows[:3]] == [40, 160, 640]
    # 20 fixed, 20 r of bits and 60 √r of states: r = 7.1 fits 400 less than it does.
    assert 20 + 20 * 8.5 + 60 * 8.5**0.5 < 400 < 20 + 20 * 11 + 60 * 11**0.5
    assert 85 < found["moonwalk"] < 110
    assert found["other"] is None
    assert found["failed"] is None
    assert made.depth_at(50, repeats=10)["backprop"] == 5
    assert made.depth_at(5, repeats=10)["moonwalk"] == 0
    # 30 of weights and 30 of gradients grow, 10 of data does not.
    assert made.depth_at(330, repeats=10, whole=True)["backprop"] == 20
    assert "estimated" in str(found)


def test_a_report_estimates_its_own_block(report):
    assert report.repeats.count == 12
    twice = 2 * report["backprop"].temp_bytes
    assert report.depth_at(twice)["backprop"] == 24
    found = report.depth_at(report["moonwalk"].temp_bytes)
    assert found["moonwalk"] == 12
    assert found["checkpoint"] < 12


def test_depths_are_measured():
    def make(count):
        program = programs.scanned(programs.relu, count, 16, 128)
        return moonwalk_compile(program.loss), program.params, program.batch

    needs = make(6)[0].memory(*make(6)[1:], methods=["backprop"])["backprop"].temp_bytes
    found = depth.depth_at(make, needs, methods=["backprop"], start=2, tries=6)
    assert found["backprop"] == 6
    assert found.rows[0].bytes == needs
    assert found.rows[0].over == 7
    assert found.measured
    assert "compiled" in str(found)
    assert json.loads(json.dumps(found.to_dict()))["rows"][0]["depth"] == 6
    tiny = depth.depth_at(make, 64, methods=["backprop"], start=2, tries=4)
    assert tiny["backprop"] == 0
    with pytest.raises(MoonwalkTypeError, match="make"):
        depth.depth_at(lambda n: jnp.sum, 64)


@pytest.mark.parametrize("limit", [7, 100, 1000, 12345])
@pytest.mark.parametrize("power", [0.3, 0.5, 1.0, 1.5])
def test_the_search_ends_where_the_bytes_cross(limit, power):
    known = {}
    at = 4
    while at is not None and len(known) < 40:
        known[at] = 3 + round(5 * at**power)
        at = depth._next(known, limit)
    fits = max((d for d, need in known.items() if need <= limit), default=0)
    over = min(d for d, need in known.items() if need > limit)
    assert over - fits <= max(1, fits / 64)
    assert len(known) <= 20


def sharded(program, mesh, spec):
    """A program's arguments: parameters everywhere, the batch over the mesh."""

    def put(leaf, spec):
        place = NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)

    params = jax.tree.map(lambda leaf: put(leaf, PartitionSpec()), program.params)
    return params, put(program.batch, spec)


MESH = AbstractMesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
ROWS = PartitionSpec(("data", "model"))


def test_bytes_are_those_of_one_device_of_a_mesh():
    program = scan()
    ours = moonwalk_compile(program.loss)
    methods = ["backprop", "moonwalk"]
    args = program.params, program.batch
    whole = ours.memory(*args, methods=methods)
    found = ours.memory(*sharded(program, MESH, ROWS), target="cpu", methods=methods)
    assert found.devices == 8
    batch = 256 * 32 * 4
    for one, all_ in zip(found.rows, whole.rows, strict=True):
        assert all_.argument_bytes - one.argument_bytes == batch * 7 // 8
        assert one.temp_bytes < all_.temp_bytes / 3
        assert one.predicted_bytes is None
    assert "each of 8 devices" in str(found)


@pytest.mark.figures
def test_a_mesh_of_gpus_that_are_not_there():
    if not (plugin.in_environment() or plugin.is_complete(plugin.folder())):
        pytest.skip(f"the wheels are missing: run `{plugin.INSTALL}`")
    program = scan(4)
    ours = moonwalk_compile(program.loss)
    args = sharded(program, MESH, ROWS)
    many = ours.memory(*args, target="h200", methods=["backprop"])["backprop"]
    described = targets.resolve(targets.resolve("h200").config)
    assert described.name == "NVIDIA H200 141GB HBM3e"
    one = ours.memory(
        program.params, program.batch, target=described, methods=["backprop"]
    )["backprop"]
    assert many.temp_bytes < one.temp_bytes / 3


def test_meshes_that_do_not_fit_their_target():
    eight = targets.Target("pod", "cuda", "...", topology="2x8x1")
    with pytest.raises(MoonwalkTargetError, match="sharded over 8 devices"):
        targets.spread(eight, 8)
    assert targets.spread(eight, 16) is eight
    assert targets.spread(eight, 1) is eight
    gpu = targets.Target("gpu", "cuda", attached=True)
    with pytest.raises(MoonwalkTargetError, match="abstract mesh"):
        targets.spread(gpu, 8)


def test_a_description_of_ones_own(tmp_path):
    text = 'gpu_device_info { core_count: 2 }\ndevice_description_str: "My GPU"'
    file = tmp_path / "mine.txtpb"
    file.write_text(text)
    for given in (text, file, str(file)):
        found = targets.resolve(given)
        assert (found.name, found.platform, found.config) == ("My GPU", "cuda", text)
    assert targets.resolve("gpu_device_info {}").name == "described GPU"
    with pytest.raises(MoonwalkTargetError, match="cannot be read"):
        targets.resolve(tmp_path / "none.txtpb")


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_pictures(report, curve, tmp_path, suffix):
    for name, one in (("bars", report), ("curve", curve)):
        path = tmp_path / f"{name}.{suffix}"
        one.plot(path)
        start = path.read_bytes()[:400]
        marks = {"png": b"PNG", "svg": b"<svg", "pdf": b"%PDF"}
        assert marks[suffix] in path.read_bytes()[:1500], start


def test_pictures_show_every_method_and_number(report, curve):
    from mwc.memory import plots

    figure = plots.bars(report)
    (axes,) = figure.axes
    assert [t.get_text() for t in axes.get_yticklabels()] == [
        r.method for r in report.rows
    ]
    widths = [bar.get_width() for bar in axes.patches]
    assert widths[0] == pytest.approx(report["backprop"].temp_bytes / MIB)
    assert len(axes.lines) == 2  # what two plans predict
    (axes,) = plots.trade(curve).axes
    names = {text.get_text() for text in axes.get_legend().get_texts()}
    assert names == {"moonwalk", "backprop", "checkpoint", "checkpoint-2"}


def test_pictures_in_memory_and_bad_names(report, tmp_path):
    stream = io.BytesIO()
    report.plot(stream)
    assert b"</svg>" in stream.getvalue()
    with pytest.raises(MoonwalkValueError, match=r"bars\.gif"):
        report.plot(tmp_path / "bars.gif")


def test_without_matplotlib_the_remedy_is_said(report, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MoonwalkUnsupportedError, match="pip install matplotlib"):
        report.plot(tmp_path / "bars.png")


def test_importing_leaves_matplotlib_alone():
    code = "import sys, mwc, mwc.memory; sys.exit('matplotlib' in sys.modules)"
    import subprocess

    run = subprocess.run([sys.executable, "-c", code], cwd=".", check=False)
    assert run.returncode == 0
    assert mwc.memory.depth_at is depth.depth_at
