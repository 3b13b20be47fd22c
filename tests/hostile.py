# ruff: noqa: E501
"""Hostile inputs, made by a generator: each is refused in a sentence, within 2 GB and ten seconds.

    python tests/hostile.py [KIND ...] [--count 200] [--seed 0]

Every case is made in one child process and read in another, whose memory and time are measured; the
table says of each kind how many were tried, refused, and went over the bounds or broke out of them.
test_fuzz_readers.py takes a sample.
"""

import argparse
import base64
import contextlib
import gzip
import io
import json
import os
import random
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fresnel import cli
from fresnel.data import dataset
from fresnel.models.cvs import CVS
from fresnel.models.decoder import Decoder
from fresnel.report.index import records
from fresnel.scene.gaussians import Gaussians
from fresnel.training import checkpoints

MOST_BYTES, MOST_S = 2 << 30, 10.0
MB = 1 << 20
Case = tuple[str, Path]
"""Which reader is to read it, and the file or folder."""
KINDS: dict[str, Callable[[Path, random.Random], Case]] = {}


def kind(make: Callable[[Path, random.Random], Case]) -> Callable[[Path, random.Random], Case]:
    KINDS[make.__name__] = make
    return make


# ---- readers: a command where there is one; each raises ValueError or OSError, or answers


def _command(*words: str) -> None:
    """A command of ours, whose refusal is one line and an exit status of 2."""
    with contextlib.redirect_stderr(io.StringIO()) as said, contextlib.redirect_stdout(said):
        status = cli.main(words)
    text = said.getvalue().strip()
    last = next((line for line in text.splitlines() if line.startswith("FAIL after")), text[-2000:])
    if status == 2 and text.splitlines()[-1].startswith("fresnel: ") and "Traceback" not in text:
        raise ValueError(text.splitlines()[-1])
    if status == 1 and last.startswith("FAIL"):  # the gate's verdict
        raise ValueError(last)
    raise AssertionError(f"status {status}: {text[-2000:]}")


def _index(path: Path) -> None:
    wrong = [record for _, record in records(path) if isinstance(record, ValueError)]
    raise wrong[0] if wrong else AssertionError("the record was taken")


READERS: dict[str, Callable[[Path], Any]] = {
    "validate": lambda path: _command("validate", str(path)),
    "views": lambda path: _command("views", str(path), "--out", f"{path}-views"),
    "original": lambda path: dataset.open(path)[0],
    "splats": Gaussians.load,
    "weights": lambda path: [net.load(path) for net in (CVS, Decoder)],
    "checkpoint": checkpoints.read,
    "index": _index,
}

# ---- what files are made of


