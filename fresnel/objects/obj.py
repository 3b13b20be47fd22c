"""Wavefront OBJ and its materials, as found in the wild, as triangles.

What is read of one stands in docs/data.md.  Files that are named and not found come back as notes.
"""

import posixpath
import re
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fresnel.data.images import decoded
from fresnel.objects.assets import MOST_WORDS
from fresnel.objects.surface import (
    MAX_FACES,
    Doubles,
    Floats,
    Material,
    Part,
    Surface,
    Texture,
    assemble,
    linear,
    texture_image,
)

_OPTIONS = {  # of a texture: how many values follow at most
    **dict.fromkeys(("-blendu", "-blendv", "-cc", "-clamp", "-imfchan", "-type"), 1),
    **dict.fromkeys(("-bm", "-boost", "-texres"), 1),
    **dict.fromkeys(("-o", "-s", "-t"), 3),
    "-mm": 2,
}
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d{1,2})?")
_WHOLE = re.compile(r"\d+/\d+/\d+(?: +\d+/\d+/\d+)*", re.ASCII)
_LINE = re.compile(r"[^\n]*\n?")
_POINTS = re.compile(r"[\d ]+", re.ASCII)
_MOST_MATERIALS = 10_000
_MOST_WORK = 5e8
"""The sum of squares of the corners of polygons above 1000: triangulating takes as many steps."""
_PLAIN = Material()


class _Look(NamedTuple):
    """A material, its colour with alpha, and what scales and moves its texture coordinates."""

    material: Material = _PLAIN
    color: Floats = np.ones(4, np.float32)
    scale: Doubles = np.ones(2)
    offset: Doubles = np.zeros(2)
    painted: bool = False  # by a map_Kd


@dataclass
class _Polygons:
    """Polygons of one material: how many corners each has, and every corner's three indices."""

    sizes: list[int] = field(default_factory=list)
    corners: "array[int]" = field(default_factory=lambda: array("q"))


