import math
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from fresnel.scene.cameras import (
    Cameras,
    gravity_frame,
    intrinsics,
    look_at,
    opengl,
    orbit,
    relative_azimuth_deg,
    rigid,
)

SIZE = {"focal_px": 77.0, "width": 32, "height": 24}
PIVOT = torch.tensor([1.0, 2.0, 3.0])


def ring(n=8, elevation=20.0):
    return orbit(torch.arange(n) * 360.0 / n, elevation, 2.2, pivot=PIVOT, **SIZE)


def pixels(cameras, points):
    """Of world points (..., 3) in cameras of the same batch shape."""
    seen = (cameras.viewmats[..., :3, :3] @ points[..., None])[..., 0] + cameras.viewmats[
        ..., :3, 3
    ]
    image = (cameras.Ks @ seen[..., None])[..., 0]
    return image[..., :2] / image[..., 2:]


def test_orbit_stands_where_it_says_and_looks_at_the_pivot():
    cameras = ring().validate()
    offset = cameras.centers - PIVOT
    assert_close(offset.norm(dim=-1), torch.full((8,), 2.2))
    assert_close(-offset / 2.2, cameras.forward, atol=1e-6, rtol=0)
    assert offset[0, 2] > 0 and abs(offset[0, 0]) < 1e-6, "azimuth 0 is +Z"
    assert offset[2, 0] > 0 and abs(offset[2, 2]) < 1e-6, "azimuth grows towards +X"
    azimuths, elevations = torch.tensor([-170.0, -30, 0, 90]), torch.tensor([-60.0, 0, 10, 45])
    cameras = orbit(azimuths, elevations, 3.0, pivot=PIVOT, **SIZE)
    assert_close(cameras.azimuth_deg(PIVOT), azimuths, atol=1e-3, rtol=0)
    assert_close(cameras.elevation_deg((1, 2, 3)), elevations, atol=1e-3, rtol=0)


def test_image_axes_are_opencv():
    camera = orbit(0.0, 0.0, 2.0, pivot=(0, 0, 0), **SIZE)
    right_up_near = camera.viewmats @ torch.tensor([0.5, 0.25, 0.5, 1.0])
    assert_close(right_up_near, torch.tensor([0.5, -0.25, 1.5, 1.0]))


def test_rays_hit_the_pixels_they_come_from():
    Ks = ring(3).Ks.clone()
    Ks[:, 0, 1], Ks[:, 1, 2] = 3.0, 11.0  # skewed, off the centre
    cameras = replace(ring(3), Ks=Ks)
    origins, directions = cameras.rays()
    got = pixels(cameras.reshape(3, 1, 1), origins + 1.7 * directions)
    x, y = torch.meshgrid(torch.arange(32) + 0.5, torch.arange(24) + 0.5, indexing="xy")
    assert_close(got, torch.stack([x, y], -1).expand(3, -1, -1, -1), atol=2e-4, rtol=0)


def test_pluecker_does_not_depend_on_the_point_along_the_ray():
    cameras = ring(2)
    d, m = cameras.pluecker(gravity_frame(cameras, PIVOT)).split(3, dim=-1)
    assert_close((d * m).sum(-1), torch.zeros(2, 24, 32), atol=1e-6, rtol=0)
    assert_close(d.norm(dim=-1), torch.ones(2, 24, 32))


def test_gravity_frame_is_the_same_for_every_azimuth():
    cameras, other = ring(8), ring(1, elevation=-10.0)
    rays = cameras.pluecker(gravity_frame(cameras, PIVOT))
    assert_close(rays, rays[:1].expand_as(rays), atol=2e-6, rtol=0)
    assert not torch.allclose(other.pluecker(gravity_frame(other, PIVOT))[0], rays[0], atol=0.1)


def test_gravity_frame_of_a_camera_on_the_pivot_or_looking_down():
    at_pivot = Cameras(torch.eye(4)[None], intrinsics(64.0, 64, 64)[None], 64, 64)
    ahead = at_pivot.transformed(gravity_frame(at_pivot, (0, 0, 0))).forward
    assert_close(ahead, torch.tensor([[0.0, 0.0, -1.0]]))
    turn = torch.tensor([[[0.0, 0, -1], [1, 0, 0], [0, -1, 0]]])  # its image's up is -x
    down = replace(at_pivot, viewmats=rigid(turn, torch.tensor([[0.0, 0, 2]])))
    seen = down.transformed(gravity_frame(down, (0, 0, 0))).validate()
    assert_close(seen.viewmats[0, 1], torch.tensor([0.0, 0, 1, 0]))
    assert_close(seen.centers, torch.tensor([[0.0, 2, 0]]))


