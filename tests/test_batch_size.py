"""The batch found by trial, with a device whose memory is a formula."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fresnel.training import batch_size
from fresnel.training import host as surroundings
from fresnel.training.batch_size import find_batch_size
from fresnel.training.loop import OutOfMemory, TrainConfig

FIXED, PER_SAMPLE = 1000, 100


class Card:
    """So many bytes; whatever needs more raises what CUDA raises."""

    def __init__(self, free: int, burst: int = 0) -> None:
        self.free, self.peak, self.burst = free, 0, burst
        self.tried: list[int] = []

    def task(self, size: int) -> Any:
        card = self

        class Task:
            def __init__(self) -> None:
                self.model, self.batch_size = nn.Linear(2, 1), size

            def batch(self, step: int, generator: torch.Generator) -> dict[str, Tensor]:
                if step == 99 and (not card.tried or card.tried[-1] != size):
                    card.tried.append(size)
                return {"x": torch.ones(size, 2)}

            def loss(self, batch: Any, *, progress: float, **_: Any) -> dict[str, Tensor]:
                assert progress == 0.99  # where a curriculum asks for most
                need = FIXED + PER_SAMPLE * size + (card.burst if size > 8 else 0)
                if need > card.free:
                    raise torch.OutOfMemoryError(f"want {need} of {card.free}")
                card.peak = max(card.peak, need)
                return {"loss": self.model(batch["x"]).square().mean()}

        return Task()


@pytest.fixture
def card(monkeypatch):
    def make(free: int, burst: int = 0) -> Card:
        made = Card(free, burst)
        monkeypatch.setattr(surroundings, "free_memory", lambda _: made.free)
        monkeypatch.setattr(surroundings, "peak_memory", lambda _: made.peak)
        monkeypatch.setattr(surroundings, "reset_peak_memory", lambda _: setattr(made, "peak", 0))
        return made

    return make


def find(card: Card, wanted: int, **options: Any) -> batch_size.BatchSize:
    config = TrainConfig(steps=100)
    return find_batch_size(card.task, wanted, config, device="cpu", **options)


@pytest.mark.parametrize(
    "free, expected", [(10**9, 64), (9000, 64), (7000, 32), (2500, 8), (1300, 1)]
)
def test_the_largest_divisor_that_fits_with_room_to_spare(card, free: int, expected: int) -> None:
    made = card(free)
    found = find(made, 64)
    assert (found.batch_size, found.accumulate) == (expected, 64 // expected)
    assert found.peak_bytes == FIXED + PER_SAMPLE * expected
    assert found.peak_bytes <= 0.9 * free or expected == 1
    assert made.tried == sorted(made.tried) and found.trials == len(made.tried)
    # never further than fourfold beyond what was measured, so a CPU isn't filled to its end
    assert all(b <= 4 * a for a, b in zip(made.tried, made.tried[1:], strict=False))


def test_a_limit_stands_for_a_smaller_card(card) -> None:
    assert find(card(10**9), 64, limit_bytes=2500).batch_size == 8


def test_running_out_in_a_trial_is_not_the_end(card) -> None:
    made = card(7000, burst=6000)  # more than what small batches promise
    assert find(made, 64).batch_size == 8
    assert made.tried == [1, 4, 16, 8]  # 16 ran out
    assert find(card(9000, burst=6000), 64).batch_size == 8  # 16 ran, too near to the edge
    assert find(card(12_000, burst=6000), 64).batch_size == 16  # 32 looked as steep


def test_not_even_one(card) -> None:
    with pytest.raises(OutOfMemory, match="batch_size 1"):
        find(card(1050), 4)
    with pytest.raises(ValueError, match="wanted: got 0"):
        find(card(1050), 0)


def test_peak_memory_is_that_since_the_reset() -> None:
    device = torch.device("cpu")
    surroundings.reset_peak_memory(device)
    before = surroundings.peak_memory(device)
    torch.ones(60_000_000)
    risen = surroundings.peak_memory(device) - before
    assert 200e6 < risen < 300e6
    surroundings.reset_peak_memory(device)
    assert surroundings.peak_memory(device) < before + 100e6
    assert surroundings.free_memory(device) > 0
