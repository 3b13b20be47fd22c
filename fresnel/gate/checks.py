"""The gate's checks of records: plain functions from measurements to one `Finding` each.

A check says of every record whether it shows a fault; whether the *set* has the fault is decided
by a sequential test on those flags (`decide`).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from fresnel.gate.thresholds import Finding, Seen, flagged, flags, median, share

Check = Callable[[Seen], Finding | None]


def _simple(
    code: str, values: str | Callable[[Seen], np.ndarray], limit: str, message: str, hint: str
) -> Check:
    """A check of one number a record (a key of the record rows, or a function) against a limit.

    In `message`, "value" is the median of the flagged records and "share" the mean of all.
    """
    name = limit.partition("_")[2]

    def check(seen: Seen) -> Finding:
        found = seen.record(values) if isinstance(values, str) else values(seen)
        marks, value = seen.beyond(found, limit)
        said = {name: value, "share": share(found), limit: getattr(seen.config, limit)}
        return Finding(code, marks, message.format(value=value, share=said["share"]), hint, said)

    return check


# --- files and poses as such ---------------------------------------------------------------------


def check_unreadable(seen: Seen) -> Finding | None:
    """Files that are missing, truncated, changed, of the wrong size or no pictures: training would
    stop at one."""
    errors = [row["error"] for row in seen.objects if row.get("error")]
    if not errors:
        return None
    return Finding(
        "unreadable",
        np.array([float(bool(row.get("error"))) for row in seen.objects]),
        f"{len(errors)} of {len(seen.objects)} records can't be read: {errors[0]}",
        "restore or remove the file",
        {"records": float(len(errors))},
        at_once=True,
    )


def _invalid(seen: Seen, key: str, code: str, what: str, hint: str) -> Finding:
    """A count per record of things of which one is too many."""
    bad = seen.record(key)
    marks, total = flags(bad > 0, np.isfinite(bad)), float(np.nansum(bad))
    message = what.format(f"{total:.0f}", f"{np.nansum(marks):.0f} records")
    return Finding(code, marks, message, hint, {"count": total}, at_once=True)


def check_poses(seen: Seen) -> Finding:
    """Poses that are NaN, scaled, or mirrored (no proper rotation within 1e-3)."""
    hint = "world-to-camera rotations must be orthonormal, right-handed and finite"
    what = "{} camera poses in {} are NaN or not a rotation"
    return _invalid(seen, "bad_poses", "pose_invalid", what, hint)


def check_depth(seen: Seen) -> Finding:
    """NaN or infinite depth pixels."""
    hint, what = "write 0 where nothing was hit", "{} depth pixels in {} are not finite"
    return _invalid(seen, "bad_depth", "depth_invalid", what, hint)


def check_views(seen: Seen) -> Finding:
    """Records with a single view: nothing can be compared, and nothing learned of other sides."""
    views = seen.record("views")
    return Finding(
        "too_few_views",
        (views == 1).astype(float),
        f"{(views == 1).sum()} of {len(views)} records have one view only",
        "give every object at least two views, better eight, from all around it",
        {"views": median(views)},
    )


# --- pictures ------------------------------------------------------------------------------------


# Frames of one colour that claim to be covered: share of a record's views.
check_constant = _simple(
    "constant_frames",
    lambda seen: seen.per_record(seen.column("constant"), np.mean),
    "max_constant",
    "{share:.0%} of the views are a single colour all over the frame",
    "look at the renderer's output: an exposure that clips, a camera inside the object, or "
    "frames that were never written",
)


def check_cropped(seen: Seen) -> Finding:
    """Content that leaves the frame: share of a record's views whose border is covered."""
    border = seen.column("border")
    cut = np.where(np.isfinite(border), border > seen.config.max_border, np.nan)
    of_record = seen.per_record(cut, np.mean)
    of_record[seen.foreground("none")] = np.nan
    return Finding(
        "out_of_frame",
        seen.beyond(of_record, "max_cropped")[0],
        f"the object leaves the frame in {share(cut):.0%} of the views",
        "move the cameras back or widen the field of view; check the focal length",
        {"share": share(cut), "max_border": seen.config.max_border},
    )


