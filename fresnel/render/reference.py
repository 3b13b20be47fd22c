"""The dense float64 renderer: slow, obviously right, the truth the other backends are held to.

Every Gaussian is evaluated at every pixel. Equations are those of 3D Gaussian Splatting
(Kerbl et al. 2023, arXiv 2308.04079, "3DGS") and EWA splatting (Zwicker et al. 2001, "EWA");
cut-offs and the order of the tests are gsplat 1.5.3's.
"""

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

from fresnel.scene.cameras import Cameras
from fresnel.scene.gaussians import Gaussians, rotation_from_quaternion

ALPHA_MIN = 1.0 / 255.0  # a contribution below one 8-bit step is skipped
ALPHA_MAX = 0.999  # of one Gaussian at one pixel
TRANSMITTANCE_STOP = 1e-4  # a pixel is finished before its transmittance would fall to this


def sh_basis(directions: Tensor, degree: int) -> Tensor:
    """Real spherical harmonics (..., (degree + 1)^2) at unit directions (..., 3), 3DGS's order."""
    x, y, z = directions.unbind(-1)
    basis = [torch.full_like(x, 0.5 / math.sqrt(math.pi))]
    if degree > 0:
        basis += [math.sqrt(0.75 / math.pi) * c for c in (-y, z, -x)]
    if degree > 1:
        c, d = math.sqrt(15 / (4 * math.pi)), math.sqrt(5 / (16 * math.pi))
        basis += [c * x * y, -c * y * z, d * (3 * z * z - 1), -c * x * z, c / 2 * (x * x - y * y)]
    if degree > 2:
        a, b = math.sqrt(35 / (32 * math.pi)), math.sqrt(105 / (4 * math.pi))
        c, d = math.sqrt(21 / (32 * math.pi)), math.sqrt(7 / (16 * math.pi))
        basis += [
            -a * y * (3 * x * x - y * y), b * x * y * z, -c * y * (5 * z * z - 1),
            d * z * (5 * z * z - 3), -c * x * (5 * z * z - 1), b / 2 * z * (x * x - y * y),
            -a * x * (x * x - 3 * y * y),
        ]  # fmt: skip
    return torch.stack(basis, -1)


def radiance(means: Tensor, colors: Tensor, viewmat: Tensor) -> Tensor:
    """RGB (N, 3) as a camera sees it: `colors`, or of SH (N, K, 3) max(0, 0.5 + sum c Y)."""
    if colors.ndim == 2:
        return colors
    center = -viewmat[:3, :3].T @ viewmat[:3, 3]
    directions = torch.nn.functional.normalize(means - center, dim=-1)
    basis = sh_basis(directions, math.isqrt(colors.shape[-2]) - 1)
    return (0.5 + (basis[..., None] * colors).sum(-2)).clamp_min(0)


