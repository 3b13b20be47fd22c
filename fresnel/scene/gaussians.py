"""`Gaussians`: the one 3D type, and its way to and from splat files."""

import warnings
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from fresnel.scene import splats

_SH_DEGREE_OF_COEFFICIENTS = {1: 0, 4: 1, 9: 2, 16: 3}


@dataclass(frozen=True)
class Gaussians:
    """A batch of scenes, each a set of N anisotropic 3D Gaussians, stored as they are used.

    Args:
        means: centres, shape (..., N, 3), in the units of the frame they live in.
        quats: rotations as wxyz quaternions, shape (..., N, 4); they need not be normalised.
        scales: standard deviations along the three axes, shape (..., N, 3), > 0, not logarithms.
        opacities: shape (..., N), in [0, 1], not logits.
        colors: sRGB in [0, 1], shape (..., N, 3), or spherical-harmonics coefficients of shape
            (..., N, K, 3) with K = 1, 4, 9 or 16 (degree 0 to 3).

    Raises:
        ValueError: if the shapes disagree.
    """

    means: Tensor
    quats: Tensor
    scales: Tensor
    opacities: Tensor
    colors: Tensor

    def __post_init__(self) -> None:
        shape, colors = tuple(self.means.shape[:-1]), tuple(self.colors.shape)
        wanted = {"means": (*shape, 3), "quats": (*shape, 4), "scales": (*shape, 3)}
        for name, want in {**wanted, "opacities": shape}.items():
            if (got := tuple(getattr(self, name).shape)) != want or not shape:
                raise ValueError(f"{name}: got shape {got}, want {want}, of means (..., N, 3)")
        plain = (*shape, 3)
        if colors != plain and colors not in [(*shape, k, 3) for k in _SH_DEGREE_OF_COEFFICIENTS]:
            raise ValueError(
                f"colors: got shape {colors}, want {plain} or (..., N, K, 3), K in 1, 4, 9, 16"
            )

    def validate(self) -> Self:
        """Check the values too, and return self.

        Raises:
            ValueError: for NaN or infinity, a scale <= 0, an opacity outside [0, 1], or a
                quaternion of length zero.
        """
        lengths = torch.linalg.norm(self.quats, dim=-1)
        good = {
            "means": self.means.isfinite(),
            "quats": lengths.isfinite() & (lengths > 0),
            "scales": self.scales.isfinite() & (self.scales > 0),
            "opacities": (self.opacities >= 0) & (self.opacities <= 1),
            "colors": self.colors.isfinite(),
        }
        for name, values in good.items():
            if not values.all():
                said = f"{int((~values).sum())} of {values.numel()} values"
                raise ValueError(f"Gaussians.{name}: {said} are NaN, infinite or out of range")
        return self

    @property
    def batch_shape(self) -> torch.Size:
        return self.means.shape[:-2]

    @property
    def num(self) -> int:
        """Gaussians in each scene."""
        return self.means.shape[-2]

    @property
    def sh_degree(self) -> int | None:
        """Degree of the spherical harmonics, or None for plain RGB."""
        if self.colors.ndim == self.means.ndim:
            return None
        return _SH_DEGREE_OF_COEFFICIENTS[self.colors.shape[-2]]

    @property
    def device(self) -> torch.device:
        return self.means.device

    @property
    def dtype(self) -> torch.dtype:
        return self.means.dtype

    def __repr__(self) -> str:
        batch = "".join(f"{count} x " for count in self.batch_shape)
        colours = "RGB" if self.sh_degree is None else f"harmonics of degree {self.sh_degree}"
        return f"Gaussians({batch}{self.num}, {colours}, {self.device})"

    def _repr_html_(self) -> str:
        import fresnel  # which knows the rooms above this one

        return fresnel.preview(self)

    def _map(self, function: Any) -> Self:
        return type(self)(*(function(getattr(self, field.name)) for field in fields(self)))

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Self:
        return self._map(lambda tensor: tensor.to(device=device, dtype=dtype))

    def detach(self) -> Self:
        return self._map(torch.Tensor.detach)

    def __getitem__(self, index: Any) -> Self:
        """Pick scenes out of the batch."""
        if not self.batch_shape:
            raise TypeError("a single scene has no batch to index; `select` picks its Gaussians")
        return self._map(lambda tensor: tensor[index])

    def select(self, keep: Tensor) -> Self:
        """Pick Gaussians of a single scene by a mask or index tensor of shape (N,) or (K,)."""
        if self.batch_shape:
            raise ValueError("select: want a single scene; index the batch first")
        return self._map(lambda tensor: tensor[keep])

    def transform(self, matrix: Tensor) -> Self:
        """Move the Gaussians by similarity transforms, shape (4, 4) or (..., 4, 4).

        The only way from one frame to another. A uniform scale multiplies the Gaussians' scales.
        Colours of degree >= 1 depend on direction and are not rotated, so they are refused.

        Raises:
            ValueError: if the upper 3x3 part is not a rotation times a positive scale.
        """
        if self.sh_degree:
            raise ValueError("transform: spherical harmonics of degree >= 1 cannot be moved")
        matrix = matrix.to(self.means)
        linear = matrix[..., :3, :3]
        determinant = torch.linalg.det(linear.double())
        if not (determinant > 0).all():
            raise ValueError("matrix: want a rotation with a positive scale (it mirrors or is 0)")
        scale = determinant.pow(1 / 3).to(self.means)
        rotation = linear / scale[..., None, None]
        identity = torch.eye(3, dtype=self.dtype, device=self.device)
        if (rotation @ rotation.transpose(-1, -2) - identity).abs().max() > 1e-3:
            raise ValueError("matrix: want a rotation times one scale; it shears or stretches")
        means = self.means @ linear.transpose(-1, -2) + matrix[..., None, :3, 3]
        turn = quaternion_from_rotation(rotation)[..., None, :]
        return replace(
            self,
            means=means,
            quats=quaternion_product(turn.expand_as(self.quats), self.quats),
            scales=self.scales * scale[..., None, None],
        )

    def save(self, path: str | Path) -> Path:
        """Write one scene as ``.ply`` or ``.spz``, the formats that splat viewers open.

        SPZ is lossy (24-bit positions, 8-bit colours and opacities).

        Raises:
            ValueError: for a batch of scenes, an unknown suffix, or invalid values.
        """
        import gsply

        path = Path(path)
        if self.batch_shape:
            raise ValueError(f"save: got a batch {tuple(self.batch_shape)}, want one scene")
        if path.suffix.lower() not in {".ply", ".spz"}:
            raise ValueError(f"save: got suffix {path.suffix!r}, want .ply or .spz")
        scene = self.detach().to("cpu", torch.float32).validate()
        if scene.sh_degree is None:
            dc, rest = (scene.colors - 0.5) / splats.SH_C0, scene.colors.new_zeros(scene.num, 0, 3)
        else:
            dc, rest = scene.colors[:, 0], scene.colors[:, 1:]
        # A logit of exactly 0 or 1 is infinite: viewers want finite numbers.
        opacities = torch.logit(scene.opacities.double(), eps=1e-7).float()
        data = gsply.GSData(
            means=scene.means.numpy().copy(),
            scales=scene.scales.log().numpy(),
            quats=normalize(scene.quats, dim=-1).numpy(),
            opacities=opacities.numpy(),
            sh0=dc.contiguous().numpy(),
            shN=rest.contiguous().numpy(),
            _format=gsply.create_ply_format(sh_degree=scene.sh_degree or 0),
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix.lower() == ".spz":
            gsply.write_spz(path, data)
        elif path.name.lower().endswith(".compressed.ply"):
            gsply.plywrite(path, data)
        else:  # the same bytes, without a second for torch's compiler, which it does not need
            gsply.writer.write_uncompressed(path, data)
        return path

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read one scene from ``.ply`` (of 3DGS and its kin, see `splats`) or ``.spz``.

        Degree-0 files become plain RGB colours, higher ones keep their harmonics.  Gaussians that
        are not finite are left out, with a warning.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if the file is not a splat file.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file; want a .ply or .spz splat file")
        try:
            read = splats.read_spz if path.suffix.lower() == ".spz" else splats.read_ply
            found = read(path.read_bytes())
        except ValueError as error:
            raise ValueError(f"{path}: not a readable splat file ({error})") from error
        with np.errstate(divide="ignore"):
            turned = 1 / np.linalg.norm(found.quats, axis=1, keepdims=True)
        rows = [values.reshape(len(turned), -1) for values in (*found, turned)]
        finite = np.isfinite(np.concatenate(rows, axis=1)).all(axis=1)
        if not finite.all():
            first, many = int(np.argmin(finite)), int((~finite).sum())
            said = f"{many} of {len(turned)} Gaussians (number {first}, for one) are left out"
            warnings.warn(f"{path}: {said}: NaN, infinite, or turned by 0 0 0 0", stacklevel=2)
        used = (found.scales > 0).all() and ((found.opacities >= 0) & (found.opacities <= 1)).all()
        if used and len(turned):
            said = "scales and opacities look as they are used, not as logarithms and logits"
            warnings.warn(f"{path}: {said}, which is how they were read", stacklevel=2)
        means, scales, quats, opacities, sh0, shN = (
            torch.from_numpy(values[finite].astype(np.float32)) for values in found
        )
        colors = (sh0 * splats.SH_C0 + 0.5).clamp_min(0)  # not below black, as a renderer has it
        return cls(
            means=means,
            quats=normalize(quats, dim=-1),
            scales=scales.exp(),
            opacities=opacities.sigmoid(),
            colors=torch.cat([sh0[:, None], shN], dim=1) if shN.numel() else colors,
        )


def rotation_from_quaternion(quats: Tensor) -> Tensor:
    """Rotation matrices (..., 3, 3) of quaternions (..., 4) wxyz of any length."""
    w, x, y, z = normalize(quats, dim=-1).unbind(-1)
    rows = [
        1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y),
        2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x),
        2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y),
    ]  # fmt: skip
    return torch.stack(rows, -1).unflatten(-1, (3, 3))


