"""Runs that need not be computed again: what a run depends on, and whether that is still so.

joblib.Memory keeps, below reports/.cache, one entry for each report: the key is what is known
before a run (`identity`: notebook, parameters, this package's code and assets, packages, machine);
the value is where the run lies and every file that it touched, as it was when the run ended. The
entry counts only while all of them are still so: what the run read (data, receipts, other runs'
results, modules outside of this package), the folders it listed, and what it made (a dataset or a
receipt that is gone has to be made again). Checkpoints are the exception: they may be deleted.

Only a run that finished with a verdict is kept; REFUSED is none.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import json
import os
import site
import sys
import sysconfig
import time
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

from fresnel.host.machine import project_root
from fresnel.report.provenance import machine
from fresnel.report.record import RESULTS_NAME, RecordError, RunRecord

PACKAGE = Path(__file__).resolve().parents[1]
CACHE_NAME = ".cache"
_SHOWS_ONLY = {
    *("__main__.py", "study/runner.py"),
    *("report/engine.py", "report/cache.py", "report/touched.py", "report/run.py"),
    *("report/page.py", "report/plain_page.py", "report/html.py", "report/index.py"),
    *("report/ledger.py", "report/templates", "report/schema"),
}
"""Of this package, what runs or shows a report but has no part in its figures."""
NOT_TRAINING = {
    *("analysis", "show", "report", "host", "views.py", "objects/furniture.py"),
    *("study/data.py", "study/smoke.py", "study/results.py", "training/forecast.py"),
}
"""What else has no part in a training: a checkpoint outlives a change to these."""
_FORMAT = 1
"""Of the entries; another number makes all older ones unknown."""
# a file changed within this time before it was looked at may change again without a new stamp
_RACE_NS = 2_000_000_000


def identity(
    notebook: Path, params: Mapping[str, Any], name: str, output_dir: Path | None
) -> dict[str, Any]:
    """What a run is determined by, as far as it is known before it starts; JSON-able."""
    return {
        "format": _FORMAT,
        "notebook": str(notebook),
        "source": _notebook_source(notebook),
        "params": dict(params),
        "name": name,
        "output_dir": None if output_dir is None else str(output_dir),
        "project": str(project_root()),
        "code": code_hash(),
        "machine": machine(),
    }


def code_hash(apart: Set[str] = frozenset()) -> str:
    """sha256 over this package's sources and assets, but for those that only show a report, and
    for other files and folders of the package's that the caller names."""
    digest, apart = hashlib.sha256(), apart | _SHOWS_ONLY
    for path in sorted(PACKAGE.rglob("*")):
        inner = path.relative_to(PACKAGE)
        above = {inner.as_posix(), *(parent.as_posix() for parent in inner.parents)}
        if not path.is_file() or "__pycache__" in inner.parts or above & apart:
            continue
        digest.update(f"{inner}\0".encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def find(reports: Path, wanted: Mapping[str, Any]) -> tuple[Path, RunRecord] | str:
    """The folder and record of a run of `wanted` that still counts; else why there is none."""
    cached, key = _memory(reports), _canonical(wanted)
    if not cached.check_call_in_cache(key, None):
        return "it has not been computed with these parameters and this code"
    entry = cached(key, None)
    if not entry:  # joblib could not read it, and says so by itself
        return "its cache entry is damaged"
    folder = Path(entry["folder"])
    try:
        record = RunRecord.read(folder)
    except RecordError as error:
        return str(error)
    if not _keepable(record):
        return f"{folder / RESULTS_NAME} is no longer that of a finished run"
    for name in ("notebook", "thumbnail"):
        file = record.artifacts.get(name)
        if file and not (folder / file).is_file():
            return f"{folder / file} is gone"
    for path, before in entry["files"].items():
        if state(path, before)[-1] != before[-1]:
            return f"{path} has changed"
    return folder, record


def keep(
    reports: Path,
    wanted: Mapping[str, Any],
    folder: Path,
    record: RunRecord,
    trace: Path,
    started: float,
) -> str | None:
    """Remember a run that is over; returns why that was not possible, or None.

    trace: what `fresnel.report.touched` noted. started: `time.time()` before the kernel was."""
    if not _keepable(record):
        return "it did not finish with a verdict"
    try:
        lines = trace.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        return f"what it read was not noted ({error.strerror})"
    touched: dict[str, set[str]] = {}
    for line in lines:
        kind, path = json.loads(line)
        path = _source_of(path)
        if not _ignored(path, folder, reports):
            touched.setdefault(path, set()).add(kind)
    named = {os.path.abspath(project_root() / text) for text in _texts(wanted["params"])}
    for path in named:
        if os.path.isfile(path):  # compiled libraries read files that no Python code opens
            touched.setdefault(path, set()).add("read")
    for store in (project_root() / "runs" / "data", Path.home() / ".cache" / "fresnel"):
        if str(store) not in named:  # whoever renders a set looks here for what others left behind
            touched.get(str(store), set()).discard("list")
    made = {path for path, kinds in touched.items() if "write" in kinds}
    files = {}
    for path, kinds in sorted(touched.items()):
        now = state(path)
        if now[0] == "file" and now[1][2] > started * 1e9:
            if made.isdisjoint((path, *map(str, Path(path).parents))):
                return f"{path} changed while it ran"
        elif now[0] == "none" and "write" in kinds:
            continue  # a temporary file
        elif now[0] == "folder" and "list" not in kinds:
            continue  # renamed into its place; what was read of it is there by itself
        files[path] = now
    _memory(reports).call(_canonical(wanted), {"folder": str(folder), "files": files})
    return None


def state(path: str, before: list[Any] | None = None) -> list[Any]:
    """[kind, stamp, digest] of a file, or of the names in a folder; ["none", None, None].

    before: an earlier state; a file whose size, times and inode are still those is not read again,
    unless it was looked at so soon after it changed that its times could hide another change."""
    try:
        about = os.stat(path)
        if os.path.isdir(path):
            names = sorted(name for name in os.listdir(path) if not name.startswith("."))
            return ["folder", None, hashlib.sha256("\0".join(names).encode()).hexdigest()]
        stamp = [about.st_size, about.st_mtime_ns, about.st_ctime_ns, about.st_ino]
        if before is not None and before[1] is not None and before[1][:4] == stamp and before[1][4]:
            return before
        settled = time.time_ns() - about.st_ctime_ns > _RACE_NS
        with open(path, "rb") as file:
            if os.path.basename(path) == RESULTS_NAME:
                digest = _digest_of_results(file.read())
            else:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return ["none", None, None]
    return ["file", [*stamp, settled], digest]


def lock_file(reports: Path, wanted: Mapping[str, Any]) -> Path:
    """Where runs of one identity meet, so that the second waits for the first."""
    key = hashlib.sha256(_canonical(wanted).encode()).hexdigest()[:16]
    return reports / CACHE_NAME / "locks" / f"{key}.lock"


def _memory(reports: Path) -> Any:
    from joblib import Memory

    # a new function each time: joblib remembers of one that its code is on disk, whatever the disk
    def outcome(key: str, value: Any) -> Any:
        return value

    return Memory(reports / CACHE_NAME, verbose=0).cache(outcome, ignore=["value"])


def _keepable(record: RunRecord) -> bool:
    return record.status == "finished" and record.verdict != "REFUSED"


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)


