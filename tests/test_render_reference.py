"""The reference itself: gradcheck, closed forms, and gsplat's own CPU functions as an oracle."""

import math
from typing import Any

import pytest
import torch
from pytest import approx
from torch import Tensor

from fresnel.render import Views, reference, render
from fresnel.scene.cameras import Cameras
from fresnel.scene.gaussians import Gaussians

Backend = Any


def single(
    opacity: float = 0.7,
    z: float = 0.0,
    color: Any = (0.2, 0.4, 0.8),
    scales: Any = (0.2, 0.2, 0.2),
) -> Gaussians:
    rows = ([[0.0, 0.0, z]], [[1.0, 0.0, 0.0, 0.0]], [scales], [opacity], [color])
    return Gaussians(*(torch.tensor(row) for row in rows))


def seen(backend: Backend, *scenes: Gaussians, **options: Any) -> Views:
    """33 x 33 px from z = -4, looking at the origin, which is the middle of the centre pixel."""
    viewmat, K = torch.eye(4), torch.tensor([[40.0, 0, 16.5], [0, 40.0, 16.5], [0, 0, 1]])
    viewmat[2, 3] = 4.0
    camera = Cameras(viewmat[None], K[None], 33, 33)
    together = zip(*(vars(scene).values() for scene in scenes), strict=True)
    views = render(Gaussians(*map(torch.cat, together)), camera, backend=backend, **options)
    return Views(views.rgb[0].double(), views.alpha[0, ..., 0].double(), views.depth[0, ..., 0])


backends = pytest.mark.parametrize("backend", ["reference", "cpu"])


@backends
def test_one_round_gaussian_is_its_formula(backend: Backend) -> None:
    """alpha(r) = o exp(-r^2 / (2 s^2)), s^2 = (f s / z)^2 + 0.3: on the axis J is diagonal."""
    views = seen(backend, single())
    offsets = torch.arange(33).double() + 0.5 - 16.5
    square = offsets[:, None] ** 2 + offsets[None] ** 2
    want = 0.7 * torch.exp(-square / (2 * ((40 * 0.2 / 4) ** 2 + 0.3)))
    want = torch.where(want < 1 / 255, 0, want)
    assert (views.alpha - want).abs().max() < 1e-6
    assert (views.rgb - want[..., None] * torch.tensor([0.2, 0.4, 0.8])).abs().max() < 1e-6
    assert (views.depth - torch.where(want > 0, 4.0, 0.0)).abs().max() < 1e-5


@backends
def test_an_elongated_gaussian_has_its_own_width_on_each_axis(backend: Backend) -> None:
    alpha = seen(backend, single(scales=(0.4, 0.1, 0.3))).alpha
    for profile, scale in ((alpha[16], 0.4), (alpha[:, 16], 0.1)):
        variance = (40 * scale / 4) ** 2 + 0.3
        assert profile[18] / profile[16] == approx(math.exp(-4 / (2 * variance)), rel=1e-5)


@backends
def test_two_gaussians_blend_front_to_back(backend: Backend) -> None:
    """The centre pixel: c1 a1 + c2 a2 (1 - a1) + b (1 - a1) (1 - a2), whatever their order."""
    near, far = single(0.6, -1.0, (1.0, 0.0, 0.0)), single(0.5, 1.0, (0.0, 1.0, 0.0))
    for pair in ([near, far], [far, near]):
        views = seen(backend, *pair, background=[0, 0, 1.0])
        assert views.rgb[16, 16].tolist() == approx([0.6, 0.2, 0.2], abs=1e-6)
        assert views.alpha[16, 16].item() == approx(0.8, abs=1e-6)
        assert views.depth[16, 16].item() == approx((0.6 * 3 + 0.2 * 5) / 0.8, abs=1e-5)


@backends
def test_alpha_is_clamped_and_the_pixel_stops_before_1e_4(backend: Backend) -> None:
    """0.999 leaves 1e-3; a second clamped Gaussian would leave 1e-6, so it is not drawn at all."""
    front, behind = single(1.0, 0.0, (1.0, 1.0, 1.0)), single(1.0, 1.0, (0.0, 1.0, 0.0))
    views = seen(backend, front, behind, single(0.8, 2.0, (0.0, 0.0, 1.0)))
    assert views.rgb[16, 16].tolist() == approx([0.999, 0.999, 0.999], abs=1e-6)


