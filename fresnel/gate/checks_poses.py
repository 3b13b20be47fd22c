"""The gate's checks of poses against pictures, and of views against each other.

Every threshold is of one record and was set on healthy training objects (149 renders of furniture
at 64 px, 80 renders of Gaussians decoded from them) so that at most 5% of them are flagged; what
decides about the set is the sequential test in `findings`.
"""

from __future__ import annotations

import numpy as np

from fresnel.gate.findings import Finding, Seen, beyond, flagged, flags, invalid, share


def check_poses(seen: Seen) -> Finding | None:
    """Poses that are NaN, scaled, or mirrored (no proper rotation within 1e-3).  One is enough."""
    hint = "world-to-camera rotations must be orthonormal, right-handed and finite"
    are = "NaN or not a rotation"
    return invalid(seen, "bad_poses", "pose_invalid", "camera poses", are, hint)


def check_up(seen: Seen) -> Finding | None:
    """A world whose up is not +Y: Z-up data, or pictures upside down.

    Angle between the cameras' mean up and the world's Y, degrees.  Healthy orbits stay below 15;
    an axis swapped makes 90 or 180.  Azimuth, elevation and the networks' frame assume Y up.
    """
    marks, tilt = beyond(seen.record("up_tilt_deg"), seen.config.max_up_tilt_deg)
    return Finding(
        "up_axis",
        marks,
        f"the cameras' common up direction is {tilt:.0f} degrees away from the world's +Y",
        "turn the world so that +Y is up (a Z-up tool exported it, or the pictures are turned)",
        {"up_tilt_deg": tilt, "max_up_tilt_deg": seen.config.max_up_tilt_deg},
    )


def check_pivot(seen: Seen) -> Finding | None:
    """Cameras that look at another point than the object: the original experiment's mistake.

    Distance from the nearest point to all optical axes to the content, over the cameras' distance
    (healthy: at most 0.13; the original experiment: above 1); or to the pivot that the data states.
    """
    limit = seen.config.max_pivot_offset
    relative, error = seen.record("pivot_relative"), seen.record("pivot_error")
    hint = "orbit the object's centroid: pass it as the pivot when the views are made"
    (off, of_radius), (stated, of_stated) = beyond(relative, limit), beyond(error, limit)
    if np.nansum(off) or not np.nansum(stated):
        distance = flagged(seen.record("pivot_distance"), off)
        return Finding(
            "pivot_offset",
            off,
            f"the cameras orbit a point {distance:.1f} units away from the object "
            f"({of_radius:.2f} of their distance to that point)",
            hint,
            {"distance": distance, "relative": of_radius, "max_pivot_offset": limit},
        )
    units = flagged(error * seen.record("radius"), stated)
    return Finding(
        "pivot_offset",
        stated,
        f"the cameras look at a point {units:.1f} units away from the pivot that the data states",
        "one of the two is wrong: check the transform between object and cameras",
        {"distance": units, "relative": of_stated, "max_pivot_offset": limit},
    )


def check_poses_match(seen: Seen) -> Finding | None:
    """Poses that don't belong to the pictures.

    Four numbers, each a symptom: silhouettes that no single object explains (`hull_miss`: share of
    the other silhouettes that a ray misses at its best point, plus a tenth of what the visual hull
    leaves unexplained; renders at most 0.001, 98% of the renders of Gaussians 0.007), surface
    points from depth beside other views' outlines (`stray`, healthy 0.022) or floating in front of
    what they see (0.13), centroids that are not the image of one point (RMS in image widths, 0.08).
    """
    config = seen.config
    limits = {
        "hull_miss": config.max_hull_miss,
        "stray": config.max_stray,
        "centroid_residual": config.max_centroid_residual,
        "floating": config.max_floating,
    }
    columns = {key: seen.record(key) for key in limits}
    # Outlines that had to be guessed are ragged.
    guessed = np.array([row.get("foreground") == "estimated" for row in seen.objects])
    columns["hull_miss"] = np.where(guessed, columns["hull_miss"] / 4, columns["hull_miss"])
    columns["stray"] = np.where(guessed, columns["stray"] / 2, columns["stray"])
    known = np.any([np.isfinite(column) for column in columns.values()], axis=0)
    marks = flags(np.any([columns[key] > limits[key] for key in limits], axis=0), known)
    iou, stray = flagged(seen.record("hull_iou"), marks), flagged(columns["stray"], marks)
    said = f"the objects' outlines in different views agree to {iou:.0%} only"
    if stray > config.max_stray:
        said += f" and {stray:.0%} of what one view shows lies outside the outline in the others"
    elif iou > 0.98:
        said = "the depths of neighbouring views contradict each other"
    values = {key: flagged(column, marks) for key, column in columns.items()} | {"hull_iou": iou}
    return Finding(
        "pose_mismatch",
        marks,
        f"{said}: the poses don't belong to the pictures",
        "check the order of the poses, the axis convention and the focal length",
        values | {f"max_{key}": value for key, value in limits.items()},
    )


