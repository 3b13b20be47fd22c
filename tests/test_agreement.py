"""Views of a coloured ball, whose surface and whose hidden half are known."""

import math
from dataclasses import replace

import pytest
import torch
from test_evaluate import tensors
from torch import Tensor

from fresnel.data.images import InputImages
from fresnel.evaluation import agreement, metrics, perceptual
from fresnel.evaluation.agreement import Common
from fresnel.models import Predictor
from fresnel.render import Views
from fresnel.scene.cameras import Cameras, relative_azimuth_deg, standard_orbit

RADIUS, SIZE, COUNT = 0.45, 48, 8


@pytest.fixture(scope="module")
def cameras() -> Cameras:
    """Two rings of eight, (2, 8)."""
    heights = torch.tensor([[10.0, -20, 30, 0, 25, -5, 15, 5], [0.0] * 8])
    ring = torch.arange(COUNT) * 45.0
    return standard_orbit(ring.expand(2, -1), heights, SIZE)


@pytest.fixture(scope="module")
def ball(cameras: Cameras) -> tuple[Views, Tensor]:
    """Its true views, and the outward normals of what they show."""
    origins, toward = cameras.rays()
    along = -(origins * toward).sum(-1)
    inside = RADIUS**2 - (origins.square().sum(-1) - along.square())
    far = along - inside.clamp_min(0).sqrt()
    z = far * (toward * cameras.forward[..., None, None, :]).sum(-1)
    hit = (inside > 0)[..., None].float()
    normals = (origins + far[..., None] * toward) / RADIUS
    rgb = (0.5 + 0.3 * torch.sin(4 * normals)) * hit
    return Views(rgb, hit, z[..., None] * hit), normals


def common(views: Views, cameras: Cameras) -> Common:
    return Common.of(cameras, views.depth[..., 0], views.alpha[..., 0])


def test_true_views_agree_and_others_do_not(ball: tuple[Views, Tensor], cameras: Cameras) -> None:
    views, _ = ball
    floor = agreement.disagreement(views, cameras)
    torch.testing.assert_close(floor, agreement.disagreement(views, cameras, views.depth[..., 0]))
    assert floor.shape == (2, COUNT) and float(floor.max()) < 0.5
    drawn = torch.Generator().manual_seed(0)
    noise = 0.1 * torch.randn(views.rgb.shape, generator=drawn)
    noisy = agreement.disagreement(replace(views, rgb=views.rgb + noise), cameras)
    assert float(noisy.min()) > 10
    still = replace(views, rgb=views.rgb[:, :1].expand_as(views.rgb))  # one view for all
    assert float(agreement.disagreement(still, cameras).min()) > 10
    empty = replace(views, alpha=torch.zeros_like(views.alpha))
    assert agreement.disagreement(empty, cameras).isnan().all()


def test_what_is_in_common_is_what_both_cameras_see(
    ball: tuple[Views, Tensor], cameras: Cameras
) -> None:
    views, normals = ball
    found = common(views, cameras)
    for m in range(2):
        for v in range(COUNT):
            assert sorted((found.others[m, v] - v) % COUNT) == [1, COUNT - 1]
            for n, other in enumerate(found.others[m, v].tolist()):
                to_other = cameras.centers[m, other] - RADIUS * normals[m, v]
                slant = (to_other * normals[m, v]).sum(-1) / to_other.norm(dim=-1)
                slant[views.alpha[m, v, ..., 0] == 0] = -1
                both = found.both[m, v, n]
                assert float(slant[both].min()) > 0  # nothing that is hidden from it
                assert float(both[slant > 0.75].float().mean()) > 0.98


@pytest.mark.parametrize("factor", [0.8, 1.2])
def test_a_surface_that_is_not_there_is_not_in_common(
    ball: tuple[Views, Tensor], cameras: Cameras, factor: float
) -> None:
    """One view's depth is wrong by a fifth: nearly nothing of it is compared."""
    views, _ = ball
    depth = views.depth.clone()
    depth[:, 3] *= factor
    found = common(replace(views, depth=depth), cameras)
    share = found.both.float().mean(dim=(2, 3, 4)) / common(views, cameras).both.float().mean()
    assert float(share[:, 3].max()) < 0.2 and float(share[:, 4].max()) < 0.75
    assert float(share[:, 0].min()) > 0.8


