import math
from dataclasses import replace

import pytest
import torch

from fresnel.scene.cameras import (
    Cameras,
    gravity_frame,
    intrinsics,
    look_at,
    orbit,
    relative_azimuth_deg,
    rigid,
)

SIZE = {"focal_px": 77.0, "width": 64, "height": 48}


def ring(n=8, pivot=(1.0, 2.0, 3.0), elevation=20.0):
    return orbit(torch.arange(n) * 360.0 / n, elevation, 2.2, pivot=pivot, **SIZE)


def test_orbit_stands_where_it_says_and_looks_at_the_pivot():
    cameras = ring()
    offset = cameras.centers - torch.tensor([1.0, 2.0, 3.0])
    torch.testing.assert_close(offset.norm(dim=-1), torch.full((8,), 2.2))
    torch.testing.assert_close(-offset / 2.2, cameras.forward, atol=1e-6, rtol=0)
    assert offset[0, 2] > 0 and abs(offset[0, 0]) < 1e-6, "azimuth 0 is +Z"
    assert offset[2, 0] > 0 and abs(offset[2, 2]) < 1e-6, "azimuth grows towards +X"
    torch.testing.assert_close(cameras.elevation_deg((1, 2, 3)), torch.full((8,), 20.0))
    cameras.validate()


def test_image_axes_are_opencv():
    camera = orbit(0.0, 0.0, 2.0, pivot=(0, 0, 0), **SIZE)
    right_up_near = camera.viewmats @ torch.tensor([0.5, 0.25, 0.5, 1.0])
    torch.testing.assert_close(right_up_near, torch.tensor([0.5, -0.25, 1.5, 1.0]))


def test_rays_hit_the_pixels_they_come_from():
    cameras = ring(3)
    origins, directions = cameras.rays()
    points = origins + 1.7 * directions
    seen = torch.einsum("vij,vhwj->vhwi", cameras.viewmats[:, :3, :3], points)
    seen = seen + cameras.viewmats[:, None, None, :3, 3]
    pixels = torch.einsum("vij,vhwj->vhwi", cameras.Ks, seen)
    pixels = pixels[..., :2] / pixels[..., 2:]
    x, y = torch.meshgrid(torch.arange(64) + 0.5, torch.arange(48) + 0.5, indexing="xy")
    torch.testing.assert_close(
        pixels, torch.stack([x, y], -1).expand(3, -1, -1, -1), atol=2e-4, rtol=0
    )


def test_pluecker_does_not_depend_on_the_point_along_the_ray():
    cameras = ring(2)
    d, m = cameras.pluecker(gravity_frame(cameras, (1, 2, 3))).split(3, dim=-1)
    torch.testing.assert_close((d * m).sum(-1), torch.zeros(2, 48, 64), atol=1e-6, rtol=0)
    torch.testing.assert_close(d.norm(dim=-1), torch.ones(2, 48, 64))


def test_gravity_frame_is_the_same_for_every_azimuth():
    cameras = ring(8)
    rays = cameras.pluecker(gravity_frame(cameras, (1, 2, 3)))
    torch.testing.assert_close(rays, rays[:1].expand_as(rays), atol=2e-6, rtol=0)
    other = ring(1, elevation=-10.0)
    assert not torch.allclose(other.pluecker(gravity_frame(other, (1, 2, 3)))[0], rays[0], atol=0.1)


def test_gravity_frame_of_a_camera_on_the_pivot_or_looking_down():
    at_pivot = Cameras(torch.eye(4)[None], intrinsics(64.0, 64, 64)[None], 64, 64)
    ahead = at_pivot.transformed(gravity_frame(at_pivot, (0, 0, 0))).forward
    torch.testing.assert_close(ahead, torch.tensor([[0.0, 0.0, -1.0]]))
    turn = torch.tensor([[[0.0, 0, -1], [1, 0, 0], [0, -1, 0]]])  # its image's up is -x
    down = replace(at_pivot, viewmats=rigid(turn, torch.tensor([[0.0, 0, 2]])))
    seen = down.transformed(gravity_frame(down, (0, 0, 0))).validate()
    torch.testing.assert_close(seen.viewmats[0, 1], torch.tensor([0.0, 0, 1, 0]))
    torch.testing.assert_close(seen.centers, torch.tensor([[0.0, 2, 0]]))


