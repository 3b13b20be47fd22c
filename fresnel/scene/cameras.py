"""Batches of pinhole cameras, and the few pieces of geometry everything else agrees on.

Conventions: OpenCV axes (x right, y down, z forward); ``viewmats`` map world to camera;
``Ks`` are in pixels with pixel centres at +0.5; the world has Y up.  An azimuth of 0 degrees is a
camera on the +Z side of the pivot, and azimuth grows towards +X.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.functional import normalize

STANDARD_RADIUS = 2.2
"""Distance from the pivot of our own orbits, in object lengths (longest side = 1)."""
STANDARD_FOCAL = 1.2
"""Focal length of our own orbits, in image widths: a sphere of radius 0.846 fits the frame."""


@dataclass(frozen=True)
class Cameras:
    """A batch of pinhole cameras that share one image size.

    Args:
        viewmats: world-to-camera matrices, shape (..., 4, 4).
        Ks: intrinsics in pixels, shape (..., 3, 3).
        width: image width in pixels.
        height: image height in pixels.

    Raises:
        ValueError: if shapes disagree, or the size is not positive; see `validate` for the rest.
    """

    viewmats: Tensor
    Ks: Tensor
    width: int
    height: int

    def __post_init__(self) -> None:
        shape, of_pixels = tuple(self.viewmats.shape), tuple(self.Ks.shape)
        if shape[-2:] != (4, 4) or of_pixels != (*shape[:-2], 3, 3):
            want = "(..., 4, 4) and (..., 3, 3)"
            raise ValueError(f"viewmats, Ks: got shapes {shape} and {of_pixels}, want {want}")
        if self.width < 1 or self.height < 1:
            raise ValueError(f"image size: got {self.width} x {self.height}, want at least 1 x 1")

    def validate(self) -> Self:
        """Check the values too: finite, rotations orthonormal, focal lengths positive."""
        if not (self.viewmats.isfinite().all() and self.Ks.isfinite().all()):
            raise ValueError("cameras: viewmats or Ks hold NaN or infinity; check the pose files")
        rotation = self.viewmats[..., :3, :3].double()
        identity = torch.eye(3, dtype=torch.float64, device=rotation.device)
        error = (rotation @ rotation.transpose(-1, -2) - identity).abs().amax(dim=(-1, -2))
        if (error > 1e-3).any() or (torch.linalg.det(rotation) < 0).any():
            raise ValueError(
                f"viewmats: a rotation is not orthonormal and right-handed (off by up to "
                f"{error.max().item():.3g}); want world-to-camera matrices without scale or mirror"
            )
        if (self.Ks[..., 0, 0] <= 0).any() or (self.Ks[..., 1, 1] <= 0).any():
            raise ValueError("Ks: a focal length is not positive; want pixels > 0")
        return self

    @property
    def batch_shape(self) -> torch.Size:
        return self.viewmats.shape[:-2]

    @property
    def device(self) -> torch.device:
        return self.viewmats.device

    @property
    def centers(self) -> Tensor:
        """Camera positions in the world, shape (..., 3)."""
        rotation, translation = self.viewmats[..., :3, :3], self.viewmats[..., :3, 3:]
        return -(rotation.transpose(-1, -2) @ translation)[..., 0]

    @property
    def forward(self) -> Tensor:
        """Unit viewing directions in the world, shape (..., 3)."""
        return self.viewmats[..., 2, :3]

    def __repr__(self) -> str:
        batch = " x ".join(map(str, self.batch_shape)) or "one"
        focal = f"focal length {self.Ks[..., 0, 0].mean().item():.4g} px"
        return f"Cameras({batch}, {self.width} x {self.height} px, {focal}, {self.device})"

    def _repr_html_(self) -> str:
        import fresnel  # which knows the rooms above this one

        return fresnel.preview(self)

    def __len__(self) -> int:
        if not self.batch_shape:
            raise TypeError("a single camera has no length")
        return self.batch_shape[0]

    def _map(self, function: Callable[[Tensor], Tensor]) -> Self:
        return replace(self, viewmats=function(self.viewmats), Ks=function(self.Ks))

    def __getitem__(self, index: Any) -> Self:
        return self._map(lambda tensor: tensor[index])

    def reshape(self, *batch: int) -> Self:
        return self._map(lambda tensor: tensor.reshape(*batch, *tensor.shape[-2:]))

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Self:
        return self._map(lambda tensor: tensor.to(device=device, dtype=dtype))

    def resized(self, width: int, height: int) -> Self:
        """The same cameras for images scaled to ``width`` x ``height`` pixels."""
        Ks = self.Ks.clone()  # scaled in place: a tensor of factors would come from the host
        Ks[..., 0, :] *= width / self.width
        Ks[..., 1, :] *= height / self.height
        return replace(self, Ks=Ks, width=width, height=height)

    def mirrored(self) -> Self:
        """Cameras in which the world mirrored in x looks like these cameras' mirrored pictures."""
        of_views, of_pixels, across = mirror_signs(self.device)
        Ks = self.Ks * of_pixels + across * self.width
        return replace(self, viewmats=self.viewmats * of_views, Ks=Ks)

    def transformed(self, new_from_world: Tensor) -> Self:
        """The same cameras with the world re-expressed by a rigid transform, shape (..., 4, 4)."""
        return replace(self, viewmats=self.viewmats @ rigid_inverse(new_from_world))

    def joined(self, others: Self) -> Self:
        """These cameras (M, V) and others (M, W) of the same size: (M, V + W)."""
        pairs = (self.viewmats, others.viewmats), (self.Ks, others.Ks)
        viewmats, Ks = (torch.cat(pair, dim=1) for pair in pairs)
        return replace(self, viewmats=viewmats, Ks=Ks)

    def reprojected(self, depth: Tensor, there: Self) -> tuple[Tensor, Tensor]:
        """Where what these cameras (...) show at z-depth (..., H, W) is in others (...): places in
        [-1, 1] of their pictures, (..., H, W, 2), and its z-depth there, (..., H, W)."""
        h, w = depth.shape[-2:]
        # pixel (x, y, 1) times z to the other's (x z, y z, z): a turn, and a shift
        move = there.viewmats @ rigid_inverse(self.viewmats)
        turn = there.Ks @ move[..., :3, :3] @ torch.linalg.inv(self.Ks)
        y, x = (torch.arange(k, device=depth.device) + 0.5 for k in (h, w))
        grid = torch.stack([*torch.meshgrid(x, y, indexing="xy"), depth.new_ones(h, w)], dim=-1)
        seen = (grid.flatten(0, 1) @ turn.mT).unflatten(-2, (h, w)) * depth[..., None]
        seen = seen + (there.Ks @ move[..., :3, 3:])[..., None, None, :, 0]
        size = depth.new_tensor([there.width, there.height])
        return seen[..., :2] / seen[..., 2:].clamp_min(1e-6) * 2 / size - 1, seen[..., 2]

    def rays(self) -> tuple[Tensor, Tensor]:
        """Ray origins and unit directions in the world, each of shape (..., H, W, 3)."""
        y, x = torch.meshgrid(
            torch.arange(self.height, device=self.device, dtype=self.viewmats.dtype) + 0.5,
            torch.arange(self.width, device=self.device, dtype=self.viewmats.dtype) + 0.5,
            indexing="ij",
        )
        pixels = torch.stack([x, y, torch.ones_like(x)], dim=-1).reshape(-1, 3)
        # inverses of Ks, which are upper triangular with a one below
        (fx, skew, cx), (fy, cy) = self.Ks[..., 0, :].unbind(-1), self.Ks[..., 1, 1:].unbind(-1)
        zero, one = torch.zeros_like(fx), torch.ones_like(fx)
        rows = [1 / fx, -skew / (fx * fy), (skew * cy / fy - cx) / fx]
        rows += [zero, 1 / fy, -cy / fy, zero, zero, one]
        inverse = torch.stack(rows, dim=-1).reshape(self.Ks.shape)
        turn = self.viewmats[..., :3, :3].transpose(-1, -2) @ inverse
        # contiguous, which einsum's result is not: norm and cross product are ten times as fast
        directions = normalize(pixels @ turn.transpose(-1, -2), dim=-1)
        directions = directions.unflatten(-2, (self.height, self.width))
        return self.centers[..., None, None, :].expand_as(directions), directions

    def pluecker(self, frame: Tensor) -> Tensor:
        """Pluecker coordinates (d, o x d) of every pixel's ray, shape (..., H, W, 6).

        Args:
            frame: rigid world-to-frame matrices, shape (4, 4) or (..., 4, 4); the rays are
                expressed there.
        """
        origins, directions = self.transformed(frame).rays()
        return torch.cat([directions, torch.linalg.cross(origins, directions)], dim=-1)

    def azimuth_deg(self, pivot: Tensor | Sequence[float]) -> Tensor:
        """Azimuths of the camera positions about ``pivot``, in degrees in (-180, 180]."""
        x, _, z = (self.centers - _vector(pivot, self.viewmats)).unbind(-1)
        return torch.rad2deg(torch.atan2(x, z))

    def elevation_deg(self, pivot: Tensor | Sequence[float]) -> Tensor:
        """Elevations of the camera positions above ``pivot``, in degrees."""
        x, y, z = (self.centers - _vector(pivot, self.viewmats)).unbind(-1)
        return torch.rad2deg(torch.atan2(y, torch.hypot(x, z)))


