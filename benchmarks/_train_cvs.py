"""train.py: how fast the CVS trains, lever by lever, and the whole loop of `train.fit`."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from _train_bench import PREDICTED, Bench, attempt, config_of, per_step, profiled, scale, synthetic
from torch.utils.flop_counter import FlopCounterMode

from fresnel.data.dataset import ViewTensors
from fresnel.gate import verdict as gate
from fresnel.host import machine as surroundings
from fresnel.models.cvs import CVS, CVSConfig
from fresnel.models.unet import count_parameters
from fresnel.training.cvs_task import CVSTask
from fresnel.training.loop import fit
from fresnel.training.step import Stepper, kernels


def cvs_task(bench: Bench, size: str, batch: int, views: ViewTensors, **changes: Any) -> CVSTask:
    torch.manual_seed(0)
    network = CVS(CVSConfig.preset(size, image_size=views.rgb.shape[2], **changes))
    return CVSTask(
        network, views, batch_size=batch, mirror=True, colour_jitter=0.3, device=bench.device
    )


def cvs_flops(size: str, image_size: int) -> tuple[int, int]:
    """FLOP a sample of the network: forward, and forward and backward."""
    with torch.device("meta"):
        network = CVS(CVSConfig.preset(size, image_size=image_size))
        x = torch.zeros(1, 4, image_size, image_size)
        cond = torch.zeros(1, 16, image_size, image_size)
        with FlopCounterMode(display=False) as counter:
            out = network(x, torch.ones(1), cond)
            forward = counter.get_total_flops()
            out.sum().backward()
    return forward, counter.get_total_flops()


def section_cvs(bench: Bench) -> None:
    size, pixels, batch, steps = scale(bench)
    views = synthetic(500 if bench.gpu else 64, 8, pixels, bench.device)
    forward, both = cvs_flops(size, pixels)
    parameters = count_parameters(CVS(CVSConfig.preset(size)))
    bench.say(
        f"CVS '{size}': {parameters / 1e6:.1f} M parameters, {pixels} px, batch {batch}, "
        f"{both / 1e9:.1f} GFLOP a sample forward and backward ({forward / 1e9:.1f} forward)"
    )
    bench.say("")
    bench.say(
        "| lever | samples/s | TFLOP/s | of the matrix rate | predicted | measured | peak GB |"
    )
    bench.say("|:--|--:|--:|--:|--:|--:|--:|")
    before = 0.0

    def row(name: str, seconds: float, flops: float = both) -> None:
        nonlocal before
        speed = batch / seconds
        rate = speed * flops
        gain = speed / before if before else 1.0
        memory = surroundings.peak_memory(bench.device) / 1e9
        bench.say(
            f"| {name} | {speed:,.1f} | {rate / 1e12:.2f} | {rate / bench.rate:.0%} | "
            f"{PREDICTED.get(name, 1.0):.2f}x | {gain:.2f}x | {memory:.1f} |"
        )
        bench.figures[name] = {"samples_per_s": speed, "flop_per_s": rate, "peak_gb": memory}
        before = speed

    def uncompiled(name: str, precision: str, trials: bool, graphs: bool = False) -> None:
        with kernels(not bench.gpu, bench.device):
            torch.backends.cudnn.benchmark = trials
            surroundings.reset_peak_memory(bench.device)
            config = config_of(bench, precision=precision, graphs=graphs)
            stepper = Stepper(cvs_task(bench, size, batch, views), config)
            row(name, per_step(bench, stepper, 0, 8 if bench.gpu else steps))
            said_of(bench, stepper)

    if not bench.quick:
        attempt(bench, "eager, fp32", uncompiled, "eager, fp32", "fp32", False)
        attempt(bench, "eager, bf16", uncompiled, "eager, bf16", "bf16", False)
    name = "+ cuDNN tries its algorithms" if bench.gpu else "eager, fp32"
    if bench.quick or bench.gpu:
        attempt(bench, name, uncompiled, name, "bf16" if bench.gpu else "fp32", True)
    if bench.gpu:
        attempt(bench, "recorded", uncompiled, "+ steps recorded", "bf16", True, graphs=True)
    with kernels(False, bench.device):
        compiled_levers(bench, cvs_task(bench, size, batch, views), row, both, forward)
    if bench.gpu or not bench.quick:
        loop(bench, size, batch, views, both, forward)


def compiled_levers(
    bench: Bench, task: CVSTask, row: Callable[..., None], both: int, forward: int
) -> None:
    steps, compile_s, compiled_parts = scale(bench)[3], dict[str, float](), dict[str, str]()
    fast = bench.gpu or not bench.quick
    config = config_of(bench, precision="bf16" if fast else "fp32", graphs=False)
    stepper = Stepper(task, config)

    def compiled(name: str, parts: list[str]) -> None:
        surroundings.reset_peak_memory(bench.device)
        compile_s[name] = stepper.compile(parts)
        compiled_parts.update(stepper.compiled)
        row(name, per_step(bench, stepper, 0, steps))

    def recorded(name: str) -> None:
        nonlocal stepper
        stepper = Stepper(task, replace(config, graphs=True))
        surroundings.reset_peak_memory(bench.device)
        row(name, per_step(bench, stepper, 0, steps))
        said_of(bench, stepper)

    def late(name: str) -> None:
        row(name, per_step(bench, stepper, 9_000, steps), both + forward)  # forward only

    if fast:
        name = "+ network compiled"
        attempt(bench, name, compiled, name, ["network"])
        name = "+ batch and loss compiled"
        attempt(bench, name, compiled, name, ["batch", "loss"])
        if bench.gpu:
            name = "compiled, steps recorded"
            attempt(bench, name, recorded, name)
        name = "+ second pass (consistency)"
        attempt(bench, name, late, name)
        spent = ", ".join(f"{name[2:]} {seconds:.0f} s" for name, seconds in compile_s.items())
        bench.say("")
        bench.say(f"Compiling, or loading what the cache holds: {spent}; {compiled_parts}.")
        bench.figures["compile_s"] = compile_s
    bench.say("")
    attempt(bench, "profile", profiled, bench, stepper, 9_000)


def said_of(bench: Bench, stepper: Stepper) -> None:
    if stepper.recorder and not stepper.recorder.count:
        why = stepper.recorder.refused or "no reason given"
        bench.say(f"| (not recorded: {why.replace('|', '/')}) |")


def section_recording(bench: Bench) -> None:
    """Whole steps as CUDA graphs, uncompiled: what launching kernels costs by network and batch."""
    if not bench.gpu:
        bench.say("CUDA graphs need a GPU.")
        return
    sizes = [("compact", 128, 64), ("compact", 128, 256), ("base", 128, 128), ("large", 256, 64)]
    if bench.quick:
        sizes = sizes[1:3]
    bench.say(
        "Samples/s in the denoising half of a run, and late, with the second pass; s to compile."
    )
    bench.say("")
    bench.say(
        "| size | px | batch | eager | recorded | predicted | measured | + batch, loss compiled | "
        "+ network | late | s |"
    )
    bench.say("|:--|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|")

    def measured(size: str, pixels: int, batch: int) -> None:
        torch.compiler.reset()
        views, speeds, compile_s = synthetic(64, 8, pixels, bench.device), list[float](), 0.0
        task = cvs_task(bench, size, batch, views)
        for graphs, parts, first in (
            (False, None, 0), (True, None, 0), (True, ["batch", "loss"], 0),
            (True, ["network"], 0), (True, None, 9_000),
        ):  # fmt: skip
            stepper = Stepper(task, config_of(bench, precision="bf16", graphs=graphs))
            compile_s += stepper.compile(parts) if parts else 0.0
            speeds.append(batch / per_step(bench, stepper, first, 20))
            said_of(bench, stepper)
        columns = [f"{speed:,.0f}" for speed in speeds]
        gains = [f"{PREDICTED[size]:.1f}x", f"{speeds[1] / speeds[0]:.2f}x"]
        cells = [size, str(pixels), str(batch), *columns[:2], *gains, *columns[2:]]
        bench.say(f"| {' | '.join(cells)} | {compile_s:.0f} |")
        bench.figures[f"{size}, {pixels} px, {batch}"] = [*speeds, compile_s]

    with kernels(False, bench.device):
        for row in sizes:
            attempt(bench, row[0], measured, *row)


def loop(bench: Bench, size: str, batch: int, views: ViewTensors, both: int, forward: int) -> None:
    """The whole of `fit`: data, average, log, validation, checkpoints, preview; wall time."""
    steps = (80 if bench.quick else 200) if bench.gpu else 30
    bench.say("")
    bench.say(
        f"`fit`, compiled{' and recorded' if bench.gpu else ''}, {steps} steps, one checkpoint "
        f"each {steps // 2} steps (wall time, less compiling):"
    )
    bench.say("")
    bench.say(
        "| run | samples/s in steps | samples/s in all | TFLOP/s | compile, cached, s | paused, s |"
    )
    bench.say("|:--|--:|--:|--:|--:|--:|")
    runs = [("denoising", 1.0, both), ("consistency", 0.0, both + forward)]

    def measured(name: str, share: float, flops: int) -> None:
        task = cvs_task(bench, size, batch, views, denoising_share=share)
        config = config_of(
            bench, steps=steps, compile=True, precision="bf16", warmup_steps=10,
            log_every=20, validate_every=steps, snapshot_every=steps // 2,
        )  # fmt: skip
        torch.compiler.reset()  # as a new process would start
        with tempfile.TemporaryDirectory() as folder:
            began = time.perf_counter()
            result = fit(task, passing(Path(folder)), config=config, run_dir=Path(folder) / "run")
            wall = time.perf_counter() - began - result.compile_s
        overall = steps * batch / wall
        bench.say(
            f"| {name} | {result.samples_per_s:,.0f} | {overall:,.0f} | "
            f"{result.samples_per_s * flops / 1e12:.1f} | {result.compile_s:.0f} | "
            f"{result.paused_s:.1f} |"
        )
        bench.figures[f"fit, {name}"] = {
            "samples_per_s": result.samples_per_s,
            "samples_per_s_overall": overall,
            "compile_s": result.compile_s,
            "paused_s": result.paused_s,
            "peak_gb": result.peak_memory_bytes / 1e9,
        }

    for name, share, flops in runs[1:] if bench.quick else runs:
        attempt(bench, name, measured, name, share, flops)


def passing(folder: Path) -> Any:
    """A dataset that `fit` takes: the data are in memory here, and fit for timing only."""
    data = SimpleNamespace(path=folder, content_hash="sha256:" + "0" * 64, verify=lambda: None)
    gate.write_receipt(data, "gate", True, "synthetic data of a benchmark")
    return data
