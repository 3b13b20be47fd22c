"""The U-Net that the decoder and the view synthesiser share."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

UNET_OPTIONS = (
    *("base_channels", "channel_multipliers", "blocks_per_level", "attention_levels", "patch"),
)
"""The part of a network's configuration that is its U-Net's."""
_RESIDUAL_SCALE = 0.5**0.5  # keeps a sum of two unit-variance branches at unit variance


class GroupNorm(nn.GroupNorm):
    """Group norm; in float32 on a CPU, whose kernel for bfloat16 takes three times as long.

    Compiled, means over pixels come first, then those over a group's channels, which lie next to
    each other: for a CPU the compiler makes vector code of a loop over all of them, but not of one
    over a group's four; for a GPU no intermediate loses the order that convolutions want.
    """

    def forward(self, input: Tensor) -> Tensor:
        if input.device.type != "cpu":
            compiling = torch.compiler.is_compiling()
            return (
                _scaled(input, *self._per_channel(input)) if compiling else super().forward(input)
            )
        x = input.float() if input.dtype == torch.bfloat16 else input
        if not torch.compiler.is_compiling():
            return super().forward(x)
        x = x - self._over_groups(x)
        variance = self._over_groups(x.square())
        scale = (variance + self.eps).rsqrt() * self.weight[:, None, None]
        return torch.addcmul(self.bias[:, None, None], x, scale)

    def activated(self, x: Tensor, modulation: Tensor | None = None) -> Tensor:
        """SiLU of the normalised x (B, C, H, W), perhaps times 1 + scale, plus shift: of
        `modulation` (B, 2 C) the first and the second half."""
        if modulation is None:
            return F.silu(self(x))
        scale, shift = modulation.chunk(2, dim=1)
        if x.device.type == "cpu" or not torch.compiler.is_compiling():
            return F.silu(_scaled(self(x), scale + 1, shift))
        factor, term = self._per_channel(x)
        return F.silu(_scaled(x, factor * (scale + 1), term * (scale + 1) + shift))

    def _per_channel(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The factor and the term, (B, C) each, that normalise x: one pass over it, and one on the
        way back, where a norm in steps of torch's takes three."""
        with torch.autocast(x.device.type, enabled=False):
            x = x.float()
            moments = x.mean(dim=(2, 3)), x.square().mean(dim=(2, 3))
            mean, square = (m.unflatten(1, (self.num_groups, -1)).mean(2, True) for m in moments)
            deviation = ((square - mean.square()).clamp_min(0) + self.eps).rsqrt()
            factor = deviation * self.weight.unflatten(0, (self.num_groups, -1))
            term = self.bias.unflatten(0, (self.num_groups, -1)) - mean * factor
        return factor.flatten(1), term.flatten(1)

    def _over_groups(self, x: Tensor) -> Tensor:
        """The mean of each channel's group, (B, C, 1, 1).

        By a product of matrices, so that what follows finds a value a channel and need not look up
        its group for every pixel.
        """
        size = self.num_channels // self.num_groups
        group = torch.arange(self.num_channels, device=x.device) // size
        same = (group[:, None] == group).to(x.dtype) / size
        with torch.autocast(x.device.type, enabled=False):
            return (x.mean(dim=(2, 3)) @ same)[..., None, None]


def _scaled(x: Tensor, factor: Tensor, term: Tensor) -> Tensor:
    """x (B, C, H, W) times a factor plus a term, (B, C) both, in float32."""
    return torch.addcmul(term[..., None, None], x.float(), factor[..., None, None])


