"""Models of public libraries, decorated unchanged, against plain `jax.grad`.

Everything runs in float64, where another order of the same operations agrees to 1e-9
of the largest entry of each leaf; mixed precision has its own tolerance. Gradients are
taken in the model's inexact leaves and in the data.
"""

from __future__ import annotations

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mwc import moonwalk_compile
from tests.models import CASES

pytestmark = pytest.mark.usefixtures("x64", "quick")


def close(mine, true, rtol):
    """Same structure, shapes and types; entries within `rtol` of the largest."""
    assert jax.tree.structure(mine) == jax.tree.structure(true)
    whole = max((float(jnp.max(jnp.abs(t))) for t in inexact(true)), default=0.0)
    for one, two in zip(jax.tree.leaves(mine), jax.tree.leaves(true), strict=True):
        assert (one.shape, one.dtype) == (two.shape, two.dtype)
        two = np.asarray(two, np.float64 if eqx.is_inexact_array(two) else None)
        # A gradient that cancels to nothing is as exact as what it cancels from.
        limit = rtol * np.max(np.abs(two), initial=0) + 1e-3 * rtol * whole
        np.testing.assert_allclose(np.asarray(one, two.dtype), two, rtol=0, atol=limit)


def inexact(tree):
    return [x for x in jax.tree.leaves(tree) if eqx.is_inexact_array(x) and x.size]


@functools.cache
def case_of(name):
    with jax.enable_x64(True):
        case = CASES[name]()
        return case, through_jax(case, case.loss)


def through_jax(case, loss):
    """Value and gradients by `jax.value_and_grad` under `jax.jit`."""
    model, x, rest = case.args
    moving, static = eqx.partition((model, x), eqx.is_inexact_array)

    @jax.jit
    def run(moving, rest):
        def full(moving):
            return loss(*eqx.combine(moving, static), rest)

        return jax.value_and_grad(full, has_aux=case.has_aux)(moving)

    return run(moving, rest)


@pytest.mark.parametrize("extra", [0, pytest.param(1, marks=pytest.mark.slow), 2])
@pytest.mark.parametrize("name", CASES)
def test_gradients(name, extra):
    case, expected = case_of(name)
    decorate = functools.partial(moonwalk_compile, has_aux=case.has_aux)
    if extra == 2:
        loss = decorate(case.loss, argnums=(0, 1))
        found = loss.value_and_grad(*case.args)
    else:
        found = through_jax(case, decorate(case.loss, extra_forwards=extra))
    close(found, expected, case.rtol)


@pytest.mark.parametrize("name", CASES)
def test_values(name):
    case, (value, _) = case_of(name)
    close(moonwalk_compile(case.loss)(*case.args), value, case.rtol)


@pytest.mark.parametrize("name", CASES)
def test_plan_saves(name):
    """Two extra forward passes do not store everything."""
    case, _ = case_of(name)
    plan = moonwalk_compile(case.loss, has_aux=case.has_aux).plan(*case.args)
    strategies = {stage.strategy for stage in plan.stages}
    assert strategies <= {"stored", "checkpoint"}
    assert strategies != {"stored"}
    assert plan.residual_bytes < plan.backprop_bytes
    assert plan.extra_forwards <= 2.1
