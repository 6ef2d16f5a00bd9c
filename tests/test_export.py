"""Shape-polymorphic export: one program for all sizes, gradients as `jax.grad`'s."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, lax

import mwc
from mwc import moonwalk_compile
from tests import programs

pytestmark = pytest.mark.usefixtures("x64", "quick")


def dense(params, x):
    for w, b in params:
        x = jax.nn.relu(x @ w + b)
    return jnp.mean(x**2)


def scanned(params, x):
    def body(x, w):
        return jax.nn.relu(x @ w[0] + w[1]), jnp.sum(x)

    ws = [jnp.stack(leaves) for leaves in zip(*params, strict=True)]
    x, sums = lax.scan(body, x, ws)
    return jnp.sum(x**2) + jnp.sum(jnp.sin(sums))


def over_rows(params, x):
    """A loop whose number of steps is symbolic."""
    (w, b), *_ = params

    def body(state, row):
        return jnp.tanh(state @ w + row), state[0]

    state, first = lax.scan(body, b, x)
    return jnp.sum(state) + jnp.sum(first**2)


def attention(params, x):
    for w, b in params:
        scores = jax.nn.softmax((x @ w) @ x.T / math.sqrt(5.0))
        x = x + scores @ jax.nn.gelu(x) + b
    return jnp.sum(x**2)


def pooled(params, x):
    """Sums over, and masks of, the symbolic dimension alone; it may vanish."""
    for w, b in params:
        x = jnp.where(x.sum(1, keepdims=True) > 0, x @ w, x) + b
        x = x - jnp.max(x, axis=0)
    return jnp.sum(x[2:] ** 2)


def drawn(params, x):
    key = jax.random.key(0)
    for w, _ in params:
        key, now = jax.random.split(key)
        x = jax.nn.relu(x @ w) * jax.random.bernoulli(now, 0.7, x.shape)
    return jnp.sum(x**2)


def branched(params, x):
    for w, b in params:
        x = lax.cond(x[0, 0] > 0, lambda x, w=w, b=b: jnp.sin(x @ w + b), jnp.cos, x)
    return jnp.sum(x)


def some_params():
    draw = np.random.default_rng(0)
    shapes = [((5, 5), (5,))] * 4
    return [tuple(jnp.asarray(draw.standard_normal(s) / 2) for s in p) for p in shapes]


def specs(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def batch(*shape):
    return jnp.asarray(np.random.default_rng(1).standard_normal(shape))


def assert_close(found, true):
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(true), strict=True)
    for mine, other in pairs:
        assert mine.shape == other.shape
        mine, other = np.asarray(mine, float), np.asarray(other, float)
        scale = np.max(np.abs(other), initial=1e-30)
        assert np.max(np.abs(mine - other), initial=0.0) <= 1e-12 * scale


PROGRAMS = [dense, scanned, over_rows, attention, pooled, drawn, branched]


CASES = [(fun, 1) for fun in PROGRAMS] + [(dense, 0), (dense, 2), (scanned, 0)]


@pytest.mark.parametrize(("fun", "extra"), CASES)
def test_gradients(fun, extra):
    loss = moonwalk_compile(fun, extra_forwards=extra)
    params = some_params()
    (b,) = export.symbolic_shape("b", constraints=["b >= 2"])
    x = jax.ShapeDtypeStruct((b, 5), jnp.float64)
    exported = export.export(jax.jit(jax.grad(loss)))(specs(params), x)
    for rows in (3, 16):
        x = batch(rows, 5)
        assert_close(exported.call(params, x), jax.grad(fun)(params, x))


@pytest.mark.parametrize("shape", ["b, 5", "2*b + 1, 5", "b - 1, 5"])
def test_value_and_aux_of_symbolic_size(shape):
    def fun(params, x):
        for w, b in params:
            x = jax.nn.leaky_relu(x @ w + b)
        return jnp.sum(x**2), (jnp.argmax(x, 1), x > 0)

    loss = moonwalk_compile(fun, has_aux=True)
    dims = export.symbolic_shape(shape)
    args = some_params(), jax.ShapeDtypeStruct(dims, jnp.float64)
    both = jax.jit(jax.value_and_grad(loss, has_aux=True))
    exported = export.export(both)(specs(args[0]), args[1])
    for rows in (5, 9):
        full = args[0], batch(rows, 5)
        found = exported.call(*full)
        assert_close(found, jax.value_and_grad(fun, has_aux=True)(*full))


def test_parameters_of_symbolic_size():
    def fun(ws, x):
        for w in ws:
            x = jnp.maximum(x @ w, jnp.minimum(x, 0.1))
        return jnp.sum(x)

    b, n = export.symbolic_shape("b, n")
    spec = jax.ShapeDtypeStruct
    args = [spec((n, n), jnp.float64)] * 5, spec((b, n), jnp.float64)
    loss = moonwalk_compile(fun, extra_forwards=1)
    exported = export.export(jax.jit(jax.grad(loss)))(*args)
    for rows, width in ((1, 3), (4, 8)):
        full = [batch(width, width)] * 5, batch(rows, width)
        assert_close(exported.call(*full), jax.grad(fun)(*full))


def test_images_of_symbolic_size():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            for features in (4, 8):
                x = nn.Conv(features, (3, 3), param_dtype=x.dtype)(x)
                x = nn.relu(nn.LayerNorm(param_dtype=x.dtype)(x))
                x = nn.max_pool(x, (2, 2), (2, 2))
            return jnp.mean(x, axis=(1, 2))

    net = Net()

    def fun(params, x):
        return jnp.sum(net.apply(params, x) ** 2)

    params = net.init(jax.random.key(0), batch(1, 16, 16, 3))
    b, h = export.symbolic_shape("b, h", constraints=["h >= 12"])
    x = jax.ShapeDtypeStruct((b, h, 16, 3), jnp.float64)
    loss = moonwalk_compile(fun, extra_forwards=1)
    exported = export.export(jax.jit(jax.grad(loss)))(specs(params), x)
    for shape in ((1, 12, 16, 3), (2, 17, 16, 3)):
        x = batch(*shape)
        assert_close(exported.call(params, x), jax.grad(fun)(params, x))


def test_other_transformations():
    params, (b,) = some_params(), export.symbolic_shape("b")
    x = jax.ShapeDtypeStruct((b, 5), jnp.float64)
    loss = moonwalk_compile(dense)

    def rows(fun):
        return jax.vmap(jax.grad(fun), (None, 0))

    def second(fun):
        return jax.grad(lambda p, x: jnp.sum(jax.grad(fun)(p, x)[0][0] ** 2))

    def forward(fun):
        return lambda p, x: jax.jvp(lambda x: fun(p, x), (x,), (x,))

    for made in (rows, second, forward, lambda fun: fun):
        exported = export.export(jax.jit(made(loss)))(specs(params), x)
        for count in (2, 7):
            full = params, batch(count, 5)
            assert_close(exported.call(*full), made(dense)(*full))


def test_plan_says_what_it_counted():
    program = programs.dense(programs.relu, 6, 16, 32)
    (b,) = export.symbolic_shape("b")
    x = jax.ShapeDtypeStruct((b, 16), jnp.float32)
    plan = moonwalk_compile(program.loss).plan(program.params, x)
    assert any("sizes b are planned" in note for note in plan.notes)
    assert "1024" in str(plan)
    same = moonwalk_compile(program.loss).plan(
        program.params, jax.ShapeDtypeStruct((1024, 16), jnp.float32)
    )
    assert same.peak_bytes == plan.peak_bytes
    assert not same.notes


@pytest.mark.parametrize("rows", ["b", "b, t"])
def test_what_could_be_rebuilt_is_not_of_symbolic_size(rows):
    rotate = mwc.coisometric(lambda x, w: x @ w)

    def loss(weights, x):
        for w in weights:
            x = rotate(x, w)
        return jnp.mean(jnp.sin(x))

    ours = moonwalk_compile(loss, strategies=("moonwalk", "stored"))
    weights = [np.linalg.qr(np.eye(5) + i)[0] for i in range(4)]
    shape = export.symbolic_shape(f"{rows}, 5")
    like = [jax.ShapeDtypeStruct((5, 5), float)] * 4, jax.ShapeDtypeStruct(shape, float)
    reasons = [stage.reason for stage in ours.plan(*like).stages]
    assert any("symbolic dimensions" in reason for reason in reasons)
    made = export.export(jax.jit(jax.grad(ours)))(*like)
    x = np.random.default_rng(0).standard_normal((*range(3, 2 + len(shape)), 5))
    assert sum(s.strategy == "moonwalk" for s in ours.plan(weights, x).stages) == 3
    for a, b in zip(made.call(weights, x), jax.grad(loss)(weights, x), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)
