"""A run on a machine behind a real sshd on loopback, with a small job in place of the main one."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sshd

from fresnel.host.files import sha256
from fresnel.launch import runs
from fresnel.launch.plan import Plan, Terms
from fresnel.launch.remote import Box, RemoteError

pytestmark = pytest.mark.skipif(bool(sshd.missing()), reason=sshd.missing() or "-")
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[sshd.Machine]:
    made = sshd.Machine(tmp_path_factory.mktemp("sshd") / "machine")
    yield made
    made.stop()


class Laptop:
    """A project of two files whose run_all.sh is the job, its reports, and a box to send it to."""

    def __init__(self, folder: Path, machine: sshd.Machine) -> None:
        self.machine, self.place = machine, folder / "box"
        self.root, self.reports = folder / "project", folder / "reports"
        self.root.mkdir()
        self.on = machine.address(self.place)
        self.write("notes.txt", "some notes\n")
        self.job("echo done >$out/result.txt; echo said so")

    def write(self, name: str, text: str) -> None:
        (self.root / name).parent.mkdir(parents=True, exist_ok=True)
        (self.root / name).write_text(text)

    def job(self, body: str) -> None:
        """What ./run_all.sh does there; $out is the folder of its results."""
        self.write("run_all.sh", f"#!/bin/sh\nfor out; do :; done\n{body}\n")
        (self.root / "run_all.sh").chmod(0o755)

    def plan(self, **terms: Any) -> Plan:
        chosen = dict(budget_usd=1.0, rate_usd=36.0, kill_s=2.0, tick_s=0.1, python="python3")
        names = sorted(p.relative_to(self.root) for p in self.root.rglob("*") if p.is_file())
        return Plan(
            *("job", ("job",), Terms(**{**chosen, **terms}), self.root),
            tuple(map(str, names)),
            stages=(("verify", PLAN_STAGE),),
        )

    def launch(self, plan: Plan | None = None, **terms: Any) -> str:
        return runs.launch(plan or self.plan(**terms), self.on, self.reports)

    def until(self, run: str, *states: str, limit_s: float = 20) -> dict[str, Any]:
        """Poll the box's own files, as that costs no connection."""
        end = time.monotonic() + limit_s
        while self.state(run) not in states:
            assert time.monotonic() < end, f"{self.state(run)}\n{self.there(run, 'log')}"
            time.sleep(0.05)
        return runs.status(run, self.reports)

    def state(self, run: str) -> str:
        return self.there(run, "state").strip()

    def there(self, run: str, name: str) -> str:
        path = self.place / "runs" / run / name
        return path.read_text() if path.exists() else ""

    def entry(self, run: str) -> dict[str, Any]:
        return runs.find(run, self.reports)


PLAN_STAGE = 'sh "$FRESNEL_HOME/box.sh" verify "$FRESNEL_DIR" "$FRESNEL_RUN"'


@pytest.fixture
def laptop(
    tmp_path: Path, machine: sshd.Machine, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Laptop]:
    monkeypatch.setenv("FRESNEL_SSH", f"ssh -F {machine.folder / 'ssh_config'}")
    monkeypatch.setenv("FRESNEL_SSH_TIMEOUT", "6")
    made = Laptop(tmp_path, machine)
    yield made
    for state in made.place.glob("runs/*/settings"):  # whatever is left ends by itself
        (state.parent / "stop").touch()
        (state.parent / "fetched").touch()


