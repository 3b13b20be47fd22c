"""Choose the 24 CC0 objects that come with the library, and copy them out of furniture.zip.

    python benchmarks/make_assets.py PATH/TO/furniture.zip

The objects were chosen by eye from a contact sheet of the zip's 130 CC0 objects: varied in shape,
colour, brightness and thinness, each held-out one with a recognisable relative among the training
ones.  What is held out here is never in the zip's training split, so figures from models trained
on either set stay honest.  The files' base colour factors, sRGB in the zip, become linear as glTF
wants them; nothing else changes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import zipfile
from pathlib import Path

from fresnel.objects import meshes

ASSETS = Path(__file__).resolve().parents[1] / "fresnel" / "assets"
MAX_BYTES = 3_000_000
SOURCE = "Debian package sweethome3d-furniture 1.8-1"
# file in the zip -> name, category
TRAIN = {
    "0025": ("blue_chair", "seat"),
    "0096": ("red_chair", "seat"),
    "0105": ("wooden_chair", "seat"),
    "0118": ("red_armchair", "seat"),
    "0083": ("black_armchair", "seat"),
    "0114": ("table", "table"),
    "0012": ("desk_lamp", "lamp"),
    "0134": ("outdoor_lamp", "lamp"),
    "0067": ("little_plant", "plant"),
    "0009": ("biplane", "vehicle"),
    "0099": ("fork_lift", "vehicle"),
    "0081": ("horse", "animal or doll"),
    "0148": ("wooden_doll", "animal or doll"),
    "0019": ("baby_bottle", "bottle"),
    "0068": ("basketball", "toy"),
    "0050": ("parasol", "parasol"),
}
HELD_OUT = {
    "0091": ("chair_with_cushion", "seat"),
    "0112": ("sofa", "seat"),
    "0095": ("dark_couch", "seat"),
    "0022": ("oak_table", "table"),
    "0135": ("plant_box", "plant"),
    "0117": ("wheelbarrow", "vehicle"),
    "0041": ("teddy_bear", "animal or doll"),
    "0054": ("yogurt_bottle", "bottle"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("zip", type=Path, help="furniture.zip")
    path = parser.parse_args().zip
    with zipfile.ZipFile(path) as archive:
        manifest = {
            Path(entry["file"]).stem: entry for entry in json.loads(archive.read("manifest.json"))
        }
    assets = {asset.name: asset for asset in meshes.zip_assets(path)}
    ASSETS.mkdir(exist_ok=True)
    entries = []
    for split, chosen in (("train", TRAIN), ("held_out", HELD_OUT)):
        for number, (name, category) in chosen.items():
            entry = manifest[number]
            if entry["license"] != "CC0-1.0" or (entry["split"] == "train") != (split == "train"):
                raise SystemExit(f"{number}: is {entry['license']}, split {entry['split']}")
            data = assets[number].load()
            assert isinstance(data, bytes)
            (ASSETS / f"{name}.glb").write_bytes(data)
            entries.append(
                {
                    "file": f"{name}.glb",
                    "name": name,
                    "title": entry["name"],
                    "category": category,
                    "split": split,
                    "creator": entry["creator"],
                    "licence": entry["license"],
                    "source": f"{SOURCE}: {entry['source']}",
                    "sha256": hashlib.sha256(data).hexdigest(),
                }
            )
    (ASSETS / "objects.json").write_text(json.dumps(entries, indent=1) + "\n")
    size = sum((ASSETS / entry["file"]).stat().st_size for entry in entries)
    if size > MAX_BYTES:
        raise SystemExit(f"the objects take {size} bytes, the limit is {MAX_BYTES}")
    print(f"{len(entries)} objects, {size / 1e6:.2f} MB, in {ASSETS}")


if __name__ == "__main__":
    main()
