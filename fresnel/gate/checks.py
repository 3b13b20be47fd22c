"""The gate's checks of pictures: plain functions from measurements to one `Finding` each.

Every threshold is of one record and was set on healthy training objects (149 renders of furniture
at 64 px, 80 renders of Gaussians decoded from them) so that at most 5% of them are flagged; what
decides about the set is the sequential test in `findings`.
"""

from __future__ import annotations

import math

import numpy as np

from fresnel.gate.findings import Finding, Seen, beyond, flagged, flags, invalid, median, share


def check_unreadable(seen: Seen) -> Finding | None:
    """Files that are missing, truncated, of the wrong size or no pictures.  One is enough: training
    would stop at it."""
    errors = [row for row in seen.objects if row.get("error")]
    if not errors:
        return None
    return Finding(
        "unreadable",
        np.array([float(bool(row.get("error"))) for row in seen.objects]),
        f"{len(errors)} of {len(seen.objects)} records can't be read: {errors[0]['error']}",
        "restore or remove the file",
        {"records": float(len(errors))},
        at_once=True,
    )


def check_depth(seen: Seen) -> Finding | None:
    """NaN or infinite depth pixels.  One is enough."""
    hint = "write 0 where nothing was hit"
    return invalid(seen, "bad_depth", "depth_invalid", "depth pixels", "not finite", hint)


def check_constant(seen: Seen) -> Finding | None:
    """Frames of one colour that claim to be covered: white, black or grey frames.

    Share of a record's views.  Healthy renders have none.
    """
    constant = seen.column("constant")
    of_record, total = seen.per_record(constant, np.mean), share(constant)
    return Finding(
        "constant_frames",
        beyond(of_record, seen.config.max_constant)[0],
        f"{total:.0%} of the views are a single colour all over the frame",
        "look at the renderer's output: an exposure that clips, a camera inside the object, or "
        "frames that were never written",
        {"share": total, "max_constant": seen.config.max_constant},
    )


def check_cropped(seen: Seen) -> Finding | None:
    """Content that leaves the frame.

    Share of a record's views whose border is covered to more than 2%.  Our orbits frame every
    object whole, so healthy renders have none; renders of Gaussians have haze of 0.2% at most.
    """
    border = seen.column("border")
    cut = np.where(np.isfinite(border), border > seen.config.max_border, np.nan)
    of_record = seen.per_record(cut.astype(float), np.mean)
    of_record[[row.get("foreground") == "none" for row in seen.objects]] = np.nan
    total = share(cut)
    return Finding(
        "out_of_frame",
        beyond(of_record, seen.config.max_cropped)[0],
        f"the object leaves the frame in {total:.0%} of the views",
        "move the cameras back or widen the field of view; check the focal length",
        {"share": total, "max_border": seen.config.max_border},
    )


def check_empty(seen: Seen) -> Finding | None:
    """Views that show nothing or too little, by coverage and not by brightness.

    Share of empty views, and median coverage over the input's, of a record.  No healthy view was
    empty, and no record's median below 0.62.
    """
    config, empty, ratio = seen.config, seen.empty, seen.column("coverage_ratio")
    shares, medians = seen.per_record(empty.astype(float), np.mean), seen.per_record(ratio)
    marks = (shares > config.max_empty) | (medians < config.min_coverage_ratio)
    total, coverage = share(empty), median(ratio)
    mean = float(np.mean(seen.column("coverage")))
    bins = seen.azimuth_bins()
    gone = sorted({float(b) for b in set(bins[np.isfinite(bins)]) if empty[bins == b].all()})
    where = f"; nothing at all at azimuths {', '.join(f'{b:.0f}' for b in gone)} degrees"
    return Finding(
        "views_empty",
        flags(marks, np.isfinite(shares)),
        f"{total:.0%} of the views are empty and the median view covers {coverage:.0%} of what the "
        f"input covers (mean coverage {mean:.3f}){where if gone else ''}: the object is not "
        "there, whatever the exposure",
        "check where the cameras look and how far away they are",
        {"share": total, "coverage_ratio": coverage, "mean_coverage": mean}
        | {"max_empty": config.max_empty, "min_coverage_ratio": config.min_coverage_ratio},
    )


def check_exposure(seen: Seen) -> Finding | None:
    """Views much darker or brighter than the input although they cover as much.

    Ratio of mean linear-light luminance of covered pixels to the input's, over views that are not
    empty: its median in a record, and the share of (almost) black or white ones.  90% of the
    training records have medians of 0.64 to 1.23; no view was below 0.08 of its input's.
    """
    config = seen.config
    ratio = seen.of_filled("luminance_ratio")
    medians, known = seen.per_record(ratio), np.isfinite(seen.per_record(ratio))
    # NaN compares as False and per_record leaves it out: emptiness is no darkness.
    dark = seen.per_record(np.where(np.isfinite(ratio), ratio < config.dark_view, np.nan), np.mean)
    bright = seen.per_record(
        np.where(np.isfinite(ratio), ratio > config.bright_view, np.nan), np.mean
    )
    darker = (medians < config.min_luminance_ratio) | (dark > config.max_dark)
    brighter = (medians > config.max_luminance_ratio) | (bright > config.max_bright)
    value, coverage = median(medians), median(seen.of_filled("coverage_ratio"))
    values = {"luminance_ratio": value, "coverage_ratio": coverage}
    values |= {"dark": share(dark), "bright": share(bright)}
    rest = f"coverage is {coverage:.0%} of the input's, so it is exposure, not emptiness"
    hint = "check exposure, tone curve and colour range of the renders"
    if darker.sum() >= brighter.sum():
        what = f"the median view has {value:.2f} of the input's luminance"
        what += f" and {share(dark):.0%} of the views are almost black" if share(dark) > 0 else ""
        message = f"views are dark: {what}; {rest}"
        return Finding("views_dark", flags(darker, known), message, hint, values)
    what = f"the median view has {value:.2f} times the input's luminance"
    what += f" and {share(bright):.0%} of the views are far brighter" if share(bright) > 0 else ""
    message = f"views are too bright: {what}; {rest}"
    return Finding("views_bright", flags(brighter, known), message, hint, values)


