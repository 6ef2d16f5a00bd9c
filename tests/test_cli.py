"""The command line: output, exit codes, and no half-done installation."""

import json
import subprocess
import sys

import pytest
from click.testing import CliRunner

from mwc.__main__ import main
from mwc.memory import plugin, targets


@pytest.fixture
def place(monkeypatch, tmp_path):
    monkeypatch.setenv("MWC_TARGET_DIR", str(tmp_path))
    monkeypatch.setattr(plugin, "in_environment", lambda: False)
    return tmp_path


def call(*args):
    return CliRunner().invoke(main, args)


def fake_pip(monkeypatch, code):
    monkeypatch.setattr(plugin, "_installer", lambda: [sys.executable, "-c", code])


# Does what `pip install --no-deps --target FOLDER A==V B==V` leaves behind.
PIP = """
import pathlib, sys
folder, *pins = sys.argv[3:]
for pin in pins:
    name = pin.replace("-", "_").replace("==", "-") + ".dist-info"
    pathlib.Path(folder, name).mkdir(parents=True)
"""


@pytest.mark.parametrize("args", [["--help"], ["target", "--help"], ["-h"]])
def test_help_shows_examples(args):
    result = call(*args)
    assert result.exit_code == 0
    assert "Example" in result.output
    assert "mwc target install" in result.output


@pytest.mark.parametrize("args", [["frobnicate"], ["target", "frobnicate"], ["--frob"]])
def test_unknown_commands_are_exit_code_2(args):
    result = call(*args)
    assert result.exit_code == 2
    assert "No such" in result.output


@pytest.mark.usefixtures("place")
def test_list_says_what_is_there_and_what_to_run():
    result = call("target", "list", "--json")
    rows = {row["target"]: row for row in json.loads(result.output)}
    assert list(rows) == list(targets.NAMES)
    assert rows["cpu"]["available"]
    assert not rows["h200"]["available"]
    assert plugin.INSTALL in rows["h200"]["how"]
    text = call("target", "list")
    assert text.exit_code == 0
    assert "b200" in text.output


def test_install_once_then_remove(place, monkeypatch):
    fake_pip(monkeypatch, PIP)
    result = call("target", "install", "--no-check")
    assert result.exit_code == 0, result.output
    assert str(plugin.folder()) in result.output
    assert plugin.is_complete(plugin.folder())
    fake_pip(monkeypatch, "raise SystemExit('must not run again')")
    assert call("target", "install", "--no-check").exit_code == 0
    assert "removed" in call("target", "remove").output
    assert "nothing" in call("target", "remove").output
    assert not list(place.iterdir())


def test_install_that_fails_is_one_line_and_leaves_nothing(place, monkeypatch):
    fake_pip(monkeypatch, "raise SystemExit('ERROR: no network')")
    result = call("target", "install")
    assert result.exit_code == 2
    (line,) = result.output.strip().splitlines()
    assert line.startswith("mwc: pip could not install jax-cuda12-plugin==")
    assert "no network" in line
    assert not list(place.iterdir())


def test_pip_that_installs_half_is_a_failure(place, monkeypatch):
    fake_pip(monkeypatch, PIP.replace("in pins:", "in pins[:1]:"))
    assert call("target", "install").exit_code == 2
    assert not plugin.is_complete(plugin.folder())
    assert not list(place.iterdir())


def test_an_environment_with_the_plugin_needs_nothing(monkeypatch, tmp_path):
    monkeypatch.setenv("MWC_TARGET_DIR", str(tmp_path))
    monkeypatch.setattr(plugin, "in_environment", lambda: True)
    result = call("target", "install", "--no-check")
    assert result.exit_code == 0
    assert "nothing to install" in result.output
    assert plugin.search_path() == []


def test_python_dash_m_runs_it():
    run = subprocess.run(
        [sys.executable, "-m", "mwc", "target", "frobnicate"],
        capture_output=True,
        text=True,
        check=False,
        env={"PYTHONPATH": ":".join(p for p in sys.path if p), "JAX_PLATFORMS": "cpu"},
    )
    assert run.returncode == 2
    assert "mwc target" in run.stderr
