"""Images in: one careful reader for whatever people have, and batches of input images.

An image inside the library is 8-bit sRGB composited over black beside its 8-bit alpha, so "empty"
and "dark" are never confused.
"""

import contextlib
import gzip
import io
import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn.functional import interpolate

from fresnel.host import files
from fresnel.scene.cameras import Cameras, standard_orbit

MAX_PIXELS = 50_000_000
"""Larger images are refused before they are decoded: a small file can claim a huge picture."""
_MOST_SCANS = 100
"""Of a progressive JPEG, which has about ten: each is decoded over the whole picture."""
FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "BMP", "TIFF", "GIF")
IMAGE_SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".webp", ".avif", ".bmp", ".tif", ".tiff", ".gif"),
    *(".heic", ".heif"),
)


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
    """Tensors and cameras, each with one row for every name; indexed, it is a smaller batch."""

    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: Any) -> Self:
        if isinstance(index, int):
            raise TypeError("index: got an integer, want a slice or several indices (batches only)")
        index = index if isinstance(index, slice) else np.atleast_1d(np.asarray(index))
        rows = np.arange(len(self))[index].tolist()
        return self._each(lambda value: value[rows], names=tuple(self.names[i] for i in rows))

    def to(self, device: torch.device | str) -> Self:
        return self._each(lambda value: value.to(device))

    def _each(self, change: Callable[[Any], Any], **more: Any) -> Self:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor | Cameras | Batch):
                more[field.name] = change(value)
        return replace(self, **more)


@dataclass(frozen=True)
class InputImages(Batch):
    """A batch of M input images and the cameras that saw them; numpy arrays become tensors.

    Raises:
        ValueError: if shapes or dtypes disagree.
    """

    rgb: Tensor  # uint8 (M, H, W, 3), composited over black
    alpha: Tensor  # uint8 (M, H, W), 255 where the object covers the whole pixel
    cameras: Cameras  # of batch shape (M,)
    depth: Tensor | None = None  # z-depth in world units, float32 (M, H, W), 0 where nothing is
    elevation_is_assumed: bool = False  # the cameras are a guess (photographs)

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", tuple(self.names))
        check_pictures(self, "", (len(self.names), None, None))

    def resized(self, size: int) -> Self:
        """The same images at ``size`` x ``size`` pixels."""
        return replace(self, **scaled(self, size))


def check_pictures(owner: Any, prefix: str, shape: Sequence[int | None]) -> Sequence[int | None]:
    """Make tensors of a dataclass's rgb, alpha and depth; they and its cameras must agree with
    ``shape``, (*batch, height, width) with None for any number, and with each other."""

    def expect(name: str, got: Sequence[int], want: Sequence[int | None]) -> None:
        fits = (a == b if b is not None else a > 0 for a, b in zip(got, want, strict=False))
        if len(got) != len(want) or not all(fits):
            wanted = ", ".join("*" if n is None else str(n) for n in want)
            raise ValueError(f"{prefix}{name}: got shape {tuple(got)}, want ({wanted})")

    for name in ("rgb", "alpha", "depth"):
        if (value := getattr(owner, prefix + name, None)) is None:
            continue
        tensor = torch.as_tensor(value)
        if name != "depth" and tensor.dtype != torch.uint8:
            raise ValueError(f"{prefix}{name}: got {tensor.dtype}, want uint8 (0 to 255)")
        expect(name, tensor.shape, (*shape, 3) if name == "rgb" else shape)
        if name == "rgb":
            shape = tuple(tensor.shape[:-1])
        elif name == "depth":
            tensor = tensor.to(torch.float32)
            least, most = torch.aminmax(tensor)  # NaN, if there is one
            if not (least >= 0 and most < math.inf):
                raise ValueError(
                    f"{prefix}depth: holds NaN, infinite or negative depths, want >= 0"
                )
        object.__setattr__(owner, prefix + name, tensor)
    for name in ("camera", "cameras"):
        if (cameras := getattr(owner, prefix + name, None)) is not None:
            got = (*cameras.batch_shape, cameras.height, cameras.width)
            expect(f"{name} (batch, height, width)", got, shape)
    return shape


def scaled(pictures: Any, size: int) -> dict[str, Any]:
    """The rgb, alpha, depth and cameras of a record or batch at ``size`` x ``size`` pixels."""
    if tuple(pictures.rgb.shape[-3:-1]) == (size, size):
        return {}
    alpha, depth = pictures.alpha[..., None], pictures.depth
    if depth is not None:  # the mean over what alpha covers
        weight = alpha.float() * (1 / 255)
        total, cover = (_interpolated(x, size) for x in (depth[..., None] * weight, weight))
        depth = torch.where(cover > 0, total / cover.clamp_min(1e-6), 0.0)[..., 0]
    return {
        "rgb": resize(pictures.rgb, size),
        "alpha": resize(alpha, size)[..., 0],
        "depth": depth,
        "cameras": pictures.cameras.resized(size, size),
    }


def resize(images: Tensor, size: int | tuple[int, int]) -> Tensor:
    """uint8 images (..., H, W, C) scaled to (..., size, size, C), or to a height and width: area
    average down, bilinear up, of sRGB values over black (premultiplied)."""
    return (_interpolated(images, size) + 0.5).floor().clamp(0, 255).to(torch.uint8)


def _interpolated(images: Tensor, size: int | tuple[int, int]) -> Tensor:
    height, width = (size, size) if isinstance(size, int) else size
    if min(height, width) < 1:
        raise ValueError(f"size: got {size}, want at least 1 pixel")
    flat = images.reshape(-1, *images.shape[-3:]).permute(0, 3, 1, 2).float()
    mode = "area" if max(flat.shape[-2:]) > max(height, width) else "bilinear"
    made = interpolate(flat, (height, width), mode=mode).permute(0, 2, 3, 1)
    return made.reshape(*images.shape[:-3], height, width, images.shape[-1])


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


