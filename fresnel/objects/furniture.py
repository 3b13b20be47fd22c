"""The furniture set for everyone: Debian's sweethome3d-furniture as multi-view data.

554 objects of the package's five libraries, split into train, val and test by kind of object; the
list is in assets/furniture.json.  Their OBJ models are read as they are, and what is read is
checked against pinned sha256 sums.  Libraries are CC0 or CC BY: whoever shows the pictures names
the authors, whom the dataset's ATTRIBUTION.txt lists.
"""

from __future__ import annotations

import contextlib
import io
import json
import lzma
import os
import re
import shutil
import subprocess
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from fresnel.data.dataset import DatasetError, MultiViewDataset
from fresnel.data.writing import check_target
from fresnel.host.files import sha256, write_atomic
from fresnel.objects.assets import Asset
from fresnel.objects.render_set import render_set

_LIST = Path(__file__).parents[1] / "assets" / "furniture.json"
_INSIDE_DEB = "usr/share/sweethome3d/furniture/"


def listing() -> dict[str, Any]:
    """The committed list: ``package``, ``libraries`` and ``objects``."""
    return json.loads(_LIST.read_text(encoding="utf-8"))


def assets(sh3f: str | Path, split: str | None = None) -> list[Asset]:
    """The objects of the list, read from a folder with the package's five .sh3f files.

    Args:
        split: "train", "val", "test", or None for all.

    Raises:
        DatasetError: if a file is missing or not the one that the list was made from.
    """
    folder, known = Path(sh3f), listing()
    libraries = known["libraries"]
    for name, library in libraries.items():
        _check(folder / f"{name}.sh3f", library)
    return [
        Asset(
            name=entry["file"],
            source=folder / f"{entry['library']}.sh3f",
            split=entry["split"],
            licence=libraries[entry["library"]]["licence"],
            attribution=attribution(entry, libraries[entry["library"]]),
            category=entry["category"],
            member=entry["model"],
            origin=f"{entry['library']}/{entry['model']}",
        )
        for entry in known["objects"]
        if split in (None, entry["split"])
    ]


def attribution(entry: dict[str, Any], library: dict[str, Any]) -> str:
    """Title, author, holder of the rights and licence of an object of the list, in one line."""
    who = f"{entry['creator']}, {library['copyright']}"
    return f"{entry['name']} by {who} ({library['licence']})"


def _check(path: Path, want: dict[str, Any]) -> None:
    if not path.is_file():
        raise DatasetError(f"{path}: no such file; want it from sweethome3d-furniture 1.8-1")
    if path.stat().st_size != want["bytes"] or sha256(path) != want["sha256"]:
        raise DatasetError(
            f"{path}: not the file of sweethome3d-furniture 1.8-1 (sha256 differs). Fetch it again"
        )


def make(
    out: str | Path,
    *,
    deb: str | Path | None = None,
    sh3f: str | Path | None = None,
    split: Literal["train", "val", "test"] | None = None,
    overwrite: bool = False,
    **settings: Any,
) -> MultiViewDataset:
    """Render the set from a package, from its .sh3f files, or (neither given) from apt.

    A call that was stopped goes on where it was.

    Args:
        settings: `render_set`'s.

    Raises:
        DatasetError: if the package can't be had or isn't the pinned one, or rendering fails.
    """
    target = Path(out)
    check_target(target, overwrite)  # before anything is fetched
    given = contextlib.nullcontext(Path(sh3f)) if sh3f else None
    with given or _unpacked(target, Path(deb) if deb else None) as folder:
        chosen = assets(folder, split)
        made = render_set(chosen, target, overwrite=overwrite, **settings)
    lines = sorted({asset.attribution for asset in chosen})
    (target / "ATTRIBUTION.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return made


@contextlib.contextmanager
def _unpacked(target: Path, deb: Path | None) -> Iterator[Path]:
    """The .sh3f files in a hidden folder beside ``target``, which goes when all is done."""
    folder = target.parent / f".{target.name}.sh3f"
    folder.mkdir(parents=True, exist_ok=True)
    known = listing()
    if not all((folder / f"{name}.sh3f").is_file() for name in known["libraries"]):
        package = deb or _download(folder, known["package"])
        _check(package, known["package"])
        unpack(package, folder)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def _download(folder: Path, package: dict[str, Any]) -> Path:
    command = ["apt-get", "download", f"{package['package']}={package['version']}"]
    try:
        subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
        return next(folder.glob("*.deb"))
    except FileNotFoundError:
        raise DatasetError(
            "apt-get: not on this machine. Fetch sweethome3d-furniture_1.8-1_all.deb from a Debian "
            "mirror and pass --deb"
        ) from None
    except subprocess.CalledProcessError as error:
        said = (error.stderr.strip().splitlines() or ["no word why"])[-1]
        raise DatasetError(
            f"{' '.join(command)}: {said}. Run `apt-get update` first, or pass --deb"
        ) from None


def unpack(deb: Path, folder: Path) -> list[Path]:
    """The .sh3f files of a Debian package (ar around a tar file), into ``folder``.

    Raises:
        DatasetError: if it is no such package, or holds none of them.
    """
    found = []
    try:
        with tarfile.open(fileobj=io.BytesIO(_member_of_ar(deb, "data.tar"))) as tar:
            for member in tar:
                name = re.fullmatch(rf"(?:\./)?{_INSIDE_DEB}(\w+\.sh3f)", member.name)
                source = tar.extractfile(member) if name and member.isreg() else None
                if name and source:
                    write_atomic(folder / name[1], source.read())
                    found.append(folder / name[1])
    except (OSError, tarfile.TarError, lzma.LZMAError, zlib.error, EOFError, ValueError) as error:
        raise DatasetError(f"{deb}: can't be unpacked ({error})") from None
    if not found:
        raise DatasetError(f"{deb}: holds no .sh3f file")
    return found


def _member_of_ar(path: Path, stem: str) -> bytes:
    """The member of an ar archive (60-byte headers, even offsets) named ``stem`` and something."""
    with path.open("rb") as file:
        if file.read(8) != b"!<arch>\n":
            raise ValueError("not a Debian package")
        while len(header := file.read(60)) == 60:
            size = int(header[48:58])
            if header.startswith(stem.encode()):
                return file.read(size)
            file.seek(size + size % 2, os.SEEK_CUR)
    raise ValueError(f"a package without {stem}")
