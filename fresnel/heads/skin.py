"""Colours of skin, eyes and lashes that need no picture: noise, UV masks, and where light is kept
out (an ambient occlusion of the base mesh, the same for everybody)."""

import functools
from typing import Any, NamedTuple

import numpy as np

from fresnel.data.images import decoded, read_bytes
from fresnel.heads import shape
from fresnel.heads.base import MAX_BYTES, Base, Doubles, Ints, data_folder, load
from fresnel.heads.person import Person
from fresnel.objects.render_set import chance
from fresnel.objects.surface import Material, Part, Texture

_MELANIN = (0.0, 0.25, 0.5, 0.75, 1.0)
_RED = (0.82, 0.68, 0.45, 0.21, 0.075)
_GREEN = (0.57, 0.41, 0.235, 0.093, 0.036)
_BLUE = (0.45, 0.28, 0.13, 0.05, 0.022)
_IRISES = {
    "brown": (0.10, 0.045, 0.018),
    "darkbrown": (0.035, 0.016, 0.008),
    "lightbrown": (0.20, 0.10, 0.035),
    "blue": (0.09, 0.19, 0.36),
    "green": (0.12, 0.20, 0.09),
    "grey": (0.20, 0.24, 0.27),
}
_INSIDE = {  # helper geometry that is seen, and its colour
    "helper-upper-teeth": (0.42, 0.38, 0.31),
    "helper-lower-teeth": (0.36, 0.32, 0.26),
    "helper-tongue": (0.25, 0.06, 0.06),
}
_LASHES = dict.fromkeys(("helper-l-eyelashes-2", "helper-r-eyelashes-2"), (0.02, 0.014, 0.012))
PIVOT = np.array([0.0, 7.3, 0.42])
"""The middle of the base's head, decimetres."""
_ANGLES = (0, 25, 45, 58, 70, 78, 84, 104, 111, 128, 180)
_HEIGHTS = (8.02, 8.0, 7.9, 7.62, 7.3, 7.05, 7.42, 7.42, 7.0, 6.65, 6.45)


class Canvas(NamedTuple):
    """The skin's mesh and what is known of its V vertices: places ``at`` (V, 3) in the base mesh,
    masks in [0, 1], ``light`` that reaches them, and how far above the hairline (decimetres)."""

    skin: shape.Skin
    at: Doubles
    lips: Doubles
    lids: Doubles
    ears: Doubles
    mouth: Doubles
    light: Doubles
    scalp: Doubles


def hairline(at: Doubles) -> Doubles:
    """Height (N,) of points of the base mesh above where hair begins, in decimetres."""
    angle = np.degrees(np.arctan2(np.abs(at[:, 0]), at[:, 2] - PIVOT[2]))
    return at[:, 1] - np.interp(angle, _ANGLES, _HEIGHTS)


@functools.cache
def canvas() -> Canvas:
    """Of the base mesh, made once a process."""
    base, found = load(), []
    quads, quad_uvs = base.faces("body")
    centres = base.vertices[quads].mean(axis=1)
    near = (centres[:, 1] > 5.2) & (np.abs(centres[:, 0]) < 1.3)
    skin = shape.subdivided(base, quads[near], quad_uvs[near])
    at, uv = skin.matrix @ base.vertices, np.zeros((skin.matrix.shape[0], 2))
    uv[skin.split.vertex] = skin.split.uvs
    for name in ("lips", "eyelids", "ears", "inside-mouth"):
        data = read_bytes(data_folder() / "textures" / f"mpfb_{name}.jpg", MAX_BYTES)
        picture = np.asarray(decoded(f"mpfb_{name}.jpg", data).convert("L")) / 255.0
        x, y = (np.stack([uv[:, 0], 1 - uv[:, 1]]) * len(picture)).astype(int)
        found.append(picture[y.clip(0, len(picture) - 1), x.clip(0, len(picture) - 1)])
    lips, lids, ears, mouth = found
    scalp = np.where((ears > 0.3) | (at[:, 1] < 6.3), -1.0, hairline(at))
    light = skin.matrix @ _occlusion(base, quads[near])
    return Canvas(skin, at, lips, lids, ears, mouth, light, scalp)


def traced(vertices: Doubles, faces: Ints, starts: Doubles, ways: Doubles) -> dict[str, Any]:
    """What rays (R, 3) from ``starts`` along ``ways`` hit first: Embree's primID, u, v, tfar."""
    from embreex.mesh_construction import TriangleMesh
    from embreex.rtcore_scene import EmbreeScene

    tracer = EmbreeScene()
    TriangleMesh(tracer, np.ascontiguousarray(vertices[faces].astype(np.float32)))
    return tracer.run(np.ascontiguousarray(starts, np.float32), ways.astype(np.float32), output=1)


