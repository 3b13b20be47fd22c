"""The decoder's render as a condition: what is encoded, what training and sampling see of it."""

import pytest
import torch
from test_cvs import SIZE, generator, views

from fresnel.data.dataset import InputImages
from fresnel.models import Predictor
from fresnel.models import condition as rendered
from fresnel.models.cvs import CVS, LEFT_OUT, CVSConfig, predictor
from fresnel.render import Views
from fresnel.scene.cameras import Cameras, standard_orbit
from fresnel.study import arms
from fresnel.training.cvs_task import CVSTask, mirror


def truth_renderer(depth: float = 2.0) -> Predictor:
    """Stands for a decoder without fault: the true view of whatever camera is asked for."""
    data = views()
    known = {tuple(row.flatten().tolist()): i for i, row in enumerate(data.cameras.viewmats[0])}

    def render(inputs: InputImages, cameras: Cameras) -> Views:
        order = [[known[tuple(m.flatten().tolist())] for m in row] for row in cameras.viewmats]
        rows = [data.names.index(name) for name in inputs.names]
        rgb = torch.stack([data.rgb[r][o] for r, o in zip(rows, order, strict=True)]).float() / 255
        alpha = torch.stack([data.alpha[r][o] for r, o in zip(rows, order, strict=True)])
        alpha = alpha[..., None].float() / 255
        return Views(rgb, alpha, alpha * depth)

    return render


def network(**changes: object) -> CVS:
    torch.manual_seed(0)
    net = CVS(CVSConfig.preset("tiny", render_condition=True, **changes))
    torch.nn.init.normal_(net.unet.head.weight, std=0.1)
    return net


def test_the_condition_holds_colour_alpha_and_depth_behind_the_pivot() -> None:
    data = views(objects=1, per_object=2)
    alpha = torch.zeros(1, 2, SIZE, SIZE, 1)
    alpha[..., :8, :, :] = 1.0
    drawn = Views(alpha * torch.tensor([1.0, 0.5, 0.0]), alpha, alpha * 2.5)
    given = data.inputs, data.cameras, data.pivots
    seen = rendered.seen(lambda inputs, cameras: drawn, *given, twin=False)
    assert seen.shape == (1, 2, rendered.RENDER_CHANNELS, SIZE, SIZE)
    full, empty = seen[0, 0, :, 0, 0], seen[0, 0, :, -1, 0]
    torch.testing.assert_close(full, torch.tensor([1.0, 0.0, -1.0, 1.0, 0.3]))  # orbit radius 2.2
    torch.testing.assert_close(empty, torch.tensor([-1.0, -1.0, -1.0, -1.0, 0.0]))


def ball(radius: float) -> Predictor:
    """Stands for a decoder without fault: a ball about the pivot, coloured by place."""

    def render(inputs: InputImages, cameras: Cameras) -> Views:
        origins, directions = cameras.rays()
        nearest = -(origins * directions).sum(-1, keepdim=True)
        inside = radius**2 - (origins + nearest * directions).square().sum(-1, keepdim=True)
        alpha = (inside > 0).float()
        points = origins + (nearest - inside.clamp_min(0).sqrt()) * directions
        ahead = cameras.forward[..., None, None, :]
        depth = ((points - origins) * ahead).sum(-1, keepdim=True) * alpha
        x, y, z = (points / radius).split(1, dim=-1)
        colours = torch.cat([x.abs(), (y + 1) / 2, (z + 1) / 2], dim=-1)  # left and right alike
        return Views(colours * alpha, alpha, depth)

    return render


