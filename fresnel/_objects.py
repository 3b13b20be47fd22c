"""Objects to make data from: the 24 that come with the library, and zip files of others."""

from __future__ import annotations

import json
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from fresnel._surfaces import srgb_to_linear
from fresnel.images import DatasetError

_MAX_MESH_BYTES = 1 << 28
_ASSETS = Path(__file__).parent / "assets"


@dataclass(frozen=True)
class Asset:
    """A 3D object, where it lies, and whom to thank for it.

    ``source`` is a mesh file, or a zip file with ``member`` naming the GLB inside.
    ``srgb_factors``: the GLB's base colour factors are sRGB (against the standard) and are
    converted by `load`.  ``origin`` names the model in the collection it was taken from, so that
    one object can be known again in two sets.
    """

    name: str
    source: Path
    split: str
    licence: str
    attribution: str
    category: str = ""
    member: str = ""
    srgb_factors: bool = False
    origin: str = ""

    def load(self) -> Path | bytes:
        """What `meshes.load` takes: the file's path, or the bytes of a GLB.

        Raises:
            DatasetError: if the file or the zip's member is missing, damaged or too large.
        """
        if not self.member:
            if not self.source.is_file():
                raise DatasetError(f"{self.source}: no such file (object {self.name!r})")
            return self.source
        try:
            with zipfile.ZipFile(self.source) as archive:
                if archive.getinfo(self.member).file_size > _MAX_MESH_BYTES:
                    raise DatasetError(f"{self.source}: {self.member} is too large")
                data = archive.read(self.member)
        except KeyError:
            raise DatasetError(f"{self.source}: has no member {self.member!r}") from None
        except (OSError, zipfile.BadZipFile) as error:
            raise DatasetError(f"{self.source}: can't be read as a zip file ({error})") from error
        return linear_factors(data) if self.srgb_factors else data


def linear_factors(glb: bytes) -> bytes:
    """A GLB whose base colour factors are sRGB values, made to hold linear ones as it should."""
    try:
        (size,) = struct.unpack_from("<I", glb, 12)
        header = json.loads(glb[20 : 20 + size])
        for material in header.get("materials", []):
            pbr = material.get("pbrMetallicRoughness", {})
            if "baseColorFactor" in pbr:
                r, g, b, a = pbr["baseColorFactor"]
                pbr["baseColorFactor"] = [*srgb_to_linear(np.array([r, g, b])).tolist(), a]
    except (struct.error, ValueError, AttributeError, TypeError) as error:
        raise DatasetError(f"mesh bytes: not a binary glTF (GLB) ({error})") from None
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 4)
    rest = glb[20 + size :]
    total = 20 + len(text) + len(rest)
    return b"".join([glb[:8], struct.pack("<II", total, len(text)), b"JSON", text, rest])


def embedded_assets(split: Literal["train", "held_out"] | None = None) -> list[Asset]:
    """The 24 CC0 objects that come with the library: 16 to train on, 8 held out."""
    entries = json.loads((_ASSETS / "objects.json").read_text())
    return [
        Asset(
            name=entry["name"],
            source=_ASSETS / entry["file"],
            split=entry["split"],
            licence=entry["licence"],
            attribution=f"{entry['title']} by {entry['creator']} ({entry['licence']})",
            category=entry["category"],
            origin=entry["source"].partition(": ")[2],
        )
        for entry in entries
        if split in (None, entry["split"])
    ]


def zip_assets(path: str | Path, split: str | None = None) -> list[Asset]:
    """The objects of a zip file of GLBs with a manifest.json (the furniture set).

    Args:
        split: "train", "val", "test", or None for all.
    """
    source = Path(path)
    try:
        with zipfile.ZipFile(source) as archive:
            entries = json.loads(archive.read("manifest.json"))
        assets = [
            Asset(
                name=Path(entry["file"]).stem,
                source=source,
                split=entry["split"],
                licence=entry["license"],
                attribution=f"{entry['name']} by {entry['creator']}, {entry['copyright']} "
                f"({entry['license']})",
                category=entry["category"],
                member=entry["file"],
                srgb_factors=True,
                origin=entry.get("source", ""),
            )
            for entry in entries
            if split in (None, entry["split"])
        ]
    except FileNotFoundError:
        raise DatasetError(f"{source}: no such file") from None
    except (OSError, zipfile.BadZipFile) as error:
        raise DatasetError(f"{source}: can't be read as a zip file ({error})") from error
    except (KeyError, TypeError, ValueError) as error:
        raise DatasetError(f"{source}: its manifest.json is missing or damaged ({error})") from None
    if not assets:
        raise DatasetError(f"{source}: holds no object of split {split!r}")
    return assets
