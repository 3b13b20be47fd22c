"""Gaussians and cameras in, pictures out: one `render` in front of three interchangeable backends.

``cpu`` (Numba) is the embedded default, ``gsplat`` the one for GPUs, ``reference`` (dense float64)
the truth that both are tested against. All three share gsplat 1.5.3's semantics: 0.3 px dilation,
contributions below 1/255 skipped, alpha clamped, a pixel finished at transmittance 1e-4.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
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
    far: float = 1e10,
    eps2d: float = 0.3,
    alpha_max: float = 0.999,
    packed: bool | None = None,
    threads: int | None = None,
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
        near, far: z-depths outside [near, far] are culled, world units.
        eps2d: variance added to both axes of every projected Gaussian, px^2.
        alpha_max: largest opacity of one Gaussian at one pixel, in (0, 1). gsplat has 0.999 built
            in and is refused with any other value.
        packed: gsplat only: keep just the visible (Gaussian, view) pairs. Saves memory where most
            are culled, costs time where few are. None means False.
        threads: cpu only: how many to use; None takes NUMBA_NUM_THREADS, or every core. The result
            has the same bits for any number.

    Returns:
        Views of batch shape (..., C), float32 (float64 from the reference).

    Raises:
        ValueError: for shapes, devices or parameters that do not fit, and for NaN or infinite
            Gaussians (cpu and reference; on a GPU the check would stall the queue).
    """
    chosen = _choose(gaussians, cameras, backend, alpha_max)
    if not 0 < alpha_max < 1:
        raise ValueError(f"alpha_max: got {alpha_max}, want a number in (0, 1)")
    if not 0 < near < far:
        raise ValueError(f"near, far: got {near} and {far}, want 0 < near < far")
    if not eps2d >= 0:
        raise ValueError(f"eps2d: got {eps2d}, want a variance >= 0 in px^2")
    if threads is not None and threads < 1:
        raise ValueError(f"threads: got {threads}, want at least 1")
    batch, views = gaussians.batch_shape, tuple(cameras.batch_shape)
    if views[:-1] != tuple(batch) or len(views) != len(batch) + 1:
        raise ValueError(
            f"cameras: got batch shape {views}, want {(*batch, 'C')}: C views of every scene"
        )
    backdrop = _backdrop(background, views, gaussians)

    if chosen == "cpu":
        from fresnel.render import cpu

        images = cpu.rasterize(
            gaussians, cameras, backdrop,
            near=near, far=far, eps2d=eps2d, alpha_max=alpha_max, threads=threads,
        )  # fmt: skip
    elif chosen == "gsplat":
        from fresnel.render import gsplat as gpu

        images = gpu.rasterize(
            gaussians, cameras, backdrop, near=near, far=far, eps2d=eps2d, packed=bool(packed)
        )
    else:
        images = _reference(gaussians, cameras, backdrop, near, far, eps2d, alpha_max)
    return Views(*images)


def _choose(gaussians: Gaussians, cameras: Cameras, backend: str, alpha_max: float) -> str:
    """Resolve "auto" and refuse what the chosen backend cannot do."""
    device = gaussians.device
    if cameras.viewmats.device != device:
        raise ValueError(
            f"cameras: on {cameras.viewmats.device}, want {device}, where the Gaussians are"
        )
    if backend == "auto":
        backend = "gsplat" if device.type == "cuda" else "cpu"
    if backend not in ("cpu", "gsplat", "reference"):
        raise ValueError(f"backend: got {backend!r}, want 'auto', 'cpu', 'gsplat' or 'reference'")
    if backend == "gsplat" and device.type != "cuda":
        raise ValueError(f"backend: gsplat renders CUDA tensors only, got tensors on {device}")
    if backend == "gsplat" and alpha_max != 0.999:
        raise ValueError(f"alpha_max: got {alpha_max}; gsplat has 0.999 built in, want that")
    if backend == "cpu" and device.type != "cpu":
        raise ValueError(f"backend: cpu renders CPU tensors only, got tensors on {device}")
    if backend == "cpu" and (cameras.viewmats.requires_grad or cameras.Ks.requires_grad):
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


def one_batch(
    gaussians: Gaussians, cameras: Cameras, background: Tensor | None
) -> tuple[list[Tensor], Tensor | None]:
    """Everything with one batch dimension, for backends that want B scenes and C views of each.

    Returns:
        means, quats, scales, opacities and colors (B, N, ...), viewmats (B, C, 4, 4) and Ks
        (B, C, 3, 3); the background (B, C, 3) or None.
    """
    g, batch, C = gaussians, len(gaussians.batch_shape), cameras.batch_shape[-1]
    B = gaussians.batch_shape.numel()
    tensors = [
        t.reshape(B, *t.shape[batch:]) for t in (g.means, g.quats, g.scales, g.opacities, g.colors)
    ]
    tensors += [cameras.viewmats.reshape(B, C, 4, 4), cameras.Ks.reshape(B, C, 3, 3)]
    return tensors, None if background is None else background.reshape(B, C, 3)


def _reference(
    gaussians: Gaussians,
    cameras: Cameras,
    background: Tensor | None,
    near: float,
    far: float,
    eps2d: float,
    alpha_max: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the dense renderer over the batch, one image at a time."""
    from fresnel.render import reference

    tensors, background = one_batch(gaussians, cameras, background)
    *scenes, viewmats, Ks = (tensor.double() for tensor in tensors)
    if not all(bool(tensor.isfinite().all()) for tensor in tensors):
        raise ValueError("gaussians or cameras: got NaN or infinite values, want finite ones")
    width, height = cameras.width, cameras.height
    B, C = viewmats.shape[:2]
    if B * C == 0:
        empty = viewmats.new_zeros(*cameras.batch_shape, height, width, 1)
        return empty.expand(*empty.shape[:-1], 3), empty, empty
    behind = viewmats.new_zeros(B, C, 3) if background is None else background.double()
    limits: dict[str, Any] = dict(near=near, far=far, eps2d=eps2d, alpha_max=alpha_max)
    draw: Callable[..., tuple[Tensor, Tensor, Tensor]] = partial(reference.rasterize, **limits)
    images = [
        draw(*(t[b] for t in scenes), viewmats[b, c], Ks[b, c], width, height, behind[b, c])
        for b in range(B)
        for c in range(C)
    ]
    rgb, alpha, depth = (
        torch.stack(parts).reshape(*cameras.batch_shape, *parts[0].shape)
        for parts in zip(*images, strict=True)
    )
    return rgb, alpha, depth
