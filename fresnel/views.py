"""One picture -> novel views of what it shows, and its Gaussians, as files a person can open.

`./run_all.sh views photo.jpg` writes the folder photo-views.
"""

import contextlib
import json
import math
import re
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from fresnel import gate
from fresnel.data import photos
from fresnel.data.images import InputImages
from fresnel.evaluation import domain as distances
from fresnel.gate import measure
from fresnel.host.files import write_atomic
from fresnel.models import cvs, decoder
from fresnel.models.weights import held_out, read_header
from fresnel.render import Views, render
from fresnel.scene.cameras import Cameras, standard_orbit
from fresnel.show import pictures, scenes, style

PLY_FROM_WORLD = torch.diag(torch.tensor([1.0, -1.0, -1.0, 1.0]))
"""3DGS's files have COLMAP's axes, x right, y down, z forward; our world's Y is up."""
MOST_VIEWS, MOST_PIXELS = 3600, 2048
SHIPPED_SIZE = 128
"""Pixels that what ships sees and draws."""
_DOMAINS = ("faces", "objects")
RARE = 95.0
"""Per cent of the training pictures that lie nearer to the others: said where it is more."""
_BESIDE = ("input.png", "contact_sheet.png", "turntable.webp", "viewer.html")
_OURS = r"(cvs_)?azimuth_\d{3}(\.\d)?\.png|object\.(ply|spz)|" + "|".join(map(re.escape, _BESIDE))
_AT_ONCE, _SHEET_PX = 12, 200
_OVERRIDDEN = "; the gate was overridden"


def view_cameras(elevation_deg: float, size: int, count: int = 8) -> Cameras:
    """Cameras (1, count) about the object, evenly spread from azimuth 0, the input's, onwards."""
    azimuth = torch.arange(count) * (360.0 / count)
    return standard_orbit(azimuth[None], elevation_deg, size)


