"""Chains that are rebuilt: gradients are those of `jax.grad`, and little is kept."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import mwc
from mwc import moonwalk_compile
from mwc._tie import CPU_DROPS_BARRIERS
from mwc.constraints import orthogonal
from tests.submersive import (
    BATCH,
    DEPTH,
    FORCED,
    KINKS,
    LAYERS,
    WIDTH,
    chain,
    data,
    isometry,
    layer,
    layers,
    max_min,
    mean_square,
    numbers,
    over_layers,
    rows,
    weights,
)

pytestmark = pytest.mark.usefixtures("quick")


def assert_same(mine, true, rtol=1e-9):
    assert jax.tree.structure(mine) == jax.tree.structure(true)
    for a, b in zip(jax.tree.leaves(mine), jax.tree.leaves(true), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        limit = rtol * np.max(np.abs(b), initial=0)
        np.testing.assert_allclose(a, b, rtol=0, atol=limit)


def compare(loss, *args, least=0, make=jax.grad, rtol=1e-9, both=False, **options):
    """Gradients under forced and default strategies; the plan of the first."""
    true = jax.jit(make(loss))(*args)
    for strategies in [FORCED, None] if both else [FORCED]:
        ours = moonwalk_compile(loss, strategies=strategies, **options)
        assert_same(jax.jit(make(ours))(*args), true, rtol)
        if strategies:
            plan = ours.plan(*args)
            assert rows(plan) >= least, str(plan)
    return plan


def bits(depth=DEPTH, batch=BATCH, width=WIDTH, per=1):
    """Packed bits of a chain, in bytes."""
    return depth * batch * -(-per * width // 8)


SKETCH = 8 * 256


FAST = {("abs", "declared"), ("max-min", "declared"), ("leaky 0.9", "triangular")}
CHAINS = [
    pytest.param(*pair, marks=() if pair in FAST else pytest.mark.slow)
    for pair in itertools.product(KINKS, LAYERS)
]


@pytest.mark.parametrize(("kink", "kind"), CHAINS)
def test_chains(x64, kind, kink):
    plan = compare(
        chain(kink, kind),
        layers(),
        data(),
        least=DEPTH - 2,
        both=(kink, kind) not in FAST,
    )
    # Matrices of `orthogonal` may run again; a state of doubles is 192 bytes.
    most = DEPTH * (SKETCH + 4 * BATCH) + 8 * BATCH * WIDTH * 4
    assert plan.residual_bytes <= most
    rebuilt = [s for s in plan.stages if s.strategy == "moonwalk" and s.bits]
    assert len(rebuilt) >= DEPTH - 2
    assert all(s.amplification and s.amplification < 1.5 for s in rebuilt)


def test_the_peak_of_a_forced_plan_is_that_of_the_same_plan_chosen():
    """States and products of sweep V are in it, not only what is kept."""
    weights, batch = [np.float32(isometry(64, 64))] * 24, np.ones((256, 64), np.float32)

    def loss(ws, x):
        for w in ws:
            x = jnp.abs(layer(x, w))
        return jnp.mean(jax.nn.relu(x @ jnp.ones((64, 8))) ** 2)

    forced = moonwalk_compile(loss, strategies=FORCED).plan(weights, batch)
    chosen = moonwalk_compile(loss).plan(weights, batch)
    assert rows(forced) == rows(chosen) == len(weights) - 1
    assert forced.peak_bytes >= 4 * batch.nbytes
    assert forced.peak_bytes == pytest.approx(chosen.peak_bytes, rel=0.01)


@pytest.mark.parametrize("head", [0, 8])
def test_the_last_layer_is_stored_where_the_peak_allows(x64, head):
    """Its cotangent is there first; after it a head that is stored has the peak."""
    ws, batch = [isometry(6, 6) for _ in range(6)], numbers(1, 4, 6)
    heads = [numbers(i, 6, 6) for i in range(head)]

    def loss(params, x):
        ws, heads = params
        for w in ws:
            x = jnp.abs(layer(x, w))
        for w in heads:
            x = jnp.tanh(x @ w)
        return jnp.mean((x - 1) ** 2)

    plan = compare(loss, (ws, heads), batch)
    last = "moonwalk" if head else "stored"
    assert [s.strategy for s in plan.stages[:6]] == ["moonwalk"] * 5 + [last]


@pytest.mark.parametrize("strategies", [None, FORCED, ("checkpoint", "stored")])
def test_the_peak_of_a_loop_is_what_is_compiled(strategies):
    """With its stage's own bytes, and with the steps on the way to a leaf."""
    weights, batch = np.float32([isometry(64, 64)] * 40), np.ones((2048, 64), "f")

    def loss(ws, x):
        return jnp.mean(
            lax.scan(lambda x, w: (jnp.abs(layer(x, w)), None), x, ws)[0] ** 2
        )

    ours = moonwalk_compile(loss, strategies=strategies)
    made = jax.jit(jax.grad(ours)).lower(weights, batch).compile()
    plan = ours.plan(weights, batch)
    compiled = made.memory_analysis().temp_size_in_bytes
    # Where barriers are dropped, a copy of a state or two is made.
    rel = 0.4 if CPU_DROPS_BARRIERS else 0.06
    assert compiled == pytest.approx(plan.peak_bytes, rel=rel)
    assert rows(plan) == (strategies != ("checkpoint", "stored"))


