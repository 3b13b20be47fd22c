"""One object or scene seen by many cameras, in whatever format: described, then read.

A view becomes square as an input image does: an opaque photograph is cropped to its central
square, a picture with alpha or a mask is padded to one, so that nothing of the object is lost.
Distortion is removed at the picture's own resolution (or twice the wanted one, if that is less):
every pixel of an ideal pinhole with the same focal lengths and principal point takes the bilinear
mean of the four pixels that the lens model points at, in premultiplied colours; what lies
beyond the photograph is transparent.  Then the area average scales it down, as everywhere here.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation
from torch import Tensor
from torch.nn.functional import grid_sample, interpolate

from fresnel.data.images import (
    DatasetError,
    decoded,
    has_alpha,
    load_image,
    named,
    resize,
    squared,
)
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
    """One picture and its camera, as the description states them.

    Args:
        image: path relative to the dataset's folder; ``mask`` too, "" where there is none.
        viewmat: OpenCV world-to-camera matrix (4, 4).
        K: pixels of a picture of ``size``, corners at integers, (3, 3).
        size: width and height that ``K`` is for.
    """

    image: str
    viewmat: Floats
    K: Floats
    size: tuple[int, int]
    mask: str = ""
    lens: Lens = ("PINHOLE", ())


@dataclass(frozen=True, eq=False)
class Capture:
    """Pictures of one thing and their cameras.

    Args:
        name: unique within a dataset.
        views: in a world whose Y is up.
        descriptions: the files that all this was read from.
        world_from_file: rotation (3, 3) from the description's world into ours.
        notes: what the reader assumed, for ``meta``.
        pivot: what the cameras turn about if the description says so, else None: estimated.
        input_image: which view acts as the input if the description says so, else "": chosen.
        files: sha256 of everything that is read, by path; filled by `dataset.open`.
    """

    name: str
    views: tuple[View, ...]
    descriptions: tuple[str, ...]
    world_from_file: Floats
    notes: dict[str, Any]
    pivot: Floats | None = None
    input_image: str = ""
    attribution: str = ""
    files: dict[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.views)

    @property
    def viewmats(self) -> Floats:
        return np.stack([view.viewmat for view in self.views])

    @property
    def paths(self) -> list[str]:
        """Every file that reading this capture reads, relative to the dataset's folder."""
        pictures = {path for view in self.views for path in (view.image, view.mask) if path}
        return sorted({*pictures, *self.descriptions})


def collect(
    where: str | Path,
    name: str,
    views: Sequence[View],
    descriptions: Sequence[str],
    kind: str,
    turn: Floats | None = None,
    **more: Any,
) -> Capture:
    """A capture from views, which are checked; ``where`` is for messages.

    Args:
        turn: rotation (3, 3) from the description's world into ours; None: the world has no
            vertical, and `upright` finds one.

    Raises:
        DatasetError: if there are none or too many, two share a picture, or a number is not finite,
            a rotation not a rotation, a focal length not positive or a size absurd.
    """
    if not 1 <= len(views) <= MAX_VIEWS:
        said = f"describes {len(views)} views; want at least one, the limit is {MAX_VIEWS}"
        raise DatasetError(f"{where}: {said}. Split it up")
    seen: set[str] = set()
    for view in views:
        if view.image in seen:
            raise DatasetError(f"{where}: two views share the picture {view.image!r}")
        seen.add(view.image)
        if bad := _fault(view):
            raise DatasetError(f"{where}: {bad} (picture {view.image!r}). Fix what wrote it")
    up = "the file's Z"
    if turn is None:
        turn, up = (
            upright(np.stack([v.viewmat for v in views])),
            "mean of the cameras' up directions",
        )
    world = np.eye(4)
    world[:3, :3] = turn.T
    turned = tuple(replace(view, viewmat=view.viewmat @ world) for view in views)
    notes = {"format": kind, "up": up}
    return Capture(name, turned, tuple(descriptions), turn, notes, **more)