def _occlusion(base: Base, quads: Ints) -> Doubles:
    """Share of the hemisphere above each vertex from which light comes, (N,), in [0, 1]."""
    rays, reach = 48, 0.6
    eyes = base.faces("helper-l-eye", "helper-r-eye")[0]
    used, light = np.unique(quads), np.ones(len(base.vertices))
    up = shape.normals(base.vertices, shape.triangles(quads))[used]
    ball = np.random.default_rng(0).normal(size=(rays, 3))
    ball /= np.linalg.norm(ball, axis=1, keepdims=True)
    ways = (up[:, None] * 1.05 + ball).reshape(-1, 3)
    ways /= np.linalg.norm(ways, axis=1, keepdims=True)
    starts = np.repeat(base.vertices[used] + 0.006 * up, rays, axis=0)
    hits = traced(base.vertices, shape.triangles(np.concatenate([quads, eyes])), starts, ways)
    blocked = (hits["primID"] >= 0) & (hits["tfar"] < reach)
    light[used] = 1 - blocked.reshape(-1, rays).mean(axis=1)
    return light


def part(
    points: Doubles,
    faces: Ints,
    color: Any,
    material: Material | None = None,
    normals: Doubles | None = None,
    uvs: Doubles | None = None,
    alpha: Any = 1.0,
) -> Part:
    """Faces with colours (N, 3) or one (3,), smooth unless normals are given."""
    colors = np.empty((len(points), 4), np.float32)
    colors[:, :3], colors[:, 3] = color, alpha
    places = np.zeros((len(points), 4), np.float32)
    if uvs is not None:
        places[:, :2] = uvs
    normals = shape.normals(points, faces) if normals is None else normals
    return Part(points, faces, material or Material(), normals, colors, places)


def noise(at: Doubles, random: np.random.Generator, frequency: float) -> Doubles:
    """A smooth field at points, about normal with deviation 1: a sum of plane waves."""
    waves = random.normal(size=(3, 24)) * frequency
    return np.sin(at @ waves + random.uniform(0, 2 * np.pi, 24)).sum(axis=1) / np.sqrt(12)


def tone(person: Person) -> Doubles:
    """The skin's mean colour, linear (3,)."""
    return np.array([np.interp(person.melanin, _MELANIN, c) for c in (_RED, _GREEN, _BLUE)])


def painted(person: Person, seed: int, base_tone: Doubles, plain: bool) -> Doubles:
    """The skin's colours (V, 3), linear, light that is kept out included.

    Args:
        base_tone: mean colour (3,).
        plain: without lips and mouth: a picture has them.
    """
    on, random = canvas(), chance(seed, person.name, "skin")
    at, front = on.at, np.clip((on.at[:, 2] - 0.8) / 0.4, 0, 1)
    patches = 1 + 0.03 * noise(at, random, 3.0) + 0.02 * noise(at, random, 12.0)
    color = base_tone * patches[:, None]
    # blood: cheeks, the nose's tip, ears, eyelids
    cheeks = np.exp(-(((np.abs(at[:, 0]) - 0.42) / 0.2) ** 2) - ((at[:, 1] - 6.9) / 0.17) ** 2)
    nose = np.exp(-((at[:, 0] / 0.16) ** 2) - ((at[:, 1] - 6.87) / 0.14) ** 2)
    blood = (0.9 * cheeks + 0.8 * nose) * front + 0.7 * on.ears + 0.5 * on.lids
    blood = np.clip(blood * person.redness * (1 + 0.3 * noise(at, random, 6.0)), 0, 1)
    color *= 1 - blood[:, None] * (0.02, 0.22, 0.2)
    # freckles and spots of age
    dots = np.clip(noise(at, random, 30.0) - 1.2, 0, 1) * person.spots
    color *= 1 - dots[:, None] * (0.25, 0.36, 0.4)
    # what gets little light is darker, and more so with age, as wrinkles are
    age = np.clip((person.age_years - 40) / 45, 0, 1)
    color *= (on.light ** (0.5 + 0.7 * age))[:, None]
    # under hair, and where a beard is shaved
    grown = np.clip(on.scalp / 0.12 + 0.25 * noise(at, random, 9.0), 0, 1) * (person.hair != "bald")
    low = np.clip((6.95 - at[:, 1] - 0.35 * np.exp(-((at[:, 0] / 0.25) ** 2))) / 0.12, 0, 1)
    beard = low * np.clip((at[:, 2] - 0.45) / 0.25, 0, 1) * np.clip((at[:, 1] - 5.95) / 0.2, 0, 1)
    lip = np.exp(-((at[:, 0] / 0.2) ** 4) - ((at[:, 1] - 6.72) / 0.05) ** 4) * front
    beard = np.clip(beard + lip, 0, 1) * (1 - on.lips) * max(person.stubble, 0.0)
    beard = np.clip(beard * (0.8 + 0.12 * noise(at, random, 30.0)), 0, 1) * (1 - 0.5 * person.grey)
    dark = hair_tone(person, 0.7) * base_tone / tone(person)
    color += (dark - color) * np.maximum(0.85 * grown, 0.65 * beard)[:, None]
    if plain:
        return np.clip(color, 0.004, 4.0)
    pale = 0.5 + 0.2 * person.is_man
    red = color * (0.95, pale, pale) + person.lips * np.array((0.10, 0.0, 0.01))
    color += (red - color) * np.clip(on.lips * 1.1, 0, 1)[:, None]
    color += (np.array((0.16, 0.03, 0.03)) - color) * on.mouth[:, None]
    return np.clip(color, 0.004, 1.0)


