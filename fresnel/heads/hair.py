"""Hair of our own: sheets of strands that follow the scalp and hang; where strands end, an alpha
test thins them out."""

import functools
from typing import NamedTuple

import numpy as np
from scipy import sparse

from fresnel.heads import shape
from fresnel.heads.base import Doubles
from fresnel.heads.person import Person
from fresnel.heads.skin import PIVOT, canvas, hair_tone, hairline, part, traced
from fresnel.objects.render_set import chance
from fresnel.objects.surface import Material, Part, Texture

_COLUMNS, _TILTS, _ROWS = 96, np.linspace(89.0, -60.0, 50), 14
_STYLES = {  # depth, length below the ears, layers, of the strands that are missing
    "cropped": (0.018, 0.0, 2, 0.0),
    "short": (0.05, 0.0, 3, 0.1),
    "parted": (0.06, 0.0, 3, 0.05),
    "curly": (0.11, 0.0, 3, 0.12),
    "bob": (0.06, 0.5, 3, 0.0),
    "long": (0.055, 0.8, 3, 0.0),
    "tied": (0.035, 0.0, 2, 0.0),
}


class Scalp(NamedTuple):
    """A grid of points on the head, (columns around, rows from the crown down): ``matrix`` makes
    them of the skin's vertices; ``angle`` (columns,) in degrees is 0 in front, ``line`` (columns,)
    the row, a fraction, where hair begins."""

    matrix: sparse.csr_matrix
    angle: Doubles
    line: Doubles


@functools.cache
def scalp() -> Scalp:
    """On the base mesh, found once a process by rays from inside of the head."""
    on = canvas()
    faces = on.skin.faces
    faces = faces[(on.ears[faces].max(axis=1) < 0.3) & (on.at[faces][..., 1].min(axis=1) > 6.2)]
    angle, tilt = np.arange(_COLUMNS) * 360.0 / _COLUMNS, np.radians(_TILTS)
    turn = np.radians(angle)[:, None]
    level = np.cos(tilt) * np.ones_like(turn)
    ways = np.stack([np.sin(turn) * level, np.sin(tilt) + 0 * turn, np.cos(turn) * level], axis=-1)
    flat = ways.reshape(-1, 3)
    hit = traced(on.at, faces, np.broadcast_to(PIVOT, flat.shape), flat)
    u, v = hit["u"].astype(float), hit["v"].astype(float)
    weights, corners = np.stack([1 - u - v, u, v], axis=1), faces[np.maximum(hit["primID"], 0)]
    missed, known = hit["primID"] < 0, np.unique(faces)
    guess = PIVOT + 0.9 * flat[missed]  # over an ear's hole: the nearest vertex there is
    nearest = ((on.at[known] - guess[:, None]) ** 2).sum(axis=-1).argmin(axis=1)
    corners[missed], weights[missed] = known[nearest][:, None], (1.0, 0.0, 0.0)
    rows = np.repeat(np.arange(len(flat)), 3)
    matrix = sparse.csr_matrix((weights.ravel(), (rows, corners.ravel())), (len(flat), len(on.at)))
    grown = hairline(matrix @ on.at).reshape(_COLUMNS, -1) > 0
    grown[:, -1] = False
    return Scalp(matrix, angle, np.argmin(grown, axis=1).astype(float))


