"""One object or scene seen by many cameras, in whatever format: described, then read.

A view becomes square as an input image does: an opaque photograph is cropped to its central
square, a picture with alpha or a mask is padded to one, so that nothing of the object is lost.
Distortion is removed at the picture's own resolution (or twice the wanted one, if that is less):
every pixel of an ideal pinhole with the same focal lengths and principal point takes the bilinear
mean of the four pixels that the lens model points at, in premultiplied colours; what lies
beyond the photograph is transparent.  Then the area average scales it down, as everywhere here.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import grid_sample, interpolate

from fresnel.data import images
from fresnel.data.images import DatasetError, has_alpha, load_image, resize, squared
from fresnel.data.layout import inside, named, read_checked
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
PINHOLE: Lens = ("PINHOLE", ())


@dataclass(frozen=True, eq=False)
class Capture:
    """V pictures of one thing and their cameras, as the description states them.

    Args:
        name: unique within a dataset.
        images: V paths relative to the dataset's folder; ``masks`` too, "" where there is none.
        viewmats: OpenCV world-to-camera matrices (V, 4, 4) in a world whose Y is up.
        Ks: pixels of pictures of ``sizes``, corners at integers, (V, 3, 3).
        lenses: V lens models, see `Lens`.
        sizes: width and height (V, 2) that ``Ks`` is for; 0 where the description doesn't say.
        descriptions: the files that all this was read from.
        world_from_file: rotation (3, 3) from the description's world into ours.
        notes: what the reader assumed, for ``meta``.
        pivot: what the cameras turn about if the description says so, else None: estimated.
        input_view: which view acts as the input if the description says so, else None: chosen.
        files: sha256 of everything that is read, by path; filled by `dataset.open`.
    """

    name: str
    images: tuple[str, ...]
    masks: tuple[str, ...]
    viewmats: Floats
    Ks: Floats
    lenses: tuple[Lens, ...]
    sizes: NDArray[np.int64]
    descriptions: tuple[str, ...]
    world_from_file: Floats
    notes: dict[str, Any] = field(default_factory=dict)
    pivot: Floats | None = None
    input_view: int | None = None
    attribution: str = ""
    files: dict[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.images)

    @property
    def paths(self) -> tuple[str, ...]:
        """Every file that reading this capture reads, relative to the dataset's folder."""
        masks = {mask for mask in self.masks if mask}
        return tuple(sorted({*self.images, *masks, *self.descriptions}))


def collect(
    where: str | Path,
    name: str,
    views: Sequence[View],
    descriptions: Sequence[str],
    world_from_file: Floats,
    **more: Any,
) -> Capture:
    """A capture from checked views; ``where`` is for messages.

    Raises:
        DatasetError: if there are none or too many, two share a picture, or a number is not finite,
            a rotation not a rotation, a focal length not positive or a size absurd.
    """
    if not views:
        raise DatasetError(f"{where}: describes no view")
    if len(views) > MAX_VIEWS:
        raise DatasetError(f"{where}: {len(views)} views, the limit is {MAX_VIEWS}. Split it up")
    images = tuple(view.image for view in views)
    if len(set(images)) < len(images):
        twice = next(path for k, path in enumerate(images) if path in images[:k])
        raise DatasetError(f"{where}: two views share the picture {twice!r}")
    viewmats = np.stack([view.viewmat for view in views])
    for view in views:
        if bad := _fault(view.viewmat):
            raise DatasetError(f"{where}: the pose of {view.image!r} is {bad}. Fix what wrote it")
    turn = np.eye(4)
    turn[:3, :3] = world_from_file.T
    capture = Capture(
        name=name,
        images=images,
        masks=tuple(view.mask for view in views),
        viewmats=viewmats @ turn,
        Ks=np.stack([view.K for view in views]),
        lenses=tuple(view.lens for view in views),
        sizes=np.array([view.size for view in views]),
        descriptions=tuple(descriptions),
        world_from_file=world_from_file,
        **more,
    )
    for view in views:
        numbers = np.abs([*view.K.ravel(), *view.lens[1]])
        if not np.isfinite(numbers).all():
            raise DatasetError(f"{where}: the intrinsics of {view.image!r} hold NaN or infinity")
        if min(view.K[0, 0], view.K[1, 1]) <= 0 or numbers.max() > 1e7:
            said = f"the intrinsics of {view.image!r} are absurd; want focal lengths > 0"
            raise DatasetError(f"{where}: {said}")
    if (capture.sizes < 0).any() or (capture.sizes > 1_000_000).any():
        raise DatasetError(f"{where}: an image size is negative or absurd")
    return capture


@dataclass(frozen=True)
class View:
    """One view of a capture; fields as there."""

    image: str
    viewmat: Floats
    K: Floats
    size: tuple[int, int] = (0, 0)
    mask: str = ""
    lens: Lens = PINHOLE


