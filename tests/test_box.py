"""A run on a machine behind a real sshd on loopback, with a small job in place of the main one."""

import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sshd

from fresnel.host.files import sha256
from fresnel.launch import runs
from fresnel.launch.plan import Plan, Terms
from fresnel.launch.remote import BOX, Box, RemoteError

pytestmark = [
    pytest.mark.skipif(bool(sshd.missing()), reason=sshd.missing() or "-"),
    pytest.mark.xdist_group("box"),
]


class Laptop:
    """A project of two files whose run_all.sh is the job, its reports, and a box to send it to."""

    def __init__(self, folder: Path, machine: sshd.Machine, body: str = "") -> None:
        folder.mkdir(exist_ok=True)
        self.machine, self.place = machine, folder / "box"
        self.root, self.reports = folder / "project", folder / "reports"
        self.root.mkdir()
        self.on = f"ssh://127.0.0.1:{machine.port}{self.place}"
        self.run = ""
        self.write("notes.txt", "some notes\n")
        self.job(body or "echo done >$out/result.txt; echo said so")

    def write(self, name: str, text: str) -> None:
        (self.root / name).parent.mkdir(parents=True, exist_ok=True)
        (self.root / name).write_text(text)

    def job(self, body: str) -> None:
        """What ./run_all.sh does there; $out is the folder of its results."""
        self.write("run_all.sh", f"#!/bin/sh\nfor out; do :; done\n{body}\n")
        (self.root / "run_all.sh").chmod(0o755)

    def plan(self, **terms: Any) -> Plan:
        """100 s for a dollar."""
        chosen = dict(budget_usd=1.0, rate_usd=36.0, kill_s=2.0, tick_s=0.2, python="python3")
        found = [path for path in self.root.rglob("*") if path.is_file()]
        files = {str(path.relative_to(self.root)): path.stat().st_size for path in found}
        made = Terms(**chosen | terms)
        return Plan("job", ["job"], ["job"], made, self.root, files, stages=["verify"])

    def launch(self, plan: Plan | None = None, **terms: Any) -> str:
        self.run = runs.launch(plan or self.plan(**terms), self.on, self.reports)
        return self.run

    def until(self, state: str, limit_s: float = 60) -> None:
        """Poll the box's own files, as that costs no connection."""
        until(lambda: self.there("state").strip() == state, limit_s, lambda: self.there("log"))

    def ended(self, state: str) -> dict[str, Any]:
        self.until(state)
        return runs.status(self.run, self.reports)

    def there(self, name: str) -> str:
        path = self.place / "runs" / self.run / name
        return path.read_text() if path.exists() else ""

    def fetch(self) -> Path:
        return runs.fetch(self.run, self.reports)


def until(
    fits: Callable[[], Any], limit_s: float = 60, said: Callable[[], str] = lambda: ""
) -> None:
    end = time.monotonic() + limit_s
    while not fits():
        assert time.monotonic() < end, said()
        time.sleep(0.02)


@pytest.fixture(scope="module", autouse=True)
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[sshd.Machine]:
    made = sshd.Machine(tmp_path_factory.mktemp("sshd") / "machine")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FRESNEL_SSH", made.ssh)
        patch.setenv("FRESNEL_SSH_TIMEOUT", "6")
        yield made
    made.stop()


@pytest.fixture
def laptop(tmp_path: Path, machine: sshd.Machine) -> Iterator[Laptop]:
    made = Laptop(tmp_path, machine)
    yield made
    end_all(made)


def end_all(made: Laptop) -> None:
    for state in made.place.glob("runs/*/settings"):  # whatever is left ends by itself
        (state.parent / "stop").touch()
        (state.parent / "fetched").touch()


TRAPPED = "trap 'echo saved >$out/checkpoint; exit 130' TERM\nwhile :; do sleep 0.05; done"
DEAF = "trap '' TERM\nwhile :; do sleep 0.05; done"
JOBS: dict[str, tuple[str, dict[str, Any]]] = {
    "finishes": ("", {}),
    "crashes": ("echo half >$out/x; exit 3", {}),
    "dies": ("kill -SEGV $$", {}),
    "hangs": (TRAPPED, {"stall_s": 12}),
    "over-budget": (TRAPPED, {"rate_usd": 150.0}),
    "ignores-TERM": (DEAF, {"rate_usd": 150.0, "kill_s": 1}),
    # a notebook's kernel has a session of its own
    "leaves-much": (f"setsid sleep 300 & echo $! >$out/left\n{DEAF}", {"kill_s": 1}),
    "waits": ("", {"at_end": "touch ended", "grace_s": 60}),
    "not-fetched": ("", {"at_end": "touch ended", "grace_s": 1}),
}


