"""A person's surface: skin, eyes, teeth, brows, lashes and hair, in the world's frame."""

import numpy as np

from fresnel.heads import hair, shape, skin, wardrobe
from fresnel.heads.base import Base, Doubles, load
from fresnel.heads.person import KINDS, Person
from fresnel.heads.wardrobe import Wardrobe
from fresnel.objects.surface import Material, Part, Surface, Texture, assemble

_OURS = ""
_WORN = {
    "cropped": (_OURS, _OURS, "short04", "short01"),
    "short": ("short01", "short01", "short04", "short03", _OURS),
    "parted": ("short02", "short02", "short03", _OURS),
    "curly": (_OURS,),
    "bob": ("bob02", "bob02", _OURS, _OURS),
    "long": ("long01", "long01", _OURS),
    "tied": ("ponytail01", "braid01", _OURS),
}
"""MakeHuman's hair of each style; ours is as likely to be worn as it is named."""


def surface(person: Person, seed: int, worn: Wardrobe | None = None) -> Surface:
    """Everything of a head, ready to be traced.

    Args:
        worn: real skins, eyes, brows, lashes and hair; what it lacks is ours.
    """
    base, on = load(), skin.canvas()
    vertices = shape.pose(base, person)
    skinned = on.skin.matrix @ vertices
    normals = shape.normals(skinned, on.skin.faces)
    chosen = {kind: _choice(worn, person, kind) if worn else "" for kind in KINDS}
    picture, tone = None, skin.tone(person)
    if worn and chosen["skins"]:
        picture = Texture(wardrobe.texture(worn, chosen["skins"], 1024))
        tone = tone / wardrobe.mean_tone(worn, chosen["skins"])
        tone = tone.mean() * (tone / tone.mean()) ** 0.8  # a part of the picture's hue is kept
    colors = skin.painted(person, seed, tone, plain=picture is not None)
    parts = _bust(skinned, normals, colors, Material(picture))
    parts += skin.inside(base, vertices, lashes=not chosen["eyelashes"])
    for kind in KINDS[1:]:
        if worn and chosen[kind]:
            parts.append(_fitted(worn, chosen[kind], kind, base, vertices, person))
        elif kind == "eyes":
            parts += skin.eyes(base, vertices, person)
        elif kind == "eyebrows":
            parts.append(skin.brows(person, seed, skinned, normals))
        elif kind == "hair":
            parts += hair.wig(person, seed, skinned, normals)
    return assemble(parts)


def _bust(skinned: Doubles, normals: Doubles, colors: Doubles, material: Material) -> list[Part]:
    """The skin above the cut, and the cap that closes it."""
    faces, vertex, uvs = skin.canvas().skin.split
    rows = np.hstack([np.hstack([skinned, normals, colors])[vertex], uvs])
    rows, kept, rims = shape.cut(rows, faces)
    points, up, colors, uvs = np.split(rows, [3, 6, 9], axis=1)
    rim, order = np.unique(rims, return_inverse=True)
    ends = np.vstack([points[rim], points[rim].mean(axis=0)])
    fan = np.column_stack([order.reshape(-1, 2), np.full(len(rims), len(rim))])
    down = np.broadcast_to(-np.asarray(shape.CUT[1]), ends.shape)
    edge = np.broadcast_to(uvs[rim[0]], (len(ends), 2))
    cap = skin.part(ends, fan, 0.5 * colors[rim].mean(axis=0), material, down, edge)
    return [skin.part(points, kept, colors, material, up, uvs), cap]


def _choice(worn: Wardrobe, person: Person, kind: str) -> str:
    """The file that a person wears, "" for ours: as chance has it, of those that suit."""
    found = worn.of(kind, ".png" if kind == "skins" else ".mhclo")
    if kind == "skins" and found:
        suits = [_suits(worn, person, name) for name in found]
        found = [name for name, suit in zip(found, suits, strict=True) if suit == max(suits)]
    elif kind == "hair":
        wanted = _WORN.get(person.hair, (_OURS,))
        name = wanted[int(person.choices["style"] * 0.999 * len(wanted))]
        found = [file for file in found if name and f"/{name}." in file]
    elif kind == "eyes":
        found = [name for name in found if "high-poly" in name] or found
    return found[int(person.choices[kind] * 0.999 * len(found))] if found else _OURS


def _suits(worn: Wardrobe, person: Person, name: str) -> float:
    """How well a skin fits: by its name ("old_african_male") sex and age, by its picture tone."""
    when = "old" if person.age_years > 62 else "middleage" if person.age_years > 40 else "young"
    woman = not person.is_man or person.age_years < 15
    ratio = skin.tone(person).mean() / wardrobe.mean_tone(worn, name).mean()
    apart = float(np.round(abs(np.log2(ratio))))
    return 1.5 * (("female" in name) == woman) + 1.0 * (when in name) - 1.2 * apart


def _fitted(
    worn: Wardrobe, name: str, kind: str, base: Base, vertices: Doubles, person: Person
) -> Part:
    piece = wardrobe.piece(worn, name)
    faces, vertex, uvs = piece.mesh
    faces = faces[piece.known(base)[vertex][faces].all(axis=1)]
    at, picture, alpha = piece.fitted(base, vertices)[vertex], piece.picture, np.ones(len(vertex))
    color = np.full(3, 0.02)
    if kind == "eyes":
        found = worn.of("eyes", ".png")
        fitting = [n for n in found if person.eyes.removeprefix("dark").removeprefix("light") in n]
        picture = [*fitting, *found, ""][int(person.choices["eyes"] * 0.999 * len(fitting))]
        color = np.full(3, 0.6 if person.eyes == "darkbrown" else 0.85)
    elif kind == "hair":
        color, alpha = skin.hair_tone(person), np.clip(shape.above(at) / 0.3, 0, 1)
        if person.choices["side"] < 0.5:
            at = at * (-1, 1, 1)
    elif kind == "eyebrows":
        color = skin.hair_tone(person, 0.5) * 0.75
    side = 512 if kind == "hair" else 256
    image = wardrobe.texture(worn, picture, side, grey=kind != "eyes") if picture else None
    material = Material(image if image is None else Texture(image), alpha="MASK", cutoff=0.35)
    return skin.part(at, faces, color, material, uvs=uvs, alpha=alpha)
