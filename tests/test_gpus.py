"""A training in several processes from the notebook's: what comes back, and how it ends."""

import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
import torch
from boxes import views_of
from test_bootstrap import CORRECTED, PIXEL, discs

from fresnel import gate
from fresnel.bootstrap import _rebuilt, bootstrap
from fresnel.data import dataset
from fresnel.data.dataset import MultiViewDataset
from fresnel.gate import receipts
from fresnel.host import machine
from fresnel.models.decoder import Decoder, load_shipped
from fresnel.study import trainings
from fresnel.study.trainings import ChildError, Training
from fresnel.training import checkpoints, ranks
from fresnel.training.cvs_task import CVSTask
from fresnel.training.loop import TrainResult
from fresnel.training.task import NonFiniteLoss, OutOfMemory

STEPS = 40
FORK = multiprocessing.get_context("fork")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> MultiViewDataset:
    """Six objects, of which two each are to train on, to validate on and to judge by."""
    records = [views_of(i, size=16, views=2) for i in range(6)]
    names = [record.name.split("__")[0] for record in records]
    splits = dict(zip(names, ("train", "val", "test") * 2, strict=True))
    path = tmp_path_factory.mktemp("several") / "set"
    made = dataset.write(path, records, meta={"object_splits": splits})
    receipts.write_receipt(made, "gate", True, "fine")
    return made


def declared(data: MultiViewDataset, folder: Path, gpus: int = 1, **changes: Any) -> Training:
    """As notebook 03 does it, in its defaults but for size and length."""
    parameters = {
        **{"model": "cvs", "size": "tiny", "objects": "train", "truth_source": str(data.path)},
        **{"batch_size": 4, "accumulate": 1, "steps": STEPS, "learning_rate": 1e-3, "seed": 0},
        **{"compile_step": False, "checkpointing": False, "precision": "fp32", **changes},
    }
    found = trainings.declare(parameters, data, device="cpu", gpus=gpus)
    return replace(found, run_dir=str(folder))


def train(training: Training, data: MultiViewDataset, gpus: int = 1) -> TrainResult:
    found, receipt = trainings.opened(training), gate.require_receipt(data)
    return trainings.fit(training, *found, receipt=receipt, gpus=gpus)


def processes_of(folder: Path) -> list[psutil.Process]:
    return [p for p in psutil.process_iter(["cmdline"]) if str(folder) in str(p.info["cmdline"])]


def once(ready: Callable[[], bool], act: Callable[[], Any]) -> None:
    while not ready():
        time.sleep(0.05)
    act()


def alone(training: Training, folder: Path) -> tuple[Any, int]:
    """A training's only process, which is a fork, and the end of a pipe that its caller holds."""
    reading, caller = os.pipe()
    (folder / "training.json").write_bytes(msgspec.json.encode(training))

    def work() -> None:
        os.dup2(reading, 0)
        os.close(caller)
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "a"}
        os.environ["MASTER_PORT"] = "1"  # as torchrun says it
        batch = CVSTask.batch
        CVSTask.batch = lambda *given: time.sleep(0.1) or batch(*given)  # there is time to end it
        trainings.main([str(folder / "training.json"), "--with-caller"])

    worker = FORK.Process(target=work)
    worker.start()
    return worker, caller


