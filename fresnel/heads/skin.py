"""Colours of skin, eyes and lashes that need no picture: noise, UV masks, and where light is kept
out (an ambient occlusion of the base mesh, the same for everybody)."""

from __future__ import annotations

import functools
import io
from dataclasses import dataclass

import numpy as np
from PIL import Image

from fresnel.heads import shape
from fresnel.heads.base import Base, Doubles, Ints, data_folder, load, masks
from fresnel.heads.person import Person, chance
from fresnel.objects.surface import Material, Part, Texture

_MELANIN = (0.0, 0.25, 0.5, 0.75, 1.0)
_TONES = (
    (0.82, 0.57, 0.45),
    (0.68, 0.41, 0.28),
    (0.45, 0.235, 0.13),
    (0.21, 0.093, 0.05),
    (0.075, 0.036, 0.022),
)
_IRISES = {
    "brown": (0.10, 0.045, 0.018),
    "darkbrown": (0.035, 0.016, 0.008),
    "lightbrown": (0.20, 0.10, 0.035),
    "blue": (0.09, 0.19, 0.36),
    "green": (0.12, 0.20, 0.09),
    "grey": (0.20, 0.24, 0.27),
}


@dataclass(frozen=True)
class Canvas:
    """The skin's mesh and what is known of its V vertices: places ``at`` (V, 3) in the base mesh,
    masks in [0, 1], ``light`` that reaches them, height above the hairline (decimetres)."""

    skin: shape.Skin
    at: Doubles
    lips: Doubles
    lids: Doubles
    ears: Doubles
    mouth: Doubles
    light: Doubles
    scalp: Doubles


_HAIRLINE = (
    (0, 8.02),
    (25, 8.0),
    (45, 7.88),
    (58, 7.62),
    (70, 7.3),
    (78, 7.05),
    (84, 7.42),
    (104, 7.42),
    (111, 7.0),
    (128, 6.65),
    (180, 6.45),
)
_PIVOT = np.array([0.0, 7.3, 0.42])


def hairline(at: Doubles) -> Doubles:
    """Height of points of the base mesh above where hair begins, in decimetres."""
    angle = np.degrees(np.arctan2(np.abs(at[:, 0]), at[:, 2] - _PIVOT[2]))
    knots, heights = zip(*_HAIRLINE, strict=True)
    return at[:, 1] - np.interp(angle, knots, heights)


@functools.cache
def canvas() -> Canvas:
    """Of the base mesh, made once a process."""
    base = load()
    quads, quad_uvs = base.faces("body")
    centres = base.vertices[quads].mean(axis=1)
    near = (centres[:, 1] > 5.2) & (np.abs(centres[:, 0]) < 1.3)
    quads, quad_uvs = quads[near], quad_uvs[near]
    skin = shape.subdivided(base, quads, quad_uvs)
    at = skin.matrix @ base.vertices
    uv = np.zeros((len(at), 2))
    uv[skin.split.vertex] = skin.split.uvs
    folder, found = data_folder(), {}
    for name in ("lips", "eyelids", "ears", "inside-mouth"):
        picture = np.asarray(Image.open(io.BytesIO(masks(folder, name))).convert("L")) / 255.0
        rows = ((1 - uv[:, 1]) * picture.shape[0]).astype(int).clip(0, picture.shape[0] - 1)
        columns = (uv[:, 0] * picture.shape[1]).astype(int).clip(0, picture.shape[1] - 1)
        found[name] = picture[rows, columns]
    lips, lids, ears, mouth = found.values()
    light = skin.matrix @ _occlusion(base, quads)
    scalp = np.where((ears > 0.3) | (at[:, 1] < 6.3), -1.0, hairline(at))
    return Canvas(skin, at, lips, lids, ears, mouth, light, scalp)


