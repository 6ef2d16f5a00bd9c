"""What counts as equal: graphs up to names, stretches of a chain."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from passes.alike import key_of, subchains
from passes.inline import inline


def key(fun, *args):
    return key_of(inline(jax.make_jaxpr(fun)(*args)))


def dense(w, x):
    return jax.nn.relu(x @ w) * 2.0


def looped(w, x):
    return lax.fori_loop(0, 3, lambda _, y: jnp.sin(y @ w), x)


ARGS = jnp.ones((3, 3)), jnp.ones((2, 3))


@pytest.mark.parametrize("fun", [dense, looped, lambda w, x: jax.nn.gelu(x @ w)])
def test_a_program_is_like_itself(fun):
    assert key(fun, *ARGS) == key(lambda *a: fun(*a), *ARGS)
    assert hash(key(fun, *ARGS)) == hash(key(fun, *ARGS))


@pytest.mark.parametrize(
    "other",
    [
        lambda w, x: jax.nn.relu(x @ w) * 3.0,
        lambda w, x: jax.nn.relu(x @ w.T) * 2.0,
        lambda w, x: jax.nn.relu(w @ x.T) * 2.0,
        lambda w, x: jax.nn.silu(x @ w) * 2.0,
        lambda w, x: jnp.maximum(x @ w, 0.0) * 2.0,
    ],
)
def test_other_programs_are_not(other):
    assert key(dense, *ARGS) != key(other, *ARGS)


def test_numbers_of_numpy_are_compared():
    # `split` has its sizes as such.
    def halves(sizes):
        return key(lambda x: lax.split(x, sizes), ARGS[0])

    assert halves(np.array([1, 2])) == halves(np.array([1, 2]))
    assert halves(np.array([1, 2])) != halves(np.array([2, 1]))


def test_bodies_are_compared():
    def other(w, x):
        return lax.fori_loop(0, 3, lambda _, y: jnp.cos(y @ w), x)

    assert key(looped, *ARGS) != key(other, *ARGS)


def test_rules_are_compared():
    def made(factor):
        fun = jax.custom_jvp(jnp.sin)
        fun.defjvp(lambda p, t: (fun(*p), factor * t[0]))
        return fun

    one, other = made(2.0), made(3.0)
    assert key(lambda x: one(x), 1.0) == key(lambda x: one(x), 1.0)
    assert key(lambda x: one(x), 1.0) != key(lambda x: other(x), 1.0)


@pytest.mark.parametrize("text", ["", "a", "aaaa", "abab", "abcabca", "aabbbaab"])
def test_subchains(text):
    alike, first = subchains(text)
    stretches = list(itertools.combinations(range(len(text) + 1), 2))
    for (i, j), (k, n) in itertools.product(stretches, stretches):
        assert (alike[i, j] == alike[k, n]) == (text[i:j] == text[k:n])
    assert [alike[i, j] for i, j in first] == list(range(len(first)))
    lengths = [j - i for i, j in first]
    assert lengths == sorted(lengths)
