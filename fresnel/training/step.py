"""One optimisation step: batches, loss, gradients, Muon and AdamW, average. No clock."""

import contextlib
import copy
import hashlib
import json
import math
import os
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fresnel.host import machine
from fresnel.models.unet import UNet
from fresnel.training import ranks
from fresnel.training.cuda_graphs import Recorded, Recorder
from fresnel.training.task import NonFiniteLoss, OutOfMemory, Task, TrainConfig

CRITIC_RATE = 0.3
"""Of the learning rate: one that learns faster than the network knows its pictures too well."""
MATRIX_RATE = 3.0
"""Of the learning rate, for matrices: see `Muon`."""


class Muon(torch.optim.AdamW):
    """Muon for the groups of matrices ("matrices": True), AdamW for the others.

    A matrix moves by its momentum made orthogonal, so that all of its directions change alike, and
    not only the few that most gradients share (K. Jordan and others, Muon, 2024). A convolution's
    kernel is the matrix (O, I h w). Moves have a root mean square of 0.2 times the rate, about what
    AdamW's have (arXiv 2502.16982, equation 4). torch's own knows matrices alone, and moves one
    after the other; here those of one shape move at once.
    """

    momentum = 0.95

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step of all groups; a closure is not called."""
        groups = self.param_groups
        for group in groups:
            alike = defaultdict[tuple[int, int], list[Tensor]](list)
            for p in group["params"] if group["matrices"] else ():
                if p.grad is not None:
                    alike[len(p), p[0].numel()].append(p)
            for shape, some in alike.items():
                self._move(some, shape, group["lr"], group["weight_decay"])
        try:
            self.param_groups = [group for group in groups if not group["matrices"]]
            super().step()
        finally:
            self.param_groups = groups

    def _move(self, some: list[Tensor], shape: tuple[int, int], lr: Any, decay: float) -> None:
        gradients = [p.grad for p in some if p.grad is not None]
        for p in some:
            if not self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
        moments = [self.state[p]["momentum"] for p in some]
        torch._foreach_lerp_(moments, gradients, 1 - self.momentum)
        ahead = torch._foreach_lerp(gradients, moments, self.momentum)  # Nesterov's
        moves = orthogonal(torch.stack([x.reshape(shape) for x in ahead]))
        moves = moves * (lr * 0.2 * max(shape) ** 0.5)
        torch._foreach_mul_(some, 1 - lr * decay)
        torch._foreach_sub_(some, [m.view(p.shape) for m, p in zip(moves, some, strict=True)])


def orthogonal(matrices: Tensor) -> Tensor:
    """About U V^T of matrices U S V^T, (N, rows, columns), by five steps of a Newton-Schulz
    iteration, in bfloat16 on a GPU: of S from 0.01 to 1 there come values from 0.68 to 1.14."""
    x = matrices.bfloat16() if matrices.is_cuda else matrices
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        gram = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)  # Jordan's
        x = torch.baddbmm(x, gram, x, beta=3.4445)
    return (x.mT if tall else x).to(matrices.dtype)


class Stepper:
    """What a training step changes: weights, their average, the optimizer's state, running sums.

    Every random draw follows from (seed, step, shard), so that steps can be repeated; the ranks of
    the run share the shards. On a GPU nothing in a step waits for the device. `sums`: of the loss
    terms and the gradient's norm (`names`) in the last `count` steps. `recorder`: records whole
    steps as CUDA graphs; None where that is not possible. `mover`: then it records what comes
    after the gradients, which is hundreds of small kernels. `first_bad`: the first shard (step *
    accumulate + number) whose loss or gradient was not finite, on the device; -1: none.
    """

    def __init__(self, task: Task, config: TrainConfig) -> None:
        self.task, self.config = task, config
        self.model: nn.Module = task.model
        self.ema = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.critic: nn.Module | None = getattr(task, "critic", None)
        ours, its = (
            [p for p in (net.parameters() if net else ()) if p.requires_grad]
            for net in (self.model, self.critic)
        )
        self.parameters = ours + its
        self.clipped = ours, its  # each by itself
        self.device = self.parameters[0].device
        cuda = self.device.type == "cuda"
        if not cuda:
            machine.reuse_memory()

        def rate() -> Any:  # a recorded step reads it from where it lies
            return torch.tensor(config.lr, device=self.device) if cuda else config.lr

        def group(params: list[Any], share: float, **more: Any) -> dict[str, Any]:
            return {"params": params, "lr": rate(), "share": share, "matrices": False, **more}

        matrices = [p for p in ours if p.ndim >= 2 and config.optimizer == "muon"]
        known = set(matrices)
        groups = [group(matrices, MATRIX_RATE, matrices=True)]
        groups.append(group([p for p in ours if p not in known], 1.0))  # biases, norms
        # two that learn against each other swing where they keep their momentum
        groups.append(group(its, CRITIC_RATE, betas=(0.0, 0.99)))
        groups = [group for group in groups if group["params"]]
        decay: dict[str, Any] = {"betas": config.betas, "weight_decay": config.weight_decay}
        self.optimizer = Muon(groups, fused=True, capturable=cuda, **decay)
        for module in self.model.modules():
            if isinstance(module, UNet):
                module.checkpointing = config.checkpointing
        self.names: list[str] = []
        self.sums: Tensor | None = None
        self.count = 0
        self.first_bad = torch.full((), -1, device=self.device)
        self.at = torch.zeros((), dtype=torch.long, device=self.device)  # the shard under way
        self.generator = torch.Generator(self.device)
        self.ranks = ranks.current()
        self.shards = self.ranks.shards(config.accumulate)  # this rank's
        self.shared: ranks.SharedGradients | None = None
        self.norm = torch.zeros((), device=self.device)  # of all gradients, of the last step
        self.recorder: Recorder | None = None
        self.mover: Recorder | None = None
        # a recorded gradient lives where the next run writes: nothing can be added to it
        one_each = config.accumulate == self.ranks.world
        if cuda and config.graphs and one_each and not config.deterministic:
            if task.phase(0.0) is not None:
                self.recorder = Recorder(self.generator)
            else:
                self.mover = Recorder(self.generator)
                for part, function in task.hot.items():
                    if not isinstance(function, Recorded):
                        model = self.model if part == "network" else None
                        task.hot[part] = Recorded(function, model)

    def compile(self) -> float:
        """Compile what every step runs, the task's `hot` functions, and run it at both ends of the
        run and half-way, as a curriculum may switch on more work; changes nothing. Returns seconds.

        What can't be compiled here runs as it was, with torch's warning.
        """
        import torch._dynamo
        from torch._inductor.runtime.cache_dir_utils import default_cache_dir

        began = time.perf_counter()
        # Kept in the user's cache folder: the next run starts in seconds. torch's own default is a
        # temporary folder, which importing its compiler puts into the variable.
        if os.environ.get("TORCHINDUCTOR_CACHE_DIR") in (None, default_cache_dir()):
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(machine.cache_dir() / "inductor")
        torch._dynamo.config.suppress_errors = True
        for part, function in self.task.hot.items():
            if isinstance(function, Recorded):
                function.function = torch.compile(function.function, dynamic=False)
            else:
                self.task.hot[part] = torch.compile(function, dynamic=False)
        buffers = [buffer.clone() for buffer in self.model.buffers()]
        with self.explained_memory_errors(0):
            ends = [self.task.phase(progress) for progress in (0.0, 1.0)]
            for progress in (0.0, *([] if self.task.phase(0.5) in ends else [0.5]), 1.0):
                self.seed(0, 0)
                self.forward(0, progress)["loss"].backward()
                self.optimizer.zero_grad(set_to_none=True)
        for buffer, before in zip(self.model.buffers(), buffers, strict=True):
            buffer.copy_(before)
        return self.time() - began

    def train(self, step: int) -> None:
        """Do step number `step`, from 0. OutOfMemory says what to lower."""
        for group in self.optimizer.param_groups:
            lr = self.lr(step) * group["share"]
            group["lr"] = group["lr"].fill_(lr) if isinstance(group["lr"], Tensor) else lr
        with self.explained_memory_errors(step):
            if self.recorder:
                self.seed(step, self.shards[0])
                phase = self.task.phase(step / self.config.steps)
                self.recorder.run(phase, lambda: self.optimise(step))
            else:
                self.optimise(step)
            self.count += 1
            if not self.failed():
                self.update_ema(step + 1)

    def optimise(self, step: int) -> None:
        """Gradients and update. Where this is recorded, what differs between steps is in tensors:
        the state of the generator (seeded before), `at` and the learning rate."""
        parts = self.config.accumulate
        before = self.first_bad.clone() if self.ranks.world > 1 else None
        # what is recorded finds gradients where they were
        self.optimizer.zero_grad(set_to_none=self.mover is None)
        totals = []
        for shard in self.shards:
            if not self.recorder:
                self.seed(step, shard)
            terms = self.forward(step, step / self.config.steps)
            (terms["loss"] / parts).backward()
            self.note_bad(terms["loss"])
            self.names = [*terms, "grad_norm"]
            totals.append(torch.stack([value.detach() for value in terms.values()]).double())
        means = torch.stack(totals).mean(dim=0)
        if before is not None:
            means = self.reduce(means * (len(totals) / parts), before)
        if self.mover:
            self.mover.run("move", self.move)
        else:
            self.move()
        values = torch.cat([means, self.norm.double()[None]])
        self.sums = torch.zeros_like(values) if self.sums is None else self.sums
        self.sums += values

    def move(self) -> None:
        """Clip the gradients and let the optimizer move the weights. Has no inputs, and all that it
        changes stays where it is."""
        # the norm of no gradients at all (a critic's that has not begun) is a number of the CPU's
        groups = [some for some in self.clipped if any(p.grad is not None for p in some)]
        norms = [nn.utils.clip_grad_norm_(group, self.config.grad_clip) for group in groups]
        self.norm.copy_(torch.stack(norms).detach().norm())
        self.note_bad(self.norm)
        if not self.failed():
            self.optimizer.step()

    def reduce(self, values: Tensor, before: Tensor) -> Tensor:
        """Sum gradients and `values` over the ranks, and agree on the first bad shard, of which
        they knew `before` this step."""
        if self.shared is None:
            self.shared = ranks.SharedGradients(self.ranks, self.parameters, len(values))
        self.note_bad(self.shared.collect())
        parts = self.config.accumulate
        mine = torch.where(self.first_bad < 0, self.first_bad, self.first_bad % parts)
        values, bad = self.shared.sum(values, mine)
        self.at -= self.at % parts  # shard 0, for what is found out after this by all
        found = torch.where(bad < 0, bad, self.at + bad)
        self.first_bad.copy_(torch.where(before < 0, found, before))
        return values

    @contextlib.contextmanager
    def explained_memory_errors(self, step: int) -> Iterator[None]:
        try:
            yield
        except (MemoryError, RuntimeError) as error:
            if not machine.is_out_of_memory(error):
                raise
            raise OutOfMemory(
                f"out of memory at step {step} with batch_size {self.task.batch_size} on "
                f"{self.device}: lower batch_size and raise accumulate (then checkpointing, a "
                "smaller image_size or base_channels), and start in another run_dir, as a run "
                "keeps its configuration"
            ) from error

    def forward(self, step: int, progress: float) -> dict[str, Tensor]:
        """The loss terms of the shard that was seeded."""
        batch = self.task.batch(step, self.generator)
        self.model.train()
        with self.autocast():
            return self.task.loss(batch, progress=progress, generator=self.generator, ema=self.ema)

    def seed(self, step: int, shard: int) -> None:
        """Every draw of a shard follows from this."""
        seed = step_seed(self.config.seed, step, shard)
        torch.manual_seed(seed)  # layers that take no generator, such as dropout
        self.generator.manual_seed(seed)
        self.at.fill_(step * self.config.accumulate + shard)

    def note_bad(self, value: Tensor) -> None:
        bad = ~value.detach().isfinite()
        self.first_bad.copy_(torch.where((self.first_bad < 0) & bad, self.at, self.first_bad))

    def failed(self) -> bool:
        """Whether a step went wrong; on a GPU to ask would wait for the queue: never."""
        return self.device.type == "cpu" and int(self.first_bad) >= 0

    def check_finite(self, folder: Path) -> None:
        """Raise NonFiniteLoss if a step's loss or gradient was not finite on any rank, once rank 0
        has the first such batch, which is made again, in `folder`. Waits for the device."""
        if (at := int(self.first_bad)) < 0:
            return
        step, shard = divmod(at, self.config.accumulate)
        names = [name for name, mean in self.take_terms().items() if not math.isfinite(mean)]
        path = folder / f"nonfinite_step_{step:06d}.safetensors"

        def keep() -> None:
            self.seed(step, shard)
            batch = self.task.batch(step, self.generator)
            found = {name: x for name, x in batch.items() if isinstance(x, Tensor)}
            tensors = {name: x.detach().cpu().clone() for name, x in found.items()}
            said = {"step": step, "shard": shard, "terms": names}
            save_file(tensors, path, {"fresnel": json.dumps(said)})

        self.ranks.from_first(keep)
        raise NonFiniteLoss(
            f"step {step}: not finite: {', '.join(names)}. The batch is in {path}; look at it, "
            "or lower lr. The last checkpoint is from before this step",
            step,
            path,
        )

    def take_terms(self) -> dict[str, float]:
        """Means of the loss terms since the last call. Waits for the device, once."""
        if self.sums is None or not self.count:
            return {}
        means = (self.sums / self.count).tolist()
        self.sums.zero_()
        self.count = 0
        return dict(zip(self.names, means, strict=True))

    def lr(self, step: int) -> float:
        warmup, cooldown = self.config.warmup_steps, self.config.cooldown_share * self.config.steps
        warm = (step + 1) / warmup if warmup else 1.0
        cool = (self.config.steps - step) / cooldown if cooldown else 1.0
        return self.config.lr * min(1.0, warm, cool)

    @torch.no_grad()
    def update_ema(self, updates: int) -> None:
        """Average with a power-function profile, whose window is a fixed share of the run so far
        (EDM2, arXiv 2312.02696, eq. 121): the first step forgets the initial weights."""
        beta = (1 - 1 / updates) ** (ema_exponent(self.config.ema_std) + 1)
        ours: list[Tensor] = list(self.ema.parameters())
        torch._foreach_lerp_(ours, list[Tensor](self.model.parameters()), 1 - beta)
        for mine, its in zip(self.ema.buffers(), self.model.buffers(), strict=True):
            mine.copy_(its)

    def autocast(self) -> torch.autocast:
        bf16 = self.config.precision == "bf16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=bf16)

    def time(self) -> float:
        """Seconds, once the device has done all that was asked for."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def step_seed(seed: int, step: int, shard: int = 0) -> int:
    """A 63-bit seed that depends on these numbers and on nothing else."""
    text = f"{seed}/{step}/{shard}" if shard else f"{seed}/{step}"
    return int(hashlib.blake2b(text.encode(), digest_size=8).hexdigest(), 16) >> 1


