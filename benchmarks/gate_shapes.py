"""Healthy sets that look faulty: unusual objects, as analytic shapes with known truth."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
import trimesh

from fresnel import faults
from fresnel.data.dataset import ObjectViews
from fresnel.objects import trace
from fresnel.scene.cameras import orbit

HARD = ("dark on black", "white on white", "thin", "symmetric", "single-coloured")
_SIZE = 64


def hard_set(name: str, seed: int, records: int, *, opaque: bool) -> list[ObjectViews]:
    """Records of one kind in `HARD`; without alpha and depth if `opaque`."""
    made = [_record(name, index, [len(name), seed, index]) for index in range(records)]
    if opaque:
        made = [replace(r, alpha=torch.full_like(r.alpha, 255), depth=None) for r in made]
    return made


def _mesh(name: str, rng: np.random.Generator) -> trimesh.Trimesh:
    if name == "thin":
        return trimesh.creation.box((0.02 + 0.02 * rng.random(), 1.0, 0.02 + 0.04 * rng.random()))
    if name == "symmetric":
        height, radius = 1.0, 0.15 + 0.3 * rng.random()
        profile = [[0.0, 0.0], [radius, 0.0], [0.5 * radius, 0.5 * height], [radius, height]]
        mesh = trimesh.creation.revolve([*profile, [0.0, height]], sections=64)
        mesh.apply_transform(trimesh.transformations.rotation_matrix(-np.pi / 2, (1, 0, 0)))
        return mesh
    ball = trimesh.creation.icosphere(radius=0.3).apply_translation(rng.uniform(-0.4, 0.4, 3))
    return trimesh.util.concatenate([trimesh.creation.box(rng.uniform(0.2, 1.0, 3)), ball])


def _record(name: str, index: int, seed: list[int]) -> ObjectViews:
    rng = np.random.default_rng(seed)
    colour = rng.uniform(40, 255, 3).astype(np.uint8)
    if name == "dark on black":
        colour = rng.integers(8, 30, 3).astype(np.uint8)
    elif name == "white on white":
        colour = np.array([250, 250, 250], np.uint8)
    mesh = _mesh(name, rng)
    mesh.apply_translation(-mesh.bounds.mean(axis=0))
    mesh.apply_scale(1 / mesh.extents.max())
    mesh.visual.face_colors = np.concatenate([colour, [255]])
    azimuth = rng.uniform(0, 360) + np.concatenate([[0.0], 45.0 * np.arange(8)])
    # A vase on a turntable is seen from one height: the hardest case for "frozen".
    elevation = np.full(9, 15.0) if name == "symmetric" else rng.uniform(-30, 45, 9)
    cameras = orbit(
        torch.from_numpy(azimuth).float(),
        torch.from_numpy(elevation).float(),
        2.2,
        pivot=(0.0, 0.0, 0.0),
        focal_px=1.2 * _SIZE,
        width=_SIZE,
        height=_SIZE,
    )
    views = trace.render(trimesh.Scene([mesh]), cameras)
    rgb = (views.rgb * 255 + 0.5).to(torch.uint8)
    alpha = (views.alpha[..., 0] * 255 + 0.5).to(torch.uint8)
    record = ObjectViews(
        name=f"{name} {index}",
        input_rgb=rgb[0],
        input_alpha=alpha[0],
        input_camera=cameras[0],
        input_depth=views.depth[0, ..., 0],
        rgb=rgb[1:],
        alpha=alpha[1:],
        depth=views.depth[1:, ..., 0],
        cameras=cameras[1:],
        pivot=torch.zeros(3),
    )
    scene: faults.Scene = "white" if name == "white on white" else "black"
    return faults.on_background(record, scene, rng, (0.0, 0.0, 0.0))
