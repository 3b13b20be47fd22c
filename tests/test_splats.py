"""Files of Gaussians in every spelling give the same values, or are refused by what they miss."""

import gsply
import numpy as np
import pytest
import torch

from fresnel.scene.gaussians import Gaussians

COUNT = 300  # more than one of SuperSplat's chunks
TYPES = {"f4": "float", "f8": "double", "u1": "uchar", "i4": "int", "u4": "uint", "i2": "short"}


def stored(degree: int = 0) -> dict[str, np.ndarray]:
    """Columns as 3DGS names them."""
    rng = np.random.default_rng(3)
    names = ["x", "y", "z", "nx", "ny", "nz", *(f"f_dc_{k}" for k in range(3))]
    names += [f"f_rest_{k}" for k in range(3 * ((degree + 1) ** 2 - 1))]
    names += ["opacity", *(f"scale_{k}" for k in range(3)), *(f"rot_{k}" for k in range(4))]
    return {name: rng.normal(size=COUNT).astype(np.float32) for name in names}


def header(form: str, elements: list[tuple[str, int, list[str]]]) -> bytes:
    lines = ["ply", f"format {form} 1.0", "comment made by a test"]
    for name, count, properties in elements:
        lines += [f"element {name} {count}", *(f"property {one}" for one in properties)]
    return ("\n".join([*lines, "end_header"]) + "\n").encode()


def ply(columns: dict[str, np.ndarray], form="binary_little_endian", names=TYPES) -> bytes:
    said = [f"{names[v.dtype.str[1:]]} {k}" for k, v in columns.items()]
    top = header(form, [("vertex", len(columns["x"]), said)])
    if form == "ascii":
        rows = zip(*(values.tolist() for values in columns.values()), strict=True)
        return top + "\n".join(" ".join(map(repr, row)) for row in rows).encode() + b"\n"
    return top + table(columns, "<" if "little" in form else ">")


def table(columns: dict[str, np.ndarray], order: str) -> bytes:
    rows = np.zeros(len(columns["x"]), [(k, order + v.dtype.str[1:]) for k, v in columns.items()])
    for name, values in columns.items():
        rows[name] = values
    return rows.tobytes()


def same(path, degree: int = 0) -> None:
    columns, found = stored(degree), Gaussians.load(path)
    pick = lambda *names: np.stack([columns[name] for name in names], axis=1)  # noqa: E731
    assert np.allclose(found.means, pick("x", "y", "z"), atol=1e-6)
    assert np.allclose(found.scales, np.exp(pick("scale_0", "scale_1", "scale_2")), rtol=1e-5)
    quats = pick("rot_0", "rot_1", "rot_2", "rot_3")
    quats /= np.linalg.norm(quats, axis=1, keepdims=True)
    assert np.allclose(found.quats, quats, atol=1e-6)
    assert np.allclose(found.opacities, 1 / (1 + np.exp(-columns["opacity"])), atol=1e-6)
    dc = pick("f_dc_0", "f_dc_1", "f_dc_2")
    if not degree:
        assert np.allclose(found.colors, np.maximum(0.5 + 0.28209479 * dc, 0), atol=1e-6)
        return
    assert np.allclose(found.colors[:, 0], dc, atol=1e-6)
    each = (degree + 1) ** 2 - 1  # one channel after the other
    for channel in range(3):
        wanted = pick(*(f"f_rest_{channel * each + k}" for k in range(each)))
        assert np.allclose(found.colors[:, 1:, channel], wanted, atol=1e-6)


def sized(names: dict[str, str]) -> dict[str, str]:
    return TYPES | names


def with_colors() -> dict[str, np.ndarray]:
    bytes_ = np.arange(COUNT, dtype=np.uint8)
    first, *rest = stored().items()
    return dict([first, ("red", bytes_), *rest, ("green", bytes_), ("flags", np.int32(bytes_))])


SPELLINGS = {
    "plain": lambda: ply(stored()),
    "ascii": lambda: ply(stored(), "ascii"),
    "big endian": lambda: ply(stored(), "binary_big_endian"),
    "float32": lambda: ply(stored(), names=sized({"f4": "float32"})),
    "doubles": lambda: ply({k: v.astype(np.float64) for k, v in stored().items()}),
    "extra properties": lambda: ply(with_colors()),
    "extra properties in ascii": lambda: ply(with_colors(), "ascii"),
    "another order": lambda: ply(dict(sorted(stored().items()))),
    "elements before and after": lambda: surrounded(),
}


