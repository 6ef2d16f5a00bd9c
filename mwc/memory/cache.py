"""What compilers said before: one small JSON file a program, in a bounded folder.

The name of a file is a hash of all that decides its contents: the exported program,
the target, the versions of JAX and of the compiler, the flags. So nothing goes stale;
what is not asked for any more is the first to be deleted when the folder is full.

`MWC_CACHE_DIR` overrides where the folder is, `MWC_CACHE=0` switches it off. A folder
that cannot be written and a file that cannot be read are as if they were not there.

Limits: processes that write at once may each delete for their own file.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pathlib
import tempfile
from typing import Any

import platformdirs

BOUND = 64 * 2**20
"""Most bytes that the folder holds."""

# What is written has another meaning when this changes.
_FORMAT = 1


def folder() -> pathlib.Path | None:
    """Where the files are; None if the cache is switched off."""
    if os.environ.get("MWC_CACHE", "1").lower() in ("0", "off", "false"):
        return None
    override = os.environ.get("MWC_CACHE_DIR")
    if override:
        return pathlib.Path(override)
    return pathlib.Path(platformdirs.user_cache_dir("mwc", appauthor=False), "compiled")


def key(blob: bytes, **others: Any) -> str:
    """The name of a program's file.

    Args:
      blob: the exported program.
      **others: whatever else decides the result, as plain data.

    Returns:
      A hash in hexadecimal digits.
    """
    digest = hashlib.sha256(json.dumps([_FORMAT, others], sort_keys=True).encode())
    digest.update(b"\0" + blob)
    return digest.hexdigest()


def read(name: str) -> dict[str, Any] | None:
    """What was kept under a key; None if there is nothing that can be read."""
    place = folder()
    if place is None:
        return None
    file = place / f"{name}.json"
    try:
        found = json.loads(file.read_bytes())
        os.utime(file)  # the oldest are deleted first
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def write(name: str, value: dict[str, Any]) -> None:
    """Keeps a result, and deletes the oldest ones if the folder is full."""
    place = folder()
    if place is None:
        return
    with contextlib.suppress(OSError):
        place.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", dir=place, prefix=".fresh-", delete=False
        ) as fresh:
            json.dump(value, fresh)
        # Readers see a whole file or none.
        os.replace(fresh.name, place / f"{name}.json")
        _trim(place)


def _trim(place: pathlib.Path) -> None:
    known = []
    for file in place.glob("*.json"):
        with contextlib.suppress(OSError):  # another process deleted it
            status = file.stat()
            known.append((status.st_mtime, status.st_size, file))
    total = sum(size for _, size, _ in known)
    for _, size, file in sorted(known):
        if total <= BOUND:
            return
        file.unlink(missing_ok=True)
        total -= size
