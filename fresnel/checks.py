"""The gate's checks: plain functions from measurements to at most one `Reason` each.

Thresholds compare medians and shares over the records and views seen, never single views: a mirror
seen edge-on is a healthy view that covers almost nothing; only a set of them is a fault.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from fresnel._measure import Row


@dataclass(frozen=True)
class GateConfig:
    """Thresholds of the gate.  The docstring of each check says how its own were set."""

    empty_coverage: float = 0.001
    empty_ratio: float = 0.02
    max_empty: float = 0.1
    min_coverage_ratio: float = 0.5
    max_pivot_offset: float = 0.2
    max_stray: float = 0.03
    max_frozen: float = 0.1
    max_constant: float = 0.02
    min_side_coverage: float = 0.4
    min_luminance_ratio: float = 0.6
    max_luminance_ratio: float = 1.6
    dark_view: float = 0.08
    max_dark: float = 0.1
    bright_view: float = 12.0
    max_bright: float = 0.1
    min_detail_ratio: float = 0.5
    min_identity_psnr: float = 13.0
    min_identity_iou: float = 0.6


@dataclass(frozen=True)
class Reason:
    """Why data was refused.

    Args:
        code: machine name, e.g. "pivot_offset".
        message: plain language with the numbers, no full stop.
        hint: what to do about it.
        values: the numbers and their thresholds.
        symptom_of: code of the reason that explains this one, if any.
    """

    code: str
    message: str
    hint: str
    values: dict[str, float] = field(default_factory=dict)
    symptom_of: str | None = None


@dataclass(frozen=True)
class _Seen:
    """The measurements as columns."""

    rows: Sequence[Row]
    objects: Sequence[Row]
    config: GateConfig

    def column(self, key: str) -> np.ndarray:
        return np.array([row[key] for row in self.rows], dtype=np.float64)

    def of_objects(self, key: str) -> np.ndarray:
        """A column of the record rows, without the records that lack it."""
        values = np.array([row.get(key, math.nan) for row in self.objects], dtype=np.float64)
        return values[np.isfinite(values)]

    @property
    def empty(self) -> np.ndarray:
        """Which views show nothing: by coverage, absolute and relative to the input's."""
        ratio = np.nan_to_num(self.column("coverage_ratio"), nan=1.0)
        config = self.config
        return (self.column("coverage") < config.empty_coverage) | (ratio < config.empty_ratio)

    @property
    def filled(self) -> np.ndarray:
        return ~self.empty

    def azimuth_bins(self) -> np.ndarray:
        """Centres of the 45 degree bins that the views fall in, 180 for -180."""
        return _azimuth_bin(self.column("azimuth_deg"))


def _azimuth_bin(azimuth_deg: np.ndarray) -> np.ndarray:
    centre = 45.0 * np.round(azimuth_deg / 45.0)
    return np.where(centre <= -180.0, 180.0, centre + 0.0)  # + 0.0: no -0.0


def _median(values: np.ndarray) -> float:
    values = values[np.isfinite(values)]
    return float(np.median(values)) if len(values) else math.nan


def _share(flags: np.ndarray) -> float:
    return float(np.mean(flags)) if len(flags) else math.nan


def check_unreadable(seen: _Seen) -> Reason | None:
    """Files that are missing, truncated, of the wrong size or no pictures.  One is enough: training
    would stop at it."""
    errors = [row for row in seen.objects if row.get("error")]
    if not errors:
        return None
    message = f"{len(errors)} of {len(seen.objects)} records can't be read: {errors[0]['error']}"
    return Reason(
        "unreadable", message, "restore or remove the file", {"records": float(len(errors))}
    )


def check_poses(seen: _Seen) -> Reason | None:
    """Poses that are NaN, scaled, or mirrored (no proper rotation within 1e-3).  One is enough."""
    bad = seen.of_objects("bad_poses")
    if not bad.sum():
        return None
    records = int((bad > 0).sum())
    return Reason(
        "pose_invalid",
        f"{int(bad.sum())} camera poses in {records} records are NaN or not a rotation",
        "world-to-camera rotations must be orthonormal, right-handed and finite",
        {"poses": float(bad.sum())},
    )


def check_depth(seen: _Seen) -> Reason | None:
    """NaN or infinite depth pixels.  One is enough."""
    bad = seen.of_objects("bad_depth")
    if not bad.sum():
        return None
    message = f"{int(bad.sum())} depth pixels in {int((bad > 0).sum())} records are not finite"
    return Reason("depth_invalid", message, "write 0 where nothing was hit", {"pixels": bad.sum()})


