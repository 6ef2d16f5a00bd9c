"""How commands print, and what they import and set."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import textwrap
from functools import partial

import pytest
from rich.console import Console

from mwc import Plan
from mwc._plan import StageRecord
from mwc.cli import running
from mwc.memory import MemoryReport, Row


def test_json_has_no_infinities(capsys):
    running.show_json({"a": [float("inf"), 1.0], "b": (float("nan"),)})
    assert json.loads(capsys.readouterr().out) == {"a": [None, 1.0], "b": [None]}


PROBE = """
import sys
from click.testing import CliRunner
import mwc
from mwc.__main__ import main
for args in (["--help"], ["--version"], ["memory", "-h"], ["target", "-h"], ["draw"]):
    result = CliRunner().invoke(main, args)
    assert result.exit_code == (2 if args == ["draw"] else 0)
assert not {"jax", "numpy", "networkx", "matplotlib"} & set(sys.modules)
"""


def test_help_needs_no_jax_and_planning_no_gpu(tmp_path, monkeypatch):
    """What imports and sets is seen in a process of its own only."""
    place = os.getcwd()
    monkeypatch.chdir(tmp_path)
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("JAX", "XLA"))}
    kept["PYTHONPATH"] = os.pathsep.join(p for p in (place, *sys.path) if p)

    def run(*args):
        options = {"capture_output": True, "text": True, "env": kept, "check": False}
        return subprocess.run([sys.executable, *args], **options)

    silent = run("-c", PROBE)
    assert (silent.returncode, silent.stdout, silent.stderr) == (0, "", "")
    (tmp_path / "asks.py").write_text(
        textwrap.dedent("""
        import os
        print(os.environ["JAX_PLATFORMS"], os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"])
        def f(w): return (w * w).sum()
        """)
    )
    result = run("-m", "mwc", "plan", "asks.py:f", "--arg", "f32[3]")
    assert (result.returncode, result.stderr) == (0, "cpu false\n")


def widest(text):
    return max(len(re.sub(r"\x1b\[[0-9;]*m", "", s)) for s in text.splitlines())


@pytest.mark.parametrize("width", [60, 200])
def test_a_terminal_gets_tables_as_wide_as_it_is(monkeypatch, capsys, width):
    monkeypatch.setattr("rich.console.Console", partial(Console, force_terminal=True))
    monkeypatch.setenv("COLUMNS", str(width))
    report = MemoryReport("cpu", (Row("moonwalk", temp_bytes=2**20, note="a note"),))
    running.show(report)
    wide = widest(capsys.readouterr().out)
    # A table that would lose digits is printed as text is: whole.
    assert (wide > width) == (width == 60)
    stage = StageRecord(
        *("loss", "net.py:1", "dot", "stored", "bits"), *[0] * 6, 1, "x"
    )
    running.show(Plan((stage,), 0.0, 0, 0, 0, 0, notes=("read [this] note",)))
    out = capsys.readouterr().out
    assert widest(out) <= width
    assert "[this]" in out
