"""The options of `moonwalk_compile`, checked once, when the decorator is applied."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from mwc.errors import (
    MoonwalkTypeError,
    MoonwalkUnsupportedError,
    MoonwalkValueError,
)

STRATEGIES = ("moonwalk", "invert", "checkpoint", "stored")
DRIFT = ("recompute", "nan", "raise")

_INSTEAD = {
    "memory_budget": "leave it out; extra_forwards bounds the extra time",
    "on_drift": "leave it out for gradients that are NaN where a guard trips, or use "
    "'raise' for an error from value_and_grad",
}


@dataclass(frozen=True)
class Options:
    """What the user asks of the plan.

    Attributes:
      extra_forwards: the most forward passes beyond backpropagation's; None is 2.
      memory_budget: bytes of temporaries that the plan must fit in.
      strategies: the node kinds that the plan may use; None is all.
      policy: a policy of `jax.checkpoint_policies`, whose saves are forced.
      tolerance: the most error that rebuilding may add.
      on_drift: what a tripped guard gives.
      strict: an equation without a rule is an error instead of a row of the plan.
      plan: a plan made earlier.
    """

    extra_forwards: float | None = None
    memory_budget: int | str | None = None
    strategies: tuple[str, ...] | None = None
    policy: Callable[..., Any] | None = None
    tolerance: float | None = None
    on_drift: str | None = None
    strict: bool = False
    plan: Any = None

    def __post_init__(self) -> None:
        _check_extra(self.extra_forwards)
        _check_strategies(self.strategies)
        if self.policy is not None and not callable(self.policy):
            raise MoonwalkTypeError(
                f"policy is {self.policy!r}",
                expected="a policy of jax.checkpoint_policies, or None",
            )
        if self.on_drift is not None and self.on_drift not in DRIFT:
            raise MoonwalkValueError(
                f"on_drift is {self.on_drift!r}",
                expected="one of " + ", ".join(map(repr, DRIFT)),
            )
        if not isinstance(self.strict, bool):
            raise MoonwalkTypeError(f"strict is {self.strict!r}", expected="a bool")
        _check_tolerance(self.tolerance)
        self._refuse_unbuilt()

    def _refuse_unbuilt(self) -> None:
        unbuilt = {
            "memory_budget": self.memory_budget is not None,
            "plan": self.plan is not None,
            "on_drift": self.on_drift == "recompute",
        }
        for name, asked in unbuilt.items():
            if asked:
                raise MoonwalkUnsupportedError(
                    f"{name}={getattr(self, name)!r} is not implemented yet",
                    remedy=_INSTEAD.get(name, f"leave {name} out"),
                )


def make_options(strategies: Iterable[str] | None = None, **others: Any) -> Options:
    """Options from what the user wrote."""
    if isinstance(strategies, str):
        strategies = (strategies,)
    if strategies is not None and not isinstance(strategies, Iterable):
        raise MoonwalkTypeError(
            f"strategies is {strategies!r}",
            expected="some of " + ", ".join(map(repr, STRATEGIES)) + ", or None",
        )
    unknown = [name for name in others if name not in Options.__dataclass_fields__]
    if unknown:
        raise MoonwalkTypeError(
            f"there is no option {unknown[0]!r}",
            expected="one of " + ", ".join(Options.__dataclass_fields__),
        )
    if strategies is not None:
        # A set has no order of its own, and equal options must compare equal.
        strategies = tuple(sorted(strategies, key=repr))
    return Options(strategies=strategies, **others)


def _check_extra(extra: Any) -> None:
    if extra is None:
        return
    if isinstance(extra, bool) or not isinstance(extra, (int, float)):
        raise MoonwalkTypeError(
            f"extra_forwards is {extra!r}", expected="a number or None"
        )
    if math.isnan(extra) or extra < 0:
        raise MoonwalkValueError(
            f"extra_forwards is {extra!r}",
            expected="a number of forward passes that is not negative",
            remedy="0 stores what backpropagation stores, 1 or 2 save most memory",
        )


def _check_tolerance(tolerance: Any) -> None:
    if tolerance is None:
        return
    if isinstance(tolerance, bool) or not isinstance(tolerance, (int, float)):
        raise MoonwalkTypeError(
            f"tolerance is {tolerance!r}", expected="a number or None"
        )
    if not 0 < tolerance < 1:
        raise MoonwalkValueError(
            f"tolerance is {tolerance!r}",
            expected="a relative error between 0 and 1",
            remedy="leave it out for the precision of the program's own products",
        )


def _check_strategies(strategies: tuple[str, ...] | None) -> None:
    if strategies is None:
        return
    for name in strategies:
        if name not in STRATEGIES:
            raise MoonwalkValueError(
                f"unknown strategy {name!r}",
                expected="some of " + ", ".join(map(repr, STRATEGIES)),
            )
    if not strategies:
        raise MoonwalkValueError(
            "strategies is empty", remedy="leave it out to allow all of them"
        )