def _fault(viewmat: Floats) -> str:
    if not (np.abs(viewmat) < 1e12).all():  # NaN is not less
        return "not finite"
    rotation = viewmat[:3, :3]
    error = np.abs(rotation @ rotation.T - np.eye(3)).max()
    if error > 1e-3:
        return f"not a rotation (R R^T is off by {error:.3g})"
    return "a mirror" if np.linalg.det(rotation) < 0 else ""


def pinhole(fx: float, fy: float, cx: float, cy: float) -> Floats:
    return np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1]], dtype=np.float64)


# --- what the description leaves open ----------------------------------------------------------


def upright(viewmats: Floats) -> Floats:
    """Rotation (3, 3) that takes the cameras' mean up direction to Y; the identity if they differ.

    For worlds without a known vertical (COLMAP, CO3D): photographers hold cameras upright.
    """
    up = -viewmats[:, 1, :3].mean(axis=0)
    length = np.linalg.norm(up)
    if not length > 0.1:
        return np.eye(3)
    a, b = up / length, np.array([0.0, 1.0, 0.0])
    v, c = np.cross(a, b), float(a @ b)
    if c < -1 + 1e-9:
        return np.diag([1.0, -1.0, -1.0])
    skew = np.array([[0, -v[2], v[1]], [v[2], 0, -v[0]], [-v[1], v[0], 0]])
    return np.eye(3) + skew + skew @ skew / (1 + c)


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
    if capture.input_view is not None:
        return capture.input_view
    return frontal(capture.viewmats, pivot_of(capture))


def alpha_source(root: Path, capture: Capture) -> str:
    """Where the alpha comes from: "mask", "file" or "none" (judged by the first view)."""
    if any(capture.masks):
        return "mask"
    path = inside(root, capture.images[0])
    if has_alpha(path) and bool((load_image(path, rotate=False)[1] < 255).any()):
        return "file"
    return "none"


def natural_side(root: Path, capture: Capture, source: str) -> int:
    """The side in pixels of the square that the first view becomes without scaling."""
    width, height = images.image_size(inside(root, capture.images[0]))
    return min(width, height) if source == "none" else max(width, height)


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
    sources = {capture.name: alpha_source(root, capture) for capture in chosen}
    most = max(len(capture) for capture in chosen)
    if image_size is None:
        sides = [natural_side(root, c, sources[c.name]) for c in chosen]
        image_size = common_side(root, sides, most)
    else:
        common_side(root, [image_size], most)
    kinds = set(sources.values())
    meta: dict[str, Any] = {
        "source": "captures",
        "formats": sorted({str(capture.notes["format"]) for capture in chosen}),
        "elevation_is_assumed": False,
        "alpha_source": kinds.pop() if len(kinds) == 1 else "mixed",
        "input": "one of the views acts as the input: the one its description names, the middle "
        "one of a capture from one side, else the first",
        "undistorted": any(_bends(lens) for c in chosen for lens in c.lenses),
        "scale": "the capture's own",
        "objects": {
            capture.name: {
                "input": capture.images[input_of(capture)],
                "pivot": pivot_of(capture).tolist(),
                "pivot_source": "nearest point to the optical axes"
                if capture.pivot is None
                else "description",
                "alpha_source": sources[capture.name],
                "views": len(capture),
                "views_left_out": len(whole) - len(capture),
                "world_from_file": capture.world_from_file.tolist(),
                **capture.notes,
            }
            for capture, whole in zip(chosen, found, strict=True)
        },
    }
    return chosen, image_size, meta


def _thinned(root: Path, capture: Capture, views: int | None) -> Capture:
    """Evenly spaced views, the declared input among them."""
    if views is None or views == len(capture):
        return capture
    if views > len(capture):
        raise DatasetError(f"{root}: {capture.name!r} has {len(capture)} views, views asks {views}")
    rows = np.linspace(0, len(capture) - 1, views).round().astype(int)
    kept = capture.input_view
    if kept is not None:
        rows[np.abs(rows - kept).argmin()] = kept
    return replace(
        capture,
        images=tuple(capture.images[row] for row in rows),
        masks=tuple(capture.masks[row] for row in rows),
        lenses=tuple(capture.lenses[row] for row in rows),
        viewmats=capture.viewmats[rows],
        Ks=capture.Ks[rows],
        sizes=capture.sizes[rows],
        input_view=None if kept is None else int(np.abs(rows - kept).argmin()),
    )


# --- pictures ----------------------------------------------------------------------------------


def read(root: Path, capture: Capture, side: int) -> ObjectViews:
    """Every view of a capture at ``side`` x ``side`` pixels; one of them acts as the input too.

    Raises:
        DatasetError: if a picture or mask can't be read, or doesn't have the stated proportions.
    """
    grids: dict[bytes, Tensor] = {}
    opaque = alpha_source(root, capture) == "none"

    def view(k: int) -> tuple[Tensor, Floats]:
        return _view(root, capture, k, side, opaque, grids)

    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(view, range(len(capture))))
    rgba = torch.stack([picture for picture, _ in done])
    cameras = Cameras(
        torch.from_numpy(capture.viewmats).float(),
        torch.from_numpy(np.stack([K for _, K in done])).float(),
        side,
        side,
    )
    first = input_of(capture)
    return named(
        root / capture.images[0],
        lambda: ObjectViews(
            name=capture.name,
            input_rgb=rgba[first, ..., :3],
            input_alpha=rgba[first, ..., 3],
            input_camera=cameras[first],
            rgb=rgba[..., :3],
            alpha=rgba[..., 3],
            cameras=cameras,
            pivot=torch.from_numpy(pivot_of(capture)).float(),
            attribution=capture.attribution,
        ),
    )


