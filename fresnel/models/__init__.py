"""Networks: one image -> Gaussians (decoder), one image and two cameras -> a view (cvs)."""

from collections.abc import Callable
from typing import Any

from fresnel.data.images import InputImages
from fresnel.render import Views
from fresnel.scene.cameras import Cameras

Predictor = Callable[[InputImages, Cameras], Views]
"""Input images (M) and target cameras (M, V) in, `Views` (M, V, H, W, ...) over black out."""


def check(config: Any, name: str, holds: bool, want: str) -> None:
    """ValueError for a field of a configuration that will not do."""
    if not holds:
        raise ValueError(f"{name}: got {getattr(config, name)!r}, want {want}")
