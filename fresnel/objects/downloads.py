"""Objaverse and CO3D, fetched by their owners' own tools; what comes is read like a local copy.

Neither tool is a dependency.  No download was exercised here: Objaverse's hub and CO3D's servers
were out of reach of the machines that this was written on, so these functions are tested against
stand-ins with the owners' signatures (objaverse 0.1.7; CO3D's download_dataset.py of 2022).
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fresnel.data.images import DatasetError
from fresnel.objects.assets import Asset, find_assets


def objaverse(uids: Sequence[str], *, processes: int = 1) -> list[Asset]:
    """Objects of Objaverse 1.0 by their uids, through the Allen Institute's package `objaverse`.

    They go to the package's own cache (~/.objaverse) and are not fetched twice.  Pass them to
    `meshes.render_set`; every object keeps its author and licence, which differ between objects.

    Raises:
        DatasetError: if the package is missing, an object doesn't exist, or the hub can't be
            reached.
    """
    try:
        import objaverse as package
    except ImportError:
        raise DatasetError(
            "objaverse: the owner's package is not installed; run: pip install objaverse"
        ) from None
    wanted = list(dict.fromkeys(uids))
    try:
        paths = package.load_objects(wanted, download_processes=processes)
        about = package.load_annotations(list(paths))
    except (OSError, ValueError, KeyError) as error:
        raise DatasetError(f"objaverse: could not be fetched ({error})") from None
    missing = [uid for uid in wanted if uid not in paths]
    if missing:
        raise DatasetError(f"objaverse: has no object {missing[0]!r} ({len(missing)} are missing)")
    assets = []
    for uid in wanted:
        (asset,) = find_assets(paths[uid])
        known = about.get(uid) or {}
        author = (known.get("user") or {}).get("displayName", "an unknown author")
        licence = str(known.get("license") or "unknown")
        title = known.get("name") or uid
        words = f"{title} by {author} ({licence})"
        assets.append(replace(asset, name=uid, licence=licence, attribution=words, origin=uid))
    return assets


def co3d(
    clone: str | Path,
    folder: str | Path,
    categories: Sequence[str],
    *,
    single_sequences: bool = True,
) -> Path:
    """Categories of CO3D v2 by the script in its owner's repository, facebookresearch/co3d, of
    which `clone` is a checkout; there is no package.  Returns `folder`, for `dataset.open`.

    Args:
        single_sequences: the small subset with one sequence a category; all of it is 5.5 TB.

    Raises:
        DatasetError: if `clone` is no such checkout, no category is named, or the script fails;
            what it has fetched by then stays, and a second call goes on there.
    """
    script, target = Path(clone) / "co3d" / "download_dataset.py", Path(folder)
    if not script.is_file():
        raise DatasetError(f"{script}: no such file; clone facebookresearch/co3d and name it")
    if not categories or not all(name.isalnum() for name in categories):
        raise DatasetError(f"categories: got {list(categories)}, want names such as 'apple'")
    target.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, script.name, "--download_folder", str(target.resolve())]
    command += ["--download_categories", ",".join(categories), "--checksum_check"]
    command += ["--single_sequence_subset"] * single_sequences
    done = subprocess.run(command, cwd=script.parent, check=False)
    if done.returncode:
        raise DatasetError(f"{script}: ended with status {done.returncode}; see what it said above")
    return target
