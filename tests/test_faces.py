"""The face detector on a photograph, and what is said without it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fresnel.data import faces

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
    assert not faces.find(skimage.data.coffee()) and not faces.find(photo[::-1].copy())
    square = torch.from_numpy(photo[:256, 96:352].copy()).float() / 255
    assert faces.present(torch.stack([square, square.flip(0)])).tolist() == [True, False]
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


def test_data_say_whether_they_are_of_heads() -> None:
    assert faces.expected({"source": "heads"})
    assert faces.expected({"object_classes": {"a": "head", "b": "head", "c": "chair"}})
    assert not faces.expected({"object_classes": {"a": "chair", "b": "head"}})
    assert not faces.expected({})
