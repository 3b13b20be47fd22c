"""Multi-view datasets on disk: read, write, hash.

A dataset is a set of objects, each with one input image and V views of it from known cameras.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fresnel.cameras import Cameras
from fresnel.images import (
    DatasetError,
    InputImages,
    _rows,
    as_depth,
    as_uint8,
    check_cameras,
    load_image,
    load_images,
)

__all__ = [
    "DatasetChanged",
    "DatasetError",
    "InputImages",
    "ObjectViews",
    "ViewTensors",
    "load_image",
    "load_images",
]


class DatasetChanged(DatasetError):
    """The files on disk are not the ones whose hash was recorded."""


@dataclass(frozen=True)
class ObjectViews:
    """One record: an input image of an object and V views of it.

    Args:
        name: unique within a dataset.
        input_rgb: uint8 (H, W, 3) over black.
        input_alpha: uint8 (H, W).
        input_camera: Cameras of batch shape ().
        rgb: uint8 (V, S, S, 3) over the dataset's background.
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


@dataclass(frozen=True)
class ViewTensors:
    """A whole dataset in memory: M objects, V views each.

    ``rgb`` uint8 (M, V, H, W, 3) over black, ``alpha`` uint8 (M, V, H, W), ``cameras`` of batch
    shape (M, V), ``pivots`` (M, 3), ``depth`` float32 (M, V, H, W) or None.
    """

    names: tuple[str, ...]
    inputs: InputImages
    rgb: Tensor
    alpha: Tensor
    cameras: Cameras
    pivots: Tensor
    depth: Tensor | None = None

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
