"""How fast training is, where a step's time goes, and what every lever gains.

    python benchmarks/train.py [--quick] [--sections cvs,decoder,...] [--out benchmarks]

Each section prints a table as soon as it has one, and one that fails leaves the others alone.
Results go to train_gpu.json or train_cpu.json; train.md is made anew from both; a section that is
not run keeps what it had.

    cvs        samples/s of the CVS, lever by lever; what a step's time goes to; the loop of `fit`
    decoder    views/s of the decoder, through the renderer
    memory     peak memory and samples/s by size and batch; gradient checkpointing

On a CPU: the small network at 64 px; on a GPU: the large one at 256 px. Predictions were written
before the measurements.
"""

import argparse
import json
import platform
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from fresnel.data.images import InputImages
from fresnel.data.records import ViewTensors
from fresnel.gate.receipts import write_receipt
from fresnel.host.machine import has_matrix_units, peak_memory, reset_peak_memory
from fresnel.models.cvs import CVS, CVSConfig
from fresnel.models.decoder import DecoderConfig
from fresnel.report.provenance import git_state
from fresnel.scene.cameras import Cameras, orbit
from fresnel.training.cvs_task import CVSTask
from fresnel.training.decoder_task import DecoderTask
from fresnel.training.loop import fit
from fresnel.training.step import Stepper, kernels
from fresnel.training.task import OutOfMemory, TrainConfig

# lever -> factor in samples/s that was expected of it, over the line before it
PREDICTED = {
    "eager, bf16": 2.0,
    "+ cuDNN tries its algorithms": 1.1,
    "+ steps recorded": 1.3,
    "+ network compiled": 2.0,
    "+ batch and loss compiled": 1.2,
    "compiled, steps recorded": 1.15,
    "+ second pass (consistency)": 0.75,
    "parts recorded": 2.5,
    "compiled": 1.5,
    "compiled, parts recorded": 3.0,
}
HASH = "sha256:" + "0" * 64
LATE = 9_000  # of a long run's 10,000 steps: its last are consistency, its first denoising


class Bench:
    """The machine, what is measured on it, and the lines of the section under way."""

    def __init__(self, device: str, quick: bool) -> None:
        self.device, self.quick = torch.device(device), quick
        self.gpu = self.device.type == "cuda"
        self.lines: list[str] = []
        self.figures: dict[str, Any] = {}
        n, kind = (8192, torch.bfloat16) if self.gpu else (2048, torch.float32)
        a, b = (torch.randn(n, n, device=self.device, dtype=kind) for _ in range(2))
        self.rate = 2 * n**3 / self.timed(lambda: a @ b)

    def say(self, line: str) -> None:
        print(line, flush=True)
        self.lines.append(line)

    def row(self, *cells: Any) -> None:
        self.say(f"| {' | '.join(str(cell) for cell in cells)} |")

    def head(self, *titles: str) -> None:
        self.row(*titles)
        self.say("|:--" + "|--:" * (len(titles) - 1) + "|")

    def timed(self, act: Callable[[], Any], times: int = 10, before: int = 3) -> float:
        """Seconds a call, after some that don't count."""
        began = 0.0
        for k in range(before + times):
            if k == before:
                self.wait()
                began = time.perf_counter()
            act()
        self.wait()
        return (time.perf_counter() - began) / times

    def wait(self) -> None:
        if self.gpu:
            torch.cuda.synchronize()

    def step_s(self, stepper: Stepper, first: int, steps: int) -> float:
        """Seconds a step; recordings start with the fourth."""
        upcoming = iter(range(first, first + steps + 5))
        return self.timed(lambda: stepper.train(next(upcoming)), steps, before=5)

    def config(self, **changes: Any) -> TrainConfig:
        settings = {"steps": 10_000, "lr": 1e-4, "precision": "bf16" if self.gpu else "fp32"}
        return TrainConfig(**{"graphs": False, **settings, **changes})

    def views(self, objects: int, pixels: int) -> ViewTensors:
        """Coloured balls before black: only shapes and types matter here."""
        grid = (torch.arange(pixels) + 0.5) / pixels * 2 - 1
        disc = grid**2 + grid[:, None] ** 2 < 0.3
        alpha = (disc.to(torch.uint8) * 255).expand(objects, 8, pixels, pixels).contiguous()
        rgb = torch.randint(60, 255, (objects, 8, pixels, pixels, 3), dtype=torch.uint8)
        rgb *= disc[..., None]

        def cameras(azimuth: torch.Tensor) -> Cameras:
            return orbit(
                azimuth, 15.0, 2.2,
                pivot=(0.0, 0.0, 0.0), focal_px=1.2 * pixels, width=pixels, height=pixels,
            )  # fmt: skip

        names = tuple(f"ball{i}" for i in range(objects))
        inputs = InputImages(names, rgb[:, 0], alpha[:, 0], cameras(torch.zeros(objects)))
        around = cameras((torch.arange(8) * 45.0).expand(objects, -1))
        made = ViewTensors(names, inputs, rgb, alpha, around, torch.zeros(objects, 3))
        return replace(made, content_hash=HASH).to(self.device)

    def cvs(self, size: str, pixels: int, batch: int, objects: int = 64, **changes: Any) -> CVSTask:
        torch.manual_seed(0)
        network = CVS(CVSConfig.preset(size, image_size=pixels, **changes))
        options: dict[str, Any] = {"mirror": True, "colour_jitter": 0.3, "device": self.device}
        return CVSTask(network, self.views(objects, pixels), batch_size=batch, **options)

    def decoder(self, objects: int, pixels: int, channels: int) -> DecoderTask:
        torch.manual_seed(0)
        network = DecoderConfig(image_size=pixels, base_channels=channels)
        views = self.views(64, pixels)
        return DecoderTask(views, network, batch_size=objects, device=self.device)


