"""The single mistakes by which poses commonly don't fit their pictures, and how each is undone.

Every `Mend` rewrites the cameras of a `Rig`; the one that makes silhouettes (and depth) consistent
again names the convention that was broken: `diagnosis` looks for it, `repair` applies it to whole
records.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from fresnel.gate.geometry import Coherence, Rig, coherence, triangulate

_FLIP = np.diag([1.0, -1.0, -1.0, 1.0])


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


def score(rig: Rig) -> float:
    """Inconsistency of a rig: 0 healthy, about 0.1 and more for wrong poses."""
    return _score(coherence(rig))


def _score(found: Coherence) -> float:
    if np.isnan(found.miss):
        return np.nan
    stray = 0.0 if np.isnan(found.stray) else found.stray
    return found.miss + 0.1 * (1 - found.hull_iou) + stray


def rows_of_views(rig: Rig) -> np.ndarray:
    """Which rows are views, not the input."""
    return np.arange(len(rig)) != (-1 if rig.input_index is None else rig.input_index)


def _posed(change: Callable[[np.ndarray], np.ndarray], everything: bool) -> Callable[[Rig], Rig]:
    def apply(rig: Rig) -> Rig:
        rows = np.ones(len(rig), bool) if everything else rows_of_views(rig)
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
    rows = rows_of_views(rig) if rows is None else rows
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
    rows, viewmats = rows_of_views(rig), rig.viewmats.copy()
    viewmats[rows] = np.diag([-1.0, 1, 1, 1]) @ viewmats[rows] @ mirror
    return replace(rig, viewmats=viewmats)


def _reordered(order: Callable[[int], np.ndarray]) -> Callable[[Rig], Rig]:
    def apply(rig: Rig) -> Rig:
        rows = np.flatnonzero(rows_of_views(rig))
        viewmats, Ks = rig.viewmats.copy(), rig.Ks.copy()
        viewmats[rows], Ks[rows] = viewmats[rows[order(len(rows))]], Ks[rows[order(len(rows))]]
        return replace(rig, viewmats=viewmats, Ks=Ks)

    return apply


def _focal(factor: float, everything: bool) -> Callable[[Rig], Rig]:
    def apply(rig: Rig) -> Rig:
        Ks = rig.Ks.copy()
        rows = np.ones(len(rig), bool) if everything else rows_of_views(rig)
        Ks[rows, 0, 0] *= factor
        Ks[rows, 1, 1] *= factor
        return replace(rig, Ks=Ks)

    return apply


def _principal(x: float, y: float, everything: bool) -> Callable[[Rig], Rig]:
    def apply(rig: Rig) -> Rig:
        Ks = rig.Ks.copy()
        rows = np.ones(len(rig), bool) if everything else rows_of_views(rig)
        Ks[rows, :2, 2] += np.array([x, y]) * rig.width
        return replace(rig, Ks=Ks)

    return apply


def _moved_back(rig: Rig) -> Rig:
    """The views' cameras moved so that what they show lies on the declared pivot."""
    rows = rows_of_views(rig)
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
        Ks[:, 0, 0] *= np.where(rows_of_views(rig), 1 - strength * (1 - across), 1.0)
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


def simple_mends(views: int) -> Iterator[Mend]:
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


def focal_mend(factor: float, everything: bool) -> Mend:
    return Mend(
        "focal_all" if everything else "focal",
        "focal_length",
        f"the focal length is multiplied by {factor:.2f}",
        _focal(factor, everything),
        (factor,),
    )


def principal_mend(x: float, y: float, everything: bool) -> Mend:
    return Mend(
        "principal_point_all" if everything else "principal_point",
        "principal_point",
        f"the principal point is moved by {x:+.3f} widths to the right and {y:+.3f} down",
        _principal(x, y, everything),
        (x, y),
    )


def depth_mend(factor: float) -> Mend:
    return Mend(
        "depth_scale",
        "depth_mismatch",
        f"depth is multiplied by {factor:.2f}",
        lambda rig: replace(rig, depths=rig.depths * factor),
        (factor,),
    )


def named(name: str, amounts: Sequence[float] = ()) -> Mend:
    """A mend by the name that a diagnosis gave it, with its parameters.

    Raises:
        ValueError: for an unknown name.
    """
    everything = name.endswith("_all")
    if name.startswith("focal"):
        return focal_mend(amounts[0], everything)
    if name.startswith("principal_point"):
        return principal_mend(amounts[0], amounts[1], everything)
    if name == "depth_scale":
        return depth_mend(amounts[0])
    views = 2 * int(abs(amounts[0])) + 2 if name.startswith("roll_") else 2
    for mend in simple_mends(views):
        if mend.name == name:
            return mend
    raise ValueError(f"name: got {name!r}, which is no mend")
