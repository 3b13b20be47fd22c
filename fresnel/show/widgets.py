"""Pictures that a reader can work with: sheets of views, sliders, and a scene to turn in 3D.

Each goes into a notebook's output as one self-contained piece of SVG or HTML, styled and scripted
within itself, so that it works in JupyterLab, in the report, and without a network.
"""

from __future__ import annotations

import base64
import hashlib
import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fresnel.render import render
from fresnel.render.reference import rotation
from fresnel.scene.cameras import Cameras, look_at
from fresnel.scene.gaussians import Gaussians, quaternion_from_rotation
from fresnel.show import style as figures


def show_sheet(
    rows: Sequence[Sequence[Any]],
    alt: str,
    *,
    columns: Sequence[str] = (),
    labels: Sequence[str] = (),
    first_apart: bool = True,
) -> None:
    """Put a labelled grid of pictures into the notebook's output: lettering sharp, pixels as made.

    Args:
        rows: pictures (H, W, 3), uint8 or [0, 1]; each row may be of another size.
        alt: the finding in words, for readers who cannot see the pictures.
        columns: a heading per column.
        labels: a caption per row, above its pictures.
        first_apart: leave a wider gap after the first column (the input).
    """
    from IPython.display import display

    _check(alt, bool(rows) and all(len(row) for row in rows))
    svg = _sheet(rows, columns, labels, first_apart)
    mime = "image/svg+xml"
    display({mime: svg, "text/plain": alt}, raw=True, metadata={mime: {"alt": alt}})


def show_pair(before: Any, after: Any, names: tuple[str, str], alt: str) -> None:
    """Put two pictures of one size on top of each other, with a slider that parts them.

    Args:
        before, after: pictures (H, W, 3), uint8 or [0, 1]; `before` shows left of the slider.
        names: what they are, in a word or two each.
        alt: what the two together show.
    """
    from IPython.display import display

    one, two = figures.to_uint8(before), figures.to_uint8(after)
    _check(alt, one.shape == two.shape and one.ndim == 3)
    left, right = (html.escape(name) for name in names)
    whole = "display:block;width:100%;height:auto;border-radius:8px"
    text = (
        f'<figure class="fresnel-pair" style="--at:50%;margin:.75rem 0;max-width:56rem">'
        f'<div style="position:relative">'
        f'<img src="{_uri(two)}" alt="{html.escape(alt)}" style="{whole}">'
        f'<img src="{_uri(one)}" alt="" style="{whole};position:absolute;inset:0;'
        f'clip-path:inset(0 calc(100% - var(--at)) 0 0)">'
        '<i aria-hidden="true" style="position:absolute;top:0;bottom:0;left:var(--at);width:2px;'
        'margin-left:-1px;background:#fff;box-shadow:0 0 0 1px #000"></i></div>'
        '<div class="pair-slide" style="display:flex;gap:.8rem;align-items:center">'
        f"<span>{left}</span>"
        f'<input type="range" min="0" max="100" value="50" style="flex:1" '
        f'aria-label="How much of {left} to show, over {right}" '
        "oninput=\"this.closest('figure').style.setProperty('--at',this.value+'%')\">"
        f"<span>{right}</span></div></figure>"
    )
    display({"text/html": text, "text/plain": alt}, raw=True)


