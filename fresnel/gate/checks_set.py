"""The gate's checks across the set: duplicates, leaks between splits, imbalance."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from fresnel.gate.thresholds import Finding, Row, Seen


def _stem(name: str) -> str:
    """The object's name: without the folder before it and the number of the picture behind it."""
    return name.rpartition("/")[2].partition("__")[0]


def twins(objects: Sequence[Row]) -> Iterator[tuple[int, int]]:
    """Pairs of records with the same pictures: the same bytes, or thumbnails that differ by less
    than 2% of what they show."""
    groups: dict[int, list[int]] = {}
    for k, row in enumerate(objects):
        thumbnail = row.get("thumbnail")
        if thumbnail is not None and thumbnail.mean() >= 0.2:  # empty pictures are all alike
            groups.setdefault(len(thumbnail), []).append(k)
    for group in groups.values():
        sums = np.array([objects[k]["thumbnail"].sum() for k in group])
        order = np.argsort(sums, kind="stable")
        small = np.stack([objects[group[k]]["thumbnail"] for k in order])
        sums = sums[order]
        # Thumbnails that alike have sums that alike: only those neighbours are compared.
        ends = np.searchsorted(sums, sums * 1.0205, side="right")
        for a, end in enumerate(ends):
            off = np.abs(small[a + 1 : end] - small[a]).sum(axis=1)
            for b in np.flatnonzero(off <= 0.02 * sums[a]) + a + 1:
                first, second = sorted((group[order[a]], group[order[b]]))
                yield first, second


def check_duplicates(seen: Seen) -> Finding | None:
    """Records with the same pictures under two names, as a share of the set.

    Decided on the whole set: ten examples spread over it seldom hold both of a pair.
    """
    stems = [_stem(str(row["name"])) for row in seen.objects]
    pairs = sorted((a, b) for a, b in twins(seen.objects) if stems[a] != stems[b])
    if not pairs:
        return None
    again = sorted({b for _, b in pairs})
    marks = np.zeros(len(seen.objects))
    part = len(again) / len(marks)
    marks[again] = float(part > seen.config.max_duplicates)
    a, b = (seen.objects[k]["name"] for k in pairs[0])
    return Finding(
        "duplicated_objects",
        marks,
        f"{len(again)} of {len(marks)} records repeat another one's pictures (first: {a!r} "
        f"and {b!r})",
        "keep one of each: duplicates weigh double and leak between splits",
        {"share": part, "max_duplicates": seen.config.max_duplicates},
        at_once=True,
        late=True,
    )


def check_leak(seen: Seen) -> Finding | None:
    """The same object in two splits: every later figure would be wrong.

    Splits come from the dataset's meta ("object_splits"), from folders called train, val and test,
    or from a second dataset given to `validate` (meta["against"]: its records' names, digests and
    thumbnails).  The same object is one of the same name (before "__", after the folder; not of
    layouts that number their records) or with the same pictures; the same object under another
    name *and* from other cameras is not recognised.
    """
    known, count = seen.meta.get("object_splits") or {}, len(seen.objects)
    own = [_split(str(row["name"]), known) for row in seen.objects]
    leaks = list(_leaks(list(seen.objects), own))
    if others := seen.meta.get("against"):
        splits = ["this set"] * count + ["the other set"] * len(others)
        leaks += _leaks([*seen.objects, *others], splits)
    if not leaks:
        return None
    marks = np.zeros(count)
    marks[[k for a, b, _ in leaks for k in (a, b) if k < count]] = 1
    return Finding(
        "split_leak",
        marks,
        f"{len(leaks)} objects are in more than one split: {leaks[0][2]}",
        "split by object before anything is rendered",
        {"objects": float(len(leaks))},
        at_once=True,
    )


def _leaks(objects: Sequence[Row], splits: Sequence[str | None]) -> Iterator[tuple[int, int, str]]:
    first: dict[str, int] = {}
    for k, (row, split) in enumerate(zip(objects, splits, strict=True)):
        if not split or row.get("numbered"):
            continue
        earlier = first.setdefault(_stem(str(row["name"])), k)
        if splits[earlier] != split:
            yield earlier, k, f"{row['name']!r} is in {splits[earlier]} and in {split}"
    if len({*splits} - {None}) < 2:
        return
    for a, b in twins(objects):
        if splits[a] and splits[b] and splits[a] != splits[b]:
            names = [f"{objects[k]['name']!r} ({splits[k]})" for k in (a, b)]
            yield a, b, f"{names[0]} shows the same as {names[1]}"


_SPLITS = ("train", "training", "val", "valid", "validation", "test", "held_out")


def _split(name: str, known: Mapping[str, Any]) -> str | None:
    """Which split a record belongs to: by its name, its object's, or its folder's."""
    folder, _, own = name.rpartition("/")
    for key in (name, name.partition("__")[0], own, own.partition("__")[0]):
        if key in known:
            return str(known[key])
    first = folder.partition("/")[0].lower()
    return first if first in _SPLITS else None


def check_azimuths(seen: Seen) -> Finding | None:
    """Views that crowd on one side of an object: exp(entropy) of the views over eight 45 degree
    bins of azimuth, over eight.  Photographs without a foreground may well face one way."""
    bins = seen.azimuth_bins()
    orbits = np.repeat(~seen.foreground("none"), [row["views"] for row in seen.objects])
    bins = bins[np.isfinite(bins) & orbits]
    if len(bins) < 8:
        return None
    parts = np.unique(bins, return_counts=True)[1] / len(bins)
    spread = float(np.exp(-(parts * np.log(parts)).sum()) / 8)
    return Finding(
        "azimuth_imbalance",
        np.full(len(seen.objects), float(spread < seen.config.min_azimuth_spread)),
        f"the views come from {8 * spread:.1f} of 8 directions around the object, effectively",
        "add views from the missing side: a model can't learn what is never shown",
        {"azimuth_spread": spread, "min_azimuth_spread": seen.config.min_azimuth_spread},
        at_once=True,
    )


def check_classes(seen: Seen) -> Finding | None:
    """One class that is almost the whole set, where the dataset's meta tells ("object_classes") of
    at least ten objects and two classes.  All are counted, however few have been looked at."""
    classes = seen.meta.get("object_classes") or {}
    counts = Counter(str(name) for name in classes.values() if name)
    if counts.total() < 10 or len(counts) < 2:
        return None
    ((name, most),) = counts.most_common(1)
    part = most / counts.total()
    return Finding(
        "class_imbalance",
        np.full(len(seen.objects), float(part >= seen.config.max_class_share)),
        f"{part:.0%} of the objects are of class {name!r}",
        "balance the classes, or say that the set is of one class",
        {"share": part, "max_class_share": seen.config.max_class_share},
        at_once=True,
    )
