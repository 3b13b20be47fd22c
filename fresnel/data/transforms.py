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

from fresnel.data.captures import MAX_VIEWS, Capture, Floats, Lens, View, collect, pinhole
from fresnel.data.images import IMAGE_SUFFIXES, DatasetError, decoded
from fresnel.data.layout import array, entry, inside, read_json, relative
from fresnel.data.records import ObjectViews, png
from fresnel.data.writing import replaced

_PARTS = ("transforms_train.json", "transforms_val.json", "transforms_test.json")
Y_UP = np.array([[1.0, 0, 0], [0, 0, 1.0], [0, -1.0, 0]])
"""World of the file (Z up) to ours (Y up)."""
_FLIP = np.diag([1.0, -1.0, -1.0, 1.0])
_MODELS = {
    "PINHOLE": (),
    "SIMPLE_PINHOLE": (),
    "PERSPECTIVE": (),
    "OPENCV": ("k1", "k2", "p1", "p2", "k3"),
    "OPENCV_FISHEYE": ("k1", "k2", "k3", "k4"),
}


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
        path = inside(root, relative(folder, name, root))
        top = read_json(path)
        frames = entry(top, "frames", list, path)
        if len(frames) > MAX_VIEWS:
            said = f"{len(frames)} frames, the limit is {MAX_VIEWS}. Split it up"
            raise DatasetError(f"{path}: {said}")
        marks |= entry(top, "fresnel", dict, path, {})
        sizes: list[tuple[int, int]] = []
        views += [_view(root, folder, path, top, frame, sizes) for frame in frames]
    if len(names) > 1:
        views = list({view.image: view for view in views}.values())  # a copied split repeats them
    where = base / names[0]
    more: dict[str, Any] = {"attribution": entry(marks, "attribution", str, where, "")}
    if "pivot" in marks:  # `export` wrote the file
        more["pivot"] = Y_UP @ array(marks, "pivot", (3,), where)
    if "input" in marks:
        more["input_image"] = relative(folder, marks["input"], where)
    label = folder or base.resolve().name
    said_in = [relative(folder, name, root) for name in names]
    return [collect(where, label, views, said_in, "nerfstudio", Y_UP, **more)]


def _view(
    root: Path,
    folder: str,
    path: Path,
    top: dict[str, Any],
    frame: Any,
    sizes: list[tuple[int, int]],
) -> View:
    image = _picture(root, relative(folder, entry(frame, "file_path", str, path), path))
    mask = frame.get("mask_path")
    with np.errstate(all="ignore"):
        try:
            viewmat = _FLIP @ np.linalg.inv(_matrix(frame, path))
        except np.linalg.LinAlgError:
            raise DatasetError(f"{path}: the matrix of {image!r} is singular") from None
    both = {**top, **frame}
    model = entry(both, "camera_model", str, path, "OPENCV")
    if model not in _MODELS:
        raise DatasetError(f"{path}: camera_model {model!r}; want one of {tuple(_MODELS)}")
    bends = tuple(float(entry(both, name, float, path, 0.0)) for name in _MODELS[model])
    lens: Lens = (model, bends) if bends else ("PINHOLE", ())
    if model == "OPENCV":
        lens = ("FULL_OPENCV", (*bends, 0.0, 0.0, 0.0))
    K, size = _intrinsics(root, path, both, image, sizes)
    return View(image, viewmat, K, size, "" if mask is None else relative(folder, mask, path), lens)


def _matrix(frame: dict[str, Any], path: Path) -> Floats:
    rows = len(entry(frame, "transform_matrix", list, path))
    matrix = array(frame, "transform_matrix", (3 if rows == 3 else 4, 4), path)
    matrix = np.vstack([matrix, [0, 0, 0, 1]]) if rows == 3 else matrix
    if np.abs(matrix[3] - [0, 0, 0, 1]).max() > 1e-6:
        raise DatasetError(f"{path}: a transform_matrix doesn't end in 0 0 0 1")
    return matrix


def _intrinsics(
    root: Path, path: Path, both: dict[str, Any], image: str, sizes: list[tuple[int, int]]
) -> tuple[Floats, tuple[int, int]]:
    """K and the size it is for.  Without w and h the first picture of the file is measured."""

    def number(key: str, default: float | None = None) -> float:
        return float(entry(both, key, float, path, default))

    def focal(pixels: str, angle: str, count: int) -> float | None:
        if pixels in both:
            return number(pixels)
        if angle not in both or "fl_x" in both:
            return None
        if not 0 < number(angle) < math.pi:
            raise DatasetError(f"{path}: {angle} is {number(angle)}, want radians in (0, pi)")
        return 0.5 * count / math.tan(0.5 * number(angle))

    if "w" in both or "h" in both:
        width, height = round(number("w")), round(number("h"))
    else:
        if not sizes:
            sizes.append(decoded(inside(root, image), pixels=False).size)
        width, height = sizes[0]
    fx, fy = focal("fl_x", "camera_angle_x", width), focal("fl_y", "camera_angle_y", height)
    fx = number("fl_y") if fx is None and "fl_y" in both else fx
    if fx is None:
        raise DatasetError(f"{path}: has neither fl_x nor camera_angle_x for {image!r}")
    middle = number("cx", width / 2), number("cy", height / 2)
    return pinhole(fx, fx if fy is None else fy, *middle), (width, height)


