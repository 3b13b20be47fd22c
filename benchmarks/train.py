"""How fast training is, where a step's time goes, and what every lever gains.

    python benchmarks/train.py [--quick] [--sections cvs,decoder,...] [--out benchmarks]

Each section prints a table as soon as it has one, and one that fails leaves the others alone.
Results go to train_gpu.json or train_cpu.json, and train.md is written anew from both; a section
that is not run keeps what it had. Predictions were written before the measurements.

    cvs        samples/s of the CVS: levers one by one; what a step's time goes to, and whether
               anything in it waits for the device; then the whole loop of `train.fit`
    decoder    views/s of the decoder, through the renderer, and what a step's time goes to
    optimizer  fused AdamW and foreach averages against plain ones
    memory     peak memory and samples/s by size and batch; gradient checkpointing
    trial      the batch found by trial, with the whole card and as on one of 16 GB
    agree      losses over 200 steps with each lever off and on; the same bits twice

On a CPU: the small network at 64 px; on a GPU: the large one at 256 px.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fresnel import gate, surroundings
from fresnel._step import Stepper
from fresnel.batch_size import find_batch_size
from fresnel.cameras import Cameras, orbit
from fresnel.cvs import CVS, CVSConfig
from fresnel.cvs_task import CVSTask
from fresnel.dataset import InputImages, ViewTensors
from fresnel.networks import count_parameters
from fresnel.provenance import git_state
from fresnel.train import OutOfMemory, TrainConfig, fit

# lever -> factor in samples/s that was expected of it, over the line before it
PREDICTED = {
    "eager, fp32": 1.0,
    "eager, bf16": 2.0,
    "+ cuDNN tries its algorithms": 1.1,
    "+ network compiled": 2.0,
    "+ batch and loss compiled": 1.2,
    "+ second pass (consistency)": 0.75,
    "compiled": 1.5,
    "compiled, CUDA graphs": 2.2,
    "fused AdamW over foreach": 1.5,
    "foreach average over a loop": 3.0,
    "checkpointing": 0.77,
}
DECODER_TARGET, CVS_TARGET = 3000, 1000


@dataclass
class Bench:
    """The machine, what is measured on it, and the lines of the section under way."""

    device: torch.device
    quick: bool
    lines: list[str] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
    rate: float = 0.0  # measured matrix rate, FLOP/s

    @property
    def gpu(self) -> bool:
        return self.device.type == "cuda"

    def say(self, line: str) -> None:
        print(line, flush=True)
        self.lines.append(line)

    def synchronize(self) -> None:
        if self.gpu:
            torch.cuda.synchronize()


def matrix_rate(bench: Bench) -> float:
    """FLOP/s of a large square matrix product: bf16 on a GPU, float32 on a CPU."""
    n, kind = (8192, torch.bfloat16) if bench.gpu else (2048, torch.float32)
    a, b = (torch.randn(n, n, device=bench.device, dtype=kind) for _ in range(2))
    for _ in range(3):
        a @ b
    bench.synchronize()
    began, rounds = time.perf_counter(), 10
    for _ in range(rounds):
        a @ b
    bench.synchronize()
    return rounds * 2 * n**3 / (time.perf_counter() - began)


def synthetic(objects: int, views: int, size: int, device: torch.device) -> ViewTensors:
    """Coloured balls before black, uint8 on the device: only shapes and types matter here."""
    generator = torch.Generator(device).manual_seed(0)
    grid = (torch.arange(size, device=device) + 0.5) / size * 2 - 1
    disc = grid**2 + grid[:, None] ** 2 < 0.3
    alpha = (disc.to(torch.uint8) * 255).expand(objects, views, size, size).contiguous()
    rgb = torch.randint(
        60, 255, (objects, views, size, size, 3),
        generator=generator, device=device, dtype=torch.uint8,
    )  # fmt: skip
    rgb *= disc[..., None]

    def cameras(azimuth: torch.Tensor, elevation: torch.Tensor) -> Cameras:
        return orbit(
            azimuth, elevation, 2.2,
            pivot=(0.0, 0.0, 0.0), focal_px=1.2 * size, width=size, height=size,
        ).to(device)  # fmt: skip

    names = tuple(f"ball{i}" for i in range(objects))
    tilt = torch.linspace(0, 30, objects)
    inputs = InputImages(names, rgb[:, 0], alpha[:, 0], cameras(torch.zeros(objects), tilt))
    around = torch.arange(views) * (360.0 / views)
    turned = cameras(around.expand(objects, views), tilt[:, None].expand(objects, views))
    return ViewTensors(names, inputs, rgb, alpha, turned, torch.zeros(objects, 3, device=device))


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


def config_of(bench: Bench, **changes: Any) -> TrainConfig:
    # a long run, of which a few steps are taken: its first are denoising, its last consistency
    base = TrainConfig(steps=10_000, lr=1e-4, precision="bf16" if bench.gpu else "fp32")
    return replace(base, **changes)


def per_step(bench: Bench, stepper: Stepper, first: int, steps: int) -> float:
    """Seconds a step, after two that don't count."""
    for k in range(2):
        stepper.train(first + k)
    bench.synchronize()
    began = time.perf_counter()
    for k in range(steps):
        stepper.train(first + 2 + k)
    bench.synchronize()
    return (time.perf_counter() - began) / steps


