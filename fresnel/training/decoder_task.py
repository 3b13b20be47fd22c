"""What a decoder learns from, through the renderer, as the task that `fit` runs."""

from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fresnel.data.memory import Images, uniform
from fresnel.data.records import ViewTensors
from fresnel.evaluation.metrics import psnr
from fresnel.models.decoder import Decoder, DecoderConfig, normalised_depth, resize
from fresnel.models.weights import checksum
from fresnel.render import Views, render
from fresnel.scene.cameras import Cameras, mirror_signs, rigid_inverse
from fresnel.scene.colour import luminance
from fresnel.scene.gaussians import Gaussians
from fresnel.training.losses import WEIGHTS, multiview_loss

Batch = dict[str, Tensor]


class DecoderTask:
    """What `fit` needs to train a decoder on multi-view data.

    A step takes `batch_size` objects, one image of each as the input, and supervises that view
    and `target_views` others; the patch kind, whose camera geometry is fixed, its input alone.

    Args:
        views: training objects; images square and of one size, which is also the size rendered.
        config: of a fresh decoder.
        model: continue this decoder instead.
        validation: objects for the validation loss and pictures; None: the training objects.
        any_input: let every view act as the input, as it may where the data are ground truth; else
            the record's input image alone.
        augment: mirror, and mix the colours of, half of the objects.
        room: bytes of the device for images, as `fresnel.data.memory.Images` says.
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
        augment: bool = True,
        room: float | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        if min(len(views), batch_size, target_views) < 1:
            got = f"{len(views)} objects, batch_size {batch_size}, target_views {target_views}"
            raise ValueError(f"views: got {got}; want at least 1 of each")
        origin = checksum(model.state_dict()) if model else "random"
        self.device = torch.device(device)
        self.model = (model or Decoder(config)).to(self.device)
        self.data, held_out = views, validation or views
        self.batch_size, self.any_input, self.augment = batch_size, any_input, augment
        self.frontal_only = self.model.config.kind == "patch"
        self._train = centred(views, self.device, room)
        self._held_out = centred(validation, self.device, room) if validation else self._train
        self.model.render_size = self._train.size
        self.target_views = min(target_views, self._train.views)
        self._mirroring = mirror_signs(self.device)
        self.hot: dict[str, Callable[..., Any]] = {
            "network": decoded,
            "loss": multiview_loss,
            "batch": augmented,
        }
        self.config: dict[str, Any] = {
            "model": asdict(self.model.config),
            "initial_weights": origin,
            "target_views": self.target_views,
            "any_input": any_input,
            "augment": augment,
            "weights": WEIGHTS,
            "validation": [held_out.content_hash, *held_out.names],
        }

    def phase(self, progress: float) -> None:
        """The rasteriser asks a GPU how much there is to do: no step is recorded whole."""

    def batch(self, step: int, generator: torch.Generator) -> Batch:
        """Random objects, input views and target views; the same for the same generator state."""

        def draw(*shape: int) -> Tensor:
            return uniform(generator, self.device, self.batch_size, *shape)

        objects = (draw() * self._train.records).long()
        order = draw(1 + self._train.views)
        if not self.any_input:
            order[:, 0] = -1.0  # the record's own input comes first
        picks = order.argsort(dim=1)[:, : 1 + (0 if self.frontal_only else self.target_views)]
        stored = self._train.pick(objects, picks)
        if not self.augment:
            return floats(stored)
        draws = draw(8)
        return self.hot["batch"](stored, draws, draws[:, 2:5].argsort(dim=1), self._mirroring)

    def loss(self, batch: Batch, *, generator: torch.Generator, **_: Any) -> dict[str, Tensor]:
        """`multiview_loss` of the decoded inputs on all views of the batch, random backgrounds."""
        background = uniform(generator, self.device, *batch["rgba"].shape[:2], 1, 1, 3)
        return self._loss(self.model, batch, background)[0]

    def _loss(
        self, model: Decoder, batch: Batch, background: Tensor
    ) -> tuple[dict[str, Tensor], Views]:
        network, loss = decoded, multiview_loss
        if model is self.model:
            network, loss = self.hot["network"], self.hot["loss"]
        gaussians, aux, cameras = network(model, batch)
        with torch.autocast(self.device.type, enabled=False):
            views = render(gaussians, cameras)
            # The patch kind lives in its own units: its depths are not the record's.
            depth = None if self.frontal_only else batch.get("depth")
            terms = loss(views, batch["rgba"], background, target_depth=depth, gaussians=gaussians)
            if "depth_known" in aux:
                error = F.l1_loss(aux["depth_predicted"], aux["depth_known"])
                terms["predicted_depth"] = error
                terms["loss"] = terms["loss"] + WEIGHTS["predicted_depth"] * error
        return terms, views

    def _fixed(self, objects: int, views: int) -> Batch:
        """The record's input and its first views of evenly spread validation objects."""
        numbers = torch.arange(1 if self.frontal_only else 1 + min(views, self._held_out.views))
        records = self._held_out.spread(objects, self._held_out.records)
        numbers = numbers.to(self.device).expand(len(records), -1)
        return floats(self._held_out.pick(records, numbers))

    @torch.no_grad()
    def preview(self, model: Decoder, generator: torch.Generator | None = None) -> np.ndarray:
        """A picture (H, W, 3) uint8: per validation object its true views above the rendered."""
        batch = self._fixed(objects=4, views=5)
        _, views = self._loss(model, batch, torch.ones(3, device=self.device))
        pair = (over_white(batch["rgba"]), views.rgb + 1 - views.alpha)
        rows = torch.stack(pair, dim=1)  # (B, 2, V, H, W, 3)
        sheet = rows.permute(0, 1, 3, 2, 4, 5).flatten(0, 2).flatten(1, 2)
        return (sheet.clamp(0, 1) * 255).round().byte().cpu().numpy()

    @torch.no_grad()
    def validation(self, model: Decoder) -> dict[str, float]:
        """On fixed views of at most 32 validation objects, over white: "loss", "psnr_input", and,
        unless frontal, "psnr_novel" beside "psnr_copy", what copying the input image would score;
        "luminance_ratio": light of all of them over the true one."""
        batch = self._fixed(objects=32, views=self._held_out.views)
        white = torch.ones(3, device=self.device)
        losses, pictures, light = [], [], torch.zeros((), device=self.device)
        for start in range(0, len(batch["rgba"]), self.batch_size):  # bounded memory
            part = {key: value[start : start + self.batch_size] for key, value in batch.items()}
            terms, views = self._loss(model, part, white)
            losses.append(terms["loss"].expand(len(part["rgba"])))
            pictures.append((views.rgb + 1 - views.alpha).clamp(0, 1))
            light += luminance(views.rgb.clamp(0, 1)).sum()
        ours, truth = torch.cat(pictures), over_white(batch["rgba"])
        true_light = luminance(batch["rgba"][..., :3]).sum()
        compared = {"psnr_input": (ours[:, :1], truth[:, :1])}
        if not self.frontal_only:
            compared["psnr_novel"] = (ours[:, 1:], truth[:, 1:])
            compared["psnr_copy"] = (truth[:, :1].expand_as(truth[:, 1:]), truth[:, 1:])
        return {
            "loss": float(torch.cat(losses).mean()),
            "luminance_ratio": float(light / true_light.clamp_min(1e-10)),
            **{k: float(psnr(*(x.flatten(0, 1) for x in v)).mean()) for k, v in compared.items()},
        }


