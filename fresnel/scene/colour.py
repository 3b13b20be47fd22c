"""The one sRGB curve of the library (IEC 61966-2-1) and luminance, for arrays and tensors alike."""

from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Values = TypeVar("Values", Tensor, NDArray[np.floating])

LUMINANCE_WEIGHTS = (0.2126, 0.7152, 0.0722)
"""Rec. 709, of linear red, green and blue."""


def srgb_to_linear(srgb: Values) -> Values:
    """Linear light of encoded values in [0, 1], of any shape; the rest is clamped."""
    srgb, where = srgb.clip(0.0, 1.0), _where(srgb)
    return where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)


def linear_to_srgb(linear: Values) -> Values:
    """Encoded values in [0, 1] of linear light, of any shape; what is outside [0, 1] is clamped."""
    linear, where = linear.clip(0.0, 1.0), _where(linear)
    # the power's slope is infinite at 0, where the other branch is taken
    curve = 1.055 * linear.clip(1e-9) ** (1 / 2.4) - 0.055
    return where(linear <= 0.0031308, 12.92 * linear, curve)


def luminance(rgb: Values) -> Values:
    """Relative luminance in linear light of sRGB colours (..., 3) -> (...)."""
    if rgb.shape[-1:] != (3,):
        raise ValueError(f"rgb: got shape {tuple(rgb.shape)}, want (..., 3)")
    if isinstance(rgb, Tensor):
        return srgb_to_linear(rgb) @ rgb.new_tensor(LUMINANCE_WEIGHTS)
    return srgb_to_linear(rgb) @ np.asarray(LUMINANCE_WEIGHTS, rgb.dtype)


def _where(values: Tensor | NDArray[np.floating]) -> Any:
    return torch.where if isinstance(values, Tensor) else np.where
