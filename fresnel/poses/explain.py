"""Which single mistake explains poses that don't fit their pictures, and how it is undone.

Every `Mend` rewrites the cameras of a `Rig`; the one that makes silhouettes (and depth) consistent
again names the convention that was broken.  `fix` applies it to whole records.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from fresnel.poses import transforms
from fresnel.poses.geometry import Rig, principal_shift, score, triangulate

_GOOD = 0.012
"""A score up to which a mended record counts as consistent; healthy training records reach 0.005
(0.02 for renders of Gaussians, whose depth is soft)."""


@dataclass(frozen=True)
class Mend:
    """One way in which poses are commonly wrong, and its undoing.

    Args:
        name: machine name.
        code: of the reason that it explains.
        words: what is wrong, after "the pictures fit if": plain language.
        apply: the rig with its mistake undone.
        amounts: the parameters of the mend, if it has any (widths, a factor).
    """

    name: str
    code: str
    words: str
    apply: Callable[[Rig], Rig]
    amounts: tuple[float, ...] = ()


def _posed(change: transforms.Poses, everything: bool = False) -> Callable[[Rig], Rig]:
    def apply(rig: Rig) -> Rig:
        rows, viewmats = rig.views | everything, rig.viewmats.copy()
        viewmats[rows] = change(viewmats[rows])
        return replace(rig, viewmats=viewmats)

    return apply


def _calibrated(
    change: Callable[[np.ndarray, int], np.ndarray], everything: bool
) -> Callable[[Rig], Rig]:
    def apply(rig: Rig) -> Rig:
        rows, Ks = rig.views | everything, rig.Ks.copy()
        Ks[rows] = change(Ks[rows], rig.width)
        return replace(rig, Ks=Ks)

    return apply


def _turned_back(rig: Rig) -> Rig:
    """The views' poses mirrored in the vertical plane through pivot and input camera."""
    if rig.input_index is None:
        return _calibrated(transforms.mirrored, False)(rig)
    away = rig.centers[rig.input_index] - rig.pivot
    if np.hypot(away[0], away[2]) < 1e-6:
        away = -rig.viewmats[rig.input_index, 2, :3]
    return _posed(lambda poses: transforms.mirrored_about(poses, rig.pivot, away))(rig)


def _reordered(order: Callable[[int], np.ndarray]) -> Callable[[Rig], Rig]:
    def apply(rig: Rig) -> Rig:
        rows = np.flatnonzero(rig.views)
        viewmats, Ks = rig.viewmats.copy(), rig.Ks.copy()
        viewmats[rows], Ks[rows] = viewmats[rows[order(len(rows))]], Ks[rows[order(len(rows))]]
        return replace(rig, viewmats=viewmats, Ks=Ks)

    return apply


def _moved_back(rig: Rig) -> Rig:
    """The views' cameras moved so that what they show lies on the declared pivot."""
    found = triangulate(rig.only(rig.views))
    if found is None:
        return rig

    def moved(by: np.ndarray) -> Rig:
        return _posed(lambda poses: transforms.moved(poses, by))(rig)

    best = rig.pivot - found
    least = score(moved(best))
    if rig.input_index is None or not least < 0.6 * score(rig):
        return moved(best)
    # The silhouettes' centroids are not quite the image of the pivot; the input knows better.
    step = 0.04 * float(np.median(np.linalg.norm(rig.centers[rig.views] - found, axis=1)))
    for _ in range(4):
        for way in np.concatenate([np.eye(3), -np.eye(3)]):
            value = score(moved(best + step * way))
            if value < least:
                best, least = best + step * way, value
        step /= 2
    return moved(best)


def _widened(strength: float) -> Callable[[Rig], Rig]:
    """Undo the squeeze of a flat cut-out."""

    def apply(rig: Rig) -> Rig:
        if rig.input_index is None:
            return rig
        forward = rig.viewmats[:, 2, [0, 2]]
        forward = forward / np.maximum(np.linalg.norm(forward, axis=1, keepdims=True), 1e-9)
        width = transforms.squeezed(forward @ forward[rig.input_index], strength)
        Ks = rig.Ks.copy()
        Ks[:, 0, 0] *= np.where(rig.views, width, 1.0)
        return replace(rig, Ks=Ks)

    return apply


