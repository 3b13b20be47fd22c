"""What the gate learns from poses and pictures together, and what it can mend."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from boxes import Memory, views_of
from scipy.ndimage import gaussian_filter

from fresnel import bootstrap, faults, gate
from fresnel.data import dataset
from fresnel.gate import checks, leaks, measure
from fresnel.gate.fix import corrected, fix
from fresnel.gate.thresholds import GateConfig
from fresnel.models import decoder
from fresnel.objects.assets import embedded_assets
from fresnel.objects.render_set import render_set
from fresnel.poses import epipolar, transforms
from fresnel.poses.epipolar import misfit
from fresnel.poses.explain import explain, named
from fresnel.poses.geometry import centroid_residual, coherence, rigs_of
from fresnel.scene.cameras import orbit


def rigs(records: list[Any]) -> list[Any]:
    return [rigs_of(r, r.rgb.numpy(), r.alpha.numpy(), with_input=True)[0] for r in records]


def judged(records: list[Any], **meta: Any) -> Any:
    return gate.validate(Memory(records, meta=meta), progress=False)


def codes(records: list[Any], **meta: Any) -> list[str]:
    return [reason.code for reason in judged(records, **meta).reasons]


@pytest.fixture(scope="module")
def healthy() -> list[Any]:
    return [views_of(i) for i in range(4)]


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("clean") / "set"
    return dataset.write(path, [views_of(i, size=24) for i in range(5)], meta={})


def test_outlines_of_healthy_views_explain_each_other(healthy: list[Any]) -> None:
    for rig in rigs(healthy):
        found = coherence(rig)
        assert found["hull_iou"] > 0.99 and found["hull_miss"] < 0.003 and found["stray"] < 0.01
        assert centroid_residual(rig)[0] < 0.1


@pytest.mark.parametrize(
    ("fault", "strength", "name", "amounts"),
    [
        ("inverted_extrinsics", 1.0, "inverted", ()),
        ("transposed_rotations", 1.0, "transposed", ()),
        ("opengl_axes", 1.0, "opengl_axes", ()),
        ("opengl_camera_to_world", 1.0, "opengl_camera_to_world", ()),
        ("mirrored_views", 1.0, "mirror_pictures", ()),
        ("reversed_azimuth", 1.0, "mirror_poses", ()),
        ("rolled_poses", 1.0, "roll_-1", (-1,)),
        ("wrong_focal", 0.25, "focal", (0.8,)),
        ("wrong_principal_point", 0.5, "principal_point", (-0.15, 0.0)),
    ],
)
def test_the_mend_that_fits_undoes_the_fault(
    healthy: list[Any], fault: str, strength: float, name: str, amounts: tuple[float, ...]
) -> None:
    broken = list(faults.corrupt(healthy[:3], fault, strength))
    found = explain(rigs(broken))
    assert found.name == name and found.after < 0.02 < found.before
    assert found.amounts == pytest.approx(amounts, abs=0.06)
    again = corrected(broken[0], named(name, amounts))
    for part in ("viewmats", "Ks"):
        expected, got = (getattr(views.cameras, part) for views in (healthy[0], again))
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)
    assert torch.equal(again.rgb, healthy[0].rgb)


@pytest.mark.parametrize("fault", ["", "opengl_axes", "inverted_extrinsics"])
def test_parts_thinner_than_a_pixel_may_be_missing_where_outlines_are_hard(fault: str) -> None:
    """One ray a pixel: a plank loses pieces that other views show, and that is no wrong pose."""
    look: dict[str, Any] = {"size": 64, "extent": (1.0, 0.04, 0.08), "identity": False}
    hard = [views_of(index, samples=1, **look) for index in (0, 2)]
    assert all(rig.frail for rig in rigs(hard))
    thick = views_of(0, size=64, extent=(0.8, 0.8, 0.6), samples=1)
    assert not any(rig.frail for rig in rigs([views_of(0, **look), thick]))
    found = codes([*faults.corrupt(hard, fault, 1.0)] if fault else hard)
    assert found[:1] == ([faults.EXPECTED[fault][0]] if fault else [])


def test_a_minority_of_wrong_views_is_found(healthy: list[Any]) -> None:
    flipped = explain(rigs(list(faults.corrupt(healthy[:2], "mirrored_views", 0.25))))
    assert (flipped.code, flipped.name) == ("mirrored", "") and "others are not" in flipped.words
    astray = explain(rigs(list(faults.corrupt(healthy[:2], "wrong_input_pose", 0.5))))
    assert (astray.code, astray.name) == ("input_pose", "")
    with pytest.raises(ValueError, match="no mend"):
        named("magic")


@pytest.mark.parametrize(
    "fault", ["darken", "swapped_channels", "inverted_extrinsics", "stated_pivot"]
)
def test_fix_writes_a_copy_that_passes(clean: Any, tmp_path: Path, fault: str) -> None:
    bad = faults.apply(clean, fault, faults.EXPECTED[fault][1], tmp_path / "b")
    fixed, verdict = fix(bad, tmp_path / "c", progress=False)
    assert verdict.passed and len(fixed.meta["mended"]) == 1
    assert fixed.content_hash != bad.content_hash and fixed.names == clean.names


@pytest.mark.parametrize("fault", ["opengl_axes", "darken"])
def test_of_a_set_half_mended_the_other_half_is_mended(fault: str, tmp_path: Path) -> None:
    records = [replace(views_of(i, size=32), name=f"own{i}") for i in range(6)]
    bad = list(faults.corrupt(records, fault, max(0.8, faults.EXPECTED[fault][1])))
    half = dataset.write(tmp_path / "half", [*records[:3], *bad[3:]], meta={})
    fixed, verdict = fix(half, tmp_path / "c", progress=False)
    assert verdict.passed, verdict.summary
    assert fixed.meta["mended"][0].endswith("in 3 of 6 records")
    for k in (0, 5):
        torch.testing.assert_close(
            fixed[k].cameras.viewmats, records[k].cameras.viewmats, atol=1e-3, rtol=0
        )


def test_there_is_nothing_to_fix_in_healthy_data(clean: Any, tmp_path: Path) -> None:
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
    clean: Any, tmp_path: Path, fault: str, strength: float, code: str
) -> None:
    bad = faults.apply(clean, fault, strength, tmp_path / "b")
    with pytest.raises(ValueError, match=f"{code} can't be mended"):
        fix(bad, tmp_path / "c", progress=False)
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("name", ["mirror_all_pictures", "inverted_all", "mirror_pictures"])
def test_a_mend_leaves_the_optics_of_inputs_that_are_not_square(name: str) -> None:
    wide = replace(
        views_of(0, size=32, identity=False),
        input_rgb=torch.zeros(64, 48, 3, dtype=torch.uint8),
        input_alpha=torch.zeros(64, 48, dtype=torch.uint8),
        input_depth=None,
        input_camera=orbit(0.0, 15.0, 2.2, pivot=(0, 0, 0), focal_px=50.0, width=48, height=64),
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
    path = tmp_path_factory.mktemp("inputs") / "set"
    options: dict[str, Any] = {"views": 1, "image_size": 64, "samples": 1, "workers": 1}
    return render_set(embedded_assets()[:10], path, **options).inputs()


@pytest.mark.parametrize("size", [64, 128])
def test_the_shipped_decoder_on_the_corrected_orbit_passes(
    inputs: Any, tmp_path: Path, size: int
) -> None:
    config = replace(bootstrap.CORRECTED, image_size=size)
    data = bootstrap.bootstrap(inputs, decoder.load_shipped("pixel"), config, tmp_path / "set")
    verdict = gate.validate(data, progress=False)
    assert verdict.passed, verdict.summary


def test_the_original_preset_is_refused_for_its_pivot(inputs: Any, tmp_path: Path) -> None:
    patch = decoder.load_shipped("patch")
    data = bootstrap.bootstrap(inputs, patch, bootstrap.ORIGINAL, tmp_path / "set")
    verdict = gate.validate(data, progress=False)
    first, *others = verdict.reasons
    assert first.code == "pivot_offset" and first.values["pivot_distance"] > 1.5
    assert not {"views_dark", "views_bright"} & {reason.code for reason in others}
    with pytest.raises(ValueError, match="can't be mended"):
        fix(data, tmp_path / "fixed", verdict=verdict, progress=False)


@pytest.mark.parametrize("scene", ["photo", "opaque_black", "opaque_white"])
def test_other_backgrounds_are_no_fault(scene: Any) -> None:
    rng = np.random.default_rng(0)
    verdict = judged([faults.on_background(views_of(i, size=48), scene, rng) for i in range(6)])
    assert verdict.passed, verdict.summary
    guessed = any("foreground is estimated" in note for note in verdict.notes)
    assert guessed == scene.startswith("opaque")


def test_an_object_that_touches_the_border_is_told_from_a_plain_background() -> None:
    views = faults.on_background(views_of(1, size=48), "opaque_white", np.random.default_rng(0))
    before = measure._foreground(views.rgb.numpy(), views.alpha.numpy())[1]
    touching = views.rgb.numpy().copy()
    touching[:3, 10:34, :6] = 40
    _, alpha, kind = measure._foreground(touching, views.alpha.numpy())
    assert kind == "estimated" and before.any()
    assert np.array_equal(alpha[3:], before[3:]) and alpha[:3, 10:34, :6].all()


def test_haze_over_white_does_not_brighten_an_object() -> None:
    """Decoded objects have soft edges, and what is guessed of them without alpha holds those."""

    def hazy(views: Any) -> Any:
        blur = [0.9 * gaussian_filter(part.float().numpy(), (0, 6, 6))
                for part in (views.alpha, *views.rgb.unbind(-1))]  # fmt: skip
        soft, *colours = (torch.from_numpy(part).round().byte() for part in blur)
        rgb = torch.where(views.alpha[..., None] > 0, views.rgb, torch.stack(colours, dim=-1))
        return replace(views, rgb=rgb, alpha=torch.maximum(views.alpha, soft), depth=None)

    rng = np.random.default_rng(0)
    records = [hazy(views_of(i, size=48)) for i in range(5)]
    seen = [faults.on_background(record, "opaque_white", rng) for record in records]
    assert "views_bright" not in codes(seen)


def test_opaque_photographs_are_judged_by_their_features() -> None:
    room = textured_room()  # of one side, as forward-facing captures are
    assert misfit(room) < 1.0
    healthy = judged([room, rimmed(room)])
    assert healthy.passed, healthy.summary
    assert [row["foreground"] for row in healthy.objects] == ["none", "none"]
    wrong = next(faults.corrupt([room], "inverted_extrinsics", 1.0))
    assert misfit(wrong) > 2.0
    verdict = judged([wrong, rimmed(wrong)])
    assert verdict.reasons[0].code == "pose_mismatch"
    assert any("matched features" in note for note in verdict.notes)


def test_photographs_without_any_feature_are_not_judged_by_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    none = np.zeros((0, 2)), np.zeros((0, 128), np.uint8)
    monkeypatch.setattr(epipolar, "_features", lambda *_, **__: none)
    assert np.isnan(misfit(textured_room()))


@pytest.mark.parametrize(("count", "least"), [(6, 6), (40, 40), (64, 64), (400, 64)])
def test_features_of_all_views_of_a_photographed_record_are_asked(
    monkeypatch: pytest.MonkeyPatch, count: int, least: int
) -> None:
    pytest.importorskip("skimage")
    views, seen = views_of(0, views=count, size=8), set[int]()
    numbers = torch.stack([torch.arange(count) % 200, torch.arange(count) // 200], dim=-1)
    numbered = replace(views, rgb=torch.zeros_like(views.rgb))
    numbered.rgb[:, 0, 0, :2] = numbers.byte()
    monkeypatch.setattr(
        "fresnel.poses.epipolar._features",
        lambda rgb, alpha, **_: seen.add(int(rgb[0, 0, 0]) + 200 * int(rgb[0, 0, 1])),
    )
    assert np.isnan(misfit(numbered)) and len(seen) >= least


def rimmed(views: Any, by: int = 4) -> Any:
    """Photographs whose lens has been undone: transparent corners, the same in every view."""
    y, x = np.mgrid[: views.rgb.shape[1], : views.rgb.shape[2]]
    from_corner = np.minimum(x, x[:, ::-1]) + np.minimum(y, y[::-1])
    keep = torch.from_numpy((from_corner > 3 * by) & (np.minimum(x, x[:, ::-1]) >= by // 4))
    return replace(views, rgb=views.rgb * keep[..., None], alpha=views.alpha * keep)


def textured_room(size: int = 96, views: int = 6) -> Any:
    """Cameras close together in a room whose walls carry blotches: opaque all over."""
    optics: dict[str, Any] = {"focal_px": 0.9 * size, "width": size, "height": size}
    cameras = orbit(torch.arange(views) * 12.0, 10.0, 1.5, pivot=(0.0, 0.0, 0.0), **optics)
    origins, directions = cameras.rays()
    inverse = 1 / torch.where(directions.abs() < 1e-9, 1e-9, directions)
    walls = torch.maximum((-2 - origins) * inverse, (2 - origins) * inverse).min(-1).values
    near, far = (-0.4 - origins) * inverse, (0.4 - origins) * inverse  # a cube in the middle
    cube = torch.minimum(near, far).max(-1).values
    hit = cube < torch.maximum(near, far).min(-1).values
    point = origins + torch.where(hit, cube, walls)[..., None] * directions
    cell = torch.floor(point * torch.where(hit, 9.0, 5.0)[..., None] + 1e-4).long()
    mixed = (cell * torch.tensor([73856093, 19349663, 83492791])).sum(-1)
    value = (mixed ^ (mixed >> 7)).remainder(251)
    rgb = value[..., None].expand(-1, -1, -1, 3).to(torch.uint8).contiguous()
    alpha = torch.full(rgb.shape[:3], 255, dtype=torch.uint8)
    source = views_of(0, size=size, depth=False, identity=False)
    first: dict[str, Any] = {"input_rgb": rgb[0], "input_alpha": alpha[0]}
    return replace(source, **first, input_camera=cameras[0], rgb=rgb, alpha=alpha, cameras=cameras)


def test_the_same_object_in_two_splits_is_found(healthy: list[Any]) -> None:
    splits = {"box0": "train", "other": "test"}
    found = codes([*healthy, replace(healthy[0], name="other")], object_splits=splits)
    assert found == ["split_leak", "duplicated_objects"]


def test_another_set_may_not_share_objects(healthy: list[Any]) -> None:
    def against(other: list[Any], layout: str = "fresnel") -> list[str]:
        mine, theirs = Memory(healthy), Memory(other)
        mine.layout = theirs.layout = layout  # type: ignore[attr-defined]
        found = gate.validate(mine, progress=False, against=theirs).reasons
        return [reason.code for reason in found]

    strangers = [replace(views_of(i + 9), name=f"box{i}") for i in range(2)]
    assert against(healthy[:1]) == ["split_leak"]
    assert against([replace(healthy[2], name="renamed")]) == ["split_leak"]
    part = torch.tensor([5, 2, 7])
    some = {key: getattr(healthy[1], key)[part] for key in ("rgb", "alpha", "depth", "cameras")}
    assert against([replace(healthy[1], name="some", **some)]) == ["split_leak"]
    # Names alone say nothing; of a namesake from other cameras the colours do.
    assert against([replace(strangers[0], name="test/box0__3")]) == []
    elsewhere = replace(views_of(0, views=7, radius=2.5), name="test/box0__3")
    assert against([elsewhere]) == ["split_leak"]
    assert against([replace(elsewhere, name="other")]) == []  # of a single one nobody can tell
    assert against(strangers, "original") == []  # their names are numbers
    assert against([replace(healthy[1], name="box0")], "original") == ["split_leak"]


def test_half_of_the_objects_of_another_set_are_known_again_from_other_cameras() -> None:
    """Under other names: their colours are nearer than those of any two of one set."""

    def row(index: int, name: str, noise: int) -> dict[str, Any]:
        rng = np.random.default_rng([index])
        looks = rng.random(400) ** 4 + 0.02 * np.random.default_rng([index, noise]).random(400)
        prints = np.zeros((2, 4, 12, 12), np.float16)
        return {"name": name, "prints": prints, "looks": looks / np.linalg.norm(looks)}

    own = [row(k, f"a{k}", 1) for k in range(20)]
    for first, expected in ((10, range(10, 20)), (20, [])):
        other = [row(k, f"b{k}", 2) for k in range(first, first + 20)]
        found = leaks.shared([*own, *other], ["train"] * 20 + ["test"] * 20)
        assert sorted(a for (a, _), _ in found) == list(expected)


def people(count: int, seed: int) -> np.ndarray:
    """Colours of people who share skins and hair, (count, 60): nearly all have a near relative."""
    rng, palette = np.random.default_rng(seed), np.random.default_rng(0).random((16, 60)) ** 6
    skin, hair = rng.integers(0, 5, count), rng.integers(5, 16, count)
    part = rng.beta(8, 4, count)[:, None]
    return part * palette[skin] + (1 - part) * palette[hair] + 0.02 * rng.random((count, 60))


def as_rows(colours: np.ndarray, name: str) -> list[dict[str, Any]]:
    looks = colours / np.linalg.norm(colours, axis=1, keepdims=True)
    prints = np.zeros((2, 4, 12, 12), np.float16)
    return [{"name": f"{name}{k}", "prints": prints, "looks": one} for k, one in enumerate(looks)]


def test_people_who_look_alike_are_not_the_same_at_any_look() -> None:
    """Some of a hundred of them are as near to one of another split as hardly any within one."""
    for seed in range(12):
        rows, rng = as_rows(people(400, seed + 1), "p"), np.random.default_rng(seed)
        splits = rng.choice(["train", "val", "test"], 400, p=[0.8, 0.05, 0.15]).tolist()
        meta = {
            "object_splits": {row["name"]: split for row, split in zip(rows, splits, strict=True)}
        }
        for count in (50, 63, 79, 99, 124, 155, 194, 243, 304, 380, 400):
            seen = checks.Seen([], rows[:count], GateConfig(), meta, final=count == 400)
            assert not checks._leak(seen).flags.any(), (seed, count)


def test_the_same_people_are_found_among_those_who_look_alike() -> None:
    crowd, noise = people(400, 1), np.random.default_rng(0).random((400, 60))
    again = crowd[:50] + 0.002 * noise[:50]
    own, other = as_rows(crowd, "a"), as_rows(np.concatenate([again, people(50, 2)]), "b")
    found = leaks.shared([*own, *other], ["train"] * 400 + ["test"] * 100)
    pairs = [(a, b - 400) for (a, b), _ in found]
    assert len(pairs) > 40 and sum(a == b for a, b in pairs) > 0.9 * len(pairs)


def test_namesakes_of_one_kind_are_not_the_same() -> None:
    """Two seeds of a generator give other people the same numbers."""
    own, other = as_rows(people(300, 1), "p"), as_rows(people(300, 2), "p")
    splits = ["train"] * 300 + ["test"] * 300
    assert not list(leaks.shared([*own, *other], splits))
    again = as_rows(people(300, 1) + 0.002 * np.random.default_rng(0).random((300, 60)), "p")
    assert len(list(leaks.shared([*own, *again], splits))) > 280


def test_folders_called_train_and_test_are_splits(healthy: list[Any]) -> None:
    twin = replace(views_of(0, views=7, radius=2.5), name=f"test/{healthy[0].name}__1")
    train = [replace(record, name=f"train/{record.name}__0") for record in healthy]
    other = [replace(record, name=f"spare/{record.name}") for record in healthy[:2]]
    leak = next(r for r in judged([*train, twin]).reasons if r.code == "split_leak")
    assert "'train/box0__0' (train) has the looks of 'test/box0__1' (test)" in leak.message
    assert "split_leak" not in codes([*train, *other])


def test_one_class_that_is_almost_everything_is_said() -> None:
    classes = {f"box{i}": "chair" if i else "lamp" for i in range(12)}
    records = [views_of(i, size=16) for i in range(12)]
    assert "class_imbalance" in codes(records, object_classes=classes)


def test_every_measured_view_says_whether_it_is_empty(healthy: list[Any]) -> None:
    verdict = judged(list(faults.corrupt(healthy[:3], "empty_views", 0.5)))
    assert sum(row["empty"] for row in verdict.measurements) == 12


def test_poses_mirrored_about_a_pivot_see_it_where_they_saw_it_mirrored() -> None:
    pivot, away = np.array([1.0, 2.0, 3.0]), np.array([0.5, 0.3, -1.0])
    poses = orbit(torch.tensor([10.0, 200.0]), 20.0, 2.0, pivot=(0.2, 0.4, 0.1), focal_px=9.0,
                  width=8, height=8).viewmats.double().numpy()  # fmt: skip
    mirrored = transforms.mirrored_about(poses, pivot, away)
    for point in (pivot, pivot + away, pivot + np.array([0, 7.0, 0])):
        seen, before = mirrored @ [*point, 1.0], poses @ [*point, 1.0]
        assert np.allclose(seen, before * [-1, 1, 1, 1])