@pytest.mark.parametrize("kind", [np.uint8, np.float32])
def test_plain_colours_instead_of_harmonics(kind, tmp_path):
    columns = {k: v for k, v in stored().items() if not k.startswith("f_dc")}
    rgb = np.arange(3 * COUNT).reshape(COUNT, 3) % 256
    shown = rgb.astype(kind) if kind is np.uint8 else (rgb / 255).astype(kind)
    columns |= {name: shown[:, k] for k, name in enumerate(("red", "green", "blue"))}
    (tmp_path / "scene.ply").write_bytes(ply(columns))
    found = Gaussians.load(tmp_path / "scene.ply")
    assert np.allclose(found.colors, rgb / 255, atol=1e-6)


def test_values_that_were_stored_as_used_are_said(tmp_path):
    columns = stored()
    columns |= {f"scale_{k}": np.exp(columns[f"scale_{k}"]) for k in range(3)}
    columns["opacity"] = 1 / (1 + np.exp(-columns["opacity"]))
    (tmp_path / "scene.ply").write_bytes(ply(columns))
    with pytest.warns(UserWarning, match="not as logarithms and logits"):
        Gaussians.load(tmp_path / "scene.ply")


def surrounded() -> bytes:
    """A list element first, whose rows differ in length, and scalars after."""
    columns = stored()
    said = [f"float {name}" for name in columns]
    elements = [
        ("face", 2, ["list uchar int vertex_indices", "uchar kind"]),
        ("vertex", COUNT, said),
        ("intrinsic", 9, ["float intrinsic"]),
    ]
    faces = (
        b"\3" + np.int32([0, 1, 2]).tobytes() + b"\1" + b"\2" + np.int32([5, 6]).tobytes() + b"\0"
    )
    return header("binary_little_endian", elements) + faces + table(columns, "<") + bytes(36)


@pytest.mark.parametrize("name", SPELLINGS)
def test_a_ply_is_read_by_what_it_declares(name, tmp_path):
    (tmp_path / "scene.PLY").write_bytes(SPELLINGS[name]())
    same(tmp_path / "scene.PLY")


@pytest.mark.parametrize("degree", [1, 2, 3])
def test_harmonics_are_kept(degree, tmp_path):
    (tmp_path / "scene.ply").write_bytes(ply(stored(degree)))
    same(tmp_path / "scene.ply", degree)


def packed(bounds: bool, degree: int) -> tuple[bytes, dict[str, np.ndarray]]:
    """SuperSplat's compressed file of `stored` values, packed here by its published layout."""
    columns = stored(degree)
    columns |= {k: v * np.float32(0.4) for k, v in columns.items() if k.startswith("f_")}
    of = np.arange(COUNT) // 256
    chunk: dict[str, np.ndarray] = {}

    def unit(values, name):
        low = np.array([values[of == k].min() for k in range(2)], np.float32)
        high = np.array([values[of == k].max() for k in range(2)], np.float32)
        chunk[f"min_{name}"], chunk[f"max_{name}"] = low, high
        return (values - low[of]) / (high - low)[of]

    def bits(parts, widths):
        word = np.zeros(COUNT, np.uint32)
        for part, width in zip(parts, widths, strict=True):
            value = np.round(np.clip(part, 0, 1) * (2**width - 1)).astype(np.uint32)
            word = (word << width) | value
        return word

    position = bits([unit(columns[a], a) for a in "xyz"], (11, 10, 11))
    scale = bits(
        [unit(columns[f"scale_{k}"], f"scale_{a}") for k, a in enumerate("xyz")], (11, 10, 11)
    )
    rgb = [0.5 + 0.28209479 * columns[f"f_dc_{k}"] for k in range(3)]
    rgb = [unit(c, a) for c, a in zip(rgb, "rgb", strict=True)] if bounds else rgb
    color = bits([*rgb, 1 / (1 + np.exp(-columns["opacity"]))], (8, 8, 8, 8))
    quats = np.stack([columns[f"rot_{k}"] for k in range(4)], axis=1)
    quats /= np.linalg.norm(quats, axis=1, keepdims=True)
    largest = np.abs(quats).argmax(axis=1)
    quats *= np.sign(quats[np.arange(COUNT), largest])[:, None]
    small = np.array([np.delete(q, k) for q, k in zip(quats, largest, strict=True)])
    turn = bits((small / np.sqrt(2) + 0.5).T, (10, 10, 10)) | (largest.astype(np.uint32) << 30)
    words = {"x": position, "packed_rotation": turn, "packed_scale": scale, "packed_color": color}
    names = {"x": "packed_position"}
    said = [
        ("chunk", 2, [f"float {name}" for name in chunk]),
        ("vertex", COUNT, [f"uint {names.get(name, name)}" for name in words]),
    ]
    rest = {k: v for k, v in columns.items() if k.startswith("f_rest_")}
    body = np.stack(list(chunk.values()), axis=1).astype("<f4").tobytes() + table(words, "<")
    if rest:
        said.append(("sh", COUNT, [f"uchar {name}" for name in rest]))
        values = np.stack(list(rest.values()), axis=1)
        body += np.trunc((values / 8 + 0.5) * 256).clip(0, 255).astype(np.uint8).tobytes()
    return header("binary_little_endian", said) + body, columns


