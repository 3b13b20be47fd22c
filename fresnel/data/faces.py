"""Whether a picture shows a face: MediaPipe's short-range detector, run by LiteRT.

BlazeFace (Bazarevsky et al. 2019, arXiv 1907.05047): 896 places of a picture of 128 px each guess a
box and how likely it is a face's.  The model's file is read from the installed package `mediapipe`,
whose code is not run.
"""

import os
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

NEEDS = "pip install 'mediapipe>=0.10.9,<0.10.15' ai-edge-litert (the extra [faces])"
"""Later versions of mediapipe want an older NumPy, or come without the model."""
SIDE = 128
"""Pixels that the detector sees a picture at, whatever its size."""
MIN_SCORE = 0.7
"""MediaPipe asks for 0.5, and finds faces on the backs of half of our heads (docs/measures.md)."""
_ONE_AT_A_TIME = threading.Lock()
_MODEL = "modules/face_detection/face_detection_short_range.tflite"


def missing() -> str:
    """What to install before faces can be found; "" where they can."""
    spec = find_spec("mediapipe")
    places = (spec and spec.submodule_search_locations) or ()
    runs = find_spec("ai_edge_litert") is not None
    return "" if runs and any(Path(place, _MODEL).is_file() for place in places) else NEEDS


def expected(meta: Mapping[str, Any]) -> bool:
    """Whether a dataset's ``meta`` says that its objects are mostly heads."""
    kinds = list((meta.get("object_classes") or {}).values())
    return meta.get("source") == "heads" or kinds.count("head") > len(kinds) / 2


def find(rgb: np.ndarray) -> list[tuple[float, float, float, float, float]]:
    """Faces in a picture (H, W, 3) uint8: (left, top, right, bottom, score) in pixels, the surest
    first, each once.

    Raises:
        ModuleNotFoundError: without the detector; says what to install.
        ValueError: for anything but such a picture.
    """
    if rgb.ndim != 3 or rgb.shape[2] != 3 or rgb.dtype != np.uint8 or not rgb.size:
        raise ValueError(f"rgb: got {rgb.dtype} {rgb.shape}, want uint8 (H, W, 3)")
    side = max(rgb.shape[:2])
    square = np.zeros((side, side, 3), np.uint8)
    top, left = ((side - n) // 2 for n in rgb.shape[:2])
    square[top : top + rgb.shape[0], left : left + rgb.shape[1]] = rgb
    boxes, scores = _run(torch.from_numpy(square)[None].float() / 255)
    found: list[tuple[float, float, float, float, float]] = []
    for i in np.argsort(-scores[0]):
        if scores[0, i] < MIN_SCORE:
            break
        x0, y0, x1, y1 = (float(edge) * side for edge in boxes[0, i])
        box = (x0 - left, y0 - top, x1 - left, y1 - top, float(scores[0, i]))
        if all(_overlap(box, other) < 0.3 for other in found):
            found.append(box)
    return found


def present(images: Tensor) -> Tensor:
    """Whether pictures (N, H, W, 3) in [0, 1], square and over white, show a face: (N,) bool."""
    if not len(images):
        return torch.zeros(0, dtype=torch.bool)
    return torch.from_numpy(_run(images.float().cpu())[1].max(axis=1) >= MIN_SCORE)


def _run(images: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Boxes (N, 896, 4), left, top, right, bottom in sides of the picture, and scores (N, 896)."""
    detector, source, outputs = _detector()
    small = images.permute(0, 3, 1, 2)
    if tuple(small.shape[-2:]) != (SIDE, SIDE):
        small = interpolate(small, size=(SIDE, SIDE), mode="bilinear", antialias=True)
    pictures = (small.permute(0, 2, 3, 1) * 2 - 1).contiguous().numpy()
    found = []
    for picture in pictures:
        with _ONE_AT_A_TIME:
            detector.set_tensor(source, picture[None])
            detector.invoke()
            found.append([detector.get_tensor(index)[0] for index in outputs])
    raw, logits = (np.stack(part) for part in zip(*found, strict=True))
    middle, half = raw[..., :2] / SIDE + _places(), raw[..., 2:4] / (2 * SIDE)
    scores = 1 / (1 + np.exp(-logits[..., 0].clip(-80, 80)))
    return np.concatenate([middle - half, middle + half], axis=-1), scores


def _places() -> np.ndarray:
    """Where each guess is made, (896, 2) as x, y: two for each of 16 x 16 places, six for 8 x 8."""
    parts = []
    for count, times in ((16, 2), (8, 6)):
        at = (np.arange(count) + 0.5) / count
        grid = np.stack(np.meshgrid(at, at), axis=-1).reshape(-1, 2)
        parts.append(np.repeat(grid, times, axis=0))
    return np.concatenate(parts)


@cache
def _detector() -> tuple[Any, int, list[int]]:
    """The interpreter, its input's index, and those of boxes and scores."""
    if why := missing():
        raise ModuleNotFoundError(f"faces: the detector is not installed: {why}")
    from ai_edge_litert.interpreter import Interpreter

    spec = find_spec("mediapipe")
    assert spec is not None and spec.submodule_search_locations
    path = next(p for s in spec.submodule_search_locations if (p := Path(s, _MODEL)).is_file())
    with _ONE_AT_A_TIME, _unheard():
        interpreter = Interpreter(str(path), num_threads=1)
        interpreter.allocate_tensors()
    (source,) = interpreter.get_input_details()
    ends = {end["shape"][-1]: end["index"] for end in interpreter.get_output_details()}
    return interpreter, source["index"], [ends[16], ends[1]]


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    """Intersection over union of two boxes."""
    inner = max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(
        0.0, min(a[3], b[3]) - max(a[1], b[1])
    )
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return inner / (sum(areas) - inner) if inner else 0.0


@contextmanager
def _unheard() -> Iterator[None]:
    """Without what a library writes to standard error past Python: LiteRT says at every start, in
    each process, that it runs on the CPU, and no setting silences that."""
    sys.stderr.flush()
    try:
        kept = os.dup(2)
    except OSError:  # there is none
        yield
        return
    try:
        with open(os.devnull, "wb") as nothing:
            os.dup2(nothing.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
