"""fit(): the one training loop, for decoder and CVS.

Every random draw of a step follows from (seed, step), so a run that was stopped and resumed is
bit for bit the run that was not (on one machine, with deterministic kernels).
"""

from __future__ import annotations

import contextlib
import json
import math
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from fresnel.gate.receipts import GateRefusal, Receipt, require_receipt
from fresnel.host import machine
from fresnel.host.files import locked, write_atomic
from fresnel.training import checkpoints
from fresnel.training.step import Stepper, kernels, step_seed
from fresnel.training.task import NonFiniteLoss, ResumeRefused, Task, TrainConfig


@dataclass(frozen=True)
class TrainResult:
    """What came out of `fit`.

    `history`: one row per log interval ("step", means of the loss terms, "grad_norm", "lr",
    "samples_per_s"); `validations`: "step" and the task's figures. `samples_per_s` and `duration_s`
    are of this call's training steps alone (the last row's rate, where none was left to do);
    `compile_s` came before them, `paused_s` (validation, previews, checkpoints) in between.
    `peak_memory_bytes`: of the CUDA allocator, or of the process on a CPU. `gate_overridden`:
    trained on refused data, on purpose. `previews`, `snapshots`: pictures and checkpoints by step.
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
    peak_memory_bytes: int
    gate_overridden: bool
    best_step: int
    best_loss: float
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
    stop_at_step: int | None = None,
    progress_bar: bool = True,
) -> TrainResult:
    """Train `task` on data that the gate let through; go on where an earlier call stopped.

    Writes run_dir/log.jsonl, run_dir/checkpoints/{latest,previous,best,step_XXXXXX}.safetensors and
    run_dir/previews/. May be killed at any moment: the next call resumes from `latest`. Of two
    calls with one run_dir at once the second waits for the first.

    Args:
        receipt: the gate's, of the data that `task.data` was made from: their content hashes are
            compared. None, as from data without a receipt: refused.
        resume: False starts over and removes what an earlier run left in `run_dir`.
        allow_failed_gate: negative controls: train in spite of a recorded failure. Checkpoints,
            log and result then carry gate_overridden = true.
        stop_at_step: stop (resumably) there instead of at config.steps.

    Raises:
        GateRefusal, ResumeRefused, NonFiniteLoss, OutOfMemory, checkpoints.DiskFull;
        KeyboardInterrupt after a checkpoint was saved.
    """
    if receipt is None:
        raise GateRefusal("receipt: got None; validate the data and pass the gate's receipt")
    receipt = require_receipt(task.data, "gate", allow_failed_gate, receipt=receipt)
    run = _Run(task, config, Path(run_dir), bool(receipt.overridden))
    end = config.steps if stop_at_step is None else min(stop_at_step, config.steps)
    busy = f"{run.folder}: another process trains there; waiting for it"

    with contextlib.ExitStack() as stack:
        stack.enter_context(locked(run.folder / ".lock", busy))
        run.resume() if resume else run.clear()
        resumed_at = run.step if run.resumed else None
        stack.enter_context(kernels(config.deterministic, run.device))
        stack.enter_context(
            torch.random.fork_rng([run.device] if run.device.type == "cuda" else [])
        )
        interrupted = stack.enter_context(interrupt_flag())
        stack.enter_context(run.writer)
        bar = stack.enter_context(
            tqdm(total=config.steps, initial=run.step, disable=not progress_bar, desc="train")
        )
        run.start_log()
        if config.compile and run.step < end:
            run.seconds["compile"] = run.stepper.compile()
            run.log("compile", seconds=run.seconds["compile"])
        while True:
            done, last = run.step >= end, run.step == config.steps
            if run.step != resumed_at:  # else all of this was done before the checkpoint
                snapshot = _due(run.step, config.snapshot_every) or done or interrupted.is_set()
                if _due(run.step, config.log_every) or snapshot:
                    run.status(bar)
                if _due(run.step, config.validate_every) or last:
                    snapshot |= run.validate()
                if _due(run.step, config.preview_every) or (config.preview_every and last):
                    run.preview()
                if snapshot or _due(run.step, config.keep_every):
                    run.snapshot()
            if done:
                break
            if interrupted.is_set():
                run.writer.wait()
                raise KeyboardInterrupt(
                    f"stopped at step {run.step} of {config.steps}; a checkpoint is in "
                    f"{run.folder / 'checkpoints'}: call fit() again with the same arguments "
                    "to resume"
                )
            run.train_step()
            bar.update()
        run.writer.wait()
    return run.result()


class _Run:
    """The state of one `fit` and the pieces of its loop."""

    def __init__(self, task: Task, config: TrainConfig, folder: Path, overridden: bool) -> None:
        self.task, self.config, self.folder, self.overridden = task, config, folder, overridden
        self.stepper = Stepper(task, config)
        self.device = self.stepper.device
        self.state = (self.stepper.model, self.stepper.ema, self.stepper.optimizer)
        self.writer = checkpoints.Writer(background=self.device.type == "cuda")
        about = {
            "train": asdict(config),
            "task": {"batch_size": task.batch_size, **task.config},
            "data": task.data.content_hash,
            "records": list(task.data.names),
            "gate_overridden": overridden,
        }
        self.identity: dict[str, Any] = json.loads(json.dumps(about))  # as a checkpoint has it
        self.step, self.resumed = 0, False
        self.best_loss, self.best_step = math.inf, -1
        self.rows: list[dict[str, Any]] = []
        self.samples, self.logged_s = 0, 0.0  # trained and logged by this call
        # what came before the first step and what comes after the last one are no pauses
        self.seconds = {"compile": 0.0, "start": 0.0, "steps": 0.0, "pauses": 0.0}
        self.doing, self.since = "start", time.perf_counter()
        machine.reset_peak_memory(self.device)

    def clear(self) -> None:
        """Remove what an earlier run left here."""
        for pattern in ("log.jsonl", "previews/step_*.png", f"checkpoints/*{checkpoints.SUFFIX}"):
            for path in self.folder.glob(pattern):
                path.unlink()

    def resume(self) -> None:
        found = checkpoints.read_latest(self.folder / "checkpoints")
        if found is None:
            return
        tensors, metadata = found
        if different := _differing(metadata["identity"], self.identity):
            raise ResumeRefused(
                f"{self.folder} holds a run with another configuration; differing: "
                f"{'; '.join(different)}. Use another run_dir, or resume=False to start over"
            )
        checkpoints.unpack(tensors, *self.state)
        self.step, self.resumed = metadata["step"], True
        self.best_loss = math.inf if metadata["best_loss"] is None else metadata["best_loss"]
        self.best_step = metadata["best_step"]

    def start_log(self) -> None:
        """Keep the log's rows up to the step we start from; later ones will be written again."""
        path = self.folder / "log.jsonl"
        if self.resumed and path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                with contextlib.suppress(json.JSONDecodeError):  # a kill may cut the last line
                    self.rows.append(json.loads(line))
            self.rows = [row for row in self.rows if row["step"] <= self.step]
        write_atomic(path, "".join(json.dumps(row) + "\n" for row in self.rows))
        self.log("start", resumed=self.resumed, **self.identity)

    def train_step(self) -> None:
        self.clock("steps")
        self.stepper.train(self.step)
        if self.stepper.stopped():
            self.check_finite()
        self.step += 1

    def check_finite(self) -> None:
        """Stop if a step's loss or gradient was not finite, saving the first such batch.

        The batch is made again: it follows from (seed, step). Called before every checkpoint.
        """
        found = int(self.stepper.first_bad)
        if found < 0:
            return
        step, micro = divmod(found, self.config.accumulate)
        batch = self.stepper.batch(step, micro)
        tensors = {k: v.detach().cpu().clone() for k, v in batch.items() if isinstance(v, Tensor)}
        terms = self.stepper.take_terms()
        names = [name for name, value in terms.items() if not math.isfinite(value)]
        path = self.folder / f"nonfinite_step_{step:06d}.safetensors"
        save_file(tensors, path, {"fresnel": json.dumps({"step": step, "terms": names})})
        raise NonFiniteLoss(
            f"step {step}: not finite: {', '.join(names)}. The batch is in {path}; look at it, "
            "or lower lr. The last checkpoint is from before this step",
            step,
            path,
        )

    def status(self, bar: Any) -> None:
        if not self.stepper.count:
            return
        self.check_finite()
        samples = self.stepper.count * self.task.batch_size * self.config.accumulate
        row, before = self.stepper.take_terms(), self.logged_s
        self.clock("pauses")
        self.logged_s, self.samples = self.seconds["steps"], self.samples + samples
        rate = samples / (self.logged_s - before)
        self.log("train", **row, lr=self.stepper.lr(self.step - 1), samples_per_s=rate)
        bar.set_postfix(loss=f"{row['loss']:.4g}", samples_s=f"{rate:.1f}")

    def validate(self) -> bool:
        """Log the task's validation; True if it is the best so far."""
        self.clock("pauses")
        with torch.no_grad(), self.stepper.autocast():
            values = self.task.validation(self.stepper.ema)
        self.log("validation", **values)
        best = values["loss"] < self.best_loss
        if best:
            self.best_loss, self.best_step = values["loss"], self.step
        return best

    def preview(self) -> None:
        self.clock("pauses")
        generator = torch.Generator(self.device).manual_seed(step_seed(self.config.seed, -1))
        with torch.no_grad(), self.stepper.autocast():
            picture = self.task.preview(self.stepper.ema, generator)
        file = BytesIO()
        Image.fromarray(picture).save(file, format="PNG")
        write_atomic(self.folder / "previews" / f"step_{self.step:06d}.png", file.getvalue())

    def snapshot(self) -> None:
        self.clock("pauses")
        self.check_finite()
        metadata = {
            "step": self.step,
            "identity": self.identity,
            "gate_overridden": self.overridden,
            "best_loss": self.best_loss if math.isfinite(self.best_loss) else None,
            "best_step": self.best_step,
        }
        names = ["best"] if self.best_step == self.step else []
        if _due(self.step, self.config.keep_every) and self.step:
            names.append(f"step_{self.step:06d}")
        tensors = checkpoints.pack(*self.state)
        self.writer.save(self.folder / "checkpoints", tensors, metadata, names)

    def clock(self, doing: str) -> None:
        """Count the time since the last change; from now on the run is `doing` this."""
        if doing == self.doing or (self.doing, doing) == ("start", "pauses"):
            return
        self.stepper.synchronize()
        now = time.perf_counter()
        self.seconds[self.doing] += now - self.since
        self.doing, self.since = doing, now

    def log(self, event: str, **values: Any) -> None:
        stamp = {"gate_overridden": True} if self.overridden else {}
        self.rows.append({"event": event, "step": self.step, **values, **stamp})
        with open(self.folder / "log.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(self.rows[-1]) + "\n")

    def result(self) -> TrainResult:
        events: dict[str, list[dict[str, Any]]] = {"train": [], "validation": []}
        for row in self.rows:
            events.setdefault(row["event"], []).append(row)

        def by_step(pattern: str) -> dict[int, Path]:
            return {int(path.stem[5:]): path for path in sorted(self.folder.glob(pattern))}

        history, steps_s = events["train"], self.seconds["steps"]
        rate = history[-1]["samples_per_s"] if history else 0.0
        return TrainResult(
            model=self.stepper.model,
            ema_model=self.stepper.ema,
            history=history,
            validations=events["validation"],
            steps=self.step,
            samples_per_s=self.samples / steps_s if steps_s else rate,
            duration_s=steps_s,
            compile_s=self.seconds["compile"],
            paused_s=self.seconds["pauses"],
            peak_memory_bytes=machine.peak_memory(self.device),
            gate_overridden=self.overridden,
            best_step=self.best_step,
            best_loss=self.best_loss,
            run_dir=self.folder,
            previews=by_step("previews/step_*.png"),
            snapshots=by_step(f"checkpoints/step_*{checkpoints.SUFFIX}"),
        )


@contextlib.contextmanager
def interrupt_flag() -> Iterator[threading.Event]:
    """Turn the first Ctrl-C into a flag that the loop reads between steps; a second one acts."""
    flag, before = threading.Event(), signal.getsignal(signal.SIGINT)

    def handler(number: int, frame: Any) -> None:
        if flag.is_set():
            raise KeyboardInterrupt
        flag.set()

    main = threading.current_thread() is threading.main_thread()  # handlers can be set there alone
    if main:
        signal.signal(signal.SIGINT, handler)
    try:
        yield flag
    finally:
        if main:
            signal.signal(signal.SIGINT, before)


def _differing(theirs: Any, ours: Any, path: str = "") -> list[str]:
    """Paths at which two JSON values differ, with both values, or what lists lack and have more."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        return [
            line
            for key in sorted(theirs.keys() | ours.keys())
            for line in _differing(theirs.get(key), ours.get(key), f"{path}.{key}".lstrip("."))
        ]
    if theirs == ours:
        return []
    if path == "records":
        gone, new = (sorted(set(a) - set(b)) for a, b in ((theirs, ours), (ours, theirs)))
        return [f"records: {len(gone)} gone {gone[:3]}, {len(new)} new {new[:3]}"]
    return [f"{path} was {theirs!r}, now {ours!r}"]


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
