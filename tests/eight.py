"""Tests on eight host devices, in a process of their own."""

import os
import subprocess
import sys

import jax
import pytest

_FLAG = "--xla_force_host_platform_device_count=8"


def eight(test):
    """Marks a test that needs the eight devices."""
    return pytest.mark.skipif(
        jax.device_count() < 8, reason="runs in the process of test_on_eight_devices"
    )(test)


outer = pytest.mark.skipif(jax.device_count() >= 8, reason="is the outer process")


def run_on_eight(path, *chosen):
    """Runs the tests of a file where there are eight devices, some by `chosen`."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} {_FLAG}"
    env = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "pytest", path, *chosen, "-q"]
    command += ["-p", "no:cacheprovider"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:]
