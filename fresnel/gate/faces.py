"""Of heads: whether views beside an input that shows a face show one too."""

import math

import numpy as np

from fresnel.data import faces
from fresnel.data.records import ObjectViews
from fresnel.gate.checks import Check, Row, Seen

NEAR_DEG = 45.0
"""Up to this far from the input nearly every true view of a head shows its face."""
CHECK = Check(
    "faces_missing",
    {"faces": "min_faces"},
    f"inputs show faces, but only {{faces:.0%}} of the views up to {NEAR_DEG:.0f} degrees away do",
    "look at the views: are they of the back, of another object, blurred or scrambled?",
)


def measure_faces(
    views: ObjectViews, rgb: np.ndarray, alpha: np.ndarray, azimuth_deg: np.ndarray
) -> Row:
    """Share of the views near the input that show a face, `faces`; NaN where the input shows none,
    no view is near, or the detector is not installed.

    Args:
        rgb, alpha: of the views, over black.
        azimuth_deg: away from the input.
    """
    near = np.flatnonzero(np.abs(azimuth_deg) <= NEAR_DEG)
    if faces.missing() or not len(near):
        return {"faces": math.nan}
    if not faces.find(_over_white(views.input_rgb.numpy(), views.input_alpha.numpy())):
        return {"faces": math.nan}
    shown = [bool(faces.find(_over_white(rgb[i], alpha[i]))) for i in near]
    return {"faces": float(np.mean(shown))}


def note(seen: Seen) -> list[str]:
    """That faces were not looked for, where the data say that they are of heads."""
    why = faces.expected(seen.meta) and faces.missing()
    return [f"faces were not looked for: {why}"] if why else []


def _over_white(rgb: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    return np.minimum(rgb.astype(np.int16) + 255 - alpha[..., None], 255).astype(np.uint8)
