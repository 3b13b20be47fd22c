"""Training a `Decoder` through the renderer: the loss, and the `train.Task` around it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fresnel.data.dataset import ViewTensors
from fresnel.evaluation.metrics import luminance
from fresnel.models.decoder import Decoder, DecoderConfig, resize
from fresnel.models.patch_decoder import normalised_depth
from fresnel.render import Views, render
from fresnel.scene.cameras import Cameras, mirror_signs, rigid_inverse
from fresnel.scene.gaussians import Gaussians


@dataclass(frozen=True)
class LossWeights:
    """Weights of the terms of `multiview_loss`.

    The last three are regularisers: large Gaussians blur the side views, and half-transparent
    ones hide depth errors that another angle shows.
    """

    rgb_l1: float = 1.0
    rgb_mse: float = 4.0
    ssim: float = 0.2
    alpha_l1: float = 0.5
    depth_l1: float = 0.25
    predicted_depth: float = 1.0
    scale: float = 0.02
    opacity: float = 0.002


def multiview_loss(
    views: Views,
    target: Tensor,
    background: Tensor,
    *,
    target_depth: Tensor | None = None,
    gaussians: Gaussians | None = None,
    weights: LossWeights | None = None,
    windows: tuple[Tensor, Tensor] | None = None,
) -> dict[str, Tensor]:
    """How far rendered views are from the truth, in named terms (unweighted) and their sum.

    Both sides are composited over the same random background, so a Gaussian can't pass for
    background by being black, nor hide behind a known colour.

    Args:
        views: rendered over black, (B, V, H, W, ...).
        target: premultiplied rgba in [0, 1], (B, V, H, W, 4).
        background: sRGB in [0, 1], broadcastable to (B, V, H, W, 3).
        target_depth: z-depth, (B, V, H, W), 0 where unknown; None: no depth term.
        gaussians: the scenes, for the regularisers; None: none.
        weights: None: the defaults.
        windows: see `similarity`.

    Returns:
        "rgb_l1", "rgb_mse", "ssim" (1 - SSIM), "alpha_l1", perhaps "depth_l1", "scale",
        "opacity", all scalars, and "loss", their weighted sum.
    """
    weights = weights or LossWeights()
    truth = target[..., :3] + (1 - target[..., 3:]) * background
    ours = views.rgb + (1 - views.alpha) * background
    terms = {
        "rgb_l1": F.l1_loss(ours, truth),
        "rgb_mse": F.mse_loss(ours, truth),
        "alpha_l1": F.l1_loss(views.alpha, target[..., 3:]),
    }
    if weights.ssim > 0:
        terms["ssim"] = 1 - similarity(ours, truth, windows)
    if target_depth is not None:
        depth, alpha = views.depth[..., 0], views.alpha[..., 0].detach()
        valid = ((target_depth > 0) & (target[..., 3] > 0.5) & (alpha > 0.5)).float()
        error = F.smooth_l1_loss(depth, target_depth, beta=0.05, reduction="none")
        terms["depth_l1"] = (error * valid).sum() / valid.sum().clamp_min(1.0)
    if gaussians is not None:
        opacity = gaussians.opacities
        largest = gaussians.scales.amax(-1)
        terms["scale"] = (opacity * largest).sum() / opacity.sum().clamp_min(1.0)
        terms["opacity"] = (opacity * (1 - opacity)).mean()
    terms["loss"] = torch.stack([getattr(weights, k) * v for k, v in terms.items()]).sum()
    return terms


def similarity(
    image: Tensor, truth: Tensor, windows: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """Mean SSIM of images (..., H, W, 3) in [0, 1], of at least 6 pixels a side.

    The value of `evaluate.ssim` (torchmetrics'), for training: the 11 x 11 Gaussian window is
    separable, and as two products with banded matrices it costs a hundredth of the convolution.
    `windows`: `window` of the height and of the width, where they are at hand.
    """

    def mean(values: Tensor) -> Tensor:
        return rows @ (values @ columns.mT)

    x, y = (value.movedim(-1, -3) for value in (image, truth))
    rows, columns = windows or (window(size, x) for size in x.shape[-2:])
    mean_x, mean_y = mean(x), mean(y)
    var_x, var_y, covariance = (
        mean(a * b) - mean_a * mean_b
        for a, b, mean_a, mean_b in (
            (x, x, mean_x, mean_x),
            (y, y, mean_y, mean_y),
            (x, y, mean_x, mean_y),
        )
    )
    c1, c2 = 0.01**2, 0.03**2
    spread = var_x.clamp_min(0) + var_y.clamp_min(0) + c2
    alike = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return (alike / ((mean_x.square() + mean_y.square() + c1) * spread)).mean()


def window(size: int, like: Tensor, *, reach: int = 5, sigma: float = 1.5) -> Tensor:
    """Matrix (size, size) that averages neighbours by a Gaussian; edges are reflected."""
    place = torch.arange(size, device=like.device)
    outer = torch.arange(-reach, size + reach, device=like.device)
    offset = (outer - place[:, None]).to(like.dtype)
    weights = torch.exp(-0.5 * (offset / sigma).square()) * (offset.abs() <= reach)
    inner = (size - 1) - ((size - 1) - outer.abs()).abs()
    weights = weights @ (inner[:, None] == place).to(like.dtype)
    return weights / weights.sum(dim=1, keepdim=True)


def floats(stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """What is stored in 8 and 16 bits, as the numbers that the loss takes."""
    batch = {**stored, "rgba": stored["rgba"].float() / 255}
    if "depth" in batch:
        batch["depth"] = batch["depth"].float()
    return batch


def augmented(
    stored: dict[str, Tensor],
    draws: Tensor,
    order: Tensor,
    mirroring: tuple[Tensor, Tensor, Tensor],
) -> dict[str, Tensor]:
    """`floats`, half of the objects mirrored left-right; the colours of half permuted and scaled.

    Args:
        draws: (B, 8), uniform in [0, 1).
        order: (B, 3), permutations of the channels.
        mirroring: `mirror_signs`.
    """
    batch = floats(stored)
    mirror, recolour = (draws[:, k, None, None, None, None] < 0.5 for k in (0, 1))
    rgb, alpha = batch["rgba"].split([3, 1], dim=-1)
    gain = 0.7 + 0.5 * draws[:, None, None, None, 5:]
    red, green, blue = rgb.split(1, dim=-1)
    place = order[:, None, None, None]
    permuted = torch.where(place == 0, red, torch.where(place == 1, green, blue))
    mixed = torch.minimum(permuted * gain, alpha)  # premultiplied
    rgba = torch.cat([torch.where(recolour, mixed, rgb), alpha], dim=-1)
    batch["rgba"] = torch.where(mirror, rgba.flip(3), rgba)

    mirror = mirror[..., 0]
    if "depth" in batch:
        batch["depth"] = torch.where(mirror, batch["depth"].flip(3), batch["depth"])
    # The world mirrored in x, seen by mirrored cameras, is the mirrored picture.
    of_views, of_pixels, across = mirroring
    viewmats, Ks = batch["viewmats"], batch["Ks"]
    batch["viewmats"] = torch.where(mirror, viewmats * of_views, viewmats)
    batch["Ks"] = torch.where(mirror, Ks * of_pixels + across * rgba.shape[3], Ks)
    return batch


def decoded(
    model: Decoder, batch: dict[str, Tensor]
) -> tuple[Gaussians, dict[str, Tensor], Cameras]:
    """Gaussians in the input camera's frame, and all cameras of the batch in that frame."""
    size, network_size = batch["rgba"].shape[2], model.config.image_size
    rgba = resize(batch["rgba"][:, 0].permute(0, 3, 1, 2), network_size)
    inputs = Cameras(batch["viewmats"][:, 0], batch["Ks"][:, 0], size, size)
    depth, Ks = None, batch["Ks"]
    if model.config.kind == "patch":
        Ks = Ks.clone()
        Ks[..., 0, 0] = Ks[..., 1, 1] = float(size)
        if "depth" in batch:
            depth = normalised_depth(batch["depth"][:, 0], batch["rgba"][:, 0, :, :, 3])
            depth = resize(depth[:, None], network_size)[:, 0]
    gaussians, aux = model.decode(rgba, inputs.resized(network_size, network_size), depth)
    with torch.autocast(rgba.device.type, enabled=False):
        viewmats = batch["viewmats"] @ rigid_inverse(inputs.viewmats)[:, None]
    return gaussians, aux, Cameras(viewmats, Ks, size, size)


class DecoderTask:
    """What `train.fit` needs to train a decoder on multi-view data.

    A step takes `batch_size` objects, one image of each as the input, and supervises that view
    and `target_views` others.  Where the data are ground truth any view may be the input.

    Args:
        views: training objects; images square and of one size, which is also the size rendered.
        config: of the decoder; None: the defaults.
        model: continue this decoder instead of a fresh one.
        validation: held-out objects; None: `validation()` looks at the training objects.
        any_input: let every view act as the input, not only the record's input image.
        frontal_only: supervise the input view alone, as the original did; the patch kind
            can do nothing else, its camera geometry being fixed.
        augment: mirror, and mix the colours of, half of the objects.
        device: where the model and the data live.
    """

    def __init__(
        self,
        views: ViewTensors,
        config: DecoderConfig | None = None,
        *,
        model: Decoder | None = None,
        validation: ViewTensors | None = None,
        batch_size: int = 8,
        target_views: int = 3,
        any_input: bool = True,
        frontal_only: bool = False,
        augment: bool = True,
        weights: LossWeights | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.device = torch.device(device)
        self.model = (model or Decoder(config)).to(self.device)
        if len(views) == 0:
            raise ValueError("views: got no objects, want at least one to train on")
        if batch_size < 1 or target_views < 1:
            raise ValueError(f"batch_size {batch_size}, target_views {target_views}: want >= 1")
        self.frontal_only = frontal_only or self.model.config.kind == "patch"
        self.batch_size, self.any_input, self.augment = batch_size, any_input, augment
        self.weights = weights or LossWeights()
        self._train = _Pool(views, self.device)
        self._held_out = _Pool(validation, self.device) if validation else self._train
        self.target_views = min(target_views, self._train.views - 1)
        size = self._train.size
        self._windows = (window(size, torch.zeros((), device=self.device)),) * 2
        self._mirroring = mirror_signs(self.device)
        # what every step runs, by name; the stepper puts compiled or recorded versions here
        self.hot: dict[str, Callable[..., Any]] = {
            "network": decoded,
            "loss": multiview_loss,
            "batch": augmented,
        }
        # What a resumed run must agree on.
        self.config = {
            **asdict(self.model.config),
            "target_views": self.target_views,
            "any_input": any_input,
            "frontal_only": self.frontal_only,
            "augment": augment,
            "weights": asdict(self.weights),
        }

    def batch(self, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Random objects, input views and target views; the same for the same generator state."""
        pool, count = self._train, self.batch_size
        objects = (self._uniform(generator, count) * len(pool)).long()
        order = self._uniform(generator, count, pool.views)
        if not self.any_input:
            order[:, 0] = -1.0  # the record's own input comes first
        picks = order.argsort(dim=1)[:, : 1 + (0 if self.frontal_only else self.target_views)]
        stored = pool.pick(objects, picks)
        if not self.augment:
            return floats(stored)
        draws = self._uniform(generator, count, 8)
        order = draws[:, 2:5].argsort(dim=1)
        return self.hot["batch"](stored, draws, order, self._mirroring)

    def _uniform(self, generator: torch.Generator | None, *shape: int) -> Tensor:
        """Uniform numbers in [0, 1) on the task's device, drawn where the generator lives."""
        place = generator.device if generator is not None else self.device
        return torch.rand(shape, generator=generator, device=place).to(self.device)

    def loss(
        self,
        batch: dict[str, Tensor],
        *,
        progress: float = 0.0,
        generator: torch.Generator | None = None,
        ema: torch.nn.Module | None = None,
        model: Decoder | None = None,
    ) -> dict[str, Tensor]:
        """`multiview_loss` of the decoded inputs on all views of the batch."""
        background = self._uniform(generator, *batch["rgba"].shape[:2], 1, 1, 3)
        return self._loss(model or self.model, batch, background)[0]

    def _loss(
        self, model: Decoder, batch: dict[str, Tensor], background: Tensor
    ) -> tuple[dict[str, Tensor], Views]:
        own = model is self.model
        gaussians, aux, cameras = (self.hot["network"] if own else decoded)(model, batch)
        with torch.autocast(self.device.type, enabled=False):
            views = render(gaussians, cameras)
            # The patch kind lives in its own units: its depths are not the record's.
            depth = None if model.config.kind == "patch" else batch.get("depth")
            terms = (self.hot["loss"] if own else multiview_loss)(
                views,
                batch["rgba"],
                background,
                target_depth=depth,
                gaussians=gaussians,
                weights=self.weights,
                windows=self._windows,
            )
            if "depth_known" in aux:
                error = F.l1_loss(aux["depth_predicted"], aux["depth_known"])
                terms["predicted_depth"] = error
                terms["loss"] = terms["loss"] + self.weights.predicted_depth * error
        return terms, views

    def _fixed(self, objects: int, views: int) -> dict[str, Tensor]:
        """The record's input and its first views of evenly spread held-out objects."""
        pool = self._held_out
        index = torch.linspace(0, len(pool) - 1, min(objects, len(pool))).round().long()
        order = torch.arange(1 + (0 if self.frontal_only else min(views, pool.views - 1)))
        index = index.to(self.device)
        return floats(pool.pick(index, order.to(self.device).expand(len(index), -1)))

    @torch.no_grad()
    def preview(
        self, model: Decoder, generator: torch.Generator | None = None, *, objects: int = 4
    ) -> np.ndarray:
        """A picture (H, W, 3) uint8: per held-out object its true views above the rendered."""
        batch = self._fixed(objects, 5)
        white = torch.ones(3, device=self.device)
        _, views = self._loss(model, batch, white)
        truth = batch["rgba"][..., :3] + 1 - batch["rgba"][..., 3:]
        ours = views.rgb + 1 - views.alpha
        rows = torch.stack([truth, ours], dim=1)  # (B, 2, V, H, W, 3)
        sheet = rows.permute(0, 1, 3, 2, 4, 5).flatten(0, 2).flatten(1, 2)
        return (sheet.clamp(0, 1) * 255).round().byte().cpu().numpy()

    @torch.no_grad()
    def validation(self, model: Decoder, *, objects: int = 32) -> dict[str, float]:
        """On fixed views of held-out objects, over white: "loss", "psnr_input", and, unless
        frontal, "psnr_novel" beside "psnr_copy", what copying the input image would score;
        "luminance_ratio": light of all of them over the true one."""
        batch = self._fixed(objects, self._held_out.views)
        white = torch.ones(3, device=self.device)
        losses, ours, light = [], [], []
        for start in range(0, len(batch["rgba"]), self.batch_size):  # bounded memory
            part = {key: value[start : start + self.batch_size] for key, value in batch.items()}
            terms, views = self._loss(model, part, white)
            losses.append(terms["loss"].expand(len(part["rgba"])))
            ours.append(views.rgb + 1 - views.alpha)
            light.append(luminance(views.rgb.clamp(0, 1)).sum())
        truth = batch["rgba"][..., :3] + 1 - batch["rgba"][..., 3:]
        result = {"loss": torch.cat(losses).mean()}
        picture = torch.cat(ours)
        true_light = luminance(batch["rgba"][..., :3]).sum()
        result["luminance_ratio"] = torch.stack(light).sum() / true_light.clamp_min(1e-10)
        result["psnr_input"] = _psnr(picture[:, 0], truth[:, 0])
        if not self.frontal_only:
            result["psnr_novel"] = _psnr(picture[:, 1:], truth[:, 1:])
            result["psnr_copy"] = _psnr(truth[:, :1].expand_as(truth[:, 1:]), truth[:, 1:])
        return {key: float(value) for key, value in result.items()}


def _psnr(image: Tensor, truth: Tensor) -> Tensor:
    """Mean over images (..., H, W, 3) of their peak signal-to-noise ratios, dB."""
    error = (image.clamp(0, 1) - truth).square().mean(dim=(-1, -2, -3))
    return (-10 * error.clamp_min(1e-10).log10()).mean()


class _Pool:
    """Every image of every object, the record's input first, pivots moved to the origin."""

    def __init__(self, data: ViewTensors, device: torch.device) -> None:
        height, width = data.rgb.shape[2:4]
        if height != width:
            raise ValueError(f"views: got {width} x {height} pixels, want square images")
        self.size = width
        inputs = data.inputs if data.inputs.rgb.shape[1] == width else data.inputs.resized(width)
        joined = [
            torch.cat([data.rgb, data.alpha[..., None]], dim=-1),
            torch.cat([inputs.rgb, inputs.alpha[..., None]], dim=-1)[:, None],
        ]
        self.rgba = torch.cat([part.to(device) for part in reversed(joined)], dim=1)
        self.depth: Tensor | None = None
        if data.depth is not None and inputs.depth is not None:
            self.depth = torch.cat([inputs.depth[:, None], data.depth], dim=1).to(device)
        viewmats = torch.cat([inputs.cameras.viewmats[:, None], data.cameras.viewmats], dim=1)
        shift = torch.eye(4).repeat(len(data.pivots), 1, 1, 1)
        shift[:, 0, :3, 3] = data.pivots.cpu()
        self.viewmats = (viewmats.cpu() @ shift).to(device)
        self.Ks = torch.cat([inputs.cameras.Ks[:, None], data.cameras.Ks], dim=1).to(device)
        self.views = self.rgba.shape[1]

    def __len__(self) -> int:
        return len(self.rgba)

    def pick(self, objects: Tensor, views: Tensor) -> dict[str, Tensor]:
        """Images `views` (B, T) of `objects` (B,), as they are stored."""
        index = (objects[:, None], views)
        batch = {"rgba": self.rgba[index], "viewmats": self.viewmats[index], "Ks": self.Ks[index]}
        if self.depth is not None:
            batch["depth"] = self.depth[index]
        return batch