def project(
    means: Tensor, quats: Tensor, scales: Tensor, viewmat: Tensor, K: Tensor,
    width: int, height: int, eps2d: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gaussians in the image: centres (N, 2) px, covariances (N, 2, 2) px^2, depths (N,)."""
    M = rotation_from_quaternion(quats) * scales[..., None, :]
    cov3d = M @ M.mT  # 3DGS eq. 6: Sigma = R S S^T R^T
    W = viewmat[:3, :3]
    x, y, z = (means @ W.T + viewmat[:3, 3]).unbind(-1)
    fx, fy, cx, cy = K[0, 0], K[1, 1], K[0, 2], K[1, 2]
    # gsplat evaluates the Jacobian no farther than 15 % of the image size outside the image.
    mx, my = 0.15 * width / fx, 0.15 * height / fy
    tx = z * torch.minimum(torch.maximum(x / z, -cx / fx - mx), (width - cx) / fx + mx)
    ty = z * torch.minimum(torch.maximum(y / z, -cy / fy - my), (height - cy) / fy + my)
    zero = torch.zeros_like(z)
    J = torch.stack([fx / z, zero, -fx * tx / z**2, zero, fy / z, -fy * ty / z**2], -1)
    JW = J.unflatten(-1, (2, 3)) @ W
    cov2d = JW @ cov3d @ JW.mT  # EWA eq. 31, 3DGS eq. 5: Sigma' = J W Sigma W^T J^T
    cov2d = cov2d + eps2d * torch.eye(2, dtype=means.dtype, device=means.device)
    return torch.stack([fx * x / z + cx, fy * y / z + cy], -1), cov2d, z


def alphas(means2d: Tensor, cov2d: Tensor, opacities: Tensor, width: int, height: int) -> Tensor:
    """Opacity (N, H, W) of every Gaussian at every pixel centre, zero below ALPHA_MIN."""
    ys = torch.arange(height).to(means2d) + 0.5
    xs = torch.arange(width).to(means2d) + 0.5
    dx = xs[None, None, :] - means2d[:, 0, None, None]
    dy = ys[None, :, None] - means2d[:, 1, None, None]
    a, b, c = (cov2d[:, i, j, None, None] for i, j in ((0, 0), (0, 1), (1, 1)))
    sigma = 0.5 * (c * dx * dx - 2 * b * dx * dy + a * dy * dy) / (a * c - b * b)
    alpha = (opacities[:, None, None] * torch.exp(-sigma)).clamp_max(ALPHA_MAX)  # 3DGS eq. 4
    return torch.where(alpha < ALPHA_MIN, 0, alpha)


def draw(
    means: Tensor, quats: Tensor, scales: Tensor, opacities: Tensor, colors: Tensor,
    viewmat: Tensor, K: Tensor, width: int, height: int, background: Tensor,
    *, near: float, eps2d: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """One scene (N Gaussians), one camera -> rgb (H, W, 3), alpha (H, W, 1), depth (H, W, 1)."""
    z = means @ viewmat[2, :3] + viewmat[2, 3]
    order = torch.argsort(z.detach().float(), stable=True)  # 3DGS sec. 6: front to back
    order = order[(z[order] >= near) & (opacities[order] >= ALPHA_MIN)]
    means, quats, scales, opacities = (t[order] for t in (means, quats, scales, opacities))
    means2d, cov2d, z = project(means, quats, scales, viewmat, K, width, height, eps2d)
    seen = torch.linalg.det(cov2d.detach()) > 0
    rgb = radiance(means, colors[order], viewmat)
    alpha = alphas(means2d[seen], cov2d[seen], opacities[seen], width, height)
    after = torch.cumprod(1 - alpha, 0)
    live = after > TRANSMITTANCE_STOP
    before = torch.cat([torch.ones_like(after[:1]), after[:-1]])[: len(after)]
    weights = torch.where(live, alpha * before, 0)  # 3DGS eq. 3: T_i alpha_i
    opacity = weights.sum(0)[..., None]  # = 1 - prod (1 - alpha_i)
    color = torch.einsum("nhw,nc->hwc", weights, rgb[seen]) + (1 - opacity) * background
    depth = torch.einsum("nhw,n->hw", weights, z[seen])[..., None]
    return color, opacity, depth / torch.where(opacity > 0, opacity, 1)


def one_batch(
    gaussians: Gaussians, cameras: Cameras, background: Tensor | None
) -> tuple[list[Tensor], Tensor | None]:
    """Everything with one batch dimension, for backends that want B scenes and C views of each:
    means, quats, scales, opacities and colors (B, N, ...), viewmats (B, C, 4, 4) and Ks
    (B, C, 3, 3); the background (B, C, 3) or None."""
    g, batch = gaussians, gaussians.batch_shape
    B, C = batch.numel(), cameras.batch_shape[-1]
    scenes = (g.means, g.quats, g.scales, g.opacities, g.colors)
    tensors = [t.reshape(B, *t.shape[len(batch) :]) for t in scenes]
    tensors += [cameras.viewmats.reshape(B, C, 4, 4), cameras.Ks.reshape(B, C, 3, 3)]
    return tensors, None if background is None else background.reshape(B, C, 3)


def rasterize(
    gaussians: Gaussians, cameras: Cameras, background: Tensor | None, near: float, eps2d: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Render one image at a time; parameters and results as in `fresnel.render.render`."""
    tensors, background = one_batch(gaussians, cameras, background)
    *scenes, viewmats, Ks = (t.double() for t in tensors)
    if not all(bool(tensor.isfinite().all()) for tensor in tensors):
        raise ValueError("gaussians or cameras: got NaN or infinite values, want finite ones")
    (B, C), width, height = viewmats.shape[:2], cameras.width, cameras.height
    if B * C == 0:
        empty = viewmats.new_zeros(*cameras.batch_shape, height, width, 1)
        return empty.expand(*empty.shape[:-1], 3), empty, empty
    behind = viewmats.new_zeros(B, C, 3) if background is None else background.double()
    picture: Callable[..., tuple[Tensor, ...]] = partial(draw, near=near, eps2d=eps2d)
    images = [
        picture(*(t[b] for t in scenes), viewmats[b, c], Ks[b, c], width, height, behind[b, c])
        for b, c in np.ndindex(B, C)
    ]
    shape = (*cameras.batch_shape, height, width, -1)
    rgb, alpha, depth = (torch.stack(parts).reshape(shape) for parts in zip(*images, strict=True))
    return rgb, alpha, depth
