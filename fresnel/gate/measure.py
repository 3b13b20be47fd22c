"""What the gate's checks look at: numbers measured on one record of a dataset.

Emptiness and exposure are told apart by alpha: coverage says how much of the frame is covered,
luminance is that of covered pixels only.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from fresnel.gate.geometry import (
    Rig,
    coherence,
    nearest_point,
    photometric,
    principal_shift,
    project,
    rig_of,
    triangulate,
    up_tilt_deg,
)
from fresnel.scene.cameras import Cameras, gravity_frame
from fresnel.scene.colour import LUMINANCE_WEIGHTS, srgb_to_linear

Row = dict[str, Any]

_LINEAR = srgb_to_linear(torch.arange(256) / 255.0).numpy()
_LUMINANCE = np.array(LUMINANCE_WEIGHTS, dtype=np.float32)
_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32) / 255.0
_SIDE, _RIG = 128, 64
"""Pictures larger than this are looked at in steps of whole pixels, for what is an average."""


def measure(
    views: Any, background: Sequence[float], *, trust_input: bool = True
) -> tuple[list[Row], Row, Rig | None]:
    """All numbers of one `ObjectViews`: a row per view, one for the record, and its rig.

    Args:
        background: sRGB in [0, 1] that `views.rgb` is over; it is taken out first.
        trust_input: whether the input's depth is metric and its alpha known.

    Returns:
        The rows of `Verdict.measurements`, the row of `Verdict.objects`, and what poses are asked
        of (None where the pictures have no foreground or the poses are no poses).
    """
    summary: Row = {"name": views.name, "error": None, "views": len(views.rgb)}
    has_input = views.input_rgb is not None
    rgb, alpha, foreground = _foreground(views.rgb.numpy(), views.alpha.numpy(), background)
    summary["foreground"] = foreground
    raw = zip(views.rgb.numpy(), views.alpha.numpy(), strict=True)
    summary["constant"] = [_constant(c, a) for c, a in raw]
    depth = None if views.depth is None else views.depth.numpy()
    summary["bad_poses"] = _bad_poses(views.cameras)
    if has_input:
        summary["bad_poses"] += _bad_poses(views.input_camera.reshape(1))
    summary["bad_depth"] = 0 if depth is None else int((~np.isfinite(depth)).sum())
    usable = not summary["bad_poses"] and not summary["bad_depth"]
    angles = _angles(views) if not summary["bad_poses"] else np.full((len(rgb), 2), np.nan)

    # What shines through an edge differs from view to view where the background does.
    inner = rgb * (alpha >= 250)[..., None] if foreground == "masks" else rgb
    solid = 250 if foreground == "masks" else 128
    seen = _pictures(rgb, alpha, solid)
    guessed = foreground == "estimated"
    behind = np.median(_border(views.rgb.numpy()), axis=(0, 1)) if guessed else None
    reference = _reference(views, rgb.shape[1:3], behind, solid) if has_input else None
    rows = _rows(views.name, seen, reference, angles, summary.pop("constant"))
    summary |= _of_record(rows, seen, reference, angles)
    summary["fingerprint"] = _fingerprint(views, inner, alpha)
    rig = None
    if usable and foreground != "none":
        rig = rig_of(views, rgb, alpha, with_input=has_input and trust_input)
        summary |= _poses(rig) | _pivot(views, rig)
    stray = summary.get("stray", math.nan)
    summary["frozen"] = _frozen(inner, alpha, angles, seen["coverage"], stray)
    summary |= _identity(views)
    return rows, summary, rig


def unreadable(name: str, error: Exception) -> tuple[list[Row], Row, None]:
    """What `measure` returns for a record that can't be read."""
    return [], {"name": name, "error": f"{type(error).__name__}: {error}"[:300], "views": 0}, None


# --- foreground --------------------------------------------------------------------------------


