"""One record of a dataset: its types in memory, and reading and writing its folder.

``pose.json`` holds R and t of an OpenGL world-to-camera transform, as the original's files do,
and in ours K, width, height, azimuth_deg (relative to the input) and depth_scale too.  Depth is
16-bit: depth = value * depth_scale, 0 where nothing is.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fresnel.data.images import (
    Batch,
    DatasetError,
    InputImages,
    check_pictures,
    decoded,
    has_alpha,
    load_image,
    named,
)
from fresnel.data.layout import Record, array, entry, read_json, sha256
from fresnel.scene.cameras import Cameras, intrinsics, relative_azimuth_deg

# At 256 px level 4 packs 4000 views into 72 MB in 18 s; 6 into 71 MB in 23 s, 1 into 84 MB in 12 s.
PNG_LEVEL = 4
# The original's input camera stands at the world's origin, and its views turn about that.
_ORIGIN = b'{"R": [[1, 0, 0], [0, 1, 0], [0, 0, 1]], "t": [0, 0, 0], "pivot": [0, 0, 0]}'


@dataclass(frozen=True)
class ObjectViews:
    """One record: an input image of an object and V views of it.

    Args:
        name: unique within a dataset.
        input_rgb: uint8 (H, W, 3) over black.
        input_alpha: uint8 (H, W).
        input_camera: Cameras of batch shape ().
        rgb: uint8 (V, S, S, 3) over black.
        alpha: uint8 (V, S, S).
        cameras: Cameras of batch shape (V,).
        pivot: the world point the views turn about, float32 (3,).
        depth: z-depth of the views, float32 (V, S, S), 0 where nothing is; or None.
        input_depth: z-depth of the input, float32 (H, W); or None.
        identity_rgb: what the generator renders from the input camera, uint8 (H, W, 3) over
            black; or None.
        identity_alpha: its alpha, uint8 (H, W).
        attribution: creator and licence of what is shown.

    Raises:
        ValueError: if shapes or dtypes disagree.  numpy arrays are accepted and become tensors.
    """

    name: str
    input_rgb: Tensor
    input_alpha: Tensor
    input_camera: Cameras
    rgb: Tensor
    alpha: Tensor
    cameras: Cameras
    pivot: Tensor
    depth: Tensor | None = None
    input_depth: Tensor | None = None
    identity_rgb: Tensor | None = None
    identity_alpha: Tensor | None = None
    attribution: str = ""

    def __post_init__(self) -> None:
        shape = check_pictures(self, "input_", (None, None))
        if (self.identity_rgb is None) != (self.identity_alpha is None):
            raise ValueError("identity_rgb, identity_alpha: got one of them, want both or neither")
        if self.identity_rgb is not None:
            check_pictures(self, "identity_", shape)
        check_pictures(self, "", (None, None, None))
        object.__setattr__(self, "pivot", torch.as_tensor(self.pivot, dtype=torch.float32))
        if self.pivot.shape != (3,) or not self.pivot.isfinite().all():
            raise ValueError(f"pivot: got {self.pivot.tolist()}, want three finite numbers")

    def input(self) -> InputImages:
        """The input as a batch of one."""
        return InputImages(
            (self.name,),
            self.input_rgb[None],
            self.input_alpha[None],
            self.input_camera.reshape(1),
            None if self.input_depth is None else self.input_depth[None],
        )


@dataclass(frozen=True)
class ViewTensors(Batch):
    """A whole dataset in memory: M objects, V views each.

    ``rgb`` uint8 (M, V, H, W, 3) over black, ``alpha`` uint8 (M, V, H, W), ``cameras`` of batch
    shape (M, V), ``pivots`` (M, 3), ``depth`` float32 (M, V, H, W) or None. ``content_hash`` is
    that of the dataset they were read from; "": made otherwise, and no receipt can be of them.
    """

    inputs: InputImages
    rgb: Tensor
    alpha: Tensor
    cameras: Cameras
    pivots: Tensor
    depth: Tensor | None = None
    content_hash: str = ""


def stack_cameras(cameras: Sequence[Cameras]) -> Cameras:
    viewmats, Ks = (torch.stack([getattr(c, n) for c in cameras]) for n in ("viewmats", "Ks"))
    return Cameras(viewmats, Ks, cameras[0].width, cameras[0].height)


def stack_depths(depths: Sequence[Tensor | None]) -> Tensor | None:
    """None if one of them is missing."""
    found = [depth for depth in depths if depth is not None]
    return torch.stack(found) if len(found) == len(depths) else None


# --- reading -----------------------------------------------------------------------------------


def view_folders(record: Record) -> list[str]:
    return sorted({file.split("/")[0] for file in record.files if file.startswith("view_")})


def read_object(
    base: Path,
    record: Record,
    size: int,
    count: int,
    load: Callable[[str], bytes],
    background: Sequence[float] = (0.0, 0.0, 0.0),
    original: bool = False,
) -> ObjectViews:
    """Decode one record.

    Args:
        base: its folder, for messages.
        size: side in pixels of its ``count`` views.
        load: the bytes of a file of ``record.files``.
        background: sRGB that its views are over; they are composited over black here, once.
        original: whether it is of the original experiment's layout, not of ours.
    """
    views = view_folders(record)
    if len(views) != count:
        raise DatasetError(
            f"{base}: has {len(views)} views, the dataset's other objects have {count}. Restore "
            "the views or remove the folder"
        )

    def picture(file: str, alpha_file: str, side: int | None = None) -> tuple[Tensor, Tensor]:
        data = load(file)
        if original:
            rgb, alpha = load_image(base / file, data=data)
            if not has_alpha(base / file, data):
                alpha = (rgb > 0).any(dim=-1).to(torch.uint8) * 255
        else:
            rgb = _read_png(base / file, "RGB", data)
            alpha = _read_png(base / alpha_file, "L", load(alpha_file))
        shape = (side, side) if side else rgb.shape[:2]
        _sized(base / file, rgb, shape)
        _sized(base / alpha_file, alpha, shape)
        return rgb, alpha

    def depth(stem: str, pose: dict[str, Any], shape: Sequence[int]) -> Tensor | None:
        file = f"{stem}.npy" if original else f"{stem}.png"
        if file not in record.files:
            return None
        if original:
            return _sized(base / file, _read_npy(base / file, load(file)), shape)
        scale = entry(pose, "depth_scale", float, base / file)
        return _sized(base / file, _read_depth(base / file, scale, load(file)), shape)

    input_rgb, input_alpha = picture("input.png", "input_alpha.png")
    shape = input_rgb.shape[:2]
    path = base / "input_pose.json"
    said = _ORIGIN if original else load("input_pose.json")
    input_camera, input_pose = read_camera(path, shape[1], shape[0], said)
    pictures, cameras, depths = [], [], []
    for view in views:
        pictures.append(picture(f"{view}/rgb.png", f"{view}/alpha.png", size))
        file = f"{view}/pose.json"
        camera, pose = read_camera(base / file, size, size, load(file))
        cameras.append(camera)
        depths.append(depth(f"{view}/depth", pose, (size, size)))
    rgb, alpha = (torch.stack(of_all) for of_all in zip(*pictures, strict=True))
    identity: tuple[Tensor | None, Tensor | None] = (None, None)
    if "identity.png" in record.files:
        identity = picture("identity.png", "identity_alpha.png")
    with named(base):
        return ObjectViews(
            name=record.name,
            input_rgb=input_rgb,
            input_alpha=input_alpha,
            input_camera=input_camera,
            rgb=_over_black(rgb, alpha, background),
            alpha=alpha,
            cameras=stack_cameras(cameras),
            pivot=torch.from_numpy(array(input_pose, "pivot", (3,), path)),
            depth=stack_depths(depths),
            input_depth=depth("input_depth", input_pose, shape),
            identity_rgb=identity[0],
            identity_alpha=identity[1],
            attribution=record.attribution,
        )


def _sized(path: Path, image: Tensor, shape: Sequence[int]) -> Tensor:
    if tuple(image.shape[:2]) != tuple(shape):
        (height, width), got = shape, " x ".join(str(n) for n in reversed(image.shape[:2]))
        raise DatasetError(f"{path}: is {got} pixels, want {width} x {height}. Make it again so")
    return image


def _over_black(rgb: Tensor, alpha: Tensor, background: Sequence[float]) -> Tensor:
    if not any(background):
        return rgb
    behind = (1 - alpha[..., None].float() / 255) * torch.tensor(background) * 255
    return (rgb.float() - behind + 0.5).clamp(0, 255).to(torch.uint8)


def _read_png(path: Path, mode: str, data: bytes) -> Tensor:
    """uint8 (H, W, 3) for mode "RGB", (H, W) for "L", uint16 (H, W) for "I;16"."""
    image = decoded(path, data)
    if image.mode != mode:
        said = "Write the dataset again with fresnel.data.dataset.write"
        raise DatasetError(f"{path}: a PNG of mode {image.mode}, want {mode}. {said}")
    return torch.from_numpy(np.array(image))


def _read_depth(path: Path, scale: float, data: bytes) -> Tensor:
    if scale <= 0:
        raise DatasetError(f"{path}: its depth_scale is {scale}, want a positive number")
    values = _read_png(path, "I;16", data).numpy()
    if math.frexp(scale)[0] == 0.5 and 1e-30 < scale < 1e30:  # a power of two: nothing to round
        return torch.from_numpy(values.astype(np.float32) * np.float32(scale))
    return torch.from_numpy((values.astype(np.float64) * scale).astype(np.float32))


def _read_npy(path: Path, data: bytes) -> Tensor:
    """The original's depth.npy, (H, W) or (1, H, W) numbers."""
    try:
        found = np.load(io.BytesIO(data), allow_pickle=False)
        return torch.from_numpy(found.astype(np.float32).reshape(found.shape[-2:]))
    except (OSError, ValueError, EOFError, TypeError, AttributeError) as error:
        said = f"not a readable .npy array of depth ({error}). Make it again"
        raise DatasetError(f"{path}: {said}") from None