def _fault(view: View) -> str:
    if not (np.abs(view.viewmat) < 1e12).all():  # NaN is not less
        return "a pose is not finite"
    rotation = view.viewmat[:3, :3]
    error = np.abs(rotation @ rotation.T - np.eye(3)).max()
    if error > 1e-3:
        return f"a pose is not a rotation (R R^T is off by {error:.3g})"
    if np.linalg.det(rotation) < 0:
        return "a pose is a mirror"
    if not (np.abs([*view.K.ravel(), *view.lens[1]]) <= 1e7).all():
        return "intrinsics hold NaN, infinity or absurd numbers"
    if min(view.K[0, 0], view.K[1, 1]) <= 0:
        return "intrinsics want focal lengths > 0"
    return "" if 0 < min(view.size) <= max(view.size) <= 1_000_000 else "an image size is absurd"


def pinhole(fx: float, fy: float, cx: float, cy: float) -> Floats:
    return np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1]], dtype=np.float64)


# --- what the description leaves open ----------------------------------------------------------


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


def pivot_of(capture: Capture) -> Floats:
    return nearest_to_axes(capture.viewmats) if capture.pivot is None else capture.pivot


def input_of(capture: Capture) -> int:
    said = [k for k, view in enumerate(capture.views) if view.image == capture.input_image]
    return said[0] if said else frontal(capture.viewmats, pivot_of(capture))


def first_look(root: Path, capture: Capture) -> tuple[str, int]:
    """Where the alpha comes from, "mask", "file" or "none" (judged by the first view), and the
    side in pixels of the square that this view becomes without scaling."""
    path, source = inside(root, capture.views[0].image), "none"
    if any(view.mask for view in capture.views):
        source = "mask"
    elif has_alpha(path) and bool((load_image(path, rotate=False)[1] < 255).any()):
        source = "file"
    size = decoded(path, pixels=False).size
    return source, min(size) if source == "none" else max(size)


def common_side(where: Path, sides: Sequence[int], views: int) -> int:
    """One size for all pictures: the smallest natural one, at most `LARGEST_SIDE`, less if one
    object's ``views`` would take more than `MAX_RECORD_BYTES`."""
    side = min([*sides, LARGEST_SIDE])
    affordable = int((MAX_RECORD_BYTES / (4 * views)) ** 0.5)
    if affordable < min(side, SMALLEST_SIDE):
        raise DatasetError(
            f"{where}: an object of {views} views doesn't fit into {MAX_RECORD_BYTES >> 20} MB "
            f"even at {SMALLEST_SIDE} px. Pass views= to take fewer, evenly spaced"
        )
    return min(side, affordable)


def prepare(
    root: Path, found: Sequence[Capture], image_size: int | None, views: int | None
) -> tuple[list[Capture], int, dict[str, Any]]:
    """Captures thinned to ``views``, the common side of their pictures, and what to say of them.

    Raises:
        DatasetError: if a capture has fewer views, or all of one don't fit into memory.
    """
    for name, value in (("image_size", image_size), ("views", views)):
        if value is not None and not 1 <= value <= 100_000:
            raise ValueError(f"{name}: got {value}, want at least 1")
    chosen = [_thinned(root, capture, views) for capture in found]
    looks = [first_look(root, capture) for capture in chosen]
    most = max(len(capture) for capture in chosen)
    affordable = common_side(root, [image_size or min(side for _, side in looks)], most)
    kinds = {source for source, _ in looks}
    estimated = "nearest point to the optical axes"
    meta: dict[str, Any] = {
        "source": "captures",
        "formats": sorted({str(capture.notes["format"]) for capture in chosen}),
        "elevation_is_assumed": False,
        "alpha_source": kinds.pop() if len(kinds) == 1 else "mixed",
        "input": "one of the views acts as the input: the one its description names, the middle "
        "one of a capture from one side, else the first",
        "undistorted": any(_bends(view.lens) for c in chosen for view in c.views),
        "scale": "the capture's own",
        "objects": {
            capture.name: {
                "input": capture.views[input_of(capture)].image,
                "pivot": pivot_of(capture).tolist(),
                "pivot_source": estimated if capture.pivot is None else "description",
                "alpha_source": source,
                "views": len(capture),
                "views_left_out": len(whole) - len(capture),
                "world_from_file": capture.world_from_file.tolist(),
                **capture.notes,
            }
            for capture, whole, (source, _) in zip(chosen, found, looks, strict=True)
        },
    }
    return chosen, image_size or affordable, meta


