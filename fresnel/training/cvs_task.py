"""What a CVS learns from: pairs (record, view) of a multi-view set, as the task that `fit` runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fresnel.data.records import ViewTensors
from fresnel.evaluation.metrics import psnr
from fresnel.models import Predictor, cvs
from fresnel.models.cvs import CONDITION_CHANNELS, CVS, CVSConfig, condition_tensors, rgba, sample
from fresnel.scene.cameras import Cameras
from fresnel.scene.colour import luminance
from fresnel.training import losses
from fresnel.training.task import digest

_VALIDATED, _SHOWN = 32, 4
"""Pairs that a validation and a picture look at, spread over the set."""


class CVSTask:
    """What `fit` needs to train a CVS on a multi-view set.

    Args:
        model: the network to train.
        views: the training set at the model's image size.
        batch_size: (record, view) pairs a step.
        validation: views for the validation loss and pictures, of objects that are neither trained
            on nor judged by (None: the training set).
        any_input: half of the pairs take another view of the object as input. Only for sets of
            ground truth: a bootstrap's views are no better than the decoder that made them.
        mirror: mirror half of the pairs. Cameras must have a centred principal point.
        colour_jitter: each channel of a pair is scaled by exp(uniform(-j, j)), clipped at alpha.
        pairs: train on these (record, view) pairs alone, (P, 2); None: on all.
        renderer: the decoder's predictor, for models with `render_condition`.
        device: where model and data live.
    """

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
        device: torch.device | str = "cpu",
    ) -> None:
        config = model.config
        size = (config.image_size, config.image_size)
        for which, tensors in {"views": views, "validation": validation or views}.items():
            sizes = {tuple(tensors.rgb.shape[2:4]), tuple(tensors.inputs.rgb.shape[1:3])}
            if sizes != {size}:
                raise ValueError(
                    f"{which}: got images of {sorted(sizes)} px, want the model's image_size "
                    f"{config.image_size}; use dataset.tensors(size={config.image_size})"
                )
        if config.loss_weight == "depth_laplacian" and views.depth is None:
            raise ValueError("views: have no depth, which loss_weight 'depth_laplacian' needs")
        if batch_size < 1:
            raise ValueError(f"batch_size: got {batch_size}, want at least 1")
        if config.render_condition and renderer is None:
            raise ValueError("renderer: got None, but the model's config has render_condition")
        # channels last: 1.4 times the samples a second on two CPU cores
        self.model = model.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.data, self.batch_size = views.to(device), batch_size
        self.held_out = self.data if validation is None else validation.to(device)
        self.any_input, self.mirror, self.colour_jitter = any_input, mirror, colour_jitter
        self._pairs = None if pairs is None else pairs.to(device)
        self._renders = self._held_out_renders = None
        if config.render_condition and renderer is not None:
            model.decoder = getattr(renderer, "decoder", "")
            twin = config.render_twin
            self._renders = cvs.prepared(renderer, self.data, any_input=any_input, twin=twin)
            self._held_out_renders = cvs.prepared(renderer, self.held_out, twin=twin)
        self.hot: dict[str, Callable[..., Any]] = {
            "network": losses.denoised,
            "loss": losses.consistency_terms,
            "batch": assemble,
        }
        self.config: dict[str, Any] = {
            "model": asdict(config),
            "initial_weights": model.origin,
            "any_input": any_input,
            "mirror": mirror,
            "colour_jitter": colour_jitter,
            "pairs": None if pairs is None else f"{len(pairs)}, {digest(pairs)}",
            # of the first record: another renderer draws it otherwise
            "renders": None if self._renders is None else digest(self._renders[0]),
            "validation": [self.held_out.content_hash, *self.held_out.names],
        }

    def phase(self, progress: float) -> int:
        """Steps of one phase do the same work."""
        if self.model.config.parameterisation == "original":
            return losses.original_third(progress)
        return losses.ect_stage(progress, self.model.config)

    def batch(self, step: int, generator: torch.Generator) -> dict[str, Any]:
        """Random pairs: "cond", "target", "weights" and the "record", "view" they came from."""
        b, (m, v) = self.batch_size, self.data.rgb.shape[:2]

        def uniform(*shape: int) -> Tensor:
            return losses.uniform(generator, self.data.rgb.device, *shape)

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
        stored = picked(self.data, record, view, source, self._renders)
        made = self.hot["batch"](self.model.config, stored, gain, flipped)
        return {**made, "record": record, "view": view}

    def loss(self, batch: dict[str, Any], *, ema: nn.Module, **options: Any) -> dict[str, Tensor]:
        """`original_loss` or `consistency_loss`, as the model's parameterisation says."""
        tensors = (batch["target"], batch["cond"], batch["weights"])
        options["network"] = self.hot["network"]
        if self.model.config.parameterisation == "original":
            return losses.original_loss(self.model, ema, *tensors, **options)
        return losses.consistency_loss(self.model, *tensors, **options, terms=self.hot["loss"])

    @torch.no_grad()
    def validation(self, model: nn.Module) -> dict[str, float]:
        """One-step generation of validation views with fixed noise.

        "loss": weighted root-mean-square error in [-1, 1]; "psnr" of the RGB over black in dB, of
        all pixels together; "coverage_ratio" and "luminance_ratio": area and light of what was
        generated over the truth.
        """
        assert isinstance(model, CVS)
        generator = torch.Generator(self.data.rgb.device).manual_seed(0)
        pairs = list(self._spread(_VALIDATED))
        out = torch.cat([sample(model, pair["cond"], generator=generator) for pair in pairs])
        target = torch.cat([pair["target"] for pair in pairs])
        depths = [pair["depth"] for pair in pairs if pair["depth"] is not None]
        weights = losses.pixel_weights(model.config, target, torch.cat(depths) if depths else None)
        error = (weights * (out - target).square()).mean(dim=(1, 2, 3)).sqrt()
        ours, truth = (((x.float().clamp(-1, 1) + 1) / 2).movedim(1, -1) for x in (out, target))
        (area, light), (true_area, true_light) = (
            (images[..., 3].sum(), luminance(images[..., :3]).sum()) for images in (ours, truth)
        )
        together = (images[None, ..., :3].flatten(1, 2) for images in (ours, truth))
        return {
            "loss": float(error.mean()),
            "psnr": float(psnr(*together)),
            "coverage_ratio": float(area / true_area.clamp_min(1e-10)),
            "luminance_ratio": float(light / true_light.clamp_min(1e-10)),
        }

    @torch.no_grad()
    def preview(self, model: nn.Module, generator: torch.Generator) -> np.ndarray:
        """One row a pair: input, target, one step, two steps; over black, uint8 (H, W, 3)."""
        assert isinstance(model, CVS)
        rows = []
        for pair in self._spread(_SHOWN):
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


