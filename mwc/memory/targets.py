"""Targets: the machines that memory can be measured for.

"cpu" and "gpu" are what JAX finds; the named GPUs need not be there. For those XLA
is told what the device is by a `GpuTargetConfigProto` in text form, and compiles as
it would on the device, its timing-based autotuning left out. The figures are those
of the vendor's devices as XLA's own target descriptions give them
(`xla/backends/gpu/target_config/specs` of openxla/xla).

A GPU of the user's own is given as such a text, as a file of it, or as a `Target`.

Limits: the buffer sizes of kernels that autotuning would choose on the real device
can differ a little.
"""

from __future__ import annotations

import dataclasses
import math
import os
import pathlib
import re
from typing import Literal

import jax

from mwc.errors import MoonwalkTargetError


@dataclasses.dataclass(frozen=True)
class Target:
    """A machine to compile for.

    Attributes:
      name: what the report calls it.
      platform: JAX's lowering platform.
      config: text of a `GpuTargetConfigProto`; None compiles for real devices.
      topology: the devices, as "hosts x devices x 1"; "1x1x1" is as many as the
        shardings of the arguments ask for.
      attached: whether it is the backend of this very process.
    """

    name: str
    platform: Literal["cpu", "cuda", "rocm", "tpu"]
    config: str | None = None
    topology: str = "1x1x1"
    attached: bool = False

    @property
    def devices(self) -> int:
        """How many devices the topology has."""
        return math.prod(map(int, self.topology.split("x")))


_CONFIG = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152 shared_memory_per_core: {shared_per_core}
  shared_memory_per_block_optin: {shared_optin}
  threads_per_core_limit: 2048 core_count: {cores} fpus_per_core: {fpus}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth} l2_cache_size: {l2} clock_rate_ghz: {clock}
  device_memory_size: {memory}
  cuda_compute_capability {{ major: {major} }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
runtime_version {{ major: 12 minor: 8 patch: 0 }}
device_description_str: "{description}"
"""

_HOPPER = {
    "shared_per_core": 233472,
    "shared_optin": 232448,
    "cores": 132,
    "fpus": 128,
    "l2": 52428800,
    "clock": 1.98,
    "major": 9,
}

_GPUS = {
    "a100": {
        "shared_per_core": 167936,
        "shared_optin": 166912,
        "cores": 108,
        "fpus": 64,
        "bandwidth": 2039040000000,
        "l2": 41943040,
        "clock": 1.41,
        "memory": 85100068864,
        "major": 8,
        "description": "NVIDIA A100-SXM4-80GB",
    },
    "h100": {
        **_HOPPER,
        "bandwidth": 3352320000000,
        "memory": 84942979072,
        "description": "NVIDIA H100 80GB HBM3",
    },
    "h200": {
        **_HOPPER,
        "bandwidth": 4800000000000,
        "memory": 151397597184,
        "description": "NVIDIA H200 141GB HBM3e",
    },
    "b200": {
        "shared_per_core": 233472,
        "shared_optin": 232448,
        "cores": 148,
        "fpus": 128,
        "bandwidth": 7672320000000,
        "l2": 132644864,
        "clock": 1.965,
        "memory": 191514411008,
        "major": 10,
        "description": "NVIDIA B200",
    },
}

ABSENT = tuple(_GPUS)
"""Names of the GPUs that can be compiled for without having one."""

NAMES = ("cpu", "gpu", *ABSENT)
"""Every name that `resolve` knows."""


_SUFFIXES = (".txtpb", ".pbtxt", ".textproto")


def resolve(target: str | os.PathLike[str] | Target | None) -> Target:
    """The target of a name or description; None is the current backend.

    Args:
      target: one of `NAMES`; a `GpuTargetConfigProto` in text form, or a file that
        holds one (".txtpb", ".pbtxt", ".textproto"); a `Target`; or None.

    Returns:
      The target. One that is described is named by its `device_description_str`.

    Raises:
      MoonwalkTargetError: the name is unknown, the file cannot be read, or the
        attached GPU is not there.
    """
    if isinstance(target, Target):
        return target
    if target is not None and not isinstance(target, str | os.PathLike):
        raise MoonwalkTargetError(
            f"the target is {target!r}",
            expected="a text or a file: one of " + ", ".join(map(repr, NAMES)),
        )
    if isinstance(target, os.PathLike) or str(target).endswith(_SUFFIXES):
        return _described(_read(pathlib.Path(target or "")))
    if target is not None and "gpu_device_info" in target:
        return _described(target)
    if target in _GPUS:
        return Target(target, "cuda", _CONFIG.format(**_GPUS[target]))
    if target not in (None, "cpu", "gpu"):
        raise MoonwalkTargetError(
            f"the target {target!r} is unknown",
            expected="one of " + ", ".join(map(repr, NAMES)),
            remedy="for another GPU give its GpuTargetConfigProto as text or as a file",
        )
    here = _backend()
    if target in (None, here.name):
        return here
    if target == "cpu":
        return Target("cpu", "cpu")
    raise MoonwalkTargetError(
        f'the target "gpu" is the GPU that JAX uses, and JAX uses the {here.name} here',
        remedy="for a GPU that is not attached name one of "
        + ", ".join(map(repr, ABSENT)),
    )


def spread(target: Target, devices: int) -> Target:
    """A target with as many devices as the arguments are sharded over.

    Args:
      target: one that is not attached, or whose backend can be had in a process of
        its own.
      devices: the size of the mesh.

    Returns:
      The target to compile for.

    Raises:
      MoonwalkTargetError: the target has another number of devices, or is an attached
        accelerator, of which there are only those that are there.
    """
    if target.attached and target.platform != "cpu":
        raise MoonwalkTargetError(
            f"the arguments are sharded on an abstract mesh of {devices} devices, and "
            f"the target is the attached {target.name}",
            remedy="shard them on a mesh of jax.devices(), or name a target of "
            + ", ".join(map(repr, ("cpu", *ABSENT))),
        )
    if target.devices == 1:
        target = dataclasses.replace(target, topology=f"1x{devices}x1", attached=False)
    if devices not in (1, target.devices):
        raise MoonwalkTargetError(
            f"the arguments are sharded over {devices} devices",
            expected=f"the {target.devices} of the target {target.name} "
            f"({target.topology})",
        )
    return target


def _described(config: str) -> Target:
    found = re.search(r'device_description_str:?\s*"([^"]+)"', config)
    return Target(found[1] if found else "described GPU", "cuda", config)


def _read(file: pathlib.Path) -> str:
    try:
        return file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise MoonwalkTargetError(
            f"the target description {file} cannot be read: {error}",
            expected="a GpuTargetConfigProto in text form",
        ) from error


def _backend() -> Target:
    platform = jax.devices()[0].platform
    if platform == "gpu":
        version = getattr(jax.devices()[0].client, "platform_version", "")
        platform = "rocm" if "rocm" in version.lower() else "cuda"
    name = "gpu" if platform in ("cuda", "rocm") else platform
    return Target(name, platform, attached=True)
