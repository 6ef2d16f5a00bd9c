"""Strict settings for every test, and the programs that tests differentiate with."""

from __future__ import annotations

from functools import partial

import jax
import pytest

from mwc import _shared
from mwc._plan import Plan
from passes import _jax

jax.config.update("jax_numpy_dtype_promotion", "standard")


@pytest.fixture(scope="session", autouse=True)
def _no_cache():
    """What compilers said in earlier runs is not what is tested."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MWC_CACHE", "0")
        yield


@pytest.fixture
def x64():
    """Double precision for one test."""
    with jax.enable_x64(True):
        yield


class Recompute:
    """The simplest right program: saves nothing and runs backpropagation again."""

    def __init__(self, jaxpr):
        self.jaxpr = jaxpr
        self.plan, self.guarded = Plan((), 0.0, 0, 0, 0, 0), ()
        self.fun = partial(_jax.run_jaxpr, jaxpr)

    def forward(self, active, args):
        return list(self.fun(*args)), []

    def pull(self, active, wanted, args, cts, drift):
        given = [ct is not None for ct in cts]

        def moved(*some):
            rest = iter(some)
            full = [next(rest) if w else x for w, x in zip(wanted, args, strict=True)]
            outs = self.fun(*full)
            return [y for y, g in zip(outs, given, strict=True) if g]

        some = [x for w, x in zip(wanted, args, strict=True) if w]
        found = list(jax.vjp(moved, *some)[1]([ct for ct in cts if ct is not None]))
        return [*found, jax.numpy.zeros(0)] if drift else found

    def backward(self, active, wanted, args, saved, cts, drift=False):
        args = jax.lax.optimization_barrier(list(args))
        return self.pull(active, wanted, args, cts, drift)


class SaveAll(Recompute):
    """Saves every argument and result, ten copies of nothing, and reads some of it.

    The arguments that carry tangents are read from what was saved, one by one as
    they are wanted, so that a wrong mask or a wrong batch axis gives wrong numbers.
    """

    def forward(self, active, args):
        outs = list(self.fun(*args))
        return outs, [*args, *outs]

    def backward(self, active, wanted, args, saved, cts, drift=False):
        mixed = [saved[i] if active[i] else args[i] for i in range(len(args))]
        return self.pull(active, wanted, mixed, cts, drift)


PROGRAMS = {"recompute": Recompute, "save-all": SaveAll}


def install(monkeypatch, maker):
    """Puts a reference program in the engine's place; returns the list of builds."""
    builds = []

    def build(jaxpr, roles, options, captured):
        builds.append(roles)
        return maker(jaxpr)

    monkeypatch.setattr(_shared, "_build", build)
    return builds


@pytest.fixture
def program(monkeypatch):
    """Runs a test with the program that saves everything; the list of its builds."""
    return install(monkeypatch, SaveAll)


@pytest.fixture(params=["engine", pytest.param("save-all", marks=pytest.mark.slow)])
def either_program(request, monkeypatch):
    """Runs a test with the compiler's own program, and one that saves everything."""
    if request.param != "engine":
        install(monkeypatch, PROGRAMS[request.param])


@pytest.fixture(params=sorted(PROGRAMS))
def each_program(request, monkeypatch):
    """Runs a test with each reference program."""
    return install(monkeypatch, PROGRAMS[request.param])


@pytest.fixture
def wrong_program(program, monkeypatch):
    """Differentiates with a program whose first cotangent is off by 0.1."""

    class Wrong(SaveAll):
        def backward(self, *args, **options):
            first, *others = super().backward(*args, **options)
            return [first + 0.1, *others]

    return install(monkeypatch, Wrong)


@pytest.fixture
def quick():
    """Compiles without optimisation, which tests of values do not need."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