def _zeros(compressor: Any, count: int, unit: bytes = bytes(1)) -> bytes:
    """A stream of `count` bytes of `unit`s, compressed."""
    chunk = unit * (MB // len(unit))
    parts = [compressor.compress(chunk) for _ in range(count // len(chunk))]
    return b"".join([*parts, compressor.flush()])


def _gzipped(count: int, unit: bytes = bytes(1), head: bytes = b"") -> bytes:
    compressor = zlib.compressobj(9, zlib.DEFLATED, 31)
    first = compressor.compress(head)
    return first + _zeros(compressor, count, unit)


def _png(width: int, height: int, chunks: bytes = b"", depth: int = 8, colour: int = 0) -> bytes:
    """A PNG of zeros; `chunks` stand before its pixels."""
    samples = {0: 1, 2: 3, 6: 4}[colour]
    size = (1 + (width * depth * samples + 7) // 8) * height
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = _zeros(zlib.compressobj(9), size + MB)
    return (
        b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + chunks + _chunk(b"IDAT", body)
    ) + _chunk(b"IEND", b"")


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def _saved(format: str, size: tuple[int, int] = (16, 16), **how: Any) -> bytes:
    Image.new("RGB", size, (200, 60, 20)).save(stream := io.BytesIO(), format, **how)
    return stream.getvalue()


def _deep(rng: random.Random) -> str:
    one = rng.choice(("[", '{"a":', '[{"frames":'))
    return one * rng.choice((1_000, 100_000, 1_000_000))


def _number(rng: random.Random) -> str:
    """What JSON takes for a number, or nearly."""
    return rng.choice(
        ("NaN", "Infinity", "-Infinity", "1e999", "-1e308", "1" * 5_000, "9" * 400, '"12"')
    )


def _odd_file(path: Path, rng: random.Random) -> str:
    """Something at `path` that is no file, or one that leads elsewhere."""
    which = rng.choice(("fifo", "socket", "device", "folder", "loop", "out", "sparse", "gone"))
    if which == "fifo":
        os.mkfifo(path)
    elif which == "socket":
        here = os.getcwd()
        os.chdir(path.parent)  # a socket's path has at most 108 bytes
        socket.socket(socket.AF_UNIX).bind(path.name)
        os.chdir(here)
    elif which == "folder":
        path.mkdir()
    elif which == "sparse":
        with path.open("wb") as file:
            file.truncate(1 << 40)
    else:
        path.symlink_to(
            {"device": "/dev/zero", "loop": path.name, "out": "/etc/passwd"}.get(which, "nowhere")
        )
    return which


def _transforms(folder: Path, **changes: str) -> str:
    """A sound transforms.json with pieces of its text exchanged, and its pictures."""
    (folder / "images").mkdir(exist_ok=True)
    pose = [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 3], [0, 0, 0, 1]]
    for k in range(3):
        (folder / f"images/{k}.png").write_bytes(_saved("PNG"))
    said = {"w": "16", "h": "16", "fl_x": "20.0", "k1": "0.0", "matrix": json.dumps(pose)}
    said = {**said, **changes}
    frame = said.pop("frame", '{"file_path": "images/%d.png", "transform_matrix": %s}')
    frames = [frame % (k, said["matrix"]) if "%d" in frame else frame for k in range(3)]
    rest = "".join(f', "{key}": {value}' for key, value in said.items() if key != "matrix")
    return f'{{"frames": [{", ".join(frames)}]{rest}}}'


def _gltf(**changes: Any) -> dict[str, Any]:
    """A sound triangle, with parts of the JSON exchanged."""
    data = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0]], "<f4").tobytes()
    uri = "data:application/octet-stream;base64," + base64.b64encode(data).decode()
    return {
        "asset": {"version": "2.0"},
        "scenes": [{"nodes": [0]}],
        "nodes": [{"mesh": 0}],
        "meshes": [{"primitives": [{"attributes": {"POSITION": 0}}]}],
        "accessors": [{"bufferView": 0, "count": 3, "type": "VEC3", "componentType": 5126}],
        "bufferViews": [{"buffer": 0, "byteLength": 36}],
        "buffers": [{"byteLength": 36, "uri": uri}],
        **changes,
    }


def _written(path: Path, data: bytes | str, reader: str = "validate") -> Case:
    path.write_bytes(data if isinstance(data, bytes) else data.encode("utf-8", "surrogateescape"))
    return reader, path


# ---- containers


@kind
def zip_bomb(folder: Path, rng: random.Random) -> Case:
    path = folder / rng.choice(("a.zip", "a.sh3f"))
    how = rng.choice((zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA))
    name = rng.choice(("a.glb", "a.obj", "manifest.json", "PluginFurnitureCatalog.properties"))
    with zipfile.ZipFile(path, "w", how) as archive:
        if name[-3:] not in ("glb", "obj"):
            archive.writestr("a.glb", b"glTF")
        with archive.open(name, "w", force_zip64=True) as file:
            for _ in range(rng.choice((300, 600))):
                file.write(bytes(MB))
    return "validate", path


@kind
def zip_lying_size(folder: Path, rng: random.Random) -> Case:
    reader, path = zip_bomb(folder, rng)
    data, claim = bytearray(path.read_bytes()), struct.pack("<I", rng.choice((0, 1000, 2**32 - 2)))
    at = data.rfind(b"PK\x01\x02")
    data[at + 24 : at + 28] = claim
    if rng.random() < 0.5:
        data[22:26] = claim
    return _written(path, bytes(data), reader)