def quaternion_product(a: Tensor, b: Tensor) -> Tensor:
    """Hamilton product of wxyz quaternions (..., 4): the rotation b, then the rotation a."""
    aw, ax, ay, az = a.unbind(-1)
    bw, bx, by, bz = b.unbind(-1)
    rows = [
        aw * bw - ax * bx - ay * by - az * bz,
        aw * bx + ax * bw + ay * bz - az * by,
        aw * by - ax * bz + ay * bw + az * bx,
        aw * bz + ax * by - ay * bx + az * bw,
    ]
    return torch.stack(rows, dim=-1)


def quaternion_from_rotation(rotation: Tensor) -> Tensor:
    """Unit wxyz quaternions (..., 4) of rotation matrices (..., 3, 3).

    Each component's size comes from the diagonal; the three others are divided by the largest,
    so no case divides by a small number (Shepperd 1978). Differentiable.
    """
    (xx, xy, xz), (yx, yy, yz), (zx, zy, zz) = (row.unbind(-1) for row in rotation.unbind(-2))
    rows = [
        [1 + xx + yy + zz, zy - yz, xz - zx, yx - xy],
        [zy - yz, 1 + xx - yy - zz, xy + yx, xz + zx],
        [xz - zx, xy + yx, 1 - xx + yy - zz, yz + zy],
        [yx - xy, xz + zx, yz + zy, 1 - xx - yy + zz],
    ]
    candidates = torch.stack([torch.stack(row, -1) for row in rows], -2)
    best = candidates.diagonal(dim1=-2, dim2=-1).argmax(-1)[..., None, None]
    return normalize(torch.take_along_dim(candidates, best, -2)[..., 0, :], dim=-1)
