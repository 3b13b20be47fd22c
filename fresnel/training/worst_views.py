"""The views worth training on: all but those that the gate finds furthest from their input."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def pairs_of(data: Any, drop: float) -> Tensor | None:
    """`kept_pairs` of a `MultiViewDataset`, which the gate looks at once more; None where the share
    to leave out, `drop` in [0, 1), is 0."""
    if drop == 0:
        return None
    from fresnel.gate.verdict import validate  # and with it all that reads data

    return kept_pairs(data.names, data.views_per_object, validate(data).measurements, drop)


def kept_pairs(
    names: Sequence[str], views: int, measurements: Sequence[Mapping[str, Any]], drop: float
) -> Tensor:
    """The (record, view) pairs to train on, (P, 2), without the share `drop` of the worst views.

    A view is the worse the further its covered area, the light of what is covered and its detail
    are from those of its input (`view_fault`).  Views that the gate did not look at stay.

    Args:
        names: the records'.
        measurements: `Verdict.measurements` of the same data.

    Raises:
        ValueError: if `drop` is not in [0, 1).
    """
    if not 0 <= drop < 1:
        raise ValueError(f"drop: got {drop}, want a share in [0, 1)")
    row = {name: i for i, name in enumerate(names)}
    faults = torch.zeros(len(names), views, dtype=torch.float64)
    for seen in measurements:
        if seen["object"] in row:
            faults[row[seen["object"]], seen["view"]] = view_fault(seen)
    order = faults.flatten().argsort(stable=True)
    kept = order[: order.numel() - math.floor(drop * order.numel())].sort().values
    return torch.stack([kept // views, kept % views], dim=1)


def view_fault(seen: Mapping[str, Any]) -> float:
    """How far a view is from its input: sum of |ln ratio| of area, light and detail, each <= 3."""
    ratios = [seen.get(f"{name}_ratio") for name in ("coverage", "luminance", "detail")]
    logs = [abs(math.log(r)) if r is not None and r > 0 else 3.0 for r in ratios]
    return sum(min(value, 3.0) if math.isfinite(value) else 3.0 for value in logs)
