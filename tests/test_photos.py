"""One picture of one thing: read, cut out of its background, framed, and what is said of it."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data

from fresnel.data import faces, images, photos
from fresnel.data.images import DatasetError

COLOUR = np.array([180, 60, 40])


def disc(height=300, width=400, radius=70.0):
    """Alpha in [0, 1] of a disc a little off the centre, anti-aliased."""
    y, x = np.mgrid[:height, :width] + 0.5
    distance = np.hypot(y - height / 2, x - width / 2 - 20)
    return np.clip(radius - distance + 0.5, 0, 1)


def save(path, alpha, background):
    colour = np.broadcast_to(COLOUR, (*alpha.shape, 3)).astype(float)
    if background is None:
        picture = np.dstack([colour, alpha * 255])
    else:
        picture = alpha[..., None] * colour + (1 - alpha[..., None]) * np.array(background)
    Image.fromarray((picture + 0.5).astype(np.uint8)).save(path)
    return path


def test_alpha_and_a_plain_background_give_the_same_input(tmp_path):
    alpha = disc()
    given = photos.read(save(tmp_path / "a.png", alpha, None))
    for background in ((255, 255, 255), (200, 210, 190)):
        cut = photos.read(save(tmp_path / "b.png", alpha, background))
        assert cut.background == "plain" and "one colour" in cut.assumed[0]
        assert (cut.inputs.rgb.float() - given.inputs.rgb.float()).abs().mean() < 1.0
        difference = (cut.inputs.alpha.float() - given.inputs.alpha.float()).abs()
        assert difference.mean() < 1.0 and difference.max() < 70
    covered = (given.inputs.alpha[0] > 127).nonzero()
    extent = (covered.max(0).values - covered.min(0).values + 1) / 128
    assert extent.tolist() == pytest.approx([0.6, 0.6], abs=0.03), "framed as the training was"


def test_the_cut_keeps_what_is_inside_and_the_side_the_object_stands_on():
    alpha = disc(radius=60.0)
    alpha[150:, 200:240] = 1.0  # a leg that leaves the picture
    alpha[20:23, 30:120] = 1.0  # a twig, thinner than two seams
    label = disc(radius=20.0) > 0.5  # as white as the background, inside the object
    picture = alpha[..., None] * COLOUR + (1 - alpha[..., None]) * 255
    picture[label] = 255
    found = photos.cut_plain(picture.astype(np.uint8))
    assert found is not None
    matte = found[..., 3]
    assert (found[label] == 255).all()
    assert (matte[20:23, 30:120] == 255).all()
    assert np.abs(matte / 255.0 - alpha).mean() < 0.01
    assert (matte[-1, 205:235] == 255).all()


def rembg(monkeypatch, matte=None, problem=None):
    """Stands in for the extra: a network that gives `matte`, weights that can't be had, nothing."""

    def remove(rgb, *, session, decontaminate):
        assert session == "isnet-general-use" and decontaminate
        return np.dstack([rgb, (matte * 255).astype(np.uint8)])

    def new_session(model):
        if problem:
            raise problem
        return model

    made = None if matte is None and problem is None else SimpleNamespace()
    if made:
        made.remove, made.new_session = remove, new_session
    photos._salient.cache_clear()
    monkeypatch.setitem(sys.modules, "rembg", made)


@pytest.fixture(autouse=True)
def without_the_extras(monkeypatch):
    rembg(monkeypatch)
    monkeypatch.setattr(faces, "missing", lambda: "pip install it")
    yield
    photos._salient.cache_clear()


def noise(*shape):
    return np.random.default_rng(0).integers(0, 255, shape, dtype=np.uint8)


@pytest.fixture
def scene(tmp_path):
    """A disc before a wild background."""
    alpha = disc()[..., None]
    shown = alpha * COLOUR + (1 - alpha) * noise(300, 400, 3)
    Image.fromarray(shown.astype(np.uint8)).save(tmp_path / "scene.png")
    return tmp_path / "scene.png"


def test_a_photograph_is_cut_out_and_framed(scene, monkeypatch):
    rembg(monkeypatch, disc())
    photo = photos.read(scene)
    given = photos.read(save(scene.with_name("a.png"), disc(), None))
    assert photo.background == "cut-out" and "rembg" in photo.assumed[0]
    assert not photo.careful
    for mine, theirs in (
        (photo.inputs.rgb, given.inputs.rgb),
        (photo.inputs.alpha, given.inputs.alpha),
    ):
        assert (mine.float() - theirs.float()).abs().mean() < 1.5


