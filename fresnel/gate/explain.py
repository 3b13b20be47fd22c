"""Which single mistake explains poses that don't fit their pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from fresnel.gate.geometry import Rig, principal_shift
from fresnel.gate.mend import (
    Mend,
    depth_mend,
    focal_mend,
    mirrored,
    principal_mend,
    rows_of_views,
    score,
    simple_mends,
)

_GOOD = 0.012
"""A score up to which a mended record counts as consistent; healthy training records reach 0.005
(0.02 for renders of Gaussians, whose depth is soft)."""


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
        yield _minimise(lambda log2: depth_mend(2.0**log2), np.linspace(-3, 3, 13), few)
    for everything in (False, True):
        yield _minimise(
            lambda log2, e=everything: focal_mend(2.0**log2, e),  # type: ignore[misc]
            np.linspace(-1.25, 1.25, 11),
            few,
        )
    shifts = []
    for rig in rigs:
        shift, before, after = principal_shift(rig.only(rows_of_views(rig)))
        if before > 0.02 and after < 0.7 * before:
            shifts.append(shift)
    if len(shifts) > len(rigs) / 2:
        x = float(np.median([shift[0] for shift in shifts]))
        for everything in (False, True):
            across = _minimise(
                lambda v, e=everything: principal_mend(v, 0.0, e),  # type: ignore[misc]
                x + np.linspace(-0.06, 0.06, 5),
                few,
            )
            best_x = across.amounts[0]
            yield _minimise(
                lambda v, e=everything, x=best_x: principal_mend(x, v, e),  # type: ignore[misc]
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
    for mend in simple_mends(int(rows_of_views(rigs[0]).sum())):
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
    rows, value, done = np.flatnonzero(rows_of_views(rig)), score(rig), 0
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
        share = float(np.mean([done / rows_of_views(rig).sum() for rig, done in flips]))
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
