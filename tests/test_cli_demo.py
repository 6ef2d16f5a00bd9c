"""`mwc demo`: the tour on a smaller network, and what it does where wheels lack."""

from __future__ import annotations

import json
import sys

import pytest
from click.testing import CliRunner

from mwc import CheckReport
from mwc.__main__ import main
from mwc.cli import demo
from mwc.cli.subject import Subject
from mwc.memory import MemoryReport, plugin
from mwc.memory.report import Row


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A shallow network, and no compiler for absent GPUs."""
    text = demo._network()
    less = text.replace("32, 256, 2048", "8, 16, 64")
    assert less != text
    monkeypatch.setattr(demo, "_network", lambda: less)
    monkeypatch.setenv("MWC_TARGET_DIR", str(tmp_path / "targets"))
    monkeypatch.setattr(plugin, "in_environment", lambda: False)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path / "tour"
    sys.modules.pop("network", None)


def call(*args):
    return CliRunner().invoke(main, ["demo", *map(str, args)])


def test_the_tour_where_nobody_can_answer(small):
    result = call("--folder", small)
    assert result.exit_code == 0, result.output
    for command in ("plan", "draw", "check", "memory"):
        assert f"$ mwc {command} {small}/network.py:loss" in result.stdout
    assert "gradients agree with backpropagation" in result.stdout
    assert "compiled memory in MiB, cpu" in result.stdout
    assert "`mwc target install`" in result.stdout
    assert "<svg" in (small / "saved.svg").read_text()
    # What it showed can be run again.
    again = CliRunner().invoke(main, ["plan", f"{small}/network.py:loss"])
    assert again.stdout.splitlines()[0] in result.stdout


def test_a_tour_that_goes_wrong_is_exit_code_1(small, monkeypatch):
    report = CheckReport(False, 0.5, "['value']")
    monkeypatch.setattr(Subject, "check", lambda _self: report)
    monkeypatch.setattr(demo._Tour, "memory", lambda *_: {"target": "cpu"})
    result = call("--folder", small, "--json")
    assert result.exit_code == 1
    assert result.stderr == "mwc: the gradients differ from backpropagation's\n"
    found = json.loads(result.stdout)
    assert found["check"]["ok"] is False
    assert found["memory"] == [{"target": "cpu"}]
    assert found["plan"]["stages"] > 8


def test_so_is_a_plan_that_saves_nothing():
    rows = tuple(Row(name, temp_bytes=100) for name in demo.METHODS)

    class Measured:
        def memory(self, target, _methods):
            return MemoryReport(target, rows)

    tour = demo._Tour("net.py:loss", quiet=True)
    found = tour.memory(Measured(), "cpu")
    assert [row["temp_bytes"] for row in found["rows"]] == [100, 100, 100]
    assert tour.wrong == ["the plan saves no memory for cpu"]


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("yes", [True, False])
def test_a_terminal_is_asked_whether_to_fetch_the_compiler(monkeypatch, capsys, yes):
    fetched, measured = [], []
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("click.confirm", lambda _text: yes)
    monkeypatch.setattr(demo, "fetch", lambda: fetched.append(True))
    tour = demo._Tour("net.py:loss", quiet=False)
    monkeypatch.setattr(tour, "memory", lambda _s, name: measured.append(name) or {})
    tour.absent(None)
    assert measured == (["h200"] if yes else [])
    assert len(fetched) == yes
    assert ("mwc target install" in capsys.readouterr().out) != yes
