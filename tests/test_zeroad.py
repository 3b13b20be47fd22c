"""0 A.D.'s art, on a package made here with the real one's shape."""

import hashlib
import io
import json
import struct
import subprocess
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fresnel.cli import main
from fresnel.data import dataset
from fresnel.data.dataset import DatasetError
from fresnel.objects import zeroad
from fresnel.objects.assets import find_assets
from fresnel.show import credits


def ball(rows: int = 8) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A ball's vertices, places in the skin (v is 1 at the top) and triangles."""
    up, around = np.meshgrid(np.linspace(0, np.pi, rows), np.linspace(0, 2 * np.pi, rows))
    points = np.stack([np.sin(up) * np.cos(around), np.cos(up), np.sin(up) * np.sin(around)], -1)
    places = np.stack([around / (2 * np.pi), 1 - up / np.pi], -1)
    at = np.arange(rows * rows).reshape(rows, rows)
    a, b, c, d = (x.ravel() for x in (at[:-1, :-1], at[:-1, 1:], at[1:, :-1], at[1:, 1:]))
    faces = np.concatenate([np.stack([a, c, b], -1), np.stack([b, c, d], -1)])
    return points.reshape(-1, 3), places.reshape(-1, 2), faces


def pmd(points: np.ndarray, places: np.ndarray, faces: np.ndarray, version: int = 4) -> bytes:
    rows = [
        struct.pack("<8f", *p, *p, *t) + b"\xff" * 4 + bytes(16)
        for p, t in zip(points, places, strict=True)
    ]
    body = struct.pack("<I", len(points)) + (struct.pack("<I", 1) if version == 4 else b"")
    body += b"".join(rows) + struct.pack("<I", len(faces)) + faces.astype("<u2").tobytes()
    body += struct.pack("<II", 0, 0)  # bones, places of props
    return b"PSMD" + struct.pack("<II", version, len(body)) + body


def actor(mesh: str, skin: str, material: str = "player_trans.xml") -> str:
    return (
        f"<actor version='1'><group><variant name='a'><mesh>{mesh}</mesh><textures>"
        f"<texture file='{skin}' name='baseTex'/></textures></variant></group>"
        f"<material>{material}</material></actor>"
    )


@pytest.fixture
def public(tmp_path: Path) -> Path:
    """A public.zip: two balls that share a skin, red above and blue below, and what is left out."""
    skin = Image.new("RGBA", (64, 64), (255, 0, 0, 0))
    skin.paste((0, 0, 255, 0), (0, 32, 64, 64))
    skin.save(dds := io.BytesIO(), "DDS")
    points, places, faces = ball()
    apples = np.concatenate([points * 0.02 + [x, 0, y] for x in (0, 1, 2) for y in (0, 1, 2)])
    scattered = np.concatenate([faces + k * len(points) for k in range(9)])
    meshes = {
        "props/ball.dae.cached.pmd": pmd(points, places, faces),
        "props/old.pmd": pmd(points * [1, 2, 1], places, faces, version=3),
        "props/flat.dae.cached.pmd": pmd(points * [1, 0.001, 1], places, faces),
        "props/few.dae.cached.pmd": pmd(points, places, faces[:8]),
        "props/apples.dae.cached.pmd": pmd(apples, np.tile(places, (9, 1)), scattered),
        "props/torn.dae.cached.pmd": pmd(points, places, faces)[:200],
        "props/wrong.dae.cached.pmd": pmd(points, places, faces + 1),
        "skeletal/man.dae.cached.pmd": pmd(points, places, faces),
    }
    file = tmp_path / "public.zip"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("art/textures/skins/props/skin.png.cached.dds", dds.getvalue())
        for name, data in meshes.items():
            archive.writestr(f"art/meshes/{name}", data)
            said = name.removesuffix(".cached.pmd")
            text = actor(said, "props/skin.png")
            archive.writestr(f"art/actors/props/a_{Path(said).stem}.xml", text)
        leaves = actor("props/ball.dae", "props/skin.png", "basic_trans_wind.xml")
        archive.writestr("art/actors/flora/leaves.xml", leaves)
        archive.writestr("art/actors/props/no_skin.xml", actor("props/ball.dae", "props/no.png"))
        archive.writestr("art/actors/props/torn.xml", "<actor>")
    return file


