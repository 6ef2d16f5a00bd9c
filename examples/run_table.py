"""The programs of the memory table on the device at hand: time and peak bytes.

    python examples/run_table.py
    python examples/run_table.py --rows abs-64 --rows scan-abs-64 --repeats 20

Each program's gradient under backpropagation, under one level of `jax.checkpoint` (cut
where byte counts say, without a search), and under `moonwalk_compile`. Methods take
turns in one process; the ratio is of medians. Peak bytes are the allocator's, beyond
the arguments, each in a process of its own, which finds its program compiled: what a
compiler tries out would count too.
"""

import concurrent.futures
import json
import multiprocessing
import os
import pathlib
import statistics
import sys
import tempfile
import time

import click
import jax
import jax.numpy as jnp
import rich.box
import rich.console
import rich.table

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import mwc
from mwc.memory.baselines import Checkpointed
from tests import programs

METHODS = ("backprop", "checkpoint", "mwc")


def arguments(name, maker=None):
    """A program with its arguments, made on a device of a platform.

    Weights of orthogonal rows are orthogonal.
    """
    program = programs.ROWS[name]()
    with jax.default_device(jax.devices(maker)[0]):
        params, batch = program.concrete()
        if name in programs.SUBMERSIVE:
            near = jax.jit(mwc.constraints.orthogonal)
            axes = max(leaf.ndim for leaf in jax.tree.leaves(params))
            params = jax.tree.map(
                lambda p: near(p).astype(p.dtype) if p.ndim == axes else p, params
            )
    return program, jax.device_put((params, batch), jax.devices()[0])


def checkpointed(loss, args):
    """A loss with one level of `jax.checkpoint`."""
    leaves, tree = jax.tree.flatten(args)

    def flat(*leaves):
        return [loss(*jax.tree.unflatten(tree, leaves))]

    form = Checkpointed(flat, [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves])
    grid, (row, column) = form.layouts(1)
    run = form.fun(grid[row][column])
    return lambda *args: run(*jax.tree.leaves(args))[0]


def lowered(method, program, args):
    """The gradient under a method, to be compiled."""

    def loss(*args):
        found = program.loss(*args)
        return found[0] if program.has_aux else found

    forms = {
        "backprop": lambda: loss,
        "checkpoint": lambda: checkpointed(loss, args),
        "mwc": lambda: mwc.moonwalk_compile(loss),
    }
    return jax.jit(jax.grad(forms[method]())).lower(*args)


def cached(folder):
    """Keeps what is compiled, for the process that measures its bytes."""
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


def seconds(name, repeats, folder):
    """Of each method its times, seconds to compile, and how far it is from backprop."""
    cached(folder)
    found, runs, grads = {}, {}, {}
    program, args = arguments(name)
    for method in METHODS:
        form = lowered(method, program, args)
        start = time.perf_counter()
        runs[method] = form.compile()
        spent = time.perf_counter() - start
        grads[method] = jax.block_until_ready(runs[method](*args))
        temp = runs[method].memory_analysis().temp_size_in_bytes
        found[method] = {"compile_seconds": spent, "temp_bytes": temp, "seconds": []}
    for _ in range(repeats):
        for method in METHODS:
            start = time.perf_counter()
            jax.block_until_ready(runs[method](*args))
            found[method]["seconds"].append(time.perf_counter() - start)
    true = jax.tree.leaves(grads["backprop"])
    for method in METHODS:
        pairs = zip(jax.tree.leaves(grads[method]), true, strict=True)
        errors = [jnp.linalg.norm(a - b) / jnp.linalg.norm(b) for a, b in pairs]
        found[method]["error"] = float(jnp.max(jnp.stack(errors)))
    return found, jax.devices()[0].device_kind


def peak(method, name, folder):
    """The allocator's peak beyond the arguments; None where it does not say."""
    cached(folder)
    # What makes the arguments elsewhere does not count.
    program, args = arguments(name, "cpu")
    run = lowered(method, program, args).compile()
    jax.block_until_ready(args)
    device = jax.devices()[0]
    stats = device.memory_stats() or {}
    before, high = stats.get("bytes_in_use"), stats.get("peak_bytes_in_use")
    jax.block_until_ready(run(*args))
    after = (device.memory_stats() or {}).get("peak_bytes_in_use")
    if before is None or after == high:
        return None
    return after - before


def row(name, repeats, peaks):
    """Figures of one program, by method, and the device."""
    context = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(
        len(METHODS), mp_context=context, max_tasks_per_child=1
    )
    with pool, tempfile.TemporaryDirectory() as folder:
        found, device = pool.submit(seconds, name, repeats, folder).result()
        methods = METHODS if peaks else ()
        waiting = {m: pool.submit(peak, m, name, folder) for m in methods}
        for method, one in waiting.items():
            found[method]["peak_bytes"] = one.result()
    return found, device


def cells(figures):
    """One program's cells: of each method ratio, MiB at the peak and temporaries."""
    plain = statistics.median(figures["backprop"]["seconds"])
    for method in METHODS:
        one = figures[method]
        ratio = statistics.median(one["seconds"]) / plain
        high = one.get("peak_bytes")
        shown = "–" if high is None else f"{high / 2**20:,.0f}"
        first = f"{1e3 * plain:.1f} ms" if method == "backprop" else f"×{ratio:.2f}"
        yield f"{first}, {shown} ({one['temp_bytes'] / 2**20:,.0f})"
    yield f"{figures['mwc']['error']:.1e}"


@click.command()
@click.option("--rows", "names", multiple=True, type=click.Choice(list(programs.ROWS)))
@click.option("--repeats", default=20, show_default=True, help="times each is run")
@click.option("--peaks/--no-peaks", default=True, help="measure the allocator's peak")
@click.option("--json", "output", type=click.Path(), help="also write all figures")
def main(names, repeats, peaks, output):
    """Runs the programs and prints the table."""
    # Taken at once: an allocator that grows gives up to twice what is asked for. Three
    # processes share the device.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.25")
    table = rich.table.Table("program", *METHODS, "apart", box=rich.box.SIMPLE)
    everything, device = {}, ""
    with rich.console.Console(stderr=True).status("") as status:
        for name in names or programs.SUBMERSIVE:
            status.update(name)
            everything[name], device = row(name, repeats, peaks)
            table.add_row(name, *cells(everything[name]))
            if output:
                text = {"device": device, "jax": jax.__version__, "rows": everything}
                pathlib.Path(output).write_text(json.dumps(text, indent=1))
    table.title = (
        "time, peak MiB (compiled temporaries); how far mwc is from backprop\n"
        f"{device}, jax {jax.__version__}"
    )
    rich.console.Console(width=110).print(table)


if __name__ == "__main__":
    main()
