"""From findings to a ranked verdict: which faults the set has, and which of them is the cause."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from fresnel.gate import checks, checks_poses, checks_set
from fresnel.gate.explain import diagnose
from fresnel.gate.findings import (
    Finding,
    GateConfig,
    Reason,
    Row,
    Seen,
    binomial_tail,
    median,
    sequential,
    share,
)
from fresnel.gate.geometry import Rig

Check = Callable[[Seen], Finding | None]
CHECKS: tuple[Check, ...] = (
    checks.check_unreadable,
    checks_poses.check_poses,
    checks.check_depth,
    checks.check_constant,
    checks_set.check_leak,
    checks_poses.check_up,
    checks_poses.check_pivot,
    checks_poses.check_frozen,
    checks_poses.check_sides,
    checks_poses.check_poses_match,
    checks_poses.check_input,
    checks_poses.check_epipolar,
    checks_set.check_azimuths,
    checks.check_cropped,
    checks.check_empty,
    checks.check_exposure,
    checks.check_drift,
    checks.check_channels,
    checks.check_identity,
    checks.check_grain,
    checks.check_clipping,
    checks.check_detail,
    checks_poses.check_colours,
    checks_set.check_duplicates,
    checks_set.check_classes,
)
"""In the order in which their reasons are ranked: causes before what they cause."""

_GEOMETRY = (
    *("pivot_offset", "billboard", "pose_mismatch", "input_pose", "views_empty"),
    "colours_disagree",
)
_LOOSE = ("pose_mismatch", "input_pose", "focal_length", "depth_mismatch")
_OF_EXPOSURE = (
    *("identity_mismatch", "blurred", "clipped", "exposure_drift", "colours_disagree"),
    "channels_swapped",
)
EXPLAINS = {
    "pose_invalid": ("pivot_offset", "pose_mismatch"),
    "constant_frames": (
        *("views_bright", "views_dark", "views_empty", "blurred", "pose_mismatch"),
        *("out_of_frame", "exposure_drift", "clipped", "channels_swapped", "frozen_views"),
    ),
    "azimuth_imbalance": ("pose_mismatch",),
    "pose_convention": (*_GEOMETRY, "up_axis", "azimuth_imbalance"),
    "mirrored": (*_GEOMETRY, "azimuth_imbalance"),
    "focal_length": (*_GEOMETRY, "out_of_frame"),
    "principal_point": _GEOMETRY,
    "up_axis": ("pose_mismatch", "billboard", "azimuth_imbalance"),
    "pivot_offset": (
        *("views_empty", "billboard", "pose_mismatch", "input_pose", "blurred", "views_dark"),
        *("out_of_frame", "exposure_drift", "noisy", "colours_disagree"),
    ),
    "pose_mismatch": ("colours_disagree", "input_pose"),
    "frozen_views": ("pose_mismatch", "colours_disagree"),
    "billboard": (
        *("views_empty", "pose_mismatch", "colours_disagree", "blurred", "noisy"),
        "exposure_drift",
    ),
    "input_pose": ("pose_mismatch",),
    "out_of_frame": ("pose_mismatch", "views_empty", "blurred"),
    "views_empty": ("blurred", "exposure_drift", *_LOOSE),
    "blurred": ("colours_disagree", "identity_mismatch", *_LOOSE),
    "views_dark": _OF_EXPOSURE,
    "views_bright": _OF_EXPOSURE,
    "exposure_drift": ("colours_disagree", "clipped", "views_dark", "views_bright"),
    "clipped": ("noisy", "views_dark", "views_bright", "exposure_drift", "colours_disagree"),
    "noisy": ("colours_disagree", "clipped", "views_dark", "views_bright", "exposure_drift"),
}
"""What else a fault brings about."""

Phase = Literal["early", "final"]


def decide(finding: Finding, config: GateConfig, phase: Phase) -> tuple[bool, bool]:
    """Whether the set has a fault, and whether that is settled.

    In the end, when no more data comes, a fault needs the likelihood on its side and so many
    records that chance explains them in less than one healthy set of 200; of 20, if they are a
    third.
    """
    asked = int(np.isfinite(finding.flags).sum())
    shown = int(np.nansum(finding.flags))
    if finding.late and phase == "early":
        return False, True
    if finding.at_once or not asked:
        return shown > 0, shown > 0 or not asked
    decision, ratio = sequential(shown, asked, config)
    if phase == "early":
        return decision == "faulty", decision != "undecided"
    chance = binomial_tail(shown, asked, config.healthy_rate) if shown else 1.0
    return ratio > 0 and (chance < 0.005 or (chance < 0.051 and shown > 0.3 * asked)), True


def judge(
    rows: Sequence[Row],
    objects: Sequence[Row],
    config: GateConfig,
    *,
    meta: Mapping[str, Any] | None = None,
    rigs: Mapping[int, Rig] | None = None,
    phase: Phase = "final",
) -> tuple[tuple[Reason, ...], dict[str, float], tuple[str, ...], bool]:
    """Ranked reasons (none: passed), the figures behind them, notes, and whether all is settled.

    Every cause is followed by its symptoms.

    Args:
        rigs: of records (by their place in `objects`), to find out what is wrong with poses.
        phase: "early" while more records can be read, "final" when not.
    """
    seen = Seen(rows, objects, config, dict(meta or {}))
    found: list[Reason] = []
    settled = True
    notes: list[str] = []
    suspects: list[int] = []
    for check in CHECKS:
        if not rows and check is not CHECKS[0]:
            break
        if check is checks_poses.check_sides and any(
            reason.code == "pivot_offset" for reason in found
        ):
            continue  # an orbit around another point says nothing about the object's sides
        finding = check(seen)
        if finding is None:
            continue
        faulty, sure = decide(finding, config, phase)
        settled &= sure
        if faulty:
            found.append(_reason(finding, config))
            if finding.code in ("pose_mismatch", "pivot_offset", "billboard", "input_pose"):
                suspects += np.flatnonzero(finding.flags > 0).tolist()
        elif phase == "final" and np.nansum(finding.flags) >= max(1, 0.01 * len(objects)):
            which = [str(objects[k]["name"]) for k in np.flatnonzero(finding.flags > 0)[:3]]
            count = int(np.nansum(finding.flags))
            notes.append(f"{finding.code}: {count} of {len(objects)} records, e.g. {which[0]}")
    if rigs and found:
        found = _diagnosed(found, [rigs[k] for k in dict.fromkeys(suspects) if k in rigs])
    return _ranked(found), _figures(seen) if rows else {}, (*_notes(seen), *notes), settled


def _reason(finding: Finding, config: GateConfig) -> Reason:
    asked, shown = int(np.isfinite(finding.flags).sum()), int(np.nansum(finding.flags))
    values = {key: float(value) for key, value in finding.values.items()}
    values |= {"records_shown": float(shown), "records_asked": float(asked)}
    message = finding.message
    if not finding.at_once:
        values["chance"] = binomial_tail(shown, asked, config.healthy_rate)
        message += f"; {shown} of {asked} records show it"
    return Reason(finding.code, message, finding.hint, values)


_CAUSE_KNOWN = ("pose_invalid", "constant_frames", "frozen_views")


def _diagnosed(found: list[Reason], rigs: Sequence[Rig]) -> list[Reason]:
    """Ask which convention explains a mismatch, and let the answer take its place."""
    codes = [reason.code for reason in found]
    at = next((codes.index(c) for c in ("pose_mismatch", "input_pose") if c in codes), -1)
    if at < 0 or not rigs or any(code in codes for code in _CAUSE_KNOWN):
        return found
    result = diagnose(rigs, thorough="pivot_offset" not in codes)
    if not result.words or (result.mend is None and "pivot_offset" in codes):
        return found
    values = found[at].values | {"before": result.before, "after": result.after}
    name = result.mend.name if result.mend else None
    if result.mend:
        values |= {f"mend_{k}": amount for k, amount in enumerate(result.mend.amounts)}
    if result.code == "pose_mismatch":
        if found[at].code == result.code:
            words = f"{found[at].message}; {'they fit if ' if name else ''}{result.words}"
            found[at] = replace(found[at], message=words, values=values, mend=name)
        return found
    if result.code in codes:  # a check of its own has seen it too and has the better figures
        own = codes.index(result.code)
        better = replace(found[own], mend=name, values=values | found[own].values)
        rest = [reason for reason in found if reason is not found[own]]
        return [*rest[: min(at, own)], better, *rest[min(at, own) :]]
    iou = found[at].values.get("hull_iou", np.nan)
    message = f"pictures and poses disagree (outlines agree to {iou:.0%})"
    message += f"; they fit if {result.words}" if name else f": {result.words}"
    hint = _HINTS.get(result.code, found[at].hint)
    first = Reason(result.code, message, hint, values, mend=name)
    # What a mend undoes explains where the cameras seem to look, not the other way round, if it
    # shows as often.
    before = [codes.index(c) for c in ("up_axis", "pivot_offset", "billboard") if c in codes]
    if before and (name is None or _often(found[at]) < 0.7 * max(_often(found[k]) for k in before)):
        return found
    place = min([at, *before])
    return [*found[:place], first, *found[place:]]


def _often(reason: Reason) -> float:
    return reason.values["records_shown"]


_HINTS = {
    "pose_convention": "convert the matrices where they are read: `--fix` writes a corrected copy",
    "mirrored": "flip the pictures, or the sign of azimuth: `--fix` writes a corrected copy",
    "focal_length": "check fl_x against the image size it was calibrated at",
    "principal_point": "check cx and cy: pictures cropped or padded after calibration?",
    "depth_mismatch": "check the unit and the scale of the depth maps (z-depth, not ray length)",
    "input_pose": "check which camera took the input, and that it shows the same object",
    "pivot_offset": "check the transform between the input's camera and the views'",
    "billboard": "the geometry has no depth: supervise the decoder with side views",
}


def _reordered(found: Sequence[Reason]) -> list[Reason]:
    """Faults of pictures that pass for others in some of the records go before those, if they show
    in as many records or more: jumps, stretched contrast and noise shift mean brightness; empty,
    blurred, noisy or few views have ragged outlines."""
    found = list(found)
    for code, rivals in _PASSES_FOR.items():
        at = next((k for k, r in enumerate(found) if r.code == code), -1)
        first = next((k for k, r in enumerate(found[: max(at, 0)]) if r.code in rivals), -1)
        if first >= 0 and _is_it(found[at], found[first]):
            found.insert(first, found.pop(at))
    return found


_EXPOSED = ("views_dark", "views_bright")
_PASSES_FOR = {
    "clipped": _EXPOSED,
    "exposure_drift": _EXPOSED,
    "noisy": (*_EXPOSED, "exposure_drift", "clipped", *_LOOSE),
    "blurred": _LOOSE,
    "views_empty": _LOOSE,
    "azimuth_imbalance": _LOOSE,
}


def _is_it(reason: Reason, other: Reason) -> bool:
    often, own = _often(reason) / max(_often(other), 1), reason.values
    if reason.code == "clipped":  # at both ends, or it is exposure that clips
        both = own["clipped"] > own["crushed"] + 0.05 and own["floored"] > 0.05
        return both and often >= 0.7
    if reason.code == "exposure_drift":
        return not other.values["dark"] > 0.1 and often >= 1
    if reason.code == "noisy":
        return often >= 1
    if reason.code == "blurred":
        return own["detail_ratio"] < 0.3 and often > 1.2
    return often > 1.2


def _ranked(found: Sequence[Reason]) -> tuple[Reason, ...]:
    reasons: list[Reason] = []
    for reason in _reordered(found):
        if any(earlier.code == reason.code for earlier in reasons):
            continue
        causes = [r for r in reasons if r.symptom_of is None]
        cause = next((r.code for r in causes if reason.code in EXPLAINS.get(r.code, ())), None)
        reasons.append(replace(reason, symptom_of=cause))
    causes = [reason for reason in reasons if reason.symptom_of is None]
    return tuple(r for c in causes for r in (c, *(s for s in reasons if s.symptom_of == c.code)))


def _figures(seen: Seen) -> dict[str, float]:
    config = seen.config
    return {
        "empty_share": share(seen.empty),
        "coverage_mean": float(np.mean(seen.column("coverage"))),
        "coverage_ratio": median(seen.column("coverage_ratio")),
        "luminance_ratio": median(seen.of_filled("luminance_ratio")),
        "detail_ratio": median(seen.of_filled("detail_ratio")),
        "pivot_distance": median(seen.of_objects("pivot_distance")),
        "pivot_relative": median(seen.of_objects("pivot_relative")),
        "stray": share(seen.of_objects("stray")),
        "hull_iou": share(seen.of_objects("hull_iou")),
        "hull_miss": share(seen.of_objects("hull_miss")),
        "floating": share(seen.of_objects("floating")),
        "photometric": median(seen.of_objects("photometric")),
        "epipolar": median(seen.of_objects("epipolar")),
        "drift": median(seen.of_objects("drift")),
        "up_tilt_deg": median(seen.of_objects("up_tilt_deg")),
        "frozen_share": share(seen.of_objects("frozen")),
        "constant_share": share(seen.column("constant") > 0),
        "identity_psnr": median(seen.of_objects("identity_psnr")),
        "identity_iou": median(seen.of_objects("identity_iou")),
        "false_alarm_per_check": config.false_alarm,
        "miss_per_check": config.miss,
        "miss_bound": (1 - config.faulty_rate) ** len(seen.objects),
    }


def _notes(seen: Seen) -> tuple[str, ...]:
    notes = []
    sources = [row.get("foreground") for row in seen.objects]
    if "estimated" in sources:
        notes.append(
            f"no alpha in {sources.count('estimated')} records: the foreground is estimated as "
            "what differs from the border's colour"
        )
    if "none" in sources:
        notes.append(
            f"no alpha and no plain background in {sources.count('none')} records: coverage and "
            "outlines are not judged; poses are judged by matched features"
        )
    if not np.isfinite(seen.record("input_coverage")).any() and seen.rows:
        notes.append("no input image: views are compared with each other's median instead")
    if not len(seen.of_objects("identity_psnr")):
        notes.append("identity check skipped: no render from the input camera is stored")
    if not len(seen.of_objects("stray")):
        notes.append("surfaces not compared between views: no usable depth is stored")
    if not len(seen.of_objects("pivot_distance")):
        notes.append("pivot not located: no content, or cameras that all look the same way")
    return tuple(notes)


def profile(rows: Sequence[Row], config: GateConfig | None = None) -> list[Row]:
    """Coverage and luminance by 45 degree bins of azimuth relative to the input.

    Medians over views; `empty` is the share of empty ones.
    """
    seen = Seen(rows, (), config or GateConfig())
    if not rows:
        return []
    bins, empty = seen.azimuth_bins(), seen.empty
    coverage, light = seen.column("coverage_ratio"), seen.column("luminance_ratio")
    return [
        {
            "azimuth_deg": float(centre),
            "views": int((bins == centre).sum()),
            "coverage_ratio": median(coverage[bins == centre]),
            "luminance_ratio": median(light[(bins == centre) & ~empty]),
            "empty": share(empty[bins == centre]),
        }
        for centre in np.unique(bins[np.isfinite(bins)])
    ]
