"""Live bytes: XLA's own ranges, read right, and what users are told of them."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mwc import moonwalk_compile
from mwc.errors import MoonwalkTargetError, MoonwalkValueError
from mwc.memory import alive, buffers, compiling, plugin, targets
from mwc.memory import timeline as timelines
from mwc.memory.subject import Subject
from tests import programs

WORKER_CPU = targets.Target("cpu", "cpu")
DEPTH, WIDTH, BATCH = 8, 32, 128
STATE = WIDTH * BATCH * 4


@pytest.fixture(scope="module", autouse=True)
def _end_workers():
    yield
    compiling.close_workers()


def chain(depth=DEPTH):
    return programs.dense(jnp.tanh, depth, WIDTH, BATCH)


def subject(program):
    return Subject(program.loss, {}, (program.params, program.batch))


@pytest.fixture(scope="module")
def scan():
    """A scan that is rebuilt, with a plan."""
    program = programs.scanned(jnp.abs, DEPTH, WIDTH, BATCH, product=programs.rotate)
    ours = {"moonwalk": moonwalk_compile(program.loss)}
    args = program.params, program.batch
    return Subject(program.loss, ours, args, tries=1)


@pytest.fixture(scope="module")
def compiled(scan):
    """Its plan and its timeline, as compiled here."""
    return scan.plan("moonwalk"), timelines.timeline(scan)


ASSIGNMENT = """BufferAssignment:
allocation 0: size 64, page 0, parameter 1, shape |f32[16]| at ShapeIndex {}:
 value: <1 x.1 @0> (size=64,offset=0): f32[16]{0}
allocation 1: size 64, color 1, maybe-live-out:
 value: <2 sum.{1} (phi) @0> (size=64,offset=0): f32[16]{0}
allocation 2: size 4, thread-local:
 value: <3 inner @0> (size=4,offset=0): f32[]
allocation 3: size 4, constant:
 value: <4 one @0> (size=4,offset=0): f32[]
allocation 4: size 96, preallocated-temp:
 value: <5 pair{} @0> (size=16,offset=64): (f32[16]{0}, f32[4]{0})
 value: <6 pair{0} @0> (size=64,offset=0): f32[16]{0}
 value: <7 pair{1} @0> (size=16,offset=80): f32[4]{0}
 value: <8 same @0> (size=64,offset=0): bf16[32]{0}
 value: <9 zeros{0} @0> (size=16,offset=64): f32[4]{0}
"""
RANGES = """HloLiveRange (max 4):
  InstructionSequence:
    0:x.1
    1:zeros
    2:pair
    3:same
  BufferLiveRange:
    x.1{}:0-4
    sum.{1}:3-4
    one{}:0-4
    pair{}:2-3
    pair{0}:2-3
    pair{1}:2-2
    same{}:3-4
    zeros{0}:1-3
  Live ranges at 2 (peak):
    x.1{}: 64 bytes (cumulative: 64 bytes)
"""
FORWARD = "jit(program)/jvp(A)/sin"
BACKWARD = r"jit(program)/transpose(jvp(A))/\"q\""
MODULE = f"""
  %zeros = (f32[4]{{0}}, /*index=1*/f32[]) fusion(%constant.2), kind=kLoop
  %pair = (f32[16]{{0}}, f32[4]{{0}}) fusion(%x.1), metadata={{op_name="{FORWARD}"}}
  ROOT %same = bf16[32]{{0}} bitcast(%pair), metadata={{op_name="{BACKWARD}"}}
