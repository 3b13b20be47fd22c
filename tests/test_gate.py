"""Verdicts on healthy and broken data, and the receipts bound to it."""

import json
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from boxes import Memory, cast, views_of

from fresnel import faults, gate
from fresnel.data import dataset
from fresnel.data.dataset import DatasetError, MultiViewDataset, ObjectViews
from fresnel.data.records import oriented, turned_world
from fresnel.gate import measure
from fresnel.gate import verdict as verdicts
from fresnel.gate.checks import Check, Seen
from fresnel.gate.decide import chance, is_faulty
from fresnel.gate.fix import plan
from fresnel.poses import transforms
from fresnel.scene.cameras import orbit

OPTICS: dict[str, Any] = {"focal_px": 38.4, "width": 32, "height": 32}


def original(index: int, **kwargs: Any) -> ObjectViews:
    """The original experiment's mistake: the orbit's pivot is 3 units from the object."""
    return views_of(index, centre=(0.0, 0.0, -3.0), radius=2.0, **kwargs)


def judged(records: list[Any], **kwargs: Any) -> gate.Verdict:
    return gate.validate(Memory(records), progress=False, **kwargs)


def codes(records: list[Any], **kwargs: Any) -> list[str]:
    return [reason.code for reason in judged(records, **kwargs).reasons]


@pytest.fixture(scope="module")
def healthy() -> list[Any]:
    return [views_of(i) for i in range(10)]


def test_healthy_data_passes_and_says_what_it_saw(healthy: list[Any]) -> None:
    verdict = judged(healthy)
    assert verdict.passed and verdict.reasons == ()
    assert verdict.examples_seen == verdict.examples_total == len(verdict.objects) == 10
    assert len(verdict.measurements) == 80
    assert {round(row["azimuth_deg"]) % 360 for row in verdict.measurements} == {*range(0, 360, 45)}
    assert verdict.summary.startswith("PASS: 10 of 10 records (80 views)")
    again = json.loads(json.dumps(verdict.to_dict(), allow_nan=False))
    assert again["passed"] is True and len(again["measurements"]) == 80


@pytest.mark.parametrize("depth", [True, False])
def test_the_original_geometry_is_refused_for_its_pivot_not_its_exposure(depth: bool) -> None:
    verdict = judged([original(i, depth=depth) for i in range(6)])
    first, *others = verdict.reasons
    assert first.code == "pivot_offset" and "units away" in first.message
    assert first.values["pivot_distance"] == pytest.approx(3.0, abs=0.15 if depth else 0.3)
    assert {reason.code: reason.symptom_of for reason in others}["views_empty"] == "pivot_offset"
    assert not {"views_dark", "views_bright"} & {reason.code for reason in others}
    assert any("no usable depth" in note for note in verdict.notes) != depth


def test_what_views_cover_is_told_by_their_distance_but_not_of_an_input_camera_at_the_pivot() -> (
    None
):
    views = views_of(0)
    covered = views.alpha.float().mean(dim=(1, 2)) / views.input_alpha.float().mean()

    def ratios(input_at: float) -> torch.Tensor:
        """`input_at`: the input camera's distance from the pivot, as a share of the views'."""
        front, pivot = views.input_camera, views.pivot
        to = pivot + (front.centers - pivot) * input_at
        moved = replace(front, viewmats=front.viewmats.clone())
        moved.viewmats[:3, 3] = -front.viewmats[:3, :3] @ to
        rows, _, _ = measure.measure(replace(views, input_camera=moved))
        return torch.tensor([row["coverage_ratio"] for row in rows])

    torch.testing.assert_close(ratios(1.0), covered, rtol=0.02, atol=0.01)
    torch.testing.assert_close(ratios(0.5), 4 * ratios(1.0), rtol=0.02, atol=0.01)
    torch.testing.assert_close(ratios(0.0), ratios(1.0), rtol=0.02, atol=0.01)


def test_a_scale_of_depth_explains_no_orbit_around_another_point() -> None:
    """As the original's kind of decoder has it on heads: nearly empty views of blurred depth."""
    verdict = judged([transforms.scaled_depth(original(i), 0.85) for i in range(6)])
    assert verdict.reasons[0].code == "pivot_offset"
    assert all(reason.symptom_of == "pivot_offset" for reason in verdict.reasons[1:])


