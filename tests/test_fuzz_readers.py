"""Whatever a file says, a reader answers or refuses: no crash, nothing executed, nothing outside.

FRESNEL_FUZZ=5000 looks longer; FRESNEL_FUZZ_SEED=random elsewhere each time.
"""

import copy
import gzip
import io
import json
import os
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hostile
import numpy as np
import pycolmap
import pytest
import torch
import trimesh
from boxes import views_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from fresnel import orbit
from fresnel.data import captures, dataset, formats, layout, records
from fresnel.data.dataset import DatasetError
from fresnel.data.formats import captures_in
from fresnel.host import files
from fresnel.objects import obj, trace
from fresnel.objects.assets import find_assets

COUNT = int(os.environ.get("FRESNEL_FUZZ", "40"))
fuzz = settings(
    max_examples=COUNT,
    deadline=None,
    derandomize=os.environ.get("FRESNEL_FUZZ_SEED") != "random",
    database=None,
    suppress_health_check=list(HealthCheck),
)
PATHS = ["", "..", "../../etc/passwd", "/etc/passwd", "C:\\x", "a\0b", "NaN", "images", "x" * 2000]
ODD = st.one_of(
    *(st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats()),
    *(st.sampled_from(PATHS), st.text(max_size=8), st.just([]), st.just({})),
    *(st.just([[0.0] * 4] * 4), st.just([[1e308] * 4] * 4), st.just([[float("nan")] * 3] * 3)),
    *(st.just([1e39, -1e39, 0]), st.just([10**400] * 3)),
)


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) of a JSON value."""
    for key, inner in list(value.items() if isinstance(value, dict) else enumerate(value)):
        yield value, key
        if isinstance(inner, dict | list):
            yield from places(inner)


@st.composite
def damaged(draw: st.DrawFn, sound: Any) -> Any:
    """A JSON value with up to three places replaced or removed."""
    value = copy.deepcopy(sound)
    for _ in range(draw(st.integers(1, 3))):
        if not (found := list(places(value))):
            break
        container, key = found[draw(st.integers(0, len(found) - 1))]
        if draw(st.booleans()) and draw(st.booleans()):
            del container[key]
        else:
            container[key] = copy.deepcopy(draw(ODD))
    return value


@st.composite
def bent(draw: st.DrawFn, sound: bytes) -> bytes:
    """Bytes with a few flipped, cut or repeated."""
    data = bytearray(sound)
    for _ in range(draw(st.integers(1, 6))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        kind = draw(st.sampled_from(["flip", "flip", "big", "cut", "grow"]))
        if kind == "flip" and data:
            data[at] = draw(st.integers(0, 255))
        elif kind == "big":
            data[at : at + 8] = b"\xff" * draw(st.integers(1, 8))
        elif kind == "cut":
            del data[at : at + draw(st.integers(1, 64))]
        else:
            data[at:at] = data[at : at + 32]
    return bytes(data)


def refuses_or(read: Callable[[], Any]) -> None:
    """Only DatasetError may come out."""
    try:
        read()
    except DatasetError as error:
        assert str(error)


def read_first(path: Path) -> None:
    views = dataset.open(path)[0]
    assert views.cameras.viewmats.isfinite().all() and views.cameras.Ks.isfinite().all()
    assert views.pivot.isfinite().all()


@pytest.fixture
def photos(pictures: Path) -> Iterator[Path]:
    """A folder of pictures, without any description."""
    yield pictures
    for path in (pictures / "transforms.json", pictures / "frame_annotations.jgz"):
        path.unlink(missing_ok=True)
    for path in pictures.glob("sparse/0/*"):
        path.unlink()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    (folder / "images").mkdir()
    (folder / "sparse/0").mkdir(parents=True)
    noise = np.random.default_rng(0).integers(0, 255, (3, 8, 10, 3), dtype=np.uint8)
    for k in range(3):
        Image.fromarray(noise[k]).save(folder / f"images/{k}.png")
    Image.fromarray(np.full((8, 10), 200, np.uint8)).save(folder / "mask.png")
    return folder


def pose(k: int) -> list[list[float]]:
    return [[1, 0, 0, k], [0, 1, 0, 0.5], [0, 0, 1, 3], [0, 0, 0, 1]]


TRANSFORMS = {
    **{"camera_model": "OPENCV", "fl_x": 12.0, "w": 10, "h": 8, "k1": 0.01, "p1": 0.0},
    "frames": [
        {"file_path": f"images/{k}.png", "mask_path": "mask.png", "transform_matrix": pose(k)}
        for k in range(3)
    ],
}
VIEWPOINT = {"focal_length": [2.0, 2.0], "principal_point": [0.0, 0.0], "R": np.eye(3).tolist()}
VIEWPOINT["intrinsics_format"] = "ndc_isotropic"
FRAMES = [
    {
        "sequence_name": "s",
        "image": {"path": f"cat/images/{k}.png", "size": [8, 10]},
        "mask": {"path": "cat/mask.png"},
        "viewpoint": {**VIEWPOINT, "T": [0.0, float(k), 2.0]},
    }
    for k in range(3)
]


def described(photos: Path, value: Any) -> Path:
    (photos / "transforms.json").write_text(json.dumps(value))
    return photos


@pytest.mark.filterwarnings("ignore::UserWarning")
@fuzz
@given(description=damaged(TRANSFORMS), data=bent(json.dumps(TRANSFORMS).encode()))
def test_transforms(photos, description, data):
    refuses_or(lambda: read_first(described(photos, description)))
    (photos / "transforms.json").write_bytes(data)
    refuses_or(lambda: captures_in(photos))


@fuzz
@given(frames=damaged(FRAMES), data=bent(gzip.compress(json.dumps(FRAMES).encode(), mtime=0)))
def test_co3d(photos, frames, data):
    path = photos / "frame_annotations.jgz"
    path.write_bytes(gzip.compress(json.dumps(frames).encode()))
    refuses_or(lambda: read_first(photos))
    path.write_bytes(data)
    refuses_or(lambda: captures_in(photos))


def test_a_gzip_bomb_is_refused(photos, monkeypatch):
    for module in (layout, formats):
        monkeypatch.setattr(module, "MAX_JSON_BYTES", 1 << 20)
    whole = gzip.compress(b" " * (1 << 19))
    for data, message in ((whole * 3, "more than"), (whole[:-9], "can't be read")):
        (photos / "frame_annotations.jgz").write_bytes(data)
        with pytest.raises(DatasetError, match=message):
            captures_in(photos)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("model")
    made = pycolmap.Reconstruction()
    camera = pycolmap.Camera(camera_id=1, model="PINHOLE", width=10, height=8, params=[9, 9, 5, 4])
    made.add_camera_with_trivial_rig(camera)
    for k in range(3):
        image = pycolmap.Image(name=f"{k}.png", camera_id=1, image_id=k + 1)
        made.add_image_with_trivial_frame(image, pycolmap.Rigid3d(np.array(pose(k))[:3]))
    made.write_binary(str(folder))
    made.write_text(str(folder))
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.filterwarnings("ignore::UserWarning")
@settings(fuzz, max_examples=max(6, COUNT // 10))
@given(data=st.data())
def test_colmap(photos, model, data):
    suffix = data.draw(st.sampled_from([".bin", ".txt"]))
    files = {name: text for name, text in model.items() if name.endswith(suffix)}
    name = data.draw(st.sampled_from(sorted(files)))
    files[name] = data.draw(bent(files[name]))
    for path in photos.glob("sparse/0/*"):
        path.unlink()
    for name, text in files.items():
        (photos / "sparse/0" / name).write_bytes(text)
    refuses_or(lambda: read_first(photos))


@pytest.mark.parametrize(
    "rows",
    [
        "1 1 0 0 0 0 0 3 1 0.png\n\n2 1 0 0 0 1 0 3 1 0.png\n",
        "\u00b2 1 0 0 0 0 0 3 1 0.png\n",
        "1 1 0 0 0 0 0 \udcff 1 0.png\n",
        "1 1 0 0 0 nan 0 3 1 0.png\n",
        "1 1 0 0 0 0 0 3 1 ../../0.png\n",
    ],
)
def test_text_models_of_strange_rows(photos, model, rows):
    for name in ("cameras.txt", "points3D.txt"):
        (photos / "sparse/0" / name).write_bytes(model[name])
    (photos / "sparse/0/images.txt").write_text(rows, "utf-8", "surrogateescape")
    with pytest.raises(DatasetError):
        dataset.open(photos)


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ours") / "set"
    return dataset.write(folder, [views_of(0, size=8, views=2)], meta={}).path


@fuzz
@given(data=st.data())
def test_manifests_and_poses(ours, data):
    path = ours / "image_0000/view_001/pose.json"
    changed = data.draw(damaged(json.loads(path.read_bytes())))
    refuses_or(lambda: records.camera_of(path, changed, 8, 8))
    sound = (ours / "manifest.json").read_bytes()
    try:
        (ours / "manifest.json").write_text(json.dumps(data.draw(damaged(json.loads(sound)))))
        refuses_or(lambda: read_first(ours))
    finally:
        (ours / "manifest.json").write_bytes(sound)


KINDS = ("PNG RGBA", "JPEG RGB", "GIF P", "TIFF L", "WEBP RGB", "BMP RGB")


@pytest.mark.filterwarnings("ignore::UserWarning")
@fuzz
@given(data=st.data())
def test_pictures(data, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "picture"
    kind, mode = data.draw(st.sampled_from(KINDS)).split()
    Image.new(mode, (9, 7)).save(buffer := io.BytesIO(), kind)
    path.write_bytes(data.draw(bent(buffer.getvalue())))
    refuses_or(lambda: dataset.load_image(path))


def glb(header: Any, body: bytes) -> bytes:
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 4)
    size = 12 + 8 + len(text) + len(body)
    return struct.pack("<4sIIII", b"glTF", 2, size, len(text), 0x4E4F534A) + text + body


def split_glb() -> tuple[Any, bytes]:
    whole = trimesh.creation.box().export(file_type="glb")
    (size,) = struct.unpack_from("<I", whole, 12)
    return json.loads(whole[20 : 20 + size]), whole[20 + size :]


def render_one(path: Path) -> None:
    try:
        solid = trace.load(path).normalised()
    except ValueError as error:  # `render_set` names the object
        assert str(error)
        return
    camera = orbit(torch.tensor([0.0]), 0.0, 2.2, pivot=(0, 0, 0), focal_px=9, width=8, height=8)
    assert trace.render(solid, camera, samples=1).rgb.isfinite().all()


@fuzz
@given(header=damaged(split_glb()[0]), data=bent(glb(*split_glb())))
def test_glb(header, data, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "fuzz.glb"
    for content in (glb(header, split_glb()[1]), data):
        path.write_bytes(content)
        render_one(path)


OBJ = b"mtllib a.mtl\nusemtl m\nv 0 0 0\nv 1 0 0\nv 0 1 0\nvt 0 0\nf 1/1 2/1 3/1\nf 1 2 3\n"


@fuzz
@given(data=bent(OBJ))
def test_obj(data, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "fuzz.obj"
    path.with_name("a.mtl").write_text("newmtl m\nKd 1 0 0\nmap_Kd ../../secret.png\n")
    path.write_bytes(data)
    render_one(path)


ENTRIES = [{"file": "a.glb", "name": "A", "split": "train", "license": "CC0", "creator": "me"}]


def zipped(path: Path, entries: Any) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(zipfile.ZipInfo("manifest.json"), json.dumps(entries))
        archive.writestr(zipfile.ZipInfo("a.glb"), b"glTF" * 20)
    return path


@fuzz
@given(entries=damaged(ENTRIES), data=st.data())
def test_lists_of_objects_and_zip_files(entries, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("list")
    (folder / "a.glb").write_bytes(b"glTF")
    (folder / "manifest.json").write_text(json.dumps(entries))
    cut = zipped(folder / "b.zip", ENTRIES)
    cut.write_bytes(data.draw(bent(cut.read_bytes())))
    for path in (folder, zipped(folder / "a.zip", entries), cut):
        refuses_or(lambda: [asset.read() for asset in find_assets(path)])  # noqa: B023


def framed(**changes: Any) -> dict[str, Any]:
    return {**TRANSFORMS, "frames": [{**TRANSFORMS["frames"][0], **changes}]}


def test_paths_out_of_the_folder_are_refused(photos, tmp_path):
    for path in ("../../etc/passwd", "/etc/passwd", "images/../../x.png", "C:/x.png"):
        for key in ("file_path", "mask_path"):
            with pytest.raises(DatasetError, match="refuses"):
                captures_in(described(photos, framed(**{key: path})))
    (tmp_path / "images").mkdir()
    (tmp_path / "images/0.png").symlink_to(photos / "images/0.png")
    with pytest.raises(DatasetError, match="leads out"):
        dataset.open(described(tmp_path, framed(mask_path=None)))
    (tmp_path / "b").mkdir()
    (tmp_path / "b/secret.mtl").write_text("newmtl m\nKd 1 0 0\n")
    (tmp_path / "c").mkdir()
    obj = "mtllib ../b/secret.mtl\nusemtl m\nv 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 3\n"
    (tmp_path / "c/a.obj").write_text(obj)
    colors = trace.load(tmp_path / "c/a.obj").colors
    assert not np.allclose(colors[..., 1], 0)  # the red material was not read
    gltf = {"asset": {"version": "2.0"}, "buffers": [{"uri": "../b/secret.mtl", "byteLength": 4}]}
    (tmp_path / "c/a.gltf").write_text(json.dumps(gltf))
    with pytest.raises(ValueError, match=r"a\.gltf|no triangle"):
        (trace.load(tmp_path / "c/a.gltf"))


def test_singular_and_mirrored_poses_say_so(photos):
    for matrix, message in (
        (np.zeros((4, 4)), "end in 0 0 0 1"),
        (np.diag([0.0, 0, 0, 1]), "singular"),
        (np.diag([-1.0, 1, 1, 1]), "not orthonormal"),
        (np.diag([2.0, 2, 1, 1]), "not orthonormal"),
        (np.full((4, 4), np.nan), "want finite numbers"),
    ):
        with pytest.raises(DatasetError, match=message):
            captures_in(described(photos, framed(transform_matrix=matrix.tolist())))


def test_too_many_views_are_refused(photos, monkeypatch):
    assert captures.MAX_VIEWS == formats.MAX_VIEWS == 50_000
    monkeypatch.setattr(formats, "MAX_VIEWS", 2)
    with pytest.raises(DatasetError, match="3 frames, the limit is 2"):
        dataset.open(described(photos, TRANSFORMS))
    monkeypatch.undo()
    monkeypatch.setattr(captures, "MAX_RECORD_BYTES", 100)
    with pytest.raises(DatasetError, match="doesn't fit"):
        dataset.open(photos)


def test_hostile_meshes_and_depths_are_refused_in_bounds():
    """A sample of what `python tests/hostile.py` makes: 200 of them, of every kind."""
    for name, said, memory, seconds in hostile.cases(
        6, 1, ["gltf_sizes", "gltf_repeated", "depth_arrays"]
    ):
        assert said[0] == "refused", (name, said)
        assert memory < hostile.MOST_BYTES and seconds < hostile.MOST_S, (name, memory, seconds)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("v 0 0 0\n" * 3 + "f 1 2 3\n" * 11, "over 10 triangles"),  # counted before a line is read
        ("v 0 0 0\n" * 3 + " f" + " 1" * 41, "line 4 can't be read.*over 10 triangles"),
        ("v 0 0 0\n" * 62, "over 10 triangles"),
        ("v 0 0 0\nv 0 1 0\nv 0 0 1\n" + "usemtl {0}\nf 1 2 3\n" * 3, "3 materials"),
        ("v 0 0 0\n" + "f" + " 1" * 1001, "polygons of 1001"),
    ],
)
def test_what_a_mesh_in_text_asks_for_is_bounded(monkeypatch, text, said):
    faces = 300 if "polygons" in said else 10
    for name, most in (("MAX_FACES", faces), ("_MOST_MATERIALS", 2), ("_MOST_WORK", 1e6)):
        monkeypatch.setattr(obj, name, most)
    numbered = "".join(f"{part}{k}" for k, part in enumerate(text.split("{0}")))
    with pytest.raises(ValueError, match=said):
        obj.read(numbered.encode(), lambda name: None)
    box = "v 0 0 0\nv 0 1 0\nv 0 0 1\nf 1 2 3\n"
    assert len(obj.read(box.encode(), lambda name: None).corners) == 1


def test_json_is_counted_before_it_is_parsed(monkeypatch, tmp_path):
    """A list takes some 100 bytes of memory, two of text."""
    monkeypatch.setattr(files, "_MOST", 100_000)
    for text in (
        "[" * 1000 + "]" * 1000,
        "[" + "{}," * 500 + "1]",
        '["' + "\\u4e00" * 9_000 + '"]',
    ):
        with pytest.raises(ValueError, match="it would take about"):
            files.from_json(text.encode())
    assert files.from_json(b"[" * 300 + b"]" * 300)
    (tmp_path / "transforms.json").write_text('{"frames": [' + "[]," * 900 + "[]]}")
    with pytest.raises(DatasetError, match=r"transforms\.json.*would take"):
        dataset.open(tmp_path)


def test_scans_of_a_jpeg_are_counted_before_it_is_decoded(tmp_path):
    """Each is decoded over the whole picture: a hundred are ten times what a camera writes."""
    stream = io.BytesIO()
    Image.new("RGB", (32, 32), "red").save(stream, "JPEG", progressive=True)
    data = stream.getvalue()
    last = data[data.rfind(b"\xff\xda") : -2]
    for more, fits in ((80, True), (120, False)):
        (tmp_path / "a.jpg").write_bytes(data[:-2] + last * more + data[-2:])
        if fits:
            assert dataset.load_image(tmp_path / "a.jpg")
        else:
            with pytest.raises(DatasetError, match="over 100 scans"):
                dataset.load_image(tmp_path / "a.jpg")
