"""Images in: one careful reader for whatever people have, and batches of input images.

An image inside the library is 8-bit sRGB composited over black beside its 8-bit alpha, so "empty"
and "dark" are never confused.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn.functional import interpolate

from fresnel.scene.cameras import Cameras, standard_orbit

MAX_PIXELS = 50_000_000
"""Larger images are refused before they are decoded: a small file can claim a huge picture."""
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")


class DatasetError(ValueError):
    """Data that can't be read or written; the message names the file and what to do."""


@dataclass(frozen=True)
class InputImages:
    """A batch of M input images and the cameras that saw them.

    Args:
        names: M names.
        rgb: uint8 (M, H, W, 3), composited over black.
        alpha: uint8 (M, H, W), 255 where the object covers the whole pixel.
        cameras: Cameras of batch shape (M,) for images of W x H pixels.
        depth: z-depth in world units, float32 (M, H, W), 0 where nothing is; or None.
        elevation_is_assumed: True if the cameras are a guess (photographs), not known.

    Raises:
        ValueError: if shapes or dtypes disagree.  numpy arrays are accepted and become tensors.
    """

    names: tuple[str, ...]
    rgb: Tensor
    alpha: Tensor
    cameras: Cameras
    depth: Tensor | None = None
    elevation_is_assumed: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", tuple(self.names))
        count = len(self.names)
        rgb = as_uint8(self.rgb, "rgb", (count, None, None, 3))
        shape = tuple(rgb.shape[:3])
        object.__setattr__(self, "rgb", rgb)
        object.__setattr__(self, "alpha", as_uint8(self.alpha, "alpha", shape))
        object.__setattr__(self, "depth", as_depth(self.depth, "depth", shape))
        check_cameras(self.cameras, "cameras", shape)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: Any) -> InputImages:
        """A smaller batch; ``index`` is a slice, or a sequence, array or tensor of indices."""
        rows = _rows(index, len(self))
        return replace(
            self,
            names=tuple(self.names[i] for i in rows),
            rgb=self.rgb[rows],
            alpha=self.alpha[rows],
            cameras=self.cameras[rows],
            depth=None if self.depth is None else self.depth[rows],
        )

    def resized(self, size: int) -> InputImages:
        """The same images at ``size`` x ``size`` pixels (area average down, bilinear up)."""
        if tuple(self.rgb.shape[1:3]) == (size, size):
            return self
        return replace(
            self,
            rgb=resize(self.rgb, size),
            alpha=resize(self.alpha[..., None], size)[..., 0],
            cameras=self.cameras.resized(size, size),
            depth=resize_depth(self.depth, self.alpha, size),
        )

    def to(self, device: torch.device | str) -> InputImages:
        return replace(
            self,
            rgb=self.rgb.to(device),
            alpha=self.alpha.to(device),
            cameras=self.cameras.to(device),
            depth=None if self.depth is None else self.depth.to(device),
        )


def _rows(index: Any, count: int) -> list[int]:
    if isinstance(index, slice):
        return list(range(count))[index]
    if isinstance(index, int):
        raise TypeError("index: got an integer, want a slice or several indices (batches only)")
    rows = np.arange(count)[np.asarray(index)]
    return [int(i) for i in np.atleast_1d(rows)]


def as_uint8(value: Any, name: str, shape: Sequence[int | None]) -> Tensor:
    """``value`` as a uint8 tensor of the given shape (None: any length of at least 1)."""
    tensor = torch.as_tensor(value)
    if tensor.dtype != torch.uint8:
        raise ValueError(f"{name}: got dtype {tensor.dtype}, want uint8 (0 to 255)")
    _check_shape(tensor, name, shape)
    return tensor


def as_depth(value: Any, name: str, shape: Sequence[int | None]) -> Tensor | None:
    """``value`` as a float32 tensor of finite depths >= 0, or None."""
    if value is None:
        return None
    tensor = torch.as_tensor(value, dtype=torch.float32)
    _check_shape(tensor, name, shape)
    least, most = torch.aminmax(tensor)  # NaN, if there is one
    if not (least >= 0 and most < math.inf):
        raise ValueError(f"{name}: holds NaN, infinite or negative depths, want >= 0 (0: nothing)")
    return tensor


def _check_shape(tensor: Tensor, name: str, shape: Sequence[int | None]) -> None:
    matches = tensor.ndim == len(shape) and all(
        (want is None and got > 0) or got == want
        for got, want in zip(tensor.shape, shape, strict=True)
    )
    if not matches:
        want = "(" + ", ".join("*" if n is None else str(n) for n in shape) + ")"
        raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, want {want}")