def check_empty(seen: Seen) -> Finding:
    """Views that show nothing or too little, by coverage and not by brightness: share of empty
    views, and median coverage over the input's."""
    empty, ratio = seen.empty, seen.column("coverage_ratio")
    shares, medians = seen.per_record(empty.astype(float), np.mean), seen.per_record(ratio)
    few = medians < seen.limit("min_coverage_ratio")
    marks = flags((shares > seen.limit("max_empty")) | few, np.isfinite(shares))
    total, coverage = share(empty), median(ratio)
    mean = float(np.mean(seen.column("coverage")))
    bins = seen.azimuth_bins()
    gone = sorted({float(b) for b in set(bins[np.isfinite(bins)]) if empty[bins == b].all()})
    where = f"; nothing at all at azimuths {', '.join(f'{b:.0f}' for b in gone)} degrees"
    return Finding(
        "views_empty",
        marks,
        f"{total:.0%} of the views are empty and the median view covers {coverage:.0%} of what the "
        f"input covers (mean coverage {mean:.3f}){where if gone else ''}: the object is not "
        "there, whatever the exposure",
        "check where the cameras look and how far away they are",
        {"share": total, "coverage_ratio": coverage, "mean_coverage": mean},
    )


def check_exposure(seen: Seen) -> Finding:
    """Views much darker or brighter than the input although they cover as much.

    Ratio of mean linear-light luminance of covered pixels to the input's, over views that are not
    empty: its median in a record, and the share of (almost) black or white ones.  Views without any
    light at all are dark whatever the input is.
    """
    config, ratio = seen.config, seen.filled("luminance_ratio")
    medians = seen.per_record(ratio)
    is_dark = (ratio < config.dark_view) | (seen.filled("black") > 0)
    known = np.isfinite(ratio)
    dark = seen.per_record(np.where(known, is_dark, np.nan), np.mean)
    bright = seen.per_record(np.where(known, ratio > config.bright_view, np.nan), np.mean)
    darker = (medians < seen.limit("min_luminance_ratio")) | (dark > seen.limit("max_dark"))
    brighter = (medians > seen.limit("max_luminance_ratio")) | (bright > seen.limit("max_bright"))
    value, coverage = median(medians), median(seen.filled("coverage_ratio"))
    values = {"luminance_ratio": value, "coverage_ratio": coverage}
    values |= {"dark": share(dark), "bright": share(bright)}
    values |= {"clipped": median(seen.per_record(seen.filled("clipped")))}
    rest = f"coverage is {coverage:.0%} of the input's, so it is exposure, not emptiness"
    hint = "check exposure, tone curve and colour range of the renders"
    if darker.sum() >= brighter.sum():
        what = f"the median view has {value:.2f} of the input's luminance"
        what += f" and {share(dark):.0%} of the views are almost black" if share(dark) > 0 else ""
        code, marks, what = "views_dark", darker, f"views are dark: {what}; {rest}"
    else:
        what = f"the median view has {value:.2f} times the input's luminance"
        what += f" and {share(bright):.0%} are far brighter" if share(bright) > 0 else ""
        code, marks, what = "views_bright", brighter, f"views are too bright: {what}; {rest}"
    return Finding(code, flags(marks, np.isfinite(medians)), what, hint, values)


# Exposure that changes from view to view: median absolute step of log luminance between neighbours
# in azimuth.
check_drift = _simple(
    "exposure_drift",
    "drift",
    "max_drift",
    "brightness jumps by {value:.1f} e-foldings from one view to the next",
    "fix the exposure (and white balance) over all views of an object",
)


def check_clipping(seen: Seen) -> Finding:
    """Pixels at either end of the scale, beyond the input's share of them: a record's median."""
    columns = {k: seen.per_record(seen.filled(k)) for k in ("clipped", "crushed", "floored")}
    marks, value = seen.beyond(columns["clipped"], "max_clipped")
    return Finding(
        "clipped",
        marks,
        f"{value:.0%} more of the covered pixels than in the input are fully black or white",
        "lower the contrast, or render with headroom: what is clipped is lost",
        {key: flagged(column, marks) for key, column in columns.items()},
    )


