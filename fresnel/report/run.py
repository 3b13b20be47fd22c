"""Notebook in, report out: run it, keep what ran even when it died, and show it as one HTML page.

`run()` executes one notebook into a folder of its own (`fresnel.report.engine`), or finds that
nothing has changed since it last did (`fresnel.report.cache`). What a report and the index look
like is `fresnel.report.page`; a list of notebooks is `fresnel.study.runner`.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fresnel.host.files import locked
from fresnel.host.machine import project_root
from fresnel.report import cache
from fresnel.report.params import check_parameters, read_parameters
from fresnel.report.plain_page import plain_page
from fresnel.report.record import (
    RESULTS_NAME,
    THUMBNAIL_NAME,
    RecordError,
    RunRecord,
    new_run_dir,
    write_atomic,
)

if TYPE_CHECKING:
    from fresnel.report.engine import Failure

EXECUTED_NAME = "executed.ipynb"
REPORT_NAME = "report.html"
EXIT_STATUS = {
    "cell_error": 1,
    "no_verdict": 1,
    "not_started": 1,
    "refused": 3,
    "kernel_died": 4,
    "no_page": 5,
    "disk_full": 6,
    "timed_out": 124,
    "stopped": 130,
}
"""How a process ends that ran one notebook, unless it finished (0) or was used wrongly (2)."""
_BALLAST_BYTES = 8 << 20
"""Room kept on the run's disk while it goes on, for its report should the disk fill up."""


@dataclass(frozen=True)
class Run:
    """A run that is over: what it said, and the folder that holds its report. `problem`: why its
    page is not the one it should be; None if it is."""

    record: RunRecord
    directory: Path
    problem: str | None = None

    @property
    def crashed(self) -> bool:
        return self.record.status == "crashed"

    @property
    def reused(self) -> bool:
        """Whether this is an earlier run's result, of which nothing has changed since."""
        return self.record.cached is not None

    @property
    def report(self) -> Path:
        return self.directory / REPORT_NAME

    @property
    def exit_status(self) -> int:
        """0, or one of EXIT_STATUS."""
        if self.crashed:
            return EXIT_STATUS[(self.record.failure or {"kind": "cell_error"})["kind"]]
        if self.record.verdict == "REFUSED":
            return EXIT_STATUS["refused"]
        return EXIT_STATUS["no_page"] if self.problem else 0


def run(
    notebook: str | Path,
    params: Mapping[str, Any] | None = None,
    name: str = "",
    reports_dir: str | Path | None = None,
    *,
    fresh: bool = False,
    timeout_s: float | None = None,
    cell_timeout_s: float | None = None,
    progress: bool | None = None,
    label: str = "",
) -> Run:
    """Execute a notebook and write its report, whatever happens to it.

    The folder reports_dir/runs/<UTC time>-<name>/ gets executed.ipynb, report.html, results.json
    and thumbnail.png. A notebook with a parameter `output_dir` is given that folder; where the
    caller sets `output_dir`, it is that one instead.

    A run that finished and of which nothing has changed since, neither code nor parameters nor
    anything that it read or made (`fresnel.report.cache`), is not computed again: its folder comes
    back, its record and page marked as `cached`. Of two such calls at once the second waits for the
    first.

    Args:
        params: checked against the notebook's parameters cell before anything starts.
        fresh: compute it in any case, training from the first step (a notebook's parameter
            `resume` is then False).
        timeout_s: most that the run may take; cell_timeout_s: most that one cell may. A training
            saves a checkpoint before it is stopped.
        progress: show cell, time and the kernel's progress bar; default: on a terminal.
        label: what to show before them.

    Raises ParameterError for a parameter that does not fit and FileNotFoundError without the
    notebook. An error inside it raises nothing: the returned record says "crashed" and `failure`
    how. Ctrl-C and SIGTERM raise KeyboardInterrupt after the report is written.
    """
    source = Path(notebook).resolve()
    if not source.is_file():
        raise FileNotFoundError(f"no such notebook: {notebook}")
    known = read_parameters(source)
    given = check_parameters(known, params or {})
    reports = reports_folder(reports_dir).resolve()
    name = name or source.stem
    told = given.pop("output_dir", "")
    chosen = Path(told).resolve() if told else None
    wanted = cache.identity(source, given, name, chosen)
    with _alone(reports, wanted, name):
        if not fresh:
            found = cache.find(reports, wanted)
            if not isinstance(found, str):
                return _reuse(*found)
        elif "resume" in known:
            given["resume"] = False
        directory = chosen or new_run_dir(reports, name).resolve()
        directory.mkdir(parents=True, exist_ok=True)
        for stale in (RESULTS_NAME, EXECUTED_NAME, REPORT_NAME, THUMBNAIL_NAME):
            (directory / stale).unlink(missing_ok=True)
        if "output_dir" in known:
            given["output_dir"] = str(directory)
        begun = _Begun(source, directory, name, given)
        with tempfile.TemporaryDirectory(prefix="fresnel-") as scratch:
            trace = Path(scratch) / "touched.jsonl"
            trace.touch()
            done, interrupt = _compute(
                begun, reports, trace, timeout_s, cell_timeout_s, progress, label
            )
            if not done.crashed and interrupt is None:
                with contextlib.suppress(OSError):  # a full disk: compute it again next time
                    cache.keep(reports, wanted, directory, done.record, trace, begun.unix)
    if interrupt is not None:
        raise interrupt
    return done


