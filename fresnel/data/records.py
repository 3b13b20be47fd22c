"""One record of a dataset: its types in memory, and reading and writing its folder.

``pose.json`` holds R and t of an OpenGL world-to-camera transform, as the original's files do,
and in ours K, width, height, azimuth_deg (relative to the input) and depth_scale too.  Depth is
16-bit: depth = value * depth_scale, 0 where nothing is.
"""

import functools
import io
import json
import math
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fresnel.data import images
from fresnel.data.images import Batch, DatasetError, InputImages, check_pictures, named
from fresnel.data.layout import Record, entry, inside, read_checked, read_json, sha256
from fresnel.scene.cameras import Cameras, intrinsics, opengl, relative_azimuth_deg, rigid

# At 256 px level 4 packs 4000 views into 72 MB in 18 s; 6 into 71 MB in 23 s, 1 into 84 MB in 12 s.
PNG_LEVEL = 4
# The original's input camera stands at the world's origin, and its views turn about that.
_ORIGIN = b'{"R": [[1, 0, 0], [0, 1, 0], [0, 0, 1]], "t": [0, 0, 0], "pivot": [0, 0, 0]}'


@dataclass(frozen=True)
class ObjectViews:
    """One record: an input image of an object (H x W pixels) and V views of it (S x S).

    Colours are over black, depth is 0 where nothing is.  ``identity_rgb`` is what the generator
    renders from the input camera, ``pivot`` the world point that the views turn about,
    ``attribution`` names creator and licence of what is shown.

    Raises:
        ValueError: if shapes or dtypes disagree.  numpy arrays are accepted and become tensors.
    """

    name: str  # unique within a dataset
    input_rgb: Tensor  # uint8 (H, W, 3)
    input_alpha: Tensor  # uint8 (H, W)
    input_camera: Cameras  # of batch shape ()
    rgb: Tensor  # uint8 (V, S, S, 3)
    alpha: Tensor  # uint8 (V, S, S)
    cameras: Cameras  # of batch shape (V,)
    pivot: Tensor  # float32 (3,)
    depth: Tensor | None = None  # z-depth, float32 (V, S, S)
    input_depth: Tensor | None = None  # float32 (H, W)
    identity_rgb: Tensor | None = None  # uint8 (H, W, 3)
    identity_alpha: Tensor | None = None  # uint8 (H, W)
    attribution: str = ""

    def __post_init__(self) -> None:
        shape = check_pictures(self, "input_", (None, None))
        if (self.identity_rgb is None) != (self.identity_alpha is None):
            raise ValueError("identity_rgb, identity_alpha: got one of them, want both or neither")
        check_pictures(self, "identity_", shape)
        check_pictures(self, "", (None, None, None))
        object.__setattr__(self, "pivot", torch.as_tensor(self.pivot, dtype=torch.float32))
        if self.pivot.shape != (3,) or not self.pivot.isfinite().all():
            raise ValueError(f"pivot: got {self.pivot.tolist()}, want three finite numbers")

    def input(self) -> InputImages:
        """The input as a batch of one."""
        depth = None if self.input_depth is None else self.input_depth[None]
        pictures = self.input_rgb[None], self.input_alpha[None]
        return InputImages((self.name,), *pictures, self.input_camera.reshape(1), depth)


UP_TILT_DEG = 45.0
"""Beyond this from +Y to the cameras' mean up worlds are turned: our orbits 15, others 90."""


def turned_world(views: ObjectViews, turn: Tensor) -> ObjectViews:
    """Everything turned about the world's origin by a rotation (4, 4)."""
    return replace(
        views,
        cameras=views.cameras.transformed(turn),
        input_camera=views.input_camera.transformed(turn),
        pivot=turn[:3, :3] @ views.pivot,
    )


