"""Where a result comes from: commit, versions, hardware, and the content of what it was made from.

What is unknown is None, never a guess.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

from fresnel.host.files import sha256
from fresnel.host.machine import accelerators, core_count, cuda

RESULTS_NAME = "results.json"
_PACKAGES = (
    *("fresnel", "torch", "numpy", "gsplat", "numba", "trimesh", "embreex", "gsply", "pillow"),
    *("torchmetrics", "matplotlib", "viser", "transformers", "papermill", "nbconvert"),
)


def provenance(seed: int | None = None) -> dict[str, Any]:
    """Commit, versions and hardware of this process, JSON-able."""
    device = cuda()
    gpu = device.get_device_name() if device is not None else None
    return {**machine(), "git": git_state(), "gpu": gpu, "seed": seed, "datasets": []}


def machine() -> dict[str, Any]:
    """What of this machine a result can depend on; found without importing torch."""
    packages = {}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            packages[name] = importlib.metadata.version(name)
    return {
        "python": platform.python_version(),
        "packages": packages,
        "os": f"{platform.system()} {platform.machine()}",
        "cpu": {"model": _cpu_model(), "count": core_count()},
        "accelerators": accelerators(),
    }


def git_state() -> dict[str, Any]:
    """{"commit", "dirty", "changed"} of the checkout this code runs from; products in reports/
    and runs/ do not make it dirty. A copy without its history can be told its commit by the
    variable FRESNEL_COMMIT; whether it is dirty is then unknown."""
    if told := os.environ.get("FRESNEL_COMMIT"):
        return {"commit": told, "dirty": None, "changed": []}
    command = ["git", "-C", str(Path(__file__).resolve().parents[2])]

    def git(*arguments: str) -> list[str] | None:
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            done = subprocess.run(
                [*command, *arguments], capture_output=True, text=True, timeout=20, check=True
            )
            return done.stdout.splitlines()
        return None

    commit = git("rev-parse", "HEAD")
    lines = git("status", "--porcelain", "--", ".", ":(exclude)reports", ":(exclude)runs")
    return {
        "commit": commit[0] if commit else None,
        "dirty": None if lines is None else bool(lines),
        "changed": [line[3:] for line in lines or ()][:50],
    }


def digest(path: Path, apart: Path | None = None) -> str:
    """What identifies the content of `path`: of data that states it, its content hash; of runs'
    folders, their results; of any other folder, its files' names and bytes; "" if it is not there.

    apart: a folder below it that does not count."""
    if path.is_file():
        return _results(path) if path.name == RESULTS_NAME else sha256(path)
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        return str(manifest["content_hash"])
    if not path.is_dir():
        return ""
    files = sorted(path.glob(RESULTS_NAME))
    if not files and (runs := sorted(path.glob(f"*/{RESULTS_NAME}"))):
        files = [*runs, *sorted(path.glob("*.*"))]
    files = files or [p for p in sorted(path.rglob("*")) if not _hidden(p.relative_to(path))]
    total = hashlib.sha256()
    for file in files:
        if file.is_file() and not (apart and file.is_relative_to(apart)):
            total.update(f"{file.relative_to(path)}\0{digest(file)}\n".encode())
    return total.hexdigest()


def _hidden(path: Path) -> bool:
    """Whether it is no content: hidden files, and receipts, which are told apart from the data."""
    return "receipts" in path.parts or any(part.startswith(".") for part in path.parts)


def _results(path: Path) -> str:
    """Of a results.json; that its run was used again meanwhile is no news about it."""
    data = path.read_bytes()
    with contextlib.suppress(ValueError, AttributeError, RecursionError):
        content = json.loads(data)
        content.pop("cached", None)
        data = json.dumps(content, sort_keys=True).encode()
    return hashlib.sha256(data).hexdigest()


def _cpu_model() -> str | None:
    with contextlib.suppress(OSError):
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        if match := re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE):
            return match.group(1).strip()
    return platform.processor() or platform.machine() or None
