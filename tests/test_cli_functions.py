"""`mwc plan`, `memory`, `timeline`, `pareto`, `draw` and `check`, and bad input."""

from __future__ import annotations

import json
import sys

import pytest
from click.testing import CliRunner

from mwc import Plan
from mwc.__main__ import main
from mwc.cli import running
from mwc.memory import plugin

NET = """
import jax, jax.numpy as jnp
import mwc

print("imported")

def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.float32)

def loss(params, x, *, scale=1.0):
    print("traced")
    for w in params:
        x = jnp.tanh(x @ w)
    return scale * jnp.mean(x**2)

def inputs():
    return [shape(8, 8)] * 6, shape(32, 8)

def loss_inputs():
    return ([shape(8, 8)] * 4, jnp.ones((32, 8))), {"scale": 2.0}

def pair(params, batch):
    return jnp.sum(params[0] * params[1] * batch["scale"])

def pair_inputs():
    return (shape(3), shape(3)), {"scale": shape(3)}

def single(w):
    return jnp.sum(w**2)

def single_inputs():
    return {"w": shape(3)}["w"]

@mwc.moonwalk_compile(extra_forwards=0, has_aux=True)
def decorated(params, x, mode):
    y = x
    for w in params:
        y = jnp.tanh(y @ w) if mode == "tanh" else y @ w
    return jnp.mean(y**2), y

class Model:
    def __init__(self, width):
        self.width = width

    @mwc.moonwalk_compile
    def loss(self, w):
        return jnp.sum(jnp.tanh(jnp.ones(self.width) @ w))

    def plain(self, w):
        return jnp.sum(jnp.tanh(jnp.ones(self.width) @ w))

model = Model(8)
number = 3

def vector(w):
    return jnp.tanh(w)
"""

W, X = ("--arg", "5*f32[8,8]"), ("--arg", "f32[16,8]")


