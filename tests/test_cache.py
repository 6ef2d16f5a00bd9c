"""The cache of compilations: what hits, what misses, and what must not matter."""

import dataclasses
import json
import os

import jax
import jax.numpy as jnp
import pytest

from mwc.memory import cache, compiling, targets

WORKER_CPU = targets.Target("cpu", "cpu")
SPEC = jax.ShapeDtypeStruct((4, 3), jnp.float32)


@pytest.fixture(autouse=True)
def place(monkeypatch, tmp_path):
    monkeypatch.setenv("MWC_CACHE", "1")
    monkeypatch.setenv("MWC_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def compiled(monkeypatch):
    """The requests that reach a compiling process, which answers at once."""
    asked = []

    class Worker:
        def compile(self, blob, head):
            asked.append(head)
            sizes = dict.fromkeys(compiling.FIGURES, len(asked))
            return {"compile_seconds": 1.0, **sizes}

    monkeypatch.setattr(compiling, "_worker", lambda path, flags: Worker())
    return asked


def ask(fun=jnp.sin, target=WORKER_CPU, **options):
    return compiling.compile_for(target, fun, [SPEC], **options)["temp_bytes"]


def test_the_same_program_is_compiled_once(compiled):
    assert [ask(), ask(), ask()] == [1, 1, 1]
    assert len(compiled) == 1


def test_whatever_decides_the_figures_is_part_of_the_key(compiled, monkeypatch):
    found = [ask(), ask(jnp.cos), ask(live=True)]
    found.append(ask(target=dataclasses.replace(WORKER_CPU, name="mine")))
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=true")
    found.append(ask())
    monkeypatch.setattr(compiling.plugin, "identity", lambda: ["another version"])
    found.append(ask())
    assert found == [1, 2, 3, 4, 5, 6]


def test_a_check_of_the_compiler_compiles(compiled):
    assert [ask(), ask(fresh=True), ask()] == [1, 2, 2]


def test_it_can_be_switched_off(compiled, monkeypatch, place):
    monkeypatch.setenv("MWC_CACHE", "0")
    assert [ask(), ask()] == [1, 2]
    assert not place.exists()


def test_it_is_in_the_users_cache_folder(monkeypatch):
    monkeypatch.delenv("MWC_CACHE_DIR")
    assert cache.folder().parts[-2:] == ("mwc", "compiled")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"temp_bytes": 7}', "\xff"])
def test_corrupted_files_are_ignored_and_replaced(compiled, place, text):
    ask()
    (file,) = place.glob("*.json")
    file.write_bytes(text.encode("latin1"))
    assert ask() == 2
    assert json.loads(file.read_text())["temp_bytes"] == 2


def test_a_folder_that_cannot_be_made_is_no_error(compiled, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("MWC_CACHE_DIR", str(tmp_path / "file" / "cache"))
    assert [ask(), ask()] == [1, 2]


def test_the_folder_is_bounded_and_the_oldest_go_first(monkeypatch, place):
    monkeypatch.setattr(cache, "BOUND", 250)
    for i in range(4):
        cache.write(str(i), {"text": "x" * 80})
        os.utime(place / f"{i}.json", (i, i))
        if i == 2:
            assert cache.read("1") is not None  # used again: 2 is the oldest now
            os.utime(place / "1.json", (9, 9))
    left = {file.stem for file in place.iterdir()}
    assert left == {"1", "3"}


def test_processes_share_it():
    """A real compilation, found again after the process that made it has ended."""

    def fun(x):
        return jnp.tanh(x) @ x.T

    first = compiling.compile_for(WORKER_CPU, fun, [SPEC])
    compiling.close_workers()
    again = compiling.compile_for(WORKER_CPU, fun, [SPEC])
    assert again == first
    assert not compiling._workers
