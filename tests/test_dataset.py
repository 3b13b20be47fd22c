"""Datasets on disk: round trips, hashes, both layouts, hostile files."""

import errno
import json
import os
import shutil
import struct
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_formats import nerfstudio

from fresnel import orbit
from fresnel.data import dataset, photos
from fresnel.data import layout as _layouts
from fresnel.data.dataset import DatasetChanged, DatasetError, ObjectViews
from fresnel.host import files
from fresnel.scene.cameras import Cameras, opengl

SIZE, VIEWS = 16, 3
PICTURES = ("input_rgb", "input_alpha", "identity_rgb", "identity_alpha", "rgb", "alpha", "pivot")


def make_object(seed: int, background: tuple[float, float, float] = (0, 0, 0)) -> ObjectViews:
    rng = np.random.default_rng(seed)
    alpha = rng.choice(np.array([0, 128, 255], np.uint8), (VIEWS + 1, SIZE, SIZE))
    color = rng.uniform(0, 1, (VIEWS + 1, SIZE, SIZE, 3))
    alpha[:, 0, 0], color[:, 0, 0] = 128, 0.01  # dark, not empty
    weight = alpha[..., None] / 255
    black = (color * weight * 255 + 0.5).astype(np.uint8)
    over = ((color * weight + np.array(background) * (1 - weight)) * 255 + 0.5).astype(np.uint8)
    depth = (rng.uniform(1.2, 3.2, alpha.shape) * (alpha > 0)).astype(np.float32)
    depth[:, 0, 0] = 1e-6  # less than a step of what is stored, and not nothing
    elevations = torch.from_numpy(rng.uniform(-30, 45, VIEWS + 1))
    optics = {"focal_px": 1.2 * SIZE, "width": SIZE, "height": SIZE}
    azimuths = torch.tensor([20.0, 20.0, 140.0, 260.0])
    cameras = orbit(azimuths, elevations, 2.2, pivot=(0.1, 0.2, 0.3), **optics)
    first = {"input_rgb": black[0], "input_alpha": alpha[0], "input_camera": cameras[0]}
    more = {"identity_rgb": black[0], "identity_alpha": alpha[0], "input_depth": depth[0]}
    views = {"rgb": over[1:], "alpha": alpha[1:], "cameras": cameras[1:], "depth": depth[1:]}
    said = {"name": f"object {seed}", "attribution": "someone (CC0-1.0)"}
    return ObjectViews(**said, **first, **views, **more, pivot=(0.1, 0.2, 0.3))


@pytest.fixture()
def written(tmp_path: Path) -> dataset.MultiViewDataset:
    return dataset.write(tmp_path / "set", map(make_object, range(3)), meta={"seed": 1})


def write_original(root: Path, count: int = 2) -> list[Cameras]:
    """The original experiment's layout, as its own script left it."""
    cameras = []
    for i in range(count):
        base, views = root / f"image_{i:04d}", make_object(i)
        cameras.append(views.cameras)
        base.mkdir(parents=True)
        Image.fromarray(views.input_rgb.numpy()).save(base / "input.png")
        np.save(base / "input_features.npy", np.zeros((37, 37, 4), np.float32))
        np.save(base / "input_depth.npy", np.zeros((1, SIZE, SIZE), np.float32))
        theirs = opengl(views.cameras.viewmats)
        for k in range(VIEWS):
            view = base / f"view_{k:03d}"
            view.mkdir()
            Image.fromarray(views.rgb[k].numpy()).save(view / "rgb.png")
            np.save(view / "depth.npy", views.depth[k].numpy())
            pose = {"R": theirs[k, :3, :3].tolist(), "t": theirs[k, :3, 3].tolist()}
            (view / "pose.json").write_text(json.dumps(pose))
    return cameras


