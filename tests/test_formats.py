"""Other tools' formats: written here by independent code, opened, and compared point by point."""

import gzip
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pycolmap
import pytest
import torch
from PIL import Image
from scipy.ndimage import map_coordinates

from fresnel import orbit
from fresnel.data import captures as captured
from fresnel.data import dataset
from fresnel.data.dataset import DatasetError, ObjectViews
from fresnel.objects.assets import embedded_assets
from fresnel.objects.render_set import render_set

SIZE, VIEWS = 32, 6
POINTS = np.random.default_rng(0).uniform(-0.4, 0.4, (40, 3))
TURN_Z = np.array([[1, 0, 0], [0, 0, -1], [0, 1, 0.0]])
TURN = np.array([[0.6, 0.0, 0.8], [0.0, -1.0, 0.0], [0.8, 0.0, -0.6]])  # some other world


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory) -> ObjectViews:
    """An embedded object, rendered."""
    folder = tmp_path_factory.mktemp("truth") / "set"
    return render_set(embedded_assets("train")[:1], folder, views=VIEWS, image_size=SIZE)[0]


def project(viewmats: Any, Ks: Any, points: np.ndarray) -> np.ndarray:
    """Pixels (V, N, 2) of world points (N, 3)."""
    viewmats, Ks = np.asarray(viewmats, np.float64), np.asarray(Ks, np.float64)
    seen = np.einsum("vij,nj->vni", viewmats[:, :3, :3], points) + viewmats[:, None, :3, 3]
    pixels = np.einsum("vij,vnj->vni", Ks, seen)
    return pixels[..., :2] / pixels[..., 2:]


def same_pixels(
    opened: dataset.MultiViewDataset, truth: ObjectViews, turn: np.ndarray, row: int = 0
) -> None:
    """Points reproject as they should; ``turn`` takes truth's world to the file's."""
    views, about = opened[row], opened.meta["objects"][opened.names[row]]
    ours = POINTS @ turn.T @ np.array(about["world_from_file"]).T
    want = project(truth.cameras.viewmats, truth.cameras.Ks, POINTS)
    assert np.abs(project(views.cameras.viewmats, views.cameras.Ks, ours) - want).max() < 1e-4
    assert torch.equal(views.alpha, truth.alpha)
    masked = opened.meta["alpha_source"] == "mask"  # of colours that are over black already
    assert masked or torch.equal(views.rgb, truth.rgb)


def save_views(folder: Path, truth: ObjectViews, name: str = "{:03d}.png") -> list[str]:
    """RGBA pictures with straight colours; those of translucent pixels are rounded."""
    folder.mkdir(parents=True, exist_ok=True)
    for k in range(len(truth.rgb)):
        alpha = truth.alpha[k].numpy()[..., None]
        straight = np.where(alpha > 0, truth.rgb[k].numpy() * 255.0 / np.maximum(alpha, 1), 0)
        rgba = np.concatenate([straight.round().clip(0, 255), alpha], axis=-1).astype(np.uint8)
        Image.fromarray(rgba).save(folder / name.format(k))
    return [name.format(k) for k in range(len(truth.rgb))]


def z_up(truth: ObjectViews) -> list[list[list[float]]]:
    """OpenGL camera-to-world matrices in a world whose Z is up."""
    turn, flip = np.eye(4), np.diag([1.0, -1, -1, 1])
    turn[:3, :3] = TURN_Z
    viewmats = truth.cameras.viewmats.double().numpy()
    return [(turn @ np.linalg.inv(viewmat) @ flip).tolist() for viewmat in viewmats]


def nerfstudio(folder: Path, truth: ObjectViews, **top: object) -> Path:
    names = save_views(folder / "images", truth)
    (fx, _, cx), (_, fy, cy), _ = truth.cameras.Ks[0].tolist()
    frames = [
        {"file_path": f"images/{name}", "transform_matrix": matrix}
        for name, matrix in zip(names, z_up(truth), strict=True)
    ]
    said = {"camera_model": "OPENCV", "fl_x": fx, "fl_y": fy, "cx": cx, "cy": cy}
    said |= {"w": SIZE, "h": SIZE, "frames": frames}
    (folder / "transforms.json").write_text(json.dumps({**said, **top}))
    return folder


