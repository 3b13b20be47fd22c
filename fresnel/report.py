"""Notebook in, report out: run it, keep what ran even when it died, and show it as one HTML page.

`run()` executes one notebook into a folder of its own; `run_profile()` a list of them. What a
report and the index look like is `fresnel.pages`.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import nbformat
import yaml
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager

from fresnel.pages import INDEX_NAME, index, notebook_title, to_html
from fresnel.parameters import ParameterError, check_parameters, read_parameters
from fresnel.provenance import project_root
from fresnel.record import RESULTS_NAME, THUMBNAIL_NAME, RecordError, RunRecord, new_run_dir

__all__ = [
    "INDEX_NAME",
    "ParameterError",
    "ProfileError",
    "Run",
    "Step",
    "describe",
    "index",
    "load_profile",
    "project_root",
    "read_yaml",
    "reports_folder",
    "run",
    "run_profile",
    "to_html",
]

EXECUTED_NAME = "executed.ipynb"
REPORT_NAME = "report.html"


class ProfileError(ValueError):
    """A profile file that does not say what to run."""


@dataclass(frozen=True)
class Run:
    """A run that is over: what it said, and the folder that holds its report."""

    record: RunRecord
    directory: Path

    @property
    def crashed(self) -> bool:
        return self.record.status == "crashed"

    @property
    def report(self) -> Path:
        return self.directory / REPORT_NAME


@dataclass(frozen=True)
class Step:
    """One notebook of a profile. `expect`: the verdict it must end with; `needs`: the steps that
    must not have crashed before it. A text in `params` may hold {run:NAME}, the folder of the run
    of step NAME."""

    name: str
    notebook: Path
    params: Mapping[str, Any] = field(default_factory=dict)
    expect: str | None = None
    needs: tuple[str, ...] = ()


def run(
    notebook: str | Path,
    params: Mapping[str, Any] | None = None,
    name: str = "",
    reports_dir: str | Path | None = None,
    *,
    cell_timeout_s: int | None = None,
    progress: bool | None = None,
) -> Run:
    """Execute a notebook and write its report, whatever happens to it.

    The folder reports_dir/runs/<UTC time>-<name>/ gets executed.ipynb, report.html, results.json
    and thumbnail.png. A notebook with a parameter `output_dir` is given that folder; where the
    caller sets `output_dir`, it is that one instead.

    params: checked against the notebook's parameters cell before anything starts.
    cell_timeout_s: stop if one cell takes longer. progress: show a bar; default: on a terminal.

    Raises ParameterError for a parameter that does not fit and FileNotFoundError without the
    notebook. An error inside it raises nothing: the returned record says "crashed". Ctrl-C is
    raised again after the report is written.
    """
    source = Path(notebook).resolve()
    if not source.is_file():
        raise FileNotFoundError(f"no such notebook: {notebook}")
    known = read_parameters(source)
    given = check_parameters(known, params or {})
    reports = reports_folder(reports_dir)
    name = name or source.stem
    if given.get("output_dir"):
        directory = Path(given["output_dir"])
        directory.mkdir(parents=True, exist_ok=True)
        for stale in (RESULTS_NAME, EXECUTED_NAME, REPORT_NAME, THUMBNAIL_NAME):
            (directory / stale).unlink(missing_ok=True)
    else:
        directory = new_run_dir(reports, name)
    directory = directory.resolve()
    if "output_dir" in known:
        given["output_dir"] = str(directory)

    begun, started = time.perf_counter(), datetime.now(UTC).isoformat(timespec="seconds")
    error, interrupt = None, None
    try:
        _execute(source, directory / EXECUTED_NAME, given, cell_timeout_s, progress)
    except Exception as problem:
        error = _plain_words(problem, injected=bool(given))
    except BaseException as problem:  # Ctrl-C, or the shell that asks us to end
        error, interrupt = "The run was stopped from outside before it was done.", problem

    executed = _executed(source, directory / EXECUTED_NAME, error)
    record = _settle(directory, source, executed, given, name, error, started, begun)
    to_html(directory / EXECUTED_NAME, directory / REPORT_NAME)
    if interrupt is not None:
        raise interrupt
    return Run(record, directory)


def load_profile(path: str | Path) -> list[Step]:
    """Read notebooks/params/profile_*.yaml: a list of {name, notebook, params | params_file,
    expect, needs}. Paths are relative to the project, params_file to the profile."""
    source = Path(path)
    if not source.is_file():
        raise ProfileError(f"no such profile: {source}")
    entries = read_yaml(source)
    if not isinstance(entries, list) or not entries:
        raise ProfileError(f"{source}: must be a list of steps with 'name' and 'notebook'")
    steps: list[Step] = []
    for number, entry in enumerate(entries, 1):
        where = f"{source}, step {number}"
        if not isinstance(entry, dict) or not {"name", "notebook"} <= entry.keys():
            raise ProfileError(f"{where}: needs 'name' and 'notebook'")
        unknown = entry.keys() - {"name", "notebook", "params", "params_file", "expect", "needs"}
        if unknown:
            raise ProfileError(f"{where}: does not know {', '.join(sorted(unknown))}")
        params: dict[str, Any] = {}
        if "params_file" in entry:
            params.update(read_yaml(source.parent / entry["params_file"]) or {})
        params.update(entry.get("params") or {})
        needs = entry.get("needs") or ()
        needs = (needs,) if isinstance(needs, str) else tuple(needs)
        missing = [need for need in needs if need not in {step.name for step in steps}]
        if missing:
            raise ProfileError(f"{where}: needs {', '.join(missing)}, which no step before it is")
        notebook = project_root() / entry["notebook"]
        steps.append(Step(str(entry["name"]), notebook, params, entry.get("expect"), needs))
    names = [step.name for step in steps]
    if len(set(names)) < len(names):
        raise ProfileError(f"{source}: two steps have the same name")
    return steps


def run_profile(
    steps: Sequence[Step], reports_dir: str | Path | None = None, *, only: Sequence[str] = ()
) -> list[str]:
    """Run the steps in order, one printed line each, and build the index at the end.

    A step that crashes stops only those that need it. Parameters of all steps are checked before
    the first one starts. only: names of the steps to run; an earlier one that they refer to is
    then looked up among the runs that are there.

    Returns the problems, a sentence each: crashes, steps left out, verdicts not as expected.
    """
    reports = reports_folder(reports_dir)
    unknown = [name for name in only if name not in {step.name for step in steps}]
    if unknown:
        known = ", ".join(step.name for step in steps)
        raise ProfileError(f"no step named {', '.join(unknown)} in this profile; it has: {known}")
    chosen = [step for step in steps if not only or step.name in only]
    for step in chosen:
        try:
            check_parameters(read_parameters(step.notebook), step.params)
        except (ValueError, OSError) as error:
            raise ProfileError(f"step {step.name}: {error}") from error

    problems: list[str] = []
    folders: dict[str, Path] = {}
    crashed: set[str] = set()
    width = max(len(step.name) for step in chosen)
    try:
        for number, step in enumerate(chosen, 1):
            lead = f"[{number}/{len(chosen)}] {step.name:<{width}}"
            broken = [need for need in step.needs if need in crashed]
            if broken:
                crashed.add(step.name)
                problems.append(f"{step.name} was left out: it needs {', '.join(broken)}.")
                print(f"{lead}  LEFT OUT  (needs {', '.join(broken)})", flush=True)
                continue
            if sys.stderr.isatty():
                print(f"{lead}  ...", flush=True)
            try:
                params = _fill(step.params, folders, reports)
            except ProfileError as error:
                crashed.add(step.name)
                problems.append(f"{step.name} was left out: {error}")
                print(f"{lead}  LEFT OUT  ({error})", flush=True)
                continue
            done = run(step.notebook, params, step.name, reports)
            folders[step.name] = done.directory
            print(f"{lead}  {_line(done)}", flush=True)
            if done.crashed:
                crashed.add(step.name)
                problems.append(f"{step.name} crashed: {done.record.error}")
            elif step.expect and done.record.verdict != step.expect:
                problems.append(
                    f"{step.name} ended with {done.record.verdict}, but {step.expect} was expected."
                )
    finally:
        index(reports)
    return problems


def reports_folder(reports_dir: str | Path | None = None) -> Path:
    """Where reports go: `reports_dir`, else the project's reports/."""
    return Path(reports_dir) if reports_dir is not None else project_root() / "reports"


