"""Where a run must end, and what must not be rebuilt, though it looks like it."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import mwc
from mwc import moonwalk_compile
from tests.submersive import FORCED, isometry

pytestmark = pytest.mark.usefixtures("x64", "quick")

WIDTH, BATCH, DEPTH = 6, 8, 5
rotate = mwc.coisometric(lambda h, w: h @ w)


def arguments(depth=DEPTH, width=WIDTH):
    draw = np.random.default_rng(0)
    weights = [jnp.asarray(isometry(width, width)) for _ in range(depth)]
    return weights, jnp.asarray(draw.standard_normal((BATCH, width)))


def body(weights, h):
    for w in weights:
        h = rotate(jnp.abs(h), w)
    return h


def counts(fun, *args, **options):
    stages = moonwalk_compile(fun, **options).plan(*args).stages
    return collections.Counter(row.strategy for row in stages)


def check(fun, *args, strategies=FORCED, also=(None,), **options):
    """Gradients are jax.grad's; returns how many stages are rebuilt."""
    for chosen in (strategies, *also):
        ours = moonwalk_compile(fun, strategies=chosen, **options)
        mine = jax.tree.leaves(jax.jit(jax.grad(ours))(*args))
        true = jax.tree.leaves(jax.grad(fun)(*args))
        for a, b in zip(mine, true, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)
    return counts(fun, *args, strategies=strategies, **options)["moonwalk"]


def test_a_state_that_is_read_again_at_the_end():
    """The skip's cotangent must reach the first layer."""

    def loss(weights, x):
        first, *rest = weights
        z = rotate(x, first)
        return jnp.mean((body(rest, z) + z) ** 3)

    assert check(loss, *arguments()) >= 3


def test_a_state_that_is_read_again_in_the_middle():
    def loss(weights, x):
        h = body(weights[:2], rotate(x, weights[0]))
        return jnp.mean(body(weights[2:], h) * jnp.sin(h))

    check(loss, *arguments())


def test_a_state_that_is_a_result():
    def fun(weights, x):
        z = rotate(x, weights[0])
        return jnp.mean(body(weights[1:], z) ** 3), z

    weights, x = arguments()
    cts = jnp.float64(1), jnp.ones_like(x)
    ours = moonwalk_compile(fun, strategies=FORCED)
    mine = jax.vjp(lambda w: ours(w, x), weights)[1](cts)
    true = jax.vjp(lambda w: fun(w, x), weights)[1](cts)
    for a, b in zip(jax.tree.leaves(mine), jax.tree.leaves(true), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9)


def test_a_mask_that_goes_past_a_stage():
    def loss(weights, x):
        h = rotate(x, weights[0])
        mask = h > 0
        h = rotate(jnp.abs(h), weights[1])
        h = rotate(jnp.where(mask, h, -h), weights[2])
        h = rotate(jnp.where(mask, -h, h), weights[3])
        return jnp.mean(rotate(jnp.abs(h), weights[4]) ** 3)

    check(loss, *arguments())


@pytest.mark.parametrize("size", [0.3, 1.0, 3.0])
def test_one_gain_for_a_whole_state(size):
    """The gain of a random draw must not be taken for that of the call."""

    def loss(params, x):
        weights, gain = params
        h = rotate(x, weights[0])
        for w in weights[1:]:
            h = rotate(gain * jnp.abs(h), w)
        return jnp.mean(h**3)

    weights, x = arguments()
    check(loss, (weights, jnp.float64(size)), x)


def test_one_gain_of_the_data():
    def loss(weights, x):
        h = rotate(x, weights[0])
        for w in weights[1:]:
            size = lax.stop_gradient(jnp.sqrt(jnp.mean(h**2)))
            h = rotate(jnp.abs(h) / size, w)
        return jnp.mean(h**3)

    weights, x = arguments()
    check(loss, weights, 5 * x)


FAR = 100 * np.random.default_rng(3).standard_normal((BATCH, WIDTH))

# A kink, what each layer reads of its own, and the state that the chain starts with.
RARE = {
    "a count": (lambda x, k: jnp.abs(x) * (1 + k), np.arange(4), None),
    "a far threshold": (lambda x, _: jnp.where(x > 9, 0.9 * x, x), np.zeros(4), FAR),
    "a far clip": (lambda x, _: jnp.clip(x, -50, 50), np.zeros(4), FAR),
    "one gain": (
        lambda x, g: jnp.abs(x) * jnp.where(g > 99, 0.9, 1.0),
        FAR[:4, 0],
        None,
    ),
    "layers dropped": (
        lambda x, k: jnp.where(
            jax.random.bernoulli(jax.random.key(k)), jnp.abs(x) / 0.9, x
        ),
        *(np.arange(4), None),
    ),
    "flat at zero": (lambda x, _: jnp.maximum(x, -x), np.zeros(4), 0 * FAR),
    "flat at zero, by ReLU": (
        lambda x, _: jax.nn.relu(x) - 0.9 * jax.nn.relu(-x),
        *(np.zeros(4), 0 * FAR),
    ),
}


