import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, max_pool2d
from torch.utils._python_dispatch import TorchDispatchMode

from fresnel.data.dataset import InputImages, ViewTensors
from fresnel.evaluation import perceptual
from fresnel.models import cvs
from fresnel.models.cvs import (
    CVS,
    CVSConfig,
    condition_tensors,
    predictor,
    rgba,
    sample,
    sampling_sigmas,
)
from fresnel.render import Views
from fresnel.scene.cameras import Cameras, standard_orbit
from fresnel.study import arms, results
from fresnel.training.cvs_task import CVSTask, mirror
from fresnel.training.losses import (
    cell_error,
    consistency_loss,
    ect_earlier,
    ect_stage,
    edge_error,
    grown,
    light_error,
    original_loss,
    pixel_weights,
)

SIZE = 16
close = torch.testing.assert_close


def cameras(azimuth_deg: Any, elevation_deg: float = 10.0) -> Cameras:
    return standard_orbit(torch.as_tensor(azimuth_deg), elevation_deg, SIZE)


def disc(centre_x: Tensor) -> tuple[Tensor, Tensor]:
    """Shaded discs at columns (...,): uint8 rgb over black (..., H, W, 3), alpha (..., H, W)."""
    grid = (torch.arange(SIZE) + 0.5) / SIZE * 2 - 1
    dx = grid - centre_x[..., None, None]
    alpha = ((dx**2 + grid[:, None] ** 2) < 0.3).float().expand(*centre_x.shape, SIZE, SIZE)
    rgb = alpha[..., None] * torch.stack([0.6 + 0 * dx, 0.5 + 0.4 * dx, 0.7 - 0.3 * dx], -1)
    return (rgb.clamp(0, 1) * 255).byte(), (alpha * 255).byte()


def views(objects: int = 2, per_object: int = 4, depth: bool = False) -> ViewTensors:
    azimuths = torch.arange(per_object) * 360.0 / per_object
    rgb, alpha = disc(0.4 * torch.sin(torch.deg2rad(azimuths)) * torch.ones(objects, 1))
    names = tuple(f"object_{i}" for i in range(objects))
    inputs = InputImages(names, *disc(torch.zeros(objects)), cameras(torch.zeros(objects)))
    truth = alpha.float() / 255 * 2 if depth else None
    targets = cameras(azimuths.expand(objects, -1))
    return ViewTensors(names, inputs, rgb, alpha, targets, torch.zeros(objects, 3), truth)


def condition(inputs: InputImages, there: Cameras, pivots: Tensor) -> Tensor:
    return condition_tensors(rgba(inputs.rgb, inputs.alpha), inputs.cameras, there, pivots)


def model(**changes: Any) -> CVS:
    torch.manual_seed(0)
    net = CVS(CVSConfig.preset("tiny", **changes))
    torch.nn.init.normal_(net.unet.head.weight, std=0.1)  # the head starts at zero
    return net


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch_of(net: CVS, **options: Any) -> dict:
    return CVSTask(net, views(), batch_size=4, **options).batch(0, generator())