@pytest.fixture
def net(tmp_path, monkeypatch):
    """A module in the current folder, imported afresh."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "net.py").write_text(NET)
    yield tmp_path
    forget(tmp_path)


def forget(folder):
    """Drops what was imported from a folder."""
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None)).startswith(str(folder)):
            del sys.modules[name]


def call(*args):
    return CliRunner().invoke(main, [str(a) for a in args])


def planned(*args):
    result = call("plan", *args, "--json")
    assert result.exit_code == 0, result.stderr
    return Plan.from_json(result.stdout)


def refused(*args):
    """The one line on standard error, after what the module prints."""
    result = call(*args)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    lines = [s for s in result.stderr.splitlines() if s not in ("imported", "traced")]
    (line,) = lines
    assert line.startswith("mwc: ")
    return line


@pytest.mark.usefixtures("net")
def test_plan_prints_a_table_and_nothing_else():
    result = call("plan", "net.py:loss")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith("stage  source")
    assert "net.py:13 (loss)" in result.stdout
    assert "imported" in result.stderr
    assert "traced" in result.stderr


@pytest.mark.usefixtures("net")
@pytest.mark.parametrize(
    ("args", "stages"),
    [
        (["net.py:loss"], 5),
        (["net:loss"], 5),
        (["net:loss", "--inputs", "inputs"], 7),
        (["net:loss", "--inputs", "net:inputs"], 7),
        (["net:loss", *W, *X], 6),
        (["net:loss", *W, *X, "--arg", "scale=2.0"], 6),
        (["net:decorated", *W, *X, "--arg", "'tanh'"], 6),
    ],
)
def test_where_arguments_come_from(args, stages):
    assert len(planned(*args).stages) == stages


@pytest.mark.usefixtures("net")
def test_a_pair_is_arguments_and_keywords_where_names_fit():
    assert [v.name for v in planned("net:pair").values if v.kind == "data"] == [
        "batch['scale']"
    ]
    assert "scale" in [v.name for v in planned("net:loss").values]
    assert planned("net:single").name == "single"


@pytest.mark.usefixtures("net")
def test_options_of_the_command_line_override_the_decorator_s():
    given = [*W, *X, "--arg", "mode='tanh'"]
    assert planned("net:decorated", *given).extra_forwards == 0
    assert planned("net:decorated", *given, "--extra-forwards", 2).extra_forwards > 0.5
    args = ["net:decorated", *W, *X, "--arg", "'tanh'", "--static-argnums", "2"]
    both = planned(*args, "--argnums", "0,1", "--strategies", "stored")
    assert {s.strategy for s in both.stages} == {"stored"}
    assert "x" in [v.name for v in both.values if v.kind == "parameter"]
    assert "returned a loss of type" in refused("memory", *args, "--no-has-aux")


@pytest.mark.usefixtures("net")
@pytest.mark.parametrize("name", ["model.loss", "model.plain"])
def test_attributes_of_objects(name):
    result = call("check", f"net.py:{name}", "--arg", "f32[8,4]", "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["ok"] is True


def test_files_in_packages_and_beside_others(net):
    package = net / "outer" / "pack"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "part.py").write_text("from .other import single\n")
    (package / "other.py").write_text(NET)
    assert planned("outer/pack/part.py:single", "--arg", "f32[3]").name == "single"
    (net / "outer" / "types.py").write_text("from beside import single\n")
    (net / "outer" / "beside.py").write_text(NET)
    assert planned("outer/types.py:single", "--arg", "f32[3]").name == "single"
    assert sys.modules["types"].__file__ != str(net / "outer" / "types.py")


def test_memory_rows_bounds_and_a_plot(net):
    args = ["net:loss", "--method", "backprop", "--method", "moonwalk"]
    result = call("memory", *args, "--plot", "bars.svg")
    assert result.exit_code == 0, result.stderr
    assert "compiled memory in MiB, cpu" in result.stdout
    assert "<svg" in (net / "bars.svg").read_text()
    label = "moonwalk extra_forwards=0"
    args = ["net:loss", "--method", label, "--extra-forwards", "0", "--json"]
    (row,) = json.loads(call("memory", *args, "--target", "cpu").stdout)["rows"]
    assert row["method"] == label
    assert row["temp_bytes"] > 0


def test_timeline_and_pareto(net):
    args = ["net:loss", "--method", "moonwalk", "--json", "--plot", "live.svg"]
    found = json.loads(call("timeline", *args).stdout)
    assert [s["method"] for s in found["series"]] == ["moonwalk"]
    assert (net / "live.svg").stat().st_size > 1000
    args = ["net:loss", "--extra-forwards", 0, "--extra-forwards", 1]
    result = call("pareto", *args, "--json", "--plot", "curve.svg")
    points = json.loads(result.stdout)["points"]
    assert {p["asked"] for p in points} <= {0.0, 1.0}
    assert (net / "curve.svg").stat().st_size > 1000
    assert "predicted MiB" in call("pareto", *args).stdout


def test_report_is_one_file(net):
    args = ["net:loss", "-o", "all.html", "--method", "moonwalk", "--json"]
    found = json.loads(call("report", *args).stdout)
    assert found["bytes"] == (net / "all.html").stat().st_size > 10_000
    assert call("report", "net:loss", "-o", "all.pdf").exit_code == 2


def test_draw_writes_a_picture(net):
    options = ["--compare", "--expand", "--direction", "tb", "--json"]
    result = call("draw", "net:loss", "-o", "saved.svg", *options)
    found = json.loads(result.stdout)
    assert found["bytes"] == (net / "saved.svg").stat().st_size > 1000
    assert found["stages"] == 5
    assert "saved.svg" in call("draw", "net:loss", "-o", "saved.svg").stdout


@pytest.mark.usefixtures("net")
def test_check_takes_shapes_and_a_seed():
    result = call("check", "net:loss", *W, *X, "--seed", 3, "--batch-axis", 0)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith("gradients agree with backpropagation")


@pytest.mark.usefixtures("net", "wrong_program")
def test_gradients_that_differ_are_exit_code_1():
    result = call("check", "net:loss", *W, *X, "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["ok"] is False
    result = call("check", "net:loss", *W, *X)
    assert result.exit_code == 1
    assert "DIFFER" in result.stdout


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["plan", "net.py"], ["names no function", "FILE_OR_MODULE:FUNCTION"]),
        (["plan", "net.py:"], ["names no function"]),
        (["plan", "nett.py:loss"], ["there is no file 'nett.py'"]),
        (["plan", "nett:loss"], ["there is no module 'nett'"]),
        (["plan", "mwc.nett:loss"], ["there is no module 'mwc.nett'"]),
        (["plan", "net:los"], ["net has no 'los'", "it has loss"]),
        (["plan", "net:Model.los"], ["net has no 'Model.los'", "it has loss"]),
        (["plan", "net:number"], ["type int", "a function"]),
        (["plan", "net:loss", "--inputs", "input"], ["no 'input'", "inputs"]),
        (["plan", "net:loss", "--inputs", "x.py:f"], ["no file 'x.py'"]),
        (["plan", "bare.py:f"], ["takes w, x", "f_inputs", "--inputs", "--arg"]),
        (["plan", "net:loss", "--arg", "f33[2]"], ["'f33' at column 1"]),
        (["plan", "net:loss", *W], ["missing 1 required", "'x'"]),
        (["plan", "net:loss", *W, "--arg", "f32[8,9]"], ["net.py:13 (loss)"]),
        (["plan", "net:loss", "--argnums", "5"], ["argnums", "at: net.py:10 (loss)"]),
        (["plan", "net:loss", "--extra-forwards", "-1"], ["extra_forwards is -1.0"]),
        (["plan", "net:loss", "--strategies", "magic"], ["unknown strategy 'magic'"]),
        (["plan", "net:loss", "--tolerance", "2"], ["tolerance is 2.0"]),
        (["check", "net:loss", "--batch-axis", "5"], ["batch_axis=5"]),
        (["check", "net:vector", "--arg", "f32[3]"], ["one scalar", "net.py"]),
        (["memory", "net:loss", "--target", "h300"], ["'h300' is unknown", "'h200'"]),
        (["memory", "net:loss", "--target", "gpu"], ["uses the cpu here"]),
        (["memory", "net:loss", "--target", "x.pbtxt"], ["x.pbtxt cannot be read"]),
        (["memory", "net:loss", "--target", "h200"], [plugin.INSTALL]),
        (["memory", "net:loss", "--method", "magic"], ["'magic' is unknown"]),
        (["timeline", "net:loss", "--method", "magic"], ["'magic' is unknown"]),
        (["pareto", "net:loss", "--target", "h300"], ["'h300' is unknown"]),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(net, monkeypatch, args, words):
    monkeypatch.setenv("MWC_TARGET_DIR", str(net))
    monkeypatch.setattr(plugin, "in_environment", lambda: False)
    (net / "bare.py").write_text("def f(w, x): return (w * x).sum()\n")
    line = refused(*args)
    assert [w for w in words if w not in line] == []


@pytest.mark.usefixtures("net")
@pytest.mark.parametrize(
    ("args", "word"),
    [
        (["plan", "net:loss", "--inputs", "inputs", *W], "exclude each other"),
        (["plan", "net:loss", "--argnums", "0,x"], "'0,x' is not whole numbers"),
        (["plan", "net:loss", "--extra-forwards", "x"], "not a valid float"),
        (["memory", "net:loss", "--plot", "x.bmp"], ".svg, .png, .pdf"),
        (["draw", "net:loss", "-o", "nowhere/x.svg"], "no folder 'nowhere'"),
        (["draw", "net:loss"], "Missing option '-o'"),
        (["draw", "net:loss", "-o", "x.svg", "--direction", "UP"], "'UP'"),
        (["plan"], "Missing argument"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_imported(args, word):
    result = call(*args)
    assert result.exit_code == 2
    assert word in result.stderr
    assert result.stdout == ""
    assert word == "exclude each other" or "imported" not in result.stderr


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x = 1\nraise KeyError('w')", ["raised KeyError: 'w'", "at: bad.py:2"]),
        ("def f(:", ["raised SyntaxError", "at: bad.py:1"]),
        ("import no_such_thing", ["No module named 'no_such_thing'", "bad.py:1"]),
        ("import sys\nsys.exit('usage')", ["raised SystemExit: usage", "bad.py:2"]),
    ],
)
def test_a_module_that_raises_says_what_and_where(net, text, words):
    (net / "bad.py").write_text(text)
    for name in ("bad.py:f", "bad:f"):
        line = refused("plan", name)
        assert [w for w in words if w not in line] == []
        forget(net)


@pytest.mark.usefixtures("net")
@pytest.mark.parametrize("how", ["before", "after", "environment"])
def test_tracebacks_on_request(monkeypatch, how):
    args = ["plan", "net:loss", *W, "--arg", "f32[8,9]"]
    if how == "environment":
        monkeypatch.setenv("MWC_TRACEBACK", "1")
    else:
        args.insert(0 if how == "before" else len(args), "--traceback")
    result = call(*args)
    assert result.exit_code == 2
    assert "Traceback (most recent call last)" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("mwc: TypeError")


@pytest.mark.usefixtures("net")
def test_an_interruption_is_neither_result(monkeypatch):
    def interrupted(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("mwc.cli.subject.load", interrupted)
    assert call("plan", "net:loss").exit_code == running.INTERRUPTED
