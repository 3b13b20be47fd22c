"""WebDataset shards: tar files of records, written beside any dataset and read as a stream.

A sample is one object; its key is the name up to the first dot, as WebDataset has it:

    image_0000.record.json  image_0000.input.png  image_0000.view_000.rgb.png  ...

that is, the files of our layout with "/" for "." and record.json for what the manifest says of the
object.  Reading keeps one object in memory and never seeks, so pipes do; the webdataset package
reads the same files but is not needed here.  shards.json lists the shards and their sha256.
"""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import IO, Any, Protocol

from fresnel.data.images import DatasetError
from fresnel.data.layout import SCHEMA_VERSION, Record, array, entry, inside, read_json
from fresnel.data.records import ObjectViews, encode_object, read_object
from fresnel.host.files import sha256

INDEX = "shards.json"
_KEY = re.compile(r"image_\d{4,}")
_MAX_MEMBER_BYTES = 1 << 27
_MAX_SAMPLE_BYTES = 1 << 30
_MAX_FILES = 200_000


class _Views(Protocol):
    """As much of a dataset as goes into shards."""

    content_hash: str
    meta: dict[str, Any]
    image_size: int
    views_per_object: int

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> ObjectViews: ...


def write_shards(path: str | Path, dataset: _Views, *, objects_per_shard: int = 100) -> list[Path]:
    """Write a dataset as ``path/shard-000000.tar`` and so on; one object in memory at a time.

    Raises:
        DatasetError: if ``path`` holds something already.
    """
    if objects_per_shard < 1:
        raise ValueError(f"objects_per_shard: got {objects_per_shard}, want at least 1")
    target = Path(path)
    target.mkdir(parents=True, exist_ok=True)
    if any(target.iterdir()):
        raise DatasetError(f"{target}: is not empty. Choose another path")
    shards: list[dict[str, Any]] = []
    for first in range(0, len(dataset), objects_per_shard):
        rows = range(first, min(first + objects_per_shard, len(dataset)))
        partial = target / f".shard-{len(shards):06d}.partial"
        with tarfile.open(partial, "w", format=tarfile.USTAR_FORMAT) as tar:
            for row in rows:
                for name, data in _members(f"image_{row:04d}", dataset[row]):
                    member = tarfile.TarInfo(name)  # no owner, no time: the same bytes every time
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
        file = partial.rename(target / f"shard-{len(shards):06d}.tar")
        shards.append({"file": file.name, "objects": len(rows), "sha256": sha256(file)})
    index = {
        "schema_version": SCHEMA_VERSION,
        "content_hash": dataset.content_hash,
        "image_size": dataset.image_size,
        "views_per_object": dataset.views_per_object,
        "background": (0.0, 0.0, 0.0),
        "meta": dataset.meta,
        "shards": shards,
    }
    (target / INDEX).write_text(json.dumps(index, indent=1))
    return [target / shard["file"] for shard in shards]


def recognises(folder: Path) -> bool:
    return (folder / INDEX).is_file()


def index_of(folder: Path) -> dict[str, Any]:
    """What a folder's shards.json says, checked: its meta and its shards.

    Raises:
        DatasetError: if it is damaged, or leads out of the folder.
    """
    path = inside(folder, INDEX)
    index = read_json(path)
    if index.get("schema_version") != SCHEMA_VERSION:
        raise DatasetError(f"{path}: schema_version is {index.get('schema_version')!r}")
    entry(index, "meta", dict, path)
    for shard in entry(index, "shards", list, path):
        entry(shard, "sha256", str, path)
        if not re.fullmatch(r"[\w.-]+\.tar", file := entry(shard, "file", str, path)):
            raise DatasetError(f"{path}: refuses {file!r}; want the name of a .tar beside it")
    if not index["shards"]:
        raise DatasetError(f"{path}: lists no shards")
    return index


