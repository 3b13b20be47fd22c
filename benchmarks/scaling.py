"""How training scales over the GPUs of one machine: samples/s on one card and on all of them.

    python benchmarks/scaling.py [--gpus 2] [--only decoder] [--out benchmarks]

Each line is a run of its own under torchrun, on one card too, of the step that `fit` runs, compiled
and recorded: what is timed is the slowest rank's. Weak: every card has the batch that one card has.
Strong: the cards share it. "all-reduce": of the flat gradients alone, nothing else under way.
Predictions were written before the measurements. Results: scaling.json and scaling.md.
"""

import argparse
import json
import subprocess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from train import LATE, Bench

from fresnel.report.provenance import git_state
from fresnel.training import ranks
from fresnel.training.step import Stepper, kernels

HERE = Path(__file__).parent
CASES = {  # name -> preset, pixels, samples a step on one card, first step, predicted: weak, strong
    "CVS 'large', denoising": ("large", 256, 128, 0, (1.97, 1.90)),
    "CVS 'large', consistency": ("large", 256, 128, LATE, (1.97, 1.92)),
    "CVS 'base', denoising": ("base", 128, 128, 0, (1.95, 1.80)),
    "decoder": ("decoder", 128, 16, 0, (1.90, 1.40)),
}
SMALL = {"CVS 'tiny'": ("tiny", 16, 4, 0, (1.5, 1.0))}


def measure(device: str, name: str, batch: int) -> None:
    """One rank's part of a case; rank 0 prints what was found as its last line."""

    def work(group: ranks.Ranks) -> None:
        preset, pixels, _, first, _ = (CASES | SMALL)[name]
        bench = Bench(device, quick=True)
        config = bench.config(graphs=bench.gpu, accumulate=group.world)
        task: Any = bench.decoder(batch, pixels, 40)
        if preset != "decoder":
            task = bench.cvs(preset, pixels, batch)
        with kernels(False, bench.device):
            stepper = Stepper(task, config)
            if bench.gpu and preset != "decoder":  # a decoder is fastest with its parts recorded
                stepper.compile()
            seconds = torch.tensor(bench.step_s(stepper, first, 40 if bench.gpu else 4))
            reduce_s = 0.0
            if group.world > 1 and stepper.shared:
                dist.all_reduce(seconds, dist.ReduceOp.MAX)
                reduce_s = bench.timed(lambda: dist.all_reduce(stepper.shared.flat), 20)
        recorded = stepper.recorder is not None and stepper.recorder.refused is None
        megabytes = stepper.shared.flat.numel() * 4e-6 if stepper.shared else 0.0
        found = {"seconds": float(seconds), "all_reduce_s": reduce_s, "megabytes": megabytes}
        if group.first:
            print(json.dumps(found | {"recorded": recorded, "matrix_flop_per_s": bench.rate}))

    ranks.main(work, device)


def started(device: str, name: str, gpus: int, batch: int) -> dict[str, Any]:
    case = ["--device", device, "--case", name, "--batch", str(batch)]
    command = [*ranks.torchrun(gpus), str(HERE / "scaling.py"), *case]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    if done.returncode:
        raise RuntimeError(f"{name} on {gpus}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def written(out: Path, cards: int, rows: list[dict[str, Any]], lines: list[str]) -> None:
    """After each line: a run that is cut leaves what it has."""
    kind = f"{cards} x {torch.cuda.get_device_name()}" if cards else "CPU processes"
    about = f"{kind}, torch {torch.__version__}, commit {str(git_state()['commit'])[:7]}"
    out.mkdir(parents=True, exist_ok=True)
    record = {"machine": about, "rows": rows}
    (out / "scaling.json").write_text(json.dumps(record, indent=1) + "\n")
    text = ["# Several GPUs", "", "`python benchmarks/scaling.py`", "", about, "", *lines]
    (out / "scaling.md").write_text("\n".join(text) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--gpus", type=int, default=torch.cuda.device_count() or 2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", default="", help="cases whose names hold this")
    parser.add_argument("--case")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--out", type=Path, default=HERE)
    given = parser.parse_args()
    if given.case:
        measure(given.device, given.case, given.batch)
    count, gpu = given.gpus, given.device == "cuda"
    heads = (
        "what",
        "scaling",
        "samples a card",
        "1 card, samples/s",
        f"{count} cards",
        "predicted",
    )
    heads += ("measured", "gradients, MB", "all-reduce, ms", "of the step")
    lines, rows = [f"| {' | '.join(heads)} |", "|:--|:--" + "|--:" * (len(heads) - 2) + "|"], []
    for name, (_, _, batch, _, predicted) in (CASES if gpu else SMALL).items():
        if given.only not in name:
            continue
        try:
            one = started(given.device, name, 1, batch)
            for kind, each, wanted in zip(
                ("weak", "strong"), (batch, batch // count), predicted, strict=True
            ):
                all_ = started(given.device, name, count, each)
                speeds = batch / one["seconds"], each * count / all_["seconds"]
                rows.append({"case": name, "scaling": kind, "one": one, "all": all_} | {
                    "batch": each, "samples_per_s": speeds, "predicted": wanted})  # fmt: skip
                share = all_["all_reduce_s"] / all_["seconds"]
                cells = [name, kind, each, *(f"{s:,.1f}" for s in speeds), f"{wanted:.2f}x"]
                cells += [f"{speeds[1] / speeds[0]:.2f}x", f"{all_['megabytes']:.0f}"]
                cells += [f"{all_['all_reduce_s'] * 1e3:.2f}", f"{share:.1%}"]
                lines.append(f"| {' | '.join(map(str, cells))} |")
                print(lines[-1], flush=True)
                written(given.out, count if gpu else 0, rows, lines)
        except (RuntimeError, subprocess.TimeoutExpired) as error:  # the others are worth having
            print(f"{name}: {error}", flush=True)


if __name__ == "__main__":
    main()
