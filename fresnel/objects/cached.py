"""Datasets that are made of something else when it is opened: rendered objects, unpacked shards."""

from __future__ import annotations

import os
from pathlib import Path

from fresnel.data import layout as _layouts
from fresnel.data import shards
from fresnel.data.images import DatasetError
from fresnel.data.layout import MANIFEST
from fresnel.data.writing import store


def rendered(
    root: Path, image_size: int | None, views: int | None, cache: str | Path | None
) -> Path:
    """The folder of a dataset of these objects' views, rendered unless that was done before.

    Raises:
        DatasetError: if there are no objects either: nothing is recognised.
    """
    from fresnel.objects import meshes  # it renders into datasets, so `dataset` can't import it

    assets = meshes.find_assets(root)
    if not assets:
        raise DatasetError(
            f"{root}: not a dataset; want a {MANIFEST} of ours, folders image_0000 ... "
            "with input.png and view_000/rgb.png, a transforms.json, a COLMAP model, CO3D's "
            "frame_annotations.jgz, a folder of such folders, shards with a shards.json, or 3D "
            "objects (.glb .gltf .obj .zip .sh3f or a JSON manifest of them)"
        )
    views, image_size = views or 8, image_size or 128
    said = [[a.name, a.member, a.source.resolve().as_posix(), _stamp(a.source)] for a in assets]
    target = _place(root, cache, [said, views, image_size])
    if not (target / MANIFEST).is_file():
        meshes.render_set(assets, target, views=views, image_size=image_size)
    return target


def unpacked(root: Path, cache: str | Path | None) -> Path:
    """The folder of the dataset that these shards hold, unpacked unless that was done before.

    Raises:
        DatasetError: if a shard is damaged, or not the one whose sha256 was recorded.
    """
    index = shards.index_of(root)
    target = _place(root, cache, index)
    if not (target / MANIFEST).is_file():
        meta = {**index["meta"], "unpacked_from": root.name}
        store(target, shards.checked(root, index), index["background"], meta, False, None)
    return target


def _place(root: Path, cache: str | Path | None, said: object) -> Path:
    key = _layouts.sha256(_layouts.canonical_json(said))[:16]
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    place = Path(cache) if cache is not None else Path(base) / "fresnel"
    return place / f"{root.resolve().stem}-{key}"


def _stamp(path: Path) -> list[int]:
    """Size and time of a file: cheap, and enough to know a cached rendering by."""
    about = path.stat()
    return [about.st_size, about.st_mtime_ns]
