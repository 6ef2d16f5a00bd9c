"""Loops as stages: every leaf length and number of slots, every transformation."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, PartitionSpec

import mwc
from mwc import _engine, _planner, moonwalk_compile
from mwc._options import make_options
from mwc._planner import loop_extra
from mwc.loops import Loop
from passes import chain
from tests.test_properties import assert_same

pytestmark = pytest.mark.usefixtures("x64", "quick")

WIDTH, ROWS = 3, 2
EXTRAS = (0, 0.3, 1, 1.5, 2, 5)


def relu_layers(params, h):
    """Bits suffice: a pruned body."""

    def layer(h, row):
        return jax.nn.relu(h @ row[0] + row[1]), None

    return lax.scan(layer, h, params)[0]


def smooth_layers(params, h):
    """Two products in a step, so that a leaf runs again; results of every step."""

    def layer(carry, row):
        h, n = carry
        out = h + jnp.tanh(h @ row[0] + row[1]) @ row[0].T * (n % 2)
        return (out, n + 1), (jnp.sum(out), n)

    start = h, jnp.int32(1)
    (h, n), (sums, _) = lax.scan(layer, start, params, reverse=True)
    return h * n + jnp.mean(sums)


def states_twice(params, h):
    """A constant weight; one variable is both carry and result; a carry that stays."""
    w, b = params

    def step(carry, row):
        h, still = carry
        h = jnp.maximum(jnp.tanh(h @ w[0] + row), h * still)
        return (h, still), (h, h)

    (h, still), (first, second) = lax.scan(step, (h, h), b)
    return h * still + jnp.sum(first**2, axis=0) - jnp.mean(second)


BODIES = {"relu": relu_layers, "smooth": smooth_layers, "twice": states_twice}


@functools.cache
def numbers(length, seed=0):
    draw = np.random.default_rng(seed)
    w = jnp.asarray(draw.standard_normal((length, WIDTH, WIDTH)) * 0.6)
    b = jnp.asarray(np.round(draw.standard_normal((length, WIDTH)), 1))
    return (w, b), jnp.asarray(draw.standard_normal((ROWS, WIDTH)))


def built(kind, length, extra=2.0):
    """The compiled form of one loop."""
    (w, b), h = numbers(length)
    jaxpr = jax.make_jaxpr(lambda w, b, h: BODIES[kind]((w, b), h))(w, b, h)
    roles = "parameter", "parameter", "data"
    options = make_options(strategies=("checkpoint",), extra_forwards=extra)
    return _engine.build(jaxpr, roles, options)


def loops_of(emitted):
    return [s for s in emitted.chained.node.stages if isinstance(s, Loop)]


def settings_of(length, unpruned):
    """Every leaf length with every number of slots that makes a difference."""
    groups = range(1, length + 1) if unpruned else [1]
    return [(g, s) for g in groups for s in range(-(-length // g))]


@pytest.fixture
def check(monkeypatch):
    """Compares a loop of given settings with JAX; loops of any length are stages."""
    monkeypatch.setattr(chain, "_STEPS", 1)

    def compare(kind, length, **setting):
        def settled(choices, extra):
            return dataclasses.replace(next(iter(choices)), **setting)

        monkeypatch.setattr(_planner, "settle", settled)
        program = built(kind, length)
        (loop,) = loops_of(program)
        assert [getattr(loop, k) for k in setting] == [*setting.values()]

        @jax.jit
        def pull(w, b, h, ct):
            yes = (True,) * 3
            outs, saved = program.forward(yes, [w, b, h])
            return [*outs, *program.backward(yes, yes, [w, b, h], saved, [ct])]

        (w, b), h = numbers(length)
        assert_same(expected(kind, length), pull(w, b, h, cotangent(h)))

    return compare


def cotangent(h):
    return jnp.cos(jnp.arange(float(h.size))).reshape(h.shape)


@functools.cache
def expected(kind, length):
    (w, b), h = numbers(length)

    @jax.jit
    def pull(w, b, h):
        out, back = jax.vjp(lambda w, b, h: BODIES[kind]((w, b), h), w, b, h)
        return [out, *back(cotangent(h))]

    return pull(w, b, h)


SOME = [
    *[("relu", 7, 1, s, True) for s in (0, 1, 2, 6)],
    *[("relu", 7, 3, s, False) for s in (0, 2)],
    *[
        ("smooth", 11, g, s, False)
        for g, s in [(1, 0), (1, 3), (2, 2), (4, 1), (11, 0)]
    ],
    *[("twice", 9, g, s, False) for g, s in [(1, 2), (2, 4), (4, 0), (5, 1), (9, 0)]],
    *[("relu", 1, 1, 0, True), ("smooth", 1, 1, 0, False), ("twice", 2, 2, 0, False)],
    *[("smooth", 33, 4, 3, False), ("relu", 33, 1, 4, True)],
]


@pytest.mark.parametrize(("kind", "length", "group", "slots", "pruned"), SOME)
def test_leaves_and_slots(check, kind, length, group, slots, pruned):
    check(kind, length, group=group, slots=slots, pruned=pruned)


@pytest.mark.slow
@pytest.mark.parametrize("length", range(1, 34))
@pytest.mark.parametrize("kind", BODIES)
def test_every_length(check, kind, length):
    every = settings_of(length, unpruned=True)
    draw = np.random.default_rng(length)
    some = [every[i] for i in draw.permutation(len(every))[:12]]
    for group, slots in some:
        check(kind, length, group=group, slots=slots, pruned=False)
    if kind == "relu":
        for _, slots in settings_of(length, unpruned=False):
            check(kind, length, group=1, slots=slots, pruned=True)


@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("kind", BODIES)
def test_settled_loops_stay_within_the_limit(kind, extra):
    for length in (4, 5, 13, 33):
        for loop in loops_of(built(kind, length, extra)):
            assert loop_extra(loop) <= extra + 0.1
            assert 1 <= loop.group <= length
            assert 0 <= loop.slots < length
            assert not loop.pruned or loop.group == 1


def loss_of(kind):
    def loss(params, h):
        return jnp.mean(BODIES[kind](params, h) ** 2)

    return loss


@pytest.mark.parametrize("kind", BODIES)
def test_pruned_only_where_bits_suffice(kind):
    (loop,) = loops_of(built(kind, 8))
    assert loop.pruned == (kind == "relu")


@pytest.mark.parametrize("extra", [0, 1])
@pytest.mark.parametrize("kind", BODIES)
def test_under_vmap(kind, extra):
    loss = loss_of(kind)
    lanes = [numbers(6, seed) for seed in range(3)]
    (w, b), h = jax.tree.map(lambda *xs: jnp.stack(xs), *lanes)
    mine = moonwalk_compile(loss, extra_forwards=extra)
    for axes, args in [
        (((0, 0), 0), ((w, b), h)),
        (((None, 0), None), ((w[0], b), h[0])),
        ((None, 0), ((w[0], b[0]), h)),
    ]:
        true, found = (
            jax.jit(jax.vmap(jax.grad(f, (0, 1)), in_axes=axes))(*args)
            for f in (loss, mine)
        )
        assert_same(true, found)


@pytest.mark.parametrize("kind", BODIES)
def test_inside_another_scan(kind):
    def outer(f):
        def total(params, h):
            def step(h, _):
                return h + f(params, h), None

            return jnp.mean(lax.scan(step, h, None, length=3)[0])

        return total

    mine = moonwalk_compile(loss_of(kind), extra_forwards=1)
    grads = [
        jax.jit(jax.grad(outer(f), (0, 1)))(*numbers(6)) for f in (loss_of(kind), mine)
    ]
    assert_same(*grads)


@pytest.mark.parametrize("extra", [0, 1])
@pytest.mark.parametrize("kind", BODIES)
def test_inside_shard_map(kind, extra):
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
    rows = PartitionSpec("data")

    def sharded(f):
        def mean(params, h):
            return lax.pmean(f(params, h), "data")

        return jax.shard_map(
            mean, mesh=mesh, in_specs=(PartitionSpec(), rows), out_specs=PartitionSpec()
        )

    mine = moonwalk_compile(loss_of(kind), extra_forwards=extra)
    grads = [
        jax.jit(jax.grad(sharded(f), (0, 1)))(*numbers(6))
        for f in (loss_of(kind), mine)
    ]
    assert_same(*grads)


@pytest.mark.parametrize("extra", [0, 1, 2])
@pytest.mark.parametrize("kind", BODIES)
def test_code_does_not_grow_with_depth(kind, extra):
    mine = moonwalk_compile(loss_of(kind), extra_forwards=extra)
    text = [
        str(jax.jit(jax.grad(mine)).lower(*numbers(n)).as_text()) for n in (400, 4000)
    ]
    # The schedule is a table, a few numbers a step.
    small, large = (t.count(" = ") - t.count("stablehlo.constant") for t in text)
    assert large <= small * 1.1


def test_compiled_code_does_not_grow_with_depth():
    mine = moonwalk_compile(loss_of("relu"), extra_forwards=1)

    def count(length):
        compiled = jax.jit(jax.grad(mine)).lower(*numbers(length)).compile()
        lines = compiled.as_text().splitlines()
        return sum(" = " in x and "constant" not in x for x in lines)

    assert count(400) <= count(100) * 1.1


@pytest.mark.parametrize("kind", BODIES)
def test_backward_keeps_its_loops(kind):
    mine = moonwalk_compile(loss_of(kind), extra_forwards=1)
    text = jax.jit(jax.grad(mine)).lower(*numbers(64)).as_text()
    assert text.count("stablehlo.while") >= 2
    products = text.count("stablehlo.dot_general")
    assert products <= 24


def test_some_operands_alone():
    (w, b), h = numbers(6)

    def loss(w, b, h):
        return loss_of("twice")((w, b), h)

    for argnums in [(0,), (1, 2), (2,)]:
        mine = moonwalk_compile(loss, argnums=argnums, extra_forwards=1)
        grads = [jax.jit(jax.grad(f, argnums))(w, b, h) for f in (loss, mine)]
        assert_same(*grads)


def halved(x):
    return jax.lax.while_loop(lambda x: jnp.sum(x) > 1, lambda x: x / 2, x)


def called_back(x):
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return jax.pure_callback(lambda x: np.asarray(x) / 2, shape, x)


@pytest.mark.parametrize("made", [halved, called_back])
def test_what_has_no_reverse_mode_on_the_way_of_data(made):
    def loss(w, x):
        return jnp.sum((jnp.tanh(made(x) @ w) + made(x) @ w) ** 2)

    decorated = moonwalk_compile(loss)
    w, x = jnp.arange(6.0).reshape(2, 3), jnp.ones((4, 2))
    for run in (jax.grad, lambda f: jax.jit(jax.grad(f))):
        np.testing.assert_allclose(run(decorated)(w, x), run(loss)(w, x), rtol=1e-5)
    with pytest.raises(Exception, match=r"differentiation|JVP"):
        jax.grad(loss, argnums=1)(w, x)
    with pytest.raises(mwc.MoonwalkError, match=r"(?s)reverse mode.*stop_gradient"):
        jax.grad(decorated, argnums=1)(w, x)


def deep(w, x):
    return lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, w)[0]


SHORT = {
    "nested": lambda w, x: jnp.mean(
        lax.scan(lambda h, w: (deep(w, h), None), x, w)[0] ** 2
    ),
    "mapped": lambda w, x: jnp.mean(
        lax.map(lambda x: deep(w[0], x), jnp.stack([x] * w.shape[0])) ** 2
    ),
}


@pytest.mark.parametrize("length", [1, 2, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", sorted(SHORT))
def test_a_short_loop_over_deep_bodies(name, length):
    """Two batches whose gradients add up are a loop of two steps."""
    draw = np.random.default_rng(length)
    w, x = 0.4 * draw.standard_normal((length, 24, 8, 8)), draw.standard_normal((64, 8))
    plain, ours = SHORT[name], moonwalk_compile(SHORT[name])
    mine, true = (jax.jit(jax.grad(f, (0, 1))) for f in (ours, plain))
    assert_same(mine(w, x), true(w, x))
    plan = ours.plan(w, x)
    kept = 8 * (length * 24 * 64 * 8)  # the state of every layer
    assert plan.backprop_bytes >= kept
    assert plan.peak_bytes < kept / length
    temp = [
        f.lower(w, x).compile().memory_analysis().temp_size_in_bytes
        for f in (mine, true)
    ]
    assert temp[0] < temp[1] / 2


@pytest.mark.parametrize("make", [deep, lambda w, x: lax.map(jnp.tanh, x @ w[0])])
def test_what_is_stored_is_not_run_again(make):
    """Also where it reads nothing but data."""

    def loss(w, x):
        return jnp.mean(make(w, x) ** 2)

    w, x = jnp.ones((24, 8, 8)), jnp.ones((64, 8))
    ours = moonwalk_compile(loss, extra_forwards=0)
    assert ours.plan(w, x).extra_forwards == 0
    report = ours.memory(w, x, target="cpu", methods=("backprop", "moonwalk"))
    plain, mine = (row.flops for row in report.rows)
    assert mine <= 1.15 * plain
    stored = moonwalk_compile(loss, strategies="stored").plan(w, x)
    assert stored.backprop_bytes == ours.plan(w, x).backprop_bytes
