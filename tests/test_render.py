"""The CPU rasteriser against the dense float64 reference, and the border they share."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fresnel.render import Views, cpu, reference, render
from fresnel.scene.cameras import Cameras, look_at, orbit
from fresnel.scene.gaussians import Gaussians

IMAGES = ("rgb", "alpha", "depth")
NAMES = ("means", "quats", "scales", "opacities", "colors")


def make_scene(
    seed: int,
    *,
    batch: tuple[int, ...] = (),
    num: int = 20,
    coefficients: int = 0,
    spread: float = 0.4,
    sizes: tuple[float, float] = (0.005, 0.3),
    opacities: tuple[float, float] = (0.0, 1.0),
) -> Gaussians:
    """Random Gaussians around the origin; sizes are log-uniform, so needles and discs occur."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*batch, *shape, generator=generator)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*batch, *shape, generator=generator)

    low, high = torch.tensor(sizes).log().tolist()
    colors = normal(num, coefficients, 3) * 0.4 if coefficients else uniform(0, 1, num, 3)
    means, quats = normal(num, 3) * spread, normal(num, 4)
    scales = uniform(low, high, num, 3).exp()
    return Gaussians(means, quats, scales, uniform(*opacities, num), colors)


def make_cameras(views: int, width: int, height: int, radius: float = 2.2) -> Cameras:
    options = {"focal_px": 1.2 * width, "width": width, "height": height}
    return orbit(torch.linspace(0, 250, views), 15.0, radius, pivot=torch.zeros(3), **options)


def stable(g: Gaussians, cameras: Cameras, near: float = 0.01, eps2d: float = 0.3) -> Tensor:
    """Pixels (C, H, W) at which no Gaussian sits within rounding of a threshold.

    Where an opacity is 1/255, the clamp, or a transmittance 1e-4 to within float32's rounding,
    neither answer is wrong, and both the image and its gradient jump between them.
    """
    masks, size = [], (cameras.width, cameras.height)
    tensors = [getattr(g, name).detach().double() for name in NAMES[:4]]
    x, y = (torch.arange(n) + 0.5 for n in size)
    pixels = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)
    for viewmat, K in zip(cameras.viewmats.double(), cameras.Ks.double(), strict=True):
        z = tensors[0] @ viewmat[2, :3] + viewmat[2, 3]
        order = torch.argsort(z.float(), stable=True)
        means, quats, scales, opacities = (t[order[z[order] >= near]] for t in tensors)
        centres, covariances, _ = reference.project(means, quats, scales, viewmat, K, *size, eps2d)
        d = pixels - centres[:, None, None]
        sigma = torch.einsum("nhwi,nij,nhwj->nhw", d, torch.linalg.inv(covariances), d) / 2
        raw = opacities[:, None, None] * torch.exp(-sigma)
        after = torch.cumprod(1 - torch.where(raw < 1 / 255, 0, raw.clamp_max(0.999)), 0)
        fragile = ((raw * 255 - 1).abs() < 1e-4) | ((raw / 0.999 - 1).abs() < 1e-5)
        masks.append(~(fragile | ((after * 1e4 - 1).abs() < 1e-2)).any(0))
    return torch.stack(masks)


def leaves_of(gaussians: Gaussians) -> list[Tensor]:
    return [getattr(gaussians, name).detach().clone().requires_grad_() for name in NAMES]


def gradients(
    gaussians: Gaussians, cameras: Cameras, weights: Views, backend: Any, **options: Any
) -> tuple[Views, list[Tensor]]:
    """The views, and the gradients of their weighted sum for the five tensors of the Gaussians."""
    leaves = leaves_of(gaussians)
    views = render(Gaussians(*leaves), cameras, backend=backend, **options)
    loss = sum((getattr(views, name).double() * getattr(weights, name)).sum() for name in IMAGES)
    return views, list(torch.autograd.grad(loss, leaves))


