"""The sRGB curve and luminance, for tensors and arrays, against the standard's own numbers."""

import numpy as np
import pytest
import torch
from pytest import approx

from fresnel.scene.colour import linear_to_srgb, luminance, srgb_to_linear

# IEC 61966-2-1: the foot's end, the middle, what is outside
PAIRS = {0.0: 0.0, 0.02: 0.02 / 12.92, 0.04045: 0.0031308, 0.5: 0.2140411, 1.0: 1.0}


@pytest.mark.parametrize("make", [torch.tensor, np.array])
def test_the_curve_goes_through_known_points_both_ways(make):
    encoded, linear = make(list(PAIRS)), make(list(PAIRS.values()))
    assert srgb_to_linear(encoded).tolist() == approx(linear.tolist(), abs=1e-6)
    assert linear_to_srgb(linear).tolist() == approx(encoded.tolist(), abs=2e-5)
    grid = np.linspace(0, 1, 256, dtype=np.float32)
    for curve in (srgb_to_linear, linear_to_srgb):
        assert curve(make([-0.5, 1.5])).tolist() == approx([0.0, 1.0], abs=1e-6)
        assert curve(grid).dtype == np.float32
        assert np.allclose(curve(grid), curve(torch.from_numpy(grid)).numpy(), atol=1e-6)
    assert linear_to_srgb(srgb_to_linear(grid)) == approx(grid, abs=1e-5)


def test_the_curve_has_finite_slopes_everywhere():
    linear = torch.tensor([0.0, 1e-12, 0.002, 0.5, 1.0], requires_grad=True)
    linear_to_srgb(linear).sum().backward()
    assert linear.grad.isfinite().all()


@pytest.mark.parametrize("make", [torch.tensor, np.array])
def test_luminance_is_rec_709_of_linear_light(make):
    primaries = make([[1.0, 0, 0], [0, 1.0, 0], [0, 0, 1.0], [0.5, 0.5, 0.5]])
    assert luminance(primaries).tolist() == approx([0.2126, 0.7152, 0.0722, 0.2140411])
    with pytest.raises(ValueError, match=r"want \(\.\.\., 3\)"):
        luminance(primaries[:, :2])
