"""Schedules: costs and memory as simulated, and the best of all on small chains."""

import functools
import math

import numpy as np
import pytest

from passes.binomial import steps
from passes.schedule import Costs, Leaf, Split, Store, plan


def equal(count, size=1, kept=None, forward=1.0):
    """Equal stages: one state each, residuals too large to keep unless given."""
    kept = 10**3 if kept is None else kept
    born = [((size, i + 1),) if i + 1 < count else () for i in range(count)]
    return [Costs(forward, forward, forward, kept, 0, b) for b in born]


def drawn(count, seed, skip=True):
    """Unequal stages, some states read later than by the next stage."""
    draw = np.random.default_rng(seed)
    stages = []
    for i in range(count):
        born = ()
        if i + 1 < count:
            born = ((int(draw.integers(1, 5)), i + 1),)
            if skip and draw.random() < 0.4 and i + 2 < count:
                born += ((int(draw.integers(1, 4)), int(draw.integers(i + 2, count))),)
        forward = float(draw.integers(1, 5))
        leaf = forward if draw.random() < 0.5 else 0.0
        kept, local = int(draw.integers(1, 7)), int(draw.integers(0, 4))
        stages.append(Costs(forward, leaf, forward, kept, local, born))
    return stages


def held(stages, i, k):
    """Bytes of the state at k besides the one at i."""
    return sum(s for b in range(i, k) for s, last in stages[b].born if last >= k)


def simulate(stages, at, first=True):
    """(cost, peak bytes) of a schedule, and the stages that it pulls, in order."""
    if at is None:
        return 0.0, 0, []
    if isinstance(at, Leaf):
        stage = stages[at.stage]
        return stage.leaf + first * stage.forward, stage.local, [at.stage]
    if isinstance(at, Store):
        i, stage = at.stage, stages[at.stage]
        cost, peak, order = simulate(stages, at.rest, first)
        extra = stage.kept + (held(stages, i, i + 1) if at.rest else 0)
        return stage.store + cost, max(peak + extra, stage.local), [*order, i]
    k = at.middle
    right, high, order = simulate(stages, at.right, first)
    left, low, rest = simulate(stages, at.left, False)
    moved = sum(s.forward for s in stages[at.start : k])
    peak = max(high + held(stages, at.start, k), low)
    return moved + right + left, peak, [*order, *rest]


def frontier(stages, store_first=True):
    """All pairs (cost, bytes) that no other schedule beats, by enumeration."""

    @functools.cache
    def all_of(i, j, first):
        stage = stages[i]
        found = []
        if j == i + 1:
            found.append((stage.leaf + first * stage.forward, stage.local))
        if store_first or not first:
            rest = all_of(i + 1, j, first) if j > i + 1 else [(0.0, 0)]
            more = stage.kept + (held(stages, i, i + 1) if j > i + 1 else 0)
            found += [(stage.store + c, max(m + more, stage.local)) for c, m in rest]
        for k in range(i + 1, j):
            moved = sum(s.forward for s in stages[i:k])
            more = held(stages, i, k)
            for c, m in all_of(k, j, first):
                for d, n in all_of(i, k, False):
                    found.append((moved + c + d, max(m + more, n)))
        best, kept = math.inf, []
        for c, m in sorted(found):
            if m < best:
                best = m
                kept.append((c, m))
        return kept

    return all_of(0, len(stages), True)


@pytest.mark.parametrize("store_first", [True, False])
@pytest.mark.parametrize("seed", range(12))
def test_least_memory_of_all_schedules(seed, store_first):
    stages = drawn(2 + seed % 5, seed)
    choices = frontier(stages, store_first)
    for cost, memory in choices:
        found = plan(stages, cost, store_first)
        assert found.cost <= cost + 1e-9
        # Bytes are rounded up to levels, one for each value that is held.
        assert memory <= found.memory <= memory * 1.3 + len(stages)


@pytest.mark.parametrize("count", [1, 2, 5, 9])
@pytest.mark.parametrize("seed", range(4))
def test_cost_and_memory_are_those_of_the_simulation(seed, count):
    stages = drawn(count, seed)
    total = sum(s.forward for s in stages)
    for extra in (0, 0.5, 1, 2, 4, 99):
        found = plan(stages, (1 + extra) * total)
        cost, peak, order = simulate(stages, found.schedule)
        assert order == list(reversed(range(count)))
        assert cost == pytest.approx(found.cost)
        assert peak <= found.memory


def test_no_schedule_within_the_limit_gives_the_cheapest():
    stages = drawn(5, 1)
    found = plan(stages, 0.0)
    assert found.cost == min(c for c, _ in frontier(stages))


@pytest.mark.parametrize("count", [2, 4, 7, 12])
def test_equal_stages_are_binomial(count):
    stages = equal(count)
    for slots in range(1, count):
        # All stages of the first pass run, the last one included; every leaf runs
        # its stage again.
        cost = steps(count, slots - 1) + 1 + count
        found = plan(stages, cost)
        assert found.cost <= cost
        assert found.memory <= slots
        if slots > 1:
            assert plan(stages, cost - 1).memory >= slots


def test_no_limit_of_time():
    stages = drawn(5, 3)
    found = plan(stages, math.inf)
    cost, peak, order = simulate(stages, found.schedule)
    assert order == [4, 3, 2, 1, 0]
    assert (cost, peak) == (found.cost, found.memory)


def test_residuals_that_fit_are_stored():
    stages = equal(6, size=4, kept=1)
    found = plan(stages, sum(s.forward for s in stages))
    at, stored = found.schedule, 0
    while isinstance(at, Store):
        stored, at = stored + 1, at.rest
    assert stored >= 5
    assert found.cost == 6


def test_storing_may_be_forbidden_in_the_first_pass():
    stages = equal(4, size=4, kept=1)
    at = plan(stages, 100.0, store_first=False).schedule
    while at is not None:
        assert not isinstance(at, Store)
        at = at.right if isinstance(at, Split) else None


def test_a_skip_is_charged_once():
    """Long-lived state is held by every later cut at no further cost."""
    count = 6
    stages = equal(count, size=2)
    skip = Costs(1.0, 1.0, 1.0, 10**3, 0, ((2, 1), (10, count - 1)))
    stages = [skip, *stages[1:]]
    free = plan(stages, 2 * count)
    _, peak, _ = simulate(stages, free.schedule)
    assert peak <= 10 + 2 * count


def test_edge_cases():
    assert plan([], 1.0).schedule is None
    (one,) = equal(1)
    assert isinstance(plan([one], 2.0).schedule, Leaf)


def test_empty_values():
    empty = [Costs(1.0, 0.0, 1.0, 0, 0, ((0, i + 1),)) for i in range(3)]
    found = plan(empty, 10.0)
    assert simulate(empty, found.schedule)[2] == [2, 1, 0]


def test_deep_equal_chains_are_quick():
    stages = equal(256, size=8, kept=64)
    found = plan(stages, 2 * 256.0)
    cost, peak, order = simulate(stages, found.schedule)
    assert len(order) == 256
    assert (cost, peak <= found.memory) == (pytest.approx(found.cost), True)
