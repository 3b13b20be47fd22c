"""One object or scene seen by many cameras, in whatever format: described, then read.

A view becomes square as docs/data.md says.  Distortion is removed at the picture's own resolution
(or twice the wanted one, if that is less):
every pixel of an ideal pinhole with the same focal lengths and principal point takes the bilinear
mean of the four pixels that the lens model points at, in premultiplied colours; what lies
beyond the photograph is transparent.  Then the area average scales it down, as everywhere here.
"""

import functools
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation
from torch import Tensor
from torch.nn.functional import grid_sample

from fresnel.data import images
from fresnel.data.images import DatasetError, named
from fresnel.data.layout import inside, read_checked
from fresnel.data.records import ObjectViews
from fresnel.scene.cameras import Cameras

Floats = NDArray[np.float64]

MAX_VIEWS = 50_000
"""Longer descriptions are refused; `dataset.open(views=)` thins out what is below."""
MAX_RECORD_BYTES = 1 << 28
"""What the views of one object may take in memory; decides the default size of the pictures."""
LARGEST_SIDE, SMALLEST_SIDE = 512, 64
Lens = tuple[str, tuple[float, ...]]
"""COLMAP's name of a lens model, and what bends rays in it: its parameters after the focal lengths
and the principal point (https://colmap.github.io/cameras.html)."""


@dataclass(frozen=True, eq=False)
class View:
    """One picture and its camera, as the description states them."""

    image: str  # path below the dataset's folder
    viewmat: Floats  # OpenCV world-to-camera matrix (4, 4)
    K: Floats  # for a picture of ``size``, its corners at integers, (3, 3)
    size: tuple[int, int]  # width and height
    mask: str = ""  # its path; "": none
    lens: Lens = ("PINHOLE", ())


@dataclass(frozen=True, eq=False)
class Capture:
    """Pictures of one thing and their cameras, in a world whose Y is up.

    A reader leaves open what its description does not say; `prepare` fills it in.
    """

    name: str  # unique within a dataset
    views: tuple[View, ...]
    descriptions: dict[str, str]  # the files that all this was read from, and their sha256
    notes: dict[str, Any]  # what was assumed, for ``meta``

    @property
    def viewmats(self) -> Floats:
        return np.stack([view.viewmat for view in self.views])

    @property
    def pictures(self) -> set[str]:
        """Every picture and mask that reading this capture reads."""
        return {path for view in self.views for path in (view.image, view.mask) if path}


def collect(
    where: str | Path,
    name: str,
    views: Sequence[View],
    descriptions: Mapping[str, str],
    kind: str,
    turn: Floats | None = None,
    warned: Sequence[str] = (),
) -> Capture:
    """A capture from views, which are checked; ``where`` is for messages.

    Args:
        turn: rotation (3, 3) from the description's world into ours; None: the world has no
            vertical, and `upright` finds one.
        warned: sentences on what is not as it should be; they go to ``meta`` and to Python's
            warnings.

    Raises:
        DatasetError: if there are none or too many, two share a picture, or a pose, intrinsics or
            size are impossible.
    """
    if not 1 <= len(views) <= MAX_VIEWS:
        said = f"describes {len(views)} views; want at least one, the limit is {MAX_VIEWS}"
        raise DatasetError(f"{where}: {said}. Split it up")
    seen: set[str] = set()
    for view in views:
        if view.image in seen:
            raise DatasetError(f"{where}: two views share the picture {view.image!r}")
        seen.add(view.image)
        with named(f"{where}: picture {view.image!r}"):
            viewmat, K = torch.from_numpy(view.viewmat), torch.from_numpy(view.K)
            Cameras(viewmat, K, *view.size).validate()
            if not np.isfinite(view.lens[1]).all():
                raise ValueError("the lens holds NaN or infinity. Fix what wrote it")
    up = "mean of the cameras' up directions" if turn is None else "the file's Z"
    turn = upright(np.stack([view.viewmat for view in views])) if turn is None else turn
    world = np.eye(4)
    world[:3, :3] = turn.T
    turned = tuple(replace(view, viewmat=view.viewmat @ world) for view in views)
    notes: dict[str, Any] = {"world_from_file": turn.tolist(), "format": kind, "up": up}
    if warned:
        notes["warnings"] = list(warned)
    for sentence in warned:
        warnings.warn(f"{where}: {sentence}", stacklevel=2)
    return Capture(name, turned, dict(descriptions), notes)


