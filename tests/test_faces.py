"""The face detector on a photograph, and what is said without it."""

import math
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from boxes import Memory, views_of

from fresnel import gate
from fresnel.data import faces
from fresnel.data.dataset import ObjectViews
from fresnel.gate.measure import measure

installed = pytest.mark.skipif(bool(faces.missing()), reason=f"needs {faces.NEEDS}")


@installed
def test_a_face_is_found_where_it_is() -> None:
    import skimage.data

    photo = skimage.data.astronaut()
    ((left, top, right, bottom, score),) = faces.find(photo)
    assert 170 < left < 200 < 250 < right < 290 and 70 < top < 100 < 160 < bottom < 190
    assert score > faces.MIN_SCORE
    wide = np.pad(photo[:300], ((0, 0), (100, 0), (0, 0)))  # not square: boxes stay in its pixels
    ((shifted, *_),) = faces.find(wide)
    assert abs(shifted - left - 100) < 12
    assert not faces.find(skimage.data.coffee()) and not faces.find(skimage.data.rocket())
    squares = [photo[:256, 96:352], photo[256:, 256:], skimage.data.coffee()[:256, :256]]
    pictures = torch.stack([torch.from_numpy(x.copy()).float() / 255 for x in squares])
    assert faces.present(pictures).tolist() == [True, False, False]
    assert faces.present(torch.zeros(0, 64, 64, 3)).shape == (0,)


def test_without_the_detector_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faces, "find_spec", lambda name: None)
    faces._detector.cache_clear()
    assert "ai-edge-litert" in faces.missing()
    with pytest.raises(ModuleNotFoundError, match="mediapipe"):
        faces.find(np.zeros((8, 8, 3), np.uint8))
    for bad in (np.zeros((8, 8), np.uint8), np.zeros((8, 8, 3))):
        with pytest.raises(ValueError, match="want uint8"):
            faces.find(bad)


def test_what_a_library_says_past_python_is_not_heard(capfd: pytest.CaptureFixture[str]) -> None:
    os.write(2, b"before ")
    with faces._unheard():
        os.write(2, b"INFO: Created delegate")
    with pytest.raises(KeyError), faces._unheard():
        raise KeyError
    os.write(2, b"after")
    assert capfd.readouterr().err == "before after"


def test_data_say_whether_they_are_of_heads() -> None:
    assert faces.expected({"source": "heads"})
    assert faces.expected({"object_classes": {"a": "head", "b": "head", "c": "chair"}})
    assert not faces.expected({"object_classes": {"a": "chair", "b": "head"}})
    assert not faces.expected({})


GREEN = (1, 254, 1)


def with_faces(views: ObjectViews, up_to_deg: float, from_deg: float = 0.0) -> ObjectViews:
    """A pixel that a pretended detector takes for a face, in the input and such views."""
    rgb, alpha = views.rgb.clone(), views.alpha.clone()
    first, first_alpha = views.input_rgb.clone(), views.input_alpha.clone()
    middle = rgb.shape[1] // 2
    first[middle, middle], first_alpha[middle, middle] = torch.tensor(GREEN, dtype=torch.uint8), 255
    for i, azimuth in enumerate(measure(views)[0]):
        if from_deg <= abs(azimuth["azimuth_deg"]) <= up_to_deg:
            rgb[i, middle, middle], alpha[i, middle, middle] = first[middle, middle], 255
    return replace(views, rgb=rgb, alpha=alpha, input_rgb=first, input_alpha=first_alpha)


def test_the_gate_refuses_views_without_the_faces_that_their_inputs_show(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(faces, "missing", lambda: "")
    monkeypatch.setattr(
        faces, "find", lambda rgb: [(0, 0, 1, 1, 0.9)] if (rgb == GREEN).all(-1).any() else []
    )

    def heads(up_to_deg: float, from_deg: float = 0.0) -> list[ObjectViews]:
        return [with_faces(views_of(i), up_to_deg, from_deg) for i in range(6)]

    def judged(up_to_deg: float, from_deg: float = 0.0) -> gate.Verdict:
        return gate.validate(Memory(heads(up_to_deg, from_deg)), progress=False)

    assert judged(180.0).passed and judged(50.0).passed  # nobody's back has to show a face
    assert judged(180.0).figures["faces"] == 1.0
    verdict = judged(180.0, from_deg=50.0)
    (reason,) = verdict.reasons
    assert reason.code == "faces_missing" and "only 0% of the views" in reason.message
    assert verdict.objects[0]["faces"] == 0.0
    others = [views_of(i) for i in range(6, 14)]  # of 14 inputs six are taken for faces
    assert gate.validate(Memory([*heads(180.0, from_deg=50.0), *others]), progress=False).passed


def test_inputs_without_faces_are_not_asked_for_any_and_a_missing_detector_is_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(faces, "missing", lambda: "")
    monkeypatch.setattr(faces, "find", lambda rgb: [])
    records = [views_of(i, views=4) for i in range(3)]
    verdict = gate.validate(Memory(records), progress=False)
    assert verdict.passed and math.isnan(verdict.figures["faces"])
    monkeypatch.setattr(faces, "missing", lambda: "pip install something")
    heads = Memory(records, meta={"source": "heads"})
    said = [n for n in gate.validate(heads, progress=False).notes if "faces" in n]
    assert said == ["faces were not looked for: pip install something"]
    assert not any("faces" in n for n in gate.validate(Memory(records), progress=False).notes)
