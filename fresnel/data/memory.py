"""What tasks draw their batches from: the images of a set, in memory, and random numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from fresnel.data.records import ViewTensors


class Images:
    """The images of all records on one device. Number 0 of a record is its input, 1 + k its view k.

    Args:
        data: images square, inputs and views of one size.
        depth: whether depth is wanted, too; of an input without it all is unknown (0).
    """

    def __init__(self, data: ViewTensors, device: torch.device | str, *, depth: bool) -> None:
        inputs = data.inputs
        own, others = (torch.cat([x.rgb, x.alpha[..., None]], dim=-1) for x in (inputs, data))
        pairs = {
            "rgba": (own, others),
            "viewmats": (inputs.cameras.viewmats, data.cameras.viewmats),
            "Ks": (inputs.cameras.Ks, data.cameras.Ks),
        }
        if depth and data.depth is not None:
            none = torch.zeros_like(data.depth[:, 0])
            pairs["depth"] = (none if inputs.depth is None else inputs.depth, data.depth)
        # one tensor each: a batch is one lookup, as a step of the decoder waits for the host
        self.stored = {
            name: torch.cat([first[:, None].to(rest), rest], dim=1).to(device)
            for name, (first, rest) in pairs.items()
        }
        self.records, self.views, self.size = data.alpha.shape[:3]
        self.device = torch.device(device)

    def pick(self, records: Tensor, numbers: Tensor) -> dict[str, Tensor]:
        """Images `numbers` (B, T) of `records` (B,) as they are stored: "rgba", 8 bits and
        premultiplied (B, T, H, W, 4), "viewmats" (B, T, 4, 4), "Ks", perhaps "depth"."""
        return {name: images[records[:, None], numbers] for name, images in self.stored.items()}

    def spread(self, count: int, among: int) -> Tensor:
        """At most `count` whole numbers from 0 to `among` - 1, evenly spread."""
        return torch.linspace(0, among - 1, min(count, among)).round().long().to(self.device)


def uniform(generator: torch.Generator, device: torch.device, *shape: int) -> Tensor:
    """Uniform numbers in [0, 1) on `device`, drawn where the generator lives."""
    return torch.rand(shape, generator=generator, device=generator.device).to(device)
