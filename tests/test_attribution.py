"""The factorial: Shapley values on games with known answers, locked Gaussians, exposure, cells."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from boxes import views_of

from fresnel.analysis import attribution as at
from fresnel.data import dataset
from fresnel.data.dataset import MultiViewDataset
from fresnel.models.decoder import Decoder, DecoderConfig
from fresnel.scene.cameras import Cameras
from fresnel.show import charts


@pytest.fixture(scope="module")
def boxes(tmp_path_factory: pytest.TempPathFactory) -> MultiViewDataset:
    path = tmp_path_factory.mktemp("data") / "boxes"
    return dataset.write(path, [views_of(i, size=32, views=4) for i in range(3)], meta={})


@pytest.fixture(scope="module")
def decoders() -> dict[str, Decoder]:
    torch.manual_seed(0)
    configs = {
        "frontal": DecoderConfig(kind="patch", patch_grid=12, image_size=48),
        "multi-view": DecoderConfig(
            image_size=32, base_channels=8, channel_multipliers=(1, 2), attention_levels=(1,)
        ),
    }
    return {name: Decoder(config).eval() for name, config in configs.items()}


def game(value) -> np.ndarray:
    bits = itertools.product((0, 1), repeat=3)
    return np.reshape([value(*b) for b in bits], (2, 2, 2)).astype(float)


def test_shapley_values_of_known_games() -> None:
    additive = at.shapley(game(lambda a, b, c: 2.0 * a + 0.5 * b - c), 3)
    np.testing.assert_allclose(additive, [2.0, 0.5, -1.0])
    glove = at.shapley(game(lambda left, r1, r2: float(left and (r1 or r2))), 3)
    np.testing.assert_allclose(glove, [2 / 3, 1 / 6, 1 / 6])
    generator = np.random.default_rng(0)
    cube = generator.normal(size=(2, 2, 2, 2, 5))
    values = at.shapley(cube)
    assert values.shape == (4, 5)
    np.testing.assert_allclose(values.sum(0), cube[1, 1, 1, 1] - cube[0, 0, 0, 0])


def measured(light, coverage=lambda bits: 0.5, passed=lambda bits: True, names="abcd") -> dict:
    """What `factorial` returns, of values by cell (bits, and an object's strength)."""
    strength = np.linspace(0.5, 1.0, len(names))
    cells = {
        "".join(bits): {
            "light": list(light(bits, strength) * np.ones(len(names))),
            "coverage": list(coverage(bits) * np.ones(len(names))),
            "verdict": "PASS" if passed(bits) else "FAIL",
            "codes": [] if passed(bits) else ["pivot_offset"],
        }
        for bits in itertools.product("01", repeat=4)
    }
    truth = {"light": [0.9] * len(names), "coverage": [0.8] * len(names)}
    return {"objects": list(names), "cells": cells, "truth": truth}


def test_attribution_splits_the_way_and_says_how_sure() -> None:
    """Light is path x decoder, coverage the path's alone; exposure and position do nothing."""
    found = at.attribute(
        [
            measured(
                lambda bits, strength: 0.1 + 0.8 * int(bits[0]) * int(bits[1]) * strength,
                lambda bits: 0.2 + 0.6 * int(bits[0]),
                lambda bits: bits[0] == "1",
                [f"o{i}__{k}" for i in range(6) for k in range(2)],
            )
        ]
    )
    assert found["objects"] == 6 and found["seeds"] == 1, "poses of one object count once"
    light = found["light"]["factors"]
    for factor in ("path", "decoder"):
        share = light[factor]["share"]
        assert [share.mean, share.low, share.high] == pytest.approx([0.5] * 3), "a steady ratio"
    assert light["path"]["alone"].mean == 0 and light["path"]["last"].mean == pytest.approx(0.6)
    assert light["path"]["gain"].low < light["path"]["gain"].mean < light["path"]["gain"].high
    assert light["exposure"]["last"].mean == pytest.approx(0) == light["exposure"]["alone"].mean
    assert light["exposure"]["gain"].mean == pytest.approx(0) == light["position"]["gain"].mean
    assert found["coverage"]["factors"]["path"]["share"].mean == pytest.approx(1.0)
    assert sum(entry["gain"].mean for entry in light.values()) == pytest.approx(
        found["light"]["mended"].mean - found["light"]["none"].mean
    )
    table = at.cells_table(found)
    assert len(table) == 16 and list(table["the gate says"]).count("FAIL: pivot_offset") == 8
    assert list(table.iloc[8][list(at.FACTORS)]) == ["x", "", "", ""]
    assert at.shares_table(found, "light")["share"][0].startswith("50")
    figure = charts.waterfall({o: found[o] for o in at.OUTCOMES}, at.NAMES)
    assert len(figure.axes) == 2


def test_locked_gaussians_stay_on_ray_and_depth(
    boxes: MultiViewDataset, decoders: dict[str, Decoder]
) -> None:
    inputs = boxes.inputs()
    free, locked = decoders["multi-view"], at.locked(decoders["multi-view"])
    torch.nn.init.normal_(free.network.head.weight, std=0.3)
    with torch.no_grad():
        before, after = free(inputs), locked(inputs)
    rays = Cameras(
        torch.eye(4).expand(3, 4, 4), inputs.cameras.Ks, 32, 32
    ).rays()[1].flatten(1, 2).repeat(1, 2, 1)  # fmt: skip

    def off_ray(means: torch.Tensor) -> float:
        return float(torch.linalg.cross(means, rays).norm(dim=-1).max())

    assert off_ray(after.means) < 1e-5 < 1e-2 < off_ray(before.means)
    layers = after.means[..., 2].reshape(3, 2, -1)
    assert torch.equal(layers[:, 0], layers[:, 1])
    assert torch.equal(layers[:, 0], before.means[..., 2].reshape(3, 2, -1)[:, 0])
    assert torch.equal(before.opacities, after.opacities)

    frontal, fixed = decoders["frontal"], at.locked(decoders["frontal"])
    with torch.no_grad():
        before, after = frontal(inputs), fixed(inputs)
    moved = (before.means - after.means).abs()
    assert 0 < float(moved.max()) <= 0.25 + 1e-6, "the offset, and nothing else, is gone"
    assert float(after.means[..., 2].min()) >= 2 and float(after.means[..., 2].max()) <= 4


def test_exposure_brings_each_view_to_its_inputs_luminance() -> None:
    record = views_of(0, size=32, views=4)
    dark = replace(record, rgb=(record.rgb.float() * 0.3).to(torch.uint8))
    mended = at.exposed(dark)
    rows, dim = at._measured([mended]), at._measured([dark])
    assert dim["light"][0] < 0.3 < 0.9 < rows["light"][0]
    assert rows["coverage"] == dim["coverage"]
    empty = replace(record, rgb=record.rgb * 0, alpha=record.alpha * 0)
    assert (at.exposed(empty).rgb == 0).all()


def test_every_cell_of_a_small_factorial_is_measured(
    boxes: MultiViewDataset, decoders: dict[str, Decoder]
) -> None:
    cells = at.factorial(boxes, decoders, image_size=32, views=4)
    assert set(cells["cells"]) == {"".join(b) for b in itertools.product("01", repeat=4)}
    for cell in cells["cells"].values():
        assert len(cell["light"]) == 3 == len(cell["coverage"])
        assert all(0 <= v <= 1 for v in (*cell["light"], *cell["coverage"]))
    found = at.attribute([cells])
    # Even untrained, a pixel decoder shows its input's copy: what matters is where one looks from.
    assert found["coverage"]["factors"]["path"]["share"].mean > 0.5
    assert cells["cells"]["0000"]["verdict"] == "FAIL"
    assert all(math.isfinite(found[o]["truth"].mean) for o in at.OUTCOMES)


def test_several_seeds_are_averaged_and_their_spread_stands_beside() -> None:
    seeds = [
        measured(
            lambda bits, strength, x=x: 0.1 + x * int(bits[0]), passed=lambda bits, x=x: x > 0.4
        )
        for x in (0.4, 0.5, 0.6)
    ]
    found = at.attribute(seeds)
    gain = found["light"]["factors"]["path"]["gain"]
    assert found["seeds"] == 3 and gain.mean == pytest.approx(0.5) and gain.sd == pytest.approx(0.1)
    assert gain.low < 0.4 and gain.high > 0.6, "three trainings say little about others"
    assert found["cells"]["1010"]["passed"] == [0.0, 1.0, 1.0]
    assert (
        list(at.cells_table(found)["the gate says"]).count("FAIL: pivot_offset (1 of 3 seeds)")
        == 16
    )
    with pytest.raises(ValueError, match="different objects"):
        at.attribute([seeds[0], {**seeds[1], "objects": list("abce")}])
    nothing = at.attribute([])
    assert math.isnan(nothing["light"]["factors"]["path"]["share"].mean) and not nothing["cells"]


def test_decoders_pair_by_seed(tmp_path: Path, decoders: dict[str, Decoder]) -> None:
    for seed in (0, 2, 10):
        decoders["frontal"].save(tmp_path / f"frontal-s{seed}.safetensors", half=True)
    for seed in (2, 10, 11):
        decoders["multi-view"].save(tmp_path / f"A-s{seed}.safetensors", half=True)
    decoders["multi-view"].save(tmp_path / "A-sbest.safetensors", half=True)  # of no seed
    many = str(tmp_path / "A-s{seed}.safetensors")
    pairs = at.decoder_pairs(str(tmp_path / "frontal-s{seed}.safetensors"), many, "cpu")
    assert list(pairs) == ["2", "10"]
    assert {d.config.kind for d in pairs["2"].values()} == {"patch", "pixel"}
    assert list(at.decoder_pairs("", many, "cpu")) == ["2", "10", "11"], "what ships serves all"
    assert list(at.decoder_pairs("", "", "cpu")) == [""]
    with pytest.raises(ValueError, match="no weights at"):
        at.decoder_pairs("", str(tmp_path / "B-s{seed}.safetensors"), "cpu")
    decoders["multi-view"].save(tmp_path / "C-s5.safetensors", half=True)
    frontal, apart = (str(tmp_path / f"{n}-s{{seed}}.safetensors") for n in ("frontal", "C"))
    with pytest.raises(ValueError, match="no seed in common"):
        at.decoder_pairs(frontal, apart, "cpu")


def test_one_object_has_no_interval() -> None:
    found = at.attribute([measured(lambda bits, strength: 0.5, names="a")])["light"]
    assert math.isnan(found["mended"].low) and found["mended"].mean == 0.5
    assert math.isnan(found["factors"]["path"]["share"].mean), "where nothing is gained"
