"""One run by several processes, a GPU each: who they are, and what they tell each other.

They are started by torchrun, or by srun, and are called ranks, rank 0 the first.  Ranks and
micro-batches are one axis: a step has `TrainConfig.accumulate` shards, each a batch of the task's
`batch_size` drawn from the seed (step, shard), and shard number s is computed by rank s modulo the
number of ranks.  There must be a shard for each rank.
"""

import contextlib
import gc
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")

PATIENCE = timedelta(hours=6)
"""How long a rank waits for another: rank 0 may validate, or wait for another run's lock."""
_LAST_WORDS_S = 60.0
"""What a rank whose launcher was killed may take to end in a checkpoint."""


class ElsewhereFailed(RuntimeError):
    """Rank 0 has ended with an error, which it tells itself."""


class RankLost(RuntimeError):
    """Another process of the run has ended; the checkpoint before that is good."""


@dataclass(frozen=True)
class Ranks:
    """This process among those of its run; a run of one process talks to nobody."""

    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the one that writes checkpoints, log and pictures."""
        return self.rank == 0

    def shards(self, count: int) -> range:
        """Which of a step's shards are this rank's. ValueError if there are too few for all."""
        if count < self.world:
            raise ValueError(
                f"accumulate: got {count}, want at least {self.world}, a shard of a step for each "
                f"of {self.world} ranks; for the same samples a step divide batch_size by as much"
            )
        return range(self.rank, count, self.world)

    def any(self, flag: bool) -> bool:
        """Whether it is set on any rank, asked by all of them; does not wait for a GPU's queue."""
        if self.world == 1:
            return flag
        found = torch.tensor(int(flag))
        with _talk():
            dist.all_reduce(found, dist.ReduceOp.MAX)
        return bool(found)

    def from_first(self, work: Callable[[], T]) -> T:
        """What `work` returns on rank 0, which alone does it; ElsewhereFailed on the others if it
        raises there. They wait meanwhile."""
        if self.world == 1:
            return work()
        told: list[Any] = [None, False]
        try:
            if self.first:
                told = [work(), True]
        finally:
            with _talk():
                dist.broadcast_object_list(told, 0, device=torch.device("cpu"))
        if not told[1]:
            raise ElsewhereFailed("rank 0 has failed; its message says why")
        return told[0]

    def share(self, tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
        """Rank 0's tensors on all ranks, whatever the others have."""
        known = self.from_first(lambda: [(n, t.shape, t.dtype) for n, t in tensors.items()])
        shared = {}
        for name, shape, dtype in known:
            mine = tensors[name] if self.first else torch.empty(shape, dtype=dtype)
            shared[name] = mine.to(device).contiguous()
            with _talk():
                dist.broadcast(shared[name], 0)
        return shared


@contextlib.contextmanager
def _talk() -> Iterator[None]:
    """RankLost if the others don't answer any more."""
    try:
        yield
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise RankLost(
            "another process of this run has ended, and may have said why. The last checkpoint is "
            f"whole: run again to go on from there ({reason})"
        ) from error


def current() -> Ranks:
    """This process's place among those that it has joined; alone without any."""
    if dist.is_available() and dist.is_initialized():
        return Ranks(dist.get_rank(), dist.get_world_size())
    if int(place(os.environ).get("WORLD_SIZE", 1)) > 1:
        raise RuntimeError(
            "this process was started as one of several, and would train all by itself: make the "
            "task and call fit() in `with fresnel.training.ranks.joined(device):`"
        )
    return Ranks()


class SharedGradients:
    """The gradients of all parameters in one flat buffer, summed over the ranks in one call,
    together with a few numbers beside them.

    Each gradient is a view of the buffer in its parameter's memory format, at a multiple of 128
    bytes. A parameter that has no gradient counts as one of zero.

    Args:
        beside: how many numbers.
    """

    def __init__(self, ranks: Ranks, parameters: Sequence[Tensor], beside: int) -> None:
        self.ranks, self.parameters, starts, total = ranks, parameters, list[int](), 0
        for parameter in parameters:
            starts.append(total)
            total += -(-parameter.numel() // 32) * 32
        like = parameters[0]
        self.flat = torch.zeros(total + beside + ranks.world, device=like.device, dtype=like.dtype)
        self.gradients, self._beside, self._bad = self.flat.split([total, beside, ranks.world])
        self.views = [
            self.flat.as_strided(p.shape, torch.empty_like(p).stride(), start)
            for p, start in zip(parameters, starts, strict=True)
        ]

    def collect(self) -> Tensor:
        """Copy this rank's gradients into the buffer; their sum, which is finite if they are."""
        pairs = zip(self.views, (p.grad for p in self.parameters), strict=True)
        given = [torch.zeros_like(view) if own is None else own for view, own in pairs]
        with torch.no_grad():
            torch._foreach_copy_(self.views, given)
        return self.gradients.sum()

    def sum(self, values: Tensor, bad: Tensor) -> tuple[Tensor, Tensor]:
        """Sum what was collected, which each `parameter.grad` then is a view of, and `values`
        (beside,), over the ranks.

        Args:
            bad: the first of this rank's shards that was not finite, or -1.

        Returns:
            The summed values, and the first bad shard of all ranks, or -1.
        """
        self._beside.copy_(values)
        self._bad.zero_()
        self._bad[self.ranks.rank].copy_(bad + 1)  # a place for each: what is added stays apart
        with _talk():
            dist.all_reduce(self.flat)
        for parameter, view in zip(self.parameters, self.views, strict=True):
            parameter.grad = view
        first = torch.where(self._bad > 0, self._bad - 1, torch.inf).min()
        return self._beside.to(values), torch.where(first.isfinite(), first, -1).long()


def place(environment: Mapping[str, str]) -> dict[str, str]:
    """What torch.distributed wants to know, RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and
    MASTER_PORT, as torchrun says it, or from what Slurm tells a task of `srun`; {} for a process
    that was started alone (as is a batch script of several tasks: that is no task)."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    if "RANK" in environment and "WORLD_SIZE" in environment:
        if missing := [name for name in names if name not in environment]:
            raise ValueError(
                f"RANK and WORLD_SIZE are set, but not {', '.join(missing)}: start with torchrun, "
                "or unset RANK and WORLD_SIZE to train in one process"
            )
        return {name: environment[name] for name in names}
    tasks = environment.get("SLURM_STEP_NUM_TASKS") or environment.get("SLURM_NTASKS", "1")
    if "SLURM_STEP_ID" not in environment or int(tasks) < 2:
        return {}
    # rank 0 listens on the first host, at a port of the job's, as two jobs may share a host
    hosts = environment.get("SLURM_STEP_NODELIST") or environment["SLURM_JOB_NODELIST"]
    port = str(20000 + int(environment["SLURM_JOB_ID"]) % 20000)
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": tasks,
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "MASTER_ADDR": environment.get("MASTER_ADDR") or first_host(hosts),
        "MASTER_PORT": environment.get("MASTER_PORT") or port,
    }


def first_host(hosts: str) -> str:
    """The first of Slurm's list of hosts: "node[003-006,9],other" -> "node003"."""
    return re.sub(r"\[([^],-]+)[^]]*\]", r"\1", re.split(r",(?![^[]*\])", hosts)[0])


def torchrun(gpus: int) -> list[str]:
    """The command line of torchrun with so many processes on this host alone, up to what they run.
    For several hosts see docs/performance.md."""
    module = [sys.executable, "-m", "torch.distributed.run"]
    return [*module, f"--nproc-per-node={gpus}", "--standalone"]


@contextlib.contextmanager
def joined(device: str) -> Iterator[Ranks]:
    """Join the other processes of this run: NCCL between GPUs, gloo between CPUs.

    LOCAL_RANK chooses the GPU, which "cuda" means from then on. NCCL's multicast (NVLS) is off
    unless NCCL_NVLS_ENABLE says otherwise. Once torchrun is killed this process ends as by SIGTERM,
    of which `fit` makes a checkpoint, and after a minute at the latest.

    Args:
        device: "cuda" or "cpu"; as `machine.pick_device` says.

    Raises:
        ValueError: if there are more processes than GPUs on this host, or variables are missing.
    """
    told = place(os.environ)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        threading.Thread(target=_outlive, args=(os.getppid(),), daemon=True).start()
    if int(told.get("WORLD_SIZE", 1)) == 1:
        yield Ranks()
        return
    card, local = None, int(told["LOCAL_RANK"])
    if device == "cuda":
        cards = torch.cuda.device_count()
        if cards == 1 and "SLURM_GPUS_PER_TASK" in os.environ:
            local = 0  # Slurm shows each task its own GPU alone
        if local >= cards:
            raise ValueError(
                f"rank {told['RANK']} is number {local}, from 0, on this host, which has {cards} "
                f"GPUs: start at most {cards} processes a host (--nproc-per-node={cards})"
            )
        torch.cuda.set_device(local)
        card = torch.device("cuda", local)
    os.environ.update(told)
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    # what lies on the host is told by gloo, which does not wait for a GPU's queue
    backend = "cpu:gloo,cuda:nccl" if card else "gloo"
    dist.init_process_group(backend, timeout=PATIENCE, device_id=card)
    yield current()
    gc.collect()  # recorded graphs hold on to NCCL
    dist.destroy_process_group()


def _outlive(parent: int) -> None:
    """End this process once its launcher is gone, which can't end it any more."""
    while os.getppid() == parent:
        time.sleep(0.5)
    print("torchrun has gone; ending in a checkpoint", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_LAST_WORDS_S)
    os._exit(1)


def main(work: Callable[[Ranks], Any], device: str) -> NoReturn:
    """Do `work` as one process of a run, and end the process: with code 130 after Ctrl-C or
    SIGTERM, which rank 0 explains, and with 1 after an error, which is told by whom it befell."""
    code, rank = 1, int(place(os.environ).get("RANK", 0))
    try:
        with joined(device) as ranks:
            work(ranks)
        code = 0
    except KeyboardInterrupt as stop:
        code = 130
        print(stop if rank == 0 else "", end="\n" * (rank == 0), file=sys.stderr)
    except ElsewhereFailed:
        pass
    except RankLost as lost:
        print(lost if rank < 2 else "", end="\n" * (rank < 2), file=sys.stderr)
    except Exception:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # after an error the others may be waiting, and leaving would wait for them