def hair_tone(person: Person, grey: float = 1.0) -> Doubles:
    """Hair's colour (3,), grey as the age has it; ``grey`` scales that: brows grey later."""
    share = person.grey * grey
    return np.asarray(person.hair_color) * (1 - share) + share * np.array((0.56, 0.55, 0.53))


def eyes(base: Base, vertices: Doubles, person: Person) -> list[Part]:
    """Two balls that look where the helper's do, pupil, iris and white by the angle to its pole."""
    rings = np.array([0, 6, 9.5, 10.5, 15, 20, 24.5, 26.5, 30, 40, 55, 75, 95.0])
    turns = np.linspace(0, 2 * np.pi, 25)[:, None]
    out = np.sin(np.radians(rings))
    ball = np.stack(
        [out * np.cos(turns), out * np.sin(turns), np.cos(np.radians(rings)) + 0 * turns], axis=-1
    ).reshape(-1, 3)
    angle, iris = np.tile(rings, 25)[:, None], np.asarray(_IRISES[person.eyes])
    streak = (1 + 0.25 * np.sin(turns * 7 + rings)).reshape(-1, 1) * (0.75 + angle / 50)
    veins = 1 - np.clip((angle - 35) / 60, 0, 0.6) * (0.1, 0.45, 0.4)
    white = np.array((0.62, 0.60, 0.57)) * veins
    zones = [angle < 10, angle < 24, angle < 26]
    choices = [0.006 + 0 * white, iris * streak, 0.35 * iris + 0 * white]
    color, made = np.select(zones, choices, white), []
    for side, pole in (("l", 14598), ("r", 14670)):
        own = vertices[np.unique(base.faces(f"helper-{side}-eye")[0])]
        centre = (own.max(axis=0) + own.min(axis=0)) / 2
        radius = np.ptp(own[:, :2], axis=0).mean() / 2
        forward = vertices[base.place[pole]] - centre
        right = np.cross((0.0, 1.0, 0.0), forward)
        turn = np.stack([right, np.cross(forward, right), forward])
        up = ball @ (turn / np.linalg.norm(turn, axis=1, keepdims=True))
        lit = np.clip(1.0 - 0.9 * np.clip(up[:, 1:2] - 0.15, 0, 1), 0.35, 1)  # under the lid
        glint = up @ np.array((0.25, 0.42, 0.87)) > 0.992
        shown = np.where(glint[:, None], 0.9, color * lit)
        made.append(part(centre + radius * up, shape.grid(25, len(rings)), shown, normals=up))
    return made


def inside(base: Base, vertices: Doubles, lashes: bool) -> list[Part]:
    """Teeth and tongue, which are seen where the mouth is open; with the helper's lashes too."""
    made = []
    for group, color in (_INSIDE | (_LASHES if lashes else {})).items():
        used, inverse = np.unique(base.faces(group)[0], return_inverse=True)
        made.append(part(vertices[used], shape.triangles(inverse.reshape(-1, 4)), color))
    return made


def brows(person: Person, seed: int, skinned: Doubles, normals: Doubles) -> Part:
    """Strands on a copy of the skin above the eyes, lifted a little."""
    on, random = canvas(), chance(seed, person.name, "brows")
    at, faces = on.at, on.skin.faces
    across = (np.abs(at[:, 0]) - 0.09) / 0.44
    arc = 7.44 + 0.05 * np.sin(np.clip(across, 0, 1) * 2.8)
    up = (at[:, 1] - arc) / 0.14 + 0.5
    near = (across > -0.15) & (across < 1.15) & (up > -0.5) & (up < 1.5) & (at[:, 2] > 0.9)
    used, inverse = np.unique(faces[near[faces].all(axis=1)], return_inverse=True)
    x, y = (np.arange(96) + 0.5) / 96, (np.arange(32)[:, None] + 0.5) / 32
    slant = x * 26 + (y - 0.5) * 5 * (1 - 0.6 * x)
    strands = np.interp(slant, np.arange(-6, 36, 0.25), random.uniform(0, 1, 168))
    thick = (0.13 + 0.22 * person.brows) * np.clip(1.15 - 0.85 * x, 0, 1) * np.clip(x * 12, 0.5, 1)
    inner = np.clip((x - 0.03) * 20, 0, 1) * np.clip((0.98 - x) * 12, 0, 1)
    cover = (1.1 - np.abs(y[::-1] - 0.5) / np.maximum(thick, 1e-3)) * inner
    image = np.ones((32, 96, 4), np.float32)
    image[..., 3] = np.clip(cover * 1.2 - 0.55 * strands, 0, 1)
    material = Material(Texture(image, ("clamp", "clamp")), alpha="MASK", cutoff=0.4)
    color, uvs = hair_tone(person, 0.5) * 0.75, np.stack([across[used], up[used]], axis=1)
    points, inner_faces = skinned[used] + 0.004 * normals[used], inverse.reshape(-1, 3)
    return part(points, inner_faces, color, material, normals[used], uvs)
