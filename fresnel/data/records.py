"""One record of a dataset: its types in memory, and reading and writing it in either layout."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fresnel.data import layout as _layouts
from fresnel.data.images import (
    DatasetError,
    InputImages,
    _rows,
    as_depth,
    as_uint8,
    check_cameras,
    has_alpha,
    load_image,
    resize,
    resize_depth,
)
from fresnel.data.layout import Record
from fresnel.scene.cameras import Cameras, intrinsics, relative_azimuth_deg


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
        put = lambda name, value: object.__setattr__(self, name, value)  # noqa: E731
        put("input_rgb", as_uint8(self.input_rgb, "input_rgb", (None, None, 3)))
        shape = tuple(self.input_rgb.shape[:2])
        put("input_alpha", as_uint8(self.input_alpha, "input_alpha", shape))
        put("input_depth", as_depth(self.input_depth, "input_depth", shape))
        check_cameras(self.input_camera, "input_camera", shape)
        if (self.identity_rgb is None) != (self.identity_alpha is None):
            raise ValueError("identity_rgb, identity_alpha: got one of them, want both or neither")
        if self.identity_rgb is not None:
            put("identity_rgb", as_uint8(self.identity_rgb, "identity_rgb", (*shape, 3)))
            put("identity_alpha", as_uint8(self.identity_alpha, "identity_alpha", shape))
        put("rgb", as_uint8(self.rgb, "rgb", (None, None, None, 3)))
        views = tuple(self.rgb.shape[:3])
        put("alpha", as_uint8(self.alpha, "alpha", views))
        put("depth", as_depth(self.depth, "depth", views))
        check_cameras(self.cameras, "cameras", views)
        put("pivot", torch.as_tensor(self.pivot, dtype=torch.float32))
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
class ViewTensors:
    """A whole dataset in memory: M objects, V views each.

    ``rgb`` uint8 (M, V, H, W, 3) over black, ``alpha`` uint8 (M, V, H, W), ``cameras`` of batch
    shape (M, V), ``pivots`` (M, 3), ``depth`` float32 (M, V, H, W) or None. ``content_hash`` is
    that of the dataset they were read from; "": made otherwise, and no receipt can be of them.
    """

    names: tuple[str, ...]
    inputs: InputImages
    rgb: Tensor
    alpha: Tensor
    cameras: Cameras
    pivots: Tensor
    depth: Tensor | None = None
    content_hash: str = ""

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: Any) -> ViewTensors:
        """Fewer objects; ``index`` is a slice, or a sequence, array or tensor of indices."""
        rows = _rows(index, len(self))
        return replace(
            self,
            names=tuple(self.names[i] for i in rows),
            inputs=self.inputs[rows],
            rgb=self.rgb[rows],
            alpha=self.alpha[rows],
            cameras=self.cameras[rows],
            pivots=self.pivots[rows],
            depth=None if self.depth is None else self.depth[rows],
        )

    def to(self, device: torch.device | str) -> ViewTensors:
        return replace(
            self,
            inputs=self.inputs.to(device),
            rgb=self.rgb.to(device),
            alpha=self.alpha.to(device),
            cameras=self.cameras.to(device),
            pivots=self.pivots.to(device),
            depth=None if self.depth is None else self.depth.to(device),
        )


def over_black(rgb: Tensor, alpha: Tensor, background: Sequence[float]) -> Tensor:
    """uint8 pictures over ``background``, recomposited over black."""
    if not any(background):
        return rgb
    behind = (1 - alpha[..., None].float() / 255) * torch.tensor(background) * 255
    return (rgb.float() - behind + 0.5).clamp(0, 255).to(torch.uint8)


def resized(views: ObjectViews, size: int) -> ObjectViews:
    """The record with its views (not its input) at ``size`` x ``size`` pixels."""
    if views.rgb.shape[1] == size:
        return views
    return replace(
        views,
        rgb=resize(views.rgb, size),
        alpha=resize(views.alpha[..., None], size)[..., 0],
        depth=resize_depth(views.depth, views.alpha, size),
        cameras=views.cameras.resized(size, size),
    )


def view_folders(record: Record) -> list[str]:
    return sorted({file.split("/")[0] for file in record.files if file.startswith("view_")})


def _expect_views(base: Path, record: Record, count: int) -> list[str]:
    views = view_folders(record)
    if len(views) != count:
        raise DatasetError(
            f"{base}: has {len(views)} views, the dataset's other "
            f"objects have {count}. Restore the views or remove the folder"
        )
    return views


def _expect_size(path: Path, image: Tensor, size: int) -> Tensor:
    if tuple(image.shape[:2]) != (size, size):
        height, width = image.shape[:2]
        raise DatasetError(
            f"{path}: is {width} x {height} pixels, the dataset's views are {size} x {size}. "
            "Make it again at that size"
        )
    return image


def read_object(
    base: Path,
    record: Record,
    size: int,
    count: int,
    load: Callable[[str], bytes],
    background: Sequence[float] = (0.0, 0.0, 0.0),
) -> ObjectViews:
    """Decode one record of our layout.

    Args:
        base: its folder, for messages.
        load: the bytes of a file of ``record.files``.
        background: sRGB that its views are over; they are composited over black here, once.
    """

    def png(file: str, mode: str) -> Tensor:
        return _layouts.read_png(base / file, mode, load(file))

    def sized(file: str, mode: str) -> Tensor:
        return _expect_size(base / file, png(file, mode), size)

    def depth_of(file: str, pose: dict[str, Any], pose_file: str) -> Tensor:
        return _layouts.read_depth(base / file, _scale(pose, base / pose_file), load(file))

    input_rgb = png("input.png", "RGB")
    pose_file = "input_pose.json"
    height, width = input_rgb.shape[:2]
    input_camera, input_pose = _layouts.read_camera(
        base / pose_file, width, height, load(pose_file)
    )
    rgb, alpha, depth, cameras = [], [], [], []
    for view in _expect_views(base, record, count):
        rgb.append(sized(f"{view}/rgb.png", "RGB"))
        alpha.append(sized(f"{view}/alpha.png", "L"))
        file = f"{view}/pose.json"
        camera, pose = _layouts.read_camera(base / file, size, size, load(file))
        cameras.append(camera)
        if (name := f"{view}/depth.png") in record.files:
            depth.append(_expect_size(base / name, depth_of(name, pose, file), size))
    has = record.files.__contains__
    alphas = torch.stack(alpha)
    return _layouts.named(
        base,
        lambda: ObjectViews(
            name=record.name,
            input_rgb=input_rgb,
            input_alpha=png("input_alpha.png", "L"),
            input_camera=input_camera,
            rgb=over_black(torch.stack(rgb), alphas, background),
            alpha=alphas,
            cameras=_layouts.stack_cameras(cameras),
            pivot=torch.from_numpy(_layouts.array(input_pose, "pivot", (3,), base / pose_file)),
            depth=torch.stack(depth) if len(depth) == len(rgb) else None,
            input_depth=depth_of("input_depth.png", input_pose, pose_file)
            if has("input_depth.png")
            else None,
            identity_rgb=png("identity.png", "RGB") if has("identity.png") else None,
            identity_alpha=png("identity_alpha.png", "L") if has("identity_alpha.png") else None,
            attribution=record.attribution,
        ),
    )


def _scale(pose: dict[str, Any], path: Path) -> float:
    scale = pose.get("depth_scale")
    if not isinstance(scale, int | float) or not 0 < scale < float("inf"):
        raise DatasetError(f"{path}: depth_scale is {scale!r}, want a positive number")
    return float(scale)


def read_original(
    base: Path, record: Record, size: int, count: int, load: Callable[[str], bytes]
) -> ObjectViews:
    """Decode one record of the original experiment's layout."""

    def image(file: str) -> tuple[Tensor, Tensor]:
        data = load(file)
        rgb, alpha = load_image(base / file, data=data)
        if not has_alpha(base / file, data):
            alpha = (rgb > 0).any(dim=-1).to(torch.uint8) * 255
        return rgb, alpha

    input_rgb, input_alpha = image("input.png")
    height, width = input_rgb.shape[:2]
    rgb, alpha, depth, cameras = [], [], [], []
    for view in _expect_views(base, record, count):
        view_rgb, view_alpha = image(f"{view}/rgb.png")
        rgb.append(_expect_size(base / view / "rgb.png", view_rgb, size))
        alpha.append(view_alpha)
        file = f"{view}/pose.json"
        cameras.append(_layouts.read_camera(base / file, size, size, load(file))[0])
        if (file := f"{view}/depth.npy") in record.files:
            depth.append(_layouts.read_npy_depth(base / file, (size, size), load(file)))
    K = intrinsics(float(width), width, height)
    return ObjectViews(
        name=record.name,
        input_rgb=input_rgb,
        input_alpha=input_alpha,
        input_camera=Cameras.from_opengl(torch.eye(3), torch.zeros(3), K, width, height),
        rgb=torch.stack(rgb),
        alpha=torch.stack(alpha),
        cameras=_layouts.stack_cameras(cameras),
        pivot=torch.zeros(3),
        depth=torch.stack(depth) if len(depth) == len(rgb) else None,
    )


