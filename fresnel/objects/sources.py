"""Where data and images come from: whatever a path holds, and parts of its objects by name.

3D objects become multi-view data by rendering, once: a rendering is found again by the bytes of
the objects' files (materials and textures too) and by all that it was asked for.

The training objects are halved once, by name: A gives multi-view truth to the decoder, B is seen
as single images only, which is what a bootstrap starts from.  Test objects are seen by nobody.
"""

import functools
import hashlib
import math
import re
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from fresnel.data import dataset, photos
from fresnel.data.dataset import DatasetError, InputImages, MultiViewDataset, NotADataset
from fresnel.data.images import as_photographs, image_files
from fresnel.data.layout import making, object_name, replaced
from fresnel.host.files import sha256
from fresnel.host.machine import cache_dir, runs_dir
from fresnel.objects import furniture
from fresnel.objects.assets import Asset, credited, embedded_assets, find_assets
from fresnel.objects.render_set import fingerprint, render_set

INPUT_SIZE = 128
"""Pixels: rendered inputs are at least this large, which is what the shipped decoders see."""
HEADS = {
    split: Path(__file__).parents[1] / "assets" / f"heads_{split}.zip"
    for split in ("train", "held_out")
}
"""The embedded heads: multi-view data, 16 people from 8 sides, and 8 others from 12."""
EMBEDDED = {"objects": "embedded", "faces": "heads"}
"""Domain -> the source of it that ships."""
PARTS = (
    '"all", "train", "val", "test", "unshipped", "A", "B", "A<n>" or "rest<n>" (such as "A50", '
    '"rest50")'
)


def data_dir() -> Path:
    """Where datasets go: runs/data in the project, wherever the notebook was started from."""
    return runs_dir() / "data"


def embedded_heads(split: str, cache: Path | None = None) -> MultiViewDataset:
    """The heads that ship, of "train" or "held_out" ("test"), unpacked once into ``cache``
    (None: `data_dir`)."""
    name = "train" if split == "train" else "held_out"
    archive = HEADS[name]
    target = (cache or data_dir()) / f"heads-{name}-{sha256(archive)[:12]}"
    with making(target, overwrite=False, reuse=True) as wanted:
        if wanted:
            with replaced(target) as folder, zipfile.ZipFile(archive) as packed:
                packed.extractall(folder)
    return dataset.open(target)