def read_camera(path: Path, width: int, height: int, data: bytes) -> tuple[Cameras, dict[str, Any]]:
    """The camera of a pose file for an image of width x height, and the file's other entries."""
    pose = read_json(path, data)
    rotation, translation = array(pose, "R", (3, 3), path), array(pose, "t", (3,), path)
    error, sign = np.abs(rotation @ rotation.T - np.eye(3)).max(), np.linalg.det(rotation)
    if error > 1e-3 or sign < 0:
        raise DatasetError(
            f"{path}: R is not a rotation (R R^T is off by {error:.3g}, determinant {sign:.3g}). "
            "Want an OpenGL world-to-camera rotation without scale or mirror"
        )
    K = intrinsics(float(width), width, height)  # the original: focal length = image size
    if "K" in pose:
        Ks = array(pose, "K", (3, 3), path)
        if Ks[0, 0] <= 0 or Ks[1, 1] <= 0 or Ks[2].tolist() != [0, 0, 1]:
            raise DatasetError(f"{path}: K is not a pinhole matrix with focal lengths > 0")
        if (pose.get("width", width), pose.get("height", height)) != (width, height):
            raise DatasetError(
                f"{path}: is for {pose.get('width')} x {pose.get('height')} pixels, the image "
                f"beside it has {width} x {height}. Write both again"
            )
        K = torch.from_numpy(Ks).float()
    turn, shift = torch.from_numpy(rotation).float(), torch.from_numpy(translation).float()
    return Cameras.from_opengl(turn, shift, K, width, height), pose


