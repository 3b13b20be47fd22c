"""One picture in, views and Gaussians out: the `views` command and what it assumes."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from test_photos import COLOUR, disc, save

from fresnel import views as sampling
from fresnel.cli import main
from fresnel.data import photos
from fresnel.models import cvs, decoder
from fresnel.render import render
from fresnel.report.record import RunRecord
from fresnel.scene.gaussians import Gaussians
from fresnel.study import results


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    cvs.CVS(cvs.CVSConfig.preset("tiny")).save(path, half=True)
    return path


@pytest.fixture
def picture(tmp_path):
    return save(tmp_path / "toy.png", disc(), None)


@pytest.fixture(autouse=True)
def quick(request, monkeypatch):
    """What takes seconds, and one test looks at, is left to that."""
    if "all_of_it" not in request.fixturenames:
        flat = np.zeros((4, 4, 3), np.uint8)
        monkeypatch.setattr(sampling.scenes, "turntable", lambda shown: [flat, flat + 9])
        monkeypatch.setattr(sampling.scenes, "page", lambda shown, title: f"{title}: a page")


@pytest.fixture
def all_of_it():
    pass


def test_views_writes_pictures_gaussians_and_what_it_assumed(
    picture, tmp_path, weights, capsys, all_of_it
):
    out = tmp_path / "out"
    status = main([
        "views", str(picture), "--out", str(out), "--weights", str(weights), "--views", "4",
        "--ply", str(out / "toy.ply"), "--spz", str(out / "toy.spz"), "--elevation", "20",
        "--size", "64",
    ])  # fmt: skip
    printed = capsys.readouterr().out
    assert status == 0, printed
    assert "alpha channel" in printed and "20 degrees" in printed
    for azimuth in (0, 90, 180, 270):
        for name, size in (("azimuth", 64), ("cvs_azimuth", 16)):
            with Image.open(out / f"{name}_{azimuth:03d}.png") as image:
                assert image.mode == "RGBA" and image.size == (size, size)
    facts = json.loads((out / "views.json").read_text())
    assert facts["background"] == "alpha" and facts["elevation_deg"] == 20
    assert list(facts["files"]) == ["0", "90", "180", "270"]
    scene = Gaussians.load(out / "toy.ply")
    assert scene.num == facts["gaussians"]["count"] > 500
    upright = Gaussians.load(out / "toy.spz")
    assert upright.num == scene.num
    turned = upright.means * torch.tensor([1.0, -1.0, -1.0])  # y down in a PLY, up in an SPZ
    assert torch.allclose(scene.means, turned, atol=1e-3) and upright.means[:, 1].std() > 0.01
    with Image.open(out / "turntable.webp") as turning:
        assert turning.n_frames == 36 and turning.size == (384, 384)
    viewer = (out / "viewer.html").read_text()
    assert "toy.png in 3D" in viewer and "http://" not in viewer.split("__VISER_EMBED_DATA__")[1]
    # Whatever opens them sees a solid object at three times the decoder's pixels, and no dots.
    drawn = render(upright, sampling.view_cameras(20.0, 384, 1)[0]).alpha[0, ..., 0]
    y, x = np.mgrid[:384, :384] - 191.5
    assert drawn[np.hypot(y, x) < 90].min() > 0.99  # 0.96 with dots
    # The disc fills 0.86 of the frame of the Gaussians' views, and has no smoke about it.
    alpha = np.asarray(Image.open(out / "azimuth_000.png"))[..., 3]
    rows = (alpha > 127).any(axis=1).nonzero()[0]
    assert 50 <= rows[-1] - rows[0] + 1 <= 60 and (alpha == 0).mean() > 0.25
    # The Gaussians are the object's: about one unit long, around the origin, of its colour.
    dense = scene.select(scene.opacities > 0.5)
    assert float(dense.means.norm(dim=-1).max()) < 1.0
    assert torch.allclose(dense.colors.mean(0) * 255, torch.tensor(COLOUR).float(), atol=40)


def test_views_by_weights_that_see_the_decoders_render(picture, tmp_path, monkeypatch):
    config = cvs.CVSConfig.preset("tiny", render_condition=True, render_twin=True)
    network = cvs.CVS(config)
    network.gate_overridden = True
    path = network.save(tmp_path / "refine.safetensors", half=True)
    draw, rows = sampling.pictures.contact_sheet, []
    spy = lambda *a, **k: (rows.extend(k["labels"]), draw(*a, **k))[1]  # noqa: E731
    monkeypatch.setattr(sampling.pictures, "contact_sheet", spy)
    facts = sampling.write_views(picture, tmp_path / "out", weights=path, count=2)
    stamped = [*rows, (tmp_path / "out/viewer.html").read_text().partition(": a page")[0]]
    assert all(said.endswith("; the gate was overridden") for said in stamped) and len(rows) == 2
    assert "gate overridden" in " ".join(sampling.sentences(facts))
    made = np.asarray(Image.open(tmp_path / "out" / facts["cvs_files"]["0"]).convert("RGB"), float)
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
    assert sampling._trained(path, "cpu")[1].checksum() == other.checksum()
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
    assert seen[0].inputs.rgb.shape[1] == 160 == facts["cvs_image_size"]


def test_nothing_but_a_picture_is_needed(picture, weights, capsys, monkeypatch):
    monkeypatch.chdir(picture.parent)
    assert main(["views", "toy.png", "--weights", str(weights), "--views", "2"]) == 0
    printed = capsys.readouterr().out
    out = picture.parent / "toy-views"
    for name in ("contact_sheet.png", "turntable.webp", "viewer.html", "object.ply", "object.spz"):
        assert (out / name).is_file() and f"toy-views/{name}" in printed
    # untrained weights have no figures: the Gaussians are first, and it is said
    assert "shown first: the Gaussians" in printed and "not in their file" in printed


@pytest.mark.parametrize("better", ["cvs", "decoder"])
def test_what_is_perceptually_nearer_to_the_truth_stands_first(
    picture, tmp_path, monkeypatch, better
):
    """As 03 measured it, and exported it with the weights."""
    off = {"cvs": 9.0, "decoder": 9.0, better: 7.0}
    rows = {"cvs-warp": off["cvs"], "decoder render": off["decoder"], "copy": 1.0}
    record = RunRecord("03_full_train", "running", params={"model": "cvs-warp"})
    record.metrics["summaries"] = {n: [{}, {"perceptual": x}] for n, x in rows.items()}
    record.provenance["datasets"] = []
    network = cvs.CVS(cvs.CVSConfig.preset("tiny"))
    path = results.export(network, tmp_path / "known.safetensors", record)
    sheet, rows = sampling.pictures.contact_sheet, list[list[str]]()
    spy = lambda given, **more: rows.append(more["labels"]) or sheet(given, **more)  # noqa: E731
    monkeypatch.setattr(sampling.pictures, "contact_sheet", spy)
    facts = sampling.write_views(picture, tmp_path / "out", weights=path, count=1, size=32)
    assert facts["first"] == {"cvs": "cvs", "decoder": "gaussians"}[better]
    assert "is 7.0, that of the" in facts["because"] and "9.0" in facts["because"]
    assert [label[:3] for label in rows[0]] == (
        ["CVS", "the"] if better == "cvs" else ["the", "CVS"]
    )


def test_what_ships_has_its_figures():
    known = sampling.held_out(cvs.load_shipped(model="cvs-warp"))
    assert known.keys() == {"cvs", "decoder"} and min(known.values()) > 0


def test_a_picture_of_one_camera_is_shown_as_another_frame_sees_it():
    """The frame shows the left upper quarter, and then twice as much as there is."""
    camera = sampling.view_cameras(0.0, 100, 1)[0, 0]
    rgba = np.zeros((100, 100, 4), np.uint8)
    rgba[:50, :50] = (200, 0, 0, 255)
    for scale, shift, red in ((2.0, 50.0, 1.0), (0.5, 0.0, 1 / 16)):
        Ks = camera.Ks.clone()
        Ks[0, 0] *= scale
        Ks[1, 1] *= scale
        Ks[:2, 2] += shift
        shown = sampling._framed(rgba, camera, type(camera)(camera.viewmats, Ks, 100, 100))
        assert ((shown[..., 0] > 150) & (shown[..., 1] < 60)).mean() == pytest.approx(red, abs=0.02)


def test_what_an_earlier_call_left_goes_and_nothing_else(picture, tmp_path, weights):
    out = tmp_path / "out"
    sampling.write_views(picture, out, weights=weights, count=4)
    for name in ("azimuth_045.png", "notes.txt"):
        (out / name).write_bytes(b"mine")
    facts = json.loads((out / "views.json").read_text())
    facts["files"]["7"] = "../toy.png"  # what views never makes is not removed
    facts["beside"] += ["notes.txt", "../toy.png"]
    (out / "views.json").write_text(json.dumps(facts))
    sampling.write_views(picture, out, weights=weights, count=3)
    assert {path.name for path in out.iterdir()} == {
        *(f"{who}azimuth_{at}.png" for who in ("", "cvs_") for at in ("000", "120", "240")),
        *("object.ply", "object.spz", "turntable.webp", "viewer.html", "azimuth_045.png"),
        *("input.png", "contact_sheet.png", "views.json", "notes.txt"),
    }
    assert picture.exists() and (out / "azimuth_045.png").read_bytes() == b"mine"
    before = (out / "azimuth_120.png").read_bytes()
    with pytest.raises(ValueError, match=r"azimuth_045\.png: is not of an earlier call"):
        sampling.write_views(picture, out, weights=weights, count=8)
    with pytest.raises(ValueError, match=r"input\.png: is not of an earlier call"):
        sampling.write_views(out / "input.png", out, weights=weights, count=3)
    assert (out / "azimuth_120.png").read_bytes() == before
    (tmp_path / "input.png").write_bytes(b"mine")
    with pytest.raises(ValueError, match=r"input\.png: is not of an earlier call"):
        sampling.write_views(picture, tmp_path, weights=weights, count=2)
    assert (tmp_path / "input.png").read_bytes() == b"mine"


def small_decoder(folder, **facts):
    options = {"image_size": 32, "base_channels": 8, "channel_multipliers": (1, 2), "patch": 2}
    made = decoder.Decoder(decoder.DecoderConfig(attention_levels=(), **options))
    made.provenance = facts
    made.save(folder / "decoder.safetensors", half=False)
    return folder / "decoder.safetensors"


def test_heads_have_a_decoder_of_their_own_or_it_is_said(picture, tmp_path, monkeypatch, capsys):
    shipped = sampling.decoder.weights.shipped

    def ships(name, model=""):
        asked.append(name)
        return own.get(name) or shipped(name if "faces" not in name else "gone", model)

    own, asked = {}, []
    monkeypatch.setattr(sampling.decoder.weights, "shipped", ships)
    arguments = ["views", str(picture), "--views", "2", "--domain", "faces", "--out"]
    assert main([*arguments, str(tmp_path / "a")]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert any("never seen a head" in line for line in printed) and "careful: " in printed[-1]
    facts = json.loads((tmp_path / "a" / "views.json").read_text())
    assert facts["domain"] == "faces" and facts["careful"][-1] == printed[-1][9:]
    assert facts["elevation_deg"] == 5
    own["decoder_faces.safetensors"] = small_decoder(tmp_path)
    asked.clear()
    assert main([*arguments, str(tmp_path / "b")]) == 0
    assert "cvs_warp.safetensors" not in asked, "nothing of objects draws a head"
    assert "never seen a head" not in capsys.readouterr().out
    facts = json.loads((tmp_path / "b" / "views.json").read_text())
    assert facts["gaussians"]["count"] <= 2 * 32 * 32, "its own"
    high = [Image.open(tmp_path / n / "contact_sheet.png").height for n in "ab"]
    assert high[0] > high[1] + 128, "no CVS of heads: the decoder's row alone, and no note"
    # a CVS of heads adds to the renders of the decoder that it learned from, and of no other
    twin = cvs.CVS(cvs.CVSConfig.preset("tiny", render_condition=True, render_twin=True))
    for learned in ("", decoder.load_shipped("faces").checksum()):
        twin.decoder = learned
        own["cvs_warp_faces.safetensors"] = twin.save(tmp_path / "twin.safetensors")
        assert (sampling._shipped("faces", "cpu")[0] is not None) == bool(learned)
    del own["cvs_warp_faces.safetensors"]
    # one decoder for both, as its file says
    del own["decoder_faces.safetensors"]
    own["decoder_pixel.safetensors"] = small_decoder(tmp_path, domains=["objects", "faces"])
    assert decoder.load_shipped("faces").provenance["domains"] == ["objects", "faces"]


def test_what_does_not_even_look_like_its_input_is_said(picture, tmp_path, weights, monkeypatch):
    near = sampling.distances.Nearness(0.9, 40.0, "It lies 0.9 from them.")
    monkeypatch.setattr(sampling.distances, "distance", lambda inputs, name: [near])
    facts = sampling.write_views(picture, tmp_path / "a", weights=weights, count=2)
    assert (
        not facts["careful"]
        and facts["checks"]["distance"] == 0.9
        and facts["checks"]["identity_psnr"] > 13
    )
    assert facts["checks"]["identity_iou"] > 0.9
    draw = decoder.render_small

    def elsewhere(*arguments, **options):
        views = draw(*arguments, **options)
        return type(views)(
            *(value.roll(40, dims=-2) for value in (views.rgb, views.alpha, views.depth))
        )

    monkeypatch.setattr(decoder, "render_small", elsewhere)
    facts = sampling.write_views(picture, tmp_path / "b", weights=weights, count=2)
    assert "from the input's own camera it does not look like the input" in facts["careful"][0]
    assert facts["checks"]["identity_iou"] < 0.6
    plain, noted = (np.asarray(Image.open(tmp_path / n / "contact_sheet.png")) for n in "ab")
    extra = len(noted) - len(plain)
    assert extra > 18 and (noted[extra + 5 : extra + 15] == plain[5:15]).all()
    assert ((noted[:extra, :, 0] > 150) & (noted[:extra, :, 1] < 100)).any(), "in red"


@pytest.mark.parametrize("domain", ["objects", "faces"])
def test_what_the_decoder_has_never_seen_is_said(picture, tmp_path, weights, monkeypatch, domain):
    """Of the domain that the decoder learned, which is not always the picture's."""
    asked, far = [], sampling.distances.Nearness(3.1, 100.0, "It lies 3.1 away: never seen.")
    spy = lambda inputs, name: asked.append((len(inputs), name)) or [far]  # noqa: E731
    monkeypatch.setattr(sampling.distances, "distance", spy)
    load = decoder.load_shipped

    def ships(kind, device):
        if kind == "faces":
            raise FileNotFoundError("decoder_faces is missing")
        return load(kind, device)

    monkeypatch.setattr(decoder, "load_shipped", ships)
    facts = sampling.write_views(picture, tmp_path / "o", count=1, domain=domain)
    assert facts["careful"][-1] == "it lies 3.1 away: never seen" and asked == [(1, "objects")]
    assert facts["checks"]["distance_percentile"] == 100
    assert ("decoder_faces is missing" in facts["careful"][0]) == (domain == "faces")
    rare = sampling.distances.Nearness(1.4, 96.6, "It lies 1.4 away: like the training.")
    monkeypatch.setattr(sampling.distances, "distance", lambda *_: [rare])
    facts = sampling.write_views(picture, tmp_path / "o", weights=weights, count=1)
    assert "3 % are as unlike the others" in facts["careful"][0]
    unmeasured = sampling.distances.Nearness(float("nan"), float("nan"), "Not measured: pip.")
    monkeypatch.setattr(sampling.distances, "distance", lambda *_: [unmeasured])
    facts = sampling.write_views(picture, tmp_path / "o", weights=weights, count=1)
    assert facts["careful"] == ["not measured: pip"] and "distance" not in facts["checks"]
    assert "NaN" not in (tmp_path / "o" / "views.json").read_text()