def section_cvs(bench: Bench) -> None:
    size, pixels, batch, steps = ("large", 256, 128, 20) if bench.gpu else ("small", 64, 16, 10)
    with torch.device("meta"):
        network = CVS(CVSConfig.preset(size, image_size=pixels))
        x, cond = torch.zeros(1, 4, pixels, pixels), torch.zeros(1, 16, pixels, pixels)
        with FlopCounterMode(display=False) as counter:
            out = network(x, torch.ones(1), cond)
            forward = counter.get_total_flops()
            out.sum().backward()
    both = counter.get_total_flops()
    bench.say(f"CVS '{size}', {pixels} px, batch {batch}, {both / 1e9:.1f} GFLOP a sample.\n")
    bench.head(
        "lever", "samples/s", "TFLOP/s", "of the matrix rate", "predicted", "measured", "peak GB"
    )
    task, before, stepper = bench.cvs(size, pixels, batch), 0.0, None
    units = bench.gpu or has_matrix_units()
    bf16: dict[str, Any] = {"precision": "bf16" if units else "fp32"}
    recorded, slow = {**bf16, "graphs": bench.gpu}, not bench.quick
    levers: list[tuple[bool, str, dict[str, Any], tuple[str, ...], int]] = [
        (True, "eager, fp32", {"precision": "fp32"}, (), 0),
        (units, "eager, bf16", bf16, (), 0),
        (bench.gpu, "+ cuDNN tries its algorithms", bf16, (), 0),
        (bench.gpu, "+ steps recorded", recorded, (), 0),
        (slow, "+ network compiled", bf16, ("network",), 0),
        (slow, "+ batch and loss compiled", bf16, ("batch", "loss"), 0),
        (slow and bench.gpu, "compiled, steps recorded", recorded, (), 0),
        (slow, "+ second pass (consistency)", recorded, (), LATE),
    ]
    for _, name, settings, parts, first in filter(lambda lever: lever[0], levers):
        for part in parts:
            task.hot[part] = torch.compile(task.hot[part], dynamic=False)
        reset_peak_memory(bench.device)
        with kernels(not bench.gpu or name.startswith("eager"), bench.device):
            stepper = Stepper(task, bench.config(**settings))
            speed = batch / bench.step_s(stepper, first, steps)
        rate = speed * (both + (forward if first else 0))
        gain, expected = speed / (before or speed), PREDICTED.get(name, 1.0)
        share, memory = f"{rate / bench.rate:.0%}", peak_memory(bench.device) / 1e9
        cells = (f"{speed:,.1f}", f"{rate / 1e12:.2f}", share, f"{expected:.2f}x", f"{gain:.2f}x")
        bench.row(name, *cells, f"{memory:.1f}")
        bench.figures[name] = {"samples_per_s": speed, "flop_per_s": rate, "peak_gb": memory}
        before = speed
    bench.say("")
    profiled(bench, stepper)
    if not bench.quick:
        whole_loop(bench, size, pixels, batch)