@pytest.mark.parametrize("size", [32, 48])  # pictures of the views; the input has 32 pixels
def test_a_warp_is_the_input_where_both_see_the_surface(size: int) -> None:
    there = standard_orbit(torch.tensor([[0.0, 40.0, -40.0, 180.0]]), 0.0, size)
    own = standard_orbit(torch.tensor([0.0]), 0.0, size)
    render, pivots = ball(0.4), torch.zeros(1, 3)
    true = render(None, own[:, None])
    inputs = InputImages(
        ("ball",), (true.rgb[:, 0] * 255).byte(), (true.alpha[:, 0, ..., 0] * 255).byte(), own
    )
    shown = rendered.seen(render, inputs, there, pivots, twin=True, warp=True)
    assert shown.shape == (1, 4, 4 * rendered.RENDER_CHANNELS, size, size)
    splat, warp, other, twin = ((x + 1) / 2 for x in shown[0].unflatten(1, (4, -1)).unbind(1))
    assert torch.equal(splat[:, 3] > 0.5, twin[:, 3] > 0.5)
    for pictures, truth in ((warp, splat), (other, twin)):
        visible, covered = pictures[:, 4], truth[:, 3] > 0.5
        assert not visible[~covered].any() and visible[3][covered[3]].mean() < 0.1, "nor its back"
        assert visible[0][covered[0]].mean() > 0.9, "its own view"
        sure = visible > 0.9
        for view in (0, 1, 2):
            off = (pictures[view, :4] - truth[view, :4]).abs()[:, sure[view]]
            assert off.median() < 0.02 and off.mean() < 0.03, view
    shares = [(warp[k, 4] > 0.9).sum() / (splat[k, 3] > 0.5).sum() for k in range(3)]
    assert 0.5 < shares[1] < 0.8 and abs(shares[1] - shares[2]) < 0.03, "cos 40 degrees, and back"
    # the mirrored input's pixels lie where the object is the same mirrored: swap x, swap views
    torch.testing.assert_close(other[0], warp[0].flip(-1), atol=0.05, rtol=0)


def test_a_warp_is_weighed_by_how_surely_it_is_seen() -> None:
    config = CVSConfig.preset(
        "tiny", render_condition=True, render_twin=True, render_warp=True, render_mask=True
    )
    assert config.condition_channels == 16 + 4 * 5
    cond = torch.rand(1, 36, SIZE, SIZE, generator=generator()) * 2 - 1
    cond[:, 25], cond[:, 30] = 1.0, -1.0  # the first warp is surely right, the second not
    x = torch.randn(1, 4, SIZE, SIZE, generator=generator())
    made = CVS(config)(80 * x, torch.full((1,), 80.0), cond)
    pictures = cond[:, 16:].unflatten(1, (4, 5))[:, :, :4] + 1
    none = torch.tensor(LEFT_OUT).exp()
    want = (pictures[:, 0] + pictures[:, 1] + pictures[:, 3] + 1e-4 * pictures[:, 2]) / (
        3 + 1e-4 + none
    )
    torch.testing.assert_close(made + 1, want, atol=0.02, rtol=0)
    flipped, _ = mirror(cond, cond[:, :4])
    assert torch.equal(flipped[:, 21:26], cond[:, 26:31].flip(-1)), "warps swap as renders do"
    with pytest.raises(ValueError, match="render_warp: got True, want render_twin=True"):
        CVSConfig.preset("tiny", render_condition=True, render_warp=True)


def test_prepared_renders_are_those_of_each_input_in_8_bits() -> None:
    data, asked = views(), []
    render = truth_renderer()

    def spy(inputs: InputImages, cameras: Cameras) -> Views:
        asked.append(inputs.cameras.viewmats.clone())
        return render(inputs, cameras)

    own = rendered.prepared(spy, data, batch=1)
    assert own.shape == (2, 1, 4, 5, SIZE, SIZE) and own.dtype == torch.uint8 and len(asked) == 2
    want = rendered.seen(render, data.inputs, data.cameras, data.pivots, twin=False)
    assert (rendered.restored(own[:, 0]) - want).abs().max() <= 0.5 / 127.5 + 1e-6
    asked.clear()
    every = rendered.prepared(spy, data, any_input=True)
    assert every.shape[1] == 1 + 4 and torch.equal(every[:, :1], own)
    torch.testing.assert_close(asked[3], data.cameras.viewmats[:, 2])  # source 3 is view 2


