"""What Gaussians, cameras, views and verdicts look like in a notebook: one small picture each.

Offline and quick, drawn on the CPU; whatever comes from elsewhere is escaped.
"""

import html
from typing import Any

import torch

from fresnel.gate.verdict import Verdict
from fresnel.render import Views, render
from fresnel.scene.cameras import Cameras, orbit
from fresnel.scene.gaussians import Gaussians
from fresnel.show import gate, pictures
from fresnel.show.scenes import fitted, on_ground, straight

_SIDE = 160
"""Pixels of a picture."""
_MOST = 8
"""Pictures in a preview."""


def preview(value: Any) -> str:
    """HTML of a picture of `value` (Gaussians, Cameras, Views or a Verdict), and what it is.

    Raises:
        TypeError: for anything else.
    """
    kinds: dict[type, Any] = {
        Gaussians: _gaussians,
        Cameras: _cameras,
        Views: _views,
        Verdict: _verdict,
    }
    drawn = next((draw for kind, draw in kinds.items() if isinstance(value, kind)), None)
    if drawn is None:
        raise TypeError(f"value: got {type(value).__name__}, want Gaussians, Cameras, Views, ...")
    words = html.escape(repr(value))
    return f'<figure style="margin:.5rem 0">{drawn(value)}<figcaption>{words}</figcaption></figure>'


def _gaussians(value: Gaussians) -> str:
    """The first scenes, from a little aside and above of +Z, where they fill the picture."""
    flat = Gaussians(*(_flat(getattr(value, name), value) for name in vars(value))).detach()
    shown = []
    for one in (flat[k].to("cpu", torch.float32) for k in range(min(4, len(flat.means)))):
        one = one.select(one.opacities > 0.02)
        if not one.num:
            continue
        weight = one.scales.prod(-1) * one.opacities
        one = one.select(weight.topk(min(one.num, 60_000)).indices)
        reach = (one.means - one.means.mean(0)).norm(dim=-1).quantile(0.9).clamp_min(1e-3)
        size: dict[str, Any] = {"focal_px": 1.0, "width": 1, "height": 1}
        camera = orbit(torch.tensor([25.0]), 12.0, 4 * reach, pivot=one.means.mean(0), **size)
        shown.append(render(one, fitted(one, camera, _SIDE), backend="cpu"))
    return "".join(_views(views) for views in shown)


def _flat(part: torch.Tensor, of: Gaussians) -> torch.Tensor:
    return part.reshape(-1, *part.shape[len(of.batch_shape) :])


def _cameras(value: Cameras) -> str:
    """Where they stand and look, from above."""
    flat = value.reshape(-1)
    flat = flat[:64].to("cpu", torch.float64)
    eyes, ahead = flat.centers[:, ::2], flat.forward[:, ::2]
    middle = (eyes.amax(0) + eyes.amin(0)) / 2
    reach = 2 * (eyes - middle).abs().max().clamp_min(0.5).item()
    parts = []
    for (x, z), (dx, dz) in zip(((eyes - middle) / reach).tolist(), ahead.tolist(), strict=True):
        x, z = 80 + 120 * x, 80 + 120 * z  # towards the reader: +Z, where azimuth is 0
        parts.append(f"<circle cx='{x:.1f}' cy='{z:.1f}' r='3'/>")
        parts.append(f"<path d='M{x:.1f} {z:.1f}l{16 * dx:.1f} {16 * dz:.1f}'/>")
    return (
        f"<svg width='{_SIDE}' height='{_SIDE}' viewBox='0 0 160 160' role='img' fill='#0072B2' "
        f"stroke='#0072B2' aria-label='Cameras from above'>{''.join(parts)}</svg>"
    )


def _views(value: Views) -> str:
    """The first pictures, on grey."""
    parts = (part.detach().float().cpu() for part in (value.rgb, value.alpha, value.depth))
    step = max(1, value.rgb.shape[-2] // _SIDE)
    flat = (part.reshape(-1, *part.shape[-3:])[:_MOST, ::step, ::step] for part in parts)
    found = on_ground(straight(Views(*flat)))
    sheet = pictures.contact_sheet([[*found[k : k + 4]] for k in range(0, len(found), 4)])
    return f'<img src="{pictures.picture_uri(sheet, lossy=True)}" alt="">'


def _verdict(value: Verdict) -> str:
    """The light of the views by azimuth, as a share of their input's; and the reasons."""
    profile = gate.azimuth_profile(value)
    bars = []
    for k, light in enumerate(profile["frame_luminance_ratio"]):
        high = 70 * min(light, 2.0) / 2 if light == light else 0.0
        bars.append(f"<rect x='{20 * k + 2}' y='{70 - high:.1f}' width='16' height='{high:.1f}'/>")
        at = f"{profile['azimuth_deg'][k]:.0f}"
        bars.append(
            f"<text x='{20 * k + 10}' y='80' font-size='8' text-anchor='middle'>{at}</text>"
        )
    colour = "#009E73" if value.passed else "#D55E00"
    reasons = "".join(f"<li>{html.escape(reason.message)}</li>" for reason in value.reasons)
    return (
        f"<svg width='{_SIDE}' height='84' viewBox='0 0 160 84' role='img' fill='{colour}' "
        "aria-label='Light of the views by azimuth, as a share of the input&#39;s'>"
        f"{''.join(bars)}<path d='M0 35h160' stroke='#777777' stroke-dasharray='3'/></svg>"
        f"<ol>{reasons}</ol>"
    )