@pytest.mark.parametrize("loop", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize("name", sorted(RARE))
def test_what_a_draw_must_not_miss(name, loop):
    kink, own, start = RARE[name]
    weights, x = arguments(4)

    def loss(weights, own, x):
        step = lambda x, p: (kink(rotate(x, p[0]), p[1]), None)  # noqa: E731
        if loop:
            x, _ = lax.scan(step, x, (jnp.stack(weights), own))
        else:
            for w, k in zip(weights, own, strict=True):
                x, _ = step(x, (w, k))
        return jnp.mean((x - 1) ** 2)

    check(loss, weights, own, x if start is None else start, also=())


# Maps that are what they are declared to be, with a factor beside the weight.
BESIDE = {
    "after": mwc.coisometric(lambda h, w: 3 * (h @ w), scale=9.0),
    "before": mwc.coisometric(lambda h, w: (h / 2) @ w, scale=0.25),
    "both": mwc.coisometric(lambda h, w: (h / 2) @ (2 * w)),
}


@pytest.mark.parametrize("name", sorted(BESIDE))
def test_a_claim_is_of_the_map_not_of_the_weight(name):
    def loss(weights, h):
        for w in weights:
            h = BESIDE[name](jnp.abs(h), w)
        return jnp.mean(h**2)

    assert check(loss, *arguments(), also=()) == DEPTH - 1


def test_a_claim_about_some_columns_of_a_weight():
    first = mwc.coisometric(lambda h, w: (h @ w)[:, :3])

    def loss(params, h):
        weights, last = params
        h = first(body(weights[:-1], h), weights[-1])
        return jnp.mean(jnp.abs(rotate(jnp.abs(h), last)) ** 3)

    weights, h = arguments()
    weights[-1] = weights[-1].at[:, 3:].multiply(2)
    # The last layer is stored.
    assert check(loss, (weights, isometry(3, 3)), h) == DEPTH


def test_false_claims_that_cancel():
    """The guard sees the end of a stage alone."""
    double = mwc.coisometric(lambda h: 2 * h, scale=2.0)  # 4, and the compiler sees it
    half = mwc.coisometric(lambda h: h / 2, scale=0.5)
    grow = mwc.coisometric(lambda h, g: g * h, scale=2.0)
    shrink = mwc.coisometric(lambda h, g: h / g, scale=0.5)
    weights, h = arguments()
    biases = 0.1 * jnp.ones((DEPTH, WIDTH))

    def loss(params, h, apart):
        weights, biases, g = params
        for w, b in zip(weights, biases, strict=True):
            h = jnp.abs(h)
            h = shrink(grow(h, g) + b, g) if apart else half(double(h) + b)
            h = rotate(h, w)
        return jnp.mean((h - 1) ** 2)

    params = weights, biases, jnp.full(WIDTH, 2.0)
    assert check(lambda params, h: loss(params, h, False), params, h) == DEPTH - 1
    assert check(lambda params, h: loss(params, h, True), params, h) == 0


def test_a_loop_of_slopes_behind_a_product():
    """A loop that is one stage has a constant among its residuals."""

    def loss(ws, x):
        step = lambda h, w: (jax.nn.leaky_relu(h @ w, 0.9), None)  # noqa: E731
        return jnp.mean((lax.scan(step, x @ ws[0], ws)[0] @ ws[0]) ** 2)

    check(loss, jnp.stack(arguments(3)[0]), arguments()[1])


def test_a_map_that_is_mapped_over_its_weights_alone():
    def loss(weights, x):
        h = body(weights[:2], rotate(x, weights[0]))
        many = jax.vmap(rotate, in_axes=(None, 0))(h, jnp.stack(weights[2:]))
        return jnp.mean(jnp.abs(many).sum(0) ** 3)

    check(loss, *arguments())


def test_a_map_that_is_mapped_over_both():
    def loss(weights, x):
        stacked = jnp.stack(weights)
        h = jnp.stack([x] * len(weights))
        for _ in range(4):
            h = jax.vmap(rotate)(jnp.abs(h) + 0.1, stacked)
        return jnp.mean(h**3)

    assert check(loss, *arguments()) >= 2


def test_a_loop_inside_a_declared_map():
    turned = mwc.coisometric(
        lambda h, ws: lax.scan(lambda h, w: (h @ w, None), h, ws)[0]
    )

    def loss(weights, x):
        stacked = jnp.stack([*weights, *weights])
        h = turned(x, stacked)
        return jnp.mean(turned(jnp.abs(turned(jnp.abs(h), stacked)), stacked) ** 3)

    check(loss, *arguments())


@pytest.mark.parametrize(
    ("preset", "found"),
    [("F32_F32_F32", DEPTH - 1), ("BF16_BF16_F32_X3", DEPTH - 1), ("BF16_BF16_F32", 0)],
)
def test_products_by_a_narrower_algorithm_are_not_rebuilt(preset, found):
    """Their types are float32 throughout."""
    precision = lax.DotAlgorithmPreset[preset]
    exact = mwc.coisometric(lambda h, w: jnp.dot(h, w, precision=precision))

    def loss(weights, x):
        for w in weights:
            x = jnp.abs(exact(x, w))
        return jnp.mean(x**3)

    narrow = jax.tree.map(lambda x: x.astype(np.float32), arguments())
    assert counts(loss, *narrow, strategies=FORCED)["moonwalk"] == found


def scanned(slope):
    def loss(weights, x):
        def step(h, w):
            return jax.nn.leaky_relu(rotate(h, w), slope), None

        return jnp.mean(lax.scan(step, x, jnp.stack(weights))[0] ** 3)

    return loss


@pytest.mark.parametrize(("slope", "found"), [(0.9, 1), (1e-9, 0)])
def test_slopes_that_magnify_too_much_are_not_rebuilt_in_a_loop(slope, found):
    assert check(scanned(slope), *arguments()) == found


def test_a_carry_that_starts_anew():
    """What goes on is not what the step makes of its carry."""

    def loss(weights, x):
        def step(h, w):
            return jnp.zeros_like(h), rotate(jnp.abs(h), w)

        last, ys = lax.scan(step, x, jnp.stack(weights))
        return jnp.mean(last**3) + jnp.mean(ys**3)

    check(loss, *arguments())


def test_readings_have_no_way_out_of_a_loop_over_blocks():
    """So nothing is rebuilt there: a trip would be NaN that `drift` denies."""

    def loss(weights, x):
        def block(h, ws):
            return body(list(ws), h), None

        stacked = jnp.stack([jnp.stack(weights)] * 4)
        return jnp.mean(lax.scan(block, x, stacked)[0] ** 3)

    weights, x = arguments()
    assert counts(loss, weights, x)["moonwalk"] == 0
    bad = [2 * w for w in weights]
    ours = moonwalk_compile(loss)
    _, grads, drift = ours.value_and_grad(bad, x, with_drift=True)
    assert not drift.tripped
    assert all(np.isfinite(g).all() for g in grads)


def test_time_bounds_what_is_forced():
    def loss(weights, x):
        return jnp.mean(body(weights, x) ** 3)

    args = arguments(12)
    assert counts(loss, *args, strategies=FORCED)["moonwalk"] > 9
    assert not counts(loss, *args, strategies=FORCED, extra_forwards=1)["moonwalk"]


def test_rebuilding_alone_is_an_error_that_names_the_stage():
    def loss(weights, x):
        return jnp.mean(body(weights, x) ** 3)

    with pytest.raises(mwc.MoonwalkUnsupportedError, match="test_moonwalk_edges"):
        moonwalk_compile(loss, strategies="moonwalk").plan(*arguments())


def test_drift_of_what_is_no_loss():
    with pytest.raises(mwc.MoonwalkTypeError, match="scalar"):
        moonwalk_compile(body).value_and_grad(*arguments(), with_drift=True)


def test_no_rows():
    def loss(weights, x):
        return jnp.sum(body(weights, x) ** 3)

    weights, x = arguments()
    check(loss, weights, x[:0])


def test_a_search_for_nan_sees_none_of_ours():
    def loss(weights, x):
        h = rotate(x, weights[0])
        for w in weights[1:]:
            h = rotate(jax.nn.relu(h), w)
        return jnp.mean(h**3)

    with jax.debug_infs(True), jax.debug_nans(True):
        check(loss, *arguments())


@pytest.mark.parametrize("weight", [1.0, 1e-6])
def test_a_member_whose_loss_counts_little(weight):
    """The cotangent of one member is far below the other's, and wrong."""
    turn = mwc.coisometric(lambda h, w: jnp.einsum("bmi,mij->bmj", h, w))
    rows, width = 6, 8
    draw = np.random.default_rng(3)
    made = np.linalg.qr(draw.standard_normal((5, 2, width, width)))[0]
    made[:, 1] += 0.1 * draw.standard_normal(made[:, 1].shape)
    x = np.float32(draw.standard_normal((rows, 2, width)))

    def loss(weights, x):
        for w in weights:
            x = jnp.abs(turn(x, w))
        one, two = jnp.mean((x - 1) ** 2, (0, 2))
        return one + weight * two

    ours = moonwalk_compile(loss, strategies=FORCED)
    weights = list(map(np.float32, made))
    assert sum(s.strategy == "moonwalk" for s in ours.plan(weights, x).stages) == 4
    found = jax.jit(jax.grad(ours))(weights, x)
    assert np.isnan(found[-2]).all()
    np.testing.assert_allclose(found[0], jax.grad(loss)(weights, x)[0], rtol=1e-4)
