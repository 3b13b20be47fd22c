"""Analytic test objects: axis-aligned boxes with striped faces, ray-cast exactly."""

from dataclasses import dataclass, field
from typing import Any

import torch

from fresnel.data.dataset import ObjectViews
from fresnel.scene.cameras import Cameras, orbit


def cast(
    cameras: Cameras,
    extent: tuple[float, float, float],
    colors: torch.Tensor,
    centre: tuple[float, float, float] = (0.0, 0.0, 0.0),
    stripes: float = 4.0,
    samples: int = 2,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """rgb u8 (V, H, W, 3) over black, alpha u8, depth: an L-shaped pair of boxes.

    Args:
        colors: sRGB of the three face directions, (3, 3).
        stripes: a unit; 0 leaves the faces plain.
        samples: rays a pixel each way.
    """
    fine = cameras.resized(cameras.width * samples, cameras.height * samples)
    origins, directions = fine.rays()
    big = torch.tensor(extent) / 2
    middle = torch.tensor(centre)
    # The second box sticks out at one side, so that no two azimuths look alike.
    small, beside = big * torch.tensor([0.5, 0.4, 0.6]), big * torch.tensor([1.0, 0.6, 0.8])
    t, hit, rgb = _box(
        origins, directions, middle, big * torch.tensor([1, 0.8, 0.7]), colors, stripes
    )
    t2, hit2, rgb2 = _box(origins, directions, middle + beside, small, colors.roll(1, 0), stripes)
    nearer = hit2 & (~hit | (t2 < t))
    t, rgb, hit = torch.where(nearer, t2, t), torch.where(nearer[..., None], rgb2, rgb), hit | hit2
    z = t * (directions * fine.forward[..., None, None, :]).sum(-1)
    cover = hit.float()

    def pool(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.avg_pool2d(x, samples)

    alpha = pool(cover)
    image = torch.stack([pool(rgb[..., c] * cover) for c in range(3)], dim=-1)
    depth = torch.where(alpha > 0, pool(z * cover) / alpha.clamp_min(1e-6), 0.0)
    return (255 * image + 0.5).to(torch.uint8), (255 * alpha + 0.5).to(torch.uint8), depth


def _box(origins, directions, centre, half, colors, stripes):  # type: ignore[no-untyped-def]
    inverse = 1.0 / torch.where(directions.abs() < 1e-9, 1e-9, directions)
    near, far = ((centre + s * half - origins) * inverse for s in (-1, 1))
    entry, leave = torch.minimum(near, far), torch.maximum(near, far)
    t, axis = entry.max(-1)
    hit = (t < leave.min(-1).values) & (t > 0.01)
    point = origins + t[..., None] * directions - centre
    color = colors[axis]
    if stripes:
        band = torch.floor(point * stripes * 2).sum(-1) % 2
        color = color * (0.75 + 0.25 * band[..., None])
    return torch.where(hit, t, 0.0), hit, color * hit[..., None]


def views_of(
    index: int,
    *,
    size: int = 32,
    views: int = 8,
    extent: tuple[float, float, float] | None = None,
    colors: torch.Tensor | None = None,
    stripes: float = 4.0,
    pivot: tuple[float, float, float] = (0.0, 0.0, 0.0),
    centre: tuple[float, float, float] = (0.0, 0.0, 0.0),
    radius: float = 2.2,
    background: float = 0.0,
    depth: bool = True,
    identity: bool = True,
    samples: int = 2,
) -> ObjectViews:
    """A healthy record, or one whose orbit has another pivot than the object's centre."""
    generator = torch.Generator().manual_seed(index)
    if extent is None:
        a, b, c = (0.45 + 0.55 * torch.rand(3, generator=generator)).tolist()
        extent = (a, b, c)
    if colors is None:
        colors = 0.3 + 0.7 * torch.rand(3, 3, generator=generator)
    elevations = torch.rand(views, generator=generator) * 75 - 30
    azimuth = float(torch.rand(1, generator=generator)) * 360
    optics: dict[str, Any] = {"focal_px": 1.2 * size, "width": size, "height": size}
    camera = orbit(azimuth, 15.0, 2.2, pivot=centre, **optics)
    azimuths = azimuth + torch.arange(views) * (360 / views)
    cameras = orbit(azimuths, elevations, radius, pivot=pivot, **optics)
    look = extent, colors, centre, stripes, samples
    rgb, alpha, z = cast(cameras, *look)
    input_rgb, input_alpha, input_z = cast(camera.reshape(1), *look)
    behind = (255 - alpha[..., None].float()) * background
    return ObjectViews(
        name=f"box{index}",
        input_rgb=input_rgb[0],
        input_alpha=input_alpha[0],
        input_camera=camera,
        rgb=(rgb + behind + 0.5).clamp(0, 255).to(torch.uint8),
        alpha=alpha,
        cameras=cameras,
        pivot=torch.tensor(pivot),
        depth=z if depth else None,
        input_depth=input_z[0] if depth else None,
        identity_rgb=input_rgb[0].clone() if identity else None,
        identity_alpha=input_alpha[0].clone() if identity else None,
    )


@dataclass
class Memory:
    """As much of a dataset as the gate needs, in memory."""

    records: list[Any]
    background: tuple[float, float, float] = (0.0, 0.0, 0.0)
    content_hash: str = "sha256:" + "0" * 64
    read: list[int] = field(default_factory=list)
    meta: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Any:
        self.read.append(index)
        record = self.records[index]
        if isinstance(record, Exception):
            raise record
        return record