@pytest.mark.parametrize("any_input", [False, True])
def test_batches_carry_the_render_of_their_own_view(any_input: bool) -> None:
    task = CVSTask(
        network(), views(), batch_size=16, renderer=truth_renderer(), any_input=any_input,
        mirror=True, colour_jitter=0.3, recolour=True,
    )  # fmt: skip
    batch = task.batch(0, generator())
    assert batch["cond"].shape[1] == 21 == task.model.config.condition_channels
    # A faultless render is the target, mirrored, recoloured and tinted with it.
    assert (batch["cond"][:, 16:20] - batch["target"]).abs().max() < 0.02
    terms = task.loss(batch, progress=0.7, generator=generator(), ema=task.model)
    assert terms["loss"].isfinite() and task.validation(task.model)["loss"] > 0
    assert task.preview(task.model, generator()).shape[1] == 4 * SIZE


def test_a_mirror_flips_the_render_and_no_sign() -> None:
    cond = torch.randn(2, 21, 4, 4, generator=generator())
    flipped, _ = mirror(cond, cond[:, :4])
    torch.testing.assert_close(flipped[:, 16:], cond[:, 16:].flip(-1))


def test_the_render_is_asked_for_where_it_is_needed() -> None:
    net, data = network(), views()
    with pytest.raises(ValueError, match="renderer: got None"):
        predictor(net)
    with pytest.raises(ValueError, match="renderer: got None"):
        CVSTask(net, data)
    seen = predictor(net, renderer=truth_renderer())(data.inputs, data.cameras)
    other = predictor(net, renderer=truth_renderer(depth=2.8))(data.inputs, data.cameras)
    assert seen.rgb.shape == (2, 4, SIZE, SIZE, 3)
    assert (seen.rgb - other.rgb).abs().max() > 1e-4, "depth reaches the network"


def test_training_keeps_to_the_chosen_pairs() -> None:
    pairs = torch.tensor([[0, 1], [1, 3], [1, 0]])
    net = CVS(CVSConfig.preset("tiny"))
    batch = CVSTask(net, views(), batch_size=64, pairs=pairs).batch(0, generator())
    drawn = {(int(r), int(v)) for r, v in zip(batch["record"], batch["view"], strict=True)}
    assert drawn == {(0, 1), (1, 3), (1, 0)}


def test_a_refining_network_starts_from_the_render_and_keeps_the_boundary() -> None:
    config = CVSConfig.preset("tiny", render_condition=True)
    fresh, trained = CVS(config), network()
    x = torch.randn(2, 4, SIZE, SIZE, generator=generator())
    cond = torch.rand(2, 21, SIZE, SIZE, generator=generator()) * 2 - 1
    at_max, at_min = (torch.full((2,), s) for s in (config.sigma_max, config.sigma_min))
    render = cond[:, 16:20]
    torch.testing.assert_close(fresh(80 * x, at_max, cond), render, atol=0.02, rtol=0)
    assert (trained(80 * x, at_max, cond) - render).abs().max() > 0.05, "and learns to change it"
    assert torch.equal(trained(x, at_min, cond), x), "D(x, sigma_min) = x"
    with pytest.raises(ValueError, match="adds to a render"):
        CVSConfig.preset("tiny", render_condition=True, parameterisation="original")


def one_sided(inputs: InputImages, cameras: Cameras) -> Views:
    """A renderer whose error knows left from right: a ramp, the same whatever is asked for."""
    ramp = torch.linspace(0, 1, cameras.width).expand(*cameras.batch_shape, cameras.height, -1)
    ramp = ramp[..., None].clone()
    return Views(ramp.expand(*ramp.shape[:-1], 3), ramp, ramp)


