"""Apart: runs small things while a program is planned, as if nothing were around.

Planning happens inside of the caller's trace, under the caller's mesh, settings and
guards; all of these belong to a thread.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from concurrent import futures
from typing import Any, TypeVar

import jax
import numpy as np

T = TypeVar("T")


def apart(fun: Callable[[], T]) -> T:
    """Calls a function where no mesh, trace or setting of the caller is in force.

    On the CPU, if JAX has it: a GPU rounds products of float32 to TF32.
    """
    wide = jax.dtypes.canonicalize_dtype(np.float64) == np.float64

    def call() -> T:
        quiet = jax.debug_nans(False), jax.debug_infs(False)
        guards = *quiet, jax.transfer_guard("allow"), jax.enable_x64(wide), _on_host()
        with contextlib.ExitStack() as stack:
            for one in guards:
                stack.enter_context(one)
            return fun()

    with futures.ThreadPoolExecutor(1) as pool:
        return pool.submit(call).result()


def _on_host() -> contextlib.AbstractContextManager[Any]:
    try:
        return jax.default_device(jax.local_devices(backend="cpu")[0])
    except RuntimeError:
        return contextlib.nullcontext()
