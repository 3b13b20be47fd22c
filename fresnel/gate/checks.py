"""What the gate asks of measurements: a table of checks of records, functions for those of the set.

A check says of every record whether it shows a fault; whether the *set* has the fault is decided
by a sequential test on those flags (`decide`).
"""

import functools
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fresnel.gate.leaks import Row, leaked, stem, twins, whole_prints
from fresnel.gate.thresholds import GateConfig, alone, is_blatant


@dataclass(frozen=True)
class Finding:
    """What one check found: a flag per record, and what to say if they are too many.

    Args:
        flags: 1 where a record shows the fault, 0 where not, NaN where it can't be asked.
        at_once: one record, or the set as a whole, is enough; no test of proportions.
        blatant: which records show it as no healthy record does: one of them is enough, too.
    """

    code: str
    flags: np.ndarray
    message: str
    hint: str
    values: dict[str, float]
    at_once: bool = False
    blatant: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))


@dataclass(frozen=True)
class Seen:
    """The measurements as columns of views and of records (`seen[name]`), NaN where unknown.

    Args:
        final: no more records can be read.
    """

    rows: Sequence[Row]
    objects: Sequence[Row]
    config: GateConfig
    meta: Mapping[str, Any] = field(default_factory=dict)
    final: bool = True

    def __getitem__(self, name: str) -> np.ndarray:
        return self._derived[name] if name in self._derived else self.record(name)

    def record(self, key: str) -> np.ndarray:
        """One value per record, as it was measured."""
        return np.array([row.get(key, math.nan) for row in self.objects], dtype=np.float64)

    def view(self, key: str, *, shown: bool = False) -> np.ndarray:
        """One value per view; NaN where it is empty, if only what is `shown` counts."""
        values = np.array([row[key] for row in self.rows], dtype=np.float64)
        return np.where(self.view("empty") > 0, np.nan, values) if shown else values

    def foreground(self, kind: str) -> np.ndarray:
        return np.array([row.get("foreground") == kind for row in self.objects], dtype=bool)

    def per_record(self, values: np.ndarray, how: Callable[..., Any] = np.mean) -> np.ndarray:
        """A statistic of each record's finite views; NaN where there are none."""
        finite, views = np.isfinite(values), [row["views"] for row in self.objects]
        owners = np.repeat(np.arange(len(views)), views)[finite]
        known, counts = values[finite], np.bincount(owners, minlength=len(views))
        starts, out = np.cumsum(counts) - counts, np.full(len(views), np.nan)
        for count in {*counts.tolist()} - {0}:  # of all records with so many at once
            rows = counts == count
            out[rows] = how(known[starts[rows, None] + np.arange(count)], axis=1)
        return out

    @functools.cached_property
    def _derived(self) -> dict[str, np.ndarray]:
        """What was not measured as such: one value per record, most of all its views."""
        config, empty, border = self.config, self.view("empty"), self.view("border")
        light = self.view("luminance_ratio", shown=True)
        ragged = self.foreground("estimated") | (self.record("frail") > 0)
        # Views without any light at all are dark whatever the input is.
        dark = (light < config.dark_view) | (self.view("black", shown=True) > 0)
        out = {
            "unreadable": np.array([float(bool(row.get("error"))) for row in self.objects]),
            "single": (self.record("views") == 1).astype(float),
            "empty": self.per_record(empty),
            "constant": self.per_record(self.view("constant")),
            "cropped": self.per_record(np.where(border >= 0, border > config.max_border, np.nan)),
            "dark": self.per_record(np.where(np.isfinite(light), dark, np.nan)),
            "bright": self.per_record(np.where(light >= 0, light > config.bright_view, np.nan)),
            "coverage_ratio": self.per_record(self.view("coverage_ratio"), np.median),
            # Outlines that had to be guessed are ragged; of one ray a pixel they lack thin parts.
            "hull_miss": self.record("hull_miss") / np.where(ragged, 4, 1),
            "stray": self.record("stray") / np.where(ragged, 2, 1),
            # What a decoder drew unlike its input, seen from the input's own camera, is no pose's
            # fault.
            "input_miss": np.where(
                self.record("identity_iou") < config.own_iou, np.nan, self.record("input_miss")
            ),
            "stated_distance": self.record("pivot_error") * self.record("radius"),  # units
        }
        shown = self.record("faces")  # a lamp is taken for a face now and then: most have to be
        out["faces"] = np.where(np.isfinite(shown).mean() > 0.5, shown, np.nan)
        out["cropped"][self.foreground("none")] = np.nan
        for key in ("luminance_ratio", "detail_ratio", "clipped", "crushed", "floored"):
            out[key] = self.per_record(self.view(key, shown=True), np.median)
        quarter = functools.partial(np.quantile, q=0.25)  # fine texture is on some sides only
        out["grain"] = self.per_record(self.view("grain", shown=True), quarter)
        # Objects have dark and bright sides: the light of the same surface, or at least of the
        # same side, knows better, and so do its jumps.
        gain, jump = self.record("gain"), self.record("jump")
        same = np.where(np.isfinite(gain), np.exp(gain), self.record("near_ratio"))
        with np.errstate(invalid="ignore", divide="ignore"):
            nearer = np.abs(np.log(same)) < np.abs(np.log(out["luminance_ratio"]))
        out["luminance_ratio"] = np.where(nearer, same, out["luminance_ratio"])
        out["drift"] = np.fmin(self.record("drift"), self.record("steps"))
        out["black"] = self.per_record(self.view("black", shown=True))
        known = jump < config.max_jump
        out["dark"] = np.where(known, out["black"], out["dark"])
        # One that is black with its input is a black object; ten of ten are not.
        tops = self.record("top")
        out["dark"][tops < config.min_top] = np.nan
        tops = tops[np.isfinite(tops)]
        highest = float(np.quantile(tops, 0.9)) if len(tops) >= 10 else math.nan
        out["set_top"] = np.full(len(self.objects), highest)
        out["bright"] = np.where(known, 0.0, out["bright"])
        # From within 22.5 degrees of +-90 over that of 0 and 180; not asked where those are empty.
        bins, cover = 45 * np.round(self.view("azimuth_deg") / 45), self.view("coverage_ratio")
        bins = np.where(bins <= -180, 180, bins)
        side, front = np.abs(bins) == 90, np.isin(bins, (0, 180))
        if share(empty[~side]) > 0.5 * config.max_empty:
            # Emptiness that is everywhere is not what a cut-out does at its sides.
            cover = np.where(empty > 0, np.nan, cover)
        nothing = self.per_record(np.where(front, empty, np.nan))
        beside, before = (self.per_record(np.where(rows, cover, np.nan)) for rows in (side, front))
        if len(self.objects) == 1:  # one flat object is a flat object, if its outlines agree
            limits = (out["hull_miss"] > config.max_hull_miss) | (out["stray"] > config.max_stray)
            beside = np.where(limits, beside, np.nan)
        with np.errstate(invalid="ignore", divide="ignore"):
            out["side_coverage"] = np.where(nothing <= config.max_empty, beside / before, np.nan)
        # An object that stands off the middle of frames which hold all of it is no wrong pivot yet.
        held = (out["cropped"] <= 0) & (out["empty"] <= 0)
        held &= ~(out["hull_miss"] > config.max_hull_miss)
        out["off_pivot"] = self.record("pivot_relative") * np.where(held, 0.4, 1.0)
        # exp(entropy) of all views over eight bins, over eight. Photographs without a foreground,
        # and cameras that do not turn about a point, may well face one way; so may two.
        most = self.record("views").max(initial=0)
        around = ~self.foreground("none") & np.isfinite(self.record("radius")) & (most > 2)
        orbits = np.repeat(around, [row["views"] for row in self.objects])
        bins, count = bins[np.isfinite(bins) & orbits], len(self.objects)
        parts = np.unique(bins, return_counts=True)[1] / max(len(bins), 1)
        spread = np.exp(-(parts * np.log(parts)).sum()) / 8 if len(bins) >= 8 else np.nan
        if most <= 4 and len(bins) >= 8:  # so few fill few bins: how far around do they reach?
            turns = np.sort(self.view("azimuth_deg")[orbits])
            spread = max(spread, 1 - float(np.diff([*turns, turns[0] + 360]).max()) / 360)
        # All of the set's objects are counted, however few have been looked at.
        classes = Counter(c for c in (self.meta.get("object_classes") or {}).values() if c)
        told = classes.total() >= 10 and len(classes) > 1
        # (The limit itself is too much: nine of ten.)
        most = max(classes.values()) / classes.total() + 1e-9 if told else np.nan
        out |= {"azimuth_spread": np.full(count, spread), "class_share": np.full(count, most)}
        # Ten examples spread over a set seldom hold both of a pair: this is asked in the end.
        pairs = twins(whole_prints(self.objects)) if self.final else ()
        repeats = np.zeros(count)
        again = {b for a, b in pairs if stem(self.objects[a]) != stem(self.objects[b])}
        repeats[sorted(again)] = len(again) / max(count, 1)
        return out | {"repeats": repeats}


