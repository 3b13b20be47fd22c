"""The original experiment's decoder: one frontal view -> K Gaussians for each of 37 x 37 patches.

Kept faithful, as the negative control, but for the encoder: a small one trained from scratch stands
for the original's frozen DINOv2.  It works in OpenGL camera coordinates, holds every Gaussian at z
in [-4.25, -1.75] and was trained on the input view alone, so nothing ever told it what the side or
the back of an object looks like.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fresnel.models.unet import ResidualBlock, group_norm
from fresnel.scene.gaussians import Gaussians, quaternion_from_rotation

NEAREST, FARTHEST = 2.0, 4.0
"""Distance in front of the input camera of a patch with depth 0 and 1, before its offset."""
_OFFSET = 0.25
_SCALE = 0.15
_NUMBERS = 16  # offset 3, scale 3, rotation 6, colour 3, opacity 1
_STRIDE = 4  # pixels of the encoder's input for each patch


def resize(images: Tensor, size: int) -> Tensor:
    """Images (M, C, H, W) -> (M, C, size, size), low-pass filtered where it shrinks."""
    if images.shape[-2:] == (size, size):
        return images
    return F.interpolate(
        images, size=(size, size), mode="bilinear", antialias=True, align_corners=False
    )


def normalised_depth(depth: Tensor, alpha: Tensor) -> Tensor:
    """Depth in [0, 1] as this decoder reads it: 0 is the nearest foreground, 1 the farthest.

    The original fed a monocular depth map.  Monocular networks often predict disparity, larger
    when nearer; here larger means farther, so that z = -2 - 2 * depth puts nearer parts nearer.
    Background (alpha below one half, or no depth) is 1.

    Args:
        depth: z-depth in any unit, shape (M, H, W), 0 where nothing was hit.
        alpha: in [0, 1], shape (M, H, W).
    """
    valid = (alpha > 0.5) & (depth > 0)
    near = torch.where(valid, depth, torch.inf).amin(dim=(-1, -2), keepdim=True)
    far = torch.where(valid, depth, -torch.inf).amax(dim=(-1, -2), keepdim=True)
    span = torch.where(far > near, far - near, torch.ones_like(far))
    relative = torch.where(valid, (depth - near) / span, torch.ones_like(depth))
    return relative.clamp(0.0, 1.0)


class ConvEncoder(nn.Module):
    """Patch features from scratch: rgba (M, 4, 4G, 4G) in [-1, 1] -> (M, channels, G, G)."""

    def __init__(self, channels: int, width: int = 64) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(4, width, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
        )
        self.down = nn.Conv2d(2 * width, 3 * width, 3, stride=2, padding=1)
        self.context = nn.Sequential(
            ResidualBlock(3 * width, 3 * width), ResidualBlock(3 * width, 3 * width)
        )
        self.norm = group_norm(5 * width)
        self.out = nn.Conv2d(5 * width, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        fine = self.stem(x)
        coarse = F.interpolate(self.context(self.down(fine)), size=fine.shape[-2:], mode="nearest")
        return self.out(F.silu(self.norm(torch.cat([fine, coarse], dim=1))))


class PatchNetwork(nn.Module):
    """Image (and depth) -> grid^2 * K Gaussians, in the input camera's OpenCV frame.

    The head is the original's per-patch MLP (512, 512, 256, 128) on the features and the depth.
    A small head of ours predicts the depth where none was given.

    Args:
        per_patch: K, Gaussians for each patch.
        grid: patches along a side; the original has 37.
    """

    def __init__(self, per_patch: int, grid: int) -> None:
        super().__init__()
        self.grid, self.per_patch = grid, per_patch
        channels = 384
        self.encoder = ConvEncoder(channels)
        self.depth_head = nn.Sequential(nn.Conv2d(channels, 64, 1), nn.SiLU(), nn.Conv2d(64, 1, 1))
        layers: list[nn.Module] = []
        width = channels + 1
        for hidden in (512, 512, 256, 128):
            layers += [nn.Linear(width, hidden), nn.SiLU()]
            width = hidden
        self.mlp = nn.Sequential(*layers, nn.Linear(width, per_patch * _NUMBERS))

    def forward(self, rgba: Tensor, depth: Tensor | None) -> tuple[Gaussians, dict[str, Tensor]]:
        """Decode rgba (M, 4, S, S), premultiplied, in [0, 1].

        Args:
            depth: normalised depth (M, S, S), see `normalised_depth`; None: the depth head's.

        Returns:
            Gaussians (M, grid^2 * K), and {"depth_predicted": (M, G, G), "depth_known": (M, G, G)}
            (the second only where depth was given).
        """
        image = resize(rgba * 2 - 1, self.grid * _STRIDE)
        features = self.encoder(image).float()
        with torch.autocast(rgba.device.type, enabled=False):
            predicted = torch.sigmoid(self.depth_head(features))[:, 0]
        aux = {"depth_predicted": predicted}
        used = predicted
        if depth is not None:
            used = F.interpolate(depth[:, None], size=(self.grid, self.grid), mode="area")[:, 0]
            aux["depth_known"] = used
        joined = torch.cat([features, used[:, None]], dim=1).permute(0, 2, 3, 1)
        raw = self.mlp(joined).float()
        raw = raw.reshape(len(rgba), self.grid, self.grid, self.per_patch, _NUMBERS)
        with torch.autocast(rgba.device.type, enabled=False):
            return original_parametrisation(raw, used), aux


def original_parametrisation(raw: Tensor, depth: Tensor) -> Gaussians:
    """The original's sixteen numbers a Gaussian -> Gaussians in the camera's OpenCV frame.

    x, y = patch grid in [-1, 1] + 0.25 * offset; z = -2 - 2 * depth + 0.25 * offset (OpenGL);
    scale = 0.15 * softplus(raw + 1); 6D rotation; colour and opacity by sigmoid.

    Args:
        raw: shape (M, G, G, K, 16), rows from the top of the image.
        depth: in [0, 1], 0 the nearest, shape (M, G, G).

    Returns:
        Gaussians of batch shape (M,), N = G * G * K.
    """
    offset, scale, rotation, colour, opacity = raw.split([3, 3, 6, 3, 1], dim=-1)
    grid = raw.shape[1]
    along = torch.linspace(-1.0, 1.0, grid, device=raw.device)
    y, x = torch.meshgrid(-along, along, indexing="ij")  # OpenGL: y grows upwards
    z = -NEAREST - (FARTHEST - NEAREST) * depth
    centre = torch.stack([x.expand_as(z), y.expand_as(z), z], dim=-1)[:, :, :, None]
    means = centre + _OFFSET * torch.tanh(offset)
    # no list of numbers: to bring it from the host would wait for a GPU's queue
    flip = 1.0 - 2.0 * (torch.arange(3, device=raw.device) > 0).to(raw.dtype)
    matrices = flip[:, None] * rotation_6d(rotation)  # rows flip: OpenGL to OpenCV
    return Gaussians(
        means=(means * flip).flatten(1, 3),
        quats=quaternion_from_rotation(matrices).flatten(1, 3),
        scales=(_SCALE * F.softplus(scale + 1.0)).flatten(1, 3),
        opacities=torch.sigmoid(opacity).flatten(1, 4),
        colors=torch.sigmoid(colour).flatten(1, 3),
    )


def rotation_6d(raw: Tensor) -> Tensor:
    """Rotation matrices (..., 3, 3) from six numbers, identity at zero (arXiv 1812.07035)."""
    identity = torch.arange(6, device=raw.device) % 4 == 0  # its first two columns
    first, second = (raw + identity).split(3, dim=-1)
    x = F.normalize(first, dim=-1)
    y = F.normalize(second - (x * second).sum(-1, keepdim=True) * x, dim=-1)
    return torch.stack([x, y, torch.linalg.cross(x, y)], dim=-1)
