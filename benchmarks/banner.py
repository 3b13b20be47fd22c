"""Make docs/banner.webp, the picture at README's head: 1,200 x 400 pixels.

    .venv/bin/python benchmarks/banner.py

A held-out object and head, each its input and four views: above as the original experiment made
them, with what the gate says of such views of all held-out objects, or heads; below by the CVS that
ships, with the cameras around the object.
"""

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from fresnel import gate
from fresnel.bootstrap import CORRECTED, bootstrap, novel_cameras
from fresnel.models import cvs
from fresnel.models.decoder import predictor
from fresnel.objects import sources
from fresnel.show import scenes
from fresnel.study import arms
from fresnel.study.data import bootstrap_config

TARGET = Path(__file__).resolve().parents[1] / "docs" / "banner.webp"
CELL, GAP, AZIMUTHS = 114, 5, (45, 90, 180, 270)
CHOSEN = {"objects": "teddy_bear", "faces": ""}  # "": the first


def strips(domain: str, at: Path) -> tuple[list[Any], list[Any], str]:
    """Pictures of a domain's chosen record, input first: the original's orbit and ours; and what
    the gate says of the original's views of all records."""
    source = sources.of_domain("embedded", domain)
    truth = sources.ground_truth(source, "held_out", image_size=128, views=1, seed=1000)
    inputs = truth.inputs()
    row = next(i for i, name in enumerate(truth.names) if CHOSEN[domain] in name)
    geometry = bootstrap_config("original", 8, 128, seed=0)
    chosen = [azimuth // 45 for azimuth in AZIMUTHS]  # of eight views
    assert geometry is not None
    patch = arms.load_decoder("patch", "cpu", domain=domain)
    dark = bootstrap(inputs, patch, geometry, at / domain)
    verdict = gate.validate(dark, progress=False)
    network = arms.load_decoder("pixel", "cpu", domain=domain)
    one = inputs[[row]]
    drawn = cvs.predictor(cvs.load_shipped("cpu", "cvs-warp", domain), renderer=predictor(network))
    there = novel_cameras(one, replace(CORRECTED, image_size=128))
    views = [scenes.on_ground(rgba) for rgba in scenes.straight(drawn(one, there))[chosen]]
    alpha = one.alpha[0].numpy()[..., None] / 255
    given = one.rgb[0].numpy() + (1 - alpha) * scenes.GROUND
    dark_views = dark[row].rgb[chosen].numpy()
    return (
        [one.rgb[0].numpy(), *dark_views],
        [given.astype(np.uint8), *views],
        f"{'PASS' if verdict.passed else 'FAIL'}: {verdict.reasons[0].message}",
    )


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        made = [strips(domain, Path(folder)) for domain in CHOSEN]
    sheet = Image.new("RGB", (1200, 400), "white")
    draw = ImageDraw.Draw(sheet)
    big, small = ImageFont.load_default(19), ImageFont.load_default(15)
    draw.text((6, 4), "As the original experiment made its training views", "#1d232b", big)
    draw.text((6, 196), "The same pictures, cameras around the object", "#1d232b", big)
    for half, (dark, ours, said) in enumerate(made):
        left = 6 + half * (5 * (CELL + GAP) + 3)
        for row, (top, strip) in enumerate(((32, dark), (224, ours))):
            for k, picture in enumerate(strip):
                cell = Image.fromarray(picture).resize((CELL, CELL), Image.Resampling.LANCZOS)
                sheet.paste(cell, (left + k * (CELL + GAP), top))
            if row:
                names = ["input", *(f"{azimuth}\N{DEGREE SIGN}" for azimuth in AZIMUTHS)]
                for k, name in enumerate(names):
                    middle = left + k * (CELL + GAP) + CELL // 2
                    draw.text((middle, 342), name, "#5a6572", small, anchor="ma")
        words = said.partition(" (")[0]
        draw.text((left, 152), words if half else f"The gate: {words}", "#a8261b", small)
    note = "Neither was trained on. Above by the decoders of the original's kind, below by the CVS "
    note += "that ship, one network call a view, on a CPU."
    draw.text((6, 372), note, "#5a6572", small)
    sheet.save(TARGET, quality=88, method=6)
    print(TARGET, TARGET.stat().st_size, *(said for _, _, said in made), sep="\n")


if __name__ == "__main__":
    main()
