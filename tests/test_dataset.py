"""Datasets on disk: round trips, hashes, both layouts, hostile files."""

from __future__ import annotations

import errno
import json
import os
import shutil
import struct
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fresnel import orbit
from fresnel.data import dataset
from fresnel.data import layout as _layouts
from fresnel.data import writing as _writing
from fresnel.data.dataset import DatasetChanged, DatasetError, ObjectViews
from fresnel.scene.cameras import Cameras

SIZE, VIEWS = 16, 3


def make_object(seed: int, background: tuple[float, float, float] = (0, 0, 0)) -> ObjectViews:
    rng = np.random.default_rng(seed)
    alpha = rng.choice(np.array([0, 128, 255], np.uint8), (VIEWS + 1, SIZE, SIZE))
    color = rng.uniform(0, 1, (VIEWS + 1, SIZE, SIZE, 3))
    alpha[:, 0, 0], color[:, 0, 0] = 128, 0.01  # dark, not empty
    weight = alpha[..., None] / 255
    black = (color * weight * 255 + 0.5).astype(np.uint8)
    over = ((color * weight + np.array(background) * (1 - weight)) * 255 + 0.5).astype(np.uint8)
    depth = (rng.uniform(1.2, 3.2, alpha.shape) * (alpha > 0)).astype(np.float32)
    cameras = orbit(
        torch.tensor([20.0, 20.0, 140.0, 260.0]),
        torch.from_numpy(rng.uniform(-30, 45, VIEWS + 1)),
        2.2,
        pivot=(0.1, 0.2, 0.3),
        focal_px=1.2 * SIZE,
        width=SIZE,
        height=SIZE,
    )
    return ObjectViews(
        name=f"object {seed}",
        input_rgb=black[0],
        input_alpha=alpha[0],
        input_camera=cameras[0],
        rgb=over[1:],
        alpha=alpha[1:],
        cameras=cameras[1:],
        pivot=(0.1, 0.2, 0.3),
        depth=depth[1:],
        input_depth=depth[0],
        identity_rgb=black[0],
        identity_alpha=alpha[0],
        attribution="someone (CC0-1.0)",
    )


@pytest.fixture()
def written(tmp_path: Path) -> dataset.MultiViewDataset:
    return dataset.write(tmp_path / "set", map(make_object, range(3)), meta={"seed": 1})


def write_original(root: Path, count: int = 2) -> list[Cameras]:
    """The original experiment's layout, as its own script left it."""
    cameras = []
    for i in range(count):
        base = root / f"image_{i:04d}"
        views = make_object(i)
        cameras.append(views.cameras)
        base.mkdir(parents=True)
        Image.fromarray(views.input_rgb.numpy()).save(base / "input.png")
        np.save(base / "input_features.npy", np.zeros((37, 37, 4), np.float32))
        np.save(base / "input_depth.npy", np.zeros((1, SIZE, SIZE), np.float32))
        rotation, translation = views.cameras.to_opengl()
        for k in range(VIEWS):
            view = base / f"view_{k:03d}"
            view.mkdir()
            Image.fromarray(views.rgb[k].numpy()).save(view / "rgb.png")
            np.save(view / "depth.npy", views.depth[k].numpy())
            pose = {"R": rotation[k].tolist(), "t": translation[k].tolist()}
            (view / "pose.json").write_text(json.dumps(pose))
    return cameras


# --- round trips -------------------------------------------------------------------------------


def test_what_is_written_is_read_back(written):
    reopened = dataset.open(written.path)
    assert reopened == written
    assert (reopened.image_size, reopened.views_per_object, len(reopened)) == (SIZE, VIEWS, 3)
    for index in range(3):
        want, got = make_object(index), reopened[index]
        for field in ("input_rgb", "input_alpha", "identity_rgb", "identity_alpha", "rgb", "alpha"):
            assert torch.equal(getattr(got, field), getattr(want, field)), field
        assert torch.equal(got.cameras.viewmats, want.cameras.viewmats)
        assert torch.equal(got.cameras.Ks, want.cameras.Ks)
        assert torch.equal(got.input_camera.viewmats, want.input_camera.viewmats)
        assert torch.equal(got.pivot, want.pivot)
        assert (got.depth - want.depth).abs().max() <= 2.0**-15
        assert torch.equal(got.depth == 0, want.depth == 0)
        assert (got.name, got.attribution) == (want.name, want.attribution)