def _picture(root: Path, image: str) -> str:
    """The file's path; with the extension that Blender's scripts leave out."""
    if Path(image).suffix.lower() in IMAGE_SUFFIXES or inside(root, image).is_file():
        return image
    for suffix in IMAGE_SUFFIXES:
        if (root / f"{image}{suffix}").is_file():
            return f"{image}{suffix}"
    raise DatasetError(f"{root / image}: no such file, with or without an extension of an image")


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
        return isinstance(read_json(path).get("fresnel"), dict)
    except DatasetError:
        return False


def _export_one(folder: Path, views: ObjectViews) -> None:
    (folder / "images").mkdir(parents=True)
    frames: list[dict[str, Any]] = []
    depths = views.depth if views.depth is not None else [None] * len(views.rgb)
    first = ("input", views.input_rgb, views.input_alpha, views.input_camera, views.input_depth)
    pictures = [
        first,
        *(
            (f"view_{k:03d}", views.rgb[k], views.alpha[k], views.cameras[k], depths[k])
            for k in range(len(views.rgb))
        ),
    ]
    import pycolmap

    model = pycolmap.Reconstruction()
    for number, (stem, rgb, alpha, camera, depth) in enumerate(pictures, 1):
        name = f"{stem}.png"
        (folder / "images" / name).write_bytes(png(_straight(rgb, alpha)))
        viewmat = camera.viewmats.double().numpy().copy()
        viewmat[:3, :3] = viewmat[:3, :3] @ Y_UP
        K = camera.Ks.double().numpy()
        size = {"w": camera.width, "h": camera.height}
        optics = {"fl_x": K[0, 0], "fl_y": K[1, 1], "cx": K[0, 2], "cy": K[1, 2], **size}
        matrix = np.linalg.inv(_FLIP @ viewmat)
        frames.append(
            {"file_path": f"images/{name}", "transform_matrix": matrix.tolist(), **optics}
        )
        lens = pycolmap.Camera(
            camera_id=number,
            model="PINHOLE",
            width=camera.width,
            height=camera.height,
            params=[K[0, 0], K[1, 1], K[0, 2], K[1, 2]],
        )
        model.add_camera_with_trivial_rig(lens)
        pixels, points, colors = _points(viewmat, K, rgb, alpha, depth)
        image = pycolmap.Image(name=name, camera_id=number, image_id=number)
        image.points2D = pycolmap.Point2DList([pycolmap.Point2D(pixel) for pixel in pixels])
        left, _, right = np.linalg.svd(viewmat[:3, :3])  # float32's rotations are not exact
        pose = pycolmap.Rigid3d(np.hstack([left @ right, viewmat[:3, 3:]]))
        model.add_image_with_trivial_frame(image, pose)
        for k, (point, color) in enumerate(zip(points, colors, strict=True)):
            track = pycolmap.Track([pycolmap.TrackElement(number, k)])
            model.add_point3D(point, track, color)
    (folder / "sparse/0").mkdir(parents=True)
    model.write_text(str(folder / "sparse/0"))
    top = {key: frames[1][key] for key in ("fl_x", "fl_y", "cx", "cy", "w", "h")}
    description = {
        "camera_model": "OPENCV",
        **{name: 0.0 for name in ("k1", "k2", "p1", "p2")},
        **top,
        "camera_angle_x": 2 * math.atan(0.5 * top["w"] / top["fl_x"]),
        "fresnel": {
            "pivot": (Y_UP.T @ views.pivot.double().numpy()).tolist(),
            "input": "images/input.png",
            "attribution": views.attribution,
        },
        "frames": frames,
    }
    (folder / "transforms.json").write_text(json.dumps(description, indent=1))


def _straight(rgb: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    """RGBA uint8 (H, W, 4) with straight alpha, which premultiplies to ``rgb`` again."""
    cover = alpha.to(torch.int32)[..., None]
    color = (rgb.to(torch.int32) * 255 + cover // 2) // cover.clamp_min(1) * (cover > 0)
    return torch.cat([color.clamp(0, 255), cover], dim=-1).to(torch.uint8)


def _points(viewmat: Floats, K: Floats, rgb: Any, alpha: Any, depth: Any) -> tuple[Any, Any, Any]:
    """About a thousand opaque pixels (N, 2), their places in the world (N, 3) and colours."""
    if depth is None:
        return [], [], []
    step = max(1, round((alpha.numel() / 1000) ** 0.5))
    y, x = step * np.array(np.nonzero((alpha.numpy() == 255)[::step, ::step]))
    pixels = np.stack([x, y], axis=1) + 0.5
    rays = np.linalg.inv(K) @ np.vstack([pixels.T, np.ones(len(x))])
    places = viewmat[:3, :3].T @ (rays * depth.numpy()[y, x] - viewmat[:3, 3:])
    return pixels, places.T, rgb.numpy()[y, x]
