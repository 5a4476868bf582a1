"""Figures with their targets, and quantiles, the same in every bench."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

Comparison = Literal["<=", ">=", "=="]
_COMPARE: dict[Comparison, Callable[[float, float], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "==": operator.eq,
}


@dataclass(frozen=True, slots=True)
class Figure:
    """One measured value and what it was to reach; ``target`` None: reported only."""

    name: str
    value: float | bool
    unit: str
    target: float | bool | None = None
    comparison: Comparison = "<="

    @property
    def met(self) -> bool | None:
        """Whether the target is reached, None without one."""
        return None if self.target is None else _COMPARE[self.comparison](self.value, self.target)

    def as_json(self) -> dict[str, object]:
        """Name, value, unit, target and met, as `jq '.figures[] | select(.met == false)'` wants them."""
        target = None if self.target is None else f"{self.comparison} {self.target}"
        return {"name": self.name, "value": self.value, "unit": self.unit, "target": target, "met": self.met}


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least this share of them does not exceed; 0 if there are none."""
    if not values:
        return 0.0
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]