def describe(done: Run) -> str:
    """What a person wants to read on a terminal after one run."""
    text = done.record.error if done.crashed else done.record.summary
    return "\n".join(part for part in (_line(done), text) if part)


def _line(done: Run) -> str:
    path = os.path.relpath(done.report)
    return f"{done.record.badge:<8} {done.record.duration_s:7.1f} s  {path}"


class _ThisPython(AsyncKernelManager):
    """Starts the kernel with the interpreter that runs us, whatever kernels are installed, and
    with the project importable from a checkout that is not installed."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        if self.has_trait("transport_encryption"):  # jupyter_client 8.9 and newer
            self.transport_encryption = "auto"

    @property
    def kernel_spec(self) -> KernelSpec:
        paths = [str(Path(__file__).resolve().parent.parent), os.environ.get("PYTHONPATH", "")]
        return KernelSpec(
            argv=[sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"],
            display_name="Python 3",
            language="python",
            metadata={"supported_encryption": ["curve"]},
            env={
                "PYTHONPATH": os.pathsep.join(path for path in paths if path),
                "PYDEVD_DISABLE_FILE_VALIDATION": "1",  # silences a warning on frozen modules
            },
        )


def _execute(
    source: Path,
    target: Path,
    params: Mapping[str, Any],
    cell_timeout_s: int | None,
    progress: bool | None,
) -> None:
    import papermill

    papermill.execute_notebook(
        _literal(source),
        _literal(target),
        dict(params),
        kernel_name="python3",
        language="python",
        progress_bar=sys.stderr.isatty() if progress is None else progress,
        autosave_cell_every=5,
        execution_timeout=cell_timeout_s,
        kernel_manager_class=_ThisPython,
        # the kernel's working directory; papermill's own `cwd` would move this process too
        resources={"metadata": {"path": str(project_root())}},
    )


def _literal(path: Path) -> str:
    """`path` as papermill wants it, which formats paths: braces in a folder's name are doubled."""
    return str(path).replace("{", "{{").replace("}", "}}")


