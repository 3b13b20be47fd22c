"""Poses against opaque photographs: matched features and epipolar geometry.

Where nobody knows the foreground, silhouettes say nothing; texture does.  SIFT features (Lowe, IJCV
2004) of neighbouring views are matched, and a point in one view must lie on the epipolar line that
the poses draw in the other.
"""

from __future__ import annotations

from typing import Any

import numpy as np

_PAIRS, _MATCHES = 8, 24
_LONGEST = 320
_FLOOR = 0.002
"""In image widths: as exactly as features are found and phones track their pose."""


def misfit(views: Any) -> float:
    """How much worse the given poses explain matched features than the best possible ones.

    By pair of neighbouring views: the median distance of matches to their epipolar lines, matches
    behind a camera counting as lost, over the same for the fundamental matrix that fits them best
    (at least 0.2% of the width).  The median over pairs: 0.2 to 0.9 for consistent poses, above 1.4
    for wrong ones, NaN where fewer than two pairs have 24 matches that agree with any epipolar
    geometry.  Poses that are wrong all in the same way, such as a focal length off by less than
    half, hardly move epipolar lines and pass.

    Args:
        views: an `ObjectViews`.
    """
    viewmats = views.cameras.viewmats.double().numpy()
    Ks = views.cameras.Ks.double().numpy()
    features: dict[int, tuple[np.ndarray, np.ndarray] | None] = {}

    def of(index: int) -> tuple[np.ndarray, np.ndarray] | None:
        if index not in features:
            features[index] = _features(views.rgb[index].numpy())
        return features[index]

    found: list[float] = []
    for i, j in _neighbours(viewmats):
        a, b = of(i), of(j)
        if a is None or b is None:
            continue
        fitted = explained(*_matches(a, b))
        if fitted is None:
            continue
        x, y, best = fitted
        width = views.cameras.width
        error = pair_error(viewmats[i], Ks[i], viewmats[j], Ks[j], x, y, lost=float(width))
        found.append(error / max(best, _FLOOR * width))
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
    """Median Sampson distance in pixels of matches under two poses; `lost` for a match whose point
    would lie behind a camera."""
    error = _distance(_fundamental(a, Ka, b, Kb), x, y)
    return float(np.median(np.where(_in_front(a, Ka, b, Kb, x, y), error, lost)))


def _in_front(
    a: np.ndarray, Ka: np.ndarray, b: np.ndarray, Kb: np.ndarray, x: np.ndarray, y: np.ndarray
) -> np.ndarray:
    """Whether the rays of two matched pixels come nearest to each other before both cameras."""
    relative = b @ np.linalg.inv(a)
    one = np.ones((len(x), 1))
    ray_a = np.linalg.solve(Ka, np.concatenate([x, one], axis=1).T).T @ relative[:3, :3].T
    ray_b = np.linalg.solve(Kb, np.concatenate([y, one], axis=1).T).T
    system = np.stack([ray_a, -ray_b], axis=-1)
    normal = np.einsum("nij,nik->njk", system, system) + 1e-12 * np.eye(2)
    right = np.einsum("nij,i->nj", system, -relative[:3, 3])
    depths = np.linalg.solve(normal, right[..., None])[..., 0]
    return np.min(depths, axis=1) > 0


def _neighbours(viewmats: np.ndarray) -> list[tuple[int, int]]:
    """Pairs of views that stand beside each other: consecutive ones (as the pictures were taken,
    whatever their poses say), then the nearest by pose."""
    count = len(viewmats)
    step = max(1, count // _PAIRS)
    pairs = [(i, i + 1) for i in range(0, count - 1, step)]
    forward = viewmats[:, 2, :3]
    alike = np.triu(forward @ forward.T, 1)
    order = np.argsort(-alike, axis=None)[: 4 * _PAIRS]
    pairs += [(int(k // count), int(k % count)) for k in order if k // count < k % count]
    return list(dict.fromkeys(pairs))


def _features(rgb: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """SIFT positions in pixels of the full picture (N, 2) as x, y, and descriptors."""
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
    return sift.positions[:, ::-1] / scale + 0.5, sift.descriptors


def _matches(
    a: tuple[np.ndarray, np.ndarray], b: tuple[np.ndarray, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
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


def _fundamental(a: np.ndarray, Ka: np.ndarray, b: np.ndarray, Kb: np.ndarray) -> np.ndarray:
    """F with y^T F x = 0 for pixels x of view a and y of view b (Hartley and Zisserman, 9.6)."""
    relative = b @ np.linalg.inv(a)
    t = relative[:3, 3]
    cross = np.array([[0, -t[2], t[1]], [t[2], 0, -t[0]], [-t[1], t[0], 0]])
    return np.linalg.inv(Kb).T @ cross @ relative[:3, :3] @ np.linalg.inv(Ka)


def _distance(F: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Sampson distance in pixels, (N,)."""
    one = np.ones((len(x), 1))
    x, y = np.concatenate([x, one], axis=1), np.concatenate([y, one], axis=1)
    lines, back = x @ F.T, y @ F
    numerator = np.abs((y * lines).sum(axis=1))
    slope = np.square(lines[:, :2]).sum(axis=1) + np.square(back[:, :2]).sum(axis=1)
    return numerator / np.sqrt(np.maximum(slope, 1e-18))
