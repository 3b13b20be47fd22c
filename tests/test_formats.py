"""Other tools' formats: written here by independent code, opened, and compared point by point."""

from __future__ import annotations

import gzip
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fresnel.data import captures as captured
from fresnel.data import dataset
from fresnel.data.dataset import DatasetError, ObjectViews
from fresnel.objects.assets import embedded_assets
from fresnel.objects.render_set import render_set

SIZE, VIEWS = 48, 6
POINTS = np.random.default_rng(0).uniform(-0.4, 0.4, (40, 3))


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory) -> ObjectViews:
    """An embedded object, rendered."""
    folder = tmp_path_factory.mktemp("truth") / "set"
    asset = embedded_assets("train")[0]
    return render_set([asset], folder, views=VIEWS, image_size=SIZE)[0]


def project(viewmats, Ks, points: np.ndarray) -> np.ndarray:
    """Pixels (V, N, 2) of world points (N, 3)."""
    viewmats, Ks = np.asarray(viewmats, np.float64), np.asarray(Ks, np.float64)
    seen = np.einsum("vij,nj->vni", viewmats[:, :3, :3], points) + viewmats[:, None, :3, 3]
    pixels = np.einsum("vij,vnj->vni", Ks, seen)
    return pixels[..., :2] / pixels[..., 2:]


def same_pixels(opened: dataset.MultiViewDataset, truth: ObjectViews, turn=None, index=0) -> None:
    """Points reproject as they should; ``turn`` takes truth's world to the file's."""
    views = opened[index]
    about = opened.meta["objects"][opened.names[index]]
    points = POINTS if turn is None else POINTS @ np.asarray(turn).T
    ours = points @ np.array(about["world_from_file"]).T
    want = project(truth.cameras.viewmats, truth.cameras.Ks, POINTS)
    got = project(views.cameras.viewmats, views.cameras.Ks, ours)
    assert np.abs(got - want).max() < 1e-4
    assert torch.equal(views.rgb, truth.rgb) and torch.equal(views.alpha, truth.alpha)


def save_views(folder: Path, truth: ObjectViews, name: str = "{:03d}.png") -> list[str]:
    """RGBA pictures with straight colours; those of translucent pixels are rounded."""
    names = []
    for k in range(len(truth.rgb)):
        alpha = truth.alpha[k].numpy()[..., None]
        straight = np.where(alpha > 0, truth.rgb[k].numpy() * 255.0 / np.maximum(alpha, 1), 0)
        path = folder / name.format(k)
        path.parent.mkdir(parents=True, exist_ok=True)
        rgba = np.concatenate([straight.round().clip(0, 255), alpha], axis=-1).astype(np.uint8)
        Image.fromarray(rgba).save(path)
        names.append(name.format(k))
    return names


def z_up(truth: ObjectViews) -> list[list[list[float]]]:
    """OpenGL camera-to-world matrices in a world whose Z is up."""
    y_to_z = np.array([[1, 0, 0, 0], [0, 0, -1, 0], [0, 1, 0, 0], [0, 0, 0, 1.0]])
    flip = np.diag([1.0, -1, -1, 1])
    return [
        (y_to_z @ np.linalg.inv(viewmat) @ flip).tolist()
        for viewmat in truth.cameras.viewmats.double().numpy()
    ]


TURN_Z = np.array([[1, 0, 0], [0, 0, -1], [0, 1, 0.0]])


def nerfstudio(folder: Path, truth: ObjectViews, **top: object) -> Path:
    names = save_views(folder / "images", truth)
    K = truth.cameras.Ks[0]
    frames = [
        {"file_path": f"images/{name}", "transform_matrix": matrix}
        for name, matrix in zip(names, z_up(truth), strict=True)
    ]
    description = {
        "camera_model": "OPENCV",
        "fl_x": K[0, 0].item(),
        "fl_y": K[1, 1].item(),
        "cx": K[0, 2].item(),
        "cy": K[1, 2].item(),
        "w": SIZE,
        "h": SIZE,
        "frames": frames,
    }
    (folder / "transforms.json").write_text(json.dumps({**description, **top}))
    return folder