def oriented(views: ObjectViews) -> tuple[ObjectViews, float]:
    """The record in a world whose +Y is its cameras' mean up, and the angle between them, degrees.

    Left as it is, with NaN, where cameras have no common up or the input's differs: then poses are
    wrong rather than the world.
    """
    ups = -torch.stack(
        [views.cameras.viewmats[:, 1, :3].mean(0), views.input_camera.viewmats[1, :3]]
    )
    up, own = ups.double()
    length = float(up.norm())
    if not (length >= 0.3 and float(up @ own) > 0.5 * length):
        return views, math.nan
    y, up = torch.tensor([0.0, 1.0, 0.0]).double(), up / length
    tilt = math.degrees(math.acos(min(1.0, max(-1.0, float(up[1])))))
    if tilt <= UP_TILT_DEG:
        return views, tilt
    # The half turn about the bisector of both, after one about Y; of opposites about X.
    middle = up + y if tilt < 179.9 else torch.tensor([1.0, 0.0, 0.0]).double()
    half = [2 * torch.outer(a, a) / (a @ a) - torch.eye(3).double() for a in (middle, y)]
    turn = half[1] @ half[0] if tilt < 179.9 else half[0]
    return turned_world(views, rigid(turn, torch.zeros(3).double()).float()), tilt


@dataclass(frozen=True)
class ViewTensors(Batch):
    """A whole dataset in memory: M objects, V views each, over black.

    ``content_hash`` is that of the dataset they were read from; "": made otherwise, and no receipt
    can be of them.  ``sums`` are the checksums of its records, which `verify` compares.
    """

    inputs: InputImages
    rgb: Tensor  # uint8 (M, V, H, W, 3)
    alpha: Tensor  # uint8 (M, V, H, W)
    cameras: Cameras  # of batch shape (M, V)
    pivots: Tensor  # (M, 3)
    depth: Tensor | None = None  # float32 (M, V, H, W)
    content_hash: str = ""
    sums: Tensor | None = None  # int64 (M,)

    def checksums(self) -> Tensor:
        """Of each record's pictures, depth and cameras, int64 (M,)."""
        whole = [
            getattr(cameras, name)
            for cameras in (self.cameras, self.inputs.cameras)
            for name in ("viewmats", "Ks")
        ] + [getattr(of, name) for of in (self, self.inputs) for name in ("rgb", "alpha", "depth")]
        parts = [each for each in (*whole, self.pivots) if each is not None]

        def of_record(row: int) -> int:
            rows = (part[row].detach().cpu().contiguous().numpy() for part in parts)
            return functools.reduce(lambda sum, array: zlib.crc32(array.data, sum), rows, 0)

        with ThreadPoolExecutor() as pool:
            return torch.tensor(list(pool.map(of_record, range(len(self)))), dtype=torch.int64)

    def verify(self) -> None:
        """Raises DatasetError if they were edited in memory since they were read."""
        if self.sums is not None and not torch.equal(self.sums.cpu(), self.checksums()):
            raise DatasetError("data were edited in memory after they were read; read them anew")


def stack(values: Sequence[Any], how: Callable[..., Tensor] = torch.stack) -> Any:
    """Tensors or Cameras as one; None if one of them is missing."""
    if any(value is None for value in values):
        return None
    if isinstance(values[0], Tensor):
        return how(values)
    viewmats, Ks = how([each.viewmats for each in values]), how([each.Ks for each in values])
    return replace(values[0], viewmats=viewmats, Ks=Ks)