def captured(index: int, azimuths: list[float], **how: Any) -> ObjectViews:
    """A striped box seen from these sides, up to 25 degrees higher or lower; `aside`: cameras that
    stand beside each other instead and face one way; `centre`: where it stands."""
    rng, size = np.random.default_rng(index), 64
    optics: dict[str, Any] = {"focal_px": 0.8 * size, "width": size, "height": size}
    elevations = torch.from_numpy(rng.uniform(-25, 25, len(azimuths))).float()
    cameras = orbit(torch.tensor(azimuths), elevations, 2.4, pivot=(0.0, 0.0, 0.0), **optics)
    first = orbit(torch.zeros(1), 10.0, 2.4, pivot=(0.0, 0.0, 0.0), **optics)
    if how.get("aside"):
        viewmats = first.viewmats.repeat(len(azimuths), 1, 1)
        viewmats[:, :2, 3] += torch.from_numpy(rng.uniform(-0.3, 0.3, (len(azimuths), 2))).float()
        cameras = replace(cameras, viewmats=viewmats)
    extent, colours = (
        tuple(rng.uniform(0.5, 0.9, 3)),
        torch.from_numpy(rng.uniform(0.2, 0.9, (3, 3))),
    )
    shown = {"colors": colours.float(), "centre": how.get("centre", (0.0, 0.0, 0.0)), "stripes": 4}
    (rgb, alpha, _), (own, cover, _) = (cast(c, extent, **shown) for c in (cameras, first))
    given: dict[str, Any] = {"input_rgb": own[0], "input_alpha": cover[0], "input_camera": first[0]}
    seen: dict[str, Any] = {"rgb": rgb, "alpha": alpha, "cameras": cameras}
    return ObjectViews(f"box{index}", pivot=torch.zeros(3), **given, **seen)


@pytest.mark.parametrize(
    ("azimuths", "how", "wanted"),
    [
        ([*range(0, 360, 30)], {}, []),  # its stripes are finer than the input's, and no noise
        (
            [*range(0, 360, 30)],
            {"centre": (0.5, 0.2, -0.3)},
            [],
        ),  # in every frame, beside its middle
        ([*range(0, 360, 30)], {"centre": (1.6, 0.0, 0.0)}, ["pivot_offset"]),
        ([0.0] * 12, {"aside": True}, []),  # nothing is known of the other sides, nor asked
        ([0.0, 120.0, 240.0], {}, []),  # so few fill few of the directions that are counted
        ([-40.0, 0.0, 40.0], {}, ["azimuth_imbalance"]),
        ([*np.linspace(-45, 45, 12)], {}, ["azimuth_imbalance"]),
    ],
)
def test_captures_unlike_an_orbit_are_judged_by_what_they_show(
    azimuths: list[float], how: dict[str, Any], wanted: list[str]
) -> None:
    records = [captured(index, [float(a) for a in azimuths], **how) for index in range(3)]
    assert codes(records)[:1] == wanted
    if not wanted:
        assert codes(list(faults.corrupt(records, "noise", 0.25)))[:1] == ["noisy"]


def with_views(views: ObjectViews, seen: dict[str, Any], first: dict[str, Any]) -> ObjectViews:
    """A record of other pictures, and of another input."""
    inputs = {f"input_{name}": value for name, value in first.items()}
    return replace(views, identity_rgb=None, identity_alpha=None, **seen, **inputs)


def test_the_original_geometry_rendered_from_a_mesh() -> None:
    trimesh = pytest.importorskip("trimesh")
    from fresnel.objects import gltf, trace

    centre, records = torch.tensor([0.0, 0.0, 3.0]), []
    azimuth, elevation = torch.arange(8) * 45.0, torch.linspace(-30, 45, 8)
    around = orbit(azimuth, elevation, 2.0, pivot=centre, **OPTICS)
    front = orbit(0.0, 0.0, 3.0, pivot=(0, 0, 0), **OPTICS)
    for i in range(3):
        mesh = trimesh.creation.box((0.3, 0.8 - 0.05 * i, 0.3))
        mesh.visual.vertex_colors = [200, 180, 160, 255]
        solid = gltf.read(trimesh.Scene([mesh]).export(file_type="glb"), lambda name: None)
        parts = []
        for cameras in (around, front.reshape(1)):
            seen = trace.render(solid, cameras, samples=1)
            rgb, alpha = (
                (255 * torch.as_tensor(x) + 0.5).to(torch.uint8) for x in (seen.rgb, seen.alpha)
            )
            depth = torch.as_tensor(seen.depth)[..., 0]
            parts.append({"rgb": rgb, "alpha": alpha[..., 0], "depth": depth})
        first = {name: part[0] for name, part in parts[1].items()} | {"depth": None}
        made = with_views(views_of(i), parts[0], first | {"camera": front})
        records.append(replace(made, cameras=around, pivot=centre))
    verdict = judged(records)
    assert verdict.reasons[0].code == "pivot_offset"
    assert verdict.reasons[0].values["pivot_distance"] == pytest.approx(3.0, abs=0.15)
    assert any("identity check skipped" in note for note in verdict.notes)


