"""A person's head as a smooth mesh: targets, one step of Catmull-Clark, the cut at the neck."""

from typing import NamedTuple

import numpy as np
from scipy import sparse

from fresnel.heads.base import Base, Doubles, Ints
from fresnel.heads.person import ANCESTRIES, Person, stems

_CHIN, _CROWN = 747, 881
HEIGHT = 1.13
"""Chin to crown in the world's units: with hair, two thirds of a picture's height."""
CENTRE = -0.6
"""The chin's height: head and hair (0.08 above the crown) are centred on the origin."""
CUT = ((0.0, -0.78, 0.12), (0.0, 0.97, 0.22))
"""A point and the upward normal of the plane that ends the neck: lower in front, as busts are."""
_AGES = (1.0, 10.0, 25.0, 90.0)  # what MakeHuman calls baby, child, young and old


class Split(NamedTuple):
    """Triangles (F, 3) of points that have one texture coordinate each: ``uvs`` (P, 2), and the
    vertex (P,) that each is a copy of."""

    faces: Ints
    vertex: Ints
    uvs: Doubles


class Skin(NamedTuple):
    """A subdivided mesh: ``matrix`` makes its vertices of the base's rows, ``faces`` (F, 3) name
    them, ``split`` has the same triangles with texture coordinates."""

    matrix: sparse.csr_matrix
    faces: Ints
    split: Split


def weights(person: Person) -> dict[str, float]:
    """Shape target -> weight of all that a person is, but for sliders and expression."""
    halves, found = (0.0, 0.5, 1.0), {}
    ages = _tents(person.age_years, _AGES, ("baby", "child", "young", "old"))
    muscles = _tents(person.muscle, halves, ("minmuscle", "averagemuscle", "maxmuscle"))
    bulks = _tents(person.weight, halves, ("minweight", "averageweight", "maxweight"))
    for sex, of_sex in (("female", 1 - person.sex), ("male", person.sex)):
        for age, of_age in ages.items():
            for race, share in zip(ANCESTRIES, person.ancestry, strict=True):
                found[f"{race}-{sex}-{age}"] = of_sex * of_age * share
            for muscle, of_muscle in muscles.items():
                for bulk, of_bulk in bulks.items():
                    name = f"universal-{sex}-{age}-{muscle}-{bulk}"
                    found[name] = of_sex * of_age * of_muscle * of_bulk
    return {name: weight for name, weight in found.items() if weight}


def _tents(value: float, knots: tuple[float, ...], names: tuple[str, ...]) -> dict[str, float]:
    shares = (float(np.interp(value, knots, row)) for row in np.eye(len(knots)))
    return dict(zip(names, shares, strict=True))


def pose(base: Base, person: Person) -> Doubles:
    """The base's vertices (N, 3) as this person's, in the world: upright, facing +Z, the head
    centred on the origin.  The expression changes neither scale nor place."""
    vertices, sides = base.vertices.copy(), sliders(base)
    drawn = [(name, abs(w)) for stem, w in person.sliders.items() for name in sides[stem][w > 0]]
    _move(base, vertices, weights(person) | dict(drawn))
    chin, crown = vertices[base.place[_CHIN]], vertices[base.place[_CROWN]]
    body = np.unique(base.faces("body")[0])
    skull = vertices[body[vertices[body, 1] > (chin[1] + crown[1]) / 2], 2]
    middle = np.array([0.0, chin[1], (skull.min() + skull.max()) / 2])
    scale = HEIGHT / (crown[1] - chin[1])
    _move(base, vertices, person.units)
    return (vertices - middle) * scale + (0.0, CENTRE, 0.0)


def sliders(base: Base) -> dict[str, tuple[list[str], list[str]]]:
    """By stem, the targets that a negative and a positive value put on."""
    return stems(tuple(base.moved))


def _move(base: Base, vertices: Doubles, weights: dict[str, float]) -> None:
    for name, weight in weights.items():
        rows, delta = base.moved[name]
        vertices[rows] += weight * delta


