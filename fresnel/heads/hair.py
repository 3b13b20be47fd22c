"""Hair of our own: sheets of strands that grow from the scalp and hang; where strands end, an alpha
test thins them out."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from scipy import sparse

from fresnel.heads import shape
from fresnel.heads.base import Doubles
from fresnel.heads.person import Person, chance
from fresnel.heads.skin import _HAIRLINE, _PIVOT, canvas, hair_tone
from fresnel.objects.surface import Material, Part, Texture

_COLUMNS, _ROWS = 96, 14


@dataclass(frozen=True)
class Scalp:
    """A grid of points on the scalp, (columns around, rows from the crown to the hairline).

    ``matrix`` makes them of the skin's vertices; ``angle`` (columns,) is 0 in front, in degrees.
    """

    matrix: sparse.csr_matrix
    angle: Doubles


@functools.cache
def scalp() -> Scalp:
    """On the base mesh, found once a process by rays from inside of the head."""
    from embreex.mesh_construction import TriangleMesh
    from embreex.rtcore_scene import EmbreeScene

    on = canvas()
    at, faces = on.at, on.skin.faces
    shown = faces[(on.ears[faces].max(axis=1) < 0.3) & (at[faces][..., 1].min(axis=1) > 6.2)]
    tracer = EmbreeScene()
    TriangleMesh(tracer, np.ascontiguousarray(at[shown].astype(np.float32)))
    angle = np.arange(_COLUMNS) * 360.0 / _COLUMNS
    knots, heights = zip(*_HAIRLINE, strict=True)
    ends = np.interp(np.minimum(angle, 360 - angle), knots, heights)
    tilt = np.radians(np.linspace(89.0, -45.0, 136))
    turn = np.radians(angle)
    directions = np.stack(
        [
            np.sin(turn)[:, None] * np.cos(tilt),
            np.broadcast_to(np.sin(tilt), (len(turn), len(tilt))),
            np.cos(turn)[:, None] * np.cos(tilt),
        ],
        axis=-1,
    )
    hit = _cast(tracer, directions.reshape(-1, 3))
    high = _PIVOT[1] + hit["tfar"].reshape(len(turn), -1) * np.sin(tilt)
    high[hit["primID"].reshape(high.shape) < 0] = np.nan
    last = np.array(
        [np.nanargmax(np.where(row < end, 1.0, 0.0)) for row, end in zip(high, ends, strict=True)]
    )
    last = np.where(last == 0, len(tilt) - 1, last)
    share = (np.linspace(0, 1, _ROWS) ** 0.9)[None] * last[:, None]
    grid = np.stack(
        [
            np.stack(
                [np.interp(share[k], np.arange(len(tilt)), directions[k, :, c]) for c in range(3)],
                -1,
            )
            for k in range(len(turn))
        ]
    ).reshape(-1, 3)
    hit = _cast(tracer, grid)
    missed = hit["primID"] < 0
    face = np.maximum(hit["primID"], 0).astype(int)
    u, v = hit["u"].astype(float), hit["v"].astype(float)
    weights = np.stack([1 - u - v, u, v], axis=1)
    corners = shown[face]
    if missed.any():  # over an ear's hole: the nearest vertex there is
        guess = _PIVOT + grid[missed] * 0.9
        known = np.unique(shown)
        nearest = known[((at[known][None] - guess[:, None]) ** 2).sum(-1).argmin(1)]
        corners[missed] = nearest[:, None]
        weights[missed] = (1.0, 0.0, 0.0)
    rows = np.repeat(np.arange(len(grid)), 3)
    return Scalp(
        sparse.csr_matrix((weights.ravel(), (rows, corners.ravel())), (len(grid), len(at))), angle
    )


def _cast(tracer: object, directions: Doubles) -> dict[str, np.ndarray]:
    starts = np.broadcast_to(_PIVOT, directions.shape).astype(np.float32).copy()
    return tracer.run(starts, directions.astype(np.float32), output=1)  # type: ignore[attr-defined]


_LENGTHS = {
    "cropped": 0.0,
    "short": 0.02,
    "parted": 0.03,
    "curly": 0.03,
    "bob": 0.5,
    "long": 0.95,
    "tied": 0.0,
}
_DEPTHS = {
    "cropped": 0.018,
    "short": 0.05,
    "parted": 0.06,
    "curly": 0.11,
    "bob": 0.06,
    "long": 0.055,
    "tied": 0.035,
}


def wig(person: Person, seed: int, skinned: Doubles, normals: Doubles) -> list[Part]:
    """The hair of a person.

    Args:
        skinned: the skin's vertices (V, 3) in the world.
        normals: theirs, of unit length.
    """
    if person.hair == "bald":
        return []
    grown, random = scalp(), chance(seed, person.name, "hair")
    shape_of = (_COLUMNS, _ROWS, 3)
    roots = (grown.matrix @ skinned).reshape(shape_of)
    up = grown.matrix @ normals
    up = (up / np.maximum(np.linalg.norm(up, axis=1, keepdims=True), 1e-9)).reshape(shape_of)
    t = np.linspace(0, 1, _ROWS)
    depth = _DEPTHS[person.hair] * random.uniform(0.75, 1.25)
    length = _LENGTHS[person.hair] * random.uniform(0.8, 1.2)
    around = np.radians(grown.angle)
    front = np.minimum(grown.angle, 360 - grown.angle)
    # thickest half way, thin where it meets the skin unless it hangs there
    hangs = np.clip((front - 72) / 10, 0, 1) * (length > 0.1)
    profile = np.sin(np.pi * np.clip(t, 0.0, 1.0) ** 0.8) ** 0.5
    profile = (
        np.maximum(profile, 0.85 * (t < 0.6))[None]
        + hangs[:, None] * (t > 0.5) * (1 - profile)[None]
    )
    lump = (
        1
        + 0.12 * np.sin(3 * around + random.uniform(0, 6))[:, None]
        + 0.1 * np.sin(5 * around[:, None] + 4 * t + random.uniform(0, 6))
    )
    if person.hair == "parted":
        side = random.choice((-1, 1)) * 40
        away = np.abs((grown.angle - side + 180) % 360 - 180)
        lump = lump * (1 - 0.5 * np.exp(-((away / 14) ** 2)))[:, None]
    if person.hair == "curly":
        lump = lump * (1 + 0.25 * random.normal(size=(_COLUMNS, _ROWS)))
    thick = depth * profile * lump
    if length > 0.1:  # below its widest, what hangs keeps away from the neck
        wide, level = 9, roots[..., 1:2].copy()
        out = np.concatenate(
            [roots[:, :wide], np.repeat(roots[:, wide - 1 : wide], _ROWS - wide, 1)], 1
        )
        out[..., 1:2] = level
        roots = roots + (out - roots) * hangs[:, None, None]
    made = []
    layers = 3 if person.hair != "cropped" else 2
    for layer in range(layers):
        share = (layer + 1) / layers
        made.append(
            _sheet(
                person,
                random,
                roots + up * (0.006 + thick * share)[..., None],
                hangs * length,
                layer,
            )
        )
    if person.hair == "tied":
        made.append(_bun(person, random, roots))
    return made


def _sheet(
    person: Person, random: np.random.Generator, points: Doubles, hang: Doubles, layer: int
) -> Part:
    """One layer: (columns, rows, 3) points, and how far each column hangs below its last."""
    rows = 10 if hang.any() else 0
    if rows:
        last, drop = points[:, -1:], np.linspace(0, 1, rows + 1)[1:]
        axis = np.array([0.0, 0.0, -0.06])
        tucked = (
            (last - axis) * (1, 0, 1) * (1 - 0.12 * drop**2)[:, None]
            + axis * (1, 0, 1)
            + last * (0, 1, 0)
        )
        tucked = tucked - np.array([0.0, 1.0, 0.0]) * (hang[:, None] * drop)[..., None]
        points = np.concatenate([points, tucked], axis=1)
    columns, rows = points.shape[:2]
    ring = np.concatenate([points, points[:1]])  # closed, with texture coordinates of its own
    flat = ring.reshape(-1, 3)
    a, b = np.meshgrid(np.arange(columns), np.arange(rows - 1), indexing="ij")
    first = a * rows + b
    quads = np.stack([first, first + 1, first + rows + 1, first + rows], -1).reshape(-1, 4)
    faces = shape.triangles(quads)
    normals = shape.vertex_normals(flat, faces).reshape(columns + 1, rows, 3)
    normals[[0, -1]] = normals[[0, -1]].sum(axis=0)
    uvs = np.zeros((columns + 1, rows, 4), np.float32)
    uvs[..., 0] = (np.arange(columns + 1) / columns)[:, None]
    uvs[..., 1] = 1 - np.linspace(0, 1, rows)[None]
    width, height = 384, 48
    strand = random.uniform(size=width)
    strand = 0.6 * strand + 0.4 * (strand + np.roll(strand, 1) + np.roll(strand, -1)) / 3
    along = np.linspace(0, 1, height)[:, None]
    bright = 0.62 + 0.55 * strand[None] + 0.12 * np.sin(9 * along + 6 * strand[None])
    bright *= 0.75 + 0.25 * np.sin(np.pi * along**0.7)
    ends = 0.86 + 0.2 * random.uniform(size=width)[None] - 0.05 * layer
    alpha = (along < ends) * 1.0
    if person.hair in ("curly", "short") and layer:
        alpha *= random.uniform(size=(height, width)) > 0.12 * layer
    image = np.concatenate([np.repeat(bright[..., None], 3, 2), alpha[..., None]], axis=2)
    color = hair_tone(person) * (0.7 + 0.15 * layer)
    return Part(
        flat,
        faces,
        Material(Texture(image.astype(np.float32), ("repeat", "clamp")), alpha="MASK"),
        normals=normals.reshape(-1, 3),
        colors=np.hstack([np.tile(color, (len(flat), 1)), shape.fading(flat)[:, None]]).astype(
            np.float32
        ),
        uvs=uvs.reshape(-1, 4),
    )


def _bun(person: Person, random: np.random.Generator, roots: Doubles) -> Part:
    """A knot at the back of the head, or high on it."""
    row = int(random.choice((5, 9)))
    centre = roots[_COLUMNS // 2, row] * 1.12
    tilt, turn = np.meshgrid(
        np.linspace(-np.pi / 2, np.pi / 2, 12), np.linspace(0, 2 * np.pi, 25), indexing="ij"
    )
    unit = np.stack(
        [np.cos(tilt) * np.cos(turn), np.sin(tilt), np.cos(tilt) * np.sin(turn)], -1
    ).reshape(-1, 3)
    points = centre + unit * random.uniform(0.12, 0.19) * (1.0, 0.85, 1.0)
    a, b = np.meshgrid(np.arange(11), np.arange(24), indexing="ij")
    first = a * 25 + b
    faces = shape.triangles(np.stack([first, first + 1, first + 26, first + 25], -1).reshape(-1, 4))
    bright = 0.75 + 0.25 * np.sin(turn * 9 + 5 * tilt).ravel()
    colors = np.concatenate(
        [hair_tone(person) * bright[:, None], np.ones((len(points), 1))], axis=1
    )
    return Part(points, faces, Material(), normals=unit, colors=colors.astype(np.float32))