def check_drift(seen: Seen) -> Finding | None:
    """Exposure that changes from view to view.

    Median absolute step of log luminance between neighbours in azimuth, in e-foldings; 95% of the
    training records stay below 0.55 (objects with a dark and a bright side).
    """
    marks, value = beyond(seen.record("drift"), seen.config.max_drift)
    return Finding(
        "exposure_drift",
        marks,
        f"brightness jumps by a factor of {math.exp(value):.1f} from one view to the next"
        if np.isfinite(value)
        else "brightness jumps between views",
        "fix the exposure (and white balance) over all views of an object",
        {"drift": value, "max_drift": seen.config.max_drift},
    )


def check_clipping(seen: Seen) -> Finding | None:
    """Pixels at either end of the scale, beyond the input's share of them.

    Median over a record's views; 1% of the training records reach 0.13.
    """
    marks, value = beyond(seen.per_record(seen.of_filled("clipped")), seen.config.max_clipped)
    return Finding(
        "clipped",
        marks,
        f"{value:.0%} more of the covered pixels than in the input are fully black or white",
        "lower the contrast, or render with headroom: what is clipped is lost",
        {"clipped": value, "max_clipped": seen.config.max_clipped}
        | {
            key: flagged(seen.per_record(seen.of_filled(key)), marks)
            for key in ("crushed", "floored")
        },
    )


def check_channels(seen: Seen) -> Finding | None:
    """Red and blue exchanged (BGR written as RGB).

    Distance of the views' mean colour to the input's over its distance to the input's with red and
    blue exchanged; asked only of objects whose red and blue differ.  No training record
    reaches 1.1.
    """
    marks, value = beyond(seen.record("swapped"), seen.config.max_swapped)
    return Finding(
        "channels_swapped",
        marks,
        f"the views' colours are {value:.1f} times nearer to the input's with red and blue "
        "exchanged",
        "write RGB, not BGR",
        {"swapped": value, "max_swapped": seen.config.max_swapped},
    )


def check_identity(seen: Seen) -> Finding | None:
    """Gaussians that don't even reproduce the picture they were made from.

    PSNR in dB over the union of foregrounds, and silhouette IoU, of the render from the input
    camera against the input.  The shipped decoder has 18.5 dB and 0.86 on held-out furniture, the
    original's patch decoder 10.1 dB and 0.61.
    """
    config = seen.config
    psnr, iou = seen.record("identity_psnr"), seen.record("identity_iou")
    marks = flags(
        (psnr < config.min_identity_psnr) | (iou < config.min_identity_iou), np.isfinite(psnr)
    )
    return Finding(
        "identity_mismatch",
        marks,
        f"rendered from the input camera the object does not reproduce the input: PSNR "
        f"{flagged(psnr, marks):.1f} dB over the foreground, silhouettes overlap "
        f"{flagged(iou, marks):.0%}",
        "the decoder (or the frame it speaks) is wrong before any novel view is",
        {"psnr": flagged(psnr, marks), "iou": flagged(iou, marks)}
        | {"min_identity_psnr": config.min_identity_psnr}
        | {"min_identity_iou": config.min_identity_iou},
    )


def check_detail(seen: Seen) -> Finding | None:
    """Blurred views: gradient energy per covered pixel over the input's.

    Median over a record's views that are not empty.  Alpha's outline counts too, so single-coloured
    objects are judged as well.  Training renders have 0.63 to 1.37; renders of Gaussians may be
    softer than their input (1% are below 0.44).
    """
    marks, value = beyond(
        seen.per_record(seen.of_filled("detail_ratio")), seen.config.min_detail_ratio, below=True
    )
    return Finding(
        "blurred",
        marks,
        f"views have {value:.0%} of the input's gradients: they are blurred",
        "check the resolution the views were rendered at, and the Gaussians' scales",
        {"detail_ratio": value, "min_detail_ratio": seen.config.min_detail_ratio},
    )


def check_grain(seen: Seen) -> Finding | None:
    """Noisy views: what changes from pixel to pixel inside the object, beyond the input's.

    Median absolute second difference along rows, of 255; median over a record's views.
    """
    marks, value = beyond(seen.per_record(seen.of_filled("grain")), seen.config.max_grain)
    return Finding(
        "noisy",
        marks,
        f"neighbouring pixels inside the object differ by {value:.0f} of 255 more than in the "
        "input: the views are noisy",
        "render with more samples, or look for compression artefacts",
        {"grain": value, "max_grain": seen.config.max_grain},
    )
