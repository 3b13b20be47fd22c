"""`Decoder`: one image -> Gaussians in the input camera's frame.

Two kinds share the class.  "pixel" is ours: a U-Net over the image and its camera's rays that
emits a few Gaussians a pixel, trained through the renderer against other views of the object.
"patch" is the original experiment's, kept faithful, as the negative control, but for the encoder:
a small one trained from scratch stands for its frozen DINOv2.  It works in OpenGL coordinates,
holds every Gaussian at z in [-4.25, -1.75] and was trained on the input view alone, so nothing
ever told it what the side or the back of an object looks like.
"""

import math
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fresnel.data.images import InputImages
from fresnel.models import Predictor, check, weights
from fresnel.models.unet import ResidualBlock, UNet, group_norm
from fresnel.render import Views, render
from fresnel.scene.cameras import Cameras, gravity_frame, intrinsics
from fresnel.scene.gaussians import Gaussians, quaternion_from_rotation

_REACH = 0.9
"""Depths stay within this of the pivot's, before the offset: a unit box fits (0.866)."""
_SEEN_DEPTH = -0.15  # before training, the visible surface, relative to the pivot
_BEHIND_SHARE = 0.25  # ... and the next layer, as a share of the way from there to the far side
_PIXEL_SIGMA = 0.55  # initial standard deviation in pixels: neighbours overlap without a gap
_LOG_SCALE_RANGE = 2.5  # scales stay within a factor e^2.5 of that, 0.05 to 6.7 pixels
_SEEN_OFFSET, _BEHIND_OFFSET = 0.05, 0.3
_PIXEL_NUMBERS = {"depth": 1, "offset": 3, "scale": 3, "quaternion": 4, "opacity": 1, "colour": 3}
_PATCH_NUMBERS = {"offset": 3, "scale": 3, "rotation": 6, "colour": 3, "opacity": 1}
NEAREST, FARTHEST = 2.0, 4.0
"""Distance from the input camera of a patch with depth 0 and 1, before its offset."""
_STRIDE = 4  # pixels of the patch encoder's input for each patch


@dataclass(frozen=True)
class DecoderConfig:
    """What a decoder is made of; the U-Net's options are those of `unet.UNet`."""

    kind: Literal["pixel", "patch"] = "pixel"  # ours, or the original's
    image_size: int = 128  # side of the square image the network sees, in pixels
    # pixel kind: one for what is seen, the others for what is behind; and the U-Net
    gaussians_per_pixel: int = 2
    base_channels: int = 40
    channel_multipliers: tuple[int, ...] = (1, 2, 3, 4)
    blocks_per_level: int = 1
    attention_levels: tuple[int, ...] = (3,)
    patch: int = 1
    # patch kind: the original's K, 4 or 8; patches along a side, the original has 37
    gaussians_per_patch: int = 4
    patch_grid: int = 37

    def __post_init__(self) -> None:
        shrink = self.patch * 2 ** (len(self.channel_multipliers) - 1)
        fits = self.image_size >= shrink and self.image_size % shrink == 0
        layers = "at least 2, one for what is seen and one for what is behind"
        check(self, "kind", self.kind in ("pixel", "patch"), "'pixel' or 'patch'")
        check(self, "gaussians_per_pixel", self.gaussians_per_pixel >= 2, layers)
        check(self, "image_size", self.kind == "patch" or fits, f"a multiple of {shrink}")


class Decoder(weights.Stored):
    """Images -> Gaussians; see the module's docstring.

    `render_size`, pixels of the pictures that its Gaussians were trained to be drawn in, travels
    with its checkpoint: see `render_small`.
    """

    kind, make_config, facts = "decoder", DecoderConfig, {"render_size": 128}
    render_size: int

    def __init__(self, config: DecoderConfig | None = None) -> None:
        super().__init__(config := config or DecoderConfig())
        self.network: UNet | PatchNetwork
        if config.kind == "patch":
            self.network = PatchNetwork(config.gaussians_per_patch, config.patch_grid)
        else:
            numbers = sum(_PIXEL_NUMBERS.values()) * config.gaussians_per_pixel
            self.network = UNet(4 + 6, numbers, config).to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, inputs: InputImages) -> Gaussians:
        """Gaussians (M, N) in the input camera's OpenCV frame.

        The pixel kind expects the object's pivot at the world origin.  The patch kind knows no
        camera but the original's: focal length = image size, object 2 to 4 units away.
        """
        return self.decode(*self.prepare(inputs))[0]

    def prepare(self, inputs: InputImages) -> tuple[Tensor, Cameras, Tensor | None]:
        """Images as the network sees them, on its device: premultiplied rgba in [0, 1], (M, 4, S,
        S), S = config.image_size; cameras (M,) for that size; normalised depth (M, S, S) for the
        patch kind where the record has any."""
        size, depth, inputs = self.config.image_size, None, inputs.to(self.device)
        rgba = torch.cat([inputs.rgb, inputs.alpha[..., None]], dim=-1).permute(0, 3, 1, 2) / 255
        if self.config.kind == "patch" and inputs.depth is not None:
            depth = resize(normalised_depth(inputs.depth, rgba[:, 3])[:, None], size)[:, 0]
        return resize(rgba, size), inputs.cameras.resized(size, size), depth

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


