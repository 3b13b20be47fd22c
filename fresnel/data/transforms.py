"""transforms.json: nerfstudio's, instant-ngp's and Blender's (NeRF synthetic); read and written.

``transform_matrix`` is an OpenGL camera-to-world matrix in a world whose Z is up; here the world is
turned so that Y is (x, y, z) -> (x, z, -y).  Intrinsics stand at the top or in each frame:
``fl_x fl_y cx cy w h``, or ``camera_angle_x`` in radians.  ``camera_model`` PINHOLE, SIMPLE_PINHOLE
and OPENCV (k1 k2 p1 p2, and k3) are read, OPENCV_FISHEYE (k1 k2 k3 k4) too.  ``file_path`` may
lack its extension, as Blender's do.  A folder with transforms_train.json, _val and _test instead
is one capture of all of them.  Depth maps and ``applied_scale`` are not used.

https://docs.nerf.studio/quickstart/data_conventions.html
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.spatial.transform import Rotation

from fresnel.data import layout as _layouts
from fresnel.data.captures import Capture, Floats, Lens, View, collect, pinhole
from fresnel.data.images import IMAGE_SUFFIXES, DatasetError, image_size
from fresnel.data.layout import inside, relative
from fresnel.data.records import ObjectViews
from fresnel.data.writing import replaced

_PARTS = ("transforms_train.json", "transforms_val.json", "transforms_test.json")
_MAX_JSON_BYTES = 1 << 28
Y_UP = np.array([[1.0, 0, 0], [0, 0, 1.0], [0, -1.0, 0]])
"""World of the file (Z up) to ours (Y up)."""
_FLIP = np.diag([1.0, -1.0, -1.0, 1.0])
_MODELS = ("PINHOLE", "SIMPLE_PINHOLE", "OPENCV", "OPENCV_FISHEYE", "PERSPECTIVE")


def recognises(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("transforms.json", *_PARTS))


def read(root: Path, folder: str) -> list[Capture]:
    """The capture that ``root / folder`` describes."""
    base = root / folder
    whole = (base / "transforms.json").is_file()
    names = ["transforms.json"] if whole else [name for name in _PARTS if (base / name).is_file()]
    views: list[View] = []
    marks: dict[str, Any] = {}
    for name in names:
        path = inside(root, f"{folder}/{name}" if folder else name)
        top = _layouts.read_json(path, limit=_MAX_JSON_BYTES)
        frames = top.get("frames")
        if not isinstance(frames, list):
            raise DatasetError(f"{path}: has no list of frames")
        if len(frames) > 50_000:
            raise DatasetError(f"{path}: {len(frames)} frames, the limit is 50000. Split it up")
        marks |= top["fresnel"] if isinstance(top.get("fresnel"), dict) else {}
        sizes: dict[str, tuple[int, int]] = {}
        views += [_view(root, folder, path, top, frame, sizes) for frame in frames]
    if len(names) > 1:
        views = list({view.image: view for view in views}.values())  # a copied split repeats them
    descriptions = [f"{folder}/{name}" if folder else name for name in names]
    where = base / names[0]
    return [
        collect(
            where,
            folder or base.resolve().name,
            views,
            descriptions,
            Y_UP,
            notes={"format": "nerfstudio", "up": "the file's Z"},
            **_marked(root, folder, where, marks, views),
        )
    ]


def _view(
    root: Path,
    folder: str,
    path: Path,
    top: dict[str, Any],
    frame: Any,
    sizes: dict[str, tuple[int, int]],
) -> View:
    if not isinstance(frame, dict):
        raise DatasetError(f"{path}: a frame is a {type(frame).__name__}, want a JSON object")
    image = _picture(root, relative(root, folder, frame.get("file_path"), path))
    mask = frame.get("mask_path")
    matrix = _matrix(frame, path)
    with np.errstate(all="ignore"):
        try:
            viewmat = _FLIP @ np.linalg.inv(matrix)
        except np.linalg.LinAlgError:
            raise DatasetError(f"{path}: the matrix of {image!r} is singular") from None
    both = {**top, **frame}
    model = both.get("camera_model", "OPENCV")
    if model not in _MODELS:
        raise DatasetError(f"{path}: camera_model {model!r}; want one of {_MODELS}")
    K, size = _intrinsics(root, path, both, image, sizes)
    lens: Lens = ("PINHOLE", ())
    if model == "OPENCV":
        k1, k2, p1, p2, k3 = (
            _number(both, name, path, 0.0) for name in ("k1", "k2", "p1", "p2", "k3")
        )
        lens = ("FULL_OPENCV", (k1, k2, p1, p2, k3, 0.0, 0.0, 0.0))
    elif model == "OPENCV_FISHEYE":
        fisheye = ("k1", "k2", "k3", "k4")
        lens = (model, tuple(_number(both, name, path, 0.0) for name in fisheye))
    return View(
        image=image,
        viewmat=viewmat,
        K=K,
        size=size,
        mask="" if mask is None else relative(root, folder, mask, path),
        lens=lens,
    )


def _matrix(frame: dict[str, Any], path: Path) -> Floats:
    try:
        rows = frame["transform_matrix"]
        short = len(rows) == 3
    except (KeyError, TypeError):
        raise DatasetError(f"{path}: a frame has no transform_matrix, want 4 x 4 numbers") from None
    matrix = _layouts.array(frame, "transform_matrix", (3, 4) if short else (4, 4), path)
    if short:
        matrix = np.vstack([matrix, [0, 0, 0, 1]])
    if np.abs(matrix[3] - [0, 0, 0, 1]).max() > 1e-6:
        raise DatasetError(f"{path}: a transform_matrix doesn't end in 0 0 0 1")
    return matrix


def _number(values: dict[str, Any], key: str, path: Path, default: float | None = None) -> float:
    value = values.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e12:
        raise DatasetError(f"{path}: {key} is {str(value)[:80]!r}, want a finite number")
    return float(value)


def _intrinsics(
    root: Path, path: Path, both: dict[str, Any], image: str, sizes: dict[str, tuple[int, int]]
) -> tuple[Floats, tuple[int, int]]:
    """K and the size it is for.  Without w and h the first picture of the file is measured."""
    if "w" in both or "h" in both:
        size = (round(_number(both, "w", path)), round(_number(both, "h", path)))
    else:
        size = sizes.setdefault("", (0, 0))
        if size == (0, 0):
            size = sizes[""] = image_size(inside(root, image))
    width, height = size
    if "fl_x" in both:
        fx = _number(both, "fl_x", path)
    elif "camera_angle_x" in both:
        fx = _focal(both, "camera_angle_x", width, path)
    elif "fl_y" in both:
        fx = _number(both, "fl_y", path)
    else:
        raise DatasetError(f"{path}: has neither fl_x nor camera_angle_x for {image!r}")
    if "fl_y" in both:
        fy = _number(both, "fl_y", path)
    elif "camera_angle_y" in both and "fl_x" not in both:
        fy = _focal(both, "camera_angle_y", height, path)
    else:
        fy = fx
    cx, cy = _number(both, "cx", path, width / 2), _number(both, "cy", path, height / 2)
    return pinhole(fx, fy, cx, cy), size


def _focal(values: dict[str, Any], key: str, pixels: int, path: Path) -> float:
    angle = _number(values, key, path)
    if not 0 < angle < math.pi:
        raise DatasetError(f"{path}: {key} is {angle}, want radians in (0, pi)")
    return 0.5 * pixels / math.tan(0.5 * angle)


def _picture(root: Path, image: str) -> str:
    """The file's path; with the extension that Blender's scripts leave out."""
    if Path(image).suffix.lower() in IMAGE_SUFFIXES or inside(root, image).is_file():
        return image
    for suffix in IMAGE_SUFFIXES:
        if (root / f"{image}{suffix}").is_file():
            return f"{image}{suffix}"
    raise DatasetError(f"{root / image}: no such file, with or without an extension of an image")


def _marked(
    root: Path, folder: str, where: Path, marks: dict[str, Any], views: list[View]
) -> dict[str, Any]:
    """Pivot and input view, where `export` wrote the file."""
    more: dict[str, Any] = {}
    if "pivot" in marks:
        more["pivot"] = Y_UP @ _layouts.array(marks, "pivot", (3,), where)
    if "input" in marks:
        image = relative(root, folder, marks["input"], where)
        more["input_view"] = next((k for k, v in enumerate(views) if v.image == image), None)
    if isinstance(marks.get("attribution"), str):
        more["attribution"] = marks["attribution"]
    return more


# --- writing -----------------------------------------------------------------------------------


def export(path: str | Path, objects: Iterable[ObjectViews], *, overwrite: bool = False) -> Path:
    """Write each object as a folder with a transforms.json that nerfstudio and gsplat read.

    ``path/NAME/transforms.json`` and ``images/*.png`` (RGBA, straight alpha): the input as
    ``images/input.png``, then the views.  The world is turned to Z up; the intrinsics stand at the
    top and in every frame, since some tools look only there, others only here.  A key
    "fresnel" keeps the pivot, the input and the attribution; other tools ignore it.  gsplat's own
    trainer reads COLMAP: ``sparse/0`` is a text model of the same cameras, with points from the
    depth where there is some (without, its trainer wants --init_type random).  Depth maps are not
    written.

    Returns:
        ``path``, which `dataset.open` reads again.

    Raises:
        DatasetError: if ``path`` is taken or nothing came.
    """
    target = Path(path)
    if target.exists() and any(target.iterdir()):
        if not overwrite:
            raise DatasetError(f"{target}: exists. Choose another path or pass overwrite=True")
        if not all(_is_export(entry) for entry in target.iterdir()):
            raise DatasetError(f"{target}: holds more than an export of ours. Choose another path")
    names: set[str] = set()
    with replaced(target) as partial:
        for views in objects:
            plain = (c if c.isalnum() or c in "-_ ." else "_" for c in views.name)
            folder = "".join(plain).strip(". ")
            if not folder or folder in names:
                raise DatasetError(f"{target}: can't name a folder after object {views.name!r}")
            names.add(folder)
            _export_one(partial / folder, views)
        if not names:
            raise DatasetError(f"{target}: nothing to write: no object came")
    return target


def _is_export(folder: Path) -> bool:
    """Whether `export` wrote the folder of one object: only that may be replaced."""
    path = folder / "transforms.json"
    if not path.is_file():
        return False
    try:
        return isinstance(_layouts.read_json(path, limit=_MAX_JSON_BYTES).get("fresnel"), dict)
    except DatasetError:
        return False


def _export_one(folder: Path, views: ObjectViews) -> None:
    (folder / "images").mkdir(parents=True)
    frames: list[dict[str, Any]] = []
    model = _Model()
    depths = views.depth if views.depth is not None else [None] * len(views.rgb)
    pictures = [
        ("input", views.input_rgb, views.input_alpha, views.input_camera, views.input_depth)
    ]
    pictures += [
        (f"view_{k:03d}", views.rgb[k], views.alpha[k], views.cameras[k], depths[k])
        for k in range(len(views.rgb))
    ]
    for name, rgb, alpha, camera, depth in pictures:
        (folder / "images" / f"{name}.png").write_bytes(_layouts.png(_straight(rgb, alpha)))
        viewmat = camera.viewmats.double().numpy().copy()
        viewmat[:3, :3] = viewmat[:3, :3] @ Y_UP
        matrix = np.linalg.inv(_FLIP @ viewmat)
        K = camera.Ks.double().numpy()
        model.add(f"{name}.png", viewmat, K, rgb.numpy(), alpha.numpy(), depth)
        frames.append(
            {
                "file_path": f"images/{name}.png",
                "transform_matrix": matrix.tolist(),
                "fl_x": K[0, 0],
                "fl_y": K[1, 1],
                "cx": K[0, 2],
                "cy": K[1, 2],
                "w": camera.width,
                "h": camera.height,
            }
        )
    first = {key: frames[1][key] for key in ("fl_x", "fl_y", "cx", "cy", "w", "h")}
    description = {
        "camera_model": "OPENCV",
        **{name: 0.0 for name in ("k1", "k2", "p1", "p2")},
        **first,
        "camera_angle_x": 2 * math.atan(0.5 * first["w"] / first["fl_x"]),
        "fresnel": {
            "pivot": (Y_UP.T @ views.pivot.double().numpy()).tolist(),
            "input": "images/input.png",
            "attribution": views.attribution,
        },
        "frames": frames,
    }
    (folder / "transforms.json").write_text(json.dumps(description, indent=1))
    model.write(folder / "sparse" / "0")


def _straight(rgb: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    """RGBA uint8 (H, W, 4) with straight alpha, which premultiplies to ``rgb`` again."""
    cover = alpha.to(torch.int32)[..., None]
    color = (rgb.to(torch.int32) * 255 + cover // 2) // cover.clamp_min(1) * (cover > 0)
    return torch.cat([color.clamp(0, 255), cover], dim=-1).to(torch.uint8)


class _Model:
    """A COLMAP text model in the making: one PINHOLE camera an image."""

    def __init__(self) -> None:
        self.cameras: list[str] = []
        self.images: list[str] = []
        self.points: list[str] = []

    def add(
        self, name: str, viewmat: Floats, K: Floats, rgb: Any, alpha: Any, depth: Any | None
    ) -> None:
        number = len(self.cameras) + 1
        height, width = alpha.shape
        focals = f"{K[0, 0]:.9g} {K[1, 1]:.9g} {K[0, 2]:.9g} {K[1, 2]:.9g}"
        self.cameras.append(f"{number} PINHOLE {width} {height} {focals}")
        x, y, z, w = Rotation.from_matrix(viewmat[:3, :3]).as_quat()
        seven = (w, x, y, z, *viewmat[:3, 3])
        pose = " ".join(f"{value:.17g}" for value in seven)
        seen: list[str] = []
        if depth is not None:
            step = max(1, round((width * height / 1000) ** 0.5))
            y, x = np.nonzero((alpha == 255)[::step, ::step])
            y, x = y * step, x * step
            z = depth.numpy()[y, x].astype(np.float64)
            rays = np.linalg.inv(K) @ np.stack([x + 0.5, y + 0.5, np.ones(len(x))])
            world = viewmat[:3, :3].T @ (rays * z - viewmat[:3, 3:])
            for point, pixel, color in zip(
                world.T, zip(x + 0.5, y + 0.5, strict=True), rgb[y, x], strict=True
            ):
                index = len(self.points) + 1
                position = " ".join(f"{value:.9g}" for value in point)
                shade = " ".join(str(value) for value in color)
                self.points.append(f"{index} {position} {shade} 0 {number} {len(seen)}")
                seen.append(f"{pixel[0]} {pixel[1]} {index}")
        self.images += [f"{number} {pose} {number} {name}", " ".join(seen)]

    def write(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        for name in ("cameras", "images"):
            (folder / f"{name}.txt").write_text("\n".join(getattr(self, name)) + "\n")
        (folder / "points3D.txt").write_text("".join(f"{line}\n" for line in self.points))
