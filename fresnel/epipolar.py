"""Poses against opaque photographs: matched features and epipolar geometry.

Where nobody knows the foreground, silhouettes say nothing; texture does.  SIFT features (Lowe, IJCV
2004) of neighbouring views are matched, and a point in one view must lie on the epipolar line that
the poses draw in the other.
"""

from __future__ import annotations

from typing import Any

import numpy as np

_PAIRS, _MATCHES, _TOLERANCE = 8, 24, 0.01
_LONGEST = 320


def agreement(views: Any) -> float:
    """Of the feature matches that some relative pose explains, the share that the given ones do.

    About 0.9 and more for consistent poses, below 0.3 for wrong ones; NaN where fewer than two
    pairs of neighbouring views have 24 matches that agree with any epipolar geometry.

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

    possible = given = pairs = 0
    for i, j in _neighbours(viewmats):
        a, b = of(i), of(j)
        if a is None or b is None:
            continue
        x, y = _matches(a, b)
        kept = _explained(x, y)
        if kept.sum() < _MATCHES:
            continue
        error = _distance(_fundamental(viewmats[i], Ks[i], viewmats[j], Ks[j]), x[kept], y[kept])
        possible += int(kept.sum())
        given += int((error < _TOLERANCE * views.cameras.width).sum())
        pairs += 1
        if pairs == _PAIRS:
            break
    return given / possible if pairs >= 2 else float("nan")


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


def _explained(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Which matches one epipolar geometry explains, whichever it is (RANSAC)."""
    from skimage.measure import ransac
    from skimage.transform import FundamentalMatrixTransform

    if len(x) < _MATCHES:
        return np.zeros(len(x), dtype=bool)
    _, kept = ransac(
        (x, y), FundamentalMatrixTransform, 8, 1.5, max_trials=400, rng=np.random.default_rng(0)
    )
    return np.zeros(len(x), dtype=bool) if kept is None else kept


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
