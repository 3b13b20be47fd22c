"""The same object looks the same in every encoding of glTF and OBJ, or is refused by name.

The object is a box whose six sides show different parts of a picture; `plain` is its simplest
glTF, and every other encoding of it (a row of `ENCODINGS` or `OBJECTS`) is rendered beside it.
"""

import base64
import io
import json
import shutil
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fresnel.data.images import DatasetError
from fresnel.objects import trace
from fresnel.objects.assets import Asset, content_of, find_assets
from fresnel.objects.render_set import render_set
from fresnel.scene.cameras import standard_orbit

CAMERAS = standard_orbit(torch.tensor([25.0, 205.0]), torch.tensor([30.0, -20.0]), 32)
PICTURE = np.random.default_rng(5).integers(40, 255, (6, 4, 3)).astype(np.uint8)
COMPONENTS = {"b": 5120, "B": 5121, "h": 5122, "H": 5123, "I": 5125, "f": 5126}
WIDTHS = {1: "SCALAR", 2: "VEC2", 3: "VEC3", 4: "VEC4", 16: "MAT4"}


def png(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    scaled = np.kron(pixels, np.ones((8, 8, *[1] * (pixels.ndim - 2)), pixels.dtype))
    Image.fromarray(scaled).save(stream, kind, **({"lossless": True} if kind == "WEBP" else {}))
    return stream.getvalue()


def box() -> dict[str, np.ndarray]:
    """24 vertices, 6 sides; each side's coordinates cover one row of the picture."""
    points, normals, layout, faces = [], [], [], []
    for side in range(6):
        axis, sign = side // 2, 1 - 2 * (side % 2)
        normal = np.eye(3)[axis] * sign
        right, up = np.eye(3)[(axis + 1) % 3] * sign, np.eye(3)[(axis + 2) % 3]
        for u, v in ((0, 0), (1, 0), (1, 1), (0, 1)):
            corner = normal + (2 * u - 1) * right + (2 * v - 1) * up
            points.append(corner * (0.5, 0.35, 0.2))
            normals.append(normal)
            layout.append((u, (side + v) / 6))
        faces += [[4 * side, 4 * side + 1, 4 * side + 2], [4 * side, 4 * side + 2, 4 * side + 3]]
    return {
        "POSITION": np.float32(points),
        "NORMAL": np.float32(normals),
        "TEXCOORD_0": np.float32(layout),
        "indices": np.uint16(faces).ravel(),
    }


class Gltf:
    """A glTF under construction: the box, one material with one texture."""

    def __init__(self, picture: bytes | None = None) -> None:
        self.blob = bytearray()
        self.box = box()
        self.material: dict = {"pbrMetallicRoughness": {"baseColorTexture": {"index": 0}}}
        self.node: dict = {"mesh": 0}
        self.mesh: dict = {}
        self.primitive: dict = {"material": 0}
        view = self.view(picture or png(PICTURE))
        self.json: dict = {
            "asset": {"version": "2.0"},
            "scene": 0,
            "scenes": [{"nodes": [0]}],
            "nodes": [self.node],
            "meshes": [self.mesh],
            "materials": [self.material],
            "textures": [{"source": 0}],
            "images": [{"bufferView": view, "mimeType": "image/png"}],
            "samplers": [],
        }

    def view(self, data: bytes, **more: int) -> int:
        self.blob += b"\0" * (-len(self.blob) % 4)
        views = self.__dict__.setdefault("views", [])
        views.append({"buffer": 0, "byteOffset": len(self.blob), "byteLength": len(data), **more})
        self.blob += data
        return len(views) - 1

    def accessor(self, values: np.ndarray, normalized: bool = False, **more) -> int:
        values = np.ascontiguousarray(values)
        width = values.shape[1] if values.ndim > 1 else 1
        said = {"componentType": COMPONENTS[values.dtype.char], "count": len(values)}
        said |= {"type": WIDTHS[width], **({"normalized": True} if normalized else {}), **more}
        if "bufferView" not in more and "sparse" not in more:
            said["bufferView"] = self.view(values.tobytes())
        accessors = self.__dict__.setdefault("accessors", [])
        accessors.append(said)
        return len(accessors) - 1

    def attributes(self) -> dict[str, int]:
        """Accessors of what `self.box` still has as arrays; numbers are accessors already."""
        return {
            name: value if isinstance(value, int) else self.accessor(value)
            for name, value in self.box.items()
            if name != "indices" and value is not None
        }

    def finish(self) -> dict:
        if "primitives" not in self.mesh:
            self.primitive["attributes"] = self.attributes()
            indices = self.box["indices"]
            if indices is not None:
                whole = isinstance(indices, int)
                self.primitive["indices"] = indices if whole else self.accessor(indices)
            self.mesh["primitives"] = [self.primitive]
        self.json |= {"accessors": self.accessors, "bufferViews": self.views}
        self.json["buffers"] = [{"byteLength": len(self.blob)}]
        return self.json

    def glb(self) -> bytes:
        text = json.dumps(self.finish()).encode()
        text += b" " * (-len(text) % 4)
        blob = bytes(self.blob) + b"\0" * (-len(self.blob) % 4)
        body = struct.pack("<I4s", len(text), b"JSON") + text
        body += struct.pack("<I4s", len(blob), b"BIN\0") + blob
        return struct.pack("<4sII", b"glTF", 2, 12 + len(body)) + body


def pictures(path: Path) -> torch.Tensor:
    views = trace.render(trace.load(path).normalised(), CAMERAS, samples=4)
    return torch.cat([views.rgb, views.alpha], dim=-1)


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    return -10 * float((a - b).square().mean().clamp_min(1e-12).log10())


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> torch.Tensor:
    path = tmp_path_factory.mktemp("plain") / "box.glb"
    path.write_bytes(Gltf().glb())
    return pictures(path)


# --- encodings of the same box -----------------------------------------------------------------


def indices_in(kind: type) -> object:
    return lambda g: g.box.update(indices=g.box["indices"].astype(kind))


def no_indices(g: Gltf) -> None:
    order = g.box.pop("indices")
    g.box = {name: values[order] for name, values in g.box.items()} | {"indices": None}


def sides_in(mode: int, *order: int) -> object:
    def change(g: Gltf) -> None:
        common = {"attributes": g.attributes(), "material": 0, "mode": mode}
        g.mesh["primitives"] = [
            {**common, "indices": g.accessor(np.uint16([4 * side + k for k in order]))}
            for side in range(6)
        ]

    return change


def sparse(kind: type, *wrong: int) -> object:
    """Rows that are wrong in the accessor's own view, or all of them without one."""

    def change(g: Gltf) -> None:
        right, rows = g.box["POSITION"], list(wrong or range(24))
        spoilt = right.copy()
        spoilt[rows] = 9
        indices, values = g.view(kind(rows).tobytes()), g.view(right[rows].tobytes())
        kinds = {"bufferView": indices, "componentType": COMPONENTS[np.dtype(kind).char]}
        said = {"count": len(rows), "indices": kinds, "values": {"bufferView": values}}
        view = {"bufferView": g.view(spoilt.tobytes())} if wrong else {}
        g.box["POSITION"] = g.accessor(right, sparse=said, **view)

    return change


def interleaved(g: Gltf) -> None:
    rows = np.concatenate([g.box[k] for k in ("POSITION", "NORMAL", "TEXCOORD_0")], axis=1)
    view = g.view(rows.astype(np.float32).tobytes(), byteStride=32)
    for name, offset in (("POSITION", 0), ("NORMAL", 12), ("TEXCOORD_0", 24)):
        g.box[name] = g.accessor(g.box[name], bufferView=view, byteOffset=offset)


def quantised(g: Gltf) -> None:
    g.box["POSITION"] = g.accessor(np.int16(np.round(g.box["POSITION"] * 65534)), normalized=True)
    g.box["NORMAL"] = g.accessor(np.int8(g.box["NORMAL"] * 127), normalized=True)
    g.json["extensionsRequired"] = g.json["extensionsUsed"] = ["KHR_mesh_quantization"]


def whole_numbers(g: Gltf) -> None:
    g.box["POSITION"] = np.uint16(np.round((g.box["POSITION"] + 1) * 1000))
    g.node["scale"], g.node["translation"] = [0.001] * 3, [-1.0] * 3
    g.json["extensionsRequired"] = g.json["extensionsUsed"] = ["KHR_mesh_quantization"]


def layout_in(kind: type) -> object:
    def change(g: Gltf) -> None:
        top = np.iinfo(kind).max
        g.box["TEXCOORD_0"] = g.accessor(kind(np.round(g.box["TEXCOORD_0"] * top)), normalized=True)

    return change


def second_layout(g: Gltf) -> None:
    g.box["TEXCOORD_1"] = g.box["TEXCOORD_0"]
    g.box["TEXCOORD_0"] = g.box["TEXCOORD_0"] * 0
    g.material["pbrMetallicRoughness"]["baseColorTexture"]["texCoord"] = 1


def transformed_layout(**said) -> object:
    def change(g: Gltf) -> None:
        uv = g.box["TEXCOORD_0"].astype(np.float64) - said.get("offset", (0, 0))
        cos, sin = np.cos(said.get("rotation", 0)), np.sin(said.get("rotation", 0))
        uv = uv @ np.array([[cos, sin], [-sin, cos]])  # undone: its transpose, from the right
        g.box["TEXCOORD_0"] = np.float32(uv / said.get("scale", (1, 1)))
        info = g.material["pbrMetallicRoughness"]["baseColorTexture"]
        info["extensions"] = {"KHR_texture_transform": said}
        if said.get("texCoord"):
            g.box["TEXCOORD_1"] = g.box.pop("TEXCOORD_0")

    return change


def wrapped(u: int, v: int, change: object) -> object:
    def apply(g: Gltf) -> None:
        g.json["samplers"] = [{"wrapS": u, "wrapT": v}]
        g.json["textures"][0]["sampler"] = 0
        g.box["TEXCOORD_0"] = np.float32(change(g.box["TEXCOORD_0"].astype(np.float64)))

    return apply


def nested(g: Gltf) -> None:
    turn = [0.0, 0.38268343, 0.0, 0.92387953]  # 45 degrees about Y, and back
    g.json["nodes"] = [
        {"children": [1], "rotation": turn, "translation": [3, 1, 2], "scale": [2, 2, 2]},
        {"children": [2], "rotation": [0.0, -0.38268343, 0.0, 0.92387953]},
        g.node | {"scale": [0.5, 0.5, 0.5]},
    ]


def negative_scale(g: Gltf) -> None:
    g.box["POSITION"], g.box["NORMAL"] = -g.box["POSITION"], -g.box["NORMAL"]
    g.node["scale"] = [-1.0, -1.0, -1.0]


def by_matrix(g: Gltf) -> None:
    g.box["POSITION"] = g.box["POSITION"] / np.float32([2, 3, 4])
    g.box["NORMAL"] = g.box["NORMAL"] * np.float32([2, 3, 4])
    g.node["matrix"] = np.diag([2.0, 3.0, 4.0, 1.0]).ravel().tolist()


def skinned(turned: bool) -> object:
    def change(g: Gltf) -> None:
        bind = np.eye(4)
        bind[:3, :3] = [[0, 0, 1], [1, 0, 0], [0, 1, 0]]
        g.box["POSITION"] = np.float32(g.box["POSITION"] @ bind[:3, :3] * 100)
        g.box["NORMAL"] = np.float32(g.box["NORMAL"] @ bind[:3, :3])
        g.box["JOINTS_0"] = np.uint8([[0, 1, 0, 0]] * 24)
        g.box["WEIGHTS_0"] = np.float32([[0.25, 0.75, 0, 0]] * 24)
        inverse = bind @ np.diag([0.01, 0.01, 0.01, 1])
        joint: dict = {}
        if turned:  # the joint's pose gives back what its bind matrix takes
            joint = {"rotation": [0.0, 0.70710678, 0.0, 0.70710678]}
            back = np.array([[0, 0, -1, 0], [0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1.0]])
            inverse = back @ inverse
        matrices = np.float32([inverse.T.ravel()] * 2)
        g.json["skins"] = [{"joints": [1, 2], "inverseBindMatrices": g.accessor(matrices)}]
        g.json["nodes"] = [g.node | {"skin": 0, "translation": [5, 5, 5]}, joint, joint]
        g.json["scenes"] = [{"nodes": [0, 1, 2]}]

    return change


def morphed(g: Gltf) -> None:
    shift = np.random.default_rng(0).normal(size=(24, 3)).astype(np.float32)
    g.primitive["targets"] = [{"POSITION": g.accessor(shift)}, {"POSITION": g.accessor(-shift)}]
    g.box["POSITION"] = g.box["POSITION"] - np.float32(0.5) * shift
    g.mesh["weights"], g.node["weights"] = [9.0, 9.0], [0.75, 0.25]


def instanced(g: Gltf) -> None:
    """Twice in the same place, by a transform that the node undoes."""
    said = {
        "TRANSLATION": g.accessor(np.float32([[1, 2, 3]] * 2)),
        "SCALE": g.accessor(np.float32([[2, 2, 2]] * 2)),
        "ROTATION": g.accessor(np.float32([[0, 0, 0, 1]] * 2)),
    }
    g.node["extensions"] = {"EXT_mesh_gpu_instancing": {"attributes": said}}
    g.json["extensionsUsed"] = g.json["extensionsRequired"] = ["EXT_mesh_gpu_instancing"]


def colored(kind: str) -> object:
    """White vertices of every type beside the texture, half of it in the factor."""

    def change(g: Gltf) -> None:
        if kind == "f":
            g.box["COLOR_0"] = np.full((24, 4), 1.0, np.float32)
        else:
            top = np.iinfo(kind).max
            g.box["COLOR_0"] = g.accessor(np.full((24, 3), top, kind), normalized=True)

    return change


def specular(g: Gltf) -> None:
    info = g.material.pop("pbrMetallicRoughness")["baseColorTexture"]
    said = {"diffuseTexture": info, "diffuseFactor": [1.0, 1.0, 1.0, 1.0]}
    g.material["extensions"] = {"KHR_materials_pbrSpecularGlossiness": said}


def webp(g: Gltf) -> None:
    g.json["images"].append({"bufferView": g.view(png(PICTURE, "WEBP")), "mimeType": "image/webp"})
    g.json["textures"] = [{"extensions": {"EXT_texture_webp": {"source": 1}}}]
    g.json["extensionsRequired"] = g.json["extensionsUsed"] = ["EXT_texture_webp"]


def see_through_but_opaque(g: Gltf) -> None:
    alpha = np.full((*PICTURE.shape[:2], 1), 100, np.uint8)
    data = png(np.concatenate([PICTURE, alpha], axis=2))
    g.json["images"] = [{"bufferView": g.view(data), "mimeType": "image/png"}]


def no_scenes(g: Gltf) -> None:
    del g.json["scenes"], g.json["scene"]


def palette(g: Gltf) -> None:
    stream = io.BytesIO()
    Image.open(io.BytesIO(png(PICTURE))).quantize(64).save(stream, "PNG")
    g.json["images"] = [{"bufferView": g.view(stream.getvalue()), "mimeType": "image/png"}]


ENCODINGS = {
    "indices of 32 bits": indices_in(np.uint32),
    "indices of 8 bits": indices_in(np.uint8),
    "no indices": no_indices,
    "strips": sides_in(5, 0, 1, 3, 2),
    "fans": sides_in(6, 0, 1, 2, 3),
    "sparse": sparse(np.uint16, 3, 17),
    "sparse without a view": sparse(np.uint8),
    "interleaved": interleaved,
    "normalised positions": quantised,
    "positions in whole numbers": whole_numbers,
    "uv of 8 bits": layout_in(np.uint8),
    "uv of 16 bits": layout_in(np.uint16),
    "second uv set": second_layout,
    "uv scaled and moved": transformed_layout(offset=(0.25, -0.5), scale=(0.5, 2.0)),
    "uv turned": transformed_layout(rotation=0.7, offset=(0.1, 0.2), scale=(1.5, 0.5)),
    "uv set of the transform": transformed_layout(scale=(2.0, 2.0), texCoord=1),
    "repeat": wrapped(10497, 10497, lambda uv: uv - (-3, 2)),
    "mirror": wrapped(33648, 33648, lambda uv: (2, 4) - uv),
    "nested nodes": nested,
    "negative scale": negative_scale,
    "a matrix": by_matrix,
    "skin in its bind pose": skinned(False),
    "skin in a pose": skinned(True),
    "morph weights": morphed,
    "instances": instanced,
    "colours of 8 bits": colored("u1"),
    "colours of 16 bits": colored("u2"),
    "colours in floats": colored("f"),
    "specular-glossiness": specular,
    "webp": webp,
    "far away": lambda g: g.node.update(translation=[4_600_000.0, 500_000.0, -1_000_000.0]),
    "mask": lambda g: g.material.update(alphaMode="MASK"),
    "blend": lambda g: g.material.update(alphaMode="BLEND"),
    "opaque with alpha": see_through_but_opaque,
    "no normals": lambda g: g.box.update(NORMAL=None),
    "no scenes": no_scenes,
    "second scene": lambda g: g.json.update(scenes=[{"nodes": []}, {"nodes": [0]}], scene=1),
    "palette": palette,
}


@pytest.mark.parametrize("name", ENCODINGS)
def test_every_encoding_of_a_gltf_looks_the_same(name, plain, tmp_path):
    made = Gltf()
    ENCODINGS[name](made)
    (tmp_path / "box.glb").write_bytes(made.glb())
    assert psnr(pictures(tmp_path / "box.glb"), plain) > 40
    notes = trace.load(tmp_path / "box.glb").notes
    assert notes == ("one of its 2 scenes is drawn",) * (name == "second scene"), "all is drawn"


def linked(folder: Path, embedded: bool) -> Path:
    """The box as .gltf, its bytes in data URIs, or in files whose names need percent signs."""
    said = Gltf().finish()
    made = Gltf()
    made.finish()
    image = png(PICTURE)
    if embedded:
        uris = [f"data:;base64,{base64.b64encode(data).decode()}" for data in (made.blob, image)]
    else:
        (folder / "my box.bin").write_bytes(made.blob)
        (folder / "tex").mkdir()
        (folder / "tex/ö 1.png").write_bytes(image)
        uris = ["my%20box.bin", "tex/%C3%B6%201.png"]
    said["buffers"][0]["uri"], said["images"] = uris[0], [{"uri": uris[1]}]
    (folder / "box.gltf").write_text(json.dumps(said))
    return folder / "box.gltf"


@pytest.mark.parametrize("embedded", [True, False])
def test_gltf_with_its_bytes_elsewhere(embedded, plain, tmp_path):
    assert psnr(pictures(linked(tmp_path, embedded)), plain) > 40


# --- the same box as OBJ -----------------------------------------------------------------------


def obj_lines(negative: bool = False, quads: bool = False) -> list[str]:
    """Each side's vertices, then its faces."""
    made, lines = box(), []
    for side in range(6):
        rows = range(4 * side, 4 * side + 4)
        lines += ["v {} {} {}".format(*made["POSITION"][k]) for k in rows]
        lines += [f"vt {u} {1 - v}" for u, v in made["TEXCOORD_0"][4 * side :][:4]]
        lines.append("vn {} {} {}".format(*made["NORMAL"][4 * side]))
        corners = [-4, -3, -2, -1] if negative else [k + 1 for k in rows]
        normal = -1 if negative else side + 1
        words = [f"{corner}/{corner}/{normal}" for corner in corners]
        shapes = [words] if quads else [words[:3], [words[0], *words[2:]]]
        lines += ["f " + " ".join(shape) for shape in shapes]
    return lines


def write_obj(folder: Path, lines: list[str], mtl: str | bytes = "", head: str = "") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    text = mtl or "newmtl m\nKd 1 1 1\nmap_Kd t.png\n"
    (folder / "a.mtl").write_bytes(text if isinstance(text, bytes) else text.encode())
    (folder / "t.png").write_bytes(png(PICTURE))
    head = head or "mtllib a.mtl\nusemtl m"
    (folder / "a.obj").write_text("\n".join([head, *lines]))
    return folder / "a.obj"


OBJECTS = {
    "plain": {},
    "negative": {"lines": obj_lines(negative=True)},
    "quads": {"lines": obj_lines(quads=True)},
    "coordinates of a map": {
        "lines": [
            "v {} {} {}".format(*np.add((5e5, 4.6e6, 80), [*map(float, line.split()[1:])]).tolist())
            if line.startswith("v ")
            else line
            for line in obj_lines()
        ]
    },
    "continued lines": {"lines": [line.replace(" ", " \\\n", 1) for line in obj_lines()]},
    "byte order mark": {"mtl": "\ufeffnewmtl m\nmap_Kd t.png\n".encode()},
    "options": {"mtl": "newmtl m\nmap_Kd -o 0 0 0 -s 1 1 1 -clamp off -bm 1 t.png\n"},
    "windows path": {"mtl": "newmtl m\nmap_Kd C:\\work\\out\\t.png\n"},
    "other case": {"mtl": "newmtl m\nmap_kd T.PNG\n"},
    "quoted": {"mtl": 'newmtl m\nmap_Kd "t.png"\n'},
    "Tr": {"mtl": "newmtl m\nTr 0\nd 1\nmap_Kd t.png\n"},
    "layout scaled": {
        "mtl": "newmtl m\nmap_Kd -s 2 2 -o 0.5 t.png\n",
        "lines": [
            "vt {} {}".format(*(np.array(line.split()[1:], float) - (0.5, 0)) / 2)
            if line.startswith("vt")
            else line
            for line in obj_lines()
        ],
    },
}


@pytest.mark.parametrize("name", OBJECTS)
def test_every_way_to_write_an_obj_looks_the_same(name, plain, tmp_path):
    how = OBJECTS[name]
    path = write_obj(tmp_path, how.get("lines", obj_lines()), how.get("mtl", ""))
    assert psnr(pictures(path), plain) > 40
    assert not trace.load(path).notes


def test_the_only_material_needs_no_line_that_takes_it(plain, tmp_path):
    path = write_obj(tmp_path, obj_lines(), head="g side\nmtllib a.mtl")
    assert psnr(pictures(path), plain) > 40


def test_two_material_files_in_one_line(plain, tmp_path):
    path = write_obj(tmp_path, obj_lines(), head="mtllib b.mtl a.mtl\nusemtl m")
    (tmp_path / "b.mtl").write_text("newmtl other\nKd 0 1 0\n")
    assert psnr(pictures(path), plain) > 40


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize(
    ("home", "texture", "named"),
    [
        ("1a6f/models", "1a6f/images/t.png", "../images/t.png"),  # ShapeNet
        ("mug/meshes", "mug/materials/textures/t.png", "t.png"),  # Google Scanned Objects
        ("a", "textures/t.png", "textures/t.png"),  # from the collection's folder
        ("a/b", "textures/t.png", "../../textures/t.png"),
    ],
)
def test_textures_in_other_folders_of_the_collection(home, texture, named, zipped, plain, tmp_path):
    root = tmp_path / "set"
    write_obj(root / home, obj_lines(), f"newmtl m\nmap_Kd {named}\n")
    (root / texture).parent.mkdir(parents=True, exist_ok=True)
    (root / home / "t.png").rename(root / texture)
    if zipped:
        with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
            for path in sorted(root.rglob("*")):
                archive.write(path, path.relative_to(root))
    (asset,) = find_assets(tmp_path / "set.zip" if zipped else root)
    views = trace.render(trace.load(asset).normalised(), CAMERAS, samples=4)
    assert psnr(torch.cat([views.rgb, views.alpha], dim=-1), plain) > 40


def test_a_folder_whose_name_begins_alike_is_another_objects(tmp_path):
    write_obj(tmp_path / "a", obj_lines())
    write_obj(tmp_path / "ab", obj_lines())
    (tmp_path / "a/t.png").unlink()
    with pytest.warns(UserWarning, match=r"texture 't\.png' was not found"):
        assert trace.load(Asset("a", tmp_path / "a/a.obj", root=tmp_path)).notes


def test_a_texture_of_another_object_is_never_taken(tmp_path):
    write_obj(tmp_path / "a", obj_lines())
    write_obj(tmp_path / "b", obj_lines())
    (tmp_path / "b/t.png").unlink()
    (tmp_path / "a/t.png").rename(tmp_path / "a/other.png")
    (tmp_path / "c").mkdir()
    (tmp_path / "c/t.png").write_bytes(png(PICTURE))
    for asset in find_assets(tmp_path):
        with pytest.warns(UserWarning, match=r"texture 't\.png' was not found"):
            assert trace.load(asset).notes


# --- what else is drawn ------------------------------------------------------------------------


def shown(folder: Path, change) -> torch.Tensor:
    made = Gltf()
    change(made)
    (folder / "x.glb").write_bytes(made.glb())
    return pictures(folder / "x.glb")


def test_masked_and_blended_pixels_let_through_what_is_behind(plain, tmp_path):
    """A second, smaller box inside shows through the outer one's holes, and its light half."""

    def with_alpha(mode: str, alpha: int):
        def change(g: Gltf) -> None:
            layer = np.full((*PICTURE.shape[:2], 1), alpha, np.uint8)
            data = png(np.concatenate([0 * PICTURE, layer], axis=2))
            g.json["images"].append({"bufferView": g.view(data), "mimeType": "image/png"})
            g.json["textures"].append({"source": 1})
            outer = {"pbrMetallicRoughness": {"baseColorTexture": {"index": 1}}, "alphaMode": mode}
            g.json["materials"].append(outer)
            g.primitive["attributes"] = g.attributes()
            g.primitive["indices"] = g.accessor(g.box["indices"])
            g.mesh["primitives"] = [g.primitive, g.primitive | {"material": 1}]
            g.json["meshes"] = [
                {"primitives": [g.primitive]},
                {"primitives": [g.primitive | {"material": 1}]},
            ]
            g.json["nodes"] = [{"mesh": 0, "scale": [0.5] * 3}, {"mesh": 1}]
            g.json["scenes"] = [{"nodes": [0, 1]}]

        return change

    holes = shown(tmp_path, with_alpha("MASK", 100))  # below the cutoff: as if it weren't there
    solid = shown(tmp_path, with_alpha("MASK", 200))
    half = shown(tmp_path, with_alpha("BLEND", 128))
    assert holes[..., 3].sum() < 0.4 * solid[..., 3].sum()
    assert solid[..., :3].max() < 0.01, "the outer box is black"
    both = holes[..., 3] == 1  # two black walls in front, of which half is left each
    assert torch.allclose(half[both][:, :3], holes[both][:, :3] / 2, atol=0.01)
    assert half[both][:, 3].min() > 0.99
    outside = (solid[..., 3] == 1) & (holes[..., 3] == 0)
    assert half[outside][:, 3].median() == pytest.approx(1 - (127 / 255) ** 2, abs=0.01)


def test_emission_and_unlit_materials(plain, tmp_path):
    def glowing(g: Gltf) -> None:
        g.material["pbrMetallicRoughness"]["baseColorFactor"] = [0, 0, 0, 1]
        g.material["emissiveTexture"] = {"index": 0}
        g.material["emissiveFactor"] = [0.5, 0.5, 0.5]
        g.material["extensions"] = {"KHR_materials_emissive_strength": {"emissiveStrength": 2.0}}

    def unlit(g: Gltf) -> None:
        g.material["extensions"] = {"KHR_materials_unlit": {}}

    glow, flat = shown(tmp_path, glowing), shown(tmp_path, unlit)
    assert psnr(glow, flat) > 60, "all of the picture's light, from no lamp"
    assert (flat[..., :3] >= plain[..., :3] - 1e-3).all()


def test_vertex_colours_of_every_type_look_the_same_and_need_no_material(tmp_path):
    share = np.random.default_rng(1).integers(1, 4, (24, 4)) * 85  # the same in 8 and in 16 bits

    def in_type(kind: str):
        def change(g: Gltf) -> None:
            del g.primitive["material"]
            values = share / 255 if kind == "f" else share * (257 if kind == "H" else 1)
            g.box["COLOR_0"] = g.accessor(values.astype(kind), normalized=kind != "f")

        return shown(tmp_path, change)

    wanted = in_type("f")
    assert psnr(in_type("B"), wanted) > 60 and psnr(in_type("H"), wanted) > 60
    assert wanted[..., :3].std(dim=-1).max() > 0.05, "in colour"


def test_the_edge_of_a_clamped_texture_goes_on(tmp_path):
    def outside(g: Gltf) -> None:
        wrapped(33071, 33071, lambda uv: np.full_like(uv, (-3.0, -5.0)))(g)
        g.material["extensions"] = {"KHR_materials_unlit": {}}

    colours = shown(tmp_path, outside)
    lit = colours[colours[..., 3] == 1][:, :3]
    assert (lit - torch.from_numpy(PICTURE[0, 0] / 255.0)).abs().max() < 1e-3


@pytest.mark.parametrize("deep", [False, True])
def test_grey_textures_of_8_and_16_bits(deep, tmp_path):
    grey = (np.arange(24).reshape(6, 4) * 10).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(grey.astype(np.uint16) * 257 if deep else grey).save(stream, "PNG")
    made, same = Gltf(stream.getvalue()), Gltf(png(np.repeat(grey[..., None], 3, axis=2)))
    for gltf in (made, same):
        gltf.json["samplers"] = [{"magFilter": 9728}]
        gltf.json["textures"][0]["sampler"] = 0
    (tmp_path / "a.glb").write_bytes(made.glb())
    (tmp_path / "b.glb").write_bytes(same.glb())
    assert psnr(pictures(tmp_path / "a.glb"), pictures(tmp_path / "b.glb")) > 40


def test_concave_polygons_keep_their_bay(tmp_path):
    """An L of six corners, in one polygon that a fan from its first corner would fill."""
    points = [(0, 0), (0, 2), (-2, 2), (-2, -2), (2, -2), (2, 0)]
    lines = [f"v {x} {y} 0" for x, y in points] + ["f 1 2 3 4 5 6"]
    (tmp_path / "l.obj").write_text("\n".join(lines))
    cameras = standard_orbit(torch.tensor([0.0]), torch.tensor([0.0]), 40)
    alpha = trace.render(trace.load(tmp_path / "l.obj").normalised(), cameras).alpha[0, ..., 0]
    assert alpha[20 - 5, 20 + 5] == 0, "the bay is empty"
    assert alpha[20 + 5, 20 + 5] == alpha[20 - 5, 20 - 5] == alpha[20 + 5, 20 - 5] == 1


@pytest.mark.parametrize("scale", [1, 255])
def test_vertex_colours_of_an_obj_beside_its_material(scale, tmp_path):
    lines = [f"{line} {scale} 0 0" if line.startswith("v ") else line for line in obj_lines()]
    path = write_obj(tmp_path, lines, "newmtl m\nKd 1 1 1\n")
    colours = pictures(path)
    assert colours[..., 0].max() > 0.5 and colours[..., 1:3].max() == 0


def test_opacity_of_an_obj(plain, tmp_path):
    half = pictures(write_obj(tmp_path / "d", obj_lines(), "newmtl m\nKd 1 1 1\nd 0.5\n"))
    inside = half[..., 3][plain[..., 3] == 1]
    assert inside.median() == pytest.approx(0.75, abs=0.01), "front and back"
    Image.new("L", (4, 4), 0).save(tmp_path / "hole.png")
    mtl = "newmtl m\nmap_Kd t.png\nmap_d ../hole.png\n"
    (tmp_path / "m").mkdir()
    path = write_obj(tmp_path / "m", obj_lines(), mtl)
    asset = Asset("a", path, root=tmp_path)
    assert trace.render(trace.load(asset).normalised(), CAMERAS).alpha.max() == 0


# --- what is refused, and what is said ---------------------------------------------------------


def required(name: str):
    def change(g: Gltf) -> None:
        g.json["extensionsUsed"] = g.json["extensionsRequired"] = [name]

    return change


def cut_texture(g: Gltf) -> None:
    g.json["images"] = [{"bufferView": g.view(png(PICTURE)[:60]), "mimeType": "image/png"}]


def ktx_alone(g: Gltf) -> None:
    g.json["textures"] = [{"extensions": {"KHR_texture_basisu": {"source": 0}}}]


def bad_view(g: Gltf) -> None:
    g.box["POSITION"] = g.accessor(g.box["POSITION"], bufferView=g.view(b"\0" * 40))


def absurd_count(g: Gltf) -> None:
    g.box["POSITION"] = g.accessor(g.box["POSITION"], bufferView=0, count=2_000_000_000)


def circle(g: Gltf) -> None:
    g.json["nodes"] = [g.node | {"children": [1]}, {"children": [0]}]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (required("KHR_draco_mesh_compression"), "Draco.*Decompress"),
        (required("EXT_meshopt_compression"), "meshopt.*Decompress"),
        (required("KHR_texture_basisu"), "KHR_texture_basisu.*KTX2.*Convert"),
        (required("ACME_teapots"), "requires ACME_teapots"),
        (ktx_alone, "KHR_texture_basisu alone.*KTX2"),
        (cut_texture, "texture number 0: a truncated"),
        (bad_view, "asks for more bytes.*cut off"),
        (absurd_count, "2000000000 elements"),
        (circle, "two parents"),
        (lambda g: g.json["asset"].update(version="1.0"), "version 1.0"),
        (lambda g: g.json.pop("materials"), "not well-formed glTF"),
    ],
)
def test_what_is_not_read_is_refused_by_name(change, message, tmp_path):
    made = Gltf()
    change(made)
    (tmp_path / "x.glb").write_bytes(made.glb())
    with pytest.raises(DatasetError, match=f"x\\.glb.*{message}|{message}"):
        trace.load(tmp_path / "x.glb")