def checked(folder: Path, index: dict[str, Any]) -> Iterator[ObjectViews]:
    """`stream` of the shards that `index_of` lists, each only after its sha256 has been verified.

    Raises:
        DatasetError: if one is missing, was changed, or is damaged.
    """
    for shard in index["shards"]:
        path = inside(folder, shard["file"])
        try:
            digest = sha256(path)
        except OSError as error:
            raise DatasetError(f"{path}: can't be read ({error.strerror})") from None
        if digest != shard["sha256"]:
            raise DatasetError(f"{path}: is not the shard that {INDEX} lists (sha256 differs)")
        yield from _stream(path)


def _members(key: str, views: ObjectViews) -> Iterator[tuple[str, bytes]]:
    record = {
        "name": views.name,
        "attribution": views.attribution,
        "image_size": views.rgb.shape[1],
        "views": len(views.rgb),
    }
    yield f"{key}.record.json", json.dumps(record).encode()
    for file, data in encode_object(views):
        yield f"{key}.{file.replace('/', '.')}", data


def stream(
    source: str | Path | IO[bytes] | Iterable[str | Path | IO[bytes]],
) -> Iterator[ObjectViews]:
    """Objects from shards, in their order, one in memory at a time.

    Args:
        source: a .tar (or .tar.gz), a folder of them, an open binary stream, or several of these.

    Raises:
        DatasetError: if a tar file is damaged, or holds what isn't ours, more than 1 GB an object
            or a link.
    """
    if isinstance(source, str | Path):
        path = Path(source)
        found: list[Path] = sorted(path.glob("*.tar")) if path.is_dir() else [path]
        if not found:
            raise DatasetError(f"{path}: holds no .tar file")
        for shard in found:
            yield from _stream(shard)
    elif hasattr(source, "read"):
        yield from _stream(source)  # type: ignore[arg-type]
    else:
        for one in source:
            yield from stream(one)


def _stream(source: Path | IO[bytes]) -> Iterator[ObjectViews]:
    where = source if isinstance(source, Path) else Path(str(getattr(source, "name", "stream")))
    key, size = "", 0
    files: dict[str, bytes] = {}
    try:
        file = source.open("rb") if isinstance(source, Path) else nullcontext(source)
        with file as data, tarfile.open(fileobj=data, mode="r|*") as tar:
            for member in tar:
                tar.members = []  # type: ignore[attr-defined]  # it remembers every header
                name, _, rest = member.name.partition(".")
                if not member.isreg() or not _KEY.fullmatch(name) or not rest:
                    raise DatasetError(f"{where}: refuses {member.name[:80]!r}: not of this layout")
                if name != key and files:
                    yield _decoded(where, key, files)
                    files, size = {}, 0
                key, size = name, size + member.size
                if member.size > _MAX_MEMBER_BYTES or size > _MAX_SAMPLE_BYTES:
                    raise DatasetError(f"{where}: {name} is too large")
                if len(files) > _MAX_FILES:
                    raise DatasetError(f"{where}: {name} has too many files")
                content = tar.extractfile(member)
                assert content is not None
                files[rest] = content.read()
        if files:
            yield _decoded(where, key, files)
    except FileNotFoundError:
        raise DatasetError(f"{where}: no such file") from None
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DatasetError(f"{where}: not a readable tar file ({error})") from None


def _decoded(where: Path, key: str, files: dict[str, bytes]) -> ObjectViews:
    base = where / key
    about = read_json(base / "record.json", files.pop("record.json", b""))
    name = entry(about, "name", str, base)
    attribution = entry(about, "attribution", str, base, "")
    size, count = (entry(about, key, int, base) for key in ("image_size", "views"))
    background = array({"background": [0, 0, 0], **about}, "background", (3,), base)
    ours = {re.sub(r"^(view_\d{3,})\.", r"\1/", file): data for file, data in files.items()}
    record = Record(name, key, attribution, dict.fromkeys(ours, ""))

    def load(file: str) -> bytes:
        if file not in ours:
            raise DatasetError(f"{where}: {key} has no {file}")
        return ours[file]

    return read_object(base, record, size, count, load, background.tolist())
