"""Do poses and pictures belong together?  Silhouettes, depth and colours asked across views.

A `Rig` is what all questions are asked of: cameras, and small masks, depths and colours beside
them.  Whatever rewrites its cameras (see `mend`) can ask again.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.nn.functional import interpolate

from fresnel.scene.cameras import Cameras

RIG_SIZE = 64
_RAYS, _DEPTHS, _MOST_VIEWS = 40, 48, 16


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
    """

    viewmats: np.ndarray
    Ks: np.ndarray
    masks: np.ndarray
    colors: np.ndarray
    depths: np.ndarray
    pivot: np.ndarray
    input_index: int | None = None

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

    def only(self, which: np.ndarray) -> Rig:
        """Fewer views, by index."""
        which = np.asarray(which)
        rows = np.flatnonzero(which) if which.dtype == bool else which
        at = np.flatnonzero(rows == self.input_index) if self.input_index is not None else rows[:0]
        return replace(
            self,
            viewmats=self.viewmats[rows],
            Ks=self.Ks[rows],
            masks=self.masks[rows],
            colors=self.colors[rows],
            depths=self.depths[rows],
            input_index=int(at[0]) if len(at) else None,
        )


def rig_of(
    views: Any, rgb: np.ndarray, alpha: np.ndarray, *, with_input: bool, most: int = _MOST_VIEWS
) -> Rig:
    """The rig of a record, at most `most` of its views, evenly spread.

    Args:
        views: an `ObjectViews`.
        rgb, alpha: its views' pictures over black, uint8.
        with_input: take the input camera and picture in as the last row.
    """
    rows = np.arange(len(rgb))
    if len(rows) > most:
        rows = rows[np.linspace(0, len(rows) - 1, most).round().astype(int)]
    depth = None if views.depth is None else views.depth.numpy()[rows]
    parts = [_small(views.cameras[torch.from_numpy(rows)], rgb[rows], alpha[rows], depth)]
    if with_input:
        one = views.input_depth
        parts.append(
            _small(
                views.input_camera.reshape(1),
                views.input_rgb.numpy()[None],
                views.input_alpha.numpy()[None],
                None if one is None else one.numpy()[None],
                parts[0][2].shape[1:],
            )
        )
    viewmats, Ks, masks, colors, depths = (
        np.concatenate(column) for column in zip(*parts, strict=True)
    )
    pivot = views.pivot.double().numpy()
    return Rig(viewmats, Ks, masks, colors, depths, pivot, len(rows) if with_input else None)


def _small(
    cameras: Cameras,
    rgb: np.ndarray,
    alpha: np.ndarray,
    depth: np.ndarray | None,
    shape: tuple[int, ...] | None = None,
) -> tuple[np.ndarray, ...]:
    height, width = alpha.shape[1:]
    scale = min(1.0, RIG_SIZE / max(height, width))
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


def directions(rig: Rig, pixels: np.ndarray) -> np.ndarray:
    """World directions with z-depth 1 of one pixel per view, (V, 2) -> (V, 3)."""
    homogeneous = np.concatenate([pixels, np.ones((len(pixels), 1))], axis=1)
    local = np.linalg.solve(rig.Ks, homogeneous[..., None])
    return (rig.viewmats[:, :3, :3].transpose(0, 2, 1) @ local)[..., 0]


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
    rays = directions(rig, np.nan_to_num(centroids(rig)))
    return nearest_point(rig.centers[shown], rays[shown])


