"""Binomial schedules: closed form, and instructions that do what they say."""

import functools

import pytest

from passes.binomial import again, instructions, least_slots, split, steps

LENGTHS = (0, 1, 2, 3, 4, 7, 12, 20, 33)


@functools.cache
def recursive(length, slots):
    """t(l, s) by its definition."""
    if length <= 1:
        return 0
    if slots == 0:
        return length * (length - 1) // 2
    return min(
        j + recursive(j, slots) + recursive(length - j, slots - 1)
        for j in range(1, length)
    )


@pytest.mark.parametrize("length", LENGTHS)
def test_closed_form_and_split(length):
    for slots in range(length + 2):
        assert steps(length, slots) == recursive(length, slots)
        if length > 1 and slots:
            j = split(length, slots)
            rest = recursive(j, slots) + recursive(length - j, slots - 1)
            assert j + rest == recursive(length, slots)


@pytest.mark.parametrize("length", LENGTHS)
def test_instructions_run_every_step_once_last_first(length):
    for slots in range(max(length, 1)):
        table = instructions(length, slots)
        kept = dict(enumerate((0, *table.spine)))
        assert len(kept) <= slots + 1
        runs, done, next_advance = 0, [], 0
        for source, start, step, low, high in table.leaves:
            assert low == next_advance
            for a, first, last, target in table.advances[low:high]:
                assert kept[a] == first
                assert 1 <= target <= slots
                kept[target] = last
                runs += last - first
            next_advance = high
            assert kept[source] == start <= step
            runs += step - start
            done.append(step)
        assert done == list(reversed(range(length)))
        assert next_advance == len(table.advances)
        assert runs == again(length, slots)


@pytest.mark.parametrize("length", LENGTHS)
def test_again_is_without_the_first_pass(length):
    for slots in range(length + 1):
        # The first pass goes as far as the last kept state.
        reach = max(instructions(length, slots).spine, default=0)
        assert again(length, slots) == steps(length, slots) - reach
    assert again(length, max(length - 1, 0)) == 0


@pytest.mark.parametrize("length", LENGTHS)
def test_least_slots(length):
    for most in (0, 0.5, 1, length / 2, length, 3 * length):
        slots = least_slots(length, most)
        assert slots is not None
        assert again(length, slots) <= most
        assert slots == 0 or again(length, slots - 1) > most
    assert least_slots(length, -1) is None


def test_long_chains_are_quick():
    assert steps(10**6, 20) < 10 * 10**6
    assert 0 < split(10**6, 20) < 10**6
