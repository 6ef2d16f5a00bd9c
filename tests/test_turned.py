"""Turned products: the same numbers, and no long sum down the columns on a CPU."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mwc
from mwc._tie import CPU_DROPS_BARRIERS
from mwc.nodes.turned import turned
from passes.graph import evaluate
from passes.linearise import hoisted
from tests.submersive import isometry

pytestmark = pytest.mark.usefixtures("quick")


def product(kind, x, h):
    """A sum over rows, as JAX transposes a product or as somebody wrote it."""
    found = jax.lax.dot_general(h, x, (((0,), (0,)), ((), ())))
    if kind == "both":
        return found, found.T
    return [found.T if kind == "transposed" else found]


@pytest.mark.parametrize("kind", ["transposed", "plain", "both"])
@pytest.mark.parametrize("shape", [(256, 300, 270), (256, 300, 255), (255, 300, 270)])
def test_the_same_product(kind, shape):
    rows, n, k = shape
    draw = np.random.default_rng(0)
    args = [jnp.asarray(draw.standard_normal((rows, m)), jnp.float32) for m in (n, k)]
    graph, _ = hoisted(jax.make_jaxpr(lambda x, h: product(kind, x, h))(*args))
    other = turned(graph)
    changed = min(shape) >= 256 and not CPU_DROPS_BARRIERS
    assert ("turned_product" in str(other.eqns)) == changed

    def run(*args):
        env = dict(zip(other.invars, args, strict=True))
        return evaluate(other, env, other.outvars)

    x, h = (np.asarray(t, np.float64) for t in args)
    right = {"transposed": [x.T @ h], "plain": [h.T @ x], "both": [h.T @ x, x.T @ h]}
    compiled = jax.jit(run).lower(*args).compile()
    for found, exact in zip(compiled(*args), right[kind], strict=True):
        np.testing.assert_allclose(found, exact, rtol=1e-4, atol=1e-4)
    # Of what is wanted both ways one has its copy after the product.
    slow = re.findall(r" dot\(.*lhs_contracting_dims=\{0\}", compiled.as_text())
    assert bool(slow) == (not changed)
    for_gpus = jax.jit(run).trace(*args).lower(lowering_platforms=("cuda",))
    assert "barrier" not in for_gpus.as_text()


@pytest.mark.skipif(CPU_DROPS_BARRIERS, reason="left alone there")
def test_products_unlike_are_left_alone():
    x = jnp.ones((2, 256, 256))

    def others(x):
        one = jnp.einsum("abi,abj->ij", x, x)
        two = jnp.einsum("abi,abj->aij", x, x)
        return one, two, x[0] @ x[1], x[0] @ x[1].T

    graph, _ = hoisted(jax.make_jaxpr(others)(x))
    assert turned(graph).eqns == graph.eqns


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("make", ["grad", "vmap", "hvp"])
def test_gradients_of_layers_that_are_wide(make):
    width, depth = 256, 4
    rotate = mwc.coisometric(lambda h, w: h @ w)

    def loss(ws, x):
        for w in ws:
            x = jnp.abs(rotate(x, w) + 0.1)
        return jnp.mean(x**3)

    def of(fun):
        grad = jax.grad(fun)
        if make == "vmap":
            return jax.vmap(grad, (None, 0))
        if make == "hvp":
            return lambda ws, x: jax.jvp(grad, (ws, x), (ws, x))
        return grad

    draw = np.random.default_rng(0)
    ws = [isometry(width, width) for _ in range(depth)]
    x = draw.standard_normal((*((2,) if make == "vmap" else ()), width, width))
    ours = mwc.moonwalk_compile(loss, strategies=("moonwalk", "stored"))
    compiled = jax.jit(of(ours)).lower(ws, x)
    if make == "grad":
        assert ("turned_product" in compiled.as_text()) == (not CPU_DROPS_BARRIERS)
    run, right = compiled.compile(), jax.jit(of(loss))(ws, x)
    if make == "grad" and not CPU_DROPS_BARRIERS:
        # Once in the first pass, once in sweep V: not again for the transpose.
        states = re.findall(r"f64\[256,256\]\S* abs\(", run.as_text())
        assert len(states) == 2 * depth - 1
    found = run(ws, x)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(right), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-9 * np.abs(b).max())