def test_without_the_cut_out_it_is_said_what_is_needed_and_assumed(scene, monkeypatch):
    photo = photos.read(scene)
    assert photo.background == "photograph" and (photo.inputs.alpha == 255).all()
    assert "pip install -e '.[cutout]'" in photo.careful[0] and "178 MB" in photo.careful[0]
    assert "central square" in photo.assumed[0]
    rembg(monkeypatch, problem=OSError("no route to the weights\nand more"))
    photo = photos.read(scene)
    assert (
        photo.background == "photograph" and "OSError: no route to the weights)" in photo.careful[0]
    )
    assert "isnet-general-use.onnx" in photo.careful[0]
    monkeypatch.setitem(sys.modules, "onnxruntime", None)


def test_alpha_and_plain_backgrounds_never_wait_for_a_network(tmp_path, monkeypatch):
    rembg(monkeypatch, problem=AssertionError("called"))
    for background, kind in ((None, "alpha"), ((255, 255, 255), "plain")):
        assert photos.read(save(tmp_path / "a.png", disc(), background)).background == kind


def test_a_bad_cut_out_is_refused_or_said(scene, monkeypatch):
    y, x = np.mgrid[:300, :400]
    cases = {
        "nothing in it stands out": np.zeros((300, 400)),
        "nothing in the picture could be told from": np.ones((300, 400)),
        "2 things stand out of the picture: the largest is taken": disc() + (x < 50),
        "the outline is unsure: 100%": disc() * 0.7,
        "ends before the object does (bottom, left)": 1.0 * ((y > 150) & (x < 200)),
    }
    for said, matte in cases.items():
        rembg(monkeypatch, matte)
        if matte.max() == 0:
            with pytest.raises(DatasetError, match=f"scene.png: {said}"):
                photos.read(scene)
            continue
        photo = photos.read(scene)
        assert said in photo.careful[0] and len(photo.careful) == 1, said
        assert (photo.background == "photograph") == (matte.min() == 1)
        if "2 things" in said:
            covered = (photo.inputs.alpha[0] > 127).nonzero()
            extent = (covered.max(0).values - covered.min(0).values + 1) / 128
            assert extent.tolist() == pytest.approx([0.6, 0.6], abs=0.03), "the disc alone"
    # specks are dropped without a word
    rembg(monkeypatch, disc() + ((x < 9) & (y < 9)))
    photo = photos.read(scene)
    assert not photo.careful
    assert photo.inputs.alpha[0, :10, :10].max() == 0


def test_what_shows_nothing_is_refused_in_a_sentence(tmp_path):
    path = tmp_path / "a.png"
    dot = np.zeros((200, 200, 4), np.uint8)
    dot[100:104, 100:104] = 255
    for shown, message in (
        (np.full((1, 1, 3), 9, np.uint8), "less than 8 pixels long"),
        (np.full((500, 500, 3), 200, np.uint8), "one colour all over"),
        (np.zeros((64, 64, 3), np.uint8), "one colour all over"),
        (np.zeros((64, 64, 4), np.uint8), "transparent everywhere"),
        (dot, "its object is less than 8 pixels long"),
    ):
        Image.fromarray(shown).save(path)
        with pytest.raises(DatasetError, match=f"a.png: {message}"):
            photos.read(path)
    with pytest.raises(DatasetError, match="no such file"):
        photos.read(tmp_path / "gone.jpg")
    with pytest.raises(ValueError, match="elevation_deg: got 95"):
        photos.read(path, elevation_deg=95)


def test_large_pictures_shrink_without_becoming_transparent(tmp_path, monkeypatch):
    shapes, cut, path = [], photos.cut_plain, tmp_path / "a.png"
    monkeypatch.setattr(photos, "cut_plain", lambda rgb: shapes.append(rgb.shape) or cut(rgb))
    for height, width in ((60, 90), (1999, 3001)):
        Image.fromarray(noise(height, width, 3)).save(path, compress_level=0)
        photo = photos.read(path)
        assert photo.background == "photograph" and (photo.inputs.alpha == 255).all()
    assert shapes == [(60, 90, 3), (400, 601, 3)]


