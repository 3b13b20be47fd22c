"""Where a result comes from, and what it was made from: commit, versions, hardware, content hashes.

results.json has under provenance `identity` (notebook, parameters, code, packages, machine) and
`inputs`: hashes of the files and folders that parameters name, that the notebook declared
(`Recorder.input`), and of its datasets. `report.run` uses a run again while all of them are as they
were. Checkpoints are none of them: they may be deleted. What is unknown is None, never a guess.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

from fresnel.host.files import below, from_json, read_bytes, read_json, sha256
from fresnel.host.machine import accelerators, core_count, cuda, project_root

RESULTS_NAME = "results.json"
PACKAGE = Path(__file__).resolve().parents[1]
_PACKAGES = (
    *("fresnel", "torch", "numpy", "gsplat", "numba", "embreex", "gsply", "pillow"),
    *("torchmetrics", "matplotlib", "viser", "transformers", "papermill", "nbconvert"),
)
_SHOWS_ONLY = {"__main__.py", "arguments.py", "cli.py", "views.py"} | {"report", "study/runner.py"}
"""Of this package, what runs or shows a report but has no part in its figures."""
NOT_TRAINING = {
    *("analysis", "show", "host", "objects/furniture.py", "objects/zeroad.py"),
    *("study/data.py", "study/results.py", "training/forecast.py"),
}
"""What else has no part in a training: a checkpoint outlives a change to these."""


def child_environment() -> dict[str, str]:
    """Variables of a child process, which finds this package in a checkout that is not installed,
    too."""
    paths = filter(None, (str(PACKAGE.parent), os.environ.get("PYTHONPATH")))
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def provenance(seed: int | None = None) -> dict[str, Any]:
    """Commit, versions and hardware of this process, JSON-able."""
    device = cuda()
    gpu = device.get_device_name() if device is not None else None
    return {**machine(), "git": git_state(), "gpu": gpu, "seed": seed, "datasets": []}


def machine() -> dict[str, Any]:
    """What of this machine a result can depend on; found without importing torch."""
    packages, model = {}, None
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            packages[name] = importlib.metadata.version(name)
    with contextlib.suppress(OSError):
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        model = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    fallback = platform.processor() or platform.machine() or None
    return {
        "python": platform.python_version(),
        "packages": packages,
        "os": f"{platform.system()} {platform.machine()}",
        "cpu": {"model": model[1].strip() if model else fallback, "count": core_count()},
        "accelerators": accelerators(),
    }


def git_state() -> dict[str, Any]:
    """{"commit", "dirty", "changed"} of the checkout this code runs from; products in reports/
    and runs/ do not make it dirty. A copy without its history can be told its commit by the
    variable FRESNEL_COMMIT; whether it is dirty is then unknown."""
    if told := os.environ.get("FRESNEL_COMMIT"):
        return {"commit": told, "dirty": None, "changed": []}
    said = []
    for words in ("rev-parse HEAD", "status --porcelain -- . :(exclude)reports :(exclude)runs"):
        command = ["git", "-C", str(PACKAGE.parent), *words.split()]
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
            said.append(done.stdout.splitlines())
    if len(said) < 2:
        return {"commit": None, "dirty": None, "changed": []}
    (commit,), changed = said
    return {"commit": commit, "dirty": bool(changed), "changed": [c[3:] for c in changed][:50]}


def identity(notebook: Path, params: Mapping[str, Any], name: str, output_dir: Path | None) -> str:
    """sha256 of what determines a run, as far as it is known before it starts."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    source = [  # outputs and the editor's metadata do not matter
        [cell["cell_type"], "".join(cell["source"]), cell.get("metadata", {}).get("tags")]
        for cell in cells
    ]
    told = [notebook, source, dict(params), name, output_dir, project_root()]
    text = json.dumps([*told, code_hash(), machine()], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def code_hash(apart: Set[str] = frozenset()) -> str:
    """sha256 over this package's sources and assets, but for those that only show a report, and
    for other rooms and files of the package's that the caller names."""
    total, apart = hashlib.sha256(), apart | _SHOWS_ONLY
    for path in sorted(PACKAGE.rglob("*")):
        inner = path.relative_to(PACKAGE)
        above = {inner.as_posix(), *(parent.as_posix() for parent in inner.parents)}
        if path.is_file() and "__pycache__" not in inner.parts and not above & apart:
            total.update(f"{inner}\0{sha256(path)}".encode())
    return total.hexdigest()


def inputs_of(params: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """Path -> hash of the files and folders that parameters name, but for the run's own `folder`.
    Where a notebook reads other runs, its `reports_dir` "" names those of the project."""
    texts = [text for text in params.values() if isinstance(text, str) and text]
    texts += ["reports/runs"] if params.get("reports_dir") == "" else []
    found = {}
    for path in map(project_root().joinpath, texts):
        with contextlib.suppress(OSError):  # a text that names no file
            if path.exists() and path.resolve() != folder:
                found[str(path)] = digest(path, folder)
    return found


def digest(path: Path, apart: Path | None = None) -> str:
    """What identifies the content of `path`: of data that states it, its content hash; of runs'
    folders, their results; of any other folder, its files' names and bytes; "" if it is not there.

    apart: a folder below it that does not count."""
    if path.name == RESULTS_NAME and path.is_file():
        data = read_bytes(path)
        with contextlib.suppress(ValueError, AttributeError):
            content = from_json(data)
            content.pop("cached", None)  # that its run was used again is no news about it
            data = json.dumps(content, sort_keys=True).encode()
        return hashlib.sha256(data).hexdigest()
    if path.is_file():
        return sha256(path)
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return str(read_json(path / "manifest.json")["content_hash"])
    if not path.is_dir():
        return ""
    files = sorted(path.glob(RESULTS_NAME))
    if not files and (runs := sorted(path.glob(f"*/{RESULTS_NAME}"))):
        files = [*runs, *sorted(path.glob("*.*"))]
    total = hashlib.sha256()
    for file in files or sorted(below(path)):
        inner = file.relative_to(path)
        # hidden files are no content, nor are receipts, which are told apart from the data
        hidden = any(part.startswith(".") or part == "receipts" for part in inner.parts)
        if file.is_file() and (files or not hidden) and not (apart and file.is_relative_to(apart)):
            total.update(f"{inner}\0{digest(file)}\n".encode())
    return total.hexdigest()