GREY, DARK, WHITE = torch.full((3, 3), 0.5), torch.full((3, 3), 0.1), torch.ones(3, 3)


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
    verdict = judged([views_of(i, **look) for i in range(8)])
    assert verdict.passed, verdict.summary


def test_a_symmetric_object_seen_from_one_height_is_not_frozen(healthy: list[Any]) -> None:
    """A plain solid of revolution looks the same from everywhere."""
    records, azimuths = [], torch.arange(8) * 45.0
    for i in range(4):
        cameras = orbit(azimuths, 0.0, 2.2, pivot=(0, 0, 0), **OPTICS)
        origins, directions = cameras.rays()
        along = -(origins * directions).sum(-1)
        inside = (0.3 + 0.03 * i) ** 2 - (origins + along[..., None] * directions).square().sum(-1)
        depth = (along - inside.clamp_min(0).sqrt()) * (inside > 0)
        depth = depth * (directions * cameras.forward[:, None, None]).sum(-1)
        alpha = (inside > 0).to(torch.uint8) * 255
        rgb = (alpha * 0.5).to(torch.uint8)[..., None].expand(-1, -1, -1, 3).contiguous()
        seen = {"rgb": rgb, "alpha": alpha, "depth": depth}
        first = {name: part[0] for name, part in seen.items()} | {"camera": cameras[0]}
        records.append(replace(with_views(healthy[i], seen, first), cameras=cameras))
    assert codes(records) == []
    # The same pictures from heights that differ can't be the same object.
    tilted = orbit(azimuths, torch.linspace(-30, 45, 8), 2.2, pivot=(0, 0, 0), **OPTICS)
    boxes = [replace(views, cameras=tilted) for views in healthy[:4]]
    assert codes(list(faults.corrupt(boxes, "frozen_views", 1.0)))[0] == "frozen_views"


def test_emptiness_is_not_called_exposure_and_darkness_not_emptiness(healthy: list[Any]) -> None:
    assert codes(list(faults.corrupt(healthy, "empty_views", 1.0)))[0] == "views_empty"
    verdict = judged(list(faults.corrupt(healthy, "darken", 0.9)))
    assert [reason.code for reason in verdict.reasons] == ["views_dark"]
    assert "exposure, not emptiness" in verdict.summary
    assert verdict.reasons[0].values["luminance_ratio"] == pytest.approx(0.1, abs=0.03)


def test_ten_examples_decide_a_failure_and_a_pass_takes_the_whole_set(healthy: list[Any]) -> None:
    dark = list(faults.corrupt(healthy[:1], "darken", 0.9)) * 31
    data = Memory(dark)
    verdict = gate.validate(data, progress=False)
    assert verdict.examples_seen == 10 and verdict.examples_total == 31
    assert {0, 30} <= set(data.read) and len(data.read) == 10
    records = [replace(healthy[k % 10], name=f"own{k % 10}") for k in range(24)]
    records[1] = next(faults.corrupt(records[1:2], "nan_pose", 0.2))
    verdict = judged(records)
    assert verdict.reasons[0].code == "pose_invalid" and verdict.examples_seen > 10


def test_one_record_or_none(healthy: list[Any]) -> None:
    for record in (*healthy[:8], healthy[9]):  # box 8 does leave its frames
        assert codes([record]) == []
    assert codes(list(faults.corrupt(healthy[:1], "darken", 0.8))) == ["views_dark"]
    verdict = judged([])
    assert not verdict.passed and verdict.reasons[0].code == "no_data"
    with pytest.raises(ValueError, match="first, workers"):
        judged(healthy[:1], first=0)


