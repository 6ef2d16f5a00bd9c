"""Memory reports: right checkpoint baselines, and figures that are the compiler's."""

import json

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from mwc.errors import MoonwalkTypeError, MoonwalkValueError
from mwc.memory import baselines, measure, nesting, plugin, segments
from mwc.memory.inputs import FlatCall
from tests import programs

SMALL = {
    "dense": lambda: programs.dense(programs.leaky, 6, 8, 16),
    "maxmin": lambda: programs.dense(programs.maxmin, 6, 8, 16),
    "scan": lambda: programs.scanned(programs.relu, 11, 8, 16),
    "lstm": lambda: programs.lstm(13, 8, 4),
    "transformer": lambda: programs.transformer(1, 16, 2, 2, 6),
    "resnet": lambda: programs.resnet(2, 8, (4, 8), 1, 5),
}


def checkpointed(program):
    args = (program.params, program.batch)
    call = FlatCall(args, {}, 0, program.has_aux)
    return call, baselines.Checkpointed(call.bind(program.loss), call.specs)


def assert_same(found, expected):
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize(
    ("name", "levels"),
    [
        *(("dense", 1), ("dense", 2), ("maxmin", 1), ("scan", 1), ("scan", 2)),
        *(("lstm", 1), ("lstm", 2), ("transformer", 2), ("resnet", 1)),
    ],
)
def test_checkpoints_leave_value_and_gradients(name, levels):
    program = SMALL[name]()
    call, form = checkpointed(program)
    leaves = jax.tree.leaves(program.concrete())
    expected = jax.jit(call.gradient(call.bind(program.loss), True))(*leaves)
    grid, (row, column) = form.layouts(levels)
    gradient = call.gradient(form.fun(grid[row][column]), True)
    assert_same(jax.jit(gradient)(*leaves), expected)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("sizes", [(1,), (2,), (3,), (10,), (5, 1), (6, 4), (4, 2)])
def test_nested_scans_keep_order_results_and_remainders(reverse, sizes):
    def scan(carry, xs):
        def step(c, x):
            key, value = x
            noise = jax.random.uniform(key, ())
            return jnp.sin(c * value + noise), (c, value * 2)

        return lax.scan(step, carry, xs, reverse=reverse)

    xs = jax.random.split(jax.random.key(0), 10), jnp.arange(10.0)
    jaxpr = jax.make_jaxpr(scan)(jnp.float32(0.5), xs)
    (eqn,) = [e for e in jaxpr.eqns if e.primitive.name == "scan"]
    operands = [jnp.float32(0.5), *xs]
    found = nesting.nested_scan(eqn, operands, sizes)
    assert_same(found, jax.tree.leaves(scan(*[operands[0], xs])))


def test_cuts_fall_where_little_crosses():
    def loss(w, x):
        for _ in range(24):  # wide inside a block, narrow between blocks
            x = jnp.tanh(x @ w) @ w.T
        return jnp.sum(x)

    spec = jax.ShapeDtypeStruct
    specs = [spec((8, 64), jnp.float32), spec((4, 8), jnp.float32)]
    form = baselines.Checkpointed(lambda *a: [loss(*a)], specs)
    known = form.costs
    narrow = 4 * 8 * 4
    cuts = segments.lowest(known, 1.0)
    assert len(cuts) > 4
    # The last block alone may be cut where it is wide: nothing is kept after it.
    assert {known.crossing[p] for p in cuts[1:-2]} == {narrow}
    lengths = np.diff(cuts)
    assert lengths[0] > lengths[-1]  # later segments have more kept before them
    assert len(segments.even(known, 3)) == 4


def test_report_has_rows_figures_and_text():
    program = programs.dense(programs.leaky, 16, 32, 256)
    args = (program.params, program.batch)
    ours = jax.checkpoint(program.loss)
    report = measure(program.loss, ours, args, target="cpu", tries=3)
    assert [row.method for row in report.rows] == [
        *("backprop", "checkpoint", "checkpoint-2", "moonwalk")
    ]
    layer, batch = 32 * 32 * 4 + 32 * 4, 256 * 32 * 4
    for row in report.rows:
        assert row.argument_bytes == 16 * layer + batch
        assert row.output_bytes >= 16 * layer
        assert row.compile_seconds > 0
        assert row.trace_seconds > 0
    forward = 16 * 2 * 256 * 32 * 32
    assert report["backprop"].flops >= 3 * forward - 2 * 256 * 32 * 32
    assert report["checkpoint"].flops > report["backprop"].flops
    assert "segments" in report["checkpoint"].note
    plain = json.loads(json.dumps(report.to_dict()))
    assert plain["rows"][0]["temp_bytes"] == report["backprop"].temp_bytes
    text = str(report)
    assert all(row.method in text for row in report.rows)
    assert "temp" in text.splitlines()[2]


