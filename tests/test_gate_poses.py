"""What the gate learns from poses and pictures together, and what it can mend."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from boxes import Memory, views_of

from fresnel import bootstrap, faults, gate
from fresnel.data import dataset
from fresnel.gate.decide import chance, sequential
from fresnel.gate.fix import corrected, fix
from fresnel.gate.thresholds import GateConfig, Seen
from fresnel.models import decoder
from fresnel.objects.assets import embedded_assets
from fresnel.objects.render_set import render_set
from fresnel.poses.explain import explain, named
from fresnel.poses.geometry import coherence, principal_shift, rigs_of
from fresnel.scene.cameras import orbit


def rigs(records: list[Any]) -> list[Any]:
    return [rigs_of(r, r.rgb.numpy(), r.alpha.numpy(), with_input=True)[0] for r in records]


@pytest.fixture(scope="module")
def healthy() -> list[Any]:
    return [views_of(i) for i in range(4)]


def test_outlines_of_healthy_views_explain_each_other(healthy: list[Any]) -> None:
    for rig in rigs(healthy):
        found = coherence(rig)
        assert found.hull_iou > 0.99 and found.miss < 0.002 and found.stray < 0.01
        shift, before, _ = principal_shift(rig)
        assert before < 0.1 and np.isfinite(shift).all()


@pytest.mark.parametrize(
    ("fault", "name"),
    [
        ("inverted_extrinsics", "inverted"),
        ("transposed_rotations", "transposed"),
        ("opengl_axes", "opengl_axes"),
        ("opengl_camera_to_world", "opengl_camera_to_world"),
        ("mirrored_views", "mirror_pictures"),
        ("reversed_azimuth", "mirror_poses"),
        ("rolled_poses", "roll_-1"),
    ],
)
def test_the_mend_that_fits_undoes_the_fault(healthy: list[Any], fault: str, name: str) -> None:
    broken = list(faults.corrupt(healthy, fault, 1.0))
    found = explain(rigs(broken))
    assert found.mend is not None and found.mend.name == name
    assert found.after < 0.02 < found.before
    again = corrected(broken[0], named(name, found.mend.amounts))
    expected, got = healthy[0].cameras.viewmats, again.cameras.viewmats
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
    assert torch.equal(again.rgb, healthy[0].rgb)


def test_amounts_are_estimated(healthy: list[Any]) -> None:
    focal = explain(rigs(list(faults.corrupt(healthy, "wrong_focal", 0.25))))
    assert focal.code == "focal_length" and focal.mend is not None
    assert focal.mend.amounts[0] == pytest.approx(0.8, abs=0.08)
    point = explain(rigs(list(faults.corrupt(healthy, "wrong_principal_point", 0.5))))
    assert point.code == "principal_point" and point.mend is not None
    assert point.mend.amounts == pytest.approx((-0.15, 0.0), abs=0.03)
    with pytest.raises(ValueError, match="no mend"):
        named("magic")


@pytest.mark.parametrize(
    "fault", ["darken", "swapped_channels", "inverted_extrinsics", "tilted_world", "stated_pivot"]
)
def test_fix_writes_a_copy_that_passes(tmp_path: Path, fault: str) -> None:
    clean = dataset.write(tmp_path / "a", [views_of(i, size=24) for i in range(6)], meta={})
    bad = faults.apply(clean, fault, faults.EXPECTED[fault][1], tmp_path / "b")
    fixed, verdict = fix(bad, tmp_path / "c", progress=False)
    assert verdict.passed and len(fixed.meta["mended"]) == 1
    assert fixed.content_hash != bad.content_hash and fixed.names == clean.names
    with pytest.raises(ValueError, match="nothing to fix"):
        fix(clean, tmp_path / "d", progress=False)


@pytest.mark.parametrize(
    ("fault", "strength", "code"),
    [
        ("empty_views", 1.0, "views_empty"),
        ("darken", 0.95, "views_dark"),
        ("darken", 0.99, "views_dark"),
        ("overexpose", 0.9, "views_bright"),
    ],
)
def test_fix_refuses_what_has_lost_its_information(
    tmp_path: Path, fault: str, strength: float, code: str
) -> None:
    clean = dataset.write(tmp_path / "a", [views_of(i, size=24) for i in range(4)], meta={})
    bad = faults.apply(clean, fault, strength, tmp_path / "b")
    with pytest.raises(ValueError, match=f"{code} can't be mended"):
        fix(bad, tmp_path / "c", progress=False)
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("name", ["mirror_all_pictures", "inverted_all", "mirror_pictures"])
def test_a_mend_leaves_the_optics_of_inputs_that_are_not_square(name: str) -> None:
    views = views_of(0, size=32)
    optics: dict[str, Any] = {"focal_px": 50.0, "width": 48, "height": 64}
    wide = replace(
        views,
        input_rgb=torch.zeros(64, 48, 3, dtype=torch.uint8),
        input_alpha=torch.zeros(64, 48, dtype=torch.uint8),
        input_depth=None,
        identity_rgb=None,
        identity_alpha=None,
        input_camera=orbit(0.0, 15.0, 2.2, pivot=(0, 0, 0), **optics),
    )
    mended = corrected(wide, named(name))
    torch.testing.assert_close(mended.input_camera.Ks, wide.input_camera.Ks)
    torch.testing.assert_close(mended.cameras.Ks, wide.cameras.Ks)


def test_a_mend_of_many_views_keeps_their_order() -> None:
    views = views_of(0, views=21)
    broken = next(faults.corrupt([views], "inverted_extrinsics", 1.0))
    got = corrected(broken, named("inverted")).cameras.viewmats
    torch.testing.assert_close(got, views.cameras.viewmats, atol=1e-5, rtol=0)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    assets = embedded_assets()[:10]
    path = tmp_path_factory.mktemp("inputs") / "set"
    return render_set(assets, path, views=1, image_size=64, samples=1, workers=1).inputs()


@pytest.mark.parametrize("size", [64, 128])
def test_the_shipped_decoder_on_the_corrected_orbit_passes(
    inputs: Any, tmp_path: Path, size: int
) -> None:
    config = replace(bootstrap.CORRECTED, image_size=size)
    pixel = decoder.load_shipped("pixel")
    data = bootstrap.bootstrap(inputs, pixel, config, tmp_path / "set")
    verdict = gate.validate(data, progress=False)
    assert verdict.passed, verdict.summary


def test_the_original_preset_is_refused_for_its_pivot(inputs: Any, tmp_path: Path) -> None:
    patch = decoder.load_shipped("patch")
    data = bootstrap.bootstrap(inputs, patch, bootstrap.ORIGINAL, tmp_path / "set")
    verdict = gate.validate(data, progress=False)
    first, *others = verdict.reasons
    assert first.code == "pivot_offset" and first.values["distance"] > 1.5
    assert not {"views_dark", "views_bright"} & {reason.code for reason in others}
    with pytest.raises(ValueError, match="can't be mended"):
        fix(data, tmp_path / "fixed", verdict=verdict, progress=False)


@pytest.mark.parametrize("scene", ["photo", "opaque_black", "opaque_white"])
def test_other_backgrounds_are_no_fault(scene: Any) -> None:
    rng = np.random.default_rng(0)
    records = [faults.on_background(views_of(i, size=48), scene, rng) for i in range(8)]
    verdict = gate.validate(Memory(records), progress=False)
    assert verdict.passed, verdict.summary
    guessed = any("foreground is estimated" in note for note in verdict.notes)
    assert guessed == scene.startswith("opaque")


def test_a_record_that_alone_can_be_compared_is_judged_as_if_alone() -> None:
    config = GateConfig()
    just_over = 1.1 * config.max_cropped
    for known, flagged in (
        (np.array([just_over, 0.0]), True),
        (np.array([just_over, np.nan]), False),
    ):
        seen = Seen([], [{"views": 0}] * 2, config)
        assert bool(seen.beyond(known, "max_cropped")[0][0]) == flagged


def test_haze_over_white_does_not_brighten_an_object() -> None:
    """Decoded objects have soft edges, and what is guessed of them without alpha holds those."""
    from scipy.ndimage import gaussian_filter

    def hazy(views: Any, reach: float = 6.0, share: float = 0.9) -> Any:
        soft = [
            torch.from_numpy(share * gaussian_filter(picture.float().numpy(), (0, reach, reach)))
            for picture in (views.alpha, *views.rgb.unbind(-1))
        ]
        alpha = torch.maximum(views.alpha, soft[0]).round().byte()
        colour = torch.stack(soft[1:], dim=-1).round().byte()
        rgb = torch.where(views.alpha[..., None] > 0, views.rgb, colour)
        return replace(views, rgb=rgb, alpha=alpha, depth=None)

    rng = np.random.default_rng(0)
    records = [
        faults.on_background(hazy(views_of(i, size=48)), "opaque_white", rng) for i in range(6)
    ]
    verdict = gate.validate(Memory(records), progress=False)
    assert "views_bright" not in {reason.code for reason in verdict.reasons}


def test_opaque_photographs_are_judged_by_their_features() -> None:
    pytest.importorskip("skimage")
    from fresnel.poses.epipolar import misfit

    record = textured_room(views=10)  # of one side, as forward-facing captures are
    assert misfit(record) < 1.0
    healthy = gate.validate(Memory([record, rimmed(record)]), progress=False)
    assert healthy.passed, healthy.summary
    assert [row["foreground"] for row in healthy.objects] == ["none", "none"]
    wrong = next(faults.corrupt([record], "inverted_extrinsics", 1.0))
    assert misfit(wrong) > 2.0
    verdict = gate.validate(Memory([wrong, rimmed(wrong)] * 2), progress=False)
    assert verdict.reasons[0].code == "pose_mismatch"
    assert any("matched features" in note for note in verdict.notes)


def rimmed(views: Any, by: int = 4) -> Any:
    """Photographs whose lens has been undone: transparent corners, the same in every view."""
    y, x = np.mgrid[: views.rgb.shape[1], : views.rgb.shape[2]]
    from_corner = np.minimum(x, x[:, ::-1]) + np.minimum(y, y[::-1])
    keep = torch.from_numpy((from_corner > 3 * by) & (np.minimum(x, x[:, ::-1]) >= by // 4))
    return replace(views, rgb=views.rgb * keep[..., None], alpha=views.alpha * keep)


def textured_room(size: int = 128, views: int = 6) -> Any:
    """Cameras close together in a room whose walls carry blotches: opaque all over."""
    optics: dict[str, Any] = {"focal_px": 0.9 * size, "width": size, "height": size}
    cameras = orbit(torch.arange(views) * 12.0, 10.0, 1.5, pivot=(0.0, 0.0, 0.0), **optics)
    origins, directions = cameras.rays()
    inverse = 1 / torch.where(directions.abs() < 1e-9, 1e-9, directions)
    t = torch.maximum((-2 - origins) * inverse, (2 - origins) * inverse).min(-1).values
    t_cube, hit = _cube(origins, inverse)
    point = origins + torch.where(hit, t_cube, t)[..., None] * directions
    cell = torch.floor(point * torch.where(hit, 9.0, 5.0)[..., None] + 1e-4).long()
    mixed = (cell * torch.tensor([73856093, 19349663, 83492791])).sum(-1)
    value = (mixed ^ (mixed >> 7)).remainder(251)
    rgb = value[..., None].expand(-1, -1, -1, 3).to(torch.uint8).contiguous()
    alpha = torch.full(rgb.shape[:3], 255, dtype=torch.uint8)
    source = views_of(0, size=size, depth=False, identity=False)
    return replace(
        source,
        input_rgb=rgb[0],
        input_alpha=alpha[0],
        input_camera=cameras[0],
        rgb=rgb,
        alpha=alpha,
        cameras=cameras,
    )


def _cube(origins: torch.Tensor, inverse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    near, far = (-0.4 - origins) * inverse, (0.4 - origins) * inverse
    entry = torch.minimum(near, far).max(-1).values
    return entry, entry < torch.maximum(near, far).min(-1).values


def test_the_same_object_in_two_splits_is_found(healthy: list[Any]) -> None:
    twin = replace(healthy[0], name="other")
    data = Memory([*healthy, twin])
    data.meta = {"object_splits": {"box0": "train", "other": "test"}}
    codes = [reason.code for reason in gate.validate(data, progress=False).reasons]
    assert codes == ["split_leak", "duplicated_objects"]


def test_another_set_may_not_share_objects(healthy: list[Any]) -> None:
    def against(other: list[Any], own: str = "fresnel", its: str = "fresnel") -> list[str]:
        mine, theirs = Memory(healthy), Memory(other)
        mine.layout, theirs.layout = own, its  # type: ignore[attr-defined]
        found = gate.validate(mine, progress=False, against=theirs).reasons
        return [reason.code for reason in found]

    strangers = [replace(views_of(i + 9), name=f"box{i}") for i in range(2)]
    assert against(healthy[:1]) == ["split_leak"]
    assert against([replace(healthy[2], name="renamed")]) == ["split_leak"]
    assert against([replace(strangers[0], name="test/box0__3")]) == ["split_leak"]
    assert against([replace(strangers[0], name="other")]) == []
    assert against(strangers, "original", "original") == []  # their names are numbers
    assert against([replace(healthy[1], name="box0")], "original", "original") == ["split_leak"]


def test_folders_called_train_and_test_are_splits(healthy: list[Any]) -> None:
    twin = replace(healthy[0], name=f"test/{healthy[0].name}__1", rgb=healthy[1].rgb)
    train = [replace(record, name=f"train/{record.name}__0") for record in healthy]
    other = [replace(record, name=f"spare/{record.name}") for record in healthy[:2]]
    verdict = gate.validate(Memory([*train, twin]), progress=False)
    leak = next(reason for reason in verdict.reasons if reason.code == "split_leak")
    assert "is in train and in test" in leak.message
    codes = [r.code for r in gate.validate(Memory([*train, *other]), progress=False).reasons]
    assert "split_leak" not in codes


def test_one_class_that_is_almost_everything_is_said(healthy: list[Any]) -> None:
    data = Memory([views_of(i, size=16) for i in range(12)])
    classes = {f"box{i}": "chair" if i else "lamp" for i in range(12)}
    data.meta = {"object_classes": classes}
    codes = [reason.code for reason in gate.validate(data, progress=False).reasons]
    assert "class_imbalance" in codes


def test_error_probabilities_of_the_sequential_test() -> None:
    config = GateConfig()
    assert sequential(0, 10, config)[0] == "healthy"
    assert sequential(6, 10, config)[0] == "faulty"
    assert sequential(2, 10, config)[0] == "undecided"
    assert chance(1, 1, 0.05) == pytest.approx(0.05)
    assert chance(3, 10, 0.05) == pytest.approx(0.0115, abs=1e-4)
    rng = np.random.default_rng(0)
    wrong = {"faulty": 0, "healthy": 0}
    for rate, mistake in ((config.healthy_rate, "faulty"), (config.faulty_rate, "healthy")):
        for _ in range(2000):
            shown = np.cumsum(rng.random(400) < rate)
            for n in range(10, 401, 10):
                decision = sequential(int(shown[n - 1]), n, config)[0]
                if decision != "undecided":
                    wrong[mistake] += decision == mistake
                    break
    assert wrong["faulty"] / 2000 < 0.003 and wrong["healthy"] / 2000 < 0.02
    with pytest.raises(ValueError, match="healthy_rate"):
        GateConfig(healthy_rate=0.6)


def test_every_measured_view_says_whether_it_is_empty() -> None:
    records = list(faults.corrupt([views_of(i) for i in range(3)], "empty_views", 0.5))
    verdict = gate.validate(Memory(records), progress=False)
    assert sum(row["empty"] for row in verdict.measurements) == 12