def check_constant(seen: _Seen) -> Reason | None:
    """Frames of one colour that claim to be covered: white, black or grey frames.

    Share of views.  Healthy renders have none; 2% leaves room for a camera inside a surface.
    """
    share = _share(seen.column("constant") > 0)
    if not share > seen.config.max_constant:
        return None
    return Reason(
        "constant_frames",
        f"{share:.0%} of the views are a single colour all over the frame",
        "look at the renderer's output: an exposure that clips, a camera inside the object, or "
        "frames that were never written",
        {"share": share, "max_constant": seen.config.max_constant},
    )


def check_pivot(seen: _Seen) -> Reason | None:
    """Cameras that look at another point than the object: the original experiment's mistake.

    Distance from the nearest point to all optical axes to the centroid of the content, over the
    cameras' distance; median over records (ten healthy training objects: at most 0.11; the original
    experiment: above 1).  Also the declared pivot against the first point.
    """
    limit = seen.config.max_pivot_offset
    relative, distance = seen.of_objects("pivot_relative"), seen.of_objects("pivot_distance")
    hint = "orbit the object's centroid: pass it as the pivot when the views are made"
    if len(relative) and np.median(relative) > limit:
        return Reason(
            "pivot_offset",
            f"the cameras orbit a point {np.median(distance):.1f} units away from the object "
            f"({np.median(relative):.2f} of their distance to that point)",
            hint,
            {"distance": float(np.median(distance)), "relative": float(np.median(relative))}
            | {"max_pivot_offset": limit},
        )
    error = seen.of_objects("pivot_error")
    if len(error) and np.median(error) > limit:
        units = float(np.median(error) * np.median(seen.of_objects("radius")))
        return Reason(
            "pivot_offset",
            f"the cameras look at a point {units:.1f} units away from the pivot that the data "
            "states",
            "one of the two is wrong: check the transform between object and cameras",
            {"distance": units, "relative": float(np.median(error)), "max_pivot_offset": limit},
        )
    return None


def check_frozen(seen: _Seen) -> Reason | None:
    """The same picture under different poses.

    Share of views that equal another of their record to within noise, where a solid of revolution
    can't explain it.  Healthy renders have none.
    """
    frozen = seen.of_objects("frozen")
    share = _share(frozen)
    if not share > seen.config.max_frozen:
        return None
    return Reason(
        "frozen_views",
        f"{share:.0%} of the views repeat another view's picture although the camera moved",
        "the renderer ignored the pose, or files were copied over each other",
        {"share": share, "max_frozen": seen.config.max_frozen},
    )


def check_sides(seen: _Seen) -> Reason | None:
    """Coverage that collapses from the side: a flat cut-out (billboard) instead of an object.

    Coverage of the views within 22.5 degrees of +-90 over that within 22.5 of 0 and 180, per
    record; median over records.  Not asked where front and back are empty themselves.  Ten healthy
    training objects stayed above 0.78, the ten flattest held-out ones had 0.66.
    """
    bins, ratio, empty = seen.azimuth_bins(), seen.column("coverage_ratio"), seen.empty
    if not _share(empty[np.isin(bins, (0, 180))]) <= seen.config.max_empty:
        return None
    names = np.array([row["object"] for row in seen.rows])
    shares = []
    for name in dict.fromkeys(names.tolist()):
        own = (names == name) & np.isfinite(ratio)
        side, front = own & (np.abs(bins) == 90), own & np.isin(bins, (0, 180))
        if side.any() and front.any() and not empty[front].all():
            shares.append(ratio[side].mean() / ratio[front].mean())
    median = _median(np.array(shares))
    if not median < seen.config.min_side_coverage:
        return None
    return Reason(
        "billboard",
        f"from the side the objects cover {median:.0%} of what they cover from the front and the "
        "back: they are flat",
        "the geometry has no depth: supervise the decoder with side views",
        {"side_coverage": median, "min_side_coverage": seen.config.min_side_coverage},
    )


def check_poses_match(seen: _Seen) -> Reason | None:
    """Poses that don't belong to the pictures: shuffled, mirrored, shifted, wrong focal length.

    Share of surface points (from depth) that fall beside the silhouette in other views; mean over
    records, because most objects are too symmetric to show it.  Needs depth.  Ten healthy training
    objects stay below 0.006; a single one reached 0.027.
    """
    stray = _share(seen.of_objects("stray"))
    if not stray > seen.config.max_stray:
        return None
    return Reason(
        "pose_mismatch",
        f"{stray:.0%} of what one view shows lies outside the object's outline in the others: the "
        "poses don't belong to the pictures",
        "check the order of the poses, the axis convention and the focal length",
        {"stray": stray, "max_stray": seen.config.max_stray},
    )


