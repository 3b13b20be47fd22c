"""What a CVS learns from: pairs (record, view) of a multi-view set, as the task that `fit` runs."""

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fresnel.data.memory import Images, picked, uniform
from fresnel.data.records import ViewTensors
from fresnel.evaluation import perceptual
from fresnel.evaluation.metrics import psnr
from fresnel.models import Predictor, condition
from fresnel.models.condition import CONDITION_CHANNELS, RENDER_CHANNELS, condition_tensors
from fresnel.models.critic import Critic
from fresnel.models.cvs import CVS, CVSConfig, sample
from fresnel.models.weights import checksum
from fresnel.scene.cameras import Cameras
from fresnel.scene.colour import luminance
from fresnel.training import losses


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
        recolour: half of the pairs have their channels in another order, too: for things, which may
            have any colour.
        pairs: train on these (record, view) pairs alone, (P, 2); None: on all.
        renderer: the decoder's predictor, for models with `render_condition`.
        room: bytes of the device for images, as `fresnel.data.memory.Images` says.
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
        recolour: bool = False,
        pairs: Tensor | None = None,
        renderer: Predictor | None = None,
        room: float | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        config, held_out = model.config, validation or views
        sharp, self.critic = config.objective == "sharp", None
        by_depth, size = config.loss_weight == "depth_laplacian", (config.image_size,) * 2
        shapes = [s for v in (views, held_out) for s in (v.rgb.shape[2:4], v.inputs.rgb.shape[1:3])]
        sizes = sorted({tuple(shape) for shape in shapes})
        wrong = f"views: got images of {sizes} px, want the model's image_size {size[0]}; "
        for fits, message in (
            (sizes == [size], f"{wrong}use dataset.tensors(size={size[0]})"),
            (not by_depth or views.depth is not None, "views: have no depth to weight errors by"),
            (batch_size >= 1, f"batch_size: got {batch_size}, want at least 1"),
            (renderer or not config.render_condition, "renderer: got None, but the model needs it"),
            (not sharp or batch_size > 1, "batch_size: got 1, want 2: half of it is denoised"),
        ):
            if not fits:
                raise ValueError(message)
        # channels last: 1.4 times the samples a second on two CPU cores
        self.model = model.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.data, self.batch_size = views, batch_size
        self.any_input, self.mirror = any_input, mirror
        self.colour_jitter, self.recolour = colour_jitter, recolour
        self._pairs = None if pairs is None else pairs.to(device)
        # images, pivots and renders that are trained on, and those of the validation
        self._sets = []
        for data, every in ((views, any_input), (held_out, False)):
            images, renders = Images(data, device, depth=by_depth, room=room), None
            if config.render_condition and renderer is not None:
                model.decoder = getattr(renderer, "decoder", "")
                model.gate_overridden |= getattr(renderer, "gate_overridden", False)
                made = condition.prepared(
                    renderer, data, any_input=every, device=device, **config.sees
                )
                renders = images.held(made)
            self._sets.append((images, data.pivots.to(device), renders))
        renders = self._sets[0][2]
        self.hot: dict[str, Callable[..., Any]] = {
            "network": losses.denoised,
            "loss": losses.consistency_terms,
            "batch": assemble,
        }
        if sharp:
            judge = partial(losses.one_step_terms, perceptual.distance(device=str(device)))
            self.hot["one_step"] = judge
        if sharp and config.adversarial_weight:
            critic = Critic(config.condition_channels - losses.RAYS).to(device)
            self.critic = critic.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.config: dict[str, Any] = {
            "model": asdict(config),
            "initial_weights": model.origin,
            "any_input": any_input,
            "mirror": mirror,
            "colour_jitter": colour_jitter,
            "recolour": recolour,
            "pairs": None if pairs is None else f"{len(pairs)}, {checksum({'pairs': pairs})}",
            # of the first record: another renderer draws it otherwise
            "renders": None if renders is None else checksum({"first": renders[0]}),
            "validation": [held_out.content_hash, *held_out.names],
        }

    def phase(self, progress: float) -> int:
        """Steps of one phase do the same work."""
        if self.model.config.parameterisation == "original":
            return losses.original_third(progress)
        if self.model.config.objective == "sharp":
            config = self.model.config
            judged = self.critic is not None and progress >= config.adversarial_from
            return (progress >= config.perceptual_from) + judged
        return losses.ect_stage(progress, self.model.config)

    def batch(self, step: int, generator: torch.Generator) -> dict[str, Any]:
        """Random pairs: "cond", "target", "weights" and the "record", "view" they came from."""
        b, (images, _, _) = self.batch_size, self._sets[0]

        def draw(*shape: int, high: int = 0) -> Tensor:
            drawn = uniform(generator, images.device, b, *shape)
            return (drawn * high).long().clamp_max(high - 1) if high else drawn

        if self._pairs is None:
            record, view = draw(high=images.records), draw(high=images.views)
        else:
            record, view = self._pairs[draw(high=len(self._pairs))].unbind(1)
        source = torch.zeros_like(view)
        if self.any_input:
            source = torch.where(draw() < 0.5, 1 + draw(high=images.views), source)
        gain = order = flipped = None
        if self.colour_jitter:
            gain = torch.exp((2 * draw(3, 1, 1) - 1) * self.colour_jitter)
        if self.recolour:
            own = torch.arange(3, device=images.device)
            order = torch.where(draw(1) < 0.5, draw(3).argsort(dim=1), own)
        if self.mirror:
            flipped = (draw() < 0.5)[:, None, None, None]
        stored = self._stored(0, record, source, view)
        made = self.hot["batch"](self.model.config, stored, gain, order, flipped)
        return {**made, "record": record, "view": view}

    def loss(self, batch: dict[str, Any], *, ema: nn.Module, **options: Any) -> dict[str, Tensor]:
        """`original_loss`, `sharp_loss` or `consistency_loss`, as the model's config says."""
        tensors = (batch["target"], batch["cond"], batch["weights"])
        options["network"] = self.hot["network"]
        if self.model.config.parameterisation == "original":
            return losses.original_loss(self.model, ema, *tensors, **options)
        options["terms"] = self.hot["loss"]
        if self.model.config.objective == "sharp":
            options |= {"one_step": self.hot["one_step"], "critic": self.critic}
            return losses.sharp_loss(self.model, *tensors, **options)
        return losses.consistency_loss(self.model, *tensors, **options)

    @torch.no_grad()
    def validation(self, model: CVS) -> dict[str, float]:
        """One-step generation of 32 validation views with fixed noise.

        "loss": weighted root-mean-square error in [-1, 1]; "psnr" of the RGB over black in dB, of
        all pixels together; "coverage_ratio" and "luminance_ratio": area and light of what was
        generated over the truth.
        """
        generator = torch.Generator(self._sets[1][0].device).manual_seed(0)
        pairs = list(self._spread(32))
        out = torch.cat([sample(model, pair["cond"], generator=generator) for pair in pairs])
        target, weights = (torch.cat([pair[n] for pair in pairs]) for n in ("target", "weights"))
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
    def preview(self, model: CVS, generator: torch.Generator) -> np.ndarray:
        """Four rows, one a pair: input, target, one step, two steps; black, uint8 (H, W, 3)."""
        rows = []
        for pair in self._spread(4):
            made = [sample(model, pair["cond"], steps=n, generator=generator) for n in (1, 2)]
            images = torch.cat([pair["cond"][:, :4], pair["target"], *made], dim=-1)[:, :3]
            rows.append(images.permute(0, 2, 3, 1).flatten(0, 1))
        grid = (torch.cat(rows).float() + 1) * 127.5
        return grid.round().clamp(0, 255).byte().cpu().numpy()

    def _spread(self, pairs: int) -> Iterator[dict[str, Any]]:
        """Chunks of pairs, evenly spread over the held-out records and views."""
        images = self._sets[1][0]
        flat = images.spread(pairs, images.records * images.views)
        for chunk in flat.split(max(self.batch_size, 8)):
            record, view = chunk // images.views, chunk % images.views
            stored = self._stored(1, record, torch.zeros_like(view), view)
            yield assemble(self.model.config, stored)

    def _stored(self, which: int, record: Tensor, source: Tensor, view: Tensor) -> dict[str, Any]:
        """What is stored of pairs (record, view) of a set, with image number `source` as the input:
        images as `Images.pick` gives them, input and target; "pivots", perhaps "render"."""
        images, pivots, renders = self._sets[which]
        stored = images.pick(record, torch.stack([source, 1 + view], dim=1))
        render = None if renders is None else picked(renders, record, source, view)
        return {**stored, "pivots": pivots[record], "render": render}


