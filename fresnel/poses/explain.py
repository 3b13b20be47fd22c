"""Which single mistake explains poses that don't fit their pictures, and how it is undone.

Every `Mend` rewrites the cameras of a `Rig`; the one that makes silhouettes (and depth) consistent
again names the convention that was broken.  `fix` applies it to whole records.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from fresnel.poses import transforms
from fresnel.poses.geometry import Rig, centroid_residual, score, triangulate

GOOD = 0.012
"""A score up to which a mended record counts as consistent; healthy training records reach 0.005
(0.02 for renders of Gaussians, whose depth is soft)."""
_opened: transforms.Change = lambda poses: transforms.opengl(np.linalg.inv(poses))  # noqa: E731
_closed: transforms.Change = lambda poses: np.linalg.inv(transforms.opengl(poses))  # noqa: E731
_CONVENTIONS: dict[str, tuple[str, transforms.Change]] = {
    "inverted": ("the matrices are read as camera-to-world", np.linalg.inv),
    "transposed": ("the rotations are transposed", transforms.transposed),
    "opengl_axes": ("the cameras' y and z axes are flipped (OpenGL axes)", transforms.opengl),
    "opengl_camera_to_world": ("the matrices are read as OpenGL's camera-to-world", _opened),
    "inverted_opengl": ("OpenGL's axes are flipped and the matrices then inverted", _closed),
    "upside_down": ("the pictures are turned by 180 degrees", transforms.axes(-1, -1, 1)),
    "xz_flipped": ("the cameras' x and z axes are flipped", transforms.axes(-1, 1, -1)),
}
_KINDS = {
    # Geometry alone can't tell these apart: they differ by a mirror image of everything.
    "mirror_pictures": ("mirrored", "the views are mirrored left to right"),
    "mirror_poses": ("mirrored", "azimuth grows the other way (or all pictures are mirrored)"),
    "mirror_all_pictures": ("mirrored", "all pictures are mirrored left to right, the input's too"),
    **{name: ("pose_convention", words) for name, (words, _) in _CONVENTIONS.items()},
    "move_cameras": ("pivot_offset", "the views' cameras are moved until they show the pivot"),
    "roll": ("pose_mismatch", "every view takes the pose of the one {0:+.0f} places from it"),
    "reverse": ("pose_mismatch", "the poses are taken in reverse order"),
    "widen": ("billboard", "a flat cut-out's squeeze of {0:.0%} at the side is undone"),
    "depth_scale": ("depth_mismatch", "depth is multiplied by {0:.2f}"),
    "focal": ("focal_length", "the focal length is multiplied by {0:.2f}"),
    "principal_point": ("principal_point", "cx moves by {0:+.3f} and cy by {1:+.3f} widths"),
}
"""The code of the reason, and what is wrong, after "the pictures fit if"."""


@dataclass(frozen=True)
class Mend:
    """One mistake in poses or pictures, and its undoing.

    Args:
        code: of the reason that it explains.
        words: what is wrong: plain language.
        name: machine name, "" for what can't be undone; with "_all" the input is wrong too, else
            the views alone are.
        amounts: the parameters of the mend, if it has any (widths, a factor).
        before, after: mean score of the records looked at, as given and mended.
    """

    code: str
    words: str
    name: str = ""
    amounts: tuple[float, ...] = ()
    before: float = np.nan
    after: float = np.nan

    def apply(self, rig: Rig) -> Rig:
        """The rig with its mistake undone."""
        kind, amount = _kind(self.name), [*self.amounts, 0.0][0]
        rows, has_input = rig.views | ("_all" in self.name), not rig.views.all()
        poses, Ks, source = rig.viewmats[rows], rig.Ks[rows], int(np.argmin(rig.views))
        if kind in _CONVENTIONS:
            poses = _CONVENTIONS[kind][1](poses)
        elif kind == "depth_scale":
            return replace(rig, depths=rig.depths * amount)
        elif kind == "move_cameras":
            poses = _moved_back(rig)
        elif kind == "mirror_poses" and has_input:
            away = rig.centers[source] - rig.pivot
            if np.hypot(away[0], away[2]) < 1e-6:
                away = -rig.viewmats[source, 2, :3]
            poses = transforms.mirrored_about(poses, rig.pivot, away)
        elif kind.startswith("mirror"):
            Ks = transforms.mirrored(Ks, rig.width)
        elif kind == "roll":
            poses, Ks = (np.roll(rows, -int(amount), axis=0) for rows in (poses, Ks))
        elif kind == "reverse":
            poses, Ks = poses[::-1], Ks[::-1]
        elif kind == "widen" and has_input:
            forward = rig.viewmats[:, 2, [0, 2]]
            forward = forward / np.maximum(np.linalg.norm(forward, axis=1, keepdims=True), 1e-9)
            Ks[:, 0, 0] *= transforms.squeezed(forward[rows] @ forward[source], amount)
        elif kind == "focal":
            Ks = transforms.calibrated(Ks, rig.width, zoom=amount)
        elif kind == "principal_point":
            Ks = transforms.calibrated(Ks, rig.width, *self.amounts)
        return rig.put(rows, viewmats=poses, Ks=Ks)


def _kind(name: str) -> str:
    return re.sub(r"_([-+.\d]+|all)$", "", name)


def named(name: str, amounts: Sequence[float] = ()) -> Mend:
    """A mend by the name that `explain` gave it, with its parameters.

    Raises:
        ValueError: for an unknown name.
    """
    if _kind(name) not in _KINDS:
        raise ValueError(f"name: got {name!r}, which is no mend")
    code, words = _KINDS[_kind(name)]
    return Mend(code, words.format(*amounts), name, tuple(amounts))


def _moved_back(rig: Rig) -> np.ndarray:
    """The views' poses moved so that what they show lies on the declared pivot."""
    found, poses = triangulate(rig.only(rig.views)), rig.viewmats[rig.views]
    if found is None:
        return poses

    def after(by: np.ndarray) -> float:
        return score(_few(rig.put(rig.views, viewmats=transforms.moved(poses, by))))

    best = rig.pivot - found
    least = after(best)
    if not rig.views.all() and least < 0.6 * score(_few(rig)):
        # The silhouettes' centroids are not quite the image of the pivot; the input knows better.
        step = 0.04 * float(np.median(np.linalg.norm(rig.centers[rig.views] - found, axis=1)))
        for size in (step, step / 2, step / 4, step / 8):
            for way in np.concatenate([np.eye(3), -np.eye(3)]):
                value = after(best + size * way)
                if value < least:
                    best, least = best + size * way, value
    return transforms.moved(poses, best)


