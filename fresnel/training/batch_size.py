"""The largest batch that fits, found by trial; gradient accumulation makes up for the rest.

A trial that runs out of memory is an error on a GPU and the end of the process on a CPU. So memory
is measured on one sample first, then on up to four times as many at a time, as far as those
measured say that more will fit.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from fresnel.training import host as surroundings
from fresnel.training.loop import Task, TrainConfig
from fresnel.training.step import OutOfMemory, Stepper


@dataclass(frozen=True)
class BatchSize:
    """How to train on `batch_size` * `accumulate` samples a step.

    `peak_bytes`: the largest of a trial at this size; `sample_bytes`: what one more sample takes;
    `free_bytes`: what there was before. `trials`: how many were run.
    """

    batch_size: int
    accumulate: int
    peak_bytes: int
    sample_bytes: int
    free_bytes: int
    trials: int


def find_batch_size(
    make_task: Callable[[int], Task],
    wanted: int,
    config: TrainConfig,
    *,
    device: torch.device | str,
    reserve: float = 0.1,
    limit_bytes: int | None = None,
) -> BatchSize:
    """The largest batch that divides `wanted` and trains in the free memory.

    Trials run uncompiled, which takes more memory than compiled code does, recorded as the run will
    be, at the run's last step, where a curriculum asks for most. They train throwaway tasks.

    Args:
        make_task: batch size -> a fresh task on `device`; its data may be shared.
        wanted: samples a step.
        reserve: share of the free memory to leave alone.
        limit_bytes: pretend that no more is free, as a smaller card would have.

    Raises:
        OutOfMemory: if not even one sample fits on the card.
    """
    if wanted < 1:
        raise ValueError(f"wanted: got {wanted}, want at least 1")
    sizes = [size for size in range(wanted, 0, -1) if wanted % size == 0]
    device = torch.device(device)
    surroundings.reset_peak_memory(device)
    base = surroundings.peak_memory(device)
    free = min(surroundings.free_memory(device), limit_bytes or 1 << 62)
    trials = 0

    def trial(batch_size: int) -> int:
        """Peak bytes above what was taken before."""
        nonlocal trials
        surroundings.reset_peak_memory(device)
        try:
            task = make_task(batch_size)
            stepper = Stepper(task, replace(config, accumulate=1))
            # the optimizer's state comes with the first step, a recorded graph's own memory later
            for _ in range(4 if config.graphs and device.type == "cuda" else 2):
                stepper.train(config.steps - 1)
            stepper.synchronize()
            return max(surroundings.peak_memory(device) - base, 0)
        finally:
            trials += 1
            task = stepper = None  # type: ignore[assignment]
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()

    measured = {1: trial(1)}
    room = free * (1 - reserve)
    ceiling = wanted + 1
    while True:
        (before, last) = ([1, 1, *measured])[-2:]
        rise = measured[last] - measured[before] if last > before else measured[last]
        slope = max(rise, 1) / max(last - before, 1)
        # memory of small batches says little about that of large ones: at most fourfold at a time
        fitting = [
            size
            for size in sizes
            if last < size < min(4 * last + 1, ceiling)
            and measured[last] + (size - last) * slope <= room
        ]
        if not fitting:
            return BatchSize(last, wanted // last, measured[last], int(slope), free, trials)
        try:
            peak = trial(fitting[0])
        except OutOfMemory:
            peak = free + 1
        if peak <= room:
            measured[fitting[0]] = peak
        else:
            ceiling = fitting[0]
