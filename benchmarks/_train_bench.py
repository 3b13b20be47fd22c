"""What the sections of train.py share: the machine, timing, a synthetic set, a profile."""

from __future__ import annotations

import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from fresnel.data.dataset import InputImages, ViewTensors
from fresnel.scene.cameras import Cameras, orbit
from fresnel.training.step import Stepper
from fresnel.training.task import TrainConfig

# lever -> factor in samples/s that was expected of it, over the line before it
PREDICTED = {
    "eager, fp32": 1.0,
    "eager, bf16": 2.0,
    "+ cuDNN tries its algorithms": 1.1,
    "+ network compiled": 2.0,
    "+ batch and loss compiled": 1.2,
    "+ second pass (consistency)": 0.75,
    "+ steps recorded": 1.3,
    "compiled, steps recorded": 1.15,
    "parts recorded": 2.5,
    "compiled": 1.5,
    "compiled, parts recorded": 3.0,
    "compact": 4.0,
    "base": 2.3,
    "large": 1.3,
    "fused AdamW over foreach": 1.5,
    "foreach average over a loop": 3.0,
    "checkpointing": 0.77,
}


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


def config_of(bench: Bench, **changes: Any) -> TrainConfig:
    # a long run, of which a few steps are taken: its first are denoising, its last consistency
    base = TrainConfig(steps=10_000, lr=1e-4, precision="bf16" if bench.gpu else "fp32")
    return replace(base, **changes)


def per_step(bench: Bench, stepper: Stepper, first: int, steps: int) -> float:
    """Seconds a step, after five that don't count: recordings start with the fourth."""
    for k in range(5):
        stepper.train(first + k)
    bench.synchronize()
    began = time.perf_counter()
    for k in range(steps):
        stepper.train(first + 5 + k)
    bench.synchronize()
    return (time.perf_counter() - began) / steps


def scale(bench: Bench) -> tuple[str, int, int, int]:
    """Network, pixels, batch and timed steps of the headline figures."""
    return ("large", 256, 128, 20) if bench.gpu else ("small", 64, 16, 10)


def attempt(bench: Bench, name: str, act: Callable[..., Any], *given: Any, **named: Any) -> None:
    """Go on with the next line of a table where one can't be measured."""
    try:
        act(*given, **named)
    except Exception as error:
        traceback.print_exc()
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        bench.say(f"| {name} | failed: {reason} |")
        bench.figures[name] = {"failed": reason}


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
