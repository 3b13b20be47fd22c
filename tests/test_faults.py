"""Faults do what they say, and the gate names each at its practical strength."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from boxes import Memory, cast, views_of

from fresnel import faults, gate
from fresnel.data import dataset
from fresnel.data.dataset import ObjectViews
from fresnel.gate.checks import Seen
from fresnel.gate.decide import Reason, _ranked
from fresnel.gate.fix import fix
from fresnel.gate.measure import measure
from fresnel.scene.colour import luminance


@pytest.fixture(scope="module")
def healthy() -> Memory:
    return Memory([views_of(i) for i in range(10)])


def broken(source: ObjectViews, fault: str, strength: float, seed: int = 0) -> ObjectViews:
    return next(faults.corrupt([source], fault, strength, seed=seed))


@pytest.mark.parametrize("fault", sorted(faults.EXPECTED))
def test_the_gate_names_the_fault_first(healthy: Memory, fault: str) -> None:
    code, strength = faults.EXPECTED[fault]
    before = [torch.clone(part) for part in (healthy[0].rgb, healthy[0].cameras.viewmats)]
    some = healthy.records[: 10 if fault in ("class_imbalance", "one_side") else 6]  # of many alone
    data, again = (Memory(list(faults.corrupt(some, fault, strength))) for _ in range(2))
    a, b = data[-1], again[-1]
    assert torch.equal(a.rgb, b.rgb) and torch.equal(a.alpha, b.alpha)
    assert torch.equal(a.cameras.viewmats.nan_to_num(), b.cameras.viewmats.nan_to_num())
    after = (healthy[0].rgb, healthy[0].cameras.viewmats)
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))

    data.meta = faults.said([record.name for record in data.records], fault, strength)
    verdict = gate.validate(data, progress=False)
    assert not verdict.passed
    if fault not in faults.UNPAIRED:  # of those it is enough to be refused
        assert verdict.reasons[0].code == code, verdict.summary


def test_darken_scales_linear_light_of_the_object_only() -> None:
    source = views_of(1)
    dark = broken(source, "darken", 0.75)
    solid, empty = source.alpha == 255, source.alpha == 0
    ratio = luminance(dark.rgb[solid] / 255).mean() / luminance(source.rgb[solid] / 255).mean()
    assert float(ratio) == pytest.approx(0.25, abs=0.01)
    assert torch.equal(dark.rgb[empty], source.rgb[empty])
    assert torch.equal(dark.alpha, source.alpha)


def test_empty_views_are_background_and_black_views_are_not_empty() -> None:
    source = views_of(2)
    empty, black = (broken(source, fault, 0.5) for fault in ("empty_views", "black_views"))
    assert ((empty.alpha.sum(dim=(1, 2)) == 0) & (empty.rgb.sum(dim=(1, 2, 3)) == 0)).sum() == 4
    assert empty.depth is not None and (empty.depth.sum(dim=(1, 2)) == 0).sum() == 4
    assert (black.rgb.sum(dim=(1, 2, 3)) == 0).sum() == 4
    assert torch.equal(black.alpha, source.alpha)


def test_pivot_offset_moves_the_pictures_as_a_real_render_would() -> None:
    """The box seen around a wrong pivot: compare the approximation with ray casting."""
    source = views_of(3, extent=(0.4, 0.4, 0.4), views=6)
    moved = broken(source, "pivot_offset", 0.1, seed=1)
    _, true_alpha, _ = cast(moved.cameras, (0.4, 0.4, 0.4), torch.full((3, 3), 0.7))
    a, b = moved.alpha >= 128, true_alpha >= 128
    assert float((a & b).sum() / (a | b).sum()) > 0.75
    shift = (moved.pivot - source.pivot).norm()
    assert float(shift) == pytest.approx(0.15 * 2.2, rel=1e-3)


def test_a_share_of_the_records_has_a_mistake_that_is_there_or_not() -> None:
    records = [views_of(0, size=8, views=2)] * 60
    turned = [
        r.cameras is not records[0].cameras for r in faults.corrupt(records, "opengl_axes", 0.3)
    ]
    assert 8 <= sum(turned) <= 28


@pytest.mark.parametrize(("fault", "strength"), [("rust", 0.5), ("blur", 0.0), ("blur", 1.5)])
def test_unknown_faults_and_strengths_are_refused(fault: str, strength: float) -> None:
    with pytest.raises(ValueError, match="fault: got 'rust'" if fault == "rust" else "strength"):
        broken(views_of(0, size=8), fault, strength)


def test_apply_writes_a_dataset_that_says_what_was_done(tmp_path: Path) -> None:
    records = [views_of(i, size=24) for i in range(3)]
    clean = dataset.write(tmp_path / "clean", records, meta={"source": "boxes"})
    dark = faults.apply(clean, "darken", 0.9, tmp_path / "dark")
    assert dark.meta["fault"] == {"name": "darken", "strength": 0.9}
    assert dark.meta["source"] == "boxes"
    assert dark.content_hash != clean.content_hash and dark.names == clean.names
    assert gate.validate(clean, progress=False).passed
    assert gate.validate(dark, progress=False).reasons[0].code == "views_dark"


def test_colours_of_another_kind_are_told_from_exchanged_or_brighter_ones() -> None:
    """Orange exchanged is nearly its negative; what is brighter is nearly that of what is dark; and
    a grey input says nothing of views in colour, nor a view in colour of one that is grey."""
    orange = [views_of(0, colors=torch.tensor([[0.9, 0.5, 0.15]] * 3))]
    for fault, beyond in (("swapped_channels", "swapped"), ("negative_views", "negated")):
        row = measure(next(faults.corrupt(orange, fault, 1.0)))[1]
        limits = {"swapped": 1.7, "negated": 1.2}
        over = [key for key, limit in limits.items() if row[key] > limit]
        assert beyond in over and ("negated" in over) == (beyond == "negated")
    dark = [views_of(k, colors=torch.full((3, 3), 0.2 + 0.02 * k)) for k in range(6)]
    bright = gate.validate(Memory(list(faults.corrupt(dark, "overexpose", 0.9))), progress=False)
    assert bright.reasons[0].code == "views_bright"
    grey = broken(orange[0], "grey_views", 1.0)
    assert measure(grey)[1]["saturation"] < 0.02
    mixed = replace(grey, rgb=torch.cat([grey.rgb[:-1], orange[0].rgb[-1:]]))
    assert measure(mixed)[1]["saturation"] > 0.9
    turned = replace(orange[0], input_rgb=grey.rgb[0], input_alpha=grey.alpha[0])
    assert np.isnan(measure(turned)[1]["saturation"])


def test_views_blurred_by_halves_are_seen_without_alpha_too() -> None:
    record, rng = views_of(1), np.random.default_rng(0)
    half, blurred = (broken(record, fault, 0.5) for fault in ("half_blurred", "blur"))
    limit = gate.GateConfig().min_evenness
    for views, least, most in ((record, 0.6, 1.0), (half, 0.0, limit), (blurred, 0.6, 1.0)):
        for one in (views, faults.on_background(views, "opaque_white", rng)):
            assert least < measure(one)[1]["evenness"] <= most
    shown = {"records_shown": 4.0, "detail_ratio": 0.6, "evenness": 0.2, "min_evenness": limit}
    found = [Reason("pose_mismatch", "", "", shown), Reason("blurred", "", "", shown)]
    assert [reason.code for reason in _ranked(found)] == ["blurred", "pose_mismatch"]


def test_a_negative_is_undone_where_there_is_one(tmp_path: Path) -> None:
    records = [views_of(i, identity=False) for i in range(4)]
    bad = [*faults.corrupt(records[:3], "negative_views", 1.0), records[3]]
    fixed, verdict = fix(Memory(bad), tmp_path / "fixed", progress=False)
    assert verdict.passed and fixed.meta["mended"][0].endswith("in 3 of 4 records")
    for k, record in enumerate(records):
        assert (fixed[k].rgb.int() - record.rgb.int()).abs().max() <= 2


def test_what_a_decoder_drew_unlike_its_input_is_no_wrong_pose() -> None:
    objects = [{"input_miss": 0.2, "identity_iou": iou, "views": 0} for iou in (0.7, 0.9, np.nan)]
    found = Seen([], objects, gate.GateConfig())["input_miss"]
    assert np.isnan(found[0]) and (found[1:] == 0.2).all()
