"""Notebook in, report out: run it, keep what ran even when it died, and show it as one HTML page.

`run()` has papermill execute one notebook into a folder of its own, or finds that nothing has
changed since it last did (`fresnel.report.provenance`). `Engine` is what papermill calls, for
`run()` and for `papermill --engine fresnel` alike. What a report and the index look like is
`fresnel.report.page`; a list of notebooks is `fresnel.study.runner`.
"""

import base64
import contextlib
import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fresnel.host.files import abandoned, locked, own, remove, write_atomic
from fresnel.host.machine import open_files, project_root
from fresnel.report.html import plain_page
from fresnel.report.index import CACHE_NAME, cost_avoided, index, records
from fresnel.report.params import check_parameters, read_parameters
from fresnel.report.provenance import RESULTS_NAME, digest, identity, inputs_of
from fresnel.report.record import (
    RUNNING_NAME,
    THUMBNAIL_NAME,
    RecordError,
    RunRecord,
    is_dead,
    new_run_dir,
    process,
    save_thumbnail,
    slug,
)

EXECUTED_NAME = "executed.ipynb"
REPORT_NAME = "report.html"
EXIT_STATUS = {"cell_error": 1, "no_verdict": 1, "not_started": 1, "refused": 3}
EXIT_STATUS |= {"kernel_died": 4, "no_page": 5, "disk_full": 6, "timed_out": 124, "stopped": 130}
"""How a process ends that ran one notebook, unless it finished (0) or was used wrongly (2)."""
_BAR = {"leave": False, "bar_format": "{desc} · {n_fmt}/{total_fmt} cells, {elapsed}{postfix}"}
_CONNECTION_NAME = ".kernel.json"
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
    def report(self) -> Path:
        return self.directory / REPORT_NAME

    @property
    def exit_status(self) -> int:
        """0, or one of EXIT_STATUS."""
        kind = (self.record.failure or {"kind": "cell_error"})["kind"] if self.crashed else None
        kind = kind or ("refused" if self.record.verdict == "REFUSED" else None)
        return EXIT_STATUS[kind or "no_page"] if kind or self.problem else 0


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
    and thumbnail.png; it is the notebook's parameter `output_dir`, unless `params` sets that.

    A run that finished and of which nothing has changed since, neither code nor parameters nor
    what it was made from (`fresnel.report.provenance`), is not computed again: its folder comes
    back, its record and page marked as `cached`. Of two such calls at once the second waits.

    params: checked against the notebook's parameters cell before anything starts.
    fresh: compute it in any case, a training from its first step (the parameter `resume`).
    timeout_s, cell_timeout_s: most that the run, or one cell, may take; a training saves a
        checkpoint before it is stopped.
    progress: show cell, time and the kernel's progress bar (default: on a terminal), after `label`.

    Raises ParameterError for a parameter that does not fit and FileNotFoundError without the
    notebook. An error inside it raises nothing: the returned record says "crashed" and `failure`
    how. Ctrl-C and SIGTERM raise KeyboardInterrupt after the report is written.
    """
    open_files(128)
    job = _Job(notebook, params or {}, name, reports_dir)
    waiting = f"{job.name}: another process is computing this very report; waiting for it"
    with locked(job.reports / CACHE_NAME / f"{job.identity[:16]}.lock", waiting):
        if not fresh and (found := job.found()):
            return found
        if fresh and "resume" in job.known:
            job.params["resume"] = False
        import papermill
        from papermill.engines import papermill_engines

        papermill_engines.register("fresnel", Engine)  # a checkout that is not installed has none
        shown = sys.stderr.isatty() if progress is None else progress
        with contextlib.suppress(papermill.PapermillExecutionError):  # the record says it too
            papermill.execute_notebook(
                job.source,
                None,
                engine_name="fresnel",
                progress_bar=_BAR | {"desc": label or job.name} if shown else False,
                job=job,
                execution_timeout=timeout_s,
                cell_timeout=cell_timeout_s,
            )
    return job.done


class Engine:
    """papermill's engine "fresnel": cells run watched (`fresnel.report.engine`), and whatever ends
    them a report is written.

    Called by `run`, or by `papermill --engine fresnel NOTEBOOK OUT -p NAME VALUE`, whose report
    goes to a folder of its own below the project's reports/, beside those of `run`.
    """

    @classmethod
    def execute_notebook(
        cls, nb: Any, kernel_name: str, output_path: str | None = None, **options: Any
    ) -> Any:
        """papermill's interface; its option `execution_timeout` is the whole run's, in seconds.

        Raises ParameterError before any cell runs, KeyboardInterrupt after a stop."""
        job: _Job | None = options.get("job")
        direct = job is None
        if job is None:  # the parameters are in the cell that papermill injected
            told = read_parameters(nb, "injected-parameters")
            job = _Job(options["input_path"], {name: found.default for name, found in told.items()})
        folder = job.chosen or new_run_dir(job.reports, job.name).resolve()
        with locked(folder / RUNNING_NAME, f"{folder}: another process runs into it; waiting"):
            executed, done = job.compute(nb, options, folder)
            (folder / RUNNING_NAME).unlink(missing_ok=True)
        if direct:
            try_index(job.reports)
            print(describe(done), file=sys.stderr)
        if (done.record.failure or {}).get("kind") == "stopped":
            raise KeyboardInterrupt
        return executed

    @classmethod
    def nb_kernel_name(cls, nb: Any, name: str | None = None) -> str:
        return name or "python3"  # whatever is installed, it is this Python that runs

    @classmethod
    def nb_language(cls, nb: Any, language: str | None = None) -> str:
        return language or "python"


class _Job:
    """A run from its plan to its report."""

    done: Run

    def __init__(
        self,
        notebook: str | Path,
        params: Mapping[str, Any],
        name: str = "",
        reports_dir: str | Path | None = None,
    ) -> None:
        self.source = Path(notebook).resolve()
        if not self.source.is_file():
            raise FileNotFoundError(f"no such notebook: {notebook}")
        self.name, self.reports = name or self.source.stem, reports_folder(reports_dir).resolve()
        self.known = read_parameters(self.source)
        self.params = check_parameters(self.known, params)
        told = self.params.pop("output_dir", "")
        self.chosen = Path(told).resolve() if told else None
        if "reports_dir" in self.known and self.reports != reports_folder().resolve():
            # it reads the runs it lies among
            self.params.setdefault("reports_dir", str(self.reports / "runs"))
        self.identity = identity(self.source, self.params, self.name, self.chosen)

    def found(self) -> Run | None:
        """The newest run of this identity that still counts, marked as used again."""
        runs = self.reports.glob(f"runs/*Z-{slug(self.name)}*/{RESULTS_NAME}")
        folders = [path.parent for path in sorted(runs, reverse=True)]
        for folder in [self.chosen] if self.chosen else folders:
            try:
                record = RunRecord.read(folder)
            except RecordError:
                continue
            kept = [folder / record.artifacts.get(name, "") for name in ("notebook", "thumbnail")]
            inputs = record.provenance.get("inputs", {})
            if (
                record.provenance.get("identity") == self.identity
                and record.status == "finished"
                and record.verdict != "REFUSED"
                and all(path.exists() for path in kept)
                and all(digest(Path(path), folder) == was for path, was in inputs.items())
            ):
                git = record.provenance.get("git") or {}
                now = datetime.now(UTC).isoformat(timespec="seconds")
                cached: dict[str, Any] = {"reused_utc": now, "computed_utc": record.started_utc}
                cached |= {name: git.get(name) for name in ("commit", "dirty")}
                record = record.replace(cached=cached)
                record.write(folder)
                return Run(record, folder, _page(folder, record))
        return None

    def compute(self, nb: Any, options: Mapping[str, Any], folder: Path) -> tuple[Any, Run]:
        """Run it and write everything about it; returns the executed notebook, too."""
        from papermill.engines import NotebookExecutionManager
        from papermill.parameterize import parameterize_notebook

        from fresnel.report import engine

        clock, utc = time.perf_counter(), datetime.now(UTC).isoformat(timespec="seconds")
        for stale in (RESULTS_NAME, EXECUTED_NAME, REPORT_NAME, THUMBNAIL_NAME):
            (folder / stale).unlink(missing_ok=True)
        if "output_dir" in self.known:
            self.params["output_dir"] = str(folder)
        if self.params:
            nb = parameterize_notebook(nb, self.params, kernel_name="python3", language="python")
        manager = NotebookExecutionManager(
            nb, progress_bar=options["progress_bar"], autosave_cell_every=engine.AUTOSAVE_S
        )

        def save(**_: Any) -> None:
            manager.last_save_time = manager.now()
            with contextlib.suppress(OSError):  # the next one may fare better
                _write(nb, folder)

        manager.save = save
        begun = RunRecord(self.source.stem, "running", name=self.name, params=self.params)
        begun = begun.replace(started_utc=utc, provenance={"process": process()})
        running = folder / RUNNING_NAME
        with contextlib.suppress(OSError):
            begun = RunRecord.read(begun.write(folder))
            with open(running, "ab") as ballast:
                ballast.write(b"\0" * _BALLAST_BYTES)
        try:
            manager.notebook_start()
            limits = (options.get(name) for name in ("execution_timeout", "cell_timeout"))
            ended = engine.execute(manager, project_root(), folder / _CONNECTION_NAME, *limits)
        except Exception as error:
            text = f"The notebook could not be run: {type(error).__name__}: {error}"
            ended = {"error": text, "failure": {"kind": "not_started", "cell": None}}
        finally:
            with contextlib.suppress(OSError):
                os.truncate(running, 0)
        manager.notebook_complete()
        try:
            record = RunRecord.read(folder)
        except RecordError:
            record = begun
        if record == begun:  # a notebook that keeps no record
            record = begun.replace(status="finished", verdict="DONE")
        if ended is None and record.status == "running":
            text = "The notebook ended without a verdict: its last cell must call finish()."
            ended = {"error": text, "failure": {"kind": "no_verdict", "cell": None}}
        if ended and record.verdict != "REFUSED":  # a refusal stops the notebook by raising
            record = record.replace(status="crashed", verdict=None, **ended)
        # the notebook's clock misses the kernel's start and end, which the machine's owner pays too
        duration = time.perf_counter() - clock
        record = record.replace(
            duration_s=duration,
            cost_usd=record.price_per_hour_usd * duration / 3600.0,
            name=self.name,
            provenance={**record.provenance, "identity": self.identity},
        )
        self.done = complete(record, nb, folder, self.reports, self.params)
        return nb, self.done


def complete(
    record: RunRecord, nb: Any, folder: Path, reports: Path, params: Mapping[str, Any]
) -> Run:
    """Write all that stays of a run that ended: record, executed notebook, thumbnail and page.

    nb: the executed notebook. reports: where the other runs lie. params: those that were given.
    """
    from fresnel.data.images import decoded
    from fresnel.report import page

    artifacts = {"report": REPORT_NAME, "notebook": EXECUTED_NAME, **record.artifacts}
    with contextlib.suppress(OSError, ValueError, StopIteration):
        if "thumbnail" not in artifacts:  # its first figure stands for it
            outputs = [output for cell in nb.cells for output in cell.get("outputs", ())]
            encoded = next(o.data["image/png"] for o in outputs if "image/png" in o.get("data", ()))
            save_thumbnail(decoded("figure", base64.b64decode(encoded)), folder)
            artifacts["thumbnail"] = THUMBNAIL_NAME
    inputs = inputs_of({**params, **record.params}, folder)
    inputs |= record.provenance.get("inputs", {})
    record = record.replace(
        title=page.notebook_title(nb) or record.notebook,
        artifacts=artifacts,
        provenance={**record.provenance, "inputs": inputs},
    )
    others = (other for _, other in records(reports) if isinstance(other, RunRecord))
    record = record.replace(cost_avoided=cost_avoided(record, others))
    problems = []
    try:
        record.write(folder)
        _write(nb, folder)
    except OSError as error:
        problems = [f"its results could not be written ({error.strerror})."]
    problems += filter(None, [_page(folder, record, nb)])
    return Run(record, folder, " ".join(problems) or None)


def rebuild(reports_dir: str | Path | None = None) -> list[str]:
    """Make the page of every executed notebook below the reports folder again, and the index.

    Returns the problems, a sentence each."""
    reports, problems = reports_folder(reports_dir), []
    for folder in sorted(executed.parent for executed in reports.rglob(EXECUTED_NAME)):
        try:
            record = RunRecord.read(folder)
        except RecordError:
            record = RunRecord(folder.name, "crashed", error="results.json is damaged.")
        if problem := _page(folder, record):
            problems.append(f"{folder}: {problem}")
    published = [reports / "published"] if (reports / "published").is_dir() else []
    return [*problems, *filter(None, map(try_index, [*published, reports]))]


def try_index(reports: Path) -> str | None:
    """Write the index, but a failure is a sentence: no run is lost for want of an index.  Runs
    whose process is gone get a page of what had run."""
    try:
        for folder, record in list(records(reports)):
            if isinstance(record, RunRecord) and is_dead(folder, record):
                _bury(folder, record)
        for lock in list(reports.glob(f"runs/*/{RUNNING_NAME}")):
            with own(lock) as free:
                if free and not (lock.parent / RESULTS_NAME).exists():  # nothing had run
                    for left in (*abandoned(lock.parent), lock):
                        remove(left)
        index(reports)
    except Exception as error:
        return f"the index could not be made: {type(error).__name__}: {error}"
    return None


def _bury(folder: Path, record: RunRecord) -> None:
    """Give a run that was killed its page, and remove what it left."""
    with locked(folder / RUNNING_NAME, wait=False) as mine:  # until all of it is done
        if not mine:
            return
        # the kernel knew the notebook's name alone
        record = record.replace(name=folder.name.partition("Z-")[2] or record.name)
        artifacts = {"report": REPORT_NAME, "notebook": EXECUTED_NAME, **record.artifacts}
        if record.status == "running":
            said = (
                "Its process was killed, or its machine stopped; what had run until then is here."
            )
            record = record.replace(error=said, failure={"kind": "died", "cell": None})
            record = record.replace(status="crashed")
        record.replace(artifacts=artifacts).write(folder)
        _page(folder, record, None if (folder / EXECUTED_NAME).exists() else {"cells": []})
        for left in (folder / RUNNING_NAME, folder / _CONNECTION_NAME, *abandoned(folder)):
            remove(left)


def reports_folder(reports_dir: str | Path | None = None) -> Path:
    """Where reports go: `reports_dir`, else the project's reports/."""
    return Path(reports_dir) if reports_dir is not None else project_root() / "reports"