def write_views(
    path: str | Path,
    out: str | Path | None = None,
    *,
    domain: str = "auto",
    weights: str | Path | None = None,
    elevation_deg: float | None = None,
    steps: int = 1,
    count: int = 8,
    size: int = 512,
    seed: int = 0,
    ply: str | Path | None = None,
    spz: str | Path | None = None,
    device: str = "cpu",
) -> dict[str, Any]:
    """The object or head in a picture from all sides: by the decoder's Gaussians, and by CVS.

    Writes into `out`: azimuth_000.png, azimuth_045.png ... of the Gaussians, `size` pixels that the
    object fills (RGBA, straight alpha; degrees from the input camera, growing as the camera moves
    to its right); cvs_azimuth_000.png ... as large as the CVS makes them; turntable.webp, 36 of the
    Gaussians; viewer.html, in which to turn them (where viser is installed); object.ply and
    object.spz; input.png; contact_sheet.png (all of it, and what to be careful of); and views.json,
    which holds what is returned. What an earlier call left there goes; other files stay.

    Args:
        out: None: the picture's name and "-views", where the command is called.
        domain: "objects", "faces", or "auto": faces where a face is found; see `photos.read`.
        weights: a CVS checkpoint; None: what ships for the domain: of objects the twin, which adds
            to the decoder's renders; of faces the decoder alone. One that learned from another
            decoder than the one that ships draws with that, which must lie in the same folder.
        elevation_deg: of the input camera, and of the views; None: its domain's.
        steps: network calls per view.
        ply, spz: where the Gaussians go instead. They are solid at any resolution (`scenes.scene`),
            and stand upright where viewers take files as they are meant: PLY as 3DGS writes it (y
            down, z forward; SuperSplat and others turn it over), SPZ by its definition (y up).

    Returns:
        "files" and "cvs_files" by azimuth, "first" ("gaussians" or "cvs": what the sheet shows
        first) and "because", "background", "domain", "assumed" and "careful" (sentences), "checks"
        (numbers), "weights", "duration_s" and more.

    Raises:
        DatasetError: for a picture that can't be read or shows nothing.
        FileNotFoundError, ValueError: for weights or options that won't do, or a file of somebody
            else's in a view's place.
    """
    began = time.monotonic()
    folder = Path(f"{Path(path).stem}-views" if out is None else out)
    for holds, problem in (
        (steps >= 1, f"steps: got {steps}, want at least 1"),
        (1 <= count <= MOST_VIEWS, f"views: got {count}, want 1 to {MOST_VIEWS}"),
        (16 <= size <= MOST_PIXELS, f"size: got {size}, want 16 to {MOST_PIXELS} pixels"),
        (folder.is_dir() or not folder.exists(), f"{folder}: is a file; want a folder for views"),
        (str(ply or ".ply").lower().endswith(".ply"), f"{ply}: want a name that ends in .ply"),
        (str(spz or ".spz").lower().endswith(".spz"), f"{spz}: want a name that ends in .spz"),
    ):
        if not holds:
            raise ValueError(problem)
    azimuths, form = [360.0 * i / count for i in range(count)], "03.0f" if count <= 360 else "05.1f"
    files = {f"{a:g}": f"azimuth_{a:{form}}.png" for a in azimuths}
    splats_to = [Path(ply or folder / "object.ply"), Path(spz or folder / "object.spz")]
    inside = [file.name for file, given in zip(splats_to, (ply, spz), strict=True) if given is None]
    cvs_files = {azimuth: f"cvs_{name}" for azimuth, name in files.items()}
    named = [*files.values(), *cvs_files.values(), *inside, *_BESIDE]
    stale = _stale(folder, {*named}, Path(path))
    cvs_size = size_read = SHIPPED_SIZE
    network: cvs.CVS | None = None
    if weights is not None:
        network, splats = _trained(weights, device)
        cvs_size = network.config.image_size
        size_read = max(cvs_size, splats.config.image_size)
    photo = _photo(path, elevation_deg=elevation_deg, size=size_read, domain=domain)
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
    cameras = view_cameras(photo.elevation_deg, cvs_size, count).to(device)
    with torch.no_grad():
        gaussians = splats.world(inputs)
        own = decoder.render_small(
            decoder.prune(gaussians), cameras, render_size=splats.render_size
        )
    checks, doubts = _doubts(inputs.resized(cvs_size), own, seen)
    careful += doubts
    first, because, made = "gaussians", "no CVS that learned from this decoder ships", None
    if network is not None:
        first, because = _first(network)
        kept, draw = [own], decoder.predictor(splats)  # a CVS asks for that, then for the mirrored
        renderer = lambda given, at: kept.pop() if kept else draw(given, at)  # noqa: E731
        made = cvs.predictor(network, steps, seed, renderer=renderer)(inputs, cameras)
    shown = scenes.scene(
        *(gaussians[0], cameras[0], inputs.cameras[0], torch.zeros(3)),
        most=None,
        drawn_at=splats.render_size,
    )
    if not shown.gaussians.num:
        raise ValueError(f"{path}: what was made of it is invisible; try another picture")
    result = {
        "input": str(path),
        "folder": str(folder),
        "no_viewer": "",
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
        "first": first,
        "because": because,
        "image_size": size,
        "files": files,
        "cvs_image_size": cvs_size,
        "cvs_files": {} if network is None else cvs_files,
        "beside": [*inside, *_BESIDE],
        "gaussians": {"count": shown.gaussians.num, "files": [*map(str, splats_to)]},
    }
    folder.mkdir(parents=True, exist_ok=True)
    for old in stale:
        old.unlink()
    # first: what is named in it is ours, should this call be stopped halfway
    write_atomic(folder / "views.json", json.dumps(result, indent=2) + "\n")
    _write_pictures(folder, result, shown, inputs, made)
    for place in splats_to:
        place.parent.mkdir(parents=True, exist_ok=True)
        of_spz = place.suffix.lower() == ".spz"
        (shown.gaussians if of_spz else shown.gaussians.transform(PLY_FROM_WORLD)).save(place)
    try:
        title = f"{Path(path).name} in 3D{_OVERRIDDEN * overridden}"
        document = scenes.page(shown, title)
        write_atomic(folder / "viewer.html", document)
    except (ImportError, OSError) as error:
        result["no_viewer"] = f"viewer.html could not be made: {error}; pip install -e '.[viewer]'"
    result["duration_s"] = time.monotonic() - began
    write_atomic(folder / "views.json", json.dumps(result, indent=2) + "\n")
    return result


