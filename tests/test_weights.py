"""Weights in files: what comes back, what is refused, and what belongs to what."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fresnel.models import cvs, decoder, weights
from fresnel.models.cvs import CVS, CVSConfig
from fresnel.models.decoder import Decoder, DecoderConfig

TINY = DecoderConfig(
    image_size=32, base_channels=8, channel_multipliers=(1, 2), attention_levels=(), patch=2
)
CONFIGS = {
    "pixel": TINY,
    "patch": DecoderConfig(kind="patch", image_size=32, patch_grid=5),
    "cvs": CVSConfig.preset("tiny"),
}


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_what_is_saved_comes_back(kind: str, tmp_path: Path) -> None:
    network: Any = (CVS if kind == "cvs" else Decoder)(CONFIGS[kind])
    network.train().provenance = {"params": {"steps": 7}, "data": ["sha256:1"]}
    fact, value = ("decoder", "sha256:of it") if kind == "cvs" else ("render_size", 48)
    setattr(network, fact, value)
    folder = tmp_path / "new"
    full = network.save(folder / "full.safetensors")
    half = network.save(folder / "half.safetensors", half=True)
    loaded, smaller = type(network).load(full), type(network).load(half).state_dict()
    assert loaded.config == network.config and not loaded.training
    assert loaded.provenance == network.provenance and getattr(loaded, fact) == value
    assert loaded.checksum() == network.checksum()
    for name, tensor in network.state_dict().items():
        assert smaller[name].dtype == torch.float32
        torch.testing.assert_close(smaller[name], tensor, atol=1e-3, rtol=1e-3)
    assert half.stat().st_size < 0.75 * full.stat().st_size
    assert sorted(folder.iterdir()) == [full, half]
    assert weights.read_header(half)["params"] == {"steps": 7}


def edited(path: Path, change: dict[str, Any]) -> None:
    """Another configuration in the file, its header else as it was."""
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["fresnel"])
    header["config"] |= change
    save_file(load_file(path), path, metadata={"fresnel": json.dumps(header)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base_channels": 1_000_000}, "base_channels 1000000 is out of bounds"),
        ({"channel_multipliers": [1, 4000]}, "out of bounds"),
        ({"channel_multipliers": [1] * 17}, "out of bounds"),
        ({"blocks_per_level": 500}, "blocks_per_level 500 is out of bounds"),
        ({"base_channels": 2000}, "don't fit the configuration"),
        ({"flavour": 3}, "flavour"),
        ({"encoder": "dinov2"}, "encoder 'dinov2' is not supported"),
        ({"render_base": False}, "render_base False is not supported"),
    ],
)
def test_a_configuration_that_is_not_of_its_weights_is_refused(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = Decoder(TINY).save(tmp_path / "d.safetensors")
    edited(path, change)
    with pytest.raises(ValueError, match=message):
        Decoder.load(path)


def test_damaged_foreign_and_missing_files_are_named(tmp_path: Path) -> None:
    path = Decoder(TINY).save(tmp_path / "d.safetensors")
    whole = path.read_bytes()
    with pytest.raises(ValueError, match=r"d\.safetensors: not a cvs checkpoint"):
        CVS.load(path)
    with pytest.raises(FileNotFoundError, match="no such decoder checkpoint"):
        Decoder.load(tmp_path / "none.safetensors")
    Decoder(replace(TINY, attention_levels=(1,))).save(path)
    edited(path, {"attention_levels": []})  # tensors that the network has no place for
    with pytest.raises(ValueError, match="don't fit the configuration"):
        Decoder.load(path)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="kind None"):
        Decoder.load(path)
    for content, message in (
        (whole[:1000], "not a readable decoder checkpoint"),
        (whole[:-1] + bytes([whole[-1] ^ 1]), "not those that were saved"),  # a bit of a weight
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            Decoder.load(path)


def test_a_cvs_of_before_networks_denoised_is_refused(tmp_path: Path) -> None:
    path = CVS(CONFIGS["cvs"]).save(tmp_path / "old.safetensors")
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["fresnel"])
    del header["config"]["objective"]
    save_file(load_file(path), path, metadata={"fresnel": json.dumps(header)})
    with pytest.raises(ValueError, match="made before networks denoised; train it anew"):
        CVS.load(path)


def test_what_ships_loads_and_says_what_it_is(tmp_path: Path) -> None:
    for kind in ("pixel", "patch", "patch_faces"):
        network = decoder.load_shipped(kind)
        assert network.config.kind == kind.split("_")[0] and network.render_size == 128
        assert network.provenance["notebook"] == "03_full_train"
        assert not network.gate_overridden
    for model in cvs.SHIPPED:
        network = cvs.load_shipped(model=model)
        assert network.config.render_twin is (model == "cvs-warp") and not network.training
        assert network.provenance, "where it comes from"
    again = CVS.load(network.save(tmp_path / "twin.safetensors", half=True))
    assert again.checksum() == network.checksum(), "half precision already"
    with pytest.raises(ValueError, match="no trained 'cvs-refine' ships"):
        cvs.load_shipped(model="cvs-refine")


def test_without_shipped_weights_the_message_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(weights.resources, "files", lambda _: tmp_path)
    for load, kind, file in (
        (cvs.load_shipped, "cpu", r"cvs\.safetensors"),
        (lambda of: cvs.load_shipped(model="cvs-warp", domain=of), "faces", "cvs_warp_faces"),
        (decoder.load_shipped, "patch", r"decoder_patch\.safetensors"),
    ):
        with pytest.raises(FileNotFoundError, match=f"{file}.*03_full_train"):
            load(kind)