def scale(bench: Bench) -> tuple[str, int, int, int]:
    """Network, pixels, batch and timed steps of the headline figures."""
    return ("large", 256, 128, 20) if bench.gpu else ("small", 64, 16, 10)


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

    def eager(precision: str, trials: bool, timed: int) -> float:
        with surroundings.kernels(not bench.gpu, bench.device):
            torch.backends.cudnn.benchmark = trials
            surroundings.reset_peak_memory(bench.device)
            task = cvs_task(bench, size, batch, views)
            return per_step(bench, Stepper(task, config_of(bench, precision=precision)), 0, timed)

    def uncompiled(name: str, precision: str, trials: bool) -> None:
        row(name, eager(precision, trials, 8 if bench.gpu else steps))

    if not bench.quick:
        attempt(bench, "eager, fp32", uncompiled, "eager, fp32", "fp32", False)
        attempt(bench, "eager, bf16", uncompiled, "eager, bf16", "bf16", False)
    name = "+ cuDNN tries its algorithms" if bench.gpu else "eager, fp32"
    if bench.quick or bench.gpu:
        attempt(bench, name, uncompiled, name, "bf16" if bench.gpu else "fp32", True)
    with surroundings.kernels(False, bench.device):
        compiled_levers(bench, cvs_task(bench, size, batch, views), row, both, forward)
    if bench.gpu or not bench.quick:
        loop(bench, size, batch, views, both, forward)


def compiled_levers(
    bench: Bench, task: CVSTask, row: Callable[..., None], both: int, forward: int
) -> None:
    steps, compile_s = scale(bench)[3], {}
    fast = bench.gpu or not bench.quick
    stepper = Stepper(task, config_of(bench, precision="bf16" if fast else "fp32"))

    def compiled(name: str, parts: list[str]) -> None:
        surroundings.reset_peak_memory(bench.device)
        compile_s[name] = stepper.compile(parts)
        row(name, per_step(bench, stepper, 0, steps))

    def late(name: str) -> None:
        row(name, per_step(bench, stepper, 9_000, steps), both + forward)  # forward only

    if fast:
        name = "+ network compiled"
        attempt(bench, name, compiled, name, ["network"])
        name = "+ batch and loss compiled"
        attempt(bench, name, compiled, name, ["batch", "loss"])
        name = "+ second pass (consistency)"
        attempt(bench, name, late, name)
        spent = ", ".join(f"{name[2:]} {seconds:.0f} s" for name, seconds in compile_s.items())
        bench.say("")
        bench.say(f"Compiling, at first: {spent}; {stepper.compiled}.")
        bench.figures["compile_s"] = compile_s
    bench.say("")
    attempt(bench, "profile", profiled, bench, stepper, 9_000)