def test_two_processes_train_as_one_and_go_on_after_an_orphan(data, tmp_path, capfd) -> None:
    """A process whose notebook is killed ends in a checkpoint; two others go on from it, and return
    what one process learns of the same parts."""
    two = declared(data, tmp_path / "two", gpus=2)
    assert two.config.accumulate == 2 and two.validate
    log = tmp_path / "two/log.jsonl"
    worker, caller = alone(two, tmp_path)
    once(lambda: log.exists() and log.read_text().count('"train"') >= 2, lambda: os.close(caller))
    worker.join(90)
    half = checkpoints.read_latest(tmp_path / "two/checkpoints")
    assert worker.exitcode == 130 and half is not None and 2 <= half[1]["step"] < STEPS
    ours = train(two, data, gpus=2)
    assert "train, 2 processes on the CPU" in capfd.readouterr().err
    theirs = train(declared(data, tmp_path / "one", accumulate=2), data)
    for name in ("model", "ema_model"):
        mine, its = (dict(getattr(result, name).named_parameters()) for result in (ours, theirs))
        torch.testing.assert_close(mine, its, rtol=2e-3, atol=2e-5)
    for rows in ("history", "validations"):
        mine, its = getattr(ours, rows), getattr(theirs, rows)
        assert [row["step"] for row in mine] == [row["step"] for row in its]
        losses = [[row["loss"] for row in found] for found in (mine, its)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert ours.steps == STEPS and ours.run_dir == tmp_path / "two" and ours.around_s > 0
    assert not list((tmp_path / "two").glob(".processes*")), "nothing is left"


FAKE = """
import pathlib, pickle, signal, sys, time
spec = pathlib.Path(sys.argv[-2])
def stop(*_):
    if HEEDS:
        end = pickle.dumps(KeyboardInterrupt("stopped at step 3"))
        spec.with_name("end-0000").write_bytes(end)
        sys.exit(130)
signal.signal(signal.SIGTERM, stop)
spec.parent.with_name("up").touch()
time.sleep(100)
"""


@pytest.mark.parametrize("heeds", [True, False])
def test_ctrl_c_stops_the_processes(data, tmp_path, monkeypatch, heeds) -> None:
    """They say where; those that do not heed it are killed."""
    python = [sys.executable, "-c", FAKE.replace("HEEDS", str(heeds))]
    monkeypatch.setattr(trainings.ranks, "torchrun", lambda gpus: python)
    monkeypatch.setattr(trainings, "STOP_S", 20 if heeds else 0.2)
    stop = (tmp_path / "run/up").exists, lambda: os.kill(os.getpid(), signal.SIGINT)
    threading.Thread(target=once, args=stop, daemon=True).start()
    with pytest.raises(KeyboardInterrupt, match="stopped at step 3" if heeds else "^stopped$"):
        trainings.fit(declared(data, tmp_path / "run"), receipt=None, gpus=2)
    assert processes_of(tmp_path) == []


def test_a_workers_error_is_the_callers(data, tmp_path) -> None:
    wild = declared(data, tmp_path / "run", learning_rate=1e30)
    worker, caller = alone(wild, tmp_path)
    worker.join(90)
    os.close(caller)
    (tmp_path / "said").touch()
    with pytest.raises(NonFiniteLoss, match=r"step \d+: not finite") as caught:
        trainings._result(tmp_path, wild, 1, stopped=False)
    assert caught.value.path.is_file() and caught.value.step > 0


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (gate.GateRefusal("why"), gate.GateRefusal),
        (OutOfMemory("why"), OutOfMemory),
        (checkpoints.DiskFull(28, "why"), checkpoints.DiskFull),
        (KeyboardInterrupt("why"), KeyboardInterrupt),
        ("ZeroDivisionError: why", ChildError),
        (None, ChildError),
    ],
)
def test_errors_by_their_types(tmp_path, error, kind) -> None:
    """Of several the one that tells most; without any word, the last lines."""
    (tmp_path / "said").write_text("one\nlast words\n")
    ends = [ranks.ElsewhereFailed("rank 1 has failed"), *filter(None, [error])]
    for rank, end in enumerate(ends):
        (tmp_path / f"end-{rank:04d}").write_bytes(pickle.dumps(end))
    training: Any = None
    with pytest.raises(kind, match="why" if error else "1 of 2 .* without a word") as caught:
        trainings._result(tmp_path, training, 2, stopped=False)
    if kind is ChildError:
        assert "last words" in str(caught.value)


def test_data_that_changed_since_is_not_trained_on(data, tmp_path) -> None:
    with pytest.raises(dataset.DatasetError, match="changed since the training was declared"):
        trainings.opened(replace(declared(data, tmp_path), content_hash="sha256:0"))


