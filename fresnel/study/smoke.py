"""What a smoke test measures: can the network learn this data, and is there anything to learn?

The thresholds and the verdict stand in notebook 02.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fresnel.data.dataset import ViewTensors
from fresnel.scene.colour import luminance
from fresnel.training.task import Task


class OneBatch:
    """A task that sees the same batch at every step: what a network must be able to overfit."""

    def __init__(self, task: Task, seed: int) -> None:
        self._task = task
        generator = torch.Generator(next(task.model.parameters()).device).manual_seed(seed)
        self._batch = task.batch(0, generator)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._task, name)

    def batch(self, step: int, generator: torch.Generator) -> Any:
        return self._batch


def steps_per_epoch(views: ViewTensors, batch_size: int) -> int:
    """Steps that draw as many (record, view) pairs as the set has."""
    return max(1, views.rgb.shape[0] * views.rgb.shape[1] // batch_size)


def loss_fall(history: Sequence[Mapping[str, Any]], first: float | None = None) -> float:
    """First over last loss, each the mean of a tenth of the logged steps.

    Args:
        first: take this as the first loss, such as `untrained_loss` where training went on from
            other weights.
    """
    losses = [row["loss"] for row in history if row.get("loss") is not None]
    tenth = max(1, len(losses) // 10)
    last = sum(losses[-tenth:]) / tenth
    if first is None:
        first = sum(losses[:tenth]) / tenth
    return first / last if last else float("inf")


@torch.no_grad()
def untrained_loss(task: Any, seed: int, *, batches: int = 4) -> float:
    """A CVS task's loss for a network that has learned nothing: its last layer is zero."""
    blank = copy.copy(task)
    blank.model = model = copy.deepcopy(task.model)
    for weights in model.unet.head.parameters():
        weights.zero_()
    losses = []
    for step in range(batches):
        generator = torch.Generator(next(model.parameters()).device).manual_seed(seed + step)
        batch = blank.batch(step, generator)
        terms = blank.loss(batch, progress=0.0, generator=generator, ema=model)
        losses.append(float(terms["loss"]))
    return sum(losses) / len(losses)


def light_of_targets(data: ViewTensors) -> dict[str, float]:
    """Light and area of a set's views over those of its inputs: sums over all pixels.

    Returns:
        ``target_luminance`` and ``target_coverage``; 1 where views are as bright and as large.
    """
    inputs, views = data.inputs, data.rgb.shape[1]
    light = sum(luminance(rgb.float() / 255).sum().item() for rgb in data.rgb)
    light_in = luminance(inputs.rgb.float() / 255).sum().item()
    cover, cover_in = (alpha.float().sum().item() for alpha in (data.alpha, inputs.alpha))
    pixels = inputs.alpha[0].numel() / data.alpha[0, 0].numel() / views
    return {
        "target_luminance": light / max(light_in, 1e-9) * pixels,
        "target_coverage": cover / max(cover_in, 1e-9) * pixels,
    }