def loss_of(net: CVS, batch: dict, progress: float, seed: int = 0) -> dict[str, Tensor]:
    tensors = batch["target"], batch["cond"], batch["weights"]
    return consistency_loss(net, *tensors, progress=progress, generator=generator(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_boundary_condition_holds_bit_for_bit(dtype: torch.dtype) -> None:
    net = model()
    x = torch.randn(3, 4, SIZE, SIZE, generator=generator(), dtype=dtype)
    sigma = torch.full((3,), net.config.sigma_min, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
        out = net.to(dtype)(x, sigma, torch.zeros(3, 16, 16, 16, dtype=dtype))
    assert torch.equal(out, x)


@pytest.mark.parametrize("sigma", [0.002, 0.5, 80.0])
def test_the_network_sees_noise_and_image_at_unit_scale(sigma: float) -> None:
    """c_in: whatever the level, what comes in has the variance of the data at level 0, scaled."""
    net, seen = model(), []
    net.unet.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    clean = 0.5 * torch.randn(8, 4, SIZE, SIZE, generator=generator())  # sigma_data
    noisy = clean + sigma * torch.randn(clean.shape, generator=generator(1))
    net(noisy, torch.full((8,), sigma), torch.zeros(8, 16, SIZE, SIZE))
    assert seen[0][:, :4].std() == pytest.approx(1.0, rel=0.03)


def test_scalings_follow_the_paper() -> None:
    skip, out = model().scalings(torch.tensor(0.7, dtype=torch.float64))
    assert skip.item() == pytest.approx(0.25 / (0.698**2 + 0.25))
    assert out.item() == pytest.approx(0.5 * 0.698 / math.sqrt(0.49 + 0.25))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"loss_weight": "depth"}, "loss_weight: got 'depth'"),
        ({"parameterisation": "velocity"}, "parameterisation: got 'velocity'"),
        ({"sigma_min": 90.0}, "want 0 < sigma_min < sigma_max"),
        ({"foreground_share": 1.5}, "foreground_share: got 1.5"),
        ({"ect_stages": 0}, "ect_stages"),
        ({"ect_q": 1.0}, "ect_q"),
        ({"render_twin": True}, "render_twin: got True, want render_condition=True too"),
        ({"parameterisation": "original", "render_condition": True}, "adds to a render"),
        ({"name": "huge"}, "preset: got 'huge'"),
    ],
)
def test_nonsense_is_refused(bad: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CVSConfig.preset(**{"name": "tiny", **bad})


@pytest.mark.parametrize(
    ("name", "smallest", "largest", "gflop"),
    [
        *[("base", 20e6, 26e6, 400 / 3), ("large", 50e6, 90e6, 150 / 3)],
        *[("compact", 2.7e6, 2.9e6, 1.65), ("sharp", 4.4e6, 4.7e6, 4.3)],
    ],
)
def test_presets_have_the_size_they_state(
    name: str, smallest: float, largest: float, gflop: float
) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        net = CVS(CVSConfig.preset(name))
        side = net.config.image_size
        net(torch.zeros(1, 4, side, side), torch.ones(1), torch.zeros(1, 16, side, side))
    assert smallest < sum(p.numel() for p in net.parameters()) < largest
    assert counter.get_total_flops() <= gflop * 1e9


def test_what_ships_denoises_and_takes_sharp_steps_and_other_losses_keep_their_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(perceptual, "distance", lambda device: None)  # its weights are an extra
    monkeypatch.setitem(cvs._PRESETS, "compact", cvs._PRESETS["compact"] | {"base_channels": 8})
    data = views(2, 2)

    def config(model: str, parameterisation: str, objective: str = "") -> CVSConfig:
        made = {"parameterisation": parameterisation, "seed": 0, "renderer": drawn}
        made["objective"] = objective
        return arms.make_task(model, "compact", data, **made).model.config

    def drawn(inputs: Any, cameras: Any) -> Views:
        rgb = torch.zeros(*cameras.batch_shape, cameras.height, cameras.width, 3)
        return Views(rgb, rgb[..., :1], rgb[..., :1])

    assert config("cvs", "consistency").objective == "sharp"
    assert not config("cvs", "consistency").render_mask, "there is no render to weigh"
    assert config("cvs-warp", "consistency").render_mask
    assert [config("cvs", p).objective for p in ("original", "regression")] == ["consistency"] * 2
    assert config("cvs", "consistency", "consistency").objective == "consistency"
    assert config("cvs", "consistency", "diffusion").ect_stages == 1
    assert config("cvs-warp", "consistency", "adversarial").adversarial_weight > 0
    with pytest.raises(ValueError, match="objective: got 'gan'"):
        config("cvs", "consistency", "gan")


def test_training_can_start_from_other_weights() -> None:
    source = model()
    cond = torch.randn(2, 16, 16, 16)
    x, sigma = 80.0 * torch.randn(2, 4, 16, 16), torch.full((2,), 80.0)
    # the original has no skip connection: c_skip x is 0.003 of the noise
    for kind, tolerance in (("consistency", 0.0), ("original", 0.02)):
        network = CVS(dataclasses.replace(source.config, parameterisation=kind))
        assert network.origin == "random"
        network.start_from(source)
        assert network.origin.startswith("sha256:")
        assert torch.allclose(network(x, sigma, cond), source(x, sigma, cond), 0.0, tolerance)
    with pytest.raises(ValueError, match="base_channels 8; want 16"):
        CVS(CVSConfig.preset("tiny", base_channels=16)).start_from(source)


def test_ect_ratio_follows_the_schedule() -> None:
    config = CVSConfig()
    t = torch.tensor([0.004, 0.3, 2.0, 80.0], dtype=torch.float64)
    assert ect_earlier(t, 0, config).eq(config.sigma_min).all()  # stage 0: plain denoising
    for stage in (1, 4, 11):
        n = 1 + 8 / (1 + t.exp())
        close(ect_earlier(t, stage, config), (t * (1 - n / 2**stage)).clamp(min=config.sigma_min))
        assert (ect_earlier(t, stage, config) < t).all()


def test_ect_stages_share_the_run_as_stated() -> None:
    config = CVSConfig(ect_stages=4, denoising_share=0.25)
    assert [ect_stage(p, config) for p in (0, 0.24, 0.25, 0.5, 0.99, 1.0)] == [0, 0, 1, 2, 3, 3]
    assert ect_stage(1.0, CVSConfig(ect_stages=1)) == 0
    assert ect_stage(0.99, CVSConfig(denoising_share=1.0)) == 0


def test_stage_zero_loss_is_weighted_denoising_and_needs_one_pass() -> None:
    net = model(sigma_max_fraction=1.0, light_weight=0.0)
    batch, passes = batch_of(net), []
    net.register_forward_hook(lambda _module, _args, out: passes.append(out.detach()))
    got = loss_of(net, batch, 0.0, seed=1)
    assert len(passes) == 1
    # The same draws by hand: levels (unused: every sample is at sigma_max), who is, the noise.
    g, target = generator(1), batch["target"]
    torch.randn(4, generator=g), torch.rand(4, generator=g)
    clean = target + 0.002 * torch.randn(target.shape, generator=g)
    rms = (batch["weights"] * (passes[0] - clean).square()).mean(dim=(1, 2, 3))
    expected = (((rms + 0.01**2).sqrt() - 0.01) / net.scalings(torch.tensor(80.0))[1]).mean()
    close(got["loss"].detach(), expected)
    close(got["one_step_rms"], got["x0_rms"])


def test_later_stages_compare_two_passes_without_gradient_through_the_second() -> None:
    net, grads = model(sigma_max_fraction=0.0, p_mean=0.0), []
    net.register_forward_hook(lambda _module, _args, out: grads.append(out.requires_grad))
    loss_of(net, batch_of(net), 1.0)["loss"].backward()
    assert grads == [True, False]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


def test_anchored_samples_are_compared_with_the_clean_view_in_every_stage() -> None:
    net = model(sigma_max_fraction=1.0)
    batch = batch_of(net)
    assert loss_of(net, batch, 0.0)["loss"] == loss_of(net, batch, 1.0)["loss"]


def test_original_loss_weighs_consistency_by_thirds() -> None:
    net, ema = (model(parameterisation="original") for _ in range(2))
    batch = batch_of(net)
    given = net, ema, batch["target"], batch["cond"], batch["weights"]
    for progress, w in ((0.0, 0.1), (0.5, 0.3), (1.0, 1.0)):
        terms = original_loss(*given, progress=progress, generator=generator())
        close(terms["loss"], terms["l1"] + w * terms["consistency"])


def test_alpha_aware_weights_give_the_foreground_its_share() -> None:
    target = rgba(*disc(torch.tensor([0.0, 0.3])))
    weights = pixel_weights(CVSConfig(foreground_share=0.6), target)
    alpha = (target[:, 3:] + 1) / 2
    close(weights.mean(dim=(1, 2, 3)), torch.ones(2))
    near = max_pool2d(alpha, 5, stride=1, padding=2)  # 16 px: 2 px of margin
    share = (weights * near).sum(dim=(1, 2, 3)) / weights.sum(dim=(1, 2, 3))
    close(share, torch.full((2,), 0.6))
    black = torch.full((1, 4, SIZE, SIZE), -1.0)  # nothing there: every pixel counts the same
    close(pixel_weights(CVSConfig(), black), torch.ones(1, 1, SIZE, SIZE))


def test_grown_is_a_max_pool() -> None:
    image = torch.rand(2, 1, 16, 16, generator=generator())
    for margin in (0, 1, 2, 7):
        assert torch.equal(grown(image, margin), max_pool2d(image, 2 * margin + 1, 1, margin))


def test_depth_laplacian_mask_is_highest_on_the_empty_background() -> None:
    depth = torch.zeros(1, SIZE, SIZE)
    depth[:, 4:8, 4:8] = 2.0
    config = CVSConfig(loss_weight="depth_laplacian")
    weights = pixel_weights(config, torch.zeros(1, 4, SIZE, SIZE), depth)
    assert weights.max() == weights[0, 0, 0, 0] == pytest.approx(1 / (1 + math.exp(-1)))  # 0.73
    assert weights[0, 0, 4, 4].item() < 1e-6
    with pytest.raises(ValueError, match="no depth"):
        CVSTask(model(loss_weight="depth_laplacian"), views())
    CVSTask(model(loss_weight="depth_laplacian"), views(depth=True)).batch(0, generator())


def test_light_error_sees_what_a_blur_loses_in_whole_regions() -> None:
    target = torch.full((1, 4, 32, 32), -1.0)
    target[..., 8:24, 8:24] = 1.0
    assert light_error(target, target) == 0
    assert light_error(avg_pool2d(target, 9, 1, 4, count_include_pad=False), target) > 0.1
    # Half the light everywhere (sRGB 0.735 is linear 0.5) is half the error of none at all.
    dimmed = torch.where(target > 0, 2 * 0.7353569 - 1, -1.0)
    halves, dark = light_error(dimmed, target), light_error(torch.full_like(target, -1.0), target)
    close(2 * halves, dark, rtol=1e-4, atol=0)
    odd = 2 * torch.rand(2, 4, 20, 25, generator=generator()) - 1
    beyond = odd.clone()
    beyond[..., 18:, :] = beyond[..., 24:] = 1.0  # regions of 3 x 3: 6 x 8 of them
    assert (light_error(beyond, odd) == 0).all()
    beyond[..., 17, 0] = -odd[..., 17, 0]
    assert (light_error(beyond, odd) > 0).all()


def test_edge_error_sees_a_blur_and_too_much_alike_and_not_where_an_edge_lies() -> None:
    blocks = torch.rand(1, 4, 16, 16, generator=generator()).repeat_interleave(4, -1)
    texture = blocks.repeat_interleave(4, -2) * 2 - 1  # edges at every scale
    assert edge_error(texture, texture) == 0
    assert edge_error(texture.roll(1, -1), texture) < 0.1, "as many edges elsewhere"
    faint = texture * 0.5 - 0.5  # half the contrast: half the difference of neighbours
    assert float(edge_error(faint, texture)) == pytest.approx(0.5, abs=0.02)
    assert float(edge_error(texture, faint)) == pytest.approx(1.0, abs=0.04), "twice as much"
    empty = torch.full_like(texture, -1.0)
    assert edge_error(empty, empty) == 0
    assert float(edge_error(empty, texture)) == pytest.approx(1.0, abs=0.02)
    board = empty.clone()
    board[..., ::2, 1::2] = board[..., 1::2, ::2] = 1.0
    theirs, ours = (sum(x.diff(dim=d).square().sum() for d in (-1, -2)) for x in (texture, board))
    board = (board + 1) * (theirs / ours).sqrt() - 1  # pixels differ as much as the texture's
    assert edge_error(board, texture) > 0.8, "a checkerboard in place of edges"
    drawn = empty.clone().requires_grad_()
    edge_error(drawn, texture).sum().backward()
    assert drawn.grad is not None and drawn.grad.isfinite().all(), "where there is nothing yet"


def test_cell_error_sees_steps_at_every_second_pixel_and_no_edge_of_a_picture() -> None:
    fine = torch.rand(2, 4, 64, 64, generator=generator()) * 2 - 1
    smooth = avg_pool2d(fine, 5, stride=1, padding=2)
    cells = avg_pool2d(fine, 2).repeat_interleave(2, -1).repeat_interleave(2, -2)
    for picture in (fine, smooth, fine.roll(1, -1), torch.full_like(fine, -1.0)):
        assert (cell_error(picture, fine) == 0).all()
    assert (cell_error(cells, fine) > 0.35).all(), "half of all, where it should be none"
    assert (cell_error(cells.roll((1, 1), (-1, -2)), fine) > 0.35).all()
    assert edge_error(cells, cells.roll((1, 1), (-1, -2))).max() < 0.1, "which sees no cells"
    moved = cells.clone().requires_grad_()
    cell_error(moved, fine).sum().backward()
    assert moved.grad is not None and moved.grad.isfinite().all() and moved.grad.any()


def test_the_loss_of_a_network_that_has_learned_nothing() -> None:
    tasks = [CVSTask(CVS(CVSConfig.preset("tiny")), views(2, 2), batch_size=4) for _ in range(2)]
    fresh, trained = tasks
    torch.nn.init.ones_(trained.model.unet.head.weight)
    at_first = results.untrained_loss(fresh, 3)
    assert at_first == results.untrained_loss(trained, 3)
    draws = generator(3)
    batch = fresh.batch(0, draws)
    loss = fresh.loss(batch, progress=0.0, generator=draws, ema=fresh.model)["loss"].detach()
    assert results.untrained_loss(fresh, 3, batches=1) == pytest.approx(float(loss))
    fall = results.loss_fall([{"loss": 0.2}, {"loss": 0.1}], at_first)
    assert fall == pytest.approx(at_first / 0.1)


class HostRoundTrips(TorchDispatchMode):
    """Operators that make a GPU's queue run empty: values brought from the host, or to it."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func.overloadpacket)
        if name.split(".")[-1] in ("_local_scalar_dense", "nonzero", "lift_fresh", "is_nonzero"):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def test_a_step_has_no_round_trip_to_the_host() -> None:
    task = CVSTask(
        model(),
        views(),
        batch_size=2,
        any_input=True,
        mirror=True,
        colour_jitter=0.3,
        recolour=True,
    )
    with HostRoundTrips() as trips:
        batch = task.batch(0, generator())
        task.loss(batch, progress=0.0, generator=generator(), ema=None)["loss"].backward()
    assert trips.found == []
    with HostRoundTrips() as trips:
        batch["target"].new_tensor([1.0, 2.0]).sum().item()
    assert len(trips.found) == 2


def test_half_of_the_things_have_their_channels_in_another_order() -> None:
    task = CVSTask(model(), views(), batch_size=600, recolour=True)
    batch = task.batch(0, generator())
    plain = CVSTask(model(), views(), batch_size=600).batch(0, generator())
    assert torch.equal(batch["record"], plain["record"]), "the same pairs"
    orders = torch.tensor(list(itertools.permutations(range(3))))
    ways = torch.stack([plain["target"][:, [*order, 3]] for order in orders.tolist()], dim=1)
    same = (ways == batch["target"][:, None]).flatten(2).all(2)
    assert same.any(1).all()
    share = same.float().mean(0).tolist()
    assert (
        abs(share[0] - (0.5 + 0.5 / 6)) < 0.08 and max(abs(s - 0.5 / 6) for s in share[1:]) < 0.05
    )
    chosen = orders[same.float().argmax(1)]
    cond = plain["cond"][:, :3].gather(1, chosen[:, :, None, None].expand(-1, -1, SIZE, SIZE))
    assert torch.equal(batch["cond"][:, :3], cond) and torch.equal(
        batch["cond"][:, 3:], plain["cond"][:, 3:]
    )


def test_condition_holds_the_image_and_both_cameras_rays() -> None:
    data = views(per_object=3)
    cond = condition(data.inputs, data.cameras, data.pivots)
    assert cond.shape == (2 * 3, 16, SIZE, SIZE)
    close(cond[4, :4], rgba(data.inputs.rgb, data.inputs.alpha)[1])
    close(cond[0, 4:10], cond[0, 10:])  # view 0 is the input camera
    # Rays of a camera at the pivot's height have their moment perpendicular to their direction.
    d, m = cond[:, 10:13], cond[:, 13:16]
    close((d * m).sum(1), torch.zeros_like(d[:, 0]), atol=1e-5, rtol=0)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(condition(data.inputs, data.cameras, data.pivots), cond)


def test_condition_does_not_see_where_the_world_is_nor_its_yaw() -> None:
    data, angle, motion = views(), torch.tensor(0.7), torch.eye(4)
    motion[0, 0] = motion[2, 2] = angle.cos()
    motion[0, 2], motion[2, 0] = angle.sin(), -angle.sin()
    motion[:3, 3] = torch.tensor([3.0, -1.0, 2.0])
    inputs = dataclasses.replace(data.inputs, cameras=data.inputs.cameras.transformed(motion))
    moved = condition(inputs, data.cameras.transformed(motion), data.pivots + motion[:3, 3])
    close(moved, condition(data.inputs, data.cameras, data.pivots), atol=1e-5, rtol=1e-5)


def test_mirrored_condition_is_the_condition_of_the_mirrored_camera() -> None:
    data = views(objects=1)
    there, mirrored = (cameras([[a, -b]], 30.0) for a, b in ((25.0, 80.0), (-25.0, -80.0)))
    inputs = dataclasses.replace(  # the disc's shading is not symmetric
        data.inputs, rgb=data.inputs.rgb.flip(2), alpha=data.inputs.alpha.flip(2)
    )
    expected = condition(inputs, mirrored, data.pivots)
    cond = condition(data.inputs, there, data.pivots)
    got, target = mirror(cond, cond[:, :4])
    close(got, expected, atol=1e-5, rtol=1e-5)
    close(target, expected[:, :4])


def test_sizes_that_disagree_are_refused() -> None:
    data = views()
    with pytest.raises(ValueError, match="want the input image's 16 x 16"):
        condition(data.inputs, data.cameras.resized(8, 8), data.pivots)
    with pytest.raises(ValueError, match="image_size 32"):
        CVSTask(model(image_size=32), data)


def test_batches_follow_from_the_generator_and_augmentation_keeps_pairs_together() -> None:
    task = CVSTask(model(), views(), batch_size=6, any_input=True, mirror=True, colour_jitter=0.3)
    first, again, other = (task.batch(3, generator(seed)) for seed in (5, 5, 6))
    for key in ("cond", "target", "weights"):
        assert torch.equal(first[key], again[key]) and not torch.equal(first[key], other[key])
        assert first[key].isfinite().all()
    premultiplied = (first["target"][:, :3] <= first["target"][:, 3:] + 1e-6).all()
    assert premultiplied and first["target"].abs().max() <= 1


def test_any_input_takes_views_of_the_same_object() -> None:
    data = views(objects=1)
    conds = CVSTask(model(), data, batch_size=64, any_input=True).batch(0, generator())["cond"]
    known = torch.cat([rgba(data.inputs.rgb, data.inputs.alpha), rgba(data.rgb, data.alpha)[0]])
    distance = (conds[:, None, :4] - known).abs().amax(dim=(2, 3, 4))
    assert (distance.min(dim=1).values == 0).all()
    assert len(set(distance.argmin(dim=1).tolist())) > 2


def test_overfitting_one_batch_learns_the_views_in_one_step() -> None:
    torch.manual_seed(0)
    net = CVS(CVSConfig.preset("tiny", base_channels=16))
    task, losses = CVSTask(net, views(objects=1), batch_size=4), []
    before = task.validation(net)
    optimizer = torch.optim.AdamW(net.parameters(), lr=5e-3)
    for step in range(70):
        g = generator(step)
        terms = task.loss(task.batch(step, g), progress=step / 70, generator=g, ema=net)
        optimizer.zero_grad()
        terms["loss"].backward()
        optimizer.step()
        losses.append(terms["one_step_rms"].item())
    after = task.validation(net)
    assert after["psnr"] > before["psnr"] + 5 and after["psnr"] > 16
    assert after["loss"] < 0.5 * before["loss"]
    assert 0.7 < after["coverage_ratio"] < 1.3 and 0.7 < after["luminance_ratio"] < 1.3
    assert sum(losses[-10:]) < 0.6 * sum(losses[:10])


def test_sampling_schedule() -> None:
    config = CVSConfig()
    assert sampling_sigmas(1, config) == pytest.approx((80.0,))
    assert sampling_sigmas(2, config) == pytest.approx((80.0, 2.51), rel=0.01)
    levels = sampling_sigmas(4, config)
    assert list(levels) == sorted(levels, reverse=True) and min(levels) > config.sigma_min
    with pytest.raises(ValueError, match="steps: got 0"):
        sampling_sigmas(0, config)
    sharp = CVSConfig.preset("sharp")
    assert sampling_sigmas(1, sharp) == pytest.approx((80.0,))
    assert sampling_sigmas(4, sharp) == pytest.approx((80.0, 26.8, 8.96, 3.0), rel=0.01)
    assert min(sampling_sigmas(4, sharp)) > sharp.one_step_from, "below it squared errors blur"


def test_every_further_step_starts_from_what_was_made_and_fresh_noise_of_its_level() -> None:
    """Algorithm 1: x + sqrt(sigma^2 - sigma_min^2) z, so the variance at the next level is its."""
    asked: list[tuple[Tensor, float]] = []
    net = model()

    def fixed(x: Tensor, sigma: Tensor, cond: Tensor) -> Tensor:
        asked.append((x, float(sigma[0])))
        return torch.full_like(x, 0.25)

    net.forward = fixed  # type: ignore[method-assign]
    sample(net, torch.zeros(16, 16, 32, 32), steps=4, generator=generator())
    assert [level for _, level in asked] == pytest.approx(sampling_sigmas(4, net.config))
    assert asked[0][0].std() == pytest.approx(80.0, rel=0.02)
    for (x, level), (before, last) in zip(asked[1:], asked, strict=False):
        assert x.mean() == pytest.approx(0.25, abs=4 * level / 256)
        assert x.std() == pytest.approx(math.sqrt(level**2 - 0.002**2), rel=0.02)
        noise, old = (x - 0.25) / level, before / last
        assert (noise * old).mean().abs() < 0.02, "no noise is used twice"


def test_a_diffusion_model_is_sampled_along_the_probability_flow() -> None:
    """Of a Gaussian, N(m, d^2), the best denoiser is linear and the flow known in closed form:
    from x at sigma to (x - m) sqrt(d^2 / (sigma^2 + d^2)) + m (EDM, appendix B)."""
    mean, spread = -0.25, 0.1
    net, levels = model(objective="diffusion"), []

    def best(x: Tensor, sigma: Tensor, cond: Tensor) -> Tensor:
        levels.append(float(sigma[0]))
        return mean + (x - mean) * spread**2 / (spread**2 + sigma[0] ** 2)

    net.forward = best  # type: ignore[method-assign]
    cond = torch.zeros(8, 16, 32, 32)
    made = sample(net, cond, steps=200, generator=generator())
    assert levels == pytest.approx(sampling_sigmas(200, net.config))
    alpha = made[:, 3]  # colours are cut at alpha
    assert alpha.mean() == pytest.approx(mean, abs=0.01)
    assert alpha.std() == pytest.approx(spread, rel=0.1), "noise once drawn is not drawn again"
    again = sample(net, cond, steps=1, generator=generator())[:, 3]
    assert again.std() < 0.01 * spread, "one step gives the mean"


def test_predictor_gives_views_that_do_not_depend_on_the_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    net, data, sizes = model(), views(objects=3), []
    predict = predictor(net, steps=2, seed=4)
    found = predict(data.inputs, data.cameras)
    assert found.rgb.shape == (3, 4, SIZE, SIZE, 3)
    assert found.alpha.shape == found.depth.shape == (3, 4, SIZE, SIZE, 1)
    assert found.depth.eq(0).all() and found.rgb.min() >= 0 and found.rgb.max() <= 1
    other = predictor(net, steps=2, seed=5)(data.inputs, data.cameras)
    assert not torch.equal(found.rgb, other.rgb)
    alone = predict(data.inputs[1:2], data.cameras[1:2])
    close(alone.rgb[0], found.rgb[1], atol=1e-5, rtol=1e-5)
    monkeypatch.setattr(cvs, "MOST_AT_ONCE", 4)
    net.register_forward_pre_hook(lambda _, given: sizes.append(len(given[0])))
    chunked = predict(data.inputs, data.cameras)
    assert set(sizes) == {4}
    close(chunked.rgb, found.rgb, atol=1e-5, rtol=1e-5)


def test_predictor_resizes_and_maps_cameras() -> None:
    net, data, order = model(), views(), [1, 2, 3, 0]
    big = data.cameras.resized(24, 24)
    assert predictor(net)(data.inputs, big).rgb.shape == (2, 4, 24, 24, 3)
    shifted = predictor(net, camera_map=lambda i, c: (i.cameras, c[:, order], data.pivots))
    expected = predictor(net)(data.inputs, data.cameras[:, order])
    close(shifted(data.inputs, data.cameras).rgb, expected.rgb)