def test_narrowing_chain(x64):
    widths = np.linspace(20, 4, DEPTH + 1).astype(int)
    shapes = itertools.pairwise(widths)
    ws = [isometry(m, n) for m, n in shapes]
    batch = numbers(1, BATCH, 20), numbers(2, BATCH, 4)

    def loss(ws, batch):
        x, y = batch
        for w in ws:
            x = jnp.abs(layer(x, w) - 0.1)
        return mean_square(x, y)

    compare(loss, ws, batch, least=DEPTH - 2)


def test_slices_and_means_between_layers(x64):
    ws = [isometry(n, n) for n in (16, 16, 8, 8, 4)]
    batch = numbers(1, BATCH, 32), numbers(2, BATCH, 2)

    def loss(ws, batch):
        x, y = batch
        x = jnp.abs(layer(x[:, ::2], ws[0]))
        x = jnp.abs(layer(x, ws[1])).reshape(BATCH, 8, 2).mean(-1)
        x = jax.nn.leaky_relu(layer(x, ws[2]), 0.9)[:, ::-1]
        x = max_min(layer(x, ws[3]))[:, 2:6]
        return mean_square(jnp.abs(layer(x, ws[4]))[:, :2], y)

    compare(loss, ws, batch, least=3, both=True)


# Loops ----------------------------------------------------------------------------


@pytest.mark.parametrize("kink", KINKS)
@pytest.mark.parametrize("reverse", [False, True])
def test_scan_over_layers(x64, kink, reverse):
    plan = compare(over_layers(kink, reverse), weights(), data(), least=1)
    assert plan.residual_bytes <= DEPTH * (SKETCH + 4 * BATCH) + 8 * BATCH * WIDTH * 8


def test_scan_over_orthogonal_layers(x64):
    def loss(params, batch):
        def step(x, p):
            return jnp.abs(x @ p[0] + p[1]), None

        x, y = batch
        maps = orthogonal(params[0]), params[1]
        return mean_square(lax.scan(step, x, maps)[0], y)

    compare(loss, weights(), data(), least=1)


def recurrent(params, batch, reverse=False):
    w, u, b = params
    xs, y = batch

    def step(h, x):
        return jnp.abs(layer(h, w) + x @ u + b), None

    h = jnp.ones((xs.shape[1], WIDTH), xs.dtype)
    return mean_square(lax.scan(step, h, xs, reverse=reverse)[0], y)


def recurrent_args(steps):
    u, b = 0.3 * numbers(4, 3, WIDTH), numbers(5, WIDTH)
    batch = 0.1 * numbers(6, steps, BATCH, 3), numbers(2, BATCH, WIDTH)
    return (isometry(WIDTH, WIDTH), u, b), batch


@pytest.mark.parametrize("steps", [7, 300])
@pytest.mark.parametrize("reverse", [False, True])
def test_scan_over_time(x64, steps, reverse):
    """Gradients also of each step's input; a cotangent is kept every 128 steps."""
    loss = functools.partial(recurrent, reverse=reverse)
    make = functools.partial(jax.grad, argnums=(0, 1))
    plan = compare(loss, *recurrent_args(steps), least=1, make=make)
    stops = (steps - 1) // 128
    state = 8 * BATCH * WIDTH
    assert plan.residual_bytes <= steps * (SKETCH + 4 * BATCH) + (4 + stops) * state


# What is differentiated -------------------------------------------------------------


def tied(params, batch):
    x, y = batch
    for i in range(8):
        x = jnp.abs(layer(x, params["w"]) + params["b"][i])
    return mean_square(layer(x, params["w"].T), y)


def test_tied_weights(x64):
    params = {"w": isometry(WIDTH, WIDTH), "b": numbers(3, 8, WIDTH)}
    compare(tied, params, data(), least=6)


def test_frozen_weights(x64):
    """Only some leaves are differentiated: those of argnums, or none but one."""

    def loss(some, frozen, batch):
        x, y = batch
        for i in range(8):
            w, b = frozen[i]
            x = jnp.abs(layer(x, w) + b)
            if i in (2, 5):
                x = x + some[i]
        return mean_square(x, y)

    some = {2: numbers(3, WIDTH), 5: numbers(4, WIDTH)}
    compare(loss, some, layers(8), data(), least=2)

    def of_one(f):
        return jax.grad(lambda b, rest, batch: f([(rest[0][0], b), *rest[1:]], batch))

    def of_last(f):
        return jax.grad(lambda w, rest, batch: f([*rest[:-1], (w, 0.0)], batch))

    params = layers(8)
    compare(chain(), params, data())
    ours = moonwalk_compile(chain(), strategies=FORCED)
    for make, arg in [(of_one, params[0][1]), (of_last, params[-1][0])]:
        args = (arg, params, data())
        assert_same(jax.jit(make(ours))(*args), jax.jit(make(chain()))(*args))