def read(data: bytes, beside: Callable[[str], bytes | None]) -> Surface:
    """The triangles of a file's bytes; ``beside`` gives the bytes of a file that it names.

    Raises:
        ValueError: naming the line that can't be read, or what is too large.
    """
    points, colors, layout, normals = (array("d") for _ in range(4))
    groups: dict[str, _Polygons] = defaultdict(_Polygons)
    libraries: list[str] = []
    name, left = "", 4 * MAX_FACES  # corners; a face has four, if there are fewer
    if data.count(b"\nf") > MAX_FACES or data.count(b"\nv") > 6 * MAX_FACES:
        raise ValueError(f"mesh: over {MAX_FACES} triangles. Simplify it")
    for number, line in enumerate(_lines(data), 1):
        key, _, rest = line.partition(" ")
        try:
            if key == "v":
                place = [float(value) for value in rest.split(None, 6)[:6]]
                if len(place) < 3:
                    raise ValueError("fewer than three coordinates; repair the file")
                points.extend(place[:3])
                colors.extend(place[3:] if len(place) == 6 else ())
            elif key == "vt":
                layout.extend(_row(rest, 2))
            elif key == "vn":
                normals.extend(_row(rest, 3))
            elif key == "f":
                if (count := rest.count(" ")) >= left:
                    raise ValueError(f"over {MAX_FACES} triangles. Simplify it")
                left -= max(count + 1, 4)
                counts = len(points) // 3, len(layout) // 2, len(normals) // 3
                corners = _corners(rest, counts)
                if len(corners) > 6:
                    groups[name].sizes.append(len(corners) // 3)
                    groups[name].corners.extend(corners)
            elif key == "usemtl":
                name = rest.strip()
            elif key == "mtllib":
                libraries.append(rest.strip())
        except ValueError as error:
            raise ValueError(f"line {number} can't be read: {line[:60]!r} ({error})") from None
    large = [size for group in groups.values() for size in group.sizes if size > 1000]
    if len(groups) > _MOST_MATERIALS or sum(size * size for size in large) > _MOST_WORK:
        said = f"{len(groups)} materials, and polygons of {max(large, default=0)} corners"
        raise ValueError(f"mesh: {said}. Merge the materials, or triangulate the polygons")
    materials = _Materials(libraries, beside)
    position, vt, vn = _table(points, 3), _table(layout, 2), _table(normals, 3)
    tints = _tints(_table(colors, 3)) if len(colors) == len(points) > 0 else None
    parts = []
    for wanted, group in groups.items():
        index = np.asarray(group.corners, np.int64).reshape(-1, 3)
        if index[:, 0].max() >= len(points) // 3 or index[:, 0].min() < 0:
            raise ValueError("mesh: a face names a vertex that doesn't exist; repair the file")
        faces = _triangles(np.asarray(group.sizes), position[index[:, 0]])
        parts.append(_part(index, faces, materials.look(wanted), position, tints, vt, vn))
    return assemble(parts, materials.notes)


def _lines(data: bytes) -> Iterator[str]:
    """The lines of a text in UTF-8 or Latin-1, continued ones joined, comments and margins gone."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = data.decode("latin-1")
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    text = text.replace("\\\n", " ")
    for line in _LINE.finditer(text):  # a list of them would take more than the mesh
        yield line[0].partition("#")[0].replace("\t", " ").strip()


def _corners(text: str, counts: tuple[int, int, int]) -> list[int]:
    """Of each corner the indices from 0 of vertex, texture coordinate and normal, one after the
    other; -1 where there is none."""
    if (whole := _WHOLE.fullmatch(text)) or _POINTS.fullmatch(text):  # quicker
        found = [int(part) for part in text.replace("/", " ").split()]
        if 0 < min(found) <= max(found) <= 1 << 31:
            one = [i - 1 for i in found]
            return one if whole else [n for i in one for n in (i, -1, -1)]
    found = []
    for corner in text.split():
        for place, part in enumerate([*corner.split("/"), "", ""][:3]):
            index = int(part) if part else -1 - counts[place]
            if part and (index == 0 or index < -counts[place] or index > 1 << 31):
                raise ValueError("an index of 0, or one that nothing can have")
            found.append(index - 1 if index > 0 else counts[place] + index)
    return found


def _row(text: str, width: int) -> list[float]:
    """The first numbers of a line, zeros where there are fewer."""
    found = [float(value) for value in text.split(None, width)[:width]]
    return found + [0.0] * (width - len(found))


def _table(numbers: "array[float]", width: int) -> Doubles:
    """Rows of numbers; at least one row."""
    return np.asarray(numbers or array("d", bytes(8 * width)), np.float64).reshape(-1, width)


def _tints(given: Doubles) -> Floats:
    """Linear colours (V, 4) of the colours (V, 3) of vertices, of 1 or of 255."""
    given = given / 255 if given.max() > 1 else given
    return np.concatenate([linear(given), np.ones((len(given), 1), np.float32)], axis=1)


def _part(
    corners: NDArray[np.int64],
    faces: NDArray[np.int64],
    look: _Look,
    position: Doubles,
    colors: Floats | None,
    vt: Doubles,
    vn: Doubles,
) -> Part:
    """The triangles of a material; every corner of a polygon is a vertex of its own."""
    mapped = bool((corners[:, 1] >= 0).all()) and corners[:, 1].max() < len(vt)
    material = look.material if mapped else replace(look.material, texture=None, emissive=None)
    color = np.repeat(look.color[None], len(corners), axis=0)
    if material.texture is not None and look.painted:
        color[:, :3] = 1  # a texture takes the colour's place
    if colors is not None and material.texture is None:
        color *= colors[corners[:, 0]]
    uvs = None
    if mapped:
        uv = (vt[corners[:, 1]] * look.scale + look.offset).astype(np.float32)
        uvs = np.concatenate([uv, uv], axis=1)
    normals = None
    if (corners[:, 2] >= 0).all() and corners[:, 2].max() < len(vn):
        normals = vn[corners[:, 2]]
    return Part(position[corners[:, 0]], faces, material, normals, color, uvs)


def _triangles(sizes: NDArray[np.int64], points: Doubles) -> NDArray[np.int64]:
    """Faces (n, 3) of polygons whose corners lie one after the other at ``points``."""
    first = np.cumsum(sizes) - sizes
    found, at = [], []
    for size in np.unique(sizes):
        start = first[sizes == size]
        fan = np.stack([0 * np.arange(1, size - 1), np.arange(1, size - 1), np.arange(2, size)], 1)
        if size > 3:
            loops = points[start[:, None] + np.arange(size)]
            sides = np.roll(loops, -1, axis=1) - loops
            turns = np.cross(sides, np.roll(sides, -1, axis=1))
            normal = np.cross(loops - loops[:, :1], np.roll(loops, -1, axis=1) - loops[:, :1]).sum(
                1
            )
            bent = np.einsum("nij,nj->ni", turns, normal)
            scale = np.linalg.norm(turns, axis=2) * np.linalg.norm(normal, axis=1)[:, None]
            concave = (bent < -1e-6 * scale).any(axis=1)
            for place in np.nonzero(concave)[0]:
                ears = _ears(loops[place], normal[place])
                found.append(start[place] + ears)
                at.append(np.full(len(ears), start[place]))
            start = start[~concave]
        found.append((start[:, None, None] + fan).reshape(-1, 3))
        at.append(np.repeat(start, len(fan)))
    return np.concatenate(found)[np.argsort(np.concatenate(at), kind="stable")]


def _ears(loop: Doubles, normal: Doubles) -> NDArray[np.int64]:
    """The triangles (n, 3) of one concave polygon, seen along its normal."""
    from mapbox_earcut import triangulate_float64

    axes = [axis for axis in range(3) if axis != np.abs(normal).argmax()]
    flat = np.ascontiguousarray(loop[:, axes])
    faces = triangulate_float64(flat, np.array([len(flat)], np.uint32)).astype(np.int64)
    return faces.reshape(-1, 3)


class _Materials:
    """What the material files of an OBJ say; ``notes`` name what was not found."""

    def __init__(self, libraries: list[str], beside: Callable[[str], bytes | None]) -> None:
        self.beside, self.notes = beside, list[str]()
        self.images: dict[str, Floats | None] = {}
        self.said: dict[str, dict[str, str]] = {}
        for names in dict.fromkeys(libraries):
            words = names.split(None, MOST_WORDS)[:MOST_WORDS]
            whole = [names] if beside(names) is not None else words
            for name in dict.fromkeys(whole):  # a name with spaces, or several
                data = beside(name)
                if data is None:
                    self.notes.append(f"material file {name!r} was not found: it would colour this")
                else:
                    self._collect(data, posixpath.dirname(name.replace("\\", "/")))

    def _collect(self, data: bytes, folder: str) -> None:
        current: dict[str, str] = {}
        for line in _lines(data):
            key, _, rest = line.partition(" ")
            if key == "newmtl":
                current = self.said.setdefault(rest.strip(), {"folder": folder})
            elif key:
                current[key.lower()] = rest.strip()

    def look(self, name: str) -> _Look:
        """The material of that name; white where there is none."""
        if not name and len(self.said) == 1:  # the only one there is, and no line that takes it
            (name,) = self.said
        if name not in self.said:
            if self.said:
                self.notes.append(f"no material file describes {name!r}: it is drawn white")
            return _Look()
        said = self.said[name]
        color = linear(_numbers(said.get("kd", "0.4 0.4 0.4"), 3))
        glow = linear(_numbers(said.get("ke", "0 0 0"), 3))
        dissolve = float(_numbers(said.get("d", "1"), 1)[0] - _numbers(said.get("tr", "0"), 1)[0])
        if dissolve <= 0:  # what some programs write for "opaque"
            dissolve = 1.0
            self.notes.append("a material's dissolve of 0 was taken as opaque")
        options, texture = self._image("map_kd", said)
        _, emissive = self._image("map_ke", said)
        _, cut = self._file("map_d", said)
        painted = texture is not None
        if cut is not None:
            mask = decoded("map_d", cut)
            mask = mask.getchannel("A") if "A" in mask.getbands() else mask.convert("L")
            mask = mask if texture is None else mask.resize(texture.shape[1::-1])
            opacity = np.asarray(mask, np.float32)[..., None] / np.float32(255)
            kept = np.ones((*mask.size[::-1], 3), np.float32) if texture is None else texture
            texture = np.concatenate([kept[..., :3], opacity], axis=-1)
        elif texture is not None:  # an alpha channel of its own is no opacity here
            texture = np.concatenate([texture[..., :3], np.ones_like(texture[..., 3:])], axis=-1)
        if emissive is not None and not glow.any():
            glow = np.ones(3, np.float32)
        wrap = "clamp" if options.get("-clamp") == ["on"] else "repeat"
        shown, shining = (
            None if image is None else Texture(image, (wrap, wrap)) for image in (texture, emissive)
        )
        alpha = "BLEND" if dissolve < 1 or cut is not None else "OPAQUE"
        return _Look(
            Material(shown, shining, glow.tolist(), alpha),
            np.asarray([*color, dissolve], np.float32),
            _numbers(" ".join(options.get("-s", [])), 2, 1.0),
            _numbers(" ".join(options.get("-o", [])), 2, 0.0),
            painted,
        )

    def _file(self, key: str, said: dict[str, str]) -> tuple[str, bytes | None]:
        """A map's options and name, and the bytes of its file, if there is one."""
        words = said.get(key, "").split()
        name = " ".join(words[len(_options(words)[1]) :])
        inner = posixpath.join(said["folder"], name.replace("\\", "/"))
        data = self.beside(inner) if name else None
        data = self.beside(name) if data is None and said["folder"] else data
        if name and data is None:
            self.notes.append(f"texture {name!r} was not found: what it colours is plain")
        return name, data

    def _image(self, key: str, said: dict[str, str]) -> tuple[dict[str, list[str]], Floats | None]:
        """A map's options and its linear image (h, w, 4), if there is one."""
        options, _ = _options(said.get(key, "").split())
        shared = f"{said['folder']}/{said.get(key)}"
        if shared not in self.images:
            name, data = self._file(key, said)
            self.images[shared] = None if data is None else texture_image(name, data)
        return options, self.images[shared]


def _options(words: list[str]) -> tuple[dict[str, list[str]], list[str]]:
    """The options that a map's words start with, and the words that they take."""
    options, taken = dict[str, list[str]](), list[str]()
    waiting = list(words)
    while waiting and waiting[0].lower() in _OPTIONS:
        option = waiting[0].lower()
        count = 0
        while count < min(_OPTIONS[option], len(waiting) - 1):
            if _OPTIONS[option] > 1 and not _NUMBER.fullmatch(waiting[1 + count]):
                break
            count += 1
        options[option] = waiting[1 : 1 + count]
        taken += waiting[: 1 + count]
        waiting = waiting[1 + count :]
    return options, taken


def _numbers(text: str, count: int, default: float = 0.0) -> Doubles:
    """The first numbers of a text; a single one stands for all three of a colour."""
    found = [float(word) for word in text.split()[:count] if _NUMBER.fullmatch(word)]
    found = found * 3 if len(found) == 1 and count == 3 else found
    return np.asarray([*found, *[default] * (count - len(found))], np.float64)
