"""One optimisation step: batches, loss, gradients, AdamW, average. No files, no clock."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import math
import time
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from fresnel.models.unet import UNet
from fresnel.training import host as surroundings
from fresnel.training.cuda_graphs import Recorded, Recorder

if TYPE_CHECKING:
    from fresnel.training.loop import Task, TrainConfig


class OutOfMemory(RuntimeError):
    """The model and batch don't fit; the message says what to lower."""


class Stepper:
    """What a training step changes: weights, their average, the optimizer's state, running sums.

    Every random draw follows from (seed, step, micro-batch), so that steps can be repeated. On a
    GPU nothing in a step waits for the device.

    Attributes:
        sums: of the loss terms and the gradient's norm since `take_terms`, float64, in the order of
            `names`; count: over how many steps; warming: whether one of them took longer than its
            like will, as it was run to be recorded.
        compiled: part of the task -> how it was compiled, for what `compile` was called for.
        recorder: records whole steps as CUDA graphs; None where that is not possible.
        first_bad: the first micro-batch (step * accumulate + index) whose loss or gradient was not
            finite, on the device; -1: none.
    """

    def __init__(self, task: Task, config: TrainConfig) -> None:
        self.task, self.config = task, config
        self.model: nn.Module = task.model
        self.ema = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.device = next(self.model.parameters()).device
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        cuda = self.device.type == "cuda"
        if self.device.type == "cpu":
            surroundings.reuse_memory()
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            # a recorded step reads the rate from where it lies
            lr=torch.tensor(config.lr, device=self.device) if cuda else config.lr,
            betas=config.betas,
            weight_decay=config.weight_decay,
            fused=True,
            capturable=cuda,
        )
        for module in self.model.modules():
            if isinstance(module, UNet):
                module.checkpointing = config.checkpointing
        self.compiled: dict[str, str] = {}
        self.names: list[str] = []
        self.sums: Tensor | None = None
        self.count = 0
        self.warming = False
        self.first_bad = torch.full((), -1, device=self.device)
        self.at = torch.zeros((), dtype=torch.long, device=self.device)  # the micro-batch under way
        self.generator = torch.Generator(self.device)
        # a recorded gradient lives where the next run writes: nothing can be added to it
        record = cuda and config.graphs and config.accumulate == 1 and not config.deterministic
        self.phase: Any = getattr(task, "phase", None)
        whole = record and self.phase is not None
        self.recorder = Recorder(self.generator) if whole else None
        hot = getattr(task, "hot", {})
        if record and not whole:
            for part, function in hot.items():
                if not isinstance(function, Recorded):
                    model = self.model if part == "network" else None
                    hot[part] = Recorded(function, model)

    def compile(self, parts: Sequence[str] | None = None) -> float:
        """Compile what every step runs and run it, changing nothing; returns seconds.

        That is what a task lists under `hot`, by name (`parts`: these of them); of other tasks the
        model. A part that can't be compiled here, or does not give the loss and gradient that it
        gave before, stays as it was, with a warning.
        """
        began = time.perf_counter()
        surroundings.keep_compiled_code()
        hot = getattr(self.task, "hot", None)
        if hot is None:
            hot = {"model": self.model}
        buffers = [buffer.clone() for buffer in self.model.buffers()]
        try:
            with self.explained_memory_errors(0):
                wanted = self.probe()
                for part in [name for name in hot if parts is None or name in parts]:
                    self.compile_part(hot, part, wanted)
        finally:
            self.optimizer.zero_grad(set_to_none=True)
            for buffer, before in zip(self.model.buffers(), buffers, strict=True):
                buffer.copy_(before)
        return time.perf_counter() - began

    def compile_part(self, hot: dict[str, Any], part: str, wanted: list[list[float]]) -> None:
        """Put a compiled version into `hot`, or leave what is there, with a warning."""
        before, reasons = hot[part], list[str]()
        plain: Any = before.function if isinstance(before, Recorded) else before
        # a late loss compares two passes, whose small difference bf16 rounds coarsely
        tolerance = 0.2 if self.config.precision == "bf16" else 0.02
        for way in surroundings.ways_to_compile(tiling=part == "network"):
            try:
                if part == "model":
                    plain.compile(dynamic=False, **way)
                else:
                    hot[part] = torch.compile(plain, dynamic=False, **way)
                got = self.probe()
                if not np.allclose(got, wanted, rtol=tolerance, atol=1e-4, equal_nan=True):
                    raise ArithmeticError(f"loss and gradient {got}, uncompiled {wanted}")
                if isinstance(before, Recorded):
                    hot[part] = Recorded(hot[part], before.model)
                self.compiled[part] = "compiled"
                return
            except Exception as error:  # compilers fail in many ways, and none may end a run
                if surroundings.is_out_of_memory(error):
                    raise
                reasons.append(" ".join(f"{type(error).__name__}: {error}".split())[:300])
                self.optimizer.zero_grad(set_to_none=True)
                hot[part] = before
                if part == "model":
                    plain._compiled_call_impl = None  # what nn.Module.compile sets
        self.compiled[part] = f"not compiled: {reasons[-1]}"
        warnings.warn(
            f"compile: the {part} of {self.task.__class__.__name__} runs uncompiled, slower but "
            f"the same ({reasons[-1]})",
            stacklevel=2,
        )

    def probe(self) -> list[list[float]]:
        """Loss and gradient norm of the first batch at both ends of the run, as a curriculum may
        switch on more work on its way."""
        found = []
        for progress in (0.0, 1.0):
            self.optimizer.zero_grad(set_to_none=True)
            self.seed(0, 0)
            loss = self.forward(0, progress)["loss"]
            loss.backward()
            norm = nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
            found.append(torch.stack([loss.detach().double(), norm.double()]).tolist())
        return found

    def train(self, step: int) -> None:
        """Do step number `step`, from 0.

        Raises:
            OutOfMemory: says what to lower.
        """
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(self.lr(step))
            else:
                group["lr"] = self.lr(step)
        with self.explained_memory_errors(step):
            phase = self.phase(step / self.config.steps) if self.recorder else None
            if self.recorder and phase is not None:
                self.seed(step, 0)
                self.warming |= self.recorder.run(phase, lambda: self.optimise(step, seeded=True))
            else:
                self.optimise(step)
            self.count += 1
            # on a GPU this would wait for the queue
            if self.device.type == "cpu" and int(self.first_bad) >= 0:
                return
            self.update_ema(step + 1)

    def optimise(self, step: int, *, seeded: bool = False) -> None:
        """Gradients and update. Where this is recorded, what differs between steps is in tensors:
        the generator's `seed`, `at` and the learning rate."""
        config = self.config
        self.optimizer.zero_grad(set_to_none=True)
        total: Tensor | None = None
        for micro in range(config.accumulate):
            if not seeded:
                self.seed(step, micro)
            terms = self.forward(step, step / config.steps)
            loss = terms["loss"]
            (loss / config.accumulate if config.accumulate > 1 else loss).backward()
            if micro < config.accumulate - 1:
                self.note_bad(loss)
            self.names = [*terms, "grad_norm"]
            values = torch.stack([value.detach() for value in terms.values()]).double()
            total = values if total is None else total + values
        assert total is not None
        norm = nn.utils.clip_grad_norm_(self.parameters, config.grad_clip)
        # no sum of the two is finite unless both are, as a norm isn't negative
        self.note_bad(loss.detach() + norm.detach())
        values = torch.cat([total / config.accumulate, norm.detach().double()[None]])
        if self.sums is None:
            self.sums = torch.zeros_like(values)
        self.sums += values
        if self.device.type == "cpu" and int(self.first_bad) >= 0:
            return
        self.optimizer.step()

    @contextlib.contextmanager
    def explained_memory_errors(self, step: int) -> Iterator[None]:
        try:
            yield
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not surroundings.is_out_of_memory(error):
                raise
            raise OutOfMemory(
                f"out of memory at step {step} with batch_size {self.task.batch_size} on "
                f"{self.device}: lower batch_size and raise accumulate (then checkpointing, a "
                "smaller image_size or base_channels), and start in another run_dir, as a run "
                "keeps its configuration"
            ) from error

    def forward(self, step: int, progress: float) -> dict[str, Tensor]:
        """The loss terms of the micro-batch that was seeded."""
        batch = self.task.batch(step, self.generator)
        self.model.train()
        with self.autocast():
            return self.task.loss(batch, progress=progress, generator=self.generator, ema=self.ema)

    def batch(self, step: int, micro: int = 0) -> dict[str, Any]:
        """A micro-batch once more, as training had it."""
        self.seed(step, micro)
        return self.task.batch(step, self.generator)

    def seed(self, step: int, micro: int) -> None:
        """Every draw of a micro-batch follows from this."""
        seed = step_seed(self.config.seed, step, micro)
        torch.manual_seed(seed)  # layers that take no generator, such as dropout
        self.generator.manual_seed(seed)
        self.at.fill_(step * self.config.accumulate + micro)

    def note_bad(self, value: Tensor) -> None:
        bad = ~value.detach().isfinite()
        self.first_bad.copy_(torch.where((self.first_bad < 0) & bad, self.at, self.first_bad))

    def take_terms(self) -> dict[str, float]:
        """Means of the loss terms since the last call. Waits for the device, once."""
        if self.sums is None or not self.count:
            return {}
        means = (self.sums / self.count).tolist()
        self.sums.zero_()
        self.count, self.warming = 0, False
        return dict(zip(self.names, means, strict=True))

    def lr(self, step: int) -> float:
        config = self.config
        warm = (step + 1) / config.warmup_steps if config.warmup_steps else 1.0
        cooldown = config.cooldown_share * config.steps
        cool = (config.steps - step) / cooldown if cooldown else 1.0
        return config.lr * min(1.0, warm, cool)

    @torch.no_grad()
    def update_ema(self, updates: int) -> None:
        """Average with a power-function profile, whose window is a fixed share of the run so far:
        the initial weights are forgotten from the first step on (EDM2, arXiv 2312.02696, eq. 121).
        """
        beta = (1 - 1 / updates) ** (ema_exponent(self.config.ema_std) + 1)
        ours: list[Tensor] = list(self.ema.parameters())
        theirs: list[Tensor] = list(self.model.parameters())
        torch._foreach_lerp_(ours, theirs, 1 - beta)
        for mine, its in zip(self.ema.buffers(), self.model.buffers(), strict=True):
            mine.copy_(its)

    def autocast(self) -> Any:
        enabled = self.config.precision == "bf16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled)

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def step_seed(seed: int, step: int, micro: int = 0) -> int:
    """A 63-bit seed that depends on these numbers and on nothing else."""
    text = f"{seed}/{step}/{micro}" if micro else f"{seed}/{step}"
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def ema_exponent(std: float) -> float:
    """The power-function exponent gamma whose averaging window has relative width `std`.

    The positive root of gamma^3 + 7 gamma^2 + (16 - std^-2) gamma + 12 - std^-2 (EDM2,
    arXiv 2312.02696, equation 127): 0.05 gives 16.97, 0.1 gives 6.94.
    """
    inverse = std**-2
    roots = np.roots([1, 7, 16 - inverse, 12 - inverse])
    return float(roots.real.max())


def finite_names(terms: dict[str, float]) -> list[str]:
    """The names of the terms that are not finite."""
    return [name for name, value in terms.items() if not math.isfinite(value)]