def test_what_is_whole_becomes_objects_that_are_read_as_any_others(
    public: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "0ad.zip"
    assert main(["zeroad", "--public", str(public), "--out", str(out), "--side", "32"]) == 0
    assert "2 objects at" in capsys.readouterr().out
    found = {asset.name: asset for asset in find_assets(out)}
    assert set(found) == {"props_ball", "props_old"} and found["props_ball"].category == "props"
    assert found["props_ball"].attribution == "a ball by Wildfire Games (CC-BY-SA-3.0)"
    with zipfile.ZipFile(out) as archive:
        assert sorted(archive.namelist()) == sorted(
            ["manifest.json", "skins/0000.jpg"]
            + [f"props_{n}.{end}" for n in ("ball", "old") for end in ("obj", "mtl")]
        ), "a skin is kept once"
        assert Image.open(io.BytesIO(archive.read("skins/0000.jpg"))).size == (32, 32)
        assert {e["split"] for e in json.loads(archive.read("manifest.json"))} == {"train"}
    later = time.localtime(time.time() + 100)
    monkeypatch.setattr(time, "localtime", lambda *_: later)
    zeroad.make(tmp_path / "again.zip", public=public, side=32)
    assert (tmp_path / "again.zip").read_bytes() == out.read_bytes(), "whenever it is made"
    made = tmp_path / "set"
    options = ["--out", str(made), "--size", "32", "--views", "2", "--workers", "1"]
    options += ["--inputs", "2"]
    assert main(["objects", str(out), "--stretch", "1.5", *options]) == 0
    data = dataset.open(made)
    assert len(data) == 4 and "Wildfire Games" in (made / "ATTRIBUTION.txt").read_text()
    (entry,) = credits.credits(["props_ball__1"], data)
    assert entry["title"] == "a ball" and entry["source"] == "0ad-data 0.0.26-1"
    (shown,) = credits.credit_rows([entry])
    assert "/by-sa/3.0/" in shown["licence"] and "debian.org/sid/0ad-data" in shown["source"]
    view = data[0]
    above, below = (
        view.input_rgb[8:14, 16].float().mean(0),
        view.input_rgb[18:24, 16].float().mean(0),
    )
    assert above[0] > 3 * above[2] and below[2] > 3 * below[0], "the skin stands upright"
    assert view.input_alpha.float().mean() > 40, "and its faces look outwards"


def test_nothing_is_replaced_unasked_and_every_failure_says_what_to_do(
    public: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "made.zip"
    zeroad.make(out, public=public)
    first = out.read_bytes()
    with pytest.raises(DatasetError, match="--overwrite replaces it"):
        zeroad.make(out, public=public)
    assert zeroad.make(out, public=public, overwrite=True) == 2 and len(out.read_bytes()) == len(
        first
    )
    with pytest.raises(DatasetError, match=r"want the name of a \.zip"):
        zeroad.make(tmp_path / "made", public=public)
    with zipfile.ZipFile(empty := tmp_path / "empty.zip", "w") as archive:
        archive.writestr("readme.txt", "")
    with pytest.raises(DatasetError, match="holds no mesh with a skin"):
        zeroad.make(tmp_path / "none.zip", public=empty)
    with pytest.raises(DatasetError, match="sha256 differs"):
        zeroad.make(tmp_path / "none.zip", deb=empty)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DatasetError, match=r"apt-get: not on this machine.*--public"):
        zeroad.make(tmp_path / "none.zip")
    assert not (tmp_path / "none.zip").exists()
    for bad in (b"", b"PSMD", b"nope" + bytes(40), b"PSMD" + struct.pack("<III", 2, 0, 0)):
        with pytest.raises(ValueError):
            zeroad.read_pmd(bad)


def test_the_package_is_unpacked(
    public: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = tmp_path / "tree" / Path(zeroad._INSIDE_DEB).parent
    inner.mkdir(parents=True)
    (inner / "public.zip").write_bytes(public.read_bytes())
    control = tmp_path / "tree" / "DEBIAN" / "control"
    control.parent.mkdir()
    control.write_text(
        "Package: 0ad-data\nVersion: 0.0.26-1\nArchitecture: all\nMaintainer: a <a@b.c>\n"
        "Description: test\n"
    )
    deb = tmp_path / "0ad.deb"
    try:
        subprocess.run(["dpkg-deb", "--build", str(tmp_path / "tree"), str(deb)], check=True)
    except FileNotFoundError:
        pytest.skip("not installed: dpkg-deb (Debian: dpkg)")
    monkeypatch.setattr(zeroad, "SHA256", hashlib.sha256(deb.read_bytes()).hexdigest())
    assert zeroad.make(tmp_path / "out.zip", deb=deb) == 2
    assert not list(tmp_path.glob(".out.zip*")), "nothing is left beside it"