@kind
def zip_directory(folder: Path, rng: random.Random) -> Case:
    """Many members, or the same bytes under many names, or names that are none."""
    path = folder / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for k in range(rng.choice((10, 20_000))):
            info = zipfile.ZipInfo(f"{'../' * (k % 5)}{k}\n<b>{rng.randrange(9)}.txt")
            archive.writestr(info, b"")
        archive.writestr("a.gltf", json.dumps(_gltf(buffers=[{"byteLength": 36, "uri": "../x"}])))
    if rng.random() < 0.5:
        data = bytearray(path.read_bytes())
        data[-12:-8] = rng.randbytes(4)  # the size of the directory
        path.write_bytes(data)
    return "validate", path


@kind
def gzip_bomb(folder: Path, rng: random.Random) -> Case:
    path = folder / "frame_annotations.jgz"
    unit = rng.choice((b" ", b"[],", b"{},", b'{"a":1},', b"[[", b'"\xf0\x9f\x98\x80",'))
    size = rng.choice((100 * MB, 250 * MB, 900 * MB))
    tail = gzip.compress(b"0]") if unit[-1:] == b"," else b""  # and whole JSON, if it is read
    path.write_bytes(gzip.compress(b"[") + _gzipped(size, unit) + tail)
    return "validate", folder


@kind
def splats_bomb(folder: Path, rng: random.Random) -> Case:
    """SPZ that unpacks into much, or claims to hold it."""
    count = rng.choice((900_000, 5_000_000, 60_000_000, 2**32 - 1))
    head = struct.pack(
        "<4sIIBBBB", b"NGSP", rng.choice((2, 3, 4)), count, rng.choice((0, 3)), 12, 0, 0
    )
    return _written(folder / "a.spz", _gzipped(rng.choice((MB, 900 * MB)), head=head), "splats")


@kind
def ply_sizes(folder: Path, rng: random.Random) -> Case:
    form = rng.choice(("ascii", "binary_little_endian", "binary_big_endian"))
    count = rng.choice((2**31, 2**63, -5, 10_000_000, 10**30))
    lines = ["ply", f"format {form} 1.0", f"element vertex {count}"]
    shape = rng.choice(
        ("property float x", "property list uchar int a", "", "property list int double b")
    )
    lines += [shape] * rng.choice((1, 1, 50_000))
    body = bytes(rng.choice((0, 100, 40 * MB)))
    return _written(
        folder / "a.ply", "\n".join(lines).encode() + b"\nend_header\n" + body, "splats"
    )


# ---- pictures


@kind
def picture_pixels(folder: Path, rng: random.Random) -> Case:
    """More pixels than are read, whole or only claimed."""
    side = rng.choice((8_000, 13_000, 20_000, 40_000))
    how = rng.choice(("PNG", "PNG1", "PNGRGBA", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "AVIF"))
    if how.startswith("PNG"):
        depth, colour = (1, 0) if how == "PNG1" else (8, 6 if how == "PNGRGBA" else 0)
        return _written(
            folder / "a.png", _png(side, min(side, 13_000), b"", depth, colour), "views"
        )
    data = bytearray(_saved(how))
    places = {
        "JPEG": (data.find(b"\xff\xc0") + 5, ">HH"),
        "TIFF": (0, ""),
        "BMP": (18, "<ii"),
        "GIF": (6, "<HH"),
        "WEBP": (data.find(b"\x9d\x01\x2a") + 3, "<HH"),
        "AVIF": (data.find(b"ispe") + 8, ">II"),
    }
    at, form = places[how]
    if how == "TIFF":  # width and height are tags 256 and 257
        for tag in (256, 257):
            entry = data.find(struct.pack("<HH", tag, 4))
            entry = entry if entry >= 0 else data.find(struct.pack("<HH", tag, 3))
            data[entry + 2 : entry + 12] = struct.pack("<HII", 4, 1, side)
    else:
        two = struct.pack(form, *(min(side, 16_000) if how == "WEBP" else side,) * 2)
        data[at : at + len(two)] = two
    return _written(folder / f"a.{how.lower()}", bytes(data), "views")


