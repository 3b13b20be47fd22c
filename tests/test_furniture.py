"""The furniture command, on a package made here with the real one's shape."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import zipfile
from collections import Counter
from pathlib import Path

import pytest

from fresnel.cli import main
from fresnel.data import dataset
from fresnel.data.dataset import DatasetError
from fresnel.objects import furniture, sources
from fresnel.objects.assets import embedded_assets, find_assets

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


def package(path: Path, files: dict[str, bytes], compression: str = "xz") -> Path:
    """A Debian package: an ar archive of debian-binary, control.tar and data.tar."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=f"w:{compression}") as tar:  # type: ignore[call-overload]
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    parts = {"debian-binary": b"2.0\n", "control.tar.xz": b"odd", "data.tar.xz": buffer.getvalue()}
    with path.open("wb") as file:
        file.write(b"!<arch>\n")
        for name, data in parts.items():
            file.write(f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(data):<10}`\n".encode())
            file.write(data + b"\n" * (len(data) % 2))
    return path


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package whose two objects are the list."""
    data = library(tmp_path / "Lib.sh3f").read_bytes()
    deb = package(
        tmp_path / "furniture.deb",
        {
            "./usr/share/sweethome3d/furniture/Lib.sh3f": data,
            "./usr/share/doc/copyright": b"text",
            "./usr/share/sweethome3d/furniture/../../../../evil.sh3f": b"no",
        },
    )

    def about(content: bytes) -> dict:
        return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}

    entry = {"group": "g", "category": "c", "creator": "Somebody", "library": "Lib"}
    chair = {"file": "0", "name": "Chair", "split": "train", "model": "lib/armchair/a.obj"}
    bed = {"file": "1", "name": "Bed", "split": "test", "model": "lib/bed/b.obj"}
    listing = {
        "package": {"package": "p", "version": "1", **about(deb.read_bytes())},
        "libraries": {"Lib": {"copyright": "(c) us", "licence": "CC-BY-3.0", **about(data)}},
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


def test_another_package_is_refused(small, tmp_path):
    data = bytearray(small.read_bytes())
    data[-10] ^= 1
    small.write_bytes(data)
    with pytest.raises(DatasetError, match="sha256 differs"):
        furniture.make(tmp_path / "out", deb=small)
    with pytest.raises(DatasetError, match="no such file"):
        furniture.make(tmp_path / "out", sh3f=tmp_path / "nowhere")
    for content in (b"", b"!<arch>\n", b"!<arch>\nshort", b"PK"):
        (tmp_path / "bad.deb").write_bytes(content)
        with pytest.raises(DatasetError, match=r"bad\.deb"):
            furniture.unpack(tmp_path / "bad.deb", tmp_path)
    odd = package(tmp_path / "odd.deb", {"./usr/share/x": b"x"}, "gz")
    with pytest.raises(DatasetError, match=r"holds no \.sh3f"):
        furniture.unpack(odd, tmp_path)


@pytest.mark.parametrize(
    ("script", "message"),
    [(None, "pass --deb"), ("echo no such package >&2; exit 100", "apt-get download p=1: no such")],
)
def test_without_apt_it_says_what_to_do(script, message, small, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    if script:
        (tmp_path / "apt-get").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "apt-get").chmod(0o755)
    with pytest.raises(DatasetError, match=message):
        furniture.make(tmp_path / "out")


def test_a_download_is_unpacked_and_goes(small, tmp_path, monkeypatch):
    (tmp_path / "apt-get").write_text(f"#!/bin/sh\n/bin/cp {small} p_1.deb\n")
    (tmp_path / "apt-get").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    made = furniture.make(tmp_path / "out" / "set", image_size=8, views=1, split="test")
    assert made.names == ("1__0",)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["set"]


def test_sweet_home_libraries_open_as_they_are(tmp_path):
    assets = find_assets(library(tmp_path / "Lib.sh3f"))
    assert [asset.name for asset in assets] == ["a", "b"]
    assert assets[1].licence == "CC0" and assets[0].attribution == "Armchair by Somebody (unknown)"
    opened = sources.open(tmp_path / "Lib.sh3f", image_size=8, views=1, cache=tmp_path / "cache")
    assert opened.names == ("a__0", "b__0")
