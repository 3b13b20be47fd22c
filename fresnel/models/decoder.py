"""`Decoder`: one image -> Gaussians in the input camera's frame.

Two kinds share the class.  "pixel" is ours: a U-Net over the image and its camera's rays that
emits a few Gaussians a pixel, trained through the renderer against other views of the object.
"patch" is the original experiment's frontal-only decoder (see `fresnel.models.patch_decoder`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fresnel.data.images import InputImages
from fresnel.models import Predictor, weights
from fresnel.models.patch_decoder import PatchNetwork, normalised_depth, resize
from fresnel.models.unet import UNet, unet_options
from fresnel.render import Views, render
from fresnel.scene.cameras import Cameras, gravity_frame, intrinsics
from fresnel.scene.gaussians import Gaussians

_REACH = 0.9
"""Depths stay within this of the pivot's, before the offset: a unit box fits (0.866)."""
_SEEN_DEPTH = -0.15  # before training, the visible surface, relative to the pivot
_BEHIND_SHARE = 0.25  # ... and the next layer, as a share of the way from there to the far side
_PIXEL_SIGMA = 0.55  # initial standard deviation in pixels: neighbours overlap without a gap
_LOG_SCALE_RANGE = 2.5  # scales stay within a factor e^2.5 of that, 0.05 to 6.7 pixels
_SEEN_OFFSET, _BEHIND_OFFSET = 0.05, 0.3
_CHANNELS = 15  # depth 1, offset 3, scale 3, quaternion 4, opacity 1, colour 3


@dataclass(frozen=True)
class DecoderConfig:
    """What a decoder is made of.

    Args:
        kind: "pixel" (ours) or "patch" (the original's).
        image_size: side of the square image the network sees, in pixels.
        gaussians_per_pixel: pixel kind: one for what is seen, the others for what is behind.
        base_channels, channel_multipliers, blocks_per_level, attention_levels, patch: pixel
            kind: the U-Net's, see `unet.UNet`.
        gaussians_per_patch: patch kind: the original's K, 4 or 8.
        patch_grid: patch kind: patches along a side; the original has 37.
    """

    kind: Literal["pixel", "patch"] = "pixel"
    image_size: int = 128
    gaussians_per_pixel: int = 2
    base_channels: int = 40
    channel_multipliers: tuple[int, ...] = (1, 2, 3, 4)
    blocks_per_level: int = 1
    attention_levels: tuple[int, ...] = (3,)
    patch: int = 1
    gaussians_per_patch: int = 4
    patch_grid: int = 37

    def __post_init__(self) -> None:
        if self.kind not in ("pixel", "patch"):
            raise ValueError(f"kind: got {self.kind!r}, want 'pixel' or 'patch'")
        if self.gaussians_per_pixel < 2:
            raise ValueError(
                f"gaussians_per_pixel: got {self.gaussians_per_pixel}, want at least 2, one for "
                f"what is seen and one for what is behind"
            )
        shrink = self.patch * 2 ** (len(self.channel_multipliers) - 1)
        if self.kind == "pixel" and (self.image_size < shrink or self.image_size % shrink):
            raise ValueError(f"image_size: got {self.image_size}, want a multiple of {shrink}")


