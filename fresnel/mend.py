"""Which single mistake explains poses that don't fit their pictures, and how to undo it.

Every `Mend` rewrites the cameras of a `Rig`; the one that makes silhouettes (and depth) consistent
again names the convention that was broken.  `corrected` applies it to whole records.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from fresnel.cameras import Cameras
from fresnel.consistency import (
    Coherence,
    Rig,
    coherence,
    principal_shift,
    rig_of,
    triangulate,
)

_FLIP = np.diag([1.0, -1.0, -1.0, 1.0])
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


@dataclass(frozen=True)
class Diagnosis:
    """What explains the mismatch best.

    Args:
        code: of the reason to give.
        words: plain language.
        before, after: mean score of the records looked at, as given and mended.
        mend: what restores them, or None where it can't be undone.
        views: share of the views at fault, for mistakes that are not in all of them.
    """

    code: str
    words: str
    before: float
    after: float
    mend: Mend | None = None
    views: float = 1.0


def score(rig: Rig) -> float:
    """Inconsistency of a rig: 0 healthy, about 0.1 and more for wrong poses."""
    return _score(coherence(rig))


def _score(found: Coherence) -> float:
    if np.isnan(found.miss):
        return np.nan
    stray = 0.0 if np.isnan(found.stray) else found.stray
    return found.miss + 0.1 * (1 - found.hull_iou) + stray


def _views(rig: Rig) -> np.ndarray:
    """Which rows are views, not the input."""
    return np.arange(len(rig)) != (-1 if rig.input_index is None else rig.input_index)


def _posed(change: Callable[[np.ndarray], np.ndarray], everything: bool) -> Callable[[Rig], Rig]:
    def apply(rig: Rig) -> Rig:
        rows = np.ones(len(rig), bool) if everything else _views(rig)
        viewmats = rig.viewmats.copy()
        viewmats[rows] = change(viewmats[rows])
        return replace(rig, viewmats=viewmats)

    return apply


def _transposed(viewmats: np.ndarray) -> np.ndarray:
    out = viewmats.copy()
    out[:, :3, :3] = viewmats[:, :3, :3].transpose(0, 2, 1)
    return out


def mirrored(rig: Rig, rows: np.ndarray | None = None) -> Rig:
    """Some pictures (None: the views') flipped left to right."""
    Ks = rig.Ks.copy()
    flip = np.array([[-1.0, 0, rig.width], [0, 1, 0], [0, 0, 1]])
    rows = _views(rig) if rows is None else rows
    Ks[rows] = flip @ Ks[rows]
    return replace(rig, Ks=Ks)


def _turned_back(rig: Rig) -> Rig:
    """The views' poses mirrored in the vertical plane through pivot and input camera."""
    if rig.input_index is None:
        return mirrored(rig)
    away = rig.centers[rig.input_index] - rig.pivot
    if np.hypot(away[0], away[2]) < 1e-6:
        away = -rig.viewmats[rig.input_index, 2, :3]
    normal = np.array([away[2], 0.0, -away[0]]) / max(np.hypot(away[0], away[2]), 1e-9)
    mirror = np.eye(4)
    mirror[:3, :3] -= 2 * np.outer(normal, normal)
    mirror[:3, 3] = 2 * normal * (normal @ rig.pivot)
    rows, viewmats = _views(rig), rig.viewmats.copy()
    viewmats[rows] = np.diag([-1.0, 1, 1, 1]) @ viewmats[rows] @ mirror
    return replace(rig, viewmats=viewmats)


def _reordered(order: Callable[[int], np.ndarray]) -> Callable[[Rig], Rig]:
    def apply(rig: Rig) -> Rig:
        rows = np.flatnonzero(_views(rig))
        viewmats, Ks = rig.viewmats.copy(), rig.Ks.copy()
        viewmats[rows], Ks[rows] = viewmats[rows[order(len(rows))]], Ks[rows[order(len(rows))]]
        return replace(rig, viewmats=viewmats, Ks=Ks)

    return apply


def _focal(factor: float, everything: bool) -> Callable[[Rig], Rig]:
    def apply(rig: Rig) -> Rig:
        Ks = rig.Ks.copy()
        rows = np.ones(len(rig), bool) if everything else _views(rig)
        Ks[rows, 0, 0] *= factor
        Ks[rows, 1, 1] *= factor
        return replace(rig, Ks=Ks)

    return apply


def _principal(x: float, y: float, everything: bool) -> Callable[[Rig], Rig]:
    def apply(rig: Rig) -> Rig:
        Ks = rig.Ks.copy()
        rows = np.ones(len(rig), bool) if everything else _views(rig)
        Ks[rows, :2, 2] += np.array([x, y]) * rig.width
        return replace(rig, Ks=Ks)

    return apply


def _moved_back(rig: Rig) -> Rig:
    """The views' cameras moved so that what they show lies on the declared pivot."""
    rows = _views(rig)
    found = triangulate(rig.only(rows))
    if found is None:
        return rig

    def moved(by: np.ndarray) -> Rig:
        viewmats = rig.viewmats.copy()
        viewmats[rows, :3, 3] -= viewmats[rows, :3, :3] @ by
        return replace(rig, viewmats=viewmats)

    best = rig.pivot - found
    least = score(moved(best))
    if rig.input_index is None or not least < 0.6 * score(rig):
        return moved(best)
    # The silhouettes' centroids are not quite the image of the pivot; the input knows better.
    step = 0.04 * float(np.median(np.linalg.norm(rig.centers[rows] - found, axis=1)))
    for _ in range(4):
        for way in np.concatenate([np.eye(3), -np.eye(3)]):
            value = score(moved(best + step * way))
            if value < least:
                best, least = best + step * way, value
        step /= 2
    return moved(best)


def _widened(strength: float) -> Callable[[Rig], Rig]:
    """Undo the squeeze of a flat cut-out: width 1 - strength (1 - |cos azimuth|)."""

    def apply(rig: Rig) -> Rig:
        if rig.input_index is None:
            return rig
        forward = rig.viewmats[:, 2, [0, 2]]
        forward = forward / np.maximum(np.linalg.norm(forward, axis=1, keepdims=True), 1e-9)
        across = np.abs(forward @ forward[rig.input_index])
        Ks = rig.Ks.copy()
        Ks[:, 0, 0] *= np.where(_views(rig), 1 - strength * (1 - across), 1.0)
        return replace(rig, Ks=Ks)

    return apply


def _conventions() -> Iterator[Mend]:
    inverse = np.linalg.inv
    changes: list[tuple[str, str, Callable[[np.ndarray], np.ndarray]]] = [
        ("inverted", "the matrices are read as camera-to-world", inverse),
        ("transposed", "the rotations are transposed", _transposed),
        ("opengl_axes", "the cameras' y and z axes are flipped (OpenGL axes)", lambda m: _FLIP @ m),
        (
            "opengl_camera_to_world",
            "the matrices are read as camera-to-world with OpenGL axes",
            lambda m: _FLIP @ inverse(m),
        ),
        (
            "inverted_opengl",
            "the cameras' y and z axes are flipped and the matrices then inverted",
            lambda m: inverse(_FLIP @ m),
        ),
        ("upside_down", "the pictures are turned by 180 degrees", lambda m: _DIAG_XY @ m),
        ("xz_flipped", "the cameras' x and z axes are flipped", lambda m: _DIAG_XZ @ m),
    ]
    for everything in (False, True):
        for name, words, change in changes:
            name = f"{name}_all" if everything else name
            yield Mend(name, "pose_convention", words, _posed(change, everything))


_DIAG_XY, _DIAG_XZ = np.diag([-1.0, -1, 1, 1]), np.diag([-1.0, 1, -1, 1])


def _simple_mends(views: int) -> Iterator[Mend]:
    yield Mend("mirror_pictures", "mirrored", "the views are mirrored left to right", mirrored)
    # Geometry alone can't tell these two apart: they differ by a mirror image of everything.
    yield Mend(
        "mirror_poses",
        "mirrored",
        "the cameras turn about the object the other way round (azimuth with the wrong sign; or "
        "all pictures are mirrored)",
        _turned_back,
    )
    yield Mend(
        "mirror_all_pictures",
        "mirrored",
        "all pictures are mirrored left to right, the input's too",
        lambda rig: mirrored(rig, np.ones(len(rig), bool)),
    )
    yield from _conventions()
    yield Mend(
        "move_cameras",
        "pivot_offset",
        "the views' cameras are moved back until what they show lies on the pivot",
        _moved_back,
    )
    for by in range(1, views):
        shift = by if by <= views // 2 else by - views
        yield Mend(
            f"roll_{shift:+d}",
            "pose_mismatch",
            f"every view takes the pose of the one {abs(shift)} "
            f"{'after' if shift > 0 else 'before'} it",
            _reordered(lambda count, by=shift: np.roll(np.arange(count), -by)),  # type: ignore[misc]
            (float(shift),),
        )
    yield Mend(
        "reverse",
        "pose_mismatch",
        "the poses are taken in reverse order",
        _reordered(lambda count: np.arange(count)[::-1]),
    )
    for strength in (0.3, 0.5, 0.7, 0.85, 0.95):
        yield Mend(
            f"widen_{strength:g}",
            "billboard",
            f"the views are widened to undo a squeeze of {strength:.0%} at the side: the object is "
            "a flat cut-out",
            _widened(strength),
            (strength,),
        )


def _focal_mend(factor: float, everything: bool) -> Mend:
    return Mend(
        "focal_all" if everything else "focal",
        "focal_length",
        f"the focal length is multiplied by {factor:.2f}",
        _focal(factor, everything),
        (factor,),
    )


def _principal_mend(x: float, y: float, everything: bool) -> Mend:
    return Mend(
        "principal_point_all" if everything else "principal_point",
        "principal_point",
        f"the principal point is moved by {x:+.3f} widths to the right and {y:+.3f} down",
        _principal(x, y, everything),
        (x, y),
    )


def _depth_mend(factor: float) -> Mend:
    return Mend(
        "depth_scale",
        "depth_mismatch",
        f"depth is multiplied by {factor:.2f}",
        lambda rig: replace(rig, depths=rig.depths * factor),
        (factor,),
    )


def _mean_score(rigs: Sequence[Rig], mend: Mend | None = None) -> float:
    scores = [score(mend.apply(rig) if mend else rig) for rig in rigs]
    return float(np.nanmean(scores)) if np.isfinite(scores).any() else np.nan


def _minimise(make: Callable[[float], Mend], grid: np.ndarray, rigs: Sequence[Rig]) -> Mend:
    """The best of a grid, refined twice between its neighbours."""
    values = grid
    for _ in range(3):
        scores = [_mean_score(rigs, make(float(v))) for v in values]
        best = int(np.nanargmin(scores))
        low, high = values[max(best - 1, 0)], values[min(best + 1, len(values) - 1)]
        # Silhouettes leave a flat valley a pixel wide: its middle is the best guess.
        level = values[np.array(scores) <= np.nanmin(scores) + 0.003]
        result = make(float(level.mean()))
        values = np.linspace(low, high, 7)
    return result


def _candidates(rigs: Sequence[Rig]) -> Iterator[Mend]:
    """Mends with a parameter, at their best for these records."""
    few = rigs[:3]
    if any((rig.depths > 0).any() for rig in few):
        yield _minimise(lambda log2: _depth_mend(2.0**log2), np.linspace(-3, 3, 13), few)
    for everything in (False, True):
        yield _minimise(
            lambda log2, e=everything: _focal_mend(2.0**log2, e),  # type: ignore[misc]
            np.linspace(-1.25, 1.25, 11),
            few,
        )
    shifts = []
    for rig in rigs:
        shift, before, after = principal_shift(rig.only(_views(rig)))
        if before > 0.02 and after < 0.7 * before:
            shifts.append(shift)
    if len(shifts) > len(rigs) / 2:
        x = float(np.median([shift[0] for shift in shifts]))
        for everything in (False, True):
            across = _minimise(
                lambda v, e=everything: _principal_mend(v, 0.0, e),  # type: ignore[misc]
                x + np.linspace(-0.06, 0.06, 5),
                few,
            )
            best_x = across.amounts[0]
            yield _minimise(
                lambda v, e=everything, x=best_x: _principal_mend(x, v, e),  # type: ignore[misc]
                np.linspace(-0.3, 0.3, 9),
                few,
            )


def diagnose(rigs: Sequence[Rig], most: int = 6, *, thorough: bool = True) -> Diagnosis:
    """What single mistake explains these inconsistent records.

    Candidates are tried on three records first; those that help are judged on all (at most
    `most`), and the best has to bring the score to a third, or to what healthy records have.

    Args:
        thorough: if no mend of all views helps, look for a minority of wrong ones too.
    """
    scored = sorted(((score(rig), k) for k, rig in enumerate(rigs)), key=lambda pair: -pair[0])
    rigs = [rigs[k] for s, k in scored if np.isfinite(s)][:most]
    if not rigs:
        return Diagnosis("pose_mismatch", "", np.nan, np.nan)
    before, first = _mean_score(rigs), _mean_score(rigs[:3])
    if before < _GOOD:
        return Diagnosis("pose_mismatch", "", before, before)
    found = _all_views(rigs, before, first)
    if found is not None:
        return found
    part = _some_views(rigs, before) if thorough else None
    if part is not None:
        return part
    words = "no single change of convention mends it: the poses are shuffled, or of other pictures"
    return Diagnosis("pose_mismatch", words, before, before)


def _restores(after: float, before: float) -> bool:
    return after < max(_GOOD, 0.3 * before) and after < 0.6 * before


def _all_views(rigs: Sequence[Rig], before: float, first: float) -> Diagnosis | None:
    best: tuple[float, Mend] | None = None
    for mend in _simple_mends(int(_views(rigs[0]).sum())):
        if not _mean_score(rigs[:3], mend) < 0.6 * first:
            continue
        after = _mean_score(rigs, mend)
        # Earlier ones are more common mistakes: a later one has to be clearly better.
        if best is None or after < 0.7 * best[0] - 0.002:
            best = after, mend
    parametric = list(_candidates(rigs)) if best is None or best[0] > _GOOD else []
    for mend in parametric:
        after = _mean_score(rigs, mend)
        if best is None or after < 0.7 * best[0] - 0.002:
            best = after, mend
    if best is None or not _restores(best[0], before):
        return None
    after, mend = best
    return Diagnosis(mend.code, mend.words, before, after, mend)


def _flipped(rig: Rig) -> tuple[Rig, int]:
    """Pictures flipped one by one as long as that helps, and how many were."""
    rows, value, done = np.flatnonzero(_views(rig)), score(rig), 0
    while done <= len(rows) // 2 and value > _GOOD:
        tried = [mirrored(rig, np.array([k])) for k in rows]
        scores = [score(t) for t in tried]
        best = int(np.nanargmin(scores)) if np.isfinite(scores).any() else 0
        if not scores[best] < value:
            break
        rig, value, done = tried[best], scores[best], done + 1
    return rig, done


def _some_views(rigs: Sequence[Rig], before: float) -> Diagnosis | None:
    """Mistakes in a minority of the views, or in the input alone: drop the worst until the rest
    agrees, then ask whether mirroring brings the dropped ones back."""
    flips = [_flipped(rig) for rig in rigs[:3]]
    left = float(np.mean([score(rig) for rig, _ in flips]))
    if left < max(_GOOD, 0.25 * before):
        share = float(np.mean([done / _views(rig).sum() for rig, done in flips]))
        words = f"about {share:.0%} of the pictures are mirrored left to right, the others are not"
        return Diagnosis("mirrored", words, before, left, None, share)
    shares, inputs, afters = [], [], []
    for rig in rigs[:4]:
        rows, value = np.arange(len(rig)), score(rig)
        while len(rows) > max(4, 0.6 * len(rig)) and value > _GOOD:
            without = [score(rig.only(np.delete(rows, k))) for k in range(len(rows))]
            drop = int(np.nanargmin(without)) if np.isfinite(without).any() else 0
            rows, value = np.delete(rows, drop), without[drop]
        dropped = np.setdiff1d(np.arange(len(rig)), rows)
        if value > max(_GOOD, 0.3 * before) or not len(dropped):
            continue
        afters.append(value)
        shares.append(len(dropped) / len(rig))
        inputs.append(set(dropped.tolist()) == {rig.input_index})
    if len(shares) < max(1, min(len(rigs), 4) / 2):
        return None
    after, share = float(np.mean(afters)), float(np.mean(shares))
    if np.mean(inputs) > 0.5:
        words = "the views agree with each other but not with the input's pose or picture"
        return Diagnosis("input_pose", words, before, after, None, share)
    words = f"about {share:.0%} of the pictures don't belong to their poses, the others agree"
    return Diagnosis("pose_mismatch", words, before, after, None, share)


def named(name: str, amounts: Sequence[float] = ()) -> Mend:
    """A mend by the name that a diagnosis gave it, with its parameters.

    Raises:
        ValueError: for an unknown name.
    """
    everything = name.endswith("_all")
    if name.startswith("focal"):
        return _focal_mend(amounts[0], everything)
    if name.startswith("principal_point"):
        return _principal_mend(amounts[0], amounts[1], everything)
    if name == "depth_scale":
        return _depth_mend(amounts[0])
    views = 2 * int(abs(amounts[0])) + 2 if name.startswith("roll_") else 2
    for mend in _simple_mends(views):
        if mend.name == name:
            return mend
    raise ValueError(f"name: got {name!r}, which is no mend")


def corrected(views: Any, mend: Mend) -> Any:
    """An `ObjectViews` with a mend applied: cameras rewritten, pictures flipped where needed.

    Raises:
        ValueError: for mends of the pictures' content (a flat cut-out can't be mended).
    """
    if mend.code == "billboard":
        raise ValueError("mend: a flat cut-out has no side views to restore; make the data anew")
    rgb, alpha = views.rgb.numpy(), views.alpha.numpy()
    rig = rig_of(views, rgb, alpha, with_input=True, most=len(rgb))
    after = mend.apply(rig)
    by = np.array([views.cameras.width / rig.width, views.cameras.height / rig.masks.shape[1], 1])
    Ks, viewmats = after.Ks * by[:, None], after.viewmats
    count = len(rgb)
    flipped = Ks[:, 0, 0] < 0
    Ks[flipped] = np.diag([-1.0, 1, 1]) @ Ks[flipped]
    Ks[flipped, 0, 2] += views.cameras.width
    out = replace(views, cameras=_cameras(views.cameras, viewmats[:count], Ks[:count]))
    if mend.name == "depth_scale" and views.depth is not None:
        own = None if views.input_depth is None else views.input_depth * mend.amounts[0]
        return replace(views, depth=views.depth * mend.amounts[0], input_depth=own)
    if flipped[:count].any():
        rows = torch.from_numpy(flipped[:count])
        turn = lambda x: None if x is None else torch.where(_like(rows, x), x.flip(2), x)  # noqa: E731
        out = replace(out, rgb=turn(views.rgb), alpha=turn(views.alpha), depth=turn(views.depth))
    scale = views.input_camera.width / views.cameras.width
    input_K = Ks[count] * np.array([scale, scale, 1])[:, None]
    camera = _cameras(views.input_camera, viewmats[count], input_K)
    out = replace(out, input_camera=camera)
    if flipped[count]:
        for name in ("input_rgb", "input_alpha", "input_depth", "identity_rgb", "identity_alpha"):
            value = getattr(out, name)
            if value is not None:
                out = replace(out, **{name: value.flip(1)})
    return out


def _like(rows: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return rows.reshape(-1, *[1] * (x.ndim - 1))


def _cameras(like: Cameras, viewmats: np.ndarray, Ks: np.ndarray) -> Cameras:
    return replace(
        like,
        viewmats=torch.from_numpy(viewmats).to(like.viewmats),
        Ks=torch.from_numpy(Ks).to(like.Ks),
    )
