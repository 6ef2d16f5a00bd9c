"""Choices as stages: each branch a chain, under every transformation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, PartitionSpec

from mwc import _assemble, moonwalk_compile
from tests.test_properties import assert_same

pytestmark = pytest.mark.usefixtures("x64")

quick = pytest.mark.usefixtures("quick")

WIDTH, ROWS, DEPTH = 3, 2, 4


def deep(h, ws):
    return functools.reduce(lambda h, w: jnp.tanh(h @ w), ws, h)


def identity(h, ws):
    return h


def cond(ws, h, n):
    """Layers or nothing, within a chain."""
    h = jnp.tanh(h @ ws[0])
    h = lax.cond(n % 2 == 1, deep, identity, h, ws)
    return jnp.tanh(h @ ws[1])


def switch(ws, h, n):
    """Closed-over values, integer operands, a branch that a cotangent dies in."""
    shift = jnp.sum(ws[2])

    def counted(h, k):
        return deep(h, ws[:2]) * k + shift, k + 1, h

    def flat(h, k):
        return jnp.ones_like(h), k, lax.stop_gradient(h)

    def twice(h, k):
        out = jax.nn.relu(h @ ws[3]) @ ws[0]
        return out, 2 * k, out

    h, k, also = lax.switch(n, [counted, flat, twice], h, n + 1)
    return h * k + also


def nested(ws, h, n):
    """A choice in a branch, next to a loop."""

    def loop(h):
        step = lambda h, w: (jnp.tanh(h @ w), None)  # noqa: E731
        return lax.scan(step, h, jnp.stack([*ws, *ws]))[0]

    def inner(h):
        return jnp.sin(lax.cond(jnp.sum(h) > 0, deep, identity, h, ws)) @ ws[0]

    return lax.switch(n, [loop, inner, lambda h: 2 * h], h)


def in_scan(ws, h, n):
    """Layers that are dropped, in a loop."""

    def step(h, row):
        w, k = row

        def twice(h, w):
            # The transpose is no operand: XLA's CPU compiler of JAX 0.10 aborts on the
            # cotangent of one, where it is a batch of tiny products.
            return deep(h, [w, w.T])

        return lax.cond((k + n) % 2 == 1, twice, identity, h, w), jnp.sum(h)

    h, sums = lax.scan(step, h, (jnp.stack(ws), jnp.arange(len(ws))))
    return h + jnp.mean(sums)


def dropout(ws, h, n):
    """A key among the operands; the same array as two of them."""
    key = jax.random.key(3)

    def noisy(h, again, key):
        keep = jax.random.bernoulli(key, 0.5, h.shape)
        return jnp.where(keep, deep(h, ws), 0) * again

    return lax.cond(n > 0, noisy, lambda h, again, key: h + again, h, h, key)


PROGRAMS = {f.__name__: f for f in (cond, switch, nested, in_scan, dropout)}


def loss_of(name):
    return lambda ws, h, n: jnp.sum(PROGRAMS[name](ws, h, n) ** 2)


@functools.cache
def numbers(seed=0):
    draw = np.random.default_rng(seed)
    ws = [jnp.asarray(draw.standard_normal((WIDTH, WIDTH))) for _ in range(DEPTH)]
    return ws, jnp.asarray(draw.standard_normal((ROWS, WIDTH)))


def both(name, make, **options):
    """What a function of the loss gives, for JAX's and for ours."""
    loss = loss_of(name)
    return (jax.jit(make(f)) for f in (loss, moonwalk_compile(loss, **options)))


def kinds(plan):
    return [stage.kind for stage in plan.stages]


@quick
@pytest.mark.parametrize("extra", [0, 1, 5])
@pytest.mark.parametrize("name", PROGRAMS)
def test_gradients(name, extra):
    jaxs, ours = both(
        name, lambda f: jax.value_and_grad(f, (0, 1)), extra_forwards=extra
    )
    for n in range(3):
        assert_same(jaxs(*numbers(), n), ours(*numbers(), n))


@quick
@pytest.mark.parametrize("name", PROGRAMS)
def test_strategies_and_some_arguments(name):
    for options in ({"strategies": ["stored"]}, {"strategies": ["checkpoint"]}):
        jaxs, ours = both(name, lambda f: jax.grad(f, 1), **options)
        assert_same(jaxs(*numbers(), 1), ours(*numbers(), 1))


