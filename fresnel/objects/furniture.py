"""The furniture set for everyone: Debian's sweethome3d-furniture as multi-view data.

554 objects of the package's five libraries, split by kind of object as assets/furniture.json has
it, checked against pinned sha256 sums.  Libraries are CC0 or CC BY: whoever shows the pictures
names the authors, whom the dataset's ATTRIBUTION.txt lists.
"""

import json
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from fresnel.data.dataset import DatasetError, MultiViewDataset
from fresnel.data.layout import check_target
from fresnel.host.files import own, remove, sha256
from fresnel.objects.assets import Asset, credited, find_assets
from fresnel.objects.render_set import render_set

_LIST = Path(__file__).parents[1] / "assets" / "furniture.json"
_INSIDE_DEB = "usr/share/sweethome3d/furniture"


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
    if not _is(path, want):
        raise DatasetError(
            f"{path}: not the file of sweethome3d-furniture 1.8-1 (sha256 differs). Fetch it again"
        )


def _is(path: Path, want: dict[str, Any]) -> bool:
    sized = path.is_file() and path.stat().st_size == want["bytes"]
    return sized and sha256(path) == want["sha256"]


def make(
    out: str | Path,
    *,
    deb: str | Path | None = None,
    sh3f: str | Path | None = None,
    split: Literal["train", "val", "test"] | None = None,
    more: str | Path | None = None,
    overwrite: bool = False,
    **settings: Any,
) -> MultiViewDataset:
    """Render the set from a package, from its .sh3f files, or (neither given) from apt.

    A call that was stopped goes on where it was.

    Args:
        split: only this one's objects.
        more: other 3D objects (whatever `find_assets` reads) beside the furniture, to train on.
        settings: `render_set`'s.

    Raises:
        DatasetError: if the package can't be had or isn't the pinned one, `more` holds no object,
            or rendering fails.
    """
    target = Path(out)
    check_target(target, overwrite)  # before anything is fetched
    others = [replace(asset, split="train") for asset in find_assets(more)] if more else []
    if more and not others:
        raise DatasetError(f"{more}: holds no 3D objects; want such as `zeroad` writes")
    unpacked, known = target.with_name(f".{target.name}.unpacked-sh3f"), listing()
    folder = Path(sh3f) if sh3f else unpacked / _INSIDE_DEB
    libraries, package = known["libraries"], known["package"]
    if not sh3f and not all(_is(folder / f"{name}.sh3f", libraries[name]) for name in libraries):
        unpacked.mkdir(parents=True, exist_ok=True)
        if not deb:
            for torn in unpacked.glob("*.deb"):  # of a download that was stopped
                torn.unlink()
            _call("apt-get", "download", f"{package['package']}={package['version']}", at=unpacked)
        file = Path(deb or next(unpacked.glob("*.deb"), unpacked))
        _check(file, package)
        _call("dpkg-deb", "--extract", str(file.resolve()), ".", at=unpacked)
    chosen = assets(folder, split) + others
    with own(unpacked):
        made = render_set(chosen, target, overwrite=overwrite, also=credited(chosen), **settings)
    remove(unpacked)
    return made


def _call(*command: str, at: Path) -> None:
    call(
        *command, at=at, file="sweethome3d-furniture_1.8-1_all.deb", inside=_INSIDE_DEB, by="--sh3f"
    )


def call(*command: str, at: Path, file: str, inside: str, by: str) -> None:
    """One of Debian's tools, in a folder; DatasetError where it is not there or fails, with what to
    do: unpack the package's `file`, and pass what is `inside` `by` an option."""
    try:
        subprocess.run(command, cwd=at, capture_output=True, text=True, check=True)
    except FileNotFoundError:
        raise DatasetError(
            f"{command[0]}: not on this machine. Unpack {file} from a "
            f"Debian mirror, and pass {by} with its {inside}"
        ) from None
    except subprocess.CalledProcessError as error:
        said = (error.stderr.strip().splitlines() or ["no word why"])[-1]
        raise DatasetError(
            f"{' '.join(command)}: {said}. Run `apt-get update` first, or pass --deb or {by}"
        ) from None