def _vector(value: Tensor | Sequence[float], like: Tensor) -> Tensor:
    if isinstance(value, Tensor):
        return value.to(like)
    # filled on the device: a tensor from the host would wait for a GPU's queue
    return torch.stack([like.new_full((), float(number)) for number in value])


def rigid(rotation: Tensor, translation: Tensor) -> Tensor:
    """4x4 matrices from rotations (..., 3, 3) and translations (..., 3)."""
    top = torch.cat([rotation, translation[..., None]], dim=-1)
    bottom = torch.eye(4, dtype=top.dtype, device=top.device)[3:]
    return torch.cat([top, bottom.expand(*top.shape[:-2], 1, 4)], dim=-2)


def rigid_inverse(matrices: Tensor) -> Tensor:
    """Inverses of rigid transforms (..., 4, 4); a few products, which a compiler can fuse."""
    rotation = matrices[..., :3, :3].transpose(-1, -2)
    return rigid(rotation, -(rotation @ matrices[..., :3, 3:])[..., 0])


def opengl(viewmats: Tensor) -> Tensor:
    """View matrices of OpenGL cameras (y up, looking down -z) as ours, or ours as those."""
    return viewmats * viewmats.new_tensor([1.0, -1.0, -1.0, 1.0])[:, None]


def intrinsics(focal_px: float | Tensor, width: int, height: int) -> Tensor:
    """Square-pixel pinhole intrinsics with the principal point at the centre, (..., 3, 3)."""
    focal = torch.as_tensor(focal_px, dtype=torch.float32)
    zero, one = torch.zeros_like(focal), torch.ones_like(focal)
    rows = [focal, zero, one * width / 2, zero, focal, one * height / 2, zero, zero, one]
    return torch.stack(rows, dim=-1).reshape(*focal.shape, 3, 3)