def profiled(bench: Bench, stepper: Any) -> None:
    """Where the time of three late steps goes, by kernel."""
    from torch.profiler import ProfilerActivity, profile

    kind = "cuda" if bench.gpu else "cpu"
    with profile(activities=[getattr(ProfilerActivity, kind.upper())]) as found:
        for k in range(3):
            stepper.train(LATE + k)
        bench.wait()
    key = f"self_{'device' if bench.gpu else 'cpu'}_time_total"
    events = sorted(found.key_averages(), key=lambda event: -getattr(event, key))
    total = sum(getattr(event, key) for event in events)
    bench.head("kernel", "share", "ms a step", "calls a step")
    for event in events[:14]:
        spent, name = getattr(event, key), event.key.replace("|", "/")[:80]
        bench.row(f"`{name}`", f"{spent / total:.1%}", f"{spent / 3e3:.2f}", event.count // 3)


def whole_loop(bench: Bench, size: str, pixels: int, batch: int) -> None:
    """All of `fit`: data, average, log, validation, checkpoints; wall time."""
    steps = 200 if bench.gpu else 30
    bench.say(f"\n`fit`, compiled, {steps} steps, two checkpoints (less compiling):\n")
    bench.head("run", "samples/s in steps", "in all", "compile, cached, s", "paused, s")
    for name, share in (("denoising", 1.0), ("consistency", 0.0)):
        task = bench.cvs(size, pixels, batch, denoising_share=share)
        options = {"validate_every": steps, "snapshot_every": steps // 2, "warmup_steps": 10}
        config = bench.config(steps=steps, compile=True, graphs=True, precision="bf16", **options)
        torch.compiler.reset()  # as a new process would start
        with tempfile.TemporaryDirectory() as folder:
            data = SimpleNamespace(path=Path(folder), content_hash=HASH)
            receipt = write_receipt(data, "gate", True, "synthetic data of a benchmark")
            began = time.perf_counter()
            result = fit(task, receipt=receipt, config=config, run_dir=Path(folder) / "run")
            overall = steps * batch / (time.perf_counter() - began - result.compile_s)
        cells = (f"{result.samples_per_s:,.0f}", f"{overall:,.0f}", f"{result.compile_s:.0f}")
        bench.row(name, *cells, f"{result.paused_s:.1f}")
        bench.figures[f"fit, {name}"] = [result.samples_per_s, overall, result.compile_s]


def section_decoder(bench: Bench) -> None:
    objects, pixels, channels = (16, 128, 40) if bench.gpu else (4, 64, 24)
    bench.say(f"Decoder, {objects} objects x 4 views, {pixels} px; wanted on an H100: 3,000.\n")
    bench.head("lever", "views/s", "ms a step", "predicted", "measured", "peak GB")
    first = 0.0
    for name in ("eager", "compiled", "parts recorded", "compiled, parts recorded"):
        compiled, graphs = "compiled" in name, "recorded" in name
        if (compiled and bench.quick) or (graphs and not bench.gpu):
            continue
        torch.compiler.reset()
        reset_peak_memory(bench.device)
        with kernels(False, bench.device):
            stepper = Stepper(bench.decoder(objects, pixels, channels), bench.config(graphs=graphs))
            if compiled:
                stepper.compile()
            seconds = bench.step_s(stepper, 0, 50 if bench.gpu else 5)
        first, memory = first or seconds, peak_memory(bench.device) / 1e9
        gain = (f"{PREDICTED.get(name, 1.0):.1f}x", f"{first / seconds:.2f}x", f"{memory:.1f}")
        bench.row(name, f"{objects * 4 / seconds:,.0f}", f"{seconds * 1e3:.1f}", *gain)
        bench.figures[name] = {"views_per_s": objects * 4 / seconds, "gb": memory}


def section_memory(bench: Bench) -> None:
    """Uncompiled, at the run's end, where a curriculum asks for most."""
    cases = [("small", 64, [4, 16, 64]), ("base", 128, [4, 16])]
    if bench.gpu:
        cases = [("small", 64, [64, 256]), ("base", 128, [32, 128]), ("large", 256, [8, 32, 128])]
    bench.head("size", "px", "batch", "peak GB", "samples/s", "checkpointing: GB", "then samples/s")
    for size, pixels, batch in [(s, px, b) for s, px, batches in cases for b in batches]:
        found: list[str] = []
        for checkpointing in (False, True):
            reset_peak_memory(bench.device)
            try:
                config = bench.config(checkpointing=checkpointing)
                stepper = Stepper(bench.cvs(size, pixels, batch, objects=16), config)
                seconds = bench.step_s(stepper, LATE, 3)
                gb = peak_memory(bench.device) / 1e9
                found += [f"{gb:.2f}", f"{batch / seconds:,.1f}"]
            except OutOfMemory:
                found += ["-", "-"]
            del stepper
            if bench.gpu:
                torch.cuda.empty_cache()
        bench.row(size, pixels, batch, *found)
        bench.figures[f"{size}/{pixels}/{batch}"] = found


def written(folder: Path) -> None:
    how = "`python benchmarks/train.py`. Predictions were written before the measurements."
    lines = ["# Training speed", "", how]
    for path in (folder / "train_gpu.json", folder / "train_cpu.json"):
        found = json.loads(path.read_text()) if path.exists() else {"sections": {}}
        if found["sections"]:
            rate = f"Large matrix product: {found['matrix_flop_per_s'] / 1e12:.1f} TFLOP/s."
            lines += ["", f"## {found['machine']}", "", rate]
        for name, section in found["sections"].items():
            lines += ["", f"### {name}", "", *section["lines"], ""]
            lines += [f"Commit {str(section['commit'])[:7]}, {section['duration_s']:.0f} s."]
    (folder / "train.md").write_text("\n".join(lines) + "\n")


def main() -> None:
    sections = {n[8:]: f for n, f in globals().items() if n.startswith("section_")}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--sections", default=",".join(sections))
    parser.add_argument("--quick", action="store_true", help="leave out what takes minutes")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    bench = Bench(arguments.device, arguments.quick)
    path = arguments.out / f"train_{'gpu' if bench.gpu else 'cpu'}.json"
    kept = json.loads(path.read_text())["sections"] if path.exists() else {}
    name = torch.cuda.get_device_name() if bench.gpu else platform.processor()
    threads = "" if bench.gpu else f", {torch.get_num_threads()} threads"
    about = f"{name or platform.machine()}{threads}, torch {torch.__version__}"
    for name in arguments.sections.split(","):
        bench.lines, bench.figures = [], {}
        print(f"\n## {name}\n", flush=True)
        began = time.perf_counter()
        try:
            sections[name](bench)
        except Exception as error:  # the other sections are worth having
            traceback.print_exc()
            bench.say(f"\nFailed: {type(error).__name__}: {error}")
        kept[name] = {
            "lines": bench.lines,
            "figures": bench.figures,
            "duration_s": time.perf_counter() - began,
            "commit": git_state()["commit"],
        }
        record = {"machine": about, "matrix_flop_per_s": bench.rate, "sections": kept}
        path.write_text(json.dumps(record, indent=1) + "\n")
        written(arguments.out)


if __name__ == "__main__":
    main()