def test_relative_azimuth():
    inputs = orbit(torch.tensor([30.0, -100.0]), 10.0, 2.2, pivot=(0, 0, 0), **SIZE)
    azimuth = torch.tensor([[30.0, 75.0, -60.0], [-100.0, 80.0, -190.0]])
    views = orbit(azimuth, 35.0, 2.2, pivot=(0, 0, 0), **SIZE)
    got = relative_azimuth_deg(views, inputs, (0, 0, 0))
    want = torch.tensor([[0.0, 45.0, -90.0], [0.0, 180.0, -90.0]])
    torch.testing.assert_close((got - want + 180) % 360 - 180, torch.zeros(2, 3), atol=1e-3, rtol=0)


def test_opengl_round_trip_and_meaning():
    cameras = ring()
    rotation, translation = cameras.to_opengl()
    back = Cameras.from_opengl(rotation, translation, cameras.Ks, 64, 48)
    torch.testing.assert_close(back.viewmats, cameras.viewmats)
    pivot = rotation @ torch.tensor([1.0, 2.0, 3.0]) + translation
    want = torch.tensor([0.0, 0.0, -2.2]).expand(8, 3)
    torch.testing.assert_close(pivot, want, atol=1e-5, rtol=0)


def test_resized_cameras_see_the_same_rays():
    cameras = ring(1)
    small = cameras.resized(32, 24)
    corner = cameras.rays()[1][0, :2, :2].mean((0, 1))
    torch.testing.assert_close(
        torch.nn.functional.normalize(corner, dim=0), small.rays()[1][0, 0, 0], atol=1e-4, rtol=0
    )


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
    torch.testing.assert_close(moved.centers, cameras.centers + torch.tensor([1.0, 0.0, 0.0]))


def test_mirrored_cameras_see_the_mirrored_world():
    cameras = orbit(torch.tensor([20.0, 130.0]), 25.0, 2.0, pivot=(0.1, 0, 0.2), **SIZE)
    Ks = cameras.Ks.clone()
    Ks[:, 0, 2] += 3  # off the centre
    cameras = replace(cameras, Ks=Ks)
    point = torch.tensor([0.3, -0.2, 0.5, 1.0])

    def pixel(of, where):
        seen = (of.viewmats @ where)[:, :3]
        image = (of.Ks @ seen[..., None])[..., 0]
        return image[:, :2] / image[:, 2:]

    there = pixel(cameras, point)
    mirrored = pixel(cameras.mirrored(), point * torch.tensor([-1.0, 1, 1, 1]))
    torch.testing.assert_close(mirrored[:, 0], 64 - there[:, 0])
    torch.testing.assert_close(mirrored[:, 1], there[:, 1])
    cameras.mirrored().validate()


def test_azimuth_and_elevation_are_those_of_the_orbit_about_any_pivot():
    pivot = torch.tensor([0.3, -1.0, 2.0])
    azimuths = torch.tensor([-170.0, -30.0, 0.0, 90.0])
    elevations = torch.tensor([-60.0, 0, 10, 45])
    cameras = orbit(azimuths, elevations, 3.0, pivot=pivot, **SIZE)
    torch.testing.assert_close(cameras.azimuth_deg(pivot), azimuths, atol=1e-3, rtol=0)
    torch.testing.assert_close(cameras.elevation_deg(pivot), elevations, atol=1e-3, rtol=0)
    assert cameras[3].centers[0] > pivot[0], "azimuth grows towards +X"