# Red and blue exchanged: distance of the views' mean colour to the input's over that to the input's
# with both exchanged; asked only of objects whose red and blue differ.
check_channels = _simple(
    "channels_swapped",
    "swapped",
    "max_swapped",
    "the views' colours are {value:.1f} times nearer to the input's with red and blue exchanged",
    "write RGB, not BGR",
)


def check_identity(seen: Seen) -> Finding:
    """Gaussians that don't even reproduce their input: PSNR (dB) over the union of foregrounds and
    silhouette IoU of the render from the input camera."""
    psnr, iou = seen.record("identity_psnr"), seen.record("identity_iou")
    marks = (psnr < seen.limit("min_identity_psnr")) | (iou < seen.limit("min_identity_iou"))
    marks = flags(marks, np.isfinite(psnr))
    values = {"psnr": flagged(psnr, marks), "iou": flagged(iou, marks)}
    return Finding(
        "identity_mismatch",
        marks,
        f"rendered from the input camera the object does not reproduce the input: PSNR "
        f"{values['psnr']:.1f} dB over the foreground, silhouettes overlap {values['iou']:.0%}",
        "the decoder (or the frame it speaks) is wrong before any novel view is",
        values,
    )


# Blurred views: gradient energy of colour and outline per covered pixel over the input's.
check_detail = _simple(
    "blurred",
    lambda seen: seen.per_record(seen.filled("detail_ratio")),
    "min_detail_ratio",
    "views have {value:.0%} of the input's gradients: they are blurred",
    "check the resolution the views were rendered at, and the Gaussians' scales",
)


# Median absolute second difference along rows inside the object, beyond the input's.
check_grain = _simple(
    "noisy",
    lambda seen: seen.per_record(seen.filled("grain")),
    "max_grain",
    "neighbouring pixels inside the object differ by {value:.0f} of 255 more than in the input: "
    "the views are noisy",
    "render with more samples, or look for compression artefacts",
)


# --- poses against pictures ----------------------------------------------------------------------


# The angle of the cameras' mean up to +Y. Azimuth, elevation and the networks' frame assume Y up.
check_up = _simple(
    "up_axis",
    "up_tilt_deg",
    "max_up_tilt_deg",
    "the cameras' common up direction is {value:.0f} degrees away from the world's +Y",
    "turn the world so that +Y is up (a Z-up tool exported it, or the pictures are turned)",
)


def check_pivot(seen: Seen) -> Finding:
    """Cameras that look at another point than the object: the original experiment's mistake.

    Distance from the nearest point to all optical axes to the content, over the cameras' distance;
    or to the pivot that the data states.
    """
    relative, error = seen.record("pivot_relative"), seen.record("pivot_error")
    (off, of_radius), (stated, of_stated) = (
        seen.beyond(values, "max_pivot_offset") for values in (relative, error)
    )
    limit = {"max_pivot_offset": seen.config.max_pivot_offset}
    if np.nansum(off) or not np.nansum(stated):
        distance = flagged(seen.record("pivot_distance"), off)
        return Finding(
            "pivot_offset",
            off,
            f"the cameras orbit a point {distance:.1f} units away from the object "
            f"({of_radius:.2f} of their distance to that point)",
            "orbit the object's centroid: pass it as the pivot when the views are made",
            {"distance": distance, "relative": of_radius} | limit,
        )
    units = flagged(error * seen.record("radius"), stated)
    return Finding(
        "pivot_offset",
        stated,
        f"the cameras look at a point {units:.1f} units away from the pivot that the data states",
        "one of the two is wrong: check the transform between object and cameras",
        {"distance": units, "relative": of_stated} | limit,
    )


