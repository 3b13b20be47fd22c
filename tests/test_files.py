"""Files that are whole, inside their folder, and locked; the machine's answers."""

import errno
import fcntl
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from boxes import views_of

from fresnel.data import dataset
from fresnel.host import files, machine


def test_a_write_is_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new" / "a.json"
    files.write_atomic(path, "ä")
    assert path.read_bytes() == "ä".encode() and path.stat().st_mode & 0o777 == 0o644
    files.write_atomic(path, b"\0")
    assert path.read_bytes() == b"\0"

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(os, "fsync", full)
        files.write_atomic(path, "half")
    assert path.read_bytes() == b"\0" and os.listdir(path.parent) == ["a.json"]
    # a link is replaced, not followed
    (tmp_path / "mine").write_text("precious")
    (tmp_path / "a").symlink_to(tmp_path / "mine")
    files.write_atomic(tmp_path / "a", "new")
    assert (tmp_path / "mine").read_text() == "precious" and not (tmp_path / "a").is_symlink()
    (tmp_path / "link").symlink_to(path.parent)
    files.remove(tmp_path / "link")
    assert not (tmp_path / "link").is_symlink() and path.exists(), "the link alone is removed"


def test_names_that_lead_out_are_refused_and_others_taken(tmp_path: Path) -> None:
    (tmp_path / "folder" / "b").mkdir(parents=True)
    folder = tmp_path / "folder"
    (folder / "out").symlink_to(tmp_path)
    (folder / "link").symlink_to(folder / "b")
    for name in ("/etc/passwd", "../x", "a/../../x", "out/x", "out"):
        with pytest.raises(ValueError, match="leads out"):
            files.inside(folder, name)
    for name in ("a.png", "b/a.png", "b/../a.png", "link/a.png"):
        assert files.inside(folder, name) == folder / name


HOLD = """
import fcntl, os, sys, time
fcntl.flock(os.open(sys.argv[1], os.O_CREAT | os.O_RDWR), fcntl.LOCK_EX)  # as `locked` does
print("held", flush=True)
time.sleep(60)
"""


def test_a_lock_is_another_s_until_that_ends_however(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "deep" / "a.lock"
    with files.locked(path):
        pass
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE)
    assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
    with files.locked(path, wait=False) as mine:
        assert not mine
    threading.Timer(0.3, holder.kill).start()
    with files.locked(path, "it is busy"):
        assert holder.wait(5), "it waits while the other holds the lock"
    assert "it is busy" in capsys.readouterr().err
    with files.locked(path, wait=False) as mine:
        assert mine
        with files.locked(path, wait=False) as twice:
            assert not twice, "another thread's, or the same one's"
    with files.locked(path, "it is busy"):
        assert capsys.readouterr().err == ""


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EIO])
def test_where_files_cannot_be_locked_it_is_an_error_and_not_busy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuses(handle: int, how: int) -> None:
        raise OSError(number, "as it happens")

    monkeypatch.setattr(fcntl, "flock", refuses)
    said = pytest.raises(OSError, match=r"a\.lock: can't be locked")
    with said, files.locked(tmp_path / "a.lock", wait=False):
        raise AssertionError


def test_fingerprints_are_of_values_not_of_order() -> None:
    assert files.fingerprint({"a": 1, "b": 2}) == files.fingerprint({"b": 2, "a": 1})
    assert files.fingerprint({"a": 1}) != files.fingerprint({"a": 2})


def test_the_project_is_found_from_any_folder_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Path(__file__).parent.parent
    monkeypatch.chdir(root / "tests")
    assert machine.project_root() == root
    monkeypatch.chdir(tmp_path)
    assert machine.project_root() == tmp_path


def test_devices_are_named_or_refused() -> None:
    assert machine.pick_device("auto") == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(ValueError, match="got 'tpu'"):
        machine.pick_device("tpu")
    assert machine.is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory"))
    assert not machine.is_out_of_memory(RuntimeError("mat1 and mat2"))


def test_kills_at_file_operations_lose_nothing() -> None:
    """A sample of `benchmarks/kills.py`, which tries them all."""
    root = Path(__file__).parent.parent
    jobs = ["overwrite", "in two steps", "training", "index"]
    command = [sys.executable, "benchmarks/kills.py", *jobs, "--sample", "2"]
    done = subprocess.run(
        command,
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root)},
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split("|")[2:6] for line in done.stdout.splitlines()[2:]]
    assert len(rows) == len(jobs) and all(int(tried) >= 2 for _, tried, _, _ in rows)


LITTLE = """
for folder in {folders}; do
    mount --bind $folder $folder && mount -o remount,ro,bind $folder || exit 9
done
mount -t tmpfs -o size=64k tmpfs /dev/shm || exit 9
unset HOME XDG_CACHE_HOME
ulimit -n 40
exec {python} -m fresnel validate {data}"""


def test_read_only_data_checkout_and_home_with_little_of_all_else(tmp_path: Path) -> None:
    """In a world of its own: the gate answers where nothing but /tmp may be written."""
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("no namespaces for users and mounts here")
    root, data = Path(__file__).parent.parent, tmp_path / "data"
    dataset.write(data / "set", [views_of(0, size=32, views=3)], meta={})
    folders = " ".join(map(str, (data, root, Path.home())))
    shell = LITTLE.format(folders=folders, python=sys.executable, data=data / "set")
    command = ["unshare", "-rm", "bash", "-c", shell]
    environment = os.environ | {"PYTHONPATH": str(root), "TMPDIR": "/tmp"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, env=environment)
    if done.returncode == 9:
        pytest.skip(f"nothing may be mounted here: {done.stderr}")
    assert done.returncode in (0, 1) and "Traceback" not in done.stderr, done.stderr
    assert done.stdout.splitlines()[0] in ("PASS", "FAIL") and not (data / "receipts").exists()


CLOSED = "exec {python} -m fresnel clean --dry-run --reports {folder} {folder} <&- >&- 2>&-"


def test_clean_lists_and_removes_what_nobody_holds(tmp_path: Path) -> None:
    left = [tmp_path / n for n in (".a.tmp-0f", ".b.partial-1", ".c.rendering-2", ".d.lock")]
    left += [tmp_path / ".cache" / "e.lock", tmp_path / "runs" / "r" / ".running"]
    others = [tmp_path / name for name in ("a.tmp-0f", ".lock", "poetry.lock", ".hidden")]
    for path in left + others:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("0123456789")
    held = tmp_path / ".held.tmp-3"
    held.touch()
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-m", "fresnel", "clean", "--reports", str(tmp_path)]
    with files.own(held), files.scratch(tmp_path / "mine") as mine:
        for words in (["--dry-run"], []):
            done = subprocess.run(
                [*command, *words], env=environment, cwd=tmp_path, capture_output=True, text=True
            )
            assert done.returncode == 0, done.stderr
            listed = {line.split("  ")[-1] for line in done.stdout.splitlines()[:-1]}
            listed -= {str(tmp_path / ".cache" / "index.lock")}  # of the index that it made
            assert listed <= {str(path) for path in left} and len(listed) >= len(left) - 1
            assert [path.exists() for path in left] == [bool(words)] * len(left)
        assert mine.exists() and held.exists() and all(path.exists() for path in others)
    shell = CLOSED.format(python=sys.executable, folder=tmp_path)
    assert subprocess.run(["bash", "-c", shell], env=environment, cwd=tmp_path).returncode == 0
