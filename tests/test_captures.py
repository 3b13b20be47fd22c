"""One capture in every format and spelling opens to the same poses and pictures, or is refused or
warned of by name."""

import gzip
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pycolmap
import pytest
import torch
from PIL import Image

from fresnel import gate
from fresnel.data import dataset
from fresnel.data.dataset import DatasetError, ObjectViews
from fresnel.objects.assets import embedded_assets
from fresnel.objects.render_set import render_set

SIZE, VIEWS = 32, 5
Y_FROM_Z = np.array([[1, 0, 0, 0], [0, 0, 1, 0], [0, -1, 0, 0], [0, 0, 0, 1.0]])
FLIP = np.diag([1.0, -1, -1, 1])


@pytest.fixture(scope="module")
def truth(tmp_path_factory) -> ObjectViews:
    folder = tmp_path_factory.mktemp("truth") / "set"
    assets = [embedded_assets("train")[0]]
    return render_set(assets, folder, views=VIEWS, image_size=SIZE, samples=1)[0]


def pictures(folder: Path, truth: ObjectViews, name: str = "{:03d}.png") -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    names = [name.format(k) for k in range(VIEWS)]
    for k, file in enumerate(names):  # one ray a pixel: alpha is 0 or 255
        rgba = torch.cat([truth.rgb[k], truth.alpha[k, ..., None]], dim=-1)
        Image.fromarray(rgba.numpy()).save(folder / file)
    return names


def transforms(folder: Path, truth: ObjectViews) -> dict:
    """What nerfstudio would say of it; the caller writes it."""
    viewmats, K = truth.cameras.viewmats.double().numpy(), truth.cameras.Ks[0].tolist()
    frames = [
        {
            "file_path": f"images/{name}",
            "transform_matrix": (np.linalg.inv(viewmat @ Y_FROM_Z) @ FLIP).tolist(),
        }
        for name, viewmat in zip(pictures(folder / "images", truth), viewmats, strict=True)
    ]
    optics = {"fl_x": K[0][0], "fl_y": K[1][1], "cx": K[0][2], "cy": K[1][2]}
    return {"w": SIZE, "h": SIZE, **optics, "frames": frames}


def write(folder: Path, said: dict) -> Path:
    (folder / "transforms.json").write_text(json.dumps(said))
    return folder


def colmap(
    folder: Path, truth: ObjectViews, place: str = "sparse/0", which=range(VIEWS), **how
) -> Path:
    """A text model by hand, or what pycolmap makes of that in binary."""
    name = how.get("name", "{:03d}.png")
    pictures(folder / "images", truth, name)
    model = folder / place
    model.mkdir(parents=True)
    K = truth.cameras.Ks[0].tolist()
    lens = f"PINHOLE {SIZE} {SIZE} {K[0][0]} {K[1][1]} {K[0][2]} {K[1][2]}"
    (model / "cameras.txt").write_text(f"# cameras\n1 {lens}\n")
    lines = []
    for k in which:
        pose = pycolmap.Rigid3d(truth.cameras.viewmats[k].double().numpy()[:3])
        x, y, z, w = pose.rotation.quat
        values = (w, x, y, z, *pose.translation)
        if k == how.get("zero"):
            values = (0, 0, 0, 0, *pose.translation)
        lines.append(f"{k + 1} {' '.join(map(repr, map(float, values)))} 1 {name.format(k)}")
        lines += how.get("second_lines", [""])
    (model / "images.txt").write_text("# images\n" + "\n".join(lines) + "\n")
    (model / "points3D.txt").write_text("")
    if how.get("binary"):
        made = pycolmap.Reconstruction(str(model))
        for file in model.glob("*.txt"):
            file.unlink()
        made.write_binary(str(model))
    return folder


def co3d(folder: Path, truth: ObjectViews) -> Path:
    names = pictures(folder / "cup/seq/images", truth)
    alpha = folder / "cup/seq/masks"
    alpha.mkdir()
    frames = []
    for k, name in enumerate(names):
        Image.fromarray(truth.alpha[k].numpy()).save(alpha / name)
        viewmat = truth.cameras.viewmats[k].double().numpy().copy()
        viewmat[:2] *= -1
        K = truth.cameras.Ks[k].double().numpy()
        point = {
            "R": viewmat[:3, :3].T.tolist(),
            "T": viewmat[:3, 3].tolist(),
            "focal_length": [2 * K[0, 0] / SIZE, 2 * K[1, 1] / SIZE],
            "principal_point": [1 - 2 * K[0, 2] / SIZE, 1 - 2 * K[1, 2] / SIZE],
            "intrinsics_format": "ndc_isotropic",
        }
        image = {"path": f"cup/seq/images/{name}", "size": [SIZE, SIZE]}
        mask = {"path": f"cup/seq/masks/{name}"}
        frames.append({"sequence_name": "seq", "image": image, "mask": mask, "viewpoint": point})
    with gzip.open(folder / "cup/frame_annotations.jgz", "wt") as file:
        json.dump(frames, file)
    return folder / "cup"