def _texts(params: Mapping[str, Any]) -> list[str]:
    return [value for value in params.values() if isinstance(value, str) and value]


def _notebook_source(path: Path) -> str:
    """sha256 over a notebook's cells; its outputs and editor's metadata do not matter."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    told = [
        [cell["cell_type"], "".join(cell["source"]), cell.get("metadata", {}).get("tags")]
        for cell in cells
    ]
    return hashlib.sha256(_canonical(told).encode()).hexdigest()


def _digest_of_results(data: bytes) -> str:
    """Of a results.json; that it was found in the cache meanwhile is no news about the run."""
    with contextlib.suppress(ValueError, AttributeError):
        content = json.loads(data)
        content.pop("cached", None)
        data = _canonical(content).encode()
    return hashlib.sha256(data).hexdigest()


def _source_of(path: str) -> str:
    """The module that a compiled one was made from: it is what a person changes."""
    if path.endswith(".pyc"):
        with contextlib.suppress(ValueError):
            return importlib.util.source_from_cache(path)
    return path


@functools.cache
def _elsewhere(folder: Path, reports: Path) -> tuple[str, ...]:
    """Folders whose files say nothing about what a run in `folder` depends on: its own, this
    package (the code's hash stands for it), installed packages (their versions stand for them),
    checkpoints, and what IPython and matplotlib keep for themselves."""
    from jupyter_core import paths

    home = Path.home()
    kinds = ("stdlib", "platstdlib", "purelib", "platlib")
    places = [
        *(folder, reports / CACHE_NAME, PACKAGE, project_root() / "runs" / "train"),
        *(sysconfig.get_path(kind) for kind in kinds),
        *(*site.getsitepackages(), site.getusersitepackages()),
        *(Path(sys.prefix) / "share", Path(sys.prefix) / "etc"),
        *(paths.jupyter_runtime_dir(), paths.jupyter_config_dir(), *paths.jupyter_path()),
        *paths.SYSTEM_CONFIG_PATH,
        *(home / ".ipython", "/etc/ipython", "/usr/local/etc/ipython"),
        *(home / ".config" / "matplotlib", home / ".cache" / "matplotlib"),
        os.environ.get("MPLCONFIGDIR") or folder,
    ]
    return tuple(os.path.join(os.path.abspath(place), "") for place in places)


def _ignored(path: str, folder: Path, reports: Path) -> bool:
    path = os.path.join(path, "")
    volatile = path.startswith(("/proc/", "/sys/", "/dev/")) and not path.startswith("/dev/shm/")
    compiled = f"{os.sep}__pycache__{os.sep}" in path
    return volatile or compiled or path.startswith(_elsewhere(folder, reports))