def assemble(
    config: CVSConfig,
    stored: dict[str, Any],
    gain: Tensor | None = None,
    order: Tensor | None = None,
    flipped: Tensor | None = None,
) -> dict[str, Tensor]:
    """ "cond" (B, C, H, W), "target" (B, 4, H, W) and "weights" of stored pairs: colours taken in
    `order` (B, 3) and scaled by `gain` (B, 3, 1, 1), mirrored where `flipped`, bool (B, 1, 1, 1).
    """
    size = stored["rgba"].shape[2]
    given, target = (stored["rgba"].movedim(-1, -3).float() / 127.5 - 1.0).unbind(1)
    cameras = Cameras(stored["viewmats"], stored["Ks"], size, size)
    cond = condition_tensors(given, cameras[:, 0], cameras[:, 1:], stored["pivots"])
    if stored["render"] is not None:
        cond = torch.cat([cond, condition.restored(stored["render"])], dim=1)
    if gain is not None or order is not None:
        parts = [tinted(cond[:, :4], gain, order), cond[:, 4:CONDITION_CHANNELS]]
        if stored["render"] is not None:
            for render in cond[:, CONDITION_CHANNELS:].split(RENDER_CHANNELS, dim=1):
                parts += [tinted(render[:, :4], gain, order), render[:, 4:]]
        cond, target = torch.cat(parts, dim=1), tinted(target, gain, order)
    depth = stored["depth"][:, 1] if "depth" in stored else None
    weights = losses.pixel_weights(config, target, depth)
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
    of two renders (and warps) each takes the other's place, made of the other's input mirrored.

    A reflection X takes a ray (d, o x d) to (X d, (X o) x (X d)) = (X d, -X (o x d)), and the
    image column u to W - 1 - u; cameras must have a centred principal point and no roll.
    """
    cond = cond.flip(-1)
    # no tensor of signs: to bring one from the host would wait for a GPU's queue
    mirrored = [cond[:, :4]]
    for rays in cond[:, 4:CONDITION_CHANNELS].split(6, dim=1):
        mirrored += [-rays[:, :1], rays[:, 1:4], -rays[:, 4:]]
    if cond.shape[1] > CONDITION_CHANNELS:
        mirrored += reversed(cond[:, CONDITION_CHANNELS:].split(RENDER_CHANNELS, dim=1))
    return torch.cat(mirrored, dim=1), target.flip(-1)


def tinted(image: Tensor, gain: Tensor | None, order: Tensor | None) -> Tensor:
    colour, alpha = image[:, :3], image[:, 3:]
    if order is not None:
        colour = colour.gather(1, order[:, :, None, None].expand_as(colour))
    if gain is not None:
        colour = torch.minimum((colour + 1) * gain, alpha + 1) - 1
    return torch.cat([colour, alpha], dim=1)


def pairs_of(data: Any, drop: float) -> Tensor | None:
    """The (record, view) pairs of a `MultiViewDataset` to train on, (P, 2), without the share
    `drop` in [0, 1) of the worst views, for which the gate looks at it once more; None: all.

    A view is the worse the further the area that it covers, the light of that and its detail are
    from its input's: sum of |ln ratio|, each at most 3.  Views that the gate did not look at stay.
    """
    if not 0 <= drop < 1:
        raise ValueError(f"drop: got {drop}, want a share in [0, 1)")
    if drop == 0:
        return None
    from fresnel.gate.verdict import validate  # and with it all that reads data

    row = {name: i for i, name in enumerate(data.names)}
    faults = torch.zeros(len(row), data.views_per_object, dtype=torch.float64)
    for seen in validate(data).measurements:
        ratios = (seen[f"{what}_ratio"] for what in ("coverage", "luminance", "detail"))
        logs = (min(abs(math.log(r)), 3.0) if 0 < r < math.inf else 3.0 for r in ratios)
        faults[row[seen["object"]], seen["view"]] = sum(logs)
    order = faults.flatten().argsort(stable=True)
    kept = order[: order.numel() - math.floor(drop * order.numel())].sort().values
    return torch.stack([kept // faults.shape[1], kept % faults.shape[1]], dim=1)