def _plain_words(problem: Exception, *, injected: bool) -> str:
    """What happened, for a person who has not seen a traceback today."""
    kind = type(problem).__name__
    if kind == "PapermillExecutionError":
        failed: Any = problem
        # the source has one code cell less than what ran: papermill put the parameters into one
        number = (failed.exec_count or 0) - injected
        place = f"Code cell {number}" if number > 0 else "A cell"
        return f"{place} stopped with {failed.ename}: {failed.evalue}"
    if kind == "DeadKernelError":
        return (
            "The notebook's Python process ended in the middle of a cell: it ran out of memory, "
            "or it was killed from outside."
        )
    if kind == "CellTimeoutError":
        return f"A cell took longer than it was allowed to: {str(problem).splitlines()[0]}"
    return f"The notebook could not be run: {kind}: {problem}"


def _executed(source: Path, target: Path, error: str | None) -> nbformat.NotebookNode:
    """The executed notebook, as far as it came; marks the cell that a dead kernel left behind."""
    try:
        notebook = nbformat.read(target, as_version=4)
    except Exception:  # never written, or only half of it
        notebook = nbformat.read(source, as_version=4)
    notebook.cells = [
        cell
        for cell in notebook.cells
        if not {"papermill-error-cell-tag"} & set(cell.metadata.get("tags", []))
    ]
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    ran = [cell for cell in code if cell.metadata.get("papermill", {}).get("start_time")]
    for cell in code:
        cell.metadata.fresnel = {"ran": not error or cell in ran}
    if error and ran and not any(o.output_type == "error" for c in code for o in c.outputs):
        ran[-1].outputs.append(
            nbformat.v4.new_output("error", ename="Stopped", evalue=error, traceback=[error])
        )
    nbformat.write(notebook, target)
    return notebook


def _settle(
    directory: Path,
    source: Path,
    executed: nbformat.NotebookNode,
    params: Mapping[str, Any],
    name: str,
    error: str | None,
    started: str,
    begun: float,
) -> RunRecord:
    """Bring results.json to its final state: the notebook's own record where it wrote one."""
    try:
        record = RunRecord.read(directory)
    except RecordError:
        record = RunRecord(source.stem, "finished", "DONE", params=dict(params))
        record = record.replace(started_utc=started)
    if error is None and record.status == "running":
        error = "The notebook ended without a verdict: its last cell must call finish()."
    refused = record.status == "finished" and record.verdict == "REFUSED"
    if error is not None and not refused:  # a refusal stops the notebook by raising, on purpose
        record = record.replace(status="crashed", verdict=None, error=error)
    # the notebook's clock misses the kernel's start and end, which the machine's owner pays too
    duration = time.perf_counter() - begun
    record = record.replace(
        duration_s=duration, cost_usd=record.price_per_hour_usd * duration / 3600.0
    )
    artifacts = {"report": REPORT_NAME, "notebook": EXECUTED_NAME, **record.artifacts}
    if "thumbnail" not in artifacts and _first_picture(executed, directory / THUMBNAIL_NAME):
        artifacts["thumbnail"] = THUMBNAIL_NAME
    title = notebook_title(executed) or source.stem
    record = record.replace(name=name, title=title, artifacts=artifacts)
    record.write(directory / RESULTS_NAME)
    return record


def _first_picture(notebook: nbformat.NotebookNode, target: Path) -> bool:
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


def _fill(value: Any, folders: Mapping[str, Path], reports: Path) -> Any:
    """`value` with every {run:NAME} replaced by that step's folder."""
    if isinstance(value, Mapping):
        return {key: _fill(item, folders, reports) for key, item in value.items()}
    if isinstance(value, list):
        return [_fill(item, folders, reports) for item in value]
    if not isinstance(value, str):
        return value
    while "{run:" in value:
        before, _, rest = value.partition("{run:")
        name, _, after = rest.partition("}")
        folder = folders.get(name) or _latest(reports, name)
        value = f"{before}{folder}{after}"
    return value


def _latest(reports: Path, name: str) -> Path:
    runs = sorted(reports.glob(f"runs/*Z-{name}*/{RESULTS_NAME}"), reverse=True)
    for results in runs:
        with contextlib.suppress(RecordError):
            if RunRecord.read(results).name == name:
                return results.parent.resolve()
    raise ProfileError(f"no run of step {name!r} is there yet: run it first")


def read_yaml(path: Path) -> Any:
    """The content of a YAML file; raises ProfileError if it cannot be read."""
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ProfileError(f"{path}: cannot be read ({error.strerror})") from error
    except yaml.YAMLError as error:
        raise ProfileError(f"{path}: is not valid YAML: {error}") from error
