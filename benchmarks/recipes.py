"""Which recipe makes a better decoder, and a better refining CVS? Chosen on B, judged elsewhere.

    python -m fresnel furniture --apt --out runs/data/furniture
    python -m fresnel furniture --apt --split train --inputs 8 --views 16 \\
        --out runs/data/furniture-eight
    python -m fresnel furniture --apt --split train --inputs 8 --views 16 --stretch 1.5 \\
        --out runs/data/furniture-stretch
    python benchmarks/recipes.py            # a process takes recipe after recipe; start several
    python benchmarks/recipes.py --table    # recipes.md of what there is

Every recipe is trained once (seed 0) on A, half of the furniture set's training objects, and
judged on B, the other half, which it has not seen: the study's 78 test objects choose nothing.
Decoders are compared with copying the input, refining networks with the render that they refine.
Decoders take 1,800 steps, half of the study's, unless the recipe says otherwise.

Predicted before the run, dB in the far bin: eight +0.2 over two, stretch +0.1 over eight, large
+0.15 and long +0.1 over stretch, three and views 0; twin +0.15 over refine-stretch, that +0.1 over
refine, three times the steps +0.1, one step alone 0.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from fresnel.data import dataset
from fresnel.data.dataset import ViewTensors
from fresnel.evaluation import metrics as evaluate
from fresnel.evaluation.metrics import AZIMUTH_BINS, Predictor
from fresnel.host import machine as surroundings
from fresnel.host.files import lock_if_free
from fresnel.models import decoder
from fresnel.models.decoder import Decoder, DecoderConfig
from fresnel.objects import splits as studies
from fresnel.report.provenance import git_state
from fresnel.study import arms
from fresnel.training.decoder_task import DecoderTask
from fresnel.training.forecast import full_config
from fresnel.training.step import Stepper

ROOT = Path(__file__).resolve().parent.parent
METRICS = ("psnr", "psnr_white", "luminance_ratio", "coverage_ratio")

DECODERS: dict[str, dict[str, Any]] = {
    "large": {
        "about": "136 pictures an object, of eight shapes; 22 M parameters", "data": "stretch",
        "lr": 6e-4, "network": {"base_channels": 96},
    },
    "stretch": {"about": "136 pictures an object, of eight shapes", "data": "stretch"},
    "long": {"about": "the same, twice the steps", "data": "stretch", "steps": 3600},
    "three": {
        "about": "the same, three Gaussians a pixel", "data": "stretch",
        "network": {"gaussians_per_pixel": 3},
    },
    "views": {
        "about": "the same, 7 views of 16 objects a step", "data": "stretch", "batch": 16,
        "target_views": 7,
    },
    "eight": {"about": "136 pictures an object"},
    "two": {"about": "34 pictures an object", "records": 2},
}  # fmt: skip
REFINERS: dict[str, dict[str, Any]] = {
    "refine": {"about": "nine pictures an object, any as the input", "data": "furniture"},
    "refine-eight": {"about": "eight inputs x 16 views", "data": "eight"},
    "refine-stretch": {"about": "the same, of eight shapes"},
    "twin": {"about": "eight shapes, renders from the mirrored input too", "model": "cvs-twin"},
    "twin-regression": {
        "about": "the same, one step alone", "model": "cvs-twin", "parameterisation": "regression",
    },
    "twin-long": {"about": "three times the steps", "model": "cvs-twin", "steps": 3000},
    "twin-long-regression": {
        "about": "three times the steps, one step alone", "model": "cvs-twin", "steps": 3000,
        "parameterisation": "regression",
    },
    "refine-long": {"about": "eight shapes, three times the steps", "steps": 3000},
    "twin-large": {
        "about": "renders of the decoder 'large'", "model": "cvs-twin", "decoder": "large",
    },
}  # fmt: skip


def training_data(which: str, records: int) -> ViewTensors:
    """The pictures of A: `furniture`'s, or those of the larger sets, of the first records."""
    folder = "furniture" if which == "furniture" else f"furniture-{which}"
    data = studies.part(dataset.open(ROOT / "runs" / "data" / folder), "A")
    kept = [i for i, name in enumerate(data.names) if int(name.rpartition("__")[2]) < records]
    return data.subset(kept).tensors()


def judged(one: Predictor, truth: ViewTensors) -> dict[str, list[float]]:
    """By metric, its value in every bin."""
    found = evaluate.summarise(evaluate.evaluate(one, truth, progress=False), resamples=10)
    by_bin = {entry["bin"]: entry for entry in found}
    return {metric: [by_bin[name][metric] for name, _ in AZIMUTH_BINS] for metric in METRICS}


def trained(task: Any, config: Any) -> tuple[Any, float]:
    """The average of the weights, and the seconds that its steps took."""
    stepper = Stepper(task, config)
    with surroundings.kernels(False, stepper.device):
        if config.compile:
            stepper.compile()
        began = time.perf_counter()
        for step in range(config.steps):
            stepper.train(step)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    return stepper.ema.eval(), time.perf_counter() - began


