"""What notebook 04 still calls."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from fresnel.report.params import parameters_of as parameters  # noqa: F401


def usefulness(trained: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Loss histories and held-out luminance by azimuth bin of training runs, for one figure."""
    series = {}
    for role, run in trained.items():
        metrics = run["metrics"]
        bins = [entry for entry in metrics["summaries"]["cvs"] if entry["bin"] != "all"]
        steps, loss = zip(*metrics["loss_history"], strict=True)
        series[role] = {
            "steps": steps,
            "loss": loss,
            "bins": [entry["bin"] for entry in bins],
            "luminance_ratio": [entry["luminance_ratio"] for entry in bins],
        }
    return series


def crop_rows(sheet: Any, rows: int, *, row_px: int = 134) -> np.ndarray:
    """The upper rows of a contact sheet that was saved as a picture, as an RGB array."""
    array = np.asarray(sheet.convert("RGB"))
    return array[: 24 + rows * row_px]


def restore_nan(value: Any) -> Any:
    """What JSON could not say (null) back to NaN, through dicts and lists."""
    if isinstance(value, dict):
        return {key: restore_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [restore_nan(item) for item in value]
    return float("nan") if value is None else value
