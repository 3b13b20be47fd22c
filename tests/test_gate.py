"""Verdicts on healthy and broken data, and the receipts bound to it."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from boxes import Memory, views_of

from fresnel import faults, gate
from fresnel.data import dataset
from fresnel.data.dataset import DatasetError, MultiViewDataset, ObjectViews
from fresnel.gate import measure
from fresnel.gate import verdict as verdicts
from fresnel.gate.checks import Check, Seen
from fresnel.gate.decide import chance, is_faulty
from fresnel.scene.cameras import orbit


def original(index: int, **kwargs: Any) -> ObjectViews:
    """The original experiment's mistake: the orbit's pivot is 3 units from the object."""
    return views_of(index, centre=(0.0, 0.0, -3.0), radius=2.0, **kwargs)


def codes(records: list[Any], **kwargs: Any) -> list[str]:
    return [r.code for r in gate.validate(Memory(records), progress=False, **kwargs).reasons]


def test_healthy_data_passes_and_says_what_it_saw() -> None:
    verdict = gate.validate(Memory([views_of(i) for i in range(12)]), progress=False)
    assert verdict.passed and verdict.reasons == ()
    assert verdict.examples_seen == verdict.examples_total == 12
    assert len(verdict.measurements) == 12 * 8 and len(verdict.objects) == 12
    assert {round(row["azimuth_deg"]) % 360 for row in verdict.measurements} == {*range(0, 360, 45)}
    assert verdict.summary.startswith("PASS: 12 of 12 records (96 views)")
    again = json.loads(json.dumps(verdict.to_dict(), allow_nan=False))
    assert again["passed"] is True and len(again["measurements"]) == 96


def test_the_original_geometry_is_refused_for_its_pivot_not_its_exposure() -> None:
    verdict = gate.validate(Memory([original(i) for i in range(10)]), progress=False)
    first, *others = verdict.reasons
    assert first.code == "pivot_offset"
    assert "orbit a point" in first.message and "units away" in first.message
    assert first.values["pivot_distance"] == pytest.approx(3.0, abs=0.15)
    emptiness = next(reason for reason in others if reason.code == "views_empty")
    assert emptiness.symptom_of == "pivot_offset"
    assert not {"views_dark", "views_bright"} & {reason.code for reason in verdict.reasons}


def test_the_pivot_is_found_without_depth_too() -> None:
    verdict = gate.validate(Memory([original(i, depth=False) for i in range(10)]), progress=False)
    assert verdict.reasons[0].code == "pivot_offset"
    assert verdict.reasons[0].values["pivot_distance"] == pytest.approx(3.0, abs=0.3)
    assert any("no usable depth" in note for note in verdict.notes)


def test_the_original_geometry_rendered_from_a_mesh() -> None:
    trimesh = pytest.importorskip("trimesh")
    from fresnel.objects import trace

    records = []
    for i in range(4):
        mesh = trimesh.creation.box((0.3, 0.8 - 0.05 * i, 0.3))
        mesh.visual.vertex_colors = [200, 180, 160, 255]
        source = views_of(i)
        centre = torch.tensor([0.0, 0.0, 3.0])
        optics: dict[str, Any] = {"focal_px": 32.0, "width": 32, "height": 32}
        azimuth, elevation = torch.arange(8) * 45.0, torch.linspace(-30, 45, 8)
        around = orbit(azimuth, elevation, 2.0, pivot=centre, **optics)
        views = trace.render(trimesh.Scene([mesh]), around, samples=1)
        front = orbit(0.0, 0.0, 3.0, pivot=(0, 0, 0), **optics)
        image = trace.render(trimesh.Scene([mesh]), front.reshape(1), samples=1)
        byte = lambda x: (255 * torch.as_tensor(x) + 0.5).to(torch.uint8)  # noqa: E731
        records.append(
            replace(
                source,
                input_rgb=byte(image.rgb[0]),
                input_alpha=byte(image.alpha[0, ..., 0]),
                input_camera=front,
                input_depth=None,
                rgb=byte(views.rgb),
                alpha=byte(views.alpha[..., 0]),
                depth=torch.as_tensor(views.depth[..., 0]),
                cameras=around,
                pivot=centre,
                identity_rgb=None,
                identity_alpha=None,
            )
        )
    verdict = gate.validate(Memory(records), progress=False)
    assert verdict.reasons[0].code == "pivot_offset"
    assert verdict.reasons[0].values["pivot_distance"] == pytest.approx(3.0, abs=0.15)
    assert any("identity check skipped" in note for note in verdict.notes)


GREY, DARK, WHITE = torch.full((3, 3), 0.5), torch.full((3, 3), 0.03), torch.ones(3, 3)


@pytest.mark.parametrize(
    "look",
    [
        {"extent": (0.8, 0.9, 0.06)},
        {"extent": (0.05, 1.0, 0.05)},
        {"colors": DARK},
        {"colors": WHITE, "stripes": 0.0},
        {"colors": GREY, "stripes": 0.0},
        {"extent": (0.5, 0.5, 0.5)},
    ],
    ids=["flat", "pole", "dark", "white", "plain", "cube"],
)
def test_unusual_but_healthy_objects_pass(look: dict[str, Any]) -> None:
    verdict = gate.validate(Memory([views_of(i, **look) for i in range(10)]), progress=False)
    assert verdict.passed, verdict.summary


def test_a_symmetric_object_seen_from_one_height_is_not_frozen() -> None:
    """A plain solid of revolution looks the same from everywhere."""
    records = []
    for i in range(4):
        source = views_of(i)
        optics: dict[str, Any] = {"focal_px": 38.4, "width": 32, "height": 32}
        cameras = orbit(torch.arange(8) * 45.0, 0.0, 2.2, pivot=(0, 0, 0), **optics)
        origins, directions = cameras.rays()
        along = -(origins * directions).sum(-1)
        inside = (0.3 + 0.03 * i) ** 2 - (origins + along[..., None] * directions).square().sum(-1)
        depth = (along - inside.clamp_min(0).sqrt()) * (inside > 0)
        depth = depth * (directions * cameras.forward[:, None, None]).sum(-1)
        alpha = (inside > 0).to(torch.uint8) * 255
        rgb = (alpha * 0.5).to(torch.uint8)[..., None].expand(-1, -1, -1, 3).contiguous()
        views = replace(source, rgb=rgb, alpha=alpha, depth=depth, cameras=cameras)
        records.append(
            replace(
                views,
                input_rgb=rgb[0],
                input_alpha=alpha[0],
                input_depth=depth[0],
                input_camera=cameras[0],
                identity_rgb=None,
                identity_alpha=None,
            )
        )
    assert codes(records) == []
    # The same pictures from heights that differ can't be the same object.
    tilted = orbit(
        torch.arange(8) * 45.0, torch.linspace(-30, 45, 8), 2.2, pivot=(0, 0, 0), **optics
    )
    boxes = [replace(views_of(i), cameras=tilted) for i in range(4)]
    frozen = list(faults.corrupt(boxes, "frozen_views", 1.0))
    assert codes(frozen)[0] == "frozen_views"


def test_emptiness_is_not_called_exposure_and_darkness_not_emptiness() -> None:
    healthy = [views_of(i) for i in range(10)]
    assert codes(list(faults.corrupt(healthy, "empty_views", 1.0)))[0] == "views_empty"
    verdict = gate.validate(Memory(list(faults.corrupt(healthy, "darken", 0.9))), progress=False)
    assert [reason.code for reason in verdict.reasons] == ["views_dark"]
    assert "exposure, not emptiness" in verdict.summary
    assert verdict.reasons[0].values["luminance_ratio"] == pytest.approx(0.1, abs=0.03)


def test_ten_examples_decide_a_failure_and_the_rest_is_not_read() -> None:
    data = Memory(list(faults.corrupt([views_of(i % 3) for i in range(31)], "darken", 0.9)))
    verdict = gate.validate(data, progress=False)
    assert verdict.examples_seen == 10 and verdict.examples_total == 31
    assert {0, 30} <= set(data.read) and len(data.read) == 10


def test_the_whole_set_is_read_when_the_first_ten_pass() -> None:
    records = [views_of(i) for i in range(24)]
    bad = list(faults.corrupt(records, "nan_pose", 0.2))
    data = Memory([bad[i] if i == 1 else record for i, record in enumerate(records)])
    verdict = gate.validate(data, progress=False)
    assert verdict.reasons[0].code == "pose_invalid" and verdict.examples_seen > 10


def test_one_record_or_none() -> None:
    for i in (*range(8), 9, 10, 11):  # box 8 does leave its frames
        assert codes([views_of(i)]) == []
    dark = list(faults.corrupt([views_of(0)], "darken", 0.8))
    assert codes(dark) == ["views_dark"]
    verdict = gate.validate(Memory([]), progress=False)
    assert not verdict.passed and verdict.reasons[0].code == "no_data"
    with pytest.raises(ValueError, match="first, workers"):
        gate.validate(Memory([views_of(0)]), first=0)


def test_what_cannot_be_read_is_a_reason_not_a_crash() -> None:
    records = [views_of(i) for i in range(4)]
    verdict = gate.validate(Memory([*records, DatasetError("rgb.png: truncated")]), progress=False)
    assert [reason.code for reason in verdict.reasons] == ["unreadable"]
    assert "rgb.png: truncated" in verdict.summary
    json.dumps(verdict.to_dict(), allow_nan=False)
    everything = gate.validate(Memory([DatasetError("gone")] * 3), progress=False)
    assert everything.reasons[0].code == "unreadable"


def test_thresholds_can_be_set() -> None:
    records = [views_of(i) for i in range(5)]
    strict = gate.GateConfig(min_luminance_ratio=1.5)
    assert codes(records, config=strict) == ["views_dark"]


def test_no_light_at_all_is_dark_even_beside_a_black_input() -> None:
    def black(views: ObjectViews) -> ObjectViews:
        return replace(views, rgb=0 * views.rgb, input_rgb=0 * views.input_rgb)

    assert codes([black(views_of(i, identity=False)) for i in range(4)])[0] == "views_dark"


def test_a_set_of_single_views_is_no_multi_view_set() -> None:
    def alone(views: ObjectViews) -> ObjectViews:
        one = slice(0, 1)
        depth = views.depth[one] if views.depth is not None else None
        parts = {"rgb": views.rgb[one], "alpha": views.alpha[one], "depth": depth}
        return replace(views, cameras=views.cameras[one], **parts)

    assert "too_few_views" in codes([alone(views_of(i)) for i in range(6)])


def test_all_views_of_a_record_are_tested_and_no_order_is_guessed_from_some() -> None:
    """The views that a first look leaves out have each other's poses."""
    records = [views_of(i, views=32) for i in range(2)]
    assert codes(records) == []
    order = torch.arange(32)
    looked_at = torch.linspace(0, 31, 16).round().long()
    rest = order[~torch.isin(order, looked_at)]
    order[rest] = rest.roll(5)
    wrong = [replace(views, cameras=views.cameras[order]) for views in records]
    assert codes(wrong)[0] == "pose_mismatch"
    rolled = list(faults.corrupt(records, "rolled_poses", 1.0))
    first = gate.validate(Memory(rolled), progress=False).reasons[0]
    assert first.code == "pose_mismatch" and first.mend is None