def test_what_cannot_be_read_is_a_reason_not_a_crash(healthy: list[Any]) -> None:
    verdict = judged([*healthy[:4], DatasetError("rgb.png: truncated")])
    assert [reason.code for reason in verdict.reasons] == ["unreadable"]
    assert "rgb.png: truncated" in verdict.summary
    json.dumps(verdict.to_dict(), allow_nan=False)
    assert codes([DatasetError("gone")] * 3) == ["unreadable"]


def test_thresholds_can_be_set(healthy: list[Any]) -> None:
    assert codes(healthy[:4], config=gate.GateConfig(min_luminance_ratio=1.5)) == ["views_dark"]


def test_no_light_at_all_is_dark_even_beside_a_black_input() -> None:
    def black(views: ObjectViews) -> ObjectViews:
        return replace(views, rgb=0 * views.rgb, input_rgb=0 * views.input_rgb)

    assert codes([black(views_of(i, identity=False)) for i in range(4)])[0] == "views_dark"


def test_a_set_of_single_views_is_no_multi_view_set(healthy: list[Any]) -> None:
    alone = [
        replace(v, cameras=v.cameras[:1], rgb=v.rgb[:1], alpha=v.alpha[:1], depth=v.depth[:1])
        for v in healthy[:6]
    ]
    assert "too_few_views" in codes(alone)


def test_all_views_of_a_record_are_tested_and_their_order_is_found() -> None:
    """The views that a first look of 16 leaves out have each other's poses."""
    records = [views_of(i, views=20, size=24) for i in range(2)]
    assert codes(records) == []
    order = torch.arange(20)
    rest = order[~torch.isin(order, torch.linspace(0, 19, 16).round().long())]
    order[rest] = rest.roll(1)
    wrong = [replace(views, cameras=views.cameras[order]) for views in records]
    assert codes(wrong)[0] == "pose_mismatch"
    first = judged(list(faults.corrupt(records, "rolled_poses", 1.0))).reasons[0]
    assert first.code == "pose_mismatch" and first.mend == "roll_-1"


def test_frozen_views_are_found_in_a_moment_among_hundreds(healthy: list[Any]) -> None:
    rgb, alpha = healthy[0].rgb.repeat(50, 1, 1, 1), healthy[0].alpha.repeat(50, 1, 1)
    angles, started = np.stack([np.arange(400) * 7.0, np.linspace(-40, 50, 400)], 1), time.time()
    found = measure._frozen(rgb.numpy(), alpha.numpy(), angles, np.full(400, 0.2), 0.0)
    assert found == 1.0 and time.time() - started < 2


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[MultiViewDataset, gate.Verdict]:
    folder = tmp_path_factory.mktemp("made") / "set"
    data = dataset.write(folder, [views_of(i, size=24) for i in range(3)], meta={})
    return data, gate.validate(data, progress=False)


@pytest.fixture
def written(made: tuple[MultiViewDataset, gate.Verdict], tmp_path: Path) -> MultiViewDataset:
    shutil.copytree(made[0].path, tmp_path / "set")
    return dataset.open(tmp_path / "set")


@pytest.fixture
def verdict(made: tuple[MultiViewDataset, gate.Verdict]) -> gate.Verdict:
    return made[1]


def refused(data: Any, match: str, *arguments: Any, **kwargs: Any) -> None:
    with pytest.raises(gate.GateRefusal, match=match):
        gate.require_receipt(data, *arguments, **kwargs)


def test_a_receipt_lets_exactly_its_data_through(
    written: MultiViewDataset, verdict: gate.Verdict, tmp_path: Path
) -> None:
    refused(written, r"run_all\.sh validate")
    issued = gate.issue_receipt(written, verdict)
    assert issued.passed and issued.dataset_hash == written.content_hash
    assert (issued.records_seen, issued.records_total) == (3, 3)
    assert issued.thresholds["max_hull_miss"] == gate.GateConfig().max_hull_miss
    assert gate.read_receipt(written) == issued
    assert gate.require_receipt(dataset.open(written.path)) == issued
    refused(written, "smoke_train", "smoke-cvs")
    refused(written, "kind", "smoke-cvs", receipt=issued)
    other = dataset.write(tmp_path / "other", [views_of(9, size=24)], meta={})
    shutil.copytree(written.path / "receipts", other.path / "receipts")
    refused(other, "other data", allow_failed=True)
    with pytest.raises(ValueError, match="verdict: is about other data"):
        gate.issue_receipt(other, verdict)
    tensors = written.tensors()  # are let through by their hash
    assert gate.require_receipt(tensors, receipt=issued) == issued
    for strange in ("", "sha256:" + "0" * 64):
        refused(replace(tensors, content_hash=strange), "other data", receipt=issued)
    picture = next(written.path.rglob("view_000/rgb.png"))  # changed files void the receipt
    picture.write_bytes(picture.read_bytes() + b"\0")
    refused(written, r"rgb\.png")


