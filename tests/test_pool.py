"""Worker processes: what comes back, and that nothing stays behind, however a program ends."""

import os
import platform
import resource
import subprocess
import sys
import time
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest
import torch

from fresnel.data import dataset
from fresnel.data.images import DatasetError
from fresnel.host import pool


def sizes(tensor: torch.Tensor) -> tuple[torch.Tensor, int, int, int]:
    return tensor + 1, tensor.untyped_storage().nbytes(), torch.get_num_threads(), os.getpid()


def test_tensors_travel_by_value_and_errors_as_themselves(tmp_path: Path, monkeypatch) -> None:
    whole = torch.arange(1000.0)
    monkeypatch.chdir(tmp_path)
    with pool.processes(2) as crew:
        result, stored, threads, pid = crew.submit(sizes, whole[10:20]).result()
        assert torch.equal(result, whole[10:20] + 1) and not result.is_shared()
        assert (stored, threads) == (40, 1) and pid != os.getpid()
        with pytest.raises(DatasetError, match="no-such-folder"):
            crew.submit(dataset.open, "no-such-folder").result()
        with pytest.raises(OSError) as full:  # its number decides what a full disk is called
            crew.submit(os.mkdir, "/proc/x").result()
        assert full.value.errno
        assert list(crew.map(abs, [-3, 4])) == [3, 4]
        assert crew.submit(os.getcwd).result() == str(tmp_path)
    assert _gone([pid])


def page_faults() -> int:
    """Of the last of some large blocks, each freed before the next."""
    before = 0
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(40_000_000, dtype=torch.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="asks this C library")
def test_workers_keep_what_is_freed_for_the_next_record() -> None:
    with pool.processes(1) as crew:
        assert crew.submit(page_faults).result() < 1000  # of ten thousand pages


def test_a_killed_worker_is_an_error_and_no_hang() -> None:
    with pytest.raises(BrokenProcessPool), pool.processes(2) as crew:
        crew.submit(os._exit, 9).result()


def test_an_error_ends_busy_workers_at_once() -> None:
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt), pool.processes(2) as crew:
        pid = crew.submit(os.getpid).result()
        for _ in range(2):
            crew.submit(time.sleep, 60)
        raise KeyboardInterrupt
    assert _gone([pid]) and time.monotonic() - started < 30


# The worker's end of a pipe is open here, too: who waits in the middle would wait for ever.
HALF = """\
import os, signal, time
from fresnel.host.pool import processes
try:
    with processes(2) as crew:
        pids = {crew.submit(os.getpid).result() for _ in range(9)}
        if %r == "a result":
            queue = [crew.submit(bytes, 300_000_000) for _ in range(20)]
            time.sleep(1)
        else:
            queue = [crew.submit(time.sleep, 60), crew.submit(time.sleep, 60)]
            queue += [crew.submit(len, bytes(10_000_000)) for _ in range(9)]
            queue[-1].cancel()
            time.sleep(1)
            os.kill(min(pids), signal.SIGTERM)  # as a signal to the whole group does
            time.sleep(1)
        raise KeyboardInterrupt
except KeyboardInterrupt:
    print("stopped")
"""


@pytest.mark.skipif(pool.METHOD != "forkserver", reason="multiprocessing answers for its own")
@pytest.mark.parametrize("what", ["a result", "a task"])
def test_a_stop_in_the_middle_of_a_transfer_ends_the_program(what: str, tmp_path: Path) -> None:
    script, root = tmp_path / "script.py", str(Path(__file__).parent.parent)
    script.write_text(HALF % what)
    ended = subprocess.run(
        [sys.executable, str(script)], env=os.environ | {"PYTHONPATH": root}, timeout=60,
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert ended.stdout == "stopped\n"


def grandchild() -> tuple[int, int, int]:
    with pool.processes(1) as crew:
        return os.getppid(), crew.submit(os.getppid).result(), crew.submit(os.getpid).result()


@pytest.mark.skipif(pool.METHOD != "forkserver", reason="there is no server")
def test_a_workers_workers_come_from_the_same_server_and_end_with_it() -> None:
    with pool.processes(2) as crew:
        for job in [crew.submit(grandchild) for _ in range(2)]:
            mine, its, pid = job.result()
            assert mine == its == pool.forkserver._forkserver._forkserver_pid
            assert _gone([pid])


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
import os, time
from fresnel.host.pool import forkserver, processes
print("started", os.getpid(), flush=True)
with processes(2) as crew:
    server = forkserver._forkserver._forkserver_pid
    print(crew.submit(os.getpid).result(), server, flush=True)
    crew.submit(time.sleep, 60)
    time.sleep(60)
"""


@pytest.mark.skipif(pool.METHOD != "forkserver", reason="multiprocessing answers for its own")
def test_busy_workers_end_at_once_with_a_killed_unguarded_script(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    root, pipe = str(Path(__file__).parent.parent), subprocess.PIPE
    running = subprocess.Popen(
        [sys.executable, str(script)], cwd=tmp_path, env=os.environ | {"PYTHONPATH": root},
        stdout=pipe, stderr=pipe, text=True,
    )  # fmt: skip
    assert running.stdout is not None
    assert running.stdout.readline().startswith("started")
    pids = [int(word) for word in running.stdout.readline().split()]
    running.kill()
    rest, _ = running.communicate(timeout=30)
    assert rest == "", "a worker ran the script again"
    assert len(pids) == 2 and _gone(pids)
