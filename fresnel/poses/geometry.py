"""Do poses and pictures belong together?  Silhouettes, depth and colours asked across views.

A `Rig` is what all questions are asked of: cameras, and small masks, depths and colours beside
them.  Whatever rewrites its cameras (see `explain`) can ask again.
"""

from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch
from scipy.ndimage import binary_opening, maximum_filter
from scipy.optimize import least_squares
from torch.nn.functional import interpolate

from fresnel.data.records import ObjectViews

Row = dict[str, Any]
_SIDE, _VIEWS = 64, 16  # of a rig: pixels, and views beside the input
_RAYS, _DEPTHS = 40, 48


@dataclass(frozen=True)
class Rig:
    """V cameras and what they saw, small.

    Args:
        viewmats: world-to-camera, float64 (V, 4, 4).
        Ks: pixels of the small pictures, float64 (V, 3, 3).  A negative K[0, 0] says that the
            picture is mirrored left to right.
        masks: covered share of each pixel, float32 (V, h, w).
        colors: sRGB in [0, 1] over black, float32 (V, h, w, 3).
        depths: z-depth (V, h, w), 0 where unknown.
        views: which rows are views, not the input, (V,).
        pivot: what the data says the views turn about, (3,).
        whole: whether all of a record's views are here, in their order.
    """

    viewmats: np.ndarray
    Ks: np.ndarray
    masks: np.ndarray
    colors: np.ndarray
    depths: np.ndarray
    views: np.ndarray
    pivot: np.ndarray
    whole: bool = True

    @property
    def width(self) -> int:
        return int(self.masks.shape[2])

    @property
    def centers(self) -> np.ndarray:
        return -np.einsum("vji,vj->vi", self.viewmats[:, :3, :3], self.viewmats[:, :3, 3])

    @property
    def shown(self) -> np.ndarray:
        """Views that show something and not everything, (V,)."""
        coverage = self.masks.mean(axis=(1, 2))
        return (coverage > 0.001) & (coverage < 0.98)

    @property
    def frail(self) -> bool:
        """Whether outlines may lack what is thinner than a pixel: no pixel is half covered, and of
        some view more than 3 % is less than three wide (heads 1.4 %)."""
        masks = self.masks[self.views & self.shown]
        solid, partial = masks > 0.5, ((masks > 0.05) & (masks < 0.95)).sum()
        if partial >= 0.1 * np.diff(solid, axis=2).sum():
            return False
        thick = binary_opening(solid, np.ones((1, 3, 3)))
        share = (solid & ~thick).sum(axis=(1, 2)) / np.maximum(solid.sum(axis=(1, 2)), 1)
        return bool(share.max(initial=0.0) > 0.03)

    def only(self, which: Any) -> Self:
        """Fewer views, by index or mask."""
        names = ("viewmats", "Ks", "masks", "colors", "depths", "views")
        chosen: dict[str, Any] = {name: getattr(self, name)[which] for name in names}
        return replace(self, **chosen, whole=False)

    def put(self, which: np.ndarray, **matrices: np.ndarray) -> Self:
        """Other `viewmats` or `Ks` for some views."""
        changed: dict[str, Any] = {name: getattr(self, name).copy() for name in matrices}
        for name, new in matrices.items():
            changed[name][which] = new
        return replace(self, **changed)


