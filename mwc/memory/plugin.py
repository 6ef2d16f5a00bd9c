"""The compiler for GPUs that are not there: two wheels in a folder of their own.

`jax-cuda12-plugin` and `jax-cuda12-pjrt` hold XLA's GPU compiler, which needs neither
a GPU nor the CUDA libraries. In the user's environment they would make every
`import jax` print tracebacks about those libraries, so they are unpacked into a
private folder, one a jaxlib version, that only the compiling subprocess has on its
path. `MWC_TARGET_DIR` overrides where these folders are.

An environment that has the CUDA plugin anyhow (a machine with a GPU) is used as is.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

import platformdirs

from mwc.errors import MoonwalkTargetError

WHEELS = ("jax-cuda12-plugin", "jax-cuda12-pjrt")
INSTALL = "python -m mwc target install"


def root() -> pathlib.Path:
    """The folder that holds one folder for each jaxlib version."""
    override = os.environ.get("MWC_TARGET_DIR")
    if override:
        return pathlib.Path(override)
    return pathlib.Path(platformdirs.user_cache_dir("mwc", appauthor=False), "targets")


def folder() -> pathlib.Path:
    """Where the wheels for the installed jaxlib belong."""
    return root() / f"jaxlib-{version()}"


def version() -> str:
    """The installed version of jaxlib, which the wheels must have too."""
    return importlib.metadata.version("jaxlib")


def in_environment() -> bool:
    """Whether the user's own environment has a CUDA plugin."""
    return any(_installed(f"jax-cuda{n}-plugin") for n in (12, 13))


def identity() -> list[str | None]:
    """The versions of jaxlib and of whatever CUDA plugin the environment has."""
    names = [f"jax-cuda{n}-{part}" for n in (12, 13) for part in ("plugin", "pjrt")]
    return [version(), *map(_installed, names)]


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def is_complete(place: pathlib.Path) -> bool:
    """Whether a folder holds both wheels."""
    return all(
        any(place.glob(f"{wheel.replace('-', '_')}-*.dist-info")) for wheel in WHEELS
    )


def search_path() -> list[str]:
    """What the compiling process needs on its path.

    Raises:
      MoonwalkTargetError: the wheels are missing; its one line says how to get them.
    """
    if in_environment():
        return []
    if not is_complete(folder()):
        raise MoonwalkTargetError(
            f"compiling for a GPU that is not there needs two wheels: run `{INSTALL}`"
        )
    return [str(folder())]


def install() -> pathlib.Path:
    """Fetches the wheels through pip, unless they are there.

    They are unpacked beside their place and moved there whole, so that an interrupted
    run leaves nothing that looks complete.

    Returns:
      The folder.

    Raises:
      MoonwalkTargetError: pip failed; carries the end of what it said.
    """
    place = folder()
    if is_complete(place):
        return place
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.parent, prefix=".fetch-") as fresh:
        unpacked = pathlib.Path(fresh, "wheels")
        run = subprocess.run(
            [*_installer(), "--no-deps", "--target", str(unpacked), *_pins()],
            capture_output=True,
            text=True,
            check=False,
        )
        if run.returncode or not is_complete(unpacked):
            said = (run.stderr or run.stdout).strip().splitlines()[-3:]
            raise MoonwalkTargetError(
                f"pip could not install {' and '.join(_pins())}: {' '.join(said)}"
            )
        if place.exists():
            shutil.rmtree(place)
        unpacked.rename(place)
    return place


def remove() -> bool:
    """Deletes the wheels for the installed jaxlib; False if there were none."""
    if not folder().exists():
        return False
    shutil.rmtree(folder())
    return True


def _pins() -> list[str]:
    return [f"{wheel}=={version()}" for wheel in WHEELS]


def _installer() -> list[str]:
    # Environments made by uv have no pip of their own.
    if importlib.util.find_spec("pip") is None and shutil.which("uv"):
        return ["uv", "pip", "install", "--quiet"]
    quiet = ("--quiet", "--disable-pip-version-check")
    return [sys.executable, "-m", "pip", "install", *quiet]
