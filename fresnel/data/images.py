"""Images in: one careful reader for whatever people have, and batches of input images.

An image inside the library is 8-bit sRGB composited over black beside its 8-bit alpha, so "empty"
and "dark" are never confused.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Self

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


@contextlib.contextmanager
def named(path: str | Path) -> Iterator[None]:
    """Puts the file's name in front of a ValueError's complaint about what it holds."""
    try:
        yield
    except DatasetError:
        raise
    except ValueError as error:
        raise DatasetError(f"{path}: {error}") from None


@dataclass(frozen=True)
class Batch:
    """Tensors and cameras, each with one row for every name."""

    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: Any) -> Self:
        """A smaller batch; ``index`` is a slice, or a sequence, array or tensor of indices."""
        if isinstance(index, int):
            raise TypeError("index: got an integer, want a slice or several indices (batches only)")
        index = index if isinstance(index, slice) else np.asarray(index)
        rows = np.atleast_1d(np.arange(len(self))[index]).tolist()
        return self._each(lambda value: value[rows], names=tuple(self.names[i] for i in rows))

    def to(self, device: torch.device | str) -> Self:
        return self._each(lambda value: value.to(device))

    def _each(self, change: Callable[[Any], Any], **more: Any) -> Self:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        rows = {k: v for k, v in values.items() if isinstance(v, Tensor | Cameras | Batch)}
        return replace(self, **{name: change(value) for name, value in rows.items()}, **more)


@dataclass(frozen=True)
class InputImages(Batch):
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

    rgb: Tensor
    alpha: Tensor
    cameras: Cameras
    depth: Tensor | None = None
    elevation_is_assumed: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", tuple(self.names))
        check_pictures(self, "", (len(self.names), None, None))

    def resized(self, size: int) -> InputImages:
        """The same images at ``size`` x ``size`` pixels."""
        return replace(self, **scaled(self, size))


def check_pictures(owner: Any, prefix: str, want: Sequence[int | None]) -> tuple[int, ...]:
    """Make tensors of a dataclass's rgb, alpha and depth; all and its cameras must agree with
    ``want``, (*batch, height, width) with None for any number, and with each other."""

    def put(name: str, dtype: torch.dtype, shape: Sequence[int | None]) -> Tensor:
        tensor = torch.as_tensor(getattr(owner, prefix + name))
        if dtype == torch.uint8 and tensor.dtype != dtype:
            raise ValueError(f"{prefix}{name}: got {tensor.dtype}, want uint8 (0 to 255)")
        _expect(prefix + name, tensor.shape, shape)
        object.__setattr__(owner, prefix + name, tensor.to(dtype))
        return tensor

    shape = tuple(put("rgb", torch.uint8, (*want, 3)).shape[:-1])
    put("alpha", torch.uint8, shape)
    if getattr(owner, f"{prefix}depth", None) is not None:
        least, most = torch.aminmax(put("depth", torch.float32, shape))  # NaN, if there is one
        if not (least >= 0 and most < math.inf):
            raise ValueError(f"{prefix}depth: holds NaN, infinite or negative depths, want >= 0")
    name = f"{prefix}cameras" if len(shape) > 2 else f"{prefix}camera"
    cameras = getattr(owner, name, None)
    if cameras is not None:
        got = (*cameras.batch_shape, cameras.height, cameras.width)
        _expect(f"{name} (batch, height, width)", got, shape)
    return shape


def _expect(name: str, got: Sequence[int], want: Sequence[int | None]) -> None:
    fits = (a == b if b is not None else a > 0 for a, b in zip(got, want, strict=False))
    if len(got) != len(want) or not all(fits):
        wanted = ", ".join("*" if n is None else str(n) for n in want)
        raise ValueError(f"{name}: got shape {tuple(got)}, want ({wanted})")


def scaled(pictures: Any, size: int) -> dict[str, Any]:
    """The rgb, alpha, depth and cameras of a record or batch at ``size`` x ``size`` pixels."""
    if tuple(pictures.rgb.shape[-3:-1]) == (size, size):
        return {}
    depth = pictures.depth
    return {
        "rgb": resize(pictures.rgb, size),
        "alpha": resize(pictures.alpha[..., None], size)[..., 0],
        "depth": None if depth is None else _resize_depth(depth, pictures.alpha, size),
        "cameras": pictures.cameras.resized(size, size),
    }


def resize(images: Tensor, size: int) -> Tensor:
    """uint8 images (..., H, W, C) scaled to (..., size, size, C): area average down, bilinear up.

    Averages sRGB values, as compositing does; colours must be premultiplied (over black).
    """
    if size < 1:
        raise ValueError(f"size: got {size}, want at least 1 pixel")
    flat = images.reshape(-1, *images.shape[-3:]).permute(0, 3, 1, 2).float()
    flat = _interpolate(flat, size)
    whole = (flat + 0.5).floor().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
    return whole.reshape(*images.shape[:-3], size, size, images.shape[-1])


def _resize_depth(depth: Tensor, alpha: Tensor, size: int) -> Tensor:
    """Depth (..., H, W) scaled to (..., size, size): the mean over what alpha covers."""
    weight = alpha.reshape(-1, 1, *alpha.shape[-2:]).float() * (1 / 255)
    total = _interpolate(depth.reshape(weight.shape) * weight, size)
    coverage = _interpolate(weight, size)
    mean = torch.where(coverage > 0, total / coverage.clamp_min(1e-6), 0.0)
    return mean.reshape(*depth.shape[:-2], size, size)


def _interpolate(images: Tensor, size: int) -> Tensor:
    mode = "area" if max(images.shape[-2:]) > size else "bilinear"
    return interpolate(images, (size, size), mode=mode)


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
    image = decoded(path, data)
    with named(path):
        image = _eight_bit(ImageOps.exif_transpose(image) if rotate else image)
    rgba = np.asarray(image.convert("RGBA"))
    colour, alpha = rgba[..., :3].astype(np.uint16), rgba[..., 3]
    over_black = (colour * alpha[..., None] + 127) // 255
    return torch.from_numpy(over_black.astype(np.uint8)), torch.from_numpy(alpha.copy())


def has_alpha(path: str | Path, data: bytes | None = None) -> bool:
    """Whether the image file carries transparency of its own."""
    image = decoded(path, data, pixels=False)
    return "A" in image.getbands() or "transparency" in image.info


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


def decoded(path: str | Path, data: bytes | None = None, pixels: bool = True) -> Image.Image:
    """The image of a file or its bytes, or (without ``pixels``) only what its header says.

    Raises:
        DatasetError: whatever is wrong with it.
    """
    data = read_bytes(path) if data is None else data
    most = f"the limit is {MAX_PIXELS // 1_000_000} megapixels. Shrink it"
    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise DatasetError(f"{path}: it claims a huge size, {most}") from None
    except Exception:
        kind = "not a readable image" if data else "an empty file"
        wanted = ", ".join(_FORMATS)
        raise DatasetError(f"{path}: {kind}; want {wanted}. Remove it or save it again") from None
    if image.width * image.height > MAX_PIXELS:
        raise DatasetError(f"{path}: it is {image.width} x {image.height} pixels, {most}")
    try:
        if pixels:
            image.load()
    except Exception as error:
        said = f"truncated or damaged image ({error}). Copy or make it again"
        raise DatasetError(f"{path}: {said}") from None
    return image


def _eight_bit(image: Image.Image) -> Image.Image:
    """16-bit and float greyscale to 8 bits; Pillow's own conversion would clip, not scale."""
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if values.size and (values.min() < 0 or values.max() > 65535):
            raise ValueError(f"greyscale values beyond 16 bits ({values.max()})")
        return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))
    if image.mode == "F":
        values = np.nan_to_num(np.asarray(image), nan=0.0).clip(0.0, 1.0)
        return Image.fromarray((values * 255 + 0.5).astype(np.uint8))
    return image


def _image_files(root: Path) -> list[Path]:
    found = root.iterdir() if root.is_dir() else ()
    return sorted(path for path in found if path.suffix.lower() in IMAGE_SUFFIXES)


def holds_images(folder: str | Path) -> bool:
    """Whether a folder has image files directly in it."""
    return bool(_image_files(Path(folder)))


def as_photographs(images: InputImages, size: int, elevation_deg: float) -> InputImages:
    """Pictures whose cameras are forgotten and assumed, as `load_images` does."""
    cameras = standard_orbit(torch.zeros(len(images)), elevation_deg, size)
    small = images.resized(size)
    return replace(small, cameras=cameras, depth=None, elevation_is_assumed=True)


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
    paths = _image_files(root)
    if not paths:
        what = f"holds no image; want files ending in {IMAGE_SUFFIXES}"
        raise DatasetError(f"{folder}: {what if root.is_dir() else 'no such folder'}")
    with ThreadPoolExecutor() as pool:
        rgba = torch.stack(list(pool.map(lambda path: _small_square(path, size), paths)))
    cameras = standard_orbit(torch.zeros(len(paths)), elevation_deg, size)
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
