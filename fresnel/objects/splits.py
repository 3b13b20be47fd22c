"""Parts of the objects by name: splits, and the halves A and B.

The training objects are halved once, by name: A gives multi-view truth to the decoder, B is seen
as single images only, which is what a bootstrap starts from.  Test objects are seen by nobody.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence

from fresnel.data.dataset import DatasetError, MultiViewDataset
from fresnel.data.layout import object_name
from fresnel.objects import furniture
from fresnel.objects.assets import embedded_assets

PARTS = (
    '"all", "train", "val", "test", "unshipped", "A", "B", "A<n>" or "rest<n>" (such as "A50", '
    '"rest50")'
)


def part(data: MultiViewDataset, objects: str) -> MultiViewDataset:
    """Some of a dataset's objects; the receipt of the whole set is valid for it.

    Args:
        objects: "all"; "train", "val" or "test" (also "held_out"), as the dataset states them;
            of the training objects "unshipped" (those that are not embedded in the library, whose
            main job holds some of them out), "A" (about half) or "B" (the others), "A50" (the
            first 50 of A, any number goes) or "rest50" (all but these).

    Raises:
        DatasetError: if the dataset has no such objects.
        ValueError: for an unknown part.
    """
    names = list(dict.fromkeys(object_name(name) for name in data.names))
    chosen = choose(names, objects, data.meta.get("object_splits"))
    if not chosen:
        raise DatasetError(f"{data.path}: has no objects {objects!r}; it has {len(names)} in all")
    return data if len(chosen) == len(names) else _of_objects(data, chosen)


def first_objects(data: MultiViewDataset, count: int) -> MultiViewDataset:
    """The records of a dataset's first `count` objects."""
    return _of_objects(data, list(dict.fromkeys(object_name(name) for name in data.names))[:count])


def _of_objects(data: MultiViewDataset, objects: Sequence[str]) -> MultiViewDataset:
    known = set(objects)
    return data.subset([i for i, name in enumerate(data.names) if object_name(name) in known])


def choose(
    names: Sequence[str], objects: str, splits: Mapping[str, str] | None = None
) -> list[str]:
    """The names (of objects) that belong to a part, in their order; see `part`.

    Args:
        splits: name -> "train", "val" or "test"; names it doesn't know count as "train".
    """
    of = {name: (splits or {}).get(name, "train") for name in names}
    if objects == "all":
        return list(names)
    if objects in ("train", "val", "test", "held_out"):
        want = "test" if objects == "held_out" else objects
        return [name for name in names if of[name] in (want, objects)]
    training = [name for name in names if of[name] == "train"]
    if objects == "unshipped":
        return [name for name in training if name not in _shipped()]
    found = re.fullmatch(r"(A)(\d*)|(B)|rest(\d+)", objects)
    if found is None:
        raise ValueError(f"objects: got {objects!r}, want {PARTS}")
    in_a = [name for name in sorted(training, key=_rank) if _rank(name)[0] < 0.5]
    count = int(found[2] or found[4] or len(in_a))
    if count > len(in_a):
        raise DatasetError(f"objects: {objects!r} asks for {count}, A has {len(in_a)} here")
    first = set(in_a[:count])
    return [name for name in training if (name in first) == bool(found[1])]


@functools.cache
def _rank(name: str) -> tuple[float, float]:
    """Where an object stands in the order that halves the set, each in [0, 1).

    Objects of one kind ("office chair 3") come together, as in the furniture set's own split, so
    that no near-duplicate of an object in A is in B; other data have their names alone.
    """
    texts = (_kinds().get(name, name), name)
    digests = (hashlib.sha256(text.encode()).digest() for text in texts)
    first, second = (int.from_bytes(digest[:6], "big") / 2**48 for digest in digests)
    return first, second


@functools.cache
def _shipped() -> frozenset[str]:
    """The furniture set's names of the objects that are embedded in the library."""
    origins = {asset.origin for asset in embedded_assets()}
    objects = furniture.listing()["objects"]
    return frozenset(e["file"] for e in objects if f"{e['library']}/{e['model']}" in origins)


@functools.cache
def _kinds() -> dict[str, str]:
    return {entry["file"]: entry["group"] for entry in furniture.listing()["objects"]}


def require_apart(training: Iterable[str], held_out: Iterable[str]) -> None:
    """Training and held-out records must not share an object.

    Raises:
        DatasetError: names the first that both have.
    """
    both = {object_name(name) for name in training} & {object_name(name) for name in held_out}
    if both:
        raise DatasetError(
            f"object {min(both)!r} is in the training data and among the held-out objects; "
            f"choose another truth_source, or objects={PARTS}"
        )
