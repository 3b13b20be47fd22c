"""One picture -> novel views of what it shows, and its Gaussians, as files a person can open.

`python -m fresnel views photo.jpg --out views/ --ply object.ply`
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from fresnel import gate
from fresnel.data import photos
from fresnel.data.images import InputImages
from fresnel.evaluation import domain as distances
from fresnel.gate import measure
from fresnel.host.files import write_atomic
from fresnel.models import cvs, decoder
from fresnel.models.weights import read_header
from fresnel.render import Views
from fresnel.scene.cameras import Cameras, standard_orbit
from fresnel.show import pictures, style

PLY_FROM_WORLD = torch.diag(torch.tensor([1.0, -1.0, -1.0, 1.0]))
"""3DGS's files have COLMAP's axes, x right, y down, z forward; our world's Y is up."""
MOST_VIEWS = 3600
SHIPPED_SIZE = 128
"""Pixels that what ships sees and draws."""
RARE = 95.0
"""Per cent of the training pictures that lie nearer to the others: said where it is more."""
_OTHERS = ("input.png", "contact_sheet.png")  # beside the views
_OURS = r"azimuth_\d{3}(\.\d)?\.png|input\.png|contact_sheet\.png"


def view_cameras(elevation_deg: float, size: int, count: int = 8) -> Cameras:
    """Cameras (1, count) about the object, evenly spread from azimuth 0, the input's, onwards."""
    azimuth = torch.arange(count) * (360.0 / count)
    return standard_orbit(azimuth[None], elevation_deg, size)


