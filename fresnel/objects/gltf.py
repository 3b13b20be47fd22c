"""glTF 2.0: the default scene of a .gltf or .glb file as triangles, in its default pose.

What is read of one stands in docs/data.md.  What a file requires and is not read is refused by its
name; what it merely offers and is not drawn comes back as a note.
"""

import base64
import struct
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import unquote

import numpy as np
from numpy.typing import NDArray

from fresnel.host.files import from_json
from fresnel.objects.surface import (
    MAX_FACES,
    Doubles,
    Material,
    Part,
    Surface,
    Texture,
    assemble,
    texture_image,
)

_READ = {
    *("KHR_mesh_quantization", "KHR_texture_transform", "KHR_materials_unlit"),
    *("KHR_materials_emissive_strength", "KHR_materials_pbrSpecularGlossiness"),
    *("EXT_mesh_gpu_instancing", "EXT_texture_webp"),
}
_UNSEEN = {"KHR_xmp_json_ld", "KHR_xmp", "KHR_animation_pointer"}  # not about looks
_DECOMPRESS = "Decompress it first: `gltf-transform copy in.glb out.glb`, or export it so"
_COMPRESSED = {
    "KHR_draco_mesh_compression": f"the mesh is Draco-compressed. {_DECOMPRESS}",
    "EXT_meshopt_compression": f"the mesh is meshopt-compressed. {_DECOMPRESS}",
    "KHR_meshopt_compression": f"the mesh is meshopt-compressed. {_DECOMPRESS}",
    "KHR_texture_basisu": "its textures are KTX2 (Basis Universal). Convert them to PNG or JPEG "
    "first: `gltf-transform ktxdecompress in.glb out.glb`",
}
_NODES = 100_000
"""Of nodes, of primitives and of instances that are drawn."""
_NUMBERS = 40 * MAX_FACES
"""Read from accessors in all: position, normal, colour and texture of a corner are 14."""
_TYPES = {"SCALAR": 1, "VEC2": 2, "VEC3": 3, "VEC4": 4, "MAT2": 4, "MAT3": 9, "MAT4": 16}
_COMPONENTS = {5120: "i1", 5121: "u1", 5122: "<i2", 5123: "<u2", 5125: "<u4", 5126: "<f4"}
_WRAPS = {10497: "repeat", 33648: "mirror", 33071: "clamp"}
_UNDRAWN = ("points", "lines", "line loops", "line strips")

Json = dict[str, Any]


def read(data: bytes, beside: Callable[[str], bytes | None]) -> Surface:
    """The triangles of a file's bytes; ``beside`` gives the bytes of a file that it names.

    Raises:
        ValueError: naming what is damaged, missing, too large or not supported.
    """
    try:
        return _Reader(data, beside).surface()
    except (LookupError, TypeError, AttributeError, struct.error, OverflowError) as error:
        raise ValueError(f"not well-formed glTF ({type(error).__name__}: {error})"[:200]) from None
    except RecursionError:
        raise ValueError("not well-formed glTF (nested too deeply)") from None