def test_frozen_views_are_found_in_a_moment_among_hundreds() -> None:
    views = views_of(0, views=8, depth=False)
    many = {k: getattr(views, k).repeat(50, *[1] * (getattr(views, k).ndim - 1))
            for k in ("rgb", "alpha")}  # fmt: skip
    elevations = torch.linspace(-40, 50, 400)
    optics: dict[str, Any] = {"focal_px": 38.4, "width": 32, "height": 32}
    cameras = orbit(torch.arange(400) * 7.0, elevations, 2.2, pivot=(0, 0, 0), **optics)
    started = time.process_time()
    row = measure._frozen(
        many["rgb"].numpy(), many["alpha"].numpy(),
        np.stack([cameras.azimuth_deg((0, 0, 0)), elevations], 1), np.full(400, 0.2), 0.0,
    )  # fmt: skip
    assert row == 1.0 and time.process_time() - started < 2


@pytest.fixture
def written(tmp_path: Path) -> MultiViewDataset:
    return dataset.write(tmp_path / "set", [views_of(i, size=24) for i in range(3)], meta={})


def test_a_receipt_lets_exactly_its_data_through(written: MultiViewDataset) -> None:
    with pytest.raises(gate.GateRefusal, match=r"run_all\.sh validate"):
        gate.require_receipt(written)
    verdict = gate.validate(written, progress=False)
    issued = gate.issue_receipt(written, verdict)
    assert issued.passed and issued.dataset_hash == written.content_hash
    assert (issued.records_seen, issued.records_total) == (3, 3)
    assert issued.thresholds["max_hull_miss"] == gate.GateConfig().max_hull_miss
    assert gate.read_receipt(written) == issued
    assert gate.require_receipt(dataset.open(written.path)) == issued
    with pytest.raises(gate.GateRefusal, match="smoke_train"):
        gate.require_receipt(written, "smoke-cvs")