def check_input(seen: Seen) -> Finding | None:
    """An input that does not fit views which fit each other: its pose, or another object.

    Share of the silhouettes that rays of the input miss, and of its silhouette that their rays
    miss, less the median view's.  95% of the training records stay below 0.002, renders of
    Gaussians below 0.009 (99%); an input turned by 90 degrees shows in 6 of 10 objects, by 180 in
    5: most look much the same from behind.
    """
    marks, value = beyond(seen.record("input_miss"), seen.config.max_input_miss)
    return Finding(
        "input_pose",
        marks,
        f"the views agree with each other but not with the input: {value:.1%} more of its outline "
        "contradicts the others than of a view's",
        "check which camera took the input, and that it shows the same object",
        {"input_miss": value, "max_input_miss": seen.config.max_input_miss},
    )


def check_epipolar(seen: Seen) -> Finding | None:
    """Photographs whose matched features contradict the poses: see `epipolar.misfit`.

    Asked of opaque photographs only.  51 synthetic rooms (four kinds of texture, three focal
    lengths, three steps) stay below 0.84; inverted, OpenGL's and reversed poses reach 1.45.  Of 31
    other rooms one is flagged (a repeating brick wall), and every one with such poses.
    """
    marks, value = beyond(seen.record("epipolar"), seen.config.max_epipolar)
    return Finding(
        "pose_mismatch",
        marks,
        f"features matched between views lie {value:.1f} times as far from where the poses put "
        "them as the best possible poses would: these don't belong to the pictures",
        "check the order of the poses, the axis convention and the focal length",
        {"epipolar": value, "max_epipolar": seen.config.max_epipolar},
    )


def check_colours(seen: Seen) -> Finding | None:
    """Surface points that change colour from one view to the next.

    Photometric reprojection where depth exists: mean colour difference of the same surface point in
    neighbouring views over that of unrelated points (0: the same, 1: unrelated; not asked of
    single-coloured objects).  95% of the training records stay below 0.8.
    """
    marks, value = beyond(seen.record("photometric"), seen.config.max_photometric)
    return Finding(
        "colours_disagree",
        marks,
        f"the same surface point differs between neighbouring views by {value:.2f} of what "
        "unrelated points differ by",
        "check depth, the order of the views, and that lighting is the same in all of them",
        {"photometric": value, "max_photometric": seen.config.max_photometric},
    )


def check_frozen(seen: Seen) -> Finding | None:
    """The same picture under different poses.

    Share of views that equal another of their record to within noise, where a solid of revolution
    can't explain it.  Healthy renders have none.
    """
    frozen = seen.record("frozen")
    total = share(frozen)
    return Finding(
        "frozen_views",
        beyond(frozen, seen.config.max_frozen)[0],
        f"{total:.0%} of the views repeat another view's picture although the camera moved",
        "the renderer ignored the pose, or files were copied over each other",
        {"share": total, "max_frozen": seen.config.max_frozen},
    )


def side_coverage(seen: Seen) -> np.ndarray:
    """Coverage within 22.5 degrees of +-90 over that within 22.5 of 0 and 180, per record."""
    bins, ratio, empty = seen.azimuth_bins(), seen.column("coverage_ratio"), seen.empty
    side, front = np.abs(bins) == 90, np.isin(bins, (0, 180))
    if share(empty[~side]) > 0.5 * seen.config.max_empty:
        # Emptiness that is everywhere is not what a cut-out does at its sides.
        ratio = np.where(empty, np.nan, ratio)
    from_side = seen.per_record(np.where(side, ratio, np.nan), np.mean)
    from_front = seen.per_record(np.where(front, ratio, np.nan), np.mean)
    nothing = seen.per_record(np.where(front, empty.astype(float), np.nan), np.mean)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(nothing <= seen.config.max_empty, from_side / from_front, np.nan)


def check_sides(seen: Seen) -> Finding | None:
    """Coverage that collapses from the side: a flat cut-out (billboard) instead of an object.

    `side_coverage`; not asked where front and back are empty themselves.  Of the training objects
    3% are flatter than 0.45, half are above 0.97.
    """
    marks, value = beyond(side_coverage(seen), seen.config.min_side_coverage, below=True)
    return Finding(
        "billboard",
        marks,
        f"from the side the objects cover {value:.0%} of what they cover from the front and the "
        "back: they are flat",
        "the geometry has no depth: supervise the decoder with side views",
        {"side_coverage": value, "min_side_coverage": seen.config.min_side_coverage},
    )