def pinhole(fx: float, fy: float, cx: float, cy: float) -> Floats:
    return np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1]], dtype=np.float64)


def upright(viewmats: Floats) -> Floats:
    """Rotation (3, 3) that takes the cameras' mean up direction to Y; the identity if they differ.

    For worlds without a known vertical (COLMAP, CO3D): photographers hold cameras upright.
    """
    up = -viewmats[:, 1, :3].mean(axis=0)
    if not np.linalg.norm(up) > 0.1:
        return np.eye(3)
    return Rotation.align_vectors([[0.0, 1.0, 0.0]], [up])[0].as_matrix()


def centers(viewmats: Floats) -> Floats:
    return -np.einsum("vji,vj->vi", viewmats[:, :3, :3], viewmats[:, :3, 3])


def nearest_to_axes(viewmats: Floats) -> Floats:
    """The point (3,) whose squared distances to the optical axes sum to the least.

    Parallel axes leave its place along them open; then it lies as near as possible to the mean
    of the cameras' positions plus their mean spread along the mean direction.
    """
    c, d = centers(viewmats), viewmats[:, 2, :3]
    across = np.eye(3) - d[:, :, None] * d[:, None, :]
    spread = np.linalg.norm(c - c.mean(axis=0), axis=1).mean()
    guess = c.mean(axis=0) + d.mean(axis=0) * (spread if spread > 0 else 1.0)
    weak = 1e-6 * len(c)  # too weak to move a point that the axes determine
    A = across.sum(axis=0) + weak * np.eye(3)
    return np.linalg.solve(A, np.einsum("vij,vj->i", across, c - guess)) + guess


def frontal(viewmats: Floats, pivot: Floats) -> int:
    """Which view acts as the input: the first, or the middle one of a capture from one side.

    From one side: the mean of the unit directions from the pivot to the cameras is longer than
    a half; the middle one is nearest to that mean.
    """
    offset = centers(viewmats) - pivot
    direction = offset / np.maximum(np.linalg.norm(offset, axis=1, keepdims=True), 1e-12)
    mean = direction.mean(axis=0)
    return int((direction @ mean).argmax()) if np.linalg.norm(mean) > 0.5 else 0