def edit(path: Path, change: Callable[[dict], object]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def test_nerfstudio(truth, tmp_path):
    opened = dataset.open(nerfstudio(tmp_path / "lego", truth))
    assert (opened.layout, opened.names, len(opened)) == ("captures", ("lego",), 1)
    assert (opened.image_size, opened.views_per_object) == (SIZE, VIEWS)
    same_pixels(opened, truth, TURN_Z)
    # Its world is ours again, and the cameras' axes meet where the object is.
    views, about = opened[0], opened.meta["objects"]["lego"]
    assert torch.allclose(views.cameras.viewmats, truth.cameras.viewmats, atol=1e-6)
    assert views.pivot.norm() < 1e-4 and torch.equal(views.input_rgb, views.rgb[0])
    assert (opened.meta["alpha_source"], about["input"]) == ("file", "images/000.png")
    assert opened.tensors().rgb.shape == (1, VIEWS, SIZE, SIZE, 3)
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


@pytest.mark.parametrize("scale", [1, 2])
def test_intrinsics_of_each_frame_jpeg_and_masks_of_any_size(truth, tmp_path, scale):
    folder = nerfstudio(tmp_path / "scene", truth, camera_model="PINHOLE")
    (folder / "masks").mkdir()
    for k in range(VIEWS):
        picture = Image.open(folder / f"images/{k:03d}.png")
        picture.convert("RGB").save(folder / f"images/{k:03d}.jpg", quality=98, subsampling=0)
        large = picture.getchannel("A").resize((SIZE * scale,) * 2, Image.Resampling.NEAREST)
        large.save(folder / f"masks/{k:03d}.png")

    def change(top: dict) -> None:
        own = {key: top.pop(key) for key in ("fl_x", "fl_y", "cx", "cy", "w", "h")}
        for k, frame in enumerate(top["frames"]):
            frame |= {**own, "file_path": f"images/{k:03d}.jpg", "mask_path": f"masks/{k:03d}.png"}

    edit(folder / "transforms.json", change)
    opened = dataset.open(folder)
    views = opened[0]
    assert opened.meta["alpha_source"] == "mask" and torch.equal(views.alpha, truth.alpha)
    assert (views.rgb.int() - truth.rgb.int()).abs().float().mean() < 3
    assert torch.allclose(views.cameras.Ks, truth.cameras.Ks)
    Image.new("L", (SIZE, 2 * SIZE)).save(folder / "masks/001.png")
    with pytest.raises(DatasetError, match=r"masks/001\.png: is 32 x 64 pixels, want the prop"):
        dataset.open(folder)[0]


def test_photographs_are_cropped_and_scaled_copies_keep_their_poses(truth, tmp_path):
    half = SIZE // 2
    folder = nerfstudio(tmp_path / "photos", truth, w=96, h=2 * SIZE, cx=48.0, cy=float(SIZE))
    noise = np.random.default_rng(1).integers(0, 255, (VIEWS, SIZE, 48, 3), dtype=np.uint8)
    for k in range(VIEWS):
        Image.fromarray(noise[k]).save(folder / f"images/{k:03d}.png")
    opened = dataset.open(folder)
    views = opened[0]
    assert opened.meta["alpha_source"] == "none" and bool((views.alpha == 255).all())
    assert opened.image_size == SIZE
    assert torch.equal(views.rgb, torch.from_numpy(noise[:, :, 8 : 8 + SIZE]))
    focal = truth.cameras.Ks[0, 0, 0].item() / 2
    want = torch.tensor([[focal, 0, half], [0, focal, half], [0, 0, 1]])
    assert torch.allclose(views.cameras.Ks[0], want)
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


@pytest.mark.parametrize("model", LENSES)
def test_distortion_is_undone(tmp_path, model):
    """A smooth picture with colours that tell where each pixel is comes back straight."""
    terms, K = LENSES[model], np.array([[70.0, 0, 46], [0, 72.0, 50], [0, 0, 1]])
    y, x = np.mgrid[:96, :96] / 96
    ideal = np.stack([40 + 180 * x, 40 + 180 * y, 120 + 80 * np.sin(9 * x * y)], axis=-1)
    lens = pycolmap.Camera(
        model=model, width=96, height=96, params=[70, 72, 46, 50, *terms.values()]
    )
    pixels = np.stack([96 * x + 0.5, 96 * y + 0.5], axis=-1).reshape(-1, 2)
    rays = np.asarray(lens.cam_from_img(pixels))  # COLMAP's own inverse, by search
    places = (rays * [70, 72] + [46, 50] - 0.5).T[::-1].reshape(2, 96, 96)
    bent = np.stack(
        [map_coordinates(c, places, order=1, mode="nearest") for c in ideal.transpose(2, 0, 1)], -1
    )
    assert np.abs(bent - ideal).max() > 5
    frames = []
    for k in range(2):
        Image.fromarray(bent.round().astype(np.uint8)).save(tmp_path / f"{k}.png")
        eye = np.eye(4)
        eye[0, 3] = k
        frames.append({"file_path": f"{k}.png", "transform_matrix": eye.tolist()})
    top = {"camera_model": model, "fl_x": 70, "fl_y": 72, "cx": 46, "cy": 50, "w": 96, "h": 96}
    (tmp_path / "transforms.json").write_text(json.dumps({**top, **terms, "frames": frames}))
    views = dataset.open(tmp_path)[0]
    inside = np.zeros((96, 96), bool)
    inside[12:-12, 12:-12] = (views.alpha[0] == 255).numpy()[12:-12, 12:-12]
    error = np.abs(views.rgb[0].numpy() - ideal)[inside]
    assert inside.mean() > 0.5 and error.max() < 2.5 and error.mean() < 0.5
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
        ("THIN_PRISM_FISHEYE", (0.05, -0.02, 0.01, 0.01, 0.0, 0.0, 0.001, 0.002)),
    ],
)
def test_every_lens_is_undone_as_colmap_does(lens):
    rays = np.random.default_rng(0).uniform(-0.6, 0.6, (200, 2))
    focals = [100.0] if lens[0] in ("SIMPLE_RADIAL", "RADIAL") else [100.0, 100.0]
    params = [*focals, 90.0, 110.0, *lens[1]]
    camera = pycolmap.Camera(model=lens[0], width=200, height=200, params=params)
    want = camera.img_from_cam(np.insert(rays, 2, 1, axis=1))
    assert np.abs(captured.distorted(rays, lens) * 100 + [90, 110] - want).max() < 1e-6
    assert np.abs(captured.distorted(np.zeros((1, 2)), lens)).max() < 1e-9