@pytest.mark.parametrize("rows", [[0, 1], [0, 1, 1]])
def test_a_subset_certifies_nothing_but_itself(
    written: MultiViewDataset, verdict: gate.Verdict, rows: list[int]
) -> None:
    part = gate.validate(written.subset(rows), progress=False)
    assert part.dataset_hash == written.content_hash and part.is_subset
    seen, total = replace(verdict, examples_seen=2), replace(verdict, examples_total=2)
    for data, of in (
        *((written, part), (written.subset(rows), part), (written.subset([0]), verdict)),
        *((written, seen), (written, total)),
    ):
        with pytest.raises(ValueError, match="verdict"):
            gate.issue_receipt(data, of)


def test_lax_thresholds_count_as_overridden(written: MultiViewDataset) -> None:
    dark = faults.apply(written, "darken", 0.95, written.path.parent / "dark")
    lax = gate.GateConfig(min_luminance_ratio=1e-9, dark_view=1e-9)
    lenient = gate.validate(dark, lax, progress=False)
    assert lenient.passed and gate.issue_receipt(dark, lenient).passed
    refused(dark, "calibrated ones: min_luminance_ratio 1e-09")
    assert gate.require_receipt(dark, allow_failed=True).overridden


def test_broken_receipts_and_those_of_another_gate_are_void(
    written: MultiViewDataset, verdict: gate.Verdict
) -> None:
    issued = gate.issue_receipt(written, verdict)
    path = written.path / "receipts" / "gate.json"
    content = json.loads(path.read_text())
    for text in ("{", "[]", '{"kind": "gate"}', '{"reasons": 3}'):
        path.write_text(text)
        refused(written, "receipt")
    path.write_text(json.dumps(content | {"passed": 1}))
    refused(written, "not a readable receipt")
    for version in ({"gate_version": 1}, {}):
        old = {k: v for k, v in content.items() if k != "gate_version"} | version
        path.write_text(json.dumps(old))
        refused(written, "by gate 1")
    refused(written, "by gate 1", receipt=replace(issued, gate_version=1))
    assert gate.require_receipt(written, receipt=issued) == issued
    with pytest.raises(ValueError, match="kind"):
        gate.read_receipt(written, "diploma")


def test_receipts_are_not_written_through_links(
    written: MultiViewDataset, verdict: gate.Verdict
) -> None:
    elsewhere, receipts = written.path.parent / "elsewhere", written.path / "receipts"
    elsewhere.mkdir()
    victim = elsewhere / "victim"
    victim.write_text("mine")
    receipts.symlink_to(elsewhere)
    with pytest.raises(ValueError, match="leads out"):
        gate.issue_receipt(written, verdict)
    receipts.unlink()
    receipts.mkdir()
    (receipts / "gate.json").symlink_to(victim)
    with pytest.raises(ValueError, match="leads out"):
        gate.issue_receipt(written, verdict)
    assert victim.read_text() == "mine"


def test_a_failed_receipt_needs_an_override_that_stays_visible(written: MultiViewDataset) -> None:
    dark = faults.apply(written, "darken", 0.9, written.path.parent / "dark")
    receipt = gate.issue_receipt(dark, gate.validate(dark, progress=False))
    assert not receipt.passed and receipt.reasons[0].startswith("views_dark: ")
    refused(dark, "views_dark")
    through = gate.require_receipt(dark, allow_failed=True)
    assert through.overridden and not through.passed
    # A smoke verdict reached on waved-through data doesn't become a clean one.
    gate.write_receipt(dark, "smoke-cvs", True, "go", overridden=through.overridden)
    refused(dark, "overridden", "smoke-cvs")
    assert gate.require_receipt(dark, "smoke-cvs", allow_failed=True).overridden


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
    assert str(together.measurements) == str(alone.measurements)  # with NaN
    assert (together.passed, together.figures) == (alone.passed, alone.figures)


