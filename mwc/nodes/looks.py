"""Looks: rows of signs go through the weights of a run as sweep R does.

What they come to tells how often sweep V refines (`polish.times_of`). A weight by which
sweep R multiplies is at hand; looked at apart, each would be read once more. Source:
`mwc.nodes.polish`. Limits: weights that are arguments.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mwc.nodes.claims import Claim, Group
from mwc.nodes.polish import signs_of, times_of
from passes.graph import Var

Array = Any


class Looks:
    """The looks at the weights of a run, last stage first.

    Attributes:
      times: by stage and weight, `times_of` those that have been looked at.
    """

    def __init__(self, batches: Sequence[Sequence[Group]]) -> None:
        self._batches = [[pair for (pair,) in batch] for batch in batches]
        self._places = {
            (i, of.var): place
            for place, batch in enumerate(self._batches)
            for i, of in batch
        }
        self._rows: dict[int, Array] = {}
        self.times: dict[tuple[int, Var], Array] = {}

    def rows(self, i: int, claims: Sequence[Claim], token: Array) -> list[Array | None]:
        """What goes through the weight of each claim of a stage; None through some.

        Args:
          i: the stage.
          claims: its claims.
          token: what must be there before the first rows are.
        """
        found: list[Array | None] = []
        for of in claims:
            place = self._places.get((i, of.var))
            if place is not None and place not in self._rows:
                self._rows[place] = signs_of(of, token)
            found.append(None if place is None else self._rows[place])
        return found

    @property
    def flying(self) -> list[Array]:
        """The rows between two stages."""
        return [*self._rows.values()]

    @flying.setter
    def flying(self, rows: Sequence[Array]) -> None:
        self._rows = dict(zip(self._rows, rows, strict=True))

    def passed(
        self, i: int, claims: Sequence[Claim], rows: Sequence[Array | None]
    ) -> None:
        """Takes what `rows` have become."""
        for of, found in zip(claims, rows, strict=True):
            if found is None:
                continue
            place = self._places[i, of.var]
            self._rows[place], batch = found, self._batches[place]
            if batch[0] == (i, of):
                times = times_of(self._rows.pop(place), of, len(batch))
                self.times |= {(j, one.var): times for j, one in batch}
