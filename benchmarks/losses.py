"""Which loss is good for what: the CVS of heads that ships, trained on by each, three seeds.

    python benchmarks/losses.py train DATA OUT [--steps 400] [--seed 0 ...]
    python benchmarks/losses.py judge OUT TEST [--objects 20]

From scratch, a short training by any of them does not denoise yet, so that nothing can be said of
it (docs/study.md); these start from weights that do. "train": the same views, steps and seeds by
easy consistency tuning, by denoising at all levels, and by regression in one step. "judge": one,
two, four (and 18) calls on TEST's objects, beside the weights that all began with; by object, as
JSON (OUT/losses.json) and as a table.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fresnel import gate
from fresnel.analysis import stats
from fresnel.data import dataset
from fresnel.evaluation import metrics
from fresnel.host import machine
from fresnel.host.files import write_atomic
from fresnel.models import cvs
from fresnel.study import arms, results
from fresnel.training.loop import fit
from fresnel.training.task import TrainConfig

LOSSES: dict[str, dict[str, Any]] = {
    "consistency": {"objective": "consistency"},
    "diffusion": {"objective": "diffusion"},
    "regression": {"parameterisation": "regression"},
}
SHOWN = ("psnr", "ssim", "perceptual", "edge_energy_ratio", "luminance_ratio")
BEFORE = "before"


def train(given: argparse.Namespace) -> None:
    data, device = dataset.open(given.data), machine.pick_device()
    receipt, views = gate.require_receipt(data), data.tensors(size=128)
    for name, seed in ((name, seed) for name in LOSSES for seed in given.seed):
        task = arms.make_task(
            "cvs", "compact", views, seed=seed, initial_weights="shipped", domain="faces",
            batch_size=128, device=device, **LOSSES[name],
        )  # fmt: skip
        config = TrainConfig(
            steps=given.steps, lr=5e-4, seed=seed, validate_every=0, snapshot_every=0,
            precision="bf16" if device == "cuda" else "fp32",
        )  # fmt: skip
        result = fit(
            task, config=config, run_dir=given.out / f"run-{name}-s{seed}", receipt=receipt
        )
        result.ema_model.save(given.out / f"{name}-s{seed}.safetensors", half=True)
        print(f"{name}-s{seed}: {result.samples_per_s:.0f} samples/s, {result.duration_s:.0f} s")


@torch.no_grad()
def judge(given: argparse.Namespace) -> None:
    data, place = dataset.open(given.test), given.out / "losses.json"
    chosen = np.random.default_rng(0).permutation(len(data))[: given.objects].tolist()
    truth = data.tensors(size=128)[chosen]
    networks = {BEFORE: cvs.load_shipped(domain="faces")}
    networks |= {p.stem: cvs.CVS.load(p) for p in sorted(given.out.glob("*-s?.safetensors"))}
    found: dict[str, Any] = json.loads(place.read_text()) if place.exists() else {}
    measures = metrics.find_measures()

    def keep() -> None:
        write_atomic(place, json.dumps(found).encode())

    for name, network in networks.items():
        one = found.setdefault(name, {})
        if "noise_left" not in one:
            one["noise_left"] = results.noise_shares(network, truth, 0, most=given.objects)["left"]
            keep()
        for steps in (1, 2, 4, 18) if name.startswith("diffusion") else (1, 2, 4):
            if str(steps) in one:
                continue
            rows = metrics.evaluate(
                cvs.predictor(network, steps), truth, measures=measures, progress=False
            )
            one[str(steps)] = {m: metrics.by_object(rows, m)["all"] for m in SHOWN}
            keep()
            print(name, steps, flush=True)
    print("\n".join(table(found)))


def table(found: dict[str, Any]) -> list[str]:
    """Means over seeds and objects with their 95 % intervals, of each loss and number of calls."""
    lines = [
        f"| trained on by | calls | {' | '.join(SHOWN)} | noise left |",
        "|---|--:|" + "--:|" * 6,
    ]
    for loss in (BEFORE, *LOSSES):
        seeds = [found[name] for name in sorted(found) if name.startswith(loss)]
        for calls in ("1", "2", "4", "18"):
            if not seeds or any(calls not in one for one in seeds):
                continue
            cells = []
            for metric in SHOWN:
                values = np.array([[*one[calls][metric].values()] for one in seeds])
                digits = 3 if metric == "ssim" else 2 if "ratio" in metric else 1
                cells.append(
                    stats.over_objects(values).text(digits).replace("\N{NO-BREAK SPACE}", " ")
                )
            left = stats.each([one["noise_left"][1] for one in seeds]).text(3)
            lines.append(f"| {loss} | {calls} | {' | '.join(cells)} | {left.split(' [')[0]} |")
    return lines


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    jobs = parser.add_subparsers(required=True)
    one = jobs.add_parser("train")
    one.add_argument("data", type=Path)
    one.add_argument("out", type=Path)
    one.add_argument("--steps", type=int, default=400)
    one.add_argument("--seed", type=int, nargs="*", default=[0, 1, 2])
    one.set_defaults(run=train)
    one = jobs.add_parser("judge")
    one.add_argument("out", type=Path)
    one.add_argument("test", type=Path)
    one.add_argument("--objects", type=int, default=20)
    one.set_defaults(run=judge)
    given = parser.parse_args()
    given.run(given)