# --- writing -----------------------------------------------------------------------------------


def png(image: Tensor | np.ndarray) -> bytes:
    """Lossless PNG of uint8 (H, W, 3), (H, W, 4) or (H, W), or of uint16 (H, W)."""
    buffer = io.BytesIO()
    Image.fromarray(np.asarray(image)).save(buffer, "PNG", compress_level=PNG_LEVEL)
    return buffer.getvalue()


def write_object(root: Path, index: int, views: ObjectViews) -> Record:
    folder = f"image_{index:04d}"
    files = {}
    for file, data in encode_object(views):
        path = root / folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        files[file] = sha256(data)
    return Record(views.name, folder, views.attribution, files)


def encode_object(views: ObjectViews) -> Iterable[tuple[str, bytes]]:
    """The files of one record in our layout: path inside its folder, and bytes."""
    views.cameras.validate()
    views.input_camera.validate()
    yield "input.png", png(views.input_rgb)
    yield "input_alpha.png", png(views.input_alpha)
    pivot = views.pivot.tolist()
    yield from _depth_and_pose("input_", views.input_depth, views.input_camera, 0.0, pivot=pivot)
    if views.identity_rgb is not None and views.identity_alpha is not None:
        yield "identity.png", png(views.identity_rgb)
        yield "identity_alpha.png", png(views.identity_alpha)
    cameras, about = views.cameras, views.input_camera.reshape(1)
    azimuths = relative_azimuth_deg(cameras.reshape(1, -1), about, views.pivot)[0].tolist()
    for k, azimuth in enumerate(azimuths):
        folder = f"view_{k:03d}/"
        yield f"{folder}rgb.png", png(views.rgb[k])
        yield f"{folder}alpha.png", png(views.alpha[k])
        depth = None if views.depth is None else views.depth[k]
        yield from _depth_and_pose(folder, depth, cameras[k], azimuth)


def _depth_and_pose(
    prefix: str, depth: Tensor | None, camera: Cameras, azimuth_deg: float, **more: Any
) -> Iterable[tuple[str, bytes]]:
    scale = None
    if depth is not None:
        # numpy: torch would call all cores together for each of the encoding threads' pictures
        exact = depth.numpy().astype(np.float64)
        largest = float(exact.max())
        # a step is a power of two, so that writing again changes no bit
        scale = 2.0 ** math.ceil(math.log2(largest / 65535)) if largest > 0 else 2.0**-16
        steps = np.rint(exact / scale)
        np.clip(steps, 1, 65535, out=steps, where=exact > 0)
        yield f"{prefix}depth.png", png(steps.astype(np.uint16))
    rotation, translation = camera.to_opengl()
    pose = {
        "R": rotation.tolist(),
        "t": translation.tolist(),
        "K": camera.Ks.tolist(),
        "width": camera.width,
        "height": camera.height,
        "azimuth_deg": round(azimuth_deg, 4),
        "depth_scale": scale,
        **more,
    }
    yield f"{prefix}pose.json", json.dumps(pose, indent=1).encode()