def test_rays_beyond_a_lens_fold_have_no_place_in_the_picture():
    radius = np.linspace(0.01, 3, 300)
    rays = np.stack([radius, 0 * radius], axis=1)
    bent = captured.distorted(rays, ("SIMPLE_RADIAL", (-0.3,)))[:, 0]
    fold = (1 / 0.9) ** 0.5  # where d/dr of r - 0.3 r^3 is 0
    assert np.isfinite(bent[radius < fold - 0.01]).all()
    assert np.isnan(bent[radius > fold + 0.01]).all()


def colmap(folder: Path, truth: ObjectViews, suffix: str = "bin", rig: bool = False) -> Path:
    names = save_views(folder / "images", truth, "v{:03d}.png")
    (f, _, cx), (_, _, cy), _ = truth.cameras.Ks[0].double().tolist()
    viewmats = truth.cameras.viewmats.double().numpy().copy()
    viewmats[:, :3, :3] = viewmats[:, :3, :3] @ TURN.T
    made = pycolmap.Reconstruction()

    def rigid(matrix: np.ndarray) -> Any:
        u, _, vt = np.linalg.svd(matrix[:3, :3])
        return pycolmap.Rigid3d(np.hstack([u @ vt, matrix[:3, 3:]]))

    def camera(number: int) -> Any:
        size = {"width": SIZE, "height": SIZE}
        return pycolmap.Camera(camera_id=number, model="RADIAL", params=[f, cx, cy, 0, 0], **size)

    if not rig:
        made.add_camera_with_trivial_rig(camera(7))
        for k, name in enumerate(names):
            image = pycolmap.Image(name=name, camera_id=7, image_id=k + 1)
            made.add_image_with_trivial_frame(image, rigid(viewmats[k]))
    else:  # frames of two cameras each; the second one's pose is relative to the first
        made.add_camera(camera(1))
        made.add_camera(camera(2))
        sensors = [pycolmap.sensor_t(pycolmap.SensorType.CAMERA, number) for number in (1, 2)]
        for k in range(0, VIEWS, 2):
            unit = pycolmap.Rig(rig_id=k + 1)
            unit.add_ref_sensor(sensors[0])
            unit.add_sensor(sensors[1], rigid(viewmats[k + 1] @ np.linalg.inv(viewmats[k])))
            made.add_rig(unit)
            frame = pycolmap.Frame(frame_id=k + 1, rig_id=k + 1)
            frame.rig_from_world = rigid(viewmats[k])
            for j in (0, 1):
                frame.add_data_id(pycolmap.data_t(sensors[j], k + j + 1))
            made.add_frame(frame)
            for j in (0, 1):
                ids = {"camera_id": j + 1, "image_id": k + j + 1, "frame_id": k + 1}
                made.add_image(pycolmap.Image(name=names[k + j], **ids))
            made.register_frame(k + 1)
    (folder / "sparse/0").mkdir(parents=True)
    (made.write_binary if suffix == "bin" else made.write_text)(str(folder / "sparse/0"))
    return folder