def tile(pictures: Sequence[Any], columns: int = 4) -> np.ndarray:
    """Pictures (H, W, 3) of one size in a grid without gaps: RGB uint8 array."""
    cells = [figures.to_uint8(picture) for picture in pictures]
    cells += [np.zeros_like(cells[0])] * (-len(cells) % columns)
    lines = [np.concatenate(cells[i : i + columns], 1) for i in range(0, len(cells), columns)]
    return np.concatenate(lines, 0)


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
        g, path = self.gaussians, Path(path)
        many = torch.cat([self.input_camera.viewmats[None], self.cameras.viewmats])
        arrays = {
            "means": g.means.half(),
            "quats": g.quats.half(),
            "scales": g.scales.half(),
            "opacities": g.opacities.half(),
            "colors": (g.colors.clamp(0, 1) * 255).round().byte(),
            "viewmats": many,
            "Ks": torch.cat([self.input_camera.Ks[None], self.cameras.Ks]),
            "pivot": self.pivot,
            "size": torch.tensor([self.cameras.width, self.cameras.height]),
        }
        plain: dict[str, Any] = {name: a.detach().cpu().numpy() for name, a in arrays.items()}
        np.savez_compressed(path, **plain)
        return path

    @classmethod
    def load(cls, path: str | Path) -> Scene:
        """Read what `save` wrote."""
        with np.load(path) as file:
            t = {name: torch.from_numpy(file[name].astype(np.float32)) for name in file.files}
        width, height = (int(side) for side in t["size"])
        gaussians = Gaussians(
            t["means"], t["quats"], t["scales"].clamp_min(1e-7), t["opacities"], t["colors"] / 255
        )
        cameras = Cameras(t["viewmats"], t["Ks"], width, height)
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
    many Gaussians, the most opaque and largest ones (a viewer of 16,000 takes 1.2 MB)."""
    g = gaussians.detach().to("cpu", torch.float32)
    if g.sh_degree is not None:
        raise ValueError("gaussians: want plain colours, got spherical harmonics")
    weight = g.opacities * g.scales.sort(dim=-1).values[..., 1:].prod(-1).sqrt()
    kept = (g.opacities >= min_opacity).nonzero()[:, 0]
    kept = kept[weight[kept].argsort(descending=True)[:most]]
    return Scene(g.select(kept), cameras.to("cpu"), input_camera.to("cpu"), pivot.cpu().float())


def show_scene(shown: Scene, alt: str, *, height_px: int = 420) -> None:
    """Put a scene into the notebook's output: a still picture, and a button that makes of it an
    interactive viewer (viser's, complete in the page; it needs WebGL). Where viser is missing or
    finds no port to make its page through, the picture stands alone and says so.

    In the viewer the input camera is vermilion, the others are blue, and the pivot is a black dot.
    """
    from IPython.display import display

    _check(alt, shown.gaussians.num > 0)
    picture = (
        f'<img src="{_uri(still(shown))}" alt="{html.escape(alt)}" '
        f'style="width:{height_px}px;max-width:100%;border-radius:8px">'
    )
    try:
        document = html.escape(_viewer(shown))
    except (ImportError, OSError) as error:
        lost = html.escape(f"There is no viewer here: {error}. To get one: pip install viser")
        text = f'<figure class="fresnel-viewer">{picture}<figcaption>{lost}</figcaption></figure>'
        display({"text/html": text, "text/plain": alt}, raw=True)
        return
    # the button stays where it was, so that the focus does too
    script = (
        "const f=this.closest('figure'),v=f.querySelector('iframe'),s=f.querySelector('img');"
        "const on=v.hidden;if(on&&!v.srcdoc)v.srcdoc=v.dataset.document;"
        "v.hidden=!on;s.hidden=on;this.textContent=on?'Show the still picture':'Turn it in 3D'"
    )
    text = (
        '<figure class="fresnel-viewer" style="margin:.75rem 0;max-width:56rem">'
        f'{picture}<iframe hidden title="{html.escape(alt)}" data-document="{document}" '
        f'style="width:100%;height:{height_px}px;border:1px solid #868f9b;border-radius:8px">'
        f"</iframe>"
        f'<div><button type="button" class="button viewer-open" style="margin-top:.4rem" '
        f'onclick="{html.escape(script)}">Turn it in 3D</button></div></figure>'
    )
    display({"text/html": text, "text/plain": alt}, raw=True)


def still(shown: Scene, size_px: int = 320) -> np.ndarray:
    """The scene's Gaussians from above and aside: RGB uint8 array (size_px, size_px, 3)."""
    target, eye = _viewpoint(shown.gaussians.means)
    camera = look_at(eye[None], target, focal_px=1.2 * size_px, width=size_px, height=size_px)
    return figures.to_uint8(render(shown.gaussians, camera, backend="cpu").rgb[0])


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
    turn = rotation(g.quats)
    covariances = turn @ torch.diag_embed(g.scales.square()) @ turn.mT
    everything = torch.cat([g.means, shown.cameras.centers, shown.input_camera.centers[None]])
    target = (everything.amin(0) + everything.amax(0)) / 2
    reach = torch.linalg.norm(everything.amax(0) - everything.amin(0)).item()
    _, eye = _viewpoint(g.means)
    eye = target + torch.nn.functional.normalize(eye - g.means.mean(0), dim=0) * 1.1 * reach
    console = rich.get_console()
    console.quiet, talked = True, console.quiet  # it greets, and says goodbye
    server = viser.ViserServer(host="127.0.0.1", port=0, verbose=False)
    try:
        space = server.scene
        space.set_up_direction("+y")
        server.initial_camera.position = tuple(eye.tolist())
        server.initial_camera.look_at = tuple(target.tolist())
        space.add_gaussian_splats(
            "/object",
            centers=g.means.numpy(),
            covariances=covariances.numpy(),
            rgbs=g.colors.numpy(),
            opacities=g.opacities.numpy()[:, None],
        )
        space.add_icosphere(
            "/pivot", radius=0.012 * reach, color=(0, 0, 0), position=shown.pivot.numpy()
        )
        _frustum(space, "/input camera", shown.input_camera, 0.09 * reach, (213, 94, 0))
        for i in range(len(shown.cameras)):
            _frustum(space, f"/cameras/{i}", shown.cameras[i], 0.06 * reach, (0, 114, 178))
        return space.as_html()
    finally:
        server.stop()
        console.quiet = talked


def _frustum(space: Any, name: str, camera: Cameras, scale: float, color: tuple) -> None:
    pose = quaternion_from_rotation(camera.viewmats[:3, :3].T)
    fov = 2 * torch.atan(camera.height / (2 * camera.Ks[1, 1])).item()
    space.add_camera_frustum(
        name,
        fov=fov,
        aspect=camera.width / camera.height,
        scale=scale,
        wxyz=pose.numpy(),
        position=camera.centers.numpy(),
        color=color,
    )


def _sheet(
    rows: Sequence[Sequence[Any]], columns: Sequence[str], labels: Sequence[str], apart: bool
) -> str:
    """The SVG of `show_sheet`: each different picture once, in its own pixels."""
    cell, gap = 96, 4
    head, caption = (18 if columns else 0), (18 if labels else 0)
    wide = 2 * gap if apart and max(map(len, rows)) > 1 else 0
    pictures: dict[str, str] = {}
    parts: list[str] = []

    def write(x: float, y: float, text: str) -> None:
        parts.append(f'<text x="{x}" y="{y}" style="font-size: 12px">{html.escape(text)}</text>')

    top = head + gap
    for r, row in enumerate(rows):
        if r < len(labels):
            write(gap, top + 13, labels[r])
        height = 0
        for c, picture in enumerate(row):
            left = gap + c * (cell + gap) + (wide if c else 0)
            if r == 0 and c < len(columns):
                write(left, 14, columns[c])
            array = figures.to_uint8(picture)
            data = _uri(array)
            key = "p" + hashlib.sha1(data.encode()).hexdigest()[:10]
            tall = round(cell * array.shape[0] / array.shape[1])
            if key not in pictures:
                pictures[key] = (
                    f'<image id="{key}" width="{cell}" height="{tall}" '
                    f'style="image-rendering: pixelated" xlink:href="{data}"/>'
                )
            parts.append(f'<use xlink:href="#{key}" x="{left}" y="{top + caption}"/>')
            height = max(height, tall)
        top += caption + height + gap
    width = gap + max(map(len, rows)) * (cell + gap) + wide
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{width}px" height="{top}px" viewBox="0 0 {width} {top}" '
        f'font-family="DejaVu Sans, sans-serif">'
        f'<g class="fresnel-sheet"><rect width="{width}" height="{top}" style="fill: #ffffff"/>'
        f"<defs>{''.join(pictures.values())}</defs>{''.join(parts)}</g></svg>"
    )


def _uri(picture: np.ndarray) -> str:
    data = figures.to_png(np.ascontiguousarray(picture))
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def _check(alt: str, fits: bool) -> None:
    if not alt.strip():
        raise ValueError("alt: want a sentence that says what the picture shows")
    if not fits:
        raise ValueError("pictures: got none, or two of different sizes")