@backends
def test_contributions_below_one_step_of_255_are_skipped(backend: Backend) -> None:
    for opacity, pixels in ((0.99 / 255, 0), (1.01 / 255, 1)):
        assert (seen(backend, single(opacity)).alpha > 0).sum() == pixels


@backends
def test_the_dilation_keeps_a_point_visible(backend: Backend) -> None:
    """A Gaussian without extent is a dot of variance 0.3 px^2."""
    row = seen(backend, single(scales=(0.0, 0.0, 0.0))).alpha[16, 16:18].tolist()
    assert row == approx([0.7, 0.7 * math.exp(-1 / 0.6)], abs=1e-6)


def random_inputs(coefficients: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(coefficients)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    colors = normal(4, coefficients, 3) * 0.1 if coefficients else normal(4, 3).sigmoid()
    viewmat = torch.eye(4, dtype=torch.float64)
    viewmat[:3, 3] = torch.tensor([0.1, -0.2, 4.0])
    K = torch.tensor([[9.0, 0, 3.5], [0, 8.0, 3.0], [0, 0, 1]], dtype=torch.float64)
    scales = 0.4 + normal(4, 3).sigmoid()
    tensors = [normal(4, 3) * 0.5, normal(4, 4), scales, normal(4).sigmoid(), colors, viewmat, K]
    return [tensor.requires_grad_() for tensor in tensors]


@pytest.mark.parametrize("coefficients", [0, 4, 16])
def test_gradcheck(coefficients: int) -> None:
    """Against finite differences, for all inputs, poses and intrinsics included.

    The Gaussians are wide enough for no pixel to cross the 1/255 threshold within a step.
    """
    background = torch.tensor([0.3, 0.1, 0.6], dtype=torch.float64, requires_grad=True)

    def images(*inputs: Tensor) -> tuple[Tensor, ...]:
        *scene, backdrop = inputs
        return reference.draw(*scene, 7, 6, backdrop, near=0.01, eps2d=0.3)

    inputs = (*random_inputs(coefficients), background)
    assert torch.autograd.gradcheck(images, inputs, atol=1e-4, fast_mode=True)


def test_projection_agrees_with_gsplat() -> None:
    """Centres, conics, depths and their gradients, on and beyond the image's edge."""
    from gsplat.cuda._torch_impl import _fully_fused_projection, _quat_scale_to_covar_preci

    means, quats, scales, _, _, viewmat, K = random_inputs(0)
    far = means * torch.tensor([[1.0], [4.0], [10.0], [30.0]], dtype=torch.float64)
    weights = torch.arange(1.0, 25.0, dtype=torch.float64).reshape(4, 6)
    centers, covariances, depths = reference.project(far, quats, scales, viewmat, K, 7, 6, 0.3)
    inverse = torch.linalg.inv(covariances)
    conics = torch.stack([inverse[:, 0, 0], inverse[:, 0, 1], inverse[:, 1, 1]], -1)
    covars, _ = _quat_scale_to_covar_preci(quats, scales, compute_preci=False)
    _, *theirs, _ = _fully_fused_projection(far, covars, viewmat[None], K[None], 7, 6, eps2d=0.3)
    results = []
    for c, z, conic in ((centers, depths, conics), (t[0] for t in theirs)):
        values = torch.cat([c, z[:, None], conic], -1)
        front = (z > 0.01)[:, None]
        loss = (torch.where(front, values, 0) * weights).sum()
        inputs = (means, quats, scales, viewmat, K)
        *grads, v_K = torch.autograd.grad(loss, inputs, retain_graph=True)
        v_K = torch.where(K == 0, 0, v_K)  # gsplat's torch code has a skew, its CUDA code has not
        results.append((values, *grads, v_K))
        assert 2 <= front.sum() <= 4
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("degree", [0, 1, 2, 3])
def test_harmonics_agree_with_gsplat(degree: int) -> None:
    from gsplat.cuda._torch_impl import _spherical_harmonics

    directions = torch.randn(50, 3, dtype=torch.float64)
    coefficients = torch.randn(50, (degree + 1) ** 2, 3, dtype=torch.float64)
    unit = torch.nn.functional.normalize(directions, dim=-1)
    ours = (reference.sh_basis(unit, degree)[..., None] * coefficients).sum(-2)
    assert torch.allclose(ours, _spherical_harmonics(degree, directions, coefficients), atol=1e-9)