def picked(
    views: ViewTensors,
    record: Tensor,
    view: Tensor,
    source: Tensor | None = None,
    renders: Tensor | None = None,
) -> dict[str, Any]:
    """What is stored of the pairs (record, view): 8-bit images and cameras, input and target.

    Args:
        source: which view is the input; -1: the record's own. None: always that.
        renders: what `cvs.prepared` made of the same views.
    """

    def images(data: Any, index: Any) -> tuple[Tensor, Tensor, Cameras]:
        return data.rgb[index], data.alpha[index], data.cameras[index]

    rgb, alpha, cameras = images(views.inputs, record)
    if source is not None:
        other = (source >= 0)[:, None, None]
        there_rgb, there_alpha, there = images(views, (record, source.clamp_min(0)))
        rgb = torch.where(other[..., None], there_rgb, rgb)
        alpha = torch.where(other, there_alpha, alpha)
        viewmats = torch.where(other, there.viewmats, cameras.viewmats)
        cameras = replace(cameras, viewmats=viewmats, Ks=torch.where(other, there.Ks, cameras.Ks))
    which = 0 if source is None else source + 1
    return {
        "input": (rgb, alpha, cameras),
        "target": images(views, (record, view)),
        "pivots": views.pivots[record],
        "render": None if renders is None else renders[record, which, view],
        "depth": None if views.depth is None else views.depth[record, view],
    }


def condition_and_target(stored: dict[str, Any]) -> dict[str, Any]:
    """ "cond" (B, C, H, W), "target" (B, 4, H, W) and "depth" of what was `picked`."""
    rgb, alpha, cameras = stored["input"]
    target_rgb, target_alpha, target_cameras = stored["target"]
    targets = target_cameras.reshape(len(rgb), 1)
    cond = condition_tensors(rgba(rgb, alpha), cameras, targets, stored["pivots"])
    if stored["render"] is not None:
        cond = torch.cat([cond, cvs.restored(stored["render"])], dim=1)
    return {"cond": cond, "target": rgba(target_rgb, target_alpha), "depth": stored["depth"]}


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
            for render in cond[:, CONDITION_CHANNELS:].split(cvs.RENDER_CHANNELS, dim=1):
                parts += [tinted(render[:, :4], gain), render[:, 4:]]
        cond, target = torch.cat(parts, dim=1), tinted(target, gain)
    weights = losses.pixel_weights(config, target, pair["depth"])
    if flipped is not None:
        mirrored = mirror(cond, target)
        cond = torch.where(flipped, mirrored[0], cond)
        target = torch.where(flipped, mirrored[1], target)
        weights = torch.where(flipped, weights.flip(-1), weights)
    if target.device.type == "cpu":
        target = target.contiguous()  # as "cond" is; a compiled loss of interleaved colours is slow
    return {"cond": cond, "target": target, "weights": weights}


def mirror(cond: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The pair as seen in a mirror at the canonical frame's x = 0 plane: left and right swap, and
    of two renders each takes the other's place, as each is made of the other's input mirrored.

    A reflection X takes a ray (d, o x d) to (X d, (X o) x (X d)) = (X d, -X (o x d)), and the
    image column u to W - 1 - u; cameras must have a centred principal point and no roll.
    """
    cond = cond.flip(-1)
    # no tensor of signs: to bring one from the host would wait for a GPU's queue
    mirrored = [cond[:, :4]]
    for rays in cond[:, 4:CONDITION_CHANNELS].split(6, dim=1):
        mirrored += [-rays[:, :1], rays[:, 1:4], -rays[:, 4:]]
    if cond.shape[1] > CONDITION_CHANNELS:
        mirrored += reversed(cond[:, CONDITION_CHANNELS:].split(cvs.RENDER_CHANNELS, dim=1))
    return torch.cat(mirrored, dim=1), target.flip(-1)


def tinted(image: Tensor, gain: Tensor) -> Tensor:
    colour = torch.minimum((image[:, :3] + 1) * gain, image[:, 3:] + 1) - 1
    return torch.cat([colour, image[:, 3:]], dim=1)
