"""The decoder before and during training, and the task around it."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fresnel.data.dataset import InputImages, ViewTensors
from fresnel.models.decoder import (
    Decoder,
    DecoderConfig,
    normalised_depth,
    original_parametrisation,
    pixel_parametrisation,
    predictor,
    prune,
    render_small,
    rotation_6d,
)
from fresnel.render import Views, render
from fresnel.scene.cameras import Cameras, standard_orbit
from fresnel.scene.gaussians import Gaussians
from fresnel.training.decoder_task import DecoderTask
from fresnel.training.losses import WEIGHTS, multiview_loss

TINY = DecoderConfig(
    image_size=32, base_channels=8, channel_multipliers=(1, 2), attention_levels=(), patch=2
)
TINY_PATCH = DecoderConfig(kind="patch", image_size=32, patch_grid=5)
close = torch.testing.assert_close


def standard(azimuth: Any, elevation: Any, size: int) -> Cameras:
    return standard_orbit(torch.as_tensor(azimuth), torch.as_tensor(elevation), size)


def draws(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gaussians_of(means: Tensor, scales: float, opacities: Any, seed: int) -> Gaussians:
    batch = means.shape[:-1]
    return Gaussians(
        means,
        torch.tensor([1.0, 0, 0, 0]).expand(*batch, 4),
        torch.full((*batch, 3), scales),
        torch.as_tensor(opacities).expand(batch).clone(),
        torch.rand(*batch, 3, generator=draws(seed)),
    )


def pictures(size: int, *, azimuth: Any = (30.0, -100.0), depth: bool = False) -> InputImages:
    """A coloured oval, the same in every image."""
    count = len(azimuth)
    y, x = torch.meshgrid(torch.arange(size) + 0.5, torch.arange(size) + 0.5, indexing="ij")
    u, v = x / size - 0.5, y / size - 0.5
    inside = ((u / 0.33) ** 2 + (v / 0.22) ** 2) < 1
    rgb = torch.stack([0.2 + 0.7 * x / size, 0.9 - 0.6 * y / size, 0.5 + 0.4 * (u > 0)], dim=-1)
    images = ((rgb * inside[..., None] * 255).byte(), inside.byte() * 255, (2.0 + u) * inside)
    rgb, alpha, hit = (image.expand(count, *image.shape).contiguous() for image in images)
    names = tuple(f"picture{i}" for i in range(count))
    cameras = standard(azimuth, torch.linspace(5.0, 25.0, count), size)
    return InputImages(names, rgb, alpha, cameras, hit if depth else None)


def blobs(size: int = 24, objects: int = 2, views: int = 4) -> ViewTensors:
    """Ground truth from Gaussians: a few coloured blobs off the vertical axis."""
    means = torch.rand(objects, 5, 3, generator=draws(3)) * 0.7 - 0.35
    azimuth = torch.arange(views) * (360.0 / views) + 20.0
    cameras = standard(azimuth, torch.linspace(-10.0, 30.0, views), size)[None]
    cameras = cameras[torch.zeros(objects, dtype=torch.long)]
    images = render(gaussians_of(means, 0.12, 0.99, 4), cameras)
    rgb, alpha = (
        (image.clamp(0, 1) * 255).round().byte() for image in (images.rgb, images.alpha[..., 0])
    )
    depth, names = images.depth[..., 0], tuple(f"blobs{i}" for i in range(objects))
    inputs = InputImages(names, rgb[:, 0], alpha[:, 0], cameras[:, 0], depth[:, 0])
    rest = (rgb[:, 1:], alpha[:, 1:], cameras[:, 1:], torch.zeros(objects, 3), depth[:, 1:])
    return ViewTensors(names, inputs, *rest)


@pytest.mark.parametrize("render_size", [64, 32])
def test_untrained_pixel_decoder_reproduces_its_input(render_size: int) -> None:
    inputs = pictures(64)
    decoder = Decoder(replace(TINY, image_size=64)).eval()
    cameras = decoder.input_cameras(inputs).resized(render_size, render_size)[:, None]
    with torch.no_grad():
        views = render(decoder.world(inputs).validate(), cameras)
    truth = inputs.resized(render_size)
    alpha, rgb = truth.alpha.float() / 255, truth.rgb.float() / 255
    inner, empty = alpha > 0.99, torch.nn.functional.max_pool2d(alpha, 5, 1, 2) == 0
    ours = views.alpha[:, 0, ..., 0]
    assert ours[inner].mean() > 0.94 and ours[empty].mean() < 0.02
    assert (views.rgb[:, 0] - rgb)[inner].abs().mean() < 0.05
    # What remains is the silhouette's edge: the renderer's dilation moves it out by up to a pixel.
    assert (ours - alpha).abs().mean() < 0.06
    assert 0.95 < ours.mean() / alpha.mean() < 1.35


def test_untrained_pixel_decoder_is_visible_from_every_side() -> None:
    cameras = standard(30.0 + torch.arange(8) * 45.0, torch.zeros(8), 32).reshape(1, 8)
    views = predictor(Decoder(TINY).eval())(pictures(32, azimuth=(30.0,)), cameras)
    assert (views.alpha.mean(dim=(0, 2, 3, 4)) > 0.02).all()


def test_pixel_gaussians_stay_within_reach_and_in_order() -> None:
    layers, size = 3, 6
    raw = 20 * torch.randn(2, layers * 15, size, size, generator=draws())
    cameras = standard([0.0, 90.0], [0.0, 20.0], size)
    rgba = torch.rand(2, 4, size, size, generator=draws(1))
    gaussians = pixel_parametrisation(raw, rgba, cameras).validate()
    world = gaussians.transform(torch.linalg.inv(cameras.viewmats))
    corner = 2.2 * 0.6 * 2**0.5  # half a frame's diagonal at the pivot
    assert world.means.norm(dim=-1).max() < (0.9 + 0.3 * 3**0.5 + corner)
    flat = pixel_parametrisation(torch.zeros_like(raw), rgba, cameras)
    first = flat.means.reshape(2, layers, -1, 3)[:, 0, :, 2]
    assert first.std(dim=1).max() < 1e-4  # before training the first layer faces the camera
    no_offset = raw.reshape(2, layers, 15, size, size).clone()
    no_offset[:, :, 1:4] = 0
    means = pixel_parametrisation(no_offset.flatten(1, 2), rgba, cameras).means
    assert (means.norm(dim=-1).reshape(2, layers, -1).diff(dim=1) >= -1e-6).all()
    pixel = 2.2 / (1.2 * size)
    assert gaussians.scales.max() < 8 * pixel * 2 and gaussians.scales.min() > pixel / 60


def test_azimuth_of_the_input_camera_does_not_matter() -> None:
    decoder, one = Decoder(TINY).eval(), pictures(32, azimuth=(0.0,))
    with torch.no_grad():
        for p in decoder.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=draws(p.numel())))
        a, turned, lifted = (
            decoder(replace(one, cameras=standard([azimuth], [elevation], 32)))
            for azimuth, elevation in ((0.0, 5.0), (77.0, 5.0), (0.0, 25.0))
        )
    close(a.means, turned.means, atol=1e-4, rtol=1e-4)
    close(a.opacities, turned.opacities, atol=1e-4, rtol=1e-4)
    assert (a.means - lifted.means).abs().max() > 1e-3  # the elevation does


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "voxel"}, "kind"),
        ({"gaussians_per_pixel": 1}, "at least 2"),
        ({"image_size": 100}, "multiple of"),
    ],
)
def test_bad_configs_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DecoderConfig(**change)


def test_prune_keeps_the_picture_and_a_rectangular_batch() -> None:
    means = torch.rand(2, 40, 3, generator=draws(1)) - 0.5
    scene = gaussians_of(means, 0.05, torch.linspace(0, 0.9, 40), 2)
    scene.opacities[0, :30] = 0.001
    pruned, cameras = prune(scene), blobs().cameras
    assert pruned.num == 39 and pruned.batch_shape == (2,) and prune(scene[0]).num == 10
    close(render(scene, cameras).rgb, render(pruned, cameras).rgb, atol=1e-5, rtol=0)


def test_original_parametrisation_is_the_published_one() -> None:
    grid, k = 37, 4
    raw, depth = torch.zeros(1, grid, grid, k, 16), torch.rand(1, grid, grid, generator=draws())
    gaussians = original_parametrisation(raw, depth).validate()
    assert gaussians.num == 1369 * k
    means = gaussians.means.reshape(grid, grid, k, 3)
    assert torch.allclose(means[0, 0, 0, :2], torch.tensor([-1.0, -1.0]))  # OpenCV: y down
    assert torch.allclose(means[-1, -1, 0, :2], torch.tensor([1.0, 1.0]))
    close(means[..., 2], (2 + 2 * depth[0])[..., None].expand(-1, -1, k))
    softplus = torch.nn.functional.softplus(torch.tensor(1.0))
    close(gaussians.scales, (0.15 * softplus).expand_as(gaussians.scales))
    z = original_parametrisation(raw + 50 * torch.randn_like(raw), depth).means[..., 2]
    assert z.min() >= 1.75 and z.max() <= 4.25


def test_rotation_6d_is_a_rotation() -> None:
    matrices, eye = rotation_6d(torch.randn(50, 6, generator=draws())), torch.eye(3)
    close(matrices @ matrices.transpose(-1, -2), eye.expand(50, 3, 3), atol=1e-5, rtol=0)
    close(torch.linalg.det(matrices), torch.ones(50), atol=1e-5, rtol=0)
    close(rotation_6d(torch.zeros(6)), eye)


def test_nearer_parts_get_nearer_gaussians() -> None:
    depth, alpha = torch.tensor([[[2.0, 3.0], [0.0, 2.5]]]), torch.tensor([[[1.0, 1], [0, 1]]])
    close(normalised_depth(depth, alpha), torch.tensor([[[0.0, 1.0], [1.0, 0.5]]]))
    assert normalised_depth(0 * depth, 0 * alpha).eq(1).all()


@pytest.mark.parametrize("depth", [True, False])
def test_patch_decoder_uses_depth_or_predicts_it(depth: bool) -> None:
    inputs, decoder = pictures(32, depth=depth), Decoder(TINY_PATCH).eval()
    with torch.no_grad():
        gaussians = decoder(inputs).validate()
        _, aux = decoder.decode(*decoder.prepare(inputs))
        world = decoder.world(inputs)
    assert gaussians.num == 25 * 4 and ("depth_known" in aux) is depth
    # In the world the centroid is as far from the camera as the pivot is.
    offset = world.means - inputs.cameras.centers[:, None]
    along = (offset * inputs.cameras.forward[:, None]).sum(-1)
    mean = (along * world.opacities).sum(-1) / world.opacities.sum(-1)
    close(mean, torch.full((2,), 2.2), atol=1e-3, rtol=0)
    cameras = decoder.input_cameras(inputs)[:, None]
    own = render(gaussians, replace(cameras, viewmats=torch.eye(4).expand(2, 1, 4, 4)))
    close(render(world, cameras).rgb, own.rgb, atol=2e-3, rtol=0)


def test_multiview_loss_is_zero_for_the_truth_and_names_its_terms() -> None:
    data = blobs()
    rgba = torch.cat([data.rgb, data.alpha[..., None]], dim=-1).float() / 255
    same = Views(rgba[..., :3], rgba[..., 3:], data.depth[..., None])
    background = torch.rand(2, 3, 1, 1, 3, generator=draws())
    terms = multiview_loss(same, rgba, background, target_depth=data.depth)
    assert set(terms) == {"rgb_l1", "rgb_mse", "alpha_l1", "ssim", "depth_l1", "loss"}
    assert float(terms["loss"].detach()) < 1e-5
    black = Views(0 * same.rgb, torch.ones_like(same.alpha), same.depth)
    assert multiview_loss(black, rgba, background)["loss"] > 0.3
    # An empty view isn't free even where the background happens to be the object's colour.
    empty = Views(0 * same.rgb, 0 * same.alpha, 0 * same.depth)
    weights = {**WEIGHTS, "rgb_l1": 0, "rgb_mse": 0, "ssim": 0}
    assert multiview_loss(empty, rgba, background, weights=weights)["loss"] > 0.01


def test_both_sides_of_the_loss_lie_over_the_same_background() -> None:
    """Half a grey pixel's cover lets half of the background through, in truth and render alike."""
    truth = torch.full((1, 1, 12, 12, 4), 0.5)
    truth[..., :3] = 0.2
    for rgb, alpha in ((0.2, 0.5), (0.0, 0.0), (0.1, 1.0)):
        values = ((3, rgb), (1, alpha), (1, 0.0))
        views = Views(*(torch.full((1, 1, 12, 12, n), value) for n, value in values))
        found = multiview_loss(views, truth, torch.full((3,), 0.8))
        error = abs(rgb + (1 - alpha) * 0.8 - (0.2 + 0.5 * 0.8))
        assert found["rgb_l1"] == pytest.approx(error, abs=1e-6)
        assert found["rgb_mse"] == pytest.approx(error**2, abs=1e-6)