def test_in_process_figures_are_those_of_plain_jax():
    program = programs.dense(programs.leaky, 4, 16, 32)
    args = (program.params, program.batch)
    jitted = jax.jit(jax.value_and_grad(program.loss))
    stats = jitted.lower(*args).compile().memory_analysis()
    row = measure(program.loss, None, args, methods=["backprop"])["backprop"]
    assert row.temp_bytes == stats.temp_size_in_bytes
    assert row.output_bytes == stats.output_size_in_bytes


def test_inputs_of_every_kind():
    def loss(params, x, key, count, *, mode):
        assert mode == "sum"
        keep = jax.random.bernoulli(key, 0.5, x.shape)
        h = params["act"]((x * keep) @ params["w"])
        return jnp.sum(h) * count + jnp.sum(params["empty"]), {"count": count}

    params = {
        "w": jnp.ones((3, 5)),
        "empty": jnp.zeros((0, 2)),
        "none": None,
        "act": jnp.tanh,
    }
    args = (params, np.ones((4, 3), np.float32), jax.random.key(0), 3)
    report = measure(
        *(loss, None, args, {"mode": "sum"}), has_aux=True, argnums=(0, 1), tries=1
    )
    assert all(row.temp_bytes is not None for row in report.rows)


def test_numbers_of_a_module_stay_inside():
    """A dropout of equinox asks for a key where its rate is an array."""
    layer, rest = eqx.nn.Linear(4, 4, key=jax.random.key(0)), eqx.nn.Dropout(0.0)

    def loss(model, x):
        layer, rest = model
        return jnp.mean(rest(jax.vmap(layer)(x)) ** 2)

    call = FlatCall(((layer, rest), jnp.ones((2, 4))), {}, 0, False)
    assert [spec.shape for spec in call.specs] == [(4, 4), (4,), (2, 4)]
    value, *_ = call.gradient(call.bind(loss), True)(
        *(layer.weight, layer.bias, jnp.ones((2, 4)))
    )
    np.testing.assert_allclose(value, loss((layer, rest), jnp.ones((2, 4))))


def test_static_arguments_stay_inside():
    def power(x, n, *, flip):
        for _ in range(n):
            x = x * x
        return -jnp.sum(x) if flip else jnp.sum(x)

    report = measure(
        *(power, None, (jnp.ones(3), 2), {"flip": True}),
        methods=["backprop"],
        static_argnums=(1,),
        static_argnames=("flip",),
    )
    assert report["backprop"].argument_bytes == 12


def test_gradient_without_the_value():
    args = (jnp.ones(3),)
    with_value = measure(jnp.sum, None, args, methods=["backprop"])
    without = measure(jnp.sum, None, args, methods=["backprop"], value=False)
    sizes = [r["backprop"].output_bytes for r in (with_value, without)]
    assert sizes[0] > sizes[1]


def test_a_method_that_fails_says_why_and_the_others_go_on():
    def bad(x):
        raise RuntimeError("no such luck")

    report = measure(jnp.sum, bad, (jnp.ones(3),), methods=["backprop", "moonwalk"])
    assert report["backprop"].temp_bytes is not None
    assert report["moonwalk"].temp_bytes is None
    assert "no such luck" in report["moonwalk"].note
    with pytest.raises(RuntimeError, match="no such luck"):
        measure(bad, None, (jnp.ones(3),))


def test_bad_requests():
    with pytest.raises(MoonwalkValueError, match="'magic' is unknown"):
        measure(jnp.sum, None, (jnp.ones(3),), methods=["magic"])
    with pytest.raises(MoonwalkTypeError, match="argnums"):
        measure(jnp.sum, None, (jnp.ones(3),), argnums=1)
    with pytest.raises(MoonwalkTypeError, match="has_aux=True"):
        measure(lambda x: (x.sum(), x), None, (jnp.ones(3),))
    with pytest.raises(KeyError):
        measure(jnp.sum, None, (jnp.ones(3),), methods=["backprop"])["moonwalk"]


@pytest.mark.figures
@pytest.mark.parametrize(
    ("name", "backprop", "one"),
    [("dense-relu-64", 520, 96), ("scan-relu-64", 664, 184)],
)
def test_columns_of_the_table_without_us(name, backprop, one):
    if not (plugin.in_environment() or plugin.is_complete(plugin.folder())):
        pytest.skip(f"the wheels are missing: run `{plugin.INSTALL}`")
    program = programs.TABLE[name]()
    args = (program.params, program.batch)
    methods = ("backprop", "checkpoint")
    report = measure(
        *(program.loss, None, args),
        methods=methods,
        target="h200",
        value=False,
        tries=4,
    )
    found = [row.temp_bytes / 2**20 for row in report.rows]
    assert found == pytest.approx([backprop, one], rel=0.1)