def look_at(
    eyes: Tensor,
    target: Tensor | Sequence[float],
    *,
    focal_px: float,
    width: int,
    height: int,
) -> Cameras:
    """Upright cameras at ``eyes`` (..., 3) whose axes pass through ``target`` (3,) or (..., 3).

    Raises:
        ValueError: if an eye coincides with its target, or is straight above or below it.
    """
    eyes = torch.as_tensor(eyes, dtype=torch.float32)
    offset = _vector(target, eyes) - eyes
    if (torch.linalg.norm(offset, dim=-1) < 1e-9).any():
        raise ValueError("eyes: a camera stands on its target; want some distance between them")
    z = normalize(offset, dim=-1)
    x = torch.linalg.cross(z, _vector((0.0, 1.0, 0.0), eyes).expand_as(z))
    if (torch.linalg.norm(x, dim=-1) < 1e-6).any():
        raise ValueError("eyes: a camera looks straight up or down; move it aside a little")
    x = normalize(x, dim=-1)
    rotation = torch.stack([x, torch.linalg.cross(z, x), z], dim=-2)
    translation = -(rotation @ eyes[..., None])[..., 0]
    Ks = intrinsics(focal_px, width, height).to(eyes).expand(*eyes.shape[:-1], 3, 3)
    return Cameras(rigid(rotation, translation), Ks, width, height)


