"""How training scales over the GPUs of one machine: samples/s on one card and on all of them.

    python benchmarks/scaling.py [--gpus 2] [--only decoder] [--causes] [--out benchmarks]

A case is a run under torchrun on one card and one on all of them, of the step that `fit` runs,
compiled and recorded: what is timed is the slowest rank's, the median of three runs of steps.
Weak: every card has the batch that one card has. Strong: the cards share it. "all-reduce": of the
flat gradients alone, nothing else under way. Results: scaling.json and scaling.md.

`--causes` takes a step on several cards apart instead, in one run a case: the first card alone, all
cards at once that know nothing of each other, the step that shares gradients without its exchange,
with it, and with it once Python's garbage collector leaves alone what lived before. Then a profile
of one card's steps: see `profiled`. Results: causes.json and causes.md.

Predictions were written before the measurements.
"""

import argparse
import functools
import gc
import json
import re
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile
from train import LATE, Bench

from fresnel.report.provenance import git_state
from fresnel.training import ranks
from fresnel.training.cuda_graphs import Recorded
from fresnel.training.step import Stepper, kernels

HERE = Path(__file__).parent
CASES = {  # name -> preset, pixels, samples a step on one card, first step, predicted: weak, strong
    "CVS 'large', denoising": ("large", 256, 128, 0, (1.97, 1.90)),
    "CVS 'large', consistency": ("large", 256, 128, LATE, (1.97, 1.92)),
    "CVS 'base', denoising": ("base", 128, 128, 0, (1.95, 1.80)),
    "decoder": ("decoder", 128, 16, 0, (1.65, 1.08)),
    "decoder, many": ("decoder", 128, 64, 0, (1.85, 1.50)),
}
SMALL = {
    "CVS 'tiny'": ("tiny", 16, 4, 0, (1.5, 1.0)),
    "decoder": ("decoder", 16, 4, 0, (1.5, 1.0)),
    "decoder, many": ("decoder", 16, 8, 0, (1.5, 1.0)),
}
WAITS = ("Synchronize", "aten::item", "cudaMemcpyAsync", "cudaEventQuery")
"""What names a wait of the host for the GPU, perhaps."""


def stepper_of(bench: Bench, name: str, batch: int, world: int) -> Stepper:
    preset, pixels, *_ = (CASES if bench.gpu else SMALL)[name]
    task: Any = bench.decoder(batch, pixels, 40 if bench.gpu else 8)
    if preset != "decoder":
        task = bench.cvs(preset, pixels, batch)
    stepper = Stepper(task, bench.config(graphs=bench.gpu, accumulate=world))
    if bench.gpu and preset != "decoder":  # a decoder is fastest with its parts recorded
        stepper.compile()
    return stepper


def recorded(stepper: Stepper) -> list[str]:
    """What runs as a CUDA graph: "step", or parts of it."""
    hot = stepper.task.hot.items()
    parts = [part for part, f in hot if isinstance(f, Recorded) and f.flat is not None]
    whole = stepper.recorder is not None and bool(stepper.recorder.graphs)
    return [*parts, "step"] if whole else parts