def check_poses_match(seen: Seen) -> Finding:
    """Poses that don't belong to the pictures.

    Four symptoms: silhouettes that no single object explains (`hull_miss`: share of the other
    silhouettes that a ray misses at its best point, plus a tenth of what the visual hull leaves
    unexplained), surface points from depth beside other views' outlines (`stray`) or floating in
    front of what they see, centroids that are not the image of one point.
    """
    keys = ("hull_miss", "stray", "centroid_residual", "floating")
    columns, guessed = {key: seen.record(key) for key in keys}, seen.foreground("estimated")
    for key, ragged in (("hull_miss", 4), ("stray", 2)):  # outlines that had to be guessed
        columns[key] = np.where(guessed, columns[key] / ragged, columns[key])
    over = np.any([columns[key] > seen.limit(f"max_{key}") for key in keys], axis=0)
    marks = flags(over, np.any([np.isfinite(column) for column in columns.values()], axis=0))
    iou, stray = flagged(seen.record("hull_iou"), marks), flagged(columns["stray"], marks)
    said = f"the objects' outlines in different views agree to {iou:.0%} only"
    if stray > seen.config.max_stray:
        said += f" and {stray:.0%} of what one view shows lies outside the outline in the others"
    elif iou > 0.98:
        said = "the depths of neighbouring views contradict each other"
    return Finding(
        "pose_mismatch",
        marks,
        f"{said}: the poses don't belong to the pictures",
        "check the order of the poses, the axis convention and the focal length",
        {key: flagged(column, marks) for key, column in columns.items()} | {"hull_iou": iou},
    )


# Share of the silhouettes that rays of the input miss, and of its silhouette that their rays miss,
# less the median view's. An input turned by 90 degrees shows in 6 of 10 objects, by 180 in 5: most
# look much the same from behind.
check_input = _simple(
    "input_pose",
    "input_miss",
    "max_input_miss",
    "the views agree with each other but not with the input: {value:.1%} more of its outline "
    "contradicts the others than of a view's",
    "check which camera took the input, and that it shows the same object",
)


# Opaque photographs whose matched features contradict the poses: see `epipolar.misfit`.
check_epipolar = _simple(
    "pose_mismatch",
    "epipolar",
    "max_epipolar",
    "features matched between views lie {value:.1f} times as far from where the poses put them as "
    "the best possible poses would: these don't belong to the pictures",
    "check the order of the poses, the axis convention and the focal length",
)


# Colour of the same surface point in neighbouring views, by depth: mean difference over that of
# unrelated points (0: the same, 1: unrelated).
check_colours = _simple(
    "colours_disagree",
    "photometric",
    "max_photometric",
    "the same surface point differs between neighbouring views by {value:.2f} of what unrelated "
    "points differ by",
    "check depth, the order of the views, and that lighting is the same in all of them",
)


# Share of views that equal another of their record to within noise, where a solid of revolution
# can't explain it.
check_frozen = _simple(
    "frozen_views",
    "frozen",
    "max_frozen",
    "{share:.0%} of the views repeat another view's picture although the camera moved",
    "the renderer ignored the pose, or files were copied over each other",
)


def check_sides(seen: Seen) -> Finding:
    """Coverage that collapses from the side: a flat cut-out (billboard) instead of an object.

    Coverage within 22.5 degrees of +-90 over that within 22.5 of 0 and 180; not asked where front
    and back are empty themselves.
    """
    bins, ratio, empty = seen.azimuth_bins(), seen.column("coverage_ratio"), seen.empty
    side, front = np.abs(bins) == 90, np.isin(bins, (0, 180))
    if share(empty[~side]) > 0.5 * seen.config.max_empty:
        # Emptiness that is everywhere is not what a cut-out does at its sides.
        ratio = np.where(empty, np.nan, ratio)
    from_side = seen.per_record(np.where(side, ratio, np.nan), np.mean)
    from_front = seen.per_record(np.where(front, ratio, np.nan), np.mean)
    nothing = seen.per_record(np.where(front, empty.astype(float), np.nan), np.mean)
    with np.errstate(invalid="ignore", divide="ignore"):
        flat = np.where(nothing <= seen.config.max_empty, from_side / from_front, np.nan)
    marks, value = seen.beyond(flat, "min_side_coverage")
    return Finding(
        "billboard",
        marks,
        f"from the side the objects cover {value:.0%} of what they cover from the front and the "
        "back: they are flat",
        "the geometry has no depth: supervise the decoder with side views",
        {"side_coverage": value, "min_side_coverage": seen.config.min_side_coverage},
    )