def _foreground(
    rgb: np.ndarray, alpha: np.ndarray, background: Sequence[float]
) -> tuple[np.ndarray, np.ndarray, str]:
    """Pictures over black, alpha, and where alpha comes from.

    "alpha": as stored; "masks": as stored, over another background than the dataset's (a
    photograph); "estimated": opaque pictures whose border is of one colour, which is taken out;
    "none": opaque photographs, whose foreground nobody knows.
    """
    if (alpha == 255).all():
        border = _border(rgb)
        colour = np.median(border, axis=1).astype(np.int16)
        off = np.abs(border.astype(np.int16) - colour[:, None]).max(axis=-1)
        if (np.mean(off > 12, axis=1) < 0.25).mean() < 0.75:
            return rgb, alpha, "none"
        away = np.abs(rgb.astype(np.int16) - colour[:, None, None]).max(axis=-1)
        # As little as stands out from the border's own noise.
        alpha = np.where(away > max(3.0, 2 * float(np.quantile(off, 0.98))), 255, 0)
        alpha = alpha.astype(np.uint8)
        return rgb * (alpha > 0)[..., None], alpha, "estimated"
    step = max(1, rgb.shape[1] // _RIG)
    behind = alpha[:, ::step, ::step] == 0
    claimed = np.asarray(background, dtype=np.float32) * 255
    if behind.any() and np.abs(rgb[:, ::step, ::step][behind] - claimed).mean() > 8:
        # Edge pixels keep some of the photograph behind them; the solid ones are exact.
        return (rgb * (alpha[..., None] / np.float32(255))).astype(np.uint8), alpha, "masks"
    if not any(background):
        return rgb, alpha, "alpha"
    rest = (255 - alpha[..., None]).astype(np.float32) * np.asarray(background, dtype=np.float32)
    return np.clip(np.rint(rgb - rest), 0, 255).astype(np.uint8), alpha, "alpha"


def _border(rgb: np.ndarray) -> np.ndarray:
    """The outermost pixels of each picture, (V, N, 3)."""
    return np.concatenate([rgb[:, 0], rgb[:, -1], rgb[:, :, 0], rgb[:, :, -1]], axis=1)


def _constant(rgb: np.ndarray, alpha: np.ndarray) -> bool:
    """Whether a frame is of one colour and claims to be covered.

    Every third pixel of every third row mostly shows that it is not; only then all are looked at.
    """
    if alpha.mean() <= 127:
        return False
    some = rgb[::3, ::3].astype(np.int16)
    if np.abs(some - some[:1, :1]).max() > 2:
        return False
    whole = np.concatenate([rgb, alpha[..., None]], axis=-1).astype(np.int16)
    return bool(np.abs(whole - whole[:1, :1]).max() <= 2)


# --- pictures ----------------------------------------------------------------------------------


def _pictures(rgb: np.ndarray, alpha: np.ndarray, solid: int = 128) -> dict[str, np.ndarray]:
    """Numbers of pictures over black, each (V,), colour (V, 3)."""
    step = max(1, rgb.shape[1] // _SIDE)
    pairs = zip(rgb[:, ::step, ::step], alpha[:, ::step, ::step], strict=True)
    light = [_light(c, a, solid) for c, a in pairs]
    edges = [alpha[:, 0], alpha[:, -1], alpha[:, :, 0], alpha[:, :, -1]]
    return {
        "coverage": alpha[:, ::step, ::step].mean(axis=(1, 2)) / 255.0,
        "luminance": np.array([item[0] for item in light]),
        "clipped": np.array([item[1] for item in light]),
        "crushed": np.array([item[2] for item in light]),
        "floored": np.array([item[4] for item in light]),
        "color": np.array([item[3] for item in light]),
        "detail": _detail(rgb, alpha),
        "grain": np.array([_grain(c[::step], a[::step]) for c, a in zip(rgb, alpha, strict=True)]),
        "border": np.concatenate(edges, axis=1).mean(axis=1) / 255.0,
    }


def _light(
    rgb: np.ndarray, alpha: np.ndarray, solid: int
) -> tuple[float, float, float, np.ndarray, float]:
    """Mean linear luminance of the covered pixels (alpha at least `solid`, or a half where hardly
    any are), their colour un-premultiplied, so that a half-transparent white object is white; the
    share of them at either end of the scale, and at the black end; their mean linear colour; the
    share of which some channel is black.  NaN without any."""
    mask = alpha >= solid
    if mask.sum() < 20:
        mask = alpha >= 128
    if not mask.any():
        return math.nan, math.nan, math.nan, np.full(3, np.nan), math.nan
    color, weight = rgb[mask].astype(np.float32), alpha[mask].astype(np.float32)
    straight = np.minimum(color * (255.0 / weight)[:, None] + 0.5, 255).astype(np.uint8)
    linear = _LINEAR[straight].mean(axis=0)
    brightest = straight.max(axis=1)
    crushed, blown = float((brightest <= 1).mean()), float((brightest >= 254).mean())
    floored = float((straight.min(axis=1) <= 1).mean())
    return float(linear @ _LUMINANCE), crushed + blown, crushed, linear, floored


def _detail(rgb: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """RMS gradient of luma over black and of alpha, per covered pixel, (V,).

    Alpha's share makes it see the blur of a black or single-coloured object at its outline.  Of
    large pictures every second row of gradients is taken.
    """
    rows = slice(None, None, max(1, rgb.shape[1] // _SIDE))
    energy = np.zeros(len(rgb))
    for channel in (rgb[:, rows] @ _LUMA, alpha[:, rows].astype(np.float32) / 255.0):
        across = np.diff(channel, axis=2).reshape(len(rgb), -1)
        energy += 2 * np.einsum("vi,vi->v", across, across)
    covered = alpha[:, rows].reshape(len(alpha), -1).astype(np.float32).sum(axis=1) / 255.0
    return np.where(covered > 1, np.sqrt(energy / np.maximum(covered, 1)), np.nan)


def _grain(rgb: np.ndarray, alpha: np.ndarray) -> float:
    """Median absolute second difference of green along rows inside the object, of 255: edges are
    few enough not to count, noise is everywhere."""
    green = rgb[..., 1].astype(np.int16)
    covered, width = alpha == 255, alpha.shape[1]
    if width < 8:
        return math.nan
    # Three pixels away from the outline on either side, where edges are guessed or blended.
    inner = np.logical_and.reduce([covered[:, k : width - 6 + k] for k in range(7)])
    green, solid = green[:, 2:-2], inner
    if solid.sum() < 20:
        return math.nan
    return float(np.median(np.abs(green[:, 2:] - 2 * green[:, 1:-1] + green[:, :-2])[solid]))


def _reference(
    views: Any, size: tuple[int, int], behind: np.ndarray | None, solid: int
) -> dict[str, np.ndarray]:
    """The numbers of the input, its detail at the views' size.

    Where the views' foreground had to be guessed, the input's is guessed the same way, over the
    same colour: both then err alike at their edges.
    """
    rgb, alpha = views.input_rgb.numpy(), views.input_alpha.numpy()
    if behind is not None:
        rest = 1 - alpha[..., None] / np.float32(255)
        rgb = np.clip(rgb + rest * behind, 0, 255).astype(np.uint8)
        rgb, opaque = rgb[None], np.full((1, *alpha.shape), 255, np.uint8)
        rgb, alpha = (part[0] for part in _foreground(rgb, opaque, (0.0, 0.0, 0.0))[:2])
    out = _pictures(rgb[None], alpha[None], solid)
    if alpha.shape != size:
        both = torch.from_numpy(np.concatenate([rgb, alpha[..., None]], axis=-1)).permute(2, 0, 1)
        both = torch.nn.functional.interpolate(
            both[None].float(), size=size, mode="bilinear", antialias=True, align_corners=False
        )[0]
        small = both.round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()
        out["detail"] = _detail(small[None, ..., :3], small[None, ..., 3])
    return {name: value[0] for name, value in out.items()}


def _rows(
    name: str,
    seen: dict[str, np.ndarray],
    reference: dict[str, np.ndarray] | None,
    angles: np.ndarray,
    constant: Sequence[bool],
) -> list[Row]:
    if reference is None:  # the median view stands in for the input
        with np.errstate(all="ignore"):
            reference = {key: _nanmedian(value) for key, value in seen.items()}
    rows = []
    for i in range(len(angles)):
        light = seen["luminance"][i]
        rows.append(
            {
                "object": name,
                "view": i,
                "azimuth_deg": float(angles[i, 0]),
                "elevation_deg": float(angles[i, 1]),
                "coverage": float(seen["coverage"][i]),
                "coverage_ratio": _ratio(seen["coverage"][i], float(reference["coverage"])),
                "luminance": float(light),
                # The floor keeps black objects, whose ratio is noise, near 1.
                "luminance_ratio": _ratio(light + 0.004, float(reference["luminance"]) + 0.004),
                "detail_ratio": _ratio(seen["detail"][i], float(reference["detail"])),
                "grain": float(seen["grain"][i] - reference["grain"]),
                "clipped": float(seen["clipped"][i] - reference["clipped"]),
                "crushed": float(seen["crushed"][i] - reference["crushed"]),
                "floored": float(seen["floored"][i] - reference["floored"]),
                "border": float(seen["border"][i]),
                "constant": bool(constant[i]),
            }
        )
    return rows


def _nanmedian(values: np.ndarray) -> np.ndarray:
    finite = values[np.isfinite(values).reshape(len(values), -1).all(axis=1)]
    return np.median(finite, axis=0) if len(finite) else np.full(values.shape[1:], np.nan)


def _of_record(
    rows: list[Row],
    seen: dict[str, np.ndarray],
    reference: dict[str, np.ndarray] | None,
    angles: np.ndarray,
) -> Row:
    """What only several views together tell."""
    out: Row = {"drift": _drift(seen["luminance"], angles[:, 0])}
    if reference is None:
        return out | {"input_coverage": math.nan, "input_luminance": math.nan}
    out |= {
        "input_coverage": float(reference["coverage"]),
        "input_luminance": float(reference["luminance"]),
    }
    mine, theirs = np.sqrt(_nanmedian(seen["color"])), np.sqrt(reference["color"])
    # Only a colour with red and blue apart can tell whether they changed places.
    if np.isfinite(mine).all() and abs(theirs[0] - theirs[2]) > 0.06:
        same, swapped = np.abs(mine - theirs).sum(), np.abs(mine[::-1] - theirs).sum()
        out["swapped"] = float(same / max(swapped, 1e-6))
    return out


def _drift(luminance: np.ndarray, azimuth_deg: np.ndarray) -> float:
    """Median absolute step of log luminance between views that are neighbours in azimuth."""
    usable = np.isfinite(luminance) & np.isfinite(azimuth_deg)
    if usable.sum() < 4:
        return math.nan
    order = np.argsort(azimuth_deg[usable])
    light = np.log(luminance[usable][order] + 0.01)
    return float(np.median(np.abs(light - np.roll(light, 1))))


def _ratio(value: float, reference: float) -> float:
    return float(value / reference) if reference > 0 and np.isfinite(value) else math.nan


def _fingerprint(views: Any, rgb: np.ndarray, alpha: np.ndarray) -> dict[str, Any]:
    """What two records of the same pictures share: a hash, and thumbnails 12 pixels wide."""
    pictures = [np.dstack([rgb[i], alpha[i]]) for i in (0, len(rgb) // 2)]
    if views.input_rgb is not None:
        pictures.append(np.dstack([views.input_rgb.numpy(), views.input_alpha.numpy()]))
    small = []
    for picture in pictures:
        rows, columns = (_bins(n) for n in picture.shape[:2])
        sums = columns @ np.tensordot(rows, picture.astype(np.float32), 1)
        small.append(sums / (rows.sum(1)[:, None, None] * columns.sum(1)[:, None]).astype(float))
    return {"digest": hashlib.sha256(rgb.tobytes()).hexdigest(), "thumbnail": np.ravel(small)}


@functools.cache
def _bins(length: int) -> np.ndarray:
    """Which of at most 12 equal parts each pixel of a side belongs to, float32 (parts, length)."""
    edges = np.linspace(0, length, min(length, 12) + 1).astype(int)
    return np.repeat(np.eye(len(edges) - 1, dtype=np.float32), np.diff(edges), axis=1)


# --- poses -------------------------------------------------------------------------------------


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
    reference = views.cameras[0] if views.input_camera is None else views.input_camera
    seen = views.cameras.transformed(gravity_frame(reference, views.pivot))
    origin = (0.0, 0.0, 0.0)
    return torch.stack([seen.azimuth_deg(origin), seen.elevation_deg(origin)], dim=-1).numpy()


def _poses(rig: Rig) -> Row:
    """Consistency of poses with pictures: shares; shifts in image widths; degrees."""
    found = coherence(rig)
    shift, off_centre, _ = principal_shift(rig)
    colour, floating = photometric(rig)
    miss = found.miss + 0.1 * (1 - found.hull_iou)
    return {
        "hull_iou": found.hull_iou,
        "hull_miss": miss,
        "stray": found.stray,
        "input_miss": found.input_miss,
        "mismatch": miss if math.isnan(found.stray) else miss + found.stray,
        "centroid_residual": off_centre,
        "centroid_shift": float(np.hypot(*shift)),
        "photometric": colour,
        "floating": floating,
        "up_tilt_deg": up_tilt_deg(rig),
    }


def _pivot(views: Any, rig: Rig) -> Row:
    """Where the cameras look, where the content is, and where the data says the pivot is.

    The first is the nearest point to all optical axes; the second the point to which the
    silhouettes' centroids triangulate, or, where objects leave frames or too few views show one,
    the median over views of what depth gives (`_middle`).  `pivot_distance` is between the two, in
    world units: to the middle of what was rendered, which is not quite where the object ought to
    be (a decoder may place its Gaussians deeper).  `*_relative` is in units of the cameras'
    distance.
    """
    nothing: Row = {"pivot_distance": math.nan, "pivot_relative": math.nan, "pivot_error": math.nan}
    origins = views.cameras.centers.double().numpy()
    looks_at = nearest_point(origins, views.cameras.forward.double().numpy())
    if looks_at is None:
        return nothing
    radius = float(np.median(np.linalg.norm(origins - looks_at, axis=1)))
    if radius < 1e-6:  # all cameras stand on one point
        return nothing
    out = {**nothing, "radius": radius, "looks_at": looks_at.round(4).tolist()}
    out["pivot_error"] = float(np.linalg.norm(looks_at - rig.pivot)) / radius
    content = _content(rig)
    if content is not None:
        out["content_at"] = content.round(4).tolist()
        out["pivot_distance"] = float(np.linalg.norm(content - looks_at))
        out["pivot_relative"] = out["pivot_distance"] / radius
    return out


def _content(rig: Rig) -> np.ndarray | None:
    edges = [rig.masks[:, 0], rig.masks[:, -1], rig.masks[:, :, 0], rig.masks[:, :, -1]]
    inside = np.max([edge.max(axis=1) for edge in edges], axis=0) < 0.5
    whole = rig.shown & inside
    if whole.sum() >= 0.6 * len(rig) and whole.sum() >= 3:
        point = triangulate(rig.only(whole))
        if point is not None and (project(rig, point)[1] > 0).mean() > 0.5:
            return point
    views = np.arange(len(rig)) != (-1 if rig.input_index is None else rig.input_index)
    if not rig.shown[views].any():
        return None  # nothing but the input shows anything
    middles = [_middle(rig, int(i)) for i in np.flatnonzero(rig.shown)]
    known = [point for point in middles if point is not None]
    if known:  # every view counts once, whatever it covers
        return np.median(known, axis=0)
    # A cut-off silhouette's centroid is off; two whole ones know better.
    point = triangulate(rig.only(whole)) if whole.sum() >= 2 else None
    return triangulate(rig) if point is None else point


def _middle(rig: Rig, i: int) -> np.ndarray | None:
    """Where the middle of what a view shows must be, by its depth: the median of its surface (which
    shrugs off flying pixels), and half the silhouette's radius further from the camera, because
    what is seen is the near side.  None where depth says nothing."""
    cloud = _surface(rig, i)
    if len(cloud) < 4:
        return None
    surface = np.median(cloud, axis=0)
    away = surface - rig.centers[i]
    # Of a disc of the silhouette's area, as a share of its distance.
    radius = np.sqrt(rig.masks[i].sum() / np.pi) / np.sqrt(abs(rig.Ks[i, 0, 0] * rig.Ks[i, 1, 1]))
    return surface + 0.5 * radius * away


def _surface(rig: Rig, i: int) -> np.ndarray:
    """About 200 world points on what a view shows."""
    y, x = np.nonzero((rig.masks[i] > 0.75) & (rig.depths[i] > 0))
    step = max(1, len(y) // 200)
    y, x = y[::step], x[::step]
    z = rig.depths[i, y, x]
    pixels = np.stack([x + 0.5, y + 0.5, np.ones(len(x))], axis=-1)
    local = (pixels @ np.linalg.inv(rig.Ks[i]).T) * z[:, None]
    return (local - rig.viewmats[i, :3, 3]) @ rig.viewmats[i, :3, :3]


def _frozen(
    rgb: np.ndarray, alpha: np.ndarray, angles: np.ndarray, coverage: np.ndarray, stray: float
) -> float:
    """Share of the views that repeat another view's picture although the pose differs.

    Only pictures equal to within noise (mean difference over what is covered below 0.25 of 255)
    count, and only if a solid of revolution can't explain them: the elevations differ, or depth
    contradicts the poses.
    """
    repeated = np.zeros(len(rgb), dtype=bool)
    small = rgb.reshape(len(rgb), -1)
    glance = small[:, ::61].astype(np.int16)
    contrast = small.max(axis=1).astype(int) - small.min(axis=1)
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
            off = np.abs(small[i].astype(np.int16) - small[j]).sum()
            off += np.abs(alpha[i].astype(np.int16) - alpha[j]).sum()
            if off < 0.25 * covered:
                repeated[[i, j]] = True
    return float(repeated.mean())


def _identity(views: Any) -> Row:
    """PSNR (dB) over the union of foregrounds and IoU of silhouettes of input and identity."""
    nothing = {"identity_psnr": math.nan, "identity_iou": math.nan}
    if views.identity_rgb is None or views.input_rgb is None:
        return nothing
    mine, theirs = views.input_rgb.numpy(), views.identity_rgb.numpy()
    a, b = views.input_alpha.numpy() >= 128, views.identity_alpha.numpy() >= 128
    union = a | b
    if not union.any():
        return nothing
    mse = float(np.square(mine[union].astype(np.float32) - theirs[union]).mean()) / 255.0**2
    iou = float((a & b).sum() / union.sum())
    return {"identity_psnr": -10 * math.log10(max(mse, 1e-10)), "identity_iou": iou}