def _occlusion(base: Base, quads: Ints, rays: int = 48, reach: float = 0.6) -> Doubles:
    """Share of the hemisphere above each vertex from which light comes, (N,), in [0, 1]."""
    from embreex.mesh_construction import TriangleMesh
    from embreex.rtcore_scene import EmbreeScene

    eyes = np.concatenate([base.faces(f"helper-{side}-eye")[0] for side in "lr"])
    faces = shape.triangles(np.concatenate([quads, eyes]))
    tracer = EmbreeScene()
    TriangleMesh(tracer, np.ascontiguousarray(base.vertices[faces].astype(np.float32)))
    used = np.unique(quads)
    normals = shape.vertex_normals(base.vertices, shape.triangles(quads))[used]
    normals /= np.linalg.norm(normals, axis=1, keepdims=True)
    random = np.random.default_rng(0)
    ball = random.normal(size=(rays, 3))
    ball /= np.linalg.norm(ball, axis=1, keepdims=True)
    directions = (normals[:, None] * 1.05 + ball).reshape(-1, 3).astype(np.float32)
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    starts = np.repeat(base.vertices[used] + 0.006 * normals, rays, axis=0).astype(np.float32)
    hits = tracer.run(starts, directions, output=1)
    blocked = (hits["primID"] >= 0) & (hits["tfar"] < reach)
    light = np.ones(len(base.vertices))
    light[used] = 1 - blocked.reshape(-1, rays).mean(axis=1)
    return light


def noise(at: Doubles, random: np.random.Generator, frequency: float) -> Doubles:
    """A smooth field at points, about normal with deviation 1: a sum of plane waves."""
    waves = random.normal(size=(3, 24)) * frequency
    return np.sin(at @ waves + random.uniform(0, 2 * np.pi, 24)).sum(axis=1) / np.sqrt(12)


def tone(person: Person) -> Doubles:
    """The skin's mean colour, linear (3,)."""
    return np.array([np.interp(person.melanin, _MELANIN, c) for c in zip(*_TONES, strict=True)])


def mean_tone(picture: np.ndarray) -> Doubles:
    """The mean colour (3,) of a skin's picture (h, w, 4) on the cheeks and forehead."""
    height, width = picture.shape[:2]
    rows, columns = (
        slice(int(0.44 * height), int(0.60 * height)),
        slice(int(0.76 * width), int(0.94 * width)),
    )
    return np.median(picture[rows, columns, :3].astype(np.float64), axis=(0, 1))


def painted(person: Person, seed: int, base_tone: Doubles, plain: bool) -> Doubles:
    """The skin's colours (V, 3), linear, light that is kept out included.

    Args:
        base_tone: mean colour (3,).
        plain: without lips and mouth: a picture has them.
    """
    on, random = canvas(), chance(seed, person.name, "skin")
    at, front = on.at, np.clip((on.at[:, 2] - 0.8) / 0.4, 0, 1)
    patches = 1 + 0.035 * noise(at, random, 3.0) + 0.03 * noise(at, random, 12.0)
    color = base_tone * patches[:, None]
    # blood: cheeks, the nose's tip, ears, eyelids
    cheeks = np.exp(-(((np.abs(at[:, 0]) - 0.42) / 0.2) ** 2) - ((at[:, 1] - 6.9) / 0.17) ** 2)
    nose = np.exp(-((at[:, 0] / 0.16) ** 2) - ((at[:, 1] - 6.87) / 0.14) ** 2)
    blood = (0.9 * cheeks + 0.8 * nose) * front + 0.7 * on.ears + 0.5 * on.lids
    blood = np.clip(blood * person.redness * (1 + 0.3 * noise(at, random, 6.0)), 0, 1)
    color *= 1 - blood[:, None] * (0.02, 0.22, 0.2)
    # freckles and spots of age
    dots = np.clip(noise(at, random, 26.0) - 1.1, 0, 1) * person.spots
    color *= 1 - dots[:, None] * (0.35, 0.5, 0.55)
    # wrinkles' shade, where there is little light anyway
    age = np.clip((person.age_years - 40) / 45, 0, 1)
    color *= (on.light ** (0.75 + 0.6 * age))[:, None]
    rough = person.stubble if person.stubble > 0 else 0.0
    low = np.clip((6.95 - at[:, 1] - 0.35 * np.exp(-((at[:, 0] / 0.25) ** 2))) / 0.12, 0, 1)
    beard = low * np.clip((at[:, 2] - 0.45) / 0.25, 0, 1) * np.clip((at[:, 1] - 5.95) / 0.2, 0, 1)
    lip = np.exp(-((at[:, 0] / 0.2) ** 4) - ((at[:, 1] - 6.72) / 0.05) ** 4) * front
    beard = np.clip(beard + lip, 0, 1) * (1 - on.lips) * rough
    grown = np.clip(beard * (0.75 + 0.25 * noise(at, random, 30.0)), 0, 1)
    color += (hair_tone(person, 0.7) * base_tone / tone(person) - color) * (0.75 * grown)[:, None]
    if plain:
        return np.clip(color, 0.004, 4.0)
    red = color * (0.95, 0.52, 0.5) + person.lips * np.array((0.10, 0.0, 0.01))
    color += (red - color) * np.clip(on.lips * 1.1, 0, 1)[:, None]
    color += (np.array((0.16, 0.03, 0.03)) - color) * on.mouth[:, None]
    return np.clip(color, 0.004, 1.0)


