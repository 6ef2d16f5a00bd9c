"""Parameters' gradients come before the cotangent that goes on."""

import jax
import jax.numpy as jnp
import pytest

from passes.flops import eqn_flops
from passes.graph import is_var
from passes.inline import inline
from passes.linearise import linearise
from passes.order import parameters_first

ROWS, WIDTH = 3, 5


def ordered(fun, *args, states=1):
    """The ordered backward of a function whose first arguments are its state."""
    linear = linearise(inline(jax.make_jaxpr(fun)(*args)), (True,) * len(args))
    state = linear.bwd.outvars[:states]
    bwd, waits = parameters_first(
        linear.bwd, linear.ct_inputs, state, lambda e: eqn_flops(e).matrix
    )
    assert (bwd.invars, bwd.outvars) == (linear.bwd.invars, linear.bwd.outvars)
    assert set(bwd.eqns) == set(linear.bwd.eqns)
    assert len(bwd.eqns) == len(linear.bwd.eqns)
    known = set(bwd.invars)
    for eqn in bwd.eqns:
        assert all(v in known for v in eqn.invars if is_var(v))
        known.update(eqn.outvars)
    return bwd, waits


def products(bwd, outs):
    return [i for i in bwd.needed(outs) if eqn_flops(bwd.eqns[i]).matrix]


def test_the_state_waits_for_the_weight():
    x, w, b = jnp.ones((ROWS, 7)), jnp.ones((7, WIDTH)), jnp.ones(WIDTH)
    bwd, waits = ordered(lambda x, w, b: jax.nn.relu(x @ w + b), x, w, b)
    state, weight = (products(bwd, [v])[0] for v in bwd.outvars[:2])
    assert weight < state
    assert list(waits) == [state]
    (ct,) = waits[state].reads
    assert ct.aval.shape == (ROWS, WIDTH)
    assert waits[state].done == tuple(bwd.eqns[weight].outvars)


def test_every_product_of_a_stage_waits_for_those_that_are_ready():
    x, w, v = jnp.ones((ROWS, 7)), jnp.ones((7, WIDTH)), jnp.ones((WIDTH, 2))
    bwd, waits = ordered(lambda x, w, v: jnp.tanh(x @ w) @ v, x, w, v)
    first, second = products(bwd, bwd.outvars[:1])
    outer, inner = bwd.outvars[2], bwd.outvars[1]
    assert max(products(bwd, [outer])) < first < max(products(bwd, [inner])) < second
    assert list(waits) == [first, second]


@pytest.mark.parametrize("states", [0, 3])
def test_nothing_waits_without_both_sides(states):
    args = jnp.ones((ROWS, 7)), jnp.ones((7, WIDTH)), jnp.ones(WIDTH)
    _, waits = ordered(lambda x, w, b: x @ w + b, *args, states=states)
    assert not waits


def test_cheap_code_is_left_alone():
    bwd, waits = ordered(lambda x, b: jnp.sin(x) * b, jnp.ones((0, 3)), jnp.ones(3))
    assert not waits
    assert bwd.eqns
