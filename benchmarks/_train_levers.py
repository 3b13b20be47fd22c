"""train.py: the optimizer's parts, memory by size and batch, the batch found, agreement."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from _train_bench import Bench, attempt, config_of, per_step, scale, synthetic
from _train_cvs import cvs_task
from _train_decoder import decoder_task
from torch import nn

from fresnel.host import machine as surroundings
from fresnel.models.cvs import CVS, CVSConfig
from fresnel.training.cvs_task import CVSTask
from fresnel.training.step import Stepper, kernels
from fresnel.training.task import OutOfMemory, TrainConfig


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


def section_agree(bench: Bench) -> None:
    """Losses over 200 steps with levers on, against eager fp32; determinism."""
    views = synthetic(16, 8, 32, bench.device)
    steps = 200

    def losses(task: Any, **changes: Any) -> tuple[torch.Tensor, Stepper]:
        config = TrainConfig(**{"steps": steps, "lr": 1e-3, "graphs": False, **changes})
        stepper = Stepper(task, config)
        with kernels(stepper.config.deterministic, bench.device):
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
    whole: dict[str, Any] = {"graphs": True, "precision": "bf16"}
    cases: dict[str, tuple[float, dict[str, Any]]] = {
        "cuDNN's choice of kernels": (0.02, {"deterministic": False}),
        "bf16": (0.05, {"precision": "bf16"}),
        "checkpointing": (0.02, {"checkpointing": True}),
        "compiled": (0.02, {"compile": True}),
        "compiled, bf16": (0.05, {"compile": True, "precision": "bf16"}),
    }
    if bench.gpu:
        cases["recorded"] = (0.02, {"graphs": True})
        cases["recorded, bf16"] = (0.05, whole)
        cases["compiled, recorded, bf16"] = (0.05, {"compile": True, **whole})
    if bench.quick:
        quick = ("recorded", "recorded, bf16") if bench.gpu else ("bf16",)
        cases = {name: cases[name] for name in quick}
    for name, (tolerance, changes) in cases.items():
        attempt(bench, name, compare, name, tolerance, plain, cvs(), **changes)
    if bench.gpu:
        eager, _ = losses(decoder_task(bench, 8, 32, 16))
        rows = {"decoder: parts recorded": {"graphs": True}}
        if not bench.quick:
            rows["decoder: compiled, parts recorded"] = {"graphs": True, "compile": True}
        for name, changes in rows.items():
            task = decoder_task(bench, 8, 32, 16)
            attempt(bench, name, compare, name, 0.05, eager, task, **changes)
