"""The process that compiles for another platform than the caller's.

It reads requests from its standard input, one line of JSON each, followed by the
bytes of a program (`jax.export`), and answers each with one line of JSON: the
compiler's figures or the reason why there are none. What compilers print goes to
standard error. It ends with its input.

Source: DESIGN.md section 8. Wrapping an exported program in `jit` leaves XLA's buffer
assignment as it is for the program itself (a test compares the two).
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mwc.memory.figures import figures


def compile_exported(
    blob: bytes, target: dict[str, Any], axes: dict[str, int] | None, live: bool
) -> dict[str, Any]:
    """Compiles an exported program for a target.

    Args:
      blob: a serialised `jax.export.Exported` over flat arguments.
      target: the fields of `mwc.memory.targets.Target`.
      axes: sizes by name of the mesh that the arguments are sharded on, or None.
      live: whether to find the live range of every value too.

    Returns:
      What `figures` finds.
    """
    exported = export.deserialize(bytearray(blob))
    devices = _devices(target)
    shardings: list[Any] = [None] * len(exported.in_avals)
    if devices is not None or axes is not None:
        axes = axes or {"d": len(devices or jax.devices())}
        where = np.array(devices or jax.devices()).reshape(tuple(axes.values()))
        mesh = Mesh(where, tuple(axes))
        given = exported.in_shardings_jax(mesh)
        everywhere = NamedSharding(mesh, PartitionSpec())
        shardings = [everywhere if s is None else s for s in given]
    kept = set(exported.module_kept_var_idx)
    avals = exported.in_avals
    # `jit` drops arguments that nobody reads; the wrapper must drop them as well.
    reads = [i for i, a in enumerate(avals) if i in kept or _is_key(a.dtype)]

    def call(*args: Any) -> Any:
        given = dict(zip(reads, args, strict=True))
        full = [
            given[i] if i in given else jnp.zeros(a.shape, a.dtype)
            for i, a in enumerate(avals)
        ]
        return exported.call(*full)

    specs = [
        jax.ShapeDtypeStruct(avals[i].shape, avals[i].dtype, sharding=shardings[i])
        for i in reads
    ]
    traced = jax.jit(call).trace(*specs)
    platform = target["platform"]
    return figures(traced.lower(lowering_platforms=(platform,)), platform, live)


def _is_key(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jax.dtypes.prng_key)


def _devices(target: dict[str, Any]) -> Any:
    """The devices of a description; None for those of this process."""
    if target["config"] is None:
        return None
    topology = topologies.get_topology_desc(
        topology_name=target["name"],
        platform=target["platform"],
        topology=target["topology"],
        target_config=target["config"],
    )
    return topology.devices


def serve() -> None:
    """Answers requests until the input ends."""
    # Compilers write to file descriptor 1 as they like: keep the channel apart.
    channel = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    source = sys.stdin.buffer
    for line in iter(source.readline, b""):
        request = json.loads(line)
        blob = source.read(request["bytes"])
        try:
            asked = request["target"], request["mesh"], request["live"]
            reply = {"figures": compile_exported(blob, *asked)}
        except Exception as error:  # every failure is an answer, not an end
            reply = {"error": f"{type(error).__name__}: {error}"}
        channel.write(json.dumps(reply) + "\n")
        channel.flush()
        # One program after another: what the last one left must not pile up.
        jax.clear_caches()


if __name__ == "__main__":
    serve()