_CONVENTIONS: tuple[tuple[str, str, transforms.Poses], ...] = (
    ("inverted", "the matrices are read as camera-to-world", transforms.inverted),
    ("transposed", "the rotations are transposed", transforms.transposed),
    ("opengl_axes", "the cameras' y and z axes are flipped (OpenGL axes)", transforms.opengl),
    (
        "opengl_camera_to_world",
        "the matrices are read as camera-to-world with OpenGL axes",
        lambda poses: transforms.opengl(transforms.inverted(poses)),
    ),
    (
        "inverted_opengl",
        "the cameras' y and z axes are flipped and the matrices then inverted",
        lambda poses: transforms.inverted(transforms.opengl(poses)),
    ),
    (
        "upside_down",
        "the pictures are turned by 180 degrees",
        transforms.flipped(-1, -1, 1),
    ),
    ("xz_flipped", "the cameras' x and z axes are flipped", transforms.flipped(-1, 1, -1)),
)


def mends(views: int) -> Iterator[Mend]:
    """Mends without a parameter to search for, common mistakes first; of orders up to `views`."""
    flip, turned = transforms.mirrored, "the cameras turn about the object the other way round"
    # Geometry alone can't tell these apart: they differ by a mirror image of everything.
    for name, words, apply in (
        ("mirror_pictures", "the views are mirrored left to right", _calibrated(flip, False)),
        (
            "mirror_poses",
            f"{turned} (azimuth with the wrong sign; or all pictures are mirrored)",
            _turned_back,
        ),
        (
            "mirror_all_pictures",
            "all pictures are mirrored left to right, the input's too",
            _calibrated(flip, True),
        ),
    ):
        yield Mend(name, "mirrored", words, apply)
    for suffix in ("", "_all"):
        for name, words, change in _CONVENTIONS:
            apply = _posed(change, bool(suffix))
            yield Mend(name + suffix, "pose_convention", words, apply)
    words = "the views' cameras are moved back until what they show lies on the pivot"
    yield Mend("move_cameras", "pivot_offset", words, _moved_back)
    for by in range(1, views):
        shift = by if by <= views // 2 else by - views
        where = f"{abs(shift)} {'after' if shift > 0 else 'before'} it"
        words = f"every view takes the pose of the one {where}"
        apply = _reordered(lambda count, by=shift: np.roll(np.arange(count), -by))  # type: ignore[misc]
        yield Mend(f"roll_{shift:+d}", "pose_mismatch", words, apply, (float(shift),))
    if views:
        words = "the poses are taken in reverse order"
        backwards = _reordered(lambda count: np.arange(count)[::-1])
        yield Mend("reverse", "pose_mismatch", words, backwards)
    for strength in (0.3, 0.5, 0.7, 0.85, 0.95):
        words = f"the views are widened to undo a squeeze of {strength:.0%} at the side: "
        words += "the object is a flat cut-out"
        apply = _widened(strength)
        yield Mend(f"widen_{strength:g}", "billboard", words, apply, (strength,))


def _focal(factor: float, everything: bool) -> Mend:
    words = f"the focal length is multiplied by {factor:.2f}"
    apply = _calibrated(lambda Ks, _: transforms.zoomed(Ks, factor), everything)
    return Mend("focal" + "_all" * everything, "focal_length", words, apply, (factor,))


def _principal(x: float, y: float, everything: bool) -> Mend:
    words = f"the principal point is moved by {x:+.3f} widths to the right and {y:+.3f} down"
    apply = _calibrated(lambda Ks, width: transforms.shifted(Ks, x, y, width), everything)
    name = "principal_point" + "_all" * everything
    return Mend(name, "principal_point", words, apply, (x, y))


