"""Do two sets, or two splits of one, show the same objects?  Asked of what `print_of` says."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from scipy.special import bdtrc, betaln

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


def shared(
    objects: Sequence[Row], splits: Sequence[str | None], *, by_colours: bool = True
) -> Iterator[_Leak]:
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
    if not by_colours:
        return
    stems: dict[str, dict[str, list[int]]] = {}
    for k, (row, split) in enumerate(zip(objects, splits, strict=True)):
        if split and "looks" in row:
            one = str(k) if row.get("numbered") else stem(row)
            stems.setdefault(split, {}).setdefault(one, []).append(k)
    for mine, its in itertools.combinations(stems.values(), 2):
        for a, b in (*_namesakes(objects, mine, its), *_relatives(objects, mine, its)):
            yield (a, b), f"{names[a]} has the looks of {names[b]}"


def leaked(
    own: Sequence[Row], meta: Mapping[str, Any], *, final: bool = True
) -> tuple[np.ndarray, int, str]:
    """Which records of a set are in two splits, how many objects that are, and the first in words.

    Splits come from the dataset's meta ("object_splits"), from folders called train, val and test,
    or from a second dataset given to `validate` (meta["against"]: what `print_of` says of its
    records).  The same object is one
    - with the same pictures, under whatever name: two of them (or the only one);
    - of the same name (before "__", after the folder; not of layouts that number their records) and
      of the same colours, if of the common names more look alike than chance explains;
    - of the same colours from wherever it is seen, if in the other split more have a relative that
      is so much nearer than all others than within one.
    Colours are asked in the end (`final`): asked at every look they would be wrong at some.
    """
    known = meta.get("object_splits") or {}
    splits = [split_of(str(row["name"]), known) for row in own]
    leaks = list(shared(own, splits, by_colours=final))
    if others := meta.get("against"):
        where = ["this set"] * len(own) + ["the other set"] * len(others)
        leaks += shared([*own, *others], where, by_colours=final)
    flags = np.zeros(len(own))
    flags[[k for pair, _ in leaks for k in pair if k < len(own)]] = 1
    count = len({stem(own[k]) for k in np.flatnonzero(flags).tolist()})
    return flags, count, leaks[0][1] if leaks else ""


_ALIKE = 0.97
"""Likeness of colours: 48 training objects from other cameras 0.975 (95 % of them), 0.1 % of pairs
of different ones and 6 % of 230,860 pairs of heads more."""
_RATE, _NOISE, _STRANGERS = 0.03, 1e-6, 2000
"""How many objects have so lone a relative; what a likeness is rounded by; how many of a split say
how alike strangers are."""


def _looks(objects: Sequence[Row], rows: Sequence[int]) -> np.ndarray:
    mean = np.asarray(np.mean([objects[k]["looks"] for k in rows], axis=0, dtype=np.float32))
    return np.asarray(mean / max(float(np.linalg.norm(mean)), 1e-9))


def _namesakes(
    objects: Sequence[Row], one: Mapping[str, list[int]], other: Mapping[str, list[int]]
) -> list[tuple[int, int]]:
    """Those that look more alike than 95 % of strangers (99.6 %, of a single name), unless so many
    namesakes do by chance."""
    both = [name for name in one if name in other]
    if not both:
        return []
    names = [list(part)[:_STRANGERS] for part in (one, other)]
    ones, others = (
        np.stack([_looks(objects, part[name]) for name in some])
        for part, some in zip((one, other), names, strict=True)
    )
    strange = np.array(names[0])[:, None] != np.array(names[1])
    apart, rate = (ones @ others.T)[strange], 0.05 if len(both) > 1 else 0.004
    limit = max(_ALIKE, float(np.quantile(apart, 1 - rate)) if len(apart) else 0.0)
    found = [
        (one[name][0], other[name][0])
        for name in both
        if _looks(objects, one[name]) @ _looks(objects, other[name]) > limit
    ]
    return found if chance(len(found), len(both), rate) < 0.005 else []


def _relatives(
    objects: Sequence[Row], one: Mapping[str, list[int]], other: Mapping[str, list[int]]
) -> list[tuple[int, int]]:
    """Objects of the smaller split whose nearest one in the larger stands out before all others
    there, as of hardly any object of the larger the nearest within it does; unless so many do by
    chance.  How near the nearest is says nothing: of many objects of one kind every one has a near
    relative."""
    few, many = sorted((list(one.values()), list(other.values())), key=len)
    if len(many) < 10:
        return []
    small, large = (np.stack([_looks(objects, rows) for rows in part]) for part in (few, many))
    rank = max(1, int(_RATE * len(many)))
    limit = np.partition(_nearest(large, large, among=True)[2], rank - 1)[rank - 1]
    place, likeness, lead = _nearest(small, large)
    shown = np.flatnonzero((lead < limit) & (likeness > _ALIKE)).tolist()
    copies = {int(place[k]): k for k in shown}  # an object is once in a split
    if _before(len(copies), len(few), rank, len(many)) >= 0.001:
        return []
    pairs = [(few[k][0], many[at][0]) for at, k in copies.items()]
    return sorted((min(pair), max(pair)) for pair in pairs)


def _nearest(
    some: np.ndarray, all_: np.ndarray, *, among: bool = False
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each which one of all (if it is `among` them, which other one) is nearest, its likeness,
    and its distance (1 - likeness) over that of the second nearest."""
    parts = []
    for start in range(0, len(some), 1000):
        alike = some[start : start + 1000] @ all_.T
        if among:
            alike[np.arange(len(alike)), start + np.arange(len(alike))] = -1
        two = np.sort(np.partition(alike, -2, axis=1)[:, -2:], axis=1).astype(np.float64)
        lead = (1 + _NOISE - two[:, 1]) / (1 + _NOISE - two[:, 0])
        parts.append((alike.argmax(axis=1), two[:, 1], lead))
    place, likeness, lead = map(np.concatenate, zip(*parts, strict=True))
    return place, likeness, lead


def _before(shown: int, asked: int, rank: int, count: int) -> float:
    """P(at least `shown` of `asked` come before the one of `rank` among `count`) if all are drawn
    alike: beta-binomial."""
    i = np.arange(shown, asked + 1)
    log = betaln(i + rank, asked - i + count - rank + 1) - betaln(rank, count - rank + 1)
    return float(np.exp(log - betaln(i + 1, asked - i + 1)).sum() / (asked + 1))


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
