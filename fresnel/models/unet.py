"""The U-Net that the decoder and the view synthesiser share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

_RESIDUAL_SCALE = 0.5**0.5  # keeps a sum of two unit-variance branches at unit variance


class GroupNorm(nn.GroupNorm):
    """Group norm; in float32 on a CPU, whose kernel for bfloat16 takes three times as long.

    Compiled for a CPU, means over pixels come first, then those over a group's channels: channels
    lie next to each other, and a compiler makes vector code of a loop over all of them, but not of
    one over a group's four.
    """

    def forward(self, input: Tensor) -> Tensor:
        if input.device.type != "cpu":
            return super().forward(input)
        x = input.float() if input.dtype == torch.bfloat16 else input
        if not torch.compiler.is_compiling():
            return super().forward(x)
        mean = self._over_groups(x.mean(dim=(2, 3)))
        x = x - mean
        variance = self._over_groups(x.square().mean(dim=(2, 3)))
        scale = (variance + self.eps).rsqrt() * self.weight[:, None, None]
        return torch.addcmul(self.bias[:, None, None], x, scale)

    def _over_groups(self, means: Tensor) -> Tensor:
        """Means over pixels (B, C) -> each channel's group's (B, C, 1, 1).

        By a product of matrices, so that what follows finds a value a channel and need not look up
        its group for every pixel.
        """
        size = self.num_channels // self.num_groups
        group = torch.arange(self.num_channels, device=means.device) // size
        same = (group[:, None] == group).to(means.dtype) / size
        with torch.autocast(means.device.type, enabled=False):
            return (means @ same)[..., None, None]


def group_norm(channels: int) -> GroupNorm:
    """Group norm with at most 32 groups of at least four channels each (one group if none fits)."""
    groups = next((g for g in range(min(32, channels // 4), 1, -1) if channels % g == 0), 1)
    return GroupNorm(groups, channels, eps=1e-5)


def _zero(module: nn.Conv2d) -> nn.Conv2d:
    nn.init.zeros_(module.weight)
    if module.bias is not None:
        nn.init.zeros_(module.bias)
    return module


class FourierEmbedding(nn.Module):
    """Scalars (B,) -> (B, channels): cosines and sines of fixed frequencies, then an MLP.

    Frequencies are spaced geometrically from 1 to `max_frequency` radians per unit. Consistency
    training wants few high frequencies: a target at a slightly lower noise level must not look
    like a different input (Improved Consistency Training, arXiv 2310.14189, section 3.1).
    """

    frequencies: Tensor

    def __init__(self, channels: int, *, features: int = 64, max_frequency: float = 16.0) -> None:
        super().__init__()
        frequencies = torch.logspace(0.0, 1.0, features // 2, base=max_frequency)
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.mlp = nn.Sequential(
            nn.Linear(features, channels), nn.SiLU(), nn.Linear(channels, channels)
        )

    def forward(self, values: Tensor) -> Tensor:
        phases = values[:, None] * self.frequencies
        # sqrt(2) gives every feature unit variance over a phase
        return self.mlp(torch.cat([phases.cos(), phases.sin()], dim=1) * 2.0**0.5)


class ResidualBlock(nn.Module):
    """Norm, SiLU, 3x3 convolution, twice, with a skip: (B, C_in, H, W) -> (B, C_out, H, W).

    An embedding (B, E) scales and shifts the second norm (adaptive group norm, arXiv 2105.05233).
    The second convolution starts at zero, so a fresh block passes its skip branch through.
    """

    def __init__(self, in_channels: int, out_channels: int, embedding_dim: int = 0) -> None:
        super().__init__()
        self.norm1 = group_norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.affine = nn.Linear(embedding_dim, 2 * out_channels) if embedding_dim else None
        self.norm2 = group_norm(out_channels)
        self.conv2 = _zero(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        same = in_channels == out_channels
        self.skip = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, embedding: Tensor | None = None) -> Tensor:
        h = self.norm2(self.conv1(F.silu(self.norm1(x))))
        if self.affine is not None and embedding is not None:
            scale, shift = self.affine(F.silu(embedding))[:, :, None, None].chunk(2, dim=1)
            h = torch.addcmul(shift, h, scale + 1)
        h = self.conv2(F.silu(h))
        return (self.skip(x) + h) * _RESIDUAL_SCALE


class SelfAttention(nn.Module):
    """Multi-head self-attention over pixels with a skip: (B, C, H, W) -> same."""

    def __init__(self, channels: int, *, head_channels: int = 64) -> None:
        super().__init__()
        self.heads = max(1, channels // head_channels)
        if channels % self.heads:
            raise ValueError(f"channels: got {channels}, want a multiple of {self.heads} heads")
        self.norm = group_norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = _zero(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        qkv = self.qkv(self.norm(x)).permute(0, 2, 3, 1)  # channel-last: free where x is
        q, k, v = qkv.reshape(b, h * w, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        if x.device.type == "cpu" and q.dtype == torch.bfloat16:
            # the fused kernel's backward pass takes three times as long there
            y = (q * q.shape[-1] ** -0.5 @ k.mT).softmax(dim=-1).to(v.dtype) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v)
        y = y.transpose(1, 2).reshape(b, h, w, c).permute(0, 3, 1, 2)
        return (x + self.out(y)) * _RESIDUAL_SCALE


class UNet(nn.Module):
    """U-Net over pixel-unshuffled images: (B, in_channels, H, W) -> (B, out_channels, H, W).

    The stem folds `patch` x `patch` pixels into channels, the head unfolds them again. Each of
    the `len(channel_multipliers)` levels holds `blocks_per_level` residual blocks on the way
    down and again on the way up, with self-attention after each block of the levels named in
    `attention_levels` (0 is the finest) and in the middle. Fully convolutional: any H, W
    divisible by `divisor` = patch * 2^(levels - 1) will do; others raise ValueError.

    `embedding_dim` > 0 makes forward() require an embedding (B, embedding_dim) that drives
    every residual block's adaptive norm. A fresh network's output is exactly zero.

    `checkpointing`, an attribute, keeps each block's inputs only and computes the rest again on
    the way back: less memory for more time (arXiv 1604.06174).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        base_channels: int,
        channel_multipliers: Sequence[int],
        blocks_per_level: int,
        attention_levels: Sequence[int],
        patch: int,
        embedding_dim: int = 0,
    ) -> None:
        super().__init__()
        levels = len(channel_multipliers)
        if min(base_channels, blocks_per_level, patch, *channel_multipliers) < 1:
            raise ValueError(
                "base_channels, blocks_per_level, patch, channel_multipliers: got "
                f"{base_channels}, {blocks_per_level}, {patch}, {channel_multipliers}, "
                "want at least 1"
            )
        if any(not 0 <= level < levels for level in attention_levels):
            raise ValueError(
                f"attention_levels: got {attention_levels}, want levels in [0, {levels - 1}]"
            )
        self.patch, self.divisor = patch, patch * 2 ** (levels - 1)
        self.checkpointing = False

        def blocks(level: int, first: int) -> nn.ModuleList:
            width = widths[level]
            return nn.ModuleList(
                ResidualBlock(first if i == 0 else width, width, embedding_dim)
                for i in range(blocks_per_level)
            )

        def attended(level: int) -> nn.ModuleList:
            return nn.ModuleList(
                SelfAttention(widths[level]) if level in attention_levels else nn.Identity()
                for _ in range(blocks_per_level)
            )

        widths = [base_channels * m for m in channel_multipliers]
        self.stem = nn.Conv2d(in_channels * patch**2, widths[0], 3, padding=1)
        self.down_blocks, self.down_attention = nn.ModuleList(), nn.ModuleList()
        self.downsample = nn.ModuleList()
        for level, width in enumerate(widths):
            if level:
                self.downsample.append(nn.Conv2d(widths[level - 1], width, 3, stride=2, padding=1))
            self.down_blocks.append(blocks(level, width))
            self.down_attention.append(attended(level))
        last = widths[-1]
        self.middle_in, self.middle_out = (
            ResidualBlock(last, last, embedding_dim) for _ in range(2)
        )
        self.middle_attention = SelfAttention(last) if attention_levels else nn.Identity()
        self.up_blocks, self.up_attention = nn.ModuleList(), nn.ModuleList()
        self.upsample = nn.ModuleList()
        for level in reversed(range(levels)):
            # both branches of the join carry as many channels as the level
            self.up_blocks.append(blocks(level, 2 * widths[level]))
            self.up_attention.append(attended(level))
            if level:
                # 1x1 before the nearest upsampling: a quarter of the cost of after it, same values
                self.upsample.append(nn.Conv2d(widths[level], widths[level - 1], 1))
        self.norm_out = group_norm(widths[0])
        self.head = _zero(nn.Conv2d(widths[0], out_channels * patch**2, 3, padding=1))

    def forward(self, x: Tensor, embedding: Tensor | None = None) -> Tensor:
        if x.shape[2] % self.divisor or x.shape[3] % self.divisor:
            raise ValueError(
                f"x: got {x.shape[2]} x {x.shape[3]} pixels, want both divisible by "
                f"{self.divisor} (patch {self.patch} x 2^{len(self.downsample)} for the levels)"
            )
        h = self.stem(F.pixel_unshuffle(x, self.patch) if self.patch > 1 else x)
        skips: list[Tensor] = []
        for blocks, attentions in zip(self.down_blocks, self.down_attention, strict=True):
            if skips:
                h = self.downsample[len(skips) - 1](h)
            h = self._run(blocks, attentions, h, embedding)
            skips.append(h)
        h = self._run([self.middle_in], [self.middle_attention], h, embedding)
        h = self._run([self.middle_out], [None], h, embedding)
        for i, (blocks, attentions) in enumerate(
            zip(self.up_blocks, self.up_attention, strict=True)
        ):
            h = self._run(blocks, attentions, torch.cat([h, skips.pop()], dim=1), embedding)
            if skips:
                h = F.interpolate(self.upsample[i](h), scale_factor=2.0, mode="nearest")
        h = self.head(F.silu(self.norm_out(h)))
        return F.pixel_shuffle(h, self.patch) if self.patch > 1 else h

    def _run(self, blocks: Any, attentions: Any, h: Tensor, embedding: Tensor | None) -> Tensor:
        for block, attention in zip(blocks, attentions, strict=True):

            def run(
                h: Tensor, embedding: Tensor | None, block: Any = block, attention: Any = attention
            ) -> Tensor:
                h = block(h, embedding)
                return h if attention is None else attention(h)

            if self.checkpointing and torch.is_grad_enabled():
                # there is no random state to restore, which would wait for a GPU
                h = checkpoint(run, h, embedding, use_reentrant=False, preserve_rng_state=False)
            else:
                h = run(h, embedding)
        return h


def unet_options(config: Any) -> dict[str, Any]:
    """The part of a network's configuration that is its U-Net's."""
    names = ["base_channels", "channel_multipliers", "blocks_per_level", "attention_levels"]
    return {name: getattr(config, name) for name in [*names, "patch"]}