def test_what_is_left_out_is_said_once(tmp_path):
    made = Gltf()
    made.json["extensionsUsed"] = ["KHR_materials_clearcoat", "KHR_lights_punctual"]
    made.json["animations"] = [{"channels": [], "samplers": []}]
    (tmp_path / "x.glb").write_bytes(made.glb())
    with pytest.warns(UserWarning) as said:
        notes = trace.load(tmp_path / "x.glb").notes
    assert [note.split()[0] for note in notes] == [
        "KHR_materials_clearcoat", "KHR_lights_punctual", "animations",
    ]  # fmt: skip
    assert len(said) == len(notes) and "x.glb" in str(said[0].message)


def test_what_an_obj_names_and_nobody_finds_is_said(tmp_path):
    path = write_obj(tmp_path, obj_lines(), "newmtl m\nmap_Kd none.png\n")
    with pytest.warns(UserWarning, match=r"texture 'none\.png' was not found"):
        trace.load(path)
    path = write_obj(tmp_path, obj_lines(), head="mtllib lost.mtl\nusemtl m")
    with pytest.warns(UserWarning, match=r"material file .lost\.mtl. was not found"):
        trace.load(path)
    path = write_obj(tmp_path, obj_lines(), "newmtl other\n")
    with pytest.warns(UserWarning, match="no material file describes 'm'"):
        trace.load(path)


