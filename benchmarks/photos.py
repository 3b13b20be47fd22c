"""Make docs/photos/*.webp: what `views` makes of photographs, of a chair and of a head held out.

    .venv/bin/python benchmarks/photos.py [NAME ...]

The photographs lie in scikit-image's wheel; needs the extra "cutout" and its weights.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image
from skimage import data as skimage_data

from fresnel import views
from fresnel.data.dataset import MultiViewDataset
from fresnel.objects import sources

HERE = Path(__file__).resolve().parents[1] / "docs" / "photos"
FOLDER = Path(skimage_data.__file__).parent
PHOTOS = {
    "astronaut": "astronaut.png",
    "cat": "chelsea.png",
    "coffee": "coffee.png",
    "rocket": "rocket.jpg",
}


def held_out(data: MultiViewDataset, at: int, path: Path) -> Path:
    """A record's input as a picture with alpha."""
    record = data[at]
    alpha = record.input_alpha.numpy()[..., None]
    colour = np.minimum(record.input_rgb.numpy() * 255.0 / np.maximum(alpha, 1) + 0.5, 255)
    Image.fromarray(np.concatenate([colour.astype(np.uint8), alpha], axis=-1)).save(path)
    return path


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        at = Path(folder)
        made = {name: FOLDER / file for name, file in PHOTOS.items()}
        objects = sources.ground_truth("embedded", "held_out", image_size=128, views=1, cache=at)
        chair = next(i for i, name in enumerate(objects.names) if "chair" in name)
        made["chair"] = held_out(objects, chair, at / "chair.png")
        made["head"] = held_out(sources.embedded_heads("held_out", at), 0, at / "head.png")
        HERE.mkdir(exist_ok=True)
        for name in sys.argv[1:] or made:
            facts = views.write_views(made[name], at / name)
            with Image.open(at / name / "contact_sheet.png") as sheet:
                sheet.save(HERE / f"{name}.webp", quality=82, method=6)
            print(name, facts["domain"], facts["checks"], *facts["careful"], sep="\n  ", flush=True)


if __name__ == "__main__":
    main()