def attempt(bench: Bench, name: str, act: Callable[..., Any], *given: Any, **named: Any) -> None:
    """Go on with the next line of a table where one can't be measured."""
    try:
        act(*given, **named)
    except Exception as error:
        traceback.print_exc()
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        bench.say(f"| {name} | failed: {reason} |")
        bench.figures[name] = {"failed": reason}


def loop(bench: Bench, size: str, batch: int, views: ViewTensors, both: int, forward: int) -> None:
    """The whole of `fit`: data, average, log, validation, checkpoints, preview; wall time."""
    steps = (80 if bench.quick else 200) if bench.gpu else 30
    bench.say("")
    bench.say(
        f"`fit`, compiled, {steps} steps, one checkpoint each {steps // 2} steps "
        "(wall time, less compiling):"
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


def decoder_task(bench: Bench, objects: int, pixels: int, channels: int) -> Any:
    from fresnel.decoder import DecoderConfig
    from fresnel.decoder_task import DecoderTask

    views = synthetic(64, 8, pixels, bench.device)
    torch.manual_seed(0)
    network = DecoderConfig(image_size=pixels, base_channels=channels)
    return DecoderTask(views, network, batch_size=objects, target_views=3, device=bench.device)


def section_decoder(bench: Bench) -> None:
    objects, pixels, channels = (16, 128, 40) if bench.gpu else (4, 64, 24)
    views = objects * 4
    bench.say(
        f"Decoder, {objects} objects x 4 views, {pixels} px, two Gaussians a pixel; wanted on an "
        f"H100: {DECODER_TARGET:,} views/s."
    )
    bench.say("")
    bench.say("| lever | views/s | ms a step | predicted | measured | peak GB |")
    bench.say("|:--|--:|--:|--:|--:|--:|")
    first = 0.0

    def row(name: str, stepper: Stepper) -> None:
        nonlocal first
        seconds = per_step(bench, stepper, 0, 50 if bench.gpu else 5)
        first = first or seconds
        memory = surroundings.peak_memory(bench.device) / 1e9
        bench.say(
            f"| {name} | {views / seconds:,.0f} | {seconds * 1e3:.1f} | "
            f"{PREDICTED.get(name, 1.0):.1f}x | {first / seconds:.2f}x | {memory:.1f} |"
        )
        bench.figures[name] = {"views_per_s": views / seconds, "step_s": seconds, "gb": memory}

    def compiled(name: str, graphs: bool) -> None:
        nonlocal stepper
        torch.compiler.reset()
        surroundings.reset_peak_memory(bench.device)
        stepper = Stepper(decoder_task(bench, objects, pixels, channels), config_of(bench))
        stepper.task.cuda_graphs = graphs  # type: ignore[attr-defined]
        compile_s = stepper.compile()
        row(name, stepper)
        notes.append(f"{name}: compiling took {compile_s:.0f} s; {stepper.compiled}.")

    notes: list[str] = []
    with surroundings.kernels(False, bench.device):
        surroundings.reset_peak_memory(bench.device)
        stepper = Stepper(decoder_task(bench, objects, pixels, channels), config_of(bench))
        attempt(bench, "eager", row, "eager", stepper)
        if not bench.quick:
            attempt(bench, "compiled", compiled, "compiled", False)
        if bench.gpu:
            name = "compiled, CUDA graphs"
            attempt(bench, name, compiled, name, True)
        for note in notes:
            bench.say("")
            bench.say(note)
        bench.say("")
        attempt(bench, "profile", profiled, bench, stepper, 0)


def profiled(bench: Bench, stepper: Stepper, first: int, rows: int = 14) -> None:
    """Where the time of three steps goes, by kernel; and what waits for the device."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU]
    if bench.gpu:
        activities.append(ProfilerActivity.CUDA)
    stepper.train(first)
    bench.synchronize()
    with profile(activities=activities) as profiler:
        began = time.perf_counter()
        for k in range(3):
            stepper.train(first + k)
        bench.synchronize()
        wall = time.perf_counter() - began
    attribute = "self_device_time_total" if bench.gpu else "self_cpu_time_total"
    found = profiler.key_averages()
    if bench.gpu:  # kernels only: operators report their kernels' time once more
        kernels = [e for e in found if str(e.device_type).endswith("CUDA")]
        found = kernels or found  # type: ignore[assignment]
    events = sorted(found, key=lambda e: -getattr(e, attribute))
    total = sum(getattr(e, attribute) for e in events)
    bench.say(
        f"Three steps: {wall * 1e3:.0f} ms of wall time, {total / 1e3:.0f} ms in "
        f"{sum(e.count for e in events):,} {'kernels' if bench.gpu else 'operators'}."
    )
    bench.say("")
    bench.say("| kernel | share | ms a step | calls a step |")
    bench.say("|:--|--:|--:|--:|")
    for event in events[:rows]:
        spent = getattr(event, attribute)
        name = event.key.replace("|", "/")[:80]
        bench.say(f"| `{name}` | {spent / total:.1%} | {spent / 3e3:.2f} | {event.count / 3:.0f} |")
    if bench.gpu:
        waits = waiting(stepper, first)
        bench.say("")
        bench.say(f"Waits for the device in a step: {len(waits)}" + (":" if waits else "."))
        for line in sorted(set(waits)):
            bench.say(f"- `{line}` ({waits.count(line)} times)")
        bench.figures["waits"] = waits


def waiting(stepper: Stepper, step: int) -> list[str]:
    """Where one step waits for the GPU: file and line of each."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            stepper.train(step)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return [
        f"{Path(str(w.filename)).name}:{w.lineno}"
        for w in caught
        if "synchronizing" in str(w.message)
    ]