def test_a_training_is_written_for_machines_elsewhere(data, tmp_path, capsys) -> None:
    notebook = Path(__file__).parent.parent / "notebooks/03_full_train.ipynb"
    given = {"dataset_dir": str(data.path), "gpus": "16", "device": "cuda", "precision": "bf16"}
    with pytest.raises(ValueError, match="smoke-cvs"):
        trainings.write(notebook, given, tmp_path / "spec.json")
    receipts.write_receipt(data, "smoke-cvs", True, "go")
    with pytest.raises(ValueError, match="gpus, precision: say what it is"):
        trainings.write(notebook, {**given, "gpus": "auto", "precision": "auto"}, tmp_path / "x")
    with pytest.raises(ValueError, match=r"gpus: got 16, want .* a divisor of 8"):
        trainings.write(notebook, {**given, "batch_size": 8}, tmp_path / "spec.json")
    assert trainings.write(notebook, given, tmp_path / "spec.json") == 0
    found = msgspec.json.decode((tmp_path / "spec.json").read_bytes(), type=Training)
    assert (found.config.accumulate, found.config.precision, found.device) == (16, "bf16", "cuda")
    assert "-p gpus 1 -p accumulate 16" in capsys.readouterr().out


def test_how_many_gpus(data, monkeypatch) -> None:
    folders = {
        trainings.declare(
            {"model": "cvs", "size": "tiny", "batch_size": 4, "steps": 1, "precision": "fp32",
             "learning_rate": 1e-3, "compile_step": False, "checkpointing": False, "seed": 0,
             "accumulate": accumulate, "gpus": str(gpus)}, data, device="cpu", gpus=gpus,
        ).run_dir
        for accumulate, gpus in ((1, 2), (2, 1), (2, 2))
    }  # fmt: skip
    assert len(folders) == 1, "one run, whoever computes its parts"
    monkeypatch.setattr(machine, "core_count", lambda: 2)
    assert [machine.pick_gpus(n, "cpu") for n in ("auto", "1", 2)] == [1, 1, 2]
    for wrong in ("3", "0", "two", "1.0"):
        with pytest.raises(ValueError, match=f"gpus: got '{wrong}', want 'auto' or 1 to 2"):
            machine.pick_gpus(wrong, "cpu")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert [machine.pick_gpus("auto", "cuda", *step) for step in ((), (16,), (16, 2))] == [4] * 3
    assert machine.pick_gpus("auto", "cuda", 6) == 3, "that can share a step"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert machine.pick_gpus("auto", "cuda") == 1
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: "H100")
    assert [machine.cards("cuda", n) for n in (1, 2)] == ["H100", "2 x H100"]


def test_a_processs_decoder_lies_in_memory_as_the_callers() -> None:
    ours = load_shipped("pixel")
    state = {name: x.contiguous() for name, x in ours.state_dict().items()}
    its = _rebuilt(ours.config, state, ours.render_size)
    strides = [[x.stride() for x in decoder.parameters()] for decoder in (ours, its)]
    assert strides[0] == strides[1] and any(x.stride()[1:2] == (1,) for x in its.parameters())
    assert its.checksum() == ours.checksum() and its.render_size == ours.render_size


def test_processes_share_a_bootstrap(tmp_path, monkeypatch) -> None:
    """The same bytes and the same verdict, the last batch smaller than the others."""
    pool = partial(ProcessPoolExecutor, mp_context=FORK)  # ours imports all anew: see test_pool
    monkeypatch.setattr("fresnel.bootstrap.processes", pool)
    inputs, decoder = discs("abcde"), Decoder(PIXEL)
    config = replace(CORRECTED, image_size=24, views_per_image=2)
    made = [
        bootstrap(inputs, decoder, config, tmp_path / str(n), batch_size=2, gpus=n) for n in (1, 2)
    ]
    assert made[0].content_hash == made[1].content_hash and made[1].names == tuple("abcde")
    made[1].verify()
    receipt = [gate.issue_receipt(each, gate.validate(each)) for each in made]
    assert replace(receipt[0], created_utc="") == replace(receipt[1], created_utc="")
