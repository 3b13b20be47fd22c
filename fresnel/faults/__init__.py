"""Named corruptions of multi-view data: what the gate is tested and calibrated against.

Every fault is a plain function of one record (or of the whole set, or of what the set says of its
objects), a strength in (0, 1] whose meaning it states, and a random generator.  Nothing is
re-rendered.  Mistakes that are there or not hit a share of the records.
"""

from fresnel.faults.pictures import EXPECTED, FAULTS
from fresnel.faults.sets import (
    SET_FAULTS,
    UNPAIRED,
    Objects,
    Scene,
    apply,
    corrupt,
    on_background,
    said,
)

__all__ = [
    "EXPECTED",
    "FAULTS",
    "SET_FAULTS",
    "UNPAIRED",
    "Objects",
    "Scene",
    "apply",
    "corrupt",
    "on_background",
    "said",
]
