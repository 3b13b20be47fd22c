"""How the full training is set up, and what it will take, from what a smoke test measures.

A notebook's time is grouped by what its stages begin with ("open the data"), so that the forecast
of 02 and the account of 03 speak of the same `PARTS`.
"""

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from fresnel.data.records import ViewTensors
from fresnel.evaluation import metrics as evaluate
from fresnel.gate import receipts
from fresnel.host import machine
from fresnel.host.files import fingerprint, read_json, scratch
from fresnel.training import checkpoints
from fresnel.training.loop import TrainResult
from fresnel.training.step import Stepper, kernels
from fresnel.training.task import TrainConfig

PARTS = {
    "start": "the kernel's start and the imports",
    "data": "opening the data and checking their receipts",
    "compile": "starting the compiler, compiling from its cache",
    "steps": "the training's steps",
    "pauses": "set-up, validations, pictures, checkpoints, log",
    "pictures": "loading the rivals, drawing",
    "evaluation": "held-out views of the model and its rivals",
}
_FIRST_WORDS = {
    **dict.fromkeys(("open", "check", "render"), "data"),
    **dict.fromkeys(("load", "draw"), "pictures"),
    "import": "compile",
    "evaluate": "evaluation",
}
_AFRESH = 2.0
"""A new process takes so many times as long to load compiled code as one that has done so before:
2.1 on two CPU cores, 2.05 on an H200."""


def pick_precision(precision: str, device: str) -> str:
    """Resolve "auto" to "bf16" on a GPU that has it and on a CPU with matrix units (AMX, where it
    trains 1.13 to 1.25 times as fast; with AVX512-BF16 alone it gains nothing), else "fp32"."""
    if precision not in {"auto", "fp32", "bf16"}:
        raise ValueError(f"precision: got {precision!r}, want 'auto', 'fp32' or 'bf16'")
    if precision != "auto":
        return precision
    has_bf16 = torch.cuda.is_bf16_supported if device == "cuda" else machine.has_matrix_units
    return "bf16" if has_bf16() else "fp32"


