"""What nobody asks for costs nothing, under every transformation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from mwc import moonwalk_compile
from passes import _jax
from tests.transforming import arrays, both, same, vector

pytestmark = pytest.mark.usefixtures("x64", "either_program", "quick")


def has_aux_loss(w, x):
    hidden = jnp.tanh(x @ w)
    return jnp.sum(hidden**2), (hidden, jnp.argmax(hidden), None)


def saved_and_read(jaxpr):
    """Numbers of saved values that a forward sweep keeps and a backward reads."""
    small, _ = _jax.dead_code(jaxpr, [True] * len(jaxpr.out_avals))
    found = {
        e.primitive.name: sum(e.params["site"].kept)
        for e in small.eqns
        if "site" in e.params
    }
    return found["moonwalk_forward"], found["moonwalk_backward"]


def chain_of_two(w, v, x):
    hidden = jnp.tanh(x @ w)
    return jnp.sum(hidden), jnp.sum(jnp.sin(x @ v)), hidden


@pytest.mark.usefixtures("program")
def test_dead_code_shrinks_what_is_saved():
    args = arrays((3, 4), (3, 2), (5, 3))
    f = moonwalk_compile(chain_of_two)

    def run(fun):
        return jax.grad(lambda *a: fun(*a)[0], argnums=(0, 1))

    # The program saves 3 arguments and 3 results, and reads the active arguments; of
    # those only w has to do with the result that is differentiated.
    assert saved_and_read(jax.make_jaxpr(run(f))(*args)) == (1, 1)
    same(run(f)(*args), run(chain_of_two)(*args))
    # Nothing needs the saved values once no cotangent is asked for.
    dead = jax.make_jaxpr(lambda *a: jax.vjp(f, *a)[0])(*args)
    small, _ = _jax.dead_code(dead, [True] * 3)
    assert [e.primitive.name for e in small.eqns] == ["moonwalk_call"]


def test_has_aux():
    both(
        lambda f: jax.value_and_grad(f, argnums=(0, 1), has_aux=True),
        *arrays((3, 4), (5, 3)),
        fun=has_aux_loss,
    )
    both(
        lambda f: jax.jit(jax.grad(f, has_aux=True)),
        *arrays((3, 4), (5, 3)),
        fun=has_aux_loss,
    )


def test_unused_outputs():
    both(
        lambda f: jax.jit(jax.grad(lambda w, x: jnp.sum(f(w, x)[0]))),
        *arrays((3, 4), (5, 3)),
        fun=vector,
    )
    both(
        lambda f: jax.jit(lambda w, x: jax.vjp(f, w, x)[1]((jnp.ones(4), 1.0))[1]),
        *arrays((3, 4), (5, 3)),
        fun=vector,
    )