def test_relative_azimuth():
    inputs = orbit(torch.tensor([30.0, -100.0]), 10.0, 2.2, pivot=(0, 0, 0), **SIZE)
    azimuth = torch.tensor([[30.0, 75.0, -60.0], [-100.0, 80.0, -190.0]])
    views = orbit(azimuth, 35.0, 2.2, pivot=(0, 0, 0), **SIZE)
    got = relative_azimuth_deg(views, inputs, (0, 0, 0))
    want = torch.tensor([[0.0, 45.0, -90.0], [0.0, 180.0, -90.0]])
    assert_close((got - want + 180) % 360 - 180, torch.zeros(2, 3), atol=1e-3, rtol=0)
    assert_close(relative_azimuth_deg(views[0], inputs[0], (0, 0, 0)), got[0])


def test_opengl_and_back():
    cameras = ring()
    theirs = opengl(cameras.viewmats)
    assert_close(opengl(theirs), cameras.viewmats)
    pivot = theirs @ torch.tensor([*PIVOT, 1.0])
    assert_close(pivot[:, :3], torch.tensor([0.0, 0.0, -2.2]).expand(8, 3), atol=1e-5, rtol=0)
    assert (theirs[:, 1, 1] > 0).all(), "y is up"


def test_resized_cameras_see_the_same_rays():
    cameras = ring(1)
    corner = torch.nn.functional.normalize(cameras.rays()[1][0, :2, :2].mean((0, 1)), dim=0)
    assert_close(corner, cameras.resized(16, 12).rays()[1][0, 0, 0], atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("viewmats", "word"),
    [
        (torch.diag(torch.tensor([1.0, 1.0, -1.0, 1.0])), "right-handed"),
        (torch.diag(torch.tensor([2.0, 2.0, 2.0, 1.0])), "orthonormal"),
        (torch.full((4, 4), math.nan), "NaN"),
    ],
)
def test_bad_matrices_are_named(viewmats, word):
    with pytest.raises(ValueError, match=word):
        Cameras(viewmats, intrinsics(64.0, 64, 64), 64, 64).validate()


@pytest.mark.parametrize(
    ("make", "error", "word"),
    [
        (lambda: Cameras(torch.eye(4), torch.eye(4), 8, 8), ValueError, "Ks"),
        (lambda: Cameras(torch.eye(4), torch.eye(3), 8, 0), ValueError, "image size"),
        (lambda: Cameras(torch.eye(4), -torch.eye(3), 8, 8).validate(), ValueError, "focal"),
        (lambda: look_at(torch.zeros(3), (0, 0, 0), **SIZE), ValueError, "target"),
        (lambda: look_at(torch.tensor([0.0, 1, 0]), (0, 0, 0), **SIZE), ValueError, "up or down"),
        (lambda: orbit(0.0, 0.0, 0.0, pivot=(0, 0, 0), **SIZE), ValueError, "radius"),
        (lambda: orbit(0.0, 0.0, 1.0, **SIZE), TypeError, "pivot"),
    ],
)
def test_bad_arguments_are_named(make, error, word):
    with pytest.raises(error, match=word):
        make()


def test_rigid_and_indexing():
    cameras = ring(8).reshape(2, 4)
    assert cameras.batch_shape == (2, 4) and len(cameras) == 2
    assert cameras[1].batch_shape == (4,) and cameras[1, 2].batch_shape == ()
    moved = cameras.transformed(rigid(torch.eye(3), torch.tensor([1.0, 0.0, 0.0])))
    assert_close(moved.centers, cameras.centers + torch.tensor([1.0, 0.0, 0.0]))


def test_mirrored_cameras_see_the_mirrored_world():
    cameras = orbit(torch.tensor([20.0, 130.0]), 25.0, 2.0, pivot=(0.1, 0, 0.2), **SIZE)
    cameras = replace(cameras, Ks=cameras.Ks + 3 * torch.eye(3)[0][:, None] * torch.eye(3)[2])
    point = torch.tensor([0.3, -0.2, 0.5]).expand(2, 3)
    there = pixels(cameras, point)
    mirrored = pixels(cameras.mirrored().validate(), point * torch.tensor([-1.0, 1, 1]))
    assert_close(mirrored, torch.stack([32 - there[:, 0], there[:, 1]], dim=-1))
