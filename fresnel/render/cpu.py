"""The CPU rasteriser (Numba): tiled, front to back, with a hand-derived backward pass."""

from __future__ import annotations

import numba
import numpy as np
import torch
from torch import Tensor

from fresnel.render import reference

TILE = 16


def rasterize(
    means: Tensor, quats: Tensor, scales: Tensor, opacities: Tensor, colors: Tensor,
    viewmats: Tensor, Ks: Tensor, width: int, height: int, background: Tensor | None,
    *, near: float, far: float, eps2d: float, alpha_max: float, threads: int | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Render B scenes from C cameras each; shapes as in `fresnel.render.gpu.rasterize`."""
    scenes = (means, quats, scales, opacities, colors)
    if not all(bool(t.isfinite().all()) for t in scenes):
        raise ValueError("gaussians: got NaN or infinite values, want finite ones")
    B, C = viewmats.shape[:2]
    images = []
    for b in range(B):
        m, q, s, o, k = (t[b].double() for t in scenes)
        for c in range(C):
            view, K = viewmats[b, c].double(), Ks[b, c].double()
            with torch.no_grad():
                z = m @ view[2, :3] + view[2, 3]
                order = torch.argsort(z.float(), stable=True)
                keep = (z >= near) & (z <= far) & (o >= reference.ALPHA_MIN)
                order = order[keep[order]]
            means2d, cov, z = reference.project(
                m[order], q[order], s[order], view, K, width, height, eps2d
            )
            rgb = reference.radiance(m[order], k[order], view)
            a, bb, d = cov[:, 0, 0], cov[:, 0, 1], cov[:, 1, 1]
            det = a * d - bb * bb
            det = torch.where(det > 0, det, torch.inf)
            conic = torch.stack([d / det, -bb / det, a / det], -1)
            reach = (2 * torch.log(o[order] * 255)).clamp_min(0).sqrt()
            extent = torch.stack([reach * a.sqrt(), reach * d.sqrt()], -1).detach()
            features = torch.cat([rgb, z[:, None]], -1)
            images.append(
                _Raster.apply(means2d, conic, o[order], features, extent, width, height, alpha_max)
            )
    if not images:
        return tuple(means.new_zeros(B, C, height, width, n) for n in (3, 1, 1))  # type: ignore
    image = torch.stack(images).unflatten(0, (B, C))
    rgb, depth, alpha = image[..., :3], image[..., 3:4], image[..., 4:]
    if background is not None:
        rgb = rgb + (1 - alpha) * background[:, :, None, None]
    return rgb, alpha, depth / torch.where(alpha > 0, alpha, 1)


class _Raster(torch.autograd.Function):
    @staticmethod
    def forward(ctx, means2d, conic, opacities, features, extent, width, height, alpha_max):  # type: ignore
        arrays = [t.detach().numpy() for t in (means2d, conic, opacities, features)]
        starts, ids = _bin(arrays[0], extent.numpy(), width, height)
        image = np.zeros((height, width, 5), np.float32)
        last = np.zeros((height, width), np.int32)
        _forward(*arrays, starts, ids, alpha_max, image, last)
        ctx.save_for_backward(means2d, conic, opacities, features, torch.from_numpy(image))
        ctx.rest = (starts, ids, last, alpha_max)
        return torch.from_numpy(image)

    @staticmethod
    def backward(ctx, grad):  # type: ignore
        *inputs, image = ctx.saved_tensors
        starts, ids, last, alpha_max = ctx.rest
        grads = _backward(
            *(t.detach().numpy() for t in inputs),
            starts,
            ids,
            alpha_max,
            image.numpy(),
            last,
            np.ascontiguousarray(grad.numpy()),
        )
        return (*(torch.from_numpy(g) for g in grads), None, None, None, None)


@numba.njit(cache=True)
def _bin(means2d, extent, width, height):
    tx, ty = (width + TILE - 1) // TILE, (height + TILE - 1) // TILE
    counts = np.zeros(tx * ty + 1, np.int64)
    n = len(means2d)
    box = np.empty((n, 4), np.int64)
    for g in range(n):
        for axis in range(2):
            limit = tx if axis == 0 else ty
            lo = np.floor((means2d[g, axis] - extent[g, axis]) / TILE)
            hi = np.ceil((means2d[g, axis] + extent[g, axis]) / TILE)
            box[g, axis] = int(min(max(lo, 0), limit))
            box[g, axis + 2] = int(min(max(hi, 0), limit))
        for j in range(box[g, 1], box[g, 3]):
            for i in range(box[g, 0], box[g, 2]):
                counts[j * tx + i + 1] += 1
    starts = np.cumsum(counts)
    fill = starts.copy()
    ids = np.empty(starts[-1], np.int64)
    for g in range(n):
        for j in range(box[g, 1], box[g, 3]):
            for i in range(box[g, 0], box[g, 2]):
                ids[fill[j * tx + i]] = g
                fill[j * tx + i] += 1
    return starts, ids


@numba.njit(cache=True)
def _forward(means2d, conic, opacities, features, starts, ids, alpha_max, image, last):
    height, width = last.shape
    tx = (width + TILE - 1) // TILE
    for y in range(height):
        for x in range(width):
            tile = (y // TILE) * tx + x // TILE
            T = 1.0
            for k in range(starts[tile], starts[tile + 1]):
                g = ids[k]
                dx, dy = x + 0.5 - means2d[g, 0], y + 0.5 - means2d[g, 1]
                a, b, c = conic[g]
                sigma = 0.5 * (a * dx * dx + c * dy * dy) + b * dx * dy
                alpha = min(alpha_max, opacities[g] * np.exp(-sigma))
                if alpha < 1 / 255:
                    continue
                if T * (1 - alpha) <= 1e-4:
                    break
                for f in range(4):
                    image[y, x, f] += features[g, f] * alpha * T
                T *= 1 - alpha
                last[y, x] = k + 1
            image[y, x, 4] = 1 - T


@numba.njit(cache=True)
def _backward(means2d, conic, opacities, features, starts, ids, alpha_max, image, last, grad):
    height, width = last.shape
    tx = (width + TILE - 1) // TILE
    v_means, v_conic = np.zeros_like(means2d), np.zeros_like(conic)
    v_opacities, v_features = np.zeros_like(opacities), np.zeros_like(features)
    for y in range(height):
        for x in range(width):
            tile = (y // TILE) * tx + x // TILE
            T_final = 1 - np.float64(image[y, x, 4])
            T, behind = T_final, 0.0
            for k in range(last[y, x] - 1, starts[tile] - 1, -1):
                g = ids[k]
                dx, dy = x + 0.5 - means2d[g, 0], y + 0.5 - means2d[g, 1]
                a, b, c = conic[g]
                sigma = 0.5 * (a * dx * dx + c * dy * dy) + b * dx * dy
                vis = np.exp(-sigma)
                alpha = min(alpha_max, opacities[g] * vis)
                if alpha < 1 / 255:
                    continue
                T /= 1 - alpha
                v_alpha = grad[y, x, 4] * T_final / (1 - alpha)
                shade = 0.0
                for f in range(4):
                    v_features[g, f] += alpha * T * grad[y, x, f]
                    shade += features[g, f] * grad[y, x, f]
                v_alpha += T * shade - behind / (1 - alpha)
                behind += shade * alpha * T
                if opacities[g] * vis <= alpha_max:
                    v_opacities[g] += vis * v_alpha
                    v_sigma = -alpha * v_alpha
                    v_conic[g, 0] += 0.5 * v_sigma * dx * dx
                    v_conic[g, 1] += v_sigma * dx * dy
                    v_conic[g, 2] += 0.5 * v_sigma * dy * dy
                    v_means[g, 0] -= v_sigma * (conic[g, 0] * dx + conic[g, 1] * dy)
                    v_means[g, 1] -= v_sigma * (conic[g, 1] * dx + conic[g, 2] * dy)
    return v_means, v_conic, v_opacities, v_features