def rebuild(reports_dir: str | Path | None = None) -> list[str]:
    """Make the page of every executed notebook below the reports folder again, and the index.

    Returns the problems, a sentence each."""
    reports = reports_folder(reports_dir)
    problems = []
    for executed in sorted(reports.rglob(EXECUTED_NAME)):
        try:
            record = RunRecord.read(executed.parent)
        except RecordError:
            record = RunRecord(executed.parent.name, "crashed", error="results.json is damaged.")
        problem = _page(executed.parent, record)
        problems += [f"{executed.parent}: {problem}"] if problem else []
    problem = try_index(reports)
    return [*problems, problem] if problem else problems


def index(reports_dir: str | Path | None = None) -> Path:
    """Write the index over all runs. Calls at once take turns, so that the last one sees all."""
    from fresnel.report import page as pages

    reports = reports_folder(reports_dir)
    with locked(reports / cache.CACHE_NAME / "index.lock"):
        return pages.index(reports)


def try_index(reports: Path) -> str | None:
    """`index`, but a failure comes back as a sentence: no run is lost for want of an index."""
    try:
        index(reports)
    except Exception as error:
        return f"the index could not be made: {type(error).__name__}: {error}"
    return None


def reports_folder(reports_dir: str | Path | None = None) -> Path:
    """Where reports go: `reports_dir`, else the project's reports/."""
    return Path(reports_dir) if reports_dir is not None else project_root() / "reports"


def describe(done: Run) -> str:
    """What a person wants to read on a terminal after one run."""
    text = done.record.error if done.crashed else done.record.summary
    return "\n".join(part for part in (line(done), text) if part)


def line(done: Run) -> str:
    """One line on a run: verdict, time, where its report is, and whether it was computed now."""
    path = os.path.relpath(done.report)
    text = f"{done.record.badge:<8} {done.record.duration_s:7.1f} s  {path}"
    if not done.reused:
        return text
    cached = done.record.cached or {}
    commit = f" by {cached['commit'][:8]}" if cached["commit"] else ""
    return f"{text}  (unchanged; computed {cached['computed_utc']}{commit})"


@dataclass(frozen=True)
class _Begun:
    """What is known of a run when it starts."""

    source: Path
    directory: Path
    name: str
    params: dict[str, Any]
    clock: float = 0.0
    unix: float = 0.0
    utc: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "clock", time.perf_counter())
        object.__setattr__(self, "unix", time.time())
        object.__setattr__(self, "utc", datetime.now(UTC).isoformat(timespec="seconds"))


def _compute(
    begun: _Begun,
    reports: Path,
    trace: Path,
    timeout_s: float | None,
    cell_timeout_s: float | None,
    progress: bool | None,
    label: str,
) -> tuple[Run, BaseException | None]:
    """Run it and write everything about it; with the interrupt that is still to be raised."""
    import nbformat

    from fresnel.report.engine import Failure, execute

    directory = begun.directory
    notebook = _with_parameters(nbformat.read(begun.source, as_version=4), begun.params)
    interrupt: BaseException | None = None

    def save() -> None:
        write_atomic(directory / EXECUTED_NAME, nbformat.writes(notebook) + "\n")

    with _ballast(directory):
        try:
            failure = execute(
                notebook,
                save=save,
                folder=project_root(),
                timeout_s=timeout_s,
                cell_timeout_s=cell_timeout_s,
                progress=progress,
                label=label,
                environment={"FRESNEL_TRACE": str(trace)},
            )
        except Exception as error:
            text = f"The notebook could not be run: {type(error).__name__}: {error}"
            failure = Failure("not_started", text)
        except BaseException as second:  # Ctrl-C again, while the kernel was being stopped
            failure, interrupt = Failure("stopped", "The run was stopped from outside."), second
    if failure is not None and failure.kind == "stopped" and interrupt is None:
        interrupt = KeyboardInterrupt()
    problems = []
    try:
        save()
    except OSError as error:
        problems.append(f"The executed notebook could not be saved ({error.strerror}).")
    record = _settle(begun, notebook, failure, reports)
    try:
        record.write(directory / RESULTS_NAME)
    except OSError as error:
        problems.append(f"{RESULTS_NAME} could not be written ({error.strerror}).")
    problem = _page(directory, record, notebook)
    problems += [problem] if problem else []
    return Run(record, directory, " ".join(problems) or None), interrupt


