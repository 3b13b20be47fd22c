"""Bins of the azimuth between the input camera and a view."""

from __future__ import annotations

from collections.abc import Sequence

AZIMUTH_BINS = (("0-30", 30.0), ("30-60", 60.0), ("60-90", 90.0), ("90-180", 180.0))
"""Name and inclusive upper end, in degrees, of the bins of |azimuth relative to the input|."""


def azimuth_bin(azimuth_deg: float) -> str:
    """Name of the bin of |azimuth_deg|; rounded to 1e-3 first, so that 30.0001 is in 0-30."""
    distance = round(abs((azimuth_deg + 180.0) % 360.0 - 180.0), 3)
    return next(name for name, upper in AZIMUTH_BINS if distance <= upper)


def azimuths_label(azimuths_deg: Sequence[float]) -> str:
    """What a bin really holds, in degrees: "135, 180" of single azimuths, or "91 to 178".

    Views of an orbit stand at a few azimuths, and a bin that holds 45 alone says nothing of 31.
    """
    found = sorted({round(abs(azimuth)) for azimuth in azimuths_deg})
    if len(found) > 3:
        return f"{found[0]} to {found[-1]}"
    return ", ".join(f"{azimuth}" for azimuth in found)
