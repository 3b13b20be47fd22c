"""A person's head as a smooth mesh: targets, one step of Catmull-Clark, the cut at the neck."""

from __future__ import annotations

import functools
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
    """Shape target -> weight of all that a person is, but for the expression."""
    age = (person.age_years - 1) / 48 if person.age_years < 25 else (person.age_years + 40) / 130
    knots = {"baby": 0.0, "child": 0.1875, "young": 0.5, "old": 1.0}
    ages = {name: _tent(age, list(knots.values()), k) for k, name in enumerate(knots)}
    halves = (0.0, 0.5, 1.0)
    steps = ("min", "average", "max")
    muscles = {f"{s}muscle": _tent(person.muscle, halves, k) for k, s in enumerate(steps)}
    bulk = {f"{s}weight": _tent(person.weight, halves, k) for k, s in enumerate(steps)}
    found = {}
    for sex, of_sex in (("female", 1 - person.sex), ("male", person.sex)):
        for when, of_age in ages.items():
            for race, share in zip(ANCESTRIES, person.ancestry, strict=True):
                found[f"{race}-{sex}-{when}"] = of_sex * of_age * share
            for muscle, of_muscle in muscles.items():
                for heavy, of_weight in bulk.items():
                    name = f"universal-{sex}-{when}-{muscle}-{heavy}"
                    found[name] = of_sex * of_age * of_muscle * of_weight
    return {name: weight for name, weight in found.items() if weight}


def _tent(value: float, knots: list[float] | tuple[float, ...], k: int) -> float:
    return float(np.interp(value, knots, np.eye(len(knots))[k]))


def pose(base: Base, person: Person) -> Doubles:
    """The base's vertices (N, 3) as this person's, in the world: upright, facing +Z, the head
    centred on the origin.  The expression changes neither scale nor place."""
    vertices = base.vertices.copy()
    _move(base, vertices, weights(person))
    sides, chosen = sliders(base), dict[str, float]()
    for stem, value in person.sliders.items():
        chosen |= dict.fromkeys(sides[stem][value > 0], abs(value))
    _move(base, vertices, chosen)
    chin, crown = vertices[base.place[_CHIN]], vertices[base.place[_CROWN]]
    body = np.unique(base.faces("body")[0])
    skull = vertices[body[vertices[body, 1] > (chin[1] + crown[1]) / 2], 2]
    middle = np.array([0.0, chin[1], (skull.min() + skull.max()) / 2])
    scale = HEIGHT / (crown[1] - chin[1])
    _move(base, vertices, person.units)
    return (vertices - middle) * scale + (0.0, CENTRE, 0.0)


def sliders(base: Base) -> dict[str, tuple[list[str], list[str]]]:
    """By stem, the targets that a negative and a positive value put on."""
    return _stems(tuple(base.moved))


@functools.cache
def _stems(names: tuple[str, ...]) -> dict[str, tuple[list[str], list[str]]]:
    return stems(names)


def _move(base: Base, vertices: Doubles, weights: dict[str, float]) -> None:
    for name, weight in weights.items():
        rows, delta = base.moved[name]
        vertices[rows] += weight * delta