def describe(done: Run) -> str:
    """What a person wants to read on a terminal after one run."""
    text = done.record.error if done.crashed else done.record.summary
    return "\n".join(part for part in (line(done), text) if part)


def leftovers(folders: Iterable[Path]) -> Iterator[Path]:
    """What killed processes left below these folders: half-made files and sets, and locks that
    nobody holds.  Each is locked until the next one is asked for."""
    for top in folders:
        for at, inner, names in os.walk(top):
            place = Path(at)
            yield from abandoned(place, kinds="tmp|partial|replaced|rendering|unpacked")
            inner[:] = [name for name in inner if not re.match(r"\..*-", name)]
            ours = place.name in (CACHE_NAME, ".study")
            for lock in (place / name for name in sorted(names)):
                is_lock = lock.suffix == ".lock" and (ours or lock.name[0] == ".")
                with (
                    own(lock)
                    if is_lock or lock.name == RUNNING_NAME
                    else contextlib.nullcontext() as free
                ):
                    if free:
                        yield lock


def line(done: Run) -> str:
    """One line on a run: verdict, time, where its report is, and whether it was computed now."""
    path, cached = os.path.relpath(done.report), done.record.cached
    text = f"{done.record.badge:<8} {done.record.duration_s:7.1f} s  {path}"
    if cached is None:
        return text
    commit = f" by {cached['commit'][:8]}" if cached["commit"] else ""
    return f"{text}  (unchanged; computed {cached['computed_utc']}{commit})"


