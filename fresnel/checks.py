"""The gate's checks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

Row = dict[str, Any]


@dataclass(frozen=True)
class Reason:
    """Why data was refused.

    Args:
        code: machine name, e.g. "pivot_offset".
        message: plain language with the numbers, no full stop.
        hint: what to do about it.
        values: the numbers and their thresholds.
        symptom_of: code of the reason that explains this one, if any.
    """

    code: str
    message: str
    hint: str
    values: dict[str, float] = field(default_factory=dict)
    symptom_of: str | None = None


@dataclass(frozen=True)
class GateConfig:
    """Thresholds."""


def measure(views: Any, background: Sequence[float], *, trust_input: bool = True):
    raise NotImplementedError


def unreadable(name: str, error: Exception) -> tuple[list[Row], Row]:
    raise NotImplementedError


def judge(rows: Sequence[Row], objects: Sequence[Row], config: GateConfig):
    raise NotImplementedError


def profile(rows: Sequence[Row]) -> list[Row]:
    return []