def prepare(
    root: Path, found: Sequence[Capture], image_size: int | None, views: int | None
) -> tuple[list[Capture], int, dict[str, Any]]:
    """Captures thinned to ``views`` and completed, the side of their pictures, and ``meta``.

    The side, unless ``image_size`` states it, is the smallest natural one, at most `LARGEST_SIDE`,
    less if one object's views would take more than `MAX_RECORD_BYTES`.

    Raises:
        DatasetError: if a capture has fewer views, or all of one don't fit into memory.
    """
    for name, value in (("image_size", image_size), ("views", views)):
        if value is not None and not 1 <= value <= 100_000:
            raise ValueError(f"{name}: got {value}, want at least 1")
    chosen: list[Capture] = []
    side = LARGEST_SIDE
    for capture in found:
        count, whole = len(capture.views), capture.views
        if views is not None and views > count:
            raise DatasetError(f"{root}: {capture.name!r} has {count} views, views asks {views}")
        rows = np.linspace(0, count - 1, views or count).round().astype(int)
        thinned = replace(capture, views=tuple(whole[row] for row in rows))
        pivot = nearest_to_axes(thinned.viewmats)
        first, said = inside(root, thinned.views[0].image), capture.notes.get("warnings", [])
        alpha = images.load_image(first, rotate=False)[1]
        if images.orientation(images.decoded(first, pixels=False)) > 1:
            ignored = "the EXIF rotation of its pictures is ignored: poses are of what is stored"
            warnings.warn(f"{root}: {capture.name}: {ignored}", stacklevel=2)
            said = [*said, ignored]
        source = "file" if bool((alpha < 255).any()) else "none"
        source = "mask" if any(view.mask for view in thinned.views) else source
        side = min(side, min(alpha.shape) if source == "none" else max(alpha.shape))
        notes = {
            "input": thinned.views[frontal(thinned.viewmats, pivot)].image,
            "pivot": pivot.tolist(),
            "alpha_source": source,
            "views": len(rows),
            "views_left_out": count - len(rows),
            **capture.notes,
            **({"warnings": said} if said else {}),
        }
        chosen.append(replace(thinned, notes=notes))
    most = max(len(capture.views) for capture in chosen)
    affordable = int((MAX_RECORD_BYTES / (4 * most)) ** 0.5)
    if affordable < min(image_size or side, SMALLEST_SIDE):
        raise DatasetError(
            f"{root}: an object of {most} views doesn't fit into {MAX_RECORD_BYTES >> 20} MB "
            f"even at {SMALLEST_SIDE} px. Pass views= to take fewer, evenly spaced"
        )
    kinds = {capture.notes["alpha_source"] for capture in chosen}
    meta: dict[str, Any] = {
        "source": "captures",
        "elevation_is_assumed": False,
        "alpha_source": kinds.pop() if len(kinds) == 1 else "mixed",
        "warnings": [
            f"{capture.name}: {sentence}"
            for capture in chosen
            for sentence in capture.notes.get("warnings", ())
        ],
        "objects": {capture.name: capture.notes for capture in chosen},
    }
    return chosen, image_size or min(side, affordable), meta


def read(root: Path, capture: Capture, side: int, digests: dict[str, str]) -> ObjectViews:
    """Every view of a capture at ``side`` x ``side`` pixels; one of them acts as the input too.

    Raises:
        DatasetError: if a picture or mask can't be read, doesn't have the stated proportions, or
            another sha256 than ``digests`` has for its path.
    """
    opaque = capture.notes["alpha_source"] == "none"
    with ThreadPoolExecutor(2) as pool:
        done = pool.map(lambda view: _read_view(root, view, side, opaque, digests), capture.views)
        pictures, Ks = zip(*done, strict=True)
    rgba, mats = torch.stack(pictures), torch.from_numpy(capture.viewmats).float()
    cameras = Cameras(mats, torch.from_numpy(np.stack(Ks)).float(), side, side)
    first = [view.image for view in capture.views].index(capture.notes["input"])
    seen = rgba[first, ..., :3], rgba[first, ..., 3], cameras[first]
    pivot, views = torch.tensor(capture.notes["pivot"]), (rgba[..., :3], rgba[..., 3], cameras)
    with named(root / next(iter(capture.descriptions))):
        return ObjectViews(capture.name, *seen, *views, pivot)


