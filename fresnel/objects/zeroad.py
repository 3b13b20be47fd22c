"""The art of the game 0 A.D. as 3D objects: Debian's 0ad-data 0.0.26-1, CC BY-SA 3.0.

More shapes for a CVS that has learned 430 pieces of furniture by heart: houses, tools, statues,
rocks, animals. Its meshes (.pmd, as pyrogenesis caches them) and skins (DDS) become a zip of OBJ
files that every command reads, with names and licence in its manifest. One skin a mesh, without
what only alpha gives its shape (leaves), without skeletons, bare triangles and scattered pieces.
Many share a skin, so that no split of them is free of leaks: all are to train on.
"""

import io
import json
import re
import struct
import xml.etree.ElementTree as ElementTree
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fresnel.data.dataset import DatasetError
from fresnel.host.files import own, remove, sha256
from fresnel.objects.furniture import call

PACKAGE, VERSION = "0ad-data", "0.0.26-1"
SHA256 = "53745ae74d05bccf6783400fa98f3932b21729ab9d2e86151aa2c331c3455178"
LICENCE, MAKER = "CC-BY-SA-3.0", "Wildfire Games"
_INSIDE_DEB = "usr/share/games/0ad/mods/public/public.zip"
_SEE_THROUGH = re.compile(r"basic_trans|alphatest|foliage|aura|glow")
_FEWEST, _MOST = 60, 8000
"""Triangles of a mesh."""
_FLAT, _LEAST_AREA, _MAIN = 0.06, 0.25, 0.5
"""Least thickness of the largest piece over its length (of singular values); least area of all
triangles over the longest side's square: fences have less; least reach of the largest piece over
the whole's: apples on the ground have less."""

Floats = NDArray[np.float32]


def make(
    out: str | Path,
    *,
    deb: str | Path | None = None,
    public: str | Path | None = None,
    side: int = 512,
    overwrite: bool = False,
) -> int:
    """Write the objects to a zip file, whole or not at all, and return how many there are.

    Args:
        deb: the package; of neither this nor `public` it is fetched by apt-get (1.4 GB).
        public: its public.zip, 3.3 GB.
        side: of a skin, at most, in pixels.

    Raises:
        DatasetError: if the package can't be had or isn't the pinned one, or `out` exists.
    """
    target = Path(out)
    if target.suffix != ".zip":
        raise DatasetError(f"{target}: want the name of a .zip file for --out")
    if target.exists() and not overwrite:
        raise DatasetError(f"{target}: exists already; --overwrite replaces it")
    folder = target.with_name(f".{target.name}.unpacked")
    with own(folder):
        folder.mkdir(parents=True, exist_ok=True)
        art = Path(public) if public else _unpacked(deb, folder)
        part = folder / "objects.zip"
        with (
            zipfile.ZipFile(art) as archive,
            zipfile.ZipFile(part, "w", zipfile.ZIP_DEFLATED) as zip,
        ):
            count = _convert(archive, zip, side)
        if not count:
            raise DatasetError(f"{art}: holds no mesh with a skin; want 0 A.D.'s public.zip")
        part.replace(target)
    remove(folder)
    return count


def _unpacked(deb: str | Path | None, folder: Path) -> Path:
    """public.zip of the package."""

    def ask(*command: str) -> None:
        package = f"{PACKAGE}_{VERSION}_all.deb"
        call(*command, at=folder, file=package, inside=_INSIDE_DEB, by="--public")

    if not deb:
        ask("apt-get", "download", f"{PACKAGE}={VERSION}")
    file = Path(deb or next(folder.glob("*.deb"), folder))
    if not file.is_file() or sha256(file) != SHA256:
        raise DatasetError(f"{file}: not {PACKAGE} {VERSION} (sha256 differs). Fetch it again")
    ask("dpkg-deb", "--extract", str(file.resolve()), ".")
    if not (folder / _INSIDE_DEB).is_file():
        raise DatasetError(f"{file}: holds no {_INSIDE_DEB}. Fetch it again")
    return folder / _INSIDE_DEB


def _convert(archive: zipfile.ZipFile, zip: zipfile.ZipFile, side: int) -> int:
    skins, listed = dict[str, str](), list[dict[str, str]]()

    def put(name: str, data: str | bytes, how: int = zipfile.ZIP_DEFLATED) -> None:
        zip.writestr(zipfile.ZipInfo(name), data, how)  # without the time: same art, same bytes

    for mesh, (skin, actor) in sorted(_pairs(archive).items()):
        try:
            points, places, faces = read_pmd(archive.read(mesh))
            if not _is_solid(points, faces):
                continue
            if skin not in skins:
                skins[skin] = f"skins/{len(skins):04d}.jpg"
                put(skins[skin], _picture(archive.read(skin), side), zipfile.ZIP_STORED)
        except (ValueError, OSError, NotImplementedError):
            continue  # a kind of DDS or mesh that is not read
        name = re.sub(r"\W+", "_", mesh.removeprefix("art/meshes/").split(".")[0])
        put(f"{name}.obj", _obj(name, points, places, faces))
        put(f"{name}.mtl", f"newmtl skin\nmap_Kd {skins[skin]}\n")
        title = Path(actor).stem.replace("_", " ")
        said = {"file": f"{name}.obj", "name": title, "creator": MAKER, "license": LICENCE}
        listed.append(said | {"split": "train", "category": actor.split("/")[2]})
    put("manifest.json", json.dumps(listed, indent=0))
    return len(listed)