def test_the_colours_of_half_of_the_objects_are_mixed() -> None:
    task = DecoderTask(blobs(), TINY, batch_size=64, target_views=1)
    mixed = task.batch(0, draws(5))
    task.augment = False
    plain = task.batch(0, draws(5))
    turned = ~(mixed["viewmats"] == plain["viewmats"]).flatten(1).all(dim=1)
    assert 0.3 < turned.float().mean() < 0.7
    ours = torch.where(turned[:, None, None, None, None], mixed["rgba"].flip(3), mixed["rgba"])
    assert torch.equal(ours[..., 3], plain["rgba"][..., 3])
    same = (ours == plain["rgba"]).flatten(1).all(dim=1)
    assert 0.3 < same.float().mean() < 0.7
    gains = []
    for after, before in zip(ours[~same], plain["rgba"][~same], strict=True):
        for channel in range(3):  # each is one of the three, 0.7 to 1.2 times as bright
            unclipped = after[..., channel] < after[..., 3] - 1e-3
            ratios = [
                (after[..., channel] / before[..., k])[(before[..., k] > 0.05) & unclipped]
                for k in range(3)
            ]
            best = min(ratios, key=lambda r: float(r.std()) if len(r) > 2 else 0.0)
            assert len(best) < 3 or best.std() < 1e-3
            gains += best[:1].tolist()
    assert 0.69 < min(gains) < 0.8 and 1.1 < max(gains) < 1.21