def test_what_is_written_is_read_back(written, tmp_path):
    reopened = dataset.open(written.path)
    assert reopened == written
    assert (reopened.image_size, reopened.views_per_object, len(reopened)) == (SIZE, VIEWS, 3)
    for index in range(3):
        want, got = make_object(index), reopened[index]
        for field in PICTURES:
            assert torch.equal(getattr(got, field), getattr(want, field)), field
        for a, b in ((got.cameras, want.cameras), (got.input_camera, want.input_camera)):
            assert torch.equal(a.viewmats, b.viewmats) and torch.equal(a.Ks, b.Ks)
        assert (got.depth - want.depth).abs().max() <= 2.0**-14
        assert torch.equal(got.depth == 0, want.depth == 0)
        assert (got.name, got.attribution) == (want.name, want.attribution)
    again = dataset.write(tmp_path / "again", (written[i] for i in range(3)), meta={"seed": 1})
    assert again.content_hash == written.content_hash  # no byte has changed


def test_pose_files_hold_opengl_world_to_camera_and_relative_azimuths(written):
    pose = json.loads((written.path / "image_0001/view_001/pose.json").read_text())
    theirs = opengl(make_object(1).cameras[1].viewmats)
    assert np.allclose(np.column_stack([pose["R"], pose["t"]]), theirs[:3])
    assert pose["azimuth_deg"] == pytest.approx(120.0, abs=1e-3)
    # An OpenGL camera looks down its own -z: the pivot lies in front of it.
    assert (np.array(pose["R"]) @ np.array([0.1, 0.2, 0.3]) + pose["t"])[2] < 0