def _thinned(root: Path, capture: Capture, views: int | None) -> Capture:
    """Evenly spaced views, the declared input among them."""
    if views is None or views == len(capture):
        return capture
    if views > len(capture):
        raise DatasetError(f"{root}: {capture.name!r} has {len(capture)} views, views asks {views}")
    rows = np.linspace(0, len(capture) - 1, views).round().astype(int)
    for row, view in enumerate(capture.views):
        if view.image == capture.input_image:
            rows[np.abs(rows - row).argmin()] = row
    return replace(capture, views=tuple(capture.views[row] for row in rows))


# --- pictures ----------------------------------------------------------------------------------


def read(root: Path, capture: Capture, side: int) -> ObjectViews:
    """Every view of a capture at ``side`` x ``side`` pixels; one of them acts as the input too.

    Raises:
        DatasetError: if a picture or mask can't be read, or doesn't have the stated proportions.
    """
    opaque = first_look(root, capture)[0] == "none"
    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(lambda v: _read_view(root, capture, v, side, opaque), capture.views))
    rgba = torch.stack([picture for picture, _ in done])
    cameras = Cameras(
        torch.from_numpy(capture.viewmats).float(),
        torch.from_numpy(np.stack([K for _, K in done])).float(),
        side,
        side,
    )
    first = input_of(capture)
    with named(root / capture.descriptions[0]):
        return ObjectViews(
            name=capture.name,
            input_rgb=rgba[first, ..., :3],
            input_alpha=rgba[first, ..., 3],
            input_camera=cameras[first],
            rgb=rgba[..., :3],
            alpha=rgba[..., 3],
            cameras=cameras,
            pivot=torch.from_numpy(pivot_of(capture)).float(),
            attribution=capture.attribution,
        )