@kind
def picture_chunks(folder: Path, rng: random.Random) -> Case:
    """Profiles and texts that unpack into much; the picture itself is of one colour."""
    packed = _zeros(zlib.compressobj(9), rng.choice((70, 400)) * MB)
    name, head = rng.choice(
        ((b"iCCP", b"a\0\0"), (b"zTXt", b"a\0\0"), (b"iTXt", b"a\0\1\0\0\0"), (b"eXIf", b"MM"))
    )
    many = rng.choice((1, 40))
    return _written(folder / "a.png", _png(32, 32, _chunk(name, head + packed) * many), "views")


@kind
def picture_scans(folder: Path, rng: random.Random) -> Case:
    """A progressive JPEG whose last scan comes again and again."""
    data = _saved("JPEG", (rng.choice((4_000, 7_000)),) * 2, progressive=True)
    last = data[data.rfind(b"\xff\xda") : -2]
    return _written(
        folder / "a.jpg", data[:-2] + last * rng.choice((300, 3_000)) + data[-2:], "views"
    )


@kind
def picture_other_formats(folder: Path, rng: random.Random) -> Case:
    """Formats that Pillow would open by other programs, under a name that we read."""
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(x) run\nshowpage\n%%EOF\n"
    data = rng.choice(
        (eps, _saved("PDF"), _saved("PPM"), _saved("ICNS", (32, 32)), b"", b"\0" * 99)
    )
    return _written(folder / f"a.{rng.choice(('png', 'jpg', 'tif', 'webp'))}", data, "views")


@kind
def texture(folder: Path, rng: random.Random) -> Case:
    """The same as a mesh's texture."""
    made = rng.choice((picture_pixels, picture_other_formats, picture_scans))
    _, picture = made(folder, rng)
    if rng.random() < 0.5:
        uri = picture.name
    else:
        uri = "data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode()
    accessors = [*_gltf()["accessors"], {**_gltf()["accessors"][0], "type": "VEC2"}]
    primitive = {"attributes": {"POSITION": 0, "TEXCOORD_0": 1}, "material": 0}
    materials = [{"pbrMetallicRoughness": {"baseColorTexture": {"index": 0}}}]
    more = {"accessors": accessors, "materials": materials, "meshes": [{"primitives": [primitive]}]}
    said = _gltf(**more, textures=[{"source": 0}], images=[{"uri": uri}])
    return _written(folder / "a.gltf", json.dumps(said))


# ---- meshes


@kind
def gltf_sizes(folder: Path, rng: random.Random) -> Case:
    """Accessors, views and buffers of any size."""
    large = rng.choice((15_000_000, 2**31, 2**63, -1, 10**30, 1.5, "9"))
    said = _gltf()
    part = rng.choice((said["accessors"], said["bufferViews"], said["buffers"]))[0]
    key = rng.choice(("count", "byteOffset", "byteStride", "byteLength"))
    part[key] = large
    if rng.random() < 0.5:
        said["accessors"][0] |= {"type": "MAT4", "count": 15_000_000}
        del said["accessors"][0]["bufferView"]
        said["meshes"][0]["primitives"][0]["attributes"]["TEXCOORD_0"] = 0
    else:
        said["accessors"][0]["count"] = large
    return _written(folder / "a.gltf", json.dumps(said))


@kind
def gltf_repeated(folder: Path, rng: random.Random) -> Case:
    """Little that is drawn often: nodes, primitives, instances, skins of large accessors."""
    count = rng.choice((2_000_000, 14_000_000))
    large = {"count": count, "type": "VEC3", "componentType": 5126}
    small = {"count": 3, "type": "SCALAR", "componentType": 5121}
    attributes = {"POSITION": 0, "NORMAL": 0, "COLOR_0": 0, "JOINTS_0": 2, "WEIGHTS_0": 2}
    primitives = [{"attributes": attributes, "indices": 1}] * rng.choice((1, 1_000, 100_000))
    nodes = [{"mesh": 0, **rng.choice(({}, {"skin": 0}))}] * rng.choice((1, 1_000, 90_000))
    if rng.random() < 0.5:
        instanced = {"EXT_mesh_gpu_instancing": {"attributes": {"TRANSLATION": 0}}}
        nodes = [{**node, "extensions": instanced} for node in nodes]
    said = _gltf(accessors=[large, small, {**small, "type": "VEC4"}], nodes=nodes)
    said |= {"meshes": [{"primitives": primitives}], "skins": [{"joints": [0]}]}
    said["scenes"] = [{"nodes": [*range(len(nodes))]}]
    return _written(folder / "a.gltf", json.dumps(said))


