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
        inputs, cameras = data.inputs, data.cameras
        stored = {
            "rgb": (inputs.rgb, data.rgb),
            "alpha": (inputs.alpha[..., None], data.alpha[..., None]),
            "viewmats": (inputs.cameras.viewmats, cameras.viewmats),
            "Ks": (inputs.cameras.Ks, cameras.Ks),
        }
        if depth and data.depth is not None:
            own = torch.zeros_like(data.depth[:, 0]) if inputs.depth is None else inputs.depth
            stored["depth"] = (own, data.depth)
        self.stored = {name: (a.to(device), b.to(device)) for name, (a, b) in stored.items()}
        self.records, self.views, self.size = data.alpha.shape[:3]
        self.device = torch.device(device)

    def pick(self, records: Tensor, numbers: Tensor) -> dict[str, Tensor]:
        """Images `numbers` (B, T) of `records` (B,) as they are stored: "rgba", 8 bits and
        premultiplied (B, T, H, W, 4), "viewmats" (B, T, 4, 4), "Ks", perhaps "depth"."""
        found, views = dict[str, Tensor](), (numbers - 1).clamp_min(0)
        for name, (inputs, others) in self.stored.items():
            there, own = others[records[:, None], views], inputs[records][:, None]
            is_input = (numbers == 0).reshape(*numbers.shape, *(1,) * (there.ndim - 2))
            found[name] = torch.where(is_input, own, there)
        found["rgba"] = torch.cat([found.pop("rgb"), found.pop("alpha")], dim=-1)
        return found

    def spread(self, count: int, among: int) -> Tensor:
        """At most `count` whole numbers from 0 to `among` - 1, evenly spread."""
        return torch.linspace(0, among - 1, min(count, among)).round().long().to(self.device)


def uniform(generator: torch.Generator, device: torch.device, *shape: int) -> Tensor:
    """Uniform numbers in [0, 1) on `device`, drawn where the generator lives."""
    return torch.rand(shape, generator=generator, device=generator.device).to(device)