def _read_view(
    root: Path, capture: Capture, view: View, side: int, opaque: bool
) -> tuple[Tensor, Floats]:
    """Premultiplied rgba uint8 (side, side, 4) and K (3, 3)."""
    path, data = root / view.image, read_checked(root, view.image, capture.files[view.image])
    rgb, alpha = load_image(path, rotate=False, data=data)
    height, width = alpha.shape
    if view.mask:
        data = read_checked(root, view.mask, capture.files[view.mask])
        alpha = _masked(root / view.mask, data, alpha)
        rgb = ((rgb.to(torch.int32) * alpha[..., None] + 127) // 255).to(torch.uint8)
    rgba = torch.cat([rgb, alpha[..., None]], dim=-1)
    K = _fitted(view, width, height, path)
    if _bends(view.lens):
        rgba, K = _shrunk(rgba, K, 2 * side)
        height, width = rgba.shape[:2]
        fx, fy, cx, cy = K[0, 0], K[1, 1], K[0, 2], K[1, 2]
        rgba = _sampled(rgba, _grid((fx, fy, cx, cy), view.lens, width, height))
    length = min(height, width) if opaque else max(height, width)
    square, x0, y0 = squared(rgba, length)
    K = K - np.array([[0, 0, x0], [0, 0, y0], [0, 0, 0]])
    scale = np.array([side / length, side / length, 1.0])
    return resize(square, side) if side != length else square, K * scale[:, None]


def _masked(path: Path, data: bytes, alpha: Tensor) -> Tensor:
    """The picture's alpha times a mask's grey value (its alpha, where a mask is all white)."""
    grey, mask_alpha = load_image(path, rotate=False, data=data)
    mask = grey.amax(dim=-1) if bool((mask_alpha == 255).all()) else mask_alpha
    if mask.shape != alpha.shape:
        both = (mask.shape[1] * alpha.shape[0], mask.shape[0] * alpha.shape[1])
        if abs(both[0] - both[1]) > 0.02 * max(both):
            raise DatasetError(
                f"{path}: a mask of {mask.shape[1]} x {mask.shape[0]} pixels for a picture of "
                f"{alpha.shape[1]} x {alpha.shape[0]}. Make it again in the picture's size"
            )
        scaled = interpolate(mask[None, None].float(), tuple(alpha.shape), mode="bilinear")
        mask = (scaled[0, 0] + 0.5).to(torch.uint8)
    return ((mask.to(torch.int32) * alpha + 127) // 255).to(torch.uint8)


def _fitted(view: View, width: int, height: int, path: Path) -> Floats:
    """K for the picture as it lies on disk: downscaled copies (images_4/) keep their poses."""
    w, h = view.size
    if not w or not h or (w, h) == (width, height):
        return view.K
    if abs(w * height - h * width) > 0.02 * max(w * height, h * width):
        raise DatasetError(
            f"{path}: is {width} x {height} pixels, its description says {w} x {h}. Restore the "
            "picture, or describe it anew"
        )
    return view.K * np.array([width / w, height / h, 1.0])[:, None]


def _shrunk(rgba: Tensor, K: Floats, limit: int) -> tuple[Tensor, Floats]:
    height, width = rgba.shape[:2]
    if min(height, width) <= limit:
        return rgba, K
    factor = min(height, width) / limit
    shape = (round(height / factor), round(width / factor))
    small = interpolate(rgba.permute(2, 0, 1)[None].float(), shape, mode="area")
    picture = (small[0].permute(1, 2, 0) + 0.5).to(torch.uint8)
    return picture, K * np.array([shape[1] / width, shape[0] / height, 1.0])[:, None]


def _bends(lens: Lens) -> bool:
    return any(lens[1]) or "FISHEYE" in lens[0]


@functools.lru_cache(maxsize=4)  # one lens, a few at most; one a view would fill the memory
def _grid(optics: tuple[float, float, float, float], lens: Lens, width: int, height: int) -> Tensor:
    """For `grid_sample`: where in the photograph each pixel of a pinhole's picture is."""
    focals, middle = np.array(optics[:2]), np.array(optics[2:])
    pixels = np.stack(np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5), axis=-1)
    bent = distorted(((pixels - middle) / focals).reshape(-1, 2), lens).reshape(pixels.shape)
    places = 2 * (bent * focals + middle) / [width, height] - 1
    places = np.nan_to_num(places, nan=9.0, posinf=9.0, neginf=-9.0).clip(-9.0, 9.0)
    return torch.from_numpy(places.astype(np.float32))[None]


def _sampled(rgba: Tensor, grid: Tensor) -> Tensor:
    picture = rgba.permute(2, 0, 1)[None].float()
    found = grid_sample(picture, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return (found[0].permute(1, 2, 0) + 0.5).clamp(0, 255).to(torch.uint8)


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

    def project(scale: float) -> Floats:
        points = np.concatenate([rays * scale, np.ones((len(rays), 1))], axis=1)
        return np.asarray(camera.img_from_cam(points), dtype=np.float64)

    placed = project(1.0)
    with np.errstate(all="ignore"):
        grows = ((project(1.0 + 1e-5) - placed) * placed).sum(axis=1) > 0
        same_side = (placed * rays).sum(axis=1) > 0
    centre = np.abs(rays).max(axis=1) < 1e-9
    return np.where(((grows & same_side) | centre)[:, None], placed, np.nan)