def subdivided(base: Base, quads: Ints, quad_uvs: Ints) -> Skin:
    """One step of Catmull-Clark (1978); texture coordinates are halved linearly."""
    count, faces = len(base.vertices), len(quads)
    ends = np.stack([quads, np.roll(quads, -1, axis=1)], axis=2).reshape(-1, 2)
    edges, edge_of, uses = np.unique(
        np.sort(ends, axis=1), axis=0, return_inverse=True, return_counts=True
    )
    edge_of = edge_of.reshape(faces, 4)
    rows = np.repeat(np.arange(faces), 4)
    centre = sparse.csr_matrix((np.full(4 * faces, 0.25), (rows, quads.ravel())), (faces, count))
    rows = np.repeat(np.arange(len(edges)), 2)
    middle = sparse.csr_matrix(
        (np.full(len(rows), 0.5), (rows, edges.ravel())), (len(edges), count)
    )
    touching = sparse.csr_matrix(
        (np.full(4 * faces, 0.5), (edge_of.ravel(), np.repeat(np.arange(faces), 4))),
        (len(edges), faces),
    )
    inner = sparse.diags((uses == 2).astype(float))
    along = inner @ (middle + touching @ centre) * 0.5 + sparse.diags((uses != 2) * 1.0) @ middle
    # vertices: (Q + 2 R + (n - 3) S) / n inside, (mean of edge middles + S) / 2 on a border
    valence = np.bincount(quads.ravel(), minlength=count).astype(float)
    at = sparse.csr_matrix(
        (np.ones(4 * faces), (quads.ravel(), np.repeat(np.arange(faces), 4))), (count, faces)
    )
    of = sparse.csr_matrix((np.ones(len(rows)), (edges.ravel(), rows)), (count, len(edges)))
    border = np.bincount(edges[uses != 2].ravel(), minlength=count) > 0
    safe = np.maximum(valence, 1)
    smooth = sparse.diags(1 / safe**2) @ (at @ centre + 2 * of @ middle) + sparse.diags(
        1 - 3 / safe
    )
    rim = sparse.diags((uses != 2) * 0.25)
    edge = of @ rim @ middle + 0.5 * sparse.eye(count)
    keep = sparse.diags(((valence > 0) & ~border) * 1.0), sparse.diags(border * 1.0)
    corner = keep[0] @ smooth + keep[1] @ edge
    matrix = sparse.vstack([corner, along, centre]).tocsr()
    own, before = count + edge_of, count + np.roll(edge_of, 1, axis=1)
    hub = np.broadcast_to((count + len(edges) + np.arange(faces))[:, None], quads.shape)
    small = np.stack([quads, own, hub, before], axis=2).reshape(-1, 4)
    uv = base.uvs[quad_uvs]
    half = (uv + np.roll(uv, -1, axis=1)) / 2
    hubs = np.broadcast_to(uv.mean(axis=1, keepdims=True), uv.shape)
    small_uv = np.stack([uv, half, hubs, np.roll(half, 1, axis=1)], axis=2).reshape(-1, 4, 2)
    used, inverse = np.unique(small, return_inverse=True)
    uvs, uv_of = np.unique(small_uv.reshape(-1, 2), axis=0, return_inverse=True)
    small = inverse.reshape(-1, 4)
    return Skin(matrix[used], triangles(small), split(small, uv_of.reshape(-1, 4), uvs))


def split(quads: Ints, quad_uvs: Ints, uvs: Doubles) -> Split:
    """Triangles of quads whose corners name vertices and, beside them, texture coordinates."""
    corners = np.stack([triangles(quads), triangles(quad_uvs)], axis=2).reshape(-1, 2)
    pairs, inverse = np.unique(corners, axis=0, return_inverse=True)
    return Split(inverse.reshape(-1, 3), pairs[:, 0], uvs[pairs[:, 1]])


def triangles(quads: np.ndarray) -> np.ndarray:
    """Quads (F, 4, ...) as (2 F, 3, ...)."""
    return np.stack([quads[:, [0, 1, 2]], quads[:, [0, 2, 3]]], axis=1).reshape(
        -1, 3, *quads.shape[2:]
    )


def vertex_normals(vertices: Doubles, faces: Ints) -> Doubles:
    """Area-weighted sums, not of unit length."""
    corners = vertices[faces]
    flat = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    sums = [np.bincount(faces.ravel(), np.repeat(flat[:, k], 3), len(vertices)) for k in range(3)]
    return np.stack(sums, axis=1)


def fading(points: Doubles) -> Doubles:
    """Alpha of hair (N,) at points (N, 3): whole down to the neck, none below the cut."""
    return np.clip((points - CUT[0]) @ np.asarray(CUT[1]) / 0.3, 0.0, 1.0)


def cut(rows: Doubles, faces: Ints, plane: tuple = CUT) -> tuple[Doubles, Ints, Ints]:
    """What of a mesh lies above a plane, and its rim.

    Args:
        rows: (V, K), the vertices' places first, then whatever goes along with them.

    Returns:
        rows, faces, and the edges (E, 2) where it was cut, in the order that a cap's faces take.
    """
    point, normal = (np.asarray(value) for value in plane)
    height = (rows[:, :3] - point) @ normal
    above = height[faces] > 0
    kept, crossing = faces[above.all(axis=1)], faces[above.any(axis=1) & ~above.all(axis=1)]
    over, pieces, rims, extra = height > 0, [kept], [], []
    start = len(rows)
    for triangle in crossing:
        k = int(np.argmax(over[triangle] != (over[triangle].sum() > 1)))
        apex, b, c = np.roll(triangle, -k)
        new = []
        for other in (b, c):
            share = height[apex] / (height[apex] - height[other])
            extra.append(rows[apex] + share * (rows[other] - rows[apex]))
            new.append(start + len(extra) - 1)
        if over[apex]:
            pieces.append(np.array([[apex, new[0], new[1]]]))
            rims.append(new[::-1])
        else:
            pieces.append(np.array([[new[0], b, c], [new[0], c, new[1]]]))
            rims.append(new)
    return (
        np.concatenate([rows, np.array(extra).reshape(-1, rows.shape[1])]),
        np.concatenate(pieces),
        np.array(rims),
    )