def test_there_and_back(laptop: Laptop) -> None:
    laptop.write("deep/folder/a file.txt", "with a space\n")
    run = laptop.launch()
    laptop.until(run, "finished")
    target = runs.fetch(run, laptop.reports)
    assert target == laptop.reports / "remote" / run
    assert (target / "out" / "result.txt").read_text() == "done\n"
    assert "said so" in (target / "log.txt").read_text()
    assert (laptop.place / "tree/deep/folder/a file.txt").read_text() == "with a space\n"
    assert json.loads((target / "launch.json").read_text())["run"] == run
    entry = laptop.entry(run)
    assert entry["state"] == "finished" and entry["exit"] == "0" and entry["fetched"]
    assert entry["planned"] == {"duration_s": 100.0, "cost_usd": 1.0}
    assert 0 <= entry["spent"]["cost_usd"] < 0.3
    assert entry["spent"]["cost_usd"] == pytest.approx(entry["spent"]["duration_s"] / 100)
    assert not list((laptop.reports / "remote").glob("*.partial"))
    with pytest.raises(FileExistsError, match="nothing is overwritten"):
        runs.fetch(run, laptop.reports)
    assert (target / "out" / "result.txt").read_text() == "done\n"


def test_what_is_there_is_not_sent_again(laptop: Laptop) -> None:
    laptop.write("big.bin", "x" * 300_000)
    run = laptop.launch()
    laptop.until(run, "finished")
    before = (laptop.place / "tree/big.bin").stat()
    laptop.write("notes.txt", "other notes\n")
    laptop.until(laptop.launch(), "finished")
    after = (laptop.place / "tree/big.bin").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    assert (laptop.place / "tree/notes.txt").read_text() == "other notes\n"


def test_a_dropped_upload_goes_on_where_it_stopped(
    laptop: Laptop, capfd: pytest.CaptureFixture[str]
) -> None:
    (laptop.root / "big.bin").write_bytes(os.urandom(40_000_000))
    plan = laptop.plan()
    done = threading.Event()

    def cut() -> None:
        tree = laptop.place / "tree"
        while not done.is_set():
            if any(p.stat().st_size > 1_000_000 for p in tree.glob(".*big*")):
                for pid in laptop.machine.sessions():
                    os.kill(pid, signal.SIGKILL)
                return
            time.sleep(0.005)

    cutter = threading.Thread(target=cut)
    cutter.start()
    try:
        run = laptop.launch(plan)
    finally:
        done.set()
        cutter.join()
    assert "the connection broke off; going on" in capfd.readouterr().err
    assert sha256(laptop.place / "tree/big.bin") == sha256(laptop.root / "big.bin")
    laptop.until(run, "finished")


def test_a_peer_that_hangs_is_given_up(laptop: Laptop) -> None:
    import socket

    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen()
        box = Box("127.0.0.1", "x", deaf.getsockname()[1], timeout_s=1)
        began = time.monotonic()
        with pytest.raises(RemoteError, match="no connection"):
            box.probe()
        assert time.monotonic() - began < 8


@pytest.mark.parametrize(
    ("without", "said"),
    [("rsync", "lacks rsync"), ("python", "no Python 3.11"), ("space", "GB are needed")],
)
def test_a_machine_that_lacks_something_is_refused_before_the_upload(
    laptop: Laptop, tmp_path: Path, without: str, said: str
) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    names = "sh cat mv mkdir rm date dd df awk head cut tr grep find flock setsid sha256sum timeout"
    for name in [*names.split(), "rsync", "sleep", "touch", "cp", "xargs", "sed", "ls", "true"]:
        (tools / name).symlink_to(shutil.which(name) or "/nowhere")
    fakes = {"python3": "exit 1" if without == "python" else "echo 3"}
    if without == "space":
        fakes["df"] = "echo head; echo disk 9 9 1000 9 /"
    if without == "rsync":
        (tools / "rsync").unlink()
    for name, body in fakes.items():
        (tools / name).unlink(missing_ok=True)
        (tools / name).write_text(f"#!/bin/sh\n{body}\n")
        (tools / name).chmod(0o755)
    bare = sshd.Machine(tmp_path / "bare", path=str(tools))
    os.environ["FRESNEL_SSH"] = f"ssh -F {bare.folder / 'ssh_config'}"
    laptop.on = bare.address(laptop.place)
    try:
        with pytest.raises(RemoteError, match=said):
            laptop.launch()
    finally:
        bare.stop()
    assert not (laptop.place / "tree").exists()
    assert runs.entries(laptop.reports)[0]["state"] == "not started"