def resize(images: Tensor, size: int) -> Tensor:
    """Images (M, C, H, W) -> (M, C, size, size), low-pass filtered where it shrinks."""
    if images.shape[-2:] == (size, size):
        return images
    return F.interpolate(images, size=(size, size), mode="bilinear", antialias=True)


def _flat(means: Tensor, quats: Tensor, scales: Tensor, opacity: Tensor, rgb: Tensor) -> Gaussians:
    """Fields (M, A, B, C, n) -> Gaussians (M, A * B * C)."""
    means, quats, scales, rgb = (field.flatten(1, 3) for field in (means, quats, scales, rgb))
    return Gaussians(means, quats, scales, opacity.flatten(1, 4), rgb)


def pixel_parametrisation(raw: Tensor, rgba: Tensor, cameras: Cameras) -> Gaussians:
    """Network outputs -> Gaussians in the input camera's frame, sensible at raw = 0.

    At zero the first layer is a fronto-parallel copy of the image, one Gaussian a pixel, opaque
    where the image is; the layers behind it are fainter copies deeper inside the object.  Points
    slide along their rays within reach of the pivot; each layer lies behind the one before.
    A small offset leaves the ray.  Colours start at the image's (in logit space).

    Of raw (M, L * 15, H, W), premultiplied rgba in [0, 1], (M, 4, H, W), and cameras (M,) with the
    object's pivot at the world origin, it makes N = L H W Gaussians, layer by layer.
    """
    m, _, h, w = raw.shape
    numbers = list(_PIXEL_NUMBERS.values())
    raw = raw.reshape(m, -1, sum(numbers), h, w).permute(0, 1, 3, 4, 2)  # (M, L, H, W, 15)
    depth, offset, scale, quat, opacity, colour = raw.split(numbers, dim=-1)
    identity = torch.eye(4, dtype=raw.dtype, device=raw.device)
    directions = Cameras(identity.expand(m, 4, 4), cameras.Ks, w, h).rays()[1][:, None]

    surfaces = [_REACH * torch.tanh(depth[:, 0] + math.atanh(_SEEN_DEPTH / _REACH))]
    for layer in depth.unbind(1)[1:]:
        share = torch.sigmoid(layer + math.log(_BEHIND_SHARE / (1 - _BEHIND_SHARE)))
        surfaces.append(surfaces[-1] + (_REACH - surfaces[-1]) * share)
    # A camera inside the object's reach must not put Gaussians behind itself.
    pivot_depth = cameras.viewmats[:, 2, 3, None, None, None, None]
    z = (pivot_depth + torch.stack(surfaces, dim=1)).clamp_min(0.05)
    seen = torch.arange(raw.shape[1], device=raw.device)[:, None, None, None] == 0
    reach = torch.where(seen, _SEEN_OFFSET, _BEHIND_OFFSET)
    means = directions / directions[..., 2:] * z + reach * torch.tanh(offset)
    footprint = _PIXEL_SIGMA * z / cameras.Ks[:, 0, 0].reshape(m, 1, 1, 1, 1)
    scales = footprint * torch.exp(_LOG_SCALE_RANGE * torch.tanh(scale / _LOG_SCALE_RANGE))

    alpha = rgba[:, 3:, :, :, None]
    # 0.27 behind the silhouette; outside just above 1/255, where the renderer still sees it
    logit = torch.where(seen, torch.logit(alpha.clamp(0.004, 0.98)), -5.4 + 4.4 * alpha)
    # unpremultiplied; the object's mean colour where nothing covers
    total = rgba.sum(dim=(-1, -2), keepdim=True)
    weight = 1e-2 * (total[:, :3] / total[:, 3:].clamp_min(1e-3))  # against the pixel's alpha
    base = ((rgba[:, :3] + weight) / (rgba[:, 3:] + 1e-2)).permute(0, 2, 3, 1)
    colour = torch.where(seen, 1.5 * torch.tanh(colour), colour)
    colors = torch.sigmoid(torch.logit(base.clamp(0.01, 0.99))[:, None] + colour)
    quats = F.normalize(quat + identity[0], dim=-1)
    return _flat(means, quats, scales, torch.sigmoid(opacity + logit), colors)