def test_a_receipt_of_other_data_is_refused(written: MultiViewDataset, tmp_path: Path) -> None:
    gate.issue_receipt(written, gate.validate(written, progress=False))
    other = dataset.write(tmp_path / "other", [views_of(9, size=24)], meta={})
    (other.path / "receipts").mkdir()
    copy = (written.path / "receipts" / "gate.json").read_text()
    (other.path / "receipts" / "gate.json").write_text(copy)
    with pytest.raises(gate.GateRefusal, match="other data"):
        gate.require_receipt(other, allow_failed=True)
    verdict = gate.validate(written, progress=False)
    with pytest.raises(ValueError, match="verdict: is about other data"):
        gate.issue_receipt(other, verdict)


@pytest.mark.parametrize("rows", [[0, 1], [0, 1, 1]])
def test_a_subset_certifies_nothing_but_itself(written: MultiViewDataset, rows: list[int]) -> None:
    verdict = gate.validate(written.subset(rows), progress=False)
    assert verdict.dataset_hash == written.content_hash and verdict.is_subset
    for data in (written, written.subset(rows)):
        with pytest.raises(ValueError, match="subset"):
            gate.issue_receipt(data, verdict)
    whole = gate.validate(written, progress=False)
    for part in (replace(whole, examples_seen=2), replace(whole, examples_total=2)):
        with pytest.raises(ValueError, match="verdict"):
            gate.issue_receipt(written, part)