def median(values: np.ndarray, how: Callable[..., Any] = np.median) -> float:
    """Of what is known; NaN if nothing is."""
    known = values[np.isfinite(values)]
    return float(how(known)) if len(known) else math.nan


def share(values: np.ndarray) -> float:
    return median(values, np.mean)


_SHARES = {"empty", "constant", "cropped", "dark", "bright", "black", "frozen"}  # of its views


@dataclass(frozen=True)
class Check:
    """A fault that records show by numbers beyond limits.

    Args:
        limits: column -> limit ("max_..." or "min_..." of the config; "": 0), of which one beyond
            is enough.
        message: with the columns' values in braces: the mean of shares, the sum of counts (whose
            limit is 0); else the median of the records that show it, or of all.
        also: other columns to state.
        of_all: medians are of all records, if most of them show it.
        at_once: one record, or the set as a whole, is enough.
    """

    code: str
    limits: Mapping[str, str]
    message: str
    hint: str
    also: tuple[str, ...] = ()
    of_all: bool = False
    at_once: bool = False

    def __call__(self, seen: Seen) -> Finding:
        columns = {key: seen[key] for key in (*self.limits, *self.also)}
        known = np.any([np.isfinite(columns[key]) for key in self.limits], axis=0)
        (over, far), values = np.zeros((2, len(known)), bool), dict[str, float]()
        for key, name in self.limits.items():
            limit = float(getattr(seen.config, name)) if name else 0.0
            values |= {name: limit} if name else {}
            # Nothing can confirm a single flag.
            wider = alone(name) if known.sum() <= 1 and not self.at_once else 1.0
            low = name.startswith("min")
            own = columns[key] < limit / wider if low else columns[key] > limit * wider
            over, far = over | own, far | (own & is_blatant(columns[key], name))
        whole = not over.any() or (self.of_all and over.sum() > 0.8 * known.sum())
        rows = known if whole else over
        rows = far if far.any() and over.sum() < 0.3 * known.sum() else rows
        for key, column in columns.items():
            total = float(np.nansum(column)) if "" in self.limits.values() else median(column[rows])
            values[key] = share(column) if key in _SHARES else total
        error = next((row["error"] for row in seen.objects if row.get("error")), "")
        first = next((row["name"] for row, one in zip(seen.objects, over, strict=True) if one), "")
        named = {"error": error, "first": first, "records": int(over.sum())}
        said = self.message.format(**values, **named)
        said = said.replace("nan%", "an unknown share")
        flags = np.where(known, over, np.nan)
        return Finding(self.code, flags, said, self.hint, values, self.at_once, far)