def _depth(factor: float) -> Mend:
    words = f"depth is multiplied by {factor:.2f}"
    apply = lambda rig: replace(rig, depths=rig.depths * factor)  # noqa: E731
    return Mend("depth_scale", "depth_mismatch", words, apply, (factor,))


def named(name: str, amounts: Sequence[float] = ()) -> Mend:
    """A mend by the name that `explain` gave it, with its parameters.

    Raises:
        ValueError: for an unknown name.
    """
    everything = name.endswith("_all")
    if name.startswith("focal"):
        return _focal(amounts[0], everything)
    if name.startswith("principal_point"):
        return _principal(amounts[0], amounts[1], everything)
    if name == "depth_scale":
        return _depth(amounts[0])
    views = 2 * int(abs(amounts[0])) + 2 if name.startswith("roll_") else 2
    for mend in mends(views):
        if mend.name == name:
            return mend
    raise ValueError(f"name: got {name!r}, which is no mend")


@dataclass(frozen=True)
class Explanation:
    """What explains the mismatch best.

    Args:
        code: of the reason to give.
        words: plain language.
        before, after: mean score of the records looked at, as given and mended.
        mend: what restores them, or None where it can't be undone.
    """

    code: str
    words: str
    before: float
    after: float
    mend: Mend | None = None


def _mean_score(rigs: Sequence[Rig], mend: Mend | None = None) -> float:
    scores = [score(mend.apply(rig) if mend else rig) for rig in rigs]
    return float(np.nanmean(scores)) if np.isfinite(scores).any() else np.nan


def _minimise(make: Callable[[float], Mend], grid: np.ndarray, rigs: Sequence[Rig]) -> Mend:
    """The best of a grid, refined twice between its neighbours."""
    values = grid
    for _ in range(3):
        scores = np.array([_mean_score(rigs, make(float(v))) for v in values])
        best = int(np.nanargmin(scores))
        low, high = values[max(best - 1, 0)], values[min(best + 1, len(values) - 1)]
        # Silhouettes leave a flat valley a pixel wide: its middle is the best guess.
        result = make(float(values[scores <= scores[best] + 0.003].mean()))
        values = np.linspace(low, high, 7)
    return result


def _searched(rigs: Sequence[Rig]) -> Iterator[Mend]:
    """Mends with a parameter, at their best for these records."""
    few = rigs[:3]
    if any((rig.depths > 0).any() for rig in few):
        yield _minimise(lambda log2: _depth(2.0**log2), np.linspace(-3, 3, 13), few)
    for every in (False, True):
        focal = lambda log2, e=every: _focal(2.0**log2, e)  # noqa: E731
        yield _minimise(focal, np.linspace(-1.25, 1.25, 11), few)
    found = [principal_shift(rig.only(rig.views)) for rig in rigs]
    shifts = [shift for shift, before, after in found if before > 0.02 and after < 0.7 * before]
    if len(shifts) <= len(rigs) / 2:
        return
    x = float(np.median([shift[0] for shift in shifts]))
    for every in (False, True):
        across = lambda v, e=every: _principal(v, 0.0, e)  # noqa: E731
        best_x = _minimise(across, x + np.linspace(-0.06, 0.06, 5), few).amounts[0]
        down = lambda v, e=every, at=best_x: _principal(at, v, e)  # noqa: E731
        yield _minimise(down, np.linspace(-0.3, 0.3, 9), few)


