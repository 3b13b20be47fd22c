"""Do two sets, or two splits of one, show the same objects?  Asked of what `print_of` says."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from scipy.special import bdtrc

Row = dict[str, Any]


def stem(row: Row) -> str:
    """The object's name: without the folder before it and the number of the picture behind it."""
    return str(row["name"]).rpartition("/")[2].partition("__")[0]


def twins(prints: Sequence[np.ndarray]) -> Iterator[tuple[int, int]]:
    """Pairs of the same pictures: small prints (C, 12, 12) that differ by less than 2% of what they
    show.  Empty pictures are all alike and are not compared."""
    order = [k for k, one in enumerate(prints) if one.mean(dtype=np.float32) >= 0.2]
    if not order:
        return
    stack = np.stack([prints[k] for k in order]).astype(np.float32)
    parts = stack.sum(axis=(2, 3))
    sums, rows = parts.sum(axis=1), np.argsort(parts.sum(axis=1), kind="stable")
    stack, parts, sums = stack[rows], parts[rows], sums[rows]
    # Prints that are alike have sums that are alike: only those neighbours are compared.
    for a, end in enumerate(np.searchsorted(sums, sums * 1.0205, side="right")):
        near = np.abs(parts[a + 1 : end] - parts[a]).sum(axis=1) <= 0.02 * sums[a]
        near = np.flatnonzero(near) + a + 1
        off = np.abs(stack[near] - stack[a]).sum(axis=(1, 2, 3))
        for b in near[off <= 0.02 * sums[a]]:
            i, j = order[rows[a]], order[rows[b]]
            yield min(i, j), max(i, j)


def whole_prints(objects: Sequence[Row]) -> list[np.ndarray]:
    """Of each record one: its first and middle view and its input."""
    prints = [row.get("prints") for row in objects]
    nothing = np.zeros((12, 12, 12), np.float16)
    return [
        nothing if one is None else np.concatenate([one[0], one[(len(one) - 1) // 2], one[-1]])
        for one in prints
    ]


_Leak = tuple[tuple[int, int], str]


def shared(objects: Sequence[Row], splits: Sequence[str | None]) -> Iterator[_Leak]:
    """Pairs of records of two splits that show the same object, and how that is known."""
    names = [f"{row['name']!r} ({split})" for row, split in zip(objects, splits, strict=True)]
    if len({*splits} - {None}) < 2:
        return
    owners = [k for k, row in enumerate(objects) for _ in row.get("prints", ()) if splits[k]]
    pictures = [one for k, row in enumerate(objects) for one in row.get("prints", ()) if splits[k]]
    common: dict[tuple[int, int], set[int]] = {}
    for i, j in twins(pictures):
        a, b = owners[i], owners[j]
        if splits[a] != splits[b]:
            common.setdefault((a, b), set()).add(i)
    for (a, b), same in common.items():
        if len(same) >= min(2, len(objects[a]["prints"]), len(objects[b]["prints"])):
            yield (a, b), f"{names[a]} shows the same as {names[b]}"
    stems: dict[str, dict[str, list[int]]] = {}
    for k, (row, split) in enumerate(zip(objects, splits, strict=True)):
        if split and "looks" in row:
            one = str(k) if row.get("numbered") else stem(row)
            stems.setdefault(split, {}).setdefault(one, []).append(k)
    for mine, its in itertools.combinations(stems.values(), 2):
        for a, b in (*_namesakes(objects, mine, its), *_relatives(objects, mine, its)):
            yield (a, b), f"{names[a]} has the looks of {names[b]}"


def leaked(own: Sequence[Row], meta: Mapping[str, Any]) -> tuple[np.ndarray, int, str]:
    """Which records of a set are in two splits, how many objects that are, and the first in words.

    Splits come from the dataset's meta ("object_splits"), from folders called train, val and test,
    or from a second dataset given to `validate` (meta["against"]: what `print_of` says of its
    records).  The same object is one
    - with the same pictures, under whatever name: two of them (or the only one);
    - of the same name (before "__", after the folder; not of layouts that number their records) and
      of the same colours, if of the common names more look alike than chance explains;
    - of the same colours from wherever it is seen, if more have so near a relative in the other
      split than within one.
    """
    known = meta.get("object_splits") or {}
    leaks = list(shared(own, [split_of(str(row["name"]), known) for row in own]))
    if others := meta.get("against"):
        where = ["this set"] * len(own) + ["the other set"] * len(others)
        leaks += shared([*own, *others], where)
    flags = np.zeros(len(own))
    flags[[k for pair, _ in leaks for k in pair if k < len(own)]] = 1
    count = len({stem(own[k]) for k in np.flatnonzero(flags).tolist()})
    return flags, count, leaks[0][1] if leaks else ""


_ALIKE = 0.97
"""Likeness of colours: 48 training objects from other cameras 0.975 (95 % of them), 0.1 % of pairs
of different ones and 4 % of pairs of heads more."""


def _looks(objects: Sequence[Row], rows: Sequence[int]) -> np.ndarray:
    mean = np.asarray(np.mean([objects[k]["looks"] for k in rows], axis=0, dtype=np.float32))
    return np.asarray(mean / max(float(np.linalg.norm(mean)), 1e-9))


def _namesakes(
    objects: Sequence[Row], one: Mapping[str, list[int]], other: Mapping[str, list[int]]
) -> list[tuple[int, int]]:
    """Those that look alike, unless so many namesakes do by chance."""
    both = [name for name in one if name in other]
    found = [
        (one[name][0], other[name][0])
        for name in both
        if _looks(objects, one[name]) @ _looks(objects, other[name]) > _ALIKE
    ]
    return found if chance(len(found), len(both), 0.05) < 0.051 else []


def _relatives(
    objects: Sequence[Row], one: Mapping[str, list[int]], other: Mapping[str, list[int]]
) -> list[tuple[int, int]]:
    """Objects of the smaller split that are nearer to one of the larger than those are to each
    other, unless so many are by chance."""
    few, many = sorted((list(one.values()), list(other.values())), key=len)
    if len(many) < 10:
        return []
    small, large = (np.stack([_looks(objects, rows) for rows in part]) for part in (few, many))
    within, across = large @ large.T, small @ large.T
    np.fill_diagonal(within, 0)
    rate = max(0.02, 1 / (len(many) + 1))
    limit = max(float(np.quantile(within.max(axis=1), 1 - rate)), 0.985)
    shown = np.flatnonzero(across.max(axis=1) > limit)
    if chance(len(shown), len(few), rate) >= 0.001:
        return []
    pairs = [(few[k][0], many[int(across[k].argmax())][0]) for k in shown.tolist()]
    return [(min(pair), max(pair)) for pair in pairs]


def chance(shown: int, asked: int, rate: float) -> float:
    """P(at least `shown` of `asked`) at a rate."""
    return float(bdtrc(shown - 1, asked, rate)) if shown else 1.0


_SPLITS = ("train", "training", "val", "valid", "validation", "test", "held_out")


def split_of(name: str, known: Mapping[str, Any]) -> str | None:
    """Which split a record belongs to: by its name, its object's, or its folder's."""
    folder, _, own = name.rpartition("/")
    for key in (name, name.partition("__")[0], own, own.partition("__")[0]):
        if key in known:
            return str(known[key])
    first = folder.partition("/")[0].lower()
    return first if first in _SPLITS else None