def test_a_record_that_alone_can_be_compared_is_judged_as_if_alone() -> None:
    check = Check("frozen_views", {"frozen": "max_frozen"}, "{frozen}", "")
    just_over = 1.1 * gate.GateConfig().max_frozen
    for other, flagged in ((0.0, 1.0), (np.nan, 0.0)):
        objects = [{"name": "", "views": 0, "frozen": value} for value in (just_over, other)]
        assert check(Seen([], objects, gate.GateConfig())).flags[0] == flagged


def test_statistics_of_records_are_of_their_own_views() -> None:
    random, views = np.random.default_rng(0), [3, 0, 12, 3, 1, 40]
    values = random.normal(size=sum(views))
    values[random.random(len(values)) < 0.3] = np.nan
    seen = Seen([], [{"views": count} for count in views], gate.GateConfig())
    parts = [part[np.isfinite(part)] for part in np.split(values, np.cumsum(views)[:-1])]
    for how in (np.mean, np.median):
        expected = [how(part) if len(part) else np.nan for part in parts]
        np.testing.assert_array_equal(seen.per_record(values, how), expected)


@pytest.mark.parametrize(
    ("fault", "strength"),
    [("opengl_axes", 1.0), ("darken", 0.9), ("empty_views", 0.5)],
)
def test_one_bad_record_of_many_is_refused_by_its_name(
    healthy: list[Any], fault: str, strength: float
) -> None:
    records = [*healthy, *(views_of(k) for k in range(10, 14))]
    records[11:12] = faults.corrupt(records[11:12], fault, strength)
    verdict = judged(records)
    first = verdict.reasons[0]
    assert first.code == faults.EXPECTED[fault][0], verdict.summary
    assert first.message.endswith("records show it, box11 beyond doubt")


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


@pytest.mark.parametrize("angle", [90.0, 180.0, 65.0])
def test_a_world_whose_y_is_not_up_is_turned_by_its_cameras_and_noted(angle: float) -> None:
    turn = torch.eye(4)
    a = torch.tensor(angle).deg2rad()
    turn[1:3, 1:3] = torch.tensor([[a.cos(), -a.sin()], [a.sin(), a.cos()]])
    records = [views_of(i) for i in range(3)]
    verdict = judged([turned_world(views, turn) for views in records])
    assert verdict.passed, verdict.summary
    assert any("turned by their cameras' mean up" in note for note in verdict.notes)
    assert not any("mean up" in note for note in judged(records).notes)
    again, tilt = oriented(turned_world(records[0], turn))
    up = -again.cameras.viewmats[:, 1, :3].mean(dim=0)
    assert float(up[1] / up.norm()) > 0.999 and tilt == pytest.approx(angle, abs=20)
    turned = again.cameras.viewmats @ torch.linalg.inv(again.input_camera.viewmats)
    before = records[0].cameras.viewmats @ torch.linalg.inv(records[0].input_camera.viewmats)
    torch.testing.assert_close(turned, before, atol=1e-4, rtol=0)


def test_sets_that_are_near_black_with_their_inputs_are_dark(healthy: list[Any]) -> None:
    def dim(views: ObjectViews) -> ObjectViews:
        names = ("rgb", "input_rgb", "identity_rgb")
        return replace(views, **{name: getattr(views, name) // 20 for name in names})

    verdict = judged([dim(views) for views in healthy])
    first = verdict.reasons[0]
    assert first.code == "views_dark" and first.values["top"] < 16
    assert plan(verdict) is None


def test_exposure_is_asked_of_the_same_surface() -> None:
    """The same surface is as bright from all sides: what differs is the object."""
    views = views_of(0)
    order = views.rgb[1:].float().mean(dim=(1, 2, 3)).argsort()[:5] + 1
    side = replace(views, rgb=views.rgb.clone())
    side.rgb[order] = side.rgb[order] // 4
    row = measure.measure(views)[1]
    assert abs(row["gain"]) < 0.1 and row["steps"] < 0.1
    assert measure.measure(side)[1]["jump"] > 1.0


def test_one_black_object_among_many_is_no_fault(healthy: list[Any]) -> None:
    """A lamp of black paint is black with its input; a whole set of them is dark."""

    def black(views: ObjectViews) -> ObjectViews:
        names = ("rgb", "input_rgb", "identity_rgb")
        return replace(views, **{name: getattr(views, name) * 0 for name in names})

    many = [healthy[k % len(healthy)] for k in range(29)]
    assert "views_dark" not in codes([*many, black(healthy[0])])
    assert "views_dark" in codes([black(views) for views in healthy])
