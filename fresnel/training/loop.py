"""fit(): the one training loop, for decoder and CVS.

Every random draw of a step follows from (seed, step), so a run that was stopped and resumed is
bit for bit the run that was not (on one machine, with deterministic kernels). So is one on another
number of GPUs but for the order of summation: `fresnel.training.ranks`.
"""

import contextlib
import json
import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from fresnel.gate.receipts import GateRefusal, Receipt, require_receipt
from fresnel.host import machine
from fresnel.host.files import locked, write_atomic
from fresnel.training import checkpoints, ranks
from fresnel.training.checkpoints import SUFFIX
from fresnel.training.step import Stepper, kernels, step_seed
from fresnel.training.task import ResumeRefused, Task, TrainConfig


@dataclass(frozen=True)
class TrainResult:
    """What came out of `fit`.

    `history`: one row per log interval ("step", means of the loss terms, "grad_norm", "lr",
    "samples_per_s"); `validations`: "step" and the task's figures. `samples_per_s` and `duration_s`
    are of this call's training steps alone (the last row's rate, where none was left to do);
    `compile_s` came before them, `paused_s` (validation, previews, checkpoints) in between,
    `around_s` before and after. `peak_memory_bytes`: of the CUDA allocator, or of the process on a
    CPU. `gate_overridden`: trained on refused data, on purpose. `previews`, `snapshots`: by step.
    """

    model: Any
    ema_model: Any
    history: list[dict[str, Any]]
    validations: list[dict[str, Any]]
    steps: int
    samples_per_s: float
    duration_s: float
    compile_s: float
    paused_s: float
    around_s: float
    peak_memory_bytes: int
    gate_overridden: bool
    run_dir: Path
    previews: dict[int, Path]
    snapshots: dict[int, Path]


