"""Gaussians and cameras in, pictures out: one `render` in front of three interchangeable backends.

``cpu`` (Numba) is the embedded default, ``gsplat`` the one for GPUs, ``reference`` (dense float64)
the truth that both are tested against. All three share gsplat 1.5.3's semantics: 0.3 px dilation,
contributions below 1/255 skipped, alpha clamped, a pixel finished at transmittance 1e-4.
"""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fresnel.scene.cameras import Cameras
from fresnel.scene.gaussians import Gaussians

__all__ = ["Views", "render"]

Backend = Literal["auto", "cpu", "gsplat", "reference"]


@dataclass(frozen=True)
class Views:
    """Rendered images, channel last.

    Args:
        rgb: sRGB composited over the background that was passed, shape (..., C, H, W, 3).
        alpha: coverage in [0, 1], shape (..., C, H, W, 1).
        depth: expected z-depth of what covers the pixel, sum(w z) / sum(w), in world units, 0 where
            nothing does, shape (..., C, H, W, 1).
    """

    rgb: Tensor
    alpha: Tensor
    depth: Tensor


def render(
    gaussians: Gaussians,
    cameras: Cameras,
    *,
    background: Tensor | Sequence[float] | None = None,
    backend: Backend = "auto",
    near: float = 0.01,
    eps2d: float = 0.3,
) -> Views:
    """Render scenes from cameras, differentiably.

    Gradients reach means, quaternions, scales, opacities, colours and the background; camera poses
    and intrinsics too, except in the ``cpu`` backend, which refuses cameras that require them, and
    to differentiate a gradient again.

    Args:
        gaussians: scenes of batch shape (...), usually () or (B,). Colours may be RGB or spherical
            harmonics up to degree 3.
        cameras: batch shape (..., C): C views of every scene.
        background: sRGB to composite over, broadcast to (..., C, 3); None is black.
        backend: "auto" takes gsplat for CUDA tensors and cpu otherwise.
        near: what has a smaller z-depth is culled, world units.
        eps2d: variance added to both axes of every projected Gaussian, px^2.

    Returns:
        Views of batch shape (..., C), float32 (float64 from the reference).

    Raises:
        ValueError: for shapes, devices or parameters that do not fit, and for NaN or infinite
            Gaussians (cpu and reference; on a GPU the check would stall the queue).
    """
    chosen = _choose(gaussians, cameras, backend)
    if not near > 0:
        raise ValueError(f"near: got {near}, want a depth > 0")
    if not eps2d >= 0:
        raise ValueError(f"eps2d: got {eps2d}, want a variance >= 0 in px^2")
    batch, views = gaussians.batch_shape, tuple(cameras.batch_shape)
    if views[:-1] != tuple(batch) or len(views) != len(batch) + 1:
        raise ValueError(
            f"cameras: got batch shape {views}, want {(*batch, 'C')}: C views of every scene"
        )
    # imported late: Numba and gsplat take seconds
    rasterize = importlib.import_module(f"fresnel.render.{chosen}").rasterize
    backdrop = _backdrop(background, views, gaussians)
    return Views(*rasterize(gaussians, cameras, backdrop, near, eps2d))


def _choose(gaussians: Gaussians, cameras: Cameras, backend: str) -> str:
    """Resolve "auto" and refuse what the chosen backend cannot do."""
    device, viewmats = gaussians.device, cameras.viewmats
    if viewmats.device != device:
        raise ValueError(f"cameras: on {viewmats.device}, want {device}, where the Gaussians are")
    if backend == "auto":
        backend = "gsplat" if device.type == "cuda" else "cpu"
    if backend not in ("cpu", "gsplat", "reference"):
        raise ValueError(f"backend: got {backend!r}, want 'auto', 'cpu', 'gsplat' or 'reference'")
    kind = {"gsplat": "cuda", "cpu": "cpu"}.get(backend, device.type)
    if device.type != kind:
        raise ValueError(f"backend: {backend} renders {kind.upper()} tensors only, got {device}")
    if backend == "cpu" and (viewmats.requires_grad or cameras.Ks.requires_grad):
        raise ValueError(
            "cameras: require gradients, which the cpu backend does not have; "
            "detach them, or use 'reference' or 'gsplat'"
        )
    return backend


def _backdrop(
    background: Tensor | Sequence[float] | None, views: tuple[int, ...], gaussians: Gaussians
) -> Tensor | None:
    """Background colours as (..., C, 3), or None for black."""
    if background is None:
        return None
    colors = torch.as_tensor(background, dtype=gaussians.dtype, device=gaussians.device)
    try:
        return colors.broadcast_to(*views, 3)
    except RuntimeError:
        raise ValueError(
            f"background: got shape {tuple(colors.shape)}, want one broadcastable to {(*views, 3)}"
        ) from None


class _Callable(types.ModuleType):
    """`from fresnel import render` gives this room, and `render(...)` calls its function."""

    def __call__(self, *args: Any, **options: Any) -> Views:
        return render(*args, **options)


sys.modules[__name__].__class__ = _Callable