def test_pose_files_hold_opengl_world_to_camera_and_relative_azimuths(written):
    pose = json.loads((written.path / "image_0001/view_001/pose.json").read_text())
    rotation, translation = make_object(1).cameras[1].to_opengl()
    assert np.allclose(pose["R"], rotation) and np.allclose(pose["t"], translation)
    assert pose["azimuth_deg"] == pytest.approx(120.0, abs=1e-3)
    # An OpenGL camera looks down its own -z: the pivot lies in front of it.
    assert (np.array(pose["R"]) @ np.array([0.1, 0.2, 0.3]) + pose["t"])[2] < 0


def test_writing_what_was_read_changes_no_byte(written, tmp_path):
    again = dataset.write(tmp_path / "again", (written[i] for i in range(3)), meta={"seed": 1})
    assert again.content_hash == written.content_hash


def test_tensors_scale_pictures_cameras_and_depth(written):
    full, half = written.tensors(), written.tensors(SIZE // 2)
    assert full.rgb.shape == (3, VIEWS, SIZE, SIZE, 3) and len(full) == 3
    assert half.rgb.shape == (3, VIEWS, SIZE // 2, SIZE // 2, 3)
    assert half.cameras.width == SIZE // 2 and half.inputs.cameras.width == SIZE // 2
    assert torch.allclose(half.cameras.Ks[..., 0, 2], torch.tensor(SIZE / 4))
    block = full.rgb[1, 2, 4:6, 6:8].float().mean(dim=(0, 1))
    assert (half.rgb[1, 2, 2, 3].float() - block).abs().max() <= 0.5
    covered = full.depth[full.depth > 0]
    halved = half.depth[half.alpha > 0]
    assert halved.min() >= covered.min() - 1e-4 and halved.max() <= covered.max() + 1e-4
    assert full[1:].names == full.names[1:] and len(full[[0, 2]]) == 2


def test_views_over_white_come_back_over_black(tmp_path):
    white = dataset.write(
        tmp_path / "white",
        [make_object(5, (1, 1, 1))],
        background=(1, 1, 1),
        meta={},
    )
    got = white.tensors().rgb[0].int()
    assert (got - make_object(5).rgb.int()).abs().max() <= 1
    assert torch.equal(white.tensors().rgb[0], white[0].rgb)
    # what is made of it is over black too, wherever it goes
    copied = dataset.write(tmp_path / "copy", [white[0]], meta={})[0]
    dataset.export(tmp_path / "out", [white[0]])
    exported = dataset.open(tmp_path / "out")[0]
    assert torch.equal(copied.rgb, white[0].rgb)
    assert (exported.rgb[1:].int() - white[0].rgb.int()).abs().max() <= 2


def test_inputs_of_unequal_size_are_scaled_to_the_views(tmp_path):
    small = make_object(1)
    first = make_object(0)
    inputs = dataset.InputImages(
        ("x",), first.input_rgb[None], first.input_alpha[None], first.input_camera.reshape(1)
    ).resized(8)
    other = replace(
        first,
        input_rgb=inputs.rgb[0],
        input_alpha=inputs.alpha[0],
        input_camera=inputs.cameras[0],
        input_depth=None,
        identity_rgb=None,
        identity_alpha=None,
    )
    mixed = dataset.write(tmp_path / "mixed", [small, other], meta={}).inputs()
    assert mixed.rgb.shape == (2, SIZE, SIZE, 3) and mixed.depth is None


def test_subsets_keep_the_hash_of_the_whole_and_say_so(written):
    part = written.subset(["object 2", "object 0"])
    assert part.names == ("object 2", "object 0") and part.is_subset
    assert part.content_hash == written.content_hash
    assert part[0].name == "object 2" and len(written.subset(slice(2))) == 2
    part.verify()
    with pytest.raises(DatasetError, match="no object named 'nobody'"):
        written.subset(["nobody"])
    with pytest.raises(DatasetError, match="empty"):
        written.subset([])


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def seal(root: Path) -> dataset.MultiViewDataset:
    """Give the manifest the hashes of what lies there now, as if it had been written so."""
    manifest = json.loads((root / "manifest.json").read_text())
    for entry in manifest["objects"]:
        for file in entry["files"]:
            data = (root / entry["folder"] / file).read_bytes()
            entry["files"][file] = _layouts.sha256(data)
    records = [_layouts.Record(**entry) for entry in manifest["objects"]]
    manifest["content_hash"] = _layouts.content_hash(records, manifest)
    (root / "manifest.json").write_text(json.dumps(manifest))
    return dataset.open(root)


# --- hashes ------------------------------------------------------------------------------------


def edit_pixel(root: Path) -> None:
    path = root / "image_0001/view_001/rgb.png"
    pixels = np.array(Image.open(path))
    pixels[0, 0, 0] ^= 1
    Image.fromarray(pixels).save(path)


def edit_pose(root: Path) -> None:
    path = root / "image_0000/view_002/pose.json"
    path.write_text(path.read_text() + "\n")


def remove_file(root: Path) -> None:
    (root / "image_0002/input_alpha.png").unlink()


def add_view(root: Path) -> None:
    shutil.copytree(root / "image_0000/view_000", root / "image_0000/view_003")


def add_object(root: Path) -> None:
    shutil.copytree(root / "image_0000", root / "image_0003")


def replace_set(root: Path) -> None:
    dataset.write(root, [make_object(9)], meta={}, overwrite=True)


EDITS = [edit_pixel, edit_pose, remove_file, add_view, add_object, replace_set]


@pytest.mark.parametrize("edit", EDITS)
def test_any_edit_is_noticed(written, edit: Callable[[Path], None]):
    written.verify()
    edit(written.path)
    with pytest.raises(DatasetChanged):
        written.verify()


@pytest.mark.parametrize("edit", EDITS[:5])
def test_any_edit_changes_the_hash_of_the_original_layout(tmp_path, edit):
    root = tmp_path / "original"
    write_original(root, 3)
    (root / "image_0002/input_alpha.png").write_bytes(b"something that may be removed")
    before = dataset.open(root)
    before.verify()
    edit(root)
    assert dataset.open(root).content_hash != before.content_hash
    with pytest.raises(DatasetChanged):
        before.verify()


def test_receipts_are_not_part_of_the_hash_but_meta_is(written, tmp_path):
    (written.path / "receipts").mkdir()
    (written.path / "receipts/gate.json").write_text("{}")
    (written.path / "image_0000/.DS_Store").write_text("finder")
    written.verify()
    other = dataset.write(tmp_path / "b", map(make_object, range(3)), meta={"seed": 2})
    assert other.content_hash != written.content_hash
    gray = [replace(make_object(i), attribution="someone else") for i in range(3)]
    assert dataset.write(tmp_path / "c", gray, meta={}).content_hash != written.content_hash


@pytest.mark.parametrize("change", [{"background": [1, 1, 1]}, {"meta": {}}, {"image_size": 8}])
def test_an_edited_manifest_is_refused(written, change):
    edit_json(written.path / "manifest.json", **change)
    with pytest.raises(DatasetChanged, match="was edited"):
        dataset.open(written.path)


def test_what_is_decoded_is_what_was_hashed(written, tmp_path):
    """Files that are exchanged after opening, and back again, are noticed while they are read."""
    write_original(tmp_path / "original", 2)
    capture = dataset.export(tmp_path / "captured", [written[1]])
    for opened in (written, dataset.open(tmp_path / "original"), dataset.open(capture)):
        path = next(p for p in sorted(opened.path.rglob("*.png")) if "view_001" in str(p))
        row = 1 if opened is written else 0
        if opened is written:
            path = opened.path / "image_0001/view_001/rgb.png"
        before = path.read_bytes()
        Image.new(Image.open(path).mode, Image.open(path).size).save(path)
        with pytest.raises(DatasetChanged, match="was changed after its hash"):
            opened[row]
        with pytest.raises(DatasetChanged):
            opened.tensors()
        path.write_bytes(before)
        assert len(opened[row].rgb) >= VIEWS


def test_a_stored_set_cannot_be_opened_at_another_size(written, tmp_path):
    write_original(tmp_path / "original", 1)
    for path in (written.path, tmp_path / "original"):
        for options in ({"image_size": 8}, {"views": 2}):
            with pytest.raises(DatasetError, match="are for captures, this set is stored"):
                dataset.open(path, **options)


def test_other_tools_manifests_in_folders_spoil_no_set(written, tmp_path):
    for name in ("a", "b"):
        dataset.write(tmp_path / "root" / name, [make_object(1)], meta={})
    (tmp_path / "root/web").mkdir()
    (tmp_path / "root/web/manifest.json").write_text('{"name": "app", "icons": []}')
    assert dataset.open(tmp_path / "root").names == ("a/object 1", "b/object 1")


# --- the original's layout ---------------------------------------------------------------------


def test_the_original_layout_opens_as_it_is(tmp_path):
    cameras = write_original(tmp_path / "original")
    opened = dataset.open(tmp_path / "original")
    assert (opened.layout, opened.names) == ("original", ("image_0000", "image_0001"))
    assert opened.meta["alpha_source"] == "estimated"
    assert opened.content_hash.startswith("sha256:")
    views, want = opened[1], make_object(1)
    # Absolute OpenGL world-to-camera poses; focal length = image size.
    assert torch.allclose(views.cameras.viewmats, cameras[1].viewmats, atol=1e-6)
    assert torch.equal(views.cameras.Ks[0], torch.tensor([[16.0, 0, 8], [0, 16, 8], [0, 0, 1]]))
    assert torch.equal(views.rgb, want.rgb) and torch.equal(views.depth, want.depth)
    assert torch.equal(views.alpha == 255, (want.rgb > 0).any(-1))
    # Its input camera stands at the world origin and looks along -Z, with Y up.
    assert torch.equal(views.input_camera.centers, torch.zeros(3))
    assert torch.equal(views.input_camera.forward, torch.tensor([0.0, 0.0, -1.0]))
    assert torch.equal(views.pivot, torch.zeros(3))
    assert opened.inputs().elevation_is_assumed and views.input_depth is None


def test_the_original_layout_with_damage_is_refused(tmp_path):
    root = tmp_path / "original"
    write_original(root)
    np.save(root / "image_0000/view_000/depth.npy", np.zeros((4, 4), np.float32))
    with pytest.raises(DatasetError, match=r"view_000/depth\.npy: is 4 x 4 pixels"):
        dataset.open(root)[0]
    shutil.rmtree(root / "image_0001/view_002")
    with pytest.raises(DatasetError, match=r"image_0001.*has 2 views"):
        dataset.open(root)[1]


# --- writing that fails ------------------------------------------------------------------------


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def test_an_interrupted_write_leaves_nothing(tmp_path):
    def objects():
        yield make_object(0)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        dataset.write(tmp_path / "set", objects(), meta={})
    assert leftovers(tmp_path) == []


def test_a_full_disk_leaves_nothing_and_says_so(tmp_path, monkeypatch):
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(_writing, "write_object", full)
    with pytest.raises(DatasetError, match=r"disk is full.*Nothing was kept"):
        dataset.write(tmp_path / "set", [make_object(0)], meta={})
    assert leftovers(tmp_path) == []


def dies(*args: object) -> None:
    os._exit(9)


def test_encoding_in_processes_changes_no_byte_and_fails_alike(written, tmp_path, monkeypatch):
    monkeypatch.setattr(_writing, "_WORTH_PROCESSES", 1)
    monkeypatch.setattr(_writing, "core_count", lambda: 4)
    crews = []
    lent = _writing.processes
    monkeypatch.setattr(_writing, "processes", lambda n: crews.append(n) or lent(n))
    objects = [written[i] for i in range(len(written))]
    there = tmp_path / "there"
    made = dataset.write(there, objects, meta=written.meta, total=len(objects))
    assert len(crews) == 1
    assert made.content_hash == written.content_hash
    made.verify()

    def interrupted(count):
        yield from objects[:count]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        dataset.write(tmp_path / "other", interrupted(2), meta={}, total=9)
    monkeypatch.setattr(_writing, "write_object", dies)
    with pytest.raises(DatasetError, match=r"killed.*Nothing was kept"):
        dataset.write(tmp_path / "other", objects, meta={}, total=9)
    assert sorted(leftovers(tmp_path)) == ["set", "there"]


def test_a_failed_overwrite_keeps_the_old_dataset(written):
    with pytest.raises(DatasetError, match="nothing to write"):
        dataset.write(written.path, [], meta={}, overwrite=True)
    dataset.open(written.path).verify()
    assert leftovers(written.path.parent) == ["set"]


def test_write_refuses_to_overwrite_unasked_and_what_is_not_a_dataset(written, tmp_path):
    with pytest.raises(DatasetError, match="overwrite=True"):
        dataset.write(written.path, [make_object(0)], meta={})
    (tmp_path / "home").mkdir()
    (tmp_path / "home/letter.txt").write_text("dear")
    with pytest.raises(DatasetError, match="not of ours"):
        dataset.write(tmp_path / "home", [make_object(0)], meta={}, overwrite=True)
    (tmp_path / "home/manifest.json").write_text('{"name": "a web page"}')
    with pytest.raises(DatasetError, match="not of ours"):
        dataset.write(tmp_path / "home", [make_object(0)], meta={}, overwrite=True)
    assert (tmp_path / "home/letter.txt").exists()


def test_write_refuses_objects_that_do_not_fit(tmp_path):
    one = make_object(0)
    fewer = replace(
        one, name="b", rgb=one.rgb[:2], alpha=one.alpha[:2], cameras=one.cameras[:2], depth=None
    )
    with pytest.raises(DatasetError, match="same size and number"):
        dataset.write(tmp_path / "a", [one, fewer], meta={})
    with pytest.raises(DatasetError, match="two objects are named"):
        dataset.write(tmp_path / "a", [one, one], meta={})
    with pytest.raises(ValueError, match="background"):
        dataset.write(tmp_path / "a", [one], meta={}, background=(0, 0, 300))
    with pytest.raises(ValueError, match="depth: holds NaN"):
        replace(one, depth=torch.full_like(one.depth, float("nan")))
    with pytest.raises(ValueError, match=r"alpha: got shape \(2, 16, 16\), want \(3, 16, 16\)"):
        replace(one, alpha=one.alpha[:2])
    with pytest.raises(ValueError, match="want uint8"):
        replace(one, rgb=one.rgb.float())


# --- hostile datasets --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"R": [[float("nan")] * 3] * 3}, "R is .*want finite numbers"),
        ({"R": [[2, 0, 0], [0, 1, 0], [0, 0, 1]]}, "not orthonormal"),
        ({"R": [[-1, 0, 0], [0, 1, 0], [0, 0, 1]]}, "not orthonormal"),
        ({"R": [[1, 0], [0, 1]]}, "shape"),
        ({"t": "far away"}, "t is 'far away'"),
        ({"t": [0, 0, float("inf")]}, "t is .*want finite"),
        ({"K": [[0, 0, 0]] * 3}, "not a pinhole"),
        ({"width": 99}, "99 x 16"),
    ],
)
def test_damaged_poses_name_the_file(written, change, message):
    edit_json(written.path / "image_0000/view_001/pose.json", **change)
    with pytest.raises(DatasetError, match=rf"image_0000/view_001/pose\.json: .*{message}"):
        seal(written.path)[0]