def principal_shift(rig: Rig) -> tuple[np.ndarray, float, float]:
    """A common shift of all pictures that makes their centroids the image of one point.

    Gauss-Newton over the point and the shift.

    Returns:
        The shift (2,) in image widths, and the RMS of the residuals without and with it, in image
        widths; NaN where it can't be asked.
    """
    nothing = np.full(2, np.nan), np.nan, np.nan
    point, shown = triangulate(rig), rig.shown
    if point is None or shown.sum() < 4:
        return nothing
    target, shift, before = centroids(rig)[shown], np.zeros(2), np.nan
    part = rig.only(shown)
    for _ in range(4):
        pixel, z = project(part, point)
        if (z <= 0).any() or not np.isfinite(pixel).all():
            return nothing
        residual = target - pixel - shift
        if np.isnan(before):
            before = float(np.sqrt(np.square(residual).sum(axis=1).mean()))
        local = part.viewmats[:, :3, :3] @ point + part.viewmats[:, :3, 3]
        jacobian = np.zeros((len(part), 2, 5))
        zero = np.zeros(len(part))
        fx, fy = part.Ks[:, 0, 0], part.Ks[:, 1, 1]
        by_local = np.stack(
            [
                np.stack([fx / z, zero, -fx * local[:, 0] / z**2], axis=-1),
                np.stack([zero, fy / z, -fy * local[:, 1] / z**2], axis=-1),
            ],
            axis=1,
        )
        jacobian[:, :, :3] = by_local @ part.viewmats[:, :3, :3]
        jacobian[:, :, 3:] = np.eye(2)
        step = np.linalg.lstsq(jacobian.reshape(-1, 5), residual.reshape(-1), rcond=1e-3)[0]
        point, shift = point + step[:3], shift + step[3:]
    pixel, _ = project(part, point)
    after = float(np.sqrt(np.square(target - pixel - shift).sum(axis=1).mean()))
    return shift / rig.width, before / rig.width, after / rig.width


@dataclass(frozen=True)
class Coherence:
    """How well silhouettes of different views explain each other.

    Args:
        hull_iou: share of silhouette that the visual hull of all views projects back onto (the
            hull never leaves a silhouette, so this is their intersection over union).
        miss: mean share of the other views whose silhouette a ray through this view's misses at
            its best point; 0 for consistent data, whatever the object's shape.
        stray: the same at the point where depth says the surface is; NaN without depth.
        votes: miss by pair, (V, V): row i's rays, column j's silhouette; NaN where not asked.
        input_miss: miss of the input with the views, both ways, less what the median view has;
            NaN without an input.
    """

    hull_iou: float
    miss: float
    stray: float
    votes: np.ndarray
    input_miss: float = np.nan

    @property
    def score(self) -> float:
        """What a mend has to bring down."""
        return self.miss if np.isnan(self.stray) else 0.5 * (self.miss + self.stray)


_UNKNOWN = np.full((0, 0), np.nan)
NOT_ASKED = Coherence(np.nan, np.nan, np.nan, _UNKNOWN)
IMPOSSIBLE = Coherence(0.0, 1.0, np.nan, _UNKNOWN)