@pytest.mark.parametrize("suffix", ["bin", "txt"])
@pytest.mark.parametrize("rig", [False, True])
def test_colmap(truth, tmp_path, rig, suffix):
    folder = colmap(tmp_path / "scene", truth, suffix, rig)
    opened = dataset.open(folder)
    same_pixels(opened, truth, TURN)
    views = opened[0]
    assert -views.cameras.viewmats[:, 1, 1].mean() > 0.8  # the cameras stand upright
    assert opened.meta["objects"]["scene"]["up"].startswith("mean of")
    assert np.allclose(views.pivot, 0, atol=1e-3)
    (folder / f"sparse/0/images.{suffix}").unlink()
    with pytest.raises(DatasetError, match=rf"has no images\.{suffix}, which says"):
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


def co3d(root: Path, truth: ObjectViews, kind: str = "ndc_isotropic", width: int = SIZE) -> Path:
    """A category "box" of two sequences; PyTorch3D: row vectors, x left, y up."""
    frames, mirror = [], np.diag([-1.0, -1.0, 1.0])
    half = np.array([width, SIZE]) / 2
    unit = np.full(2, half.min()) if kind == "ndc_isotropic" else half
    for sequence in ("101_1_2", "102_3_4"):
        for k in range(VIEWS):
            pad = np.zeros((SIZE, width, 4), np.uint8)
            pad[:, :SIZE, :3], pad[:, :SIZE, 3] = truth.rgb[k].numpy(), truth.alpha[k].numpy()
            files = [f"box/{sequence}/{what}/frame{k:06d}.png" for what in ("images", "masks")]
            for file, picture in zip(files, (pad[..., :3], pad[..., 3]), strict=True):
                (root / file).parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(picture).save(root / file)
            viewmat = truth.cameras.viewmats[k].double().numpy()
            K = truth.cameras.Ks[k].double().numpy()
            viewpoint = {
                "R": (mirror @ viewmat[:3, :3] @ TURN.T).T.tolist(),
                "T": (mirror @ viewmat[:3, 3]).tolist(),
                "focal_length": (np.array([K[0, 0], K[1, 1]]) / unit).tolist(),
                "principal_point": ((half - K[:2, 2]) / unit).tolist(),
                "intrinsics_format": kind,
            }
            frame = {"sequence_name": sequence, "frame_number": k, "viewpoint": viewpoint}
            frame["image"] = {"path": files[0], "size": [SIZE, width]}
            frames.append({**frame, "mask": {"path": files[1], "mass": 1.0}})
    lost = {"path": "box/103_5_6/x.png", "size": [9, 9]}
    frames.append({**frames[0], "sequence_name": "103_5_6", "image": lost})
    with gzip.open(root / "box/frame_annotations.jgz", "wt") as file:
        json.dump(frames, file)
    return root