def test_damaged_files_name_themselves(written):
    base = written.path / "image_0000"
    whole = (base / "view_001/rgb.png").read_bytes()
    pose = (base / "view_001/pose.json").read_text()
    for scale in (None, -1):
        edit_json(base / "view_001/pose.json", depth_scale=scale)
        with pytest.raises(DatasetError, match=r"view_001/pose\.json: depth_scale is .*want a"):
            seal(written.path)[0]
    (base / "view_001/pose.json").write_text(pose)
    for data, message in [
        (whole[: len(whole) // 2], "truncated"),
        (b"", "empty file"),
        (b"hello", "not a readable image"),
    ]:
        (base / "view_001/rgb.png").write_bytes(data)
        with pytest.raises(DatasetError, match=rf"view_001/rgb\.png: .*{message}"):
            seal(written.path)[0]
    Image.new("RGB", (8, 8)).save(base / "view_001/rgb.png")
    with pytest.raises(DatasetError, match=r"view_001/rgb\.png: is 8 x 8 pixels"):
        seal(written.path)[0]
    Image.new("L", (SIZE, SIZE)).save(base / "view_001/rgb.png")
    with pytest.raises(DatasetError, match=r"view_001/rgb\.png: a PNG of mode L, want RGB"):
        seal(written.path)[0]
    (base / "input_pose.json").write_text("{")
    with pytest.raises(DatasetError, match=r"input_pose\.json: not valid JSON"):
        seal(written.path)[0]
    (base / "input.png").unlink()
    with pytest.raises(DatasetError, match=r"input\.png: was removed"):
        written[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"folder": "../elsewhere"}, "refuses"),
        ({"folder": "/etc"}, "refuses"),
        ({"files": {"../../secret.png": "0"}}, "refuses"),
        ({"files": {"view_000/../../rgb.png": "0"}}, "refuses"),
        ({"files": ["input.png"]}, "files is .*want an object"),
        ({"name": 3}, "name is '3', want text"),
        ({"name": "object 1"}, "share a name"),
    ],
)
def test_manifests_that_lead_elsewhere_are_refused(written, change, message):
    path = written.path / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["objects"][0] |= change
    path.write_text(json.dumps(manifest))
    with pytest.raises(DatasetError, match=message):
        dataset.open(written.path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 99}, "schema_version is 99"),
        ({"objects": []}, "lists no objects"),
        ({"image_size": "big"}, "image_size is 'big'"),
        ({"background": [0, 0, float("nan")]}, "background"),
        ({"meta": []}, "meta is .*want an object"),
    ],
)
def test_damaged_manifests_are_refused(written, change, message):
    edit_json(written.path / "manifest.json", **change)
    with pytest.raises(DatasetError, match=message):
        dataset.open(written.path)