def _exposed(code: str, limits: Mapping[str, str], message: str) -> Check:
    hint = "check exposure, tone curve and colour range of the renders"
    message += "; {coverage_ratio:.0%} of the input's area is covered, so it is exposure, not "
    also = ("dark", "bright", "black", "coverage_ratio", "clipped")
    return Check(code, limits, f"{message}emptiness", hint, also, of_all=True)


_DARK = _exposed(
    "views_dark",
    {"luminance_ratio": "min_luminance_ratio", "dark": "max_dark", "top": "min_top"}
    | {"set_top": "min_set_top"},
    "views are dark: the median view has {luminance_ratio:.2f} of the input's luminance, "
    "{dark:.0%} are almost black, and the brightest of views and input are at {top:.0f} of 255",
)
_BRIGHT = _exposed(
    "views_bright",
    {"luminance_ratio": "max_luminance_ratio", "bright": "max_bright"},
    "views are too bright: the median view has {luminance_ratio:.2f} times the input's luminance "
    "and {bright:.0%} are far brighter",
)
_ORBIT = Check(
    "pivot_offset",
    {"off_pivot": "max_pivot_offset"},
    "the cameras orbit a point {pivot_distance:.1f} units away from the object "
    "({pivot_relative:.2f} of their distance to that point)",
    "orbit the object's centroid: pass it as the pivot when the views are made",
    ("pivot_distance", "pivot_relative"),
)
_STATED = Check(
    "pivot_offset",
    {"pivot_error": "max_pivot_offset"},
    "the cameras look at a point {stated_distance:.1f} units away from the pivot that the data "
    "states",
    "one of the two is wrong: check the transform between object and cameras",
    ("stated_distance",),
)


