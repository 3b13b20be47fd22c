"""Parts of the objects, views worth keeping, and the arithmetic of equal time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from boxes import views_of
from PIL import Image

from fresnel.data import dataset
from fresnel.data.dataset import DatasetError, MultiViewDataset
from fresnel.gate import verdict
from fresnel.objects import furniture, sources
from fresnel.objects import splits as studies
from fresnel.training.cvs_task import pairs_of

SPLITS = {"box0": "train", "box2": "train", "box3": "test", "box4": "val", "box6": "train"}


@pytest.fixture(scope="module")
def boxes(tmp_path_factory: pytest.TempPathFactory) -> MultiViewDataset:
    path = tmp_path_factory.mktemp("data") / "boxes"
    records = [replace(views_of(i, size=16, views=2), name=f"box{i}__0") for i in (0, 2, 3, 4, 6)]
    return dataset.write(path, records, meta={"object_splits": SPLITS})


def test_the_furniture_set_is_halved_by_kind_for_ever() -> None:
    objects = furniture.listing()["objects"]
    names = [entry["file"] for entry in objects]
    splits = {entry["file"]: entry["split"] for entry in objects}
    parts = {p: set(studies.choose(names, p, splits)) for p in ("A", "B", "A50", "rest50", "train")}
    assert {name: len(found) for name, found in parts.items()} == {
        "A": 233, "B": 213, "A50": 50, "rest50": 396, "train": 446,
    }  # fmt: skip
    unshipped = set(studies.choose(names, "unshipped", splits))
    assert len(unshipped) == 430 and unshipped < parts["train"]
    assert parts["A"] | parts["B"] == parts["train"] == parts["A50"] | parts["rest50"]
    assert not parts["A"] & parts["B"] and parts["A50"] < parts["A"]
    kinds = {entry["file"]: entry["group"] for entry in objects}
    assert not {kinds[n] for n in parts["A"]} & {kinds[n] for n in parts["B"]}
    assert set(studies.choose(names, "A25", splits)) < parts["A50"]
    # The order of the names, and which others are there, change nothing.
    assert set(studies.choose(names[::-2], "B", splits)) == parts["B"] & set(names[::-2])


def test_parts_of_a_dataset_keep_to_its_splits(boxes: MultiViewDataset) -> None:
    assert studies.part(boxes, "all") is boxes
    assert studies.part(boxes, "held_out").names == ("box3__0",)
    training = {*studies.part(boxes, "A").names, *studies.part(boxes, "B").names}
    assert studies.part(boxes, "A").names == ("box0__0",)
    assert training == {"box0__0", "box2__0", "box6__0"}
    assert studies.part(boxes, "A").content_hash == boxes.content_hash
    for wrong in ("C", "B5", "rest", "a"):
        with pytest.raises(ValueError, match="objects: got"):
            studies.part(boxes, wrong)
    with pytest.raises(DatasetError, match="asks for 400"):
        studies.part(boxes, "A400")


def test_a_dataset_is_a_source_of_truth_and_of_inputs(boxes: MultiViewDataset) -> None:
    source = str(boxes.path)
    truth = sources.ground_truth(source, "held_out", image_size=16)
    assert truth.names == ("box3__0",)
    two = sources.ground_truth(source, "train", image_size=16, objects=2)
    assert two.names == ("box0__0", "box2__0")
    inputs, words = sources.input_images(source, images=2, image_size=16)
    assert inputs.names == ("box0__0", "box2__0") and "2 input views" in words
    half, _ = sources.input_images(source, images=9, image_size=16, objects="B")
    assert set(half.names) == set(studies.part(boxes, "B").names)


def test_photographs_have_no_parts(tmp_path: Path) -> None:
    Image.new("RGB", (32, 32), "red").save(tmp_path / "photo.png")
    with pytest.raises(ValueError, match="folder of photographs"):
        sources.input_images(str(tmp_path), images=1, image_size=16, objects="B")


def test_shared_objects_are_refused() -> None:
    studies.require_apart(["a__0", "b__0"], ["c__0"])
    with pytest.raises(DatasetError, match="'b' is in the training data"):
        studies.require_apart(["a__0", "b__1"], ["b__0"])


def test_the_worst_views_are_those_furthest_from_their_input(monkeypatch) -> None:
    good = {"coverage_ratio": 1.0, "luminance_ratio": 1.1, "detail_ratio": 0.9}
    rows = [{"object": name, "view": view, **good} for name in "ab" for view in range(3)]
    rows[1] |= {"coverage_ratio": 0.0, "luminance_ratio": float("nan")}  # empty
    rows[5] |= {"detail_ratio": 0.2}  # blurred
    rows[2] |= {"luminance_ratio": 1.4}
    monkeypatch.setattr(verdict, "validate", lambda data: SimpleNamespace(measurements=rows))
    data = SimpleNamespace(names=("a", "b"), views_per_object=3)
    assert pairs_of(data, 0.0) is None
    assert pairs_of(data, 0.1).tolist() == [[i, j] for i in range(2) for j in range(3)]
    assert pairs_of(data, 0.2).tolist() == [
        [0, 0], [0, 2], [1, 0], [1, 1], [1, 2],
    ]  # fmt: skip
    assert pairs_of(data, 0.5).tolist() == [[0, 0], [1, 0], [1, 1]]
    rows.clear()
    assert len(pairs_of(data, 0.1)) == 6
    with pytest.raises(ValueError, match="drop"):
        pairs_of(data, 1.0)
