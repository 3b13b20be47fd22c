"""What the gate's checks look at: numbers measured on one record of a dataset.

Emptiness and exposure are told apart by alpha: coverage says how much of the frame is covered,
luminance is that of covered pixels only.
"""

import math
import warnings
from typing import Any

import numpy as np
import torch
from scipy.ndimage import gaussian_filter, minimum_filter
from scipy.spatial.distance import pdist, squareform
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, interpolate

from fresnel.data.records import ObjectViews, oriented
from fresnel.gate.faces import measure_faces
from fresnel.poses import geometry
from fresnel.poses.epipolar import misfit
from fresnel.poses.geometry import Rig, Row
from fresnel.scene.cameras import Cameras, gravity_frame
from fresnel.scene.colour import LUMINANCE_WEIGHTS, srgb_to_linear

_LINEAR = srgb_to_linear(torch.arange(256) / 255.0).numpy()
_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32) / 255.0
_SIDE = 128
"""Pictures larger than this are looked at in steps of whole pixels, for what is an average."""
_EMPTY_COVERAGE, _EMPTY_RATIO = 0.001, 0.02
"""A view that covers less than this, or less than this of what its input covers, is empty."""
_WHOLE = 128
"""Up to how many views all of them are kept, small, to find out what is wrong with their order."""
_BINS = 12
"""Of each channel, in a histogram of colours."""
_Numbers = dict[str, np.ndarray]


def measure(views: ObjectViews, *, trust_input: bool = True) -> tuple[list[Row], Row, Rig | None]:
    """All numbers of one record, whose pictures are over black.

    Args:
        trust_input: whether the input's depth is metric and its alpha known.

    Returns:
        The rows of `Verdict.measurements`, the row of `Verdict.objects`, and the worst of what
        poses are asked of (None where the pictures have no foreground or the poses are no poses).
    """
    views, tilt = oriented(views)
    stored_rgb, stored_alpha = views.rgb.numpy(), views.alpha.numpy()
    rgb, alpha, foreground = _foreground(stored_rgb, stored_alpha)
    summary = {**print_of(views), "error": None, "views": len(rgb), "foreground": foreground}
    summary["up_tilt_deg"] = tilt
    summary["bad_poses"] = sum(map(_is_bad, [*iter(views.cameras), views.input_camera]))
    depth = None if views.depth is None else views.depth.numpy()
    summary["bad_depth"] = 0 if depth is None else int((~np.isfinite(depth)).sum())

    masks, guessed = foreground == "masks", foreground == "estimated"
    # What shines through an edge differs from view to view where the background does.
    inner, solid = (rgb * (alpha >= 250)[..., None], 250) if masks else (rgb, 128)
    behind = np.median(_border(stored_rgb), axis=(0, 1)) if guessed else None
    seen = _pictures(rgb, alpha, solid, behind)
    reference = _reference(views, rgb.shape[1:3], behind, solid)
    angles = np.full((len(rgb), 2), np.nan)
    if not summary["bad_poses"]:
        around = views.cameras.transformed(gravity_frame(views.input_camera, views.pivot))
        angles[:, 0], angles[:, 1] = around.azimuth_deg((0, 0, 0)), around.elevation_deg((0, 0, 0))
    constant = [_constant(c, a) for c, a in zip(stored_rgb, stored_alpha, strict=True)]
    rows = _rows(views.name, seen, reference, angles, constant)
    areas, toward = _framing(views)
    for row, area in zip(rows, areas.tolist(), strict=True):  # further away it covers less
        row["coverage_ratio"] /= area
    summary |= _of_record(seen, reference, angles[:, 0], toward) | _identity(views)
    summary |= _colours(views, rgb, alpha, toward, summary["looks"])
    edges = (stored_rgb if guessed else rgb) @ _LUMA if foreground != "alpha" else alpha / 255.0
    summary["evenness"] = _evenness(edges) if foreground != "none" else math.nan
    summary |= measure_faces(views, rgb, alpha, angles[:, 0])
    rig = None
    if summary["bad_poses"] or summary["bad_depth"]:
        pass
    elif foreground == "none":
        summary["epipolar"] = misfit(views)
    else:
        rigs = geometry.rigs_of(views, rgb, alpha, with_input=trust_input)
        found, rig = _poses(rigs)
        found["frail"] = any(one.frail for one in rigs)
        if len(rigs) > 1 and len(rgb) <= _WHOLE:  # in which orders of views can be tried
            rig = geometry.rigs_of(views, rgb, alpha, with_input=trust_input, most=_WHOLE)[0]
        summary |= found | geometry.pivot(views, rigs[0])
    summary["frozen"] = _frozen(inner, alpha, angles, seen["coverage"], summary.get("stray", 0.0))
    return rows, summary, rig