def coherence(rig: Rig, rays: int = _RAYS) -> Coherence:
    """Silhouette coherence, after Hernandez, Schmitt and Cipolla (TPAMI 2007).

    Every ray through a silhouette must meet the object somewhere, so it holds at least one point
    that lies inside all other silhouettes.  Points are sampled along the rays within a sphere
    about the triangulated centre; silhouettes are grown by a pixel.  Outside a frame counts as a
    miss unless the object leaves that frame.
    """
    rig = rig.only(rig.shown)
    if len(rig) < 3:
        return NOT_ASKED
    centre = triangulate(rig)
    if centre is None:
        return IMPOSSIBLE
    _, z = project(rig, centre)
    if (z <= 0).mean() > 0.3:
        return IMPOSSIBLE
    solid = rig.masks > 0.6
    solid[~solid.any(axis=(1, 2))] = rig.masks[~solid.any(axis=(1, 2))] > 0.1
    picked = [_spread(mask, rays) for mask in solid]
    if min(len(p) for p in picked) < 2:
        keep = np.array([len(p) >= 2 for p in picked])
        return coherence(rig.only(keep), rays) if keep.sum() >= 3 else NOT_ASKED
    middles = centroids(rig)
    reach, tall = (
        np.array([np.abs(p[:, k] + 0.5 - c[k]).max() for p, c in zip(picked, middles, strict=True)])
        / np.abs(rig.Ks[:, k, k])
        for k in (0, 1)
    )
    radius = 1.25 * float(np.median(np.abs(z) * np.maximum(reach, tall))) + 1e-6
    who = np.repeat(np.arange(len(rig)), [len(p) for p in picked])
    pixels = np.concatenate(picked)
    local = np.einsum(
        "vij,vj->vi",
        np.linalg.inv(rig.Ks)[who],
        np.concatenate([pixels + 0.5, np.ones((len(pixels), 1))], axis=1),
    )
    toward = np.einsum("vji,vj->vi", rig.viewmats[who][:, :3, :3], local)
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
    missed = missed.reshape(len(rig), *z_of.shape)
    asked = asked.reshape(len(rig), *z_of.shape)
    own = np.arange(len(rig))[:, None] == who[None]
    missed[own] = False
    asked[own] = False
    count = missed.sum(axis=0)
    best = np.argmin(count[:, :-1], axis=1)
    at = np.arange(len(who))
    possible = np.maximum(asked.sum(axis=0), 1)
    worst = count[at, best]
    votes = np.full((len(rig), len(rig)), np.nan)
    by_view = missed[:, at, best]
    for i in range(len(rig)):
        votes[i] = by_view[:, who == i].mean(axis=1)
    np.fill_diagonal(votes, np.nan)
    stray = count[has_depth, -1] / possible[has_depth, -1]
    return Coherence(
        hull_iou=float((worst == 0).mean()),
        miss=float((worst / max(len(rig) - 1, 1)).mean()),
        stray=float(stray.mean()) if has_depth.sum() >= 8 else np.nan,
        votes=votes,
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
    seen = grow(rig.masks > 0.05, 1)
    framed = np.zeros((len(rig), height + 2, width + 2), dtype=bool)
    framed[:, 1:-1, 1:-1] = seen
    # Where an object leaves the frame nobody knows what is beyond.
    leaves = _touching(rig.masks)
    framed[leaves, 0], framed[leaves, -1] = True, True
    framed[leaves, :, 0], framed[leaves, :, -1] = True, True
    matrices = (rig.Ks @ rig.viewmats[:, :3]).astype(np.float32)
    pixel = matrices[:, :, :3] @ points.T + matrices[:, :, 3:]
    z = pixel[:, 2]
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        x = np.clip(np.nan_to_num(pixel[:, 0] / z), -1, width).astype(np.int32) + 1
        y = np.clip(np.nan_to_num(pixel[:, 1] / z), -1, height).astype(np.int32) + 1
    inside = framed[np.arange(len(rig))[:, None], y, x] & (z > 1e-3)
    outside = (x == 0) | (y == 0) | (x == width + 1) | (y == height + 1)
    return ~inside, ~(outside & leaves[:, None])


def _touching(masks: np.ndarray) -> np.ndarray:
    """Which views' objects leave the frame, (V,)."""
    edges = [masks[:, 0], masks[:, -1], masks[:, :, 0], masks[:, :, -1]]
    return np.max([(edge > 0.5).mean(axis=1) for edge in edges], axis=0) > 0.03


def grow(masks: np.ndarray, by: int) -> np.ndarray:
    """Dilation of masks (..., H, W) by a square of 2 * by + 1 pixels."""
    for axis in (-2, -1):
        pad = [(0, 0)] * masks.ndim
        pad[axis] = (by, by)
        padded, length = np.pad(masks, pad), masks.shape[axis]
        masks = np.logical_or.reduce(
            [np.take(padded, range(k, k + length), axis=axis) for k in range(2 * by + 1)]
        )
    return masks


def photometric(rig: Rig, rays: int = 80) -> tuple[float, float]:
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
        inner = ~grow((rig.depths[i] <= 0) | (rig.masks[i] <= 0.9), 1)
        pixels = _spread(inner, rays)
        if len(pixels) < 8:
            continue
        x, y = pixels.T
        z = rig.depths[i, y, x]
        local = np.linalg.solve(rig.Ks[i], np.stack([x + 0.5, y + 0.5, np.ones(len(x))])) * z
        world = rig.viewmats[i, :3, :3].T @ (local - rig.viewmats[i, :3, 3:])
        for j in np.argsort(-alike[i])[:2]:
            there = rig.viewmats[j, :3, :3] @ world + rig.viewmats[j, :3, 3:]
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
