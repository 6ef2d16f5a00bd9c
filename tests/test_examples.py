"""The examples and the README's tour run, in processes of their own."""

from __future__ import annotations

import functools
import importlib
import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from mwc.memory import plugin
from tests import programs

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def run(*command, folder=ROOT):
    """What a Python command prints, run in a folder; it must succeed."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "COLUMNS": "100"}
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env=environment,
        cwd=folder,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_digits():
    said = run(
        *("examples/digits.py", "--depth", "3", "--width", "64"),
        *("--epochs", "20", "--batch", "239", "--target", "cpu"),
    )
    differences = re.findall(r"difference from jax.grad's losses: ([^,]+)", said)
    assert len(differences) == 2
    assert max(map(float, differences)) <= 2e-2
    assert "gradients agree" in said
    assert re.search(r"^ *moonwalk .*\d", said, re.MULTILINE)
    assert "extra forward passes" in said
    assert float(said.split()[-1]) >= 0.9


def test_digits_says_what_a_target_lacks(tmp_path, monkeypatch, capsys):
    if plugin.in_environment():
        pytest.skip("this environment has JAX's CUDA plugin")
    monkeypatch.setenv("MWC_TARGET_DIR", str(tmp_path))
    digits = importlib.import_module("examples.digits")
    training, _ = digits.digits(0)
    params = digits.initial(jax.random.key(0), 1, 16)
    digits.memory_tables(params, training, ["h200"])
    assert "python -m mwc target install" in capsys.readouterr().out


def test_memory_table():
    said = run("examples/memory_table.py", "--help")
    assert "--target" in said


def test_run_table(monkeypatch):
    table = importlib.import_module("examples.run_table")
    small = functools.partial(
        programs.dense, jnp.abs, 12, 16, 64, layer=programs.rotate
    )
    for rows in (programs.ROWS, programs.SUBMERSIVE):
        monkeypatch.setitem(rows, "small", small)
    monkeypatch.setattr(table, "cached", lambda folder: None)
    found, device = table.seconds("small", 3, "")
    assert device == jax.devices()[0].device_kind
    assert [*found] == [*table.METHODS]
    for figures in found.values():
        assert len(figures["seconds"]) == 3
        assert figures["error"] <= 1e-5
    assert found["mwc"]["temp_bytes"] < found["backprop"]["temp_bytes"]
    assert table.peak("mwc", "small", "") is None, "a CPU does not count"
    assert len([*table.cells(found)]) == 4


def test_draw_plans(tmp_path):
    run("examples/draw_plans.py", str(tmp_path))
    for name, text in (("moonwalk.svg", "bits"), ("unet.svg", "down2")):
        assert text in (tmp_path / name).read_text()


def test_tour_of_the_readme(tmp_path):
    code = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(code) == 2
    said = run("-c", "\n".join(code), folder=tmp_path)
    pictures = {"saved.svg", "memory.png", "pareto.svg", "timeline.svg", "report.html"}
    assert {path.name for path in tmp_path.iterdir()} == pictures
    assert "backprop" in said
    assert "agree" in said


def test_readme_has_the_two_commands():
    commands = re.findall(r"```sh\n(.*?)\n```", README, re.DOTALL)
    assert len(commands) == 2
    assert commands[0].endswith(".venv/bin/python examples/digits.py")
    assert ".venv/bin/python -m pytest" in commands[1]