def read_bytes(path: str | Path, limit: int = 1 << 30) -> bytes:
    """A regular file's bytes (of a .jgz: unpacked); DatasetError if there is none, they are more,
    or can't be read."""
    try:
        data = files.read_bytes(path, limit)
        if Path(path).suffix != ".jgz":
            return data
        with gzip.open(io.BytesIO(data)) as file:
            data = file.read(limit + 1)
    except FileNotFoundError:
        raise DatasetError(f"{path}: no such file") from None
    except (OSError, EOFError, zlib.error) as error:
        raise DatasetError(f"{path}: can't be read ({error})") from error
    except ValueError as error:
        raise DatasetError(str(error)) from None
    if len(data) > limit:
        raise DatasetError(f"{path}: more than {limit} bytes, which is the limit. Make it smaller")
    return data


def decoded(
    path: str | Path,
    data: bytes | None = None,
    pixels: bool = True,
    formats: tuple[str, ...] = FORMATS,
) -> Image.Image:
    """The image of a file or its bytes, or (without ``pixels``) only what its header says.

    Raises:
        DatasetError: whatever is wrong with it.
    """
    data = read_bytes(path) if data is None else data
    wrong = f"{'not a readable image' if data else 'an empty file'}; want {', '.join(formats)}"
    if formats == FORMATS and _is_heif(data):
        try:
            import pillow_heif
        except ImportError:
            raise DatasetError(
                f"{path}: a HEIC picture; pip install -e '.[heic]', or save it as JPEG"
            ) from None
        pillow_heif.register_heif_opener()
        formats = (*formats, "HEIF")
    if data.startswith(b"\xff\xd8") and data.count(b"\xff\xda") > _MOST_SCANS:
        raise DatasetError(f"{path}: a JPEG of over {_MOST_SCANS} scans. Save it again")
    try:
        image = Image.open(io.BytesIO(data), formats=formats)
        if image.width * image.height > MAX_PIXELS:
            raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels")
        wrong = "a truncated or damaged image"
        if pixels:
            image.load()
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        most = f"the limit is {MAX_PIXELS // 1_000_000} megapixels. Shrink it"
        raise DatasetError(f"{path}: too large ({error}), {most}") from None
    except Exception:
        raise DatasetError(f"{path}: {wrong}. Remove it, or copy or save it again") from None
    return image


def orientation(image: Image.Image) -> int:
    """How EXIF data turn a picture, 1 (not at all) to 8; damaged ones don't."""
    with contextlib.suppress(Exception):
        return int(image.getexif().get(0x0112, 1))
    return 1


def _is_heif(data: bytes) -> bool:
    """Whether a file is HEIF as phones write it; AVIF, which Pillow reads, has the same frame."""
    brands = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1")
    return data[4:8] == b"ftyp" and data[8:12] in brands and b"avif" not in data[16:64]


def load_image(
    path: str | Path, *, rotate: bool = True, data: bytes | None = None
) -> tuple[Tensor, Tensor]:
    """Read any common image as sRGB over black, uint8 (H, W, 3), and alpha, uint8 (H, W).

    Handles RGB(A), greyscale, palettes, transparency keys, 16 bits a channel, CMYK and EXIF
    rotation.  Colour profiles are ignored: values are taken as sRGB.

    Args:
        rotate: turn the picture as its EXIF data say; False for pictures whose camera was
            calibrated on the stored pixels (COLMAP and nerfstudio ignore EXIF).
        data: the file's bytes where they were read already.

    Raises:
        DatasetError: if the file is missing, no image, truncated, or larger than `MAX_PIXELS`.
    """
    image = decoded(path, data)
    if rotate and orientation(image) > 1:
        with contextlib.suppress(Exception):  # damaged EXIF data
            image = ImageOps.exif_transpose(image)
    if image.mode[0] in "IF":  # Pillow's own conversion would clip to 8 bits, not scale
        values = np.nan_to_num(np.asarray(image).astype(np.float64))
        most = 1 if image.mode == "F" else 65535
        if image.mode != "F" and (values.min() < 0 or values.max() > most):
            raise DatasetError(f"{path}: greyscale values beyond 16 bits ({values.max():.0f})")
        image = Image.fromarray((values.clip(0, most) * (255 / most) + 0.5).astype(np.uint8))
    rgba = np.asarray(image.convert("RGBA"))
    colour, alpha = rgba[..., :3].astype(np.uint16), rgba[..., 3]
    over_black = (colour * alpha[..., None] + 127) // 255
    return torch.from_numpy(over_black.astype(np.uint8)), torch.from_numpy(alpha.copy())


def image_files(folder: str | Path) -> list[Path]:
    """The image files directly in a folder, by name."""
    root = Path(folder)
    found = root.iterdir() if root.is_dir() else ()
    return sorted(path for path in found if path.suffix.lower() in IMAGE_SUFFIXES)


def as_photographs(images: InputImages, size: int, elevation_deg: float) -> InputImages:
    """Pictures whose cameras are forgotten: each is placed on the orbit at azimuth 0 and the
    assumed elevation, looking at the world origin, and marked ``elevation_is_assumed``."""
    if not -89 <= elevation_deg <= 89:
        raise ValueError(f"elevation_deg: got {elevation_deg}, want degrees in [-89, 89]")
    cameras = standard_orbit(torch.zeros(len(images)), elevation_deg, size)
    small = images.resized(size)
    return replace(small, cameras=cameras, depth=None, elevation_is_assumed=True)