def test_a_full_disk_is_said(laptop: Laptop, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*words: Any, **_: Any) -> Any:
        said = b'rsync: write failed on "/x": No space left on device (28)\nrsync error: error 11'
        return subprocess.CompletedProcess(words, 11, b"", said)

    box = Box.parse(laptop.on)
    monkeypatch.setattr(subprocess, "run", full)
    with pytest.raises(RemoteError, match=r"disk is full: .*No space left"):
        box._rsync(["x"])


def test_set_up_that_fails_half_way_is_named_and_goes_on_from_there(laptop: Laptop) -> None:
    counted = "echo ran >>$FRESNEL_DIR/first"
    plan = replace(laptop.plan(), stages=(("first", counted), ("second", "cat wanted.txt")))
    run = laptop.launch(plan)
    entry = laptop.until(run, "failed")
    assert "set-up failed in the stage 'second': exit status 1" in entry["why"]
    (laptop.place / "tree/wanted.txt").write_text("here now\n")
    runs.resume(run, laptop.reports)
    laptop.until(run, "finished")
    assert (laptop.place / "first").read_text() == "ran\n"
    with pytest.raises(RemoteError, match="nothing to resume"):
        runs.resume(run, laptop.reports)


TRAPPED = "trap 'echo saved >$out/checkpoint; exit 130' TERM\nwhile :; do sleep 0.05; done"
DEAF = "trap '' TERM\nwhile :; do sleep 0.05; done"


@pytest.mark.parametrize(
    ("body", "terms", "state", "why", "code"),
    [
        ("echo half >$out/x; exit 3", {}, "failed", "exit status 3", "3"),
        ("kill -SEGV $$", {}, "failed", "exit status 139", "139"),
        (TRAPPED, {"stall_s": 5}, "failed", "no progress for 5 s", "130"),
        (TRAPPED, {"rate_usd": 450.0}, "failed", "the budget is spent", "130"),
        (DEAF, {"rate_usd": 450.0, "kill_s": 1}, "failed", "the budget is spent", "137"),
    ],
    ids=["crashes", "dies", "hangs", "budget", "ignores TERM"],
)
def test_how_a_job_ends(
    laptop: Laptop, body: str, terms: dict[str, Any], state: str, why: str, code: str
) -> None:
    laptop.job(body)
    run = laptop.launch(**terms)
    entry = laptop.until(run, state)
    assert why in entry["why"] and entry["exit"] == code
    if body == TRAPPED:
        target = runs.fetch(run, laptop.reports)
        assert (target / "out/checkpoint").read_text() == "saved\n"
    if "rate_usd" in terms:
        assert entry["spent"]["cost_usd"] <= 1.1
        with pytest.raises(RemoteError, match="its deadline is over"):
            time.sleep(max(0, entry["left_s"]) + 1)
            runs.resume(run, laptop.reports)


def test_what_a_job_leaves_running_does_not_outlive_it(laptop: Laptop) -> None:
    """A notebook's kernel has a session of its own."""
    laptop.job(f"setsid sleep 300 & echo $! >$out/left\n{DEAF}")
    run = laptop.launch(kill_s=1)
    left = laptop.place / "runs" / run / "out/left"
    laptop.until(run, "running")
    time.sleep(0.5)
    runs.stop(run, laptop.reports)
    assert laptop.until(run, "stopped")["why"] == "stopped on request"
    state = Path(f"/proc/{int(left.read_text())}/status")
    assert not state.exists() or "zombie" in state.read_text()


