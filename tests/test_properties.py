"""Random programs: gradients are those of `jax.grad`, whatever is kept or run again."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from mwc import moonwalk_compile
from tests import grammar

EXTRAS = (0, 0.3, 1, 2, 5)
STRATEGIES = (None, ("stored",), ("checkpoint",))
SHAPES = ((4, 5), (1, 5), (6, 3), (4, 1), (1, 1))
DRAWS = ((0, "normal"), (1, "ties"), (2, "normal"))

programs = st.lists(st.sampled_from(sorted(grammar.RULES)), min_size=1, max_size=7)
plans = st.tuples(st.sampled_from(EXTRAS), st.sampled_from(STRATEGIES))

quick_profile = settings(
    max_examples=8,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
long_profile = settings(quick_profile, max_examples=400, derandomize=False)


def both(names, plan=(2, None), argnums=(0, 1)):
    """Value and gradients by JAX and by the compiler, compiled."""
    extra, strategies = plan
    loss = grammar.loss_of(names)
    ours = moonwalk_compile(loss, extra_forwards=extra, strategies=strategies)
    return [jax.jit(jax.value_and_grad(f, argnums)) for f in (loss, ours)]


def assert_same(true, mine, rtol=1e-12):
    """Within `rtol` of the largest entry of each leaf; NaN and inf where JAX has them.

    A gradient that cancels to nothing is as exact as what it cancels from.
    """
    assert jax.tree.structure(true) == jax.tree.structure(mine)
    leaves = [np.asarray(x) for x in jax.tree.leaves(true)]
    finite = [np.where(np.isfinite(x), x, 0).astype(np.float64) for x in leaves]
    whole = max(np.max(np.abs(x), initial=0) for x in finite)
    for one, known, two in zip(leaves, finite, jax.tree.leaves(mine), strict=True):
        two = np.asarray(two)
        assert (one.shape, one.dtype) == (two.shape, two.dtype)
        odd = ~np.isfinite(one)
        np.testing.assert_array_equal(two[odd], one[odd])
        found = np.where(odd, 0, two).astype(np.float64)
        limit = rtol * (np.max(np.abs(known), initial=0) + 0.1 * whole)
        np.testing.assert_allclose(found, known, rtol=0, atol=limit)


def check(names, plan, shape, argnums=(0, 1)):
    jaxs, ours = both(names, plan, argnums)
    for seed, kind in DRAWS:
        args = grammar.values(len(names), *shape, seed, kind)
        try:
            true = jaxs(*args)
        except jax.errors.JaxRuntimeError:
            return  # what XLA cannot run, such as a transposed FFT on the CPU
        try:
            assert_same(true, ours(*args))
        except AssertionError:
            if kind == "ties" and grammar.cancels(names, *args):
                continue
            if all(np.all(np.isfinite(x)) for x in jax.tree.leaves(true)):
                raise
            # Without optimisation XLA may compute a state twice and round it otherwise:
            # none of its entries is the maximum then, and JAX divides by their number.
            assert_same(jaxs.__wrapped__(*args), ours(*args))


@pytest.mark.usefixtures("x64", "quick")
@quick_profile
@given(programs, plans, st.sampled_from(SHAPES))
@example(["scan-twice", "scan-time", "dense"], (2, None), (4, 5))
@example(["push", "residual", "scan-swap", "pop"], (1, None), (4, 5))
def test_random_programs(names, plan, shape):
    check(names, plan, shape)


@pytest.mark.slow
@pytest.mark.usefixtures("x64", "quick")
@long_profile
@given(programs, plans, st.sampled_from(SHAPES))
@example(["abs", "fft", "top", "aside"], (0, None), (4, 5))
def test_many_random_programs(names, plan, shape):
    check(names, plan, shape)


@pytest.mark.slow
@pytest.mark.usefixtures("x64", "quick")
@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("name", sorted(grammar.RULES))
def test_each_rule_between_layers(name, extra):
    check(["dense", "leaky", name, "dense", "relu"], (extra, None), (4, 5))


@pytest.mark.slow
@pytest.mark.usefixtures("x64", "quick")
@settings(long_profile, max_examples=60)
@given(st.lists(st.sampled_from(sorted(grammar.RULES)), min_size=12, max_size=30))
def test_deep_random_programs(names):
    check(names, (1, None), (4, 5))


@pytest.mark.usefixtures("x64", "quick")
@pytest.mark.parametrize("argnums", [0, 1])
def test_one_argument_alone(argnums):
    names = ["tied", "relu", "triu", "scan-time", "dropout", "tied-both", "norm"]
    check(names, (1, None), (4, 5), argnums)


@pytest.mark.usefixtures("x64", "quick")
def test_many_values_through_one_program():
    names = ["dense", "relu", "maxmin", "residual", "abs", "clip", "prelu", "relu6"]
    jaxs, ours = both(names, (1, None))
    for seed in range(60):
        kind = "ties" if seed % 2 else "normal"
        args = grammar.values(len(names), 4, 5, seed, kind)
        assert_same(jaxs(*args), ours(*args))


@pytest.mark.usefixtures("x64", "quick")
@pytest.mark.parametrize("extra", [0, 1, 2])
def test_nan_and_inf_where_jax_has_them(extra):
    names = ["relu", "maxmin", "scan-layers", "abs", "scan-smooth", "clip", "dropout"]
    jaxs, ours = both(names, (extra, None))
    for number in (np.nan, np.inf, -np.inf):
        for row, column in [(0, 0), (3, 4)]:
            params, x, extras = grammar.values(len(names))
            args = params, x.at[row, column].set(number), extras
            assert_same(jaxs(*args), ours(*args))
        params, x, extras = grammar.values(len(names))
        weights = params["blocks"][4]["ws"]
        params["blocks"][4]["ws"] = weights.at[2, 1, 1].set(number)
        assert_same(jaxs(params, x, extras), ours(params, x, extras))


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("extra", [0, 1])
@pytest.mark.parametrize(
    ("dtype", "rtol"), [(jnp.float32, 2e-5), (jnp.bfloat16, 0.1), (jnp.float16, 0.02)]
)
def test_narrow_dtypes(dtype, rtol, extra):
    names = ["dense", "relu", "residual", "scan-layers", "leaky", "scan-time", "triu"]
    args = grammar.values(len(names), dtype=dtype)
    jaxs, ours = both(names, (extra, None))
    assert_same(jaxs(*args), ours(*args), rtol)


@pytest.mark.usefixtures("x64", "quick")
def test_no_limit_of_time():
    check(["dense", "tanh", "scan-smooth", "dense", "relu"], (np.inf, None), (4, 5))


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("extra", [0, 1])
def test_empty_batches(extra):
    names = ["dense", "relu", "maxmin", "dense", "scan-layers"]

    def loss(params, x, extras):
        h, env = x, grammar.Env(x, params["tied"], *extras)
        for name, p in zip(names, params["blocks"], strict=True):
            h = grammar.RULES[name](h, p, env)
        return jnp.sum(h**2)

    args = grammar.values(len(names), rows=0, dtype=np.float32)
    ours = moonwalk_compile(loss, extra_forwards=extra)
    assert_same(*[jax.grad(f, (0, 1))(*args) for f in (loss, ours)])