@pytest.mark.parametrize(("bounds", "degree"), [(False, 0), (True, 0), (True, 2)])
def test_supersplats_compressed_file(bounds, degree, tmp_path):
    data, columns = packed(bounds, degree)
    (tmp_path / "scene.ply").write_bytes(data)
    (tmp_path / "plain.ply").write_bytes(ply(columns))
    found, wanted = Gaussians.load(tmp_path / "scene.ply"), Gaussians.load(tmp_path / "plain.ply")
    assert (found.means - wanted.means).abs().max() < 0.005
    assert (found.scales / wanted.scales - 1).abs().max() < 0.005
    assert ((found.quats * wanted.quats).sum(dim=-1).abs() - 1).abs().max() < 1e-4
    assert (found.opacities - wanted.opacities).abs().max() < 0.003
    if degree:
        assert (found.colors - wanted.colors).abs().max() < 0.02
    else:
        inside = (wanted.colors > 0) & (wanted.colors < 1)
        assert (found.colors - wanted.colors)[inside].abs().max() < 0.005


@pytest.mark.parametrize("version", [3, 4])
@pytest.mark.parametrize("suffix", [".spz", ".SPZ"])
def test_spz_of_any_case_and_version(suffix, version, tmp_path):
    gaussians = Gaussians.load(_written(tmp_path / "scene.ply", ply(stored(1))))
    columns = stored(1)
    data = gsply.plyread(tmp_path / "scene.ply")
    gsply.write_spz(tmp_path / "scene.spz", data, version=version)
    path = (tmp_path / "scene.spz").rename(tmp_path / f"again{suffix}")
    found = Gaussians.load(path)
    assert found.num == len(columns["x"]) and found.sh_degree == 1
    assert (found.means - gaussians.means).abs().max() < 1e-3
    assert (found.opacities - gaussians.opacities).abs().max() < 0.01


def _written(path, data: bytes):
    path.write_bytes(data)
    return path


def test_gaussians_that_are_not_finite_are_left_out_and_counted(tmp_path):
    columns = stored()
    columns["y"][7], columns["scale_1"][9], columns["opacity"][11] = np.nan, np.inf, -np.inf
    for name in ("rot_0", "rot_1", "rot_2", "rot_3"):
        columns[name][20] = 0
    (tmp_path / "scene.ply").write_bytes(ply(columns))
    with pytest.warns(UserWarning, match=rf"4 of {COUNT} Gaussians \(number 7, for one\)"):
        found = Gaussians.load(tmp_path / "scene.ply")
    kept = np.delete(np.arange(COUNT), [7, 9, 11, 20])
    assert np.array_equal(found.means[:, 0], columns["x"][kept])
    assert torch.isfinite(found.scales).all()


LISTS = b"""ply
format binary_big_endian 1.0
element vertex 2000000
property list uchar double b
end_header
""" + bytes(2_000_000)


def without(name: str) -> bytes:
    return ply({k: v for k, v in stored().items() if k != name})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"hello", "not a PLY file"),
        (b"", "not a PLY file"),
        (without("scale_1"), "its vertices have no scale_1"),
        (without("f_dc_0"), "no f_dc_0"),
        (ply(stored() | {"f_rest_0": np.zeros(COUNT, np.float32)}), "1 harmonics"),
        (ply(stored())[:-4], "ends within its 300 rows of 'vertex'"),
        (ply(stored(), "ascii")[:-400], "cut off|misses a number|numbers, not"),
        (ply(stored()).replace(b"float x", b"thing x"), "line 'property thing x'"),
        (LISTS, "2000000 rows of 'vertex' hold lists"),
        (packed(True, 0)[0].replace(b"min_scale_y", b"min_scale_q"), "no min_scale_y"),
        (packed(True, 0)[0].replace(b"element chunk 2", b"element chunk 1"), "cut off|chunks"),
    ],
)
def test_what_is_no_splat_file_is_named(data, message, tmp_path):
    (tmp_path / "scene.ply").write_bytes(data)
    with pytest.raises(ValueError, match=rf"scene\.ply: .*({message})"):
        Gaussians.load(tmp_path / "scene.ply")


def test_a_damaged_spz_is_named(tmp_path):
    (tmp_path / "scene.spz").write_bytes(b"NGSP" + bytes(20))
    with pytest.raises(ValueError, match=r"scene\.spz: not a readable splat file"):
        Gaussians.load(tmp_path / "scene.spz")