@pytest.mark.parametrize(
    ("head", "far", "background", "domain"),
    [
        (3.1, True, "alpha", "objects"), (2.5, True, "alpha", "faces"),
        (3.1, False, "alpha", "faces"), (3.1, True, "cut-out", "faces"),
    ],
)  # fmt: skip
def test_a_thing_with_a_face_is_a_thing(picture, monkeypatch, head, far, background, domain):
    """A teddy bear: far from all heads, and half as far from the objects."""
    read, nearness = photos.read, sampling.distances.Nearness
    near = {"faces": nearness(head, 99.5 if far else 90.0, ""), "objects": nearness(1.3, 94.0, "")}
    seen = lambda *given, **asked: replace(read(*given, **asked), background=background)  # noqa: E731
    monkeypatch.setattr(photos, "find_face", lambda rgb: (48.0, 48.0, 40.0))
    monkeypatch.setattr(photos, "read", seen)
    monkeypatch.setattr(sampling.distances, "distance", lambda inputs, name: [near[name]])
    photo = sampling._photo(picture, domain="auto")
    assert photo.domain == domain and ("--domain faces" in photo.assumed[0]) == (domain != "faces")
    assert sampling._photo(picture, domain="faces").domain == "faces", "as it was told"


def test_every_view_has_a_file_of_its_own(picture, tmp_path, weights, monkeypatch):
    sheet = np.zeros((4, 4, 3), "u1")
    monkeypatch.setattr(sampling.pictures, "contact_sheet", lambda *_, **__: sheet)
    facts = sampling.write_views(picture, tmp_path / "out", weights=weights, count=400, size=16)
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
        (["--size", "8"], "size: got 8"),
        (["--device", "cuda"], "torch sees no GPU; use 'auto' or 'cpu'"),
        (["--out", "toy.png"], "want a folder"),
    ],
)
def test_wrong_use_is_one_clear_line(picture, weights, capsys, monkeypatch, change, message):
    monkeypatch.chdir(picture.parent)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["views", "toy.png", "--out", "o", "--weights", str(weights), *change]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_what_ships_draws_the_object_and_stays_near_the_decoder(picture, tmp_path):
    facts = sampling.write_views(picture, tmp_path / "out")
    assert facts["weights"] == "shipped" and facts["cvs_image_size"] == 128
    with Image.open(tmp_path / "out" / facts["cvs_files"]["0"]) as image:
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
    assert off["cvs-warp"] < off["cvs"], off
