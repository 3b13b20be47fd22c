"""The one sRGB curve of the library (IEC 61966-2-1) and luminance, for arrays and tensors alike."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Values = TypeVar("Values", Tensor, NDArray[np.floating])

LUMINANCE_WEIGHTS = (0.2126, 0.7152, 0.0722)
"""Rec. 709, of linear red, green and blue."""


def srgb_to_linear(srgb: Values) -> Values:
    """Linear light of encoded values in [0, 1], of any shape; the rest is clamped."""
    if isinstance(srgb, Tensor):
        srgb = srgb.clamp(0.0, 1.0)
        return torch.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    srgb = srgb.clip(0.0, 1.0)
    return np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)


def linear_to_srgb(linear: Values) -> Values:
    """Encoded values in [0, 1] of linear light, of any shape; what is outside [0, 1] is clamped."""
    if isinstance(linear, Tensor):
        linear = linear.clamp(0.0, 1.0)
        # the power's slope is infinite at 0, where the other branch is taken
        curve = 1.055 * linear.clamp_min(1e-9) ** (1 / 2.4) - 0.055
        return torch.where(linear <= 0.0031308, 12.92 * linear, curve)
    linear = linear.clip(0.0, 1.0)
    return np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055)


def luminance(rgb: Values) -> Values:
    """Relative luminance in linear light of sRGB colours (..., 3) -> (...)."""
    if rgb.shape[-1:] != (3,):
        raise ValueError(f"rgb: got shape {tuple(rgb.shape)}, want (..., 3)")
    if isinstance(rgb, Tensor):
        return srgb_to_linear(rgb) @ rgb.new_tensor(LUMINANCE_WEIGHTS)
    return srgb_to_linear(rgb) @ np.asarray(LUMINANCE_WEIGHTS, rgb.dtype)