def ema_exponent(std: float) -> float:
    """The power-function exponent gamma whose averaging window has relative width `std`.

    The positive root of gamma^3 + 7 gamma^2 + (16 - std^-2) gamma + 12 - std^-2 (EDM2,
    arXiv 2312.02696, equation 127): 0.05 gives 16.97, 0.1 gives 6.94.
    """
    inverse = std**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


@contextlib.contextmanager
def kernels(deterministic: bool | None, device: torch.device) -> Iterator[None]:
    """Choose kernels while inside: the same bits twice (None: on a CPU only; warns where there is
    no such kernel), or the fastest of those that cuDNN tries. TF32 stays off: geometry needs
    float32."""
    memory: Any = torch.utils.deterministic
    cudnn = torch.backends.cudnn
    wanted = device.type == "cpu" if deterministic is None else deterministic
    before, filled = torch.get_deterministic_debug_mode(), memory.fill_uninitialized_memory
    tried = cudnn.benchmark
    try:
        if wanted:
            # cuBLAS reads it when it starts, and keeps to one order of summation
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.set_deterministic_debug_mode("warn")
            # costs a write of every new tensor, and nothing here reads uninitialised memory
            memory.fill_uninitialized_memory = False
        cudnn.benchmark = not wanted
        yield
    finally:
        torch.set_deterministic_debug_mode(before)
        memory.fill_uninitialized_memory, cudnn.benchmark = filled, tried