def check_empty(seen: _Seen) -> Reason | None:
    """Views that show nothing or too little, by coverage and not by brightness.

    Share of empty views, and the median coverage over the input's.  Of 1,192 healthy training views
    none was empty (the thinnest had coverage 0.0095, and 0.11 of the input's), and the median over
    ten objects stayed above 0.88.
    """
    config = seen.config
    share, coverage = _share(seen.empty), _median(seen.column("coverage_ratio"))
    if not (share > config.max_empty or coverage < config.min_coverage_ratio):
        return None
    mean = float(np.mean(seen.column("coverage")))
    empty_bins = sorted(
        {float(b) for b in set(seen.azimuth_bins()) if seen.empty[seen.azimuth_bins() == b].all()}
    )
    where = f"; nothing at all at azimuths {', '.join(f'{b:.0f}' for b in empty_bins)} degrees"
    return Reason(
        "views_empty",
        f"{share:.0%} of the views are empty and the median view covers {coverage:.0%} of what the "
        f"input covers (mean coverage {mean:.3f}){where if empty_bins else ''}: the object is not "
        "there, whatever the exposure",
        "check where the cameras look and how far away they are",
        {"share": share, "coverage_ratio": coverage, "mean_coverage": mean}
        | {"max_empty": config.max_empty, "min_coverage_ratio": config.min_coverage_ratio},
    )


def check_exposure(seen: _Seen) -> Reason | None:
    """Views much darker or brighter than the input although they cover as much.

    Ratio of mean linear-light luminance of covered pixels to the input's, over views that are not
    empty: its median, and the share of views that are (almost) black or white.  Ten healthy
    training objects: median within 0.80 to 1.12, at most 5% of the views below 0.08 of the input's
    (the unlit back of a mirror) and 4% above 12 times.
    """
    config, filled = seen.config, seen.filled
    ratio = seen.column("luminance_ratio")[filled]
    ratio = ratio[np.isfinite(ratio)]
    if not len(ratio):
        return None
    median, coverage = float(np.median(ratio)), _median(seen.column("coverage_ratio")[filled])
    dark, bright = _share(ratio < config.dark_view), _share(ratio > config.bright_view)
    values = {"luminance_ratio": median, "coverage_ratio": coverage, "dark": dark, "bright": bright}
    rest = f"coverage is {coverage:.0%} of the input's, so it is exposure, not emptiness"
    if median < config.min_luminance_ratio or dark > config.max_dark:
        what = f"the median view has {median:.2f} of the input's luminance"
        what += f" and {dark:.0%} of the views are almost black" if dark > 0 else ""
        hint = "check exposure, tone curve and colour range of the renders"
        return Reason("views_dark", f"views are dark: {what}; {rest}", hint, values)
    if median > config.max_luminance_ratio or bright > config.max_bright:
        what = f"the median view has {median:.2f} times the input's luminance"
        what += f" and {bright:.0%} of the views are far brighter" if bright > 0 else ""
        hint = "check exposure, tone curve and colour range of the renders"
        return Reason("views_bright", f"views are too bright: {what}; {rest}", hint, values)
    return None


def check_identity(seen: _Seen) -> Reason | None:
    """Gaussians that don't even reproduce the picture they were made from.

    PSNR in dB over the union of foregrounds, and silhouette IoU, of the render from the input
    camera against the input; medians over records.  An early decoder at 48 px had 18.8 dB and 0.84
    on held-out objects, the original's patch decoder 10.1 dB and 0.61.
    """
    config = seen.config
    psnr, iou = _median(seen.of_objects("identity_psnr")), _median(seen.of_objects("identity_iou"))
    if not (psnr < config.min_identity_psnr or iou < config.min_identity_iou):
        return None
    return Reason(
        "identity_mismatch",
        f"rendered from the input camera the object does not reproduce the input: PSNR "
        f"{psnr:.1f} dB over the foreground, silhouettes overlap {iou:.0%}",
        "the decoder (or the frame it speaks) is wrong before any novel view is",
        {"psnr": psnr, "iou": iou, "min_identity_psnr": config.min_identity_psnr}
        | {"min_identity_iou": config.min_identity_iou},
    )


def check_detail(seen: _Seen) -> Reason | None:
    """Blurred views: gradient energy per covered pixel over the input's.

    Median over views that are not empty.  Alpha's outline counts too, so single-coloured objects
    are judged as well.  Ten healthy training objects stayed above 0.91; renders of Gaussians may be
    softer than their input (0.73 for an early decoder).
    """
    detail = _median(seen.column("detail_ratio")[seen.filled])
    if not detail < seen.config.min_detail_ratio:
        return None
    return Reason(
        "blurred",
        f"views have {detail:.0%} of the input's gradients: they are blurred",
        "check the resolution the views were rendered at, and the Gaussians' scales",
        {"detail_ratio": detail, "min_detail_ratio": seen.config.min_detail_ratio},
    )


