"""Photographs in: one thing, cut out of its background and framed as the training pictures are.

A picture with alpha says itself what it shows; a background of one colour is taken away by its
colour; any other by a network for salient objects (ISNet, arXiv 2203.03041) through `rembg`, which
is the extra "cutout". Whatever had to be assumed is said, in sentences for a person.
"""

import functools
import math
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from fresnel.data import faces, images
from fresnel.data.images import DatasetError, InputImages
from fresnel.scene.cameras import standard_orbit

Face = tuple[float, float, float]
"""The middle (x, y) of a face's square, from the brows to the chin, and its side, in pixels."""
ELEVATION_DEG = {"objects": 15.0, "faces": 5.0}
"""By domain, what is assumed of a photograph's camera; people are taken about level."""
_EXTENT = {"objects": 0.6, "faces": 0.785}
"""By domain, the share of the frame that the longer side takes in the pictures of the training."""
_MATTE_SIZE = 512  # pixels: a matte is as good as what networks see needs, and costs a blink
_FACE_SIZE = 256  # pixels of the longer side in which a face is looked for
_LEAST = 8  # pixels that an object is long, at least
_MODEL = "isnet-general-use"  # Apache 2.0, 178 MB; rembg's own default may not be used for money
_WEIGHTS = f"{_MODEL}.onnx in the folder models/{_MODEL} of REMBG_HOME (~/.rembg)"
_ASSUMED = {
    "alpha": "the picture's alpha channel says what the object is",
    "plain": "the picture's border is of one colour, which is taken for the background; what is "
    "connected to the border and has that colour is cut away",
    "cut-out": "what stands out of the picture is taken for the object (cut out by rembg, "
    f"{_MODEL})",
    "photograph": "everything in the picture's central square is taken for the object. Cut the "
    "object out (a PNG with alpha) for views of the object alone",
}


@dataclass(frozen=True)
class Photo:
    """A picture as the networks take it, before black, its camera on the orbit at azimuth 0, and
    what had to be assumed about it. `background`: "alpha" (the file's own), "plain" (estimated),
    "cut-out" (by a network) or "photograph" (unknown); `domain`: "objects" or "faces"; `assumed`:
    sentences for a person; `careful`: those that speak against what is made of it."""

    inputs: InputImages
    background: str
    domain: str
    elevation_deg: float
    assumed: tuple[str, ...]
    careful: tuple[str, ...]