def test_links_out_of_the_folder_are_refused(written, tmp_path):
    secret = tmp_path / "secret.png"
    Image.new("RGB", (SIZE, SIZE)).save(secret)
    path = written.path / "image_0000/view_000/rgb.png"
    path.unlink()
    path.symlink_to(secret)
    with pytest.raises(DatasetError, match="leads out of its folder"):
        written[0]
    with pytest.raises(DatasetError, match="leads out of its folder"):
        written.verify()


def test_folders_that_are_no_dataset_are_refused(tmp_path):
    with pytest.raises(DatasetError, match="no such folder"):
        dataset.open(tmp_path / "nowhere")
    with pytest.raises(DatasetError, match="not a dataset"):
        dataset.open(tmp_path)
    (tmp_path / "image_0000").mkdir()
    with pytest.raises(DatasetError, match=r"image_0000: has no input\.png"):
        dataset.open(tmp_path)


# --- images ------------------------------------------------------------------------------------


def save(path: Path, array: np.ndarray, **options: object) -> Path:
    Image.fromarray(array).save(path, **options)
    return path


def test_rgba_is_composited_over_black(tmp_path):
    rgba = np.zeros((2, 3, 4), np.uint8)
    rgba[...] = (200, 100, 50, 128)
    rgb, alpha = dataset.load_image(save(tmp_path / "a.png", rgba))
    assert rgb.shape == (2, 3, 3) and rgb.dtype == torch.uint8
    assert rgb[0, 0].tolist() == [100, 50, 25] and alpha.unique().tolist() == [128]


