"""gsplat behind our border: every scene and every view of a batch in one call (CUDA and ROCm).

gsplat 1.5.3 (arXiv 2409.06765) defines the semantics that the other backends follow; this file
only rearranges arguments, so that rendering through it costs what calling gsplat costs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def rasterize(
    means: Tensor,
    quats: Tensor,
    scales: Tensor,
    opacities: Tensor,
    colors: Tensor,
    viewmats: Tensor,
    Ks: Tensor,
    width: int,
    height: int,
    background: Tensor | None,
    *,
    near: float,
    far: float,
    eps2d: float,
    packed: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Render B scenes from C cameras each.

    Args:
        means, quats, scales, opacities, colors: (B, N, ...) float32 on a CUDA device; colors
            (B, N, 3) or SH (B, N, K, 3).
        viewmats, Ks: (B, C, 4, 4) and (B, C, 3, 3).
        background: (B, C, 3) or None.

    Returns:
        rgb (B, C, H, W, 3), alpha (B, C, H, W, 1), expected depth (B, C, H, W, 1).

    Raises:
        ValueError: where there is no GPU.
    """
    if not torch.cuda.is_available():
        raise ValueError("backend: gsplat needs a GPU and PyTorch sees none; want 'cpu'")
    B, C = viewmats.shape[:2]
    if means.shape[1] == 0 or B * C == 0:  # gsplat's kernels do not launch on nothing
        empty = means.new_zeros(B, C, height, width, 1)
        rgb = empty.expand(-1, -1, -1, -1, 3)
        return rgb if background is None else rgb + background[:, :, None, None], empty, empty
    from gsplat import rasterization

    image, alpha, _ = rasterization(
        means.float(),
        quats.float(),
        scales.float(),
        opacities.float(),
        colors.float(),
        viewmats.float(),
        Ks.float(),
        width,
        height,
        near_plane=near,
        far_plane=far,
        eps2d=eps2d,
        sh_degree=None if colors.ndim == 3 else math.isqrt(colors.shape[-2]) - 1,
        packed=packed,
        # packed, gsplat 1.5.3 takes no background for more than one image
        backgrounds=None if background is None or packed else background.float(),
        render_mode="RGB+ED",
    )
    rgb = image[..., :3]
    if packed and background is not None:
        rgb = rgb + (1 - alpha) * background.float()[:, :, None, None]
    return rgb, alpha, image[..., 3:]