def measure(device: str, name: str, batches: list[int]) -> None:
    """One rank's part of a case; rank 0 prints a line for each batch."""

    def work(group: ranks.Ranks) -> None:
        first = (CASES | SMALL)[name][3]
        bench = Bench(device, quick=True)
        for batch in batches:
            with kernels(False, bench.device):
                stepper = stepper_of(bench, name, batch, group.world)
                times = max(15, min(40, 640 // batch)) if bench.gpu else 4
                blocks = [bench.step_s(stepper, first, times) for _ in range(3)]
                seconds, reduce_s = torch.tensor(blocks), 0.0
                flat = stepper.shared.flat if stepper.shared else torch.zeros(0)
                if group.world > 1:
                    dist.all_reduce(seconds, dist.ReduceOp.MAX)
                    reduce_s = bench.timed(functools.partial(dist.all_reduce, flat), 20)
            found = {"batch": batch, "seconds": float(seconds.median()), "all_reduce_s": reduce_s}
            found |= {"blocks_s": seconds.tolist(), "megabytes": flat.numel() * 4e-6}
            found |= {"recorded": recorded(stepper), "matrix_flop_per_s": bench.rate}
            if group.first:
                print(json.dumps(found), flush=True)
            del stepper

    ranks.main(work, device)


def take_apart(device: str, name: str, batch: int) -> None:
    """One rank's part of `--causes`; rank 0 prints a line for each way."""

    def work(group: ranks.Ranks) -> None:
        bench = Bench(device, quick=True)
        count = 60 if bench.gpu else 4

        def warm(stepper: Stepper) -> Stepper:
            for k in range(16 if bench.gpu else 1):  # recordings start with the fourth
                stepper.train(k)
            bench.wait()
            group.any(False)
            return stepper

        def steps(stepper: Stepper) -> list[float]:
            """Milliseconds of each step, as the host sees them; the last waits for the card."""
            times = []
            for k in range(count):
                began = time.perf_counter()
                stepper.train(20 + k)
                if k == count - 1:
                    bench.wait()
                times.append((time.perf_counter() - began) * 1e3)
            return times

        def told(way: str, times: list[float]) -> None:
            all_ = torch.zeros(group.world, count)
            all_[group.rank] = torch.tensor(times)
            dist.all_reduce(all_)
            if group.first:
                each = [sorted(some) for some in all_.tolist() if any(some)]
                found = [{"mean_ms": statistics.mean(some), "median_ms": some[count // 2],
                          "p95_ms": some[int(0.95 * count)], "most_ms": some[-1]}
                         for some in each]  # fmt: skip
                slowest = all_.max(dim=0).values.mean()
                line = {"way": way, "ranks": found, "slowest_each_step_ms": float(slowest)}
                print(json.dumps(line), flush=True)

        with kernels(False, bench.device):
            with mock.patch.object(ranks, "current", ranks.Ranks):
                alone = warm(stepper_of(bench, name, batch, 1))
            nothing: list[float] = [0.0] * count
            told("the first card alone", steps(alone) if group.first else nothing)
            told("all at once, apart", steps(alone))
            together = warm(stepper_of(bench, name, batch, group.world))
            with mock.patch.object(dist, "all_reduce"):
                times = steps(together)
            told("shared, without the exchange", times)
            told("shared", steps(together))
            gc.collect()
            gc.freeze()
            told("shared, collector frozen", steps(together))
            if group.first:
                found = {"recorded": recorded(alone)} | profiled(bench, alone)
                print(json.dumps(found), flush=True)
            group.any(False)

    ranks.main(work, device)


def profiled(bench: Bench, stepper: Stepper, steps: int = 8) -> dict[str, Any]:
    """What one card does in a step, and what the host does meanwhile, of each step: kernels, time
    in which the card does anything, launches, calls in which the host may wait. The profiler slows
    the host but hardly a kernel: compare with an unprofiled step's time."""
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * bench.gpu
    with profile(activities=kinds) as record:
        began = time.perf_counter()
        for k in range(steps):
            stepper.train(100 + k)
        bench.wait()
        wall = time.perf_counter() - began
    with tempfile.TemporaryDirectory() as folder:
        record.export_chrome_trace(f"{folder}/trace.json")
        trace = json.loads(Path(f"{folder}/trace.json").read_text())
    return {"profiled_step_ms": wall / steps * 1e3, **summed(trace["traceEvents"], steps)}


def summed(events: list[dict[str, Any]], steps: int) -> dict[str, Any]:
    """Of a trace in Chrome's format, whose times are microseconds."""
    spans = [e for e in events if e.get("ph") == "X" and "dur" in e]
    on_card = [e for e in spans if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    busy, until = 0.0, 0.0
    for start, end in sorted((float(e["ts"]), float(e["ts"]) + e["dur"]) for e in on_card):
        busy += max(0.0, end - max(start, until))
        until = max(until, end)

    def table(chosen: list[dict[str, Any]], most: int) -> list[tuple[str, float, float]]:
        names = {str(e["name"]) for e in chosen}
        rows = [(n[:90], [e["dur"] for e in chosen if e["name"] == n]) for n in names]
        found = [(n, round(len(d) / steps, 2), round(sum(d) / steps / 1e3, 3)) for n, d in rows]
        return sorted(found, key=lambda row: -row[2])[:most]

    calls = [e for e in spans if e.get("cat") in ("cuda_runtime", "cuda_driver")]
    launches = [e for e in calls if "aunch" in e["name"]]
    waits = [e for e in spans if any(word in e["name"] for word in WAITS)]
    return {
        "card_busy_ms": busy / steps / 1e3,
        "kernels": sum(e["cat"] == "kernel" for e in on_card) / steps,
        "launches": len(launches) / steps,
        "launches_ms": sum(e["dur"] for e in launches) / steps / 1e3,
        "waits (calls, ms)": table(waits, 8),
        "host calls (calls, ms)": table(calls, 12),
        "card (calls, ms)": table(on_card, 25),
        "host operators (calls, ms)": table([e for e in spans if e.get("cat") == "cpu_op"], 25),
    }


def started(given: Any, name: str, gpus: int, *more: str) -> list[dict[str, Any]]:
    """The lines of a case's run; those before an error, or the time limit, if there are any."""
    case = ["--device", given.device, "--case", name, *more]
    command = [*ranks.torchrun(gpus), str(HERE / "scaling.py"), *case]
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        try:
            asked = {"stdout": out, "stderr": errors, "timeout": given.limit}
            code = subprocess.run(command, **asked).returncode
        except subprocess.TimeoutExpired:
            code = 124
        said = [file.seek(0) or file.read() for file in (out, errors)]
    lines = [json.loads(line) for line in said[0].splitlines() if line.startswith("{")]
    if code:
        print(f"{name} on {gpus}: ended with {code}: {said[1][-2000:]}", flush=True)
    if not lines:
        raise RuntimeError(f"{name} on {gpus}: gave nothing")
    return lines


def written(path: Path, cards: int, rows: list[dict[str, Any]], lines: list[str]) -> None:
    """After each case: a run that is cut leaves what it has."""
    kind = f"{cards} x {torch.cuda.get_device_name()}" if cards else "CPU processes"
    about = f"{kind}, torch {torch.__version__}, commit {str(git_state()['commit'])[:7]}"
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {"machine": about, "rows": rows}
    path.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    text = ["# Several GPUs", "", "`python benchmarks/scaling.py`", "", about, "", *lines]
    path.with_suffix(".md").write_text("\n".join(text) + "\n")


def scaled(given: Any, name: str) -> list[tuple[dict[str, Any], str]]:
    """A case's rows and their lines of the table."""
    *_, batch, _, predicted = (CASES if given.device == "cuda" else SMALL)[name]
    count = given.gpus
    one = started(given, name, 1, "--batches", str(batch))[0]
    found = []
    several = started(given, name, count, "--batches", f"{batch},{batch // count}")
    for kind, all_, wanted in zip(("weak", "strong"), several, predicted, strict=False):
        each = all_["batch"]
        speeds = batch / one["seconds"], each * count / all_["seconds"]
        row = {"case": name, "scaling": kind, "one": one, "all": all_, "batch": each}
        share = all_["all_reduce_s"] / all_["seconds"]
        cells = [name, kind, each, *(f"{s:,.1f}" for s in speeds), f"{wanted:.2f}x"]
        cells += [f"{speeds[1] / speeds[0]:.2f}x", f"{all_['megabytes']:.0f}"]
        cells += [f"{all_['all_reduce_s'] * 1e3:.2f}", f"{share:.1%}"]
        row |= {"samples_per_s": speeds, "predicted": wanted}
        found.append((row, f"| {' | '.join(map(str, cells))} |"))
    return found


def caused(given: Any, name: str) -> list[tuple[dict[str, Any], str]]:
    """A case's ways, and the profile."""
    batch = (CASES if given.device == "cuda" else SMALL)[name][2]
    found = []
    for row in started(given, name, given.gpus, "--causes", "--batches", str(batch)):
        if "way" in row:
            cells = [name, row["way"], f"{max(r['mean_ms'] for r in row['ranks']):.2f}"]
            for key in ("median_ms", "p95_ms", "most_ms"):
                cells.append(", ".join(f"{r[key]:.2f}" for r in row["ranks"]))
            line = f"| {' | '.join([*cells, format(row['slowest_each_step_ms'], '.2f')])} |"
        else:
            line = "\nProfile of a step on the first card alone:\n"
            for key, value in row.items():
                if isinstance(value, float):
                    line += f"\n- {key}: {value:.2f}"
                else:  # rows, of names or of name, calls, ms
                    rows = [v if isinstance(v, str) else f"`{v[0]}` {v[1]}, {v[2]}" for v in value]
                    line += "".join([f"\n- {key}:", *(f"\n  - {each}" for each in rows)])
        found.append(({"case": name, **row}, line))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--gpus", type=int, default=torch.cuda.device_count() or 2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", default="", help="cases whose names match this")
    parser.add_argument("--causes", action="store_true", help="take a step on several apart")
    parser.add_argument("--case", help="be a process of this case")
    parser.add_argument("--batches", default="")
    parser.add_argument("--limit", type=float, default=400.0, help="seconds, of each run")
    parser.add_argument("--out", type=Path, default=HERE)
    given = parser.parse_args()
    if given.case:
        batches = [int(number) for number in given.batches.split(",")]
        if given.causes:
            take_apart(given.device, given.case, batches[0])
        measure(given.device, given.case, batches)
    count, gpu = given.gpus, given.device == "cuda"
    heads = ["what", "scaling", "samples a card", "1 card, samples/s", f"{count} cards"]
    heads += ["predicted", "measured", "gradients, MB", "all-reduce, ms", "of the step"]
    if given.causes:
        heads = ["what", "how", "mean ms, slowest card", "median of each", "95 %", "most"]
        heads += ["mean of each step's slowest"]
    lines, rows = [f"| {' | '.join(heads)} |", "|:--|:--" + "|--:" * (len(heads) - 2) + "|"], []
    for name in CASES if gpu else SMALL:
        if not re.search(given.only, name):
            continue
        try:
            for row, line in (caused if given.causes else scaled)(given, name):
                rows.append(row)
                lines.append(line)
                print(line, flush=True)
            path = given.out / ("causes" if given.causes else "scaling")
            written(path, count if gpu else 0, rows, lines)
        except RuntimeError as error:  # the others are worth having
            print(error, flush=True)


if __name__ == "__main__":
    main()