def test_every_kind_of_file_gives_the_same_input(tmp_path):
    """Held as cameras, scanners and painting programs write it: CMYK, palette, 16 bits, turned."""
    plain = save(tmp_path / "a.png", disc(), (255, 255, 255))
    shown, want = Image.open(plain).convert("RGB"), photos.read(plain).inputs
    exif = Image.Exif()
    exif[0x0112] = 6
    grey = np.asarray(shown.convert("L"))
    kinds = {
        "cmyk.jpg": (shown.convert("CMYK"), {"quality": 95}),
        "palette.png": (shown.quantize(64), {}),
        "palette.gif": (shown.quantize(64), {}),
        "turned.jpg": (shown.transpose(Image.Transpose.ROTATE_90), {"exif": exif, "quality": 95}),
        "a.webp": (shown, {"lossless": True}),
        "a.avif": (shown, {"quality": 90}),
        "a.tif": (shown, {}),
        "16 bits.png": (Image.fromarray(grey.astype(np.uint16) * 257), {}),
        "bilevel.bmp": (Image.fromarray(grey > 127), {}),
    }
    for name, (image, options) in kinds.items():
        image.save(tmp_path / name, **options)
        photo = photos.read(tmp_path / name)
        assert photo.background == "plain", name
        assert (photo.inputs.alpha.float() - want.alpha.float()).abs().mean() < 2, name
        if image.mode in ("RGB", "P", "CMYK"):
            assert (photo.inputs.rgb.float() - want.rgb.float()).abs().mean() < 3, name


def test_heic_is_read_by_its_plug_in_or_named(tmp_path, monkeypatch):
    path = tmp_path / "a.heic"
    path.write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(99))
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(DatasetError, match=r"a\.heic: a HEIC picture; pip install -e '\.\[heic\]'"):
        photos.read(path)
    called = []
    plug_in = SimpleNamespace(register_heif_opener=lambda: called.append(1))
    monkeypatch.setitem(sys.modules, "pillow_heif", plug_in)
    with pytest.raises(DatasetError, match=r"truncated or damaged|not a readable image"):
        photos.read(path)
    assert called
    shown = Image.fromarray(np.full((9, 9, 3), 200, np.uint8))
    shown.save(tmp_path / "a.avif")  # in the same frame, and Pillow's own
    assert images.load_image(tmp_path / "a.avif")[0].shape == (9, 9, 3)


def test_a_folder_of_pictures_becomes_inputs_and_says_what_was_assumed(tmp_path, scene):
    save(tmp_path / "a.png", disc(), None)
    save(tmp_path / "b.jpg", disc(), (255, 255, 255))
    inputs, said = photos.read_folder(tmp_path, 32, elevation_deg=20.0)
    assert inputs.names == ("a", "b", "scene") and inputs.elevation_is_assumed
    assert inputs.rgb.shape == (3, 32, 32, 3) and inputs.cameras.batch_shape == (3,)
    assert torch.allclose(inputs.cameras.elevation_deg((0, 0, 0)), torch.tensor(20.0))
    for text in ("1 x the picture's alpha", "1 x the picture's border", "1 x everything", "cutout"):
        assert text in said
    heads, said = photos.read_folder(tmp_path, 32, domain="faces")
    assert torch.allclose(heads.cameras.elevation_deg((0, 0, 0)), torch.tensor(5.0))
    assert heads.alpha[0].sum() > 1.3 * inputs.alpha[0].sum(), "a head fills more of its frame"
    few, _ = photos.read_folder(tmp_path, 32, most=2)
    assert few.names == ("a", "b")
    save(tmp_path / "b.png", disc(), None)
    assert photos.read_folder(tmp_path, 32)[0].names == ("a.png", "b.jpg", "b.png", "scene.png")


def test_a_face_is_found_where_one_is():
    """A person in a space suit; a cat, a motorcycle, a cup, grass, and a page are none."""
    x, y, side = photos.find_face(data.astronaut())
    assert abs(x - 225) < 15 and abs(y - 115) < 20 and 80 < side < 130
    for other in (data.chelsea(), data.coffee(), data.grass(), data.page(), data.rocket()):
        rgb = other if other.ndim == 3 else np.dstack([other] * 3)
        assert photos.find_face(rgb) is None


def test_the_better_detector_is_asked_where_there_is_one(monkeypatch):
    boxes = [(0.0, 0.0, 10.0, 10.0, 0.9), (10.0, 30.0, 50.0, 70.0, 0.8)]
    monkeypatch.setattr(faces, "missing", lambda: "")
    monkeypatch.setattr(faces, "find", lambda rgb: boxes)
    assert photos.find_face(noise(200, 240, 3)) == pytest.approx((30, 47.6, 40)), "the largest"
    assert photos.find_face(noise(200, 260, 3)) is None, "too small for a portrait"
    boxes.clear()
    assert photos.find_face(data.astronaut()) is None


