"""One run by two processes: what it computes is what one process computes, and how it can end."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_train import Line, changed, checkpoint, log_of, run
from torch import Tensor

from fresnel.training import checkpoints, ranks
from fresnel.training.loop import TrainResult
from fresnel.training.task import NonFiniteLoss

TOLERANCE = {"rtol": 2e-4, "atol": 2e-6}
"""Of weights after ten steps: sums of float32 in another order."""
TWO, THREE = changed(accumulate=2), changed(accumulate=3)
HERE = Path(__file__).resolve().parent


def parameters(result: TrainResult) -> dict[str, Tensor]:
    nets = {"model": result.model, "ema": result.ema_model}
    return {
        f"{n}.{name}": p.detach() for n, net in nets.items() for name, p in net.named_parameters()
    }


def worker(folder: Path, scene: str) -> None:
    """What each process of a test does; scenes that end by themselves come one after the other."""

    def work(group: ranks.Ranks) -> None:
        def fit(name: str, task: Line | None = None, **options: Any) -> TrainResult:
            result = run(folder, name, task, **{"config": TWO, **options})
            save_file(parameters(result), folder / f"{name}-{group.rank}.safetensors")
            return result

        def on_rank_1(act: Any) -> Any:
            return act if group.rank == 1 else lambda _: None

        def terminate(_: Any) -> None:
            signal.raise_signal(signal.SIGTERM)

        if scene != "all":
            print(f"rank {group.rank} is {os.getpid()}", flush=True)
            fit(scene, Line(at={step: lambda _: time.sleep(0.3) for step in range(10)}))
            return
        torch.manual_seed(group.rank)
        task = Line()
        for p in task.model.parameters():  # rank 0's count
            p.data += group.rank
        result = fit("two", task)
        assert task.batches == list(range(10)), "a shard a step"
        assert result.samples_per_s > 0 and len(result.validations) == 3
        fit("three", config=THREE)
        with pytest.raises(ValueError, match="accumulate: got 1, want at least 2"):
            run(folder, "one")
        with pytest.raises(KeyboardInterrupt, match="stopped at step 5 of 10; a checkpoint is in"):
            fit("two-one", Line(at={4: on_rank_1(terminate)}))
        fit("one-two")
        with pytest.raises(NonFiniteLoss, match="step 7: not finite: loss, error"):
            fit("nan", Line(at={7: on_rank_1(lambda x: x[0, 0, 0].fill_(torch.nan))}))
        error = ValueError if group.first else ranks.ElsewhereFailed
        with pytest.raises(error):
            fit("two", config=changed(accumulate=2, lr=1.0))

    ranks.main(work, "cpu")


@contextlib.contextmanager
def launched(folder: Path, scene: str) -> Iterator[subprocess.Popen[str]]:
    path = folder / f"{scene}.py"
    path.write_text(f"""\
import pathlib, sys
sys.path.insert(0, {str(HERE)!r})
import test_ranks
test_ranks.worker(pathlib.Path({str(folder)!r}), {scene!r})
""")
    env = {**os.environ, "PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": "1"}
    command = [*ranks.torchrun(2, {}), str(path)]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=env)
    with process:
        try:
            yield process
        finally:
            process.kill()


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which two ranks ran "all"; before, one process went half the way of "one-two"."""
    folder = tmp_path_factory.mktemp("ranks")
    with pytest.raises(KeyboardInterrupt):
        run(
            folder,
            "one-two",
            Line(at={4: lambda _: signal.raise_signal(signal.SIGINT)}),
            config=TWO,
        )
    with launched(folder, "all") as process:
        _, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    return folder


def assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    torch.testing.assert_close(ours, theirs, **TOLERANCE)


def test_two_ranks_are_two_micro_batches(together: Path, tmp_path: Path) -> None:
    for name, config in (("two", TWO), ("three", THREE)):
        found = [load_file(together / f"{name}-{rank}.safetensors") for rank in (0, 1)]
        for key, value in found[0].items():
            assert torch.equal(value, found[1][key]), "the ranks hold the same, averages too"
        alone = run(tmp_path, name, config=config)
        assert_close(parameters(alone), found[0])
        logged = [row["error"] for row in log_of(together / name) if row["event"] == "train"]
        assert logged == pytest.approx([row["error"] for row in alone.history], rel=1e-4)


def test_a_run_goes_on_on_another_number_of_ranks(together: Path) -> None:
    whole = load_file(together / "two-0.safetensors")
    assert_close(load_file(together / "one-two-1.safetensors"), whole)
    resumed = run(together, "two-one", task := Line(), config=TWO)
    assert task.batches == [step for step in range(5, 10) for _ in "ab"]
    assert_close(parameters(resumed), whole)


def test_a_bad_shard_of_another_rank_is_kept_by_the_first(together: Path) -> None:
    """It is made again from its seed: here, where nothing spoils it."""
    assert checkpoints.read(checkpoint(together / "nan"))[1]["step"] == 5
    (path,) = (together / "nan").glob("nonfinite*")
    with checkpoints.safe_open(str(path), "pt") as file:
        assert json.loads(file.metadata()["fresnel"])["shard"] == 1
        assert file.get_tensor("x").shape == (4, 1, 8, 8)