def subdivided(base: Base, quads: Ints, quad_uvs: Ints) -> Skin:
    """One step of Catmull-Clark (1978), as Warren and Weimer (2001) have it: split linearly, then
    move every vertex towards the mean of its quads' centres.  Texture coordinates only split."""
    count, faces = len(base.vertices), len(quads)
    ends = np.sort(np.stack([quads, np.roll(quads, -1, axis=1)], axis=2), axis=2).reshape(-1, 2)
    edges, edge_of = np.unique(ends, axis=0, return_inverse=True)
    edge_of = count + edge_of.reshape(faces, 4)
    hub = np.broadcast_to(count + len(edges) + np.arange(faces)[:, None], quads.shape)
    linear = sparse.vstack([sparse.eye(count), _mean(edges, count), _mean(quads, count)]).tocsr()

    def four(corner: np.ndarray, half: np.ndarray, middle: np.ndarray) -> np.ndarray:
        found = np.stack([corner, half, middle, np.roll(half, 1, axis=1)], axis=2)
        return found.reshape(-1, 4, *corner.shape[2:])

    small = four(quads, edge_of, hub)
    used, inverse = np.unique(small, return_inverse=True)
    small, linear = inverse.reshape(-1, 4), linear[used]
    valence = np.bincount(small.ravel()).astype(float)
    around = sparse.csr_matrix(
        (1 / valence[small.ravel()], (small.ravel(), np.repeat(np.arange(len(small)), 4)))
    )
    share = sparse.diags(4 / valence)
    pulled = share @ around @ _mean(small, len(used)) + sparse.eye(len(used)) - share
    uv = base.uvs[quad_uvs]
    middle = np.broadcast_to(uv.mean(axis=1, keepdims=True), uv.shape)
    small_uv = four(uv, (uv + np.roll(uv, -1, axis=1)) / 2, middle).reshape(-1, 2)
    uvs, uv_of = np.unique(small_uv, axis=0, return_inverse=True)
    matrix = (pulled @ linear).tocsr()
    return Skin(matrix, triangles(small), split(small, uv_of.reshape(-1, 4), uvs))


def _mean(groups: Ints, count: int) -> sparse.csr_matrix:
    """What makes the mean of each group (G, k) of rows of ``count``."""
    groups_of = np.repeat(np.arange(len(groups)), groups.shape[1])
    values = np.full(groups.size, 1 / groups.shape[1])
    return sparse.csr_matrix((values, (groups_of, groups.ravel())), (len(groups), count))


def split(quads: Ints, quad_uvs: Ints, uvs: Doubles) -> Split:
    """Triangles of quads whose corners name vertices and, beside them, texture coordinates."""
    corners = np.stack([triangles(quads), triangles(quad_uvs)], axis=2).reshape(-1, 2)
    pairs, inverse = np.unique(corners, axis=0, return_inverse=True)
    return Split(inverse.reshape(-1, 3), pairs[:, 0], uvs[pairs[:, 1]])


def triangles(quads: np.ndarray) -> np.ndarray:
    """Quads (F, 4) as (2 F, 3)."""
    return quads[:, [[0, 1, 2], [0, 2, 3]]].reshape(-1, 3)


def grid(columns: int, rows: int) -> Ints:
    """Triangles of a grid of columns x rows points."""
    first = (np.arange(columns - 1)[:, None] * rows + np.arange(rows - 1)).ravel()
    return triangles(np.stack([first, first + 1, first + rows + 1, first + rows], axis=1))


def normals(vertices: Doubles, faces: Ints) -> Doubles:
    """Of unit length, area-weighted, (V, 3)."""
    corners = vertices[faces]
    flat = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    sums = [np.bincount(faces.ravel(), np.repeat(flat[:, k], 3), len(vertices)) for k in range(3)]
    found = np.stack(sums, axis=1)
    return found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-12)


def above(points: Doubles) -> Doubles:
    """Height (N,) of points (N, 3) above the cut."""
    return (points - CUT[0]) @ np.asarray(CUT[1])


def cut(rows: Doubles, faces: Ints) -> tuple[Doubles, Ints, Ints]:
    """What of a mesh lies above the cut, and its rim.

    Args:
        rows: (V, K), the vertices' places first, then whatever goes along with them.

    Returns:
        rows, faces, and the edges (E, 2) of the rim in the order that a cap's faces take.
    """
    height = above(rows[:, :3])
    over = height > 0
    pieces = [faces[over[faces].all(axis=1)]]
    apart = faces[over[faces].any(axis=1) & ~over[faces].all(axis=1)]
    lone = over[apart] != (over[apart].sum(axis=1) > 1)[:, None]  # one corner is on its own side
    turn = (np.argmax(lone, axis=1)[:, None] + np.arange(3)) % 3
    apex, b, c = np.take_along_axis(apart, turn, axis=1).T
    new = []
    for other in (b, c):
        share = (height[apex] / (height[apex] - height[other]))[:, None]
        new.append(rows[apex] + share * (rows[other] - rows[apex]))
    at = len(rows) + np.arange(len(apart))
    to = at + len(apart)
    up = over[apex]
    pieces += [np.stack(corners, axis=1)[up] for corners in [(apex, at, to)]]
    pieces += [np.stack(corners, axis=1)[~up] for corners in [(at, b, c), (at, c, to)]]
    rims = np.where(up[:, None], np.stack([to, at], axis=1), np.stack([at, to], axis=1))
    return np.concatenate([rows, *new]), np.concatenate(pieces), rims