def astronaut(tmp_path, monkeypatch, factor=1):
    """Her head, neck and shoulders as a network cuts them out; her picture `factor` times larger,
    to the left of nothing of interest."""
    shown = np.pad(data.astronaut(), ((0, 0), (0, 60), (0, 0)), mode="edge")
    shown = shown.repeat(factor, 0).repeat(factor, 1)
    Image.fromarray(shown).save(tmp_path / "a.png", compress_level=1)
    rembg(monkeypatch, np.zeros((1, 1)))

    def remove(rgb, **_):
        y, x = np.mgrid[: rgb.shape[0], : rgb.shape[1]] / len(rgb)
        around = np.hypot((x - 0.5) / 0.26, (y - 0.42) / 0.32) < 1
        return np.dstack([rgb, 255 * (around | (y > 0.7)).astype(np.uint8)])

    sys.modules["rembg"].remove = remove
    return tmp_path / "a.png"


@pytest.mark.parametrize("factor", [1, 3])
def test_a_portrait_is_framed_as_the_heads_of_the_training_are(tmp_path, monkeypatch, factor):
    path = astronaut(tmp_path, monkeypatch, factor)
    photo = photos.read(path, domain="auto")
    assert photo.domain == "faces" and photo.elevation_deg == 5 and photo.background == "cut-out"
    assert "a face was found" in photo.assumed[0] and not photo.careful
    _, y, side = photos.find_face(photo.inputs.rgb[0].numpy())
    assert 0.42 < side / 128 < 0.62 and (y + side / 2) / 128 == pytest.approx(0.875, abs=0.05)
    covered = photo.inputs.alpha[0].numpy() > 127
    rows, columns = covered.any(1).nonzero()[0], covered[:70].any(0).nonzero()[0]
    assert 0.08 < rows[0] / 128 < 0.25 and 0.9 < (rows[-1] + 1) / 128 < 0.98
    assert (columns[0] + columns[-1]) / 256 == pytest.approx(0.5, abs=0.04), "the head's middle"
    assert not covered[122:].any() and covered[115].sum() < 64, "shoulders are cut"
    alpha = photo.inputs.alpha[0, 110:126, 64].int()
    assert (alpha[1:] <= alpha[:-1]).all() and ((alpha > 20) & (alpha < 235)).sum() >= 2, "softly"


def test_what_a_picture_shows_can_be_said(tmp_path, monkeypatch):
    path = astronaut(tmp_path, monkeypatch)
    photo = photos.read(path, domain="objects")
    assert photo.domain == "objects" and photo.elevation_deg == 15
    monkeypatch.setattr(photos, "find_face", lambda rgb: None)
    assert photos.read(path, domain="auto").domain == "objects"
    bust = save(tmp_path / "b.png", disc(), None)
    photo = photos.read(bust, domain="faces", elevation_deg=-3)
    assert photo.domain == "faces" and photo.elevation_deg == -3
    assert "no face was found" in photo.assumed[0]
    covered = (photo.inputs.alpha[0] > 127).any(1).nonzero()
    assert len(covered) / 128 == pytest.approx(0.785, abs=0.03), "from crown to neck"
    with pytest.raises(ValueError, match="domain: got 'heads', want 'auto', 'objects' or 'faces'"):
        photos.read(bust, domain="heads")


def test_the_network_itself_cuts_out_a_disc(tmp_path, scene):
    """Where the extra is installed and its weights lie on disk."""
    sys.modules.pop("rembg")
    sessions = pytest.importorskip("rembg.sessions", reason="the extra cutout is not installed")
    if not sessions.sessions[photos._MODEL].resolve_existing(f"{photos._MODEL}.onnx"):
        pytest.skip("rembg's weights are not on this machine")
    alpha = disc()
    Image.fromarray(np.dstack([noise(300, 400, 3)[..., :1] // 4 + 90] * 3)).save(scene)
    shown = alpha[..., None] * COLOUR + (1 - alpha[..., None]) * np.asarray(Image.open(scene))
    Image.fromarray(shown.astype(np.uint8)).save(scene)
    photo = photos.read(scene)
    assert photo.background == "cut-out"
    want = photos.read(save(tmp_path / "a.png", alpha, None)).inputs
    assert (photo.inputs.alpha.float() - want.alpha.float()).abs().mean() < 8
