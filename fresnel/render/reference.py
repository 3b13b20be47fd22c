"""The dense float64 renderer: slow, obviously right, the truth the other backends are held to.

Every Gaussian is evaluated at every pixel. Equations are those of 3D Gaussian Splatting
(Kerbl et al. 2023, arXiv 2308.04079, "3DGS") and EWA splatting (Zwicker et al. 2001, "EWA");
cut-offs and the order of the tests are gsplat 1.5.3's.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

ALPHA_MIN = 1.0 / 255.0  # a contribution below one 8-bit step is skipped
TRANSMITTANCE_STOP = 1e-4  # a pixel is finished before its transmittance would fall to this


def rotation(quats: Tensor) -> Tensor:
    """Rotation matrices (..., 3, 3) of quaternions (..., 4) wxyz of any length."""
    w, x, y, z = torch.nn.functional.normalize(quats, dim=-1).unbind(-1)
    rows = [
        1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y),
        2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x),
        2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y),
    ]  # fmt: skip
    return torch.stack(rows, -1).unflatten(-1, (3, 3))


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
    M = rotation(quats) * scales[..., None, :]
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


def alphas(
    means2d: Tensor, cov2d: Tensor, opacities: Tensor, width: int, height: int, alpha_max: float
) -> Tensor:
    """Opacity (N, H, W) of every Gaussian at every pixel centre, zero below ALPHA_MIN."""
    ys = torch.arange(height).to(means2d) + 0.5
    xs = torch.arange(width).to(means2d) + 0.5
    dx = xs[None, None, :] - means2d[:, 0, None, None]
    dy = ys[None, :, None] - means2d[:, 1, None, None]
    a, b, c = (cov2d[:, i, j, None, None] for i, j in ((0, 0), (0, 1), (1, 1)))
    sigma = 0.5 * (c * dx * dx - 2 * b * dx * dy + a * dy * dy) / (a * c - b * b)
    alpha = (opacities[:, None, None] * torch.exp(-sigma)).clamp_max(alpha_max)  # 3DGS eq. 4
    return torch.where(alpha < ALPHA_MIN, 0, alpha)


def rasterize(
    means: Tensor, quats: Tensor, scales: Tensor, opacities: Tensor, colors: Tensor,
    viewmat: Tensor, K: Tensor, width: int, height: int, background: Tensor,
    *, near: float, far: float, eps2d: float, alpha_max: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """One scene (N Gaussians), one camera -> rgb (H, W, 3), alpha (H, W, 1), depth (H, W, 1)."""
    z = means @ viewmat[2, :3] + viewmat[2, 3]
    order = torch.argsort(z.detach().float(), stable=True)  # 3DGS sec. 6: front to back
    order = order[(z[order] >= near) & (z[order] <= far) & (opacities[order] >= ALPHA_MIN)]
    means, quats, scales, opacities = (t[order] for t in (means, quats, scales, opacities))
    means2d, cov2d, z = project(means, quats, scales, viewmat, K, width, height, eps2d)
    seen = torch.linalg.det(cov2d.detach()) > 0
    rgb = radiance(means, colors[order], viewmat)
    alpha = alphas(means2d[seen], cov2d[seen], opacities[seen], width, height, alpha_max)
    after = torch.cumprod(1 - alpha, 0)
    live = after > TRANSMITTANCE_STOP
    before = torch.cat([torch.ones_like(after[:1]), after[:-1]])[: len(after)]
    weights = torch.where(live, alpha * before, 0)  # 3DGS eq. 3: T_i alpha_i
    opacity = weights.sum(0)[..., None]  # = 1 - prod (1 - alpha_i)
    color = torch.einsum("nhw,nc->hwc", weights, rgb[seen]) + (1 - opacity) * background
    depth = torch.einsum("nhw,n->hw", weights, z[seen])[..., None]
    return color, opacity, depth / torch.where(opacity > 0, opacity, 1)