def test_tensors_scale_pictures_cameras_and_depth(written):
    full, half = written.tensors(), written.tensors(SIZE // 2)
    assert full.rgb.shape == (3, VIEWS, SIZE, SIZE, 3) and len(full) == 3
    assert half.rgb.shape == (3, VIEWS, SIZE // 2, SIZE // 2, 3)
    assert half.cameras.width == SIZE // 2 and half.inputs.cameras.width == SIZE // 2
    assert torch.allclose(half.cameras.Ks[..., 0, 2], torch.tensor(SIZE / 4))
    block = full.rgb[1, 2, 4:6, 6:8].float().mean(dim=(0, 1))
    assert (half.rgb[1, 2, 2, 3].float() - block).abs().max() <= 0.5
    covered, halved = full.depth[full.depth > 0], half.depth[half.alpha > 0]
    assert halved.min() >= covered.min() - 1e-4 and halved.max() <= covered.max() + 1e-4
    assert full[1:].names == full.names[1:] and len(full[[0, 2]]) == 2


def test_views_over_white_come_back_over_black(tmp_path):
    objects = [make_object(5, (1, 1, 1))]
    white = dataset.write(tmp_path / "white", objects, background=(1, 1, 1), meta={})
    got = white.tensors().rgb[0]
    assert (got.int() - make_object(5).rgb.int()).abs().max() <= 1
    # what is made of it is over black too, wherever it goes
    copied = dataset.write(tmp_path / "copy", [white[0]], meta={})[0]
    assert torch.equal(got, white[0].rgb) and torch.equal(copied.rgb, white[0].rgb)


def test_inputs_of_unequal_size_are_scaled_to_the_views(tmp_path):
    first = replace(make_object(0), input_depth=None, identity_rgb=None, identity_alpha=None)
    small = first.input().resized(8)
    pictures = {"input_rgb": small.rgb[0], "input_alpha": small.alpha[0]}
    other = replace(first, **pictures, input_camera=small.cameras[0])
    mixed = dataset.write(tmp_path / "mixed", [make_object(1), other], meta={}).inputs()
    assert mixed.rgb.shape == (2, SIZE, SIZE, 3) and mixed.depth is None


def test_subsets_keep_the_hash_of_the_whole_and_say_so(written):
    part = written.subset(["object 2", "object 0"])
    assert part.names == ("object 2", "object 0") and part.is_subset
    assert part.content_hash == written.content_hash
    assert part[0].name == "object 2" and len(written.subset(slice(2))) == 2
    part.verify()
    edit_pixel(written.path)  # of the third
    with pytest.raises(DatasetChanged):
        part.verify()
    for which, message in ((["nobody"], "no object named 'nobody'"), ([], "empty")):
        with pytest.raises(DatasetError, match=message):
            written.subset(which)


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def seal(root: Path) -> dataset.MultiViewDataset:
    """Give the manifest the hashes of what lies there now, as if it had been written so."""
    manifest = json.loads((root / "manifest.json").read_text())
    for said in manifest["objects"]:
        for file in said["files"]:
            said["files"][file] = _layouts.sha256((root / said["folder"] / file).read_bytes())
    records = [_layouts.Record(**said) for said in manifest["objects"]]
    manifest["content_hash"] = _layouts.content_hash(records, manifest)
    (root / "manifest.json").write_text(json.dumps(manifest))
    return dataset.open(root)


def edit_pixel(root: Path) -> None:
    path = root / "image_0001/view_001/rgb.png"
    pixels = np.array(Image.open(path))
    pixels[0, 0, 0] ^= 1
    Image.fromarray(pixels).save(path)


def edit_pose(root: Path) -> None:
    path = root / "image_0000/view_002/pose.json"
    path.write_text(path.read_text() + "\n")


EDITS: dict[str, Callable[[Path], Any]] = {
    "pixel": edit_pixel,
    "pose": edit_pose,
    "removed": lambda root: (root / "image_0002/input_alpha.png").unlink(),
    "view": lambda root: shutil.copytree(
        root / "image_0000/view_000", root / "image_0000/view_003"
    ),
    "object": lambda root: shutil.copytree(root / "image_0000", root / "image_0003"),
    "set": lambda root: dataset.write(root, [make_object(9)], meta={}, overwrite=True),
}


@pytest.mark.parametrize("edit", EDITS)
def test_any_edit_is_noticed(written, tmp_path, edit):
    written.verify()
    EDITS[edit](written.path)
    with pytest.raises(DatasetChanged):
        written.verify()
    if edit == "set":
        return
    root = tmp_path / "original"
    write_original(root, 3)
    (root / "image_0002/input_alpha.png").write_bytes(b"something that may be removed")
    before = dataset.open(root)
    before.verify()
    EDITS[edit](root)
    assert dataset.open(root).content_hash != before.content_hash
    with pytest.raises(DatasetChanged):
        before.verify()


def test_receipts_are_not_part_of_the_hash_but_meta_and_attributions_are(written, tmp_path):
    (written.path / "receipts").mkdir()
    (written.path / "receipts/gate.json").write_text("{}")
    (written.path / "image_0000/.DS_Store").write_text("finder")
    written.verify()
    objects = [make_object(i) for i in range(3)]
    others = [replace(views, attribution="someone else") for views in objects]
    for k, (views, meta) in enumerate(((objects, {"seed": 2}), (others, {"seed": 1}))):
        made = dataset.write(tmp_path / str(k), views, meta=meta)
        assert made.content_hash != written.content_hash


@pytest.mark.parametrize(
    "change",
    [
        *({"background": [1, 1, 1]}, {"background": [0, 0, float("nan")]}, {"background": None}),
        *({"meta": {}}, {"image_size": 8}, {"image_size": "big"}, {"objects": []}, {"objects": 3}),
        *({"objects": [{"folder": "../elsewhere"}]}, {"content_hash": None}),
    ],
    ids=str,
)
def test_an_edited_manifest_is_refused(written, change):
    edit_json(written.path / "manifest.json", **change)
    with pytest.raises(DatasetChanged, match=r"manifest\.json: was edited"):
        dataset.open(written.path)


def test_manifests_of_other_versions_or_that_lead_elsewhere_are_refused(written):
    path = written.path / "manifest.json"
    sound = path.read_text()
    for folder, file in (("..", "input.png"), ("image_0000", "../../secret.png")):
        manifest = json.loads(sound)
        said = manifest["objects"][0]
        said["folder"], said["files"][file] = folder, said["files"]["input.png"]
        records = [_layouts.Record(**each) for each in manifest["objects"]]
        manifest["content_hash"] = _layouts.content_hash(records, manifest)
        path.write_text(json.dumps(manifest))
        forged = dataset.open(written.path)
        with pytest.raises(DatasetError, match="leads out of its folder"):
            forged[0] if folder == ".." else forged.verify()
    path.write_text(sound)
    edit_json(path, schema_version=1)
    with pytest.raises(DatasetError, match="schema_version is 1, want 2"):
        dataset.open(written.path)


@pytest.mark.parametrize("layout", ["set", "captures", "original"])
def test_no_word_in_a_manifest_switches_the_check_of_files_off(written, layout):
    edit_json(written.path / "manifest.json", layout=layout)
    opened = dataset.open(written.path)
    assert opened.layout == "fresnel"
    edit_pixel(written.path)
    with pytest.raises(DatasetChanged, match=r"view_001/rgb\.png"):
        opened.verify()


def test_what_is_decoded_is_what_was_hashed(written, tmp_path):
    """Files that are exchanged after opening, and back again, are noticed while they are read."""
    write_original(tmp_path / "original", 2)
    capture = nerfstudio(tmp_path / "captured", written[1], w=SIZE, h=SIZE)
    for opened in (written, dataset.open(tmp_path / "original"), dataset.open(capture)):
        path = next(p for p in sorted(opened.path.rglob("*.png")) if "001" in str(p))
        before = path.read_bytes()
        Image.new(Image.open(path).mode, Image.open(path).size).save(path)
        for read in (lambda: opened[0], opened.tensors):  # noqa: B023
            with pytest.raises(DatasetChanged, match="was changed after its hash"):
                read()
        path.write_bytes(before)
        assert len(opened[0].rgb) >= VIEWS


def test_a_stored_set_cannot_be_opened_at_another_size(written, tmp_path):
    write_original(tmp_path / "original", 1)
    for path in (written.path, tmp_path / "original"):
        for options in ({"image_size": 8}, {"views": 2}):
            with pytest.raises(DatasetError, match="are for captures, this set is stored"):
                dataset.open(path, **options)


def test_the_original_layout_opens_as_it_is(tmp_path):
    root = tmp_path / "original"
    cameras = write_original(root)
    opened = dataset.open(root)
    assert (opened.layout, opened.names) == ("original", ("image_0000", "image_0001"))
    assert opened.meta["alpha_source"] == "estimated"
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
    np.save(root / "image_0000/view_000/depth.npy", np.zeros((4, 4), np.float32))
    with pytest.raises(DatasetError, match=r"view_000/depth\.npy: is 4 x 4 pixels"):
        dataset.open(root)[0]
    shutil.rmtree(root / "image_0001/view_002")
    with pytest.raises(DatasetError, match=r"image_0001.*has 2 views"):
        dataset.open(root)[1]


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def interrupted(objects: list[ObjectViews]) -> Any:
    yield from objects
    raise KeyboardInterrupt


def full(*args: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def dies(*args: object) -> None:
    os._exit(9)


def test_a_write_that_fails_leaves_nothing_and_keeps_the_old_dataset(
    written, tmp_path, monkeypatch
):
    with pytest.raises(KeyboardInterrupt):
        dataset.write(tmp_path / "other", interrupted([make_object(0)]), meta={})
    with pytest.raises(DatasetError, match="nothing to write"):
        dataset.write(written.path, [], meta={}, overwrite=True)
    monkeypatch.setattr(dataset, "write_object", full)
    with pytest.raises(DatasetError, match=r"disk is full.*Nothing was kept"):
        dataset.write(written.path, [make_object(0)], meta={}, overwrite=True)
    dataset.open(written.path).verify()
    assert leftovers(tmp_path) == ["set"]


def test_encoding_and_reading_in_processes_change_no_byte_and_fail_alike(
    written, tmp_path, monkeypatch
):
    alone = written.tensors()
    crews: list[int] = []
    lent = dataset.processes
    monkeypatch.setattr(dataset, "core_count", lambda: 4)
    monkeypatch.setattr(dataset, "processes", lambda n: crews.append(n) or lent(n))
    monkeypatch.setattr(dataset, "_WORTH_PROCESSES", 1)
    monkeypatch.setattr(dataset, "_RECORDS_A_WORKER", 1)
    objects = [written[i] for i in range(len(written))]
    made = dataset.write(tmp_path / "there", objects, meta=written.meta, total=len(objects))
    assert made.content_hash == written.content_hash
    together = made.tensors()
    assert crews == [4, 3] and together.names == alone.names
    assert torch.equal(together.rgb, alone.rgb)
    assert torch.equal(together.cameras.viewmats, alone.cameras.viewmats)
    with pytest.raises(KeyboardInterrupt):
        dataset.write(tmp_path / "other", interrupted(objects[:2]), meta={}, total=9)
    monkeypatch.setattr(dataset, "write_object", dies)
    with pytest.raises(DatasetError, match=r"killed.*Nothing was kept"):
        dataset.write(tmp_path / "other", objects, meta={}, total=9)
    assert leftovers(tmp_path) == ["set", "there"]


def test_write_refuses_to_overwrite_unasked_and_what_is_not_a_dataset(written, tmp_path):
    with pytest.raises(DatasetError, match="overwrite=True"):
        dataset.write(written.path, [make_object(0)], meta={})
    (tmp_path / "home").mkdir()
    for name, text in (("letter.txt", "dear"), ("manifest.json", '{"name": "a web page"}')):
        (tmp_path / "home" / name).write_text(text)
        with pytest.raises(DatasetError, match="not of ours"):
            dataset.write(tmp_path / "home", [make_object(0)], meta={}, overwrite=True)
    assert (tmp_path / "home/letter.txt").exists()


class Killed(BaseException):
    """Nothing that comes after it is done, as after SIGKILL."""


@pytest.mark.parametrize("steps", [1, 2], ids=["in one step", "in two steps"])
def test_a_set_that_is_replaced_is_never_absent(steps, written, tmp_path, monkeypatch):
    """Killed at any moment of the swap, the next who opens it finds the old set or the new one, and
    the next who writes it leaves nothing beside.  (`benchmarks/kills.py` kills processes.)"""
    path, new = written.path, [make_object(7)]
    wanted = dataset.write(tmp_path / "wanted", new, meta={}).content_hash
    if steps == 2:
        monkeypatch.setattr(files, "exchange", lambda one, other: False)
    names = [(Path, "rename"), (files, "exchange"), (files, "remove"), (Path, "unlink")]
    for at in range(1, 99):
        shutil.rmtree(path)
        shutil.copytree(written_again(tmp_path), path)
        with monkeypatch.context() as patch:
            left = [at]
            for module, name in names:
                patch.setattr(module, name, dying(getattr(module, name), left))
            try:
                dataset.write(path, new, meta={}, overwrite=True)
            except Killed:
                left = []
        found = dataset.open(path)
        found.verify()
        assert found.content_hash in (written.content_hash, wanted)
        made = dataset.write(path, new, meta={}, overwrite=True)
        assert made.content_hash == wanted
        assert leftovers(tmp_path) == ["again", "set", "wanted"], at
        if left:
            break
    assert at > 3


def dying(act: Any, left: list[int]) -> Any:
    def acted(*args: Any, **options: Any) -> Any:
        left[0] -= 1
        if left[0] <= 0:
            raise Killed
        return act(*args, **options)

    return acted


def written_again(folder: Path) -> Path:
    if not (folder / "again").exists():
        dataset.write(folder / "again", map(make_object, range(3)), meta={"seed": 1})
    return folder / "again"


def test_who_wants_a_set_that_is_being_made_waits_and_takes_it(tmp_path, capsys):
    made: list[str] = []

    def slowly(name: str) -> Any:
        made.append(name)
        time.sleep(0.3)
        yield make_object(0)

    def want(name: str) -> str:
        return dataset.write(tmp_path / "set", slowly(name), meta={}, reuse=True).content_hash

    with ThreadPoolExecutor(3) as threads:
        assert len(set(threads.map(want, "abc"))) == 1
    assert len(made) == 1 and leftovers(tmp_path) == ["set"]
    assert f"another process makes it; waiting (process {os.getpid()})" in capsys.readouterr().err
    before = (tmp_path / "set").stat().st_ino
    dataset.write(tmp_path / "set", slowly("d"), meta={}, overwrite=True)
    assert (tmp_path / "set").stat().st_ino == before, "the same set is left to who reads it"


def test_what_does_not_fit_is_refused(tmp_path):
    one = make_object(0)
    fewer = {"rgb": one.rgb[:2], "alpha": one.alpha[:2], "cameras": one.cameras[:2], "depth": None}
    for objects, options, message in (
        ([one, replace(one, name="b", **fewer)], {}, "same size and number"),
        ([one, one], {}, "two objects are named"),
        ([one], {"background": (0, 0, 300)}, "background"),
    ):
        with pytest.raises(ValueError, match=message):
            dataset.write(tmp_path / "a", objects, meta={}, **options)
    for change, message in (
        ({"depth": torch.full_like(one.depth, float("nan"))}, "depth: holds NaN"),
        ({"alpha": one.alpha[:2]}, r"alpha: got shape \(2, 16, 16\), want \(3, 16, 16\)"),
        ({"rgb": one.rgb.float()}, "want uint8"),
        ({"cameras": one.cameras[:2]}, r"cameras .*got shape \(2, 16, 16\)"),
        ({"identity_rgb": None}, "want both or neither"),
        ({"pivot": [0, 0, float("inf")]}, "three finite numbers"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(one, **change)


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
        ({"K": [[0, 0, 8], [0, 9, 8], [0, 0, 1]]}, "focal length is not positive"),
        ({"width": 99}, "99 x 16"),
        ({"depth_scale": None}, "depth_scale is .*want a number"),
        ({"depth_scale": -1}, "depth_scale is .*want a positive"),
    ],
)
def test_damaged_poses_name_the_file(written, change, message):
    edit_json(written.path / "image_0000/view_001/pose.json", **change)
    with pytest.raises(DatasetError, match=rf"image_0000/view_001/pose\.json: .*{message}"):
        seal(written.path)[0]


def test_damaged_files_name_themselves(written, tmp_path):
    base = written.path / "image_0000"
    whole = (base / "view_001/rgb.png").read_bytes()
    Image.new("RGB", (8, 8)).save(tmp_path / "small.png")
    Image.new("L", (SIZE, SIZE)).save(tmp_path / "grey.png")
    for data, message in (
        (whole[: len(whole) // 2], "truncated"),
        (b"", "empty file"),
        (b"hello", "not a readable image"),
        ((tmp_path / "small.png").read_bytes(), "is 8 x 8 pixels"),
        ((tmp_path / "grey.png").read_bytes(), "a PNG of mode L, want RGB"),
    ):
        (base / "view_001/rgb.png").write_bytes(data)
        with pytest.raises(DatasetError, match=rf"view_001/rgb\.png: .*{message}"):
            seal(written.path)[0]
    (base / "input_pose.json").write_text("{")
    with pytest.raises(DatasetError, match=r"input_pose\.json: not valid JSON"):
        seal(written.path)[0]
    (base / "input.png").unlink()
    with pytest.raises(DatasetError, match=r"input\.png: was removed"):
        written[0]


def test_links_out_of_the_folder_are_refused(written, tmp_path):
    path = written.path / "image_0000/view_000/rgb.png"
    path.rename(tmp_path / "secret.png")
    path.symlink_to(tmp_path / "secret.png")
    for read in (lambda: written[0], written.verify):
        with pytest.raises(DatasetError, match="leads out of its folder"):
            read()


def test_folders_that_are_no_dataset_are_refused(tmp_path):
    with pytest.raises(DatasetError, match="no such folder"):
        dataset.open(tmp_path / "nowhere")
    with pytest.raises(dataset.NotADataset, match="not a dataset"):
        dataset.open(tmp_path)
    (tmp_path / "image_0000").mkdir()
    with pytest.raises(DatasetError, match=r"holds no object|image_0000: has no input\.png"):
        dataset.open(tmp_path)
    for path in ("/etc/hostname", "../outside", "a/../../outside"):
        with pytest.raises(DatasetError, match="leads out of"):
            _layouts.inside(tmp_path, path)


def test_sets_beside_what_is_another_programs(written, tmp_path):
    """A foreign manifest.json is passed over; a set where a picture should be is named."""
    shutil.copytree(written.path, tmp_path / "all/one")
    (tmp_path / "all/web").mkdir()
    (tmp_path / "all/web/manifest.json").write_text('{"name": "web app"}')
    assert len(dataset.open(tmp_path / "all")) == len(written)
    frame = {"file_path": "one/image_0000", "transform_matrix": np.eye(4).tolist()}
    (tmp_path / "all/transforms.json").write_text(json.dumps({"frames": [frame]}))
    with pytest.raises(DatasetError, match="one/image_0000: no such file"):
        dataset.open(tmp_path / "all")


def save(path: Path, array: np.ndarray, **options: object) -> Path:
    Image.fromarray(array).save(path, **options)
    return path


def test_images_of_every_kind_become_rgb_over_black_and_alpha(tmp_path):
    grey, path = np.full((2, 2), 77, np.uint8), tmp_path / "a.png"
    rgb, alpha = dataset.load_image(save(path, np.full((2, 3, 4), (200, 100, 50, 128), np.uint8)))
    assert rgb.shape == (2, 3, 3) and rgb.dtype == torch.uint8
    assert rgb[0, 0].tolist() == [100, 50, 25] and alpha.unique().tolist() == [128]
    rgb, alpha = dataset.load_image(save(path, grey))
    assert rgb.unique().tolist() == [77] and alpha.unique().tolist() == [255]
    Image.merge("LA", [Image.fromarray(grey), Image.new("L", (2, 2), 0)]).save(path)
    rgb, alpha = dataset.load_image(path)
    assert rgb.max() == 0 and alpha.max() == 0
    # 16 bits are scaled, not clipped
    rgb, _ = dataset.load_image(save(path, np.array([[0, 257, 32768, 65535]], np.uint16)))
    assert rgb[0, :, 0].tolist() == [0, 1, 128, 255]
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 210, 220])
    image.putpixel((1, 0), 1)
    image.save(path, transparency=0)
    rgb, alpha = dataset.load_image(path)
    assert alpha.tolist() == [[0, 255]] and rgb[0].tolist() == [[0, 0, 0], [200, 210, 220]]
    pixels = np.zeros((2, 4, 3), np.uint8)
    pixels[:, :2] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright: rotate by 90 degrees clockwise
    rgb, _ = dataset.load_image(save(path, pixels, exif=exif))
    assert rgb.shape == (4, 2, 3) and rgb[:2].min() == 255 and rgb[2:].max() == 0


def png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_hostile_images_and_missing_ones_are_refused_by_name(tmp_path):
    for data, message in (
        (png_header(60_000, 60_000), "megapixels"),
        (png_header(9_000, 6_000), "9000 x 6000 pixels.*50 megapixels"),
        (png_header(10_000, 10_000), "megapixels"),
        (png_header(64, 64), "truncated or damaged"),
        (b"just some text", "not a readable image"),
        (b"", "an empty file"),
    ):
        (tmp_path / "hostile.png").write_bytes(data)
        with pytest.raises(DatasetError, match=rf"hostile\.png: .*{message}"):
            dataset.load_image(tmp_path / "hostile.png")
        with pytest.raises(DatasetError, match="hostile"):
            photos.read_folder(tmp_path, 8)
    with pytest.raises(DatasetError, match="no such file"):
        dataset.load_image(tmp_path / "none.png")
    with pytest.raises(DatasetError, match="no such folder"):
        photos.read_folder(tmp_path / "none", 8)
    (tmp_path / "hostile.png").rename(tmp_path / "notes.txt")
    with pytest.raises(DatasetError, match="holds no image"):
        photos.read_folder(tmp_path, 8)
