"""What a training is given: a task, and how long and how to train it. And how it can end badly."""

import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from fresnel.data.records import ViewTensors


class Task(Protocol):
    """What is trained and on what; model and data live on one device.

    The content hash of `data` is compared with the gate's receipt. A resumed run must have the same
    `config`. `hot` holds by name the functions of tensors that every step calls through it, so that
    compiled or recorded ones can take their place ("network" calls the model).
    """

    model: Any
    data: ViewTensors
    batch_size: int
    config: dict[str, Any]
    hot: dict[str, Callable[..., Any]]

    def phase(self, progress: float) -> Hashable:
        """What kind of step that is: those of one kind do the same work on other random numbers and
        wait for nothing, so that they make one CUDA graph. None: not such a step; then, on a GPU,
        the functions in `hot` become graphs."""

    def batch(self, step: int, generator: torch.Generator) -> dict[str, Any]: ...

    def loss(
        self, batch: Any, *, progress: float, generator: torch.Generator, ema: Any
    ) -> dict[str, Tensor]:
        """Named scalar terms; "loss" is the one to minimise. `progress` runs from 0 to 1."""

    def validation(self, model: Any) -> dict[str, float]:
        """Figures on validation objects; "loss" decides which checkpoint is the best."""

    def preview(self, model: Any, generator: torch.Generator) -> np.ndarray:
        """A picture to look at, uint8 (H, W, 3)."""


@dataclass(frozen=True)
class TrainConfig:
    """How to train; what to train is the task's. An interval of 0 steps means never."""

    steps: int = 1000
    optimizer: str = "muon"  # of matrices and kernels, AdamW of the rest; or "adamw", of all
    lr: float = 1e-3
    warmup_steps: int = 50  # linear from 0
    cooldown_share: float = 0.6  # last share of the run, linear to 0
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
    validate_every: int = 200  # and at the end
    snapshot_every: int = 200  # steps between writings of `latest`
    keep_every: int = 0  # steps between snapshots that are kept as step_XXXXXX
    preview_every: int = 0  # steps between pictures, and at the end

    def __post_init__(self) -> None:
        every = "validate_every snapshot_every keep_every preview_every"
        wanted: list[tuple[str, Callable[[Any], bool], str]] = [
            ("steps log_every accumulate", lambda n: n >= 1, "at least 1"),
            (every, lambda n: n >= 0, "at least 0"),
            ("lr grad_clip", lambda x: 0 < x < math.inf, "a finite value > 0"),
            # beyond, no positive exponent has this width
            ("ema_std", lambda x: 0 < x < 0.28, "a value in (0, 0.28)"),
            ("cooldown_share", lambda x: 0 <= x <= 1, "one in [0, 1]"),
            ("precision", lambda name: name in ("fp32", "bf16"), "'fp32' or 'bf16'"),
            ("optimizer", lambda name: name in ("muon", "adamw"), "'muon' or 'adamw'"),
        ]
        for names, fits, want in wanted:
            for name in names.split():
                if not fits(value := getattr(self, name)):
                    raise ValueError(f"{name}: got {value!r}, want {want}")


class OutOfMemory(RuntimeError):
    """The model and batch don't fit; the message says what to lower."""


class NonFiniteLoss(RuntimeError):
    """The loss or its gradient is NaN or infinite; `path` holds the batch that caused it."""

    def __init__(self, message: str, step: int, path: Path) -> None:
        super().__init__(message, step, path)  # as it is made again in another process
        self.step, self.path = step, path

    def __str__(self) -> str:
        return str(self.args[0])


class ResumeRefused(ValueError):
    """The run in this folder was started with another configuration or other data."""