def hair_tone(person: Person, grey: float = 1.0) -> Doubles:
    """Hair's colour (3,), grey as the age has it; ``grey`` scales that: brows grey later."""
    share = person.grey * grey
    return np.asarray(person.hair_color) * (1 - share) + share * np.array((0.56, 0.55, 0.53))


def eyes(base: Base, vertices: Doubles, person: Person) -> list[Part]:
    """Two balls that look where the helper's do, pupil, iris and white by the angle to its pole."""
    angles = np.radians([0, 6, 9.5, 10.5, 15, 20, 24.5, 26.5, 30, 40, 55, 75, 95])
    turns = np.linspace(0, 2 * np.pi, 25)[:-1]
    rings, spokes = len(angles), len(turns)
    ball = np.stack(
        [
            np.outer(np.sin(angles), np.cos(turns)),
            np.outer(np.sin(angles), np.sin(turns)),
            np.outer(np.cos(angles), np.ones(spokes)),
        ],
        axis=-1,
    ).reshape(-1, 3)
    a, b = np.meshgrid(np.arange(rings - 1), np.arange(spokes), indexing="ij")
    c = (b + 1) % spokes
    quads = np.stack(
        [a * spokes + b, (a + 1) * spokes + b, (a + 1) * spokes + c, a * spokes + c], -1
    )
    angle = np.degrees(np.repeat(angles, spokes))
    iris = np.asarray(_IRISES[person.eyes])
    streak = 1 + 0.25 * np.sin(np.tile(turns, rings) * 7 + angle)
    color = np.where(
        angle[:, None] < 10, 0.006, iris * streak[:, None] * (0.75 + angle[:, None] / 50)
    )
    color = np.where(angle[:, None] > 24, iris * 0.35, color)
    veins = 1 - np.clip((angle[:, None] - 35) / 60, 0, 0.6) * (0.1, 0.45, 0.4)
    color = np.where(angle[:, None] > 26, np.array((0.62, 0.60, 0.57)) * veins, color)
    made = []
    for side, pole in (("l", 14598), ("r", 14670)):
        rows = np.unique(base.faces(f"helper-{side}-eye")[0])
        centre = (vertices[rows].max(axis=0) + vertices[rows].min(axis=0)) / 2
        radius = np.ptp(vertices[rows][:, :2], axis=0).mean() / 2
        forward = vertices[base.place[pole]] - centre
        forward /= np.linalg.norm(forward)
        right = np.cross((0.0, 1.0, 0.0), forward)
        right /= np.linalg.norm(right)
        turn = np.stack([right, np.cross(forward, right), forward])
        normals = ball @ turn
        shadow = np.clip(1.0 - 0.9 * np.clip(normals[:, 1:2] - 0.1, 0, 1), 0.3, 1)
        shown = np.concatenate([color * shadow, np.ones((len(ball), 1))], axis=1)
        glint = normals @ np.array((0.25, 0.42, 0.87)) > 0.992
        shown[glint, :3] = 0.9
        made.append(
            Part(
                *(centre + radius * normals, shape.triangles(quads.reshape(-1, 4)), Material()),
                normals=normals,
                colors=shown.astype(np.float32),
            )
        )
    return made