def ours(folder: Path, truth: ObjectViews) -> Path:
    return dataset.write(folder / "set", [truth], meta={"source": "test"}).path


def subfolders(folder: Path, truth: ObjectViews) -> Path:
    (folder / "images/left cam").mkdir(parents=True)
    return colmap(folder, truth, name="left cam/{:03d}.png")


def backslashes(said: dict) -> dict:
    for frame in said["frames"]:
        frame["file_path"] = frame["file_path"].replace("/", "\\")
    return said


FORMATS = {
    "ours": ours,
    "transforms": lambda folder, truth: write(folder, transforms(folder, truth)),
    "colmap text": colmap,
    "colmap binary": lambda folder, truth: colmap(folder, truth, binary=True),
    "colmap in sparse/1 alone": lambda folder, truth: colmap(folder, truth, "sparse/1"),
    "names in folders": lambda folder, truth: subfolders(folder, truth),
    "backslashes": lambda folder, truth: write(folder, backslashes(transforms(folder, truth))),
    "names with spaces": lambda folder, truth: colmap(folder, truth, name="IMG ({}) a.png"),
    "names that are numbers": lambda folder, truth: colmap(folder, truth, name="{:04d} 7.png"),
    "no second lines": lambda folder, truth: colmap(folder, truth, second_lines=[]),
    "points in second lines": lambda folder, truth: colmap(
        folder, truth, second_lines=["1.5 2.5 -1 3.25 4.5 7 5.5 6.5 -1 7.5 8.5 -1"]
    ),
    "co3d": co3d,
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_opens_to_the_same_poses_and_pictures(name, truth, tmp_path):
    opened = dataset.open(FORMATS[name](tmp_path, truth))
    views = opened[0]
    turn = np.eye(4)
    about = opened.meta.get("objects", {}).get(opened.names[0])
    if about is not None and about["format"] != "nerfstudio":
        turn[:3, :3] = about["world_from_file"]
    poses = views.cameras.viewmats.double().numpy() @ turn
    assert np.abs(poses - truth.cameras.viewmats.double().numpy()).max() < 2e-6
    assert np.abs(views.cameras.Ks.numpy() - truth.cameras.Ks.numpy()).max() < 1e-4
    assert torch.equal(views.rgb, truth.rgb) and torch.equal(views.alpha, truth.alpha)
    assert not opened.meta.get("warnings")


# --- transforms.json ---------------------------------------------------------------------------


def opened(folder: Path, truth: ObjectViews, change) -> ObjectViews:
    said = transforms(folder, truth)
    change(said)
    return dataset.open(write(folder, said))[0]


def by_angle(said: dict) -> None:
    """The frames' own angle, where the file has a focal length that is wrong."""
    angle = 2 * np.arctan(0.5 * SIZE / said["fl_x"])
    said["fl_x"] = said["fl_y"] = 1.0
    for frame in said["frames"]:
        frame["camera_angle_x"] = frame["camera_angle_y"] = angle


def own_optics(said: dict) -> None:
    for frame in said["frames"]:
        frame |= {key: said[key] for key in ("fl_x", "fl_y", "cx", "cy", "w", "h")}
    said |= {"fl_x": 1.0, "fl_y": 2.0, "cx": 3.0, "cy": 4.0, "w": 5, "h": 6}


def measured(said: dict) -> None:
    del said["w"], said["h"]


@pytest.mark.parametrize("change", [by_angle, own_optics, measured])
def test_a_frames_own_optics_stand_for_the_files(change, truth, tmp_path):
    views = opened(tmp_path, truth, change)
    assert np.abs(views.cameras.Ks.numpy() - truth.cameras.Ks.numpy()).max() < 1e-4


def test_a_description_is_opened_by_its_own_name(truth, tmp_path):
    write(tmp_path, transforms(tmp_path, truth))
    by_name, by_folder = (dataset.open(p) for p in (tmp_path / "transforms.json", tmp_path))
    assert by_name.content_hash == by_folder.content_hash


LENSES = {
    "SIMPLE_RADIAL": {"k1": 0.11},
    "RADIAL": {"k1": 0.1, "k2": -0.05},
    "OPENCV": {"k1": 0.1, "k2": -0.05, "p1": 0.01, "p2": -0.02, "k3": 0.02},
    "OPENCV_FISHEYE": {"k1": 0.1, "k2": -0.05, "k3": 0.02, "k4": 0.01},
    "THIN_PRISM_FISHEYE": {"k1": 0.1, "p1": 0.01, "sx1": 0.02},
    "FOV": {"omega": 0.4},
}


@pytest.mark.parametrize("model", LENSES)
def test_a_lens_is_the_same_in_a_transforms_file_and_in_colmap(model, truth, tmp_path):
    views = opened(tmp_path / "a", truth, lambda s: s.update(camera_model=model, **LENSES[model]))
    colmap(tmp_path / "b", truth)
    name = "FULL_OPENCV" if model == "OPENCV" else model
    K = truth.cameras.Ks[0].double().numpy()
    camera = pycolmap.Camera.create_from_model_name(1, name, K[0, 0], SIZE, SIZE)
    terms = camera.params_info.split(", ")
    optics = {"f": K[0, 0], "fx": K[0, 0], "fy": K[1, 1], "cx": K[0, 2], "cy": K[1, 2]}
    values = {**optics, **LENSES[model], "k": LENSES[model].get("k1")}
    line = " ".join(repr(float(values.get(term) or 0.0)) for term in terms)
    (tmp_path / "b/sparse/0/cameras.txt").write_text(f"1 {name} {SIZE} {SIZE} {line}\n")
    other = dataset.open(tmp_path / "b")[0]
    assert torch.equal(views.rgb, other.rgb)
    assert not torch.equal(views.rgb, truth.rgb), "something was undone"


def test_instant_ngps_fisheye_flag(truth, tmp_path):
    bends = LENSES["OPENCV_FISHEYE"]
    named = opened(
        tmp_path / "a", truth, lambda s: s.update(camera_model="OPENCV_FISHEYE", **bends)
    )
    flagged = opened(tmp_path / "b", truth, lambda s: s.update(is_fisheye=True, **bends))
    assert torch.equal(named.rgb, flagged.rgb) and not torch.equal(named.rgb, truth.rgb)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"equirectangular": True}, "equirectangular pictures are not read"),
        ({"latlong": True}, "latlong pictures"),
        ({"ftheta_p0": 0.5}, "ftheta_p0 pictures"),
        ({"k4": 0.1}, "k4 .* means different things"),
        ({"camera_model": "EQUIRECTANGULAR"}, "camera_model 'EQUIRECTANGULAR'; want one of"),
        ({"camera_model": "FISHEYE624"}, "camera_model 'FISHEYE624'"),
    ],
)
def test_lenses_that_are_not_read_are_named(change, message, truth, tmp_path):
    with pytest.raises(DatasetError, match=f"transforms.json: {message}"):
        opened(tmp_path, truth, lambda said: said.update(change))