def wig(person: Person, seed: int, skinned: Doubles, normals: Doubles) -> list[Part]:
    """The hair of a person; skinned and normals are the skin's (V, 3)."""
    if person.hair not in _STYLES:
        return []
    grown, random = scalp(), chance(seed, person.name, "hair")
    depth, length, layers, gaps = _STYLES[person.hair]
    depth, length = depth * random.uniform(0.75, 1.25), length * random.uniform(0.8, 1.2)
    front = np.minimum(grown.angle, 360 - grown.angle)
    hang = np.clip((front - 74) / 8, 0, 1) * length
    # where strands end: at the hairline, higher where it recedes, lower for a fringe
    ends = grown.line + np.interp(grown.angle, np.arange(0, 361, 10), _loop(random, 36) * 0.4)
    ends -= np.clip(-person.fringe, 0, 1) * 5 * np.exp(-(((front - 38) / 18) ** 2))
    ends += np.clip(person.fringe - 0.4, 0, 1) * 11 * np.clip((62 - front) / 14, 0, 1)
    ends = np.where(hang > 0.02, np.minimum(ends, 33), ends).clip(4, len(_TILTS) - 2)
    t = np.linspace(0, 1, _ROWS)
    at = ends[:, None] * t
    row, share, column = at.astype(int), (at % 1)[..., None], np.arange(_COLUMNS)[:, None]

    def sampled(values: Doubles) -> Doubles:
        values = (grown.matrix @ values).reshape(_COLUMNS, -1, 3)
        return values[column, row] * (1 - share) + values[column, row + 1] * share

    roots, up = sampled(skinned), sampled(normals)
    roots += (0.05 * (hang > 0.02) * np.exp(-(((front - 98) / 16) ** 2)))[:, None, None] * up
    profile = np.maximum(np.sin(np.pi * t**0.8) ** 0.5, 0.85 * (t < 0.6))
    profile = profile + (hang > 0.02)[:, None] * (t > 0.5) * (1 - profile)
    turn, (one, two) = np.radians(grown.angle)[:, None], random.uniform(0, 6, 2)
    lump = 1 + 0.12 * np.sin(3 * turn + one) + 0.1 * np.sin(5 * turn + 4 * t + two)
    side = random.choice((-1, 1)) * 40
    if person.hair == "parted":
        away = np.abs((grown.angle - side + 180) % 360 - 180)
        lump = lump * (1 - 0.5 * np.exp(-((away / 14) ** 2)))[:, None]
    elif person.hair == "curly":
        lump = lump * (1 + 0.25 * random.normal(size=lump.shape))
    lump = 1 + (lump - 1) * np.minimum(3 * t, 1)  # columns meet at the crown
    thick, made = depth * profile * lump, []
    for layer in range(layers):
        points = roots + up * (0.006 + thick * (layer + 1) / layers)[..., None]
        made.append(_sheet(person, random, points, hang, layer, gaps * layer))
    if person.hair == "tied":
        turns, tilts = np.linspace(0, 2 * np.pi, 25)[:, None], np.linspace(-1.57, 1.57, 12)
        level = np.cos(tilts)
        ball = np.stack(
            [level * np.cos(turns), np.sin(tilts) + 0 * turns, level * np.sin(turns)], -1
        )
        ball = ball.reshape(-1, 3)
        knot = roots[_COLUMNS // 2, int(random.choice((4, 9)))] * 1.12
        color = hair_tone(person) * (0.75 + 0.25 * np.sin(turns * 9 + 5 * tilts)).reshape(-1, 1)
        points = knot + ball * (1.0, 0.85, 1.0) * random.uniform(0.12, 0.19)
        made.append(part(points, shape.grid(25, 12), color))
    return made


def _loop(random: np.random.Generator, count: int) -> Doubles:
    """Smooth noise whose last value is its first, (count + 1,)."""
    values = random.normal(size=count)
    return np.append(values, values[0])


def _sheet(
    person: Person,
    random: np.random.Generator,
    points: Doubles,
    hang: Doubles,
    layer: int,
    gaps: float,
) -> Part:
    """One layer: (columns, rows, 3) points, and how far each column hangs below its last."""
    if hang.any():
        last, drop = points[:, -1:], np.linspace(0, 1, 11)[1:, None]
        tucked = last * (1, 1, 1) * np.where([True, False, True], 1 - 0.12 * drop**2, 1.0)
        points = np.concatenate([points, tucked - hang[:, None, None] * drop * (0, 1, 0)], axis=1)
    columns, rows = points.shape[:2]
    flat = np.concatenate([points, points[:1]]).reshape(-1, 3)  # the last column is the first
    faces = shape.grid(columns + 1, rows)
    normals = shape.normals(flat, faces).reshape(columns + 1, rows, 3)
    normals[[0, -1]] = normals[[0, -1]].sum(axis=0)
    u, v = np.arange(columns + 1)[:, None] / columns, np.linspace(0, 1, rows)
    sweep = 0.1 * random.normal()
    uvs = np.stack([u + sweep * v, 1 - v + 0 * u], axis=-1).reshape(-1, 2)
    width, height = 512, 48
    strand, along = random.uniform(size=width), np.linspace(0, 1, height)[:, None]
    strand = (strand + np.roll(strand, 1)) / 2
    bright = 0.5 + 0.8 * strand + 0.12 * np.sin(9 * along + 6 * strand)
    bright *= 0.75 + 0.25 * np.sin(np.pi * along**0.7)
    alpha = along < 0.84 + 0.18 * random.uniform(size=width) - 0.03 * layer
    alpha = alpha & (random.uniform(size=(height, width)) > gaps)
    image = np.stack([bright, bright, bright, alpha], axis=2).astype(np.float32)
    color = np.tile(hair_tone(person) * (0.7 + 0.15 * layer), (len(flat), 1))
    material = Material(Texture(image, ("repeat", "clamp")), alpha="MASK")
    alphas = np.clip(shape.above(flat) / 0.3, 0, 1)
    return part(flat, faces, color, material, normals.reshape(-1, 3), uvs, alphas)
