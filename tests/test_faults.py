"""Faults do what they say, and the gate names each at its practical strength."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from boxes import Memory, views_of

from fresnel import faults, gate
from fresnel.data import dataset
from fresnel.data.dataset import ObjectViews
from fresnel.scene.colour import luminance


@pytest.fixture(scope="module")
def healthy() -> Memory:
    return Memory([views_of(i) for i in range(10)])


def corrupted(healthy: Memory, fault: str, strength: float) -> list[ObjectViews]:
    return list(faults.corrupt(healthy, fault, strength))


def test_every_fault_has_an_expected_reason() -> None:
    assert faults.EXPECTED.keys() == {*faults.FAULTS, *faults.SET_FAULTS, "class_imbalance"}
    assert set(faults.UNPAIRED) < faults.EXPECTED.keys()


def test_healthy_boxes_pass(healthy: Memory) -> None:
    verdict = gate.validate(healthy, progress=False)
    assert verdict.passed, verdict.summary


@pytest.mark.parametrize("fault", sorted(faults.EXPECTED))
def test_the_gate_names_the_fault_first(healthy: Memory, fault: str) -> None:
    code, strength = faults.EXPECTED[fault]
    data = Memory(corrupted(healthy, fault, strength))
    data.meta = faults.said([record.name for record in data.records], fault, strength)
    verdict = gate.validate(data, progress=False)
    assert not verdict.passed
    if fault not in faults.UNPAIRED:  # of those it is enough to be refused
        assert verdict.reasons[0].code == code, verdict.summary


@pytest.mark.parametrize("fault", sorted(faults.EXPECTED))
def test_faults_are_deterministic_and_leave_their_source_alone(fault: str) -> None:
    source = views_of(0, size=16)
    before = source.rgb.clone(), source.alpha.clone(), source.cameras.viewmats.clone()
    a, b = (next(faults.corrupt([source], fault, 0.5, seed=3)) for _ in range(2))
    assert torch.equal(a.rgb, b.rgb) and torch.equal(a.alpha, b.alpha)
    assert torch.equal(a.cameras.viewmats.nan_to_num(), b.cameras.viewmats.nan_to_num())
    assert torch.equal(before[0], source.rgb) and torch.equal(before[1], source.alpha)
    assert torch.equal(before[2], source.cameras.viewmats)
    assert a.rgb.shape[1:] == source.rgb.shape[1:] and a.alpha.shape == a.rgb.shape[:3]


def test_darken_scales_linear_light_of_the_object_only() -> None:
    source = views_of(1)
    dark = faults.FAULTS["darken"](source, 0.75, np.random.default_rng(0))
    solid = source.alpha == 255
    ratio = luminance(dark.rgb[solid] / 255).mean() / luminance(source.rgb[solid] / 255).mean()
    assert float(ratio) == pytest.approx(0.25, abs=0.01)
    empty = source.alpha == 0
    assert torch.equal(dark.rgb[empty], source.rgb[empty])
    assert torch.equal(dark.alpha, source.alpha)


def test_empty_views_are_background_and_black_views_are_not_empty() -> None:
    source = views_of(2)
    empty = faults.FAULTS["empty_views"](source, 0.5, np.random.default_rng(0))
    assert ((empty.alpha.sum(dim=(1, 2)) == 0) & (empty.rgb.sum(dim=(1, 2, 3)) == 0)).sum() == 4
    assert empty.depth is not None and (empty.depth.sum(dim=(1, 2)) == 0).sum() == 4
    black = faults.FAULTS["black_views"](source, 0.5, np.random.default_rng(0))
    assert (black.rgb.sum(dim=(1, 2, 3)) == 0).sum() == 4
    assert torch.equal(black.alpha, source.alpha)


def test_pivot_offset_moves_the_pictures_as_a_real_render_would() -> None:
    """The box seen around a wrong pivot: compare the approximation with ray casting."""
    from boxes import cast

    source = views_of(3, extent=(0.4, 0.4, 0.4), views=6)
    colors = torch.full((3, 3), 0.7)
    moved = faults.FAULTS["pivot_offset"](source, 0.1, np.random.default_rng(1))
    _, true_alpha, _ = cast(moved.cameras, (0.4, 0.4, 0.4), colors)
    a, b = moved.alpha >= 128, true_alpha >= 128
    iou = (a & b).sum() / (a | b).sum()
    assert float(iou) > 0.75
    shift = (moved.pivot - source.pivot).norm()
    assert float(shift) == pytest.approx(0.15 * 2.2, rel=1e-3)


def test_unknown_faults_and_strengths_are_refused() -> None:
    with pytest.raises(ValueError, match="fault: got 'rust'"):
        next(faults.corrupt([views_of(0, size=8)], "rust", 0.5))
    for strength in (0.0, 1.5):
        with pytest.raises(ValueError, match="strength"):
            next(faults.corrupt([views_of(0, size=8)], "blur", strength))


def test_apply_writes_a_dataset_that_says_what_was_done(tmp_path: Path) -> None:
    records = [views_of(i, size=24) for i in range(3)]
    clean = dataset.write(tmp_path / "clean", records, meta={"source": "boxes"})
    dark = faults.apply(clean, "darken", 0.9, tmp_path / "dark")
    assert dark.meta["fault"] == {"name": "darken", "strength": 0.9, "seed": 0}
    assert dark.meta["source"] == "boxes"
    assert dark.content_hash != clean.content_hash and dark.names == clean.names
    assert gate.validate(clean, progress=False).passed
    assert gate.validate(dark, progress=False).reasons[0].code == "views_dark"
