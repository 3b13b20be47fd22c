"""Every kind of source by parameter: ground truth, input images, and notebook 01 as it is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from test_dataset import write_original
from test_formats import co3d, colmap, nerfstudio, truth  # noqa: F401

from fresnel.data import dataset, layout
from fresnel.data.dataset import DatasetError, ObjectViews
from fresnel.objects import sources, splits
from fresnel.objects.assets import embedded_assets
from fresnel.report import run as report

ASSETS = Path(dataset.__file__).parents[1] / "assets"
GLBS = ("red_chair", "teddy_bear", "table")


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


def objects(folder: Path, _: ObjectViews) -> Path:
    folder.mkdir()
    for name in GLBS:
        shutil.copy(ASSETS / f"{name}.glb", folder)
    return folder


def manifest(folder: Path, views: ObjectViews) -> Path:
    splits = ("train", "train", "test")
    listed = [
        {"file": f"{name}.glb", "split": split} for name, split in zip(GLBS, splits, strict=True)
    ]
    (objects(folder, views) / "list.json").write_text(json.dumps(listed))
    return folder / "list.json"


def ours(folder: Path, views: ObjectViews) -> Path:
    return dataset.write(folder, [views], meta={}).path


def original(folder: Path, _: ObjectViews) -> Path:
    write_original(folder, 3)
    return folder


def models(folder: Path, views: ObjectViews) -> Path:
    colmap(folder, views, "txt")
    return folder


Make = Callable[[Path, ObjectViews], Path]
VIEWS: dict[str, Make] = {
    "nerfstudio": lambda folder, views: nerfstudio(_made(folder), views),
    "colmap": lambda folder, views: models(_made(folder), views),
    "co3d": lambda folder, views: co3d(_made(folder), views),
    "original": original,
    "ours": ours,
}
OBJECTS: dict[str, Make] = {"objects": objects, "manifest": manifest}


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


@pytest.mark.parametrize("kind", VIEWS)
def test_multi_view_data_is_taken_as_it_is(kind, truth, tmp_path):  # noqa: F811
    source = VIEWS[kind](tmp_path / kind, truth)
    assert not sources.holds_objects(source)
    data = sources.ground_truth(str(source), "train", image_size=32)
    assert data.content_hash == dataset.open(source).content_hash
    inputs, said = sources.input_images(str(source), images=2, image_size=32)
    assert 1 <= len(inputs) <= 2
    if kind == "ours":  # the input's camera is known
        assert not inputs.elevation_is_assumed and "input views" in said
        return
    assert inputs.elevation_is_assumed and "cameras assumed" in said
    assert inputs.rgb.shape[1] == sources.INPUT_SIZE
    assert inputs.cameras.centers.norm(dim=-1).sub(2.2).abs().max() < 1e-4


@pytest.mark.parametrize("kind", OBJECTS)
def test_objects_are_rendered_by_split(kind, truth, tmp_path):  # noqa: F811
    source = OBJECTS[kind](tmp_path / kind, truth)
    assert sources.holds_objects(source)
    options = {"image_size": 16, "views": 2, "samples": 1, "cache": tmp_path}
    data = sources.ground_truth(str(source), "train", **options)
    assert len(data) == (2 if kind == "manifest" else 3) and data.views_per_object == 2
    if kind == "manifest":
        held = sources.ground_truth(str(source), "held_out", **options)
        assert held.names == ("table__0",)
        with pytest.raises(DatasetError, match="no object of split 'val'"):
            sources.ground_truth(str(source), "val", image_size=16)
    options = {"image_size": 16, "cache": tmp_path / "inputs"}
    inputs, said = sources.input_images(str(source), images=2, **options)
    assert len(inputs) == 2 and not inputs.elevation_is_assumed
    assert said.startswith("2 rendered input views of 2 training objects")
    chosen = splits.choose([f"{name}" for name in GLBS[: len(data)]], "B")
    halves, said = sources.input_images(str(source), images=5, objects="B", **options)
    assert len(halves) == 5 and f"5 rendered input views of {len(chosen)} " in said
    assert {layout.object_name(name) for name in halves.names} == set(chosen)
    assert [name[-1] for name in halves.names] == sorted(name[-1] for name in halves.names)
    with pytest.raises(DatasetError, match="has no objects 'val'"):
        sources.input_images(str(source), images=5, objects="val", **options)


def test_objects_that_ship_can_be_left_out(tmp_path):
    shipped = next(asset for asset in embedded_assets() if asset.name == "table")
    listed = [{"file": f"{name}.glb"} for name in GLBS]
    listed[2]["source"] = shipped.origin
    (objects(tmp_path / "o", None) / "list.json").write_text(json.dumps(listed))
    options = {"image_size": 8, "views": 1, "samples": 1, "cache": tmp_path}
    source = str(tmp_path / "o" / "list.json")
    found = sources.ground_truth(source, "train", exclude_embedded=True, **options)
    assert found.names == ("red_chair__0", "teddy_bear__0")
    listed[:2] = []
    (tmp_path / "o" / "list.json").write_text(json.dumps(listed))
    with pytest.raises(DatasetError, match="holds no object"):
        sources.ground_truth(source, "train", exclude_embedded=True, **options)


def test_what_is_no_source_is_refused(tmp_path):
    for read in (sources.ground_truth, lambda s, _, image_size: sources.open(s)):
        with pytest.raises(DatasetError, match="no such"):
            read(str(tmp_path / "nothing"), "train", image_size=16)
    with pytest.raises(DatasetError, match="neither multi-view data nor 3D objects"):
        sources.ground_truth(str(tmp_path), "train", image_size=16)


@pytest.mark.parametrize(
    ("kind", "preset"),
    [("co3d", "none"), ("objects", "truth")],
)
def test_notebook_01_gates_it(kind, preset, truth, tmp_path):  # noqa: F811
    source = {**VIEWS, **OBJECTS}[kind](tmp_path / kind, truth)
    params = {"source": str(source), "preset": preset, "images": 3, "image_size": 32}
    notebook = Path(__file__).parent.parent / "notebooks" / "01_validate_data.ipynb"
    done = report.run(notebook, params, kind, tmp_path / "reports", progress=False)
    assert not done.crashed, done.record.error
    assert done.record.verdict in ("PASS", "FAIL") and done.record.metrics["views_seen"] >= 6
    assert "<h2" in done.report.read_text()