def section_optimizer(bench: Bench) -> None:
    """Milliseconds of the parts of a step that touch every parameter."""
    size = scale(bench)[0]
    network = CVS(CVSConfig.preset(size)).to(bench.device)
    average = CVS(CVSConfig.preset(size)).to(bench.device).requires_grad_(False)
    ours, theirs = list(average.parameters()), list(network.parameters())
    for p in theirs:
        p.grad = torch.randn_like(p)
    optimizers = {
        name: torch.optim.AdamW(theirs, lr=1e-4, **options)
        for name, options in (
            ("AdamW, loop", {"foreach": False}),
            ("AdamW, foreach", {"foreach": True}),
            ("AdamW, fused", {"fused": True}),
        )
    }

    @torch.no_grad()
    def looped() -> None:
        for mine, its in zip(ours, theirs, strict=True):
            mine.lerp_(its, 0.01)

    cases: dict[str, Callable[[], Any]] = {name: o.step for name, o in optimizers.items()}
    cases["average, loop"] = looped
    cases["average, foreach"] = torch.no_grad()(lambda: torch._foreach_lerp_(ours, theirs, 0.01))
    cases["clip"] = lambda: nn.utils.clip_grad_norm_(theirs, 1.0)
    bench.say(f"| all parameters of '{size}' | ms |")
    bench.say("|:--|--:|")
    for name, act in cases.items():
        act()
        bench.synchronize()
        began = time.perf_counter()
        for _ in range(10):
            act()
        bench.synchronize()
        spent = (time.perf_counter() - began) / 10
        bench.figures[name] = spent
        bench.say(f"| {name} | {spent * 1e3:.2f} |")


