"""One picture in, views and Gaussians out: the `views` command and what it assumes."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from test_photos import COLOUR, disc, save

from fresnel import views as sampling
from fresnel.cli import main
from fresnel.data import photos
from fresnel.models import cvs, decoder
from fresnel.scene.gaussians import Gaussians


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    cvs.CVS(cvs.CVSConfig.preset("tiny")).save(path, half=True)
    return path


@pytest.fixture
def picture(tmp_path):
    return save(tmp_path / "toy.png", disc(), None)


def test_views_writes_pictures_gaussians_and_what_it_assumed(picture, tmp_path, weights, capsys):
    out = tmp_path / "out"
    status = main([
        "views", str(picture), "--out", str(out), "--weights", str(weights), "--views", "4",
        "--ply", str(out / "toy.ply"), "--spz", str(out / "toy.spz"), "--elevation", "20",
    ])  # fmt: skip
    printed = capsys.readouterr().out
    assert status == 0, printed
    assert "alpha channel" in printed and "20 degrees" in printed
    for azimuth in (0, 90, 180, 270):
        with Image.open(out / f"azimuth_{azimuth:03d}.png") as image:
            assert image.mode == "RGBA" and image.size == (16, 16)
    facts = json.loads((out / "views.json").read_text())
    assert facts["background"] == "alpha" and facts["elevation_deg"] == 20
    assert list(facts["files"]) == ["0", "90", "180", "270"]
    scene = Gaussians.load(out / "toy.ply")
    assert scene.num == facts["gaussians"]["count"] > 500
    upright = Gaussians.load(out / "toy.spz")
    assert upright.num == scene.num
    turned = upright.means * torch.tensor([1.0, -1.0, -1.0])  # y down in a PLY, up in an SPZ
    assert torch.allclose(scene.means, turned, atol=1e-3) and upright.means[:, 1].std() > 0.01
    assert (out / "contact_sheet.png").stat().st_size > 1000
    # The Gaussians are the object's: about one unit long, around the origin, of its colour.
    dense = scene.select(scene.opacities > 0.5)
    assert float(dense.means.norm(dim=-1).max()) < 1.0
    assert torch.allclose(dense.colors.mean(0) * 255, torch.tensor(COLOUR).float(), atol=40)


def test_views_by_weights_that_see_the_decoders_render(picture, tmp_path):
    config = cvs.CVSConfig.preset("tiny", render_condition=True, render_twin=True)
    path = cvs.CVS(config).save(tmp_path / "refine.safetensors", half=True)
    facts = sampling.write_views(picture, tmp_path / "out", weights=path, count=2)
    made = np.asarray(Image.open(tmp_path / "out" / facts["files"]["0"]).convert("RGB"), float)
    # An untrained one gives the decoder's render: the object, in its colour.
    assert np.abs(np.median(made[8, 6:10], axis=0) - COLOUR).max() < 40


def test_views_draw_with_the_decoder_that_the_weights_belong_to(picture, tmp_path, monkeypatch):
    small = {"image_size": 32, "base_channels": 8, "channel_multipliers": (1, 2), "patch": 2}
    other = decoder.Decoder(decoder.DecoderConfig(attention_levels=(), **small))
    config = cvs.CVSConfig.preset("tiny", render_condition=True)
    network = cvs.CVS(config)
    network.decoder = other.checksum()
    (tmp_path / "weights").mkdir()
    path = network.save(tmp_path / "weights" / "refine.safetensors", half=True)
    with pytest.raises(ValueError, match="put that decoder's file into the same folder"):
        sampling.write_views(picture, tmp_path / "out", weights=path, count=2)
    other.save(tmp_path / "weights" / "other.safetensors", half=False)
    decoder.Decoder(other.config).save(tmp_path / "weights" / "another.safetensors", half=False)
    assert sampling._decoder_of(network, path, "cpu").checksum() == other.checksum()
    drawn = []
    draw = decoder.render_small
    monkeypatch.setattr(
        decoder, "render_small", lambda *a, **k: drawn.append(a[1].batch_shape) or draw(*a, **k)
    )
    facts = sampling.write_views(picture, tmp_path / "out", weights=path, count=2)
    assert facts["gaussians"]["count"] <= 2 * 32 * 32  # the shipped one has 2 x 128 x 128
    assert drawn == [(1, 2)], "one render serves the sheet and the network"


def test_a_picture_is_read_as_large_as_the_network_sees_it(picture, tmp_path, monkeypatch):
    seen, read = [], photos.read
    spy = lambda *a, **k: seen.append(read(*a, **k)) or seen[-1]  # noqa: E731
    monkeypatch.setattr(photos, "read", spy)
    path = cvs.CVS(cvs.CVSConfig.preset("tiny", image_size=160)).save(tmp_path / "w.safetensors")
    facts = sampling.write_views(picture, tmp_path / "out", weights=path, count=1)
    assert seen[0].inputs.rgb.shape[1] == 160 == facts["image_size"]


def test_every_view_has_a_file_of_its_own(picture, tmp_path, weights, monkeypatch):
    sheet = np.zeros((4, 4, 3), "u1")
    monkeypatch.setattr(sampling.pictures, "contact_sheet", lambda *_, **__: sheet)
    facts = sampling.write_views(picture, tmp_path / "out", weights=weights, count=400)
    assert len(list((tmp_path / "out").glob("azimuth_*.png"))) == 400 == len(facts["files"])
    assert facts["files"]["0.9"] == "azimuth_000.9.png"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--weights", "missing.safetensors"], "no such cvs checkpoint"),
        (["--weights", "toy.png"], "not a readable cvs checkpoint"),
        (["--elevation", "95"], "elevation_deg: got 95"),
        (["--steps", "0"], "steps: got 0"),
        (["--views", "3601"], "views: got 3601"),
        (["--ply", "toy.obj"], "ends in .ply"),
        (["--out", "toy.png"], "want a folder"),
    ],
)
def test_wrong_use_is_one_clear_line(picture, weights, capsys, monkeypatch, change, message):
    monkeypatch.chdir(picture.parent)
    assert main(["views", "toy.png", "--out", "o", "--weights", str(weights), *change]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_what_ships_draws_the_object_and_stays_near_the_decoder(picture, tmp_path):
    facts = sampling.write_views(picture, tmp_path / "out")
    assert facts["weights"] == "shipped" and facts["image_size"] == 128
    with Image.open(tmp_path / "out" / facts["files"]["0"]) as image:
        made = np.asarray(image, float)
    y, x = np.mgrid[:128, :128] + 0.5
    inside = np.hypot(y - 64, x - 64) < 30
    assert np.abs(np.median(made[inside, :3], axis=0) - COLOUR).max() < 15
    assert made[inside, 3].mean() > 240 and made[~inside, 3].mean() < 40
    # Where there is nothing to mend, it leaves the decoder's render alone: beside the CVS that
    # draws anew, it is the nearer one.
    photo = photos.read(picture)
    cameras = sampling.view_cameras(15.0, 128, 4)
    render = decoder.predictor(decoder.load_shipped("pixel"))
    own = render(photo.inputs, cameras).rgb
    off = {}
    for model in cvs.SHIPPED:
        predict = cvs.predictor(cvs.load_shipped(model=model), renderer=render)
        off[model] = float((predict(photo.inputs, cameras).rgb - own).abs().mean())
    assert off["cvs-twin"] < 0.5 * off["cvs"], off
