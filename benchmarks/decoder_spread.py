"""Why a decoder falls short on unseen objects: what averaging removes is spread, not bias.

    python -m fresnel furniture --apt --out runs/data/furniture
    python -m fresnel study notebooks/params/study.yaml      # or its decoders' weights
    python benchmarks/decoder_spread.py [--arms decoder-A,decoder-shapes]
    python -m fresnel furniture --apt --size 256 --split test --out runs/data/furniture-256
    python benchmarks/decoder_spread.py --data runs/data/furniture-256 --size 256 --alone

On the furniture set's 78 test objects: the decoders of three seeds, each alone; each averaged with
what it makes of the mirrored input, mirrored back; and the mean of the three seeds' views. An error
that they share (too little capacity, what one picture can't tell) stays in the mean; one that
differs between them (what few objects leave open) goes. Prints and writes decoder_spread.md and
decoder_spread.json, by size: dB over copying the input, over black / over white, by azimuth. At
256 px the networks still see 128: their Gaussians are drawn larger.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from fresnel.data.dataset import InputImages
from fresnel.evaluation import metrics as evaluate
from fresnel.evaluation.metrics import AZIMUTH_BINS, Predictor
from fresnel.models.decoder import Decoder, predictor
from fresnel.models.refine import mirrored
from fresnel.objects import sources
from fresnel.render import Views
from fresnel.report.provenance import git_state
from fresnel.scene.cameras import Cameras

ROOT = Path(__file__).resolve().parent.parent
METRICS = ("psnr", "psnr_white")
ARMS = ("decoder-A50", "decoder-A", "decoder-many", "decoder-shapes")


def mean_of(predictors: list[Predictor]) -> Predictor:
    """The mean of their views, pixel by pixel."""

    def predict(inputs: InputImages, cameras: Cameras) -> Views:
        found = [one(inputs, cameras) for one in predictors]
        parts = zip(*((views.rgb, views.alpha, views.depth) for views in found), strict=True)
        return Views(*(torch.stack(part).mean(dim=0) for part in parts))

    return predict


def table(sizes: dict[str, dict[str, Any]]) -> str:
    """Markdown, a section a size."""
    text = "# What averaging gains a decoder\n\n"
    text += (
        "`python benchmarks/decoder_spread.py`: dB over copying the input, over black / white.\n"
    )
    for size, found in sizes.items():
        rows = [
            {"decoder": name, "seeds": row["seeds"], **_cells(row, "+.2f"), "commit": row["commit"]}
            for name, row in found["rows"].items()
        ]
        copy = _cells(found["copy_input"], ".2f")
        rows.append({"decoder": "copying the input, dB", "seeds": "", **copy, "commit": ""})
        text += f"\n## {size} px, {found['objects']} test objects\n\n"
        text += f"{evaluate.format_rows(rows)}\n"
    return text


def _cells(row: dict[str, Any], style: str) -> dict[str, str]:
    """Bin -> its values of all `METRICS`."""
    return {
        name: " / ".join(f"{row[metric][k]:{style}}" for metric in METRICS)
        for k, (name, _) in enumerate(AZIMUTH_BINS)
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", default="runs/data/furniture")
    parser.add_argument("--size", type=int, default=128, help="pixels of the views")
    parser.add_argument("--weights", type=Path, default=ROOT / "runs" / "weights")
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--alone", action="store_true", help="leave out what is averaged")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    arguments = parser.parse_args()
    held_out = sources.ground_truth(arguments.data, "held_out", image_size=arguments.size)
    truth = held_out.tensors(size=arguments.size, device=arguments.device)

    def measured(one: Predictor) -> dict[str, list[float]]:
        rows = evaluate.summarise(evaluate.evaluate(one, truth, progress=False))
        by_bin = {row["bin"]: row for row in rows}
        return {metric: [by_bin[name][metric] for name, _ in AZIMUTH_BINS] for metric in METRICS}

    commit = (git_state()["commit"] or "")[:7]
    copy = measured(evaluate.baselines(truth)["copy_input"])
    gains: dict[str, dict[str, Any]] = {}
    for arm in arguments.arms.split(","):
        paths = sorted(arguments.weights.glob(f"{arm}-s*.safetensors"))
        if not paths:
            raise SystemExit(f"{arguments.weights}/{arm}-s*.safetensors: none; run the study first")
        seeds = [predictor(Decoder.load(path, arguments.device)) for path in paths]
        ways = {
            "each alone": seeds,
            "each with its mirror image": [mean_of([one, mirrored(one)]) for one in seeds],
            "their mean": [mean_of(seeds)],
        }
        if arguments.alone:
            ways = {"each alone": seeds}
        for way, predictors in ways.items():
            each = [measured(one) for one in predictors]
            gains[f"{arm}, {way}"] = {"seeds": len(seeds), "commit": commit} | {
                metric: [
                    sum(values) / len(values) - base
                    for *values, base in zip(
                        *(one[metric] for one in each), copy[metric], strict=True
                    )
                ]
                for metric in METRICS
            }
            print(f"{arm}, {way}:", gains[f"{arm}, {way}"], flush=True)
    path = arguments.out / "decoder_spread.json"
    sizes = json.loads(path.read_text()) if path.exists() else {}
    known = sizes.get(str(arguments.size), {}).get("rows", {}) | gains
    arms = dict.fromkeys([*ARMS, *arguments.arms.split(",")])
    sizes[str(arguments.size)] = {
        "objects": len({evaluate.object_name(name) for name in truth.names}),
        "copy_input": copy,
        "rows": {  # with those of other arms that an earlier call measured
            name: row for arm in arms for name, row in known.items() if name.startswith(f"{arm},")
        },
    }
    path.write_text(json.dumps(sizes, indent=1) + "\n")
    (arguments.out / "decoder_spread.md").write_text(table(sizes))
    print(table(sizes))


if __name__ == "__main__":
    main()