def normalised_depth(depth: Tensor, alpha: Tensor) -> Tensor:
    """z-depth (M, H, W), 0 where nothing was hit, as the patch kind reads it: from 0, the nearest
    foreground, to 1, the farthest, and the background (no depth, or alpha below one half).

    The original fed a monocular depth map.  Monocular networks often predict disparity, larger
    when nearer; here larger means farther, so that z = -2 - 2 * depth puts nearer parts nearer.
    """
    valid = (alpha > 0.5) & (depth > 0)
    near = torch.where(valid, depth, torch.inf).amin(dim=(-1, -2), keepdim=True)
    far = torch.where(valid, depth, -torch.inf).amax(dim=(-1, -2), keepdim=True)
    span = torch.where(far > near, far - near, 1.0)
    return torch.where(valid, (depth - near) / span, 1.0).clamp(0.0, 1.0)


class PatchNetwork(nn.Module):
    """Image (and depth) -> Gaussians in the input camera's OpenCV frame, `per_patch` (K) for each
    of `grid`^2 patches.

    On patch features and the depth runs the original's per-patch MLP (512, 512, 256, 128). A small
    head of ours predicts the depth where none was given.
    """

    def __init__(self, per_patch: int, grid: int) -> None:
        super().__init__()
        self.grid, self.per_patch = grid, per_patch

        def halve(channels: int, to: int) -> nn.Conv2d:
            return nn.Conv2d(channels, to, 3, stride=2, padding=1)

        modules = {
            "stem": nn.Sequential(halve(4, 64), nn.SiLU(), halve(64, 128)),
            "down": halve(128, 192),
            "context": nn.Sequential(ResidualBlock(192, 192), ResidualBlock(192, 192)),
            "norm": group_norm(128 + 192),
            "out": nn.Conv2d(128 + 192, 384, 1),
        }
        self.encoder = nn.ModuleDict(modules)
        self.depth_head = nn.Sequential(nn.Conv2d(384, 64, 1), nn.SiLU(), nn.Conv2d(64, 1, 1))
        layers: list[nn.Module] = []
        for width, hidden in pairwise((384 + 1, 512, 512, 256, 128)):
            layers += [nn.Linear(width, hidden), nn.SiLU()]
        layers.append(nn.Linear(128, per_patch * sum(_PATCH_NUMBERS.values())))
        self.mlp = nn.Sequential(*layers)

    def forward(self, rgba: Tensor, depth: Tensor | None) -> tuple[Gaussians, dict[str, Tensor]]:
        """Premultiplied rgba in [0, 1], (M, 4, S, S), and `normalised_depth` (M, S, S), if known ->
        Gaussians (M, G G K), and the depths "depth_predicted" and, if known, "depth_known", both
        (M, G, G)."""
        encoder, size = self.encoder, (self.grid, self.grid)
        fine = encoder["stem"](resize(rgba * 2 - 1, self.grid * _STRIDE))
        coarse = encoder["context"](encoder["down"](fine))
        joined = torch.cat([fine, F.interpolate(coarse, size=size, mode="nearest")], dim=1)
        features = encoder["out"](F.silu(encoder["norm"](joined))).float()
        with torch.autocast(rgba.device.type, enabled=False):
            used = torch.sigmoid(self.depth_head(features))[:, 0]
        aux = {"depth_predicted": used}
        if depth is not None:
            used = aux["depth_known"] = F.interpolate(depth[:, None], size=size, mode="area")[:, 0]
        raw = self.mlp(torch.cat([features, used[:, None]], dim=1).permute(0, 2, 3, 1)).float()
        raw = raw.reshape(*raw.shape[:3], self.per_patch, -1)
        with torch.autocast(rgba.device.type, enabled=False):
            return original_parametrisation(raw, used), aux