def sentences(made: dict[str, Any]) -> list[str]:
    """What `write_views` returned, for whoever called the command: what speaks against it last."""
    first = {"gaussians": "the Gaussians' views", "cvs": "the CVS's views"}[made["first"]]
    overridden = "gate overridden: these weights learned from data that the gate refused"
    shown = ("contact_sheet.png", "turntable.webp", "viewer.html")[: 3 - bool(made["no_viewer"])]
    return [
        *(f"assumed: {sentence}" for sentence in made["assumed"]),
        *([overridden] if made["gate_overridden"] else []),
        f"shown first: {first}; {made['because']}",
        *(f"{file}: {made['gaussians']['count']} Gaussians" for file in made["gaussians"]["files"]),
        f"{len(made['files'])} views in {made['duration_s']:.1f} s",
        *(str(Path(made["folder"]) / name) for name in shown),
        *([made["no_viewer"]] if made["no_viewer"] else []),
        *(f"careful: {sentence}" for sentence in made["careful"]),
    ]


def _first(network: cvs.CVS) -> tuple[str, str]:
    """What is shown first, "gaussians" or "cvs", and why: on held-out objects its views are
    perceptually nearer to the truth."""
    known = held_out(network)
    if not {"cvs", "decoder"} <= {*known}:
        return "gaussians", "how near to the truth these weights' views are is not in their file"
    ours, theirs = known["cvs"], known["decoder"]
    near, far = sorted((ours, theirs))
    return (
        "cvs" if ours < theirs else "gaussians",
        f"on held-out objects their perceptual distance to the truth is {near:.1f}, that of the "
        f"{'Gaussians' if ours < theirs else 'CVS'} {far:.1f} (1 is a shift by one pixel)",
    )


def _write_pictures(
    folder: Path,
    result: dict[str, Any],
    shown: scenes.Scene,
    inputs: InputImages,
    made: Views | None,
) -> None:
    """The views of the Gaussians and of the CVS, the input, the turntable and the sheet."""
    with ThreadPoolExecutor(1) as beside:  # encoding, which leaves the other core free
        turning = scenes.turntable(shown)
        turned = beside.submit(scenes.save_turntable, turning, folder / "turntable.webp")
        sheet = _write_stills(folder, result, shown, inputs, made)
        Image.fromarray(sheet).save(folder / "contact_sheet.png")
        turned.result()