@pytest.mark.parametrize("top", [1, 255])
def test_masks_of_ones_are_masks(top, truth, tmp_path):
    def masked(said: dict) -> None:
        (tmp_path / "masks").mkdir()
        for k, frame in enumerate(said["frames"]):
            Image.fromarray(truth.rgb[k].numpy()).save(tmp_path / frame["file_path"])
            frame["mask_path"] = f"masks/{k}.png"
            ones = truth.alpha[k].numpy() // 255 * top
            Image.fromarray(ones.astype(np.uint8)).save(tmp_path / frame["mask_path"])

    assert torch.equal(opened(tmp_path, truth, masked).alpha, truth.alpha)


def scaled(*factors: float):
    def change(said: dict) -> None:
        for frame in said["frames"]:
            matrix = np.array(frame["transform_matrix"])
            matrix[:3, :3] = matrix[:3, :3] @ np.diag(factors)
            frame["transform_matrix"] = matrix.tolist()

    return change


def test_a_scale_in_the_rotations_is_taken_out_and_said(truth, tmp_path):
    said = transforms(tmp_path, truth)
    scaled(2.5, 2.5, 2.5)(said)
    with pytest.warns(UserWarning, match=r"rotations of 5 of 5 views are scaled \(by 2\.5"):
        found = dataset.open(write(tmp_path, said))
    assert torch.allclose(found[0].cameras.viewmats, truth.cameras.viewmats, atol=1e-6)
    assert "scaled" in found.meta["warnings"][0]
    scaled(0.8, 2.0, 1.0)(said)
    with pytest.raises(DatasetError, match="not orthonormal"):
        dataset.open(write(tmp_path, said))


