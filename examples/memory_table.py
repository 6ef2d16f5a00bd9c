"""The memory table: compiled temporary bytes of each program under each method.

    python examples/memory_table.py --target h200
    python examples/memory_table.py --rows scan-relu-64 --rows lstm-1024 --extra 1

Nothing is run, so the GPU need not be there (`python -m mwc target install` once).
Each cell is MiB of temporaries of the compiled `jax.grad`, with compile seconds.
"""

import json
import pathlib
import sys

import click
import jax
import rich.box
import rich.console
import rich.table

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from mwc.memory import measure
from tests import programs

BASELINES = ("backprop", "checkpoint", "checkpoint-2")


def ours(program, extra):
    """The decorated loss; what fails in decorating fails in its own column."""

    def loss(*args):
        import mwc

        decorated = mwc.moonwalk_compile(
            program.loss, extra_forwards=extra, has_aux=program.has_aux
        )
        return decorated(*args)

    return loss


def table_row(name, target, extras, methods, say):
    """The reports' rows of one program, by method."""
    program = programs.ROWS[name]()
    decorated = {f"extra {extra:g}": ours(program, extra) for extra in extras}
    columns = [*BASELINES, *decorated]
    report = measure(
        program.loss,
        decorated,
        (program.params, program.batch),
        target=target,
        has_aux=program.has_aux,
        methods=[m for m in columns if not methods or m in methods],
        value=False,
        progress=lambda method: say(f"{name}: {method}"),
    )
    return report.to_dict()["rows"]


def cell(row):
    """MiB and compile seconds, or a dash."""
    if row is None or row["temp_bytes"] is None:
        return "–"
    return f"{row['temp_bytes'] / 2**20:,.0f} ({row['compile_seconds']:.1f} s)"


@click.command()
@click.option("--target", default="h200", show_default=True, help="cpu, h200, ...")
@click.option("--rows", "names", multiple=True, type=click.Choice(list(programs.ROWS)))
@click.option(
    "--extra", "extras", multiple=True, type=float, help="extra_forwards; 1 and 2"
)
@click.option("--methods", multiple=True, help="columns to measure; all by default")
@click.option("--json", "as_json", is_flag=True, help="print JSON")
def main(target, names, extras, methods, as_json):
    """Measures the programs and prints the table."""
    console = rich.console.Console(stderr=True)
    extras = extras or (1.0, 2.0)
    columns = [*BASELINES, *(f"extra {extra:g}" for extra in extras)]
    table = rich.table.Table(
        *("program", *columns),
        title=f"temp MiB (compile time), {target}, jax {jax.__version__}",
        box=rich.box.SIMPLE,
    )
    found, reasons = {}, []
    for name in names or programs.ROWS:
        with console.status(name) as status:
            try:
                rows = table_row(name, target, extras, methods, status.update)
            except Exception as error:  # one program must not cost the others
                rows = []
                reasons.append(f"{name}: {type(error).__name__}: {error}")
        found[name] = rows
        by_method = {row["method"]: row for row in rows}
        reasons += [
            f"{name}, {row['method']}: {row['note']}"
            for row in rows
            if row["temp_bytes"] is None
        ]
        table.add_row(name, *(cell(by_method.get(column)) for column in columns))
    if as_json:
        head = {"target": target, "jax": jax.__version__}
        print(json.dumps({**head, "programs": found, "failures": reasons}, indent=1))
        return
    rich.console.Console(width=110).print(table)
    for reason in reasons:
        print(reason)


if __name__ == "__main__":
    main()
