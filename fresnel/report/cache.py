"""Runs that need not be computed again: what a run depends on, and whether that is still so.

A run's results.json says what it was made from: under provenance, `identity` (notebook, parameters,
code, packages, machine) and `inputs`, the hashes of the files and folders that its parameters name,
that its notebook declared (`Recorder.input`) and of its datasets. The run is used again while all
of them are as they were, what it made (a dataset, a receipt) included. Checkpoints are none of
them: they may be deleted.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

from fresnel.host.files import sha256
from fresnel.host.machine import project_root
from fresnel.report.provenance import RESULTS_NAME, digest, machine
from fresnel.report.record import RecordError, RunRecord, slug

PACKAGE = Path(__file__).resolve().parents[1]
CACHE_NAME = ".cache"
_SHOWS_ONLY = {"__main__.py", "cli.py", "views.py", "report", "study/runner.py"}
"""Of this package, what runs or shows a report but has no part in its figures."""
NOT_TRAINING = {
    *("analysis", "show", "host", "objects/furniture.py", "training/forecast.py"),
    *("study/data.py", "study/smoke.py", "study/results.py"),
}
"""What else has no part in a training: a checkpoint outlives a change to these."""


def identity(notebook: Path, params: Mapping[str, Any], name: str, output_dir: Path | None) -> str:
    """sha256 of what determines a run, as far as it is known before it starts."""
    told = {
        "notebook": str(notebook),
        "source": _cells(notebook),
        "params": dict(params),
        "name": name,
        "output_dir": None if output_dir is None else str(output_dir),
        "project": str(project_root()),
        "code": code_hash(),
        "machine": machine(),
    }
    return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()


def code_hash(apart: Set[str] = frozenset()) -> str:
    """sha256 over this package's sources and assets, but for those that only show a report, and
    for other rooms and files of the package's that the caller names."""
    digest, apart = hashlib.sha256(), apart | _SHOWS_ONLY
    for path in sorted(PACKAGE.rglob("*")):
        inner = path.relative_to(PACKAGE)
        above = {inner.as_posix(), *(parent.as_posix() for parent in inner.parents)}
        if path.is_file() and "__pycache__" not in inner.parts and not above & apart:
            digest.update(f"{inner}\0{sha256(path)}".encode())
    return digest.hexdigest()


def find(reports: Path, wanted: str, name: str, output_dir: Path | None) -> Path | None:
    """The folder of the newest run of identity `wanted` that still counts."""
    found = sorted(reports.glob(f"runs/*Z-{slug(name)}*/{RESULTS_NAME}"), reverse=True)
    folders = [output_dir] if output_dir is not None else [path.parent for path in found]
    return next((folder for folder in folders if _counts(folder, wanted)), None)


def inputs_of(params: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """Path -> hash of the files and folders that parameters name, but for the run's own `folder`.
    Where a notebook reads other runs, its `reports_dir` "" names those of the project."""
    texts = [text for text in params.values() if isinstance(text, str) and text]
    if params.get("reports_dir") == "":
        texts.append("reports/runs")
    found = {}
    for text in texts:
        path = project_root() / text
        with contextlib.suppress(OSError):  # a text that names no file
            if path.exists() and path.resolve() != folder:
                found[str(path)] = digest(path, folder)
    return found


def _counts(folder: Path, wanted: str) -> bool:
    try:
        record = RunRecord.read(folder)
    except RecordError:
        return False
    made_from, kept = record.provenance, ("notebook", "thumbnail")
    return (
        made_from.get("identity") == wanted
        and record.status == "finished"
        and record.verdict != "REFUSED"
        and all((folder / record.artifacts.get(name, "")).exists() for name in kept)
        and all(digest(Path(p), folder) == was for p, was in made_from.get("inputs", {}).items())
    )


def _cells(notebook: Path) -> list[Any]:
    """A notebook's cells; its outputs and editor's metadata do not matter."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return [
        [cell["cell_type"], "".join(cell["source"]), cell.get("metadata", {}).get("tags")]
        for cell in cells
    ]