@kind
def gltf_graph(folder: Path, rng: random.Random) -> Case:
    """Nodes in circles, in chains without an end, or with two parents; too many; none."""
    many = rng.choice((1_000, 99_000, 200_000))
    chain = [{"children": [k + 1]} for k in range(many)]
    nodes = rng.choice(
        (
            [*chain, {"children": [0], "mesh": 0}],
            [*chain, {"translation": [0, 0, float("inf")], "mesh": 0}],
            [{"children": [0]}],
            [{"children": [1, 1], "mesh": 0}, {"mesh": 0}],
            [{"children": [-1], "mesh": 7}],
            [{"matrix": [1e300] * 16, "mesh": 0}],
        )
    )
    return _written(folder / "a.gltf", json.dumps(_gltf(nodes=nodes)))


@kind
def glb_chunks(folder: Path, rng: random.Random) -> Case:
    text = rng.choice((_deep(rng), json.dumps(_gltf())[:-9], "{}", '{"asset":{"version":"1"}}'))
    length = rng.choice((0, 12, 2**32 - 1, 28 + len(text)))
    head = struct.pack(
        "<4sIIII",
        b"glTF",
        rng.choice((1, 2)),
        length,
        rng.choice((len(text), 2**32 - 1)),
        0x4E4F534A,
    )
    return _written(folder / "a.glb", head + text.encode())


@kind
def obj_text(folder: Path, rng: random.Random) -> Case:
    """Faces without end, polygons that wind, numbers that are none, materials that name each other."""
    n = rng.choice((30_000, 300_000))
    ring = "\n".join(f"v {k % 7} {k * 7919 % 1000} 0" for k in range(n))
    text = rng.choice(
        (
            f"{ring}\nf {' '.join(str(k + 1) for k in range(n))}",
            "v 0 0 0\nf " + "1 " * 25_000_000,
            "v 1e999 0 0\nv 0 1 0\nv 0 0 1\nf 1 2 3",
            "v 0 0 0\nv 0 1 0\nv 0 0 1\n" + "f 1 2 3\n" * 6_000_000,
            "v " + "0 " * 2_000_000 + "\nf 1 1 " + "9" * 5_000,
            "mtllib " + "a.mtl " * 200_000 + "\nusemtl b\nf 1 2 3",
            "v 0 0 0\nf 1//99999999999999999999 1 1",
        )
    )
    _written(folder / "a.mtl", "newmtl b\nmap_Kd a.mtl\nmap_Ke /dev/zero\nmap_d a.obj\n" * 50)
    return _written(folder / "a.obj", text)


@kind
def lists(folder: Path, rng: random.Random) -> Case:
    """Manifests of objects."""
    names = ("../a.glb", "/etc/passwd.glb", "a\0.glb", "a" * 5_000 + ".glb", "\ud800.glb", "a.png")
    text = rng.choice(
        (
            json.dumps([{"file": rng.choice(names)}]),
            json.dumps([{"file": 3}] * 1_000_000),
            _deep(rng),
            "[" + "[]," * 20_000_000 + "0]",
            f'[{{"file": {_number(rng)}}}]',
        )
    )
    return _written(folder / "a.json", text)


# ---- captures and datasets


@kind
def transforms_text(folder: Path, rng: random.Random) -> Case:
    choices: tuple[Callable[[], str], ...] = (
        lambda: _deep(rng),
        lambda: _transforms(folder, **{rng.choice(("w", "fl_x", "k1")): _number(rng)}),
        lambda: _transforms(folder, matrix=f"[[{_number(rng)}, 0, 0, 0]]"),
        lambda: _transforms(folder, matrix="[" * 500 + "]" * 500),
        lambda: '{"frames": [' + "{}," * 8_000_000 + "{}]}",
        lambda: '{"frames": [' + "[]," * 40_000_000 + "0]}",
        lambda: '{"x": "\U0001f600' + "a" * (200 * MB) + '", "frames": []}',
        lambda: _transforms(folder, w="100000", h="100000", fl_x="1e11"),
    )
    _written(folder / "transforms.json", rng.choice(choices)())
    return "validate", folder