def check_cameras(cameras: Cameras, name: str, shape: Sequence[int]) -> None:
    """``shape`` is the batch shape followed by height and width."""
    got = (*cameras.batch_shape, cameras.height, cameras.width)
    if got != tuple(shape):
        raise ValueError(f"{name}: got (batch, height, width) {got}, want {tuple(shape)}")


def resize(images: Tensor, size: int) -> Tensor:
    """uint8 images (..., H, W, C) scaled to (..., size, size, C).

    Averages sRGB values, as compositing does; colours must be premultiplied (over black).
    """
    if size < 1:
        raise ValueError(f"size: got {size}, want at least 1 pixel")
    flat = images.reshape(-1, *images.shape[-3:]).permute(0, 3, 1, 2).float()
    flat = _interpolate(flat, size)
    scaled = (flat + 0.5).floor().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
    return scaled.reshape(*images.shape[:-3], size, size, images.shape[-1])


def resize_depth(depth: Tensor | None, alpha: Tensor, size: int) -> Tensor | None:
    """Depth (..., H, W) scaled to (..., size, size): the mean over what alpha covers."""
    if depth is None:
        return None
    weight = alpha.reshape(-1, 1, *alpha.shape[-2:]).float() * (1 / 255)
    scaled = _interpolate(depth.reshape(weight.shape) * weight, size)
    coverage = _interpolate(weight, size)
    scaled = torch.where(coverage > 0, scaled / coverage.clamp_min(1e-6), 0.0)
    return scaled.reshape(*depth.shape[:-2], size, size)


def _interpolate(images: Tensor, size: int) -> Tensor:
    if max(images.shape[-2:]) > size:
        return interpolate(images, (size, size), mode="area")
    return interpolate(images, (size, size), mode="bilinear", align_corners=False)


def load_image(
    path: str | Path, *, rotate: bool = True, data: bytes | None = None
) -> tuple[Tensor, Tensor]:
    """Read any common image as sRGB over black and alpha.

    Handles RGB(A), greyscale, palettes, transparency keys, 16 bits a channel, CMYK and EXIF
    rotation.  Colour profiles are ignored: values are taken as sRGB.

    Args:
        rotate: turn the picture as its EXIF data say; False for pictures whose camera was
            calibrated on the stored pixels (COLMAP and nerfstudio ignore EXIF).
        data: the file's bytes where they were read already; ``path`` is then for messages.

    Returns:
        rgb uint8 (H, W, 3) composited over black, and alpha uint8 (H, W) (255 if there is none).

    Raises:
        DatasetError: if the file is missing, not an image, truncated, or larger than
            ``MAX_PIXELS`` pixels.
    """
    with opened(path, read_bytes(path) if data is None else data) as image:
        image = _eight_bit(ImageOps.exif_transpose(image) if rotate else image)
        rgba = np.asarray(image.convert("RGBA"))
    colour, alpha = rgba[..., :3].astype(np.uint16), rgba[..., 3]
    over_black = (colour * alpha[..., None] + 127) // 255
    return torch.from_numpy(over_black.astype(np.uint8)), torch.from_numpy(alpha.copy())


def has_alpha(path: str | Path, data: bytes | None = None) -> bool:
    """Whether the image file carries transparency of its own."""
    with opened(path, read_bytes(path) if data is None else data, decode=False) as image:
        return "A" in image.getbands() or "transparency" in image.info


def image_size(path: str | Path) -> tuple[int, int]:
    """Width and height of the stored pixels; only the file's header is decoded."""
    with opened(path, read_bytes(path), decode=False) as image:
        return image.width, image.height


def read_bytes(path: str | Path, limit: int = 1 << 30) -> bytes:
    """A regular file's bytes, at most ``limit`` of them.

    Raises:
        DatasetError: if there is none, it is larger, or it can't be read.
    """
    try:
        if not Path(path).is_file() and Path(path).exists():
            raise DatasetError(f"{path}: is no regular file")
        with open(path, "rb") as file:
            data = file.read(limit + 1)
    except FileNotFoundError:
        raise DatasetError(f"{path}: no such file") from None
    except OSError as error:
        raise DatasetError(f"{path}: can't be read ({error.strerror or error})") from error
    if len(data) > limit:
        raise DatasetError(f"{path}: more than {limit} bytes, which is the limit. Make it smaller")
    return data