def test_grey_images_with_and_without_alpha(tmp_path):
    grey = np.full((2, 2), 77, np.uint8)
    rgb, alpha = dataset.load_image(save(tmp_path / "l.png", grey))
    assert rgb.unique().tolist() == [77] and alpha.unique().tolist() == [255]
    both = Image.merge("LA", [Image.fromarray(grey), Image.new("L", (2, 2), 0)])
    both.save(tmp_path / "la.png")
    rgb, alpha = dataset.load_image(tmp_path / "la.png")
    assert rgb.max() == 0 and alpha.max() == 0


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    deep = np.array([[0, 257, 32768, 65535]], np.uint16)
    rgb, _ = dataset.load_image(save(tmp_path / "deep.png", deep))
    assert rgb[0, :, 0].tolist() == [0, 1, 128, 255]


def test_palettes_with_transparency(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 210, 220])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "p.png", transparency=0)
    rgb, alpha = dataset.load_image(tmp_path / "p.png")
    assert alpha.tolist() == [[0, 255]] and rgb[0].tolist() == [[0, 0, 0], [200, 210, 220]]


def test_exif_rotation_is_applied(tmp_path):
    pixels = np.zeros((2, 4, 3), np.uint8)
    pixels[:, :2] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright: rotate by 90 degrees clockwise
    rgb, _ = dataset.load_image(save(tmp_path / "e.png", pixels, exif=exif))
    assert rgb.shape == (4, 2, 3)
    assert rgb[:2].min() == 255 and rgb[2:].max() == 0


