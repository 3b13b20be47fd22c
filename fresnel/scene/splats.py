"""Files of 3D Gaussians as they are found: PLY of 3DGS and its kin, SuperSplat's compressed PLY.

A PLY file is read by the elements and properties that it declares, whatever else it holds: text or
binary of either byte order, every scalar type, lists.  What is stored is handed on as stored.
"""

import math
import tempfile
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
SH_C0 = 0.28209479177387814
"""The harmonic of degree 0: a colour is 0.5 + SH_C0 x its coefficient."""
_KINDS = ("i1", "u1", "i2", "u2", "i4", "u4", "f4", "f8")
_IN_C = ("char", "uchar", "short", "ushort", "int", "uint", "float", "double")
_SCALARS = {str(np.dtype(kind)): kind for kind in _KINDS} | dict(zip(_IN_C, _KINDS, strict=True))
_ORDERS = {"ascii": "", "binary_little_endian": "<", "binary_big_endian": ">"}
_LIST_ROWS = 1_000_000  # some three seconds
_HEADER_BYTES = 1 << 20


class Splats(NamedTuple):
    """N Gaussians as files keep them: scales as logarithms, opacities as logits, colours as
    harmonics (N, 3) and (N, K, 3), quaternions (N, 4) wxyz of any length."""

    means: Floats
    scales: Floats
    quats: Floats
    opacities: Floats
    sh0: Floats
    shN: Floats


def read_ply(data: bytes) -> Splats:
    """The Gaussians of a PLY file's bytes.

    Raises:
        ValueError: if it is damaged, or holds no Gaussians; the message names what is missing.
    """
    elements = ply_elements(data)
    vertex = elements.get("vertex", {})
    if "packed_position" in vertex:
        try:
            return _unpacked(elements)
        except KeyError as error:
            raise ValueError(f"no compressed Gaussians: it has no {error.args[0]}") from None
    wanted = ["x", "y", "z", "opacity", *(f"scale_{k}" for k in range(3))]
    wanted += [f"rot_{k}" for k in range(4)]
    plain = [name for name in ("red", "green", "blue") if name in vertex]  # instead of harmonics
    wanted += [f"f_dc_{k}" for k in range(3)] if len(plain) < 3 else []
    missing = [name for name in wanted if name not in vertex]
    if missing:
        raise ValueError(f"no Gaussians: its vertices have no {', '.join(missing)}")

    def columns(*names: str) -> Floats:
        return np.stack([vertex[name].astype(np.float32) for name in names], axis=-1)

    if "f_dc_0" in vertex:
        sh0 = columns("f_dc_0", "f_dc_1", "f_dc_2")
    else:
        whole = vertex["red"].dtype.kind == "u" or vertex["red"].max(initial=0) > 1
        sh0 = (columns(*plain) / np.float32(255 if whole else 1) - np.float32(0.5)) / SH_C0
    return Splats(
        columns("x", "y", "z"),
        columns("scale_0", "scale_1", "scale_2"),
        columns("rot_0", "rot_1", "rot_2", "rot_3"),
        vertex["opacity"].astype(np.float32),
        sh0,
        _harmonics(vertex, len(vertex["x"])),
    )


def read_spz(data: bytes) -> Splats:
    """The Gaussians of an SPZ file's bytes, of any version (read by gsply).

    Raises:
        ValueError: if it is damaged.
    """
    import gsply

    with tempfile.NamedTemporaryFile(suffix=".spz") as file:
        file.write(data)
        file.flush()
        try:
            found = gsply.read_spz(file.name)
        except Exception as error:
            raise ValueError(str(error).replace(file.name, "it")) from error
    count = len(found.means)
    none = np.zeros((count, 0, 3), np.float32)
    return Splats(
        found.means,
        found.scales,
        found.quats,
        found.opacities.reshape(-1),
        found.sh0,
        none if found.shN is None else found.shN.reshape(count, -1, 3),
    )


def ply_elements(data: bytes) -> dict[str, dict[str, NDArray[np.generic]]]:
    """Element -> property -> its values, one a row; lists are passed over.

    Raises:
        ValueError: if the header is damaged, or the file ends early.
    """
    end = data.find(b"end_header", 0, _HEADER_BYTES)
    newline = data.find(b"\n", end)
    if not data.startswith(b"ply") or end < 0 or newline < 0:
        raise ValueError("not a PLY file: its header is missing or damaged")
    order, elements = None, list[tuple[str, int, list[list[str]]]]()
    for line in data[:end].decode("ascii", "replace").splitlines():
        words = line.split()
        try:
            if words[:1] == ["format"]:
                order = _ORDERS[words[1]]
            elif words[:1] == ["element"]:
                elements.append((words[1], int(words[2]), []))
            elif words[:1] == ["property"]:
                kinds = words[2:4] if words[1] == "list" else words[1:2]
                elements[-1][2].append([words[-1], *(_SCALARS[kind] for kind in kinds)])
        except (LookupError, ValueError):
            raise ValueError(f"its header's line {line!r} can't be read") from None
    if order is None:
        raise ValueError("its header states no format")
    if order == "":
        return _text(data[newline + 1 :], elements)
    return _binary(data, newline + 1, order, elements)