@pytest.mark.parametrize("kind", ["ndc_isotropic", "ndc_norm_image_bounds"])
def test_co3d(truth, tmp_path, kind):
    opened = dataset.open(co3d(tmp_path / "a", truth, kind))
    category = dataset.open(tmp_path / "a/box")
    assert opened.names == ("box/101_1_2", "box/102_3_4")
    assert category.names == ("101_1_2", "102_3_4")
    for each in (opened, category):
        same_pixels(each, truth, TURN, 1)
        assert each.meta["alpha_source"] == "mask"
    assert opened.tensors().rgb.shape[:2] == (2, VIEWS)
    # pictures that are not square are padded: ten rows above and below
    views = dataset.open(co3d(tmp_path / "b", truth, kind, SIZE + 20), image_size=SIZE + 20)[0]
    moved = truth.cameras.Ks.clone()
    moved[:, 1, 2] += 10
    assert torch.allclose(views.cameras.Ks, moved, atol=1e-4)
    assert views.alpha.shape[1:] == (SIZE + 20, SIZE + 20)
    assert torch.equal(views.alpha[:, 10 : 10 + SIZE, :SIZE], truth.alpha)


def test_a_folder_of_captures_is_a_set_of_objects(truth, tmp_path, tmp_path_factory):
    nerfstudio(tmp_path / "a", truth)
    outside = nerfstudio(tmp_path_factory.mktemp("outside") / "c", truth)
    (tmp_path / "c").symlink_to(outside)  # not followed
    colmap(tmp_path / "b", truth)
    (tmp_path / "notes").mkdir()
    edit(tmp_path / "a/transforms.json", lambda top: top["frames"].pop())
    opened = dataset.open(tmp_path)
    assert opened.names == ("a", "b")
    assert [opened.meta["objects"][name]["format"] for name in "ab"] == ["nerfstudio", "colmap"]
    assert [len(opened[k].rgb) for k in range(2)] == [5, 6]
    assert opened.subset(["b"])[0].name == "b" and len(opened.inputs()) == 2
    with pytest.raises(DatasetError, match="objects have 5 to 6 views"):
        opened.tensors()
    four = dataset.open(tmp_path, views=4)
    assert four.tensors().rgb.shape[:2] == (2, 4)
    copy = dataset.write(tmp_path / "copy", (four[k] for k in range(2)), meta={})
    assert copy.names == ("a", "b")


def test_a_folder_of_datasets_is_one_set(truth, tmp_path):
    written = dataset.write(tmp_path / "all/one", [truth], meta={"k": 1})
    asset = embedded_assets("train")[1]
    render_set([asset], tmp_path / "all/two", views=VIEWS, image_size=SIZE // 2, samples=1)
    root = nerfstudio(tmp_path / "all/three", truth)
    (tmp_path / "all/web").mkdir()
    (tmp_path / "all/web/manifest.json").write_text('{"name": "app", "icons": []}')
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
    dataset.write(root / "mine", [truth], meta={})  # a description here counts first
    assert (dataset.open(root).layout, dataset.open(root).names) == ("captures", ("three",))


def test_pivot_and_input_of_captures_from_one_side():
    options = {"pivot": (1.0, 2.0, 3.0), "focal_px": 30.0, "width": 32, "height": 32}
    for angles, first in (([-30.0, 0.0, 28.0], 1), (list(range(0, 360, 60)), 0)):
        viewmats = orbit(torch.tensor(angles), 10.0, 3.0, **options).viewmats.double().numpy()
        pivot = captured.nearest_to_axes(viewmats)
        assert np.allclose(pivot, (1, 2, 3), atol=1e-4)
        assert captured.frontal(viewmats, pivot) == first
    # Parallel axes: somewhere in front of the cameras, and finite.
    row = np.tile(np.eye(4), (3, 1, 1))
    row[:, 0, 3] = [-1, 0, 1]
    ahead = captured.nearest_to_axes(row)
    assert np.isfinite(ahead).all() and ahead[2] > 0.5 and abs(ahead[0]) < 1e-6


def test_upright_turns_the_mean_up_direction_to_y():
    turn = np.linalg.qr(np.random.default_rng(3).normal(size=(3, 3)))[0]
    turn *= np.sign(np.linalg.det(turn))
    viewmats = np.tile(np.eye(4), (4, 1, 1))
    viewmats[:, :3, :3] = turn
    for rotation in (captured.upright(viewmats), captured.upright(np.tile(np.eye(4), (2, 1, 1)))):
        assert np.allclose(rotation @ rotation.T, np.eye(3)) and np.linalg.det(rotation) > 0
    assert np.allclose(captured.upright(viewmats) @ -turn[1], [0, 1, 0])