def png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    ("data", "message"),
    [
        (png_header(60_000, 60_000), "megapixels"),
        (png_header(9_000, 6_000), "9000 x 6000 pixels.*50 megapixels"),
        (png_header(10_000, 10_000), "megapixels"),
        (png_header(64, 64), "truncated or damaged"),
        (b"just some text", "not a readable image"),
        (b"", "an empty file"),
    ],
)
def test_hostile_images_are_refused_by_name(tmp_path, data, message):
    path = tmp_path / "hostile.png"
    path.write_bytes(data)
    with pytest.raises(DatasetError, match=rf"hostile\.png: .*{message}"):
        dataset.load_image(path)
    with pytest.raises(DatasetError, match="hostile"):
        dataset.load_images(tmp_path, 8)


def test_missing_images_and_folders(tmp_path):
    with pytest.raises(DatasetError, match="no such file"):
        dataset.load_image(tmp_path / "none.png")
    with pytest.raises(DatasetError, match="no such folder"):
        dataset.load_images(tmp_path / "none", 8)
    (tmp_path / "notes.txt").write_text("not an image")
    with pytest.raises(DatasetError, match="holds no image"):
        dataset.load_images(tmp_path, 8)


def test_a_folder_of_photographs_becomes_inputs(tmp_path):
    photo = np.zeros((8, 16, 3), np.uint8)
    photo[:, 4:12] = 200  # the central square
    save(tmp_path / "b.png", photo)
    cut_out = np.zeros((8, 16, 4), np.uint8)
    cut_out[2:6, 0:4] = (90, 90, 90, 255)
    save(tmp_path / "a.png", cut_out)
    inputs = dataset.load_images(tmp_path, 8, elevation_deg=20.0)
    assert inputs.names == ("a", "b") and inputs.elevation_is_assumed
    assert inputs.rgb[1].unique().tolist() == [200] and inputs.alpha[1].unique().tolist() == [255]
    assert inputs.alpha[0, 3:5, 0:2].unique().tolist() == [255]  # padded to 16 x 16, then halved
    assert inputs.alpha[0].float().mean() / 255 == pytest.approx(4 / 64)
    assert torch.allclose(inputs.cameras.elevation_deg((0, 0, 0)), torch.tensor(20.0))