def read_object(
    root: Path,
    record: Record,
    size: int,
    count: int,
    background: Sequence[float] = (0.0, 0.0, 0.0),
    original: bool = False,
) -> ObjectViews:
    """Decode a record of ``count`` views of ``size`` pixels from a dataset's folder.

    Args:
        background: sRGB that its views are over; they are composited over black here, once.
        original: whether it is of the original experiment's layout, not of ours.
    """
    base = inside(root, record.folder)
    folders = sorted({file.split("/")[0] for file in record.files if file.startswith("view_")})
    if len(folders) != count:
        said = f"has {len(folders)} views, the dataset's other objects have {count}"
        raise DatasetError(f"{base}: {said}. Restore the views or remove the folder")

    def load(file: str) -> bytes:
        if file not in record.files:
            raise DatasetError(f"{base / file}: is not among the dataset's files")
        return read_checked(root, f"{record.folder}/{file}", record.files[file])

    def sized(file: str, image: Tensor, shape: Sequence[int]) -> Tensor:
        if shape and tuple(image.shape[:2]) != tuple(shape):
            got, want = (" x ".join(str(n) for n in x[1::-1]) for x in (image.shape, shape))
            raise DatasetError(f"{base / file}: is {got} pixels, want {want}. Make it again so")
        return image

    def picture(file: str, mode: str, shape: Sequence[int]) -> Tensor:
        image = images.decoded(base / file, load(file))
        if image.mode != mode:
            said = f"a PNG of mode {image.mode}, want {mode}. Write the dataset again"
            raise DatasetError(f"{base / file}: {said}")
        return sized(file, torch.from_numpy(np.array(image)), shape)

    def colours(file: str, alpha_file: str, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
        if not original:
            rgb = picture(file, "RGB", shape)
            return rgb, picture(alpha_file, "L", rgb.shape[:2])
        rgb, alpha = images.load_image(base / file, data=load(file))
        estimated = (rgb > 0).any(dim=-1).to(torch.uint8) * 255
        return sized(file, rgb, shape), estimated if bool((alpha == 255).all()) else alpha

    def shot(prefix: str, file: str, shape: Sequence[int] = ()) -> tuple[Any, ...]:
        """rgb, alpha, camera, depth and pose of the input or of a view."""
        rgb, alpha = colours(file, f"{prefix}alpha.png", shape)
        path = base / f"{prefix}pose.json"
        from_file = not original or prefix != "input_"
        pose = read_json(path, load(f"{prefix}pose.json") if from_file else _ORIGIN)
        camera = camera_of(path, pose, rgb.shape[1], rgb.shape[0])
        depth, name = None, f"{prefix}depth.{'npy' if original else 'png'}"
        if name in record.files and original:  # (H, W) or (1, H, W) numbers
            try:
                found = np.load(io.BytesIO(load(name)), allow_pickle=False).astype(np.float32)
            except Exception as error:  # a header may claim anything
                raise DatasetError(f"{base / name}: no readable array of depth ({error})") from None
            depth = sized(name, torch.from_numpy(found.reshape(found.shape[-2:])), alpha.shape)
        elif name in record.files:
            if (scale := entry(pose, "depth_scale", float, path)) <= 0:
                raise DatasetError(f"{path}: depth_scale is {scale}, want a positive number")
            steps = picture(name, "I;16", alpha.shape).numpy()
            depth = torch.from_numpy((steps.astype(np.float64) * scale).astype(np.float32))
        return rgb, alpha, camera, depth, pose

    input_rgb, input_alpha, input_camera, input_depth, pose = shot("input_", "input.png")
    views = [shot(f"{folder}/", f"{folder}/rgb.png", (size, size)) for folder in folders]
    rgb, alpha, cameras, depth = (stack([view[k] for view in views]) for k in range(4))
    if any(background):
        behind = (1 - alpha[..., None].float() / 255) * torch.tensor(background) * 255
        rgb = (rgb.float() - behind + 0.5).clamp(0, 255).to(torch.uint8)
    identity: tuple[Tensor | None, Tensor | None] = (None, None)
    if "identity.png" in record.files:
        identity = colours("identity.png", "identity_alpha.png", input_alpha.shape)
    pivot = torch.from_numpy(entry(pose, "pivot", (3,), base / "input_pose.json"))
    seen, made = (input_rgb, input_alpha, input_camera), (rgb, alpha, cameras, pivot, depth)
    with named(base):
        return ObjectViews(
            record.name, *seen, *made, input_depth, *identity, attribution=record.attribution
        )


def camera_of(path: Path, pose: dict[str, Any], width: int, height: int) -> Cameras:
    """The camera that a pose file states, for an image of width x height."""
    turn, shift = (
        torch.from_numpy(entry(pose, key, shape, path)).float()
        for key, shape in (("R", (3, 3)), ("t", (3,)))
    )
    K = intrinsics(float(width), width, height)  # the original: focal length = image size
    if "K" in pose:
        K = torch.from_numpy(entry(pose, "K", (3, 3), path)).float()
        said = pose.get("width", width), pose.get("height", height)
        if said != (width, height) or K[2].tolist() != [0, 0, 1]:
            raise DatasetError(
                f"{path}: is for {said[0]} x {said[1]} pixels, or K is not a pinhole matrix; the "
                f"image beside it has {width} x {height}. Write both again"
            )
    with named(path):
        return Cameras(opengl(rigid(turn, shift)), K, width, height).validate()


def png(image: Tensor | np.ndarray) -> bytes:
    """Lossless PNG of uint8 (H, W, 3), (H, W, 4) or (H, W), or of uint16 (H, W)."""
    buffer = io.BytesIO()
    Image.fromarray(np.asarray(image)).save(buffer, "PNG", compress_level=PNG_LEVEL)
    return buffer.getvalue()


def write_object(root: Path, index: int, views: ObjectViews) -> Record:
    folder = f"image_{index:04d}"
    files = write_files(root / folder, encode_object(views))
    return Record(views.name, folder, views.attribution, files)


def write_files(folder: Path, files: Iterable[tuple[str, bytes]]) -> dict[str, str]:
    """Write a record's files into a folder that isn't there yet; the sha256 of each."""
    made, digests = set[str](), {}
    for file, data in files:
        path = f"{folder}/{file}"
        if (parent := os.path.dirname(path)) not in made:  # once: most files share theirs
            os.makedirs(parent, exist_ok=True)
            made.add(parent)
        with open(path, "wb") as stream:
            stream.write(data)
        digests[file] = sha256(data)
    return digests


def encode_object(views: ObjectViews) -> Iterator[tuple[str, bytes]]:
    """The files of one record in our layout: path inside its folder, and bytes."""
    views.cameras.validate()
    yield "input.png", png(views.input_rgb)
    shot = views.input_alpha, views.input_depth, views.input_camera.validate()
    yield from _beside("input_", *shot, 0.0, pivot=views.pivot.tolist())
    if views.identity_rgb is not None and views.identity_alpha is not None:
        yield "identity.png", png(views.identity_rgb)
        yield "identity_alpha.png", png(views.identity_alpha)
    cameras, about = views.cameras, views.input_camera.reshape(1)
    azimuths = relative_azimuth_deg(cameras.reshape(1, -1), about, views.pivot)[0].tolist()
    for k, azimuth in enumerate(azimuths):
        yield f"view_{k:03d}/rgb.png", png(views.rgb[k])
        depth = None if views.depth is None else views.depth[k]
        yield from _beside(f"view_{k:03d}/", views.alpha[k], depth, cameras[k], azimuth)


def _beside(
    prefix: str,
    alpha: Tensor,
    depth: Tensor | None,
    camera: Cameras,
    azimuth_deg: float,
    **more: Any,
) -> Iterator[tuple[str, bytes]]:
    """What lies beside the colours of the input or of a view."""
    yield f"{prefix}alpha.png", png(alpha)
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
    theirs = opengl(camera.viewmats)
    pose = {
        "R": theirs[:3, :3].tolist(),
        "t": theirs[:3, 3].tolist(),
        "K": camera.Ks.tolist(),
        "width": camera.width,
        "height": camera.height,
        "azimuth_deg": round(azimuth_deg, 4),
        "depth_scale": scale,
        **more,
    }
    yield f"{prefix}pose.json", json.dumps(pose, indent=1).encode()
