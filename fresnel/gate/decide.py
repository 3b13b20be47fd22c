"""From findings to ranked reasons: which faults the set has, and which of them is the cause.

Whether a *set* has a fault is decided by Wald's sequential probability ratio test on its records'
flags, so the gate can stop at ten records and state how often it will be wrong.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from scipy.special import bdtrc

from fresnel.gate import checks, checks_set
from fresnel.gate.checks import Check
from fresnel.gate.thresholds import Finding, GateConfig, Row, Seen, median, share
from fresnel.poses.explain import explain
from fresnel.poses.geometry import Rig

CHECKS: tuple[Check, ...] = (
    checks.check_unreadable,
    checks.check_poses,
    checks.check_depth,
    checks.check_constant,
    checks_set.check_leak,
    checks.check_up,
    checks.check_pivot,
    checks.check_frozen,
    checks.check_sides,
    checks.check_poses_match,
    checks.check_input,
    checks.check_epipolar,
    checks_set.check_azimuths,
    checks.check_views,
    checks.check_cropped,
    checks.check_empty,
    checks.check_exposure,
    checks.check_drift,
    checks.check_channels,
    checks.check_identity,
    checks.check_grain,
    checks.check_clipping,
    checks.check_detail,
    checks.check_colours,
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
    "azimuth_imbalance": ("pose_mismatch", "too_few_views"),
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


@dataclass(frozen=True)
class Reason:
    """Why data was refused.

    Args:
        code: machine name, e.g. "pivot_offset".
        message: plain language with the numbers, no full stop.
        hint: what to do about it.
        values: the numbers and their thresholds.
        symptom_of: code of the reason that explains this one, if any.
        mend: name of the change that makes the data consistent again, if one was found.
    """

    code: str
    message: str
    hint: str
    values: dict[str, float] = field(default_factory=dict)
    symptom_of: str | None = None
    mend: str | None = None


@dataclass(frozen=True)
class Decision:
    """Ranked reasons (none: passed), notes, and whether more records could change any of it."""

    reasons: tuple[Reason, ...]
    notes: tuple[str, ...]
    settled: bool


def sequential(
    shown: int, asked: int, config: GateConfig
) -> tuple[Literal["faulty", "healthy", "undecided"], float]:
    """Wald's test of "in at most `healthy_rate` of the records" against "in `faulty_rate`".

    Returns:
        The decision and the log likelihood ratio; its sign decides where no more data comes
        (Wald, Sequential Analysis, 1947; error probabilities hold to within his approximation).
    """
    low, high = config.healthy_rate, config.faulty_rate
    ratio = shown * math.log(high / low) + (asked - shown) * math.log((1 - high) / (1 - low))
    if ratio >= math.log((1 - config.miss) / config.false_alarm):
        return "faulty", ratio
    if ratio <= math.log(config.miss / (1 - config.false_alarm)):
        return "healthy", ratio
    return "undecided", ratio


def chance(shown: int, asked: int, rate: float) -> float:
    """P(at least `shown` of `asked`) at a rate."""
    return float(bdtrc(shown - 1, asked, rate)) if shown else 1.0


def has_fault(finding: Finding, config: GateConfig, final: bool) -> tuple[bool, bool]:
    """Whether the set has a fault, and whether that is settled.

    In the end, when no more data comes, a fault needs the likelihood on its side and so many
    records that chance explains them in less than one healthy set of 200; of 20, if they are a
    third.
    """
    asked = int(np.isfinite(finding.flags).sum())
    shown = int(np.nansum(finding.flags))
    if finding.late and not final:
        return False, True
    if finding.at_once or not asked:
        return shown > 0, shown > 0 or not asked
    decision, ratio = sequential(shown, asked, config)
    if not final:
        return decision == "faulty", decision != "undecided"
    odds = chance(shown, asked, config.healthy_rate)
    return ratio > 0 and (odds < 0.005 or (odds < 0.051 and shown > 0.3 * asked)), True


def decide(
    rows: Sequence[Row],
    objects: Sequence[Row],
    config: GateConfig,
    *,
    meta: Mapping[str, Any],
    rigs: Mapping[int, Rig],
    final: bool,
) -> Decision:
    """What is wrong with what was measured so far; every cause is followed by its symptoms.

    Args:
        rigs: of records (by their place in `objects`), to find out what is wrong with poses.
        final: no more records can be read.
    """
    seen = Seen(rows, objects, config, meta)
    found: list[Reason] = []
    notes, suspects, settled = _notes(seen), dict[int, None](), True
    for check in CHECKS if rows else CHECKS[:1]:
        if check is checks.check_sides and any(r.code == "pivot_offset" for r in found):
            continue  # an orbit around another point says nothing about the object's sides
        finding = check(seen)
        if finding is None:
            continue
        faulty, sure = has_fault(finding, config, final)
        settled &= sure
        marked = np.flatnonzero(finding.flags > 0)
        if faulty:
            found.append(_reason(finding, config))
            if finding.code in ("pose_mismatch", "pivot_offset", "billboard", "input_pose"):
                suspects |= dict.fromkeys(marked.tolist())
        elif final and len(marked) >= max(1, 0.01 * len(objects)):
            count, first = len(marked), objects[marked[0]]["name"]
            notes.append(f"{finding.code}: {count} of {len(objects)} records, e.g. {first}")
    if found:
        found = _explained(found, [rigs[k] for k in suspects if k in rigs])
    return Decision(_ranked(found), tuple(notes), settled)


def _reason(finding: Finding, config: GateConfig) -> Reason:
    asked, shown = int(np.isfinite(finding.flags).sum()), int(np.nansum(finding.flags))
    values = {key: float(value) for key, value in finding.values.items()}
    values |= {"records_shown": float(shown), "records_asked": float(asked)}
    message = finding.message
    if not finding.at_once:
        values["chance"] = chance(shown, asked, config.healthy_rate)
        message += f"; {shown} of {asked} records show it"
    return Reason(finding.code, message, finding.hint, values)


_CAUSE_KNOWN = ("pose_invalid", "constant_frames", "frozen_views")


def _explained(found: list[Reason], rigs: Sequence[Rig]) -> list[Reason]:
    """Ask which convention explains a mismatch, and let the answer take its place."""
    codes = [reason.code for reason in found]
    at = next((codes.index(c) for c in ("pose_mismatch", "input_pose") if c in codes), -1)
    if at < 0 or not rigs or any(code in codes for code in _CAUSE_KNOWN):
        return found
    result = explain(rigs, thorough="pivot_offset" not in codes)
    if not result.words or (not result.name and "pivot_offset" in codes):
        return found
    values = found[at].values | {"before": result.before, "after": result.after}
    name = result.name or None
    values |= {f"mend_{k}": amount for k, amount in enumerate(result.amounts)}
    if result.code == "pose_mismatch":
        if found[at].code == result.code:
            words = f"{found[at].message}; {'they fit if ' if name else ''}{result.words}"
            found[at] = replace(found[at], message=words, values=values, mend=name)
        return found
    if result.code in codes:  # a check of its own has seen it too and has the better figures
        own = found.pop(codes.index(result.code))
        place = min(at, codes.index(result.code))
        found.insert(place, replace(own, mend=name, values=values | own.values))
        return found
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
    found.insert(min([at, *before]), first)
    return found


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
_EXPOSED = ("views_dark", "views_bright")
_PASSES_FOR = {
    "clipped": _EXPOSED,
    "exposure_drift": _EXPOSED,
    "noisy": (*_EXPOSED, "exposure_drift", "clipped", *_LOOSE),
    "blurred": _LOOSE,
    "views_empty": _LOOSE,
    "azimuth_imbalance": _LOOSE,
}


def _reordered(found: list[Reason]) -> list[Reason]:
    """Faults of pictures that pass for others in some of the records go before those, if they show
    in as many records or more: jumps, stretched contrast and noise shift mean brightness; empty,
    blurred, noisy or few views have ragged outlines."""
    for code, rivals in _PASSES_FOR.items():
        at = next((k for k, r in enumerate(found) if r.code == code), -1)
        first = next((k for k, r in enumerate(found[: max(at, 0)]) if r.code in rivals), -1)
        if first >= 0 and _is_it(found[at], found[first]):
            found.insert(first, found.pop(at))
    return found


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


def _ranked(found: list[Reason]) -> tuple[Reason, ...]:
    reasons: list[Reason] = []
    for reason in _reordered(found):
        if any(earlier.code == reason.code for earlier in reasons):
            continue
        causes = [r for r in reasons if r.symptom_of is None]
        cause = next((r.code for r in causes if reason.code in EXPLAINS.get(r.code, ())), None)
        reasons.append(replace(reason, symptom_of=cause))
    causes = [reason for reason in reasons if reason.symptom_of is None]
    return tuple(r for c in causes for r in (c, *(s for s in reasons if s.symptom_of == c.code)))


def figures(rows: Sequence[Row], objects: Sequence[Row], config: GateConfig) -> dict[str, float]:
    """The numbers of a set that were compared with the thresholds, by name."""
    if not rows:
        return {}
    seen = Seen(rows, objects, config)
    of_records = {
        median: (
            *("pivot_distance", "pivot_relative", "photometric", "epipolar", "drift"),
            *("up_tilt_deg", "identity_psnr", "identity_iou"),
        ),
        share: ("stray", "hull_iou", "hull_miss", "floating"),
    }
    return {
        "empty_share": share(seen.empty),
        "coverage_mean": float(np.mean(seen.column("coverage"))),
        "coverage_ratio": median(seen.column("coverage_ratio")),
        "luminance_ratio": median(seen.filled("luminance_ratio")),
        "detail_ratio": median(seen.filled("detail_ratio")),
        "frozen_share": share(seen.record("frozen")),
        "constant_share": share(seen.column("constant")),
        **{key: how(seen.record(key)) for how, keys in of_records.items() for key in keys},
        "false_alarm_per_check": config.false_alarm,
        "miss_per_check": config.miss,
        "miss_bound": (1 - config.faulty_rate) ** len(objects),
    }


def _notes(seen: Seen) -> list[str]:
    """Checks that could not be made, and why."""
    known = {key: np.isfinite(seen.record(key)).any() for key in ("identity_psnr", "stray")}
    guessed, unknown = (int(seen.foreground(kind).sum()) for kind in ("estimated", "none"))
    said = (
        (
            guessed > 0,
            f"no alpha in {guessed} records: the foreground is estimated as what differs from the "
            "border's colour",
        ),
        (
            unknown > 0,
            f"no alpha and no plain background in {unknown} records: coverage, outlines and sides "
            "are not judged; poses are judged by matched features",
        ),
        (
            len(seen.objects) == 1,
            "one record only: its limits are half as wide again, since nothing can confirm a flag",
        ),
        (
            not known["identity_psnr"],
            "identity check skipped: no render from the input camera is stored",
        ),
        (
            not known["stray"],
            "surfaces not compared between views: no usable depth is stored",
        ),
        (
            not np.isfinite(seen.record("pivot_distance")).any(),
            "pivot not located: no content, or cameras that all look the same way",
        ),
    )
    return [text for applies, text in said if applies]