def test_lax_thresholds_count_as_overridden(written: MultiViewDataset) -> None:
    dark = faults.apply(written, "darken", 0.95, written.path.parent / "dark")
    lax = gate.GateConfig(min_luminance_ratio=1e-9, dark_view=1e-9)
    verdict = gate.validate(dark, lax, progress=False)
    assert verdict.passed and gate.issue_receipt(dark, verdict).passed
    with pytest.raises(gate.GateRefusal, match="calibrated ones: min_luminance_ratio 1e-09"):
        gate.require_receipt(dark)
    assert gate.require_receipt(dark, allow_failed=True).overridden


def test_a_receipt_of_another_gate_is_void(written: MultiViewDataset) -> None:
    issued = gate.issue_receipt(written, gate.validate(written, progress=False))
    path = written.path / "receipts" / "gate.json"
    content = json.loads(path.read_text())
    for version in ({"gate_version": 1}, {}):
        old = {k: v for k, v in content.items() if k != "gate_version"} | version
        path.write_text(json.dumps(old))
        with pytest.raises(gate.GateRefusal, match="by gate 1"):
            gate.require_receipt(written)
    with pytest.raises(gate.GateRefusal, match="by gate 1"):
        gate.require_receipt(written, receipt=replace(issued, gate_version=1))


def test_tensors_are_let_through_by_their_hash(written: MultiViewDataset) -> None:
    receipt = gate.issue_receipt(written, gate.validate(written, progress=False))
    tensors = written.tensors()
    assert gate.require_receipt(tensors, receipt=receipt) == receipt
    for other in ("", "sha256:" + "0" * 64):
        with pytest.raises(gate.GateRefusal, match="other data"):
            gate.require_receipt(replace(tensors, content_hash=other), receipt=receipt)


def test_receipts_are_not_written_through_links(written: MultiViewDataset) -> None:
    verdict = gate.validate(written, progress=False)
    elsewhere = written.path.parent / "elsewhere"
    elsewhere.mkdir()
    (written.path / "receipts").symlink_to(elsewhere)
    with pytest.raises(ValueError, match="leads out"):
        gate.issue_receipt(written, verdict)
    (written.path / "receipts").unlink()
    (written.path / "receipts").mkdir()
    victim = elsewhere / "victim"
    victim.write_text("mine")
    (written.path / "receipts" / "gate.json").symlink_to(victim)
    with pytest.raises(ValueError, match="leads out"):
        gate.issue_receipt(written, verdict)
    assert victim.read_text() == "mine"