def test_batches_repeat_with_the_generator_and_mirroring_is_consistent() -> None:
    task = DecoderTask(blobs(), TINY, batch_size=6, target_views=2)
    one, two = task.batch(0, draws(5)), task.batch(0, draws(5))
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert one["rgba"].shape == (6, 3, 24, 24, 4)
    assert (one["rgba"][..., :3] <= one["rgba"][..., 3:] + 1e-6).all()  # premultiplied
    # A mirrored batch is what mirrored cameras see of the mirrored world: distances along the
    # rays are unchanged, so the depth at mirrored pixels unprojects to mirrored points.
    task.augment = False
    plain = task.batch(0, draws(5))

    def unprojected(batch: dict[str, Tensor]) -> Tensor:
        start, direction = Cameras(batch["viewmats"], batch["Ks"], 24, 24).rays()
        return start + direction * batch["depth"][..., None]

    for b, (points, ours) in enumerate(zip(unprojected(plain), unprojected(one), strict=True)):
        if not torch.equal(plain["viewmats"][b], one["viewmats"][b]):
            points = points.flip(2) * torch.tensor([-1.0, 1.0, 1.0])
        close(ours, points, atol=1e-4, rtol=1e-4)
    close(torch.linalg.det(one["viewmats"][..., :3, :3]), torch.ones(6, 3))


