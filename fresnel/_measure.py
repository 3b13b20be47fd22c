"""What the gate's checks look at: numbers measured on one record of a dataset.

Emptiness and exposure are told apart by alpha: coverage says how much of the frame is covered,
luminance is that of covered pixels only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from fresnel.cameras import Cameras, gravity_frame
from fresnel.evaluate import srgb_to_linear

Row = dict[str, Any]

_LINEAR = srgb_to_linear(torch.arange(256) / 255.0).numpy()
_LUMINANCE = np.array([0.2126, 0.7152, 0.0722], dtype=np.float32)
_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32) / 255.0


def measure(
    views: Any, background: Sequence[float], *, trust_input: bool = True
) -> tuple[list[Row], Row]:
    """All numbers of one `ObjectViews`: a row per view, and one for the record.

    Args:
        background: sRGB in [0, 1] that `views.rgb` is over; it is taken out first.
        trust_input: whether the input's depth is metric and its alpha known.

    Returns:
        The rows of `Verdict.measurements` and the row of `Verdict.objects`.
    """
    rgb, alpha = _over_black(views.rgb.numpy(), views.alpha.numpy(), background)
    depth = None if views.depth is None else views.depth.numpy()
    size = rgb.shape[1:3]
    summary: Row = {"name": views.name, "error": None, "views": len(rgb)}
    summary["bad_poses"] = _bad_poses(views.cameras) + _bad_poses(views.input_camera.reshape(1))
    summary["bad_depth"] = 0 if depth is None else int((~np.isfinite(depth)).sum())
    angles = _angles(views) if not summary["bad_poses"] else np.full((len(rgb), 2), np.nan)

    coverage = alpha.mean(axis=(1, 2)) / 255.0
    light = np.array([_luminance(c, a) for c, a in zip(rgb, alpha, strict=True)])
    detail = _detail(rgb, alpha)
    input_rgb, input_alpha = views.input_rgb.numpy(), views.input_alpha.numpy()
    input_coverage = input_alpha.mean() / 255.0
    input_light = _luminance(input_rgb, input_alpha)
    small_rgb, small_alpha = _shrunk(input_rgb, input_alpha, size)
    input_detail = _detail(small_rgb[None], small_alpha[None])[0]
    # Every third pixel of every third row is enough to see that a frame is not of one colour.
    some = np.concatenate([rgb, alpha[..., None]], axis=-1)[:, ::3, ::3].astype(np.int16)
    spread = np.abs(some - some[:, :1, :1]).reshape(len(rgb), -1).max(axis=1)
    border = np.stack([alpha[:, 0], alpha[:, -1], alpha[:, :, 0], alpha[:, :, -1]], axis=1)
    border = border.reshape(len(alpha), -1).mean(axis=1) / 255.0

    rows: list[Row] = []
    for i in range(len(rgb)):
        rows.append(
            {
                "object": views.name,
                "view": i,
                "azimuth_deg": float(angles[i, 0]),
                "elevation_deg": float(angles[i, 1]),
                "coverage": float(coverage[i]),
                "coverage_ratio": _ratio(coverage[i], input_coverage),
                "luminance": light[i],
                # The floor keeps black objects, whose ratio is noise, near 1.
                "luminance_ratio": _ratio(light[i] + 0.004, input_light + 0.004),
                "detail_ratio": _ratio(detail[i], input_detail),
                "border": float(border[i]),
                "constant": bool(spread[i] <= 2 and coverage[i] > 0.5),
            }
        )
    summary |= {"input_coverage": float(input_coverage), "input_luminance": input_light}
    summary |= _pivot(views, rgb, alpha, depth, trust_input) if not summary["bad_poses"] else {}
    usable = not summary["bad_poses"] and not summary["bad_depth"]
    stray = _stray(views, alpha, depth, trust_input) if usable else np.array([math.nan])
    summary["stray"] = float(np.nanmean(stray)) if np.isfinite(stray).any() else math.nan
    summary["frozen"] = _frozen(rgb, alpha, angles, coverage, summary["stray"])
    summary |= _identity(views)
    return rows, summary


def unreadable(name: str, error: Exception) -> tuple[list[Row], Row]:
    """What `measure` returns for a record that can't be read."""
    return [], {"name": name, "error": f"{type(error).__name__}: {error}"[:300], "views": 0}


