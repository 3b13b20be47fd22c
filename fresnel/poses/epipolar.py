"""Poses against opaque photographs: matched features and epipolar geometry.

Where nobody knows the foreground, silhouettes say nothing; texture does.  SIFT features (Lowe, IJCV
2004) of neighbouring views are matched, and a point in one view must lie on the epipolar line that
the poses draw in the other.
"""

from __future__ import annotations

import functools

import numpy as np

from fresnel.data.records import ObjectViews

_PAIRS, _MATCHES = 8, 24
_LONGEST = 320
FLOOR = 0.002
"""In image widths: as exactly as features are found and phones track their pose."""
Features = tuple[np.ndarray, np.ndarray]


def misfit(views: ObjectViews) -> float:
    """How much worse the given poses explain matched features than the best possible ones.

    By pair of neighbouring views: the median distance of matches to their epipolar lines, matches
    behind a camera counting as lost, over the same for the fundamental matrix that fits them best
    (at least 0.2% of the width).  The median over pairs: 0.2 to 0.9 for consistent poses, above 1.4
    for wrong ones, NaN where fewer than two pairs have 24 matches that agree with any epipolar
    geometry.  Poses that are wrong all in the same way, such as a focal length off by less than
    half, hardly move epipolar lines and pass.
    """
    viewmats = views.cameras.viewmats.double().numpy()
    Ks = views.cameras.Ks.double().numpy()
    width = views.cameras.width

    @functools.cache
    def of(index: int) -> Features | None:
        return features(views.rgb[index].numpy(), views.alpha[index].numpy())

    found: list[float] = []
    for i, j in _neighbours(viewmats):
        a, b = of(i), of(j)
        fitted = None if a is None or b is None else explained(*matches(a, b))
        if fitted is None:
            continue
        x, y, best = fitted
        error = pair_error(viewmats[i], Ks[i], viewmats[j], Ks[j], x, y, lost=float(width))
        found.append(error / max(best, FLOOR * width))
        if len(found) == _PAIRS:
            break
    return float(np.median(found)) if len(found) >= 2 else float("nan")


def pair_error(
    a: np.ndarray,
    Ka: np.ndarray,
    b: np.ndarray,
    Kb: np.ndarray,
    x: np.ndarray,
    y: np.ndarray,
    lost: float,
) -> float:
    """Median Sampson distance in pixels of matches (N, 2) under two poses (4, 4); `lost` for those
    whose rays come nearest to each other behind a camera."""
    relative = b @ np.linalg.inv(a)
    rotation, t = relative[:3, :3], relative[:3, 3]
    # y^T F x = 0 (Hartley and Zisserman, 9.6)
    F = np.linalg.inv(Kb).T @ np.cross(np.eye(3), t) @ rotation @ np.linalg.inv(Ka)
    ray_a = _homogeneous(x) @ np.linalg.inv(Ka).T @ rotation.T
    ray_b = _homogeneous(y) @ np.linalg.inv(Kb).T
    system = np.stack([ray_a, -ray_b], axis=-1)
    normal = np.einsum("nij,nik->njk", system, system) + 1e-12 * np.eye(2)
    depths = np.linalg.solve(normal, np.einsum("nij,i->nj", system, -t)[..., None])[..., 0]
    return float(np.median(np.where(depths.min(axis=1) > 0, _distance(F, x, y), lost)))


def _homogeneous(pixels: np.ndarray) -> np.ndarray:
    return np.concatenate([pixels, np.ones((len(pixels), 1))], axis=1)


def _neighbours(viewmats: np.ndarray) -> list[tuple[int, int]]:
    """Pairs of views that stand beside each other: consecutive ones (as the pictures were taken,
    whatever their poses say), then the nearest by pose."""
    count = len(viewmats)
    pairs = [(i, i + 1) for i in range(0, count - 1, max(1, count // _PAIRS))]
    forward = viewmats[:, 2, :3]
    alike = np.triu(forward @ forward.T, 1)
    order = np.argsort(-alike, axis=None)[: 4 * _PAIRS]
    pairs += [(int(k // count), int(k % count)) for k in order if k // count < k % count]
    return list(dict.fromkeys(pairs))


def features(rgb: np.ndarray, alpha: np.ndarray) -> Features | None:
    """SIFT positions in pixels of the full picture (N, 2) as x, y, and descriptors; none at the rim
    that a lens left, which moves with the camera."""
    from skimage.color import rgb2gray
    from skimage.feature import SIFT
    from skimage.transform import rescale

    scale = min(1.0, _LONGEST / max(rgb.shape[:2]))
    grey = rgb2gray(rgb)
    if scale < 1:
        grey = rescale(grey, scale, anti_aliasing=True)
    sift = SIFT(upsampling=2 if max(grey.shape) < 200 else 1)
    try:
        sift.detect_and_extract(grey)
    except RuntimeError:  # how skimage says that it found no feature
        return None
    if sift.positions is None or sift.descriptors is None:
        return None
    where = sift.positions[:, ::-1] / scale + 0.5
    if (alpha == 255).all():
        return where, sift.descriptors
    from scipy.ndimage import distance_transform_edt

    x, y = np.minimum(where.astype(int), np.array(alpha.shape[::-1]) - 1).T
    kept = distance_transform_edt(alpha == 255)[y, x] > 0.03 * alpha.shape[1]
    return where[kept], sift.descriptors[kept]


def matches(a: Features, b: Features) -> tuple[np.ndarray, np.ndarray]:
    """Pixels (N, 2) of two pictures that show the same."""
    from skimage.feature import match_descriptors

    pairs = match_descriptors(a[1], b[1], max_ratio=0.8, cross_check=True)
    return a[0][pairs[:, 0]], b[0][pairs[:, 1]]


def explained(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, float] | None:
    """The matches that one epipolar geometry explains, whichever it is (RANSAC), and their median
    distance in pixels to it; None where they are too few."""
    from skimage.measure import ransac
    from skimage.transform import FundamentalMatrixTransform

    if len(x) < _MATCHES:
        return None
    best, kept = ransac(  # fitted to all that it keeps
        (x, y), FundamentalMatrixTransform, 8, 1.5, max_trials=400, rng=np.random.default_rng(0)
    )
    if kept is None or kept.sum() < _MATCHES:
        return None
    x, y = x[kept], y[kept]
    return x, y, float(np.median(_distance(best.params, x, y)))


def _distance(F: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Sampson distance in pixels, (N,)."""
    x, y = _homogeneous(x), _homogeneous(y)
    lines, back = x @ F.T, y @ F
    slope = np.square(lines[:, :2]).sum(axis=1) + np.square(back[:, :2]).sum(axis=1)
    return np.abs((y * lines).sum(axis=1)) / np.sqrt(np.maximum(slope, 1e-18))
