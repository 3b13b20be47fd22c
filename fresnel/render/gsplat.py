"""gsplat behind our border: every scene and every view of a batch in one call (CUDA and ROCm).

gsplat 1.5.3 (arXiv 2409.06765) defines the semantics that the other backends follow; this file
only rearranges arguments, so that rendering through it costs what calling gsplat costs.
"""

import importlib
import math
import sys
from pathlib import Path

import torch
import torch.utils.cpp_extension
from torch import Tensor

from fresnel.host.files import locked
from fresnel.render.reference import one_batch
from fresnel.scene.cameras import Cameras
from fresnel.scene.gaussians import Gaussians


def rasterize(
    gaussians: Gaussians, cameras: Cameras, background: Tensor | None, near: float, eps2d: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Render tensors on a GPU; parameters and results as in `fresnel.render.render`.

    The first use on a machine compiles for a minute or two; one process at a time: gsplat takes
    another's lock away, and both then break each other's build.

    Raises:
        ValueError: where there is no GPU.
    """
    if not torch.cuda.is_available():
        raise ValueError("backend: gsplat needs a GPU and PyTorch sees none; want 'cpu'")
    tensors, background = one_batch(gaussians, cameras, background)
    means, quats, scales, opacities, colors, viewmats, Ks = (t.float() for t in tensors)
    views, width, height = cameras.batch_shape, cameras.width, cameras.height
    if means.shape[1] == 0 or views.numel() == 0:  # gsplat's kernels do not launch on nothing
        empty = means.new_zeros(*views, height, width, 1)
        behind = 0 if background is None else background.reshape(*views, 1, 1, 3)
        return empty.expand(*empty.shape[:-1], 3) + behind, empty, empty
    if "gsplat.cuda._backend" not in sys.modules:
        with locked(Path(torch.utils.cpp_extension.get_default_build_root()) / "gsplat.lock"):
            importlib.import_module("gsplat.cuda._backend")
    from gsplat import rasterization

    image, alpha, _ = rasterization(
        means, quats, scales, opacities, colors, viewmats, Ks, width, height,
        near_plane=near, eps2d=eps2d, packed=False, render_mode="RGB+ED",
        sh_degree=None if colors.ndim == 3 else math.isqrt(colors.shape[-2]) - 1,
        backgrounds=None if background is None else background.float(),
    )  # fmt: skip
    image, alpha = (t.reshape(*views, *t.shape[2:]) for t in (image, alpha))
    return image[..., :3], alpha, image[..., 3:]
