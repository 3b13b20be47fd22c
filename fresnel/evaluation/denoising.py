"""Does a CVS look at its noisy input? The share of the noise that it leaves, against what it could.

A consistency model that ignores its input is a regression: its one step is blurred, its four steps
are noise on screen, and PSNR shows neither.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fresnel.evaluation.noise import LEVELS
from fresnel.models.cvs import CVS, randn


@torch.no_grad()
def noise_left(
    model: CVS,
    cond: Tensor,
    target: Tensor,
    *,
    generator: torch.Generator,
    levels: Sequence[float] = LEVELS,
) -> list[float]:
    """Share of the noise n that is left at each level: D's slope along it,
    <D(y + s n) - D(y - s n), n> / (2 s <n, n>), of true views y (B, 4, H, W) in [-1, 1]."""
    noise, found = randn(target, generator), list[float]()
    for level in levels:
        at = target.new_full((len(target),), level)
        apart = model(target + level * noise, at, cond) - model(target - level * noise, at, cond)
        share = (apart * noise).sum() / (2 * level * noise.square().sum())
        found.append(float(share))
    return found


def ignoring(model: CVS, levels: Sequence[float] = LEVELS) -> list[float]:
    """What a network leaves that does not look at its noisy input: c_skip."""
    return model.scalings(torch.tensor(levels))[0].tolist()


def linear(target: Tensor, levels: Sequence[float] = LEVELS) -> list[float]:
    """What the best linear denoiser of such views (B, 4, H, W) leaves: Wiener's filter by their
    mean spectrum P, the mean over frequencies of P / (P + sigma^2)."""
    centred = target - target.mean(dim=0, keepdim=True)
    power = torch.fft.fft2(centred, norm="ortho").abs().square().mean(dim=0)
    return [float((power / (power + level**2)).mean()) for level in levels]