def fit(
    task: Task,
    *,
    config: TrainConfig,
    run_dir: str | Path,
    receipt: Receipt | None,
    resume: bool = True,
    allow_failed_gate: bool = False,
    progress_bar: bool = True,
) -> TrainResult:
    """Train `task` on data that the gate let through; go on where an earlier call stopped.

    Writes run_dir/log.jsonl, run_dir/checkpoints/{latest,previous,best,step_XXXXXX}.safetensors and
    run_dir/previews/. May be killed at any moment: the next call resumes from `latest`. Of two
    calls with one run_dir at once the second waits for the first.

    In a process of several that have joined (`fresnel.training.ranks`) it is one run by all: each
    returns its result, rank 0 alone reads and writes in `run_dir`, validates and shows the bar.

    Args:
        receipt: the gate's, of the data that `task.data` was made from: their content hashes are
            compared. None, as from data without a receipt: refused.
        resume: False starts over and removes what an earlier run left in `run_dir`.
        allow_failed_gate: negative controls: train in spite of a recorded failure. Checkpoints,
            log, result and networks then carry gate_overridden = true, as they do where the task's
            model starts from, or sees renders of, weights that carry it.

    Raises:
        GateRefusal, ResumeRefused, NonFiniteLoss, OutOfMemory, checkpoints.DiskFull;
        KeyboardInterrupt after a checkpoint was saved; ranks.ElsewhereFailed where rank 0 raised.
    """
    began = time.perf_counter()
    if receipt is None:
        raise GateRefusal("receipt: got None; validate the data and pass the gate's receipt")
    receipt = require_receipt(task.data, "gate", allow_failed_gate, receipt=receipt)
    overridden = receipt.overridden or bool(getattr(task.model, "gate_overridden", False))
    folder, rows, group = Path(run_dir), list[dict[str, Any]](), ranks.current()
    log_file, kept = folder / "log.jsonl", folder / "checkpoints"
    identity = {
        "train": asdict(config),
        "task": {"batch_size": task.batch_size, **task.config},
        "data": task.data.content_hash,
        "records": list(task.data.names),
        "gate_overridden": overridden,
    }
    now: dict[str, Any] = {"step": 0, "best_loss": math.inf, "best_step": -1}  # in checkpoints
    now |= {"gate_overridden": overridden, "identity": json.loads(json.dumps(identity))}
    compile_s = steps_s = paused_s = logged_s = 0.0
    resumed_at, samples = -1, 0

    def due(every: int) -> bool:
        return every > 0 and now["step"] % every == 0

    def log(event: str, **values: Any) -> None:
        stamp = {"gate_overridden": True} if overridden else {}
        rows.append({"event": event, "step": now["step"], **values, **stamp})
        if group.first:
            with open(log_file, "a", encoding="utf-8") as file:
                file.write(json.dumps(rows[-1]) + "\n")

    def show() -> None:
        generator = torch.Generator(device).manual_seed(step_seed(config.seed, -1))
        with torch.no_grad(), stepper.autocast():
            picture = Image.fromarray(task.preview(stepper.ema, generator))
        picture.save(file := BytesIO(), format="PNG")
        write_atomic(folder / f"previews/step_{now['step']:06d}.png", file.getvalue())

    def validated() -> dict[str, float]:
        with torch.no_grad(), stepper.autocast():
            return task.validation(stepper.ema)

    def write(also: list[str]) -> None:
        writer.save(kept, checkpoints.pack(*state), dict(now), also)

    with contextlib.ExitStack() as stack:
        busy = f"{folder}: another process trains there; waiting for it"
        group.from_first(lambda: stack.enter_context(locked(folder / ".lock", busy)))
        stepper = Stepper(task, config)
        state = (stepper.model, stepper.ema, stepper.optimizer, stepper.critic)
        device = stepper.device
        for network in (stepper.model, stepper.ema):
            vars(network)["gate_overridden"] = overridden  # saved with the weights
        machine.reset_peak_memory(device)
        tensors: dict[str, Tensor] | None = None

        def go_on() -> tuple[dict[str, Any], list[dict[str, Any]], int]:
            nonlocal tensors
            tensors, then, before = _earlier(folder, now, resume)
            return then, before, -1 if tensors is None else then["step"]

        now, rows, resumed_at = group.from_first(go_on)
        if tensors is not None:
            checkpoints.unpack(tensors, *state)
        if group.world > 1:
            tensors = group.share(checkpoints.pack(*state), device)
            checkpoints.unpack(tensors, *state)
        del tensors
        log("start", resumed=resumed_at >= 0, **now["identity"])
        stack.enter_context(kernels(config.deterministic, device))
        stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
        writer = stack.enter_context(checkpoints.Writer(background=device.type == "cuda"))
        interrupted = stack.enter_context(interrupt_flag(terminate=bool(ranks.place(os.environ))))
        quiet = not (progress_bar and group.first)
        bar = tqdm(total=config.steps, initial=now["step"], disable=quiet, desc="train")
        stack.enter_context(bar)
        if config.compile and now["step"] < config.steps:
            compile_s = stepper.compile()
            log("compile", seconds=compile_s)
        mark = stepper.time()
        while True:
            step, done = now["step"], now["step"] == config.steps
            stopping = group.any(interrupted.is_set())
            save = done or due(config.snapshot_every) or stopping
            preview = due(config.preview_every) or (config.preview_every > 0 and done)
            others = (config.log_every, config.validate_every, config.keep_every)
            # what was due at `resumed_at` was done before the checkpoint
            if step != resumed_at and (save or preview or any(map(due, others))):
                stepper.check_finite(folder)
                stopped, trained = stepper.time(), stepper.count
                steps_s += stopped - mark if trained else 0.0
                if trained and (save or due(config.log_every)):
                    count = trained * task.batch_size * config.accumulate
                    rate, samples, logged_s = count / (steps_s - logged_s), samples + count, steps_s
                    terms = stepper.take_terms()
                    log("train", **terms, lr=stepper.lr(step - 1), samples_per_s=rate)
                    bar.set_postfix(loss=f"{terms['loss']:.4g}", samples_s=f"{rate:.1f}")
                if due(config.validate_every) or done:
                    values = group.from_first(validated)
                    log("validation", **values)
                    if values["loss"] < now["best_loss"]:
                        now |= {"best_loss": values["loss"], "best_step": step}
                        save = True
                if preview:
                    group.from_first(show)
                if save or due(config.keep_every):
                    also = ["best"] if now["best_step"] == step else []
                    also += [f"step_{step:06d}"] if step and due(config.keep_every) else []
                    group.from_first(partial(write, also))
                mark = stepper.time()
                # what comes before the first step and after the last one is no pause
                paused_s += mark - stopped if trained and not done else 0.0
            if done:
                break
            if stopping:
                group.from_first(writer.wait)
                raise KeyboardInterrupt(
                    f"stopped at step {step} of {config.steps}; a checkpoint is in {kept}: call "
                    "fit() again with the same arguments to resume"
                )
            stepper.train(step)
            if device.type == "cpu":  # on a GPU, to ask would wait for the queue
                stepper.check_finite(folder)
            now["step"] += 1
            bar.update()
        group.from_first(writer.wait)

    def by_step(pattern: str) -> dict[int, Path]:
        return {int(path.stem[5:]): path for path in sorted(folder.glob(pattern))}

    history = [row for row in rows if row["event"] == "train"]
    last_rate = history[-1]["samples_per_s"] if history else 0.0
    return TrainResult(
        model=stepper.model,
        ema_model=stepper.ema,
        history=history,
        validations=[row for row in rows if row["event"] == "validation"],
        steps=now["step"],
        samples_per_s=samples / steps_s if steps_s else last_rate,
        duration_s=steps_s,
        compile_s=compile_s,
        paused_s=paused_s,
        around_s=time.perf_counter() - began - compile_s - steps_s - paused_s,
        peak_memory_bytes=machine.peak_memory(device),
        gate_overridden=overridden,
        run_dir=folder,
        previews=by_step("previews/step_*.png"),
        snapshots=by_step(f"checkpoints/step_*{SUFFIX}"),
    )


