"""What tasks draw their batches from: the images of a set, in memory, and random numbers."""

import math
import mmap
import weakref
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from fresnel.data.records import ViewTensors


class Images:
    """The images of all records, for one device. Number 0 of a record is its input, 1 + k its
    view k.

    They lie on the device while there is room, and beyond in the host's memory, page-locked, out
    of which a GPU itself reads what a batch takes: nothing waits, and the batches are the same.

    Args:
        data: images square, inputs and views of one size; on the host, if they are not to pass
            through the device.
        depth: whether depth is wanted, too; of an input without it all is unknown (0).
        room: bytes of the device for images; None: half of what is free on a GPU.
    """

    def __init__(
        self,
        data: ViewTensors,
        device: torch.device | str,
        *,
        depth: bool,
        room: float | None = None,
    ) -> None:
        inputs, self.device = data.inputs, torch.device(device)
        own, others = (torch.cat([x.rgb, x.alpha[..., None]], dim=-1) for x in (inputs, data))
        pairs = {
            "rgba": (own, others),
            "viewmats": (inputs.cameras.viewmats, data.cameras.viewmats),
            "Ks": (inputs.cameras.Ks, data.cameras.Ks),
        }
        if depth and data.depth is not None:
            none = torch.zeros_like(data.depth[:, 0])
            pairs["depth"] = (none if inputs.depth is None else inputs.depth, data.depth)
        free = self.device.type == "cuda" and torch.cuda.mem_get_info(self.device)[0]
        self.room = room if room is not None else free / 2 if free else math.inf
        self.on_host = 0  # bytes
        # one tensor each: a batch is one lookup, as a step of the decoder waits for the host
        self.stored = {
            name: self.held(torch.cat([first[:, None].to(rest), rest], dim=1))
            for name, (first, rest) in pairs.items()
        }
        self.records, self.views, self.size = data.alpha.shape[:3]

    def held(self, tensor: Tensor) -> Tensor:
        """A tensor where there is room for it, to be looked up by indices on the device."""
        fits = tensor.nbytes <= self.room
        self.room -= tensor.nbytes * fits
        self.on_host += tensor.nbytes * (not fits)
        if fits or self.device.type != "cuda":
            return tensor.to(self.device)
        return _on_host(tensor, self.device)

    def pick(self, records: Tensor, numbers: Tensor) -> dict[str, Tensor]:
        """Images `numbers` (B, T) of `records` (B,) as they are stored: "rgba", 8 bits and
        premultiplied (B, T, H, W, 4), "viewmats" (B, T, 4, 4), "Ks", perhaps "depth"."""
        index = (records[:, None], numbers)
        return {name: picked(images, *index) for name, images in self.stored.items()}

    def spread(self, count: int, among: int) -> Tensor:
        """At most `count` whole numbers from 0 to `among` - 1, evenly spread."""
        return torch.linspace(0, among - 1, min(count, among)).round().long().to(self.device)


def picked(stored: Tensor, *index: Tensor) -> Tensor:
    """`stored[index]`; bytes four at a time, as a GPU reads host memory well only in long runs."""
    wide = stored.dtype == torch.uint8 and stored.shape[-1] % 4 == 0
    return (stored.view(torch.int32) if wide else stored)[index].view(stored.dtype)


def _on_host(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy in the host's memory, as a tensor of the GPU, which reads it over the bus."""
    pages = mmap.mmap(-1, tensor.nbytes)  # whole ones, which can be locked by themselves
    kept = torch.frombuffer(pages, dtype=tensor.dtype).view(tensor.shape).copy_(tensor)
    runtime: Any = torch.cuda.cudart()
    at, portable_and_mapped = kept.data_ptr(), 3
    with torch.cuda.device(device):
        error = int(runtime.cudaHostRegister(at, kept.nbytes, portable_and_mapped))
    if error:
        raise RuntimeError(
            f"{tensor.nbytes / 1e9:.1f} GB of images are too many for the GPU, and can't be locked "
            f"in host memory either (CUDA error {error}): raise the limit (ulimit -l unlimited), "
            "or train on fewer or smaller images"
        )
    weakref.finalize(kept, runtime.cudaHostUnregister, at).atexit = False
    kind = {torch.uint8: "|u1", torch.float32: "<f4"}[kept.dtype]
    place = {"shape": tuple(kept.shape), "typestr": kind, "data": (at, False), "version": 3}
    # what says to torch where the tensor lies, and keeps it there (CUDA array interface)
    seen = SimpleNamespace(kept=kept, __cuda_array_interface__=place)
    return torch.as_tensor(seen, device=device)


def uniform(generator: torch.Generator, device: torch.device, *shape: int) -> Tensor:
    """Uniform numbers in [0, 1) on `device`, drawn where the generator lives."""
    return torch.rand(shape, generator=generator, device=generator.device).to(device)