@quick
@pytest.mark.parametrize("axes", [(None, 0, None), (None, None, 0), (0, 0, 0)])
@pytest.mark.parametrize("name", PROGRAMS)
def test_under_vmap(name, axes):
    lanes = [numbers(seed) for seed in range(3)]
    ws, h = jax.tree.map(lambda *xs: jnp.stack(xs), *lanes)
    given = zip((ws, h, jnp.arange(3)), axes, strict=True)
    args = [x if a == 0 else jax.tree.map(lambda x: x[1], x) for x, a in given]
    make = lambda f: jax.vmap(jax.grad(f, (0, 1)), in_axes=axes)  # noqa: E731
    jaxs, ours = both(name, make)
    assert_same(jaxs(*args), ours(*args))


@quick
@pytest.mark.parametrize("name", PROGRAMS)
def test_second_derivatives(name):
    def make(f):
        def slope(ws, h, n):
            return sum(jnp.sum(jnp.cos(g)) for g in jax.grad(f)(ws, h, n))

        return jax.grad(slope, (0, 1))

    jaxs, ours = both(name, make)
    for n in range(3):
        assert_same(jaxs(*numbers(), n), ours(*numbers(), n))


@quick
@pytest.mark.parametrize("name", PROGRAMS)
def test_inside_a_scan(name):
    def make(f):
        def total(ws, h, ns):
            return lax.scan(lambda s, n: (s + f(ws, h, n), None), 0.0, ns)[0]

        return jax.grad(total, (0, 1))

    jaxs, ours = both(name, make)
    assert_same(jaxs(*numbers(), jnp.arange(3)), ours(*numbers(), jnp.arange(3)))


@quick
@pytest.mark.parametrize("name", PROGRAMS)
def test_inside_shard_map(name):
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
    none, rows = PartitionSpec(), PartitionSpec("data")

    def make(f):
        return jax.grad(
            jax.shard_map(
                lambda ws, h, n: lax.pmean(f(ws, h, n), "data"),
                mesh=mesh,
                in_specs=(none, rows, none),
                out_specs=none,
            ),
            (0, 1),
        )

    jaxs, ours = both(name, make)
    assert_same(jaxs(*numbers(), jnp.int32(1)), ours(*numbers(), jnp.int32(1)))


def test_the_plan_says_so():
    plan = moonwalk_compile(loss_of("cond")).plan(*numbers(), 1)
    assert "cond[2]" in kinds(plan)
    (stage,) = [s for s in plan.stages if s.kind == "cond[2]"]
    assert stage.strategy == "checkpoint"
    assert "branch" in stage.reason
    assert stage.residual_bytes == 0


def test_cheap_branches_stay_one_equation():
    def loss(w, h, n):
        h = lax.cond(n > 0, lambda h: jnp.sin(h) @ w, jnp.cos, h)
        return jnp.sum(lax.cond(n > 1, jnp.sin, jnp.cos, h))

    plan = moonwalk_compile(loss).plan(numbers()[0][0], numbers()[1], 1)
    assert all("branch taken" not in stage.reason for stage in plan.stages)


def test_equal_branches_are_assembled_once(monkeypatch):
    """Twelve layers that may be dropped are planned like one."""
    made = []
    start = _assemble.Assembly.__init__

    def counted(self, *args, **kwargs):
        made.append(self)
        start(self, *args, **kwargs)

    monkeypatch.setattr(_assemble.Assembly, "__init__", counted)

    def loss(ws, h, flags):
        for i in range(12):
            h = lax.cond(flags[i], deep, identity, h, ws[i])
        return jnp.sum(h)

    ws = [numbers(seed)[0] for seed in range(12)]
    moonwalk_compile(loss).plan(ws, numbers()[1], jnp.ones(12, bool))
    # The program, then both branches with and without a state that is the input.
    assert len(made) <= 5


@pytest.mark.parametrize(("extra", "share"), [(1, 0.6), (2, 0.4)])
def test_compiled_memory(extra, share):
    """Residuals of no branch are kept; its own schedule bounds what a leaf needs."""

    def loss(ws, h, flag):
        h = lax.cond(flag, deep, identity, jnp.tanh(h @ ws[0]), ws[1:13])
        return jnp.mean(jnp.tanh(h @ ws[13]) ** 2)

    spec = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    args = [spec((64, 64))] * 14, spec((4096, 64)), jax.ShapeDtypeStruct((), bool)
    found = [
        jax.jit(jax.grad(f)).lower(*args).compile().memory_analysis().temp_size_in_bytes
        for f in (moonwalk_compile(loss, extra_forwards=extra), loss)
    ]
    assert found[0] < share * found[1]