def centred(data: ViewTensors, device: torch.device, room: float | None = None) -> Images:
    """The set's images with pivots moved to the origin, inputs as large as the views."""
    height, width = data.rgb.shape[2:4]
    if height != width:
        raise ValueError(f"views: got {width} x {height} pixels, want square images")
    inputs = data.inputs if data.inputs.rgb.shape[1] == width else data.inputs.resized(width)
    shift = torch.eye(4).repeat(len(data.pivots), 1, 1)
    shift[:, :3, 3] = data.pivots.cpu()
    own, others = (x.viewmats.cpu() for x in (inputs.cameras, data.cameras))
    inputs = replace(inputs, cameras=replace(inputs.cameras, viewmats=own @ shift))
    cameras = replace(data.cameras, viewmats=others @ shift[:, None])
    images = replace(data, inputs=inputs, cameras=cameras)
    return Images(images, device, depth=inputs.depth is not None, room=room)


def decoded(model: Decoder, batch: Batch) -> tuple[Gaussians, Batch, Cameras]:
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


def floats(stored: Batch) -> Batch:
    """What is stored in 8 and 16 bits, as the numbers that the loss takes."""
    batch = {**stored, "rgba": stored["rgba"].float() / 255}
    if "depth" in batch:
        batch["depth"] = batch["depth"].float()
    return batch


def augmented(
    stored: Batch, draws: Tensor, order: Tensor, mirroring: tuple[Tensor, Tensor, Tensor]
) -> Batch:
    """`floats`; half of the objects mirrored left-right, the colours of half permuted and scaled by
    `draws` (B, 8) in [0, 1) and `order` (B, 3) of channels. `mirroring`: `mirror_signs`."""
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


def over_white(rgba: Tensor) -> Tensor:
    return rgba[..., :3] + 1 - rgba[..., 3:]