def print_of(views: ObjectViews) -> Row:
    """As much of a record's row as tells whether another set has it: its name, `prints` of its
    views and its input, 12 pixels wide, (V + 1, 4, 12, 12), and its `looks`, how often its views
    have which colours: the roots of a smoothed histogram, of length 1 (their products are
    Bhattacharyya's coefficients)."""
    rgb, alpha, _ = _foreground(views.rgb.numpy(), views.alpha.numpy())
    own = views.input_rgb.numpy()[None], views.input_alpha.numpy()[None]
    small = [
        adaptive_avg_pool2d(
            torch.from_numpy(np.concatenate([c, a[..., None]], -1)).movedim(-1, 1).float(), 12
        )
        for c, a in ((rgb, alpha), own)
    ]
    prints = torch.cat(small).numpy().astype(np.float16)
    return {"name": views.name, "prints": prints, "looks": _looks(rgb, alpha)}


def _looks(rgb: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """The colours of pictures over black: see `print_of`."""
    colours, cover = rgb[alpha >= 200], alpha[alpha >= 200]
    step = max(1, len(colours) // 50_000)
    straight = colours[::step] * (255 / cover[::step, None].astype(np.float32))
    counts = np.histogramdd(straight.clip(0, 255), _BINS, [(0, 256)] * 3)[0]
    looks = np.sqrt(gaussian_filter(counts / max(len(straight), 1), 1.0, mode="nearest")).ravel()
    return (looks / max(float(np.linalg.norm(looks)), 1e-9)).astype(np.float32)


def _foreground(rgb: np.ndarray, alpha: np.ndarray) -> tuple[np.ndarray, np.ndarray, str]:
    """Pictures over black, alpha, and where alpha comes from.

    "alpha": as stored; "masks": as stored, over a photograph; "estimated": opaque pictures whose
    border is of one colour, which is taken out; "none": opaque photographs, whose foreground nobody
    knows, with or without the rim that taking out a lens's distortion leaves.
    """
    if (alpha == 255).all():
        border = _border(rgb)
        colour = np.median(border, axis=1).astype(np.int16)
        off = np.abs(border.astype(np.int16) - colour[:, None]).max(axis=-1)
        if (np.mean(off > 12, axis=1) < 0.25).mean() < 0.75:
            return rgb, alpha, "none"
        away = np.abs(rgb.astype(np.int16) - colour[:, None, None]).max(axis=-1)
        # As little as stands out from the border's own noise and haze; an object that touches it
        # is neither.
        solid = away > max(3.0, 2 * float(np.quantile(off[off <= 64], 0.98)))
        return rgb * solid[..., None], np.uint8(255) * solid, "estimated"
    by, across = (max(1, n // 8) for n in alpha.shape[1:])
    full = len(alpha) > 1 and (alpha[:, by:-by, across:-across] == 255).all()
    if full and ((alpha >= 128) != (alpha[:1] >= 128)).mean() < 0.01:
        return rgb, alpha, "none"  # a rim, in all views alike
    behind = alpha == 0
    if behind.any() and rgb[behind].mean() > 8:
        # Edge pixels keep some of the photograph behind them; the solid ones are exact.
        return (rgb * (alpha[..., None] / np.float32(255))).astype(np.uint8), alpha, "masks"
    return rgb, alpha, "alpha"


def _border(rgb: np.ndarray) -> np.ndarray:
    """The outermost pixels of each picture, (V, N, ...)."""
    return np.concatenate([rgb[:, 0], rgb[:, -1], rgb[:, :, 0], rgb[:, :, -1]], axis=1)


def _constant(rgb: np.ndarray, alpha: np.ndarray) -> bool:
    """Whether a frame is of one colour and claims to be covered."""
    if alpha.mean() <= 127 or np.abs(rgb[::3, ::3].astype(np.int16) - rgb[0, 0]).max() > 2:
        return False  # every third pixel mostly shows that it is not
    return all(np.abs(x.astype(np.int16) - x[0, 0]).max() <= 2 for x in (rgb, alpha))


def _pictures(
    rgb: np.ndarray, alpha: np.ndarray, solid: int, behind: np.ndarray | None
) -> _Numbers:
    """Numbers of pictures over black, each (V,), colour (V, 3)."""
    step, width = max(1, rgb.shape[1] // _SIDE), rgb.shape[2]
    coarse, cover = rgb[:, ::step, ::step], alpha[:, ::step, ::step]
    light = [_light(c, a, solid, behind) for c, a in zip(coarse, cover, strict=True)]
    grain = [_grain(c, a) for c, a in zip(rgb, alpha, strict=True)]
    return {
        **{key: np.array([item[key] for item in light]) for key in light[0]},
        "coverage": cover.mean(axis=(1, 2)) / 255.0,
        "detail": _detail(rgb, alpha),
        "grain": np.array(grain),
        # What stands on the lower edge, as a portrait does, has not left the frame.
        "border": np.delete(_border(alpha), np.s_[width : 2 * width], axis=1).mean(axis=1) / 255.0,
    }


def _light(
    rgb: np.ndarray, alpha: np.ndarray, solid: int, behind: np.ndarray | None
) -> dict[str, Any]:
    """Of the covered pixels (alpha at least `solid`, or a half where hardly any are), colour
    un-premultiplied so that a half-transparent white object is white: mean linear luminance and
    colour; the share at either end of the scale (`clipped`), at the black end (`crushed`), and of
    which some channel is black (`floored`).  NaN without any."""
    mask = alpha >= (solid if (alpha >= solid).sum() >= 20 else 128)
    if not mask.any():
        nothing = dict.fromkeys(("luminance", "clipped", "crushed", "floored", "top"), math.nan)
        return {**nothing, "color": np.full(3, np.nan)}
    color, weight = rgb[mask].astype(np.float32), alpha[mask].astype(np.float32)
    straight = np.minimum(color * (255.0 / weight)[:, None] + 0.5, 255).astype(np.uint8)
    shown = straight
    if behind is not None:  # half of a guessed foreground may be haze: what stands out most is not
        away = np.abs(straight.astype(np.float32) - behind).max(axis=1)
        shown = straight[away >= np.median(away)]
    linear, brightest = _LINEAR[shown].mean(axis=0), straight.max(axis=1)
    return {
        "luminance": float(linear @ np.array(LUMINANCE_WEIGHTS, np.float32)),
        "clipped": float(((brightest <= 1) | (brightest >= 254)).mean()),
        "crushed": float((brightest <= 1).mean()),
        "floored": float((straight.min(axis=1) <= 1).mean()),
        "top": float(np.quantile(brightest, 0.99)),
        "color": linear,
    }


def _detail(rgb: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """RMS gradient of luma over black and of alpha, per covered pixel, (V,).

    Alpha's share makes it see the blur of a black or single-coloured object at its outline.  Of
    large pictures every second row of gradients is taken.
    """
    rows = slice(None, None, max(1, rgb.shape[1] // _SIDE))
    energy, cover = np.zeros(len(rgb)), alpha[:, rows].astype(np.float32) / 255.0
    for channel in (rgb[:, rows] @ _LUMA, cover):
        energy += 2 * np.square(np.diff(channel, axis=2)).sum(axis=(1, 2))
    covered = cover.sum(axis=(1, 2))
    return np.where(covered > 1, np.sqrt(energy / np.maximum(covered, 1)), np.nan)


def _grain(rgb: np.ndarray, alpha: np.ndarray) -> float:
    """How strong noise is inside the object, of 255: the least of green's absolute second
    differences along rows, columns and both, each the lower quartile, on the scale of the median
    along rows of white noise.  That is everywhere and in all directions; what is drawn on an object
    leaves plain spots, or a direction."""
    if min(alpha.shape) < 8:
        return math.nan
    green = rgb[..., 1].astype(np.int16)
    # Three pixels away from the outline, where edges are guessed or blended.
    solid = minimum_filter(alpha, 7, mode="constant")[1:-1, 1:-1] == 255
    rows, columns = np.diff(green, 2, axis=1), np.diff(green, 2, axis=0)
    parts = (rows[1:-1], 1.0), (columns[:, 1:-1], 1.0), (np.diff(rows, 2, axis=0), 2.45)
    if solid.sum() < 20:
        return math.nan
    return min(float(np.quantile(np.abs(part[solid]), 0.25)) / by for part, by in parts) / 0.472


def _reference(
    views: ObjectViews, size: tuple[int, int], behind: np.ndarray | None, solid: int
) -> _Numbers:
    """The numbers of the input, its detail at the views' size.

    Where the views' foreground had to be guessed, the input's is guessed the same way, over the
    same colour: both then err alike at their edges.
    """
    rgb, alpha = views.input_rgb.numpy()[None], views.input_alpha.numpy()[None]
    if behind is not None:
        rest = 1 - alpha[..., None] / np.float32(255)
        over = np.clip(rgb + rest * behind, 0, 255).astype(np.uint8)
        rgb, alpha, _ = _foreground(over, np.full_like(alpha, 255))
    out = _pictures(rgb, alpha, solid, behind)
    if alpha.shape[1:] != size:
        both = torch.from_numpy(np.concatenate([rgb, alpha[..., None]], -1)).permute(0, 3, 1, 2)
        small = interpolate(both.float(), size, mode="bilinear", antialias=True)
        picture = small.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
        out["detail"] = _detail(picture[..., :3], picture[..., 3])
    return {name: value[0] for name, value in out.items()}


def _rows(
    name: str, seen: _Numbers, reference: _Numbers, angles: np.ndarray, constant: list[bool]
) -> list[Row]:
    columns = {"azimuth_deg": angles[:, 0], "elevation_deg": angles[:, 1]}
    columns |= {key: seen[key] for key in ("coverage", "luminance", "border")}
    # The floor keeps black objects, whose ratio is noise, near 1.
    for key, floor in (("coverage", 0.0), ("luminance", 0.004), ("detail", 0.0)):
        whole = reference[key] + floor
        columns[f"{key}_ratio"] = (seen[key] + floor) / (whole if whole > 0 else np.nan)
    columns |= {k: seen[k] - reference[k] for k in ("grain", "clipped", "crushed", "floored")}
    columns |= {"black": seen["crushed"] > 0.99, "constant": np.array(constant)}
    nothing = seen["coverage"] < _EMPTY_COVERAGE
    columns["empty"] = nothing | (columns["coverage_ratio"] < _EMPTY_RATIO)
    return [
        {"object": name, "view": i} | {key: value[i].item() for key, value in columns.items()}
        for i in range(len(angles))
    ]


def _framing(views: ObjectViews) -> tuple[np.ndarray, np.ndarray]:
    """By their cameras, what share of a view an object at the pivot covers of what it covers of the
    input, at most 1, and the cosine of the angle between the two, each (V,). An input camera that
    stands at the pivot, as the original experiment's, says nothing of that: 1."""
    cameras, own = views.cameras, views.input_camera

    def scale(one: Cameras) -> Tensor:
        focal = (one.Ks[..., 0, 0] * one.Ks[..., 1, 1]).abs() / (one.width * one.height)
        return focal / (one.centers - views.pivot).square().sum(-1).clamp_min(1e-12)

    area = (scale(cameras) / scale(own).clamp_min(1e-12)).nan_to_num(1.0).clamp_max(1.0)
    area = torch.where(area < 0.01, 1.0, area)
    return area.double().numpy(), (cameras.forward @ own.forward).nan_to_num(0.0).numpy()


def _of_record(
    seen: _Numbers, reference: _Numbers, azimuth_deg: np.ndarray, toward: np.ndarray
) -> Row:
    """What only several views together tell: `drift`, the median absolute step of log luminance
    between neighbours in azimuth; `swapped`, the distance of the views' mean colour to the input's
    over that to the input's with red and blue exchanged, of all views or of those from the input's
    side, whichever is less: other sides have other colours."""
    out: Row = {f"input_{key}": float(reference[key]) for key in ("coverage", "luminance")}
    tops = [reference["top"], *seen["top"][np.isfinite(seen["top"])]]
    out["top"] = float(max(tops[0], np.median(tops[1:]))) if len(tops) > 1 else math.nan
    usable = np.isfinite(seen["luminance"]) & np.isfinite(azimuth_deg)
    light = np.log(seen["luminance"][usable][np.argsort(azimuth_deg[usable])] + 0.01)
    steps = np.abs(light - np.roll(light, 1))
    out["drift"] = float(np.median(steps)) if len(steps) >= 4 else math.nan
    if usable.any():  # of the view from about the input's side
        nearest = np.argmin(np.where(usable, np.abs(azimuth_deg), np.inf))
        out["near_ratio"] = float(
            (seen["luminance"][nearest] + 0.004) / (reference["luminance"] + 0.004)
        )
    known = np.isfinite(seen["color"]).all(axis=1)
    sides, theirs = [known, known & (toward > 0.7)], np.sqrt(reference["color"])
    # Only a colour with red and blue apart can tell whether they changed places.
    if sides[1].any() and abs(theirs[0] - theirs[2]) > 0.06:
        mine = np.sqrt([np.median(seen["color"][side], axis=0) for side in sides])
        same, swapped = (np.abs(mine - to).sum(axis=1) for to in (theirs, theirs[::-1]))
        out["swapped"] = float((same / np.maximum(swapped, 1e-6)).min())
    return out


def _colours(
    views: ObjectViews, rgb: np.ndarray, alpha: np.ndarray, toward: np.ndarray, looks: np.ndarray
) -> Row:
    """Whether the views' colours are the input's at all: `saturation`, that of the most colourful
    view over the input's, where that is no grey; and `negated`, how much likelier its negative
    would give them (of all views or of those from its side, whichever are liker), 0 where nothing
    is much like the negative, or red and blue exchanged fit better."""
    rows = np.flatnonzero(toward >= min(0.7, float(toward.max())))
    own = views.input_rgb.numpy()[None], views.input_alpha.numpy()[None]
    mine = _looks(*own).reshape((_BINS,) * 3)
    sides = np.stack([looks, _looks(rgb[rows], alpha[rows])])
    others = (mine, mine[::-1, ::-1, ::-1], mine.transpose(2, 1, 0))
    same, negative, swapped = ((sides @ one.ravel()).max() for one in others)
    is_negative = negative > max(swapped, 0.7)
    tops, chroma = [], []
    for colours, cover in zip((own[0][0], *rgb), (own[1][0], *alpha), strict=True):
        solid = colours[cover >= 200].astype(np.float32)
        tops.append(max(float(solid.max(axis=1).sum()) if len(solid) else 0.0, 1e-6))
        chroma.append(float(np.ptp(solid, axis=1).sum()) if len(solid) else 0.0)
    shares = np.array(chroma) / np.array(tops)
    coloured = chroma[0] > 10 * max(int((own[1] >= 200).sum()), 1)
    return {
        "saturation": float(shares[1:].max() / shares[0]) if coloured else math.nan,
        "negated": float(negative / max(same, 1e-3)) if is_negative else 0.0,
    }


def _evenness(pictures: np.ndarray) -> float:
    """How sharp the softest quarter of views (V, H, W) is beside the sharpest: quartiles of
    gradients, each weighted by itself, over the picture's range, which depends neither on how long
    edges are nor much on exposure."""
    steps = [np.abs(np.diff(pictures, axis=k)).reshape(len(pictures), -1) for k in (1, 2)]
    total, squares = (sum(one(part).sum(axis=1) for part in steps) for one in (np.abs, np.square))
    sharp = (squares / np.maximum(total * np.ptp(pictures, axis=(1, 2)), 1e-6))[total > 1]
    return (
        float(np.quantile(sharp, 0.25) / np.quantile(sharp, 0.75)) if len(sharp) > 1 else math.nan
    )


def _identity(views: ObjectViews) -> Row:
    """`identity` of a record, NaN where it has no picture from its input's camera."""
    found = math.nan, math.nan
    if views.identity_rgb is not None and views.identity_alpha is not None:
        given = views.input_rgb, views.input_alpha
        found = identity(*given, views.identity_rgb, views.identity_alpha)
    return {"identity_psnr": found[0], "identity_iou": found[1]}


def identity(rgb: Tensor, alpha: Tensor, own_rgb: Tensor, own_alpha: Tensor) -> tuple[float, float]:
    """PSNR (dB) over the union of foregrounds, and IoU of silhouettes, of an input, uint8 (H, W, 3)
    and (H, W), and what is rendered from its camera; NaN where both are empty."""
    mine, theirs = alpha.numpy() >= 128, own_alpha.numpy() >= 128
    union = mine | theirs
    if not union.any():
        return math.nan, math.nan
    off = rgb.numpy()[union].astype(np.float32) - own_rgb.numpy()[union]
    mse = float(np.square(off).mean()) / 255.0**2
    return -10 * math.log10(max(mse, 1e-10)), float((mine & theirs).sum() / union.sum())


def _is_bad(camera: Any) -> bool:
    """Whether a pose is NaN, not a rotation, mirrored, or has no positive focal length."""
    try:
        camera.validate()
    except ValueError:
        return True
    return False


def _poses(rigs: list[Rig]) -> tuple[Row, Rig]:
    """Consistency of poses with pictures (shares, image widths, degrees), the mean over all rigs of
    a record, and the worst rig."""
    rows: list[Row] = []
    for rig in rigs:
        row = geometry.coherence(rig) | geometry.photometric(rig)
        rows.append(row | {"centroid_residual": geometry.centroid_residual(rig)[0]})
    with warnings.catch_warnings(action="ignore", category=RuntimeWarning):
        mean = {key: float(np.nanmean([row[key] for row in rows])) for key in rows[0]}
        jumps = [row["jump"] for row in rows if row["jump"] >= 0]
        mean["jump"] = max(jumps, default=math.nan)
    worst = np.argmax(np.nan_to_num([row["mismatch"] for row in rows], nan=-1.0))
    return mean, rigs[int(worst)]


def _frozen(
    rgb: np.ndarray, alpha: np.ndarray, angles: np.ndarray, coverage: np.ndarray, stray: float
) -> float:
    """Share of the views that repeat another view's picture although the pose differs.

    Only pictures equal to within noise (mean difference over what is covered below 0.25 of 255)
    count, and only if a solid of revolution can't explain them: the elevations differ, or depth
    contradicts the poses.
    """
    repeated, small = np.zeros(len(rgb), dtype=bool), rgb.reshape(len(rgb), -1)
    shown = np.flatnonzero((coverage > 0.002) & (np.ptp(small, axis=1) > 8))
    if len(shown) < 2:
        return 0.0
    turn = np.abs((angles[shown, 0] - angles[shown, 0, None] + 180) % 360 - 180)
    tilt = np.abs(angles[shown, 1] - angles[shown, 1, None])
    moved = (np.maximum(turn, tilt) >= 5) & ((tilt >= 2) | (stray > 0.02))
    # A glance at some pixels first: almost every pair differs there.
    glance = small[shown, ::61].astype(np.float32)
    alike = squareform(pdist(glance, "cityblock")) / glance.shape[1] <= 2
    for i, j in shown[np.argwhere(np.triu(moved & alike, 1))]:
        if repeated[i] and repeated[j]:
            continue
        covered = 4 * max(int((alpha[i] >= 64).sum()), int((alpha[j] >= 64).sum()))
        off = np.abs(small[i].astype(np.int16) - small[j]).sum()
        off += np.abs(alpha[i].astype(np.int16) - alpha[j]).sum()
        repeated[[i, j]] |= off < 0.25 * covered
    return float(repeated.mean())
