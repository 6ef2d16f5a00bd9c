"""Plans as JSON text, and back.

The records of `mwc._plan` field by field, under a format version. What is read is
checked against the fields and their types, so that a text that is no plan is told
apart from one of another version. Limits: a plan is data; giving one back to the
decorator is the decorator's business.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import types
import typing
from typing import Any

from mwc._plan import Plan
from mwc.errors import MoonwalkValueError

FORMAT = "mwc-plan"
VERSION = 1


def dump(plan: Plan) -> str:
    """The plan as JSON text."""
    head = {"format": FORMAT, "version": VERSION}
    return json.dumps(head | dataclasses.asdict(plan), indent=1)


def load(text: str) -> Plan:
    """The plan of a JSON text; see `Plan.from_json`."""
    try:
        found = json.loads(text)
    except (TypeError, ValueError) as error:
        raise MoonwalkValueError(
            f"the text of a plan is no JSON: {error}", expected=_EXPECTED
        ) from None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise MoonwalkValueError("the JSON text is no plan", expected=_EXPECTED)
    if found.get("version") != VERSION:
        raise MoonwalkValueError(
            f"the plan has format version {found.get('version')!r}",
            expected=f"version {VERSION}, which this version of mwc reads",
            remedy="plan again with loss.plan(...)",
        )
    fields = {k: v for k, v in found.items() if k not in ("format", "version")}
    return _read(Plan, fields, "plan")


_EXPECTED = "what plan.to_json() wrote"


def _read(kind: Any, found: Any, where: str) -> Any:
    """A value of an annotated type from plain data.

    Args:
      kind: a record, a tuple of one kind, a number, a text, or one of several.
      found: the data.
      where: its place in the text, for the error.
    """
    if isinstance(kind, type) and isinstance(found, dict):
        hints = _hints(kind)
        if set(found) != set(hints):
            odd = ", ".join(sorted(set(found) ^ set(hints)))
            raise MoonwalkValueError(
                f"{where} lacks fields, or has others: {odd}", expected=_EXPECTED
            )
        pairs = hints.items()
        return kind(**{k: _read(t, found[k], f"{where}.{k}") for k, t in pairs})
    if typing.get_origin(kind) is tuple and isinstance(found, list):
        inner = typing.get_args(kind)[0]
        return tuple(_read(inner, x, f"{where}[{i}]") for i, x in enumerate(found))
    plain = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    # A float may be written without a point; True is no number.
    good = (*plain, int) if float in plain else plain
    if type(found) in good:
        return float(found) if float in plain and found is not None else found
    raise MoonwalkValueError(
        f"{where} is {found!r:.60}", expected=f"{kind}; {_EXPECTED}"
    )


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind)
