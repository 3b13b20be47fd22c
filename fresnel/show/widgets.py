"""A scene in 3D: Gaussians and the cameras that look at them, still and to turn in the page."""

from __future__ import annotations

import html
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fresnel.data.dataset import ObjectViews
from fresnel.render import render
from fresnel.scene.cameras import Cameras, look_at
from fresnel.scene.gaussians import (
    Gaussians,
    quaternion_from_rotation,
    rotation_from_quaternion,
)
from fresnel.show.pictures import evenly, picture_uri
from fresnel.show.style import put, to_uint8

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
    def load(cls, path: str | Path) -> Scene:
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
    most: int = 16_000,
    min_opacity: float = 0.02,
) -> Scene:
    """A scene to show: plain colours, on the CPU, without what nobody could see, and at most so
    many Gaussians, the most opaque and largest ones (a viewer of 16,000 takes 1.2 MB).

    They are as large as the renderer draws them at the 128 pixels that decoders are trained at (it
    widens each by 0.55 of a pixel); closer by they would be a screen of dots."""
    g = gaussians.detach().to("cpu", torch.float32)
    if g.sh_degree is not None:
        raise ValueError("gaussians: want plain colours, got spherical harmonics")
    weight = g.opacities * g.scales.sort(dim=-1).values[..., 1:].prod(-1).sqrt()
    kept = (g.opacities >= min_opacity).nonzero()[:, 0]
    kept = kept[weight[kept].argsort(descending=True)[:most]]
    g, source = g.select(kept), input_camera.to("cpu")
    distance = torch.linalg.norm(g.means.mean(0) - source.centers)
    blur = 0.3**0.5 * distance / (source.Ks[0, 0] * 128 / source.width)
    g = replace(g, scales=(g.scales.square() + blur.square()).sqrt())
    return Scene(g, cameras.to("cpu"), source, pivot.cpu().float())


def show_scene(shown: Scene, alt: str, *, height_px: int = 420) -> None:
    """Put a scene into the notebook's output: a still picture, and a button that makes of it an
    interactive viewer (viser's, complete in the page; it needs WebGL). Where viser is missing or
    finds no port to make its page through, the picture stands alone and says so.

    The viewer opens on the object; further out stand the input camera (vermilion), the others
    (blue), and the pivot is a black dot.
    """
    said = html.escape(alt)
    picture = (
        f'<img src="{picture_uri(still(shown))}" alt="{said}" '
        f'style="width:{height_px}px;max-width:100%;border-radius:8px">'
    )
    try:
        document = html.escape(_viewer(shown))
    except (ImportError, OSError) as error:
        lost = html.escape(f"There is no viewer here: {error}. To get one: pip install viser")
        text = f'<figure class="fresnel-viewer">{picture}<figcaption>{lost}</figcaption></figure>'
        put("text/html", text, alt)
        return
    # the button stays where it was, so that the focus does too
    script = (
        "const f=this.closest('figure'),v=f.querySelector('iframe'),s=f.querySelector('img');"
        "const on=v.hidden;if(on&&!v.srcdoc)v.srcdoc=v.dataset.document;"
        "v.hidden=!on;s.hidden=on;this.textContent=on?'Show the still picture':'Turn it in 3D'"
    )
    text = (
        '<figure class="fresnel-viewer" style="margin:.75rem 0;max-width:56rem">'
        f'{picture}<iframe hidden title="{said}" data-document="{document}" style="width:100%;'
        f'height:{height_px}px;border:1px solid #868f9b;border-radius:8px"></iframe>'
        f'<div><button type="button" class="button viewer-open" style="margin-top:.4rem" '
        f'onclick="{html.escape(script)}">Turn it in 3D</button></div></figure>'
    )
    put("text/html", text, alt)


def still(shown: Scene, size_px: int = 320) -> np.ndarray:
    """The scene's Gaussians from above and aside: RGB uint8 array (size_px, size_px, 3)."""
    target, eye = _viewpoint(shown.gaussians.means)
    camera = look_at(eye[None], target, focal_px=1.2 * size_px, width=size_px, height=size_px)
    return to_uint8(render(shown.gaussians, camera, backend="cpu").rgb[0])


def _viewpoint(points: Tensor) -> tuple[Tensor, Tensor]:
    """The middle of most of the points (P, 3), and an eye from which they fill a picture."""
    low, high = (points.quantile(q, dim=0) for q in (0.02, 0.98))
    target, reach = (low + high) / 2, torch.linalg.norm(high - low).clamp_min(1e-3)
    direction = torch.nn.functional.normalize(torch.tensor([0.75, 0.5, 1.0]), dim=0)
    return target, target + 1.5 * reach * direction