def decoder_recipe(name: str, device: str, scale: float) -> dict[str, Any]:
    recipe = DECODERS[name]
    torch.manual_seed(0)
    task = DecoderTask(
        training_data(recipe.get("data", "eight"), recipe.get("records", 8)),
        model=Decoder(DecoderConfig(**recipe.get("network", {}))),
        batch_size=recipe.get("batch", 32),
        target_views=recipe.get("target_views", 3),
        device=device,
    )
    config = full_config(
        max(2, int(scale * recipe.get("steps", 1800))),
        lr=recipe.get("lr", 1e-3), precision="bf16" if device == "cuda" else "fp32",
        compile=device == "cuda",
    )  # fmt: skip
    model, seconds = trained(task, config)
    model.save(ROOT / "runs" / "recipes" / f"{name}.safetensors")
    return {"steps": config.steps, "seconds": seconds, "predictor": decoder.predictor(model)}


def refiner_recipe(name: str, device: str, scale: float) -> dict[str, Any]:
    recipe = REFINERS[name]
    which, model = recipe.get("data", "stretch"), recipe.get("model", "cvs-refine")
    weights = ROOT / "runs" / "recipes" / f"{recipe.get('decoder', 'stretch')}.safetensors"
    while not weights.exists():  # another process is making them
        time.sleep(2)
    renderer = decoder.predictor(Decoder.load(weights, device))
    task = arms.make_task(
        model, "compact", training_data(which, 8), batch_size=256, seed=0, device=device,
        ground_truth=which == "furniture", renderer=renderer,
        parameterisation=recipe.get("parameterisation", "consistency"),
    )  # fmt: skip
    config = full_config(
        max(2, int(scale * recipe.get("steps", 1000))),
        lr=1e-3, precision="bf16" if device == "cuda" else "fp32",
    )  # fmt: skip
    network, seconds = trained(task, config)
    predict = arms.predictor(model, network, renderer=renderer)
    return {"steps": config.steps, "seconds": seconds, "predictor": predict, "rival": renderer}


def table(folder: Path) -> str:
    """Markdown of the recipes that have been run."""
    text = "# Recipes, chosen on B\n\n`python benchmarks/recipes.py`; trained on A once (seed 0), "
    text += "judged on the 213 objects of B; dB over black / over white.\n"
    for title, recipes, over in (
        ("Decoders: dB over copying the input", DECODERS, "copy"),
        ("Refining networks: dB over the render that they refine", REFINERS, "render"),
    ):
        rows, missing = [], []
        for name, recipe in recipes.items():
            path = folder / f"{name}.json"
            if not path.exists():
                missing.append(f"{name} ({recipe['about']})")
                continue
            found = json.loads(path.read_text())
            row = {"recipe": f"**{name}** {recipe['about']}", "steps": str(found["steps"])}
            row["s"] = f"{found['seconds']:.0f}"
            row["commit"] = (found["commit"] or "")[:7]
            for k, (name_of_bin, _) in enumerate(AZIMUTH_BINS):
                row[name_of_bin] = " / ".join(
                    f"{found['ours'][m][k] - found[over][m][k]:+.2f}" for m in METRICS[:2]
                )
            for metric, word in (("luminance_ratio", "light"), ("coverage_ratio", "area")):
                low, high = min(found["ours"][metric]), max(found["ours"][metric])
                row[word] = f"{low:.2f} to {high:.2f}"
            rows.append(row)
        text += f"\n## {title}\n\n{evaluate.format_rows(rows) or 'None has run.'}\n"
        if missing:
            text += f"\nNot run: {'; '.join(missing)}.\n"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", default="", help="these recipes, such as two,eight")
    parser.add_argument("--scale", type=float, default=1.0, help="of the steps, for a rehearsal")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "recipes")
    parser.add_argument("--table", action="store_true", help="only write recipes.md")
    arguments = parser.parse_args()
    folder, device = arguments.out, arguments.device
    folder.mkdir(parents=True, exist_ok=True)
    wanted = [name for name in arguments.only.split(",") if name] or [*DECODERS, *REFINERS]
    if arguments.table:
        wanted = []
    truth: ViewTensors | None = None
    for name in wanted:
        with lock_if_free(folder / f"{name}.lock") as mine:
            if not mine or (folder / f"{name}.json").exists():
                continue
            run = decoder_recipe if name in DECODERS else refiner_recipe
            found = run(name, device, arguments.scale)
            if truth is None:
                data = dataset.open(ROOT / "runs" / "data" / "furniture")
                truth = studies.part(data, "B").tensors(device=device)
            result = {
                "steps": found["steps"],
                "seconds": found["seconds"],
                "commit": git_state()["commit"],
                "ours": judged(found["predictor"], truth),
            }
            if "rival" in found:
                result["render"] = judged(found["rival"], truth)
            else:
                result["copy"] = judged(evaluate.baselines(truth)["copy_input"], truth)
            (folder / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
            print(f"{name}: {found['seconds']:.0f} s, {result}", flush=True)
    print(table(folder))
    if arguments.table:
        (Path(__file__).parent / "recipes.md").write_text(table(folder))


if __name__ == "__main__":
    main()