def test_the_twin_is_made_of_the_mirrored_input_and_mirrored_back() -> None:
    data, asked = views(), []

    def spy(inputs: InputImages, cameras: Cameras) -> Views:
        asked.append((inputs, cameras))
        return one_sided(inputs, cameras)

    one, other = (
        rendered.seen(spy, data.inputs, data.cameras, data.pivots, twin=True)
        .unflatten(2, (2, rendered.RENDER_CHANNELS))
        .unbind(2)
    )
    assert torch.equal(other[..., :4, :, :], one[..., :4, :, :].flip(-1))
    (plain, there), (flipped, mirrored) = asked
    assert torch.equal(flipped.rgb, plain.rgb.flip(2))
    # a world point and its mirror image are seen in mirrored places
    point = torch.tensor([0.3, 0.2, -0.1, 1.0])
    image = point * torch.tensor([-1.0, 1.0, 1.0, 1.0])
    for cameras, by in ((there, mirrored), (plain.cameras, flipped.cameras)):
        by.validate()
        here = (cameras.Ks @ (cameras.viewmats @ point)[..., :3, None])[..., 0]
        across = (by.Ks @ (by.viewmats @ image)[..., :3, None])[..., 0]
        here, across = here[..., :2] / here[..., 2:], across[..., :2] / across[..., 2:]
        torch.testing.assert_close(across[..., 0], cameras.width - here[..., 0])
        torch.testing.assert_close(across[..., 1], here[..., 1])


def test_a_twin_network_starts_from_the_mean_and_swaps_its_renders_in_the_mirror() -> None:
    config = CVSConfig.preset("tiny", render_condition=True, render_twin=True)
    assert config.condition_channels == 26
    cond = torch.rand(2, 26, SIZE, SIZE, generator=generator()) * 2 - 1
    x = torch.randn(2, 4, SIZE, SIZE, generator=generator())
    mean = (cond[:, 16:20] + cond[:, 21:25]) / 2
    fresh = CVS(config)
    torch.testing.assert_close(fresh(80 * x, torch.full((2,), 80.0), cond), mean, atol=0.02, rtol=0)
    flipped, _ = mirror(cond, cond[:, :4])
    assert torch.equal(flipped[:, 16:21], cond[:, 21:26].flip(-1))
    assert torch.equal(flipped[:, 21:26], cond[:, 16:21].flip(-1))
    with pytest.raises(ValueError, match="render_twin: got True, want render_condition=True"):
        CVSConfig.preset("tiny", render_twin=True)


def test_twin_training_sees_both_renders_tinted_and_sampling_asks_for_both() -> None:
    net, faultless, data = network(render_twin=True), truth_renderer(), views()
    straight = {tuple(m.flatten().tolist()) for m in data.cameras.viewmats.flatten(0, 1)}

    def both(inputs: InputImages, cameras: Cameras) -> Views:
        """The truth, also of the mirrored objects."""
        asked = {tuple(m.flatten().tolist()) for m in cameras.viewmats.flatten(0, 1)}
        if asked <= straight:
            return faultless(inputs, cameras)
        found = faultless(inputs, cameras.mirrored())
        return Views(found.rgb.flip(3), found.alpha.flip(3), found.depth.flip(3))

    task = CVSTask(net, data, batch_size=16, renderer=both, mirror=True, colour_jitter=0.3)
    batch = task.batch(0, generator())
    assert batch["cond"].shape[1] == 26
    for at in (16, 21):
        assert (batch["cond"][:, at : at + 4] - batch["target"]).abs().max() < 0.02
    fresh = predictor(CVS(net.config), renderer=one_sided)(data.inputs, data.cameras)
    assert (fresh.alpha - 0.5).abs().max() < 0.03, "the mean of a ramp and its mirror image"


def test_what_ships_is_a_rival_of_what_started_from_it() -> None:
    data = views(objects=1, per_object=2)

    def rivals(**changes: object) -> dict[str, Predictor]:
        options = {"model": "cvs", "original": False, "initial_weights": "shipped"} | changes
        return arms.rivals(data, device="cpu", **options)

    found = rivals()
    made, own = (
        found[name](data.inputs, data.cameras) for name in ("shipped twin", "decoder render")
    )
    assert made.rgb.shape == own.rgb.shape == (1, 2, SIZE, SIZE, 3)
    assert not torch.equal(made.rgb, own.rgb)
    for changes in ({"initial_weights": ""}, {"original": True}, {"model": "decoder"}):
        assert "shipped twin" not in rivals(**changes)