def record_folder(index: int) -> str:
    return f"image_{index:04d}"


def write_object(root: Path, index: int, views: ObjectViews) -> Record:
    folder = record_folder(index)
    files = {}
    for file, data in encode_object(views):
        path = root / folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        files[file] = _layouts.sha256(data)
    return Record(views.name, folder, views.attribution, files)


def encode_object(views: ObjectViews) -> Iterable[tuple[str, bytes]]:
    """The files of one record in our layout: path inside its folder, and bytes."""
    views.cameras.validate()
    views.input_camera.validate()
    yield "input.png", _layouts.png(views.input_rgb)
    yield "input_alpha.png", _layouts.png(views.input_alpha)
    scale = None
    if views.input_depth is not None:
        scale = _layouts.depth_scale(views.input_depth)
        yield "input_depth.png", _layouts.depth_png(views.input_depth)
    pose = _layouts.pose_json(views.input_camera, 0.0, scale, pivot=views.pivot.tolist())
    yield "input_pose.json", pose
    if views.identity_rgb is not None and views.identity_alpha is not None:
        yield "identity.png", _layouts.png(views.identity_rgb)
        yield "identity_alpha.png", _layouts.png(views.identity_alpha)
    azimuths = relative_azimuth_deg(
        views.cameras.reshape(1, -1), views.input_camera.reshape(1), views.pivot
    )[0]
    for k in range(len(views.rgb)):
        yield f"view_{k:03d}/rgb.png", _layouts.png(views.rgb[k])
        yield f"view_{k:03d}/alpha.png", _layouts.png(views.alpha[k])
        scale = None
        if views.depth is not None:
            scale = _layouts.depth_scale(views.depth[k])
            yield f"view_{k:03d}/depth.png", _layouts.depth_png(views.depth[k])
        pose = _layouts.pose_json(views.cameras[k], float(azimuths[k]), scale)
        yield f"view_{k:03d}/pose.json", pose