CHECKS: tuple[Callable[[_Seen], Reason | None], ...] = (
    check_unreadable,
    check_poses,
    check_depth,
    check_constant,
    check_pivot,
    check_frozen,
    check_sides,
    check_poses_match,
    check_empty,
    check_exposure,
    check_identity,
    check_detail,
)
"""In the order in which their reasons are ranked: causes before what they cause."""

EXPLAINS = {
    "pose_invalid": ("pivot_offset", "pose_mismatch"),
    "constant_frames": ("views_bright", "views_dark", "views_empty", "blurred", "pose_mismatch"),
    "pivot_offset": ("views_empty", "billboard", "pose_mismatch", "blurred", "views_dark"),
    "frozen_views": ("pose_mismatch",),
    "billboard": ("views_empty", "pose_mismatch", "blurred"),
    "views_empty": ("blurred",),
    "views_dark": ("identity_mismatch", "blurred"),
    "views_bright": ("identity_mismatch", "blurred"),
}
"""What else a fault brings about."""


def judge(
    rows: Sequence[Row], objects: Sequence[Row], config: GateConfig
) -> tuple[tuple[Reason, ...], dict[str, float], tuple[str, ...]]:
    """Ranked reasons (none: passed), the figures behind them, and notes on skipped checks.

    Every cause is followed by its symptoms.
    """
    seen = _Seen(rows, objects, config)
    if not rows:
        reason = check_unreadable(seen)
        return (() if reason is None else (reason,)), {}, ()
    reasons: list[Reason] = []
    for check in CHECKS:
        if check is check_sides and any(reason.code == "pivot_offset" for reason in reasons):
            continue  # an orbit around another point says nothing about the object's sides
        reason = check(seen)
        if reason is not None:
            causes = [r for r in reasons if r.symptom_of is None]
            cause = next((r.code for r in causes if reason.code in EXPLAINS.get(r.code, ())), None)
            reasons.append(replace(reason, symptom_of=cause))
    causes = [reason for reason in reasons if reason.symptom_of is None]
    reasons = [r for c in causes for r in (c, *(s for s in reasons if s.symptom_of == c.code))]
    return tuple(reasons), _figures(seen), _notes(seen)


def _figures(seen: _Seen) -> dict[str, float]:
    filled = seen.filled
    return {
        "empty_share": _share(seen.empty),
        "coverage_mean": float(np.mean(seen.column("coverage"))),
        "coverage_ratio": _median(seen.column("coverage_ratio")),
        "luminance_ratio": _median(seen.column("luminance_ratio")[filled]),
        "detail_ratio": _median(seen.column("detail_ratio")[filled]),
        "pivot_distance": _median(seen.of_objects("pivot_distance")),
        "pivot_relative": _median(seen.of_objects("pivot_relative")),
        "stray": _share(seen.of_objects("stray")),
        "frozen_share": _share(seen.of_objects("frozen")),
        "constant_share": _share(seen.column("constant") > 0),
        "identity_psnr": _median(seen.of_objects("identity_psnr")),
        "identity_iou": _median(seen.of_objects("identity_iou")),
    }


def _notes(seen: _Seen) -> tuple[str, ...]:
    notes = []
    if not len(seen.of_objects("identity_psnr")):
        notes.append("identity check skipped: no render from the input camera is stored")
    if not len(seen.of_objects("stray")):
        notes.append("poses against pictures not checked: no usable depth is stored")
    if not len(seen.of_objects("pivot_distance")):
        notes.append("pivot not located: no content, or cameras that all look the same way")
    return tuple(notes)


def profile(rows: Sequence[Row], config: GateConfig | None = None) -> list[Row]:
    """Coverage and luminance by 45 degree bins of azimuth relative to the input.

    Medians over views; `empty` is the share of empty ones.
    """
    seen = _Seen(rows, (), config or GateConfig())
    if not rows:
        return []
    bins, empty = seen.azimuth_bins(), seen.empty
    coverage, light = seen.column("coverage_ratio"), seen.column("luminance_ratio")
    return [
        {
            "azimuth_deg": float(centre),
            "views": int((bins == centre).sum()),
            "coverage_ratio": _median(coverage[bins == centre]),
            "luminance_ratio": _median(light[(bins == centre) & ~empty]),
            "empty": _share(empty[bins == centre]),
        }
        for centre in np.unique(bins[np.isfinite(bins)])
    ]