def test_any_view_may_be_the_input_only_if_allowed() -> None:
    data = blobs()
    for any_input in (False, True):
        task = DecoderTask(data, TINY, batch_size=32, any_input=any_input, augment=False)
        picked = task.batch(0, draws(1))["viewmats"][:, 0]
        known = (picked[:, None] == data.inputs.cameras.viewmats).flatten(2).all(dim=2).any(dim=1)
        assert known.all() != any_input
    with pytest.raises(ValueError, match="batch_size"):
        DecoderTask(data, TINY, batch_size=0)


@pytest.mark.parametrize("config", [TINY, TINY_PATCH])
def test_geometry_stays_in_float32_under_autocast(config: DecoderConfig) -> None:
    """In bfloat16 a camera matrix is off by a pixel or more."""
    inputs = pictures(32, depth=True)
    task = DecoderTask(blobs(), config, batch_size=2, augment=False)
    batch, found = task.batch(0, draws()), []
    for enabled in (False, True):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = task.loss(batch, generator=draws())["loss"]
            found.append((loss, task.model(inputs).validate()))
    (exact_loss, exact), (mixed_loss, mixed) = found
    assert mixed.means.dtype == mixed.colors.dtype == torch.float32
    close(mixed.means, exact.means, atol=5e-3, rtol=0)
    if config.kind == "pixel":  # whose fresh network gives zeros
        close(mixed_loss, exact_loss, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("config", [TINY, TINY_PATCH])
def test_a_few_steps_lower_the_loss(config: DecoderConfig) -> None:
    torch.manual_seed(0)
    task = DecoderTask(blobs(), config, batch_size=2, target_views=2, augment=False)
    optimiser, generator = torch.optim.Adam(task.model.parameters(), lr=5e-3), draws()
    before = task.validation(task.model)
    for step in range(16):
        terms = task.loss(task.batch(step, generator), generator=generator)
        optimiser.zero_grad()
        terms["loss"].backward()
        optimiser.step()
    after = task.validation(task.model)
    assert after["loss"] < 0.8 * before["loss"]
    assert np.isfinite(list(after.values())).all()
    if config.kind == "pixel":
        assert after["psnr_novel"] > max(before["psnr_novel"] + 1, after["psnr_copy"])
    else:
        assert "psnr_novel" not in after  # the original looks at its input view alone
        assert "predicted_depth" in terms
    assert all(p.grad is None or p.grad.isfinite().all() for p in task.model.parameters())
    picture = task.preview(task.model)
    assert picture.dtype == np.uint8 and picture.ndim == 3 and picture.shape[2] == 3


def test_pivots_away_from_the_origin_make_no_difference() -> None:
    data, move = blobs(), torch.eye(4)
    move[:3, 3] = torch.tensor([5.0, -2.0, 1.0])  # the same cameras in a world that is shifted
    moved = replace(
        data,
        inputs=replace(data.inputs, cameras=data.inputs.cameras.transformed(move)),
        cameras=data.cameras.transformed(move),
        pivots=move[:3, 3].expand(2, 3),
    )
    here, there = (DecoderTask(d, TINY, batch_size=2).batch(0, draws()) for d in (data, moved))
    close(here["viewmats"], there["viewmats"], atol=1e-5, rtol=0)


def test_at_any_size_gaussians_are_drawn_as_large_as_they_were_trained() -> None:
    """A wall of twenty-four by twenty-four Gaussians, much smaller than a pixel."""
    grid = torch.linspace(-0.4, 0.4, 24)
    means = torch.cartesian_prod(grid, grid, torch.zeros(1))[None]
    wall, camera = gaussians_of(means, 2e-3, 0.99, 0), standard([0.0], [0.0], 64).reshape(1, 1)
    native = render(wall, camera)
    close(render_small(wall, camera, render_size=64).rgb, native.rgb)
    for size in (16, 24, 48, 96, 192):
        drawn = render_small(wall, camera.resized(size, size), render_size=64)
        assert drawn.alpha.shape[2:4] == (size, size)
        assert drawn.alpha.mean() == pytest.approx(native.alpha.mean().item(), rel=0.03)


def test_a_decoder_is_drawn_at_the_size_it_was_trained_at() -> None:
    data = blobs(size=24)
    model = DecoderTask(data, TINY, batch_size=2).model
    assert model.render_size == 24
    seen = predictor(model)(data.inputs, data.cameras)
    close(seen.rgb, render(prune(model.world(data.inputs)), data.cameras).rgb)


def test_averaged_down_depth_is_of_what_is_covered() -> None:
    data = blobs(size=60)
    scene = Decoder(TINY).world(data.inputs).detach()
    for size in (15, 30):
        views = render_small(scene, data.cameras.resized(size, size), render_size=60)
        covered = views.alpha > 0.3
        assert covered.any()
        assert (views.depth[covered] > 1.2).all() and (views.depth[covered] < 3.2).all()