def test_the_machine_ends_once_results_are_fetched_or_the_grace_is_over(laptop: Laptop) -> None:
    run = laptop.launch(at_end=f"touch {laptop.place}/ended", grace_s=60)
    laptop.until(run, "finished")
    time.sleep(0.5)
    assert not (laptop.place / "ended").exists()  # waits for the fetch
    runs.fetch(run, laptop.reports)
    _until(lambda: (laptop.place / "ended").exists())
    run = laptop.launch(at_end=f"touch {laptop.place}/late", grace_s=1)
    laptop.until(run, "finished")
    _until(lambda: (laptop.place / "late").exists())


def test_the_dead_mans_switch_is_armed_before_the_upload(
    laptop: Laptop, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Box, "upload", gone)
    with pytest.raises(KeyboardInterrupt):
        laptop.launch(at_end=f"touch {laptop.place}/off", grace_s=1, stall_s=1)
    run = runs.entries(laptop.reports)[0]["run"]
    entry = laptop.until(run, "failed")
    assert "the upload did not finish: no progress for 1 s" in entry["why"]
    _until(lambda: (laptop.place / "off").exists())


def test_a_closed_laptop_changes_nothing(laptop: Laptop) -> None:
    """The client is killed while it follows the log, with all of its connections."""
    laptop.job("sleep 1.5; echo done >$out/result.txt")
    run = laptop.launch()
    code = (
        "from fresnel.launch import runs; from pathlib import Path; "
        f"runs.logs({run!r}, Path({str(laptop.reports)!r}), follow=True)"
    )
    client = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.DEVNULL)
    laptop.until(run, "running")
    client.kill()
    client.wait()
    for pid in laptop.machine.sessions():
        os.kill(pid, signal.SIGKILL)
    laptop.until(run, "finished")
    assert (runs.fetch(run, laptop.reports) / "out/result.txt").read_text() == "done\n"


def test_a_restarted_machine_is_interrupted_and_goes_on(laptop: Laptop) -> None:
    laptop.job("[ -e $out/checkpoint ] && exit 0; echo half >$out/checkpoint; sleep 60")
    run = laptop.launch()
    laptop.until(run, "running")
    _until(lambda: (laptop.place / "runs" / run / "out/checkpoint").exists())
    deadline = laptop.there(run, "deadline")
    for pid in _marked(run, laptop):
        os.kill(pid, signal.SIGKILL)
    laptop.machine.stop()
    laptop.machine.start()  # with another boot id
    assert runs.status(run, laptop.reports)["state"] == "interrupted"
    runs.resume(run, laptop.reports)
    laptop.until(run, "finished")
    assert laptop.there(run, "deadline") == deadline


def test_of_two_launches_the_second_is_refused(laptop: Laptop) -> None:
    laptop.job("sleep 60")
    first = laptop.launch()
    with pytest.raises(RemoteError, match=f"the run {first} has the machine"):
        laptop.launch(replace(laptop.plan(), name="second"))
    box = Box.parse(laptop.on)  # and at the very same time, by the lock itself
    box.put("third", laptop.reports / "remote/.ledger" / first / "run")
    done = box.run(box.command("arm", "third"), check=False)
    assert (done.returncode, done.stdout.decode().strip()) == (75, f"busy={first}")
    with pytest.raises(RemoteError, match="not over"):
        runs.fetch(first, laptop.reports)