def _pairs(archive: zipfile.ZipFile) -> dict[str, tuple[str, str]]:
    """Mesh -> (skin, actor): of the first actor that shows it, by its first variants."""
    names, found = set(archive.namelist()), dict[str, tuple[str, str]]()
    for actor in sorted(n for n in names if re.fullmatch(r"art/actors/.+/.+\.xml", n)):
        try:
            said = ElementTree.fromstring(archive.read(actor))
        except ElementTree.ParseError:
            continue
        if _SEE_THROUGH.search(said.findtext("material") or ""):
            continue
        mesh = next((m for v in said.iter("variant") if (m := v.findtext("mesh"))), "")
        textures = (t for t in said.iter("texture") if t.get("name") == "baseTex")
        skin = next((file for t in textures if (file := t.get("file"))), "")
        places = (f"art/meshes/{mesh}", ".pmd"), (f"art/textures/skins/{skin}", ".dds")
        pair = [next((p for p in (f"{n}.cached{end}", n) if p in names and p.endswith(end)), "")
                for n, end in places]  # fmt: skip
        if all(pair) and not mesh.startswith("skeletal/"):
            found.setdefault(pair[0], (pair[1], actor))
    return found


def read_pmd(data: bytes) -> tuple[Floats, Floats, NDArray[np.uint16]]:
    """Vertices (N, 3), their places in the skin (N, 2), from its foot, and triangles (F, 3) of a
    pyrogenesis mesh, versions 3 and 4 (its source/graphics/ModelDef.cpp).

    Raises:
        ValueError: for anything else, and for what ends early or names no vertex.
    """
    try:
        magic, version, _, count = struct.unpack_from("<4sIII", data)
        sets, start = 1, 16
        if version == 4:
            (sets,), start = struct.unpack_from("<I", data, start), start + 4
        if magic != b"PSMD" or version not in (3, 4) or not 1 <= sets <= 8:
            raise ValueError(f"not a .pmd of version 3 or 4 (version {version})")
        size = 24 + 8 * sets + 20  # place and normal, skins, bones
        rows = np.frombuffer(data, np.uint8, count * size, start).reshape(count, size)
        floats = rows[:, :32].copy().view("<f4")
        (triangles,) = struct.unpack_from("<I", data, start + count * size)
        faces = np.frombuffer(data, "<u2", 3 * triangles, start + count * size + 4).reshape(-1, 3)
    except struct.error as error:
        raise ValueError(f"a .pmd that ends early ({error})") from None
    if not np.isfinite(floats).all() or (len(faces) and faces.max() >= count):
        raise ValueError("a .pmd with vertices that are no numbers, or are not there")
    return floats[:, :3], floats[:, 6:8], faces


def _is_solid(points: Floats, faces: NDArray[np.uint16]) -> bool:
    """Whether it is one thing with a body: neither flat nor thin, nor pieces that lie about."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    if not _FEWEST <= len(faces) <= _MOST:
        return False
    longest = np.ptp(points, axis=0).max()
    a, b, c = (points[faces[:, k]] for k in range(3))
    areas = np.linalg.norm(np.cross(b - a, c - a), axis=1) / 2
    # vertices are there once for each skin place: those in one place are one
    _, one = np.unique((points / (1e-4 * longest)).round(), axis=0, return_inverse=True)
    links = one.reshape(-1)[faces][:, [0, 1, 2]], one.reshape(-1)[faces][:, [1, 2, 0]]
    ends = (links[0].ravel(), links[1].ravel())
    graph = coo_array((np.ones(3 * len(faces)), ends), (one.max() + 1,) * 2)
    _, piece = connected_components(graph, directed=False)
    of_face = piece[one.reshape(-1)[faces[:, 0]]]
    main = of_face == np.bincount(of_face, weights=areas).argmax()
    body = points[np.unique(faces[main])]
    thin = np.linalg.svd(body - body.mean(axis=0), compute_uv=False)
    whole = bool(np.ptp(body, axis=0).max() > _MAIN * longest)
    return whole and bool(thin[2] > _FLAT * thin[0] and areas.sum() > _LEAST_AREA * longest**2)


def _picture(dds: bytes, side: int) -> bytes:
    """A skin as JPEG, without its alpha, which says where the player's colour goes."""
    from PIL import Image

    image: Image.Image = Image.open(io.BytesIO(dds))
    image = image.convert("RGB")
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    image.save(made := io.BytesIO(), "JPEG", quality=90)
    return made.getvalue()


def _obj(name: str, points: Floats, places: Floats, faces: NDArray[np.uint16]) -> str:
    """Wavefront OBJ: left-handed as the game has it is mirrored to right-handed, faces turned."""

    def lines() -> Iterator[str]:
        yield from (f"mtllib {name}.mtl", "usemtl skin")
        yield from (f"v {x:.6g} {y:.6g} {-z:.6g}" for x, y, z in points.tolist())
        yield from (f"vt {u:.6g} {v:.6g}" for u, v in places.tolist())
        for a, b, c in (faces[:, [0, 2, 1]].astype(int) + 1).tolist():
            yield f"f {a}/{a} {b}/{b} {c}/{c}"

    return "\n".join(lines()) + "\n"