def explain(rigs: Sequence[Rig], *, thorough: bool = True) -> Explanation:
    """What single mistake explains these inconsistent records.

    Candidates are tried on three records first; those that help are judged on all (at most six),
    and the best has to bring the score to a third, or to what healthy records have.  Orders of
    views are tried where a rig has all of a record's.

    Args:
        thorough: if no mend of all views helps, look for a minority of wrong ones too.
    """
    scored = sorted(((score(rig), k) for k, rig in enumerate(rigs)), key=lambda pair: -pair[0])
    rigs = [rigs[k] for s, k in scored if np.isfinite(s)][:6]
    before = _mean_score(rigs) if rigs else np.nan
    if not before >= _GOOD:
        return Explanation("pose_mismatch", "", before, before)
    found = _all_views(rigs, before) or (_some_views(rigs, before) if thorough else None)
    words = "no single change of convention mends it: the poses are shuffled, or of other pictures"
    return found or Explanation("pose_mismatch", words, before, before)


def _all_views(rigs: Sequence[Rig], before: float) -> Explanation | None:
    first, best, least = _mean_score(rigs[:3]), None, np.inf
    ordered = all(rig.whole for rig in rigs)
    candidates = mends(int(rigs[0].views.sum()) if ordered else 0)
    for mend in candidates:
        if _mean_score(rigs[:3], mend) < 0.6 * first:
            after = _mean_score(rigs, mend)
            # Earlier ones are more common mistakes: a later one has to be clearly better.
            if best is None or after < 0.7 * least - 0.002:
                best, least = mend, after
    for mend in _searched(rigs) if least > _GOOD else ():
        after = _mean_score(rigs, mend)
        if best is None or after < 0.7 * least - 0.002:
            best, least = mend, after
    if best is None or not (least < max(_GOOD, 0.3 * before) and least < 0.6 * before):
        return None
    return Explanation(best.code, best.words, before, least, best)


def _flipped(rig: Rig) -> tuple[float, float]:
    """The score with pictures flipped one by one as long as that helps, and the share flipped."""
    rows, value, done = np.flatnonzero(rig.views), score(rig), 0
    while done <= len(rows) // 2 and value > _GOOD:
        tried = [
            replace(
                rig, Ks=np.where(_only(rig, int(k)), transforms.mirrored(rig.Ks, rig.width), rig.Ks)
            )
            for k in rows
        ]
        scores = np.nan_to_num([score(one) for one in tried], nan=np.inf)
        best = int(np.argmin(scores))
        if not scores[best] < value:
            break
        rig, value, done = tried[best], float(scores[best]), done + 1
    return value, done / len(rows)


def _only(rig: Rig, row: int) -> np.ndarray:
    return (np.arange(len(rig)) == row)[:, None, None]


def _some_views(rigs: Sequence[Rig], before: float) -> Explanation | None:
    """Mistakes in a minority of the views, or in the input alone: drop the worst until the rest
    agrees, then ask whether mirroring brings the dropped ones back."""
    left, part = np.mean([_flipped(rig) for rig in rigs[:3]], axis=0)
    if left < max(_GOOD, 0.25 * before):
        words = f"about {part:.0%} of the pictures are mirrored left to right, the others are not"
        return Explanation("mirrored", words, before, float(left))
    shares, inputs, afters = [], [], []
    for rig in rigs[:4]:
        rows, value = np.arange(len(rig)), score(rig)
        while len(rows) > max(4, 0.6 * len(rig)) and value > _GOOD:
            without = [score(rig.only(np.delete(rows, k))) for k in range(len(rows))]
            drop = int(np.nanargmin(without)) if np.isfinite(without).any() else 0
            rows, value = np.delete(rows, drop), without[drop]
        dropped = np.setdiff1d(np.arange(len(rig)), rows)
        if value <= max(_GOOD, 0.3 * before) and len(dropped):
            afters.append(value)
            shares.append(len(dropped) / len(rig))
            inputs.append(set(dropped.tolist()) == {rig.input_index})
    if len(shares) < max(1, min(len(rigs), 4) / 2):
        return None
    after = float(np.mean(afters))
    if np.mean(inputs) > 0.5:
        words = "the views agree with each other but not with the input's pose or picture"
        return Explanation("input_pose", words, before, after)
    words = f"about {np.mean(shares):.0%} of the pictures don't belong to their poses, "
    return Explanation("pose_mismatch", words + "the others agree", before, after)
