"""Metrics against closed forms and against torchmetrics called directly."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from boxes import views_of

from fresnel.data.dataset import InputImages, ViewTensors
from fresnel.evaluation import metrics as ev
from fresnel.render import Views
from fresnel.scene import colour
from fresnel.scene.cameras import Cameras


def tensors(count: int = 3, views: int = 4, size: int = 16) -> ViewTensors:
    records = [views_of(i, size=size, views=views) for i in range(count)]

    def stacked(name: str) -> Any:
        parts = [getattr(record, name) for record in records]
        if isinstance(parts[0], torch.Tensor):
            return torch.stack(parts)
        matrices = (torch.stack([getattr(part, k) for part in parts]) for k in ("viewmats", "Ks"))
        return Cameras(*matrices, size, size)

    names = tuple(f"box{i}__0" for i in range(count))
    inputs = InputImages(names, *map(stacked, ("input_rgb", "input_alpha", "input_camera")))
    views_ = map(stacked, ("rgb", "alpha", "cameras"))
    return ViewTensors(names, inputs, *views_, torch.zeros(count, 3))


def oracle(data: ViewTensors, gain: float = 1.0) -> ev.Predictor:
    """Predicts the truth, its sRGB values times a gain."""

    def predict(inputs: InputImages, cameras: Cameras) -> Views:
        rows = [data.names.index(name) for name in inputs.names]
        rgb = data.rgb[rows].float() / 255 * gain
        alpha = data.alpha[rows].float()[..., None] / 255
        return Views(rgb, alpha, torch.zeros_like(alpha))

    return predict


def test_psnr_matches_its_closed_form_and_torchmetrics() -> None:
    from torchmetrics.functional.image import peak_signal_noise_ratio

    target = torch.rand(2, 8, 8, 3, generator=torch.Generator().manual_seed(0)) * 0.8
    assert ev.psnr(target + 0.1, target).tolist() == pytest.approx([20.0, 20.0], abs=1e-3)
    assert ev.psnr(target, target).tolist() == [ev.MAX_PSNR] * 2
    noisy = target.flip(0)
    want = [float(peak_signal_noise_ratio(noisy[i], target[i], data_range=1.0)) for i in (0, 1)]
    assert ev.psnr(noisy, target).tolist() == pytest.approx(want, abs=1e-4)


def test_masked_psnr_sees_only_the_mask() -> None:
    target, mask = torch.zeros(2, 8, 8, 3), torch.zeros(2, 8, 8, dtype=torch.bool)
    mask[0, :2] = True
    output = target.clone()
    output[:, :2] = 0.1
    output[:, 4:] = 1.0
    first, second = ev.psnr(output, target, mask).tolist()
    assert first == pytest.approx(20.0, abs=1e-4)
    assert math.isnan(second)


def test_ssim_is_torchmetrics_ssim() -> None:
    from torchmetrics.functional.image import structural_similarity_index_measure

    generator = torch.Generator().manual_seed(1)
    a, b = torch.rand(2, 3, 16, 16, 3, generator=generator)
    want = structural_similarity_index_measure(
        a.permute(0, 3, 1, 2), b.permute(0, 3, 1, 2), data_range=1.0, reduction="none"
    )
    torch.testing.assert_close(ev.ssim(a, b), want)
    everywhere = torch.ones(3, 16, 16, dtype=torch.bool)
    torch.testing.assert_close(ev.ssim(a, b, everywhere), want, atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="6 x 6"):
        ev.ssim(a[:, :4, :4], b[:, :4, :4])


def test_azimuth_bins() -> None:
    bins = {
        "0-30": (0.0, -30.0001, 359.0), "30-60": (30.01, 60), "60-90": (-90,),
        "90-180": (90.5, 180, -180.0001),
    }  # fmt: skip
    for name, azimuths in bins.items():
        assert {ev.azimuth_bin(azimuth) for azimuth in azimuths} == {name}


def test_a_perfect_prediction_is_perfect_over_black_and_white() -> None:
    data = tensors()
    rows = ev.evaluate(oracle(data), data, batch=2, progress=False)
    assert len(rows) == 12
    for row in rows:
        assert min(row["psnr"], row["psnr_white"]) > 90 and row["ssim"] > 0.999
        assert row["luminance_ratio"] == row["coverage_ratio"] == pytest.approx(1)
    assert [row["record"] for row in rows[::4]] == list(data.names)
    assert rows[0]["object"] == "box0"
    azimuths = [row["azimuth_deg"] for row in rows[:4]]
    assert [a % 360 for a in azimuths] == pytest.approx([0, 90, 180, 270], abs=1e-3)
    assert -180 < min(azimuths) < 0 < max(azimuths) <= 180


def test_each_figure_of_a_view_is_of_what_it_says() -> None:
    """Half the value on the object, some grey around it: light, foreground, both backgrounds."""
    data = tensors(1)
    rgb, alpha = torch.full_like(data.rgb, 200), torch.full_like(data.alpha, 255)
    alpha[..., :8, :], rgb[..., :8, :, :] = 100, 0  # less than half covered: no foreground
    data = replace(data, rgb=rgb, alpha=alpha)

    def predict(inputs: InputImages, cameras: Cameras) -> Views:
        made = rgb.float() / 255 * 0.5
        made[..., :8, :, :] = 0.1
        return Views(made, torch.ones_like(made[..., :1]), made[..., :1])

    row = ev.evaluate(predict, data, progress=False)[0]
    off, grey, cover = 100 / 255, 0.1, 100 / 255
    linear = colour.srgb_to_linear(torch.tensor([off, 2 * off, grey])).tolist()
    decibels = {
        "psnr_foreground": off**2,
        "psnr": (off**2 + grey**2) / 2,
        "psnr_white": (off**2 + (1 - cover - grey) ** 2) / 2,
    }
    for name, square in decibels.items():
        assert row[name] == pytest.approx(-10 * math.log10(square), abs=1e-3), name
    assert row["luminance_ratio"] == pytest.approx((linear[0] + linear[2]) / linear[1], rel=1e-5)
    assert row["coverage_ratio"] == pytest.approx(2 / (1 + cover))
    assert row["alpha_mae"] == pytest.approx((1 - cover) / 2)
    assert row["ssim_foreground"] > row["ssim"] + 0.05


def test_baselines_are_what_they_say() -> None:
    data = tensors()
    inputs, cameras = data.inputs, data.cameras
    predictors = ev.baselines(data)
    copy = predictors["copy_input"](inputs, cameras)
    torch.testing.assert_close(copy.rgb[:, 2], inputs.rgb.float() / 255)
    mean = predictors["mean_image"](inputs, cameras)
    torch.testing.assert_close(mean.rgb[1, 3], data.rgb.float().mean(dim=(0, 1)) / 255)
    torch.testing.assert_close(mean.alpha[0, 0, ..., 0], data.alpha.float().mean(dim=(0, 1)) / 255)
    assert predictors["black_image"](inputs, cameras).rgb.abs().max() == 0
    other = predictors["copy_input"](inputs, cameras.resized(8, 8))
    assert other.rgb.shape == (3, 4, 8, 8, 3)


def test_a_predictor_with_a_wrong_shape_or_nan_is_named() -> None:
    data = tensors(1)
    for size, value, message in ((8, 0.0, "predictor: got rgb"), (16, torch.nan, "NaN")):
        views = Views(*(torch.full((1, 4, size, size, c), value) for c in (3, 1, 1)))
        with pytest.raises(ValueError, match=message):
            ev.evaluate(lambda *_, made=views: made, data, progress=False)
    with pytest.raises(ValueError, match="batch"):
        ev.evaluate(oracle(data), data, batch=0)


def row(name: str, bin_: str = "0-30", **values: float) -> dict[str, Any]:
    sums = [ratio.removesuffix("_ratio") for ratio in ev.RATIOS]
    base = dict.fromkeys((*ev.MEANS, *ev.RATIOS, *sums), 0.0)
    base |= {**{f"{key}_target": 1.0 for key in sums}, "azimuth_deg": 0.0}
    return {"object": name.split("__")[0], "record": name, "bin": bin_, **base, **values}


def test_ratios_are_ratios_of_sums_per_object() -> None:
    rows = [
        row("a__0", luminance=1.0, luminance_target=10.0),
        row("a__1", luminance=2.0, luminance_target=0.5),
        row("b__0", luminance=1.0, luminance_target=1.0),
    ]
    summary = ev.summarise(rows)[0]
    assert summary["objects"] == 2 and summary["views"] == 3
    assert summary["luminance_ratio"] == pytest.approx((3 / 10.5 + 1) / 2)


def test_views_of_one_object_are_one_piece_of_evidence() -> None:
    """Ten copies of every view must not narrow the interval."""
    rows = [row(f"object{i}__0", psnr=20.0 + i) for i in range(8)]
    many = [dict(r, record=f"{r['object']}__{k}") for r in rows for k in range(10)]
    few, lots = ev.summarise(rows)[-1], ev.summarise(many)[-1]
    assert few["psnr"] == lots["psnr"] == pytest.approx(23.5)
    assert few["psnr_low"] == lots["psnr_low"]
    # The standard error of the mean of 0..7 is 2.449 / sqrt(8); Student's t of 7 is 2.365.
    assert few["psnr_high"] - few["psnr_low"] == pytest.approx(2 * 2.365 * 2.449 / 8**0.5, rel=1e-3)


@pytest.mark.parametrize("objects", [8, 16, 78])
def test_intervals_cover_the_truth_as_often_as_they_say(objects: int) -> None:
    draws = np.random.default_rng(0).normal(20.0, 3.0, (2000, objects))
    found = np.array([ev.mean_interval(values) for values in draws])
    covered = ((found[:, 1] < 20.0) & (found[:, 2] > 20.0)).mean()
    assert 0.935 < covered < 0.965
    missing = np.append(draws[0], math.nan)
    assert ev.mean_interval(missing) == ev.mean_interval(draws[0])


def test_a_bin_says_which_azimuths_it_holds() -> None:
    assert ev.azimuths_label([45.0, -45.0001]) == "45"
    assert ev.azimuths_label([180.0, -135.0, 135.0]) == "135, 180"
    assert ev.azimuths_label([91.2, 110.0, -133.0, 178.4]) == "91 to 178"
    rows = [row("a", azimuth_deg=0.0), row("b", "90-180", azimuth_deg=-135.0)]
    assert [entry["azimuths"] for entry in ev.summarise(rows)] == ["0", "135", "0, 135"]
    text = ev.table(ev.summarise(rows), metrics=("psnr",))
    assert [line.split("|")[1].strip() for line in text.splitlines()[2:]] == ["0", "135", "all"]


def test_summary_bins_nan_and_single_objects() -> None:
    rows = [row("a", psnr=10.0), row("a", "90-180", psnr=20.0, psnr_foreground=math.nan)]
    summary = {entry["bin"]: entry for entry in ev.summarise(rows)}
    assert list(summary) == ["0-30", "90-180", "all"]
    assert summary["all"]["psnr"] == 15.0
    assert math.isnan(summary["90-180"]["psnr_foreground"])
    assert math.isnan(summary["all"]["psnr_low"])
    assert ev.summarise([]) == []


def test_tables_escape_and_align() -> None:
    summary = ev.summarise([row("a", psnr=1.0), row("b", psnr=3.0)])
    text = ev.table({"copy | <input>": summary}, metrics=("psnr",))
    lines = text.splitlines()
    assert lines[0] == "| model | azimuth (deg) | objects | psnr |"
    assert "copy \\| <input>" in lines[2] and "2.00 [-10.71, 14.71]" in lines[2]
    assert "model" not in ev.table(summary)
    assert ev.table([]) == ""


def test_what_is_measured_beside_pixels_is_in_the_table_and_what_is_missing_says_so() -> None:
    data = tensors(2)

    def distance(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return (output - target).abs().mean(dim=(1, 2, 3))

    measures = ev.Measures({"lpips": distance}, missing={"perceptual": "pip install it"})
    rows = ev.evaluate(oracle(data, 0.5), data, measures=measures, progress=False)
    white = data.rgb.float() / 255 + 1 - data.alpha[..., None].float() / 255
    want = distance((white - data.rgb.float() / 510).flatten(0, 1), white.flatten(0, 1)).mean()
    summary = ev.summarise(rows)
    assert summary[-1]["lpips"] == pytest.approx(float(want)) and want > 0.01  # over white
    text = ev.table(summary, missing=measures.missing)
    assert "| lpips |" in text and "| perceptual (needs fresnel[perceptual]) |" in text
    assert "lpips" in measures.note and "perceptual was not: pip install it" in measures.note
    assert "lpips" not in ev.table(ev.summarise(ev.evaluate(oracle(data), data, progress=False)))


def test_faces_are_asked_of_views_near_the_input_beside_the_truth() -> None:
    data = tensors(2, views=8)

    def bright(images: torch.Tensor) -> torch.Tensor:  # a "face" is what is not all white
        return images.mean(dim=(1, 2, 3)) < 0.999

    nothing = ev.baselines(data)["black_image"]
    rows = ev.evaluate(nothing, data, measures=ev.Measures(faces=bright), progress=False)
    near = [row for row in rows if abs(row["azimuth_deg"]) <= 60]
    assert 0 < len(near) < len(rows)
    assert {(row["faces"], row["faces_true"]) for row in near} == {(0.0, 1.0)}
    assert all(math.isnan(row["faces"]) for row in rows if abs(row["azimuth_deg"]) > 60.01)
    summary = {entry["bin"]: entry for entry in ev.summarise(rows)}
    assert (summary["all"]["faces"], summary["all"]["faces_true"]) == (0.0, 1.0)
    assert math.isnan(summary["90-180"]["faces"])


def test_views_are_held_against_each_other_where_their_surface_is_known() -> None:
    data = tensors(2, views=8, size=32)
    depth = torch.stack([views_of(i, size=32, views=8).depth for i in range(2)])  # type: ignore
    known = replace(data, depth=depth)
    made = {"copy": ev.baselines(data)["copy_input"], "truth": oracle(data)}
    found = {k: ev.summarise(ev.evaluate(p, known, progress=False))[-1] for k, p in made.items()}
    assert found["truth"]["disagreement"] == found["truth"]["disagreement_true"]
    assert found["truth"]["disagreement_true"] == found["copy"]["disagreement_true"]
    assert found["copy"]["disagreement"] > 3 * found["truth"]["disagreement"] > 0
    assert "| disagreement |" in ev.table([found["copy"]])
    assert "disagreement" not in ev.evaluate(made["copy"], data, progress=False)[0]


def test_edge_energy_of_a_line_and_of_its_blur() -> None:
    image = torch.zeros(1, 8, 8, 3)
    image[:, :, 3] = 1.0
    assert float(ev.edge_energy(image)) == pytest.approx(16.0, rel=1e-5)  # eight rows, two edges
    assert float(ev.edge_energy(image.transpose(1, 2))) == pytest.approx(16.0, rel=1e-5)
    red = image * torch.tensor([1.0, 0.0, 0.0])
    assert float(ev.edge_energy(red)) == pytest.approx(16 * 0.299**2, rel=1e-5)
    blurred = (image + image.roll(1, 2)) / 2
    assert float(ev.edge_energy(blurred)) == pytest.approx(4.0, rel=1e-5)
    data = tensors(2)
    (*_, summary) = ev.summarise(ev.evaluate(oracle(data, 0.5), data, progress=False))
    assert summary["edge_energy_ratio"] == pytest.approx(0.25, rel=1e-3)


def test_a_checkerboard_passes_for_edges_and_not_for_coarse_ones() -> None:
    board = torch.zeros(1, 8, 8, 3)
    board[:, ::2, ::2] = board[:, 1::2, 1::2] = 1.0
    line = torch.zeros(1, 8, 8, 3)
    line[:, :, 4:] = 1.0  # between two pixels of the half-size picture
    assert float(ev.edge_energy(board)) == pytest.approx(2 * 7 * 8, rel=1e-5)
    assert float(ev.checkerboard(board)) == pytest.approx(4 * 7 * 7, rel=1e-5)
    assert ev.checkerboard(line) < 1e-6 < ev.edge_energy(line)
    data = tensors(1)
    truth = oracle(data, 1.0)

    def bought(inputs, cameras):
        views = truth(inputs, cameras)
        height, width = views.rgb.shape[2:4]
        sign = 1 - 2.0 * ((torch.arange(height)[:, None] + torch.arange(width)) % 2)
        rgb = (0.5 * views.rgb + 0.1 + 0.1 * sign[..., None]).clamp(0, 1)
        return Views(rgb, views.alpha, views.depth)

    (*_, seen) = ev.summarise(ev.evaluate(bought, data, progress=False))
    assert seen["edge_energy_ratio"] > 1 and seen["checkerboard_ratio"] > 3
    assert seen["coarse_edge_energy_ratio"] == pytest.approx(0.25, rel=0.02)


def test_cells_of_two_pixels_pass_for_edges_and_for_no_checkerboard_and_are_blocks() -> None:
    step = torch.zeros(1, 8, 8, 3)
    step[:, :, 4:] = 1.0  # a border of cells
    between, edges = ev.cell_edges(step[..., 0])
    assert float(between) == pytest.approx(float(ev.edge_energy(step))) == float(edges) == 8
    assert ev.cell_edges(step.roll(1, 2)[..., 0])[0] < 1e-4, "two edges, both inside cells"
    data = tensors(1)
    truth, seen = oracle(data, 1.0), {}

    def in_cells(inputs, cameras):
        views = truth(inputs, cameras)
        cells = views.rgb[:, :, ::2, ::2].repeat_interleave(2, 2).repeat_interleave(2, 3)
        return Views(cells, views.alpha, views.depth)

    for name, predictor in {"truth": truth, "cells": in_cells}.items():
        (*_, seen[name]) = ev.summarise(ev.evaluate(predictor, data, progress=False))
    assert seen["truth"]["blocks_ratio"] == pytest.approx(1, abs=0.1)
    assert seen["cells"]["blocks_ratio"] == pytest.approx(2, abs=1e-4)
    assert 0.7 < seen["cells"]["edge_energy_ratio"] < 1.3
    assert seen["cells"]["checkerboard_ratio"] < 1.5, "which sees no cells"


def test_values_by_object_are_what_the_summary_averages() -> None:
    data = tensors(3)
    rows = ev.evaluate(oracle(data, 0.7), data, progress=False)
    for metric in ("psnr", "luminance_ratio"):
        found = ev.by_object(rows, metric)
        for entry in ev.summarise(rows):
            values = found[entry["bin"]]
            assert len(values) == entry["objects"]
            assert sum(values.values()) / len(values) == pytest.approx(entry[metric])