def _write_stills(
    folder: Path,
    result: dict[str, Any],
    shown: scenes.Scene,
    inputs: InputImages,
    made: Views | None,
) -> np.ndarray:
    """The views of the Gaussians and of the CVS, and the input; returns the sheet of them."""
    count, size = len(result["files"]), result["image_size"]
    frames = scenes.fitted(shown.gaussians, shown.cameras, size)
    on_sheet, rows = range(0, count, -(-count // 8)), dict[str, list[np.ndarray]]()

    def put(picture: np.ndarray, name: str, row: str, i: int, camera: Cameras) -> None:
        Image.fromarray(picture).save(folder / name)
        if i in on_sheet:
            rows.setdefault(row, []).append(_framed(picture, camera, frames[i]))

    given = torch.cat([inputs.rgb, inputs.alpha[..., None]], dim=-1)[0].cpu().numpy()
    alpha = np.maximum(given[..., 3:].astype(np.float32), 1.0)  # straight: it is over black
    given[..., :3] = np.minimum(given[..., :3] * 255.0 / alpha + 0.5, 255).astype(np.uint8)
    put(given, "input.png", "input", 0, inputs.cameras[0])
    for start in range(0, count, _AT_ONCE):
        part = frames[start : start + _AT_ONCE]
        for i, picture in enumerate(scenes.straight(render(shown.gaussians, part)), start):
            put(picture, [*result["files"].values()][i], "gaussians", i, frames[i])
    for i, picture in enumerate(() if made is None else scenes.straight(made)):
        put(picture, [*result["cvs_files"].values()][i], "cvs", i, shown.cameras[i])
    calls = "one network call" if result["steps"] == 1 else f"{result['steps']} network calls"
    stamp = _OVERRIDDEN * result["gate_overridden"]
    labels = {
        "gaussians": f"the decoder's Gaussians ({size} px){stamp}",
        "cvs": f"CVS, {calls} a view ({result['cvs_image_size']} px){stamp}",
    }
    order = sorted(rows.keys() - {"input"}, key=lambda row: row != result["first"])
    azimuths = [float(azimuth) for azimuth in result["files"]]
    return pictures.contact_sheet(
        [rows["input"] + rows[row] for row in order],
        columns=["input", *style.azimuth_labels([azimuths[i] for i in on_sheet])],
        labels=[labels[row] for row in order],
        notes=[f"Careful: {sentence}" for sentence in result["careful"]],
    )


def _framed(rgba: np.ndarray, camera: Cameras, frame: Cameras) -> np.ndarray:
    """A picture of one camera, cropped as `frame` sees it from there, for the sheet: RGB uint8."""
    (fx, _, cx), (_, fy, cy) = camera.Ks[:2].tolist()
    (to_fx, _, to_cx), (_, to_fy, to_cy) = frame.Ks[:2].tolist()
    left, top = cx - to_cx * fx / to_fx, cy - to_cy * fy / to_fy
    right, bottom = left + frame.width * fx / to_fx, top + frame.height * fy / to_fy
    height, width = rgba.shape[:2]
    more = math.ceil(max(0.0, -left, -top, right - width, bottom - height))
    ground = (scenes.GROUND,) * 3
    picture = ImageOps.expand(Image.fromarray(scenes.on_ground(rgba)), more, ground)
    box = tuple(more + edge for edge in (left, top, right, bottom))
    return np.asarray(picture.resize((_SHEET_PX, _SHEET_PX), Image.Resampling.LANCZOS, box))


def _stale(folder: Path, names: set[str], picture: Path) -> list[Path]:
    """Files of an earlier call in a folder; ValueError if another one is in the place of `names`,
    or the picture itself."""
    try:
        facts = json.loads((folder / "views.json").read_text())
        earlier = {*facts["files"].values(), *facts["cvs_files"].values(), *facts["beside"]}
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


def _photo(path: str | Path, *, domain: str, **asked: Any) -> photos.Photo:
    """`photos.read`, but a thing on which a face was found is a thing all the same.

    As a head it lies farther from the heads that the decoder learned from than 99 % of these from
    one another, and twice as far as it lies, as a thing, from the objects: a teddy bear 2.4 times,
    15 made heads at most 1.2, the astronaut 1.4. Photographs before a background lie far from
    both, and are not asked."""
    photo = photos.read(path, domain=domain, **asked)
    if domain == "auto" and photo.domain == "faces" and photo.background in ("alpha", "plain"):
        thing = photos.read(path, domain="objects", **asked)
        (head,), (other,) = map(distances.distance, (photo.inputs, thing.inputs), _DOMAINS)
        if head.far and head.value > 2 * other.value:
            said = "a face was found, but as a whole it is like a thing (--domain faces: a head)"
            return replace(thing, assumed=(said, *thing.assumed))
    return photo


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
        return cvs.load_shipped(device, "cvs-warp"), decoder.load_shipped("pixel", device)
    splats = decoder.load_shipped("faces", device)
    try:
        network = cvs.load_shipped(device, "cvs-warp", domain)
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