def group_norm(channels: int) -> GroupNorm:
    """Group norm with at most 32 groups of at least four channels each (one group if none fits)."""
    groups = next((g for g in range(min(32, channels // 4), 1, -1) if channels % g == 0), 1)
    return GroupNorm(groups, channels, eps=1e-5)


def _zero(module: nn.Conv2d) -> nn.Conv2d:
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


class FourierEmbedding(nn.Module):
    """Scalars (B,) -> (B, channels): 32 cosines and sines of fixed frequencies, then an MLP.

    Frequencies are spaced geometrically from 1 to 16 radians per unit. Consistency training wants
    few high frequencies: a target at a slightly lower noise level must not look like a different
    input (Improved Consistency Training, arXiv 2310.14189, section 3.1).
    """

    frequencies: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        # torch.logspace imports a computer algebra where all is built without memory (0.7 s)
        frequencies = torch.tensor(np.logspace(0.0, 1.0, 32, base=16.0), dtype=torch.float32)
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.mlp = nn.Sequential(nn.Linear(64, channels), nn.SiLU(), nn.Linear(channels, channels))

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
        h, modulation = self.conv1(self.norm1.activated(x)), None
        if self.affine is not None and embedding is not None:
            modulation = self.affine(F.silu(embedding))
        h = self.conv2(self.norm2.activated(h, modulation))
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

    Of `config` it reads the `UNET_OPTIONS`. The stem folds `patch` x `patch` pixels into channels,
    the head unfolds them again. Each of the `len(channel_multipliers)` levels holds
    `blocks_per_level` residual blocks on the way down and again on the way up, with self-attention
    after each block of the levels named in `attention_levels` (0 is the finest) and in the middle.
    Fully convolutional: any H, W divisible by `divisor` = patch * 2^(levels - 1) will do.

    `embedding_dim` > 0 makes forward() require an embedding (B, embedding_dim) that drives
    every residual block's adaptive norm. A fresh network's output is exactly zero.

    `checkpointing`, an attribute, keeps each block's inputs only and computes the rest again on
    the way back: less memory for more time (arXiv 1604.06174).
    """

    def __init__(
        self, in_channels: int, out_channels: int, config: Any, *, embedding_dim: int = 0
    ) -> None:
        super().__init__()
        sizes = {name: getattr(config, name) for name in UNET_OPTIONS}
        patch, count, attended = config.patch, config.blocks_per_level, config.attention_levels
        widths = [config.base_channels * m for m in config.channel_multipliers]
        levels = len(widths)
        if min(count, patch, *widths) < 1:
            raise ValueError(f"got {sizes}, want sizes of at least 1")
        if not set(attended) <= set(range(levels)):
            raise ValueError(f"attention_levels: got {attended}, want levels in [0, {levels - 1}]")
        self.patch, self.divisor = patch, patch * 2 ** (levels - 1)
        self.checkpointing = False

        def add_level(to: str, level: int, first: int) -> None:
            width, numbers = widths[level], range(count)
            inputs = [width if number else first for number in numbers]
            blocks = (ResidualBlock(size, width, embedding_dim) for size in inputs)
            getattr(self, f"{to}_blocks").append(nn.ModuleList(blocks))
            attends = SelfAttention if level in attended else nn.Identity
            layers = (attends(width) for _ in numbers)
            getattr(self, f"{to}_attention").append(nn.ModuleList(layers))

        self.stem = nn.Conv2d(in_channels * patch**2, widths[0], 3, padding=1)
        self.down_blocks, self.down_attention = nn.ModuleList(), nn.ModuleList()
        self.downsample = nn.ModuleList()
        for level, width in enumerate(widths):
            if level:
                self.downsample.append(nn.Conv2d(widths[level - 1], width, 3, stride=2, padding=1))
            add_level("down", level, width)
        last = widths[-1]
        self.middle_in = ResidualBlock(last, last, embedding_dim)
        self.middle_out = ResidualBlock(last, last, embedding_dim)
        self.middle_attention = SelfAttention(last) if attended else nn.Identity()
        self.up_blocks, self.up_attention = nn.ModuleList(), nn.ModuleList()
        self.upsample = nn.ModuleList()
        for level in reversed(range(levels)):
            # both branches of the join carry as many channels as the level
            add_level("up", level, 2 * widths[level])
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
        for level in zip(self.down_blocks, self.down_attention, strict=True):
            if skips:
                h = self.downsample[len(skips) - 1](h)
            h = self._run(*level, h, embedding)
            skips.append(h)
        middle = [self.middle_in, self.middle_out], [self.middle_attention, None]
        h = self._run(*middle, h, embedding)
        for i, level in enumerate(zip(self.up_blocks, self.up_attention, strict=True)):
            h = self._run(*level, torch.cat([h, skips.pop()], dim=1), embedding)
            if skips:
                h = F.interpolate(self.upsample[i](h), scale_factor=2.0, mode="nearest")
        h = self.head(self.norm_out.activated(h))
        return F.pixel_shuffle(h, self.patch) if self.patch > 1 else h

    def _run(self, blocks: Any, attentions: Any, h: Tensor, embedding: Tensor | None) -> Tensor:
        for block, attention in zip(blocks, attentions, strict=True):

            def run(h: Tensor, embedding: Any, block: Any = block, attend: Any = attention) -> Any:
                h = block(h, embedding)
                return h if attend is None else attend(h)

            if self.checkpointing and torch.is_grad_enabled():
                # there is no random state to restore, which would wait for a GPU
                h = checkpoint(run, h, embedding, use_reentrant=False, preserve_rng_state=False)
            else:
                h = run(h, embedding)
        return h
