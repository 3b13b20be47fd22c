import math
from dataclasses import replace

import pytest
import torch
from scipy.spatial.transform import Rotation
from torch.testing import assert_close

from fresnel.scene.gaussians import (
    Gaussians,
    quaternion_from_rotation,
    quaternion_product,
    rotation_from_quaternion,
)


def random_gaussians(n=50, batch=(), sh=None):
    g, shape = torch.Generator().manual_seed(0), (*batch, n)
    harmonics = () if sh is None else ((sh + 1) ** 2,)
    return Gaussians(
        torch.randn(*shape, 3, generator=g),
        torch.randn(*shape, 4, generator=g),
        torch.rand(*shape, 3, generator=g) * 0.1 + 0.01,
        torch.rand(*shape, generator=g),
        torch.rand(*shape, *harmonics, 3, generator=g),
    )


def covariance(gaussians):
    m = rotation_from_quaternion(gaussians.quats) * gaussians.scales[..., None, :]
    return m @ m.transpose(-1, -2)


def test_quaternions_round_trip_in_all_four_cases():
    q = torch.randn(500, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    q = torch.cat([q, torch.eye(4, dtype=torch.float64)])
    r = rotation_from_quaternion(q)
    scipys = Rotation.from_quat(q.numpy(), scalar_first=True).as_matrix()
    assert_close(r, torch.from_numpy(scipys))
    assert_close(rotation_from_quaternion(quaternion_from_rotation(r)), r)
    both = rotation_from_quaternion(quaternion_product(q[:100], q[100:200]))
    assert_close(both, r[:100] @ r[100:200])


def test_transform_moves_means_and_covariances():
    gaussians = random_gaussians(batch=(2,)).to(dtype=torch.float64)
    quats = torch.tensor([[0.3, -0.2, 0.9, 0.1], [1.0, 2.0, 3.0, 4.0]]).double()
    matrix = torch.eye(4, dtype=torch.float64).repeat(2, 1, 1)
    matrix[:, :3, :3] = 2.5 * rotation_from_quaternion(quats)
    matrix[:, :3, 3] = torch.tensor([1.0, -2.0, 3.0])
    moved = gaussians.transform(matrix)
    linear = matrix[:, None, :3, :3]
    want = (linear @ gaussians.means[..., None])[..., 0] + matrix[:, None, :3, 3]
    assert_close(moved.means, want)
    want = linear @ covariance(gaussians) @ linear.transpose(-1, -2)
    assert_close(covariance(moved), want)
    assert_close(moved.transform(torch.linalg.inv(matrix)).means, gaussians.means)


@pytest.mark.parametrize(("place", "value"), [((0, 0), -1.0), ((0, 1), 0.5)])
def test_transform_refuses_what_is_not_a_similarity(place, value):
    matrix = torch.eye(4)
    matrix[place] = value  # a mirror, a shear
    with pytest.raises(ValueError, match="matrix"):
        random_gaussians().transform(matrix)
    with pytest.raises(ValueError, match="harmonics"):
        random_gaussians(sh=1).transform(torch.eye(4))


def test_scenes_are_picked_from_a_batch_and_gaussians_from_a_scene():
    batch = random_gaussians(5, (3,))
    assert batch.num == 5 and batch.batch_shape == (3,)
    assert_close(batch[1].select(torch.arange(5) > 2).means, batch.means[1, 3:])
    with pytest.raises(TypeError):
        batch[0][0]
    with pytest.raises(ValueError, match="single scene"):
        batch.select(torch.arange(2))


VIEWERS_READ = "x y z f_dc_0 f_dc_1 f_dc_2 opacity scale_0 scale_1 scale_2 rot_0 rot_1 rot_2 rot_3"
EXACT = {name: 1e-5 for name in ("means", "scales", "opacities", "colors", "covariance")}
LOSSY = {"means": 2e-3, "opacities": 0.01, "colors": 0.02, "covariance": 1e-3}


@pytest.mark.parametrize(
    ("suffix", "sh", "within"),
    [*((".ply", sh, EXACT) for sh in (None, 1, 2, 3)), (".spz", None, LOSSY)],
)
def test_files_hold_what_was_written(tmp_path, suffix, sh, within):
    gaussians = random_gaussians(sh=sh)
    gaussians.opacities[:2] = torch.tensor([0.0, 1.0])  # whose logits are infinite
    path = gaussians.save(tmp_path / f"scene{suffix}")
    loaded = Gaussians.load(path)
    assert loaded.sh_degree == sh
    for name, atol in within.items():
        got, want = (
            covariance(g) if name == "covariance" else getattr(g, name) for g in (loaded, gaussians)
        )
        assert_close(got, want, atol=atol, rtol=1e-4)
    if suffix == ".ply":
        header = path.read_bytes().split(b"end_header")[0]
        names = {line.split()[-1].decode() for line in header.splitlines() if b"property" in line}
        assert names >= set(VIEWERS_READ.split())


@pytest.mark.parametrize("suffix", [".ply", ".spz"])
def test_what_is_darker_than_black_is_black_when_loaded_again(tmp_path, suffix):
    """A renderer has max(0, 0.5 + c Y) of harmonics; plain colours have no such floor."""
    base = random_gaussians()
    scene = replace(base, colors=torch.linspace(-3, 1, base.num * 3).reshape(-1, 1, 3))
    loaded = Gaussians.load(scene.save(tmp_path / f"scene{suffix}"))
    want = (0.5 + scene.colors[:, 0] / (2 * math.sqrt(math.pi))).clamp_min(0)
    assert loaded.sh_degree is None and loaded.colors.min() == 0
    assert_close(loaded.colors, want, atol=1e-5 if suffix == ".ply" else 0.02, rtol=0)


@pytest.mark.parametrize("name", ["means", "quats", "scales", "opacities", "colors"])
def test_nan_and_wrong_shapes_are_named(name):
    gaussians = random_gaussians()
    values = {n: getattr(gaussians, n).clone() for n in vars(gaussians)}
    with pytest.raises(ValueError, match=f"{name}: got shape"):
        Gaussians(**{**values, name: values[name][..., :2]})
    values[name].view(-1)[3] = math.nan
    with pytest.raises(ValueError, match=f"{name}: 1 of "):
        Gaussians(**values).validate()


def test_files_that_are_not_splats(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        Gaussians.load(tmp_path / "missing.ply")
    (tmp_path / "text.ply").write_text("hello")
    with pytest.raises(ValueError, match="not a readable splat"):
        Gaussians.load(tmp_path / "text.ply")
    with pytest.raises(ValueError, match="suffix"):
        random_gaussians().save(tmp_path / "scene.obj")
