"""The heads that ship: python benchmarks/embed_heads.py ASSETS (MakeHuman's, a folder or zip).

16 people to train on, seen from 8 sides, and 8 held out, from 12; of numbers that only
`cvs_warp_faces` was trained on (but for those held out).  Depth is rounded to 1/256 of a unit
(0.8 mm), to take half the place.
"""

import sys
import tempfile
import zipfile
from dataclasses import replace
from pathlib import Path

from fresnel.data import dataset, records
from fresnel.heads.make import make
from fresnel.objects import sources

FIRST = 20_000
SETS = {"train": ("train", 16, 8), "held_out": ("test", 59, 12)}  # of 59 people 8 are "test"


def main(assets: str) -> None:
    records.PNG_LEVEL = 9
    for name, (split, count, views) in SETS.items():
        with tempfile.TemporaryDirectory() as folder:
            where = Path(folder)
            how = {"first": FIRST, "count": count, "split": split, "views": views}
            made = make(where / "made", assets=assets, **how)
            coarse = (
                replace(
                    each,
                    depth=(each.depth * 256).round() / 256,
                    input_depth=(each.input_depth * 256).round() / 256,
                )
                for each in (made[k] for k in range(len(made)))
            )
            packed = dataset.write(where / "set", coarse, meta=made.meta)
            target = sources.HEADS[name]
            with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
                for path in sorted(p for p in packed.path.rglob("*") if p.is_file()):
                    entry = zipfile.ZipInfo(path.relative_to(packed.path).as_posix())
                    entry.compress_type = zipfile.ZIP_DEFLATED
                    archive.writestr(entry, path.read_bytes())
            print(f"{target}: {len(made)} heads, {target.stat().st_size} bytes")


if __name__ == "__main__":
    main(sys.argv[1])