@kind
def transforms_names(folder: Path, rng: random.Random) -> Case:
    names = (
        "../0.png",
        "/etc/passwd",
        "a\\u0000b",
        "\\ud800.png",
        "x" * 4_000,
        "file:///a.png",
        "%2e%2e/a",
    )
    frame = '{"file_path": "%s", "transform_matrix": [[1,0,0,0],[0,1,0,0],[0,0,1,3]]}'
    _written(
        folder / "transforms.json",
        _transforms(folder, frame=frame.replace("%s", rng.choice(names))),
    )
    return "validate", folder


@kind
def colmap_sizes(folder: Path, rng: random.Random) -> Case:
    place = folder / "sparse/0"
    place.mkdir(parents=True)
    many = rng.choice((1, 2**31, 2**63, 1_000_000))
    which = rng.choice(("cameras", "images", "points", "names", "text"))
    real = 200_000 if many == 1_000_000 else 1
    camera = struct.pack("<IiQQ4d", 1, 1, 16, 16, 20, 20, 8, 8)
    pose = struct.pack("<I7dI", 1, 1, 0, 0, 0, 0, 0, 3, 1)
    points = {"points": many}.get(which, 0)
    image = pose + b"0.png\0" + struct.pack("<Q", points)
    if which == "names":
        image = (
            pose + rng.choice((b"../a.png", b"\xff\xfe.png", b"a" * 9_000, b"")) + b"\0" + bytes(8)
        )
    both = {"cameras": many, "images": many}
    for name, row in (("cameras", camera), ("images", image)):
        count = both[name] if which == name else 1
        body = struct.pack("<Q", count) + row * (real if which == name else 1)
        (place / f"{name}.bin").write_bytes(body)
    if which == "text":
        shutil.rmtree(place)
        place.mkdir()
        (place / "cameras.txt").write_text("1 PINHOLE 16 16 20 20 8 8\n" * real)
        row = f"1 1 0 0 0 0 0 3 1 {rng.choice(('../0.png', 'a' * 5_000, 'b.png'))}\n\n"
        (place / "images.txt").write_text(row * rng.choice((1, 500_000)))
    return "validate", folder


@kind
def depth_arrays(folder: Path, rng: random.Random) -> Case:
    """The original's layout, whose depth is .npy."""
    view = folder / "image_0000/view_000"
    view.mkdir(parents=True)
    for path in (view / "rgb.png", view.parent / "input.png"):
        path.write_bytes(_saved("PNG"))
    (view / "pose.json").write_text('{"R": [[1,0,0],[0,1,0],[0,0,1]], "t": [0,0,-3]}')
    shape = rng.choice(
        ("(1000000000, 1000000000)", "(16, 16)", f"({'1,' * 60})", "(-1, 16)", "[" * 900)
    )
    kinds = ("<f4", "|O", "<U500000000", "|V2000000000", "<c16", "|S1")
    said = f"{{'descr': '{rng.choice(kinds)}', 'fortran_order': False, 'shape': {shape}, }}"
    said += " " * rng.choice((0, 0, 50_000_000)) + "\n"
    version, form = (1, "<H") if len(said) < 60_000 else (2, "<I")
    head = b"\x93NUMPY" + bytes((version, 0)) + struct.pack(form, len(said)) + said.encode()
    (view / "depth.npy").write_bytes(head + b"cos\nsystem\n(S'false'\ntR." * rng.choice((1, 9)))
    return "original", folder


