"""The factorial: Shapley values on games with known answers, locked Gaussians, exposure, cells."""

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
    return dataset.write(path, [views_of(i, size=32, views=4) for i in range(2)], meta={})


@pytest.fixture(scope="module")
def decoders() -> dict[str, Decoder]:
    torch.manual_seed(0)
    small = {"base_channels": 8, "channel_multipliers": (1, 2), "attention_levels": (1,)}
    configs = {
        "frontal": DecoderConfig(kind="patch", patch_grid=12, image_size=48),
        "multi-view": DecoderConfig(image_size=32, **small),
    }
    return {name: Decoder(config).eval() for name, config in configs.items()}


def test_shapley_values_of_known_games() -> None:
    bits = np.array(list(itertools.product((0, 1), repeat=3)), float)
    additive = at.shapley(bits @ [2.0, 0.5, -1.0])
    np.testing.assert_allclose(additive, [2.0, 0.5, -1.0])
    glove = at.shapley(bits[:, 0] * np.maximum(bits[:, 1], bits[:, 2]))
    np.testing.assert_allclose(glove, [2 / 3, 1 / 6, 1 / 6])
    cells = np.random.default_rng(0).normal(size=(16, 5))
    values = at.shapley(cells)
    assert values.shape == (4, 5)
    np.testing.assert_allclose(values.sum(0), cells[-1] - cells[0])


def measured(light, coverage=lambda bits: 0.5, passed=lambda bits: True, names="abcd") -> dict:
    """What `factorial` returns, of values by cell (bits, and an object's strength)."""
    strength = np.linspace(0.5, 1.0, len(names))
    cells = {
        "".join(map(str, bits)): {
            "light": list(light(bits, strength) * np.ones(len(names))),
            "coverage": [coverage(bits)] * len(names),
            "verdict": "PASS" if passed(bits) else "FAIL",
            "codes": [] if passed(bits) else ["pivot_offset"],
        }
        for bits in itertools.product((0, 1), repeat=4)
    }
    truth = {"light": [0.9] * len(names), "coverage": [0.8] * len(names)}
    return {"objects": list(names), "cells": cells, "truth": truth}


def test_attribution_splits_the_way_and_says_how_sure() -> None:
    """Light is path x decoder, coverage the path's, and a little the position's."""
    found = at.attribute(
        [
            measured(
                lambda bits, strength: 0.1 + 0.8 * bits[0] * bits[1] * strength,
                lambda bits: 0.2 + 0.6 * bits[0] + 0.05 * bits[2],
                lambda bits: bits[0] == 1,
                [f"o{i}__{k}" for i in range(6) for k in range(2)],
            )
        ]
    )
    assert found["objects"] == 6 and found["seeds"] == 1, "poses of one object count once"
    light = found["light"]["factors"]
    for factor in ("path", "decoder"):
        share = light[factor]["share"]
        assert [share.mean, share.low, share.high] == pytest.approx([0.5] * 3), "a steady ratio"
        assert light[factor]["alone"].mean == pytest.approx(0)
        assert light[factor]["last"].mean == pytest.approx(0.6)
    for factor, way in itertools.product(("exposure", "position"), ("alone", "last", "gain")):
        assert light[factor][way].mean == pytest.approx(0)
    assert light["path"]["gain"].low < light["path"]["gain"].mean < light["path"]["gain"].high
    ways = {word: found["coverage"][word].mean for word in ("original", "none", "mended", "truth")}
    assert ways == pytest.approx({"original": 0.25, "none": 0.2, "mended": 0.85, "truth": 0.8})
    path = found["coverage"]["factors"]["path"]
    assert [path[way].mean for way in ("share", "alone", "last")] == pytest.approx(
        [0.6 / 0.65, 0.6, 0.6]
    )
    gain = sum(entry["gain"].mean for entry in light.values())
    assert gain == pytest.approx(found["light"]["mended"].mean - found["light"]["none"].mean)
    table = at.cells_table(found)
    assert len(table) == 16 and list(table["the gate says"]).count("FAIL: pivot_offset") == 8
    assert list(table.iloc[8][list(at.FACTORS)]) == ["x", "", "", ""]
    assert at.shares_table(found, "light")["share"][0].startswith("50")
    for axis in charts.waterfall({o: found[o] for o in at.OUTCOMES}, at.NAMES).axes:
        bars, whiskers = axis.containers
        (label,) = axis.texts
        assert label.get_position()[0] > 1, "beside the axes, where no bar covers it"
        ends = [bar.get_y() + bar.get_height() for bar in bars]
        middles = [line[:, 1].mean() for line in whiskers.lines[2][0].get_segments()]
        assert middles == pytest.approx(ends) and ends[-2] == pytest.approx(ends[-1])