def _earlier(
    folder: Path, now: dict[str, Any], resume: bool
) -> tuple[dict[str, Tensor] | None, dict[str, Any], list[dict[str, Any]]]:
    """What an earlier call left in `folder`, once it is known to be of this run: the checkpoint's
    tensors and metadata (None and `now` if there is none) and the log up to there."""
    log_file, rows = folder / "log.jsonl", list[dict[str, Any]]()
    tensors: dict[str, Tensor] | None = None
    if not resume:
        for pattern in ("log.jsonl", "previews/step_*.png", f"checkpoints/*{SUFFIX}"):
            for path in folder.glob(pattern):
                path.unlink()
    elif found := checkpoints.read_latest(folder / "checkpoints"):
        if different := _differing(found[1]["identity"], now["identity"]):
            raise ResumeRefused(
                f"{folder} holds a run with another configuration; differing: "
                f"{'; '.join(different)}. Use another run_dir, or resume=False to start over"
            )
        tensors, now = found
        rows = read_log(log_file) if log_file.exists() else []
        rows = [row for row in rows if row["step"] <= now["step"]]  # others will come again
    write_atomic(log_file, "".join(json.dumps(row) + "\n" for row in rows))
    return tensors, now, rows


def read_log(path: Path) -> list[dict[str, Any]]:
    """The rows of a run's log.jsonl. Its last line may be half written, or cut by a kill."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


@contextlib.contextmanager
def interrupt_flag(*, terminate: bool = False) -> Iterator[threading.Event]:
    """Turn the first Ctrl-C into a flag that the loop reads between steps; a second one acts. With
    `terminate` SIGTERM, by which torchrun ends its processes, is such a flag too."""
    flag, signals = threading.Event(), [signal.SIGINT, *[signal.SIGTERM] * terminate]

    def handler(number: int, frame: Any) -> None:
        if flag.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        flag.set()

    with contextlib.ExitStack() as stack:
        if threading.current_thread() is threading.main_thread():  # no other can set handlers
            for number in signals:
                stack.callback(signal.signal, number, signal.signal(number, handler))
        yield flag


def _differing(theirs: Any, ours: Any, path: str = "") -> list[str]:
    """Paths at which two JSON values differ, with both values, or what lists lack and have more."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        keys = sorted(theirs.keys() | ours.keys())
        parts = ((theirs.get(k), ours.get(k), f"{path}.{k}".lstrip(".")) for k in keys)
        return [line for part in parts for line in _differing(*part)]
    if path == "records" and theirs != ours:
        gone, new = (sorted(set(a) - set(b)) for a, b in ((theirs, ours), (ours, theirs)))
        return [f"records: {len(gone)} gone {gone[:3]}, {len(new)} new {new[:3]}"]
    return [] if theirs == ours else [f"{path} was {theirs!r}, now {ours!r}"]
