"""Whether a picture is like those that a network was trained on.

A picture, over white and smoothed by a pixel (renders of few rays have rough edges, pictures that
were scaled have not), is the means over its places of the two deepest stages' ImageNet features
(`perceptual.efficientnet`), each feature's spread over the training pictures being one, each stage
counting as much.  Its distance to these has two parts at a right angle: within the directions in
which they vary most, the mean of those to its three nearest; and how far it lies off those
directions.
"""

import math
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Self

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import conv2d, pad

from fresnel.data.images import InputImages
from fresnel.evaluation import perceptual
from fresnel.models import weights

_NEAREST, _DIRECTIONS, _MOST, _FOLDS, _WIDTHS = 3, 64, 500, 5, (112, 320)
FAR = 99.0
"""A picture farther than so many per cent of the training pictures from one another is of something
that the network has never seen."""


@dataclass(frozen=True)
class Nearness:
    """How far a picture lies from the training pictures.

    Args:
        value: 1 is what they are from one another, in the median; NaN where it can't be measured.
        percentile: how many of them, in per cent, lie nearer to the others.
        sentence: both, for a reader.
    """

    value: float
    percentile: float
    sentence: str

    @property
    def far(self) -> bool:
        return self.percentile > FAR


@dataclass(frozen=True)
class Reference:
    """A set of training pictures, as much of it as distances need: about 120 kB.

    Args:
        mean, scale: (F,) of the features; basis: (F, K) directions; points: (N, K) the pictures;
            own: (N,) each one's distance to the others.
    """

    mean: Tensor
    scale: Tensor
    basis: Tensor
    points: Tensor
    own: Tensor

    @classmethod
    def of(cls, inputs: InputImages) -> Self:
        """At most 500 of the pictures, evenly chosen, stand for all of them.

        Raises:
            ValueError: for fewer than 20.
            ModuleNotFoundError: without the extra `perceptual`.
        """
        if len(inputs) < 20:
            raise ValueError(f"inputs: got {len(inputs)} pictures, want at least 20")
        chosen = torch.linspace(0, len(inputs) - 1, min(len(inputs), _MOST)).round().long()
        found = _features(inputs[chosen.tolist()])
        own, fold = found.new_zeros(len(found)), torch.arange(len(found)) % _FOLDS
        for k in range(_FOLDS):  # each fifth as seen by the others
            own[fold == k] = cls._fitted(found[fold != k])._far(found[fold == k])
        return replace(cls._fitted(found), own=own)

    @classmethod
    def _fitted(cls, found: Tensor) -> Self:
        counts = torch.tensor([width**0.5 for width in _WIDTHS for _ in range(width)])
        mean, scale = found.mean(0), (found.std(0) + 1e-6) * counts
        _, _, directions = torch.linalg.svd((found - mean) / scale, full_matrices=False)
        basis = directions[:_DIRECTIONS].T.half().float()
        points = ((found - mean) / scale @ basis).half().float()
        return cls(mean, scale, basis, points, found.new_zeros(0))

    def distances(self, inputs: InputImages) -> Tensor:
        """(N,), as `own`."""
        return self._far(_features(inputs))

    def _far(self, found: Tensor) -> Tensor:
        found = (found - self.mean) / self.scale
        within = found @ self.basis
        near = torch.cdist(within, self.points).topk(_NEAREST, dim=1, largest=False).values
        return torch.hypot(near.mean(dim=1), (found - within @ self.basis.T).norm(dim=1))

    def save(self, path: str | Path) -> None:
        """Write it, in half precision where that is enough."""
        small = {"basis", "points"}
        tensors = {f.name: getattr(self, f.name).contiguous() for f in fields(self)}
        save_file({k: v.half() if k in small else v for k, v in tensors.items()}, path)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        return cls(**{name: tensor.float() for name, tensor in load_file(path).items()})


def distance(inputs: InputImages, name: str = "objects") -> list[Nearness]:
    """How far each picture lies from what the shipped decoder of that domain was trained on.

    Where it can't be measured, because an extra or the reference is missing, value and percentile
    are NaN and the sentence says what to do.
    """
    try:
        reference = shipped(name)
        values = (reference.distances(inputs) / reference.own.median()).tolist()
    except (ModuleNotFoundError, FileNotFoundError) as error:
        words = f"How far this is from the training pictures was not measured: {error}"
        return [Nearness(math.nan, math.nan, words)] * len(inputs)
    return [_said(reference, value) for value in values]


def _said(reference: Reference, value: float) -> Nearness:
    own = reference.own / reference.own.median()
    percentile = 100 * float((own < value).float().mean())
    usual = float(own.quantile(0.95))
    never, like = "the decoder has never seen such a thing", "like what the decoder was trained on"
    says = (
        f"It lies {value:.1f} from the training pictures, which lie 1.0 from one another (95 % of "
        f"them below {usual:.1f}): {never if percentile > FAR else like}."
    )
    return Nearness(value, percentile, says)


@cache
def shipped(name: str) -> Reference:
    """The reference in fresnel/assets of that domain.

    Raises:
        FileNotFoundError: if none ships.
    """
    return Reference.load(weights.shipped(f"domain_{name}.safetensors"))


@torch.no_grad()
def _features(inputs: InputImages) -> Tensor:
    """(N, 432) on the CPU."""
    network = perceptual.distance("perceptual").features
    rgb, alpha = inputs.rgb.cpu().float() / 255, inputs.alpha.cpu().float()[..., None] / 255
    pooled = [
        torch.cat([stage.mean(dim=(2, 3)) for stage in network(part)[-2:]], dim=1)
        for part in smoothed(rgb + 1 - alpha).split(16)
    ]
    return torch.cat(pooled)


def smoothed(images: Tensor) -> Tensor:
    """Pictures (N, H, W, 3), each pixel the mean of its neighbours by 1, 2, 1 either way."""
    line = images.new_tensor([0.25, 0.5, 0.25])
    kernel = (line[:, None] * line).expand(3, 1, 3, 3)
    around = pad(images.permute(0, 3, 1, 2), (1, 1, 1, 1), mode="replicate")
    return conv2d(around, kernel, groups=3).permute(0, 2, 3, 1)
