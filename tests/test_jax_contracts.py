"""What `passes._jax` relies on in JAX; each test names the reliant rule."""

import jax
import jax.numpy as jnp
import optax
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from mwc._tie import CPU_DROPS_BARRIERS
from passes import _jax


def eqns_of(fun, *args):
    return list(_jax.opened(jax.make_jaxpr(fun)(*args))[0].eqns)


def test_opened():
    """All of `passes`: closed jaxprs open to a body and constants."""
    table = jnp.arange(3.0)
    closed = jax.make_jaxpr(lambda x: x + table)(table)
    body, consts = _jax.opened(closed)
    assert len(body.constvars) == len(consts) == 1
    assert [e.primitive.name for e in body.eqns] == ["add"]


@pytest.mark.parametrize("counts", [(0, 1, 1), (2, 1, 0), (1, 2, 3)])
def test_scan_layout(counts):
    """`mwc.loops`: constants, carries, then per-step inputs."""
    consts, carries, inputs = counts

    def fun(cs, hs, xs):
        def step(hs, xs):
            return [h + sum(cs) + sum(xs) for h in hs], None

        return lax.scan(step, hs, xs, length=4)[0]

    args = [1.0] * consts, [2.0] * carries, [jnp.ones(4)] * inputs
    (eqn,) = [e for e in eqns_of(fun, *args) if e.primitive.name == "scan"]
    assert _jax.scan_layout(eqn) == (consts, carries)
    assert len(eqn.invars) == sum(counts)
    assert eqn.params["length"] == 4
    assert eqn.params["reverse"] is False


def test_call_body():
    """`passes.inline`: plain calls open, calls with options of their own do not."""
    (plain,) = eqns_of(jax.jit(jnp.sin), 1.0)
    assert _jax.call_body(plain) is not None
    mesh = jax.make_mesh((1,), ("a",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec())
    (other,) = eqns_of(jax.jit(jnp.sin, in_shardings=sharding), 1.0)
    assert _jax.call_body(other) is None
    (sine,) = eqns_of(jnp.sin, 1.0)[-1:]
    assert sine.primitive.name != "sin" or _jax.call_body(sine) is None


def made(factor):
    @jax.custom_jvp
    def fun(x):
        return jnp.sin(x)

    fun.defjvp(lambda p, t: (fun(*p), factor * t[0]))
    return fun


def test_rule_of():
    """`mwc._build`: equal calls of one `custom_jvp` compare equal, others do not."""
    one, other = made(2.0), made(3.0)
    eqns = eqns_of(lambda x: other(one(one(x))), 1.0)
    first, second, third = map(_jax.rule_of, eqns)
    assert first is not None
    assert first == second
    assert first != third
    relu = eqns_of(lambda x: jax.nn.relu(jax.nn.relu(x)), jnp.ones(3))
    rules = [_jax.rule_of(e) for e in relu if "custom_jvp" in e.primitive.name]
    assert len(set(map(str, rules))) <= 1


def test_source_line():
    """`mwc._describe`: the user's file, line and function."""
    (eqn,) = eqns_of(lambda x: jnp.sin(x), 1.0)[-1:]
    place = _jax.source_line(eqn)
    assert place.startswith("test_jax_contracts.py:")
    assert "/" not in place.split(" ")[0]


def test_closed():
    """`passes.linearise`: a jaxpr from equations runs."""
    body, _ = _jax.opened(jax.make_jaxpr(lambda x: jnp.cos(x) * x)(1.0))
    again = _jax.closed(list(body.invars), list(body.outvars), list(body.eqns))
    assert _jax.run_jaxpr(again, jnp.float32(0.0)) == [0.0]


def test_a_line_of_an_installed_library_gives_way_to_the_users():
    """`mwc._rows`: the user's call of a library's layer is the place of its stage."""
    eqns = eqns_of(lambda x: optax.losses.squared_error(x), 1.0)
    places = {_jax.source_line(eqn) for eqn in eqns}
    assert places
    assert all(place.startswith("test_jax_contracts.py:") for place in places)


def test_where_the_cpu_drops_barriers():
    """`mwc._tie`: a barrier parts equal sines, or it does not."""

    def twice(x):
        return jnp.sum(jnp.sin(x)) + jnp.sum(jnp.sin(lax.optimization_barrier(x)))

    text = jax.jit(twice).lower(jnp.ones(1000)).compile().as_text()
    assert text.count("sine(") == (1 if CPU_DROPS_BARRIERS else 2)
