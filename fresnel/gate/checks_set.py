"""The gate's checks across the set: duplicates, leaks between splits, imbalance."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from fresnel.gate.findings import Finding, Seen


def twins(seen: Seen) -> list[tuple[int, int]]:
    """Pairs of records with the same pictures under different names: the same bytes, or thumbnails
    that differ by less than 2% of what they show.  Names are compared before "__"."""
    prints = [row.get("fingerprint") for row in seen.objects]
    stems = [str(row["name"]).partition("__")[0] for row in seen.objects]
    pairs: list[tuple[int, int]] = []
    first: dict[str, int] = {}
    groups: dict[int, list[int]] = {}
    for k, item in enumerate(prints):
        if item is None or item["thumbnail"].mean() < 0.2:  # empty pictures are all alike
            continue
        earlier = first.setdefault(item["digest"], k)
        if earlier == k:
            groups.setdefault(len(item["thumbnail"]), []).append(k)
        elif stems[earlier] != stems[k]:
            pairs.append((earlier, k))
    for group in groups.values():
        small = np.stack([prints[k]["thumbnail"] for k in group[:4000]])  # type: ignore[index]
        squared = np.square(small).sum(axis=1)
        for a in range(len(small)):
            # |a - b|^2 first, by one matrix-vector product; then exactly where it is small.
            off = squared[a] + squared[a + 1 :] - 2 * small[a + 1 :] @ small[a]
            for b in np.flatnonzero(off < 0.01 * squared[a]) + a + 1:
                same = np.abs(small[a] - small[b]).sum() < 0.02 * small[a].sum()
                if same and stems[group[a]] != stems[group[b]]:
                    pairs.append((group[a], group[b]))
    return pairs


def check_duplicates(seen: Seen) -> Finding | None:
    """Records with the same pictures under two names, as a share of the set.  2% are let pass.

    Decided on the whole set: ten examples spread over it seldom hold both of a pair.
    """
    pairs = twins(seen)
    if not pairs:
        return None
    again = sorted({b for _, b in pairs})
    marks = np.zeros(len(seen.objects))
    marks[again] = 1
    part = len(again) / max(len(seen.objects), 1)
    a, b = (seen.objects[k]["name"] for k in pairs[0])
    return Finding(
        "duplicated_objects",
        marks if part > seen.config.max_duplicates else 0 * marks,
        f"{len(again)} of {len(seen.objects)} records repeat another one's pictures (first: {a!r} "
        f"and {b!r})",
        "keep one of each: duplicates weigh double and leak between splits",
        {"share": part, "max_duplicates": seen.config.max_duplicates},
        at_once=True,
        late=True,
    )


def check_leak(seen: Seen) -> Finding | None:
    """The same object in two splits.  One is enough: every later figure would be wrong.

    Splits come from the dataset's meta ("object_splits"), from folders called train, val and test
    of a set of sets, or from a second dataset given to `validate`.  The same object is one of the
    same name (before "__", after the folder) or with the same pictures; the same object under
    another name *and* from other cameras is not recognised.
    """
    marks, examples = np.zeros(len(seen.objects)), []
    names = [str(row["name"]) for row in seen.objects]
    splits = [_split(name, seen.meta.get("object_splits") or {}) for name in names]
    other = seen.meta.get("against") or {}
    first: dict[str, int] = {}
    for k, (name, row) in enumerate(zip(names, seen.objects, strict=True)):
        stem = name.rpartition("/")[2].partition("__")[0]
        digest = (row.get("fingerprint") or {}).get("digest")
        if stem in other.get("names", ()) or digest in other.get("digests", ()):
            marks[k] = 1
            examples.append(f"{name!r} is in the other set too")
        if splits[k]:
            earlier = first.setdefault(stem, k)
            if splits[earlier] != splits[k]:
                marks[[earlier, k]] = 1
                examples.append(f"{name!r} is in {splits[earlier]} and in {splits[k]}")
    for a, b in twins(seen) if len(set(splits) - {None}) > 1 else ():
        if splits[a] and splits[b] and splits[a] != splits[b]:
            marks[[a, b]] = 1
            examples.append(
                f"{names[a]!r} ({splits[a]}) shows the same as {names[b]!r} ({splits[b]})"
            )
    if not examples:
        return None
    return Finding(
        "split_leak",
        marks,
        f"{len(examples)} objects are in more than one split: {examples[0]}",
        "split by object before anything is rendered",
        {"objects": float(len(examples))},
        at_once=True,
    )


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
    """Views that crowd on one side.

    exp(entropy) of the views over eight 45 degree bins of azimuth, over eight: 1 for an even
    orbit, 0.375 for three neighbouring bins.  Random azimuths of ten objects stay above 0.9.
    """
    bins = seen.azimuth_bins()
    bins = bins[np.isfinite(bins)]
    if len(bins) < 8:
        return None
    parts = np.unique(bins, return_counts=True)[1] / len(bins)
    spread = float(np.exp(-(parts * np.log(parts)).sum()) / 8)
    marks = np.full(len(seen.objects), float(spread < seen.config.min_azimuth_spread))
    return Finding(
        "azimuth_imbalance",
        marks,
        f"the views come from {8 * spread:.1f} of 8 directions around the object, effectively",
        "add views from the missing side: a model can't learn what is never shown",
        {"azimuth_spread": spread, "min_azimuth_spread": seen.config.min_azimuth_spread},
        at_once=True,
    )


def check_classes(seen: Seen) -> Finding | None:
    """One class that is almost the whole set, where the dataset's meta tells ("object_classes").

    90% or more of the set's objects (at least ten) in one class while others exist.  Meta tells of
    all objects, so all are counted, however few have been looked at.
    """
    classes = seen.meta.get("object_classes") or {}
    counts = Counter(str(name) for name in classes.values() if name)
    total = counts.total()
    if total < 10 or len(counts) < 2:
        return None
    ((name, most),) = counts.most_common(1)
    part = most / total
    return Finding(
        "class_imbalance",
        np.full(len(seen.objects), float(part >= seen.config.max_class_share)),
        f"{part:.0%} of the objects are of class {name!r}",
        "balance the classes, or say that the set is of one class",
        {"share": part, "max_class_share": seen.config.max_class_share},
        at_once=True,
    )
