"""A person's surface: skin, eyes, teeth, brows, lashes and hair, in the world's frame."""

from __future__ import annotations

import numpy as np

from fresnel.heads import hair, shape, skin, wardrobe
from fresnel.heads.base import Base, Doubles, load
from fresnel.heads.person import ANCESTRIES, Person
from fresnel.heads.wardrobe import Wardrobe
from fresnel.objects.surface import Material, Part, Surface, Texture, assemble

_TAGS = {
    "cropped": (),
    "short": ("short01", "short03", "short04"),
    "parted": ("short02", "short03", "short04"),
    "curly": (),
    "bob": ("bob02", "short03"),
    "long": ("long01",),
    "tied": ("ponytail01", "braid01"),
}
"""Which of MakeHuman's hair is worn as a style; where there is none, ours is."""


def surface(person: Person, seed: int, worn: Wardrobe | None = None) -> Surface:
    """Everything of a head, ready to be traced.

    Args:
        worn: real skins, eyes, brows, lashes and hair; what it lacks is ours.
    """
    base, on = load(), skin.canvas()
    vertices = shape.pose(base, person)
    skinned = on.skin.matrix @ vertices
    normals = shape.vertex_normals(skinned, on.skin.faces)
    normals /= np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-12)
    chosen = {kind: _choice(worn, person, kind) for kind in wardrobe.KINDS} if worn else {}
    picture, tone = None, skin.tone(person)
    if worn and chosen["skins"]:
        picture = wardrobe.texture(worn, chosen["skins"], 1024)
        tone = tone / skin.mean_tone(picture)
    colors = skin.painted(person, seed, tone, plain=picture is not None)
    parts = _bust(skinned, normals, colors, None if picture is None else Texture(picture))
    parts += skin.teeth(base, vertices)
    for kind in wardrobe.KINDS[1:]:
        if worn and chosen[kind]:
            parts.append(_fitted(worn, chosen[kind], kind, base, vertices, person))
        elif kind == "eyes":
            parts += skin.eyes(base, vertices, person)
        elif kind == "eyebrows":
            parts.append(skin.brows(person, seed, skinned, normals))
        elif kind == "eyelashes":
            parts += skin.lashes(base, vertices)
        else:
            parts += hair.wig(person, seed, skinned, normals)
    return assemble(parts)


def _bust(
    skinned: Doubles, normals: Doubles, colors: Doubles, picture: Texture | None
) -> list[Part]:
    """The skin above the cut, and the cap that closes it."""
    faces, vertex, places = skin.canvas().skin.split
    rows = np.hstack([np.hstack([skinned, normals, colors])[vertex], places])
    rows, kept, rims = shape.cut(rows, faces)
    uvs = np.zeros((len(rows), 4), np.float32)
    uvs[:, :2] = rows[:, 9:11]
    whole = Part(
        *(rows[:, :3], kept, Material(picture)),
        normals=rows[:, 3:6],
        colors=_opaque(rows[:, 6:9]),
        uvs=uvs,
    )
    rim, order = np.unique(rims, return_inverse=True)
    ends = np.vstack([rows[rim], rows[rim].mean(axis=0)])
    fan = np.column_stack([order.reshape(-1, 2), np.full(len(rims), len(rim))])
    flat = np.tile(-np.asarray(shape.CUT[1]), (len(ends), 1))
    cap = _opaque(np.tile(ends[:, 6:9].mean(axis=0) * 0.5, (len(ends), 1)))
    return [
        whole,
        Part(
            ends[:, :3],
            fan,
            Material(picture),
            normals=flat,
            colors=cap,
            uvs=np.tile(uvs[rim[:1]], (len(ends), 1)),
        ),
    ]


def _opaque(colors: Doubles) -> np.ndarray:
    return np.hstack([colors, np.ones((len(colors), 1))]).astype(np.float32)


def _choice(worn: Wardrobe, person: Person, kind: str) -> str:
    """The file that a person wears, "" for none: as chance has it, of those that suit."""
    if kind == "skins":
        found = worn.of("skins", ".png")
        suits = [_suits(person, name.rpartition("/")[0]) for name in found]
        found = [name for name, suit in zip(found, suits, strict=True) if suit == max(suits)]
    elif kind == "hair":
        names = _TAGS.get(person.hair, ())
        found = [name for name in worn.of("hair", ".mhclo") if any(f"/{n}." in name for n in names)]
    elif kind == "eyes":
        found = [name for name in worn.of("eyes", ".mhclo") if "high-poly" in name]
    else:
        found = worn.of(kind, ".mhclo")
    return found[int(person.choices[kind] * 0.999 * len(found))] if found else ""


def _suits(person: Person, name: str) -> float:
    """How well a skin's name ("old_african_male") fits: by sex, then ancestry, then age."""
    race = ANCESTRIES[int(np.argmax(person.ancestry))]
    when = "old" if person.age_years > 62 else "middleage" if person.age_years > 40 else "young"
    woman = not person.is_man or person.age_years < 15
    return 4 * (("female" in name) == woman) + 2 * (race in name) + (when in name)


def _fitted(
    worn: Wardrobe, name: str, kind: str, base: Base, vertices: Doubles, person: Person
) -> Part:
    piece = wardrobe.piece(worn, name)
    at = piece.fitted(base, vertices)
    picture, color = piece.picture, np.ones(3)
    if kind == "eyes":
        irises = worn.of("eyes", ".png")
        like = {"brown": "brown", "darkbrown": "brown", "lightbrown": "brown", "blue": "blue"}
        fitting = [n for n in irises if like.get(person.eyes, person.eyes) in n] or irises
        picture = fitting[int(person.choices["eyes"] * 0.999 * len(fitting))] if fitting else ""
        color = color * (0.62 if person.eyes == "darkbrown" else 0.8)
    elif kind == "hair":
        color = skin.hair_tone(person)
    elif kind == "eyebrows":
        color = skin.hair_tone(person, 0.5) * 0.75
    else:
        color = color * 0.02
    sides = {"eyes": 256, "hair": 512}
    image = (
        wardrobe.texture(worn, picture, sides.get(kind, 256), kind != "eyes") if picture else None
    )
    faces, vertex, places = piece.mesh
    faces = faces[piece.known(base)[vertex][faces].all(axis=1)]
    at = at[vertex]
    uvs = np.zeros((len(at), 4), np.float32)
    uvs[:, :2] = places
    colors = _opaque(np.tile(color, (len(at), 1)))
    if kind == "hair":
        colors[:, 3] = shape.fading(at)
    return Part(
        *(at, faces),
        Material(None if image is None else Texture(image), alpha="MASK", cutoff=0.35),
        normals=shape.vertex_normals(at, faces),
        colors=colors,
        uvs=uvs,
    )