class _Reader:
    def __init__(self, data: bytes, beside: Callable[[str], bytes | None]) -> None:
        self.beside, self.notes = beside, list[str]()
        self.binary: bytes | None = None
        if data.startswith(b"glTF"):
            data = self._chunks(data)
        try:
            self.json: Json = from_json(data)
        except ValueError as error:
            raise ValueError(f"not readable as glTF: its JSON is damaged ({error})"[:200]) from None
        version = str(self.json["asset"].get("version", "")) if "asset" in self.json else "2.0"
        if not version.startswith("2"):
            raise ValueError(f"glTF of version {version}; want 2.0. Convert it")
        required = self.json.get("extensionsRequired", [])
        for name in required:
            if name not in _READ | _UNSEEN:
                how = _COMPRESSED.get(name, "this reader doesn't know it. Export without it")
                raise ValueError(f"it requires {name}: {how}")
        for name in self.json.get("extensionsUsed", []):
            if name not in _READ | _UNSEEN:
                self.notes.append(f"{name} is not drawn")
        if self.json.get("animations"):
            self.notes.append("animations are not played: the default pose is drawn")
        self.numbers = 0
        self.buffers: dict[int, bytes] = {}
        self.images: dict[int, NDArray[np.float32]] = {}
        self.materials: dict[int | None, tuple[Material, list[Json]]] = {}

    def _chunks(self, data: bytes) -> bytes:
        """The JSON of a binary glTF; its binary chunk is kept."""
        version, length = struct.unpack_from("<II", data, 4)
        if version != 2:
            raise ValueError(f"binary glTF of version {version}; want 2. Convert it")
        if length > len(data):
            raise ValueError(f"it ends after {len(data)} of {length} bytes: it is cut off")
        start, found = 12, []
        while start + 8 <= length:
            size, kind = struct.unpack_from("<I4s", data, start)
            if start + 8 + size > length:
                raise ValueError("one of its chunks is cut off")
            found.append((kind, data[start + 8 : start + 8 + size]))
            start += 8 + size
        if not found or found[0][0] != b"JSON":
            raise ValueError("not binary glTF: it has no JSON chunk")
        self.binary = next((chunk for kind, chunk in found[1:] if kind == b"BIN\0"), None)
        return found[0][1]

    def surface(self) -> Surface:
        parts, faces, points, drawn = list[Part](), 0, 0, 0
        for node, matrix in self._nodes():
            skinned = node.get("skin")
            for primitive in self.json["meshes"][node["mesh"]]["primitives"]:
                drawn += 1
                if drawn > _NODES:
                    raise ValueError(f"mesh: over {_NODES} primitives. Merge them")
                part = self._primitive(primitive, node)
                if part is None:
                    continue
                # of a skinned one the joints alone decide where it is (glTF 2.0, 3.7.3.3)
                places = [matrix @ instance for instance in self._instances(node)]
                if skinned is not None:
                    part = self._skinned(part, primitive, self.json["skins"][skinned])
                    places = [np.eye(4)]
                faces += len(part.faces) * len(places)
                points += len(part.vertices) * len(places)
                if faces > MAX_FACES or points > 3 * MAX_FACES:
                    raise ValueError(f"mesh: over {MAX_FACES} triangles. Simplify it")
                parts += [part if skinned is not None else _placed(part, at) for at in places]
        return assemble(parts, self.notes)

    # ---- the scene's graph

    def _nodes(self) -> Iterator[tuple[Json, Doubles]]:
        """The nodes of the default scene that have a mesh, with their place in the world."""
        nodes = self.json.get("nodes", [])
        if len(nodes) > _NODES:
            raise ValueError(f"mesh: {len(nodes)} nodes, the limit is {_NODES}. Simplify it")
        scenes = self.json.get("scenes")
        if scenes:
            shown = scenes[self.json.get("scene", 0)].get("nodes", [])
            if len(scenes) > 1:
                self.notes.append(f"one of its {len(scenes)} scenes is drawn")
        else:
            children = {child for node in nodes for child in node.get("children", [])}
            shown = [index for index in range(len(nodes)) if index not in children]
        self.world: dict[int, Doubles] = {}
        waiting = [(index, np.eye(4)) for index in reversed(shown)]
        while waiting:
            index, above = waiting.pop()
            if index in self.world:
                raise ValueError(f"not well-formed glTF: node {index} has two parents")
            node = nodes[index]
            self.world[index] = above @ _local(node)
            waiting += [(child, self.world[index]) for child in reversed(node.get("children", []))]
        for index, matrix in self.world.items():
            if "mesh" in nodes[index]:
                yield nodes[index], matrix

    def _instances(self, node: Json) -> list[Doubles]:
        said = node.get("extensions", {}).get("EXT_mesh_gpu_instancing")
        if said is None:
            return [np.eye(4)]
        places = said["attributes"].items()
        known = {k.lower(): at for k, at in places if k in ("TRANSLATION", "ROTATION", "SCALE")}
        given = {key: self._accessor(index) for key, index in known.items()}
        count = min((len(values) for values in given.values()), default=0)
        if count > _NODES:
            raise ValueError(f"mesh: {count} instances, the limit is {_NODES}. Simplify it")
        return [_local({key: values[k] for key, values in given.items()}) for k in range(count)]

    def _skinned(self, part: Part, primitive: Json, skin: Json) -> Part:
        """The part as its joints place it (glTF 2.0, 3.7.3)."""
        joints = skin["joints"]
        if max(len(joints), len(part.vertices) // 8) > _NODES:  # each takes a matrix or two
            raise ValueError("mesh: a skin of too many joints or vertices. Simplify it")
        if any(joint not in self.world for joint in joints):
            raise ValueError("not well-formed glTF: a joint of a skin is outside of the scene")
        world = np.stack([self.world[joint] for joint in joints])
        if "inverseBindMatrices" in skin:
            inverse = self._accessor(skin["inverseBindMatrices"])[: len(joints)]
            world = world @ inverse.reshape(-1, 4, 4).transpose(0, 2, 1)
        blended = np.zeros((len(part.vertices), 4, 4))
        total = np.zeros(len(part.vertices))
        attributes, k = primitive["attributes"], 0
        while f"JOINTS_{k}" in attributes and f"WEIGHTS_{k}" in attributes:
            which = self._accessor(attributes[f"JOINTS_{k}"]).astype(np.int64)
            weights = self._accessor(attributes[f"WEIGHTS_{k}"])
            for which_one, weight in zip(which.T, weights.T, strict=True):
                blended += world[which_one] * weight[:, None, None]
                total += weight
            k += 1
        if not k:
            raise ValueError("not well-formed glTF: a skinned mesh has no JOINTS_0 and WEIGHTS_0")
        return _placed(part, blended / np.where(total > 0, total, 1)[:, None, None])

    # ---- meshes

    def _primitive(self, primitive: Json, node: Json) -> Part | None:
        """A mesh's part in its own frame; None where it is no surface."""
        attributes, mode = primitive["attributes"], primitive.get("mode", 4)
        if mode < 4:
            self.notes.append(f"{_UNDRAWN[mode]} are not drawn")
            return None
        if "POSITION" not in attributes:
            self.notes.append("a mesh without positions is not drawn")
            return None
        vertices = self._accessor(attributes["POSITION"], "VEC3")
        normals = self._accessor(attributes["NORMAL"], "VEC3") if "NORMAL" in attributes else None
        mesh = self.json["meshes"][node["mesh"]]
        weights = node.get("weights", mesh.get("weights", []))
        for weight, target in zip(weights, primitive.get("targets", []), strict=False):
            if weight and "POSITION" in target:
                vertices = vertices + weight * self._accessor(target["POSITION"])
            if weight and "NORMAL" in target and normals is not None:
                normals = normals + weight * self._accessor(target["NORMAL"])
        if "indices" in primitive:
            order = self._accessor(primitive["indices"])[:, 0].astype(np.int64)
        else:
            order = np.arange(len(vertices))
        material, textures = self._material(primitive.get("material"))
        return Part(
            vertices,
            _triangles(order, mode),
            material,
            normals,
            self._colors(attributes, primitive.get("material"), len(vertices)),
            self._uvs(attributes, textures, len(vertices)),
        )

    def _colors(self, attributes: Json, material: int | None, count: int) -> NDArray[np.float32]:
        """Base colour factor x vertex colour, (V, 4), both linear."""
        colors = np.ones((count, 4), np.float32)
        if "COLOR_0" in attributes:
            given = self._accessor(attributes["COLOR_0"]).astype(np.float32).clip(0, 1)
            colors[:, : given.shape[1]] = given
            if not given[:, :3].any():
                self.notes.append("vertex colours are all black, and so is what they colour")
        if material is not None:
            colors *= np.asarray(self._base(material)[0], np.float32).clip(0, 1)
        return colors

    def _uvs(
        self, attributes: Json, textures: list[Json], count: int
    ) -> NDArray[np.float32] | None:
        """Of base colour and emission, (V, 4), origin in the image's lower left."""
        if not any(textures):
            return None
        uvs = np.zeros((count, 4), np.float32)
        for place, info in enumerate(textures):
            said = info.get("extensions", {}).get("KHR_texture_transform", {})
            name = f"TEXCOORD_{said.get('texCoord', info.get('texCoord', 0))}"
            if not info or name not in attributes:
                if info:
                    self.notes.append(f"a texture is laid out by {name}, which a mesh doesn't have")
                continue
            uv = self._accessor(attributes[name]).astype(np.float32)
            if said:
                turn, scale = said.get("rotation", 0.0), said.get("scale", (1.0, 1.0))
                cos, sin = np.cos(turn), np.sin(turn)
                # counter-clockwise as seen, and v points down
                matrix = np.array([[cos, sin], [-sin, cos]]) * scale
                uv = (uv @ matrix.T + said.get("offset", (0.0, 0.0))).astype(np.float32)
            uvs[:, 2 * place] = uv[:, 0]
            uvs[:, 2 * place + 1] = 1 - uv[:, 1]
        return uvs

    # ---- materials

    def _base(self, material: int) -> tuple[list[float], Json]:
        """Base colour: its factor, and its texture's information."""
        said = self.json["materials"][material]
        old = said.get("extensions", {}).get("KHR_materials_pbrSpecularGlossiness")
        if old is not None:
            return old.get("diffuseFactor", [1.0] * 4), old.get("diffuseTexture", {})
        rough = said.get("pbrMetallicRoughness", {})
        return rough.get("baseColorFactor", [1.0] * 4), rough.get("baseColorTexture", {})

    def _material(self, index: int | None) -> tuple[Material, list[Json]]:
        """A material, and the information of its two textures; {} where there is none."""
        if index not in self.materials:
            self.materials[index] = (Material(), []) if index is None else self._described(index)
        return self.materials[index]

    def _described(self, index: int) -> tuple[Material, list[Json]]:
        said = self.json["materials"][index]
        extensions = said.get("extensions", {})
        base, glow = self._base(index)[1], said.get("emissiveTexture", {})
        strength = extensions.get("KHR_materials_emissive_strength", {}).get("emissiveStrength", 1)
        red, green, blue = (float(strength * part) for part in said.get("emissiveFactor", (0,) * 3))
        mode = said.get("alphaMode", "OPAQUE")
        if mode not in ("OPAQUE", "MASK", "BLEND"):
            raise ValueError(f"not well-formed glTF: alphaMode {mode!r}")
        if not (red or green or blue):
            glow = {}
        return Material(
            self._texture(base) if base else None,
            self._texture(glow) if glow else None,
            (red, green, blue),
            mode,
            said.get("alphaCutoff", 0.5),
            "KHR_materials_unlit" in extensions,
        ), [base, glow]

    def _texture(self, info: Json) -> Texture:
        texture = self.json["textures"][info["index"]]
        extensions = texture.get("extensions", {})
        source = extensions.get("EXT_texture_webp", {}).get("source", texture.get("source"))
        if source is None:
            names = ", ".join(extensions) or "no image"
            how = _COMPRESSED.get(names, "Save its textures as PNG or JPEG")
            raise ValueError(f"a texture is given by {names} alone: {how}")
        if source not in self.images:
            self.images[source] = self._image(self.json["images"][source], source)
        sampler = self.json["samplers"][texture["sampler"]] if "sampler" in texture else {}
        wrap_u, wrap_v = (_WRAPS[sampler.get(key, 10497)] for key in ("wrapS", "wrapT"))
        return Texture(self.images[source], (wrap_u, wrap_v), sampler.get("magFilter") == 9728)

    def _image(self, image: Json, index: int) -> NDArray[np.float32]:
        if "bufferView" in image:
            view = self.json["bufferViews"][image["bufferView"]]
            start = view.get("byteOffset", 0)
            data = self._buffer(view["buffer"])[start : start + view["byteLength"]]
        else:
            data = self._linked(image["uri"])
        name = image.get("name") or image.get("uri", f"number {index}")
        return texture_image(name if not name.startswith("data:") else f"number {index}", data)

    # ---- bytes

    def _linked(self, uri: str) -> bytes:
        if uri.startswith("data:"):
            header, _, content = uri.partition(",")
            try:
                plain = unquote(content)
                return base64.b64decode(plain) if header.endswith(";base64") else plain.encode()
            except ValueError as error:
                raise ValueError(f"a data URI is damaged ({error})") from None
        data = self.beside(unquote(uri))
        if data is None:
            raise ValueError(f"it names {uri!r}, and there is no such file in its folder")
        return data

    def _buffer(self, index: int) -> bytes:
        if index not in self.buffers:
            said = self.json["buffers"][index]
            if "uri" in said:
                name, data = said["uri"], self._linked(said["uri"])
            else:
                name, data = "its binary chunk", self.binary or b""
            if "uri" not in said and (index or self.binary is None):
                raise ValueError(f"buffer {index} has no bytes: it is cut off, or compressed")
            if len(data) < said["byteLength"]:
                name = "a data URI" if name.startswith("data:") else name
                many, wanted = len(data), said["byteLength"]
                raise ValueError(f"{name} is too short: it ends after {many} of {wanted} bytes")
            self.buffers[index] = data
        return self.buffers[index]

    def _accessor(self, index: int, due: str = "") -> Doubles:
        """An accessor's elements as float64 (count, components), normalised where it says so."""
        said = self.json["accessors"][index]
        if due and said["type"] != due:
            raise ValueError(f"not well-formed glTF: {said['type']} where {due} is due")
        count, width = said["count"], _TYPES[said["type"]]
        dtype = np.dtype(_COMPONENTS[said["componentType"]])
        self.numbers += count * width
        if not 0 <= count <= 3 * MAX_FACES or (width > 4 and count > _NODES):
            raise ValueError(f"mesh: {count} elements in an accessor. Simplify it")
        if self.numbers > _NUMBERS:
            raise ValueError(f"mesh: over {_NUMBERS} numbers in its accessors. Simplify it")
        if "bufferView" in said:
            raw = self._strided(said["bufferView"], said.get("byteOffset", 0), count, width, dtype)
        else:
            raw = np.zeros((count, width), dtype)
        if "sparse" in said:
            raw, where = raw.copy(), said["sparse"]
            given, values = where["indices"], where["values"]
            kind = np.dtype(_COMPONENTS[given["componentType"]])
            start = given.get("byteOffset", 0)
            rows = self._strided(given["bufferView"], start, where["count"], 1, kind)
            start = values.get("byteOffset", 0)
            raw[rows[:, 0]] = self._strided(
                values["bufferView"], start, where["count"], width, dtype
            )
        result = raw.astype(np.float64)
        if said.get("normalized") and dtype.kind in "iu":
            result = (result / np.iinfo(dtype).max).clip(-1, 1)
        return result

    def _strided(
        self, view_index: int, offset: int, count: int, width: int, dtype: np.dtype
    ) -> NDArray[np.generic]:
        view = self.json["bufferViews"][view_index]
        data = self._buffer(view["buffer"])
        stride = view.get("byteStride", 0) or width * dtype.itemsize
        start, size = view.get("byteOffset", 0) + offset, width * dtype.itemsize
        end = min(view.get("byteOffset", 0) + view["byteLength"], len(data))
        if offset < 0 or start < 0 or stride < 0 or count < 0:
            raise ValueError("not well-formed glTF: a negative offset or count")
        if count and start + (count - 1) * stride + size > end:
            raise ValueError("a mesh asks for more bytes than its buffer has: it is cut off")
        shape, strides = (count, width), (stride, dtype.itemsize)
        if not count:
            return np.zeros(shape, dtype)
        return np.ndarray(shape, dtype, data, start, strides)


def _local(node: Json) -> Doubles:
    """A node's own transform, (4, 4)."""
    if "matrix" in node:
        return np.asarray(node["matrix"], np.float64).reshape(4, 4).T
    x, y, z, w = np.asarray(node.get("rotation", (0, 0, 0, 1)), np.float64)
    norm = x * x + y * y + z * z + w * w
    k = 2 / norm if norm > 1e-12 else 0.0
    matrix = np.eye(4)
    matrix[:3, :3] = [
        [1 - k * (y * y + z * z), k * (x * y - z * w), k * (x * z + y * w)],
        [k * (x * y + z * w), 1 - k * (x * x + z * z), k * (y * z - x * w)],
        [k * (x * z - y * w), k * (y * z + x * w), 1 - k * (x * x + y * y)],
    ]
    matrix[:3, :3] *= np.asarray(node.get("scale", (1, 1, 1)), np.float64)
    matrix[:3, 3] = node.get("translation", (0, 0, 0))
    return matrix


def _placed(part: Part, matrix: Doubles) -> Part:
    """The part under a transform (4, 4), or one for each vertex (V, 4, 4)."""
    turn, shift = matrix[..., :3, :3], matrix[..., :3, 3]
    if matrix.ndim == 2:
        vertices = part.vertices @ turn.T + shift
        normals = None if part.normals is None else part.normals @ np.linalg.pinv(turn)
    else:
        vertices = np.einsum("vij,vj->vi", turn, part.vertices) + shift
        normals = part.normals
        if normals is not None:
            normals = np.einsum("vi,vij->vj", normals, np.linalg.pinv(turn))
    return Part(vertices, part.faces, part.material, normals, part.colors, part.uvs)


def _triangles(order: NDArray[np.int64], mode: int) -> NDArray[np.int64]:
    """Faces (n, 3) of a list (4), strip (5) or fan (6) of vertices."""
    if mode == 4:
        return order[: len(order) // 3 * 3].reshape(-1, 3)
    if mode not in (5, 6):
        raise ValueError(f"not well-formed glTF: a primitive of mode {mode}")
    first = np.arange(max(len(order) - 2, 0))
    if mode == 6:
        return order[np.stack([0 * first, first + 1, first + 2], axis=1)]
    odd = first % 2  # every second triangle of a strip runs the other way round
    return order[np.stack([first, first + 1 + odd, first + 2 - odd], axis=1)]
