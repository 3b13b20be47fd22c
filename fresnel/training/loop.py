"""fit(): the one training loop, for decoder and CVS.

Every random draw of a step follows from (seed, step), so a run that was stopped and resumed is
bit for bit the run that was not (on one machine, with deterministic kernels).
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from fresnel.gate import verdict as gate
from fresnel.host.locks import locked
from fresnel.training import checkpoints
from fresnel.training import host as surroundings
from fresnel.training.step import OutOfMemory, Stepper, ema_exponent, finite_names, step_seed

__all__ = [
    "NonFiniteLoss",
    "OutOfMemory",
    "ResumeRefused",
    "Task",
    "TrainConfig",
    "TrainResult",
    "ema_exponent",
    "fit",
    "load_weights",
    "step_seed",
]


class Task(Protocol):
    """What is trained and on what. `config` (a dict or dataclass), where there is one, goes into
    the checkpoints and must be the same on a resume. Model and data live on one device. `hot`,
    where there is one, holds by name the functions of tensors that every step calls through it, so
    that compiled or recorded ones can take their place (else the model is compiled). `phase`, where
    there is one, takes `progress` and says what kind of step that is: steps of one kind do the same
    work on other random numbers, and wait for nothing, so that a GPU can be given them as one CUDA
    graph; None: not such a step. Without it, on a GPU, the functions in `hot` become graphs."""

    model: Any
    batch_size: int

    def batch(self, step: int, generator: torch.Generator) -> dict[str, Any]: ...

    def loss(
        self, batch: Any, *, progress: float, generator: torch.Generator, ema: Any
    ) -> dict[str, Tensor]:
        """Named scalar terms; "loss" is the one to minimise. `progress` runs from 0 to 1."""
        ...

    def validation(self, model: Any) -> dict[str, float]:
        """Held-out figures; "loss" decides which checkpoint is the best."""
        ...

    def preview(self, model: Any, generator: torch.Generator) -> np.ndarray:
        """A picture to look at, uint8 (H, W, 3)."""
        ...


@dataclass(frozen=True)
class TrainConfig:
    """How to train; what to train is the task's. An interval of 0 means never."""

    steps: int = 1000
    lr: float = 1e-3
    warmup_steps: int = 50  # linear from 0
    cooldown_share: float = 0.2  # last share of the run, linear to 0
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.99)
    grad_clip: float = 1.0  # norm of all gradients
    ema_std: float = 0.05  # width of the averaging window, as a share of the run so far
    seed: int = 0
    precision: str = "fp32"  # "fp32" | "bf16" (autocast; weights stay float32)
    compile: bool = False  # torch.compile what every step runs: minutes at first, then cached
    graphs: bool = True  # CUDA graphs of steps, where the task allows it; not if deterministic
    accumulate: int = 1  # batches of the task's batch_size a step, where no larger one fits
    checkpointing: bool = False  # recompute activations: less memory, slower
    deterministic: bool | None = None  # None: on CPU only
    log_every: int = 20
    validate_every: int = 200
    snapshot_every: int = 200  # steps between writings of `latest`
    keep_every: int = 0  # steps between snapshots that are kept as step_XXXXXX
    preview_steps: tuple[int, ...] = (0,)  # besides the last

    def __post_init__(self) -> None:
        lowest = {"steps": 1, "log_every": 1, "accumulate": 1, "validate_every": 0, "keep_every": 0}
        for name, low in lowest.items():
            if getattr(self, name) < low:
                raise ValueError(f"{name}: got {getattr(self, name)}, want at least {low}")
        for name in ("lr", "grad_clip"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise ValueError(f"{name}: got {getattr(self, name)}, want a finite value > 0")
        if not 0 < self.ema_std < 0.28:  # beyond, no positive exponent has this width
            raise ValueError(f"ema_std: got {self.ema_std}, want a value in (0, 0.28)")
        if not 0 <= self.cooldown_share <= 1:
            raise ValueError(f"cooldown_share: got {self.cooldown_share}, want one in [0, 1]")
        if self.precision not in ("fp32", "bf16"):
            raise ValueError(f"precision: got {self.precision!r}, want 'fp32' or 'bf16'")
        # lists come from JSON and YAML
        object.__setattr__(self, "betas", tuple(self.betas))
        object.__setattr__(self, "preview_steps", tuple(self.preview_steps))


@dataclass(frozen=True)
class TrainResult:
    """What came out of `fit`.

    `history`: one row per log interval ("step", the loss terms' means, "grad_norm", "lr",
    "samples_per_s", and "warming" where steps were still being recorded); `validations`: "step" and
    the task's figures. `samples_per_s` and `duration_s` are of this call's training steps alone
    (`samples_per_s` of all steps, where a finished run had none left to do); `compile_s` came
    before them, `paused_s` (validation, previews, checkpoints) in between. `peak_memory_bytes` is
    of the CUDA allocator, or of the process on a CPU. `gate_overridden`: trained on refused data,
    on purpose.
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
    previews: list[Path] = field(default_factory=list)


class NonFiniteLoss(RuntimeError):
    """The loss or its gradient is NaN or infinite; `path` holds the batch that caused it."""

    def __init__(self, message: str, step: int, path: Path) -> None:
        super().__init__(message)
        self.step, self.path = step, path


class ResumeRefused(ValueError):
    """The run in this folder was started with another configuration or other data."""


def fit(
    task: Task,
    dataset: Any,
    *,
    config: TrainConfig,
    run_dir: str | Path,
    receipt: gate.Receipt | None = None,
    device: torch.device | str | None = None,
    resume: bool = True,
    allow_failed_gate: bool = False,
    stop_at_step: int | None = None,
    progress_bar: bool = True,
) -> TrainResult:
    """Train `task` on data that the gate let through; go on where an earlier call stopped.

    Writes run_dir/log.jsonl, run_dir/checkpoints/{latest,previous,best,step_XXXXXX} and
    run_dir/previews/. May be killed at any moment: the next call resumes from `latest`. Of two
    calls with one run_dir at once the second waits for the first.

    Args:
        dataset: the data behind the task; its hash is recomputed and compared with the receipt.
        receipt: the gate's; None: the one in the dataset's folder.
        device: where the task already is (None: don't check).
        resume: False starts over and removes what an earlier run left in `run_dir`.
        allow_failed_gate: negative controls: train in spite of a recorded failure. Checkpoints,
            log and result then carry gate_overridden = true.
        stop_at_step: stop (resumably) there instead of at config.steps.

    Raises:
        gate.GateRefusal, ResumeRefused, NonFiniteLoss, OutOfMemory, checkpoints.DiskFull;
        KeyboardInterrupt after a checkpoint was saved.
    """
    receipt = gate.require_receipt(dataset, "gate", allow_failed=allow_failed_gate, receipt=receipt)
    run = _Run(task, config, Path(run_dir), str(dataset.content_hash), bool(receipt.overridden))
    if device is not None and torch.device(device).type != run.device.type:
        raise ValueError(f"device: got {device}, the task's model is on {run.device}")
    end = config.steps if stop_at_step is None else min(stop_at_step, config.steps)
    busy = f"{run.folder}: another process trains there; waiting for it"

    with contextlib.ExitStack() as stack:
        stack.enter_context(locked(run.folder / ".lock", busy))
        run.resume() if resume else run.clear()
        resumed_at = run.step if run.resumed else None
        stack.enter_context(surroundings.kernels(config.deterministic, run.device))
        cuda = [run.device] if run.device.type == "cuda" else []
        stack.enter_context(torch.random.fork_rng(cuda))
        interrupted = stack.enter_context(surroundings.interrupt_flag())
        bar = stack.enter_context(surroundings.bar(config.steps, run.step, progress_bar))
        stack.enter_context(run.writer)
        run.start_log()
        if config.compile and run.step < end:
            run.compile_s = run.stepper.compile()
            run.log("compile", seconds=run.compile_s, parts=run.stepper.compiled)
        while True:
            done = run.step >= end
            if run.step != resumed_at:  # else all of this was done before the checkpoint
                stopping = done or interrupted.is_set()
                snapshot = _due(run.step, config.snapshot_every) or stopping
                if _due(run.step, config.log_every) or snapshot:
                    run.status(bar)
                if _due(run.step, config.validate_every) or run.step == config.steps:
                    snapshot |= run.validate()
                if run.step in (*config.preview_steps, config.steps):
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


def load_weights(path: str | Path, model: nn.Module, which: str = "ema") -> dict[str, Any]:
    """Load a checkpoint's "ema" or "model" weights into `model`; returns the run's metadata."""
    return checkpoints.load_weights(path, model, which)


class _Run:
    """The state of one `fit` and the pieces of its loop."""

    def __init__(
        self, task: Task, config: TrainConfig, folder: Path, dataset_hash: str, overridden: bool
    ) -> None:
        self.task, self.config, self.folder = task, config, folder
        self.stepper = Stepper(task, config)
        self.model, self.ema = self.stepper.model, self.stepper.ema
        self.device = self.stepper.device
        self.writer = checkpoints.Writer(background=self.device.type == "cuda")
        self.overridden = overridden
        self.identity = json.loads(
            json.dumps(
                {
                    "train": asdict(config),
                    "task": _describe(task),
                    "dataset_hash": dataset_hash,
                    "gate_overridden": overridden,
                }
            )
        )
        self.step, self.resumed = 0, False
        self.best_loss, self.best_step = math.inf, -1
        self.rows: list[dict[str, Any]] = []
        self.trained_samples, self.trained_s = 0, 0.0
        self.interval_s, self.compile_s, self.paused_s = 0.0, 0.0, 0.0
        self.clock_began: float | None = None
        self.paused_at: float | None = None
        surroundings.reset_peak_memory(self.device)

    # --- start --------------------------------------------------------------------------------

    def clear(self) -> None:
        """Remove what an earlier run left here."""
        paths = [self.folder / "log.jsonl", *(self.folder / "previews").glob("step_*.png")]
        for path in [*paths, *(self.folder / "checkpoints").glob(f"*{checkpoints.SUFFIX}")]:
            path.unlink(missing_ok=True)

    def resume(self) -> None:
        found = checkpoints.read_latest(self.folder / "checkpoints")
        if found is None:
            return
        tensors, metadata = found
        different = _differing(metadata["identity"], self.identity)
        if different:
            raise ResumeRefused(
                f"{self.folder} holds a run with another configuration; differing: "
                f"{'; '.join(different)}. Use another run_dir, or resume=False to start over"
            )
        checkpoints.unpack(tensors, self.model, self.ema, self.stepper.optimizer)
        self.step, self.resumed = metadata["step"], True
        self.best_loss = math.inf if metadata["best_loss"] is None else metadata["best_loss"]
        self.best_step = metadata["best_step"]

    def start_log(self) -> None:
        """Keep the log's rows up to the step we start from; later ones will be written again."""
        self.folder.mkdir(parents=True, exist_ok=True)
        log = self.folder / "log.jsonl"
        if self.resumed and log.exists():
            for line in log.read_text(encoding="utf-8").splitlines():
                with contextlib.suppress(json.JSONDecodeError):  # a kill may cut the last line
                    row = json.loads(line)
                    if row["step"] <= self.step:
                        self.rows.append(row)
        temporary = log.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in self.rows), encoding="utf-8")
        os.replace(temporary, log)
        self.log("start", resumed=self.resumed, **self.identity)

    # --- one step -----------------------------------------------------------------------------

    def train_step(self) -> None:
        if self.clock_began is None:
            self.clock_began = time.perf_counter()
            if self.paused_at is not None:
                self.paused_s += self.clock_began - self.paused_at
        self.stepper.train(self.step)
        if self.device.type == "cpu":  # on a GPU this would wait for the queue
            self.check_finite()
        self.step += 1

    def check_finite(self) -> None:
        """Stop if a step's loss or gradient was not finite, saving the first such batch.

        The batch is made again: it follows from (seed, step). Called before every checkpoint.
        """
        found = int(self.stepper.first_bad)
        if found < 0:
            return
        from safetensors.torch import save_file

        step, micro = divmod(found, self.config.accumulate)
        batch = self.stepper.batch(step, micro)
        path = self.folder / f"nonfinite_step_{step:06d}.safetensors"
        tensors = {k: v.detach().cpu().clone() for k, v in batch.items() if isinstance(v, Tensor)}
        names = finite_names(self.stepper.take_terms())
        save_file(tensors, path, {"fresnel": json.dumps({"step": step, "terms": names})})
        raise NonFiniteLoss(
            f"step {step}: not finite: {', '.join(names)}. The batch is in {path}; look at it, "
            "or lower lr. The last checkpoint is from before this step",
            step,
            path,
        )

    # --- between steps ------------------------------------------------------------------------

    def status(self, bar: Any) -> None:
        if not self.stepper.count:
            return
        self.check_finite()
        samples = self.stepper.count * self.task.batch_size * self.config.accumulate
        warming: dict[str, Any] = {"warming": True} if self.stepper.warming else {}
        row = self.stepper.take_terms()
        self.pause_clock()
        seconds, self.interval_s = self.interval_s, 0.0
        self.trained_s += seconds
        self.trained_samples += samples
        lr = self.stepper.lr(self.step - 1)
        self.log("train", **row, lr=lr, samples_per_s=samples / seconds, **warming)
        bar.set_postfix(loss=f"{row['loss']:.4g}", samples_s=f"{samples / seconds:.1f}")

    def validate(self) -> bool:
        """Log the task's validation; True if it is the best so far."""
        self.pause_clock()
        with torch.no_grad(), self.stepper.autocast():
            values = self.task.validation(self.ema.eval())
        self.log("validation", **values)
        if not values["loss"] < self.best_loss:
            return False
        self.best_loss, self.best_step = values["loss"], self.step
        return True

    def preview(self) -> None:
        from PIL import Image

        self.pause_clock()
        generator = torch.Generator(self.device).manual_seed(step_seed(self.config.seed, -1))
        with torch.no_grad(), self.stepper.autocast():
            picture = self.task.preview(self.ema.eval(), generator)
        path = self.folder / "previews" / f"step_{self.step:06d}.png"
        path.parent.mkdir(exist_ok=True)
        temporary = path.with_suffix(".tmp")
        Image.fromarray(picture).save(temporary, format="PNG")
        os.replace(temporary, path)

    def snapshot(self) -> None:
        self.pause_clock()
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
        tensors = checkpoints.pack(self.model, self.ema, self.stepper.optimizer)
        self.writer.save(self.folder / "checkpoints", tensors, metadata, keep_as=names)

    def pause_clock(self) -> None:
        """Leave the time until the next step out of the training rate."""
        if self.clock_began is not None:
            self.stepper.synchronize()
            self.paused_at = time.perf_counter()
            self.interval_s += self.paused_at - self.clock_began
            self.clock_began = None

    def log(self, event: str, **values: Any) -> None:
        row = {"event": event, "step": self.step, **values}
        if self.overridden:
            row["gate_overridden"] = True
        self.rows.append(row)
        with open(self.folder / "log.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def rate(self) -> float:
        """Samples per second of training: of this call, or of the log where it trained nothing."""
        if self.trained_s:
            return self.trained_samples / self.trained_s
        rows = [row for row in self.rows if row["event"] == "train"]
        before = [0, *(row["step"] for row in rows)]
        steps = [row["step"] - last for row, last in zip(rows, before, strict=False)]
        seconds = sum(n / row["samples_per_s"] for n, row in zip(steps, rows, strict=True))
        return sum(steps) / seconds if seconds else 0.0

    def result(self) -> TrainResult:
        def of(event: str) -> list[dict[str, Any]]:
            return [row for row in self.rows if row["event"] == event]

        return TrainResult(
            model=self.model,
            ema_model=self.ema,
            history=of("train"),
            validations=of("validation"),
            steps=self.step,
            samples_per_s=self.rate(),
            duration_s=self.trained_s,
            compile_s=self.compile_s,
            paused_s=self.paused_s,
            peak_memory_bytes=surroundings.peak_memory(self.device),
            gate_overridden=self.overridden,
            best_step=self.best_step,
            best_loss=self.best_loss,
            run_dir=self.folder,
            previews=sorted((self.folder / "previews").glob("step_*.png")),
        )


def _describe(task: Task) -> dict[str, Any]:
    config = getattr(task, "config", None) or getattr(task.model, "config", None)
    described = asdict(config) if is_dataclass(config) else dict(config or {})  # type: ignore[arg-type]
    name = getattr(task, "name", type(task).__name__)
    return {"name": name, "batch_size": task.batch_size, **described}


def _differing(theirs: Any, ours: Any, path: str = "") -> list[str]:
    """Paths at which two JSON values differ, with both values."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        return [
            line
            for key in sorted(theirs.keys() | ours.keys())
            for line in _differing(
                theirs.get(key), ours.get(key), f"{path}.{key}" if path else str(key)
            )
        ]
    return [] if theirs == ours else [f"{path} was {theirs!r}, now {ours!r}"]


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