def _read_view(
    root: Path, view: View, side: int, opaque: bool, digests: dict[str, str]
) -> tuple[Tensor, Floats]:
    """Premultiplied rgba uint8 (side, side, 4) and K (3, 3)."""

    def load(path: str, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        data = read_checked(root, path, digests[path])
        rgb, alpha = images.load_image(root / path, rotate=False, data=data)
        (height, width), (w, h) = alpha.shape, size
        if abs(w * height - h * width) > 0.02 * max(w * height, h * width):
            quarter = images.orientation(images.decoded(path, data, pixels=False)) > 4
            turned = " (its EXIF data turn it by a quarter, which tools do or don't)"
            raise DatasetError(
                f"{root / path}: is {width} x {height} pixels, want the proportions of {w} x {h}, "
                f"which its description or picture has{turned if quarter else ''}. Restore it, or "
                "describe it anew"
            )
        return rgb, alpha

    rgb, alpha = load(view.image, view.size)
    height, width = alpha.shape
    if view.mask:
        grey, cover = load(view.mask, (width, height))
        mask = grey.amax(dim=-1) if bool((cover == 255).all()) else cover
        if bool((mask <= 1).all()):  # 1 stands for the object, as nerfstudio reads it
            mask = mask * 255
        if mask.shape != alpha.shape:
            mask = images.resize(mask[..., None], (height, width))[..., 0]
        alpha = ((mask.to(torch.int32) * alpha + 127) // 255).to(torch.uint8)
        rgb = ((rgb.to(torch.int32) * alpha[..., None] + 127) // 255).to(torch.uint8)
    rgba = torch.cat([rgb, alpha[..., None]], dim=-1)
    K = _scaled(view.K, view.size, (width, height))  # downscaled copies (images_4/) keep poses
    if any(view.lens[1]) or "FISHEYE" in view.lens[0]:
        factor = max(1.0, min(height, width) / (2 * side))
        size = round(height / factor), round(width / factor)
        if factor > 1:
            rgba, K = images.resize(rgba, size), _scaled(K, (width, height), size[::-1])
        height, width = size
        grid = _grid((K[0, 0], K[1, 1], K[0, 2], K[1, 2]), view.lens, width, height)
        picture = rgba.permute(2, 0, 1)[None].float()
        found = grid_sample(picture, grid, padding_mode="zeros", align_corners=False)
        rgba = (found[0].permute(1, 2, 0) + 0.5).clamp(0, 255).to(torch.uint8)
    length = min(height, width) if opaque else max(height, width)
    square, x0, y0 = images.squared(rgba, length)
    K = _scaled(K - np.array([[0, 0, x0], [0, 0, y0], [0, 0, 0]]), (length,) * 2, (side,) * 2)
    return images.resize(square, side) if side != length else square, K


def _scaled(K: Floats, old: tuple[int, ...], new: tuple[int, ...]) -> Floats:
    """K for a picture scaled from one width and height to another."""
    return K * np.array([[new[0] / old[0]], [new[1] / old[1]], [1.0]])


@functools.lru_cache(maxsize=4)  # one lens, a few at most; one a view would fill the memory
def _grid(optics: tuple[float, float, float, float], lens: Lens, width: int, height: int) -> Tensor:
    """For `grid_sample`: where in the photograph each pixel of a pinhole's picture is."""
    focals, middle = np.array(optics[:2]), np.array(optics[2:])
    pixels = np.stack(np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5), axis=-1)
    bent = distorted(((pixels - middle) / focals).reshape(-1, 2), lens).reshape(pixels.shape)
    places = 2 * (bent * focals + middle) / [width, height] - 1
    places = np.nan_to_num(places, nan=9.0, posinf=9.0, neginf=-9.0).clip(-9.0, 9.0)
    return torch.from_numpy(places.astype(np.float32))[None]


def distorted(rays: Floats, lens: Lens) -> Floats:
    """Where the lens puts the rays (x, y, 1) of shape (N, 2), in focal lengths: (N, 2).

    Rays beyond the radius where the lens' polynomial turns back have no place in the picture;
    they come out as NaN.
    """
    import pycolmap

    camera = pycolmap.Camera.create_from_model_name(0, lens[0], 1.0, 0, 0)
    params = np.array(camera.params)
    params[list(camera.extra_params_idxs())] = lens[1]
    camera.params = params.tolist()
    # a little further out, and as they are
    ahead, placed = (
        np.asarray(camera.img_from_cam(np.insert(rays * scale, 2, 1.0, axis=1)), np.float64)
        for scale in (1.0 + 1e-5, 1.0)
    )
    with np.errstate(all="ignore"):
        grows = ((ahead - placed) * placed).sum(axis=1) > 0
        same_side = (placed * rays).sum(axis=1) > 0
    centre = np.abs(rays).max(axis=1) < 1e-9
    return np.where(((grows & same_side) | centre)[:, None], placed, np.nan)
