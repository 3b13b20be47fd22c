"""How a CVS is trained: noise levels, losses, and the task that `train.fit` runs.

Easy Consistency Tuning (ECT), arXiv 2406.14548; what differs is said where it does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fresnel.data.dataset import ViewTensors
from fresnel.evaluation.metrics import Predictor, luminance, srgb_to_linear
from fresnel.models import refine as rendered
from fresnel.models.cvs import CONDITION_CHANNELS, CVS, CVSConfig, randn, sample
from fresnel.training.pairs import condition_and_target, mirror, picked, tinted

_BESIDE = (1, 1, 0, 0), (0, 0, 1, 1)  # padding left and right, above and below


def pixel_weights(config: CVSConfig, target: Tensor, depth: Tensor | None = None) -> Tensor:
    """Loss weights (B, 1, H, W) of target views (B, 4, H, W) in [-1, 1].

    "alpha_aware": the object with a margin of an eighth of the image, and the rest, get the
    stated shares of the weight, mean 1 (at most eightfold where there is little object). The
    margin matters: weighting the bare foreground up teaches a network that is unsure of the
    outline to draw too much of it.
    "depth_laplacian": the original experiment's mask, sigmoid(-100 (|Laplacian(depth)| - 0.01))
    with depth (B, H, W): empty background gets 0.73, the highest weight there is, and edges 0.
    """
    alpha = (target[:, 3:] + 1) / 2
    if config.loss_weight == "none":
        return torch.ones_like(alpha)
    if config.loss_weight == "depth_laplacian":
        if depth is None:
            raise ValueError("depth: got None, want depth maps for loss_weight 'depth_laplacian'")
        across, down = (F.pad(depth[:, None], pad, mode="replicate") for pad in _BESIDE)
        laplacian = (
            across[..., :-2] + across[..., 2:] + down[..., :-2, :] + down[..., 2:, :]
        ) - 4 * depth[:, None]
        return torch.sigmoid(-100 * (laplacian.abs() - 0.01))
    share = config.foreground_share
    near = grown(alpha, target.shape[-1] // 8)
    covered = near.mean(dim=(1, 2, 3), keepdim=True)
    foreground = share / covered.clamp_min(share / 8)
    background = (1 - share) / (1 - covered).clamp_min((1 - share) / 8)
    weights = near * foreground + (1 - near) * background
    return weights / weights.mean(dim=(1, 2, 3), keepdim=True)


def grown(image: Tensor, margin: int) -> Tensor:
    """The largest value within `margin` rows and columns of each pixel: (..., H, W) -> same.

    Windows double by shifts, rows then columns: 7 maxima each way where a max-pool of 65 x 65
    reads 4,225 values a pixel. Same bits.
    """
    window = 2 * margin + 1
    image = F.pad(image, (margin,) * 4, value=-torch.inf)
    for dim in (-1, -2):
        width = 1
        while width < window:
            shift, length = min(width, window - width), image.shape[dim]
            rest = length - shift
            image = torch.maximum(image.narrow(dim, 0, rest), image.narrow(dim, shift, rest))
            width += shift
    return image


def light_error(output: Tensor, target: Tensor) -> Tensor:
    """Share of the target's light that is missing or in excess, region by region, shape (B,).

    An uncertain network predicts the mean, and the mean of sRGB values is darker than the mean of
    the light they stand for: a soft edge loses light. So linear light, averaged over an eighth of
    the image each way, is compared by itself; the mean over regions is divided by the target's
    (plus 0.01, for dark objects). Images (B, 4, H, W) in [-1, 1], premultiplied.
    """
    region = max(1, target.shape[-1] // 8)
    regions = target.shape[-2] // region, target.shape[-1] // region

    def averaged(image: Tensor) -> Tensor:
        cut = image[:, :3, : regions[0] * region, : regions[1] * region]
        light = srgb_to_linear((cut + 1) / 2)
        # rows first: pixels of a row lie next to each other
        return light.unflatten(2, (-1, region)).mean(dim=3).unflatten(3, (-1, region)).mean(dim=4)

    found, true = averaged(output), averaged(target)
    return (found - true).abs().mean(dim=(1, 2, 3)) / (true.mean(dim=(1, 2, 3)) + 0.01)


def ect_stage(progress: float, config: CVSConfig) -> int:
    """The curriculum's stage at `progress` in [0, 1] of the run: 0 .. ect_stages - 1."""
    if progress < config.denoising_share or config.ect_stages == 1:
        return 0
    later = (progress - config.denoising_share) / max(1 - config.denoising_share, 1e-12)
    return 1 + min(int(later * (config.ect_stages - 1)), config.ect_stages - 2)


