"""How the full training is set up, and what it will take, from what a smoke test measures.

A notebook's time is grouped by what its stages begin with ("open the data"), so that the forecast
of 02 and the account of 03 speak of the same parts: see `PARTS`.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fresnel.data.dataset import ViewTensors
from fresnel.evaluation import metrics as evaluate
from fresnel.report.record import Stage
from fresnel.study.protocol import fingerprint
from fresnel.training import checkpoints
from fresnel.training import host as surroundings
from fresnel.training.loop import OutOfMemory, TrainConfig, TrainResult
from fresnel.training.step import Stepper

PARTS = {
    "start": "the kernel's start and the imports",
    "data": "opening the data and checking their receipts",
    "compile": "starting the compiler, compiling from its cache",
    "steps": "the training's steps",
    "pauses": "set-up, validations, checkpoints, log",
    "pictures": "loading the rivals, drawing",
    "evaluation": "held-out views of the model and its rivals",
}
_AFRESH = 2.0
"""A new process takes so many times as long to load compiled code as one that has done so before:
2.1 on two CPU cores, 2.05 on an H200 (`benchmarks/forecast.md`, before this was known)."""
_WORDS = {
    **dict.fromkeys(("open", "check", "render"), "data"),
    **dict.fromkeys(("load", "draw"), "pictures"),
    "import": "compile",
    "evaluate": "evaluation",
}


def pick_precision(precision: str, device: str) -> str:
    """Resolve "auto" to "bf16" on a GPU that has it and on a CPU with matrix units (AMX), else
    "fp32".

    With AMX bf16 trains 1.13 to 1.25 times as fast.  With AVX512-BF16 alone it trains no faster:
    the backward pass of narrow convolutions loses what the forward pass gains.

    Raises:
        ValueError: if the name is unknown.
    """
    if precision not in {"auto", "fp32", "bf16"}:
        raise ValueError(f"precision: got {precision!r}, want 'auto', 'fp32' or 'bf16'")
    if precision != "auto":
        return precision
    if device == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    return "bf16" if surroundings.has_matrix_units() else "fp32"


def full_config(steps: int, **settings: Any) -> TrainConfig:
    """How 03 trains and 02 forecasts: by the length of the run, ten validations, a hundred rows."""
    return TrainConfig(
        steps=steps,
        warmup_steps=min(50, steps // 5),
        log_every=max(1, steps // 100),
        validate_every=max(1, steps // 10),
        snapshot_every=max(1, steps // 5),
        preview_steps=(),
        **settings,
    )


def batch_of_a_task(batch_size: int, accumulate: int) -> int:
    """Samples that a task computes at a time, where a step's batch is computed in parts.

    Raises:
        ValueError: if `batch_size` is not a multiple of `accumulate`.
    """
    if accumulate < 1 or batch_size % accumulate:
        raise ValueError(f"accumulate: got {accumulate}, want a divisor of batch_size {batch_size}")
    return batch_size // accumulate


def start_s() -> float:
    """Seconds since this kernel was started; of one in which a person has idled, its busy time."""
    import psutil

    process = psutil.Process(os.getpid())
    used = process.cpu_times()
    busy = used.user + used.system
    age = time.time() - process.create_time()
    return age if age < 3 * busy + 5 else busy


def start_compiler() -> None:
    """Import what compiles: seconds, once in each process, whatever is in the cache."""
    import torch._dynamo
    import torch._inductor.compile_fx  # noqa: F401


def by_part(stages: Iterable[Stage]) -> dict[str, float]:
    """Seconds of the stages whose first word says which of `PARTS` they belong to."""
    parts: dict[str, float] = {}
    for stage in stages:
        part = _WORDS.get(stage.name.split()[0])
        if part:
            parts[part] = parts.get(part, 0.0) + stage.duration_s
    return parts


def pace(
    history: Sequence[Mapping[str, Any]],
    samples: int,
    known: tuple[float, float] | None = None,
) -> tuple[float, float]:
    """Seconds a step over a run's curriculum, and what it took beyond that, once.

    A curriculum may switch on more work half way, so either half has its median. What lies above,
    such as choosing kernels and recording graphs, happens as often in a long run.

    Args:
        history: rows with "step" and "samples_per_s", evenly spaced over the run; those that are
            "warming" tell nothing of the pace, unless there are no others.
        samples: samples a step.
        known: seconds a step of either half, where `rehearse` has measured them: a smoke run can
            be too short for any of its steps to be played from a recording.
    """
    steps = [row["step"] for row in history]
    counts = np.diff([0, *steps])
    each = np.array([samples / row["samples_per_s"] for row in history])
    late = np.array(steps) > steps[-1] / 2
    typical = np.full(len(each), np.median(each))
    steady = np.array([not row.get("warming", False) for row in history])
    for k, half in enumerate((~late, late)):
        if known:
            typical[half] = known[k]
        elif half.any():
            usable = half & steady
            typical[half] = np.median(each[usable]) if usable.any() else each[half].min()
    usual = float((typical * counts).sum())
    return usual / steps[-1], max(0.0, float((each * counts).sum()) - usual)


def around_steps(result: TrainResult, fit_s: float) -> float:
    """Seconds of a call of `fit` that took `fit_s` besides compiling, steps and pauses in between:
    checks, set-up, the first validation, which chooses kernels, and the last checkpoint."""
    return fit_s - result.compile_s - result.duration_s - result.paused_s


def timed(act: Callable[[], Any], times: int = 1) -> float:
    """Seconds a call, until the GPU has done its part."""
    began = time.perf_counter()
    for _ in range(times):
        act()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - began) / times


def settled(stepper: Stepper, first: int, times: int = 10) -> float:
    """Seconds a step from step `first` on, when kernels are chosen and steps recorded."""
    last = stepper.config.steps - 1
    upcoming = (min(k, last) for k in itertools.count(first))
    for _ in range(6):
        stepper.train(next(upcoming))
    timed(lambda: None)  # until these are done
    return timed(lambda: stepper.train(next(upcoming)), times)


def rehearse(
    task: Any,
    result: TrainResult,
    config: TrainConfig,
    truth: ViewTensors,
    contenders: Mapping[str, evaluate.Predictor],
) -> dict[str, float]:
    """Seconds of single acts of the full run, each done once or twice.

    Args:
        task: a fresh one, as the smoke run's may already be compiled.
        result: of the smoke run, whose `compile_s` may be for an empty cache.
        config: of the full run.
        truth: held-out views.
        contenders: what the full run will evaluate on them.

    Returns:
        "compile", "validation", "preview", "checkpoint"; "evaluate_first", the contenders' first
        record, with what they load for it; "evaluate_record", every further record; on a GPU
        "step_early" and "step_late", a step of either half, see `pace`.
    """
    stepper = Stepper(task, config)
    # compiled code is cached by how exact it must be
    with surroundings.kernels(config.deterministic, stepper.device):
        if config.compile:
            torch.compiler.reset()  # as a new process would start
        compile_s = stepper.compile() if config.compile else 0.0
        model = result.ema_model
        generator = torch.Generator(stepper.device).manual_seed(0)
        with torch.no_grad(), stepper.autocast():
            task.validation(model)  # the first one chooses kernels
            validation_s = timed(lambda: task.validation(model), 2)
            preview_s = timed(lambda: task.preview(model, generator))
        steps: dict[str, float] = {}
        if stepper.device.type == "cuda":
            halves = {"step_early": 0, "step_late": config.steps * 9 // 10}
            with contextlib.suppress(OutOfMemory):  # the smoke run's own models are still there
                steps = {name: settled(stepper, first) for name, first in halves.items()}
    tensors = checkpoints.pack(result.model, model, stepper.optimizer)
    tensors |= {f"moment of {name}": tensor.clone() for name, tensor in tensors.items()}
    with tempfile.TemporaryDirectory(dir=result.run_dir) as folder:
        if stepper.device.type == "cuda":  # written in the background
            checkpoint_s = timed(lambda: {name: t.cpu() for name, t in tensors.items()})
        else:
            checkpoint_s = timed(lambda: checkpoints.save(Path(folder), tensors, {}), 2)
    perceptual, _ = evaluate.find_lpips(stepper.device)
    few = truth[list(range(min(4, len(truth))))]

    def judge(records: ViewTensors) -> float:
        return sum(
            timed(lambda p=p: evaluate.evaluate(p, records, perceptual=perceptual, progress=False))  # type: ignore[misc]
            for p in contenders.values()
        )

    return {
        "compile": compile_s,
        "validation": validation_s,
        "preview": preview_s,
        "checkpoint": checkpoint_s,
        "evaluate_first": judge(truth[[0]]),
        "evaluate_record": judge(few) / len(few),
        **steps,
    }


def full_run(
    acts: Mapping[str, float],
    result: TrainResult,
    stages: Sequence[Stage],
    config: TrainConfig,
    *,
    batch_size: int,
    records: int,
    around_s: float,
    start_s: float,
    price_per_hour_usd: float,
) -> dict[str, Any]:
    """Time, memory and cost of the whole notebook 03.

    Args:
        acts: from `rehearse`.
        result: of the smoke run, which went through the whole curriculum.
        stages: of this notebook so far; the full run will open and draw as much.
        config: of the full run.
        batch_size: samples a step.
        records: how many held-out records will be evaluated.
        around_s: `around_steps` of this process's first training, as 03's is its first.

    Returns:
        "steps", "samples", "samples_per_s", "duration_s", "cost_usd", "peak_memory_bytes" of the
        training, and "parts", the seconds of each of `PARTS`.
    """
    known = (acts["step_early"], acts["step_late"]) if "step_early" in acts else None
    step_s, warm_up_s = pace(result.history, batch_size, known)
    ending = acts["validation"] + acts["preview"] + acts["checkpoint"]
    set_up = max(0.0, around_s - ending)
    steps = config.steps
    stops = {0, steps, *range(0, steps, config.validate_every)}
    rows = steps // config.log_every
    opened = by_part(stages)
    parts = {
        "start": start_s,
        **opened,
        "compile": opened.get("compile", 0.0) + min(result.compile_s, _AFRESH * acts["compile"]),
        "steps": steps * step_s + warm_up_s,
        "pauses": opened.get("pauses", 0.0)
        + set_up
        + len(stops) * (acts["validation"] + acts["checkpoint"])
        + rows * result.paused_s / max(1, len(result.history) - 1)
        + acts["preview"],
        # four of the objects are drawn too, by the model and by the decoder
        "pictures": opened.get("pictures", 0.0) + min(4, records) * acts["evaluate_record"],
        "evaluation": opened.get("evaluation", 0.0)
        + acts["evaluate_first"]
        + (records - 1) * acts["evaluate_record"],
    }
    duration_s = sum(parts.values())
    return {
        "steps": steps,
        "samples": steps * batch_size,
        "samples_per_s": batch_size / step_s,
        "duration_s": duration_s,
        "cost_usd": duration_s / 3600 * price_per_hour_usd,
        "peak_memory_bytes": result.peak_memory_bytes,
        "parts": {name: parts.get(name, 0.0) for name in PARTS},
    }


def spent(
    stages: Sequence[Stage], result: TrainResult, *, start_s: float, price_per_hour_usd: float
) -> dict[str, Any]:
    """The same figures as `full_run`'s, of a run whose figures are drawn."""
    train_s = next(stage.duration_s for stage in stages if stage.name == "train")
    opened = by_part(stages)
    paused_s = opened.get("pauses", 0.0) + train_s - result.compile_s - result.duration_s
    parts = {
        "start": start_s,
        **opened,
        "compile": result.compile_s,
        "steps": result.duration_s,
        "pauses": paused_s,
    }
    duration_s = sum(parts.values())
    return {
        "samples_per_s": result.samples_per_s,
        "duration_s": duration_s,
        "cost_usd": duration_s / 3600 * price_per_hour_usd,
        "peak_memory_bytes": result.peak_memory_bytes,
        "parts": {name: parts.get(name, 0.0) for name in PARTS},
    }


