"""Notebook in, report out: run it, keep what ran even when it died, and show it as one HTML page.

`run()` has papermill execute one notebook into a folder of its own, or finds that nothing has
changed since it last did (`fresnel.report.cache`). `Engine` is what papermill calls, for `run()`
and for `papermill --engine fresnel` alike. What a report and the index look like is
`fresnel.report.page`; a list of notebooks is `fresnel.study.runner`.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fresnel.host.files import locked, write_atomic
from fresnel.host.machine import project_root
from fresnel.report import cache, costs
from fresnel.report.html import plain_page
from fresnel.report.params import check_parameters, injected_values, read_parameters
from fresnel.report.provenance import RESULTS_NAME
from fresnel.report.record import (
    THUMBNAIL_NAME,
    Failure,
    RecordError,
    RunRecord,
    new_run_dir,
    save_thumbnail,
)

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
_BAR = {"leave": False, "bar_format": "{desc} · {n_fmt}/{total_fmt} cells, {elapsed}{postfix}"}
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
    what it was made from (`fresnel.report.cache`), is not computed again: its folder comes back,
    its record and page marked as `cached`. Of two such calls at once the second waits for the
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
    if "reports_dir" in known and reports != reports_folder().resolve():
        given.setdefault("reports_dir", str(reports / "runs"))  # it reads the runs it lies among
    wanted = cache.identity(source, given, name, chosen)
    waiting = f"{name}: another process is computing this very report; waiting for it"
    with locked(reports / cache.CACHE_NAME / f"{wanted[:16]}.lock", waiting):
        found = None if fresh else cache.find(reports, wanted, name, chosen)
        if found is not None:
            return _reuse(found)
        if fresh and "resume" in known:
            given["resume"] = False
        begun = _begin(source, name, given, reports, chosen, wanted)
        if "output_dir" in known:
            given["output_dir"] = str(begun.directory)
        shown = sys.stderr.isatty() if progress is None else progress
        import papermill
        from papermill.engines import papermill_engines

        papermill_engines.register("fresnel", Engine)  # a checkout that is not installed has none
        with contextlib.suppress(papermill.PapermillExecutionError):  # the record says it too
            papermill.execute_notebook(
                source,
                None,
                given,
                engine_name="fresnel",
                kernel_name="python3",
                language="python",
                progress_bar=_BAR | {"desc": label or name} if shown else False,
                begun=begun,
                execution_timeout=timeout_s,
                cell_timeout=cell_timeout_s,
            )
    if begun.done is None:
        raise RuntimeError(f"papermill did not execute {source}")
    return begun.done


class Engine:
    """papermill's engine "fresnel": cells run watched (`fresnel.report.engine`), and whatever ends
    them a report is written.

    Called by `run`, or by `papermill --engine fresnel NOTEBOOK OUT -p NAME VALUE`, whose report
    goes to a folder of its own below the project's reports/, beside those of `run`.
    """

    @classmethod
    def execute_notebook(
        cls,
        nb: Any,
        kernel_name: str,
        output_path: str | None = None,
        *,
        input_path: str = "",
        begun: _Begun | None = None,
        execution_timeout: float | None = None,
        cell_timeout: float | None = None,
        progress_bar: Any = True,
        **_: Any,
    ) -> Any:
        """papermill's interface; `execution_timeout` is the whole run's, in seconds.

        Raises ParameterError before any cell runs, KeyboardInterrupt after a stop."""
        from papermill.engines import NotebookExecutionManager

        from fresnel.report.engine import AUTOSAVE_S

        direct = begun is None
        begun = begun or _begin_directly(nb, Path(input_path).resolve())
        # papermill writes to its own output path at the end; the run's folder is ours
        manager = NotebookExecutionManager(
            nb, None, progress_bar=progress_bar, autosave_cell_every=AUTOSAVE_S
        )

        def save(**_: Any) -> None:
            manager.last_save_time = manager.now()
            with contextlib.suppress(OSError):  # the next one may fare better
                begun.save(nb)

        manager.save = save
        interrupt = begun.compute(manager, execution_timeout, cell_timeout)
        if direct and begun.done is not None:
            try_index(begun.reports)
            print(describe(begun.done), file=sys.stderr)
        if interrupt is not None:
            raise interrupt
        return nb

    @classmethod
    def nb_kernel_name(cls, nb: Any, name: str | None = None) -> str:
        return name or "python3"  # whatever is installed, it is this Python that runs

    @classmethod
    def nb_language(cls, nb: Any, language: str | None = None) -> str:
        return language or "python"


def rebuild(reports_dir: str | Path | None = None) -> list[str]:
    """Make the page of every executed notebook below the reports folder again, and the index.

    Returns the problems, a sentence each."""
    reports = reports_folder(reports_dir)
    found = {}
    for folder in sorted(executed.parent for executed in reports.rglob(EXECUTED_NAME)):
        try:
            record = RunRecord.read(folder)
        except RecordError:
            record = RunRecord(folder.name, "crashed", error="results.json is damaged.")
        found[f"{folder}: "] = _page(folder, record)
    found[""] = try_index(reports)
    return [place + problem for place, problem in found.items() if problem]


def index(reports_dir: str | Path | None = None) -> Path:
    """Write the index over all runs. Calls at once take turns, so that the last one sees all."""
    from fresnel.report import index as overview

    reports = reports_folder(reports_dir)
    with locked(reports / cache.CACHE_NAME / "index.lock"):
        return overview.index(reports)


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


def _begin(
    source: Path, name: str, params: dict[str, Any], reports: Path, chosen: Path | None, wanted: str
) -> _Begun:
    directory = chosen or new_run_dir(reports, name).resolve()
    directory.mkdir(parents=True, exist_ok=True)
    for stale in (RESULTS_NAME, EXECUTED_NAME, REPORT_NAME, THUMBNAIL_NAME):
        (directory / stale).unlink(missing_ok=True)
    return _Begun(source, directory, name, params, reports, wanted)


def _begin_directly(notebook: Any, source: Path) -> _Begun:
    """What papermill was asked to run by itself; the parameters are in the cell it injected."""
    known = read_parameters(notebook)
    given = check_parameters(known, injected_values(notebook))
    told = given.pop("output_dir", "")
    chosen = Path(told).resolve() if told else None
    wanted = cache.identity(source, given, source.stem, chosen)
    begun = _begin(source, source.stem, given, reports_folder(), chosen, wanted)
    if "output_dir" in known:
        from papermill.parameterize import parameterize_notebook

        given["output_dir"] = str(begun.directory)
        filled = parameterize_notebook(notebook, given, kernel_name="python3", language="python")
        notebook.cells = filled.cells
        for cell in notebook.cells:  # the new ones lack what papermill notes in each
            cell.metadata.setdefault("papermill", {})
    return begun


@dataclass
class _Begun:
    """A run from its start to its report."""

    source: Path
    directory: Path
    name: str
    params: dict[str, Any]
    reports: Path
    identity: str
    clock: float = field(default_factory=time.perf_counter)
    utc: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    done: Run | None = None

    def save(self, notebook: Any) -> None:
        import nbformat

        write_atomic(self.directory / EXECUTED_NAME, nbformat.writes(notebook) + "\n")

    def compute(
        self, manager: Any, timeout_s: float | None, cell_timeout_s: float | None
    ) -> BaseException | None:
        """Run it and write everything about it; returns the interrupt that is to be raised."""
        from fresnel.report.engine import execute

        interrupt: BaseException | None = None
        with _ballast(self.directory):
            manager.notebook_start()
            try:
                failure = execute(manager, project_root(), timeout_s, cell_timeout_s)
            except Exception as error:
                text = f"The notebook could not be run: {type(error).__name__}: {error}"
                failure = Failure("not_started", text)
            except BaseException as second:  # Ctrl-C again, while the kernel was being stopped
                failure, interrupt = Failure("stopped", "The run was stopped from outside."), second
        manager.notebook_complete()
        if failure is not None and failure.kind == "stopped":
            interrupt = interrupt or KeyboardInterrupt()
        record, problems = self._settle(manager.nb, failure), []
        writers: dict[str, Any] = {EXECUTED_NAME: lambda: self.save(manager.nb)}
        writers[RESULTS_NAME] = lambda: record.write(self.directory)
        for file, write in writers.items():
            try:
                write()
            except OSError as error:
                problems.append(f"{file} could not be written ({error.strerror}).")
        problem = _page(self.directory, record, manager.nb)
        problems += [problem] if problem else []
        self.done = Run(record, self.directory, " ".join(problems) or None)
        return interrupt

    def _settle(self, executed: Any, failure: Failure | None) -> RunRecord:
        """The record's final state: the notebook's own where it wrote one."""
        from fresnel.report.page import notebook_title

        try:
            record = RunRecord.read(self.directory)
        except RecordError:
            record = RunRecord(
                *(self.source.stem, "finished", "DONE"), params=self.params, started_utc=self.utc
            )
        if failure is None and record.status == "running":
            text = "The notebook ended without a verdict: its last cell must call finish()."
            failure = Failure("no_verdict", text)
        refused = record.status == "finished" and record.verdict == "REFUSED"
        if failure is not None and not refused:  # a refusal stops the notebook by raising
            how = {"kind": failure.kind, "cell": failure.cell}
            record = record.replace(
                status="crashed", verdict=None, error=failure.message, failure=how
            )
        artifacts = {"report": REPORT_NAME, "notebook": EXECUTED_NAME, **record.artifacts}
        with contextlib.suppress(OSError):
            if "thumbnail" not in artifacts and _first_picture(executed, self.directory):
                artifacts["thumbnail"] = THUMBNAIL_NAME
        # the notebook's clock misses the kernel's start and end, which the machine's owner pays too
        duration = time.perf_counter() - self.clock
        inputs = cache.inputs_of({**self.params, **record.params}, self.directory)
        inputs |= record.provenance.get("inputs", {})
        record = record.replace(
            duration_s=duration,
            cost_usd=record.price_per_hour_usd * duration / 3600.0,
            name=self.name,
            title=notebook_title(executed) or self.source.stem,
            artifacts=artifacts,
            provenance={**record.provenance, "identity": self.identity, "inputs": inputs},
        )
        return record.replace(cost_avoided=costs.cost_avoided(record, _others(self.reports)))


def _reuse(directory: Path) -> Run:
    record = RunRecord.read(directory)
    git = record.provenance.get("git") or {}
    cached = {
        "reused_utc": datetime.now(UTC).isoformat(timespec="seconds"),
        "computed_utc": record.started_utc,
        "commit": git.get("commit"),
        "dirty": git.get("dirty"),
    }
    record = record.replace(cached=cached)
    record.write(directory)
    return Run(record, directory, _page(directory, record))


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
        with contextlib.suppress(OSError, ValueError):
            notebook = json.loads((directory / EXECUTED_NAME).read_text(encoding="utf-8"))
    elsewhere = Path(tempfile.gettempdir()) / f"{directory.name}-{REPORT_NAME}"
    for place, pictures in ((target, True), (target, False), (elsewhere, True)):
        with contextlib.suppress(OSError):
            text = plain_page(record, notebook or {"cells": []}, problem, pictures=pictures)
            write_atomic(place, text)
            where = "" if place == target else f" It is at {place}."
            return f"{problem} A plain page stands in.{where}"
    return f"{problem} Nor could a plain one be written."


@contextlib.contextmanager
def _ballast(directory: Path) -> Iterator[None]:
    """Hold some room on the run's disk, and give it back at the end."""
    path = directory / ".ballast"
    with contextlib.suppress(OSError):
        path.write_bytes(b"\0" * _BALLAST_BYTES)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def _first_picture(notebook: Any, folder: Path) -> bool:
    """A run without a thumbnail of its own shows its first figure."""
    from PIL import Image

    for output in (o for cell in notebook.cells for o in cell.get("outputs", ())):
        if encoded := output.get("data", {}).get("image/png"):
            save_thumbnail(Image.open(io.BytesIO(base64.b64decode(encoded))), folder)
            return True
    return False
