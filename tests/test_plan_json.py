"""What a plan says of values is what the program saves; plans as JSON and back."""

import json
import math

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st

import mwc
from mwc._plan import FLOWING, INPUT, SAVED, STORAGE, Body, StageRecord, Value
from tests.drawn import PROGRAMS, decorated, plan_of

each = pytest.mark.parametrize("name", PROGRAMS)


def everything(stages, values):
    """The chain, and those inside of it, as (records, values)."""
    yield stages, values
    for stage in stages:
        for body in stage.bodies:
            yield from everything(body.stages, body.values)


@each
def test_records_add_up_to_values(name):
    plan = plan_of(name)
    kept = sum(v.bytes for v in plan.values if v.kept)
    assert kept == plan.residual_bytes
    assert sum(s.residual_bytes + s.state_bytes for s in plan.stages) == kept
    assert sum(s.backprop_bytes for s in plan.stages) == plan.backprop_bytes
    assert plan.name == "loss"
    for stages, values in everything(plan.stages, plan.values):
        for i, stage in enumerate(stages):
            own = [v for v in values if v.kind in SAVED and v.maker == i]
            assert sum(v.bytes for v in own) == stage.residual_bytes
            bits = [math.prod(v.shape) for v in own if v.kind == "bits"]
            assert sum(bits) == stage.bits
            assert stage.storage in STORAGE
        for value in values:
            assert value.kind in (*FLOWING, *SAVED)
            assert all(value.maker <= i < len(stages) for i in value.readers)
            assert (value.maker == INPUT) <= (value.kind in FLOWING)


@each
def test_what_is_kept_is_what_the_program_saves(name):
    loss, program = decorated(name)
    plan = plan_of(name)
    spec = loss._shared.spec((program.params, program.batch), {}, 0)
    params = len(jax.tree.leaves(program.params))
    active = tuple(i < params for i in range(len(spec.in_avals)))
    saved = sum(a.size * a.dtype.itemsize for a in spec.saved_avals(active))
    # Sketches are made on the way back.
    later = [v for v in plan.values if v.kind == "sketch"]
    assert saved == plan.residual_bytes - sum(v.bytes for v in later)


def test_arguments_have_the_users_paths_and_stages_his_scopes():
    plan = plan_of("unet")
    arguments = {v.name: v for v in plan.values if v.maker == INPUT}
    assert arguments["params['down']"].kind == "parameter"
    assert arguments["batch[0]"].kind == "data"
    names = [stage.name for stage in plan.stages]
    assert names[:5] == ["outer", "down", "middle", "up", "head"]
    assert plan.stages[5].name == plan.stages[5].source != ""


def test_a_skip_is_one_value_with_two_readers():
    plan = plan_of("unet")
    wide = [v for v in plan.values if v.kind == "state" and v.shape == (4, 16, 16, 8)]
    read = {plan.stages[i].name for v in wide if v.maker <= 1 for i in v.readers}
    assert {"down", "up"} <= read
    (result,) = [v for v in plan.values if v.result]
    assert result.shape == ()


@pytest.mark.parametrize(
    ("name", "storage"),
    [
        ("stored", "full value"),
        ("moonwalk", "bits"),
        ("scan", "bits"),
        ("lstm", "kept state"),
        ("dense", "recomputed"),
    ],
)
def test_storage(name, storage):
    found = [stage.storage for stage in plan_of(name).stages]
    assert storage in found
    assert ("full value" in found) >= (name == "stored")


def test_bodies():
    (step,) = plan_of("nested").stages[0].bodies
    assert (step.label, step.times) == ("step", 16)
    assert len(step.stages) > 1
    assert "params['wide'][step]" in {v.name for v in step.values}
    (choice,) = [s for s in plan_of("branches").stages if s.bodies]
    assert [body.label for body in choice.bodies] == ["branch 0", "branch 1"]
    assert all(len(body.stages) > 1 for body in choice.bodies)


# JSON ---------------------------------------------------------------------------


@each
def test_round_trip(name):
    plan = plan_of(name)
    text = plan.to_json()
    assert json.loads(text)["version"] == 1
    assert mwc.Plan.from_json(text) == plan


numbers = st.floats(allow_nan=False, allow_infinity=False)
counts = st.integers(min_value=0)
values = st.builds(Value, shape=st.lists(counts, max_size=3).map(tuple))
leaves = {name: numbers for name in ("extra_flops", "runs_again")}
leaves["amplification"] = st.none() | numbers
records = st.builds(StageRecord, **leaves, bodies=st.just(()))
bodies = st.builds(
    Body,
    stages=st.lists(records, max_size=2).map(tuple),
    values=st.lists(values, max_size=2).map(tuple),
)
outer = st.builds(StageRecord, **leaves, bodies=st.lists(bodies, max_size=2).map(tuple))
plans = st.builds(
    mwc.Plan,
    stages=st.lists(outer, max_size=3).map(tuple),
    extra_forwards=numbers,
    values=st.lists(values, max_size=3).map(tuple),
)


@given(plans)
def test_any_plan_comes_back(plan):
    assert mwc.Plan.from_json(plan.to_json()) == plan


def changed(**fields):
    return json.dumps(json.loads(plan_of("dense").to_json()) | fields)


def without(field):
    data = json.loads(plan_of("dense").to_json())
    del data[field]
    return json.dumps(data)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (lambda: "{", "no JSON"),
        (lambda: None, "no JSON"),
        (lambda: "[1]", "no plan"),
        (lambda: "{}", "no plan"),
        (lambda: changed(version=2), "version 2"),
        (lambda: changed(extra=2), "extra"),
        (lambda: without("peak_bytes"), "peak_bytes"),
        (lambda: changed(peak_bytes="3"), r"plan\.peak_bytes is '3'"),
        (lambda: changed(peak_bytes=True), r"plan\.peak_bytes is True"),
        (lambda: changed(peak_bytes=0.5), r"plan\.peak_bytes is 0.5"),
        (lambda: changed(stages=3), r"plan\.stages is 3"),
        (lambda: changed(stages=[3]), r"plan\.stages\[0\] is 3"),
        (lambda: changed(values=[{"name": ""}]), r"plan\.values\[0\] lacks"),
    ],
)
def test_bad_text(text, found):
    with pytest.raises(mwc.MoonwalkValueError, match=found) as error:
        mwc.Plan.from_json(text())
    assert "expected" in str(error.value)