def section_memory(bench: Bench) -> None:
    """Peak memory and samples/s by size and batch, uncompiled, at the run's end."""
    cases: list[tuple[str, int, list[int]]] = [("small", 64, [4, 16, 64])]
    if bench.gpu:
        cases = [
            ("small", 64, [64, 256]),
            ("base", 128, [32, 128]),
            ("large", 256, [8, 32, 128]),
        ]
    elif not bench.quick:
        cases.append(("base", 128, [4, 16]))
    bench.say("| size | px | batch | peak GB | samples/s | checkpointing: GB | samples/s |")
    bench.say("|:--|--:|--:|--:|--:|--:|--:|")
    for size, pixels, batches in cases:
        views = synthetic(16, 8, pixels, bench.device)
        for batch in batches:
            found = []
            for checkpointing in (False, True):
                surroundings.reset_peak_memory(bench.device)
                config = config_of(bench, checkpointing=checkpointing)
                try:
                    stepper = Stepper(cvs_task(bench, size, batch, views), config)
                    seconds = per_step(bench, stepper, 9_000, 3)
                except OutOfMemory:
                    found += ["-", "-"]
                    continue
                finally:
                    stepper = None  # type: ignore[assignment]
                    if bench.gpu:
                        torch.cuda.empty_cache()
                peak = surroundings.peak_memory(bench.device) / 1e9
                found += [f"{peak:.2f}", f"{batch / seconds:,.1f}"]
            bench.say(f"| {size} | {pixels} | {batch} | {' | '.join(found)} |")
            bench.figures[f"{size}/{pixels}/{batch}"] = found


def section_trial(bench: Bench) -> None:
    size, pixels, _, _ = scale(bench)
    views = synthetic(16, 8, pixels, bench.device)
    wanted = 512 if bench.gpu else 64
    bench.say(f"| free memory | {wanted} samples a step of '{size}' | peak GB | trials | s |")
    bench.say("|:--|:--|--:|--:|--:|")
    limits = [("all of it", None), ("16 GB", 16 << 30), ("8 GB", 8 << 30)]
    if not bench.gpu:
        limits = [("all of it", None), ("1 GB", 1 << 30)]
    for name, limit in limits:
        began = time.perf_counter()
        found = find_batch_size(
            lambda b: cvs_task(bench, size, b, views),
            wanted,
            config_of(bench),
            device=bench.device,
            limit_bytes=limit,
        )
        spent = time.perf_counter() - began
        bench.say(
            f"| {name} ({found.free_bytes / 1e9:.1f} GB) | {found.accumulate} x "
            f"{found.batch_size} | {found.peak_bytes / 1e9:.1f} | {found.trials} | {spent:.1f} |"
        )
        bench.figures[name] = {"batch_size": found.batch_size, "trials": found.trials, "s": spent}


def section_agree(bench: Bench) -> None:
    """Losses over 200 steps with levers on, against eager fp32; determinism."""
    views = synthetic(16, 8, 32, bench.device)
    steps = 200

    def losses(task: Any, **changes: Any) -> tuple[torch.Tensor, Stepper]:
        stepper = Stepper(task, TrainConfig(steps=steps, lr=1e-3, **changes))
        with surroundings.kernels(stepper.config.deterministic, bench.device):
            if stepper.config.compile:
                stepper.compile()
            rows = []
            for k in range(steps):
                stepper.train(k)
                if k % 20 == 19:
                    rows.append(stepper.take_terms()["loss"])
        return torch.tensor(rows), stepper

    def cvs() -> CVSTask:
        return cvs_task(bench, "tiny", 16, views)

    def compare(
        name: str, tolerance: float, plain: torch.Tensor, task: Any, **changes: Any
    ) -> None:
        found, stepper = losses(task, **changes)
        worst = float(((found - plain) / plain).abs().max())
        verdict = "" if worst <= tolerance else " **exceeded**"
        how = "; ".join(f"{part}: {way}" for part, way in stepper.compiled.items())
        bench.say(f"| {name} | {worst:.2%} | {tolerance:.0%}{verdict} | {how} |")
        bench.figures[name] = worst

    plain, first = losses(cvs(), deterministic=True)
    again, second = losses(cvs(), deterministic=True)
    same = torch.equal(plain, again) and all(
        torch.equal(a, b)
        for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True)
    )
    bench.say(
        f"Deterministic mode, twice 200 steps: {'the same bits' if same else 'NOT the same'}."
    )
    bench.figures["same_bits"] = same
    bench.say("")
    bench.say("| losses, ten means of 20 steps | largest relative difference | tolerance | |")
    bench.say("|:--|--:|--:|:--|")
    cases: dict[str, tuple[float, dict[str, Any]]] = {
        "cuDNN's choice of kernels": (0.02, {"deterministic": False}),
        "bf16": (0.05, {"precision": "bf16"}),
        "checkpointing": (0.02, {"checkpointing": True}),
        "compiled": (0.02, {"compile": True}),
        "compiled, bf16": (0.05, {"compile": True, "precision": "bf16"}),
    }
    if bench.quick:
        cases = (
            {"compiled, bf16": cases["compiled, bf16"]} if bench.gpu else {"bf16": cases["bf16"]}
        )
    for name, (tolerance, changes) in cases.items():
        attempt(bench, name, compare, name, tolerance, plain, cvs(), **changes)
    if bench.gpu:
        eager, _ = losses(decoder_task(bench, 8, 32, 16))
        name, task = "decoder: compiled, CUDA graphs", decoder_task(bench, 8, 32, 16)
        attempt(bench, name, compare, name, 0.05, eager, task, compile=True)