@kind
def not_files(folder: Path, rng: random.Random) -> Case:
    """Pipes, sockets, devices, links, folders and a terabyte of nothing where a file is read."""
    name, reader = rng.choice(
        (
            *(
                ("a.png", "views"),
                ("a.glb", "validate"),
                ("a.obj", "validate"),
                ("a.zip", "validate"),
            ),
            *(
                ("a.json", "validate"),
                ("transforms.json", "validate"),
                ("images/1.png", "validate"),
            ),
            *(("frame_annotations.jgz", "validate"), ("a.ply", "splats"), ("a.spz", "splats")),
            *(("a.safetensors", "weights"), ("a.safetensors", "checkpoint")),
            ("results.json", "index"),
        )
    )
    path = folder / name
    if name.startswith("images"):
        _written(folder / "transforms.json", _transforms(folder))
        path.unlink()
    which = _odd_file(path, rng)
    if reader == "index" and which in ("fifo", "socket", "device", "folder", "loop", "gone"):
        reader = "index"
    return reader, folder if "/" in name or name[:2] in ("tr", "fr", "re") else path


@kind
def folders(folder: Path, rng: random.Random) -> Case:
    """Nothing but folders: deep, many, in circles, or of strange names."""
    which = rng.choice(("deep", "many", "circle", "names"))
    at = folder / "set"
    at.mkdir()
    if which == "deep":
        here = os.getcwd()
        os.chdir(at)
        for _ in range(1_500):
            os.mkdir("d")
            os.chdir("d")
        os.chdir(here)
    elif which == "many":
        for k in range(5_000):
            (at / f"image_{k:04d}").mkdir()
    elif which == "circle":
        for name in ("a", "b"):
            (at / name).mkdir()
            (at / name / "up").symlink_to(at, target_is_directory=True)
            (at / name / "loop").symlink_to("loop")
    else:
        for name in (b"\xff\xfe", b"a\nb", b"%2e%2e", b"a?b#c", b"<script>", b"javascript:"):
            os.mkdir(os.path.join(os.fsencode(at), name))
    return "validate", at


# ---- weights and records


@kind
def weights_header(folder: Path, rng: random.Random) -> Case:
    config = rng.choice(
        (
            {"channels": 10**6},
            {"channels": 2048, "blocks_per_level": 16},
            {"image_size": -1},
            {"x": 1},
            [],
        )
    )
    header = {"kind": rng.choice(("cvs", "decoder")), "config": config, "format": 1, "facts": {}}
    said = rng.choice((json.dumps(header), _deep(rng), _number(rng), "{}"))
    end = rng.choice(([0, 4], [0, 2**40], [4, 0], [0, 2**63]))
    shape = rng.choice(([1], [2**40], [2**32, 2**32], [-1]))
    text = json.dumps(
        {
            "__metadata__": {"fresnel": said, "fresnel_decoder": said},
            "a": {"dtype": "F32", "shape": shape, "data_offsets": end},
        }
    ).encode()
    text = rng.choice((text, text, _deep(rng).encode(), text + b" " * (90 * MB)))
    length = rng.choice((len(text), len(text), 2**40, 2**64 - 1, 0))
    data = struct.pack("<Q", length) + text + bytes(4)
    return _written(folder / "a.safetensors", data, rng.choice(("weights", "checkpoint")))


