"""Stages of a long run share the arrays of their bits."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from mwc import moonwalk_compile
from mwc.nodes import shares as shares_of
from mwc.nodes.shares import shares
from tests.submersive import FORCED, chain, data, layers, rows

pytestmark = pytest.mark.usefixtures("quick")


def variables(*types):
    specs = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in types]
    return jax.make_jaxpr(lambda *args: args)(*specs).jaxpr.invars


def test_places():
    a, b, c, d, e, f, g = variables(
        *[((64, 8), bool)] * 3, ((32, 8), bool), *[((64, 8), bool)] * 3
    )
    bits = [(a,), (b,), (), (c,), (d,), (e, f), (g,)]
    found = [(s.at.start, s.at.stop, s.place) for s in shares(bits, 1)]
    assert found == [
        *[(0, 1, 0), (0, 1, 1), (1, 1, None), (1, 2, None)],
        *[(2, 3, None), (3, 5, None), (5, 6, None)],
    ]
    many = 6 * 64 + 32
    assert all(s.place is None for s in shares(bits, many // 2))
    assert shares(bits, many // 2 - 1)[1].place == 1


def test_pairs_of_pairs():
    each = variables(*[((16, 8), bool)] * 10)
    found = shares([each[2 * i : 2 * i + 2] for i in range(5)], 1)
    assert [s.place for s in found] == [0, 1, 0, 1, None]
    assert [(s.at.start, s.at.stop) for s in found] == [(0, 2)] * 2 + [(2, 4)] * 2 + [
        (4, 6)
    ]


def first_layers(count):
    """The gradient of the first layers alone: sweep V stops there."""

    def make(loss):
        def some(few, rest, batch):
            return loss([*few, *rest], batch)

        return lambda params, batch: jax.grad(some)(
            params[:count], params[count:], batch
        )

    return make


@pytest.mark.parametrize(
    ("kink", "make"),
    [
        ("max-min", jax.grad),
        ("abs", first_layers(3)),
        ("leaky 0.9", first_layers(4)),
    ],
)
def test_gradients(x64, monkeypatch, kink, make):
    params, batch = layers(8), data()
    true = jax.jit(make(chain(kink)))(params, batch)
    monkeypatch.setattr(shares_of, "_LITTLE", 0.0)
    ours = moonwalk_compile(chain(kink), strategies=FORCED)
    assert rows(ours.plan(params, batch)) >= 6
    traced = jax.jit(make(ours)).trace(params, batch)
    assert "u8[2," in str(traced.jaxpr)
    found = traced.lower().compile()(params, batch)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(true), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-9 * np.max(np.abs(b)))


def test_a_short_run_keeps_arrays_of_its_own(x64):
    args = layers(8), data()
    ours = moonwalk_compile(chain(), strategies=FORCED)
    assert "u8[2," not in str(jax.make_jaxpr(jax.grad(ours))(*args))