SECTIONS: dict[str, Callable[[Bench], None]] = {
    "cvs": section_cvs,
    "decoder": section_decoder,
    "optimizer": section_optimizer,
    "memory": section_memory,
    "trial": section_trial,
    "agree": section_agree,
}


def machine(device: torch.device) -> str:
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor()
    name = name or platform.machine()
    threads = "" if device.type == "cuda" else f", {torch.get_num_threads()} threads"
    return f"{name}{threads}, torch {torch.__version__}"


def table(out: Path) -> Iterator[str]:
    yield "# Training speed"
    yield ""
    yield "`python benchmarks/train.py`. Predictions were written before the measurements."
    for kind in ("gpu", "cpu"):
        path = out / f"train_{kind}.json"
        if not path.exists():
            continue
        found = json.loads(path.read_text())
        yield from ("", f"## {found['machine']}")
        yield from ("", f"Large matrix product: {found['matrix_flop_per_s'] / 1e12:.1f} TFLOP/s.")
        for name, section in found["sections"].items():
            yield from ("", f"### {name}", "", *section["lines"])
            yield from ("", f"Commit {section['commit'][:7]}, {section['duration_s']:.0f} s.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--sections", default=",".join(SECTIONS))
    parser.add_argument("--quick", action="store_true", help="leave out what takes minutes")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    bench = Bench(device, arguments.quick)
    bench.rate = matrix_rate(bench)
    path = out / f"train_{'gpu' if bench.gpu else 'cpu'}.json"
    kept = json.loads(path.read_text())["sections"] if path.exists() else {}
    print(f"{machine(device)}; matrix product {bench.rate / 1e12:.2f} TFLOP/s", flush=True)
    for name in arguments.sections.split(","):
        bench.lines, bench.figures = [], {}
        print(f"\n## {name}\n", flush=True)
        began = time.perf_counter()
        try:
            SECTIONS[name](bench)
        except Exception as error:  # the other sections are worth having
            traceback.print_exc()
            bench.say(f"\nFailed: {type(error).__name__}: {error}")
        took = time.perf_counter() - began
        print(f"\n({name}: {took:.0f} s)", flush=True)
        if bench.gpu:
            torch.cuda.empty_cache()
        torch.compiler.reset()
        kept[name] = {
            "lines": bench.lines,
            "figures": bench.figures,
            "duration_s": took,
            "commit": git_state()["commit"],
        }
        kept = {key: kept[key] for key in SECTIONS if key in kept}
        record = {
            "machine": machine(device),
            "matrix_flop_per_s": bench.rate,
            "sections": kept,
        }
        path.write_text(json.dumps(record, indent=1) + "\n")
        (out / "train.md").write_text("\n".join(table(out)) + "\n")


if __name__ == "__main__":
    main()
