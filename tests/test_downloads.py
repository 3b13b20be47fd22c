"""The owners' downloaders, stood in for by modules and scripts with their signatures."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from fresnel.data import dataset
from fresnel.data.dataset import DatasetError
from fresnel.objects import downloads, meshes

ASSETS = Path(dataset.__file__).parents[1] / "assets"


def test_objaverse(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    glb = str(ASSETS / "teddy_bear.glb")
    calls: list[object] = []

    def load_objects(uids: list[str], download_processes: int = 1) -> dict[str, str]:
        calls.append((uids, download_processes))
        return {uid: glb for uid in uids if uid != "lost"}

    def load_annotations(uids: list[str]) -> dict[str, dict[str, object]]:
        return {uids[0]: {"name": "Bear", "license": "by", "user": {"displayName": "Ada"}}}

    package = SimpleNamespace(load_objects=load_objects, load_annotations=load_annotations)
    monkeypatch.setitem(sys.modules, "objaverse", package)
    found = downloads.objaverse(["u1", "u2", "u1"], processes=3)
    assert calls == [(["u1", "u2"], 3)]
    assert [(a.name, a.licence, a.attribution) for a in found] == [
        ("u1", "by", "Bear by Ada (by)"),
        ("u2", "unknown", "u2 by an unknown author (unknown)"),
    ]
    made = meshes.render_set(found, tmp_path / "set", views=1, image_size=8, samples=1, workers=1)
    assert made.names == ("u1__0", "u2__0") and made[0].attribution == "Bear by Ada (by)"
    with pytest.raises(DatasetError, match="no object 'lost'"):
        downloads.objaverse(["u1", "lost"])

    def offline(*_: object, **__: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(package, "load_objects", offline)
    with pytest.raises(DatasetError, match="no route"):
        downloads.objaverse(["u1"])
    monkeypatch.setitem(sys.modules, "objaverse", None)
    with pytest.raises(DatasetError, match="pip install objaverse"):
        downloads.objaverse(["u1"])


def test_co3d(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="clone facebookresearch/co3d"):
        downloads.co3d(tmp_path, tmp_path / "data", ["apple"])
    script = tmp_path / "co3d" / "download_dataset.py"
    script.parent.mkdir()
    script.write_text("import sys\nopen('said', 'w').write(' '.join(sys.argv[1:]))\n")
    with pytest.raises(DatasetError, match="categories"):
        downloads.co3d(tmp_path, tmp_path / "data", [])
    target = downloads.co3d(tmp_path, tmp_path / "data", ["apple", "car"])
    assert (script.parent / "said").read_text() == (
        f"--download_folder {target.resolve()} --download_categories apple,car "
        "--checksum_check --single_sequence_subset"
    )
    script.write_text("raise SystemExit(3)\n")
    with pytest.raises(DatasetError, match="status 3"):
        downloads.co3d(tmp_path, tmp_path / "data", ["apple"], single_sequences=False)