def read(
    path: str | Path,
    *,
    elevation_deg: float | None = None,
    size: int = 128,
    domain: str = "objects",
) -> Photo:
    """A picture of one object or head, of any size, framed as the training pictures are.

    Args:
        elevation_deg: how far above the horizon the camera stood; a photograph doesn't say. None:
            `ELEVATION_DEG` of its domain.
        size: pixels of the square, at least what the networks see.
        domain: "objects", "faces", or "auto": faces where a face is found.

    Raises:
        DatasetError: if the file can't be read, or shows nothing.
        ValueError: for an elevation outside [-89, 89] degrees, or an unknown domain.
    """
    if domain not in ("auto", *ELEVATION_DEG):
        raise ValueError(f"domain: got {domain!r}, want 'auto', 'objects' or 'faces'")
    if elevation_deg is not None and not -89 <= elevation_deg <= 89:
        raise ValueError(f"elevation_deg: got {elevation_deg}, want degrees in [-89, 89]")
    rgb, alpha = images.load_image(path)
    rgba = torch.cat([rgb, alpha[..., None]], dim=-1).numpy()
    face = None if domain == "objects" else find_face(rgba[..., :3])
    said = []
    if face is not None:  # cut out of as many pixels as there are
        x, y, high = face
        x0, y0 = max(0, int(x - 1.6 * high)), max(0, int(y - 1.6 * high))  # with hair and neck
        rgba = rgba[y0 : math.ceil(y + 1.6 * high), x0 : math.ceil(x + 1.6 * high)]
        face = x - x0, y - y0, high
        said = ["a face was found, so it is a head (--domain objects: a thing)"]
    elif domain == "faces":
        said = ["no face was found in it: it is framed as a head with its neck, and nothing more"]
    domain = "objects" if domain == "auto" and face is None else domain.replace("auto", "faces")
    with images.named(path):
        whole = Image.frombytes("RGBa", rgba.shape[1::-1], rgba.tobytes())  # premultiplied
        shrunk = max(1, max(rgba.shape) // _MATTE_SIZE)
        rgba = np.array(whole.reduce(shrunk))
        background, rgba, more = _object(rgba, part=face is not None)
        if face is not None:
            face = face[0] / shrunk, face[1] / shrunk, face[2] / shrunk
            rgba, side, middle = portrait(rgba, face)
        elif background == "photograph":
            side, middle = min(rgba.shape[:2]), None
        else:
            (left, right), (top, bottom) = _box(rgba[..., 3])
            side = math.ceil(max(bottom - top, right - left) / _EXTENT[domain])
            middle = (left + right) / 2, (top + bottom) / 2
    square = images.resize(images.squared(torch.from_numpy(rgba), side, middle)[0], size)
    elevation_deg = ELEVATION_DEG[domain] if elevation_deg is None else elevation_deg
    camera = standard_orbit(torch.zeros(1), elevation_deg, size)
    names, rgb, alpha = (Path(path).stem,), square[None, ..., :3], square[None, ..., 3]
    inputs = InputImages(names, rgb, alpha, camera, elevation_is_assumed=True)
    stood = f"the camera stood {elevation_deg:g} degrees above the horizon (--elevation)"
    assumed = *said, _ASSUMED[background], stood
    return Photo(inputs, background, domain, elevation_deg, assumed, tuple(more))


def find_face(rgb: np.ndarray) -> Face | None:
    """The largest face of a picture uint8 (H, W, 3), seen from about the front, or None.

    By `faces`, where that is installed, else by scikit-image's cascade of local binary patterns.
    It takes at least a sixth of the longer side: who is shown from head to foot is no head.
    """
    if faces.missing():
        found = _cascade(rgb)
    else:  # whose squares have about that size, and lie a little lower
        sides = [(box, box[3] - box[1]) for box in faces.find(np.ascontiguousarray(rgb))]
        found = [((b[0] + b[2]) / 2, (b[1] + b[3]) / 2 - 0.06 * side, side) for b, side in sides]
    largest = max(found, key=lambda face: face[2], default=None)
    return largest if largest and largest[2] >= max(rgb.shape[:2]) / 6 else None


def _cascade(rgb: np.ndarray) -> list[Face]:
    from skimage import data
    from skimage.feature import Cascade

    scale = _FACE_SIZE / max(rgb.shape[:2])
    height, width = (max(1, round(side * scale)) for side in rgb.shape[:2])
    small = np.asarray(Image.fromarray(rgb).resize((width, height), Image.Resampling.BILINEAR))
    cascade = Cascade(data.lbp_frontal_face_cascade_filename())
    sizes = {"min_size": (_FACE_SIZE // 6,) * 2, "max_size": (_FACE_SIZE,) * 2}
    found = cascade.detect_multi_scale(small, scale_factor=1.2, step_ratio=1, **sizes)
    boxes = [(box["c"], box["r"], box["width"]) for box in found]
    return [((x + w / 2) / scale, (y + w / 2) / scale, w / scale) for x, y, w in boxes]


def portrait(rgba: np.ndarray, face: Face) -> tuple[np.ndarray, int, tuple[float, float]]:
    """A head framed as the training's are, and what lies below its neck cut away, softly.

    In their pictures the face that `find_face` sees takes 0.44 to 0.59 of the height, its lower
    edge lies at 0.875, hair ends at about 0.16 and the neck at 0.945, higher on its sides.

    Args:
        rgba: premultiplied uint8 (H, W, 4).

    Returns:
        rgba, and side and middle (x, y) of the frame in pixels.
    """
    x, y, high = face
    chin, covered = y + high / 2, rgba[..., 3] > 127
    near = covered[: int(y), max(0, int(x - 0.9 * high)) : int(x + 0.9 * high)]
    bare = np.flatnonzero(~near.any(axis=1))
    top = bare[-1] + 1 if len(bare) else 0
    side = float(np.clip((chin - top) / 0.715, 1.7 * high, 2.3 * high))
    if not covered.all():
        rows, columns = near[int(max(top, y - high / 2)) :].nonzero()
        x = max(0, int(x - 0.9 * high)) + float(columns.mean()) if len(rows) else x
        down, along = np.mgrid[: rgba.shape[0], : rgba.shape[1]] + 0.5
        end = chin + side * (0.07 - 2.6 * ((along - x) / side) ** 2)
        keep = ((end - down) / (0.03 * side) + 0.5).clip(0, 1)
        rgba = (rgba * keep[..., None] + 0.5).astype(np.uint8)
    return rgba, math.ceil(side), (x, chin - 0.375 * side)


def read_folder(
    folder: str | Path,
    size: int,
    *,
    elevation_deg: float | None = None,
    most: int | None = None,
    domain: str = "objects",
) -> tuple[InputImages, str]:
    """The (`most` first) pictures of a folder by `read`, sorted by name, and what is assumed; all
    of them of one `domain`, since one decoder is to draw them.

    Raises:
        DatasetError: if the folder is missing or holds no image, or one can't be read.
    """
    paths = images.image_files(folder)[:most]
    if not paths:
        what = f"holds no image; want files ending in {images.IMAGE_SUFFIXES}"
        raise DatasetError(f"{folder}: {what if Path(folder).is_dir() else 'no such folder'}")
    if elevation_deg is None:
        elevation_deg = ELEVATION_DEG[domain]
    how = functools.partial(read, elevation_deg=elevation_deg, size=size, domain=domain)
    with ThreadPoolExecutor() as pool:
        photos = list(pool.map(how, paths))
    names = tuple(path.stem for path in paths)
    if len(set(names)) < len(paths):
        names = tuple(path.name for path in paths)
    rgb, alpha = (torch.cat([getattr(p.inputs, n) for p in photos]) for n in ("rgb", "alpha"))
    cameras = standard_orbit(torch.zeros(len(paths)), elevation_deg, size)
    kinds = Counter(photo.background for photo in photos)
    said = "; ".join(f"{kinds[kind]} x {text}" for kind, text in _ASSUMED.items() if kinds[kind])
    notes = dict.fromkeys(note for photo in photos for note in photo.careful)
    stood = f"all cameras {elevation_deg:g} degrees above the horizon (elevation_deg)"
    said = "; ".join([said, stood, *notes])
    return InputImages(names, rgb, alpha, cameras, elevation_is_assumed=True), said


def _box(alpha: np.ndarray) -> tuple[tuple[int, int], tuple[int, int]]:
    """(left, right), (top, bottom) of what is covered; ValueError if that is next to nothing."""
    ys, xs = (alpha > 127).nonzero()
    if not len(xs):
        raise ValueError("transparent everywhere; want a picture of something")
    box = (int(xs.min()), int(xs.max()) + 1), (int(ys.min()), int(ys.max()) + 1)
    if max(high - low for low, high in box) < _LEAST:
        raise ValueError(f"its object is less than {_LEAST} pixels long; want a larger picture")
    return box


def _object(rgba: np.ndarray, part: bool) -> tuple[str, np.ndarray, list[str]]:
    """The background's kind, the object as premultiplied uint8 (H, W, 4), and what to say; `part`:
    of a picture, so that its edges mean nothing."""
    if (rgba[..., 3] < 255).any():
        return "alpha", rgba, []
    if max(rgba.shape[:2]) < _LEAST:
        raise ValueError(f"less than {_LEAST} pixels long; want a larger picture")
    found = cut_plain(rgba[..., :3])
    if found is not None:
        return "plain", found, []
    try:
        matte = _salient()(rgba[..., :3])
    except _CannotCut as error:
        return "photograph", rgba, [str(error)]
    found, said = checked_matte(matte, part)
    return ("photograph", rgba, said) if found is None else ("cut-out", found, said)


def cut_plain(rgb: np.ndarray) -> np.ndarray | None:
    """The object before a background of one colour, or None where the border is not of one.

    A pixel is background if it has the border's colour, within twice the border's own noise, and
    is connected to the border: a white label on an object before white stays.  In the seam along
    it a pixel is a mixture of the background and of the object's colour near by; alpha is the share
    of the latter that explains it best.

    Args:
        rgb: uint8 (H, W, 3).

    Returns:
        rgba uint8 (H, W, 4), over black.

    Raises:
        ValueError: if the whole picture is of that colour.
    """
    from scipy import ndimage
    from skimage.segmentation import flood

    picture = rgb.astype(np.float32)
    edges = (picture[0], picture[-1], picture[:, 0], picture[:, -1])
    colour = np.median(np.concatenate(edges), axis=0)
    off = [np.abs(edge - colour).max(axis=-1) for edge in edges]
    # One of the four sides may be crossed by the object, which stands on something.
    if sum(float(np.mean(side > 12) < 0.25) for side in off) < 3:
        return None
    still = np.concatenate([side[side <= 12] for side in off])
    noise = max(4.0, 2 * float(np.quantile(still, 0.98)))
    alike = np.abs(picture - colour).max(axis=-1) < 2 * noise
    behind = flood(np.pad(alike, 1, constant_values=True), (0, 0), connectivity=1)[1:-1, 1:-1]
    if behind.mean() > 0.999:
        raise ValueError("one colour all over; want a picture of something")
    seam_px = max(2, max(behind.shape) // 150)
    grown = ndimage.maximum_filter(behind, 2 * seam_px + 1, mode="constant")
    inner = ~grown[..., None]
    window = {"size": (4 * seam_px + 1, 4 * seam_px + 1, 1), "mode": "constant"}
    weight = ndimage.uniform_filter(inner.astype(np.float32), **window)
    near = ndimage.uniform_filter(picture * inner, **window) / np.maximum(weight, 1e-6)
    towards = near - colour
    share = ((picture - colour) * towards).sum(-1) / np.maximum((towards**2).sum(-1), 1.0)
    # parts thinner than two seams stay as they are
    mixed = grown & ~behind & (weight[..., 0] > 1e-6)
    alpha = np.where(mixed, share.clip(0, 1), ~behind)
    unmixed = np.where(mixed[..., None], near, picture) * alpha[..., None]
    rgba = np.concatenate([unmixed, alpha[..., None] * 255], axis=-1)
    return rgba.round().clip(0, 255).astype(np.uint8)


class _CannotCut(Exception):
    """Why no network can cut a picture out here, as a sentence."""


@functools.cache
def _salient() -> Any:
    """A function: rgb uint8 (H, W, 3) -> what stands out of it, straight rgba uint8 (H, W, 4).

    Raises:
        _CannotCut: if rembg is not installed, or its weights can be neither found nor fetched.
    """
    try:
        from rembg import new_session, remove
    except (ImportError, SystemExit) as error:  # it exits where onnxruntime is missing
        raise _CannotCut(
            "the picture has a background, and what cuts it out is not installed: "
            "pip install -e '.[cutout]' (rembg; its first call fetches 178 MB of weights)"
        ) from error
    try:
        session = new_session(_MODEL)
    except Exception as error:  # of the network, the disk, or a file that is no model
        raise _CannotCut(
            f"the picture has a background, and rembg's weights could not be used "
            f"({type(error).__name__}: {str(error).splitlines()[0][:120]}): put {_WEIGHTS}"
        ) from error
    return lambda rgb: remove(rgb, session=session, decontaminate=True)


def checked_matte(rgba: np.ndarray, part: bool) -> tuple[np.ndarray | None, list[str]]:
    """A network's cut-out, its largest piece alone, and what a person should know of it.

    Args:
        rgba: straight uint8 (H, W, 4).
        part: of a picture, beyond whose edges it goes on.

    Returns:
        Premultiplied uint8 (H, W, 4), or None where the whole picture was taken for the object;
        sentences.

    Raises:
        ValueError: if nothing was found.
    """
    from scipy import ndimage

    alpha = rgba[..., 3]
    covered = alpha > 127
    pieces, _ = ndimage.label(alpha > 25)
    areas = np.bincount(pieces[covered], minlength=2)
    areas[0] = 0
    if areas.max() < 0.005 * alpha.size:
        raise ValueError(
            "nothing in it stands out of its background; cut the object out (a PNG with alpha)"
        )
    if covered.mean() > 0.97:
        return None, ["nothing in the picture could be told from a background"]
    said, largest = [], pieces == areas.argmax()
    others = int((areas > 0.05 * areas.max()).sum()) - 1
    if others:
        said.append(f"{others + 1} things stand out of the picture: the largest is taken")
    alpha = np.where(largest, alpha, 0)
    unsure = float(((alpha > 25) & (alpha < 230)).sum() / (alpha > 25).sum())
    if unsure > 0.15:
        said.append(f"the outline is unsure: {unsure:.0%} of the object is half transparent")
    edges = {"top": alpha[0], "bottom": alpha[-1], "left": alpha[:, 0], "right": alpha[:, -1]}
    cut = [side for side, edge in edges.items() if (edge > 127).mean() > 0.02]
    if cut and not part:
        said.append(f"the picture ends before the object does ({', '.join(cut)})")
    colour = (rgba[..., :3].astype(np.uint16) * alpha[..., None] + 127) // 255
    return np.dstack([colour.astype(np.uint8), alpha]), said
