"""Worker processes: what comes back, and that nothing stays behind, however a program ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest
import torch

from fresnel.data import dataset
from fresnel.data.images import DatasetError
from fresnel.host import processes as _processes
from fresnel.host.processes import Crew


def sizes(tensor: torch.Tensor) -> tuple[torch.Tensor, int, int]:
    return tensor + 1, tensor.untyped_storage().nbytes(), torch.get_num_threads()


@pytest.fixture(scope="module")
def crew():
    with Crew(2) as crew:
        yield crew


def test_tensors_travel_by_value_without_their_storage(crew: Crew) -> None:
    whole = torch.arange(1000.0)
    result, stored, threads = crew.submit(sizes, whole[10:20]).result()
    assert torch.equal(result, whole[10:20] + 1)
    assert (stored, threads) == (40, 1)
    half = torch.ones(3, dtype=torch.bfloat16)  # numpy has no such type
    assert torch.equal(crew.submit(sizes, half).result()[0], half + 1)


def test_errors_come_back_as_themselves(crew: Crew) -> None:
    with pytest.raises(DatasetError, match="no-such-folder") as caught:
        crew.submit(dataset.open, "no-such-folder").result()
    assert any("In a worker process" in note for note in caught.value.__notes__)
    with pytest.raises(OSError) as full:  # its number decides what a full disk is called
        crew.submit(os.mkdir, "/proc/x").result()
    assert full.value.errno
    assert crew.submit(abs, -3).result() == 3


def test_both_ways_to_processes_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_processes, "_FORKS", False)
    with Crew(1) as crew:
        result, stored, threads = crew.submit(sizes, torch.arange(100)[:5]).result()
    assert (result.tolist(), stored, threads) == ([1, 2, 3, 4, 5], 40, 1)


@pytest.mark.skipif(not _processes._FORKS, reason="multiprocessing answers for its own")
def test_a_killed_worker_is_an_error_and_no_hang() -> None:
    with Crew(2) as crew:
        with pytest.raises(BrokenProcessPool, match="killed"):
            crew.submit(os._exit, 9).result()
        # the other one still answers; what meets the gap is told so
        answers = [crew.submit(abs, -1) for _ in range(4)]
        failed = [a for a in answers if isinstance(a.exception(), BrokenProcessPool)]
        assert len(failed) < 4
        assert all(a.result() == 1 for a in answers if a not in failed)


def pid_of_worker(crew: Crew) -> int:
    return int(crew.submit(os.getpid).result())


@pytest.mark.skipif(not _processes._FORKS, reason="elsewhere a crew is not kept")
def test_a_crew_is_lent_again_until_it_is_unfit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _processes._keeper().put(None)  # another test's
    _processes.prepare(2)
    with _processes.lend(2) as crew:
        server = crew._server
    with _processes.lend(1) as again:
        assert again is crew
        with _processes.lend(1) as other:  # one crew serves one at a time
            assert other is not crew
            pid_of_worker(again)
    assert other._server.poll() is not None, "two crews were kept"
    with _processes.lend(3) as larger:
        assert larger is not crew and larger.workers == 3
        worker = pid_of_worker(larger)
        os.kill(worker, signal.SIGKILL)
        assert _gone([server.pid, worker])
    with _processes.lend(2) as crew:
        assert crew is not larger, "a crew that lacks a worker was kept"
        worker = pid_of_worker(crew)
    os.kill(worker, signal.SIGKILL)
    assert _gone([worker])
    with _processes.lend(2) as after:
        assert after is not crew, "a crew whose worker ended while it was kept was lent"
        assert pid_of_worker(after)
    monkeypatch.chdir(tmp_path)
    with _processes.lend(2) as here:
        assert here.submit(os.getcwd).result() == str(tmp_path)


@pytest.mark.skipif(not _processes._FORKS, reason="elsewhere a crew is not kept")
def test_a_lent_crew_ends_where_it_was_left_busy_in_error_or_long_idle(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with _processes.lend(2) as crew:
        pids = [pid_of_worker(crew), crew._server.pid]
        crew.submit(time.sleep, 60)
    assert _gone(pids)
    with pytest.raises(KeyboardInterrupt), _processes.lend(2) as crew:
        pids = [pid_of_worker(crew), crew._server.pid]
        raise KeyboardInterrupt
    assert _gone(pids)
    monkeypatch.setattr(_processes, "_KEPT_S", 0.1)
    with _processes.lend(2) as crew:
        pids = [pid_of_worker(crew), crew._server.pid]
    assert _gone(pids)
    with _processes.lend(2) as crew:
        assert pid_of_worker(crew) not in pids


def _gone(pids: list[int]) -> bool:
    """Whether none of them runs; a zombie that its parent has not yet collected is none."""
    for _ in range(400):
        states = [Path(f"/proc/{pid}/stat") for pid in pids]
        if all(not s.exists() or s.read_text().rsplit(")", 1)[1].split()[0] == "Z" for s in states):
            return True
        time.sleep(0.05)
    return False


# No guard: the workers must not run the script again.
SCRIPT = """\
import os, signal, sys, time
from fresnel.host.processes import Crew, lend, prepare
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell ignores it
if "kept" in sys.argv:
    prepare(2)
    with lend(2) as crew:
        crew.submit(abs, -1).result()
else:
    crew = Crew(2)
try:
    print("started", os.getpid(), flush=True)
    busy = [crew.submit(time.sleep, 60)] if "busy" in sys.argv else []
    print(crew.submit(os.getpid).result(), crew._server.pid, flush=True)
    if "crash" in sys.argv:
        raise ValueError("as it happens")
    if "wait" in sys.argv:
        time.sleep(60)
finally:
    if "busy" in sys.argv:
        crew.shutdown(cancel_futures=True)
"""


@pytest.mark.skipif(not _processes._FORKS, reason="multiprocessing answers for its own")
@pytest.mark.parametrize(
    ("mode", "ends"),
    [
        ("end", None),
        ("crash", None),
        ("busy wait", "SIGINT"),
        ("wait", "SIGKILL"),
        ("kept", None),
        ("kept crash", None),
        ("kept wait", "SIGKILL"),
        ("kept wait", "SIGINT"),
    ],
)
def test_workers_end_with_an_unguarded_script(tmp_path: Path, mode: str, ends: str | None) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    root = Path(__file__).parent.parent
    running = subprocess.Popen(
        [sys.executable, str(script), *mode.split()],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(root)},
    )
    assert running.stdout is not None
    assert running.stdout.readline().startswith("started")
    pids = [int(word) for word in running.stdout.readline().split()]
    if ends:
        running.send_signal(getattr(signal, ends))
    rest, errors = running.communicate(timeout=60)
    assert rest == "", "a worker ran the script again"
    assert ("as it happens" in errors) == ("crash" in mode), errors
    assert ("KeyboardInterrupt" in errors) == (ends == "SIGINT"), errors
    assert len(pids) == 2
    assert _gone(pids)
