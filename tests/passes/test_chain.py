"""Cuts: pieces in order are the program; parameter-side work sinks to its reader."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mwc import _engine
from mwc._options import make_options
from passes.chain import chain, is_loop
from passes.depend import sides
from passes.graph import evaluate, is_var, nbytes, read
from passes.inline import inline
from tests import grammar

CHAINS = {
    "dense": ["dense", "relu"] * 4,
    "skips": ["push", "dense", "push", "residual", "pop", "dense", "pop"],
    "maps": ["triu", "relu", "cayley", "weight-norm", "tied", "dense", "tied-both"],
    "loops": ["dense", "scan-layers", "relu", "scan-time", "dense"],
    "many": ["attention", "dropout", "gather", "batch-norm", "cond", "maxmin", "fft"],
    "light": ["tanh", "abs", "reverse", "clip"],
}


def cut(fun, params, *rest):
    """The graph of a function, its chain, and the flat arguments."""
    leaves, tree = jax.tree.flatten((params, *rest))
    jaxpr = jax.make_jaxpr(lambda *xs: fun(*jax.tree.unflatten(tree, xs)))(*leaves)
    graph = inline(jaxpr)
    count = len(jax.tree.leaves(params))
    return graph, chain(graph, sides(graph, graph.invars[:count])), leaves


def check_chain(graph, found, leaves):
    """Evaluates prologue and pieces one by one, from what each may read."""
    given = dict(zip(graph.invars, leaves, strict=True))
    prologue = evaluate(found.prologue, dict(given), found.prologue.outvars)
    given.update(zip(found.prologue.outvars, prologue, strict=True))
    state = {}
    results = {}
    wanted = {v for v in graph.outvars if is_var(v)}
    for piece in found.pieces:
        assert set(piece.crossing) == set(state)
        values = {v: (state if v in state else given)[v] for v in piece.graph.invars}
        bound = [v for e in piece.graph.eqns for v in e.outvars]
        assert not set(bound) & set(values)
        outs = evaluate(piece.graph, values, piece.graph.outvars)
        state.update(zip(piece.graph.outvars, outs, strict=True))
        results.update((v, state[v]) for v in wanted if v in state)
        later = found.pieces[found.pieces.index(piece) + 1 :]
        reads = {v for p in later for v in p.graph.invars}
        state = {v: x for v, x in state.items() if v in reads}
    return [read({**given, **results}, v) for v in graph.outvars]


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("shape", [(4, 5), (3, 1)])
@pytest.mark.parametrize("name", CHAINS)
def test_pieces_in_order_are_the_program(name, shape):
    names = CHAINS[name]
    args = grammar.values(len(names), *shape, dtype=np.float32)
    graph, found, leaves = cut(grammar.loss_of(names), *args)
    value = jax.jit(lambda *xs: check_chain(graph, found, xs))(*leaves)[0]
    true = jax.jit(grammar.loss_of(names))(*args)
    np.testing.assert_allclose(value, true, rtol=1e-4)


def test_one_heavy_equation_a_stage_and_activations_before_products():
    def loss(ws, x):
        for w in ws:
            x = jnp.tanh(x @ w)
        return jnp.sum(x)

    _, found, _ = cut(loss, [jnp.ones((8, 8))] * 5, jnp.ones((16, 8)))
    names = [[e.primitive.name for e in p.graph.eqns] for p in found.pieces]
    assert names[1:5] == [["tanh", "dot_general"]] * 4
    assert all(n.count("dot_general") <= 1 for n in names)
    for piece in found.pieces[1:]:
        assert sum(nbytes(v) for v in piece.crossing) == 4 * 16 * 8


def test_a_skip_crosses_every_stage_between_and_is_kept_once():
    def loss(ws, x):
        skip = jnp.tanh(x @ ws[0])
        h = skip
        for w in ws[1:5]:
            h = jax.nn.relu(h @ w)
        return jnp.sum(jnp.concatenate([h, skip], axis=1) @ ws[5])

    ws = [jnp.ones((8, 8))] * 5 + [jnp.ones((16, 1))]
    x = jnp.ones((32, 8))
    _, found, _ = cut(loss, ws, x)
    widths = [len(p.crossing) for p in found.pieces]
    assert max(widths) == 2
    inside = [p.crossing for p in found.pieces if len(p.crossing) == 2]
    (skip,) = set.intersection(*map(set, inside))
    first = next(i for i, p in enumerate(found.pieces) if skip in p.crossing)
    last = max(i for i, p in enumerate(found.pieces) if skip in p.graph.invars)
    assert all(skip in p.crossing for p in found.pieces[first : last + 1])

    leaves, tree = jax.tree.flatten((ws, x))
    jaxpr = jax.make_jaxpr(lambda *xs: loss(*jax.tree.unflatten(tree, xs)))(*leaves)
    for extra in (0, 1, 5):
        roles = ["parameter"] * 6 + ["data"]
        options = make_options(extra_forwards=extra)
        _, names = _engine.build(jaxpr, roles, options).chained.node.spine
        assert len(names) == len(set(names))


def test_parameter_side_work_sinks_to_its_only_reader():
    def loss(params, x):
        w, v, shared = params
        both = jnp.exp(shared)
        x = jnp.tanh(x @ (jnp.triu(w) + jnp.eye(8)))
        x = jnp.tanh(x @ (v / jnp.linalg.norm(v)) * both)
        return jnp.sum(x @ w.T * both)

    params = jnp.ones((8, 8)), jnp.ones((8, 8)), jnp.ones(8)
    graph, found, leaves = cut(loss, params, jnp.ones((4096, 8)))
    shared = [e.primitive.name for e in found.prologue.eqns]
    assert "exp" in shared
    assert not {"select_n", "sqrt"} & set(shared)
    for name in ("select_n", "sqrt"):
        holders = [
            p for p in found.pieces if name in {e.primitive.name for e in p.graph.eqns}
        ]
        assert len(holders) == 1
        assert "dot_general" in {e.primitive.name for e in holders[0].graph.eqns}
    for piece in found.pieces:
        assert all(v.aval.shape[:1] == (4096,) for v in piece.crossing)
    np.testing.assert_allclose(
        check_chain(graph, found, leaves)[0], loss(params, leaves[-1]), rtol=1e-6
    )


def test_constants_are_copied_to_their_readers():
    def loss(ws, x):
        ramp = jnp.arange(8.0)
        for w in ws:
            x = jnp.tanh(x @ w + ramp)
        return jnp.sum(x)

    graph, found, leaves = cut(loss, [jnp.ones((8, 8))] * 4, jnp.ones((16, 8)))
    iotas = {v for e in graph.eqns if e.primitive.name == "iota" for v in e.outvars}
    holders = [
        p for p in found.pieces if iotas & {v for e in p.graph.eqns for v in e.outvars}
    ]
    assert len(holders) == 4
    assert not any(iotas & set(p.crossing) for p in found.pieces)
    check_chain(graph, found, leaves)


def test_loops_stand_alone():
    names = CHAINS["loops"]
    _, found, _ = cut(
        grammar.loss_of(names), *grammar.values(len(names), dtype=np.float32)
    )
    loops = [p for p in found.pieces if any(map(is_loop, p.graph.eqns))]
    assert len(loops) == 2
    assert all(len(p.graph.eqns) == 1 for p in loops)


def test_programs_without_state_or_equations():
    for fun in (lambda w, x: x, lambda w, x: 3.0, lambda w, x: w * 2):
        graph, found, leaves = cut(fun, jnp.ones(3), jnp.arange(3.0))
        (value,) = check_chain(graph, found, leaves)
        np.testing.assert_array_equal(value, fun(*leaves))


def test_deep_chains_have_a_bounded_number_of_stages():
    def loss(ws, x):
        for i in range(600):
            x = jnp.sin(x @ ws[i % 3])
        return jnp.sum(x)

    _, found, _ = cut(loss, [jnp.ones((4, 4))] * 3, jnp.ones((2, 4)))
    assert 60 <= len(found.pieces) <= 300


def test_long_light_stretches_are_cut():
    def loss(w, x):
        for _ in range(100):
            x = jnp.sin(x)
        return jnp.sum(x @ w)

    _, found, _ = cut(loss, jnp.ones((4, 4)), jnp.ones((2, 4)))
    assert len(found.pieces) >= 3
    assert max(len(p.graph.eqns) for p in found.pieces) <= 52


def uses(make, count=6, width=16, batch=64):
    """A chain that multiplies by each of two made weights several times."""

    def fun(params, x):
        weights = [make(*p) for p in params]
        for _ in range(count // 2):
            for w in weights:
                x = jax.nn.relu(x @ w)
        return jnp.sum(x)

    return fun, jnp.ones((batch, width))


MADE = {
    "low rank": (lambda a, b: jnp.tanh(a @ b.T), ((16, 1), (16, 1)), True),
    "kron": (jnp.kron, ((4, 4), (4, 4)), True),
    "same size": (lambda a, b: jnp.triu(a) + b, ((16, 16), (16,)), False),
    "dear": (lambda a, b: (a @ b.T) @ (a @ b.T), ((16, 8), (16, 8)), False),
}


@pytest.mark.parametrize("name", MADE)
def test_what_grows_and_is_cheap_is_made_at_each_stage(name):
    make, shapes, again = MADE[name]
    fun, x = uses(make)
    draw = np.random.default_rng(0)
    params = [[jnp.asarray(draw.standard_normal(s)) for s in shapes] for _ in range(2)]
    graph, found, leaves = cut(fun, params, x)
    large = any(v.aval.shape == (16, 16) for v in found.prologue.outvars)
    assert large != again
    assert sum(bool(p.made_from) for p in found.pieces) == (6 if again else 0)
    for piece in found.pieces:
        assert set(piece.made_from) <= set(piece.graph.invars)
    (mine,) = check_chain(graph, found, leaves)
    np.testing.assert_allclose(mine, fun(params, x), rtol=1e-5)


def test_a_result_is_made_once():
    fun, x = uses(jnp.kron)
    params = [[jnp.ones((4, 4))] * 2] * 2
    both = lambda p, x: (fun(p, x), jnp.kron(*p[0]))  # noqa: E731
    graph, found, leaves = cut(both, params, x)
    assert found.prologue.outvars
    pairs = zip(check_chain(graph, found, leaves), both(params, x), strict=True)
    for mine, true in pairs:
        np.testing.assert_allclose(mine, true, rtol=1e-5)