class Decoder(nn.Module):
    """Images -> Gaussians; see the module's docstring.

    Attributes:
        config: what it is made of.
        provenance: JSON-able facts about the run that trained it; travels with the checkpoint.
        render_size: pixels of the pictures that its Gaussians were trained to be drawn in; travels
            with the checkpoint too, see `render_small`.
    """

    def __init__(self, config: DecoderConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or DecoderConfig()
        self.provenance: dict[str, Any] = {}
        self.render_size = 128
        self.network: UNet | PatchNetwork
        if config.kind == "patch":
            self.network = PatchNetwork(config.gaussians_per_patch, config.patch_grid)
            return
        self.network = UNet(
            4 + 6,
            _CHANNELS * config.gaussians_per_pixel,
            **unet_options(config),
        ).to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def forward(self, inputs: InputImages) -> Gaussians:
        """Gaussians (M, N) in the input camera's OpenCV frame.

        The pixel kind expects the object's pivot at the world origin.  The patch kind knows no
        camera but the original's: focal length = image size, object 2 to 4 units away.
        """
        return self.decode(*self.prepare(inputs))[0]

    def prepare(self, inputs: InputImages) -> tuple[Tensor, Cameras, Tensor | None]:
        """Images as the network sees them, on its device.

        Returns:
            Premultiplied rgba in [0, 1], (M, 4, S, S), S = config.image_size; cameras (M,) for
            that size; normalised depth (M, S, S) for the patch kind where the record has any.
        """
        rgb, alpha = inputs.rgb.to(self.device), inputs.alpha.to(self.device)
        rgba = torch.cat([rgb, alpha[..., None]], dim=-1).permute(0, 3, 1, 2).float() / 255
        depth = None
        if self.config.kind == "patch" and inputs.depth is not None:
            depth = normalised_depth(inputs.depth.to(rgba), rgba[:, 3])
            depth = resize(depth[:, None], self.config.image_size)[:, 0]
        cameras = inputs.cameras.to(self.device)
        size = self.config.image_size
        return resize(rgba, size), cameras.resized(size, size), depth

    def decode(
        self, rgba: Tensor, cameras: Cameras, depth: Tensor | None = None
    ) -> tuple[Gaussians, dict[str, Tensor]]:
        """`forward` on what `prepare` returns, with the terms that training regularises."""
        if isinstance(self.network, PatchNetwork):
            return self.network(rgba, depth)
        with torch.autocast(rgba.device.type, enabled=False):  # geometry needs float32
            frame = gravity_frame(cameras, cameras.viewmats.new_zeros(3))
            rays = cameras.pluecker(frame).permute(0, 3, 1, 2)
        x = torch.cat([rgba * 2 - 1, rays], dim=1)
        # channels last: what tensor cores take as it is, and 1.5 times as fast on a CPU
        raw = self.network(x.contiguous(memory_format=torch.channels_last)).float()
        with torch.autocast(rgba.device.type, enabled=False):
            return pixel_parametrisation(raw, rgba, cameras), {}

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the network; the geometry around it is cheap and stays as it is."""
        self.network.compile(*args, **kwargs)

    def world(self, inputs: InputImages) -> Gaussians:
        """Gaussians (M, N) in the world, the object's pivot at the origin.

        The patch kind's are scaled about the input camera so that their centroid lies as far
        away as the pivot: the picture in that camera stays the same.
        """
        gaussians = self(inputs)
        to_world = torch.linalg.inv(inputs.cameras.viewmats.to(gaussians.means))
        if self.config.kind == "patch":
            distance = torch.linalg.norm(to_world[:, :3, 3], dim=-1)
            scale = torch.eye(4).to(to_world).repeat(len(distance), 1, 1)
            scale[:, :3, :3] *= (distance / centroid(gaussians)[:, 2])[:, None, None]
            to_world = to_world @ scale
        return gaussians.transform(to_world)

    def input_cameras(self, inputs: InputImages) -> Cameras:
        """The cameras (M,) in which `world` must look like the input images."""
        cameras = inputs.cameras.to(self.device)
        if self.config.kind == "pixel":
            return cameras
        Ks = intrinsics(float(cameras.width), cameras.width, cameras.height).to(cameras.Ks)
        return Cameras(cameras.viewmats, Ks.expand_as(cameras.Ks), cameras.width, cameras.height)

    def checksum(self) -> str:
        """SHA-256 of the weights, "sha256:..."; what is made by this decoder records it."""
        return weights.checksum(self.state_dict())

    def save(self, path: str | Path, *, half: bool = True) -> Path:
        """Write weights, config, render size and provenance to one file: `weights.save`."""
        return weights.save(
            path, "decoder", self, half=half, facts={"render_size": self.render_size}
        )

    @staticmethod
    def load(path: str | Path, device: torch.device | str = "cpu") -> Decoder:
        """Read what `save` wrote, in float32, in evaluation mode; raises as `weights.load`."""
        decoder, facts = weights.load(path, "decoder", lambda c: Decoder(DecoderConfig(**c)))
        decoder.render_size = int(facts.get("render_size", 128))
        return decoder.to(device)


def pixel_parametrisation(raw: Tensor, rgba: Tensor, cameras: Cameras) -> Gaussians:
    """Network outputs -> Gaussians in the input camera's frame, sensible at raw = 0.

    At zero the first layer is a fronto-parallel copy of the image, one Gaussian a pixel, opaque
    where the image is; the layers behind it are fainter copies deeper inside the object.  Points
    slide along their rays within reach of the pivot; each layer lies behind the one before.
    A small offset leaves the ray.  Colours start at the image's (in logit space).

    Args:
        raw: shape (M, L * 15, H, W), L layers.
        rgba: premultiplied, in [0, 1], shape (M, 4, H, W).
        cameras: (M,), H x W pixels, the object's pivot at the world origin.

    Returns:
        Gaussians of batch shape (M,), N = L * H * W, layer by layer.
    """
    m, _, h, w = raw.shape
    raw = raw.reshape(m, -1, _CHANNELS, h, w).permute(0, 1, 3, 4, 2)  # (M, L, H, W, 15)
    depth, offset, scale, quat, opacity, colour = raw.split([1, 3, 3, 4, 1, 3], dim=-1)
    identity = torch.eye(4, dtype=raw.dtype, device=raw.device)
    in_camera = Cameras(identity.expand(m, 4, 4), cameras.Ks, w, h)
    directions = in_camera.rays()[1][:, None]
    pivot_depth = cameras.viewmats[:, 2, 3, None, None, None, None]

    surfaces = [_REACH * torch.tanh(depth[:, 0] + math.atanh(_SEEN_DEPTH / _REACH))]
    for layer in depth.unbind(1)[1:]:
        share = torch.sigmoid(layer + math.log(_BEHIND_SHARE / (1 - _BEHIND_SHARE)))
        surfaces.append(surfaces[-1] + (_REACH - surfaces[-1]) * share)
    # A camera inside the object's reach must not put Gaussians behind itself.
    z = (pivot_depth + torch.stack(surfaces, dim=1)).clamp_min(0.05)
    on_ray = directions / directions[..., 2:] * z

    seen = torch.arange(raw.shape[1], device=raw.device)[:, None, None, None] == 0
    means = on_ray + torch.where(seen, _SEEN_OFFSET, _BEHIND_OFFSET) * torch.tanh(offset)
    focal = cameras.Ks[:, 0, 0].reshape(m, 1, 1, 1, 1)
    footprint = _PIXEL_SIGMA * z / focal
    scales = footprint * torch.exp(_LOG_SCALE_RANGE * torch.tanh(scale / _LOG_SCALE_RANGE))

    alpha, base = rgba[:, 3:, :, :, None], _extended_colour(rgba)
    seen_logit = torch.logit(alpha.clamp(0.004, 0.98))
    # 0.27 inside the silhouette; outside just above 1/255, where the renderer still sees it
    behind_logit = -5.4 + 4.4 * alpha
    logit = opacity + torch.where(seen, seen_logit, behind_logit)
    colour = torch.where(seen, 1.5 * torch.tanh(colour), colour)
    colors = torch.sigmoid(torch.logit(base.clamp(0.01, 0.99))[:, None] + colour)
    return Gaussians(
        means=means.flatten(1, 3),
        quats=F.normalize(quat + identity[0], dim=-1).flatten(1, 3),
        scales=scales.flatten(1, 3),
        opacities=torch.sigmoid(logit).flatten(1, 4),
        colors=colors.flatten(1, 3),
    )


def _extended_colour(rgba: Tensor) -> Tensor:
    """Unpremultiplied colours (M, H, W, 3), the object's mean colour where nothing covers."""
    total = rgba.sum(dim=(-1, -2), keepdim=True)
    mean = total[:, :3] / total[:, 3:].clamp_min(1e-3)
    weight = 1e-2  # of the mean, against the pixel's alpha
    return ((rgba[:, :3] + weight * mean) / (rgba[:, 3:] + weight)).permute(0, 2, 3, 1)


def centroid(gaussians: Gaussians) -> Tensor:
    """Opacity-weighted mean positions, shape (M, 3)."""
    weights = gaussians.opacities[..., None]
    return (gaussians.means * weights).sum(-2) / weights.sum(-2).clamp_min(1e-6)


def prune(gaussians: Gaussians) -> Gaussians:
    """Drop Gaussians too transparent to change an 8-bit picture.

    A batch stays rectangular: every scene keeps as many as the scene that needs most, its most
    opaque ones.  Order is not kept.
    """
    count = max(1, int((gaussians.opacities >= 1 / 255).sum(-1).max()))
    keep = gaussians.opacities.topk(count, dim=-1).indices

    def pick(values: Tensor) -> Tensor:
        index = keep.reshape(*keep.shape, *[1] * (values.ndim - keep.ndim))
        return values.gather(keep.ndim - 1, index.expand(*keep.shape, *values.shape[keep.ndim :]))

    return Gaussians(
        **{field.name: pick(getattr(gaussians, field.name)) for field in fields(gaussians)}
    )


def render_small(
    gaussians: Gaussians, cameras: Cameras, *, render_size: int = 128, near: float = 0.01
) -> Views:
    """Render over black as a decoder's Gaussians were trained to be drawn, at `render_size` pixels.

    Splatting widens every Gaussian by 0.3 square pixels, which is nothing for large ones, but
    Gaussians about as small as a pixel were trained with it. Drawn at 32 px they would grow a
    halo, so smaller pictures are drawn by a whole factor larger, and averaged down; at other sizes
    than `render_size` gaps would open between them (10 dB less on the input view at 256 px), so
    they are widened by as much in the world as there. Depth is averaged over what is covered.
    """
    width, height = cameras.width, cameras.height
    factor = -(-render_size // min(width, height))
    eps2d = 0.3 * (min(width, height) * factor / render_size) ** 2
    if factor == 1:
        return render(gaussians, cameras, near=near, eps2d=eps2d)
    large = cameras.resized(width * factor, height * factor)
    views = render(gaussians, large, near=near, eps2d=eps2d)
    batch = views.rgb.shape[:-3]

    def average(image: Tensor) -> Tensor:
        flat = image.reshape(-1, *image.shape[-3:]).permute(0, 3, 1, 2)
        return F.avg_pool2d(flat, factor).permute(0, 2, 3, 1).reshape(*batch, height, width, -1)

    alpha = average(views.alpha)
    depth = average(views.alpha * views.depth) / alpha.clamp_min(1e-8)
    return Views(average(views.rgb), alpha, depth)


def predictor(model: Decoder) -> Predictor:
    """The decoder as evaluation sees every method: (inputs (M,), cameras (M, V)) -> Views.

    Its attribute `decoder` is the decoder's checksum, which a CVS that learns from it keeps.
    """

    @torch.no_grad()
    def predict(inputs: InputImages, cameras: Cameras) -> Views:
        gaussians = prune(model.world(inputs))
        return render_small(gaussians, cameras.to(model.device), render_size=model.render_size)

    setattr(predict, "decoder", model.checksum())  # noqa: B010 - a function has no such field
    return predict


def load_shipped(
    kind: Literal["pixel", "patch"] = "pixel", device: torch.device | str = "cpu"
) -> Decoder:
    """The small trained decoder that comes with the package.

    Raises:
        FileNotFoundError: if this installation carries none; the message says how to make one.
    """
    model = {"pixel": "decoder", "patch": "decoder-frontal"}[kind]
    return Decoder.load(weights.shipped(f"decoder_{kind}.safetensors", model), device)