"""


@pytest.fixture
def written(tmp_path):
    names = ("-buffer-assignment", "-live-range", "")
    for name, text in zip(names, (ASSIGNMENT, RANGES, MODULE), strict=True):
        (tmp_path / f"module_1.f.after_optimizations{name}.txt").write_text(text)
    return tmp_path


def test_the_format_is_read(written):
    found = buffers.read(written)
    assert found["steps"] == ["", "", FORWARD, BACKWARD]
    values = {(v[0], v[2]): v for v in found["values"]}
    assert values["pair", "f32[16]"][3:] == ("temporary", 4, 0, 64, 2, 3, False)
    assert values["zeros", "f32[4]"][-1]
    assert values["x.1", "f32[16]"][3] == "argument"
    assert values["sum.", "f32[16]"][3] == "result"
    assert values["one", "f32[]"][3] == "constant"
    assert len(values) == 7  # the thread's own value and the table of pointers are out


def test_shared_bytes_count_once(written):
    live = alive.Live(buffers.read(written))
    assert live.bytes.tolist() == [0, 16, 96, 144]
    assert live.temp.tolist() == [0, 16, 96, 80]
    assert live.turn == 2
    assert live.kept_bytes == 64  # neither the zeros nor what ends there
    assert [(v.label, v.bytes) for v in live.peak.values] == [
        ('backward: A/\\"q\\"', 64),
        ("a result", 64),
        ("one number throughout", 16),
    ]


def test_nothing_written_is_nothing_read(tmp_path):
    assert buffers.read(tmp_path) is None


def test_peaks_are_what_the_compiler_allots(compiled):
    _, found = compiled
    for one in found.series:
        assert one.source == "compiler"
        assert one.ratio == pytest.approx(1, abs=0.1)
        assert one.peak.bytes == max(one.bytes) == one.bytes[one.peak.step]
        assert sum(v.bytes for v in one.peak.values) == one.peak.bytes


def test_what_is_alive_after_the_forward_pass_is_what_the_plan_keeps(compiled):
    plan, found = compiled
    kept = plan.residual_bytes + plan.state_bytes
    assert found["moonwalk"].kept_bytes == pytest.approx(kept, rel=0.1)
    states = DEPTH * STATE
    assert found["backprop"].kept_bytes >= states
    assert found["moonwalk"].kept_bytes < found["backprop"].kept_bytes / 2


def test_results_stay_to_the_end_and_arguments_are_left_out(compiled):
    _, found = compiled
    layer = 4 * (WIDTH * WIDTH + WIDTH)
    for one in found.series:
        assert one.bytes[-1] == pytest.approx(DEPTH * layer, rel=0.01)
        assert one.temp[-1] < one.bytes[-1]


def test_the_values_of_a_chain_are_named_by_the_users_scopes():
    program = chain()

    def loss(params, x):
        with jax.named_scope("encoder"):
            return program.loss(params, x)

    ours = moonwalk_compile(loss)
    found = ours.timeline(program.params, program.batch, methods=["backprop"])
    first = found.peak["backprop"].values[0]
    assert first.label == "encoder/tanh"
    assert first.shape == f"f32[{BATCH},{WIDTH}]"
    assert first.bytes == first.count * STATE
    assert first.count >= DEPTH - 1
    text = str(found)
    assert f"{first.count} × f32[{BATCH},{WIDTH}]  encoder/tanh" in text


def test_another_process_finds_the_same():
    one = subject(chain())
    here = timelines.timeline(one, None, ["backprop"])["backprop"]
    there = timelines.timeline(one, WORKER_CPU, ["backprop"])["backprop"]
    assert here.bytes == there.bytes
    assert [(v.label, v.bytes) for v in here.peak.values] == [
        (v.label, v.bytes) for v in there.peak.values
    ]


def test_plain_data_and_unknown_methods(compiled):
    _, found = compiled
    plain = json.loads(json.dumps(found.to_dict()))
    assert [s["method"] for s in plain["series"]] == [
        *("backprop", "checkpoint", "moonwalk")
    ]
    assert plain["series"][2]["peak"]["values"][0]["bytes"] > 0
    assert set(found.peak) == {"backprop", "checkpoint", "moonwalk"}
    with pytest.raises(KeyError):
        found["magic"]
    program = chain()
    with pytest.raises(MoonwalkValueError, match="'magic' is unknown"):
        timelines.timeline(subject(program), methods=["magic"])


def test_without_a_schedule_the_plan_speaks_and_says_so(scan, monkeypatch, tmp_path):
    monkeypatch.setattr(buffers, "read", lambda place: None)
    found = timelines.timeline(scan, methods=("backprop", "moonwalk"))
    plan = scan.plan("moonwalk")
    assert [s.source for s in found.series] == ["plan", "plan"]
    assert found.peak["moonwalk"].bytes == plan.residual_bytes + plan.state_bytes
    assert found.peak["backprop"].bytes == plan.backprop_bytes
    assert "moonwalk (plan)" in str(found)
    found.plot(tmp_path / "plan.svg")
    with pytest.raises(MoonwalkTargetError, match="writes no schedule"):
        timelines.timeline(subject(chain()), methods=["backprop"])


@pytest.mark.figures
def test_the_schedule_for_an_h200_keeps_what_the_plan_says():
    if not (plugin.in_environment() or plugin.is_complete(plugin.folder())):
        pytest.skip(f"the wheels are missing: run `{plugin.INSTALL}`")
    program = programs.scanned(jnp.abs, 16, 128, 1024, product=programs.rotate)
    ours = moonwalk_compile(program.loss)
    args = program.params, program.batch
    found = ours.timeline(*args, target="h200", methods=["moonwalk"])["moonwalk"]
    plan = ours.plan(*args)
    kept = plan.residual_bytes + plan.state_bytes
    np.testing.assert_allclose(found.kept_bytes, kept, rtol=0.1)
    assert found.ratio == pytest.approx(1, abs=0.02)
