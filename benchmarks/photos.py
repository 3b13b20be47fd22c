"""Make docs/photos/*.webp, what `views` makes of pictures.

    .venv/bin/python benchmarks/photos.py [NAME ...]

The photographs lie in scikit-image's wheel; they need the extra "cutout" and its weights.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image
from skimage import data as skimage_data

from fresnel import views
from fresnel.data.dataset import MultiViewDataset
from fresnel.objects import sources
from fresnel.show import scenes

ROOT = Path(__file__).resolve().parents[1]
FOLDER = Path(skimage_data.__file__).parent
PHOTOS = {
    "astronaut": "astronaut.png",
    "cat": "chelsea.png",
    "coffee": "coffee.png",
    "rocket": "rocket.jpg",
    "cameraman": "camera.png",
}
OBJECTS = ("chair", "oak_table", "teddy_bear", "yogurt_bottle", "wheelbarrow")
HEADS = (0, 5)
SHEETS = ("head_5",)  # of which the whole sheet is shown too
FRONT = ("head_5", "chair", "astronaut")  # README's three, a row each, as the gallery has them
SHOWN_DEG, CELL_PX = ("0", "45", "90", "180", "315"), 224


def held_out(data: MultiViewDataset, at: int, path: Path) -> Path:
    """A record's input as a picture with alpha."""
    record = data[at]
    alpha = record.input_alpha.numpy()[..., None]
    colour = np.minimum(record.input_rgb.numpy() * 255.0 / np.maximum(alpha, 1) + 0.5, 255)
    Image.fromarray(np.concatenate([colour.astype(np.uint8), alpha], axis=-1)).save(path)
    return path


def objects(at: Path, views_each: int) -> MultiViewDataset:
    """The embedded objects that no decoder was trained on."""
    size = {"image_size": 128, "views": views_each}
    return sources.ground_truth("embedded", "held_out", **size, cache=at)


def join(place: Path) -> None:
    """README's picture of `FRONT`, from the gallery's."""
    rows = []
    for name in FRONT:
        with Image.open(place / f"{name}.webp") as grid:
            rows.append(np.hstack(np.vsplit(np.asarray(grid.convert("RGB")), 2)))
    Image.fromarray(np.vstack(rows)).save(place / "three.webp", quality=80, method=6)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        at = Path(folder)
        made = {name: FOLDER / file for name, file in PHOTOS.items()}
        truth, heads = objects(at, 1), sources.embedded_heads("held_out", at)
        for name in OBJECTS:
            i = next(i for i, full in enumerate(truth.names) if name in full)
            made[name] = held_out(truth, i, at / f"{name}.png")
        for i in HEADS:
            made[f"head_{i}"] = held_out(heads, i, at / f"head_{i}.png")
        place = ROOT / "docs/photos"
        place.mkdir(exist_ok=True)
        for name in sys.argv[1:] or made:
            facts = views.write_views(made[name], out := at / f"{name}-views")
            files = ["input.png", *(facts["files"][degrees] for degrees in SHOWN_DEG)]
            cells = []
            for file in files:
                with Image.open(out / file) as picture:
                    shown = scenes.on_ground(np.asarray(picture.convert("RGBA")))
                cells.append(np.asarray(Image.fromarray(shown).resize((CELL_PX, CELL_PX))))
            grid = np.vstack([np.hstack(cells[:3]), np.hstack(cells[3:])])
            Image.fromarray(grid).save(place / f"{name}.webp", quality=80, method=6)
            if name in SHEETS:
                with Image.open(out / "contact_sheet.png") as sheet:
                    sheet.save(place / f"{name}_sheet.webp", quality=80, method=6)
            print(name, facts["domain"], facts["checks"], *facts["careful"], sep="\n  ", flush=True)
        join(place)


if __name__ == "__main__":
    main()