@pytest.fixture(scope="module")
def ran(
    tmp_path_factory: pytest.TempPathFactory, machine: sshd.Machine
) -> Iterator[dict[str, Laptop]]:
    """Laptops whose jobs were launched at the same time, each on a box of its own."""
    folder = tmp_path_factory.mktemp("ran")
    made = {name: Laptop(folder / name, machine, body) for name, (body, _) in JOBS.items()}
    made["finishes"].write("deep/folder/a file.txt", "with a space\n")
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda name: made[name].launch(**JOBS[name][1]), JOBS))
    yield made
    for one in made.values():
        end_all(one)


def test_there_and_back(ran: dict[str, Laptop]) -> None:
    laptop = ran["finishes"]
    laptop.until("finished")
    target = laptop.fetch()
    assert target == laptop.reports / "remote" / laptop.run
    assert (target / "out" / "result.txt").read_text() == "done\n"
    assert "said so" in (target / "log.txt").read_text()
    assert (laptop.place / "tree/deep/folder/a file.txt").read_text() == "with a space\n"
    assert json.loads((target / "launch.json").read_text())["run"] == laptop.run
    entry = runs.find(laptop.run, laptop.reports)
    assert entry["state"] == "finished" and entry["exit"] == "0" and entry["fetched"]
    assert entry["planned"] == {"duration_s": 100.0, "cost_usd": 1.0}
    assert 0 <= entry["spent"]["cost_usd"] < 0.3
    assert entry["spent"]["cost_usd"] == pytest.approx(entry["spent"]["duration_s"] / 100)
    assert not list((laptop.reports / "remote").glob("*.partial"))
    with pytest.raises(FileExistsError, match="nothing is overwritten"):
        laptop.fetch()
    assert (target / "out" / "result.txt").read_text() == "done\n"


@pytest.mark.parametrize(
    ("name", "why", "code"),
    [
        ("crashes", "exit status 3", "3"),
        ("dies", "exit status 139", "139"),
        ("hangs", "no progress for 12 s", "130"),
        ("over-budget", "the budget is spent", "130"),
        ("ignores-TERM", "the budget is spent", "137"),
    ],
)
def test_how_a_job_ends(ran: dict[str, Laptop], name: str, why: str, code: str) -> None:
    laptop = ran[name]
    entry = laptop.ended("failed")
    assert why in entry["why"] and entry["exit"] == code
    if JOBS[name][0] == TRAPPED:
        assert (laptop.fetch() / "out/checkpoint").read_text() == "saved\n"
    if "rate_usd" in JOBS[name][1]:
        assert entry["spent"]["cost_usd"] <= 1.1
        until(lambda: time.time() > int(laptop.there("armed")) + entry["planned"]["duration_s"])
        with pytest.raises(RemoteError, match="its deadline is over"):
            runs.resume(laptop.run, laptop.reports)


def test_what_a_job_leaves_running_does_not_outlive_it(ran: dict[str, Laptop]) -> None:
    laptop = ran["leaves-much"]
    until(lambda: laptop.there("out/left"))
    runs.stop(laptop.run, laptop.reports)
    assert laptop.ended("stopped")["why"] == "stopped on request"
    state = Path(f"/proc/{int(laptop.there('out/left'))}/status")
    assert not state.exists() or "zombie" in state.read_text()


def test_the_machine_ends_once_results_are_fetched_or_the_grace_is_over(
    ran: dict[str, Laptop],
) -> None:
    late, laptop = ran["not-fetched"], ran["waits"]
    for one in (late, laptop):
        one.until("finished")
    until((late.place / "ended").exists)
    assert not (laptop.place / "ended").exists()  # it waits for the fetch
    laptop.fetch()
    until((laptop.place / "ended").exists)


