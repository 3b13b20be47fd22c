"""Muon against AdamW: tiny decoders at 32 px, on objects that they have not seen.

    python benchmarks/optimizers.py DATA TEST OUT.json [--steps 2000] [--seed 0 1 2] [--objects 30]

DATA and TEST are folders of views that the gate let through. The same steps, batches and seeds by
each optimizer; means over TEST's objects as JSON, and a table. What is there already stays. As many
threads as OMP_NUM_THREADS says.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from fresnel import gate
from fresnel.analysis import stats
from fresnel.data import dataset
from fresnel.evaluation import metrics
from fresnel.host.files import write_atomic
from fresnel.models import decoder
from fresnel.study import arms
from fresnel.training.loop import fit
from fresnel.training.task import TrainConfig

OPTIMIZERS = ("adamw", "muon")
SIDE, SHOWN = 32, ("psnr", "ssim", "perceptual", "luminance_ratio")


def main(given: argparse.Namespace) -> None:
    data, test = dataset.open(given.data), dataset.open(given.test)
    receipt, views, device = gate.require_receipt(data), data.tensors(size=SIDE), "cpu"
    chosen = np.random.default_rng(0).permutation(len(test))[: given.objects].tolist()
    truth, measures = test.tensors(size=SIDE)[chosen], metrics.find_measures(device)
    found: dict[str, Any] = json.loads(given.out.read_text()) if given.out.exists() else {}
    for seed, optimizer in ((s, o) for s in given.seed for o in OPTIMIZERS):
        if (name := f"{optimizer}-s{seed}") not in found:
            task = arms.make_task(
                "decoder", "tiny", views, seed=seed, ground_truth=True, batch_size=16, device=device
            )
            config = TrainConfig(
                steps=given.steps, seed=seed, optimizer=optimizer, validate_every=0,
                snapshot_every=0,
            )  # fmt: skip
            place = given.out.with_name(f"run-{name}")
            result = fit(task, config=config, run_dir=place, receipt=receipt)
            rows = metrics.evaluate(
                decoder.predictor(result.ema_model), truth, measures=measures, progress=False
            )
            last = [row["loss"] for row in result.history[-10:]]
            found[name] = {"steps_per_s": result.samples_per_s / 16, "loss": float(np.mean(last))}
            found[name] |= {m: metrics.by_object(rows, m)["all"] for m in SHOWN}
            write_atomic(given.out, json.dumps(found).encode())
    print("\n".join(table(found)))


def table(found: dict[str, Any]) -> list[str]:
    """Of each optimizer means over seeds and objects with their 95 % intervals; over seeds of the
    steps a second, and of the loss in the last 200 steps."""
    lines = [f"| | steps/s | loss | {' | '.join(SHOWN)} |", "|---|--:|--:|" + "--:|" * len(SHOWN)]
    for optimizer in OPTIMIZERS:
        runs = [one for name, one in sorted(found.items()) if name.startswith(optimizer)]
        if not runs:
            continue
        cells = [f"{np.mean([one[key] for one in runs]):.3g}" for key in ("steps_per_s", "loss")]
        for metric in SHOWN:
            values = np.array([[*one[metric].values()] for one in runs])
            cells.append(stats.over_objects(values).text(3 if metric == "ssim" else 2))
        lines.append(f"| {optimizer}, {len(runs)} seeds | {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("data", "test", "out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--objects", type=int, default=30)
    parser.add_argument("--seed", type=int, nargs="*", default=[0, 1, 2])
    main(parser.parse_args())