def test_locked_gaussians_stay_on_ray_and_depth(
    boxes: MultiViewDataset, decoders: dict[str, Decoder]
) -> None:
    inputs = boxes.inputs()
    free = decoders["multi-view"]
    torch.nn.init.normal_(free.network.head.weight, std=0.3)
    with torch.no_grad():
        before, after = free(inputs), at.locked(free)(inputs)
    eyes = torch.eye(4).expand(2, 4, 4)
    rays = Cameras(eyes, inputs.cameras.Ks, 32, 32).rays()[1].flatten(1, 2).repeat(1, 2, 1)
    off = [torch.linalg.cross(g.means, rays).norm(dim=-1).max().item() for g in (before, after)]
    assert off[1] < 1e-5 < 1e-2 < off[0]
    layers, seen = (g.means[..., 2].reshape(2, 2, -1) for g in (after, before))
    assert torch.equal(layers, seen[:, :1].expand_as(layers))
    assert torch.equal(before.opacities, after.opacities)
    with torch.no_grad():
        before, after = decoders["frontal"](inputs), at.locked(decoders["frontal"])(inputs)
    moved = (before.means - after.means).abs()
    assert 0 < float(moved.max()) <= 0.25 + 1e-6, "the offset, and nothing else, is gone"
    assert float(after.means[..., 2].min()) >= 2 and float(after.means[..., 2].max()) <= 4


def test_exposure_brings_each_view_to_its_inputs_luminance() -> None:
    record = views_of(0, size=32, views=4)
    dark = replace(record, rgb=(record.rgb.float() * 0.3).to(torch.uint8))
    rows, dim = at.measure([at.exposed(dark)]), at.measure([dark])
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
        assert len(cell["light"]) == 2 == len(cell["coverage"])
        assert all(0 <= v <= 1 for v in (*cell["light"], *cell["coverage"]))
    found = at.attribute([cells])
    # Even untrained, a pixel decoder shows its input's copy: what matters is where one looks from.
    assert found["coverage"]["factors"]["path"]["share"].mean > 0.5
    assert cells["cells"]["0000"]["verdict"] == "FAIL"
    assert all(math.isfinite(found[o]["truth"].mean) for o in at.OUTCOMES)


def test_several_seeds_are_averaged_and_their_spread_stands_beside() -> None:
    seeds = [
        measured(lambda bits, strength, x=x: 0.1 + x * bits[0], passed=lambda bits, x=x: x > 0.4)
        for x in (0.4, 0.5, 0.6)
    ]
    found = at.attribute(seeds)
    gain = found["light"]["factors"]["path"]["gain"]
    assert found["seeds"] == 3 and gain.mean == pytest.approx(0.5) and gain.sd == pytest.approx(0.1)
    assert gain.low < 0.4 and gain.high > 0.6, "three trainings say little about others"
    assert found["cells"]["1010"]["passed"] == [0.0, 1.0, 1.0]
    assert set(at.cells_table(found)["the gate says"]) == {"FAIL: pivot_offset (1 of 3 seeds)"}
    with pytest.raises(ValueError, match="different objects"):
        at.attribute([seeds[0], {**seeds[1], "objects": list("abce")}])
    nothing = at.attribute([])
    assert math.isnan(nothing["light"]["factors"]["path"]["share"].mean) and not nothing["cells"]
    single = at.attribute([measured(lambda bits, strength: 0.5, names="a")])["light"]
    assert math.isnan(single["mended"].low) and single["mended"].mean == 0.5
    assert math.isnan(single["factors"]["path"]["share"].mean), "where nothing is gained"


def test_decoders_pair_by_seed(tmp_path: Path, decoders: dict[str, Decoder]) -> None:
    names = ["frontal-s0", "frontal-s2", "frontal-s10", "A-s2", "A-s10", "A-s11", "A-sbest", "C-s5"]
    for name in names:
        kind = "frontal" if name.startswith("f") else "multi-view"
        decoders[kind].save(tmp_path / f"{name}.safetensors", half=True)
    frontal, many, apart, none = (
        str(tmp_path / f"{n}-s{{seed}}.safetensors") for n in ("frontal", "A", "C", "B")
    )
    pairs = at.decoder_pairs(frontal, many, "cpu")
    assert list(pairs) == ["2", "10"]
    assert [d.config.kind for d in pairs["2"].values()] == ["patch", "pixel"]
    assert list(at.decoder_pairs("", many, "cpu")) == ["2", "10", "11"], "what ships serves all"
    assert list(at.decoder_pairs("", "", "cpu")) == [""]
    with pytest.raises(ValueError, match="no weights at"):
        at.decoder_pairs("", none, "cpu")
    with pytest.raises(ValueError, match="no seed in common"):
        at.decoder_pairs(frontal, apart, "cpu")
