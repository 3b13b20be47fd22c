"""A critic that tells true views from made ones, patch by patch (PatchGAN, arXiv 1611.07004)."""

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fresnel.models.unet import group_norm


class Critic(nn.Module):
    """Pictures (B, 4, H, W) in [-1, 1], and what is known of each view (B, C, H, W), to one figure
    for every patch of 46 px: above 0 is "true".

    Args:
        seen: C, channels of what is known.
    """

    def __init__(self, seen: int, width: int = 64) -> None:
        super().__init__()
        sizes = [4 + seen, width, 2 * width, 4 * width, 4 * width]
        pairs = pairwise(sizes)
        kernels = (4, 4, 4, 3)  # the first three halve the picture
        self.layers = nn.ModuleList(
            nn.Conv2d(a, b, kernel, padding=1)
            for (a, b), kernel in zip(pairs, kernels, strict=True)
        )
        self.norms = nn.ModuleList(group_norm(size) for size in sizes[2:])
        self.head = nn.Conv2d(sizes[-1], 1, 3, padding=1)

    def forward(self, pictures: Tensor, seen: Tensor, *, frozen: bool = False) -> list[Tensor]:
        """Its figures (B, 1, h, w), after the features of every layer.

        Args:
            frozen: gradients reach the pictures and not the critic.
        """

        def of(module: Any) -> list[Any]:
            return [p.detach() if frozen else p for p in (module.weight, module.bias)]

        x, found = torch.cat([pictures, seen], dim=1), list[Tensor]()
        for i, layer in enumerate(self.layers):
            weight, bias = of(layer)
            x = F.conv2d(x, weight, bias, stride=2 if i < 3 else 1, padding=1)
            if i:
                norm: Any = self.norms[i - 1]
                gain, shift = of(norm)
                x = F.group_norm(x, norm.num_groups, gain, shift, norm.eps)
            found.append(x := F.leaky_relu(x, 0.2))
        weight, bias = of(self.head)
        return [*found, F.conv2d(x, weight, bias, padding=1)]
