"""From a traced program to the compiler's figures, here or in a process of its own.

For the backend that the caller uses, the program is compiled as the caller would.
For any other target it is exported (traced and lowered here, with the caller's
settings) and handed to a worker process, so that neither the caller's platform nor
its environment changes. A worker starts on first use, serves all later programs of
its platform and ends with the caller; what it says is kept (`mwc.memory.cache`), so
that the same program is not compiled twice.

Arguments may carry shardings, on devices that are there or on an abstract mesh: the
target then has as many devices as the mesh, and bytes are those of one of them.

Limits: arrays that the function closes over travel inside the program; the shardings
of one program are on one mesh.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import export
from jax.sharding import AbstractMesh

from mwc.errors import MoonwalkTargetError
from mwc.memory import cache, plugin, targets
from mwc.memory.figures import FIGURES, figures
from mwc.memory.targets import Target


def compile_for(
    target: Target,
    fun: Callable[..., Any],
    specs: Sequence[Any],
    live: bool = False,
    fresh: bool = False,
) -> dict[str, Any]:
    """Compiles a flat function for a target.

    Args:
      target: where the program would run.
      fun: takes flat arrays; may be a `jax.jit` already.
      specs: their `ShapeDtypeStruct`s.
      live: whether to ask for the live range of every value too.
      fresh: whether to compile what was compiled before, too.

    Returns:
      The figures of `mwc.memory.figures.figures`. Those of a program that was
      compiled before come from the cache, the seconds that it took included.

    Raises:
      MoonwalkTargetError: the wheels are missing, the compiler failed, or the target
        has another number of devices than the shardings.
    """
    jitted = fun if hasattr(fun, "trace") else jax.jit(fun)
    mesh = _mesh(specs)
    if target.attached and not isinstance(mesh, AbstractMesh):
        return figures(jitted.trace(*specs).lower(), target.platform, live)
    target = targets.spread(target, 1 if mesh is None else mesh.size)
    path, flags = _setting(target)
    blob = _export(jitted, specs, target.platform)
    head = {
        "target": dataclasses.asdict(target),
        "mesh": None if mesh is None else dict(mesh.shape),
        "live": live,
    }
    name = cache.key(
        blob, **head, flags=flags, jax=jax.__version__, plugin=plugin.identity()
    )
    found = None if fresh else cache.read(name)
    if found is None or not found.keys() >= FIGURES.keys():
        found = _worker(path, flags).compile(blob, head)
        cache.write(name, found)
    return found


def _mesh(specs: Sequence[Any]) -> Any:
    """The mesh that the arguments are sharded on, None if they are not."""
    found = [spec.sharding.mesh for spec in specs if spec.sharding is not None]
    return found[0] if found else None


def check(target: Target) -> None:
    """Raises at once what compiling for the target would raise later."""
    if target.config is not None:
        plugin.search_path()


def _export(jitted: Any, specs: Sequence[Any], platform: str) -> bytes:
    """Serialises a program, whatever custom calls it makes.

    The compatibility check of `jax.export` is about keeping a file for later versions
    of JAX; here both ends are one installation.
    """
    allowed: set[str] = set()
    while True:
        checks = [export.DisabledSafetyCheck.custom_call(name) for name in allowed]
        maker = export.export(jitted, platforms=[platform], disabled_checks=checks)
        try:
            return bytes(maker(*specs).serialize())
        except ValueError as error:
            # The error lists some of the targets, as `custom_call @name`.
            found = set(re.findall(r"custom_call @([\w.$]+)", str(error)))
            if not found - allowed:
                raise
            allowed |= found


class _Worker:
    """A handle on one compiling process."""

    def __init__(self, path: Sequence[str], flags: str):
        self._lock = threading.Lock()
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as we do
        # The caller's own JAX settings are in the exported program already.
        kept = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
        inherited = [p or os.getcwd() for p in sys.path]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "mwc.memory.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env={
                **kept,
                "PYTHONPATH": os.pathsep.join([*path, *inherited]),
                "JAX_PLATFORMS": "cpu",
                "JAX_ENABLE_X64": "1",
                "XLA_FLAGS": flags,
            },
        )

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def compile(self, blob: bytes, head: dict[str, Any]) -> dict[str, Any]:
        name = head["target"]["name"]
        head = {"bytes": len(blob), **head}
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        with self._lock:
            try:
                stdin.write(json.dumps(head).encode() + b"\n" + blob)
                stdin.flush()
                line = stdout.readline()
            except BrokenPipeError:
                line = b""
        if not line:
            raise MoonwalkTargetError(
                f"the process that compiles for {name} ended: {self._last_words()}"
            )
        reply = json.loads(line)
        if "error" in reply:
            raise MoonwalkTargetError(f"compiling for {name} failed: {reply['error']}")
        return reply["figures"]

    def _last_words(self) -> str:
        self._process.wait()
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else f"exit status {self._process.returncode}"

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # it died with a request unread
            self._process.stdin.close()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._log.close()


_workers: dict[tuple[str, ...], _Worker] = {}
_workers_lock = threading.Lock()


def _setting(target: Target) -> tuple[list[str], str]:
    """What a worker for a target has on its path, and its flags for XLA."""
    flags = os.environ.get("XLA_FLAGS", "")
    if target.config is not None:
        return plugin.search_path(), f"{flags} --xla_gpu_autotune_level=0".strip()
    count = f"--xla_force_host_platform_device_count={target.devices}"
    return [], f"{flags} {count}".strip()


def _worker(path: Sequence[str], flags: str) -> _Worker:
    with _workers_lock:
        worker = _workers.get((flags, *path))
        if worker is None or not worker.alive:
            if worker is not None:
                worker.close()
            worker = _workers[flags, *path] = _Worker(path, flags)
        return worker


@atexit.register
def close_workers() -> None:
    """Ends the compiling processes; the next measurement starts them anew."""
    with _workers_lock:
        while _workers:
            _workers.popitem()[1].close()
