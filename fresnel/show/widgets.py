"""A scene in a notebook or a report: a still, and what makes of it a page to turn it in."""

import html
import re
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fresnel.data.dataset import ObjectViews
from fresnel.scene.gaussians import Gaussians
from fresnel.show.pictures import evenly, picture_uri
from fresnel.show.scenes import Scene, page, scene, still
from fresnel.show.style import put

_SCRIPT = re.compile(r"<script\b[^>]*>(.*?)</script>", re.DOTALL)
_UNPACKED = (
    "e.textContent=code;",
    'e.src=URL.createObjectURL(new Blob([code],{type:"text/javascript"}));',
)
"""viser's page unpacks most of its script; a policy of hashes runs what has an address instead."""


def show_scene(shown: Scene, alt: str, *, height_px: int = 420, **about: Any) -> None:
    """Put a scene into the notebook's output: a still picture, and a button that makes of it an
    interactive viewer (viser's, complete in the page; it needs WebGL). Where viser is missing or
    finds no port to make its page through, the picture stands alone and says so.

    See `scenes.page`: the input camera (vermilion), the others (blue) and the pivot (a black dot)
    are off until the "rig" is switched on in viser's scene tree.
    """
    said = html.escape(alt)
    picture = (
        f'<img src="{picture_uri(still(shown))}" alt="{said}" '
        f'style="width:{height_px}px;max-width:100%;border-radius:8px">'
    )
    try:
        document = page(shown, alt).replace(*_UNPACKED)
    except (ImportError, OSError) as error:
        lost = html.escape(f"There is no viewer here: {error}. To get one: pip install viser")
        text = f'<figure class="fresnel-viewer">{picture}<figcaption>{lost}</figcaption></figure>'
        put("text/html", text, alt, **about)
        return
    # the button stays where it was, so that the focus does too
    script = (
        "const f=this.closest('figure'),v=f.querySelector('iframe'),s=f.querySelector('img');"
        "const on=v.hidden;if(on&&!v.srcdoc)v.srcdoc=v.dataset.document;"
        "v.hidden=!on;s.hidden=on;this.textContent=on?'Show the still picture':'Turn it in 3D'"
    )
    text = (
        '<figure class="fresnel-viewer" style="margin:.75rem 0;max-width:56rem">'
        f'{picture}<iframe hidden title="{said}" sandbox="allow-scripts" '
        f'data-document="{html.escape(document)}" style="width:100%;'
        f'height:{height_px}px;border:1px solid #868f9b;border-radius:8px"></iframe>'
        f'<div><button type="button" class="button viewer-open" style="margin-top:.4rem" '
        f'onclick="{html.escape(script)}">Turn it in 3D</button></div></figure>'
    )
    put("text/html", text, alt, [script, *_SCRIPT.findall(document)], **about)


def record_scene(
    record: ObjectViews, gaussians: Gaussians | None = None, *, most: int = 16_000
) -> Scene | None:
    """A record to turn in 3D: these Gaussians of it, or else what a trainer is shown, the covered
    pixels (at most so many), each a Gaussian as large as its pixel, larger where some are left
    out; None without Gaussians and without depth."""
    if gaussians is None:
        found = covered_pixels(record)
        every = len(found[0]) // most + 1
        means, colors, radii = (part[::every] for part in found)
        radii = radii * every**0.5
        turns = torch.tensor([1.0, 0.0, 0.0, 0.0]).expand(len(means), 4)
        scales = radii[:, None].expand(-1, 3).clamp_min(1e-6)
        gaussians = Gaussians(means, turns, scales, torch.full((len(means),), 0.95), colors)
    shown = scene(gaussians, record.cameras, record.input_camera, record.pivot, most=most)
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
    """World positions (P, 3), colours (P, 3) and half widths (P,) of all pixels with depth that are
    half covered: of fewer 8 bits over black know no colour, and specks of any would show."""
    seen = [(record.cameras, record.depth, record.rgb, record.alpha)]
    if record.input_depth is not None:
        camera, away = record.input_camera.reshape(1), record.input_depth[None]
        seen.insert(0, (camera, away, record.input_rgb[None], record.input_alpha[None]))
    found = [(torch.zeros(0, 3), torch.zeros(0, 3), torch.zeros(0))]
    for cameras, depth, rgb, alpha in seen:
        if depth is not None:
            there, (eyes, directions) = (depth > 0) & (alpha >= 128), cameras.rays()
            ahead = (directions * cameras.forward[:, None, None]).sum(-1)  # depth is along the axis
            means = eyes + directions * (depth / ahead)[..., None]
            radii = 0.5 * depth / cameras.Ks[:, :1, :1]
            colors = rgb[there] / alpha[there, None]  # they are over black
            found.append((means[there], colors.clamp(0, 1), radii[there]))
    means, colors, radii = (torch.cat(parts) for parts in zip(*found, strict=True))
    return means, colors, radii