def ect_earlier(sigma: Tensor, stage: int, config: CVSConfig) -> Tensor:
    """The lower noise level r of ECT: r / t = 1 - n(t) / q^stage, n(t) = 1 + k sigmoid(-b t).

    r is clamped at sigma_min. In stage 0 every r is sigma_min, which is plain denoising; each
    stage halves (q = 2) the gap, towards the full consistency condition r -> t.
    """
    n = 1 + config.ect_k * torch.sigmoid(-config.ect_b * sigma)
    return (sigma * (1 - n / config.ect_q**stage)).clamp_min(config.sigma_min)


def denoised(model: CVS, x: Tensor, sigma: Tensor, cond: Tensor) -> Tensor:
    """One pass of the network, as a function that a compiled one can replace."""
    return model(x, sigma, cond)


def consistency_loss(
    model: CVS,
    target: Tensor,
    cond: Tensor,
    weights: Tensor,
    *,
    progress: float,
    generator: torch.Generator,
    network: Callable[..., Tensor] = denoised,
    terms: Callable[..., dict[str, Tensor]] | None = None,
) -> dict[str, Tensor]:
    """ECT loss of D(x_t, t) against a stop-gradient D(x_r, r) with the same noise and dropout.

    Differences from ECT, which starts from a diffusion model, and why: its time weight
    1 / (t - r) vanishes at large t and grows with every stage; training from scratch needs
    sigma_max, where the one step starts, to count. So `sigma_max_fraction` of the samples are
    there, and with `sigma_max_anchor` their reference is the clean view in every stage: the
    chain of references from sigma_max down to the data is too long for a short run to carry
    anything along, and without the anchor the one step drifts off as soon as stage 1 begins.

    Args:
        network: calls the model; perhaps compiled. So `terms`; None: `consistency_terms`.

    Returns:
        `consistency_terms`.
    """
    config, b = model.config, target.shape[0]
    t = (randn(target[:, 0, 0, 0], generator) * config.p_std + config.p_mean).exp()
    at_max = _uniform(generator, target.device, b) < config.sigma_max_fraction
    # c_out vanishes at sigma_min
    t = t.clamp(2 * config.sigma_min, config.sigma_max)
    t = torch.where(at_max, config.sigma_max, t)
    stage = ect_stage(progress, config)
    r = ect_earlier(t, stage, config)
    if config.sigma_max_anchor:
        r = torch.where(at_max, config.sigma_min, r)
    noise = randn(target, generator)
    x_t, x_r = (target + level.reshape(-1, 1, 1, 1) * noise for level in (t, r))
    seed = _seed(generator) if config.dropout else None
    output = _seeded(network, seed, model, x_t, t, cond)
    with torch.no_grad():
        # D(x, sigma_min) = x, so stage 0 needs no second pass, and a CPU only some of its rows,
        # where the network is not compiled for all of them
        reference = x_r
        if stage and (x_r.is_cuda or seed is not None or network is not denoised):
            reference = _seeded(network, seed, model, x_r, r, cond)
        elif stage:
            rows = r > config.sigma_min
            reference = x_r.clone()
            if rows.any():
                reference[rows] = model(x_r[rows], r[rows], cond[rows]).to(x_r.dtype)
    c_out = model.scalings(t)[1]
    return (terms or consistency_terms)(config, output, reference, target, weights, c_out, at_max)


