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

    A view is the worse the further the area that it covers, the light of that and its detail are
    from its input's: sum of |ln ratio|, each at most 3.  Views that the gate did not look at stay.

    Args:
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
            ratios = (seen[f"{what}_ratio"] for what in ("coverage", "luminance", "detail"))
            logs = [abs(math.log(r)) if 0 < r < math.inf else 3.0 for r in ratios]
            faults[row[seen["object"]], seen["view"]] = sum(min(log, 3.0) for log in logs)
    order = faults.flatten().argsort(stable=True)
    kept = order[: order.numel() - math.floor(drop * order.numel())].sort().values
    return torch.stack([kept // views, kept % views], dim=1)