def orbit(
    azimuth_deg: Tensor | float,
    elevation_deg: Tensor | float,
    radius: Tensor | float,
    *,
    pivot: Tensor | Sequence[float],
    focal_px: float,
    width: int,
    height: int,
) -> Cameras:
    """Cameras on a sphere around ``pivot``, all looking at it.

    ``pivot`` has no default on purpose: the experiment this project grew from orbited a point
    three units away from its object.

    Args:
        azimuth_deg: degrees, 0 on the +Z side, growing towards +X; a number or shape (...).
        elevation_deg: degrees above the pivot, in (-90, 90); broadcasts with the azimuths.
        radius: distance to the pivot, > 0; broadcasts.
        pivot: the point to look at, (3,) or (..., 3).
        focal_px: focal length in pixels.
    """
    values = (azimuth_deg, elevation_deg, radius)
    device = next((v.device for v in values if isinstance(v, Tensor)), torch.device("cpu"))
    azimuth, elevation, distance = torch.broadcast_tensors(
        *(torch.as_tensor(v, dtype=torch.float32, device=device) for v in values)
    )
    if (distance <= 0).any():
        raise ValueError(f"radius: got {distance.min().item():g}, want > 0")
    azimuth, elevation = azimuth * (math.pi / 180), elevation * (math.pi / 180)
    level = torch.cos(elevation)
    x, z = torch.sin(azimuth) * level, torch.cos(azimuth) * level
    direction = torch.stack([x, torch.sin(elevation), z], dim=-1)
    centre = _vector(pivot, direction)
    eyes = centre + distance[..., None] * direction
    return look_at(eyes, centre, focal_px=focal_px, width=width, height=height)


def standard_orbit(azimuth_deg: Tensor, elevation_deg: Tensor | float, size: int) -> Cameras:
    """The orbit of all our renders, about the origin, for pictures of ``size`` x ``size``."""
    return orbit(
        *(azimuth_deg, elevation_deg, STANDARD_RADIUS),
        pivot=(0.0, 0.0, 0.0),
        focal_px=STANDARD_FOCAL * size,
        width=size,
        height=size,
    )


def gravity_frame(cameras: Cameras, pivot: Tensor | Sequence[float]) -> Tensor:
    """World-to-canonical rigid transforms, shape (..., 4, 4): what the networks call "here".

    Origin at the pivot, Y stays up, and the yaw is such that the camera looks towards -Z, so a
    camera on the orbit stands at azimuth 0.  Elevation and roll survive: they are what tells a
    network how the input camera is tilted.  The yaw comes from the viewing direction, not from
    the position, so a camera that stands on the pivot has a frame too.
    """
    forward = cameras.forward
    heading = forward[..., ::2]
    # A camera that looks straight up or down has its heading in its image's up direction.
    steep = torch.linalg.norm(heading, dim=-1, keepdim=True) < 1e-6
    image_up = -cameras.viewmats[..., 1, :3]
    heading = torch.where(steep, (image_up * -forward[..., 1:2].sign())[..., ::2], heading)
    heading = normalize(heading, dim=-1)
    hx, hz = heading.unbind(-1)
    zero, one = torch.zeros_like(hx), torch.ones_like(hx)
    rows = [-hz, zero, hx, zero, one, zero, -hx, zero, -hz]
    rotation = torch.stack(rows, dim=-1).unflatten(-1, (3, 3))
    centre = _vector(pivot, forward).expand_as(forward)
    return rigid(rotation, -(rotation @ centre[..., None])[..., 0])


def relative_azimuth_deg(
    cameras: Cameras, input_cameras: Cameras, pivot: Tensor | Sequence[float]
) -> Tensor:
    """Azimuths of cameras (..., V) as seen from input cameras (...), degrees in (-180, 180], about
    a pivot (3,) or (..., 3)."""
    frame = gravity_frame(input_cameras, pivot)
    return cameras.transformed(frame[..., None, :, :]).azimuth_deg((0.0, 0.0, 0.0))


def mirror_signs(device: torch.device | str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """What mirroring in x does to cameras: the signs of view matrices (4, 4) and of intrinsics
    (3, 3), and where the image's width is added to the latter."""
    flip = torch.tensor([-1.0, 1.0, 1.0, 1.0])
    across = torch.zeros(3, 3)
    across[0, 2] = 1.0
    return (flip * flip[:, None]).to(device), (1 - 2 * across).to(device), across.to(device)