def write_views(
    path: str | Path,
    out: str | Path,
    *,
    domain: str = "auto",
    weights: str | Path | None = None,
    elevation_deg: float | None = None,
    steps: int = 1,
    count: int = 8,
    seed: int = 0,
    ply: str | Path | None = None,
    spz: str | Path | None = None,
    device: str = "cpu",
) -> dict[str, Any]:
    """Novel views of the object or head in a picture, by CVS, and its Gaussians, by the decoder.

    Writes `out`/input.png, azimuth_000.png, azimuth_045.png ... (RGBA, straight alpha; degrees from
    the input camera, growing as the camera moves to its right), contact_sheet.png (CVS above the
    decoder's own render, and what to be careful of) and views.json, which holds what is returned.
    What an earlier call left there goes; other files stay as they are.

    Args:
        domain: "objects", "faces", or "auto": faces where a face is found; see `photos.read`.
        weights: a CVS checkpoint; None: what ships for the domain: of objects the twin, which adds
            to the decoder's renders; of faces the decoder alone. One that learned from another
            decoder than the one that ships draws with that, which must lie in the same folder.
        elevation_deg: of the input camera, and of the views; None: its domain's.
        steps: network calls per view.
        ply, spz: where the Gaussians go; None: nowhere. They stand upright where viewers take
            files as they are meant: PLY as 3DGS writes it (y down, z forward; SuperSplat and others
            turn it over), SPZ by its definition (y up).

    Returns:
        "files" by azimuth, "background", "domain", "assumed" and "careful" (sentences), "checks"
        (numbers), "weights", "duration_s" and more.

    Raises:
        DatasetError: for a picture that can't be read or shows nothing.
        FileNotFoundError, ValueError: for weights or options that won't do, or a file of somebody
            else's in a view's place.
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
    azimuths, form = [360.0 * i / count for i in range(count)], "03.0f" if count <= 360 else "05.1f"
    files = {f"{a:g}": f"azimuth_{a:{form}}.png" for a in azimuths}
    stale = _stale(folder, {*files.values(), *_OTHERS}, Path(path))
    size = size_read = SHIPPED_SIZE
    network: cvs.CVS | None = None
    if weights is not None:
        network, splats = _trained(weights, device)
        size = network.config.image_size
        size_read = max(size, splats.config.image_size)
    photo = photos.read(path, elevation_deg=elevation_deg, size=size_read, domain=domain)
    inputs, careful, seen = photo.inputs.to(device), list(photo.careful), photo.domain
    if weights is None:
        try:
            network, splats = _shipped(seen, device)
        except FileNotFoundError as error:
            if seen == "objects":
                raise
            network, splats = _shipped(seen := "objects", device)
            careful.append(f"a decoder that has never seen a head draws this one: {error}")
    overridden = splats.gate_overridden or (network is not None and network.gate_overridden)
    cameras = view_cameras(photo.elevation_deg, size, count).to(device)
    draw, drawn = decoder.predictor(splats), []

    def render(inputs: InputImages, cameras: Cameras) -> Views:
        drawn.append(draw(inputs, cameras))
        return drawn[-1]

    rows = {}
    if network is not None:
        calls = "one network call a view" if steps == 1 else f"{steps} network calls a view"
        calls += "; the gate was overridden" if overridden else ""
        made = cvs.predictor(network, steps, seed, renderer=render)(inputs, cameras)
        rows[f"CVS, {calls}"] = made
    own = drawn[0] if drawn else draw(inputs, cameras)  # the mirrored input's come later
    rows["the decoder's Gaussians, rendered"] = own
    checks, doubts = _doubts(inputs.resized(size), own, seen)
    careful += doubts

    given = torch.cat([inputs.rgb, inputs.alpha[..., None]], dim=-1)[0].cpu().numpy()
    gaussians = decoder.prune(splats.world(inputs))[0].to("cpu").detach()
    result = {
        "input": str(path),
        "background": photo.background,
        "domain": photo.domain,
        "assumed": list(photo.assumed),
        "careful": careful,
        "checks": checks,
        "elevation_deg": photo.elevation_deg,
        "steps": steps,
        "seed": seed,
        "weights": "shipped" if weights is None else Path(weights).name,
        "gate_overridden": overridden,  # in the training of what draws
        "image_size": size,
        "files": files,
        "gaussians": {"count": gaussians.num, "files": [*map(str, splats_to)]},
        "duration_s": time.monotonic() - began,
    }
    folder.mkdir(parents=True, exist_ok=True)
    for old in stale:
        old.unlink()
    # first: what is named in it is ours, should this call be stopped halfway
    write_atomic(folder / "views.json", json.dumps(result, indent=2) + "\n")
    best = next(iter(rows.values()))
    rgba = torch.cat([best.rgb, best.alpha], dim=-1)[0].clamp(0, 1).cpu().numpy()
    shown = [*(rgba * 255 + 0.5).astype(np.uint8), given]
    for picture, file in zip(shown, (*files.values(), "input.png"), strict=True):
        alpha = np.maximum(picture[..., 3:].astype(np.float32), 1.0)  # straight: it is over black
        colour = np.minimum(picture[..., :3] * 255.0 / alpha + 0.5, 255).astype(np.uint8)
        straight = np.concatenate([colour, picture[..., 3:]], axis=-1)
        Image.fromarray(straight).save(folder / file, optimize=True)
    sheet = pictures.contact_sheet(
        [[given[..., :3], *style.to_uint8(views.rgb[0])] for views in rows.values()],
        columns=["input", *style.azimuth_labels(azimuths)],
        labels=[*rows],
        notes=[f"Careful: {sentence}" for sentence in careful],
    )
    Image.fromarray(sheet).save(folder / "contact_sheet.png", optimize=True)
    for place in splats_to:
        place.parent.mkdir(parents=True, exist_ok=True)
        of_spz = place.suffix.lower() == ".spz"
        (gaussians if of_spz else gaussians.transform(PLY_FROM_WORLD)).save(place)
    return result


def _stale(folder: Path, names: set[str], picture: Path) -> list[Path]:
    """Files of an earlier call in a folder; ValueError if another one is in the place of `names`,
    or the picture itself."""
    try:
        earlier = {*json.loads((folder / "views.json").read_text())["files"].values(), *_OTHERS}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        earlier = set[str]()  # not ours, or none
    ours = {name for name in earlier if re.fullmatch(_OURS, str(name))}
    for name in sorted(names):
        file = folder / name
        if file.exists() and (name not in ours or file.resolve() == picture.resolve()):
            raise ValueError(
                f"{file}: is not of an earlier call, and would be replaced; choose another folder"
            )
    return [folder / name for name in sorted(ours) if (folder / name).is_file()]


def _doubts(inputs: InputImages, own: Views, domain: str) -> tuple[dict[str, float], list[str]]:
    """What says whether views can be trusted, as numbers, and what speaks against it, in sentences.

    Args:
        inputs: one, as large as the views.
        own: the decoder's, the first of them from the input's camera.
        domain: what the decoder learned from.
    """
    limits = gate.GateConfig()
    psnr, iou = measure.identity(
        *(inputs.rgb[0].cpu(), inputs.alpha[0].cpu()),
        *(
            (value[0, 0].cpu() * 255 + 0.5).to(torch.uint8)
            for value in (own.rgb, own.alpha[..., 0])
        ),
    )
    checks, doubts = {"identity_psnr": psnr, "identity_iou": iou}, []
    if not (psnr >= limits.min_identity_psnr and iou >= limits.min_identity_iou):
        doubts.append(
            f"from the input's own camera it does not look like the input (PSNR {psnr:.1f} dB, at "
            f"least {limits.min_identity_psnr:g} is wanted; silhouettes overlap {iou:.0%}, at "
            f"least {limits.min_identity_iou:.0%})"
        )
    (nearness,) = distances.distance(inputs, domain)
    if not math.isnan(nearness.value):  # JSON has no NaN
        checks |= {"distance": nearness.value, "distance_percentile": nearness.percentile}
    if nearness.far or "distance" not in checks:
        doubts.append(nearness.sentence[0].lower() + nearness.sentence[1:].rstrip("."))
    elif nearness.percentile > RARE:
        doubts.append(
            f"of the pictures that the decoder learned from, {100 - nearness.percentile:.0f} % are "
            "as unlike the others as this one: its sides and its back are guesses"
        )
    return checks, doubts


def _shipped(domain: str, device: str) -> tuple[cvs.CVS | None, decoder.Decoder]:
    """The decoder of a domain that ships, and the CVS that adds to its renders; of faces None where
    none ships.  FileNotFoundError without the decoder."""
    if domain == "objects":
        return cvs.load_shipped(device, "cvs-twin"), decoder.load_shipped("pixel", device)
    splats = decoder.load_shipped("faces", device)
    try:
        network = cvs.load_shipped(device, "cvs-twin", domain)
    except FileNotFoundError:
        return None, splats
    return (network if network.decoder == splats.checksum() else None), splats


def _trained(file: str | Path, device: str) -> tuple[cvs.CVS, decoder.Decoder]:
    """A CVS, and the decoder whose renders it learned from: one that ships, or one beside it."""
    network = cvs.CVS.load(file, device)
    for kind in ("pixel", "faces"):
        with contextlib.suppress(FileNotFoundError):
            ships = decoder.load_shipped(kind, device)
            if network.decoder in ("", ships.checksum()):
                return network, ships
    for path in sorted(Path(file).resolve().parent.glob("*.safetensors")):
        if read_header(path).get("kind") == "decoder":
            found = decoder.Decoder.load(path, device)
            if found.checksum() == network.decoder:
                return network, found
    raise ValueError(
        f"{file}: learned from the renders of the decoder {network.decoder[:19]}, which is not the "
        f"one that ships; put that decoder's file into the same folder"
    )