def test_what_is_there_is_not_sent_again_but_a_byte_that_flipped_is(
    laptop: Laptop, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    laptop.write("big.bin", "x" * 300_000)
    laptop.launch()
    laptop.until("finished")
    before = (laptop.place / "tree/big.bin").stat()
    flip(laptop.place / "tree/notes.txt")
    laptop.launch(replace(laptop.plan(), name="again"))
    after = (laptop.place / "tree/big.bin").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    assert (laptop.place / "tree/notes.txt").read_text() == "some notes\n"
    laptop.until("finished")
    result = laptop.reports / f"remote/{laptop.run}.partial/out/result.txt"
    run, damaged = subprocess.run, [result] * 4  # what arrives damaged, in turn

    def damaging(words: list[str], **given: Any) -> Any:
        done = run(words, **given)
        if damaged and words[0] == "rsync":
            flip(damaged.pop())
        return done

    monkeypatch.setattr(subprocess, "run", damaging)
    with pytest.raises(RemoteError, match=r"not as planned .*: out/result.txt, though sent four"):
        laptop.fetch()
    assert not (laptop.reports / "remote" / laptop.run).exists()  # .partial only
    damaged.append(result)
    assert (laptop.fetch() / "out/result.txt").read_text() == "done\n"
    other = laptop.place / "tree/other.txt"
    damaged += [other] * 4
    laptop.write("other.txt", "other\n")
    sums = f"{sha256(laptop.root / 'other.txt')}  other.txt\n"
    (laptop.place / "runs" / laptop.run / "sent.sha256").write_text(sums)
    with Box(laptop.on, laptop.run) as box:
        with pytest.raises(RemoteError, match=r": other.txt, though sent four times"):
            box.upload(laptop.root)
        damaged.append(other)
        box.upload(laptop.root)
    assert other.read_text() == "other\n" and not damaged
    assert capfd.readouterr().err.count("(changed, damaged?): other.txt; going on") == 5


def flip(path: Path) -> None:
    """Change one byte; size and time stay."""
    if path.exists():
        before, data = path.stat(), bytearray(path.read_bytes())
        data[0] ^= 1
        path.write_bytes(data)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_a_dropped_upload_goes_on_where_it_stopped(
    laptop: Laptop, capfd: pytest.CaptureFixture[str]
) -> None:
    (laptop.root / "big.bin").write_bytes(os.urandom(20_000_000))
    plan, done = laptop.plan(), threading.Event()

    def cut() -> None:
        tree = laptop.place / "tree"
        while not done.is_set():
            if any(p.stat().st_size > 500_000 for p in tree.glob(".*big*")):
                for pid in laptop.machine.sessions():
                    os.kill(pid, signal.SIGKILL)
                return
            time.sleep(0.002)

    cutter = threading.Thread(target=cut)
    cutter.start()
    try:
        laptop.launch(plan)
    finally:
        done.set()
        cutter.join()
    assert "the connection broke off; going on" in capfd.readouterr().err
    assert sha256(laptop.place / "tree/big.bin") == sha256(laptop.root / "big.bin")


def test_a_peer_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FRESNEL_SSH_TIMEOUT", "1")
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen()
        with Box(f"ssh://127.0.0.1:{deaf.getsockname()[1]}", "x") as box:
            began = time.monotonic()
            with pytest.raises(RemoteError, match="no connection"):
                box.probe("", 0)
            assert time.monotonic() - began < 8


@pytest.mark.parametrize(
    ("without", "said"),
    [("rsync", "lacks rsync"), ("python", "no Python 3.11"), ("space", "MB are needed")],
)
def test_a_machine_that_lacks_something_is_refused_before_the_upload(
    laptop: Laptop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, without: str, said: str
) -> None:
    """A command in place of ssh runs what it is given here, with few tools."""
    tools = tmp_path / "bin"
    tools.mkdir()
    names = "sh cat mkdir date df awk head cut grep find flock setsid sha256sum timeout ls true"
    for name in [*names.split(), *(["rsync"] if without != "rsync" else [])]:
        (tools / name).symlink_to(shutil.which(name) or "/nowhere")
    fakes = {"python3": "exit 1" if without == "python" else "echo 3"}
    fakes["ssh"] = f'for last; do :; done\nPATH={tools} exec /bin/sh -c "$last"'
    if without == "space":
        fakes["df"] = "echo head; echo disk 9 9 100 9 /"
    for name, body in fakes.items():
        (tools / name).unlink(missing_ok=True)
        (tools / name).write_text(f"#!/bin/sh\n{body}\n")
        (tools / name).chmod(0o755)
    monkeypatch.setenv("FRESNEL_SSH", str(tools / "ssh"))
    with pytest.raises(RemoteError, match=said):
        laptop.launch()
    assert not (laptop.place / "runs").exists()
    assert runs.entries(laptop.reports)[0]["state"] == "not started"


def test_a_full_disk_is_said(laptop: Laptop, monkeypatch: pytest.MonkeyPatch) -> None:
    said = b'rsync: write failed on "/x": No space left on device (28)\nrsync error: error 11'
    full = subprocess.CompletedProcess([], 11, b"", said)
    with Box(laptop.on, "x") as box:
        monkeypatch.setattr(subprocess, "run", lambda *_, **__: full)
        with pytest.raises(RemoteError, match=r"disk is full: .*No space left"):
            box._send("x", "y")


def test_a_disk_that_is_really_full(laptop: Laptop, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the upload, which goes on once there is room; and by the job, whose end is still told."""
    laptop.place.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=4m", "none", laptop.place]
    if os.geteuid() or subprocess.run(words, capture_output=True).returncode:
        pytest.skip("a small disk can't be mounted here")
    monkeypatch.setattr(Box, "probe", lambda *_: None)  # it would refuse so small a disk
    try:
        laptop.job("cat /dev/zero >$out/much || { rm $out/much; exit 6; }")
        (laptop.root / "big.bin").write_bytes(os.urandom(8_000_000))
        with pytest.raises(RemoteError, match=r"the disk is full: .*No space left"):
            laptop.launch()
        laptop.run = runs.entries(laptop.reports)[0]["run"]
        subprocess.run(["mount", "-o", "remount,size=24m", laptop.place], check=True)
        runs.resume(laptop.run, laptop.reports)
        assert "exit status 6" in laptop.ended("failed")["why"]
        assert "No space left" in (laptop.fetch() / "log.txt").read_text()
    finally:
        end_all(laptop)
        until(lambda: not marked(laptop.run, laptop))
        subprocess.run(["umount", "-l", laptop.place], check=True)


def test_set_up_for_an_amd_gpu_takes_torch_and_gsplat_of_its_rocm(tmp_path: Path) -> None:
    """With stand-ins for run_all.sh and for the Python of the environment that it makes."""
    home, tree = tmp_path / "runs/x", tmp_path / "tree"
    said = {
        home / "settings": "python=''\n",
        tmp_path / "rocm/.info/version": "7.0.2-56\n",
        tree / "run_all.sh": "#!/bin/sh\necho $1 $PIP_EXTRA_INDEX_URL\n",
        tree / ".venv/bin/python": '#!/bin/sh\necho "$@"\n',
    }
    for path, text in said.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    words = ["sh", str(BOX), "environment", str(tmp_path), "x"]
    env = {**os.environ, "ROCM_PATH": str(tmp_path / "rocm")}
    done = subprocess.run(words, env=env, capture_output=True, text=True, check=True)
    assert "setup https://download.pytorch.org/whl/rocm7.0\n" in done.stdout
    assert "assert torch.version.hip" in done.stdout
    assert "amd_gsplat --index-url https://pypi.amd.com/rocm-7.0.2/simple/" in done.stdout


def test_set_up_that_fails_half_way_is_named_and_goes_on_from_there(laptop: Laptop) -> None:
    laptop.job('[ "$1" = setup ] && { cat wanted.txt; exit; }; echo done >$out/result.txt')
    laptop.launch(replace(laptop.plan(python=""), stages=["verify", "environment"]))
    entry = laptop.ended("failed")
    assert "set-up failed in the stage 'environment': exit status 1" in entry["why"]
    verified = (laptop.place / "runs" / laptop.run / "stages.done/verify").stat().st_mtime_ns
    (laptop.place / "tree/wanted.txt").write_text("here now\n")
    runs.resume(laptop.run, laptop.reports)
    laptop.until("finished")
    after = (laptop.place / "runs" / laptop.run / "stages.done/verify").stat().st_mtime_ns
    assert after == verified and "here now" in laptop.there("log")
    with pytest.raises(RemoteError, match="nothing to resume"):
        runs.resume(laptop.run, laptop.reports)


def test_the_dead_mans_switch_is_armed_before_the_upload(
    laptop: Laptop, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Box, "upload", gone)
    with pytest.raises(KeyboardInterrupt):
        laptop.launch(at_end="touch off", grace_s=1, stall_s=1)
    laptop.run = runs.entries(laptop.reports)[0]["run"]
    entry = laptop.ended("failed")
    assert "the upload did not finish: no progress for 1 s" in entry["why"]
    until((laptop.place / "off").exists)


def test_a_closed_laptop_changes_nothing_and_a_second_launch_is_refused(laptop: Laptop) -> None:
    """The client is killed while it follows the log, with all of its connections."""
    laptop.job("while [ ! -e go ]; do sleep 0.05; done; echo done >$out/result.txt")
    first = laptop.launch()
    fork = multiprocessing.get_context("fork")
    client = fork.Process(target=runs.logs, args=(first, laptop.reports), kwargs={"follow": True})
    client.start()
    until(laptop.machine.sessions)
    client.kill()
    client.join()
    for pid in laptop.machine.sessions():
        os.kill(pid, signal.SIGKILL)
    with pytest.raises(RemoteError, match=f"is in use by the run {first}"):
        runs.launch(replace(laptop.plan(), name="second"), laptop.on, laptop.reports)
    with Box(laptop.on, "third") as box:  # and at the very same time, by the lock itself
        box.put(laptop.reports / "remote/.ledger" / first / "run")
        with pytest.raises(RemoteError, match=f"is in use by the run {first}"):
            box.call("arm")
    with pytest.raises(RemoteError, match="not over"):
        laptop.fetch()
    (laptop.place / "tree/go").touch()
    laptop.until("finished")
    assert (laptop.fetch() / "out/result.txt").read_text() == "done\n"


def test_a_restarted_machine_is_interrupted_and_goes_on_and_host_keys_are_never_waved_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = sshd.Machine(tmp_path / "other")
    monkeypatch.setenv("FRESNEL_SSH", other.ssh)
    laptop = Laptop(tmp_path, other)
    laptop.job("[ -e $out/checkpoint ] && exit 0; echo half >$out/checkpoint; sleep 60")
    try:
        run = laptop.launch()
        until(lambda: laptop.there("out/checkpoint"))
        armed = laptop.there("armed")
        for pid in marked(run, laptop):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        other.stop()
        other.start()
        assert runs.status(run, laptop.reports)["state"] == "interrupted"
        runs.resume(run, laptop.reports)
        laptop.until("finished")
        assert laptop.there("armed") == armed

        def probe(trust_new: bool) -> None:
            with Box(laptop.on, run, trust_new=trust_new) as box:
                box.probe("", 0)

        known = other.folder / "known_hosts"
        known.write_text("")
        words = ["ssh-keygen", "-lf", other.folder / "host.pub"]
        shown = subprocess.run(words, capture_output=True, text=True).stdout.split()[1]
        with pytest.raises(RemoteError, match="host key is unknown: ssh-ed25519 SHA256:") as error:
            probe(False)
        assert shown in str(error.value) and "--trust-new" in str(error.value)
        assert known.read_text() == ""
        for trust in (True, False):
            probe(trust)
        other.stop()
        other.new_key("host")
        other.start()
        for trust in (False, True):
            with pytest.raises(RemoteError, match="not the one that it had"):
                probe(trust)
    finally:
        end_all(laptop)
        other.stop()


def marked(run: str, laptop: Laptop) -> list[int]:
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


@pytest.mark.skipif(bool(sshd.no_slurm()), reason=sshd.no_slurm() or "-")
def test_slurm_starts_and_requeues_the_same_supervisor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A preempted job is queued again, with its clock stopped, and goes on from its checkpoint."""
    daemons = sshd.slurm(tmp_path / "slurm")
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "slurm/slurm.conf"))
    machine = sshd.Machine(tmp_path / "machine")
    monkeypatch.setenv("FRESNEL_SSH", machine.ssh)
    laptop = Laptop(tmp_path, machine)
    laptop.on = laptop.on.replace("ssh:", "slurm:")
    laptop.job(f"[ -e $out/checkpoint ] && exit 0\n{TRAPPED}")
    try:
        until(lambda: subprocess.run(["sinfo", "-h"], capture_output=True).stdout)
        laptop.launch(sbatch="--gres=none")
        laptop.until("running")
        job = laptop.there("job").strip()
        with pytest.raises(RemoteError, match=f"is in use by the run {laptop.run}"):
            runs.launch(replace(laptop.plan(), name="second"), laptop.on, laptop.reports)
        armed = int(laptop.there("armed"))
        subprocess.run(["scontrol", "requeue", job], check=True)
        until(lambda: laptop.there("out/checkpoint"))
        entry = laptop.ended("interrupted")
        assert entry["state"] == "queued"  # for Slurm holds it back for two minutes
        with pytest.raises(RemoteError, match="not over"):
            laptop.fetch()
        time.sleep(5)
        subprocess.run(["scontrol", "update", f"JobId={job}", "StartTime=now"], check=True)
        laptop.until("finished", limit_s=200)
        assert int(laptop.there("armed")) >= armed + 5
        assert (laptop.fetch() / "out/checkpoint").read_text() == "saved\n"
    finally:
        end_all(laptop)
        machine.stop()
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait()
