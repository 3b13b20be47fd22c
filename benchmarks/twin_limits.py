"""Why the CVS that adds to the decoder's renders gains half a decibel at most, and is too dark.

    python -m fresnel furniture --apt --out runs/data/furniture
    python -m fresnel study notebooks/params/study.yaml --only 03-twin-shipped    # its weights
    python benchmarks/twin_limits.py

On the furniture set's 78 test objects, at 128 px, with the decoder that ships: its render; the mean
of that and what it makes of the mirrored input, which is what a twin adds to; the twin that ships;
that twin averaged with itself on the mirrored input; the twins that two cores trained, three seeds,
and the mean of their views.  What averaging over trainings gains is spread between them, and not
what one picture can't tell.

For the light: its ratio in linear light, as everywhere here, and in encoded (sRGB) values, in which
networks are trained; and both of the true views, slightly blurred.  An average of encoded colours
is darker than the average of their light, so whoever draws what is uncertain as an average loses
light.

Predicted before the run: the mean of three seeds gains 0.25 dB in the far bins, the mirrored input
0.1; the twin holds 0.95 of the encoded values, true views blurred by 2 px 0.95 of the light.

Prints and writes twin_limits.md and twin_limits.json.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from decoder_spread import mean_of
from scipy.ndimage import gaussian_filter
from torch import Tensor

from fresnel.analysis.stats import BINS
from fresnel.data.dataset import InputImages, ViewTensors
from fresnel.evaluation import metrics as evaluate
from fresnel.evaluation.metrics import Predictor
from fresnel.models import cvs, decoder
from fresnel.models.refine import mirrored
from fresnel.objects import sources
from fresnel.render import Views
from fresnel.report.provenance import git_state
from fresnel.scene.cameras import Cameras

ROOT = Path(__file__).resolve().parent.parent
WEIGHTS = torch.tensor([0.2126, 0.7152, 0.0722])
METRICS = ("psnr", "psnr_white", "light", "encoded")


def blurred(truth: ViewTensors, sigma: float) -> Predictor:
    """The true views themselves under a Gaussian blur of `sigma` pixels, in encoded values."""
    index = {name: k for k, name in enumerate(truth.names)}

    def predict(inputs: InputImages, cameras: Cameras) -> Views:
        of = [index[name] for name in inputs.names]
        rgba = torch.cat([truth.rgb[of], truth.alpha[of][..., None]], dim=-1).float() / 255
        made = gaussian_filter(rgba.numpy(), (0, 0, sigma, sigma, 0), mode="constant", truncate=3)
        rgb, alpha = torch.from_numpy(made).split([3, 1], dim=-1)
        return Views(rgb, alpha, torch.zeros_like(alpha))

    return predict


def measured(one: Predictor, truth: ViewTensors) -> dict[str, list[float]]:
    """`METRICS` by bin: PSNR over black and white, light, and the same of encoded values."""
    sums: list[Tensor] = []

    def watched(inputs: InputImages, cameras: Cameras) -> Views:
        views = one(inputs, cameras)
        sums.append((views.rgb.float().clamp(0, 1).cpu() @ WEIGHTS).sum(dim=(2, 3)).flatten())
        return views

    rows = evaluate.evaluate(watched, truth, progress=False)
    true = (truth.rgb.float().cpu() / 255 @ WEIGHTS).sum(dim=(2, 3)).flatten()
    made = torch.cat(sums)
    encoded = [
        {**row, "luminance": float(a), "luminance_target": float(b)}
        for row, a, b in zip(rows, made, true, strict=True)
    ]
    found = {row["bin"]: row for row in evaluate.summarise(rows)}
    other = {row["bin"]: row for row in evaluate.summarise(encoded)}
    return {
        "psnr": [found[name]["psnr"] for name in BINS],
        "psnr_white": [found[name]["psnr_white"] for name in BINS],
        "light": [found[name]["luminance_ratio"] for name in BINS],
        "encoded": [other[name]["luminance_ratio"] for name in BINS],
    }


def average(found: Sequence[dict[str, list[float]]]) -> dict[str, list[float]]:
    """Metric by metric and bin by bin."""
    return {
        metric: [
            sum(values) / len(values) for values in zip(*(f[metric] for f in found), strict=True)
        ]
        for metric in METRICS
    }


def table(found: dict[str, Any]) -> str:
    """Markdown: gains over the decoder's render, and light."""
    base, rows = found["rows"]["the decoder's render"], []
    for name, row in found["rows"].items():
        gains = [
            " / ".join(f"{row[m][k] - base[m][k]:+.2f}" for m in ("psnr", "psnr_white"))
            for k in range(len(BINS))
        ]
        rows.append({"views": name, "seeds": row["seeds"], **dict(zip(BINS, gains, strict=True))})
    light = [
        {
            "views": name,
            **{b: f"{row['light'][k]:.2f} / {row['encoded'][k]:.2f}" for k, b in enumerate(BINS)},
        }
        for name, row in found["rows"].items()
    ]
    return (
        "# What holds the refining CVS back\n\n"
        f"`python benchmarks/twin_limits.py`, {found['objects']} test objects, 128 px, commit "
        f"{found['commit'][:7]}.\n\n"
        "PSNR, dB over the decoder's render, over black / white:\n\n"
        f"{evaluate.format_rows(rows)}\n\n"
        "Output / truth, in linear light / in encoded values:\n\n"
        f"{evaluate.format_rows(light)}\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", default="runs/data/furniture")
    parser.add_argument("--weights", type=Path, default=ROOT / "runs" / "weights")
    parser.add_argument("--objects", type=int, default=0, help="0: all")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    arguments = parser.parse_args()
    held_out = sources.ground_truth(
        arguments.data, "held_out", image_size=128, objects=arguments.objects
    )
    truth = held_out.tensors(size=128, device="cpu")
    render = decoder.predictor(decoder.load_shipped("pixel"))
    shipped = cvs.predictor(cvs.load_shipped(model="cvs-twin"), renderer=render)
    paths = sorted(arguments.weights.glob("cvs-twin-s*.safetensors"))
    seeds = [cvs.predictor(cvs.CVS.load(path), renderer=render) for path in paths]
    rows: dict[str, dict[str, Any]] = {}

    def add(name: str, *predictors: Predictor) -> None:
        rows[name] = average([measured(one, truth) for one in predictors])
        rows[name]["seeds"] = len(predictors)
        print(name, {k: [round(x, 3) for x in v] for k, v in rows[name].items() if k != "seeds"})

    with torch.inference_mode():
        add("the decoder's render", render)
        add("its mean with the mirrored input's", mean_of([render, mirrored(render)]))
        add("the twin that ships", shipped)
        add("its mean with the mirrored input's, twin", mean_of([shipped, mirrored(shipped)]))
        if seeds:
            add("twins of two cores, each alone", *seeds)
            add(f"the mean of these {len(seeds)}", mean_of(seeds))
            add("the mean of these and of the one that ships", mean_of([*seeds, shipped]))
        for sigma in (1.0, 2.0):
            add(f"true views, blurred by {sigma:g} px", blurred(truth, sigma))
    names = {evaluate.object_name(name) for name in truth.names}
    result = {"commit": git_state()["commit"], "objects": len(names), "rows": rows}
    (arguments.out / "twin_limits.json").write_text(json.dumps(result, indent=1) + "\n")
    (arguments.out / "twin_limits.md").write_text(table(result))
    print(table(result))


if __name__ == "__main__":
    main()