def consistency_terms(
    config: CVSConfig,
    denoised: Tensor,
    reference: Tensor,
    target: Tensor,
    weights: Tensor,
    c_out: Tensor,
    at_max: Tensor,
) -> dict[str, Tensor]:
    """The ECT loss of outputs (B, 4, H, W) against references, and what to watch beside it.

    Pseudo-Huber on the weighted root-mean-square error of each sample, sqrt(e^2 + c^2) - c, times
    1 / c_out(t) (B,), which gives every noise level an error of order one. `at_max` (B,): which
    samples are at sigma_max.

    Returns:
        "loss"; "light", `light_error`'s mean; "x0_rms", the error against the clean target over
        all noise levels; "one_step_rms", the same at sigma_max only (0 if no sample was there).
    """
    error = (weights * (denoised - reference).square()).mean(dim=(1, 2, 3))
    huber = (error + config.huber_c**2).sqrt() - config.huber_c
    rms = (denoised.detach() - target).square().mean(dim=(1, 2, 3)).sqrt()
    lost = light_error(denoised, target).mean()
    return {
        "loss": (huber / c_out).mean() + config.light_weight * lost,
        "light": lost.detach(),
        "x0_rms": rms.mean(),
        "one_step_rms": (rms * at_max).sum() / at_max.sum().clamp_min(1),
    }


def _uniform(generator: torch.Generator, device: torch.device, *shape: int) -> Tensor:
    return torch.rand(shape, generator=generator, device=generator.device).to(device)


def _seed(generator: torch.Generator) -> int:
    return int(torch.randint(2**31, (1,), generator=generator, device=generator.device))


def _seeded(network: Callable[..., Tensor], seed: int | None, model: CVS, *given: Tensor) -> Tensor:
    """One pass whose dropout masks follow from `seed` (None: the model has no dropout)."""
    if seed is None:
        return network(model, *given)
    with torch.random.fork_rng([given[0].device] if given[0].is_cuda else []):
        torch.manual_seed(seed)
        return network(model, *given)


def original_loss(
    model: CVS,
    ema: nn.Module,
    target: Tensor,
    cond: Tensor,
    weights: Tensor,
    *,
    progress: float,
    generator: torch.Generator,
    network: Callable[..., Tensor] = denoised,
) -> dict[str, Tensor]:
    """The original experiment's loss: weighted L1 + w |D(x_t) - EMA D(x_t')| at the next level.

    Noise levels follow the cosine schedule, sigma = tan(pi u / 2), with 1,000 levels of u; w is
    0.1, 0.3, 1.0 over the thirds of training. Its perceptual term (half weight) is left out: it
    needs a pretrained network's weights.
    """
    config, b = model.config, target.shape[0]
    u = _uniform(generator, target.device, b)
    t, lower = (
        torch.tan((u - step).clamp_min(0) * (math.pi / 2)).clamp(config.sigma_min, config.sigma_max)
        for step in (0.0, 1e-3)
    )
    noise = randn(target, generator)
    output = network(model, target + t.reshape(-1, 1, 1, 1) * noise, t, cond)
    with torch.no_grad():
        neighbour = ema(target + lower.reshape(-1, 1, 1, 1) * noise, lower, cond)
    l1 = (weights * (output - target).abs()).mean()
    consistency = (output - neighbour).abs().mean()
    w = (0.1, 0.3, 1.0)[original_third(progress)]
    return {"loss": l1 + w * consistency, "l1": l1, "consistency": consistency}


def original_third(progress: float) -> int:
    """Which third of the original's training `progress` in [0, 1] is in."""
    return min(int(3 * progress), 2)