def test_a_byte_that_flipped_is_seen_though_size_and_time_are_kept(
    laptop: Laptop, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    laptop.until(laptop.launch(), "finished")
    _flip(laptop.place / "tree/notes.txt")
    run = laptop.launch(replace(laptop.plan(), name="again"))
    assert (laptop.place / "tree/notes.txt").read_text() == "some notes\n"
    laptop.until(run, "finished")
    rsync, flips = Box._rsync, []

    def damaging(self: Box, words: list[str], send: bytes = b"") -> None:
        rsync(self, words, send)
        if not flips or always:
            flips.append(_flip(laptop.reports / f"remote/{run}.partial/out/result.txt"))
            flips.append(_flip(laptop.place / "tree/other.txt"))

    monkeypatch.setattr(Box, "_rsync", damaging)
    always = True
    with pytest.raises(RemoteError, match=r"not what was made there: out/result.txt"):
        runs.fetch(run, laptop.reports)
    assert not (laptop.reports / "remote" / run).exists()  # .partial only
    always = False
    assert (runs.fetch(run, laptop.reports) / "out/result.txt").read_text() == "done\n"
    flips.clear()
    laptop.write("other.txt", "other\n")
    box = Box.parse(laptop.on)
    monkeypatch.setattr(Box, "put", lambda *_: None)  # the plan's files of the last run
    (laptop.place / "runs" / run / "sent.sha256").write_text(
        f"{sha256(laptop.root / 'other.txt')}  other.txt\n"
    )
    box.upload(run, laptop.root)
    assert "arrived damaged, sent again: other.txt" in capfd.readouterr().err
    box.close()


def test_unknown_and_changed_host_keys_are_refused(laptop: Laptop, tmp_path: Path) -> None:
    other = sshd.Machine(tmp_path / "other")
    os.environ["FRESNEL_SSH"] = f"ssh -F {other.folder / 'ssh_config'}"
    known = other.folder / "known_hosts"
    address = other.address(tmp_path / "place")
    try:
        known.write_text("")
        shown = subprocess.run(
            ["ssh-keygen", "-lf", other.folder / "host.pub"], capture_output=True, text=True
        ).stdout.split()[1]
        with pytest.raises(RemoteError, match="host key is unknown: ssh-ed25519 SHA256:") as error:
            Box.parse(address).probe()
        assert shown in str(error.value) and "--trust-new" in str(error.value)
        assert known.read_text() == ""
        assert "free_kb" in Box.parse(address, trust_new=True).probe()
        assert "free_kb" in Box.parse(address).probe()
        other.stop()
        other.new_key("host")
        other.start()
        for trust in (False, True):
            with pytest.raises(RemoteError, match="not the one that it had"):
                Box.parse(address, trust_new=trust).probe()
        assert "StrictHostKeyChecking=no" not in " ".join(Box.parse(address).ssh())
    finally:
        other.stop()


@pytest.mark.skipif(
    not (os.environ.get("SLURM_CONF") and shutil.which("sbatch")),
    reason="SLURM_CONF names no Slurm",
)
def test_slurm_starts_and_requeues_the_same_supervisor(laptop: Laptop) -> None:
    laptop.on = laptop.on.replace("ssh:", "slurm:")
    laptop.job(f"[ -e $out/checkpoint ] && exit 0\n{TRAPPED}")

    def launch() -> str:
        return runs.launch(laptop.plan(), laptop.on, laptop.reports, options="--gres=none")

    run = launch()
    laptop.until(run, "running")
    time.sleep(0.5)
    job = laptop.there(run, "job").strip()
    subprocess.run(["scontrol", "requeue", job], check=True)  # as a preemption does
    _until(lambda: (laptop.place / "runs" / run / "out/checkpoint").exists())
    entry = laptop.until(run, "finished", limit_s=200)
    assert entry["exit"] == "0"
    assert (runs.fetch(run, laptop.reports) / "out/checkpoint").read_text() == "saved\n"


def _flip(path: Path) -> None:
    """Change one byte; size and time stay."""
    if path.exists():
        before, data = path.stat(), bytearray(path.read_bytes())
        data[0] ^= 1
        path.write_bytes(data)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def _marked(run: str, laptop: Laptop) -> list[int]:
    """The processes of a run: supervisor and job."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            words = (place / "cmdline").read_bytes() + (place / "environ").read_bytes()
        except OSError:
            continue
        if run.encode() in words and str(laptop.place).encode() in words:
            found.append(int(place.name))
    return found


def _until(fits: Callable[[], bool], limit_s: float = 15) -> None:
    end = time.monotonic() + limit_s
    while not fits():
        assert time.monotonic() < end
        time.sleep(0.05)