@pytest.mark.parametrize("line", ["v 1 2", "v a b c", "f 0 1 2", "f 1/x 2 3", "f -9 -8 -7"])
def test_a_line_that_cannot_be_read_is_named(line, tmp_path):
    (tmp_path / "x.obj").write_text(f"v 0 0 0\nv 1 0 0\nv 0 1 0\n{line}\nf 1 2 3\n")
    with pytest.raises(DatasetError, match=r"line 4|three coordinates"):
        trace.load(tmp_path / "x.obj")


def test_a_buffer_that_is_cut_off_is_named(tmp_path):
    path = linked(tmp_path, embedded=False)
    whole = (tmp_path / "my box.bin").read_bytes()
    (tmp_path / "my box.bin").write_bytes(whole[:200])
    with pytest.raises(DatasetError, match=r"my%20box\.bin is too short: it ends after 200"):
        trace.load(path)
    (tmp_path / "my box.bin").unlink()
    with pytest.raises(DatasetError, match="no such file"):
        trace.load(path)


def test_an_object_that_cannot_be_read_is_left_out_and_the_others_stand(tmp_path):
    folder, small = tmp_path / "set", {"image_size": 8, "views": 2, "samples": 1}
    for name in ("a", "b", "c"):
        write_obj(folder / name, obj_lines()).rename(folder / name / f"{name}.obj")
    (folder / "b/b.obj").write_text("v 0 0 0\nf 1 1 1\n")
    (folder / "c/t.png").unlink()
    with pytest.warns(UserWarning, match="'b' can't be read and is left out, as one of 3"):
        made = render_set(find_assets(folder), tmp_path / "made", **small)
    assert made.names == ("a__0", "c__0") and made.verify() is None
    left, plain = made.meta["warnings"]
    assert "all its vertices coincide" in left
    assert "texture 't.png' was not found" in plain and "(1 of 3 objects, 'c'" in plain
    shutil.rmtree(folder / "a")
    shutil.rmtree(folder / "c")
    with pytest.raises(DatasetError, match=r"object 'b': .*coincide"):
        render_set(find_assets(folder), tmp_path / "none", **small)


