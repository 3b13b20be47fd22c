"""Why a decoder falls short on unseen objects: what averaging removes is spread, not bias.

    python -m fresnel furniture --apt --out runs/data/furniture
    python -m fresnel study notebooks/params/study.yaml      # or its decoders' weights
    python benchmarks/decoder_spread.py [--arms decoder-A50,decoder-A,decoder-many]

On the furniture set's 78 test objects: the decoders of three seeds, each alone; each averaged with
what it makes of the mirrored input, mirrored back; and the mean of the three seeds' views. An error
that they share (too little capacity, what one picture can't tell) stays in the mean; one that
differs between them (what few objects leave open) goes. Prints and writes decoder_spread.md and
decoder_spread.json: dB over copying the input, over black / over white, by azimuth.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch

from fresnel import evaluate, experiment
from fresnel.cameras import Cameras
from fresnel.dataset import InputImages
from fresnel.decoder import Decoder, predictor
from fresnel.decoder_task import mirror_signs
from fresnel.evaluate import AZIMUTH_BINS, Predictor
from fresnel.provenance import git_state
from fresnel.render import Views

ROOT = Path(__file__).resolve().parent.parent
METRICS = ("psnr", "psnr_white")


def mean_of(predictors: list[Predictor]) -> Predictor:
    """The mean of their views, pixel by pixel."""

    def predict(inputs: InputImages, cameras: Cameras) -> Views:
        found = [one(inputs, cameras) for one in predictors]
        parts = zip(*((views.rgb, views.alpha, views.depth) for views in found), strict=True)
        return Views(*(torch.stack(part).mean(dim=0) for part in parts))

    return predict


def mirrored(one: Predictor) -> Predictor:
    """What it makes of the mirrored input in mirrored cameras, mirrored back."""

    def flip(cameras: Cameras) -> Cameras:
        of_views, of_pixels, across = mirror_signs(cameras.device)
        Ks = cameras.Ks * of_pixels + across * cameras.width
        return Cameras(cameras.viewmats * of_views, Ks, cameras.width, cameras.height)

    def predict(inputs: InputImages, cameras: Cameras) -> Views:
        other = replace(
            inputs, rgb=inputs.rgb.flip(2), alpha=inputs.alpha.flip(2), depth=None,
            cameras=flip(inputs.cameras),
        )  # fmt: skip
        views = one(other, flip(cameras))
        return Views(views.rgb.flip(3), views.alpha.flip(3), views.depth.flip(3))

    return predict


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", default="runs/data/furniture")
    parser.add_argument("--weights", type=Path, default=ROOT / "runs" / "weights")
    parser.add_argument("--arms", default="decoder-A50,decoder-A,decoder-many")
    parser.add_argument("--objects", type=int, default=0, help="held-out ones; 0: all")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    arguments = parser.parse_args()
    held_out = experiment.ground_truth(
        arguments.data, "held_out", image_size=128, objects=arguments.objects, seed=1000
    )
    truth = held_out.tensors(size=128, device=arguments.device)

    def measured(one: Predictor) -> dict[str, list[float]]:
        rows = evaluate.summarise(evaluate.evaluate(one, truth, progress=False))
        by_bin = {row["bin"]: row for row in rows}
        return {metric: [by_bin[name][metric] for name, _ in AZIMUTH_BINS] for metric in METRICS}

    copy = measured(evaluate.baselines(truth)["copy_input"])
    found: dict[str, dict[str, list[float]]] = {}
    lines = [
        "# What averaging gains a decoder",
        "",
        "`python benchmarks/decoder_spread.py`: dB over copying the input, over black / white, "
        f"on {len({evaluate.object_name(name) for name in truth.names})} test objects.",
        "",
        "| decoder | seeds | " + " | ".join(name for name, _ in AZIMUTH_BINS) + " |",
        "|:--|--:|" + "--:|" * len(AZIMUTH_BINS),
    ]
    print("\n".join(lines), flush=True)
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
        for way, predictors in ways.items():
            each = [measured(one) for one in predictors]
            gains = {
                metric: [
                    sum(one[metric][k] for one in each) / len(each) - copy[metric][k]
                    for k in range(len(AZIMUTH_BINS))
                ]
                for metric in METRICS
            }
            found[f"{arm}, {way}"] = gains
            cells = [" / ".join(f"{gains[m][k]:+.2f}" for m in METRICS) for k in range(4)]
            lines.append(f"| {arm}, {way} | {len(seeds)} | " + " | ".join(cells) + " |")
            print(lines[-1], flush=True)
    commit = git_state()["commit"]
    (arguments.out / "decoder_spread.md").write_text(
        "\n".join([*lines, "", f"Commit {commit[:7]}."]) + "\n"
    )
    record = {"commit": commit, "copy_input": copy, "gains": found}
    (arguments.out / "decoder_spread.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