def teeth(base: Base, vertices: Doubles) -> list[Part]:
    """Teeth and tongue: they are seen where the mouth is open."""
    made = []
    for group, color in (
        ("upper-teeth", (0.42, 0.38, 0.31)),
        ("lower-teeth", (0.36, 0.32, 0.26)),
        ("tongue", (0.25, 0.06, 0.06)),
    ):
        faces = shape.triangles(base.faces(f"helper-{group}")[0])
        made.append(plain(vertices, faces, color))
    return made


def plain(vertices: Doubles, faces: Ints, color: tuple[float, float, float]) -> Part:
    used, inverse = np.unique(faces, return_inverse=True)
    inner, own = inverse.reshape(faces.shape), vertices[used]
    colors = np.tile(np.array([*color, 1.0], np.float32), (len(used), 1))
    return Part(own, inner, Material(), normals=shape.vertex_normals(own, inner), colors=colors)


def brows(person: Person, seed: int, skinned: Doubles, normals: Doubles) -> Part:
    """Strands on a copy of the skin above the eyes, lifted a little."""
    on, random = canvas(), chance(seed, person.name, "brows")
    at, faces = on.at, on.skin.faces
    across = (np.abs(at[:, 0]) - 0.09) / 0.44
    arc = 7.43 + 0.045 * np.sin(np.clip(across, 0, 1) * 2.9)
    up = (at[:, 1] - arc) / 0.14 + 0.5
    inside = (across > -0.15) & (across < 1.15) & (up > -0.5) & (up < 1.5) & (at[:, 2] > 0.9)
    faces = faces[inside[faces].all(axis=1)]
    used, inverse = np.unique(faces, return_inverse=True)
    width, height = 96, 32
    x, y = (np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height
    slant = x[None] * 26 + (y[:, None] - 0.5) * 5 * (1 - 0.6 * x[None])
    strands = np.interp(slant, np.arange(-6, 36, 0.25), random.uniform(0, 1, 168))
    thick = (0.16 + 0.26 * person.brows) * np.clip(1.15 - 0.85 * x, 0, 1) * np.clip(x * 12, 0.5, 1)
    inner = np.clip((x - 0.03) * 20, 0, 1) * np.clip((0.98 - x) * 12, 0, 1)
    cover = (1.1 - np.abs(y[::-1, None] - 0.5) / np.maximum(thick[None], 1e-3)) * inner[None]
    alpha = np.clip(cover * 1.2 - 0.55 * strands, 0, 1)
    image = np.concatenate([np.ones((height, width, 3)), alpha[..., None]], axis=2)
    uvs = np.zeros((len(used), 4), np.float32)
    uvs[:, 0], uvs[:, 1] = across[used], up[used]
    color = hair_tone(person, 0.5) * 0.75
    return Part(
        skinned[used] + 0.004 * normals[used],
        inverse.reshape(-1, 3),
        Material(Texture(image.astype(np.float32), ("clamp", "clamp")), alpha="MASK", cutoff=0.4),
        normals=normals[used],
        colors=np.tile(np.array([*color, 1.0], np.float32), (len(used), 1)),
        uvs=uvs,
    )


def lashes(base: Base, vertices: Doubles) -> list[Part]:
    """The helper's upper lashes, dark."""
    faces = np.concatenate([base.faces(f"helper-{side}-eyelashes-2")[0] for side in "lr"])
    return [plain(vertices, shape.triangles(faces), (0.02, 0.014, 0.012))]
