"""The plan: made in time, printed, complete; unknown primitives are named."""

import dataclasses
import itertools
import random
import time

import jax
import jax.numpy as jnp
import pytest

from mwc import MoonwalkUnsupportedError, moonwalk_compile
from passes import _jax
from tests import programs


def plan_of(program, **options):
    loss = moonwalk_compile(program.loss, has_aux=program.has_aux, **options)
    return loss.plan(program.params, program.batch)


def equal_layers():
    def loss(ws, x):
        for i in range(3400):
            x = jnp.tanh(x @ ws[i % 4] + 1.0)
        return jnp.sum(x)

    return loss, [programs.spec(8, 8)] * 4, programs.spec(4, 8)


def layers_of_many_widths():
    draw = random.Random(0)
    dims = [draw.choice(range(8, 88, 8)) for _ in range(2001)]

    def loss(params, x):
        for w, b in params:
            x = jnp.tanh(jax.nn.relu(x @ w + b))
        return jnp.sum(x)

    spec = programs.spec
    pairs = itertools.pairwise(dims)
    return loss, [(spec(a, b), spec(b)) for a, b in pairs], spec(32, dims[0])


@pytest.mark.parametrize(
    "program",
    [equal_layers, pytest.param(layers_of_many_widths, marks=pytest.mark.slow)],
)
def test_ten_thousand_equations_in_time(program):
    loss, params, x = program()

    def seconds(run):
        start = time.process_time()
        run(lambda *args: loss(*args))
        return time.process_time() - start

    def plan(loss):
        assert moonwalk_compile(loss).plan(params, x).stages

    # Ten seconds where backpropagation is traced in four or five; a busy or slow
    # machine takes longer for both.
    spent = seconds(plan)
    if spent > 10:
        traced = seconds(lambda loss: jax.make_jaxpr(jax.grad(loss))(params, x))
        assert spent < 2.5 * traced


@pytest.mark.parametrize("extra", [0, 1, 2])
def test_records_and_table(extra):
    plan = plan_of(programs.dense(programs.relu, 12, 32, 64), extra_forwards=extra)
    text = str(plan)
    assert "extra forward passes" in text
    assert "programs.py:" in text
    assert plan.extra_forwards <= extra + 0.1
    assert 0 < plan.residual_bytes <= plan.backprop_bytes
    rows = [dataclasses.asdict(row) for row in plan.stages]
    for row in rows:
        assert row["strategy"] in ("stored", "checkpoint")
        assert row["source"] or row["kind"] == "nothing"
        assert row["reason"]
        assert min(row["bits"], row["residual_bytes"], row["state_bytes"]) >= 0
    kept = sum(r["residual_bytes"] + r["state_bytes"] for r in rows)
    assert kept == plan.residual_bytes


def ad_value(tangent):
    return _jax.instantiated(tangent)


def unknown():
    primitive = _jax.new_primitive("mystery")
    primitive.multiple_results = False
    _jax.register_rules(
        primitive,
        run=lambda x: x * 2,
        avals=lambda x: (x, set()),
        emit=lambda x: [x * 2],
        jvp=lambda p, t: (primitive.bind(*p), 2 * ad_value(t[0])),
        batch=lambda *_: None,
    )
    return primitive


def test_strict_names_what_has_no_rule():
    primitive = unknown()

    def loss(w, x):
        return jnp.sum(primitive.bind(jnp.sin(x @ w)))

    args = jnp.ones((3, 3)), jnp.ones((2, 3))
    (note,) = moonwalk_compile(loss).plan(*args).notes
    assert "'mystery'" in note
    assert "test_planning.py:" in note
    assert "custom_vjp" in note
    with pytest.raises(MoonwalkUnsupportedError, match="mystery"):
        moonwalk_compile(loss, strict=True).plan(*args)
    found = jax.grad(moonwalk_compile(loss))(*args)
    assert jnp.allclose(found, jax.grad(loss)(*args))


@pytest.mark.usefixtures("x64")
def test_stages_that_differ_in_the_last_digits_of_a_constant_are_told_apart():
    scales = [jnp.asarray(1.0 + k * 1e-11) for k in range(6)]

    def loss(params, x):
        for w, c in zip(params, scales, strict=True):
            x = jnp.sin(x @ w) * c + x
        return jnp.sum(x)

    params, x = [0.7 * jnp.eye(3)] * 6, jnp.ones((2, 3))
    found = jax.grad(moonwalk_compile(loss))(params, x)
    for mine, true in zip(found, jax.grad(loss)(params, x), strict=True):
        assert float(jnp.max(jnp.abs(mine - true))) < 1e-13