def test_input_batches_can_be_indexed(written):
    inputs = written.inputs()
    assert inputs.depth is not None and not inputs.elevation_is_assumed
    assert inputs[np.array([2, 0])].names == ("object 2", "object 0")
    assert inputs[1:].cameras.batch_shape == (2,)
    assert torch.equal(inputs[torch.tensor([1])].rgb[0], make_object(1).input_rgb)
    assert inputs.to("cpu").resized(8).alpha.shape == (3, 8, 8)
    with pytest.raises(TypeError, match="batches"):
        inputs[0]


def test_a_large_set_read_by_processes_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = dataset.write(tmp_path / "d", [make_object(i) for i in range(6)], meta={})
    alone = data.tensors()
    monkeypatch.setattr(dataset, "_RECORDS_A_WORKER", 2)
    monkeypatch.setattr(dataset, "core_count", lambda: 4)
    together = data.tensors()
    assert together.names == alone.names
    assert torch.equal(together.rgb, alone.rgb)
    assert torch.equal(together.cameras.viewmats, alone.cameras.viewmats)


@pytest.mark.parametrize("path", ["/etc/hostname", "../outside", "a/../../outside"])
def test_no_path_leads_out_of_the_folder(tmp_path: Path, path: str) -> None:
    with pytest.raises(DatasetError, match="leads out of"):
        _layouts.inside(tmp_path, path)
