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
from fresnel.show import charts as figures_study
from fresnel.show import style as figures


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


def game(value) -> dict[str, float]:
    return {"".join(b): value(*map(int, b)) for b in itertools.product("01", repeat=3)}


def test_shapley_values_of_known_games() -> None:
    additive = at.shapley(game(lambda a, b, c: 2.0 * a + 0.5 * b - c), 3)
    np.testing.assert_allclose(additive, [2.0, 0.5, -1.0])
    glove = at.shapley(game(lambda left, r1, r2: float(left and (r1 or r2))), 3)
    np.testing.assert_allclose(glove, [2 / 3, 1 / 6, 1 / 6])
    generator = np.random.default_rng(0)
    cells = {"".join(b): generator.normal(size=5) for b in itertools.product("01", repeat=4)}
    values = at.shapley(cells)
    assert values.shape == (4, 5)
    np.testing.assert_allclose(values.sum(0), cells["1111"] - cells["0000"])


def test_attribution_splits_the_way_and_says_how_sure(capsys: pytest.CaptureFixture[str]) -> None:
    """Light is path x decoder, coverage the path's alone; exposure and position do nothing."""
    names = [f"o{i}__{k}" for i in range(6) for k in range(2)]
    strength = np.repeat(np.linspace(0.5, 1.0, 6), 2)
    cells = {}
    for bits in itertools.product("01", repeat=4):
        path, decoder = int(bits[0]), int(bits[1])
        cells["".join(bits)] = {
            "light": list(0.1 + 0.8 * path * decoder * strength),
            "coverage": list(0.2 + 0.6 * path * np.ones(12)),
            "verdict": "PASS" if path else "FAIL",
            "codes": [] if path else ["pivot_offset"],
        }
    truth = {"light": [0.9] * 12, "coverage": [0.8] * 12}
    found = at.attribute({"objects": names, "cells": cells, "truth": truth})
    assert found["objects"] == 6
    light = found["light"]["factors"]
    assert light["path"]["share"] == pytest.approx(0.5) == light["decoder"]["share"]
    assert light["path"]["alone"] == 0 and light["path"]["last"] == pytest.approx(0.6)
    assert light["path"]["gain_low"] < light["path"]["gain"] < light["path"]["gain_high"]
    assert light["exposure"]["gain"] == light["position"]["gain"] == pytest.approx(0.0)
    coverage = found["coverage"]["factors"]
    assert coverage["path"]["share"] == pytest.approx(1.0) == coverage["path"]["share_low"]
    assert sum(entry["gain"] for entry in light.values()) == pytest.approx(
        found["light"]["mended"] - found["light"]["none"]
    )
    table = at.cells_table(found)
    assert table.count("\n") == 17 and table.count("FAIL: pivot_offset") == 8
    assert "50 %" in at.shares_table(found) and "path 100 %" in at.sentence(found)
    figure = figures_study.waterfall({o: found[o] for o in at.OUTCOMES}, at.SHORT)
    assert len(figure.axes) == 2 and figures.to_png(figure, 40)


def test_locked_gaussians_stay_on_ray_and_depth(
    boxes: MultiViewDataset, decoders: dict[str, Decoder]
) -> None:
    inputs = boxes.inputs()
    free, locked = decoders["multi-view"], at.LockedDecoder(decoders["multi-view"])
    torch.nn.init.normal_(free.network.head.weight, std=0.3)
    locked.load_state_dict(free.state_dict())
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

    frontal, fixed = decoders["frontal"], at.LockedDecoder(decoders["frontal"])
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
    measured = at.factorial(boxes, decoders, image_size=32, views=4)
    assert set(measured["cells"]) == {"".join(b) for b in itertools.product("01", repeat=4)}
    for cell in measured["cells"].values():
        assert len(cell["light"]) == 3 == len(cell["coverage"])
        assert all(0 <= v <= 1 for v in (*cell["light"], *cell["coverage"]))
    found = at.attribute(measured)
    # Even untrained, a pixel decoder shows its input's copy: what matters is where one looks from.
    assert found["coverage"]["factors"]["path"]["share"] > 0.5
    assert measured["cells"]["0000"]["verdict"] == "FAIL"
    assert all(math.isfinite(found[o]["truth"]) for o in at.OUTCOMES)


def test_several_seeds_are_averaged_and_their_spread_stands_beside() -> None:
    def one(strength: float, failed: bool) -> dict:
        cells = {
            "".join(bits): {
                "light": [0.1 + strength * int(bits[0]) + 0.01 * i for i in range(4)],
                "coverage": [0.5] * 4,
                "verdict": "FAIL" if failed else "PASS",
                "codes": ["views_dark"] if failed else [],
            }
            for bits in itertools.product("01", repeat=4)
        }
        truth = {"light": [1.0] * 4, "coverage": [1.0] * 4}
        return {"objects": list("abcd"), "cells": cells, "truth": truth}

    seeds = [one(0.4, True), one(0.5, False), one(0.6, False)]
    found = at.attribute(seeds)
    gain = found["light"]["factors"]["path"]
    assert found["seeds"] == 3 and gain["gain"] == pytest.approx(0.5)
    assert gain["gain_sd"] == pytest.approx(0.1) and gain["share_sd"] == pytest.approx(0.0)
    assert "0.50 ± 0.10 [0.50, 0.50]" in at.shares_table(found).replace("\N{NO-BREAK SPACE}", " ")
    assert at.cells_table(found).count("FAIL: views_dark (1 of 3 seeds)") == 16
    assert "3 seeds" in at.sentence(found)
    assert at.sentence(at.attribute(seeds[:1])) == at.sentence(at.attribute(seeds[0]))
    with pytest.raises(ValueError, match="different objects"):
        at.attribute([seeds[0], {**seeds[1], "objects": list("abce")}])


def test_decoders_pair_by_seed(tmp_path: Path, decoders: dict[str, Decoder]) -> None:
    for seed in (0, 2, 10):
        decoders["frontal"].save(tmp_path / f"frontal-s{seed}.safetensors", half=True)
    for seed in (2, 10, 11):
        decoders["multi-view"].save(tmp_path / f"A-s{seed}.safetensors", half=True)
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


def test_one_object_has_no_interval(boxes: MultiViewDataset, decoders: dict[str, Decoder]) -> None:
    cells = {
        "".join(b): {"light": [0.5], "coverage": [0.5], "verdict": "PASS", "codes": []}
        for b in itertools.product("01", repeat=4)
    }
    truth = {"light": [1.0], "coverage": [1.0]}
    found = at.attribute({"objects": ["a"], "cells": cells, "truth": truth})
    assert math.isnan(found["light"]["mended_low"]) and found["light"]["mended"] == 0.5
