"""Poses against opaque photographs: matched features and epipolar geometry.

Where nobody knows the foreground, silhouettes say nothing; texture does.  SIFT features (Lowe, IJCV
2004) of neighbouring views are matched, and a point in one view must lie on the epipolar line that
the poses draw in the other.
"""

import functools
from typing import Any

import numpy as np

from fresnel.data.records import ObjectViews

_PAIRS, _MATCHES, _LONGEST = 8, 14, 320
_FLOOR = 0.002
"""In image widths: as exactly as features are found and phones track their pose."""


def misfit(views: ObjectViews) -> float:
    """How much worse the given poses explain matched features than the best possible ones.

    By pair of neighbouring views: the median distance of matches to their epipolar lines, matches
    behind a camera counting as lost, over the same for the fundamental matrix that fits them best
    (at least 0.2% of the width).  Of 64 views all are asked, of more a sixth or more.  The median
    over pairs: 0.2 to 0.9 for consistent poses, above 1.4
    for wrong ones, NaN where fewer than two pairs have 14 matches that agree with any epipolar
    geometry.  Poses that are wrong all in the same way, such as a focal length off by less than
    half, hardly move epipolar lines and pass.
    """
    from skimage.feature import match_descriptors
    from skimage.measure import ransac
    from skimage.transform import FundamentalMatrixTransform

    poses, Ks = (m.double().numpy() for m in (views.cameras.viewmats, views.cameras.Ks))
    count, width = len(poses), views.cameras.width
    # Consecutive views stand beside each other (as they were taken, whatever their poses say), and
    # the nearest by pose do.
    many = count > 2 * _PAIRS
    most = min(count // 2, 4 * _PAIRS) if many else _PAIRS
    pairs = [(i, i + 1) for i in range(0, count - 1, max(1, count // most))]
    alike = np.triu(poses[:, 2, :3] @ poses[:, 2, :3].T, 1)
    nearest = (divmod(int(k), count) for k in np.argsort(-alike, axis=None)[: 4 * most])
    pairs += [(i, j) for i, j in nearest if i < j]

    @functools.cache
    def features(index: int) -> tuple[np.ndarray, np.ndarray] | None:
        return _features(views.rgb[index].numpy(), views.alpha[index].numpy(), fine=not many)

    found: list[float] = []
    for i, j in dict.fromkeys(pairs):
        if len(found) == most:
            break
        mine, theirs = features(i), features(j)
        if mine is None or theirs is None or min(len(mine[1]), len(theirs[1])) < _MATCHES:
            continue
        same = match_descriptors(mine[1], theirs[1], max_ratio=0.8, cross_check=True)
        x, y = mine[0][same[:, 0]], theirs[0][same[:, 1]]
        if len(x) < _MATCHES:
            continue
        best, kept = ransac(  # fitted to all that it keeps
            (x, y), FundamentalMatrixTransform, 8, 1.5, max_trials=400, rng=np.random.default_rng(0)
        )
        if kept is None or kept.sum() < _MATCHES:
            continue
        x, y = x[kept], y[kept]
        relative = poses[j] @ np.linalg.inv(poses[i])
        turn, shift = relative[:3, :3], relative[:3, 3]
        to_rays, to_theirs = np.linalg.inv(Ks[i]), np.linalg.inv(Ks[j])
        # y^T F x = 0 (Hartley and Zisserman, 9.6)
        F = to_theirs.T @ np.cross(np.eye(3), shift) @ turn @ to_rays
        # Depths at which the rays of a match come nearest to each other.
        rays = [_homogeneous(x) @ to_rays.T @ turn.T, -_homogeneous(y) @ to_theirs.T]
        system = np.stack(rays, axis=-1)
        normal = np.einsum("nij,nik->njk", system, system) + 1e-12 * np.eye(2)
        depths = np.linalg.solve(normal, np.einsum("nij,i->nj", system, -shift)[..., None])
        with np.errstate(invalid="ignore"):  # cameras on one point have no epipolar lines
            off = FundamentalMatrixTransform(F).residuals(x, y)
        off = np.where(depths[..., 0].min(axis=1) > 0, off, width)
        least = max(np.median(best.residuals(x, y)), _FLOOR * width)
        found.append(float(np.median(off) / least))
    return float(np.median(found)) if len(found) >= 2 else float("nan")


def _homogeneous(pixels: np.ndarray) -> np.ndarray:
    return np.concatenate([pixels, np.ones((len(pixels), 1))], axis=1)


def _features(
    rgb: np.ndarray, alpha: np.ndarray, *, fine: bool
) -> tuple[np.ndarray, np.ndarray] | None:
    """SIFT positions in pixels of the full picture (N, 2) as x, y, and descriptors; none at the rim
    that a lens left, which moves with the camera."""
    from scipy.ndimage import distance_transform_edt
    from skimage.color import rgb2gray
    from skimage.feature import SIFT
    from skimage.transform import rescale

    scale = min(1.0, _LONGEST / max(rgb.shape[:2]))
    grey = rgb2gray(rgb)
    if scale < 1:
        grey = rescale(grey, scale, anti_aliasing=True)
    sift: Any = SIFT(upsampling=2 if fine and max(grey.shape) < 200 else 1)
    try:
        sift.detect_and_extract(grey)
    except RuntimeError:  # how skimage says that it found no feature
        return None
    where = sift.positions[:, ::-1] / scale + 0.5
    inner = distance_transform_edt(alpha == 255)
    x, y = np.minimum(where.astype(int), np.array(alpha.shape[::-1]) - 1).T
    kept = (alpha == 255).all() | (inner[y, x] > 0.03 * alpha.shape[1])
    return where[kept], sift.descriptors[kept]
