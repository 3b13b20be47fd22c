"""Does a CVS look at its noisy input? The share of the noise that it leaves, against what it could.

A consistency model that ignores its input is a regression: its one step is blurred, its four steps
are noise on screen, and PSNR shows neither.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fresnel.models.cvs import CVS, randn

LEVELS = (0.05, 0.17, 0.5, 1.0, 2.5)
"""Noise levels sigma, of pictures in [-1, 1], at which is measured."""


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


def ignored(shares: Mapping[str, Sequence[float]]) -> list[str]:
    """Why a network by rows of `study.results.noise_shares` is no denoiser, [] of one and of {}: at
    0.17 and 0.5 it has to go half of the way from c_skip, which one leaves that ignores its input,
    to the best linear denoiser of such views."""
    known = [shares[name] for name in ("left", "ignoring", "linear")] if shares else [[]] * 3
    rows = zip(LEVELS if shares else (), *known, strict=True)
    return [
        f"the network ignores its input: of noise {level:g} it leaves {left:.2f}, c_skip alone "
        f"{ignoring:.2f}, the best linear denoiser {linear:.2f}"
        for level, left, ignoring, linear in rows
        if level in (0.17, 0.5) and not ignoring - left >= 0.5 * (ignoring - linear)
    ]


def table(shares: Mapping[str, Sequence[float]]) -> list[dict[str, float]]:
    """Rows of `study.results.noise_shares`, a noise level each, in per cent; [] of {}."""
    names = {"left": "left, %", "ignoring": "ignoring its input, %"}
    names["linear"] = "best linear denoiser, %"
    return [
        {"noise level": level} | {text: 100 * shares[name][i] for name, text in names.items()}
        for i, level in enumerate(LEVELS if shares else ())
    ]
