"""Strict settings for every test, and the programs that tests differentiate with."""

from __future__ import annotations

import jax
import pytest
from jax.extend import core

from mwc import _shared

jax.config.update("jax_numpy_dtype_promotion", "standard")


@pytest.fixture
def x64():
    """Double precision for one test."""
    with jax.enable_x64(True):
        yield


class Recompute:
    """The simplest right program: saves nothing and runs backpropagation again."""

    def __init__(self, jaxpr):
        self.jaxpr = jaxpr
        self.plan = None
        self.fun = core.jaxpr_as_fun(jaxpr)

    def forward(self, active, args):
        return list(self.fun(*args)), []

    def pull(self, active, wanted, args, cts):
        given = [ct is not None for ct in cts]

        def moved(*some):
            rest = iter(some)
            full = [next(rest) if w else x for w, x in zip(wanted, args, strict=True)]
            outs = self.fun(*full)
            return [y for y, g in zip(outs, given, strict=True) if g]

        some = [x for w, x in zip(wanted, args, strict=True) if w]
        return list(jax.vjp(moved, *some)[1]([ct for ct in cts if ct is not None]))

    def backward(self, active, wanted, args, saved, cts):
        args = jax.lax.optimization_barrier(list(args))
        return self.pull(active, wanted, args, cts)


class SaveAll(Recompute):
    """Saves every argument and result, ten copies of nothing, and reads some of it.

    The arguments that carry tangents are read from what was saved, one by one as
    they are wanted, so that a wrong mask or a wrong batch axis gives wrong numbers.
    """

    def forward(self, active, args):
        outs = list(self.fun(*args))
        return outs, [*args, *outs]

    def backward(self, active, wanted, args, saved, cts):
        mixed = [saved[i] if active[i] else args[i] for i in range(len(args))]
        return self.pull(active, wanted, mixed, cts)


PROGRAMS = {"recompute": Recompute, "save-all": SaveAll}


@pytest.fixture(params=sorted(PROGRAMS))
def program(request, monkeypatch):
    """Runs a test with each reference program instead of the engine's."""
    maker = PROGRAMS[request.param]
    builds = []

    def build(jaxpr, roles, options):
        builds.append(roles)
        return maker(jaxpr)

    monkeypatch.setattr(_shared, "_build", build)
    return builds