def edit(path: Path, change: Callable[[dict], object]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


# --- transforms.json ---------------------------------------------------------------------------


def test_nerfstudio(truth, tmp_path):
    opened = dataset.open(nerfstudio(tmp_path / "lego", truth))
    assert (opened.layout, opened.names, len(opened)) == ("captures", ("lego",), 1)
    assert (opened.image_size, opened.views_per_object) == (SIZE, VIEWS)
    same_pixels(opened, truth, TURN_Z)
    # Its world is ours again, and the cameras' axes meet where the object is.
    views = opened[0]
    assert torch.allclose(views.cameras.viewmats, truth.cameras.viewmats, atol=1e-6)
    assert views.pivot.norm() < 1e-4
    assert opened.meta["alpha_source"] == "file"
    about = opened.meta["objects"]["lego"]
    assert about["pivot_source"] == "nearest point to the optical axes"
    assert about["input"] == "images/000.png"
    assert torch.equal(views.input_rgb, views.rgb[0])
    tensors = opened.tensors()
    assert tensors.rgb.shape == (1, VIEWS, SIZE, SIZE, 3)
    opened.verify()
    (tmp_path / "lego/images/003.png").write_bytes((tmp_path / "lego/images/002.png").read_bytes())
    with pytest.raises(dataset.DatasetChanged, match=r"images/003\.png: was changed"):
        opened.verify()


def test_blender_without_extensions_in_three_files(truth, tmp_path):
    save_views(tmp_path / "train", truth, "r_{}.png")
    angle = 2 * math.atan(0.5 * SIZE / truth.cameras.Ks[0, 0, 0].item())
    matrices = z_up(truth)
    for part, rows in (("train", (0, 1, 2)), ("val", (3,)), ("test", (4, 5))):
        frames = [{"file_path": f"./train/r_{k}", "transform_matrix": matrices[k]} for k in rows]
        text = json.dumps({"camera_angle_x": angle, "frames": frames})
        (tmp_path / f"transforms_{part}.json").write_text(text)
    same_pixels(dataset.open(tmp_path), truth, TURN_Z)


def test_intrinsics_of_each_frame_jpeg_and_masks(truth, tmp_path):
    folder = nerfstudio(tmp_path / "scene", truth, camera_model="PINHOLE")
    for k in range(VIEWS):
        picture = Image.open(folder / f"images/{k:03d}.png")
        picture.convert("RGB").save(folder / f"images/{k:03d}.jpg", quality=98, subsampling=0)
        (folder / "masks").mkdir(exist_ok=True)
        picture.getchannel("A").save(folder / f"masks/{k:03d}.png")

    def change(top: dict) -> None:
        own = {key: top.pop(key) for key in ("fl_x", "fl_y", "cx", "cy", "w", "h")}
        for k, frame in enumerate(top["frames"]):
            frame |= own
            frame["file_path"] = f"images/{k:03d}.jpg"
            frame["mask_path"] = f"masks/{k:03d}.png"

    edit(folder / "transforms.json", change)
    opened = dataset.open(folder)
    views = opened[0]
    assert opened.meta["alpha_source"] == "mask"
    assert torch.equal(views.alpha, truth.alpha)
    assert (views.rgb.int() - truth.rgb.int()).abs().float().mean() < 2
    assert torch.allclose(views.cameras.Ks, truth.cameras.Ks)


def test_photographs_are_cropped_and_scaled_copies_keep_their_poses(truth, tmp_path):
    folder = nerfstudio(tmp_path / "photos", truth, w=2 * 64, h=2 * SIZE, cx=64.0, cy=float(SIZE))
    noise = np.random.default_rng(1).integers(0, 255, (VIEWS, SIZE, 64, 3), dtype=np.uint8)
    for k in range(VIEWS):
        Image.fromarray(noise[k]).save(folder / f"images/{k:03d}.png")
    opened = dataset.open(folder)
    views = opened[0]
    assert opened.meta["alpha_source"] == "none" and bool((views.alpha == 255).all())
    assert opened.image_size == SIZE
    assert torch.equal(views.rgb, torch.from_numpy(noise[:, :, 8:56]))
    K = views.cameras.Ks[0]
    assert K[0, 0].item() == pytest.approx(truth.cameras.Ks[0, 0, 0].item() / 2)
    assert K[0, 2].item() == pytest.approx(SIZE / 2) and K[1, 2].item() == pytest.approx(SIZE / 2)
    small = dataset.open(folder, image_size=16, views=3)
    assert small[0].rgb.shape == (3, 16, 16, 3)
    assert small[0].cameras.Ks[0, 0, 2].item() == pytest.approx(8)
    assert small.content_hash != opened.content_hash
    with pytest.raises(DatasetError, match="has 6 views, views asks 7"):
        dataset.open(folder, views=7)


LENSES = {
    "OPENCV": {"k1": -0.25, "k2": 0.08, "p1": 0.01, "p2": -0.02},
    "OPENCV_FISHEYE": {"k1": 0.05, "k2": -0.02, "k3": 0.01, "k4": 0.0},
}


def through_lens(picture: np.ndarray, K: np.ndarray, model: str, terms: dict) -> np.ndarray:
    """What a lens makes of an ideal picture: its model is undone by search, pixel by pixel."""
    height, width = picture.shape[:2]
    u, v = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    xd, yd = (u - K[0, 2]) / K[0, 0], (v - K[1, 2]) / K[1, 1]
    x, y = xd.copy(), yd.copy()
    for _ in range(60):
        if model == "OPENCV":
            r2 = x * x + y * y
            radial = 1 + terms["k1"] * r2 + terms["k2"] * r2 * r2
            dx = 2 * terms["p1"] * x * y + terms["p2"] * (r2 + 2 * x * x)
            dy = terms["p1"] * (r2 + 2 * y * y) + 2 * terms["p2"] * x * y
            x, y = (xd - dx) / radial, (yd - dy) / radial
        else:
            r = np.hypot(x, y)
            theta = np.arctan(r)
            bend = theta * (1 + terms["k1"] * theta**2 + terms["k2"] * theta**4)
            bend += terms["k3"] * theta**7 + terms["k4"] * theta**9
            scale = r / np.maximum(bend, 1e-9)
            x, y = xd * scale, yd * scale
    column = np.clip(x * K[0, 0] + K[0, 2] - 0.5, 0, width - 1.001)
    row = np.clip(y * K[1, 1] + K[1, 2] - 0.5, 0, height - 1.001)
    i, j = row.astype(int), column.astype(int)
    a, b = (row - i)[..., None], (column - j)[..., None]
    top = picture[i, j] * (1 - b) + picture[i, j + 1] * b
    bottom = picture[i + 1, j] * (1 - b) + picture[i + 1, j + 1] * b
    return top * (1 - a) + bottom * a


@pytest.mark.parametrize("model", LENSES)
def test_distortion_is_undone(tmp_path, model):
    """A smooth picture with colours that tell where each pixel is comes back straight."""
    side, K = 96, np.array([[70.0, 0, 46], [0, 72.0, 50], [0, 0, 1]])
    y, x = np.mgrid[:side, :side] / side
    ideal = np.stack([40 + 180 * x, 40 + 180 * y, 120 + 80 * np.sin(9 * x * y)], axis=-1)
    bent = through_lens(ideal, K, model, LENSES[model])
    assert np.abs(bent - ideal).max() > 5
    (tmp_path / "a").mkdir()
    for k in range(2):
        Image.fromarray(bent.round().astype(np.uint8)).save(tmp_path / f"a/{k}.png")
    eye = np.eye(4)
    frames = []
    for k in range(2):
        eye[0, 3] = k
        frames.append({"file_path": f"{k}.png", "transform_matrix": eye.tolist()})
    top = {"camera_model": model, "fl_x": 70, "fl_y": 72, "cx": 46, "cy": 50, "w": 96, "h": 96}
    (tmp_path / "a/transforms.json").write_text(
        json.dumps({**top, **LENSES[model], "frames": frames})
    )
    opened = dataset.open(tmp_path / "a")
    views = opened[0]
    inside = (views.alpha[0] == 255).numpy()
    inside[:12], inside[-12:], inside[:, :12], inside[:, -12:] = 0, 0, 0, 0
    assert inside.mean() > 0.5 and opened.meta["undistorted"]
    error = np.abs(views.rgb[0].numpy() - ideal)[inside]
    assert error.max() < 2.5 and error.mean() < 0.5
    assert np.allclose(views.cameras.Ks[0], K)


@pytest.mark.parametrize(
    "lens",
    [
        ("PINHOLE", ()),
        ("SIMPLE_RADIAL", (-0.2,)),
        ("RADIAL", (0.1, -0.05)),
        ("OPENCV", (-0.25, 0.08, 0.01, -0.02)),
        ("FULL_OPENCV", (-0.25, 0.08, 0.01, -0.02, 0.01, 0.02, 0.01, 0.0)),
        ("FOV", (0.8,)),
        ("OPENCV_FISHEYE", (0.05, -0.02, 0.01, 0.0)),
        ("THIN_PRISM_FISHEYE", (0.05, -0.02, 0.01, 0.01, 0.0, 0.0, 0.001, 0.002)),
    ],
)
def test_every_lens_is_undone_as_colmap_does(lens):
    rays = np.random.default_rng(0).uniform(-0.6, 0.6, (200, 2))
    import pycolmap

    focals = [100.0] if lens[0] in ("SIMPLE_RADIAL", "RADIAL") else [100.0, 100.0]
    camera = pycolmap.Camera(
        model=lens[0], width=200, height=200, params=[*focals, 90.0, 110.0, *lens[1]]
    )
    want = camera.img_from_cam(np.concatenate([rays, np.ones((200, 1))], axis=1))
    assert np.abs(captured.distorted(rays, lens) * 100 + [90, 110] - want).max() < 1e-6
    middle = np.zeros((1, 2))
    assert np.abs(captured.distorted(middle, lens)).max() < 1e-9


def test_rays_beyond_a_lens_fold_have_no_place_in_the_picture():
    radius = np.linspace(0.01, 3, 300)
    rays = np.stack([radius, 0 * radius], axis=1)
    bent = captured.distorted(rays, ("SIMPLE_RADIAL", (-0.3,)))[:, 0]
    fold = (1 / 0.9) ** 0.5  # where d/dr of r - 0.3 r^3 is 0
    assert np.isfinite(bent[radius < fold - 0.01]).all()
    assert np.isnan(bent[radius > fold + 0.01]).all()


def test_export_replaces_nothing_but_an_export(truth, tmp_path):
    written = dataset.write(tmp_path / "set", [truth], meta={})
    target = dataset.export(tmp_path / "out", [written[0]])
    assert dataset.export(target, [written[0]], overwrite=True) == target
    (target / "letter.txt").write_text("dear")
    with pytest.raises(DatasetError, match="is not of ours"):
        dataset.export(target, [written[0]], overwrite=True)
    assert (target / "letter.txt").read_text() == "dear"
    with pytest.raises(DatasetError, match="is not of ours"):
        dataset.export(nerfstudio(tmp_path / "home" / "own", truth).parent, [], overwrite=True)
    assert (tmp_path / "home/own/transforms.json").is_file()


def test_export_is_read_back_exactly(truth, tmp_path):
    written = dataset.write(tmp_path / "set", [truth], meta={})
    dataset.export(tmp_path / "out", [written[0]])
    opened = dataset.open(tmp_path / "out")
    views, name = opened[0], truth.name
    assert opened.names == (name,) and len(views.rgb) == VIEWS + 1
    assert torch.equal(views.rgb[1:], truth.rgb) and torch.equal(views.alpha[1:], truth.alpha)
    assert torch.equal(views.input_rgb, truth.input_rgb)
    assert torch.allclose(views.input_camera.viewmats, truth.input_camera.viewmats, atol=1e-6)
    assert torch.allclose(views.cameras.viewmats[1:], truth.cameras.viewmats, atol=1e-6)
    assert torch.allclose(views.pivot, truth.pivot, atol=1e-6)
    assert views.attribution == truth.attribution
    top = json.loads((tmp_path / "out" / name / "transforms.json").read_text())
    assert {"fl_x", "fl_y", "cx", "cy", "w", "h", "camera_angle_x", "k1"} <= top.keys()
    assert all(len(frame["transform_matrix"]) == 4 for frame in top["frames"])
    with pytest.raises(DatasetError, match="exists"):
        dataset.export(tmp_path / "out", [written[0]])
    # gsplat's trainer reads COLMAP: the same pictures and poses once more.
    import pycolmap

    model = pycolmap.Reconstruction(tmp_path / "out" / name / "sparse/0")
    assert model.num_images() == VIEWS + 1 and model.num_points3D() > 50
    images = {image.name: image for image in model.images.values()}
    poses = np.stack([images[f"view_{k:03d}.png"].cam_from_world().matrix() for k in range(VIEWS)])
    want = project(truth.cameras.viewmats, truth.cameras.Ks, POINTS)
    assert np.abs(project(poses, truth.cameras.Ks, POINTS @ TURN_Z.T) - want).max() < 1e-4
    seen = next(iter(model.points3D.values()))
    element = seen.track.elements[0]
    image = model.images[element.image_id]
    assert np.allclose(
        image.project_point(seen.xyz), image.points2D[element.point2D_idx].xy, atol=1e-3
    )


# --- COLMAP ------------------------------------------------------------------------------------

TURN = np.array([[0.6, 0.0, 0.8], [0.0, -1.0, 0.0], [0.8, 0.0, -0.6]])  # some other world


def colmap(
    folder: Path, truth: ObjectViews, model: str = "PINHOLE", suffix: str = "bin", rig: bool = False
) -> Path:
    pycolmap = pytest.importorskip("pycolmap")
    names = save_views(folder / "images", truth, "v{:03d}.png")
    place = folder / "sparse/0"
    place.mkdir(parents=True)
    K = truth.cameras.Ks[0].double().numpy()
    f, cx, cy = K[0, 0], K[0, 2], K[1, 2]
    parameters = {
        "SIMPLE_PINHOLE": [f, cx, cy],
        "PINHOLE": [f, f, cx, cy],
        "SIMPLE_RADIAL": [f, cx, cy, 0],
        "RADIAL": [f, cx, cy, 0, 0],
        "OPENCV": [f, f, cx, cy, 0, 0, 0, 0],
        "FULL_OPENCV": [f, f, cx, cy, 0, 0, 0, 0, 0, 0, 0, 0],
        "FOV": [f, f, cx, cy, 0.5],
    }[model]
    viewmats = truth.cameras.viewmats.double().numpy().copy()
    viewmats[:, :3, :3] = viewmats[:, :3, :3] @ TURN.T

    def rigid(matrix: np.ndarray):
        u, _, vt = np.linalg.svd(matrix[:3, :3])
        return pycolmap.Rigid3d(np.hstack([u @ vt, matrix[:3, 3:]]))

    made = pycolmap.Reconstruction()
    if not rig:
        camera = pycolmap.Camera(
            camera_id=7, model=model, width=SIZE, height=SIZE, params=parameters
        )
        made.add_camera_with_trivial_rig(camera)
        for k, name in enumerate(names):
            image = pycolmap.Image(name=name, camera_id=7, image_id=k + 1)
            made.add_image_with_trivial_frame(image, rigid(viewmats[k]))
    else:  # frames of two cameras each; the second one's pose is relative to the first
        for camera_id in (1, 2):
            made.add_camera(
                pycolmap.Camera(
                    camera_id=camera_id, model=model, width=SIZE, height=SIZE, params=parameters
                )
            )
        for k in range(0, VIEWS, 2):
            rig_id = k + 1
            unit = pycolmap.Rig(rig_id=rig_id)
            first = pycolmap.sensor_t(pycolmap.SensorType.CAMERA, 1)
            second = pycolmap.sensor_t(pycolmap.SensorType.CAMERA, 2)
            unit.add_ref_sensor(first)
            unit.add_sensor(second, rigid(viewmats[k + 1] @ np.linalg.inv(viewmats[k])))
            made.add_rig(unit)
            frame = pycolmap.Frame(frame_id=rig_id, rig_id=rig_id)
            frame.rig_from_world = rigid(viewmats[k])
            for j in (0, 1):
                sensor = (first, second)[j]
                frame.add_data_id(pycolmap.data_t(sensor, k + j + 1))
            made.add_frame(frame)
            for j in (0, 1):
                made.add_image(
                    pycolmap.Image(
                        name=names[k + j], camera_id=j + 1, image_id=k + j + 1, frame_id=rig_id
                    )
                )
            made.register_frame(rig_id)
    (made.write_binary if suffix == "bin" else made.write_text)(str(place))
    return folder


@pytest.mark.parametrize("suffix", ["bin", "txt"])
@pytest.mark.parametrize("model", ["SIMPLE_PINHOLE", "PINHOLE", "RADIAL", "FULL_OPENCV"])
def test_colmap(truth, tmp_path, model, suffix):
    opened = dataset.open(colmap(tmp_path / "scene", truth, model, suffix))
    same_pixels(opened, truth, TURN)
    views = opened[0]
    assert -views.cameras.viewmats[:, 1, 1].mean() > 0.8  # the cameras stand upright
    assert opened.meta["objects"]["scene"]["up"].startswith("mean of")
    assert np.allclose(views.pivot, 0, atol=1e-3)


@pytest.mark.parametrize("suffix", ["bin", "txt"])
@pytest.mark.parametrize("rig", [False, True])
def test_colmap_with_frames_and_rigs(truth, tmp_path, suffix, rig):
    folder = colmap(tmp_path / "scene", truth, suffix=suffix, rig=rig)
    same_pixels(dataset.open(folder), truth, TURN)
    (folder / f"sparse/0/images.{suffix}").unlink()
    with pytest.raises(DatasetError, match=f"has no images.{suffix}, which says"):
        dataset.open(folder)


def test_colmap_models_that_cannot_be_read_say_why(truth, tmp_path):
    folder = colmap(tmp_path / "cut", truth)
    cameras = folder / "sparse/0/cameras.bin"
    cameras.write_bytes(cameras.read_bytes()[:30])
    with pytest.raises(DatasetError, match="cut/sparse/0"):
        dataset.open(folder)
    (folder / "sparse/0/images.bin").write_bytes(b"\xff" * 40)
    with pytest.raises(DatasetError, match="not a readable COLMAP model"):
        dataset.open(folder)
    folder = colmap(tmp_path / "lost", truth)
    for path in (folder / "images").iterdir():
        path.unlink()
    with pytest.raises(DatasetError, match="can't find picture"):
        dataset.open(folder)


# --- CO3D --------------------------------------------------------------------------------------


def co3d(root: Path, truth: ObjectViews, kind: str = "ndc_isotropic", width: int = SIZE) -> Path:
    """A category "box" of two sequences; PyTorch3D: row vectors, x left, y up."""
    frames = []
    for sequence in ("101_1_2", "102_3_4"):
        for k in range(VIEWS):
            folder = f"box/{sequence}"
            alpha = truth.alpha[k].numpy()
            pad = np.zeros((SIZE, width, 4), np.uint8)
            pad[:, :SIZE, :3], pad[:, :SIZE, 3] = truth.rgb[k].numpy(), alpha
            for name, picture in (("images", pad[..., :3]), ("masks", pad[..., 3])):
                path = root / folder / name / f"frame{k:06d}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(picture).save(path)
            viewmat = truth.cameras.viewmats[k].double().numpy()
            mirror = np.diag([-1.0, -1.0, 1.0])
            K = truth.cameras.Ks[k].double().numpy()
            half = np.array([width, SIZE]) / 2
            unit = np.full(2, half.min()) if kind == "ndc_isotropic" else half
            viewpoint = {
                "R": (mirror @ viewmat[:3, :3] @ TURN.T).T.tolist(),
                "T": (mirror @ viewmat[:3, 3]).tolist(),
                "focal_length": (np.array([K[0, 0], K[1, 1]]) / unit).tolist(),
                "principal_point": ((half - K[:2, 2]) / unit).tolist(),
                "intrinsics_format": kind,
            }
            image = {"path": f"{folder}/images/frame{k:06d}.png", "size": [SIZE, width]}
            mask = {"path": f"{folder}/masks/frame{k:06d}.png", "mass": 1.0}
            frames.append(
                {
                    "sequence_name": sequence,
                    "frame_number": k,
                    "image": image,
                    "mask": mask,
                    "viewpoint": viewpoint,
                }
            )
    lost = {
        **frames[0],
        "sequence_name": "103_5_6",
        "image": {"path": "box/103_5_6/x.png", "size": [9, 9]},
    }
    with gzip.open(root / "box/frame_annotations.jgz", "wt") as file:
        json.dump([*frames, lost], file)
    return root


@pytest.mark.parametrize("kind", ["ndc_isotropic", "ndc_norm_image_bounds"])
def test_co3d(truth, tmp_path, kind):
    co3d(tmp_path, truth, kind)
    opened = dataset.open(tmp_path)
    assert opened.names == ("box/101_1_2", "box/102_3_4")
    category = dataset.open(tmp_path / "box")
    assert category.names == ("101_1_2", "102_3_4")
    for each in (opened, category):
        views = each[1]
        about = each.meta["objects"][each.names[1]]
        ours = POINTS @ TURN.T @ np.array(about["world_from_file"]).T
        want = project(truth.cameras.viewmats, truth.cameras.Ks, POINTS)
        assert np.abs(project(views.cameras.viewmats, views.cameras.Ks, ours) - want).max() < 1e-4
        assert torch.equal(views.alpha, truth.alpha) and each.meta["alpha_source"] == "mask"
    assert opened.tensors().rgb.shape[:2] == (2, VIEWS)


@pytest.mark.parametrize("kind", ["ndc_isotropic", "ndc_norm_image_bounds"])
def test_co3d_pictures_that_are_not_square_are_padded(truth, tmp_path, kind):
    views = dataset.open(co3d(tmp_path, truth, kind, width=SIZE + 20), image_size=SIZE + 20)[0]
    moved = truth.cameras.Ks.clone()
    moved[:, 1, 2] += 10  # square: ten rows above and below
    assert torch.allclose(views.cameras.Ks, moved, atol=1e-4)
    assert views.alpha.shape[1:] == (SIZE + 20, SIZE + 20)
    assert torch.equal(views.alpha[:, 10 : 10 + SIZE, :SIZE], truth.alpha)


# --- sets --------------------------------------------------------------------------------------


def test_a_folder_of_captures_is_a_set_of_objects(truth, tmp_path):
    nerfstudio(tmp_path / "a", truth)
    colmap(tmp_path / "b", truth)
    (tmp_path / "notes").mkdir()
    edit(tmp_path / "a/transforms.json", lambda top: top["frames"].pop())
    opened = dataset.open(tmp_path)
    assert opened.names == ("a", "b") and opened.meta["formats"] == ["colmap", "nerfstudio"]
    assert [len(opened[k].rgb) for k in range(2)] == [5, 6]
    assert opened.subset(["b"])[0].name == "b"
    assert len(opened.inputs()) == 2
    with pytest.raises(DatasetError, match="objects have 5 to 6 views"):
        opened.tensors()
    four = dataset.open(tmp_path, views=4)
    assert four.tensors().rgb.shape[:2] == (2, 4)
    copy = dataset.write(tmp_path / "copy", (four[k] for k in range(2)), meta={})
    assert copy.names == ("a", "b")


def test_a_folder_of_datasets_is_one_set(truth, tmp_path):
    written = dataset.write(tmp_path / "all/one", [truth], meta={"k": 1})
    from fresnel.objects.assets import embedded_assets
    from fresnel.objects.render_set import render_set

    asset = embedded_assets("train")[1]
    render_set([asset], tmp_path / "all/two", views=VIEWS, image_size=SIZE // 2, samples=1)
    nerfstudio(tmp_path / "all/three", truth)
    opened = dataset.open(tmp_path / "all")
    assert opened.layout == "set" and opened.image_size == SIZE // 2
    assert opened.names == (f"one/{truth.name}", f"two/{asset.name}__0", "three/three")
    tensors = opened.tensors()
    assert tensors.rgb.shape == (3, VIEWS, SIZE // 2, SIZE // 2, 3)
    assert torch.equal(tensors.rgb[0], written.tensors(SIZE // 2).rgb[0])
    assert opened.meta["parts"]["one"] == {"k": 1}
    opened.verify()
    (tmp_path / "all/two/image_0000/view_000/rgb.png").write_bytes(b"x")
    with pytest.raises(dataset.DatasetChanged):
        opened.verify()


def test_a_capture_that_holds_a_stored_set_is_the_capture(truth, tmp_path):
    root = nerfstudio(tmp_path / "lego", truth)
    dataset.write(root / "mine", [truth], meta={})
    opened = dataset.open(root)
    assert (opened.layout, opened.names) == ("captures", ("lego",))


# --- what is estimated -------------------------------------------------------------------------


def test_pivot_and_input_of_captures_from_one_side():
    from fresnel import orbit

    angles = torch.tensor([-30.0, 0.0, 28.0])
    options = {"focal_px": 30.0, "width": 32, "height": 32}
    cameras = orbit(angles, 10.0, 3.0, pivot=(1.0, 2.0, 3.0), **options)
    viewmats = cameras.viewmats.double().numpy()
    pivot = captured.nearest_to_axes(viewmats)
    assert np.allclose(pivot, (1, 2, 3), atol=1e-4)
    assert captured.frontal(viewmats, pivot) == 1
    around = orbit(torch.arange(0, 360, 60.0), 10.0, 3.0, pivot=(1.0, 2.0, 3.0), **options)
    assert captured.frontal(around.viewmats.double().numpy(), pivot) == 0
    # Parallel axes: somewhere in front of the cameras, and finite.
    row = np.tile(np.eye(4), (3, 1, 1))
    row[:, 0, 3] = [-1, 0, 1]
    ahead = captured.nearest_to_axes(row)
    assert np.isfinite(ahead).all() and ahead[2] > 0.5 and abs(ahead[0]) < 1e-6


def test_upright_turns_the_mean_up_direction_to_y():
    rng = np.random.default_rng(3)
    turn = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    turn *= np.sign(np.linalg.det(turn))
    viewmats = np.tile(np.eye(4), (4, 1, 1))
    viewmats[:, :3, :3] = turn
    for rotation in (captured.upright(viewmats), captured.upright(np.tile(np.eye(4), (2, 1, 1)))):
        assert np.allclose(rotation @ rotation.T, np.eye(3)) and np.linalg.det(rotation) > 0
    assert np.allclose(captured.upright(viewmats) @ -turn[1], [0, 1, 0])


def test_nothing_heavy_is_imported_with_the_library():
    code = "import fresnel.data.dataset, sys; print({'pycolmap', 'trimesh'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