def _either(first: Check, second: Check) -> Callable[[Seen], Finding]:
    """Of two checks that exclude each other the one that more records show."""

    def check(seen: Seen) -> Finding:
        one, other = first(seen), second(seen)
        mine, its = (np.nansum(own.flags) + 3 * own.blatant.sum() for own in (one, other))
        return one if mine >= its else other

    return check


# --- across the set --------------------------------------------------------------------------


def _leak(seen: Seen) -> Finding:
    """The same object in two splits: every later figure would be wrong.  See `leaks.leaked`."""
    flags, count, first = leaked(seen.objects, seen.meta, final=seen.final)
    said = f"{count} objects are in more than one split: {first}" if count else ""
    hint, values = "split by object before anything is rendered", {"objects": float(count)}
    return Finding("split_leak", flags, said, hint, values, at_once=True)


# --- all checks ------------------------------------------------------------------------------

CHECKS: tuple[Callable[[Seen], Finding], ...] = (
    Check(
        "unreadable",
        {"unreadable": ""},
        "{records} records can't be read: {error}",
        "restore or remove the file",
        at_once=True,
    ),
    Check(
        "pose_invalid",
        {"bad_poses": ""},
        "{bad_poses:.0f} camera poses in {records} records are NaN or not a rotation",
        "world-to-camera rotations must be orthonormal, right-handed and finite",
        at_once=True,
    ),
    Check(
        "depth_invalid",
        {"bad_depth": ""},
        "{bad_depth:.0f} depth pixels in {records} records are not finite",
        "write 0 where nothing was hit",
        at_once=True,
    ),
    Check(
        "constant_frames",
        {"constant": "max_constant"},
        "{constant:.0%} of the views are a single colour all over the frame",
        "look at the renderer's output: an exposure that clips, a camera inside the object, or "
        "frames that were never written",
    ),
    _leak,
    # Another point than the object (the original experiment's mistake), or than the data states.
    _either(_ORBIT, _STATED),
    Check(  # where a solid of revolution can't explain it
        "frozen_views",
        {"frozen": "max_frozen"},
        "{frozen:.0%} of the views repeat another view's picture although the camera moved",
        "the renderer ignored the pose, or files were copied over each other",
    ),
    Check(
        "billboard",
        {"side_coverage": "min_side_coverage"},
        "from the side the objects cover {side_coverage:.0%} of what they cover from the front and "
        "the back: they are flat",
        "the geometry has no depth: supervise the decoder with side views",
    ),
    Check(  # by silhouettes, and by depth: surface beside other outlines, or before what they show
        "pose_mismatch",
        {
            "hull_miss": "max_hull_miss",
            "stray": "max_stray",
            "centroid_residual": "max_centroid_residual",
            "floating": "max_floating",
        },
        "the objects' outlines in different views agree to {hull_iou:.1%}, {stray:.0%} of what one "
        "view shows lies outside the outline in the others, {floating:.0%} in front of what they "
        "show: the poses don't belong to the pictures",
        "check the order of the poses, the axis convention and the focal length",
        ("hull_iou",),
    ),
    # An input turned by 90 degrees shows in 6 of 10 objects, by 180 in 5: most look much the same
    # from behind.
    Check(
        "input_pose",
        {"input_miss": "max_input_miss"},
        "the views agree with each other but not with the input: {input_miss:.1%} more of its "
        "outline contradicts the others than of a view's",
        "check which camera took the input, and that it shows the same object",
    ),
    Check(
        "pose_mismatch",
        {"epipolar": "max_epipolar"},
        "features matched between views lie {epipolar:.1f} times as far from where the poses put "
        "them as the best possible poses would: these don't belong to the pictures",
        "check the order of the poses, the axis convention and the focal length",
    ),
    Check(
        "azimuth_imbalance",
        {"azimuth_spread": "min_azimuth_spread"},
        "the views come from {azimuth_spread:.0%} of the directions around the object, effectively",
        "add views from the missing side: a model can't learn what is never shown",
        at_once=True,
    ),
    Check(
        "too_few_views",
        {"single": ""},
        "records have one view only: nothing can be compared, nor learned of other sides",
        "give every object at least two views, better eight, from all around it",
    ),
    Check(
        "out_of_frame",
        {"cropped": "max_cropped"},
        "the object leaves the frame in {cropped:.0%} of the views",
        "move the cameras back or widen the field of view; check the focal length",
    ),
    Check(
        "views_empty",
        {"empty": "max_empty", "coverage_ratio": "min_coverage_ratio"},
        "{empty:.0%} of the views are empty and the median view covers {coverage_ratio:.0%} of "
        "what the input covers: the object is not there, whatever the exposure",
        "check where the cameras look and how far away they are",
        of_all=True,
    ),
    _either(_DARK, _BRIGHT),
    Check(
        "exposure_drift",
        {"drift": "max_drift", "spread": "max_spread"},
        "brightness changes from view to view: by {drift:.1f} e-foldings from one to the next, "
        "and the same surface varies by {spread:.1f} over all of them",
        "fix the exposure (and white balance) over all views of an object",
    ),
    Check(
        "colour_drift",
        {"tint": "max_tint"},
        "colours change from view to view: the same surface's channels vary by {tint:.2f} "
        "e-foldings against each other over all of them",
        "fix the white balance over all views of an object",
    ),
    Check(
        "views_negative",
        {"negated": "max_negated"},
        "the views' colours are {negated:.1f} times liker the input's negative than the input",
        "write colours, not 255 less colours: `--fix` writes a corrected copy",
    ),
    Check(
        "views_grey",
        {"saturation": "min_saturation"},
        "the views have {saturation:.0%} of the input's saturation: they are grey",
        "write the views in colour, as the input is",
    ),
    Check(
        "channels_swapped",
        {"swapped": "max_swapped"},
        "the views' colours are {swapped:.1f} times nearer to the input's with red and blue "
        "exchanged",
        "write RGB, not BGR",
    ),
    Check(
        "identity_mismatch",
        {"identity_psnr": "min_identity_psnr", "identity_iou": "min_identity_iou"},
        "rendered from the input camera the object does not reproduce the input: PSNR "
        "{identity_psnr:.1f} dB over the foreground, silhouettes overlap {identity_iou:.0%}",
        "the decoder (or the frame it speaks) is wrong before any novel view is",
    ),
    Check(
        "noisy",
        {"grain": "max_grain"},
        "neighbouring pixels inside the object differ by {grain:.0f} of 255 more than in the "
        "input: the views are noisy",
        "render with more samples, or look for compression artefacts",
    ),
    Check(
        "clipped",
        {"clipped": "max_clipped"},
        "{clipped:.0%} more of the covered pixels than in the input are fully black or white",
        "lower the contrast, or render with headroom: what is clipped is lost",
        ("crushed", "floored"),
    ),
    Check(
        "blurred",
        {"detail_ratio": "min_detail_ratio", "evenness": "min_evenness"},
        "views have {detail_ratio:.0%} of the input's gradients, and the softest quarter of them "
        "{evenness:.0%} of the sharpest's: they are blurred",
        "check the resolution the views were rendered at, and the Gaussians' scales",
    ),
    Check(
        "colours_disagree",
        {"photometric": "max_photometric"},
        "the same surface point differs between neighbouring views by {photometric:.2f} of what "
        "unrelated points differ by",
        "check depth, the order of the views, and that lighting is the same in all of them",
    ),
    Check(
        "duplicated_objects",
        {"repeats": "max_duplicates"},
        "{repeats:.0%} of the records, e.g. {first}, repeat another one's pictures",
        "keep one of each: duplicates weigh double and leak between splits",
        at_once=True,
    ),
    Check(
        "class_imbalance",
        {"class_share": "max_class_share"},
        "{class_share:.0%} of the objects are of one class",
        "balance the classes, or say that the set is of one class",
        at_once=True,
    ),
)
"""In the order in which their reasons are ranked: causes before what they cause."""
OF_RECORDS = (
    *(check for check in CHECKS if isinstance(check, Check)),
    _DARK,
    _BRIGHT,
    _ORBIT,
    _STATED,
)
"""All that a record's numbers are asked."""