def test_changed_files_void_the_receipt(written: MultiViewDataset) -> None:
    gate.issue_receipt(written, gate.validate(written, progress=False))
    picture = next(written.path.rglob("view_000/rgb.png"))
    picture.write_bytes(picture.read_bytes() + b"\0")
    with pytest.raises(gate.GateRefusal, match=r"rgb\.png"):
        gate.require_receipt(written)


def test_a_failed_receipt_needs_an_override_that_stays_visible(written: MultiViewDataset) -> None:
    dark = faults.apply(written, "darken", 0.9, written.path.parent / "dark")
    receipt = gate.issue_receipt(dark, gate.validate(dark, progress=False))
    assert not receipt.passed and receipt.reasons[0].startswith("views_dark: ")
    with pytest.raises(gate.GateRefusal, match="views_dark"):
        gate.require_receipt(dark)
    through = gate.require_receipt(dark, allow_failed=True)
    assert through.overridden and not through.passed
    # A smoke verdict reached on waved-through data doesn't become a clean one.
    gate.write_receipt(dark, "smoke-cvs", True, "go", overridden=through.overridden)
    with pytest.raises(gate.GateRefusal, match="overridden"):
        gate.require_receipt(dark, "smoke-cvs")
    assert gate.require_receipt(dark, "smoke-cvs", allow_failed=True).overridden


def test_receipts_in_hand_broken_receipts_and_subsets(written: MultiViewDataset) -> None:
    verdict = gate.validate(written, progress=False)
    receipt = gate.issue_receipt(written, verdict)
    path = written.path / "receipts" / "gate.json"
    for text in ("{", "[]", '{"kind": "gate"}', '{"reasons": 3}'):
        path.write_text(text)
        with pytest.raises(gate.GateRefusal, match="receipt"):
            gate.require_receipt(written)
    assert gate.require_receipt(written, receipt=receipt) == receipt
    with pytest.raises(gate.GateRefusal, match="kind"):
        gate.require_receipt(written, "smoke-cvs", receipt=receipt)
    with pytest.raises(ValueError, match="kind"):
        gate.read_receipt(written, "diploma")
    with pytest.raises(ValueError, match="subset"):
        gate.issue_receipt(written.subset([0]), verdict)


def test_processes_measure_what_threads_measure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = [replace(views_of(i), name=f"box{i}") for i in range(12)]
    data = dataset.write(tmp_path / "d", records, meta={})
    alone = gate.validate(data, progress=False)
    started = []
    monkeypatch.setattr(verdicts, "_WORTH_PROCESSES", 1)
    monkeypatch.setattr(verdicts, "core_count", lambda: 4)
    pool = verdicts.processes
    monkeypatch.setattr(verdicts, "processes", lambda n: started.append(n) or pool(n))
    together = gate.validate(data, progress=False)
    assert started == [4]
    assert together.measurements == alone.measurements
    assert (together.passed, together.figures) == (alone.passed, alone.figures)


def test_a_record_that_alone_can_be_compared_is_judged_as_if_alone() -> None:
    check = Check("frozen_views", {"frozen": "max_frozen"}, "{frozen}", "")
    just_over = 1.1 * gate.GateConfig().max_frozen
    for other, flagged in ((0.0, 1.0), (np.nan, 0.0)):
        objects = [{"name": "", "views": 0, "frozen": value} for value in (just_over, other)]
        assert check(Seen([], objects, gate.GateConfig())).flags[0] == flagged


def test_error_probabilities_of_the_sequential_test() -> None:
    config = gate.GateConfig()
    assert [is_faulty(shown, 10, config, final=False) for shown in (0, 3, 6)] == [0, 0, 1]
    assert [is_faulty(shown, 10, config, final=True) for shown in (2, 3, 4)] == [0, 0, 1]
    assert chance(1, 1, 0.05) == pytest.approx(0.05)
    assert chance(3, 10, 0.05) == pytest.approx(0.0115, abs=1e-4)
    rng, looks = np.random.default_rng(0), np.arange(10, 401, 10)

    def refused(rate: float) -> float:
        shown = np.cumsum(rng.random((2000, 400)) < rate, axis=1)[:, looks - 1]
        least = [
            next(k for k in range(n + 1) if is_faulty(k, int(n), config, final=False))
            for n in looks
        ]
        return float((shown >= least).any(axis=1).mean())

    assert refused(config.healthy_rate) < 0.003 and refused(config.faulty_rate) > 0.98
    with pytest.raises(ValueError, match="healthy_rate"):
        gate.GateConfig(healthy_rate=0.6)