def original_parametrisation(raw: Tensor, depth: Tensor) -> Gaussians:
    """The original's sixteen numbers a Gaussian -> Gaussians in the camera's OpenCV frame.

    x, y = patch grid in [-1, 1] + 0.25 * offset; z = -2 - 2 * depth + 0.25 * offset (OpenGL);
    scale = 0.15 * softplus(raw + 1); 6D rotation; colour and opacity by sigmoid.

    Of raw (M, G, G, K, 16), rows from the top of the image, and depth in [0, 1], 0 the nearest,
    (M, G, G), it makes N = G G K Gaussians.
    """
    offset, scale, rotation, colour, opacity = raw.split(list(_PATCH_NUMBERS.values()), dim=-1)
    along = torch.linspace(-1.0, 1.0, raw.shape[1], device=raw.device)
    y, x = torch.meshgrid(-along, along, indexing="ij")  # OpenGL: y grows upwards
    z = -NEAREST - (FARTHEST - NEAREST) * depth
    centre = torch.stack([x.expand_as(z), y.expand_as(z), z], dim=-1)[:, :, :, None]
    # no list of numbers: to bring it from the host would wait for a GPU's queue
    flip = 1.0 - 2.0 * (torch.arange(3, device=raw.device) > 0).to(raw.dtype)
    means = (centre + 0.25 * torch.tanh(offset)) * flip  # OpenGL to OpenCV, as are rotations' rows
    quats = quaternion_from_rotation(flip[:, None] * rotation_6d(rotation))
    scales = 0.15 * F.softplus(scale + 1.0)
    return _flat(means, quats, scales, torch.sigmoid(opacity), torch.sigmoid(colour))


def rotation_6d(raw: Tensor) -> Tensor:
    """Rotation matrices (..., 3, 3) from six numbers, identity at zero (arXiv 1812.07035)."""
    identity = torch.arange(6, device=raw.device) % 4 == 0  # its first two columns
    first, second = (raw + identity).split(3, dim=-1)
    x = F.normalize(first, dim=-1)
    y = F.normalize(second - (x * second).sum(-1, keepdim=True) * x, dim=-1)
    return torch.stack([x, y, torch.linalg.cross(x, y)], dim=-1)


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
    values = [getattr(gaussians, field.name) for field in fields(gaussians)]
    places = [keep.reshape(*keep.shape, *[1] * (v.ndim - keep.ndim)) for v in values]
    pairs = zip(values, places, strict=True)
    return Gaussians(*(value.take_along_dim(at, keep.ndim - 1) for value, at in pairs))


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
    large = cameras.resized(width * factor, height * factor) if factor > 1 else cameras
    views = render(gaussians, large, near=near, eps2d=eps2d)
    if factor == 1:
        return views

    def average(image: Tensor) -> Tensor:
        flat = image.reshape(-1, *image.shape[-3:]).permute(0, 3, 1, 2)
        small = F.avg_pool2d(flat, factor).permute(0, 2, 3, 1)
        return small.reshape(*image.shape[:-3], height, width, -1)

    alpha = average(views.alpha)
    depth = average(views.alpha * views.depth) / alpha.clamp_min(1e-8)
    return Views(average(views.rgb), alpha, depth)


def predictor(model: Decoder) -> Predictor:
    """The decoder as evaluation sees every method: (inputs (M,), cameras (M, V)) -> Views.

    Its attributes `decoder`, the decoder's checksum, and `gate_overridden` are kept by a CVS that
    learns from it.
    """

    @torch.no_grad()
    def predict(inputs: InputImages, cameras: Cameras) -> Views:
        gaussians = prune(model.world(inputs))
        return render_small(gaussians, cameras.to(model.device), render_size=model.render_size)

    vars(predict).update(decoder=model.checksum(), gate_overridden=model.gate_overridden)
    return predict


def load_shipped(
    kind: Literal["pixel", "patch", "faces", "patch_faces"] = "pixel",
    device: torch.device | str = "cpu",
) -> Decoder:
    """The small trained decoder that comes with the package; raises as `weights.shipped`.

    "faces" is of the pixel kind, trained on heads; or the pixel decoder itself, where its file says
    that it learned both ("domains"). "patch_faces" is of the patch kind, on portraits of heads."""
    model = "decoder-frontal" if kind.startswith("patch") else "decoder"
    if kind == "faces":
        both = weights.shipped("decoder_pixel.safetensors", model)
        if "faces" in weights.read_header(both).get("domains", ()):
            return Decoder.load(both, device)
    return Decoder.load(weights.shipped(f"decoder_{kind}.safetensors", model), device)
