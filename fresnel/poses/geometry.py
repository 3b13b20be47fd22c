"""Do poses and pictures belong together?  Silhouettes, depth and colours asked across views.

A `Rig` is what all questions are asked of: cameras, and small masks, depths and colours beside
them.  Whatever rewrites its cameras (see `transforms`) can ask again.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from scipy.ndimage import maximum_filter
from scipy.optimize import least_squares
from torch.nn.functional import interpolate

from fresnel.data.records import ObjectViews
from fresnel.scene.cameras import Cameras

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
        pivot: what the data says the views turn about, (3,).
        input_index: the row of the input camera, or None.
        whole: whether all of a record's views are here, in their order.
    """

    viewmats: np.ndarray
    Ks: np.ndarray
    masks: np.ndarray
    colors: np.ndarray
    depths: np.ndarray
    pivot: np.ndarray
    input_index: int | None = None
    whole: bool = True

    def __len__(self) -> int:
        return len(self.masks)

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
    def views(self) -> np.ndarray:
        """Which rows are views, not the input, (V,)."""
        return np.arange(len(self)) != (-1 if self.input_index is None else self.input_index)

    def only(self, which: np.ndarray) -> Rig:
        """Fewer views, by index or mask."""
        which = np.asarray(which)
        rows = np.flatnonzero(which) if which.dtype == bool else which
        at = np.flatnonzero(rows == self.input_index) if self.input_index is not None else rows[:0]
        arrays = ("viewmats", "Ks", "masks", "colors", "depths")
        chosen: dict[str, Any] = {name: getattr(self, name)[rows] for name in arrays}
        return replace(self, **chosen, input_index=int(at[0]) if len(at) else None, whole=False)