def _write(notebook: Any, folder: Path) -> None:
    import nbformat

    write_atomic(folder / EXECUTED_NAME, nbformat.writes(notebook) + "\n")


def _page(directory: Path, record: RunRecord, notebook: Any = None) -> str | None:
    """Write the report's page; returns why it is only a plain one, or None."""
    target = directory / REPORT_NAME
    try:
        from fresnel.report import page as pages

        pages.to_html(directory / EXECUTED_NAME, target)
        return None
    except Exception as error:
        said = " ".join(str(error).split())[:300]
        problem = f"its page could not be made ({type(error).__name__}: {said})."
    try:
        notebook = notebook or json.loads((directory / EXECUTED_NAME).read_text(encoding="utf-8"))
        write_atomic(target, plain_page(record, notebook, problem))
    except (OSError, ValueError):
        return f"{problem} Nor could a plain one be written."
    return f"{problem} A plain page stands in."


def page_of(dataset: Path, target: Path) -> None:
    """The report of notebook 01 on a set as it is, at `target`.

    Raises:
        ValueError: if the notebook crashed or its page could not be made; the plain one is there.
    """
    with tempfile.TemporaryDirectory() as folder:
        notebook = project_root() / "notebooks" / "01_validate_data.ipynb"
        params = {"preset": "none", "source": str(dataset.resolve())}
        done = run(notebook, params, "validate", folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(done.report, target)
        if done.crashed or done.problem:
            raise ValueError(done.record.error or done.problem)
