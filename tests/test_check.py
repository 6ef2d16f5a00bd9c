"""`loss.check`: gradients against backpropagation, on all or part of a batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mwc import MoonwalkTypeError, MoonwalkValueError, moonwalk_compile
from tests import frontend

pytestmark = pytest.mark.usefixtures("quick")
W = jnp.linspace(-1.0, 1.0, 12).reshape(4, 3)


def make(seen, **options):
    """A decorated loss that notes the shapes it is traced with."""

    def loss(w, batch, scale=1.0, *, mask=None, mode="mean"):
        x, label, key = batch
        seen.append((x.shape, label.shape, None if mask is None else mask.shape))
        noise = jax.random.normal(key, x.shape)
        y = jnp.sin((x + noise) @ w) * scale
        y = y if mask is None else y * mask
        return jnp.mean((y[:, 0] - label) ** 2) if mode == "mean" else jnp.sum(y)

    return moonwalk_compile(loss, static_argnames="mode", **options)


def batch(rows):
    x = jnp.linspace(0.0, 1.0, rows * 4).reshape(rows, 4)
    return x, jnp.ones(rows), jax.random.PRNGKey(0)


@pytest.mark.parametrize(("rows", "part"), [(40, 5), (9, 2), (1, 1)])
def test_part_of_a_batch(rows, part):
    seen = []
    report = make(seen).check(W, batch(rows), batch_axis=0, mask=np.ones((rows, 3)))
    assert report.ok
    assert set(seen) == {((part, 4), (part,), (part, 3))}


def test_other_axes():
    def loss(w, x, y):
        seen.append((x.shape, y.shape))
        return jnp.sum(jnp.sin(w @ x) ** 2) * jnp.sum(y)

    for axis in (1, -1):
        seen = []
        decorated = moonwalk_compile(loss)
        assert decorated.check(W.T, jnp.ones((4, 32)), jnp.abs(W), batch_axis=axis).ok
        assert set(seen) == {((4, 4), (4, 3))}


def test_methods_and_static_arguments():
    class Model:
        scale = 2.0

        @moonwalk_compile
        def loss(self, w, x):
            seen.append(x.shape)
            return jnp.sum(jnp.sin(x @ w)) * self.scale

    seen = []
    assert Model().loss.check(W, jnp.ones((32, 4)), batch_axis=0).ok
    assert set(seen) == {(4, 4)}
    seen = []
    assert make(seen).check(W, batch(16), batch_axis=0, mode="sum").ok
    assert set(seen) == {((2, 4), (2,), None)}


def test_the_parameters_are_whole():
    seen = []
    fun = make(seen, argnums=1)
    x, label, _ = batch(16)
    with pytest.raises(MoonwalkValueError, match=r"batch_axis=2.*data argument"):
        fun.check(W, (x, label, jax.random.PRNGKey(0)), batch_axis=2)
    assert not seen


def test_no_data_has_the_axis():
    fun = moonwalk_compile(lambda w, x: jnp.sum(w * x))
    with pytest.raises(
        MoonwalkValueError, match=r"outside argnums.*\n.*leave batch_axis"
    ):
        fun.check(W, 2.0, batch_axis=0)


def test_under_a_transformation():
    fun = moonwalk_compile(lambda w, x: jnp.sum(w * x))
    with pytest.raises(MoonwalkTypeError, match="under a JAX transformation"):
        jax.jit(lambda x: fun.check(W, x, batch_axis=0).max_error)(W)


def test_check():
    fun = moonwalk_compile(frontend.loss, argnums=(0, 1))
    report = fun.check(frontend.W, frontend.X)
    assert report.ok
    assert report.max_error < 1e-5
    assert report.headroom is None
    assert report.worst_stage is None
    assert "agree" in str(report)


@pytest.mark.usefixtures("wrong_program")
def test_check_finds_a_wrong_gradient():
    report = moonwalk_compile(frontend.loss, argnums=(0, 1)).check(
        frontend.W, frontend.X
    )
    assert not report.ok
    assert report.worst_leaf == "['gradient'][0]"
    assert "DIFFER" in str(report)