def rigs_of(
    views: ObjectViews, rgb: np.ndarray, alpha: np.ndarray, *, with_input: bool
) -> list[Rig]:
    """Rigs of a record that hold all its views between them, each a few from all around.

    Args:
        rgb, alpha: the views' pictures over black, uint8.
        with_input: take the input camera and picture in as the last row of each.
    """
    parts = -(-len(rgb) // _VIEWS)
    rows = [np.arange(part, len(rgb), parts) for part in range(parts)]
    return [_rig(views, rgb, alpha, some, with_input, parts == 1) for some in rows]


def _rig(
    views: ObjectViews,
    rgb: np.ndarray,
    alpha: np.ndarray,
    rows: np.ndarray,
    with_input: bool,
    whole: bool,
) -> Rig:
    depth = None if views.depth is None else views.depth.numpy()[rows]
    parts = [_small(views.cameras[torch.from_numpy(rows)], rgb[rows], alpha[rows], depth)]
    if with_input:
        pictures = views.input_rgb.numpy()[None], views.input_alpha.numpy()[None]
        seen = None if views.input_depth is None else views.input_depth.numpy()[None]
        shape = parts[0][2].shape[1:]
        parts.append(_small(views.input_camera.reshape(1), *pictures, seen, shape))
    viewmats, Ks, masks, colors, depths = (
        np.concatenate(column) for column in zip(*parts, strict=True)
    )
    pivot = views.pivot.double().numpy()
    last = len(rows) if with_input else None
    return Rig(viewmats, Ks, masks, colors, depths, pivot, last, whole)


def _small(
    cameras: Cameras,
    rgb: Any,
    alpha: Any,
    depth: np.ndarray | None,
    shape: tuple[int, ...] | None = None,
) -> tuple[np.ndarray, ...]:
    height, width = alpha.shape[1:]
    scale = min(1.0, _SIDE / max(height, width))
    shape = shape or (max(1, round(height * scale)), max(1, round(width * scale)))
    # Of large pictures every second pixel (or fewer) is averaged: two a side are enough.
    step = max(1, min(height // shape[0], width // shape[1]) // 2)
    thin = np.concatenate([rgb[:, ::step, ::step], alpha[:, ::step, ::step, None]], axis=-1)
    layers = torch.from_numpy(thin)
    small = layers.permute(0, 3, 1, 2).float() / 255
    if tuple(shape) != tuple(small.shape[2:]):
        small = interpolate(small, shape, mode="area")
    pictures = small.permute(0, 2, 3, 1).numpy()
    # Depth is picked, not averaged: a mean across an edge lies on no surface.
    y = ((np.arange(shape[0]) + 0.5) * height / shape[0]).astype(int)
    x = ((np.arange(shape[1]) + 0.5) * width / shape[1]).astype(int)
    picked = np.zeros((len(rgb), *shape)) if depth is None else depth[:, y][:, :, x]
    by = np.array([shape[1] / cameras.width, shape[0] / cameras.height, 1.0])
    return (
        cameras.viewmats.double().numpy(),
        cameras.Ks.double().numpy() * by[:, None],
        pictures[..., 3],
        pictures[..., :3],
        np.nan_to_num(picked).astype(np.float64),
    )


def nearest_point(origins: np.ndarray, directions: np.ndarray) -> np.ndarray | None:
    """Least-squares nearest point to lines (N, 3); None where they are nearly parallel."""
    directions = directions / np.linalg.norm(directions, axis=1, keepdims=True)
    projectors = np.eye(3) - directions[:, :, None] * directions[:, None, :]
    matrix = projectors.sum(axis=0)
    if not np.isfinite(matrix).all() or np.linalg.eigvalsh(matrix)[0] < 0.01 * len(origins):
        return None
    return np.linalg.solve(matrix, (projectors @ origins[:, :, None]).sum(axis=0)[:, 0])


def centroids(rig: Rig) -> np.ndarray:
    """Centroids of the silhouettes in pixels, (V, 2); NaN where there is none."""
    weight = rig.masks.sum(axis=(1, 2))
    y, x = (np.arange(n) + 0.5 for n in rig.masks.shape[1:])
    sums = np.stack([(rig.masks.sum(axis=1) @ x), (rig.masks.sum(axis=2) @ y)], axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(rig.shown[:, None], sums / weight[:, None], np.nan)


def rays(rig: Rig, who: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    """World directions with z-depth 1 of pixels (N, 2) of the views `who` (N,), (N, 3)."""
    homogeneous = np.concatenate([pixels, np.ones((len(pixels), 1))], axis=1)
    local = np.einsum("nij,nj->ni", np.linalg.inv(rig.Ks)[who], homogeneous)
    return np.einsum("nji,nj->ni", rig.viewmats[who][:, :3, :3], local)


def project(rig: Rig, point: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pixels (V, 2) and z-depths (V,) of one world point."""
    local = rig.viewmats[:, :3, :3] @ point + rig.viewmats[:, :3, 3]
    pixel = np.einsum("vij,vj->vi", rig.Ks, local)
    with np.errstate(invalid="ignore", divide="ignore"):
        return pixel[:, :2] / pixel[:, 2:], local[:, 2]


def triangulate(rig: Rig) -> np.ndarray | None:
    """The point nearest to the rays through the silhouettes' centroids, (3,)."""
    shown = rig.shown
    if shown.sum() < 2:
        return None
    toward = rays(rig, np.flatnonzero(shown), centroids(rig)[shown])
    return nearest_point(rig.centers[shown], toward)


def centroid_residual(rig: Rig) -> float:
    """RMS of the silhouettes' centroids about the image of one point, in image widths; NaN where it
    can't be asked."""
    return _residual(*_common_point(rig))


def _common_point(rig: Rig) -> tuple[Rig, np.ndarray | None]:
    point, part = triangulate(rig), rig.only(rig.shown)
    if point is None or len(part) < 4 or (project(part, point)[1] <= 0).any():
        return part, None
    return part, point


def _residual(part: Rig, point: np.ndarray | None, shift: Any = 0.0) -> float:
    if point is None:
        return np.nan
    off = centroids(part) - project(part, point)[0] - shift
    return float(np.sqrt(np.square(off).sum(axis=1).mean())) / part.width


def principal_shift(rig: Rig) -> tuple[np.ndarray, float, float]:
    """A common shift of all pictures that makes their centroids the image of one point.

    Returns:
        The shift (2,) in image widths, and `centroid_residual` without and with it; NaN where it
        can't be asked.
    """
    part, point = _common_point(rig)
    before = _residual(part, point)
    if point is None:
        return np.full(2, np.nan), before, before
    target = centroids(part)

    def off(x: np.ndarray) -> np.ndarray:
        return np.nan_to_num(target - project(part, x[:3])[0] - x[3:], posinf=1e6).ravel()

    best = least_squares(off, [*point, 0.0, 0.0], x_scale=[*[1.0] * 3, *[rig.width] * 2]).x
    return best[3:] / rig.width, before, _residual(part, best[:3], best[3:])


@dataclass(frozen=True)
class Coherence:
    """How well silhouettes of different views explain each other.

    Args:
        hull_iou: share of silhouette that the visual hull of all views projects back onto (the
            hull never leaves a silhouette, so this is their intersection over union).
        miss: mean share of the other views whose silhouette a ray through this view's misses at
            its best point; 0 for consistent data, whatever the object's shape.
        stray: the same at the point where depth says the surface is; NaN without depth.
        input_miss: miss of the input with the views, both ways, less what the median view has;
            NaN without an input.
    """

    hull_iou: float
    miss: float
    stray: float
    input_miss: float = np.nan

    @property
    def score(self) -> float:
        """Inconsistency: 0 healthy, about 0.1 and more for wrong poses, NaN where not asked."""
        return self.hull_miss + (0.0 if np.isnan(self.stray) else self.stray)

    @property
    def hull_miss(self) -> float:
        return self.miss + 0.1 * (1 - self.hull_iou)


_NOT_ASKED = Coherence(np.nan, np.nan, np.nan)
_IMPOSSIBLE = Coherence(0.0, 1.0, np.nan)


def score(rig: Rig) -> float:
    """`Coherence.score` of a rig."""
    return coherence(rig).score


def coherence(rig: Rig) -> Coherence:
    """Silhouette coherence, after Hernandez, Schmitt and Cipolla (TPAMI 2007).

    Every ray through a silhouette must meet the object somewhere, so it holds at least one point
    that lies inside all other silhouettes.  Points are sampled along the rays within a sphere
    about the triangulated centre; silhouettes are grown by a pixel.  Outside a frame counts as a
    miss unless the object leaves that frame.
    """
    rig = rig.only(rig.shown)
    if len(rig) < 3:
        return _NOT_ASKED
    centre = triangulate(rig)
    if centre is None:
        return _IMPOSSIBLE
    _, z = project(rig, centre)
    if (z <= 0).mean() > 0.3:
        return _IMPOSSIBLE
    solid = rig.masks > 0.6
    solid[~solid.any(axis=(1, 2))] = rig.masks[~solid.any(axis=(1, 2))] > 0.1
    picked = [_spread(mask, _RAYS) for mask in solid]
    if min(len(p) for p in picked) < 2:
        keep = np.array([len(p) >= 2 for p in picked])
        return coherence(rig.only(keep)) if keep.sum() >= 3 else _NOT_ASKED
    reach = [
        np.abs((p + 0.5 - c) / np.diagonal(K)[:2]).max()
        for p, c, K in zip(picked, centroids(rig), rig.Ks, strict=True)
    ]
    radius = 1.25 * float(np.median(np.abs(z) * reach)) + 1e-6
    who = np.repeat(np.arange(len(rig)), [len(p) for p in picked])
    pixels = np.concatenate(picked)
    toward = rays(rig, who, pixels + 0.5)
    origin = rig.centers[who]
    middle = np.einsum("vi,vi->v", centre - origin, toward) / np.square(toward).sum(axis=1)
    half = radius / np.linalg.norm(toward, axis=1)
    steps = np.linspace(-1, 1, _DEPTHS)
    z_of = np.maximum(middle[:, None] + half[:, None] * steps, 1e-3)
    given = rig.depths[who, pixels[:, 1], pixels[:, 0]]
    has_depth = given > 0
    z_of = np.concatenate([z_of, np.where(has_depth, given, 1.0)[:, None]], axis=1)
    points = (origin[:, None] + z_of[..., None] * toward[:, None]).astype(np.float32)
    missed, asked = _misses(rig, points.reshape(-1, 3))
    shape = (len(rig), *z_of.shape)
    missed, asked = missed.reshape(shape), asked.reshape(shape)
    others = np.arange(len(rig))[:, None] != who
    missed, asked = missed & others[..., None], asked & others[..., None]
    count = missed.sum(axis=0)
    at, best = np.arange(len(who)), np.argmin(count[:, :-1], axis=1)
    worst, by_view = count[at, best], missed[:, at, best]
    votes = np.stack([by_view[:, who == i].mean(axis=1) for i in range(len(rig))])
    np.fill_diagonal(votes, np.nan)
    stray = count[has_depth, -1] / np.maximum(asked.sum(axis=0)[has_depth, -1], 1)
    return Coherence(
        hull_iou=float((worst == 0).mean()),
        miss=float((worst / max(len(rig) - 1, 1)).mean()),
        stray=float(stray.mean()) if has_depth.sum() >= 8 else np.nan,
        input_miss=_of_input(votes, rig.input_index),
    )


def _of_input(votes: np.ndarray, index: int | None) -> float:
    if index is None:
        return np.nan
    of_view = (np.nanmean(votes, axis=0) + np.nanmean(votes, axis=1)) / 2
    return float(of_view[index] - np.median(np.delete(of_view, index)))


def _spread(mask: np.ndarray, count: int) -> np.ndarray:
    """About `count` pixels (x, y) of a mask, evenly strided in reading order."""
    ys, xs = np.nonzero(mask)
    keep = np.linspace(0, len(ys) - 1, min(count, len(ys))).round().astype(int)
    return np.stack([xs[keep], ys[keep]], axis=1)


def _misses(rig: Rig, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For world points (P, 3): beside each view's silhouette?  Asked at all?  Both (V, P)."""
    height, width = rig.masks.shape[1:]
    framed = np.pad(grow(rig.masks > 0.05), ((0, 0), (1, 1), (1, 1)))
    # Where an object leaves the frame nobody knows what is beyond.
    leaves = _touching(rig.masks)
    framed[leaves, 0] = framed[leaves, -1] = True
    framed[leaves, :, 0] = framed[leaves, :, -1] = True
    matrices = (rig.Ks @ rig.viewmats[:, :3]).astype(np.float32)
    pixel = matrices[:, :, :3] @ points.T + matrices[:, :, 3:]
    z = pixel[:, 2]
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        x = np.clip(np.nan_to_num(pixel[:, 0] / z), -1, width).astype(np.int32) + 1
        y = np.clip(np.nan_to_num(pixel[:, 1] / z), -1, height).astype(np.int32) + 1
    inside = framed[np.arange(len(rig))[:, None], y, x] & (z > 1e-3)
    outside = (x == 0) | (y == 0) | (x == width + 1) | (y == height + 1)
    return ~inside, ~(outside & leaves[:, None])


def _edges(masks: np.ndarray) -> list[np.ndarray]:
    return [masks[:, 0], masks[:, -1], masks[:, :, 0], masks[:, :, -1]]


def _touching(masks: np.ndarray) -> np.ndarray:
    """Which views' objects leave the frame, (V,)."""
    return np.max([(edge > 0.5).mean(axis=1) for edge in _edges(masks)], axis=0) > 0.03


def grow(masks: np.ndarray) -> np.ndarray:
    """Masks (..., H, W) grown by a pixel to all sides."""
    size = (*[1] * (masks.ndim - 2), 3, 3)
    return maximum_filter(masks, size=size, mode="constant")


def photometric(rig: Rig) -> tuple[float, float]:
    """Colours and depths carried from each view to its two nearest neighbours.

    Returns:
        The mean colour difference at the same surface point over that of unrelated points (0:
        the same object, 1: unrelated), NaN for objects of one colour; and the share of surface
        points that float in front of what the neighbour sees there.
    """
    rig = rig.only(rig.shown & (rig.depths > 0).any(axis=(1, 2)))
    if len(rig) < 3:
        return np.nan, np.nan
    forward = rig.viewmats[:, 2, :3]
    alike = forward @ forward.T - 2 * np.eye(len(rig))
    same, unrelated, floating, total = [], [], 0, 0
    for i in range(len(rig)):
        # Colours at edges are mixed with what is behind them.
        inner = ~grow((rig.depths[i] <= 0) | (rig.masks[i] <= 0.9))
        pixels = _spread(inner, 2 * _RAYS)
        if len(pixels) < 8:
            continue
        x, y = pixels.T
        z = rig.depths[i, y, x]
        who = np.full(len(pixels), i)
        world = rig.centers[i] + z[:, None] * rays(rig, who, pixels + 0.5)
        for j in np.argsort(-alike[i])[:2]:
            there = rig.viewmats[j, :3, :3] @ world.T + rig.viewmats[j, :3, 3:]
            with np.errstate(invalid="ignore", divide="ignore"):
                u, v = np.nan_to_num((rig.Ks[j] @ there)[:2] / there[2], nan=-1.0)
            inside = (there[2] > 0) & (u >= 0) & (v >= 0) & (u < rig.width)
            inside &= v < rig.masks.shape[1]
            u, v = u[inside].astype(int), v[inside].astype(int)
            hit = (rig.masks[j, v, u] > 0.9) & (rig.depths[j, v, u] > 0)
            surface, depth = rig.depths[j, v, u][hit], there[2][inside][hit]
            tolerance = 0.04 * np.median(z)
            floating += int((depth < surface - tolerance).sum())
            total += len(depth)
            visible = np.abs(depth - surface) < tolerance
            mine = rig.colors[i, y, x][inside][hit][visible]
            theirs = rig.colors[j, v, u][hit][visible]
            if len(mine) >= 12:
                same.append(np.abs(mine - theirs).mean())
                unrelated.append(np.abs(mine - np.roll(theirs, len(theirs) // 2, axis=0)).mean())
    contrast = float(np.mean(unrelated)) if unrelated else 0.0
    colour = float(np.mean(same)) / contrast if contrast > 0.05 else np.nan
    return colour, floating / total if total >= 50 else np.nan


def up_tilt_deg(rig: Rig) -> float:
    """Angle between the mean image-up direction of the cameras and the world's Y, degrees; NaN
    where the cameras have no common up."""
    up = -rig.viewmats[:, 1, :3].mean(axis=0)
    length = float(np.linalg.norm(up))
    if length < 0.3:
        return np.nan
    return float(np.degrees(np.arccos(np.clip(up[1] / length, -1, 1))))


def pivot(views: ObjectViews, rig: Rig) -> Row:
    """Where the cameras look, where the content is, and where the data says the pivot is.

    The first is the nearest point to all optical axes; the second the point to which the
    silhouettes' centroids triangulate, or, where objects leave frames or too few views show one,
    the median over views of what depth gives (`_middle`).  `pivot_distance` is between the two, in
    world units: to the middle of what was rendered, which is not quite where the object ought to
    be (a decoder may place its Gaussians deeper).  `*_relative` is in units of the cameras'
    distance.
    """
    nothing: Row = {"pivot_distance": np.nan, "pivot_relative": np.nan, "pivot_error": np.nan}
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
    inside = np.max([edge.max(axis=1) for edge in _edges(rig.masks)], axis=0) < 0.5
    whole = rig.shown & inside
    if whole.sum() >= 0.6 * len(rig) and whole.sum() >= 3:
        point = triangulate(rig.only(whole))
        if point is not None and (project(rig, point)[1] > 0).mean() > 0.5:
            return point
    if not rig.shown[rig.views].any():
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
    pixels = np.argwhere((rig.masks[i] > 0.75) & (rig.depths[i] > 0))[:, ::-1]
    pixels = pixels[:: max(1, len(pixels) // 200)]
    if len(pixels) < 4:
        return None
    z = rig.depths[i, pixels[:, 1], pixels[:, 0]]
    away = np.median(z[:, None] * rays(rig, np.full(len(z), i), pixels + 0.5), axis=0)
    # Of a disc of the silhouette's area, as a share of its distance.
    radius = np.sqrt(rig.masks[i].sum() / np.pi) / np.sqrt(abs(rig.Ks[i, 0, 0] * rig.Ks[i, 1, 1]))
    return rig.centers[i] + (1 + 0.5 * radius) * away
