"""Errors and warnings of `mwc`: each names the user's line, the finding, the remedy."""

from __future__ import annotations


class MoonwalkError(Exception):
    """Base class of every error that `mwc` raises.

    Args:
      found: what was found, one sentence.
      expected: what would have been right, or None.
      remedy: what the user can do, or None.
      source: the user's place in the form "file.py:12 (function)", or None.
    """

    def __init__(
        self,
        found: str,
        *,
        expected: str | None = None,
        remedy: str | None = None,
        source: str | None = None,
    ):
        lines = [found]
        lines += [f"  expected: {expected}"] if expected else []
        lines += [f"  remedy: {remedy}"] if remedy else []
        lines += [f"  at: {source}"] if source else []
        super().__init__("\n".join(lines))
        self.source = source


class MoonwalkTypeError(MoonwalkError, TypeError):
    """An argument, output or option has the wrong type or dtype."""


class MoonwalkValueError(MoonwalkError, ValueError):
    """An option has a value outside its range."""


class MoonwalkTargetError(MoonwalkError):
    """A memory target is unknown, or cannot be compiled for on this machine."""


class MoonwalkUnsupportedError(MoonwalkError):
    """The function does something that the chosen options cannot serve."""


class MoonwalkDriftError(MoonwalkError):
    """A guard tripped: a rebuilt cotangent was not the one that it replaces."""
