"""Targets: what they are, and that compiling for one leaves the caller alone."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mwc.errors import MoonwalkTargetError
from mwc.memory import compiling, measure, plugin, targets
from tests import programs

WORKER_CPU = targets.Target("cpu", "cpu")
REQUEST = {"target": dataclasses.asdict(WORKER_CPU), "mesh": None, "live": False}


@pytest.fixture
def wheels():
    if not (plugin.in_environment() or plugin.is_complete(plugin.folder())):
        pytest.skip(f"the wheels are missing: run `{plugin.INSTALL}`")


@pytest.fixture(scope="module", autouse=True)
def _end_workers():
    yield
    compiling.close_workers()


def spec(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def python(code, **env):
    """What a fresh interpreter prints, and what it complains about."""
    kept = {k: v for k, v in os.environ.items() if k != "JAX_PLATFORMS"}
    kept["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**kept, **env},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout, run.stderr


def test_unknown_target_lists_the_known():
    with pytest.raises(MoonwalkTargetError, match="'h2' is unknown") as caught:
        targets.resolve("h2")
    assert all(repr(name) in str(caught.value) for name in targets.NAMES)


def test_attached_gpu_that_is_not_there():
    with pytest.raises(MoonwalkTargetError, match="JAX uses the cpu here"):
        targets.resolve("gpu")


def test_current_backend_and_cpu_are_compiled_for_here():
    assert targets.resolve(None).attached
    assert targets.resolve("cpu").attached
    assert not targets.resolve("h200").attached


def test_missing_wheels_are_one_line_that_says_what_to_run(monkeypatch, tmp_path):
    monkeypatch.setenv("MWC_TARGET_DIR", str(tmp_path))
    monkeypatch.setattr(plugin, "in_environment", lambda: False)
    with pytest.raises(MoonwalkTargetError) as caught:
        measure(jnp.sum, None, (spec(3),), target="h200")
    assert str(caught.value) == (
        "compiling for a GPU that is not there needs two wheels:"
        " run `python -m mwc target install`"
    )


def test_the_override_decides_where_the_wheels_are(monkeypatch, tmp_path):
    monkeypatch.setenv("MWC_TARGET_DIR", str(tmp_path))
    assert plugin.folder() == tmp_path / f"jaxlib-{plugin.version()}"
    monkeypatch.delenv("MWC_TARGET_DIR")
    assert plugin.root().parts[-2:] == ("mwc", "targets")


def test_worker_finds_what_the_same_backend_finds_here():
    program = programs.dense(programs.leaky, 6, 32, 64)
    args = (program.params, program.batch)
    here = measure(program.loss, None, args, tries=2)
    there = measure(program.loss, None, args, target=WORKER_CPU, tries=2)
    for a, b in zip(here.rows, there.rows, strict=True):
        assert (a.method, a.temp_bytes, a.flops) == (b.method, b.temp_bytes, b.flops)
        assert a.argument_bytes == b.argument_bytes


def test_worker_keeps_the_callers_settings():
    with jax.enable_x64(True):
        figures = compiling.compile_for(
            WORKER_CPU, lambda x, k: x @ x, [spec(8, 8, dtype=jnp.float64), spec(3)]
        )
    assert figures["output_bytes"] == 8 * 8 * 8
    assert figures["argument_bytes"] == 8 * 8 * 8  # nobody reads the other


def test_worker_takes_keys_integers_and_empty_arrays():
    def fun(key, unread, count, empty):
        return jax.random.normal(key, (4,)) * count + empty.sum()

    key = jax.ShapeDtypeStruct((), jax.random.key(0).dtype)
    specs = [key, key, spec(dtype=jnp.int32), spec(0, 3)]
    assert compiling.compile_for(WORKER_CPU, fun, specs)["output_bytes"] == 16


def test_worker_that_dies_is_reported_and_replaced():
    compiling.compile_for(WORKER_CPU, jnp.sin, [spec(3)])
    worker = compiling._worker(*compiling._setting(WORKER_CPU))
    worker._process.kill()
    worker._process.wait()
    with pytest.raises(MoonwalkTargetError, match="ended"):
        worker.compile(b"", REQUEST)
    assert compiling.compile_for(WORKER_CPU, jnp.sin, [spec(3)])["output_bytes"] == 12


def test_worker_survives_a_program_that_it_cannot_read():
    compiling.compile_for(WORKER_CPU, jnp.sin, [spec(3)])
    worker = compiling._worker(*compiling._setting(WORKER_CPU))
    with pytest.raises(MoonwalkTargetError, match="compiling for cpu failed"):
        worker.compile(b"nonsense" * 100, REQUEST)
    assert worker.alive


def test_importing_prints_nothing_and_starts_no_backend():
    code = "import jax, mwc, mwc.memory; assert 'jax_plugins' not in str(jax.__path__)"
    assert python(code) == ("", "")


DIRECT = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from mwc.memory import targets
from tests import programs
target = targets.resolve("h200")
described = topologies.get_topology_desc(
    topology_name="h200", platform="cuda", topology="1x1x1",
    target_config=target.config)
mesh = Mesh(np.array(described.devices), ("d",))
place = NamedSharding(mesh, PartitionSpec())
program = programs.dense(programs.leaky, 16, 256, 1024)
args = jax.tree.map(
    lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place),
    (program.params, program.batch))
temp = []
for fun in (program.loss, jax.checkpoint(program.loss)):
    traced = jax.jit(jax.grad(fun)).trace(*args)
    compiled = traced.lower(lowering_platforms=("cuda",)).compile()
    temp.append(compiled.memory_analysis().temp_size_in_bytes)
print(json.dumps(temp))
"""


@pytest.mark.usefixtures("wheels")
def test_exporting_leaves_the_buffer_assignment():
    env = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_gpu_autotune_level=0"}
    root = str(pathlib.Path(__file__).parents[1])
    path = [*plugin.search_path(), root, *(p for p in sys.path if p)]
    env["PYTHONPATH"] = os.pathsep.join(path)
    out, _ = python(DIRECT, **env)
    program = programs.dense(programs.leaky, 16, 256, 1024)
    args = (program.params, program.batch)
    ours = jax.checkpoint(program.loss)
    report = measure(
        *(program.loss, ours, args),
        methods=["backprop", "moonwalk"],
        target="h200",
        value=False,
    )
    found = [row.temp_bytes for row in report.rows]
    np.testing.assert_allclose(found, json.loads(out), rtol=0, atol=4096)


@pytest.mark.usefixtures("wheels")
@pytest.mark.parametrize("name", targets.ABSENT)
def test_every_absent_gpu_compiles_factorisations_and_convolutions(name):
    def fun(x, images, kernel):
        q, r = jnp.linalg.qr(x)
        solved = jax.scipy.linalg.solve_triangular(r, q)
        y = jax.lax.conv(images, kernel, (1, 1), "SAME")
        return solved.sum() + y.sum()

    specs = [spec(16, 16), spec(2, 3, 8, 8), spec(4, 3, 3, 3)]
    figures = compiling.compile_for(targets.resolve(name), fun, specs)
    assert figures["temp_bytes"] > 0
    assert figures["peak_bytes"] > figures["argument_bytes"]


@pytest.mark.usefixtures("wheels")
def test_the_callers_platform_is_left_alone():
    before = dict(os.environ)
    compiling.compile_for(targets.resolve("h200"), jnp.sin, [spec(3)])
    assert dict(os.environ) == before
    assert {d.platform for d in jax.devices()} == {"cpu"}