@kind
def weights_config(folder: Path, rng: random.Random) -> Case:
    """Shipped weights whose header asks for a network of another size."""
    found = CVS if rng.random() < 0.5 else Decoder
    source = Path(cli.__file__).parent / "assets"
    from safetensors import safe_open
    from safetensors.torch import save_file

    path = next(p for p in sorted(source.glob("*.safetensors")) if found.kind in p.name)
    with safe_open(str(path), "pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    said = json.loads(metadata["fresnel"])
    numbers = [k for k, v in said["config"].items() if isinstance(v, int | list) and v is not True]
    key = rng.choice(numbers)
    large = rng.choice((2048, 10**6, 10**12, -3))
    said["config"][key] = [large] * 4 if isinstance(said["config"][key], list) else large
    save_file(tensors, str(folder / "a.safetensors"), {"fresnel": json.dumps(said)})
    return "weights", folder / "a.safetensors"


@kind
def results(folder: Path, rng: random.Random) -> Case:
    text = rng.choice(
        (_deep(rng), f'{{"metrics": {_number(rng)}}}', "[]", "[" + "[]," * 9_000_000 + "0]")
    )
    _written(folder / "results.json", text)
    return "index", folder


# ---- running them


def _child(work: Callable[[], Any], limit_s: int) -> tuple[Any, int, float]:
    """What `work` returns in a child process, its largest memory in bytes, and seconds of CPU."""
    reading, writing = os.pipe()
    end = time.monotonic() + 10 * limit_s  # if it waits for something
    child = os.fork()
    if not child:
        os.close(reading)
        resource.setrlimit(resource.RLIMIT_AS, (16 << 30, 16 << 30))
        resource.setrlimit(resource.RLIMIT_CPU, (limit_s, limit_s))
        try:
            said = work()
        except BaseException:
            said = ["broke", traceback.format_exc()[-3_000:]]
        with contextlib.suppress(BaseException):
            os.write(writing, json.dumps(said).encode()[:60_000])
        os._exit(0)
    os.close(writing)
    while True:
        done, status, used = os.wait4(child, os.WNOHANG)
        if done:
            break
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
            _, status, used = os.wait4(child, 0)
            break
        time.sleep(0.005)
    seconds = used.ru_utime + used.ru_stime  # of this process, however busy the machine is
    with os.fdopen(reading, "rb") as stream:
        data = stream.read()
    try:
        said = json.loads(data)
    except ValueError:
        said = ["broke", f"ended by signal {os.WTERMSIG(status)}" if status else "said nothing"]
    return said, used.ru_maxrss * 1024, seconds


def _read(reader: str, path: Path) -> list[str]:
    warnings.simplefilter("ignore")
    try:
        READERS[reader](path)
    except (ValueError, OSError) as error:
        return ["refused" if str(error).strip() else "broke", f"{type(error).__name__}: {error}"]
    except AssertionError as error:
        return ["broke", str(error)]
    return ["answered", ""]


def cases(count: int, seed: int, names: list[str]) -> Iterator[tuple[str, list[str], int, float]]:
    """Of each case: its kind, [outcome, what was said], bytes of memory, seconds."""
    chosen = names or list(KINDS)
    for number in range(count):
        name = chosen[number % len(chosen)]
        with tempfile.TemporaryDirectory(prefix="hostile-") as place:
            folder = Path(place) / "in"
            folder.mkdir()
            os.environ["XDG_CACHE_HOME"] = f"{place}/cache"

            def make(folder: Path = folder, name: str = name, number: int = number) -> list[str]:
                reader, path = KINDS[name](folder, random.Random(f"{seed} {name} {number}"))
                return [reader, os.fsdecode(path)]

            (reader, path), _, _ = _child(make, 120)
            if reader == "broke":
                raise RuntimeError(f"{name}: {path}")
            said, memory, seconds = _child(lambda: _read(reader, Path(path)), 30)  # noqa: B023
            subprocess.run(["rm", "-rf", folder], check=False)  # deeper than Python removes
        yield name, said, memory, seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("kinds", nargs="*", help=f"of {', '.join(KINDS)}")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    table, worst = Counter[tuple[str, str]](), dict[str, tuple[int, float]]()
    for name, (outcome, text), memory, seconds in cases(
        arguments.count, arguments.seed, arguments.kinds
    ):
        over = memory > MOST_BYTES or seconds > MOST_S
        table[name, "tried"] += 1
        table[name, "over bounds" if over else outcome] += 1
        most = worst.get(name, (0, 0.0))
        worst[name] = max(most[0], memory), max(most[1], seconds)
        if over or outcome != "refused":
            print(
                f"{name}: {outcome}, {memory >> 20} MB, {seconds:.1f} s\n{text[-1500:]}\n",
                flush=True,
            )
    columns = ("tried", "refused", "answered", "over bounds", "broke")
    print(f"| kind | {' | '.join(columns)} | MB | s |\n|---|{'---|' * 7}")
    for name in dict.fromkeys(name for name, _ in table):
        row = " | ".join(str(table[name, column]) for column in columns)
        print(
            f"| {name.replace('_', ' ')} | {row} | {worst[name][0] >> 20} | {worst[name][1]:.1f} |"
        )
    whole = [sum(n for (_, column), n in table.items() if column == each) for each in columns]
    print(f"| all | {' | '.join(map(str, whole))} | | |")
    return int(whole[0] != whole[1])


if __name__ == "__main__":
    sys.exit(main())
