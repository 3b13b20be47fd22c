"""Networks: one image -> Gaussians (decoder), one image and two cameras -> a view (cvs)."""

from collections.abc import Callable, Iterable
from typing import Any

from fresnel.data.images import InputImages
from fresnel.render import Views
from fresnel.scene.cameras import Cameras

Predictor = Callable[[InputImages, Cameras], Views]
"""Input images (M) and target cameras (M, V) in, `Views` (M, V, H, W, ...) over black out."""


def check(config: Any, rules: Iterable[tuple[str, bool, str]]) -> None:
    """ValueError for the first (field, whether it will do, what is wanted) that won't do."""
    for name, holds, want in rules:
        if not holds:
            raise ValueError(f"{name}: got {getattr(config, name)!r}, want {want}")