def of_domain(source: str, domain: str) -> str:
    """The source meant where a notebook's says "embedded": what ships of that domain."""
    if domain not in EMBEDDED:
        raise ValueError(f"domain: got {domain!r}, want 'objects' or 'faces'")
    return EMBEDDED[domain] if source == "embedded" else source


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
    name, place = Path(path).resolve().stem, Path(cache or cache_dir())
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
        source: "embedded" (the 24 objects that ship), "heads" (the 24 people that ship, with the
            views that they have), 3D objects (whatever `find_assets` reads), or multi-view data in
            any format that `dataset.open` reads (its views are taken as they are).  Of a source
            that states several splits those of `split` are taken.
        split: "train" or "held_out" for the embedded objects; "train", "val" or "test" of others
            ("held_out" means "test" there).
        images: records, at least one per object: objects are seen from as many input poses as it
            takes (0: one each).
        objects: use only the first so many objects (0: all); of multi-view data too.
        exclude_embedded: leave out the objects that ship with the library, so that a decoder
            trained on the rest has never seen what the main job bootstraps from.
        cache: where renderings lie (None: `data_dir`).
    """
    if source == "heads" or (source != "embedded" and not holds_objects(source)):
        data = embedded_heads(split, cache) if source == "heads" else dataset.open(source)
        if len(set(data.meta.get("object_splits", {}).values())) > 1:
            data = part(data, split)
        return _only(data, _objects(data)[: objects or None])
    assets = _assets(source, split, exclude_embedded)[: objects or None]
    name = f"truth-{Path(source).stem}-{split}-{image_size}px"
    settings = {"views": views, "image_size": image_size, "seed": seed, "samples": samples}
    return _rendered(assets, cache or data_dir(), name, images, azimuths=azimuths, **settings)


def render_objects(
    out: str | Path, *, source: str | Path, split: str | None = None, **settings: Any
) -> MultiViewDataset:
    """Render somebody's 3D objects as multi-view data, with whom to thank in ATTRIBUTION.txt.

    Args:
        source: whatever `find_assets` reads.
        split: only this one, where the source states any.
        settings: `render_set`'s.

    Raises:
        DatasetError: if it holds no such object, or rendering fails.
    """
    found = [asset for asset in find_assets(source) if split in (None, "all", asset.split)]
    if not found:
        raise DatasetError(
            f"{source}: holds no 3D objects{f' of split {split!r}' if split else ''}"
        )
    return render_set(found, out, also=credited(found), **settings)


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
    elevation_deg: float | None = None,
    objects: str = "all",
    exclude_embedded: bool = False,
    cache: Path | None = None,
    domain: str = "objects",
) -> tuple[InputImages, str]:
    """Single images for the bootstrap, and a sentence on where they come from.

    Args:
        source: "embedded", "heads" (the people that ship, to train on), or 3D objects (input views
            are rendered from the training objects, their cameras known), a dataset in our layout
            (the inputs of its training records), multi-view data in another format (the pictures
            that act as its inputs), or a folder of image files.  The last two are photographs:
            their cameras are assumed, as `photos.read` does, because the bootstrap knows
            one scale and one pivot.
        images: at most so many; rendered objects are seen from as many input poses as it takes.
        image_size: pixels, of photographs as they are read; renders are at least `INPUT_SIZE`.
        elevation_deg: assumed elevation of photographs (None: of their domain).
        objects: which objects' images, for sources that know objects: see `part`.
        exclude_embedded: leave out the objects of a .zip that ship with the library.
        domain: of photographs: "objects", or "faces", which are framed as heads.
    """
    if source == "heads":
        heads = part(embedded_heads("train", cache), objects).subset(slice(images))
        return heads.inputs(), f"{len(heads)} portraits of synthetic people (embedded, CC0)"
    name, size = Path(source).name, max(image_size, INPUT_SIZE)
    unknown = source != "embedded" and holds_objects(source)
    if source == "embedded" or (unknown and not image_files(source)):
        assets = _assets(source, "train", exclude_embedded)
        chosen = choose([asset.name for asset in assets], objects)[:images]
        assets = [asset for asset in assets if asset.name in chosen]
        if not assets:
            raise DatasetError(f"{source}: has no objects {objects!r} to train on")
        where, place = f"truth-{Path(source).stem}-train-{size}px", cache or data_dir()
        truth = _rendered(assets, place, where, images, views=1, image_size=size, seed=seed)
        # Every object once before any twice: a prefix of the inputs is a varied sample.
        order = sorted(range(len(truth)), key=lambda i: (int(truth.names[i].rsplit("__", 1)[1]), i))
        what = "embedded, CC0" if source == "embedded" else name
        said = f"{images} rendered input views of {len(assets)} training objects ({what})"
        return truth.inputs()[order[:images]], said
    data = None if unknown else dataset.open(source)
    if data is not None and data.layout == "fresnel":
        data = part(ground_truth(source, "train", image_size=image_size), objects)
        inputs = data.subset(slice(images)).inputs()
        return inputs, f"{len(inputs)} input views of {name}, objects: {objects}"
    if objects != "all":
        raise ValueError(f"objects: got {objects!r}, but {source} is a folder of photographs")
    if data is None:
        inputs, assumed = photos.read_folder(
            source, size, elevation_deg=elevation_deg, most=images, domain=domain
        )
        return inputs, f"{len(inputs)} images from {name}. Assumed: {assumed}"
    elevation_deg = photos.ELEVATION_DEG[domain] if elevation_deg is None else elevation_deg
    inputs = as_photographs(data.subset(slice(images)).inputs(), size, elevation_deg)
    return inputs, f"{len(inputs)} pictures of {name}, cameras assumed"


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
    names = _objects(data)
    chosen = choose(names, objects, data.meta.get("object_splits"))
    if not chosen:
        raise DatasetError(f"{data.path}: has no objects {objects!r}; it has {len(names)} in all")
    return _only(data, chosen)


def _objects(data: MultiViewDataset) -> list[str]:
    return list(dict.fromkeys(map(object_name, data.names)))


def _only(data: MultiViewDataset, objects: Iterable[str]) -> MultiViewDataset:
    known = set(objects)
    rows = [i for i, name in enumerate(data.names) if object_name(name) in known]
    return data if len(rows) == len(data) else data.subset(rows)


def choose(
    names: Sequence[str], objects: str, splits: Mapping[str, str] | None = None
) -> list[str]:
    """The names (of objects) that belong to a part, in their order; see `part`.

    Args:
        splits: name -> "train", "val" or "test"; names it doesn't know count as "train".
    """
    if objects == "all":
        return list(names)
    of = {name: (splits or {}).get(name, "train") for name in names}
    if objects in ("train", "val", "test", "held_out"):
        want = "test" if objects == "held_out" else objects
        return [name for name in names if of[name] in (want, objects)]
    training = [name for name in names if of[name] == "train"]
    if objects == "unshipped":
        return [name for name in training if name not in _furniture()[1]]
    found = re.fullmatch(r"(A)(\d*)|(B)|rest(\d+)", objects)
    if found is None:
        raise ValueError(f"objects: got {objects!r}, want {PARTS}")
    in_a = [name for name in sorted(training, key=_rank) if _rank(name)[0] < 0.5]
    count = int(found[2] or found[4] or len(in_a))
    if count > len(in_a):
        raise DatasetError(f"objects: {objects!r} asks for {count}, A has {len(in_a)} here")
    first = set(in_a[:count])
    return [name for name in training if (name in first) == bool(found[1])]


def _rank(name: str) -> list[float]:
    """Where an object stands in the order that halves the set, two numbers in [0, 1).

    Objects of one kind ("office chair 3") come together, as in the furniture set's own split, so
    that no near-duplicate of an object in A is in B; other data have their names alone.
    """
    texts = (_furniture()[0].get(name, name), name)
    digests = (hashlib.sha256(text.encode()).digest() for text in texts)
    return [int.from_bytes(digest[:6], "big") / 2**48 for digest in digests]


@functools.cache
def _furniture() -> tuple[dict[str, str], set[str]]:
    """Of the furniture set: object -> kind, and the objects that are embedded in the library."""
    listed, origins = furniture.listing()["objects"], {asset.origin for asset in embedded_assets()}
    shipped = {e["file"] for e in listed if f"{e['library']}/{e['model']}" in origins}
    return {entry["file"]: entry["group"] for entry in listed}, shipped


def require_apart(training: Iterable[str], held_out: Iterable[str]) -> None:
    """Training and held-out records must not share an object.

    Raises:
        DatasetError: names the first that both have.
    """
    both = {*map(object_name, training)} & {*map(object_name, held_out)}
    if both:
        raise DatasetError(
            f"object {min(both)!r} is in the training data and among the held-out objects; "
            f"choose another truth_source, or objects={PARTS}"
        )