def compared(plan: Mapping[str, Any] | None, actual: Mapping[str, Any]) -> dict[str, Any]:
    """Metrics of a full run: "spent" and, where there was a forecast, "forecast_error": by how much
    it was too low, as a share of it, in time and in memory."""
    if plan is None:
        return {"spent": actual}
    errors = {
        name: actual[name] / plan[name] - 1
        for name in ("duration_s", "peak_memory_bytes")
        if plan[name]
    }
    return {"spent": actual, "planned": plan, "forecast_error": errors}


def settings_of(config: TrainConfig, **what: Any) -> dict[str, Any]:
    """What makes a full run the one that was forecast."""
    names = ("steps", "precision", "compile", "accumulate", "checkpointing")
    return {**what, **{name: getattr(config, name) for name in names}}


def keep(data: Any, settings: Mapping[str, Any], plan: Mapping[str, Any]) -> Path:
    """Write a forecast beside the data's receipts, for the full run with these settings."""
    path = _path(data, settings)
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps({**plan, "settings": dict(settings)}, indent=2) + "\n")
    os.replace(temporary, path)
    return path


def kept(data: Any, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """The forecast for these settings on this data, or None."""
    path = _path(data, settings)
    return json.loads(path.read_text()) if path.exists() else None


def _path(data: Any, settings: Mapping[str, Any]) -> Path:
    return Path(data.path) / "receipts" / f"forecast-{fingerprint(settings)}.json"


def table(plan: Mapping[str, Any] | None, actual: Mapping[str, Any] | None = None) -> str:
    """Markdown: forecast and actual by part, and in all."""
    columns = {name: found for name, found in (("forecast", plan), ("actual", actual)) if found}
    lines = [(f"{meaning}, s", "parts", name, 1.0) for name, meaning in PARTS.items()]
    lines += [
        ("**in all, s**", "", "duration_s", 1.0),
        ("samples/s in the steps", "", "samples_per_s", 1.0),
        ("peak memory of the training, MB", "", "peak_memory_bytes", 1e-6),
    ]
    rows = [
        {"": text}
        | {
            title: f"{(found[group] if group else found)[name] * scale:,.1f}"
            for title, found in columns.items()
        }
        for text, group, name, scale in lines
    ]
    return evaluate.format_rows(rows)
