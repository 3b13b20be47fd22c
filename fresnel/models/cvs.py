"""CVS, consistency view synthesis: one image and two cameras -> the view from the second camera.

Images are premultiplied RGBA in [-1, 1]; rays are Pluecker coordinates in the gravity-aligned
frame of the input camera, so elevation is known and azimuth is relative to the input.

A CVS may also see the decoder's render of the target view: geometry from the splats. A twin sees
what the decoder makes of the mirrored input too, mirrored back. Both are of the same object; where
they differ, the decoder guessed. With `render_warp` it also sees the input's own pixels, warped to
where the depth of each render puts them.

Preconditioning and boundary condition: Consistency Models, arXiv 2303.01469, appendix C.
Training: Easy Consistency Tuning (ECT), arXiv 2406.14548; what differs is said where it does.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from fresnel.data.images import InputImages
from fresnel.models import Predictor, check, weights
from fresnel.models.condition import (
    CONDITION_CHANNELS,
    RENDER_CHANNELS,
    condition_tensors,
    rgba,
    seen,
)
from fresnel.models.unet import UNET_OPTIONS, FourierEmbedding, UNet
from fresnel.render import Views
from fresnel.scene.cameras import Cameras

LOSS_WEIGHTS = ("alpha_aware", "depth_laplacian", "none")
KINDS = ("consistency", "original")
OBJECTIVES = ("consistency", "diffusion", "sharp")
LEFT_OUT = -3.0  # of the logits by which pictures are weighed: a fresh network takes their mean
MOST_AT_ONCE = 64  # views in a batch of `predictor`'s
CameraMap = Callable[[InputImages, Cameras], tuple[Cameras, Cameras, Tensor]]

_GPU: dict[str, Any] = {"channel_multipliers": (1, 2, 4, 4), "blocks_per_level": 2, "ect_stages": 6}
_SHARP: dict[str, Any] = {"image_size": 128, "objective": "sharp", "p_mean": -1.2, "p_std": 1.2}
_PRESETS: dict[str, dict[str, Any]] = {
    # tests: a fraction of a second a step at 16 px
    "tiny": {"image_size": 16, "base_channels": 8, "embedding_channels": 16}
    | {"channel_multipliers": (1, 2), "attention_levels": (1,)},
    "small": {},  # two CPU cores at 64 px
    # the two that ship, at 128 px. Both denoise, which a stem that folds 4 x 4 pixels does not
    # (docs/decisions.md): 2.8 M parameters for models that see the input alone
    "compact": _SHARP,
    # ... and 4.6 M for those that see renders
    "sharp": _SHARP
    | {"base_channels": 48, "channel_multipliers": (1, 2, 3, 3), "attention_levels": (1, 2, 3)},
    # one GPU at 128 px, about 23 M parameters
    "base": _GPU | {"image_size": 128, "base_channels": 64, "embedding_channels": 256},
    # one GPU at 256 px, 81 M parameters: most of them work on 16 x 16 and 8 x 8 cells, so
    # that a sample costs little more arithmetic than in a network of a third of the size
    "large": _GPU
    | {"image_size": 256, "patch": 4, "base_channels": 128, "embedding_channels": 512},
}


@dataclass(frozen=True)
class CVSConfig:
    """The network, its noise levels and its loss; `CVSConfig.preset(name, **changes)` to start.

    Noise levels sigma are in units of the images' [-1, 1]; `sigma_data` is their assumed spread.
    """

    image_size: int = 64  # pixels; the size to train and sample at
    patch: int = 2  # pixels folded into channels at the stem
    base_channels: int = 32
    channel_multipliers: tuple[int, ...] = (1, 2, 3, 4)
    blocks_per_level: int = 1
    attention_levels: tuple[int, ...] = (2, 3)
    embedding_channels: int = 128
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    sigma_data: float = 0.5
    p_mean: float = -1.1  # mean and spread of ln(sigma) in training, as in ECT
    p_std: float = 2.0
    sigma_max_fraction: float = 0.5  # share of samples trained at sigma_max, where one step starts
    sigma_max_anchor: bool = True  # those are compared with the clean view in every stage
    ect_stages: int = 4  # the curriculum's stages; stage 0 is plain denoising
    denoising_share: float = 0.5  # of the run spent in stage 0; the others share the rest equally
    ect_q: float = 2.0
    ect_k: float = 8.0
    ect_b: float = 1.0
    huber_c: float = 0.01  # root-mean-square error below which the loss turns quadratic
    loss_weight: str = "alpha_aware"  # of `LOSS_WEIGHTS`
    light_weight: float = 0.3  # of the loss on local light, which blur would otherwise swallow
    foreground_share: float = 0.7  # of the alpha-aware weight: the object with a margin
    parameterisation: str = "consistency"  # of `KINDS`; "original": no boundary condition
    # of `OBJECTIVES`: ECT; denoising at every level, sampled along the ODE; or denoising and sharp
    # single steps
    objective: str = "consistency"
    one_step_from: float = 2.0  # lowest noise level of a sharp single step, highest of denoising
    denoising_weight: float = 3.0  # of the half of a sharp run's batch that is denoised
    perceptual_weight: float = 0.1  # of a shift by one pixel, in a sharp single step
    perceptual_from: float = 0.3  # share of the run before: its gradient would drown denoising's
    adversarial_weight: float = 0.0  # of a critic of single steps; 0: none
    adversarial_from: float = 0.6  # share of the run after which the critic joins in
    render_condition: bool = False  # also see a render of the target view, and add to it
    render_twin: bool = False  # ... and to a second one, from the mirrored input: to their mean
    render_warp: bool = False  # ... and to the input itself, warped to both by the decoder's depth
    render_mask: bool = False  # all of them weighed anew at every pixel, down to nothing

    def __post_init__(self) -> None:
        ours, renders = self.parameterisation == "consistency", self.render_condition
        for name in ("sigma_max_fraction", "foreground_share", "denoising_share"):
            check(self, name, 0 <= getattr(self, name) <= 1, "a value in [0, 1]")
        named = {"loss_weight": LOSS_WEIGHTS, "parameterisation": KINDS, "objective": OBJECTIVES}
        for name, known in named.items():
            check(self, name, getattr(self, name) in known, f"one of {known}")
        ordered = 0 < self.sigma_min < self.sigma_max
        check(self, "sigma_min", ordered, "0 < sigma_min < sigma_max")
        check(self, "ect_stages", self.ect_stages >= 1, "at least one stage")
        within = self.sigma_min < self.one_step_from < self.sigma_max
        check(self, "one_step_from", within, "sigma_min < one_step_from < sigma_max")
        check(self, "ect_q", self.ect_q > 1, "a factor above 1")
        for name in ("render_twin", "render_mask"):
            check(self, name, renders or not getattr(self, name), "render_condition=True too")
        check(self, "render_warp", self.render_twin or not self.render_warp, "render_twin=True too")
        sharp = 'parameterisation "consistency", which has the boundary condition'
        check(self, "objective", ours or self.objective != "sharp", sharp)
        kind = '"consistency" for a model that adds to a render'
        check(self, "parameterisation", ours or not renders, kind)

    @property
    def pictures(self) -> int:
        """How many pictures of the target view the network sees: one render, a render and its twin,
        or a render, its warp, the twin's warp, the twin. Mirrored they are those in reverse."""
        return self.render_condition + self.render_twin + 2 * self.render_warp

    @property
    def sees(self) -> dict[str, bool]:
        """For `condition.seen`."""
        return {"twin": self.render_twin, "warp": self.render_warp}

    @property
    def condition_channels(self) -> int:
        return CONDITION_CHANNELS + self.pictures * RENDER_CHANNELS

    @classmethod
    def preset(cls, name: str, **changes: Any) -> Self:
        """'tiny' (tests), 'small' (64 px, CPU), 'compact', 'sharp' or 'base' (128 px), 'large'
        (256 px)."""
        if name not in _PRESETS:
            raise ValueError(f"preset: got {name!r}, want one of {tuple(_PRESETS)}")
        return cls(**_PRESETS[name] | changes)