def test_gradient_of_the_data(x64):
    for argnums in (1, (0, 1)):
        make = functools.partial(jax.grad, argnums=argnums)
        compare(chain(), layers(8), data(), make=make, least=6)


def test_auxiliary_results(x64):
    def loss(params, batch):
        value = chain()(params, batch)
        return value, {"double": 2 * value, "count": jnp.int32(3)}

    make = functools.partial(jax.grad, has_aux=True)
    compare(loss, layers(8), data(), make=make, has_aux=True, least=6)
    ours = moonwalk_compile(loss, has_aux=True, strategies=FORCED)
    (_, aux), grads, drift = ours.value_and_grad(layers(8), data(), with_drift=True)
    assert int(aux["count"]) == 3
    assert not drift.tripped
    assert_same(grads, jax.grad(loss, has_aux=True)(layers(8), data())[0])


# Transformations --------------------------------------------------------------------


def stacked(tree):
    return jax.tree.map(lambda x: np.stack([x, x[..., ::-1], -x]), tree)


MAKERS = {
    "eager": jax.grad,
    "vmap over data": lambda f: jax.vmap(jax.grad(f), (None, 0)),
    "vmap over parameters": lambda f: jax.vmap(jax.grad(f), (0, None)),
    "grad of vmap": lambda f: jax.grad(lambda p, b: jax.vmap(f, (None, 0))(p, b).sum()),
    "jvp of grad": lambda f: (
        lambda p, b: jax.jvp(lambda p: jax.grad(f)(p, b), (p,), (p,))[1]
    ),
    "inside scan": lambda f: (
        lambda p, b: lax.scan(lambda c, one: (c, jax.grad(f)(p, one)), 0.0, b)[1]
    ),
}


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("loop", [False, True])
def test_transformations(x64, name, loop):
    params = weights(5) if loop else layers(5)
    batch = data()
    if name in ("vmap over data", "grad of vmap", "inside scan"):
        batch = stacked(batch)
    if name == "vmap over parameters":
        params = stacked(params)
    loss = over_layers() if loop else chain()
    make, true = MAKERS[name], MAKERS[name](loss)(params, batch)
    ours = make(moonwalk_compile(loss, strategies=FORCED))
    run = ours if name == "eager" else jax.jit(ours)
    assert_same(run(params, batch), true)


# Shapes and dtypes ------------------------------------------------------------------


@pytest.mark.parametrize("loop", [False, True])
@pytest.mark.parametrize("batch", [0, 1, 17])
def test_batches(x64, loop, batch):
    loss = over_layers() if loop else chain()
    total = lambda p, b: loss(p, b) * jnp.float64(batch)  # noqa: E731
    params = weights(5) if loop else layers(5)
    if batch == 0:
        total = lambda p, b: jnp.sum(_states(loop, p, b[0]))  # noqa: E731
    compare(total, params, data(batch))


def _states(loop, params, x):
    if loop:
        return lax.scan(lambda x, p: (jnp.abs(layer(x, p[0])), None), x, params)[0]
    for w, _ in params:
        x = jnp.abs(layer(x, w))
    return x


def test_states_of_one_axis_and_of_one_number(x64):
    x, y = data()
    compare(chain(), layers(8), (x[0], y[0]), least=6)
    compare(chain(), layers(8, 1), data(1, 1), least=6)
    compare(over_layers(), weights(8), (x[0], y[0]), least=1)


def test_states_of_three_axes(x64):
    batch = numbers(1, 2, 3, WIDTH), numbers(2, 2, 3, WIDTH)
    compare(chain("leaky 0.9"), layers(8), batch, least=6)


def unitary(depth):
    z = numbers(7, depth, 4, 4) + 1j * numbers(8, depth, 4, 4)
    return np.linalg.qr(z)[0]


@pytest.mark.parametrize("loop", [False, True])
def test_complex_weights(x64, loop):
    def kink(z):
        return lax.complex(jnp.abs(z.real), z.imag - 0.1)

    def loss(ws, batch):
        x, y = batch
        if loop:
            x = lax.scan(lambda x, w: (kink(layer(x, w)), None), x, ws)[0]
        else:
            for w in ws:
                x = kink(layer(x, w))
        return mean_square(x, y)

    ws = unitary(8)
    batch = numbers(1, 3, 4) + 1j * numbers(2, 3, 4), numbers(3, 3, 4) + 0j
    compare(loss, ws if loop else [*ws], batch, least=1 if loop else 6)


def test_nothing_is_assumed_of_a_weight():
    def loss(params, batch):
        x, y = batch
        for w, b in params:
            x = jnp.abs(x @ w + b)
        return mean_square(x, y)

    params, batch = jax.tree.map(np.float32, (layers(8), data()))
    plan = mwc.moonwalk_compile(loss).plan(params, batch)
    assert rows(plan) == 0
    reasons = [stage.reason for stage in plan.stages]
    assert any("unknown conditioning" in reason for reason in reasons), reasons
