"""One run by two processes: what it computes is what one process computes, and how it can end."""

import json
import multiprocessing
import os
import re
import signal
import socket
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_train import HASH, Line, changed, checkpoint, interrupt, log_of, run
from torch import Tensor

from fresnel.training import checkpoints, ranks
from fresnel.training.loop import TrainResult
from fresnel.training.step import step_seed
from fresnel.training.task import NonFiniteLoss

pytestmark = pytest.mark.xdist_group("ranks")
TOLERANCE = {"rtol": 2e-5, "atol": 2e-7}
"""Of weights after ten steps. Two shards add up to the same bits; three were within 1.5e-6."""
TWO, THREE = changed(accumulate=2), changed(accumulate=3)


def parameters(result: TrainResult) -> dict[str, Tensor]:
    nets = {"model": result.model, "ema": result.ema_model}
    named = [(which, net.named_parameters()) for which, net in nets.items()]
    return {f"{w}.{name}": p.detach().contiguous() for w, each in named for name, p in each}


def interleaved() -> Line:
    """With weights in another memory order, which their gradients' shared buffer has to keep."""
    task = Line()
    task.model = task.model.to(memory_format=torch.channels_last)
    return task


GPU_TASKS = ("cvs", "decoder")
GPU_CONFIG = changed(steps=24, accumulate=2, lr=1e-3, log_every=1)


def gpu_task(model: str) -> Any:
    from test_cvs import views

    from fresnel.study import arms

    data = replace(views(objects=4, depth=True), content_hash=HASH)
    return arms.make_task(
        model, "tiny", data, batch_size=4, seed=0, device="cuda", ground_truth=True
    )


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

        def slowly(name: str) -> None:
            """Say which process this is, wait to be let go on, and then take a second a step."""

            def breathe(step: int, _: Tensor) -> None:
                if step == 6:
                    print(f"{name}: rank {group.rank} is {os.getpid()}.", flush=True)
                    while not (folder / f"{name}.go").exists():
                        time.sleep(0.05)
                time.sleep(step > 6)

            fit(name, Line(at={step: partial(breathe, step) for step in range(10)}))

        if scene in GPU_TASKS:
            warnings.filterwarnings("error", ".*unrecorded")
            fit(scene, gpu_task(scene), config=GPU_CONFIG)
            return
        if scene != "all":
            slowly(scene)
            return
        torch.manual_seed(group.rank)
        task = Line()
        for p in task.model.parameters():  # rank 0's count
            p.data += group.rank
        result = fit("two", task)
        assert task.batches == list(range(10)), "a shard a step"
        assert result.samples_per_s > 0 and len(result.validations) == 3
        fit("three", interleaved(), config=THREE)
        with pytest.raises(ValueError, match="accumulate: got 1, want at least 2"):
            run(folder, "one")
        with pytest.raises(KeyboardInterrupt, match="stopped at step 5 of 10; a checkpoint is in"):
            fit("two-one", Line(at={4: on_rank_1(terminate)}))
        fit("one-two")
        with pytest.raises(NonFiniteLoss, match="step 7: not finite: loss, error"):
            fit("nan", Line(at={7: lambda x: x[0, 0, 0].fill_(torch.nan)}))
        steep = Line(at={7: on_rank_1(lambda _: last.register_hook(lambda g: g * torch.inf))})
        last = steep.model.layers[2].weight
        with pytest.raises(NonFiniteLoss, match="step 7: not finite: grad_norm"):
            fit("steep", steep)
        error = ValueError if group.first else ranks.ElsewhereFailed
        with pytest.raises(error):
            fit("two", config=changed(accumulate=2, lr=1.0))
        slowly("terminated")

    ranks.main(work, "cuda" if scene in GPU_TASKS else "cpu")