def _reuse(directory: Path, record: RunRecord) -> Run:
    git = record.provenance.get("git") or {}
    record = record.replace(
        cached={
            "reused_utc": datetime.now(UTC).isoformat(timespec="seconds"),
            "computed_utc": record.started_utc,
            "commit": git.get("commit"),
            "dirty": git.get("dirty"),
        }
    )
    record.write(directory / RESULTS_NAME)
    return Run(record, directory, _page(directory, record))


def _with_parameters(notebook: Any, params: Mapping[str, Any]) -> Any:
    """The notebook with a cell behind its parameters cell that sets those that differ."""
    if not params:
        return notebook
    from papermill.parameterize import parameterize_notebook

    notebook.metadata["papermill"] = {}  # where it notes the parameters; our record has them
    for cell in notebook.cells:
        cell.metadata.setdefault("tags", [])
    filled = parameterize_notebook(notebook, dict(params), kernel_name="python3", language="python")
    del filled.metadata["papermill"]
    return filled


def _settle(begun: _Begun, executed: Any, failure: Failure | None, reports: Path) -> RunRecord:
    """The record's final state: the notebook's own where it wrote one."""
    from fresnel.report import ledger
    from fresnel.report.engine import Failure
    from fresnel.report.page import notebook_title

    directory, source = begun.directory, begun.source
    try:
        record = RunRecord.read(directory)
    except RecordError:
        record = RunRecord(source.stem, "finished", "DONE", params=dict(begun.params))
        record = record.replace(started_utc=begun.utc)
    if failure is None and record.status == "running":
        text = "The notebook ended without a verdict: its last cell must call finish()."
        failure = Failure("no_verdict", text)
    refused = record.status == "finished" and record.verdict == "REFUSED"
    if failure is not None and not refused:  # a refusal stops the notebook by raising, on purpose
        record = record.replace(
            status="crashed",
            verdict=None,
            error=failure.message,
            failure={"kind": failure.kind, "cell": failure.cell},
        )
    # the notebook's clock misses the kernel's start and end, which the machine's owner pays too
    duration = time.perf_counter() - begun.clock
    artifacts = {"report": REPORT_NAME, "notebook": EXECUTED_NAME, **record.artifacts}
    with contextlib.suppress(OSError):
        if "thumbnail" not in artifacts and _first_picture(executed, directory / THUMBNAIL_NAME):
            artifacts["thumbnail"] = THUMBNAIL_NAME
    record = record.replace(
        duration_s=duration,
        cost_usd=record.price_per_hour_usd * duration / 3600.0,
        name=begun.name,
        title=notebook_title(executed) or source.stem,
        artifacts=artifacts,
    )
    return record.replace(cost_avoided=ledger.cost_avoided(record, _others(reports)))


def _others(reports: Path) -> Iterator[RunRecord]:
    for path in reports.rglob(RESULTS_NAME):
        with contextlib.suppress(RecordError):
            yield RunRecord.read(path)


def _page(directory: Path, record: RunRecord, notebook: Any = None) -> str | None:
    """Write the report's page; returns why it is only a plain one, or None.

    Plain without pictures where the disk has no room for more, and in the system's temporary
    folder where it has none at all."""
    target = directory / REPORT_NAME
    try:
        from fresnel.report import page as pages

        pages.to_html(directory / EXECUTED_NAME, target)
        return None
    except Exception as error:
        said = " ".join(str(error).split())[:300]
        problem = f"its page could not be made ({type(error).__name__}: {said})."
    if notebook is None:
        try:
            notebook = json.loads((directory / EXECUTED_NAME).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            notebook = {"cells": []}
    elsewhere = Path(tempfile.gettempdir()) / f"{directory.name}-{REPORT_NAME}"
    for place, pictures in ((target, True), (target, False), (elsewhere, True)):
        with contextlib.suppress(OSError):
            write_atomic(place, plain_page(record, notebook, problem, pictures=pictures))
            where = "" if place == target else f" It is at {place}."
            return f"{problem} A plain page stands in.{where}"
    return f"{problem} Nor could a plain one be written."


@contextlib.contextmanager
def _alone(reports: Path, wanted: Mapping[str, Any], name: str) -> Iterator[None]:
    waiting = f"{name}: another process is computing this very report; waiting for it"
    with locked(cache.lock_file(reports, wanted), waiting):
        yield


@contextlib.contextmanager
def _ballast(directory: Path) -> Iterator[None]:
    """Hold some room on the run's disk, and give it back at the end."""
    path = directory / ".ballast"
    with contextlib.suppress(OSError), open(path, "wb") as file:
        os.posix_fallocate(file.fileno(), 0, _BALLAST_BYTES)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def _first_picture(notebook: Any, target: Path) -> bool:
    """A run without a thumbnail of its own shows its first figure."""
    import base64

    from PIL import Image

    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            encoded = output.get("data", {}).get("image/png")
            if encoded:
                picture = Image.open(io.BytesIO(base64.b64decode(encoded)))
                picture.thumbnail((480, 480), Image.Resampling.LANCZOS)
                picture.save(target, optimize=True)
                return True
    return False