def _viewer(shown: Scene) -> str:
    """viser's page of the scene: one HTML document with everything in it."""
    import rich
    import viser

    g = shown.gaussians
    turn = rotation_from_quaternion(g.quats)
    covariances = turn @ torch.diag_embed(g.scales.square()) @ turn.mT
    target, eye = _viewpoint(g.means)  # of the object: whoever wants the cameras turns the wheel
    reach = torch.linalg.norm(shown.cameras.centers - shown.pivot, dim=-1).mean().item()
    console = rich.get_console()
    console.quiet, talked = True, console.quiet  # it greets, and says goodbye
    server = viser.ViserServer(host="127.0.0.1", port=0, verbose=False)
    try:
        space = server.scene
        space.set_up_direction("+y")
        server.initial_camera.position = tuple(eye.tolist())
        server.initial_camera.look_at = tuple(target.tolist())
        centers, colors, opacities = (a.numpy() for a in (g.means, g.colors, g.opacities[:, None]))
        space.add_gaussian_splats(
            "/object", centers, covariances=covariances.numpy(), rgbs=colors, opacities=opacities
        )
        space.add_icosphere("/pivot", 0.01 * reach, (0, 0, 0), position=shown.pivot.numpy())
        looking = [("/input camera", shown.input_camera, 0.12, (213, 94, 0))]
        looking += [
            (f"/cameras/{i}", shown.cameras[i], 0.08, (0, 114, 178))
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
        return space.as_html()
    finally:
        server.stop()
        console.quiet = talked


def record_scene(record: ObjectViews, gaussians: Gaussians | None = None) -> Scene | None:
    """A record to turn in 3D: these Gaussians of it, or else what a trainer is shown, the covered
    pixels, each a Gaussian as large as its pixel; None without Gaussians and without depth."""
    if gaussians is None:
        means, colors, radii = (part[:: len(part) // 16_000 + 1] for part in covered_pixels(record))
        turns = torch.tensor([1.0, 0.0, 0.0, 0.0]).expand(len(means), 4)
        scales = radii[:, None].expand(-1, 3).clamp_min(1e-6)
        gaussians = Gaussians(means, turns, scales, torch.full((len(means),), 0.95), colors)
    shown = scene(gaussians, record.cameras, record.input_camera, record.pivot)
    return shown if shown.gaussians.num else None


def content_points(record: ObjectViews, limit: int = 1500) -> np.ndarray:
    """Points on the object in the world, (P, 3), from the input's and the views' depth maps."""
    means = covered_pixels(record)[0]
    return means[evenly(len(means), limit)].numpy()


def describe_geometry(record: ObjectViews, content: np.ndarray) -> str:
    """Alt text of the cameras around `content`."""
    distance = torch.linalg.norm(record.cameras.centers - record.pivot, dim=-1).mean()
    text = f"{len(record.cameras)} cameras stand {distance:.1f} units around the pivot; "
    if len(content) == 0:
        return text + "no depth says where the object is."
    away = np.linalg.norm(content.mean(axis=0) - record.pivot.numpy())
    return text + f"the object's centroid is {away:.1f} units away from the pivot."


def covered_pixels(record: ObjectViews) -> tuple[Tensor, Tensor, Tensor]:
    """World positions (P, 3), colours (P, 3) and half widths (P,) of all pixels with depth."""
    seen = [(record.cameras, record.depth, record.rgb)]
    if record.input_depth is not None:
        one = record.input_camera.reshape(1), record.input_depth[None], record.input_rgb[None]
        seen.insert(0, one)
    found = [(torch.zeros(0, 3), torch.zeros(0, 3), torch.zeros(0))]
    for cameras, depth, rgb in seen:
        if depth is not None:
            there, (eyes, directions) = depth > 0, cameras.rays()
            ahead = (directions * cameras.forward[:, None, None]).sum(-1)  # depth is along the axis
            means = eyes + directions * (depth / ahead)[..., None]
            radii = 0.5 * depth / cameras.Ks[:, :1, :1]
            found.append((means[there], rgb[there].float() / 255, radii[there]))
    means, colors, radii = (torch.cat(parts) for parts in zip(*found, strict=True))
    return means, colors, radii
