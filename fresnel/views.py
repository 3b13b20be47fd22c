"""One picture -> novel views of what it shows, and its Gaussians, as files a person can open.

`python -m fresnel views photo.jpg --out views/ --ply object.ply`
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, max_pool2d

from fresnel.data import images
from fresnel.data.images import DatasetError, InputImages
from fresnel.host.files import write_atomic
from fresnel.models import cvs, decoder
from fresnel.models.weights import read_header
from fresnel.render import Views
from fresnel.scene.cameras import STANDARD_FOCAL, STANDARD_RADIUS, Cameras, orbit
from fresnel.show import pictures, style

MOST_VIEWS = 3600
FOREGROUND_EXTENT = 0.6
"""Share of the frame that the longer side of an object takes in the pictures of the training."""
_MATTE_SIZE = 512  # pixels: a matte is as good as what networks see needs, and costs a blink
_ORIGIN = (0.0, 0.0, 0.0)
_ASSUMED = {
    "alpha": "the picture's alpha channel says what the object is",
    "plain": "the picture's border is of one colour, which is taken for the background; what is "
    "connected to the border and has that colour is cut away",
    "photograph": "the picture has no alpha and no plain border: everything in its central square "
    "is taken for the object. Cut the object out (a PNG with alpha) for views of the object alone",
}


@dataclass(frozen=True)
class Photo:
    """A picture as the networks take it, and what had to be assumed about it.

    Args:
        inputs: one image before black, its camera placed on the orbit at azimuth 0.
        background: "alpha" (the file's own), "plain" (estimated) or "photograph" (unknown).
        assumed: sentences for a person.
    """

    inputs: InputImages
    background: Literal["alpha", "plain", "photograph"]
    assumed: tuple[str, ...]


def read_photo(path: str | Path, *, elevation_deg: float = 15.0, size: int = 128) -> Photo:
    """A picture of one object, of any size, framed as the training pictures are.

    Args:
        elevation_deg: how far above the horizon the camera stood; a photograph doesn't say.
        size: pixels of the square, at least what the networks see.

    Raises:
        DatasetError: if the file can't be read, or shows nothing.
        ValueError: for an elevation outside [-89, 89] degrees.
    """
    if not -89 <= elevation_deg <= 89:
        raise ValueError(f"elevation_deg: got {elevation_deg}, want degrees in [-89, 89]")
    rgb, alpha = _shrunk(*images.load_image(path))
    if not bool((alpha > 127).any()):
        raise DatasetError(f"{path}: transparent everywhere; want a picture of something")
    background: Literal["alpha", "plain", "photograph"] = "alpha"
    if bool((alpha == 255).all()):
        found = cut_out(rgb)
        background = "photograph" if found is None else "plain"
        if found is not None:
            rgb, alpha = found
    rgba = torch.cat([rgb, alpha[..., None]], dim=-1)
    side, middle = min(alpha.shape), None
    if background != "photograph":  # framed as our renders are
        ys, xs = (alpha > 127).nonzero(as_tuple=True)
        (top, bottom), (left, right) = ((int(v.min()), int(v.max()) + 1) for v in (ys, xs))
        side = math.ceil(max(bottom - top, right - left) / FOREGROUND_EXTENT)
        middle = (left + right) / 2, (top + bottom) / 2
    rgba = images.resize(images.squared(rgba, side, middle)[0], size)
    camera = orbit(
        torch.zeros(1), elevation_deg, STANDARD_RADIUS,
        pivot=_ORIGIN, focal_px=STANDARD_FOCAL * size, width=size, height=size,
    )  # fmt: skip
    inputs = InputImages(
        (Path(path).stem,), rgba[None, ..., :3], rgba[None, ..., 3], camera,
        elevation_is_assumed=True,
    )  # fmt: skip
    stood = f"the camera stood {elevation_deg:g} degrees above the horizon (--elevation)"
    return Photo(inputs, background, (_ASSUMED[background], stood))


def _shrunk(rgb: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    """Averaged down by a whole factor, so that the longer side is about `_MATTE_SIZE` or less."""
    factor = max(alpha.shape) // _MATTE_SIZE
    if factor < 2:
        return rgb, alpha
    rgba = torch.cat([rgb, alpha[..., None]], dim=-1).permute(2, 0, 1)[None].float()
    small = avg_pool2d(rgba, factor, ceil_mode=True, count_include_pad=False)
    small = small[0].permute(1, 2, 0).round().to(torch.uint8)
    return small[..., :3].contiguous(), small[..., 3].contiguous()


def cut_out(rgb: Tensor) -> tuple[Tensor, Tensor] | None:
    """The object before a background of one colour, or None where the border is not of one.

    A pixel is background if it has the border's colour, within twice the border's own noise, and
    is connected to the border: a white label on an object before white stays.  In the seam along
    it a pixel is a mixture of the background and of the object's colour near by; alpha is the share
    of the latter that explains it best.

    Args:
        rgb: uint8 (H, W, 3).

    Returns:
        rgb uint8 (H, W, 3) over black, alpha uint8 (H, W).
    """
    from skimage.measure import label

    picture = rgb.numpy().astype(np.float32)
    edges = (picture[0], picture[-1], picture[:, 0], picture[:, -1])
    colour = np.median(np.concatenate(edges), axis=0)
    off = [np.abs(edge - colour).max(axis=-1) for edge in edges]
    # One of the four sides may be crossed by the object, which stands on something.
    plain = sum(float(np.mean(side > 12) < 0.25) for side in off) >= 3
    if not plain:
        return None
    still = np.concatenate([side[side <= 12] for side in off])
    noise = max(4.0, 2 * float(np.quantile(still, 0.98)))
    distance = np.abs(picture - colour).max(axis=-1)
    labels = label(distance < 2 * noise, background=0, connectivity=1)
    border = np.unique(np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]]))
    behind = np.isin(labels, border[border > 0])
    if behind.mean() > 0.999:
        return None
    seam_px = max(2, max(behind.shape) // 150)
    outside = torch.from_numpy(behind[None, None].astype(np.float32))
    inner = 1 - _dilated(outside, seam_px)
    chw = torch.from_numpy(picture).permute(2, 0, 1)[None]
    side = 4 * seam_px + 1
    weight = avg_pool2d(inner, side, 1, side // 2)
    near = avg_pool2d(chw * inner, side, 1, side // 2) / weight.clamp_min(1e-6)
    back = torch.from_numpy(colour)[None, :, None, None]
    towards = near - back
    share = ((chw - back) * towards).sum(1, keepdim=True)
    share = (share / towards.square().sum(1, keepdim=True).clamp_min(1.0)).clamp(0, 1)
    share = torch.where(weight > 0, share, 1.0)  # parts thinner than two seams stay as they are
    seam = _dilated(outside, seam_px) - outside
    alpha = torch.where(seam > 0, share, 1 - outside)
    unmixed = torch.where((seam > 0) & (weight > 0), alpha * near, alpha * chw)[0]
    return (
        unmixed.permute(1, 2, 0).round().clamp(0, 255).to(torch.uint8),
        (alpha[0, 0] * 255).round().to(torch.uint8),
    )


def _dilated(mask: Tensor, radius: int) -> Tensor:
    return max_pool2d(mask, 2 * radius + 1, stride=1, padding=radius)


def view_cameras(elevation_deg: float, size: int, count: int = 8) -> Cameras:
    """Cameras (1, count) about the object, evenly spread from azimuth 0, the input's, onwards."""
    azimuth = torch.arange(count) * (360.0 / count)
    return orbit(
        azimuth[None], elevation_deg, STANDARD_RADIUS,
        pivot=_ORIGIN, focal_px=STANDARD_FOCAL * size, width=size, height=size,
    )  # fmt: skip


def write_views(
    path: str | Path,
    out: str | Path,
    *,
    weights: str | Path | None = None,
    elevation_deg: float = 15.0,
    steps: int = 1,
    count: int = 8,
    seed: int = 0,
    ply: str | Path | None = None,
    spz: str | Path | None = None,
    device: str = "cpu",
) -> dict[str, Any]:
    """Novel views of the object in a picture, by CVS, and its Gaussians, by the decoder.

    Writes `out`/input.png, azimuth_000.png, azimuth_045.png ... (RGBA, straight alpha; degrees from
    the input camera, growing as the camera moves to its right), contact_sheet.png (CVS above the
    decoder's own render) and views.json, which holds what is returned.

    Args:
        weights: a CVS checkpoint; None: the twin that ships, which adds to the decoder's
            renders. One that learned from another decoder than the one that ships draws with that,
            which must lie in the same folder.
        elevation_deg: of the input camera, and of the views.
        steps: network calls per view.
        ply, spz: where the Gaussians go; None: nowhere.

    Returns:
        "files" by azimuth, "background", "assumed" (sentences), "weights", "duration_s" and more.

    Raises:
        DatasetError: for a picture that can't be read or shows nothing.
        FileNotFoundError, ValueError: for weights or options that won't do.
    """
    began = time.monotonic()
    if steps < 1:
        raise ValueError(f"steps: got {steps}, want at least 1")
    if not 1 <= count <= MOST_VIEWS:
        raise ValueError(f"views: got {count}, want 1 to {MOST_VIEWS}")
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{out}: is a file; want a folder for the views")
    for file, suffix in ((ply, ".ply"), (spz, ".spz")):
        if file is not None and Path(file).suffix.lower() != suffix:
            raise ValueError(f"{file}: want a name that ends in {suffix}")
    network = (
        cvs.load_shipped(device, "cvs-twin") if weights is None else cvs.CVS.load(weights, device)
    )
    splats = _decoder_of(network, weights, device)
    size = network.config.image_size
    photo = read_photo(path, elevation_deg=elevation_deg, size=max(size, splats.config.image_size))
    inputs = photo.inputs.to(device)
    cameras = view_cameras(elevation_deg, size, count).to(device)
    draw, drawn = decoder.predictor(splats), []

    def render(inputs: InputImages, cameras: Cameras) -> Views:
        drawn.append(draw(inputs, cameras))
        return drawn[-1]

    made = cvs.predictor(network, steps, seed, renderer=render)(inputs, cameras)
    own = drawn[0] if drawn else draw(inputs, cameras)  # the mirrored input's come later

    folder.mkdir(parents=True, exist_ok=True)
    azimuths = [360.0 * i / count for i in range(count)]
    form = "03.0f" if count <= 360 else "05.1f"
    files = {f"{a:g}": f"azimuth_{a:{form}}.png" for a in azimuths}
    for picture, file in zip(_straight(made), files.values(), strict=True):
        _save(folder / file, picture)
    given = torch.cat([inputs.rgb, inputs.alpha[..., None]], dim=-1)[0].cpu().numpy()
    _save(folder / "input.png", _unpremultiplied(given))
    _sheet(folder / "contact_sheet.png", photo, steps, {"made": made, "own": own}, azimuths)
    gaussians = decoder.prune(splats.world(inputs))[0].to("cpu").detach()
    for file in (ply, spz):
        if file is not None:
            Path(file).parent.mkdir(parents=True, exist_ok=True)
            gaussians.save(file)
    result = {
        "input": str(path),
        "background": photo.background,
        "assumed": list(photo.assumed),
        "elevation_deg": elevation_deg,
        "steps": steps,
        "seed": seed,
        "weights": "shipped" if weights is None else Path(weights).name,
        "image_size": size,
        "files": files,
        "gaussians": {
            "count": gaussians.num,
            "files": [str(file) for file in (ply, spz) if file is not None],
        },
        "duration_s": time.monotonic() - began,
    }
    write_atomic(folder / "views.json", json.dumps(result, indent=2) + "\n")
    return result


def _decoder_of(network: cvs.CVS, file: str | Path | None, device: str) -> decoder.Decoder:
    """The decoder whose renders a CVS learned from: the one that ships, or one beside its file."""
    ships = decoder.load_shipped("pixel", device)
    if network.decoder in ("", ships.checksum()) or file is None:
        return ships
    for path in sorted(Path(file).resolve().parent.glob("*.safetensors")):
        if read_header(path).get("kind") == "decoder":
            found = decoder.Decoder.load(path, device)
            if found.checksum() == network.decoder:
                return found
    raise ValueError(
        f"{file}: learned from the renders of the decoder {network.decoder[:19]}, which is not the "
        f"one that ships; put that decoder's file into the same folder"
    )


def _straight(views: Views) -> list[np.ndarray]:
    """Views (1, V) over black -> V pictures RGBA uint8 with straight alpha."""
    rgba = torch.cat([views.rgb, views.alpha], dim=-1)[0].clamp(0, 1).cpu().numpy()
    return [_unpremultiplied((picture * 255 + 0.5).astype(np.uint8)) for picture in rgba]


def _unpremultiplied(rgba: np.ndarray) -> np.ndarray:
    alpha = rgba[..., 3:].astype(np.float32)
    colour = np.minimum(rgba[..., :3] * 255.0 / np.maximum(alpha, 1.0) + 0.5, 255)
    return np.concatenate([colour.astype(np.uint8), rgba[..., 3:]], axis=-1)


def _save(path: Path, picture: np.ndarray) -> None:
    from PIL import Image

    Image.fromarray(picture).save(path, optimize=True)


def _sheet(
    path: Path, photo: Photo, steps: int, views: dict[str, Views], azimuths: Sequence[float]
) -> None:
    source = photo.inputs.rgb[0].cpu().numpy()
    rows = [[source, *style.to_uint8(v.rgb[0])] for v in views.values()]
    calls = "one network call a view" if steps == 1 else f"{steps} network calls a view"
    labels = [f"CVS, {calls}", "the decoder's Gaussians, rendered"]
    sheet = pictures.contact_sheet(
        rows, columns=["input", *style.azimuth_labels(azimuths)], labels=labels
    )
    _save(path, sheet)
