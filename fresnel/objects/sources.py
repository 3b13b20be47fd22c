"""Where data and images come from: whatever a path holds, as multi-view data or as single images.

3D objects become multi-view data by rendering, once: a rendering is found again by the bytes of
the objects' files (materials and textures too) and by all that it was asked for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from fresnel.data import dataset
from fresnel.data.dataset import DatasetError, InputImages, MultiViewDataset, NotADataset
from fresnel.data.images import as_photographs, image_files
from fresnel.host.machine import cache_dir, project_root
from fresnel.objects import splits
from fresnel.objects.assets import Asset, embedded_assets, find_assets
from fresnel.objects.render_set import fingerprint, render_set

INPUT_SIZE = 128
"""Pixels: rendered inputs are at least this large, which is what the shipped decoders see."""


def data_dir() -> Path:
    """Where datasets go: runs/data in the project, wherever the notebook was started from."""
    return project_root() / "runs" / "data"


def holds_objects(path: str | Path) -> bool:
    """Whether `open` would have to render what is there: 3D objects, or nothing that it knows."""
    return Path(path).exists() and not dataset.recognises(path)


def open(
    path: str | Path,
    *,
    image_size: int | None = None,
    views: int | None = None,
    cache: str | Path | None = None,
) -> MultiViewDataset:
    """Open anything: what `dataset.open` reads (see there), and 3D objects, which are rendered
    once into ``cache`` (`find_assets`: a folder, zip file, .sh3f library or JSON manifest of glTF,
    GLB or OBJ files, or one such file).

    Args:
        image_size: pixels, of captures and objects (None: 128 of objects).
        views: views of a capture, or of an object (None: 8).
        cache: folder for what is rendered (None: the user's, ~/.cache/fresnel).

    Raises:
        DatasetError: if there is nothing that can be read, or it is damaged.
    """
    try:
        return dataset.open(path, image_size=image_size, views=views)
    except NotADataset as error:
        found = find_assets(path)
        if not found:
            raise DatasetError(
                f"{error}, or 3D objects (.glb .gltf .obj .zip .sh3f or a JSON manifest of them)"
            ) from None
    place = Path(cache) if cache is not None else cache_dir()
    name = Path(path).resolve().stem
    return _rendered(found, place, name, views=views or 8, image_size=image_size or 128)


def _rendered(
    assets: Sequence[Asset], place: Path, name: str, images: int = 0, **settings: Any
) -> MultiViewDataset:
    """`render_set` in a folder named by what it is made of: `images` records, all objects alike."""
    settings["inputs_per_object"] = max(1, math.ceil(images / len(assets)))
    path = place / f"{name}-{fingerprint(assets, **settings)}"
    return render_set(assets, path, reuse=True, **settings)


def ground_truth(
    source: str,
    split: str,
    *,
    image_size: int,
    images: int = 0,
    views: int = 8,
    azimuths: Literal["even", "random"] = "even",
    objects: int = 0,
    seed: int = 0,
    samples: int = 4,
    exclude_embedded: bool = False,
    cache: Path | None = None,
) -> MultiViewDataset:
    """Multi-view ground truth of 3D objects: rendered once, found again by its content.

    Args:
        source: "embedded" (the 24 objects that ship), 3D objects (whatever `find_assets` reads), or
            multi-view data in any format that `dataset.open` reads (its views are taken as they
            are).  Of a source that states several splits those of `split` are taken.
        split: "train" or "held_out" for the embedded objects; "train", "val" or "test" of others
            ("held_out" means "test" there).
        images: records, at least one per object: objects are seen from as many input poses as it
            takes (0: one each).
        objects: use only the first so many objects (0: all); of multi-view data too.
        exclude_embedded: leave out the objects that ship with the library, so that a decoder
            trained on the rest has never seen what the main job bootstraps from.
        cache: where renderings lie (None: `data_dir`).
    """
    if source != "embedded" and not holds_objects(source):
        data = dataset.open(source)
        several = len(set(data.meta.get("object_splits", {}).values())) > 1
        data = splits.part(data, split) if several else data
        return splits.first_objects(data, objects) if objects else data
    return _rendered(
        _assets(source, split, exclude_embedded)[: objects or None],
        cache or data_dir(),
        f"truth-{Path(source).stem}-{split}-{image_size}px",
        images,
        views=views,
        image_size=image_size,
        seed=seed,
        samples=samples,
        azimuths=azimuths,
    )


def _assets(source: str, split: str, exclude_embedded: bool) -> list[Asset]:
    """The 3D objects of a source, of one split if it states several."""
    if source == "embedded":
        return embedded_assets(split)
    found = find_assets(source)
    if not found:
        raise DatasetError(f"{source}: neither multi-view data nor 3D objects")
    wanted = "test" if split == "held_out" else split
    if len({asset.split for asset in found}) > 1:
        found = [asset for asset in found if asset.split == wanted]
    if exclude_embedded:
        known = {asset.origin for asset in embedded_assets()}
        found = [asset for asset in found if asset.origin not in known]
    if not found:
        raise DatasetError(f"{source}: holds no object of split {wanted!r}")
    return found


def input_images(
    source: str,
    *,
    images: int,
    image_size: int,
    seed: int = 0,
    elevation_deg: float = 15.0,
    objects: str = "all",
    exclude_embedded: bool = False,
    cache: Path | None = None,
) -> tuple[InputImages, str]:
    """Single images for the bootstrap, and a sentence on where they come from.

    Args:
        source: "embedded" or 3D objects (input views are rendered from the training objects, their
            cameras known), a dataset in our layout (the inputs of its training records), multi-view
            data in another format (the pictures that act as its inputs), or a folder of image
            files.  The last two are photographs: their cameras are assumed, as
            `dataset.load_images` does, because the bootstrap knows one scale and one pivot.
        images: at most so many; rendered objects are seen from as many input poses as it takes.
        image_size: pixels, of photographs as they are read; renders are at least `INPUT_SIZE`.
        elevation_deg: assumed elevation of photographs.
        objects: which objects' images, for sources that know objects: see `splits.part`.
        exclude_embedded: leave out the objects of a .zip that ship with the library.
    """
    name, size = Path(source).name, max(image_size, INPUT_SIZE)
    unknown = source != "embedded" and holds_objects(source)
    if source == "embedded" or (unknown and not image_files(source)):
        assets = _assets(source, "train", exclude_embedded)
        chosen = splits.choose([asset.name for asset in assets], objects)[:images]
        assets = [asset for asset in assets if asset.name in chosen]
        if not assets:
            raise DatasetError(f"{source}: has no objects {objects!r} to train on")
        where = f"truth-{Path(source).stem}-train-{size}px"
        options: dict[str, Any] = {"views": 1, "image_size": size, "seed": seed}
        truth = _rendered(assets, cache or data_dir(), where, images, **options)
        # Every object once before any twice: a prefix of the inputs is a varied sample.
        order = sorted(range(len(truth)), key=lambda i: (int(truth.names[i].rsplit("__", 1)[1]), i))
        what = "embedded, CC0" if source == "embedded" else name
        said = f"{images} rendered input views of {len(assets)} training objects ({what})"
        return truth.inputs()[order[:images]], said
    if unknown:
        inputs = dataset.load_images(source, size, elevation_deg=elevation_deg)[:images]
        said = f"{len(inputs)} images from {name}, elevation assumed"
    else:
        data = dataset.open(source)
        if data.layout == "fresnel":
            data = splits.part(ground_truth(source, "train", image_size=image_size), objects)
            inputs = data.subset(slice(images)).inputs()
            return inputs, f"{len(inputs)} input views of {name}, objects: {objects}"
        inputs = as_photographs(data.subset(slice(images)).inputs(), size, elevation_deg)
        said = f"{len(inputs)} pictures of {name}, cameras assumed"
    if objects != "all":
        raise ValueError(f"objects: got {objects!r}, but {source} is a folder of photographs")
    return inputs, said