def _view(
    root: Path, capture: Capture, k: int, side: int, opaque: bool, grids: dict[bytes, Tensor]
) -> tuple[Tensor, Floats]:
    """Premultiplied rgba uint8 (side, side, 4) and K (3, 3) of view k."""
    path = inside(root, capture.images[k])
    rgb, alpha = load_image(path, rotate=False, data=_bytes(root, capture, capture.images[k]))
    height, width = alpha.shape
    if capture.masks[k]:
        alpha = _masked(
            inside(root, capture.masks[k]), _bytes(root, capture, capture.masks[k]), alpha
        )
        rgb = ((rgb.to(torch.int32) * alpha[..., None] + 127) // 255).to(torch.uint8)
    rgba = torch.cat([rgb, alpha[..., None]], dim=-1)
    K = _fitted(capture, k, width, height, path)
    if _bends(capture.lenses[k]):
        rgba, K = _shrunk(rgba, K, 2 * side)
        rgba = _undistorted(rgba, K, capture.lenses[k], grids)
        height, width = rgba.shape[:2]
    length = min(height, width) if opaque else max(height, width)
    square, x0, y0 = squared(rgba, length)
    K = K - np.array([[0, 0, x0], [0, 0, y0], [0, 0, 0]])
    scale = np.array([side / length, side / length, 1.0])
    return resize(square, side) if side != length else square, K * scale[:, None]


def _bytes(root: Path, capture: Capture, file: str) -> bytes:
    return read_checked(inside(root, file), capture.files[file])


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


def _fitted(capture: Capture, k: int, width: int, height: int, path: Path) -> Floats:
    """K for the picture as it lies on disk: downscaled copies (images_4/) keep their poses."""
    w, h = (int(n) for n in capture.sizes[k])
    if not w or not h or (w, h) == (width, height):
        return capture.Ks[k]
    if abs(w * height - h * width) > 0.02 * max(w * height, h * width):
        raise DatasetError(
            f"{path}: is {width} x {height} pixels, its description says {w} x {h}. Restore the "
            "picture, or describe it anew"
        )
    return capture.Ks[k] * np.array([width / w, height / h, 1.0])[:, None]


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


def _undistorted(rgba: Tensor, K: Floats, lens: Lens, grids: dict[Any, Tensor]) -> Tensor:
    height, width = rgba.shape[:2]
    key = (K.tobytes(), lens, width, height)
    grid = grids.get(key)
    if grid is None:
        x, y = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
        rays = np.stack([(x - K[0, 2]) / K[0, 0], (y - K[1, 2]) / K[1, 1]], axis=-1)
        bent = distorted(rays.reshape(-1, 2), lens).reshape(height, width, 2)
        uv = bent * [K[0, 0], K[1, 1]] + K[:2, 2]
        pixels = np.nan_to_num(2 * uv / [width, height] - 1, nan=9.0, posinf=9.0, neginf=-9.0)
        grid = torch.from_numpy(pixels.clip(-9.0, 9.0).astype(np.float32))[None]
        if len(grids) < 4:  # one lens, a few at most; a lens per view would fill the memory
            grids[key] = grid
    picture = rgba.permute(2, 0, 1)[None].float()
    sampled = grid_sample(picture, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return (sampled[0].permute(1, 2, 0) + 0.5).clamp(0, 255).to(torch.uint8)


def distorted(rays: Floats, lens: Lens) -> Floats:
    """Where the lens puts the rays (x, y, 1) of shape (N, 2), in focal lengths: (N, 2).

    Rays beyond the radius where the lens' polynomial turns back have no place in the picture;
    they come out as NaN.
    """
    import pycolmap

    camera = pycolmap.Camera.create_from_model_name(0, lens[0], 1.0, 1, 1)
    names = [name.strip() for name in camera.params_info.split(",")]
    focals = 1 if names[0] == "f" else 2
    camera.params = [1.0] * focals + [0.0, 0.0, *lens[1]]

    def project(scale: float) -> Floats:
        points = np.concatenate([rays * scale, np.ones((len(rays), 1))], axis=1)
        return np.asarray(camera.img_from_cam(points), dtype=np.float64)

    placed = project(1.0)
    with np.errstate(all="ignore"):
        grows = ((project(1.0 + 1e-5) - placed) * placed).sum(axis=1) > 0
        same_side = (placed * rays).sum(axis=1) > 0
    centre = np.abs(rays).max(axis=1) < 1e-9
    return np.where(((grows & same_side) | centre)[:, None], placed, np.nan)