def _text(data: bytes, elements: list[tuple[str, int, list[list[str]]]]) -> dict:
    lines, at, found = data.split(b"\n"), 0, {}
    for name, count, properties in elements:
        rows = lines[at : at + count]
        at += count
        if len(rows) < count or (rows and not rows[-1].strip()):
            raise ValueError(f"it ends within its {count} rows of {name!r}: it is cut off")
        if any(len(kinds) > 2 for kinds in properties):
            continue
        try:
            table = np.array([row.split() for row in rows], np.float64).reshape(count, -1)
        except ValueError:
            raise ValueError(f"a row of {name!r} has a word or misses a number") from None
        if table.shape[1] != len(properties) and count:
            raise ValueError(
                f"rows of {name!r} have {table.shape[1]} numbers, not {len(properties)}"
            )
        found[name] = {p[0]: table[:, k] for k, p in enumerate(properties)} if count else {}
    return found


def _binary(
    data: bytes, at: int, order: str, elements: list[tuple[str, int, list[list[str]]]]
) -> dict:
    found = {}
    for name, count, properties in elements:
        cut = ValueError(f"it ends within its {count} rows of {name!r}: it is cut off")
        if not 0 <= count <= len(data):
            raise cut
        if any(len(kinds) > 2 for kinds in properties):
            if count > _LIST_ROWS:
                raise ValueError(f"{count} rows of {name!r} hold lists; at most {_LIST_ROWS:,} may")
            for _ in range(count):  # rows of different lengths: each is measured
                for _, first, *rest in properties:
                    if rest:
                        size = np.dtype(first).itemsize
                        if at + size > len(data):
                            raise cut
                        items = int(np.frombuffer(data, order + first, 1, at)[0])
                        at += size + items * np.dtype(rest[0]).itemsize
                    else:
                        at += np.dtype(first).itemsize
            continue
        row = np.dtype([(p[0], order + p[1]) for p in properties])
        if at + count * row.itemsize > len(data):
            raise cut
        table = np.frombuffer(data, row, count, at) if count else np.zeros(0, row)
        found[name] = {p[0]: table[p[0]] for p in properties}
        at += count * row.itemsize
    return found


def _harmonics(vertex: Mapping[str, NDArray[np.generic]], count: int) -> Floats:
    """Coefficients (N, K, 3) beyond degree 0; the file has one channel after the other."""
    names = [name for name in vertex if name.startswith("f_rest_")]
    if len(names) not in (0, 9, 24, 45):
        raise ValueError(f"{len(names)} harmonics f_rest_*; want 0, 9, 24 or 45: degrees 0 to 3")
    if not names:
        return np.zeros((count, 0, 3), np.float32)
    try:
        flat = [vertex[f"f_rest_{k}"].astype(np.float32) for k in range(len(names))]
    except KeyError as error:
        raise ValueError(f"no {error.args[0]} among its harmonics") from None
    return np.stack(flat, axis=-1).reshape(count, 3, -1).transpose(0, 2, 1)


def _unpacked(elements: Mapping[str, Mapping[str, NDArray[np.generic]]]) -> Splats:
    """SuperSplat's compressed Gaussians: 256 to a chunk, whose bounds their bits divide
    (playcanvas/engine, gsplat-compressed-data)."""
    chunk, vertex = elements.get("chunk", {}), elements["vertex"]
    count = len(vertex["packed_position"])
    of = np.arange(count) // 256
    if count and of[-1] >= len(chunk["min_x"]):
        raise ValueError(f"{count} Gaussians in {len(chunk['min_x'])} chunks of 256: it is cut off")

    def bits(name: str, *places: tuple[int, int]) -> NDArray[np.float64]:
        """Fields (shift, width) of packed integers, each in [0, 1]."""
        packed = vertex[name].astype(np.uint32)
        parts = [
            (packed >> shift & (1 << width) - 1) / ((1 << width) - 1) for shift, width in places
        ]
        return np.stack(parts, axis=-1)

    def between(name: str, share: NDArray[np.float64], axes: str) -> NDArray[np.float64]:
        low, high = (
            np.stack([chunk[f"{end}_{name}{axis}"][of] for axis in axes], -1).astype(np.float64)
            for end in ("min", "max")
        )
        return low + share * (high - low)

    fields = ((21, 11), (11, 10), (0, 11))
    means = between("", bits("packed_position", *fields), "xyz")
    scales = bits("packed_scale", *fields)
    if "min_scale_x" in chunk:
        scales = between("scale_", scales, "xyz")
    color = bits("packed_color", (24, 8), (16, 8), (8, 8), (0, 8))
    rgb = between("", color[:, :3], "rgb") if "min_r" in chunk else color[:, :3]
    alpha = color[:, 3].clip(1e-7, 1 - 1e-7)
    small = (bits("packed_rotation", (20, 10), (10, 10), (0, 10)) - 0.5) * math.sqrt(2)
    largest = vertex["packed_rotation"].astype(np.uint32) >> 30
    rest = np.sqrt((1 - (small**2).sum(axis=1)).clip(0))
    quats = np.zeros((count, 4))
    for place in range(4):
        rows = largest == place
        quats[rows] = np.insert(small[rows], place, rest[rows], axis=1)
    names = {k: (v.astype(np.float64) + 0.5) / 256 for k, v in elements.get("sh", {}).items()}
    sh = {k: ((v - 0.5) * 8).astype(np.float32) for k, v in names.items()}
    return Splats(
        means.astype(np.float32),
        scales.astype(np.float32),
        quats.astype(np.float32),
        np.log(alpha / (1 - alpha)).astype(np.float32),
        ((rgb - 0.5) / SH_C0).astype(np.float32),
        _harmonics(sh, count),
    )