def assert_matches_reference(
    gaussians: Gaussians, cameras: Cameras, seed: int = 0, **options: Any
) -> None:
    """Images to 5e-6 of their range, gradients to 1e-4 of their norm, where both are continuous."""
    limits = {name: options[name] for name in ("near", "eps2d") if name in options}
    mask = stable(gaussians, cameras, **limits)[..., None]
    assert mask.float().mean() > 0.5
    generator = torch.Generator().manual_seed(seed)
    shape = mask.shape[:-1]
    weights = [torch.randn(*shape, k, generator=generator).double() * mask for k in (3, 1, 1)]
    (want, want_grads), (got, got_grads) = (
        gradients(gaussians, cameras, Views(*weights), backend, **options)
        for backend in ("reference", "cpu")
    )
    for name in IMAGES:
        a, b = getattr(want, name).detach(), getattr(got, name).detach()
        assert b.isfinite().all()
        assert ((a - b) * mask).abs().max() <= 5e-6 * max(1.0, float(a.abs().max())), name
    for name, want_grad, got_grad in zip(NAMES, want_grads, got_grads, strict=True):
        error = torch.linalg.norm(want_grad - got_grad)
        assert error <= 1e-4 * torch.linalg.norm(want_grad) + 1e-6, (name, float(error))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**31),
    width=st.integers(1, 40),
    height=st.integers(1, 40),
    views=st.integers(1, 2),
    radius=st.sampled_from([2.2, 0.5, 0.05]),
    options=st.fixed_dictionaries(
        {
            "num": st.integers(0, 40),
            "coefficients": st.sampled_from([0, 0, 1, 4, 9, 16]),
            "opacities": st.sampled_from(
                [(0.0, 1.0), (0.99, 1.0), (1.0, 1.0), (0.0, 0.01), (0.9, 0.9999)]
            ),
            "sizes": st.sampled_from([(0.005, 0.3), (1e-4, 1e-2), (0.001, 2.0), (0.05, 0.05)]),
        }
    ),
)
def test_cpu_matches_the_reference(
    seed: int, width: int, height: int, views: int, radius: float, options: dict
) -> None:
    cameras = make_cameras(views, width, height, radius)
    assert_matches_reference(make_scene(seed, **options), cameras, seed)


@pytest.mark.parametrize(
    "options",
    [
        {"eps2d": 0.0},
        {"eps2d": 2.0},
        {"near": 2.0},
        {"background": [0.2, 0.5, 1.0]},
        {"background": torch.tensor([[0.1, 0.2, 0.3], [1.0, 0.0, 0.5]])},
    ],
)
def test_parameters_mean_the_same_in_both(options: dict) -> None:
    gaussians, cameras = make_scene(5, num=30, sizes=(0.05, 0.3)), make_cameras(2, 20, 24)
    assert_matches_reference(gaussians, cameras, **options)
    changed = render(gaussians, cameras, **options)
    assert not torch.equal(render(gaussians, cameras).rgb, changed.rgb)


@pytest.mark.parametrize("size", [(524_273, 1), (1, 524_273)])
def test_images_beyond_what_the_kernels_count_are_refused(size: tuple[int, int]) -> None:
    """Boxes of tiles are 16-bit, entries 32-bit: further on, pictures would be silently wrong."""
    with pytest.raises(ValueError, match="at most 524272"):
        render(make_scene(5), make_cameras(1, *size))
    with pytest.raises(ValueError, match=r"fewer than 2\^31"):
        cpu._check_count(1 << 31)
    cpu._check_count((1 << 31) - 1)


@pytest.mark.parametrize("axis", [0, 1])
def test_the_last_pixel_of_the_largest_image_is_drawn(axis: int) -> None:
    size = [1, 1]
    size[axis] = cpu.MOST_PIXELS
    cameras = make_cameras(1, *size)
    K = cameras.Ks.clone()
    K[:, axis, 2] = cpu.MOST_PIXELS - 0.5  # the object, at the principal point, is there
    one = replace(make_scene(5, num=1), means=torch.zeros(1, 3))
    alpha = render(one, replace(cameras, Ks=K)).alpha.reshape(-1)
    assert alpha[-1] > 0.01 and alpha[-1] >= 0.999 * alpha.max() and alpha[0] < alpha[-1]


def test_a_larger_image_spans_many_tiles_and_chunks() -> None:
    gaussians = make_scene(11, num=1100, sizes=(0.002, 0.01), opacities=(0.05, 0.9), spread=0.3)
    cameras = make_cameras(1, 50, 35)  # four chunks of 256 and a part of one
    want, got = (render(gaussians, cameras, backend=k) for k in ("reference", "cpu"))
    mask = stable(gaussians, cameras)[..., None]
    assert mask.float().mean() > 0.5
    assert ((want.rgb - got.rgb) * mask).abs().max() < 5e-6


def hard_cases() -> dict[str, tuple[Gaussians, Cameras]]:
    here = make_cameras(1, 24, 17)
    far, wide, flat, equal = (make_scene(seed, num=10) for seed in (4, 5, 6, 8))
    eye, size = torch.tensor([[0.0, 0.0, 2.0]]), {"width": 24, "height": 17}
    above = look_at(eye, torch.zeros(3), focal_px=30.0, **size)
    in_plane = torch.tensor([1.0, 1.0, 0.0])
    return {
        "nothing": (make_scene(1, num=0), here),
        "behind the camera": (replace(far, means=far.means + 10 * here.centers[0]), here),
        "far outside the frustum": (replace(wide, means=wide.means * 1e5), here),
        "one pixel": (make_scene(2, num=8), make_cameras(1, 1, 1)),
        "one Gaussian": (make_scene(3, num=1), here),
        "no extent": (replace(flat, scales=flat.scales * 0), here),
        "needles": (make_scene(7, num=6, sizes=(1e-3, 5.0)), here),
        "inside the cloud": (make_scene(9, num=40, spread=1.0), make_cameras(1, 24, 17, 0.01)),
        "equal depths": (replace(equal, means=equal.means * in_plane), above),
    }