class CVS(weights.Stored):
    """Denoiser D(x, sigma, cond): (B, 4, H, W), (B,), (B, C, H, W) -> clean view (B, 4, H, W).

    C is 16, 21 where the network also sees a render of the target view, 26 where it sees two, 36
    with their warps.
    D = c_skip(sigma) x + c_out(sigma) F(c_in(sigma) (x - K), cond, ln(sigma) / 4); K is what is
    known of x: the mean of the renders, or, as pictures are mostly empty, -1. At sigma_min
    c_skip = 1 and c_out = 0 exactly, so D(x, sigma_min) = x bit for bit: the boundary condition
    of a consistency model. The "original" parameterisation is D = F: nothing ties it to x. With
    `render_condition`, (1 - c_skip) R is added, for the render R in the condition (the mean of
    two): from noise alone the untrained network gives R. With `render_mask` R is the sum in [0, 1]
    of all that it sees, warps too, by weights at each pixel that the network makes too (a softmax
    with "none" beside them; a warp's is times its visibility), so that it can leave a render where
    that is wrong, and copy what was seen.

    `decoder`, the checksum of the decoder whose renders it learned from, travels with the weights;
    `origin` is "random", or the checksum of the weights that training starts from.
    """

    kind, make_config, facts = "cvs", CVSConfig, {"decoder": ""}
    decoder: str

    def __init__(self, config: CVSConfig) -> None:
        super().__init__(config)
        self.origin, channels = "random", config.embedding_channels
        self.embedding = FourierEmbedding(channels)
        outputs = 4 + config.render_mask * config.pictures
        self.unet = UNet(4 + config.condition_channels, outputs, config, embedding_dim=channels)

    def forward(self, x: Tensor, sigma: Tensor, cond: Tensor) -> Tensor:
        s, data = sigma.reshape(-1, 1, 1, 1), self.config.sigma_data
        c_in, known, pictures = (s**2 + data**2).rsqrt(), -torch.ones_like(x), x[:, None]
        if self.config.render_condition:
            pictures = cond[:, CONDITION_CHANNELS:].unflatten(1, (-1, RENDER_CHANNELS))
            renders = pictures[:, ::3] if self.config.render_warp else pictures
            known = renders[:, :, :4].mean(dim=1)
        # without what is known the noise is a larger part of what the network sees
        given = torch.cat([c_in * (x - known), cond], dim=1)
        f = self.unet(given, self.embedding(sigma.log() / 4))
        f = f.to(x.dtype)
        if f.device.type == "cpu":
            f = f.contiguous()  # as x is: what a compiler makes of both orders in one loop is slow
        if self.config.parameterisation == "original":
            return f
        c_skip, c_out = self.scalings(s)
        denoised = c_skip * x + c_out * f[:, :4]
        if not self.config.render_condition:
            return denoised
        if not self.config.render_mask:
            return denoised + (1 - c_skip) * known
        logits = [torch.full_like(f[:, :1], LEFT_OUT), f[:, 4:]]
        if self.config.render_warp:
            visible = ((pictures[:, 1:3, 4] + 1) / 2).clamp_min(1e-4).log().to(f.dtype)
            logits[1:] = [f[:, 4:5], f[:, 5:7] + visible, f[:, 7:]]
        share = torch.cat(logits, dim=1).softmax(dim=1)[:, 1:, None]
        return denoised + (1 - c_skip) * ((share * (pictures[:, :, :4] + 1)).sum(dim=1) - 1)

    def scalings(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """(c_skip, c_out) with the (sigma - sigma_min) of arXiv 2303.01469, appendix C."""
        data, above = self.config.sigma_data, sigma - self.config.sigma_min
        c_skip = data**2 / (above**2 + data**2)
        return c_skip, data * above * (sigma**2 + data**2).rsqrt()

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> Self:
        """As every network; ValueError too for a file of before networks denoised, which saw their
        input otherwise."""
        header = weights.read_header(path, cls.kind)
        config = header.get("config") if header.get("kind") == cls.kind else None
        if isinstance(config, dict) and "objective" not in config:
            raise ValueError(f"{path}: was made before networks denoised; train it anew (03)")
        return super().load(path, device)

    def start_from(self, other: Self) -> None:
        """Take over another network's weights, to go on training from there.

        An "original" network takes a consistency network's so that its one step gives the same
        view: its output is the consistency network's F times c_out(sigma_max).

        Raises:
            ValueError: if the two are built differently; the message names what differs.
        """
        names = [*UNET_OPTIONS, "embedding_channels"]
        names += ["render_condition", "render_twin", "render_warp", "render_mask"]
        theirs, ours = (asdict(network.config) for network in (other, self))
        if odd := [f"{n} {theirs[n]}; want {ours[n]}" for n in names if theirs[n] != ours[n]]:
            raise ValueError(f"initial weights: built with {', '.join(odd)}. Choose their size")
        found = {name: tensor.clone() for name, tensor in other.state_dict().items()}
        if self.config.parameterisation == "original" != other.config.parameterisation:
            at_max = other.scalings(torch.tensor(other.config.sigma_max))[1]
            for name in ("unet.head.weight", "unet.head.bias"):
                found[name] *= at_max
        self.load_state_dict(found)
        self.gate_overridden |= other.gate_overridden
        self.origin = weights.checksum(found)


def randn(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator, device=generator.device).to(like.device)


def sampling_sigmas(steps: int, config: CVSConfig) -> tuple[float, ...]:
    """Noise levels to start each of `steps` passes from, sigma_max first.

    sigma_i^(1/7) is spaced evenly between sigma_max and sigma_min, the latter left out (EDM,
    arXiv 2206.00364, equation 5 with rho = 7): 80 | 80, 2.5 | 80, 18, 2.5, 0.17. A "sharp" network
    denoises by squared errors below `one_step_from`, so that its last step would blur: its levels
    are spaced evenly in the logarithm down to 1.5 times that: 80 | 80, 3 | 80, 27, 9, 3.
    """
    if steps < 1:
        raise ValueError(f"steps: got {steps}, want at least 1")
    if config.objective == "sharp":
        ratio = 1.5 * config.one_step_from / config.sigma_max
        return tuple(config.sigma_max * ratio ** (i / max(steps - 1, 1)) for i in range(steps))
    high, low = config.sigma_max ** (1 / 7), config.sigma_min ** (1 / 7)
    return tuple((high + i / steps * (low - high)) ** 7 for i in range(steps))


@torch.no_grad()
def sample(
    model: CVS, cond: Tensor, *, steps: int = 1, generator: torch.Generator, repeat: int = 1
) -> Tensor:
    """Views (B, 4, H, W) in [-1, 1] for conditions (B, 16, H, W): one pass per noise level.

    Multistep consistency sampling (arXiv 2303.01469, algorithm 1): denoise, then add noise back
    to the next, lower level; of "diffusion", the rest of the noise that was there (Euler's steps
    along the probability flow, EDM, arXiv 2206.00364, equation 4). A premultiplied colour is at
    most its alpha: what is brighter would be a haze where nothing is. `repeat`: noise is drawn for
    B / repeat images and tiled.
    """
    b, _, h, w = cond.shape
    out, rest, follows = cond.new_zeros(b, 4, h, w), cond, model.config.objective == "diffusion"
    for i, sigma in enumerate(sampling_sigmas(steps, model.config)):
        if i and follows:
            x = out + sigma * rest
        else:
            spread = sigma if i == 0 else math.sqrt(max(sigma**2 - model.config.sigma_min**2, 0.0))
            x = out + spread * randn(out[: b // repeat], generator).repeat(repeat, 1, 1, 1)
        out = model(x, out.new_full((b,), sigma), cond).clamp(-1, 1)
        out = torch.cat([torch.minimum(out[:, :3], out[:, 3:]), out[:, 3:]], dim=1)
        if follows:
            rest = (x - out) / sigma
    return out


@torch.no_grad()
def condition(
    model: CVS,
    inputs: InputImages,
    cameras: Cameras,
    *,
    renderer: Predictor | None = None,
    camera_map: CameraMap | None = None,
) -> Tensor:
    """What a network knows of the views from cameras (M, V) at its own size, (M V, C, H, W), given
    what `predictor` is given."""
    config, size, m = model.config, model.config.image_size, len(inputs)
    inputs, cameras = inputs.resized(size).to(model.device), cameras.to(model.device)
    source, targets, pivots = inputs.cameras, cameras, torch.zeros(m, 3, device=model.device)
    if camera_map is not None:
        source, targets, pivots = camera_map(inputs, cameras)
    source, targets = source.resized(size, size), targets.resized(size, size)
    image = rgba(inputs.rgb, inputs.alpha)
    cond = condition_tensors(image, source, targets, pivots)
    if config.render_condition and renderer is not None:
        renders = seen(renderer, inputs, targets, pivots, **config.sees)
        cond = torch.cat([cond, renders.to(cond).flatten(0, 1)], dim=1)
    return cond


def predictor(
    model: CVS,
    steps: int = 1,
    seed: int = 0,
    camera_map: CameraMap | None = None,
    *,
    renderer: Predictor | None = None,
) -> Predictor:
    """A function (inputs M, cameras (M, V)) -> Views (M, V, H, W) over black, depth all zero.

    Every object sees the same noise, drawn from `seed`, so a result does not depend on what else
    is in the batch. Images are made at the model's size and resized to the cameras'.

    Args:
        camera_map: replaces (input cameras, target cameras, pivots (M, 3)) before conditioning,
            for models trained in another geometry.
        renderer: the decoder's predictor; ValueError where the model needs it and there is none.
    """
    if model.config.render_condition and renderer is None:
        raise ValueError("renderer: got None, but this CVS sees the decoder's render of the view")
    size = model.config.image_size

    def predict(inputs: InputImages, cameras: Cameras) -> Views:
        m, v = cameras.batch_shape
        known = condition(model, inputs, cameras, renderer=renderer, camera_map=camera_map)
        cond = known.unflatten(0, (m, v))
        was_training, parts = model.training, []
        model.eval()
        for part in cond.split(max(1, MOST_AT_ONCE // v)):
            noise = torch.Generator(model.device).manual_seed(seed)
            flat, repeat = part.flatten(0, 1), len(part)
            parts.append(sample(model, flat, steps=steps, generator=noise, repeat=repeat))
        model.train(was_training)
        out, shape = torch.cat(parts).float(), (cameras.height, cameras.width)
        if shape != (size, size):
            out = F.interpolate(out, shape, mode="bilinear", antialias=True)
        out = ((out + 1) / 2).clamp(0, 1).unflatten(0, (m, v)).movedim(-3, -1)
        alpha = out[..., 3:]
        return Views(rgb=out[..., :3], alpha=alpha, depth=torch.zeros_like(alpha))

    return predict


SHIPPED = {"cvs": "cvs.safetensors", "cvs-warp": "cvs_warp.safetensors"}
"""Model of `arms.make_task` -> the trained CVS that comes with the package."""


def load_shipped(
    device: torch.device | str = "cpu", model: str = "cvs", domain: str = "objects"
) -> CVS:
    """A small trained CVS (128 px) that comes with the package: "cvs", 3 M parameters, draws a view
    anew; "cvs-warp", 5 M, adds to what the shipped pixel decoder (of "faces", that of heads) makes.

    ValueError if none of this model ships; also raises as `weights.shipped`.
    """
    if model not in SHIPPED:
        raise ValueError(f"no trained {model!r} ships, but {' and '.join(SHIPPED)}; want a file")
    name = SHIPPED[model] if domain == "objects" else SHIPPED[model].replace(".", f"_{domain}.")
    network = CVS.load(weights.shipped(name, model), device)
    # 1.5 times as fast on a core
    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