class CVSTask:
    """What `train.fit` needs to train a CVS on a multi-view set.

    Args:
        model: the network to train.
        views: the training set at the model's image size.
        batch_size: (record, view) pairs a step.
        validation: held-out views for the validation loss and pictures (None: the training set).
        any_input: half of the pairs take another view of the object as input. Only for sets of
            ground truth: a bootstrap's views are no better than the decoder that made them.
        mirror: mirror half of the pairs. Cameras must have a centred principal point.
        colour_jitter: each channel of a pair is scaled by exp(uniform(-j, j)), clipped at alpha.
        pairs: train on these (record, view) pairs alone, (P, 2); None: on all.
        renderer: the decoder's predictor, for models with `render_condition`.
        validation_pairs, preview_pairs: how many pairs those look at, spread over the set.
        device: where model and data live.
    """

    name = "cvs"

    def __init__(
        self,
        model: CVS,
        views: ViewTensors,
        *,
        batch_size: int = 16,
        validation: ViewTensors | None = None,
        any_input: bool = False,
        mirror: bool = False,
        colour_jitter: float = 0.0,
        pairs: Tensor | None = None,
        renderer: Predictor | None = None,
        validation_pairs: int = 32,
        preview_pairs: int = 4,
        device: torch.device | str = "cpu",
    ) -> None:
        size = model.config.image_size
        for which, tensors in {"views": views, "validation": validation or views}.items():
            sizes = {tuple(tensors.rgb.shape[2:4]), tuple(tensors.inputs.rgb.shape[1:3])}
            if sizes != {(size, size)}:
                raise ValueError(
                    f"{which}: got images of {sorted(sizes)} px, want the model's image_size "
                    f"{size}; use dataset.tensors(size={size})"
                )
        if model.config.loss_weight == "depth_laplacian" and views.depth is None:
            raise ValueError("views: have no depth, which loss_weight 'depth_laplacian' needs")
        if batch_size < 1:
            raise ValueError(f"batch_size: got {batch_size}, want at least 1")
        if model.config.render_condition and renderer is None:
            raise ValueError("renderer: got None, but the model's config has render_condition")
        # channels last: 1.4 times the samples a second on two CPU cores
        self.model = model.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.views, self.batch_size = views.to(device), batch_size
        self.held_out = self.views if validation is None else validation.to(device)
        self.any_input, self.mirror, self.colour_jitter = any_input, mirror, colour_jitter
        self.validation_pairs, self.preview_pairs = validation_pairs, preview_pairs
        self._pairs = None if pairs is None else pairs.to(device)
        self._renders: Tensor | None = None
        self._held_out_renders: Tensor | None = None
        if model.config.render_condition and renderer is not None:
            twin = model.config.render_twin
            self._renders = rendered.prepared(renderer, self.views, any_input=any_input, twin=twin)
            self._held_out_renders = rendered.prepared(renderer, self.held_out, twin=twin)
        # what every step runs, by name; the stepper puts compiled versions here
        self.hot: dict[str, Callable[..., Any]] = {
            "network": denoised,
            "loss": consistency_terms,
            "batch": assemble,
        }

    @property
    def config(self) -> dict[str, Any]:
        """Everything that makes this task what it is, for checkpoints."""
        return {
            "model": asdict(self.model.config),
            "initial_weights": self.model.origin,
            "batch_size": self.batch_size,
            "any_input": self.any_input,
            "mirror": self.mirror,
            "colour_jitter": self.colour_jitter,
            "pairs": None if self._pairs is None else len(self._pairs),
        }

    def phase(self, progress: float) -> int | None:
        """Steps of one phase do the same work; None: dropout, whose seed the host draws."""
        config = self.model.config
        if config.dropout:
            return None
        if config.parameterisation == "original":
            return original_third(progress)
        return ect_stage(progress, config)

    def batch(self, step: int, generator: torch.Generator) -> dict[str, Any]:
        """Random pairs: "cond", "target", "weights" and the "record", "view" they came from."""
        views, b = self.views, self.batch_size
        m, v = views.rgb.shape[:2]
        device = views.rgb.device

        def uniform(*shape: int) -> Tensor:
            return _uniform(generator, device, *shape)

        def draw(high: int) -> Tensor:
            return (uniform(b) * high).long().clamp_max(high - 1)

        if self._pairs is None:
            record, view = draw(m), draw(v)
        else:
            record, view = self._pairs[draw(len(self._pairs))].unbind(1)
        source = torch.where(uniform(b) < 0.5, draw(v), -1) if self.any_input else None
        gain = flipped = None
        if self.colour_jitter:
            gain = torch.exp((2 * uniform(b, 3, 1, 1) - 1) * self.colour_jitter)
        if self.mirror:
            flipped = (uniform(b) < 0.5)[:, None, None, None]
        stored = picked(views, record, view, source, self._renders)
        made = self.hot["batch"](self.model.config, stored, gain, flipped)
        return {**made, "record": record, "view": view}

    def loss(
        self,
        batch: dict[str, Any],
        *,
        progress: float,
        generator: torch.Generator,
        ema: nn.Module,
    ) -> dict[str, Tensor]:
        tensors = (batch["target"], batch["cond"], batch["weights"])
        options: dict[str, Any] = {"progress": progress, "generator": generator}
        if self.model.config.parameterisation == "original":
            return original_loss(self.model, ema, *tensors, **options, network=self.hot["network"])
        return consistency_loss(
            self.model, *tensors, **options, network=self.hot["network"], terms=self.hot["loss"]
        )

    @torch.no_grad()
    def validation(self, model: nn.Module) -> dict[str, float]:
        """One-step generation of held-out views with fixed noise.

        "loss": weighted root-mean-square error in [-1, 1]; "psnr" of the RGB over black in dB;
        "coverage_ratio" and "luminance_ratio": area and light of what was generated over the truth.
        """
        assert isinstance(model, CVS)
        errors, squares, covered, truth, light, true_light, count = *(0.0,) * 6, 0
        generator = torch.Generator(self.held_out.rgb.device).manual_seed(0)
        for pair in self._spread(self.validation_pairs):
            out, target = sample(model, pair["cond"], generator=generator), pair["target"]
            square = (out - target).square()
            weights = pixel_weights(model.config, target, pair["depth"])
            errors += (weights * square).mean(dim=(1, 2, 3)).sqrt().sum().item()
            squares += (square[:, :3].mean(dim=(1, 2, 3)) / 4).sum().item()
            covered += (out[:, 3] + 1).sum().item()
            truth += (target[:, 3] + 1).sum().item()
            light += _light(out)
            true_light += _light(target)
            count += len(target)
        return {
            "loss": errors / count,
            "psnr": -10 * math.log10(max(squares / count, 1e-10)),
            "coverage_ratio": covered / max(truth, 1e-10),
            "luminance_ratio": light / max(true_light, 1e-10),
        }

    @torch.no_grad()
    def preview(self, model: nn.Module, generator: torch.Generator) -> np.ndarray:
        """One row a pair: input, target, one step, two steps; over black, uint8 (H, W, 3)."""
        assert isinstance(model, CVS)
        rows = []
        for pair in self._spread(self.preview_pairs):
            made = [sample(model, pair["cond"], steps=n, generator=generator) for n in (1, 2)]
            images = torch.cat([pair["cond"][:, :4], pair["target"], *made], dim=-1)[:, :3]
            rows.append(images.permute(0, 2, 3, 1).flatten(0, 1))
        grid = (torch.cat(rows).float() + 1) * 127.5
        return grid.round().clamp(0, 255).byte().cpu().numpy()

    def _spread(self, pairs: int) -> Iterator[dict[str, Any]]:
        """Chunks of `pairs` pairs, evenly spread over the held-out records and views."""
        m, v = self.held_out.rgb.shape[:2]
        flat = torch.linspace(0, m * v - 1, min(pairs, m * v)).round().long()
        for chunk in flat.to(self.held_out.rgb.device).split(max(self.batch_size, 8)):
            renders = self._held_out_renders
            yield condition_and_target(picked(self.held_out, chunk // v, chunk % v, None, renders))


def assemble(
    config: CVSConfig,
    stored: dict[str, Any],
    gain: Tensor | None = None,
    flipped: Tensor | None = None,
) -> dict[str, Tensor]:
    """ "cond", "target" and "weights" of what was `picked`, augmented as the draws say.

    Args:
        gain: factors (B, 3, 1, 1) for the colour channels.
        flipped: which pairs to mirror, bool (B, 1, 1, 1).
    """
    pair = condition_and_target(stored)
    cond, target = pair["cond"], pair["target"]
    if gain is not None:
        parts = [tinted(cond[:, :4], gain), cond[:, 4:CONDITION_CHANNELS]]
        if stored["render"] is not None:
            for render in cond[:, CONDITION_CHANNELS:].split(rendered.CHANNELS, dim=1):
                parts += [tinted(render[:, :4], gain), render[:, 4:]]
        cond, target = torch.cat(parts, dim=1), tinted(target, gain)
    weights = pixel_weights(config, target, pair["depth"])
    if flipped is not None:
        mirrored = mirror(cond, target)
        cond = torch.where(flipped, mirrored[0], cond)
        target = torch.where(flipped, mirrored[1], target)
        weights = torch.where(flipped, weights.flip(-1), weights)
    if target.device.type == "cpu":
        target = target.contiguous()  # as "cond" is; a compiled loss of interleaved colours is slow
    return {"cond": cond, "target": target, "weights": weights}


def _light(images: Tensor) -> float:
    """Sum of the linear luminance of RGBA images (N, 4, H, W) in [-1, 1], over black."""
    rgb = (images[:, :3].float().clamp(-1, 1) + 1) / 2
    return luminance(rgb.movedim(1, -1)).sum().item()