@pytest.mark.parametrize("case", list(hard_cases()))
def test_hard_cases(case: str) -> None:
    gaussians, cameras = hard_cases()[case]
    assert_matches_reference(gaussians, cameras)
    if case in ("nothing", "behind the camera", "far outside the frustum"):
        assert render(gaussians, cameras).alpha.max() == 0


def test_a_zero_quaternion_is_no_rotation() -> None:
    gaussians, cameras = make_scene(10, num=5), make_cameras(1, 20, 20)
    zero, unit = (torch.tensor([w, 0, 0, 0]).expand(5, 4) for w in (0.0, 1.0))
    one, other = (render(replace(gaussians, quats=quats), cameras).rgb for quats in (zero, unit))
    assert torch.equal(one, other)


def test_same_bits_on_any_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    gaussians = make_scene(13, num=9000, sizes=(0.003, 0.05), opacities=(0.1, 1.0), coefficients=4)
    cameras = make_cameras(3, 70, 50)
    ones = Views(*(torch.ones(3, 50, 70, k, dtype=torch.float64) for k in (3, 1, 1)))
    runs = []
    for n in (1, 2, 3, 2):
        monkeypatch.setattr(cpu, "_threads", lambda projections, pixels, n=n: n)
        views, grads = gradients(gaussians, cameras, ones, "cpu")
        runs.append([views.rgb, views.depth, *grads])
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, runs[0], strict=True))


def test_renders_from_several_python_threads_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_threads", lambda projections, pixels: 2)
    gaussians, cameras = make_scene(14, num=3000), make_cameras(2, 64, 64)
    want = render(gaussians, cameras).rgb
    with ThreadPoolExecutor(4) as pool:
        images = list(pool.map(lambda _: render(gaussians, cameras).rgb, range(8)))
    assert all(torch.equal(image, want) for image in images)


def test_the_background_has_gradients_too() -> None:
    gaussians, cameras = make_scene(15, num=10), make_cameras(2, 16, 16)
    grads = []
    for backend in ("reference", "cpu"):
        background = torch.full((2, 3), 0.3, requires_grad=True)
        views = render(gaussians, cameras, background=background, backend=backend)  # type: ignore[arg-type]
        grads += torch.autograd.grad(views.rgb.pow(2).sum(), background)
    assert torch.allclose(*grads, rtol=1e-3)


def test_float64_and_views_without_gradients_render() -> None:
    gaussians, cameras = make_scene(16), make_cameras(1, 16, 16)
    with torch.no_grad():
        a = render(gaussians.to(dtype=torch.float64), cameras)
    assert a.rgb.dtype == torch.float32 and not a.rgb.requires_grad
    assert torch.equal(a.rgb, render(gaussians, cameras).rgb)
    assert render(gaussians, cameras, backend="reference").rgb.dtype == torch.float64


def moved(**changes: Tensor) -> Cameras:
    return replace(make_cameras(2, 8, 8), **changes)


def with_nan(name: str) -> Gaussians:
    tensors = {n: getattr(make_scene(17), n).clone() for n in NAMES}
    tensors[name].view(-1)[7] = float("nan")
    return Gaussians(**tensors)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "opengl"}, "backend: got 'opengl'"),
        ({"backend": "gsplat"}, "CUDA tensors only"),
        ({"near": -1.0}, "near"),
        ({"eps2d": -0.1}, "eps2d"),
        ({"background": torch.zeros(4)}, "background: got shape"),
        ({"gaussians": make_scene(19, batch=(3,))}, "C of every scene"),
        ({"cameras": moved(viewmats=torch.eye(4).repeat(2, 1, 1).requires_grad_())}, "require"),
        ({"cameras": moved(viewmats=torch.full((2, 4, 4), torch.nan))}, "cameras: got NaN"),
        *(
            ({"gaussians": with_nan(name), "backend": backend}, "gaussians.*NaN or infinite")
            for name in NAMES
            for backend in ("cpu", "reference")
        ),
    ],
)
def test_bad_parameters_are_named(options: dict, message: str) -> None:
    given = {"gaussians": make_scene(18), "cameras": make_cameras(2, 8, 8), **options}
    with pytest.raises(ValueError, match=message):
        render(**given)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="gsplat renders on a GPU only")
@pytest.mark.parametrize("coefficients", [0, 16])
def test_gsplat_agrees(coefficients: int) -> None:
    gaussians = make_scene(20, num=200, coefficients=coefficients, sizes=(0.01, 0.1))
    cameras = make_cameras(2, 64, 48)
    mask = stable(gaussians, cameras)[..., None]
    want = render(gaussians, cameras, backend="cpu", background=[0.1, 0.2, 0.3])
    got = render(gaussians.to("cuda"), cameras.to("cuda"), background=[0.1, 0.2, 0.3])
    for name in IMAGES:
        assert ((getattr(want, name) - getattr(got, name).cpu()) * mask).abs().max() < 1e-3