class opened:
    """Context: a decoded PIL image, every way of failing turned into a DatasetError."""

    def __init__(self, path: str | Path, data: bytes, decode: bool = True) -> None:
        self.path, self.data, self.decode = path, data, decode

    def __enter__(self) -> Image.Image:
        try:
            image = Image.open(io.BytesIO(self.data), formats=_FORMATS)
        except (Image.DecompressionBombError, Image.DecompressionBombWarning):
            raise self._too_large("it claims a huge size") from None
        except Exception:
            kind = "an empty file" if not self.data else "not a readable image"
            raise DatasetError(
                f"{self.path}: {kind}; want {', '.join(_FORMATS)}. Remove it or save it again"
            ) from None
        if image.width * image.height > MAX_PIXELS:
            raise self._too_large(f"it is {image.width} x {image.height} pixels")
        try:
            if self.decode:
                image.load()
        except Exception as error:
            raise DatasetError(
                f"{self.path}: truncated or damaged image ({error}). Copy or make it again"
            ) from None
        return image

    def __exit__(self, *exc: object) -> None:
        self.data = b""

    def _too_large(self, what: str) -> DatasetError:
        return DatasetError(
            f"{self.path}: {what}, the limit is {MAX_PIXELS // 1_000_000} megapixels. Shrink it"
        )


def _eight_bit(image: Image.Image) -> Image.Image:
    """16-bit and float greyscale to 8 bits; Pillow's own conversion would clip, not scale."""
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if values.size and (values.min() < 0 or values.max() > 65535):
            raise DatasetError(f"greyscale image: values beyond 16 bits ({values.max()})")
        return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))
    if image.mode == "F":
        values = np.nan_to_num(np.asarray(image), nan=0.0).clip(0.0, 1.0)
        return Image.fromarray((values * 255 + 0.5).astype(np.uint8))
    return image


def holds_images(folder: str | Path) -> bool:
    """Whether a folder has image files directly in it."""
    root = Path(folder)
    return root.is_dir() and any(p.suffix.lower() in IMAGE_SUFFIXES for p in root.iterdir())


def as_photographs(images: InputImages, size: int, elevation_deg: float) -> InputImages:
    """Pictures whose cameras are forgotten and assumed, as `load_images` does."""
    small = images.resized(size)
    cameras = _assumed_cameras(len(images), size, elevation_deg)
    return replace(small, cameras=cameras, depth=None, elevation_is_assumed=True)


def _assumed_cameras(count: int, size: int, elevation_deg: float) -> Cameras:
    """All at azimuth 0 of our renders' orbit about the world's origin."""
    return standard_orbit(torch.zeros(count), elevation_deg, size)


def load_images(folder: str | Path, size: int, *, elevation_deg: float = 15.0) -> InputImages:
    """Every image of a folder, sorted by name, as ``size`` x ``size`` inputs.

    An image with transparency is padded to a square; an opaque one is cropped to its central
    square.  Nothing is known about their cameras, so each is placed on the orbit at azimuth 0,
    looking at the world origin, and marked ``elevation_is_assumed``.

    Args:
        elevation_deg: assumed elevation of the cameras.

    Raises:
        DatasetError: if the folder is missing or holds no image, or an image can't be read.
    """
    if not -89 <= elevation_deg <= 89:
        raise ValueError(f"elevation_deg: got {elevation_deg}, want degrees in [-89, 89]")
    root = Path(folder)
    if not root.is_dir():
        raise DatasetError(f"{folder}: no such folder")
    paths = sorted(p for p in root.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
    if not paths:
        raise DatasetError(f"{folder}: holds no image; want files ending in {IMAGE_SUFFIXES}")
    with ThreadPoolExecutor() as pool:
        images = list(pool.map(lambda path: _small_square(path, size), paths))
    rgba = torch.stack(images)
    cameras = _assumed_cameras(len(paths), size, elevation_deg)
    names = tuple(path.stem for path in paths)
    if len(set(names)) < len(paths):
        names = tuple(path.name for path in paths)
    return InputImages(names, rgba[..., :3], rgba[..., 3], cameras, elevation_is_assumed=True)


def squared(
    rgba: Tensor, side: int, middle: tuple[float, float] | None = None
) -> tuple[Tensor, int, int]:
    """A picture (H, W, 4) padded or cropped to ``side`` x ``side`` about its middle, or about
    ``middle`` (x, y), and the column and row of the picture at which that square begins."""
    height, width = rgba.shape[:2]
    x0, y0 = (width - side) // 2, (height - side) // 2
    if middle is not None:
        x0, y0 = round(middle[0] - side / 2), round(middle[1] - side / 2)
    square = rgba.new_zeros(side, side, 4)
    xa, xb, ya, yb = max(x0, 0), min(x0 + side, width), max(y0, 0), min(y0 + side, height)
    square[ya - y0 : yb - y0, xa - x0 : xb - x0] = rgba[ya:yb, xa:xb]
    return square, x0, y0


def _small_square(path: Path, size: int) -> Tensor:
    rgb, alpha = load_image(path)
    side = min(alpha.shape) if bool((alpha == 255).all()) else max(alpha.shape)
    return resize(squared(torch.cat([rgb, alpha[..., None]], dim=-1), side)[0], size)