def _ratio(value: float, reference: float) -> float:
    return float(value / reference) if reference > 0 and np.isfinite(value) else math.nan


def _over_black(
    rgb: np.ndarray, alpha: np.ndarray, background: Sequence[float]
) -> tuple[np.ndarray, np.ndarray]:
    if not any(background):
        return rgb, alpha
    rest = (255 - alpha[..., None]).astype(np.float32) * np.asarray(background, dtype=np.float32)
    return np.clip(np.rint(rgb - rest), 0, 255).astype(np.uint8), alpha


def _luminance(rgb: np.ndarray, alpha: np.ndarray) -> float:
    """Mean linear luminance of the covered pixels (alpha at least a half), their colour
    un-premultiplied, so that a half-transparent white object is white; NaN without any."""
    mask = alpha >= 128
    if not mask.any():
        return math.nan
    color, weight = rgb[mask].astype(np.float32), alpha[mask].astype(np.float32)
    straight = np.minimum(color * (255.0 / weight)[:, None] + 0.5, 255).astype(np.uint8)
    return float((_LINEAR[straight] @ _LUMINANCE).mean())


def _detail(rgb: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """RMS gradient of luma over black and of alpha, per covered pixel, (V,).

    Alpha's share makes it see the blur of a black or single-coloured object at its outline.
    """
    energy = np.zeros(len(rgb))
    for channel in (rgb @ _LUMA, alpha.astype(np.float32) / 255.0):
        energy += np.square(np.diff(channel, axis=1)).sum(axis=(1, 2))
        energy += np.square(np.diff(channel, axis=2)).sum(axis=(1, 2))
    covered = alpha.reshape(len(alpha), -1).astype(np.float32).sum(axis=1) / 255.0
    return np.where(covered > 1, np.sqrt(energy / np.maximum(covered, 1)), np.nan)


def _shrunk(
    rgb: np.ndarray, alpha: np.ndarray, size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """The image at `size`, so that gradients are per pixel of the same size."""
    if alpha.shape == size:
        return rgb, alpha
    both = torch.from_numpy(np.concatenate([rgb, alpha[..., None]], axis=-1)).permute(2, 0, 1)
    both = torch.nn.functional.interpolate(
        both[None].float(), size=size, mode="bilinear", antialias=True, align_corners=False
    )[0]
    out = both.round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()
    return out[..., :3], out[..., 3]


def _bad_poses(cameras: Cameras) -> int:
    """How many poses are NaN, not a rotation, mirrored, or have no positive focal length."""
    bad = 0
    for i in range(len(cameras)):
        try:
            cameras[i].validate()
        except ValueError:
            bad += 1
    return bad


def _angles(views: Any) -> np.ndarray:
    """Azimuth and elevation in degrees about the pivot relative to the input camera, (V, 2)."""
    frame = gravity_frame(views.input_camera, views.pivot)
    seen = views.cameras.transformed(frame)
    origin = (0.0, 0.0, 0.0)
    return torch.stack([seen.azimuth_deg(origin), seen.elevation_deg(origin)], dim=-1).numpy()


def _unproject(
    camera: tuple[np.ndarray, np.ndarray], ys: np.ndarray, xs: np.ndarray, z: np.ndarray
) -> np.ndarray:
    """World points (N, 3) of pixels at z-depths."""
    viewmat, K = camera
    pixels = np.stack([xs + 0.5, ys + 0.5, np.ones_like(z)], axis=-1)
    local = (pixels @ np.linalg.inv(K).T) * z[:, None]
    return (local - viewmat[:3, 3]) @ viewmat[:3, :3]


def _matrices(cameras: Cameras) -> list[tuple[np.ndarray, np.ndarray]]:
    viewmats, Ks = cameras.viewmats.double().numpy(), cameras.Ks.double().numpy()
    return list(zip(viewmats.reshape(-1, 4, 4), Ks.reshape(-1, 3, 3), strict=True))


def _surface(
    camera: tuple[np.ndarray, np.ndarray], alpha: np.ndarray, depth: np.ndarray, count: int
) -> np.ndarray:
    """About `count` world points on what a view shows, evenly strided over its solid pixels."""
    ys, xs = np.nonzero((alpha > 200) & (depth > 0))
    keep = slice(None, None, max(1, len(ys) // count))
    ys, xs = ys[keep], xs[keep]
    return _unproject(camera, ys, xs, depth[ys, xs].astype(np.float64))


def _nearest_point(origins: np.ndarray, directions: np.ndarray) -> np.ndarray | None:
    """Least-squares nearest point to lines (N, 3); None where they are nearly parallel."""
    directions = directions / np.linalg.norm(directions, axis=1, keepdims=True)
    projectors = np.eye(3) - directions[:, :, None] * directions[:, None, :]
    matrix = projectors.sum(axis=0)
    if np.linalg.eigvalsh(matrix)[0] < 0.01 * len(origins):
        return None
    return np.linalg.solve(matrix, (projectors @ origins[:, :, None]).sum(axis=0)[:, 0])


def _pivot(
    views: Any, rgb: np.ndarray, alpha: np.ndarray, depth: np.ndarray | None, trust_input: bool
) -> Row:
    """Where the cameras look, where the content is, and where the data says the pivot is.

    The first is the nearest point to all optical axes; the second the centroid of the points that
    depth gives, or the triangulated centroids of the silhouettes.  Distances in world units, and
    in units of the cameras' distance (`*_relative`).
    """
    nothing: Row = {"pivot_distance": math.nan, "pivot_relative": math.nan, "pivot_error": math.nan}
    cameras = _matrices(views.cameras)
    origins = views.cameras.centers.double().numpy()
    looks_at = _nearest_point(origins, views.cameras.forward.double().numpy())
    if looks_at is None:
        return nothing
    radius = float(np.median(np.linalg.norm(origins - looks_at, axis=1)))
    declared = views.pivot.double().numpy()
    out = {**nothing, "radius": radius, "looks_at": looks_at.round(4).tolist()}
    out["pivot_error"] = float(np.linalg.norm(looks_at - declared)) / max(radius, 1e-9)
    seen = alpha.reshape(len(alpha), -1).mean(axis=1) / 255.0 > 0.001
    centroid = None
    if depth is not None and np.isfinite(depth).all():
        clouds = [_surface(cameras[i], alpha[i], depth[i], 200) for i in np.flatnonzero(seen)]
        if trust_input and views.input_depth is not None and views.input_depth.isfinite().all():
            camera = _matrices(views.input_camera)[0]
            input_alpha, input_depth = views.input_alpha.numpy(), views.input_depth.numpy()
            clouds.append(_surface(camera, input_alpha, input_depth, 200))
        clouds = [cloud for cloud in clouds if len(cloud) >= 4]
        if clouds:
            # Every view counts once, whatever it covers; the median shrugs off flying pixels.
            centroid = np.median([np.median(cloud, axis=0) for cloud in clouds], axis=0)
    elif seen.sum() >= 2:
        lines = [_centroid_ray(cameras[i], alpha[i]) for i in np.flatnonzero(seen)]
        centroid = _nearest_point(origins[seen], np.array(lines))
    if centroid is not None:
        out["content_at"] = centroid.round(4).tolist()
        out["pivot_distance"] = float(np.linalg.norm(centroid - looks_at))
        out["pivot_relative"] = out["pivot_distance"] / max(radius, 1e-9)
    return out


def _centroid_ray(camera: tuple[np.ndarray, np.ndarray], alpha: np.ndarray) -> np.ndarray:
    weight = alpha.astype(np.float64)
    ys, xs = np.indices(alpha.shape) + 0.5
    pixel = np.array([(xs * weight).sum(), (ys * weight).sum(), weight.sum()]) / weight.sum()
    viewmat, K = camera
    return viewmat[:3, :3].T @ np.linalg.solve(K, pixel)


def _stray(
    views: Any, alpha: np.ndarray, depth: np.ndarray | None, trust_input: bool
) -> np.ndarray:
    """Share of every view's surface points that other views see through, (V,).

    A point on the object lies within its silhouette in every view, whatever occludes it; points
    that project onto nothing mean that poses and pictures do not belong together (shuffled,
    mirrored, shifted, wrong focal length).  NaN for views that show nothing.
    """
    share = np.full(len(alpha), np.nan)
    if depth is None:
        return share
    cameras, masks = _matrices(views.cameras), list(alpha)
    if trust_input:
        cameras, masks = (
            cameras + _matrices(views.input_camera),
            [*masks, views.input_alpha.numpy()],
        )
    grown = [_grow(mask > 12, max(1, mask.shape[-1] // 64)) for mask in masks]
    worth = [mask.mean() > 0.002 for mask in grown]
    for i in range(len(alpha)):
        points = _surface(cameras[i], alpha[i], depth[i], 200)
        if len(points) < 8:
            continue
        misses = hits = 0
        for j, ((viewmat, K), mask) in enumerate(zip(cameras, grown, strict=True)):
            if j == i or not worth[j]:
                continue
            local = points @ viewmat[:3, :3].T + viewmat[:3, 3]
            local = local[local[:, 2] > 1e-3]
            pixel = (local @ K.T)[:, :2] / local[:, 2:]
            x, y = np.floor(pixel).astype(np.int64).T
            inside = (x >= 0) & (y >= 0) & (x < mask.shape[1]) & (y < mask.shape[0])
            found = int(mask[y[inside], x[inside]].sum())
            hits += found
            misses += int(inside.sum()) - found
        if hits + misses:
            share[i] = misses / (hits + misses)
    return share


def _grow(mask: np.ndarray, by: int) -> np.ndarray:
    """Dilation by a square of 2 * by + 1 pixels."""
    for axis in (0, 1):
        padded = np.pad(mask, [(by, by) if a == axis else (0, 0) for a in (0, 1)])
        length = mask.shape[axis]
        mask = np.logical_or.reduce(
            [np.take(padded, range(k, k + length), axis=axis) for k in range(2 * by + 1)]
        )
    return mask


def _frozen(
    rgb: np.ndarray, alpha: np.ndarray, angles: np.ndarray, coverage: np.ndarray, stray: float
) -> float:
    """Share of the views that repeat another view's picture although the pose differs.

    Only pictures equal to within noise (mean difference over what is covered below 0.25 of 255)
    count, and only if a solid of revolution can't explain them: the elevations differ, or depth
    contradicts the poses.
    """
    repeated = np.zeros(len(rgb), dtype=bool)
    small = np.concatenate([rgb, alpha[..., None]], axis=-1).reshape(len(rgb), -1)
    glance = small[:, ::61].astype(np.int16)
    contrast = rgb.reshape(len(rgb), -1).max(axis=1).astype(int)
    contrast -= rgb.reshape(len(rgb), -1).min(axis=1)
    shown = np.flatnonzero((coverage > 0.002) & (contrast > 8))
    for a, i in enumerate(shown):
        for j in shown[a + 1 :]:
            turn = abs((angles[i, 0] - angles[j, 0] + 180) % 360 - 180)
            tilt = abs(angles[i, 1] - angles[j, 1])
            if max(turn, tilt) < 5 or (tilt < 2 and not stray > 0.02):
                continue
            # A glance at some pixels first: almost every pair differs there.
            if np.abs(glance[i] - glance[j]).mean() > 2:
                continue
            covered = 4 * max(int((alpha[i] >= 64).sum()), int((alpha[j] >= 64).sum()))
            if np.abs(small[i].astype(np.int16) - small[j]).sum() < 0.25 * covered:
                repeated[[i, j]] = True
    return float(repeated.mean())


def _identity(views: Any) -> Row:
    """PSNR (dB) over the union of foregrounds and IoU of silhouettes of input and identity."""
    if views.identity_rgb is None:
        return {"identity_psnr": math.nan, "identity_iou": math.nan}
    mine, theirs = views.input_rgb.numpy(), views.identity_rgb.numpy()
    a, b = views.input_alpha.numpy() >= 128, views.identity_alpha.numpy() >= 128
    union = a | b
    if not union.any():
        return {"identity_psnr": math.nan, "identity_iou": math.nan}
    mse = float(np.square(mine[union].astype(np.float32) - theirs[union]).mean()) / 255.0**2
    iou = float((a & b).sum() / union.sum())
    return {"identity_psnr": -10 * math.log10(max(mse, 1e-10)), "identity_iou": iou}