def test_light_and_a_shift_of_one_view_count_as_much_as_they_change(
    ball: tuple[Views, Tensor], cameras: Cameras
) -> None:
    views, _ = ball
    found, picture = common(views, cameras), agreement.white(views)
    lighter = picture.clone()
    lighter[:, 2] += 0.1
    off = found.disagreement(lighter) - found.disagreement(picture)
    assert off[:, 2].tolist() == pytest.approx([25.5, 25.5], abs=0.5)  # a tenth of 255
    for beside in (1, 3):  # one of the two neighbours that each has
        shared = found.both[:, beside].float().mean(dim=(2, 3))
        share = (shared * (found.others[:, beside] == 2)).sum(-1) / shared.sum(-1)
        assert off[:, beside].tolist() == pytest.approx((25.5 * share).tolist(), abs=0.5)
    assert float(off[:, 5:].abs().max()) < 1e-4
    moved = picture.clone()
    moved[:, 2] = picture[:, 2].roll(2, dims=2)
    change = (moved - picture)[:, 2, None].abs().mean(-1)
    both = found.both[:, 2]
    want = 255 * (change * both).sum(dim=(1, 2, 3)) / both.sum(dim=(1, 2, 3))
    assert found.disagreement(moved)[:, 2].tolist() == pytest.approx(want.tolist(), abs=0.5)
    assert float(want.min()) > 5


def test_neither_order_nor_the_rest_of_a_batch_matters(
    ball: tuple[Views, Tensor], cameras: Cameras
) -> None:
    views, _ = ball
    drawn = torch.Generator().manual_seed(1)
    views = replace(views, rgb=torch.rand(views.rgb.shape, generator=drawn))
    want, order = agreement.disagreement(views, cameras), torch.randperm(COUNT, generator=drawn)
    mixed = Views(*(each[:, order] for each in (views.rgb, views.alpha, views.depth)))
    torch.testing.assert_close(agreement.disagreement(mixed, cameras[:, order]), want[:, order])
    alone = Views(*(each[1:] for each in (views.rgb, views.alpha, views.depth)))
    torch.testing.assert_close(agreement.disagreement(alone, cameras[1:]), want[1:])
    with pytest.raises(ValueError, match="at least two views"):
        agreement.disagreement(Views(*(e[:, :1] for e in vars(mixed).values())), cameras[:, :1])


@pytest.mark.skipif("perceptual" in perceptual.find()[1], reason="needs the extra perceptual")
def test_the_perceptual_distance_sees_it_too(ball: tuple[Views, Tensor], cameras: Cameras) -> None:
    views, _ = ball
    found, picture, distance = common(views, cameras), agreement.white(views), perceptual.distance()
    drawn = torch.Generator().manual_seed(0)
    noisy = (picture + 0.1 * torch.randn(picture.shape, generator=drawn)).clamp(0, 1)
    floor, other = found.perceptual(picture, distance), found.perceptual(noisy, distance)
    assert floor.shape == (2, COUNT) and float((other / floor).min()) > 3


def test_samples_spread_by_their_standard_deviation() -> None:
    alpha = torch.ones(1, 2, 4, 4, 1)
    levels = [Views(torch.full((1, 2, 4, 4, 3), x), alpha, alpha) for x in (0.2, 0.4)]
    levels[1].rgb[:, 1] = 0.2  # the second view is the same in both
    found = agreement.spread(levels)
    assert found.shape == (1, 2, 4, 4)
    assert found[0, 0].flatten().tolist() == pytest.approx([255 * 0.1 * math.sqrt(2)] * 16)
    assert float(found[0, 1].max()) == 0


def test_samples_spread_where_they_differ_by_azimuth() -> None:
    """What is guessed behind is known in front: means over objects, of what is covered."""
    data = tensors(2, views=4)
    away = relative_azimuth_deg(data.cameras, data.inputs.cameras, data.pivots).abs()[..., None]

    def sample(level: float) -> Predictor:
        def predict(inputs: InputImages, cameras: Cameras) -> Views:
            rows = [data.names.index(name) for name in inputs.names]
            alpha = torch.zeros(len(rows), 4, 16, 16, 1)
            alpha[:, :, 4:12] = 1
            light = (level * (away[rows] > 100))[..., None, None] * alpha
            return Views(light.expand(-1, -1, -1, -1, 3), alpha, alpha)

        return predict

    found = metrics.spread_by_azimuth([sample(0.2), sample(0.4)], data, batch=1)
    want = 255 * 0.1 * math.sqrt(2)
    means = {name: mean for name, (mean, _, _) in found.items()}
    assert means == pytest.approx(
        {"0-30": 0, "60-90": 0, "90-180": want, "all": want / 4}, rel=1e-4
    )
    drawn = agreement.spreading([sample(0.2), sample(0.4)])(data.inputs, data.cameras)
    assert float(drawn.rgb.max()) == pytest.approx(want / agreement.BRIGHT)