@pytest.mark.parametrize("zipped", [False, True])
def test_what_macos_adds_is_no_object(zipped, tmp_path):
    root = tmp_path / "set"
    write_obj(root, obj_lines())
    for junk in ("__MACOSX/._a.obj", "._a.obj", ".cache/b.glb"):
        (root / junk).parent.mkdir(exist_ok=True)
        (root / junk).write_bytes(b"\0\5\x16\7")
    if zipped:
        shutil.make_archive(str(tmp_path / "set"), "zip", root)
    found = find_assets(tmp_path / "set.zip" if zipped else root)
    assert [asset.name for asset in found] == ["a"]


@pytest.mark.parametrize("change", ["mesh", "material", "texture", "appears"])
def test_what_an_object_shows_is_in_its_hash(change, tmp_path):
    path = write_obj(tmp_path / "mug/meshes", obj_lines(), "newmtl m\nmap_Kd -clamp on t.png\n")
    texture = tmp_path / "mug/materials/t.png"
    texture.parent.mkdir()
    (path.parent / "t.png").rename(texture)
    if change == "appears":
        texture.rename(tmp_path / "t.png")
    (asset,) = find_assets(tmp_path / "mug")
    before = content_of(asset, {})
    assert content_of(asset, {}) == before
    if change == "appears":
        (tmp_path / "t.png").rename(texture)
    elif change == "texture":
        texture.write_bytes(png(PICTURE[::-1]))
    else:
        changed = path if change == "mesh" else path.with_suffix(".mtl")
        changed.write_text(changed.read_text() + "# more\n")
    assert content_of(asset, {}) != before


def test_a_name_that_no_file_can_have_is_refused(tmp_path):
    (tmp_path / "list.json").write_text(json.dumps([{"file": "e" * 300 + ".glb"}]))
    with pytest.raises(DatasetError, match=r"list\.json"):
        find_assets(tmp_path / "list.json")
