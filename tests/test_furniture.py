"""The furniture command, on a package made here with the real one's shape."""

import hashlib
import json
import shutil
import subprocess
import zipfile
from collections import Counter
from pathlib import Path

import pytest

from fresnel.cli import main
from fresnel.data import dataset
from fresnel.data.dataset import DatasetError
from fresnel.objects import furniture, sources
from fresnel.objects.assets import embedded_assets, find_assets

needs_dpkg = pytest.mark.skipif(not shutil.which("dpkg-deb"), reason="makes a Debian package")
OBJ = (
    "mtllib a.mtl\nusemtl m\nv 0 0 0\nv 1 0 0\nv 0 {h} 0\nv 0 0 1\n"
    "f 1 2 3\nf 1 3 4\nf 1 2 4\nf 2 3 4\n"
)
CATALOGUE = """id#1=A
name#1=Armchair
model#1=/lib/armchair/a.obj
category#1=Office
creator#1=Somebody
id#2=B
name#2=Bed
model#2=/lib/bed/b.obj
creator#2=Nobody
license#2=CC0
id#3=C
model#3=../../etc/passwd.obj
"""


def library(path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("PluginFurnitureCatalog.properties", CATALOGUE)
        archive.writestr("lib/armchair/A.MTL", "newmtl m\nKd 0.8 0.1 0.1\n")
        archive.writestr("lib/armchair/a.obj", OBJ.format(h=2))
        archive.writestr("lib/bed/b.obj", OBJ.format(h=0.5))
    return path


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package whose two objects are the list."""
    inner = tmp_path / "tree" / "usr/share/sweethome3d/furniture"
    inner.mkdir(parents=True)
    shutil.copy(library(tmp_path / "Lib.sh3f"), inner)
    control, deb = tmp_path / "tree" / "DEBIAN" / "control", tmp_path / "furniture.deb"
    control.parent.mkdir()
    fields = {"Package": "p", "Version": "1", "Architecture": "all", "Description": "x"}
    control.write_text("".join(f"{k}: {v}\n" for k, v in fields.items()) + "Maintainer: me\n")
    command = ["dpkg-deb", "--build", tmp_path / "tree", deb]
    subprocess.run(command, check=True, capture_output=True)

    def about(file: Path) -> dict:
        content = file.read_bytes()
        return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}

    entry = {"group": "g", "category": "c", "creator": "Somebody", "library": "Lib"}
    chair = {"file": "0", "name": "Chair", "split": "train", "model": "lib/armchair/a.obj"}
    bed = {"file": "1", "name": "Bed", "split": "test", "model": "lib/bed/b.obj"}
    rights = {"copyright": "(c) us", "licence": "CC-BY-3.0"}
    listing = {
        "package": {"package": "p", "version": "1", **about(deb)},
        "libraries": {"Lib": {**rights, **about(tmp_path / "Lib.sh3f")}},
        "objects": [{**entry, **chair}, {**entry, **bed}],
    }
    (tmp_path / "list.json").write_text(json.dumps(listing))
    monkeypatch.setattr(furniture, "_LIST", tmp_path / "list.json")
    return deb


def test_the_list_is_whole():
    known = furniture.listing()
    assert len(known["objects"]) == 554 and len(known["libraries"]) == 5
    splits = Counter(entry["split"] for entry in known["objects"])
    assert splits == {"train": 446, "val": 30, "test": 78}
    of_group: dict[str, set[str]] = {}
    for entry in known["objects"]:
        assert entry["creator"] and entry["library"] in known["libraries"]
        of_group.setdefault(entry["group"], set()).add(entry["split"])
    assert all(len(splits) == 1 for splits in of_group.values())
    assert all(len(library["sha256"]) == 64 for library in known["libraries"].values())
    # What ships with the library can be known again among them.
    origins = {f"{entry['library']}/{entry['model']}" for entry in known["objects"]}
    assert {asset.origin for asset in embedded_assets()} <= origins


@needs_dpkg
def test_from_a_package(small, tmp_path, capsys):
    out = tmp_path / "out" / "set"
    options = ["--out", str(out), "--size", "16", "--views", "2"]
    assert main(["furniture", "--deb", str(small), *options]) == 0
    made = dataset.open(out)
    made.verify()
    assert made.names == ("0__0", "1__0") and (made.image_size, made.views_per_object) == (16, 2)
    assert made[0].attribution == "Chair by Somebody, (c) us (CC-BY-3.0)"
    assert "Bed by Somebody" in (out / "ATTRIBUTION.txt").read_text()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["set"]
    assert made[0].alpha.float().mean() > 5
    rgb = made[0].rgb[made[0].alpha == 255].float()
    assert rgb[:, 0].mean() > 2 * rgb[:, 1].mean()  # its material was found, whatever its case
    assert main(["furniture", "--deb", str(small), *options]) == 2
    assert "exists" in capsys.readouterr().err
    again = furniture.make(tmp_path / "again", sh3f=tmp_path, image_size=16, views=2)
    assert again.content_hash == made.content_hash


def test_other_objects_beside_it_are_to_train_on(small, tmp_path, capsys):
    more = library(tmp_path / "Other.sh3f")
    options = ["--sh3f", str(tmp_path), "--split", "train", "--more", str(more), "--inputs", "2"]
    options += ["--size", "16", "--views", "2", "--out", str(tmp_path / "set")]
    assert main(["furniture", *options]) == 0
    made = dataset.open(tmp_path / "set")
    assert made.meta["object_splits"] == dict.fromkeys("0ab", "train")
    assert len(made) == 6 and "Bed by Nobody" in (tmp_path / "set/ATTRIBUTION.txt").read_text()
    (tmp_path / "none").mkdir()
    options[5] = str(tmp_path / "none")
    assert main(["furniture", *options, "--overwrite"]) == 2
    assert "none: holds no 3D objects" in capsys.readouterr().err
    dataset.open(tmp_path / "set").verify()


@needs_dpkg
def test_another_package_is_refused(small, tmp_path):
    small.write_bytes(small.read_bytes()[:-1] + b"x")
    for given, message in (
        ({"deb": small}, "sha256 differs"),
        ({"deb": tmp_path / "gone.deb"}, "no such file"),
        ({"sh3f": tmp_path / "nowhere"}, "no such file"),
    ):
        with pytest.raises(DatasetError, match=message):
            furniture.make(tmp_path / "out", **given)


@needs_dpkg
@pytest.mark.parametrize(
    ("script", "message"),
    [
        (None, "not on this machine.* pass --sh3f"),
        ("echo no such package >&2; exit 100", "apt-get download p=1: no such"),
        ("/bin/cp {} p_1.deb", ""),
    ],
)
def test_from_apt_or_it_says_what_to_do(script, message, small, tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "dpkg-deb").symlink_to(shutil.which("dpkg-deb"))
    if script:
        (tmp_path / "bin" / "apt-get").write_text(f"#!/bin/sh\n{script.format(small)}\n")
        (tmp_path / "bin" / "apt-get").chmod(0o755)
    path = f":{'/usr/bin:/bin'}" if script else ""  # dpkg-deb calls tar
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{path}")
    if message:
        with pytest.raises(DatasetError, match=message):
            furniture.make(tmp_path / "out" / "set")
        return
    made = furniture.make(tmp_path / "out" / "set", image_size=8, views=1, split="test")
    assert made.names == ("1__0",)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["set"], "nothing is left"


def test_sweet_home_libraries_open_as_they_are(tmp_path):
    assets = find_assets(library(tmp_path / "Lib.sh3f"))
    assert [asset.name for asset in assets] == ["a", "b"]
    assert assets[1].licence == "CC0" and assets[0].attribution == "Armchair by Somebody (unknown)"
    opened = sources.open(tmp_path / "Lib.sh3f", image_size=8, views=1, cache=tmp_path / "cache")
    assert opened.names == ("a__0", "b__0")
