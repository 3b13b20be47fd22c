"""From findings to ranked reasons: which faults the set has, and which of them is the cause.

Whether a *set* has a fault is decided by Wald's sequential probability ratio test on its records'
flags, so the gate can stop at ten records and state how often it will be wrong.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from fresnel.data.records import UP_TILT_DEG
from fresnel.gate import faces
from fresnel.gate.checks import CHECKS, Check, Finding, Seen, median, share
from fresnel.gate.leaks import chance
from fresnel.gate.thresholds import GateConfig
from fresnel.poses.explain import explain
from fresnel.poses.geometry import Rig

_ALL: tuple[Callable[[Seen], Finding], ...] = (*CHECKS, faces.CHECK)
_GEOMETRY = "pivot_offset billboard pose_mismatch input_pose views_empty colours_disagree "
_GEOMETRY += "faces_missing"
_LOOSE = "pose_mismatch input_pose focal_length depth_mismatch"
_EXPOSED = "views_dark views_bright"
_OF_EXPOSURE = "identity_mismatch blurred clipped exposure_drift colours_disagree "
_OF_EXPOSURE += "channels_swapped faces_missing colour_drift views_negative views_grey"
EXPLAINS = {
    "pose_invalid": "pivot_offset pose_mismatch",
    "constant_frames": f"{_EXPOSED} views_empty blurred pose_mismatch out_of_frame exposure_drift "
    "clipped channels_swapped frozen_views faces_missing views_grey colour_drift views_negative",
    "azimuth_imbalance": "pose_mismatch too_few_views",
    "pose_convention": f"{_GEOMETRY} azimuth_imbalance",
    "mirrored": f"{_GEOMETRY} azimuth_imbalance",
    "focal_length": f"{_GEOMETRY} out_of_frame",
    "principal_point": _GEOMETRY,
    "pivot_offset": "views_empty billboard pose_mismatch input_pose blurred views_dark "
    "out_of_frame exposure_drift noisy colours_disagree faces_missing",
    "pose_mismatch": "colours_disagree input_pose faces_missing",
    "frozen_views": "pose_mismatch colours_disagree faces_missing",
    "billboard": "views_empty pose_mismatch colours_disagree blurred noisy exposure_drift",
    "input_pose": "pose_mismatch faces_missing",
    "out_of_frame": "pose_mismatch views_empty blurred faces_missing",
    "views_empty": f"blurred exposure_drift faces_missing {_LOOSE}",
    "blurred": f"colours_disagree identity_mismatch faces_missing {_LOOSE}",
    "views_dark": _OF_EXPOSURE,
    "views_bright": _OF_EXPOSURE,
    "exposure_drift": f"colours_disagree clipped {_EXPOSED} colour_drift views_negative",
    "colour_drift": "colours_disagree channels_swapped",
    "views_negative": f"{_EXPOSED} {_OF_EXPOSURE}",
    "views_grey": "colours_disagree identity_mismatch",
    "clipped": f"noisy {_EXPOSED} exposure_drift colours_disagree colour_drift",
    "noisy": f"colours_disagree faces_missing clipped {_EXPOSED} exposure_drift colour_drift",
}
"""What else a fault brings about."""
_HINTS = {check.code: check.hint for check in _ALL if isinstance(check, Check)} | {
    "pose_convention": "convert the matrices where they are read: `--fix` writes a corrected copy",
    "mirrored": "flip the pictures, or the sign of azimuth: `--fix` writes a corrected copy",
    "focal_length": "check fl_x against the image size it was calibrated at",
    "principal_point": "check cx and cy: pictures cropped or padded after calibration?",
    "depth_mismatch": "check the unit and the scale of the depth maps (z-depth, not ray length)",
    "pivot_offset": "check the transform between the input's camera and the views'",
}


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


def is_faulty(shown: int, asked: int, config: GateConfig, *, final: bool) -> bool:
    """Whether `shown` of `asked` records are too many: a faulty set shows a fault in at least
    `faulty_rate` of its records, a healthy one in at most `healthy_rate`.

    Wald's test of the two (Sequential Analysis, 1947), whose error probabilities hold to within his
    approximation.  In the end, when no more data comes (`final`), a fault needs the likelihood on
    its side and so many records that chance explains them in less than one healthy set of 200; of
    20, if they are a third.
    """
    low, high = config.healthy_rate, config.faulty_rate
    ratio = shown * math.log(high / low) + (asked - shown) * math.log((1 - high) / (1 - low))
    if not final:
        return ratio >= math.log((1 - config.miss) / config.false_alarm)
    odds = chance(shown, asked, low)
    return ratio > 0 and (odds < 0.005 or (odds < 0.051 and shown > 0.3 * asked))


def decide(seen: Seen, rigs: Mapping[int, Rig]) -> tuple[tuple[Reason, ...], tuple[str, ...]]:
    """What is wrong with what was measured so far: reasons (none: passed), each cause followed by
    its symptoms, and notes.

    Args:
        rigs: of records (by their place), to find out what is wrong with poses.
    """
    found: list[Reason] = []
    lone: list[Reason] = []  # that a few records show as no healthy one does
    notes, suspects, total = _notes(seen), dict[str, list[int]](), len(seen.objects)
    for check in _ALL:
        finding = check(seen)
        if finding.code == "billboard" and "pivot_offset" in _codes(found):
            continue  # an orbit around another point says nothing about the object's sides
        marked = np.flatnonzero(finding.flags > 0)
        asked, shown = int(np.isfinite(finding.flags).sum()), len(marked)
        often = shown if finding.at_once else is_faulty(shown, asked, seen.config, final=seen.final)
        if often or finding.blatant.any():
            values = finding.values | {"records_shown": float(shown), "records_asked": float(asked)}
            if not finding.at_once:
                values["chance"] = chance(shown, asked, seen.config.healthy_rate)
            if not often:
                marked = np.flatnonzero(finding.blatant)
                values["beyond_doubt"] = float(marked[0])
            reason = Reason(finding.code, finding.message, finding.hint, values)
            (found if often else lone).append(reason)
            suspects.setdefault(finding.code, []).extend(marked.tolist())
        elif seen.final and shown >= max(1, 0.01 * total):
            first = seen.objects[marked[0]]["name"]
            notes.append(f"{finding.code}: {shown} of {total} records, e.g. {first}")
    if seen.final and not found:
        found = lone
    of_poses = {"pose_mismatch", "pivot_offset", "billboard", "input_pose"} & {*_codes(found)}
    rows = dict.fromkeys(k for code in suspects if code in of_poses for k in suspects[code])
    found = _explained(seen, found, [rigs[k] for k in rows if k in rigs])
    return tuple(_counted(reason, seen) for reason in _ranked(found)), tuple(notes)


def _counted(reason: Reason, seen: Seen) -> Reason:
    """With the records that show it in its message; of a few that no healthy set has, the first."""
    values = reason.values
    if "chance" not in values:
        return reason
    said = "; {records_shown:.0f} of {records_asked:.0f} records show it".format(**values)
    if "beyond_doubt" in values:
        said += f", {seen.objects[int(values['beyond_doubt'])]['name']} beyond doubt"
    return replace(reason, message=reason.message + said)


def _codes(found: Sequence[Reason]) -> list[str]:
    return [reason.code for reason in found]


def _explained(seen: Seen, found: list[Reason], rigs: Sequence[Rig]) -> list[Reason]:
    """Ask which convention explains a mismatch, and let the answer take its place."""
    codes = _codes(found)
    at = next((codes.index(c) for c in ("pose_mismatch", "input_pose") if c in codes), -1)
    known = {"pose_invalid", "constant_frames", "frozen_views"}
    if at < 0 or not rigs or known & {*codes}:
        return found
    result = explain(rigs, thorough="pivot_offset" not in codes)
    if not result.words or (not result.name and "pivot_offset" in codes):
        return found
    own, name = found[at], result.name or None
    values = own.values | {"before": result.before, "after": result.after}
    values |= {f"mend_{k}": amount for k, amount in enumerate(result.amounts)}
    fits = f"they fit if {result.words}" if name else result.words
    if result.code == "pose_mismatch":
        if own.code == result.code:
            found[at] = replace(own, message=f"{own.message}; {fits}", values=values, mend=name)
        return found
    if result.code in codes:  # a check of its own has seen it too and has the better figures
        place = codes.index(result.code)
        own = found.pop(place)
        found.insert(min(at, place), replace(own, mend=name, values=values | own.values))
        return found
    # What a mend undoes explains where the cameras seem to look, not the other way round, if it
    # shows as often.
    before = [codes.index(c) for c in ("pivot_offset", "billboard") if c in codes]
    scaled = result.code in ("focal_length", "depth_mismatch") and result.amounts
    if scaled and "pivot_offset" in codes:
        # a factor of x moves what is seen by about |x - 1| of its distance, and no further
        offset = found[codes.index("pivot_offset")].values.get("pivot_relative", 0.0)
        if offset > seen.config.max_pivot_offset + 2.0 * abs(math.log(result.amounts[0])):
            return found
    often = max((_often(found[k]) for k in before), default=0.0)
    if (name is None and before) or _often(own) < 0.7 * often:
        return found
    iou = own.values.get("hull_iou", math.nan)
    message = f"pictures and poses disagree (outlines agree to {iou:.0%}): {fits}"
    hint = _HINTS.get(result.code, own.hint)
    found.insert(min([at, *before]), Reason(result.code, message, hint, values, mend=name))
    return found


def _often(reason: Reason) -> float:
    return reason.values["records_shown"]


_Values = Mapping[str, float]
_PASSES_FOR: dict[str, tuple[str, float, Callable[[_Values, _Values], bool]]] = {
    # Both ends of the scale, or it is exposure that clips.
    "clipped": (
        f"{_EXPOSED} colour_drift",
        0.7,
        lambda own, _: own["clipped"] > own["crushed"] + 0.05 and own["floored"] > 0.05,
    ),
    "views_negative": (f"{_EXPOSED} exposure_drift colour_drift", 1.0, lambda *_: True),
    "exposure_drift": (_EXPOSED, 1.0, lambda _, other: not other["black"] > 0.02),
    "noisy": (f"{_EXPOSED} exposure_drift colour_drift clipped {_LOOSE}", 1.0, lambda *_: True),
    # Poses make no outline soft.
    "blurred": (
        _LOOSE,
        1.0,
        lambda own, other: (
            own["evenness"] < own["min_evenness"]
            or (own["detail_ratio"] < 0.3 and own["records_shown"] > 1.2 * other["records_shown"])
        ),
    ),
    "views_empty": (_LOOSE, 1.201, lambda *_: True),
    "azimuth_imbalance": (_LOOSE, 1.201, lambda *_: True),
}
"""Faults of pictures that pass for others in some of the records: those others, how many times as
often it has to show to go before them, and what else (of its values and the other's).  Jumps,
stretched contrast and noise shift mean brightness; empty, blurred, noisy or few views have ragged
outlines."""


def _ranked(found: list[Reason]) -> tuple[Reason, ...]:
    for code, (rivals, times, is_it) in _PASSES_FOR.items():
        codes = _codes(found)
        at = codes.index(code) if code in codes else 0
        first = next((k for k in range(at) if codes[k] in rivals.split()), None)
        if first is not None:
            own, other = found[at], found[first]
            if _often(own) >= times * max(_often(other), 1) and is_it(own.values, other.values):
                found.insert(first, found.pop(at))
    causes: dict[str, list[Reason]] = {}
    for reason in found:
        if any(reason.code in _codes(group) for group in causes.values()):
            continue
        cause = next((c for c in causes if reason.code in EXPLAINS.get(c, "").split()), None)
        causes.setdefault(cause or reason.code, []).append(replace(reason, symptom_of=cause))
    return tuple(reason for group in causes.values() for reason in group)


def figures(seen: Seen) -> dict[str, float]:
    """The numbers of a set that were compared with the thresholds, by name."""
    if not seen.rows:
        return {}
    config, shares = seen.config, ("stray", "hull_iou", "hull_miss", "floating")
    medians = "pivot_distance pivot_relative photometric epipolar drift up_tilt_deg"
    return {
        "empty_share": share(seen.view("empty")),
        "coverage_mean": float(np.mean(seen.view("coverage"))),
        "coverage_ratio": median(seen.view("coverage_ratio")),
        "luminance_ratio": median(seen.view("luminance_ratio", shown=True)),
        "detail_ratio": median(seen.view("detail_ratio", shown=True)),
        "frozen_share": share(seen["frozen"]),
        "constant_share": share(seen.view("constant")),
        **{k: median(seen[k]) for k in (*medians.split(), "identity_psnr", "identity_iou")},
        "faces": share(seen["faces"]),
        **{key: share(seen.record(key)) for key in shares},
        "false_alarm_per_check": config.false_alarm,
        "miss_per_check": config.miss,
        "miss_bound": (1 - config.faulty_rate) ** len(seen.objects),
    }


def _notes(seen: Seen) -> list[str]:
    """Checks that could not be made, and why."""
    guessed, unknown = (int(seen.foreground(kind).sum()) for kind in ("estimated", "none"))
    identity, depth, pivot = (
        np.isfinite(seen.record(key)).any() for key in ("identity_psnr", "stray", "pivot_distance")
    )
    notes = []
    if guessed:
        notes.append(
            f"no alpha in {guessed} records: the foreground is estimated as what differs from the "
            "border's colour"
        )
    if unknown:
        notes.append(
            f"no alpha and no plain background in {unknown} records: coverage, outlines and sides "
            "are not judged; poses are judged by matched features"
        )
    tilt = seen.record("up_tilt_deg")
    if turned := int((tilt > UP_TILT_DEG).sum()):
        notes.append(
            f"the world's +Y is not up in {turned} records ({median(tilt[tilt > UP_TILT_DEG]):.0f} "
            "degrees off): they are turned by their cameras' mean up, here and for training"
        )
    features = seen.foreground("none") & ~np.isfinite(seen.record("epipolar"))
    if features.any():
        notes.append(
            f"poses of {features.sum()} records are not judged: too few features (or views) match"
        )
    if len(seen.objects) == 1:
        wider = "its limits are half as wide again or more, since nothing can confirm a flag"
        notes.append(f"one record only: {wider}")
    if not identity:
        notes.append("identity check skipped: no render from the input camera is stored")
    if not depth:
        notes.append("surfaces not compared between views: no usable depth is stored")
    if not pivot:
        notes.append("pivot not located: no content, or cameras that all look the same way")
    return notes + faces.note(seen)
