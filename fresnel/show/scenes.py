"""Gaussians from any side, filling the frame: stills, a turntable, a page in which to turn them.

Whatever the resolution, they are as large as decoders are trained to be drawn: see `scene`.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from fresnel.render import EPS2D, Views, render
from fresnel.scene.cameras import Cameras, orbit
from fresnel.scene.gaussians import (
    Gaussians,
    quaternion_from_rotation,
    rotation_from_quaternion,
)

GROUND = 236
"""The grey that pictures stand on, apart from black and from white objects."""
_ASIDE_DEG, _ABOVE_DEG = 25.0, 8.0  # of the input camera, where a first look shows depth too
_SMOKE = 0.06  # alpha below which there is nothing to see
# viser follows no theme
_PAGE = """<script>
window.__VISER_EMBED_CONFIG__.darkMode = matchMedia("(prefers-color-scheme: dark)").matches;
document.title = TITLE;
</script><style>
:root { color-scheme: light dark } #root { height: min(100vh, 100vw) !important; width: 100% }
body { display: grid !important; align-content: center; height: 100vh; background: Canvas }
@media (prefers-color-scheme: dark) { body { background: #141414 !important } }
</style>"""

_UNPACKED = "const code=td.decode(heap.subarray(up+ss,up+sz))"
_CORNERS = (
    _UNPACKED + ".replace('[-2,-2,2,-2,2,2,-2,2]),2)',"
    "'[-2,-2,1e3,2,-2,-1e3,2,2,1e3,-2,2,-1e3]),3)')"
)
"""viser's splats have corners of two coordinates, of which three.js makes a sphere of NaN, and says
so. With a third, which their shader does not read, the sphere holds whatever there is to see."""
_HALF = ("means", "quats", "scales", "opacities")


@dataclass(frozen=True)
class Scene:
    """Gaussians and the cameras that look at them, in one world.

    gaussians: one scene. cameras: (V,). input_camera: (). pivot: (3,), what the cameras are said
    to orbit."""

    gaussians: Gaussians
    cameras: Cameras
    input_camera: Cameras
    pivot: Tensor

    @property
    def middle(self) -> Tensor:
        """Of what there is to see, (3,): the object's, wherever the pivot is."""
        low, high = (self.gaussians.means.quantile(q, dim=0) for q in (0.02, 0.98))
        return (low + high) / 2

    def save(self, path: str | Path) -> Path:
        """Write as .npz; means and scales in half precision, which a picture does not tell."""
        g, path, both = self.gaussians, Path(path), (self.input_camera.reshape(1), self.cameras)
        arrays = {name: getattr(g, name).half() for name in _HALF}
        arrays["colors"] = (g.colors.clamp(0, 1) * 255).round().byte()
        arrays |= {n: torch.cat([getattr(c, n) for c in both]) for n in ("viewmats", "Ks")}
        arrays["pivot"] = self.pivot
        arrays["size"] = torch.tensor([self.cameras.width, self.cameras.height])
        plain: dict[str, Any] = {name: a.detach().cpu().numpy() for name, a in arrays.items()}
        np.savez_compressed(path, **plain)
        return path

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote."""
        with np.load(path) as file:
            t = {name: torch.from_numpy(file[name].astype(np.float32)) for name in file.files}
        t["scales"].clamp_(min=1e-7)
        gaussians = Gaussians(**{name: t[name] for name in _HALF}, colors=t["colors"] / 255)
        cameras = Cameras(t["viewmats"], t["Ks"], *t["size"].int().tolist())
        return cls(gaussians, cameras[1:], cameras[0], t["pivot"])


def scene(
    gaussians: Gaussians,
    cameras: Cameras,
    input_camera: Cameras,
    pivot: Tensor,
    *,
    most: int | None = 16_000,
    min_opacity: float = 0.02,
    drawn_at: int = 128,
) -> Scene:
    """A scene to show: plain colours, on the CPU, without what nobody could see, and at most so
    many Gaussians, the most opaque and largest ones (a viewer of 16,000 takes 1.2 MB).

    They are made as large as the renderer draws them in pictures of `drawn_at` pixels, which the
    decoder is trained with (it widens each by 0.55 of a pixel): larger ones would show a screen of
    dots."""
    g = gaussians.detach().to("cpu", torch.float32)
    if g.sh_degree is not None:
        raise ValueError("gaussians: want plain colours, got spherical harmonics")
    weight = g.opacities * g.scales.sort(dim=-1).values[..., 1:].prod(-1).sqrt()
    kept = (g.opacities >= min_opacity).nonzero()[:, 0]
    kept = kept[weight[kept].argsort(descending=True)[:most]]
    g, source = g.select(kept), input_camera.to("cpu")
    distance = torch.linalg.norm(g.means.mean(0) - source.centers)
    blur = EPS2D**0.5 * distance / (source.Ks[0, 0] * drawn_at / source.width)
    g = replace(g, scales=(g.scales.square() + blur.square()).sqrt())
    return Scene(g, cameras.to("cpu"), source, pivot.cpu().float())


def abreast(columns: Sequence[Sequence[Scene]]) -> Scene:
    """Scenes in one world, to be turned in step: a column an object, its scenes below each other,
    each about the middle of its column's first; seen from their worlds' front, from far away."""
    all_of_them = [each for column in columns for each in column]
    reach = max(float(s.gaussians.means.sub(s.middle).norm(dim=-1).max()) for s in all_of_them)
    moved = []
    for across, column in enumerate(columns):
        for down, each in enumerate(column):
            place = 1.7 * reach * torch.tensor([float(across), -float(down), 0.0])
            means = each.gaussians.means - column[0].middle + place
            moved.append(replace(each.gaussians, means=means))
    names = (*_HALF, "colors")
    parts = {name: torch.cat([getattr(g, name) for g in moved]) for name in names}
    middle = parts["means"].quantile(0.5, dim=0)
    far = 4.0 * reach * max(len(columns), 2)
    one: dict[str, Any] = {"focal_px": 1.0, "width": 1, "height": 1}
    eye = orbit(torch.tensor([0.0]), 12.0, far, pivot=middle, **one)
    return Scene(Gaussians(**parts), eye, eye[0], middle)


def around(shown: Scene, azimuths_deg: Sequence[float], above_deg: float = 0.0) -> Cameras:
    """Cameras (V,) about the middle of the object, as far from it as the input camera, from its
    azimuth onwards, at its elevation or above it."""
    target, source = shown.middle, shown.input_camera
    azimuths = source.azimuth_deg(target) + torch.tensor([*azimuths_deg], dtype=torch.float32)
    elevation = (source.elevation_deg(target) + above_deg).clamp(-60, 60)
    distance = torch.linalg.norm(source.centers - target).clamp_min(1e-3)
    one = {"focal_px": 1.0, "width": 1, "height": 1}
    return orbit(azimuths, elevation, distance, pivot=target, **one)  # type: ignore[arg-type]


def fitted(gaussians: Gaussians, cameras: Cameras, size: int) -> Cameras:
    """Cameras (V,) where they stand, of pictures of `size` x `size` pixels whose frame the object
    fills to 0.86: one crop for all of them, so that nothing jumps."""
    seen = gaussians.opacities >= gaussians.opacities.median().clamp_max(0.5)
    turn, shift = cameras.viewmats[:, :3, :3], cameras.viewmats[:, None, :3, 3]
    x, y, z = (gaussians.means[seen] @ turn.mT + shift).unbind(-1)
    across, down = x / z.clamp_min(1e-3), y / z.clamp_min(1e-3)
    wide = 2 * float(across.abs().quantile(0.995, dim=1).max())
    top, bottom = float(down.quantile(0.005, dim=1).min()), float(down.quantile(0.995, dim=1).max())
    focal = 0.86 * size / max(wide, bottom - top, 1e-3)
    middle = size / 2 - focal * (top + bottom) / 2
    Ks = torch.tensor([[focal, 0.0, size / 2], [0.0, focal, middle], [0.0, 0.0, 1.0]])
    return Cameras(cameras.viewmats, Ks.expand(len(cameras), 3, 3), size, size)


def still(shown: Scene, size_px: int = 384) -> np.ndarray:
    """The scene from a little aside and above of its input camera: RGB uint8 (size_px, size_px,
    3)."""
    return turntable(shown, size_px, (_ASIDE_DEG,), _ABOVE_DEG)[0]


def turntable(
    shown: Scene,
    size_px: int = 384,
    azimuths_deg: Sequence[float] = range(0, 360, 10),
    above_deg: float = 0.0,
) -> list[np.ndarray]:
    """Pictures once around the object, RGB uint8 (size_px, size_px, 3), on grey."""
    cameras = fitted(shown.gaussians, around(shown, azimuths_deg, above_deg), size_px)
    return [on_ground(p) for p in straight(render(shown.gaussians, cameras, backend="cpu"))]


def save_turntable(frames: Sequence[np.ndarray], path: str | Path, turn_s: float = 3.6) -> None:
    """Write pictures as an animated WebP that goes round without end."""
    from PIL import Image

    first, *rest = (Image.fromarray(frame) for frame in frames)
    timing = {"duration": round(1000 * turn_s / len(frames)), "loop": 0}
    first.save(path, "WEBP", save_all=True, append_images=rest, quality=80, **timing)


def straight(views: Views) -> np.ndarray:
    """Views (..., V) over black as RGBA uint8 (N, H, W, 4), of straight alpha, without the smoke
    that an alpha of a few per cent is before white."""
    alpha = views.alpha.clamp(0, 1)
    clear = ((alpha - _SMOKE) / (1 - _SMOKE)).clamp_min(0)
    colour = (views.rgb / alpha.clamp_min(_SMOKE)).clamp(0, 1) * (clear > 0)
    rgba = torch.cat([colour, clear], dim=-1).flatten(0, -4).detach().cpu().numpy()
    return (rgba * 255 + 0.5).astype(np.uint8)


def on_ground(rgba: np.ndarray) -> np.ndarray:
    """RGBA uint8 (..., 4) of straight alpha on grey: RGB uint8 (..., 3)."""
    alpha = rgba[..., 3:] / 255.0
    return (rgba[..., :3] * alpha + GROUND * (1 - alpha) + 0.5).astype(np.uint8)


def page(shown: Scene, title: str) -> str:
    """viser's page of the scene, to turn it in: one HTML document with everything in it, in the
    reader's light or dark. The object fills it; cameras and pivot wait in its scene tree ("rig").

    Raises:
        ImportError: where viser is missing.
        OSError: where there is no port to make it through.
    """
    import rich
    import viser

    g = shown.gaussians
    turn = rotation_from_quaternion(g.quats)
    covariances = turn @ torch.diag_embed(g.scales.square()) @ turn.mT
    eye = around(shown, [_ASIDE_DEG], _ABOVE_DEG)[0]
    focal, high = fitted(g, around(shown, range(0, 360, 30), _ABOVE_DEG), 2).Ks[0, 1, 1:].tolist()
    reach = torch.linalg.norm(shown.cameras.centers - shown.pivot, dim=-1).mean().item()
    console = rich.get_console()
    console.quiet, talked = True, console.quiet  # it greets, and says goodbye
    server = viser.ViserServer(host="127.0.0.1", port=0, verbose=False)
    try:
        space, start = server.scene, server.initial_camera
        space.set_up_direction("+y")
        start.position = tuple(eye.centers.tolist())
        start.look_at = tuple(shown.middle.tolist())
        start.fov = 2 * math.atan((1 + abs(high - 1)) / focal)
        centers, colors, opacities = (a.numpy() for a in (g.means, g.colors, g.opacities[:, None]))
        space.add_gaussian_splats(
            "/object", centers, covariances=covariances.numpy(), rgbs=colors, opacities=opacities
        )
        space.add_frame("/rig", show_axes=False, visible=False)
        space.add_icosphere("/rig/pivot", 0.01 * reach, (0, 0, 0), position=shown.pivot.numpy())
        looking = [("/rig/input camera", shown.input_camera, 0.12, (213, 94, 0))]
        looking += [
            (f"/rig/camera {i}", shown.cameras[i], 0.08, (0, 114, 178))
            for i in range(len(shown.cameras))
        ]
        for name, camera, scale, color in looking:
            space.add_camera_frustum(
                name,
                fov=2 * torch.atan(camera.height / (2 * camera.Ks[1, 1])).item(),
                aspect=camera.width / camera.height,
                scale=scale * reach,
                wxyz=quaternion_from_rotation(camera.viewmats[:3, :3].T).numpy(),
                position=camera.centers.numpy(),
                color=color,
            )
        made = space.as_html().replace(_UNPACKED, _CORNERS)
    finally:
        server.stop()
        console.quiet = talked
    said = json.dumps(title).replace("<", "\\u003c")  # which would end the script
    return made.replace("</head>", _PAGE.replace("TITLE", said) + "</head>", 1)
