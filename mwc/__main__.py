"""`python -m mwc`, which is the command `mwc`: see `mwc.cli`."""

from __future__ import annotations

from mwc.cli.main import main

__all__ = ["main"]

if __name__ == "__main__":
    main(prog_name="mwc")
