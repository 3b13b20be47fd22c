"""Gaussians and cameras in, pictures out: one `render` in front of three interchangeable backends.

``cpu`` (Numba) is the embedded default, ``gsplat`` the one for GPUs, ``reference`` (dense float64)
the truth that both are tested against. All three share gsplat 1.5.3's semantics: 0.3 px dilation,
contributions below 1/255 skipped, alpha clamped, a pixel finished at transmittance 1e-4.
"""

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

EPS2D = 0.3
"""Variance that `render` adds to every projected Gaussian, square pixels."""
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

    def __repr__(self) -> str:
        *batch, height, width, _ = self.rgb.shape
        count, cover = " x ".join(map(str, batch)) or "one", self.alpha.float().mean().item()
        return f"Views({count}, {width} x {height} px, {cover:.0%} covered, {self.rgb.device})"

    def _repr_html_(self) -> str:
        import fresnel  # which knows the rooms above this one

        return fresnel.preview(self)


def render(
    gaussians: Gaussians,
    cameras: Cameras,
    *,
    background: Tensor | Sequence[float] | None = None,
    backend: Backend = "auto",
    near: float = 0.01,
    eps2d: float = EPS2D,
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
    device, viewmats = gaussians.device, cameras.viewmats
    batch, views = tuple(gaussians.batch_shape), tuple(cameras.batch_shape)
    chosen: str = backend
    if backend == "auto":
        chosen = "gsplat" if device.type == "cuda" else "cpu"
    kind = {"cpu": "cpu", "gsplat": "cuda", "reference": device.type}.get(chosen)
    if kind is None:
        raise ValueError(f"backend: got {backend!r}, want 'auto', 'cpu', 'gsplat' or 'reference'")
    if device.type != kind:
        raise ValueError(f"backend: {chosen} renders {kind.upper()} tensors only, got {device}")
    if viewmats.device != device:
        raise ValueError(f"cameras: on {viewmats.device}, want {device}, where the Gaussians are")
    if chosen == "cpu" and (viewmats.requires_grad or cameras.Ks.requires_grad):
        raise ValueError("cameras: require gradients; detach them, or use 'reference' or 'gsplat'")
    if not near > 0 or not eps2d >= 0:
        raise ValueError(f"near, eps2d: got {near} and {eps2d}, want a depth > 0, a variance >= 0")
    if views[:-1] != batch or not views:
        raise ValueError(
            f"cameras: got batch shape {views}, want {(*batch, 'C')}: C of every scene"
        )
    colours = None
    if background is not None:
        colours = torch.as_tensor(background, dtype=gaussians.dtype, device=device)
        try:
            colours = colours.broadcast_to(*views, 3)
        except RuntimeError:
            want = f"want one broadcastable to {(*views, 3)}"
            raise ValueError(f"background: got shape {tuple(colours.shape)}, {want}") from None
    # imported late: Numba and gsplat take seconds
    rasterize = importlib.import_module(f"fresnel.render.{chosen}").rasterize
    return Views(*rasterize(gaussians, cameras, colours, near, eps2d))


class _Callable(types.ModuleType):
    """`from fresnel import render` gives this room, and `render(...)` calls its function."""

    def __call__(self, *args: Any, **options: Any) -> Views:
        return render(*args, **options)


sys.modules[__name__].__class__ = _Callable