def rigs_of(
    views: ObjectViews, rgb: np.ndarray, alpha: np.ndarray, *, with_input: bool, most: int = _VIEWS
) -> list[Rig]:
    """Rigs of a record that hold all its views between them, each a few from all around.

    Args:
        rgb, alpha: the views' pictures over black, uint8.
        with_input: take the input camera and picture in as the last row of each.
        most: views in each.
    """
    scale = min(1.0, _SIDE / max(alpha.shape[1:]))
    shape = tuple(max(1, round(side * scale)) for side in alpha.shape[1:])
    given = [(views.cameras, rgb, alpha, views.depth)]
    if with_input:
        own = views.input()
        given.append((own.cameras, own.rgb.numpy(), own.alpha.numpy(), own.depth))
    parts = []
    for cameras, colour, cover, depth in given:
        size = cover.shape[1:]
        # Of large pictures every second pixel (or fewer) is averaged: two a side are enough.
        step = max(1, min(size[0] // shape[0], size[1] // shape[1]) // 2)
        thin = np.concatenate([colour[:, ::step, ::step], cover[:, ::step, ::step, None]], axis=-1)
        small = torch.from_numpy(thin).permute(0, 3, 1, 2).float() / 255
        layers = interpolate(small, shape, mode="area").permute(0, 2, 3, 1).numpy()
        # Depth is picked, not averaged: a mean across an edge lies on no surface.
        y, x = (
            ((np.arange(a) + 0.5) * b / a).astype(int) for a, b in zip(shape, size, strict=True)
        )
        depths = np.zeros((len(cover), *shape))
        if depth is not None:
            depths[:] = np.nan_to_num(depth.numpy()[:, y][:, :, x])
        by = np.array([shape[1] / cameras.width, shape[0] / cameras.height, 1.0])
        Ks = cameras.Ks.double().numpy() * by[:, None]
        parts.append(
            (cameras.viewmats.double().numpy(), Ks, layers[..., 3], layers[..., :3], depths)
        )
    columns: list[Any] = [np.concatenate(column) for column in zip(*parts, strict=True)]
    rows, count = np.arange(len(columns[0])), -(-len(rgb) // most)
    columns += [rows < len(rgb), views.pivot.double().numpy()]
    whole = Rig(*columns)
    split = [(rows % count == part) | ~whole.views for part in range(count)]
    return [whole] if count == 1 else [whole.only(part) for part in split]


def nearest_point(
    origins: np.ndarray, directions: np.ndarray, least: float = 0.01
) -> np.ndarray | None:
    """Least-squares nearest point to lines (N, 3); None where they are nearly parallel: where the
    mean square of their sines is below `least`."""
    directions = directions / np.linalg.norm(directions, axis=1, keepdims=True)
    projectors = np.eye(3) - directions[:, :, None] * directions[:, None, :]
    matrix = projectors.sum(axis=0)
    if not np.isfinite(matrix).all() or np.linalg.eigvalsh(matrix)[0] < least * len(origins):
        return None
    return np.linalg.solve(matrix, (projectors @ origins[:, :, None]).sum(axis=0)[:, 0])


def _centroids(rig: Rig) -> np.ndarray:
    """Centroids of the silhouettes in pixels, (V, 2)."""
    y, x = (np.arange(side) + 0.5 for side in rig.masks.shape[1:])
    sums = np.stack([rig.masks.sum(axis=1) @ x, rig.masks.sum(axis=2) @ y], axis=1)
    return sums / rig.masks.sum(axis=(1, 2))[:, None]


def _rays(rig: Rig, who: Any, pixels: np.ndarray) -> np.ndarray:
    """World directions with z-depth 1 of pixels (N, 2) of the views `who` (N,), (N, 3)."""
    homogeneous = np.concatenate([pixels, np.ones((len(pixels), 1))], axis=1)
    local = np.einsum("nij,nj->ni", np.linalg.inv(rig.Ks)[who], homogeneous)
    return np.einsum("nji,nj->ni", rig.viewmats[who][:, :3, :3], local)


def _project(rig: Rig, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pixels (V, 2, P) and z-depths (V, P) of world points (P, 3)."""
    matrices = (rig.Ks @ rig.viewmats[:, :3]).astype(points.dtype)
    local = matrices[:, :, :3] @ points.T + matrices[:, :, 3:]
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        return local[:, :2] / local[:, 2:], local[:, 2]


def triangulate(rig: Rig) -> np.ndarray | None:
    """The point nearest to the rays through the silhouettes' centroids, (3,)."""
    rig = rig.only(rig.shown)
    if len(rig.masks) < 2:
        return None
    return nearest_point(rig.centers, _rays(rig, slice(None), _centroids(rig)), 1e-3)


def centroid_residual(rig: Rig, *, shifted: bool = False) -> tuple[float, ...]:
    """How far the silhouettes' centroids are from the image of one point.

    Args:
        shifted: look for the common shift of all pictures that brings them nearest to it.

    Returns:
        Their RMS distance and that shift (x, y) in image widths; NaN where it can't be asked.
    """
    point, rig = triangulate(rig), rig.only(rig.shown)
    if point is None or len(rig.masks) < 4 or (_project(rig, point[None])[1] <= 0).any():
        return np.nan, np.nan, np.nan
    target, best = _centroids(rig), np.array([*point, 0.0, 0.0])

    def off(guess: np.ndarray) -> np.ndarray:
        pixels = _project(rig, guess[None, :3])[0][..., 0]
        return np.nan_to_num(target - pixels - guess[3:], posinf=1e6).ravel()

    if shifted:
        best = least_squares(off, best, x_scale=[*[1.0] * 3, *[rig.width] * 2]).x
    rms = np.sqrt(np.square(off(best)).sum() / len(target))
    return tuple((np.array([rms, *best[3:]]) / rig.width).tolist())


def score(rig: Rig) -> float:
    """Inconsistency: 0 healthy, about 0.1 and more for wrong poses, NaN where not asked."""
    return float(coherence(rig)["mismatch"])


def coherence(rig: Rig) -> Row:
    """How well silhouettes of different views explain each other, after Hernandez, Schmitt and
    Cipolla (TPAMI 2007).

    Every ray through a silhouette must meet the object somewhere, so it holds at least one point
    that lies inside all other silhouettes.  Points are sampled along the rays within a sphere
    about the triangulated centre; silhouettes are grown by a pixel.  Outside a frame counts as a
    miss unless the object leaves that frame.

    Returns:
        `hull_iou`, the share of silhouette that the visual hull of all views projects back onto
        (the hull never leaves a silhouette, so this is their intersection over union);
        `hull_miss`, the mean share of the other views whose silhouette a ray misses at its best
        point (0 for consistent data, whatever the object's shape) and a tenth of what `hull_iou`
        lacks; `stray`, the former at the point where depth says the surface is, NaN without depth;
        `input_miss`, what the input misses with the views, both ways, less what the median view
        does, NaN without an input; and `mismatch`, see `score`.
    """
    unasked = dict.fromkeys(("hull_iou", "hull_miss", "stray", "input_miss", "mismatch"), np.nan)
    impossible = unasked | {"hull_iou": 0.0, "hull_miss": 1.1, "mismatch": 1.1}
    rig = rig.only(rig.shown)
    # A hardly covered view has no pixel that is mostly covered.
    picked = [_spread(mask > (0.6 if (mask > 0.6).any() else 0.1), _RAYS) for mask in rig.masks]
    if any(len(pixels) < 2 for pixels in picked):
        rig = rig.only(np.array([len(pixels) >= 2 for pixels in picked]))
        picked = [pixels for pixels in picked if len(pixels) >= 2]
    count = len(picked)
    centre = triangulate(rig)
    if count < 3 or centre is None:
        return unasked if count < 3 else impossible
    z = _project(rig, centre[None])[1][:, 0]
    if (z <= 0).mean() > 0.3:
        return impossible
    reach = [
        np.abs((pixels + 0.5 - middle) / np.diagonal(K)[:2]).max()
        for pixels, middle, K in zip(picked, _centroids(rig), rig.Ks, strict=True)
    ]
    radius = 1.25 * float(np.median(np.abs(z) * reach)) + 1e-6
    who = np.repeat(np.arange(count), [len(pixels) for pixels in picked])
    pixels = np.concatenate(picked)
    toward, origin = _rays(rig, who, pixels + 0.5), rig.centers[who]
    middle = np.einsum("vi,vi->v", centre - origin, toward) / np.square(toward).sum(axis=1)
    half = radius / np.linalg.norm(toward, axis=1)
    sampled = np.maximum(middle[:, None] + half[:, None] * np.linspace(-1, 1, _DEPTHS), 1e-3)
    given = rig.depths[who, pixels[:, 1], pixels[:, 0]]
    known = given > 0
    depths = np.concatenate([sampled, np.where(known, given, 1.0)[:, None]], axis=1)
    points = (origin[:, None] + depths[..., None] * toward[:, None]).astype(np.float32)
    pixel, z = _project(rig, points.reshape(-1, 3))
    pixel, (height, width) = pixel.reshape(count, 2, *depths.shape), rig.masks.shape[1:]
    x, y = (  # in a frame with a rim of one pixel, on which everything outside lies
        np.fmax(np.fmin(pixel[:, axis], side), -1).astype(np.int32) + 1
        for axis, side in enumerate((width, height))
    )
    framed = np.pad(_grown(rig.masks > 0.05), ((0, 0), (1, 1), (1, 1)))
    # Where an object leaves the frame nobody knows what is beyond.
    leaves = np.max([(edge > 0.5).mean(axis=1) for edge in _edges(rig.masks)], axis=0) > 0.03
    framed[leaves, 0] = framed[leaves, -1] = framed[leaves, :, 0] = framed[leaves, :, -1] = True
    at = np.arange(len(who))
    start = framed[0].size * np.arange(count, dtype=np.int32)[:, None, None]
    missed = ~framed.ravel().take(start + y * (width + 2) + x) | (z <= 1e-3).reshape(x.shape)
    missed[who, at] = False  # a view can't miss what it shows
    misses = missed.sum(axis=0, dtype=np.int32)
    best = np.argmin(misses[:, :-1], axis=1)
    worst = misses[at, best]
    out, iou = dict(unasked), float((worst == 0).mean())
    out |= {"hull_iou": iou, "hull_miss": float((worst / (count - 1)).mean()) + 0.1 * (1 - iou)}
    if known.sum() >= 8:
        rim = (x[..., -1] % (width + 1) == 0) | (y[..., -1] % (height + 1) == 0)
        asked = ~(rim & leaves[:, None])
        asked[who, at] = False
        out["stray"] = float((misses[known, -1] / np.maximum(asked.sum(axis=0)[known], 1)).mean())
    if not rig.views.all():
        by_view = missed[:, at, best]
        votes = np.stack([by_view[:, who == view].mean(axis=1) for view in range(count)])
        np.fill_diagonal(votes, np.nan)
        of_view = (np.nanmean(votes, axis=0) + np.nanmean(votes, axis=1)) / 2
        out["input_miss"] = float(of_view[~rig.views][0] - np.median(of_view[rig.views]))
    return out | {"mismatch": out["hull_miss"] + float(np.nan_to_num(out["stray"]))}


def _spread(mask: np.ndarray, count: int) -> np.ndarray:
    """About `count` pixels (x, y) of a mask, evenly strided in reading order."""
    ys, xs = np.nonzero(mask)
    keep = np.linspace(0, len(ys) - 1, min(count, len(ys))).round().astype(int)
    return np.stack([xs[keep], ys[keep]], axis=1)


def _grown(masks: np.ndarray) -> np.ndarray:
    """Masks (V, H, W) grown by a pixel to all sides."""
    return maximum_filter(masks, size=(1, 3, 3), mode="constant")


def _edges(masks: np.ndarray) -> list[np.ndarray]:
    return [masks[:, 0], masks[:, -1], masks[:, :, 0], masks[:, :, -1]]


def photometric(rig: Rig) -> Row:
    """Colours and depths carried from each view to its two nearest neighbours.

    Returns:
        `photometric`, the mean colour difference at the same surface point over that of unrelated
        points (0: the same object, 1: unrelated), NaN for objects of one colour; `floating`, the
        share of surface points that float in front of what the neighbour sees there; and what the
        same surface's linear light says of exposure, in e-foldings: `gain` of the views over the
        input, `steps` between views (the median), `jump`, that of the oddest view to its
        neighbours, and `spread`, the standard deviation over all views; `tint` is that of the
        channels' gains beside their mean, which white balance changes and exposure does not.
    """
    rig = rig.only(rig.shown & (rig.depths > 0).any(axis=(1, 2)))
    count, (height, width) = len(rig.masks), rig.masks.shape[1:]
    forward = rig.viewmats[:, 2, :3]
    alike = forward @ forward.T - 2 * np.eye(count)
    # Colours at edges are mixed with what is behind them.
    inner = ~_grown((rig.depths <= 0) | (rig.masks <= 0.9))
    same, unrelated, floating, total = [], [], 0, 0
    steps, hues = np.full((count, count), np.nan), np.zeros((count, count, 3))
    for i in range(count if count >= 3 else 0):
        x, y = _spread(inner[i], 2 * _RAYS).T
        if len(x) < 8:
            continue
        z = rig.depths[i, y, x]
        toward = _rays(rig, np.full(len(x), i), np.stack([x, y], axis=1) + 0.5)
        neighbours = np.argsort(-alike[i])[:2]
        pixels, depths = _project(rig.only(neighbours), rig.centers[i] + z[:, None] * toward)
        for j, (u, v), depth in zip(
            neighbours, np.nan_to_num(pixels, nan=-1.0), depths, strict=True
        ):
            at = np.flatnonzero((depth > 0) & (u >= 0) & (v >= 0) & (u < width) & (v < height))
            u, v = u[at].astype(int), v[at].astype(int)
            hit = (rig.masks[j, v, u] > 0.9) & (rig.depths[j, v, u] > 0)
            at, u, v = at[hit], u[hit], v[hit]
            off, tolerance = depth[at] - rig.depths[j, v, u], 0.04 * np.median(z)
            floating += int((off < -tolerance).sum())
            total += len(off)
            visible = np.abs(off) < tolerance
            mine, theirs = rig.colors[i, y, x][at][visible], rig.colors[j, v, u][visible]
            if len(mine) >= 12:
                same.append(np.abs(mine - theirs).mean())
                unrelated.append(np.abs(mine - np.roll(theirs, len(theirs) // 2, axis=0)).mean())
                light = [np.square(part).mean(axis=1) + 0.004 for part in (mine, theirs)]
                steps[i, j] = np.median(np.log(light[0] / light[1]))
                tones = np.log((np.square(mine) + 0.02) / (np.square(theirs) + 0.02))
                hues[i, j] = np.median(tones - tones.mean(axis=1, keepdims=True), axis=0)
    contrast = float(np.mean(unrelated)) if unrelated else 0.0
    views = rig.views[:, None] & rig.views
    of_view = [row[np.isfinite(row)] for row in np.where(views, np.abs(steps), np.nan)]
    own = np.concatenate([steps[:, ~rig.views].ravel(), -steps[~rig.views].ravel()])
    own, every = own[np.isfinite(own)], np.concatenate([np.zeros(0), *of_view])
    # The gains of all views that make up for their differences, in the least-squares sense.
    one, two = np.nonzero(np.isfinite(steps) & views)
    each = np.column_stack([steps[one, two], hues[one, two]])
    gains = np.linalg.lstsq(np.eye(count)[one] - np.eye(count)[two], each)[0][rig.views]
    varied = gains.var(axis=0) if len(one) >= max(count, 1) else np.full(4, np.nan)
    exposure = {
        "spread": float(np.sqrt(varied[0])),
        "tint": float(np.sqrt(varied[1:].sum())),
        "gain": float(np.median(own)) if len(own) else np.nan,
        "steps": float(np.median(every)) if len(every) else np.nan,
        "jump": max((float(np.median(row)) for row in of_view if len(row)), default=np.nan),
    }
    return exposure | {
        "photometric": float(np.mean(same)) / contrast if contrast > 0.05 else np.nan,
        "floating": floating / total if total >= 50 else np.nan,
    }


def pivot(views: ObjectViews, rig: Rig) -> Row:
    """Where the cameras look, where the content is, and where the data says the pivot is.

    The first is the nearest point to all optical axes; the second the point to which the
    silhouettes' centroids triangulate, or, where objects leave frames or too few views show one,
    the median over views of what depth gives.  `pivot_distance` is between the two, in
    world units: to the middle of what was rendered, which is not quite where the object ought to
    be (a decoder may place its Gaussians deeper).  `*_relative` is in units of the cameras'
    distance.
    """
    out: Row = {"pivot_distance": np.nan, "pivot_relative": np.nan, "pivot_error": np.nan}
    origins = views.cameras.centers.double().numpy()
    looks_at = nearest_point(origins, views.cameras.forward.double().numpy())
    if looks_at is None:
        return out
    radius = float(np.median(np.linalg.norm(origins - looks_at, axis=1)))
    if radius < 1e-6:  # all cameras stand on one point
        return out
    out |= {"radius": radius, "looks_at": looks_at.round(4).tolist()}
    out["pivot_error"] = float(np.linalg.norm(looks_at - rig.pivot)) / radius
    content = _content(rig)
    if content is not None:
        out["content_at"] = content.round(4).tolist()
        out["pivot_distance"] = float(np.linalg.norm(content - looks_at))
        out["pivot_relative"] = out["pivot_distance"] / radius
    return out


def _content(rig: Rig) -> np.ndarray | None:
    whole = rig.shown & (np.max([e.max(axis=1) for e in _edges(rig.masks)], axis=0) < 0.5)
    # A cut-off silhouette's centroid is off; two whole ones know better.
    point = triangulate(rig.only(whole))
    if point is not None and whole.sum() >= max(3, 0.6 * len(whole)):
        in_front = _project(rig, point[None])[1] > 0
        if in_front.mean() > 0.5:
            return point
    if not rig.shown[rig.views].any():
        return None  # nothing but the input shows anything
    middles = []
    for i in np.flatnonzero(rig.shown):
        x, y = np.argwhere((rig.masks[i] > 0.75) & (rig.depths[i] > 0))[:, ::-1].T
        if len(x) < 4:
            continue
        x, y = x[:: max(1, len(x) // 200)], y[:: max(1, len(x) // 200)]
        toward = _rays(rig, np.full(len(x), i), np.stack([x, y], axis=1) + 0.5)
        # The median of the surface (which shrugs off flying pixels), and half the radius of a disc
        # of the silhouette's area further from the camera, because what is seen is the near side.
        away = np.median(rig.depths[i, y, x, None] * toward, axis=0)
        focal = np.sqrt(abs(rig.Ks[i, 0, 0] * rig.Ks[i, 1, 1]))
        middles.append(
            rig.centers[i] + (1 + 0.5 * np.sqrt(rig.masks[i].sum() / np.pi) / focal) * away
        )
    if middles:  # every view counts once, whatever it covers
        return np.median(middles, axis=0)
    return triangulate(rig) if point is None else point