def _few(rig: Rig) -> Rig:
    """At most 16 of the views, from all around, and the input: enough to score a mend of all."""
    rows = np.flatnonzero(rig.views)
    if len(rows) <= 16:
        return rig
    chosen = rows[np.linspace(0, len(rows) - 1, 16).round().astype(int)]
    return rig.only(np.append(chosen, np.flatnonzero(~rig.views)))


def _mean_score(rigs: Sequence[Rig], mend: Mend | None = None) -> float:
    scores = [score(_few(mend.apply(rig) if mend else rig)) for rig in rigs]
    return float(np.nanmean(scores)) if np.isfinite(scores).any() else np.nan


def _tried(rigs: Sequence[Rig]) -> Iterator[Mend]:
    """Mends without a parameter to search for, common mistakes first: a later one has to be clearly
    better.  Orders are tried where a rig has all of a record's views."""
    count = int(rigs[0].views.sum()) if all(rig.whole for rig in rigs) else 0
    names = ["mirror_pictures", "mirror_poses", "mirror_all_pictures", *_CONVENTIONS]
    names += [*(f"{name}_all" for name in _CONVENTIONS), "move_cameras"]
    yield from (named(name) for name in names)
    for shift in (by if by <= count // 2 else by - count for by in range(1, count)):
        yield named(f"roll_{shift:+d}", [float(shift)])
    yield from [named("reverse")] if count else []
    yield from (named(f"widen_{part:g}", [part]) for part in (0.3, 0.5, 0.7, 0.85, 0.95))


def _searched(rigs: Sequence[Rig]) -> Iterator[Mend]:
    """Mends with a parameter, at their best for three records."""
    few = rigs[:3]

    def best(name: str, grid: np.ndarray, make: Callable[..., Sequence[float]]) -> Mend:
        """Of a grid, refined twice between its neighbours."""
        for _ in range(3):
            scores = np.array([_mean_score(few, named(name, make(x))) for x in grid.tolist()])
            at = int(np.nanargmin(scores))
            # Silhouettes leave a flat valley a pixel wide: its middle is the best guess.
            found = make(float(grid[scores <= scores[at] + 0.003].mean()))
            grid = np.linspace(grid[max(at - 1, 0)], grid[min(at + 1, len(grid) - 1)], 7)
        return named(name, found)

    if any((rig.depths > 0).any() for rig in few):
        yield best("depth_scale", np.linspace(-3, 3, 13), lambda log2: [2.0**log2])
    for name in ("focal", "focal_all"):
        yield best(name, np.linspace(-1.25, 1.25, 11), lambda log2: [2.0**log2])
    shifts = []
    for part in (rig.only(rig.views) for rig in rigs):
        before, (after, x, _) = centroid_residual(part)[0], centroid_residual(part, shifted=True)
        shifts += [x] if before > 0.02 and after < 0.7 * before else []
    if len(shifts) > len(rigs) / 2:
        grid = float(np.median(shifts)) + np.linspace(-0.06, 0.06, 5)
        for name in ("principal_point", "principal_point_all"):
            across = best(name, grid, lambda x: [x, 0.0]).amounts[0]
            yield best(name, np.linspace(-0.3, 0.3, 9), lambda y, x=across: [x, y])


def explain(rigs: Sequence[Rig], *, thorough: bool = True) -> Mend:
    """What single mistake explains these inconsistent records.

    Candidates are tried on three records first; those that help are judged on all (at most six),
    and the best has to bring the score to a third, or to what healthy records have.  Orders of
    views are tried where a rig has all of a record's.

    Args:
        thorough: if no mend of all views helps, look for a minority of wrong ones too.
    """
    scored = sorted(
        ((score(_few(rig)), k) for k, rig in enumerate(rigs)), key=lambda pair: -pair[0]
    )
    rigs = [rigs[k] for value, k in scored if np.isfinite(value)][:6]
    before = _mean_score(rigs) if rigs else np.nan
    if not before >= GOOD:
        return Mend("pose_mismatch", "", before=before, after=before)
    first, best, least = _mean_score(rigs[:3]), None, np.inf
    for candidates in (_tried, _searched):
        for mend in candidates(rigs) if least > GOOD else ():
            if _mean_score(rigs[:3], mend) < 0.6 * first:
                after = _mean_score(rigs, mend)
                if after < 0.7 * least - 0.002:
                    best, least = mend, after
    if best is None or least >= max(GOOD, 0.3 * before) or least >= 0.6 * before:
        words = "no single change of convention mends it: poses are shuffled, or of other pictures"
        best, least = Mend("pose_mismatch", words), before
        if thorough:
            best, least = _some_views([_few(rig) for rig in rigs], before) or (best, least)
    return replace(best, before=before, after=least)


def _worst(
    rig: Rig, change: Callable[[Rig, np.ndarray], Rig], rows: np.ndarray, most: int
) -> tuple[float, np.ndarray]:
    """The score with up to `most` of the rows changed, the one that helps most first, as long as
    that helps; and which those are (V,)."""
    chosen, value = np.zeros(len(rig.masks), bool), score(rig)
    while chosen.sum() < most and value > GOOD:
        tried = [chosen | (np.arange(len(chosen)) == row) for row in rows]
        scores = np.nan_to_num([score(change(rig, some)) for some in tried], nan=np.inf)
        best = int(np.argmin(scores))
        if not scores[best] < value:
            break
        chosen, value = tried[best], float(scores[best])
    return value, chosen


def _some_views(rigs: Sequence[Rig], before: float) -> tuple[Mend, float] | None:
    """A mistake in a minority of the views, or in the input alone, and the score without: are they
    mirrored?  Else the worst are dropped until the rest agrees."""

    def flipped(rig: Rig, rows: np.ndarray) -> Rig:
        return rig.put(rows, Ks=transforms.mirrored(rig.Ks[rows], rig.width))

    found: list[tuple[float, ...]] = []
    for rig in rigs[:3]:
        value, chosen = _worst(rig, flipped, np.flatnonzero(rig.views), rig.views.sum() // 2 + 1)
        found.append((value, chosen[rig.views].mean()))
    after, share = np.mean(found, axis=0).tolist()
    if after < max(GOOD, 0.25 * before):
        words = f"about {share:.0%} of the pictures are mirrored left to right, the others are not"
        return Mend("mirrored", words), after
    found = []
    for rig in rigs[:4]:
        every = np.arange(len(rig.masks))
        most = len(every) - max(4, int(0.6 * len(every)))
        value, dropped = _worst(rig, lambda one, some: one.only(~some), every, most)
        if value <= max(GOOD, 0.3 * before) and dropped.any():
            found.append((value, dropped.mean(), (dropped == ~rig.views).all()))
    if len(found) < max(1, min(len(rigs), 4) / 2):
        return None
    after, share, is_input = np.mean(found, axis=0).tolist()
    if is_input > 0.5:
        words = "the views agree with each other but not with the input's pose or picture"
        return Mend("input_pose", words), after
    words = f"about {share:.0%} of the pictures don't belong to their poses, the others agree"
    return Mend("pose_mismatch", words), after