def full_config(steps: int, *, previews: int = 0, **settings: Any) -> TrainConfig:
    """How 03 trains and 02 forecasts: a hundred rows, ten validations, or one every 20 steps.

    Args:
        previews: pictures made on the way, at even intervals from the start, and one at the end.
        settings: other fields of `TrainConfig`.
    """
    return TrainConfig(
        steps=steps,
        warmup_steps=min(50, steps // 5),
        log_every=max(1, steps // 100),
        validate_every=max(min(steps, 20), steps // 10),
        snapshot_every=max(1, steps // 5),
        preview_every=max(1, steps // previews) if previews else 0,
        **settings,
    )


def parts_of_a_step(batch_size: int, accumulate: int, gpus: int = 1) -> int:
    """Equal parts that a step's batch is computed in: `accumulate`, one for each GPU at least."""
    if accumulate < 1 or batch_size % accumulate:
        raise ValueError(f"accumulate: got {accumulate}, want a divisor of batch_size {batch_size}")
    if batch_size % (parts := max(accumulate, gpus)):
        raise ValueError(f"gpus: got {gpus}, want at most accumulate, or a divisor of {batch_size}")
    return parts


def start_s() -> float:
    """Seconds since this kernel was started; of one in which a person has idled, its busy time."""
    import psutil

    process = psutil.Process()
    busy = sum(process.cpu_times()[:2])
    age = time.time() - process.create_time()
    return age if age < 3 * busy + 5 else busy


def start_compiler() -> None:
    """Import what compiles: seconds, once in each process, whatever is in the cache."""
    import torch._dynamo
    import torch._inductor.compile_fx  # noqa: F401


def pace(
    history: Sequence[Mapping[str, Any]], samples: int, *, recorded: bool = False
) -> tuple[float, float]:
    """Seconds a step over a run's curriculum, and what it took beyond that, once.

    A curriculum may switch on more work half way, so either half has its median; where steps are
    recorded (on a GPU), most of a short run's are not yet played, and the fastest row tells. What
    lies above, such as choosing kernels and recording, happens as often in a long run.

    Args:
        history: rows with "step" and "samples_per_s", evenly spaced over the run.
        samples: samples a step.
    """
    steps = np.array([row["step"] for row in history])
    counts = np.diff(steps, prepend=0)
    each = np.array([samples / row["samples_per_s"] for row in history])
    late = steps > steps[-1] / 2
    typical = np.min if recorded else np.median
    halves = [half for half in (~late, late) if half.any()]
    usual = sum(typical(each[half]) * counts[half].sum() for half in halves)
    return float(usual / steps[-1]), max(0.0, float((each * counts).sum() - usual))


def rehearse(
    task: Any,
    result: TrainResult,
    config: TrainConfig,
    truth: ViewTensors,
    contenders: Mapping[str, evaluate.Predictor],
) -> dict[str, float]:
    """Seconds of single acts of the full run with this `config`: "compile", "validation",
    "preview", "checkpoint"; "evaluate_first", the contenders on the first record of `truth` with
    what they load for it, and "evaluate_record", on every further one.

    Args:
        task: a fresh one, as the smoke run's may already be compiled.
        result: of the smoke run, whose `compile_s` may be for an empty cache.
    """
    stepper, model, acts = Stepper(task, config), result.ema_model, dict[str, float]()
    measures = evaluate.find_measures(stepper.device)

    def timed(act: Callable[[], Any], times: int = 1) -> float:
        began = stepper.time()
        for _ in range(times):
            act()
        return (stepper.time() - began) / times

    def judge(records: ViewTensors) -> None:
        for predict in contenders.values():
            evaluate.evaluate(predict, records, measures=measures, progress=False)

    # compiled code is cached by how exact it must be
    with kernels(config.deterministic, stepper.device):
        if config.compile:
            torch.compiler.reset()  # as a new process would start
        acts["compile"] = stepper.compile() if config.compile else 0.0
        generator = torch.Generator(stepper.device).manual_seed(0)
        with torch.no_grad(), stepper.autocast():
            task.validation(model)  # the first one chooses kernels
            acts["validation"] = timed(lambda: task.validation(model), 2)
            acts["preview"] = timed(lambda: task.preview(model, generator))
    tensors = checkpoints.pack(result.model, model, stepper.optimizer)
    tensors |= {f"moment of {name}": tensor.clone() for name, tensor in tensors.items()}
    with scratch(result.run_dir / "rehearsal", folder=True) as folder:
        if stepper.device.type == "cuda":  # written in the background
            acts["checkpoint"] = timed(lambda: {name: t.cpu() for name, t in tensors.items()})
        else:
            acts["checkpoint"] = timed(lambda: checkpoints.save(folder, tensors, {}), 2)
    acts["evaluate_first"] = timed(lambda: judge(truth[:1]))
    acts["evaluate_record"] = timed(lambda: judge(truth[:1]))
    return acts


def full_run(
    acts: Mapping[str, float],
    result: TrainResult,
    stages: Iterable[Any],
    config: TrainConfig,
    *,
    batch_size: int,
    records: int,
    around_s: float,
    start_s: float,
    price_per_hour_usd: float,
    gpus: int = 1,
) -> dict[str, Any]:
    """Time, memory and cost of the whole notebook 03 with this `config`: "steps", "samples",
    "samples_per_s", "duration_s", "cost_usd", "peak_memory_bytes" of the training, and "parts", the
    seconds of each of `PARTS`.

    Args:
        acts: from `rehearse`.
        result: of the smoke run, which went through the whole curriculum.
        stages: of this notebook so far; the full run will open and draw as much.
        batch_size: samples a step.
        records: how many held-out records will be evaluated.
        around_s: of this process's first training, as 03's is its first.
        gpus: that the smoke run was trained on, and that the full run will be.
    """
    on_gpu = next(result.model.parameters()).is_cuda
    step_s, warm_up_s = pace(result.history, batch_size, recorded=on_gpu and config.graphs)
    stop_s, record_s = acts["validation"] + acts["checkpoint"], acts["evaluate_record"]
    stops = len({config.steps, *range(0, config.steps, config.validate_every)})
    kept = config.steps // config.keep_every if config.keep_every else 0
    shown = 1 + config.steps // config.preview_every if config.preview_every else 0
    row_s = result.paused_s / max(1, len(result.history) - 1)
    pauses = max(0.0, around_s - stop_s) + stops * stop_s + kept * acts["checkpoint"]
    parts = {
        "start": start_s,
        "compile": min(result.compile_s, _AFRESH * acts["compile"]),
        "steps": config.steps * step_s + warm_up_s,
        "pauses": pauses + shown * acts["preview"] + config.steps // config.log_every * row_s,
        # four of the objects are drawn too, by the model and by the decoder
        "pictures": min(4, records) * record_s,
        "evaluation": acts["evaluate_first"] + (records - 1) * record_s,
    }
    found = _account(parts, stages, result, batch_size / step_s, price_per_hour_usd, gpus)
    return {"steps": config.steps, "samples": config.steps * batch_size, **found}


def spent(
    stages: Iterable[Any],
    result: TrainResult,
    *,
    start_s: float,
    price_per_hour_usd: float,
    gpus: int = 1,
) -> dict[str, Any]:
    """The same figures as `full_run`'s, of a run whose figures are drawn."""
    parts = {"start": start_s, "compile": result.compile_s, "steps": result.duration_s}
    parts["pauses"] = result.paused_s + result.around_s
    return _account(parts, stages, result, result.samples_per_s, price_per_hour_usd, gpus)


def _account(
    parts: Mapping[str, float],
    stages: Iterable[Any],
    result: TrainResult,
    samples_per_s: float,
    price_per_hour: float,
    gpus: int,
) -> dict[str, Any]:
    """`parts`, and the stages (`fresnel.report.record`), whose first word says what they are of."""
    taken = {name: parts.get(name, 0.0) for name in PARTS}
    for stage in stages:
        if part := _FIRST_WORDS.get(stage.name.split()[0]):
            taken[part] += stage.duration_s
    duration_s = sum(taken.values())
    return {
        "samples_per_s": samples_per_s,
        "duration_s": duration_s,
        "cost_usd": duration_s / 3600 * price_per_hour,  # of the machine with all its cards
        "gpus": gpus,
        "gpu_hours": duration_s / 3600 * gpus if torch.cuda.is_available() else 0.0,
        "peak_memory_bytes": result.peak_memory_bytes,
        "parts": taken,
    }


def compared(plan: Mapping[str, Any] | None, actual: Mapping[str, Any]) -> dict[str, Any]:
    """Metrics of a full run: "spent" and, where there was a forecast, "forecast_error": by how much
    it was too low, as a share of it, in time and in memory."""
    if plan is None:
        return {"spent": actual}
    names = ("duration_s", "peak_memory_bytes")
    errors = {name: actual[name] / plan[name] - 1 for name in names if plan[name]}
    return {"spent": actual, "planned": plan, "forecast_error": errors}


def settings_of(config: TrainConfig, *, gpus: int = 1, **what: Any) -> dict[str, Any]:
    """What makes a full run the one that was forecast."""
    names = ("steps", "precision", "compile", "accumulate", "checkpointing")
    several = {"gpus": gpus} if gpus > 1 else {}
    return {**what, **{name: getattr(config, name) for name in names}, **several}


def keep(data: Any, settings: Mapping[str, Any], plan: Mapping[str, Any]) -> None:
    """Write a forecast beside the data's receipts, for the full run with these settings."""
    text = json.dumps({**plan, "settings": dict(settings)}, indent=2) + "\n"
    receipts.keep(data, _file(settings), text)


def kept(data: Any, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """The forecast for these settings on this data; None if there is none that can be read."""
    try:
        plan = read_json(receipts.kept(data, _file(settings)))
        return plan if plan["parts"].keys() == PARTS.keys() else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _file(settings: Mapping[str, Any]) -> str:
    return f"forecast-{fingerprint(settings)}.json"


def table(
    plan: Mapping[str, Any] | None, actual: Mapping[str, Any] | None = None
) -> list[dict[str, str]]:
    """Rows of forecast and actual, by part and in all."""
    runs = {title: run for title, run in (("forecast", plan), ("actual", actual)) if run}
    rows = [
        [f"{text}, s"] + [run["parts"][n] for run in runs.values()] for n, text in PARTS.items()
    ]
    rows.append(["in all, s", *(run["duration_s"] for run in runs.values())])
    if any(run.get("gpus", 1) > 1 and run["gpu_hours"] for run in runs.values()):
        rows.append(["GPU-minutes", *(run["gpu_hours"] * 60 for run in runs.values())])
    rows.append(["samples/s in the steps", *(run["samples_per_s"] for run in runs.values())])
    memory = [run["peak_memory_bytes"] / 1e6 for run in runs.values()]
    rows.append(["peak memory of the training, MB", *memory])
    return [
        {"part": text} | {title: f"{x:,.1f}" for title, x in zip(runs, found, strict=True)}
        for text, *found in rows
    ]