def test_pictures_of_two_formats_are_each_measured(truth, tmp_path):
    """Landscape and portrait, fl_x and no w and h: the middle of each is its own."""

    def mixed(said: dict) -> None:
        del said["w"], said["h"], said["cx"], said["cy"]
        for k, frame in enumerate(said["frames"]):
            size = (SIZE, 2 * SIZE) if k % 2 else (2 * SIZE, SIZE)
            Image.new("RGB", size, (9, 9, 9)).save(tmp_path / frame["file_path"])

    views = opened(tmp_path, truth, mixed)
    middle = torch.tensor([SIZE / 2, SIZE / 2])
    assert torch.allclose(views.cameras.Ks[:, :2, 2], middle.expand(VIEWS, 2))
    assert (views.rgb == 9).all()


def test_an_exif_rotation_is_said_to_be_ignored(truth, tmp_path):
    def turned(said: dict) -> None:
        for frame in said["frames"]:
            exif = Image.Exif()
            exif[0x0112] = 3
            picture = Image.open(tmp_path / frame["file_path"])
            picture.save(tmp_path / frame["file_path"], exif=exif)

    with pytest.warns(UserWarning, match="EXIF rotation of its pictures is ignored"):
        views = opened(tmp_path, truth, turned)
    assert torch.equal(views.rgb, truth.rgb)


def test_a_picture_that_its_exif_data_turn_is_named(truth, tmp_path):
    said = transforms(tmp_path, truth)
    said |= {"w": SIZE, "h": 2 * SIZE, "cx": SIZE / 2, "cy": SIZE}
    for frame in said["frames"]:
        exif = Image.Exif()
        exif[0x0112] = 6
        frame["file_path"] = frame["file_path"].replace(".png", ".jpg")
        Image.new("RGB", (2 * SIZE, SIZE)).save(tmp_path / frame["file_path"], exif=exif)
    with pytest.raises(DatasetError, match="its EXIF data turn it by a quarter"):
        dataset.open(write(tmp_path, said))[0]


# --- COLMAP and names --------------------------------------------------------------------------


@pytest.mark.parametrize("binary", [False, True])
def test_of_several_models_the_largest_is_read(binary, truth, tmp_path):
    colmap(tmp_path, truth, "sparse/0", [0], binary=binary)
    colmap(tmp_path, truth, "sparse/1", [1, 2, 4], binary=binary)
    with pytest.warns(UserWarning) as said:
        found = dataset.open(tmp_path)
    assert found.views_per_object == 3
    text = " ".join(str(one.message) for one in said)
    assert "sparse/0 holds another model, of 1 pictures" in text
    assert "2 pictures in images" in text and "have no pose" in text
    assert len(found.meta["warnings"]) == 2
    assert gate.validate(found, progress=False).notes[:2] == tuple(found.meta["warnings"])


def test_models_without_pictures_or_with_no_rotation_are_named(truth, tmp_path):
    colmap(tmp_path / "a", truth, which=[])
    with pytest.raises(DatasetError, match="no registered image"):
        dataset.open(tmp_path / "a")
    colmap(tmp_path / "b", truth, zero=1)
    with pytest.raises(DatasetError, match=r"quaternion of '001\.png' is 0 0 0 0"):
        dataset.open(tmp_path / "b")


def test_a_zero_quaternion_in_a_binary_model_is_named(truth, tmp_path):
    colmap(tmp_path, truth, binary=True)
    path = tmp_path / "sparse/0/images.bin"
    data = bytearray(path.read_bytes())
    start = data.index(b"001.png") - 4 - 7 * 8  # quaternion, translation, camera, name
    data[start : start + 32] = bytes(32)
    path.write_bytes(data)
    for file in ("frames.bin", "rigs.bin"):
        (tmp_path / "sparse/0" / file).unlink(missing_ok=True)
    with pytest.raises(DatasetError, match=r"001\.png"):
        dataset.open(tmp_path)


def test_a_binary_model_that_claims_more_points_than_it_has_is_refused_at_once(truth, tmp_path):
    colmap(tmp_path, truth, binary=True)
    path = tmp_path / "sparse/0/images.bin"
    data = path.read_bytes()
    for place in (len(data) - 8, 0):  # of the last picture's points, of the pictures
        path.write_bytes(data[:place] + (1 << 41).to_bytes(8, "little") + data[place + 8 :])
        with pytest.raises(DatasetError, match="not a readable COLMAP model"):
            dataset.open(tmp_path)


def test_a_folder_whose_name_is_not_utf8_is_named(truth, tmp_path):
    write(tmp_path, transforms(tmp_path, truth))
    odd = os.fsdecode(os.fsencode(tmp_path.parent) + b"/caf\xe9")
    shutil.copytree(tmp_path, odd)
    with pytest.raises(DatasetError, match=r"not UTF-8\. Rename it"):
        dataset.open(odd)