class Launcher:
    """Two forks of this process in a scene, below one that hands SIGTERM on to them, as torchrun
    does (which test_gpus has: its own imports would take most of a test), and what they say."""

    def __init__(self, folder: Path, scene: str) -> None:
        said = folder / f"{scene}.txt"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        fork = multiprocessing.get_context("fork")
        self.process = fork.Process(target=self.launch, args=(folder, scene, said))
        self.process.start()
        self.said, self.folder = said.read_text, folder

    def launch(self, folder: Path, scene: str, said: Path) -> None:
        sys.stdout = sys.stderr = said.open("a")
        os.environ |= {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_RUN_ID": "x"}
        os.environ["MASTER_PORT"] = str(self.port)
        pids = []
        for rank in "01":
            if not (pid := os.fork()):
                os.environ |= {"RANK": rank, "LOCAL_RANK": rank}
                worker(folder, scene)
            pids.append(pid)
        signal.signal(signal.SIGTERM, lambda number, _: [os.kill(pid, number) for pid in pids])
        codes = [os.waitpid(pid, 0)[1] for pid in pids]
        os._exit(int(any(codes)))

    def pids(self, name: str) -> dict[str, int]:
        """Of the processes that train under this name, by rank, once both do."""
        found: list[tuple[str, str]] = []
        while len(found) < 2:
            time.sleep(0.1)
            found = re.findall(rf"{name}: rank (\d) is (\d+)\.", self.said())
            assert self.process.is_alive(), self.said()
        return {rank: int(pid) for rank, pid in found}

    def go_on(self, name: str) -> None:
        time.sleep(0.5)  # until a signal has come through
        (self.folder / f"{name}.go").touch()


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder in which two ranks ran "all" up to SIGTERM; one process had gone half the way of
    "one-two"."""
    folder = tmp_path_factory.mktemp("ranks")
    with pytest.raises(KeyboardInterrupt):
        run(folder, "one-two", Line(at={4: interrupt}), config=TWO)
    launcher = Launcher(folder, "all")
    try:
        launcher.pids("terminated")
        launcher.process.terminate()
        launcher.go_on("terminated")
        launcher.process.join(60)
    finally:
        launcher.process.kill()
    yield folder


def assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    torch.testing.assert_close(ours, theirs, **TOLERANCE)


def test_two_ranks_are_two_micro_batches(together: Path, tmp_path: Path) -> None:
    for name, config in (("two", TWO), ("three", THREE)):
        found = [load_file(together / f"{name}-{rank}.safetensors") for rank in (0, 1)]
        for key, value in found[0].items():
            assert torch.equal(value, found[1][key]), "the ranks hold the same, averages too"
        alone = run(tmp_path, name, interleaved() if name == "three" else Line(), config=config)
        assert_close(parameters(alone), found[0])
        logged = [row["error"] for row in log_of(together / name) if row["event"] == "train"]
        assert logged == pytest.approx([row["error"] for row in alone.history], rel=1e-4)


def test_a_run_goes_on_on_another_number_of_ranks(together: Path) -> None:
    whole = load_file(together / "two-0.safetensors")
    assert_close(load_file(together / "one-two-1.safetensors"), whole)
    resumed = run(together, "two-one", task := Line(), config=TWO)
    assert task.batches == [step for step in range(5, 10) for _ in "ab"]
    assert_close(parameters(resumed), whole)


@pytest.mark.parametrize(("name", "shard"), [("nan", 0), ("steep", 1)])
def test_the_first_bad_shard_of_all_ranks_is_kept_by_the_first(
    together: Path, name: str, shard: int
) -> None:
    """It is made again from its seed: of `steep` here, where nothing spoils it."""
    assert stopped_at(together, name) == 5
    with checkpoints.safe_open(str(*(together / name).glob("nonfinite*")), "pt") as file:
        assert json.loads(file.metadata()["fresnel"])["shard"] == shard
        generator = torch.Generator().manual_seed(step_seed(0, 7, shard))
        wanted = torch.randn(4, 1, 8, 8, generator=generator)
        wanted[0, 0, 0] += torch.nan if name == "nan" else 0.0
        assert torch.equal(file.get_tensor("x").nan_to_num(), wanted.nan_to_num())


def stopped_at(folder: Path, name: str) -> int:
    """The step of a run's checkpoint, which is whole."""
    return int(checkpoints.read(checkpoint(folder / name))[1]["step"])


def test_sigterm_to_the_launcher_ends_in_a_checkpoint(together: Path) -> None:
    said = (together / "all.txt").read_text()
    step = stopped_at(together, "terminated")
    assert 7 <= step < 10 and f"stopped at step {step} of 10; a checkpoint is in" in said
    assert said.count("to resume") == 1


def test_a_killed_rank_ends_the_others_and_a_killed_launcher_leaves_no_orphans(
    tmp_path: Path,
) -> None:
    names = ("rank", "launcher")
    both = {name: Launcher(tmp_path, name) for name in names}
    try:
        pids = {name: both[name].pids(name) for name in names}
        os.kill(pids["rank"]["1"], signal.SIGKILL)
        both["launcher"].process.kill()
        for name in names:
            both[name].go_on(name)
        both["rank"].process.join(60)
        assert both["rank"].process.exitcode == 1
        assert stopped_at(tmp_path, "rank") == 5
        assert "whole: run again to go on from there" in both["rank"].said()
        everyone = {pid for each in pids.values() for pid in each.values()}
        for _ in range(300):
            if not any(map(psutil.pid_exists, everyone)):
                break
            time.sleep(0.1)
        assert not [pid for pid in everyone if psutil.pid_exists(pid)]
        assert 7 <= stopped_at(tmp_path, "launcher") < 10, "it had time for a checkpoint"
    finally:
        for launcher in both.values():
            launcher.process.kill()


def test_places_are_read_from_torchrun_and_slurm() -> None:
    told = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "a"}
    with pytest.raises(ValueError, match="are set, but not MASTER_PORT"):
        ranks.place(told)
    told["MASTER_PORT"] = "1"
    slurm = {"SLURM_JOB_ID": "41234", "SLURM_NTASKS": "16", "SLURM_PROCID": "9"}
    slurm |= {"SLURM_LOCALID": "1", "SLURM_JOB_NODELIST": "gpu[007-008,11],other"}
    assert ranks.place(told | {"PATH": "x"} | slurm) == told
    assert ranks.place({}) == {} == ranks.place(slurm), "a batch script is no task"
    assert ranks.place(slurm | {"SLURM_STEP_ID": "0"}) == {
        **{"RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1"},
        **{"MASTER_ADDR": "gpu007", "MASTER_PORT": "21234"},
    }
    assert [ranks.first_host(x) for x in ("a,b", "a[1,2]", "a-b[09]-c,d")] == ["a", "a1", "a-b09-c"]


def test_one_of_several_processes_does_not_train_alone(tmp_path: Path, monkeypatch) -> None:
    told = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "a"}
    for name, value in {**told, "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RuntimeError, match="would train all by itself"):
        run(tmp_path)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ValueError, match="number 0, from 0, on this host, which has 0 GPUs"):
        ranks.joined("cuda").__enter__()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("model", GPU_TASKS)
def test_two_gpus_are_one_that_takes_both_shards(tmp_path: Path, model: str) -> None:
    """Recorded steps with NCCL's sum inside, against unrecorded ones of one GPU."""
    launcher = Launcher(tmp_path, model)
    launcher.process.join(300)
    assert launcher.process.exitcode == 0, launcher.said()
    found = [load_file(tmp_path / f"{model}-{rank}.safetensors") for rank in (0, 1)]
    for key, value in found[0].items():
        assert torch.equal(value, found[1][key]), key
    alone = run(tmp_path, "alone", gpu_task(model), config=GPU_CONFIG)
    logged = [row["loss"] for row in log_of(tmp_path / model) if row["event"] == "train"]
    assert logged == pytest.approx([row["loss"] for row in alone.history], rel=2e-2)
