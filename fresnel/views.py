"""One picture -> novel views of what it shows, and its Gaussians, as files a person can open.

`python -m fresnel views photo.jpg --out views/ --ply object.ply`
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from fresnel.data import photos
from fresnel.data.images import InputImages
from fresnel.host.files import write_atomic
from fresnel.models import cvs, decoder
from fresnel.models.weights import read_header
from fresnel.render import Views
from fresnel.scene.cameras import Cameras, standard_orbit
from fresnel.show import pictures, style

PLY_FROM_WORLD = torch.diag(torch.tensor([1.0, -1.0, -1.0, 1.0]))
"""3DGS's files have COLMAP's axes, x right, y down, z forward; our world's Y is up."""
MOST_VIEWS = 3600


def view_cameras(elevation_deg: float, size: int, count: int = 8) -> Cameras:
    """Cameras (1, count) about the object, evenly spread from azimuth 0, the input's, onwards."""
    azimuth = torch.arange(count) * (360.0 / count)
    return standard_orbit(azimuth[None], elevation_deg, size)


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
        ply, spz: where the Gaussians go; None: nowhere. They stand upright where viewers take
            files as they are meant: PLY as 3DGS writes it (y down, z forward; SuperSplat and others
            turn it over), SPZ by its definition (y up).

    Returns:
        "files" by azimuth, "background", "assumed" (sentences), "weights", "duration_s" and more.

    Raises:
        DatasetError: for a picture that can't be read or shows nothing.
        FileNotFoundError, ValueError: for weights or options that won't do.
    """
    began, folder = time.monotonic(), Path(out)
    splats_to = [Path(file) for file in (ply, spz) if file is not None]
    for holds, problem in (
        (steps >= 1, f"steps: got {steps}, want at least 1"),
        (1 <= count <= MOST_VIEWS, f"views: got {count}, want 1 to {MOST_VIEWS}"),
        (folder.is_dir() or not folder.exists(), f"{out}: is a file; want a folder for the views"),
        (str(ply or ".ply").lower().endswith(".ply"), f"{ply}: want a name that ends in .ply"),
        (str(spz or ".spz").lower().endswith(".spz"), f"{spz}: want a name that ends in .spz"),
    ):
        if not holds:
            raise ValueError(problem)
    network = (
        cvs.load_shipped(device, "cvs-twin") if weights is None else cvs.CVS.load(weights, device)
    )
    splats, size = _decoder_of(network, weights, device), network.config.image_size
    photo = photos.read(path, elevation_deg=elevation_deg, size=max(size, splats.config.image_size))
    inputs, azimuths = photo.inputs.to(device), [360.0 * i / count for i in range(count)]
    cameras = view_cameras(elevation_deg, size, count).to(device)
    draw, drawn = decoder.predictor(splats), []

    def render(inputs: InputImages, cameras: Cameras) -> Views:
        drawn.append(draw(inputs, cameras))
        return drawn[-1]

    made = cvs.predictor(network, steps, seed, renderer=render)(inputs, cameras)
    own = drawn[0] if drawn else draw(inputs, cameras)  # the mirrored input's come later

    folder.mkdir(parents=True, exist_ok=True)
    form = "03.0f" if count <= 360 else "05.1f"
    files = {f"{a:g}": f"azimuth_{a:{form}}.png" for a in azimuths}
    rgba = torch.cat([made.rgb, made.alpha], dim=-1)[0].clamp(0, 1).cpu().numpy()
    given = torch.cat([inputs.rgb, inputs.alpha[..., None]], dim=-1)[0].cpu().numpy()
    shown = [*(rgba * 255 + 0.5).astype(np.uint8), given]
    for picture, file in zip(shown, (*files.values(), "input.png"), strict=True):
        alpha = np.maximum(picture[..., 3:].astype(np.float32), 1.0)  # straight: it is over black
        colour = np.minimum(picture[..., :3] * 255.0 / alpha + 0.5, 255).astype(np.uint8)
        straight = np.concatenate([colour, picture[..., 3:]], axis=-1)
        Image.fromarray(straight).save(folder / file, optimize=True)
    calls = "one network call a view" if steps == 1 else f"{steps} network calls a view"
    overridden = network.gate_overridden or splats.gate_overridden
    calls += "; the gate was overridden" if overridden else ""
    sheet = pictures.contact_sheet(
        [[given[..., :3], *style.to_uint8(views.rgb[0])] for views in (made, own)],
        columns=["input", *style.azimuth_labels(azimuths)],
        labels=[f"CVS, {calls}", "the decoder's Gaussians, rendered"],
    )
    Image.fromarray(sheet).save(folder / "contact_sheet.png", optimize=True)
    gaussians = decoder.prune(splats.world(inputs))[0].to("cpu").detach()
    for place in splats_to:
        place.parent.mkdir(parents=True, exist_ok=True)
        of_spz = place.suffix.lower() == ".spz"
        (gaussians if of_spz else gaussians.transform(PLY_FROM_WORLD)).save(place)
    result = {
        "input": str(path),
        "background": photo.background,
        "assumed": list(photo.assumed),
        "elevation_deg": elevation_deg,
        "steps": steps,
        "seed": seed,
        "weights": "shipped" if weights is None else Path(weights).name,
        "gate_overridden": overridden,  # in the training of what draws
        "image_size": size,
        "files": files,
        "gaussians": {"count": gaussians.num, "files": [*map(str, splats_to)]},
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
