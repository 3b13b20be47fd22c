"""A notebook that no engine of ours runs, in JupyterLab or by plain papermill, ends as a page too.

`start` is a notebook's first call after its parameters. It checks these, and where nobody else
watches the kernel it keeps the cells with what they put out: in the end, after `finish`, they are
the page. Of a cell that fails the index says CRASHED or STOPPED, unless a person sits before it.
"""

import atexit
import contextlib
import os
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nbformat

from fresnel.host.files import write_atomic
from fresnel.host.machine import project_root
from fresnel.report import record as records
from fresnel.report import run as runs
from fresnel.report.params import (
    Parameter,
    ParameterError,
    check_parameters,
    read_parameters,
)
from fresnel.report.record import Recorder, RunRecord

_OUTPUTS = {"stream", "display_data", "update_display_data", "execute_result", "error"}
_OUTPUTS |= {"clear_output"}
_INJECTED = "# Parameters\n"
"""What the cell begins with in which papermill gives parameters."""
_watch: "_Watch | None" = None


def start(notebook: str, namespace: Mapping[str, Any]) -> Recorder:
    """Begin a notebook's record (`record.start`), its parameters checked.

    Args:
        notebook: its name, such as "03_full_train".
        namespace: its `globals()`: values of the parameters, and the cells that ran.

    Raises:
        ParameterError: for a parameter that papermill gave and the notebook does not have, or a
            value that it cannot take.
    """
    global _watch
    cells = [str(text) for text in namespace.get("In", ()) if str(text).strip()]
    file, is_lab = _file(notebook, cells, namespace)
    source: Any = nbformat.read(file, as_version=4) if file else nbformat.v4.new_notebook()
    known = read_parameters(source)
    with contextlib.suppress(ParameterError):  # a copy may have more: they are what ran first
        known = {**_literals(*cells[:1]), **known}
    values = _literals(*(text for text in cells if text.startswith(_INJECTED)))
    given = {name: parameter.default for name, parameter in values.items()}
    given |= {name: namespace[name] for name in known if name in namespace}
    params = check_parameters(known, given)
    before, folder = _watch, params.get("output_dir", "")
    if before is not None:
        before.leave()
        if before.run.record.notebook == notebook and before.written is None:
            folder = before.run.output_dir  # this very run, begun once more
    seed, price = params.get("seed"), params.get("price_per_hour_usd", 0.0)
    run = records.start(notebook, params, folder, price_per_hour_usd=price, seed=seed)
    shell = namespace["get_ipython"]() if "get_ipython" in namespace else None
    watched = run.alone and cells and hasattr(shell, "kernel")
    _watch = _Watch(run, source, shell, cells, is_lab) if watched else None
    return run


def _literals(*cells: str) -> dict[str, Parameter]:
    """What these cells assign, which must be literals."""
    new = nbformat.v4.new_code_cell("\n".join(cells), metadata={"tags": ["parameters"]})
    return read_parameters(nbformat.v4.new_notebook(cells=[new]))


def _file(
    notebook: str, cells: list[str], namespace: Mapping[str, Any]
) -> tuple[Path | None, bool]:
    """The file of the notebook that runs, None where there is none, and whether an editor has it
    open."""
    opened = Path(os.environ.get("JPY_SESSION_NAME") or namespace.get("__vsc_ipynb_file__", ""))
    if opened.suffix == ".ipynb" and opened.is_file():
        # a kernel that a notebook's process started inherits its name
        held = {cell.source.strip() for cell in nbformat.read(opened, as_version=4).cells}
        if held & {text.strip() for text in cells}:
            return opened, True
    ours = project_root() / "notebooks" / f"{notebook}.ipynb"
    return (ours if ours.is_file() else None), False


class _Watch:
    """Keeps what the cells of a kernel put out, and writes the report when the run has ended."""

    def __init__(
        self, run: Recorder, source: Any, shell: Any, cells: list[str], is_lab: bool
    ) -> None:
        from nbclient import NotebookClient

        self.run, self.notebook, self.shell, self.is_lab = run, source, shell, is_lab
        for cell in source.cells:
            if cell.cell_type == "code":
                cell.outputs, cell.execution_count = [], None
                cell.metadata["papermill"] = {"status": "pending"}
        self._client, self._lock = NotebookClient(source), threading.RLock()
        self._client.reset_execution_trackers()
        self._client.clear_before_next_output = False
        self.written: RunRecord | None = None
        self._place, setup = -1, self._find(cells[-1], None)
        places = [(text, self._find(text, None)) for text in cells]
        for text, place in places:  # of what else had run only what led here
            led_here = setup is None or (place is not None and place <= setup)
            if led_here or text.startswith(_INJECTED):
                self._begin(text)
        self._send = shell.kernel.session.send
        shell.kernel.session.send = self._sent
        shell.events.register("pre_run_cell", self._before)
        shell.events.register("post_run_cell", self._after)
        atexit.register(self._at_exit)

    def leave(self) -> None:
        """Watch no more."""
        self.shell.kernel.session.send = self._send
        for event, function in (("pre_run_cell", self._before), ("post_run_cell", self._after)):
            self.shell.events.unregister(event, function)
        atexit.unregister(self._at_exit)
        self.run.release()

    def _before(self, info: Any) -> None:
        if info.store_history and not info.silent:
            self._begin(info.raw_cell, info.cell_id)

    def _find(self, source: str, key: str | None) -> int | None:
        code = [(k, c) for k, c in enumerate(self.notebook.cells) if c.cell_type == "code"]
        named = (k for k, cell in code if key and cell.get("id") == key)
        equal = (k for k, cell in code if cell.source.strip() == source.strip())
        return next(named, next(equal, None))

    def _begin(self, source: str, key: str | None = None) -> None:
        """Find the cell of the notebook that runs, or add it behind the one that ran last."""
        with self._lock:
            place = self._find(source, key)
            if place is None:
                tags = ["injected-parameters"] if source.startswith(_INJECTED) else []
                new = nbformat.v4.new_code_cell(metadata={"tags": tags})
                place = self._place + 1
                self.notebook.cells.insert(place, new)
                self._client.reset_execution_trackers()
            self._place = place
            self._client.clear_display_id_mapping(place)
            self.notebook.cells[place].update(source=source, outputs=[])
            self.notebook.cells[place].metadata["papermill"] = {"status": "running"}

    def _sent(
        self, stream: Any, message: Any, content: Any = None, *more: Any, **named: Any
    ) -> Any:
        """The kernel's `session.send`, which is asked to send everything that a cell puts out."""
        done = self._send(stream, message, content, *more, **named)
        kind = message if isinstance(message, str) else message["header"]["msg_type"]
        if kind in _OUTPUTS:
            full = {"content": content, "metadata": {}, "parent_header": {}}
            full |= {"header": {"msg_type": kind}} if isinstance(message, str) else message
            with self._lock, contextlib.suppress(Exception):  # a cell goes on, whatever it showed
                cell = self.notebook.cells[self._place]
                self._client.process_message({**full, "msg_type": kind}, cell, self._place)
        return done

    def _after(self, result: Any) -> None:
        """Keep what ran; once the run has ended, write its report."""
        if not (result.info.store_history and not result.info.silent):
            return
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        cell, run = self.notebook.cells[self._place], self.run
        cell.metadata["papermill"] = {"status": "completed"}
        cell.execution_count = result.execution_count
        error = result.error_before_exec or result.error_in_exec
        if error is not None and run.record.status == "running" and not self.is_lab:
            code = [c for c in self.notebook.cells if c.cell_type == "code"]
            source = [c for c in code if "injected-parameters" not in c.metadata.get("tags", [])]
            number = next((n for n, other in enumerate(source, 1) if other is cell), None)
            if isinstance(error, KeyboardInterrupt):
                run.crash("The run was stopped from outside.", "stopped", number)
            else:
                said = f"{type(error).__name__}: {error}".removesuffix(": ")
                run.crash(f"Code cell {number} stopped with {said}", "cell_error", number)
        with contextlib.suppress(OSError):
            text = nbformat.writes(self.notebook) + "\n"
            write_atomic(run.output_dir / runs.EXECUTED_NAME, text)
        if run.record.status != "running" and run.record is not self.written:
            self._report()

    def _report(self) -> None:
        run, reports = self.run, project_root() / "reports"
        self.written = run.record
        done = runs.complete(run.record, self.notebook, run.output_dir, reports, {})
        run.release()
        problem = runs.try_index(reports)
        print(runs.describe(done), *filter(None, [done.problem, problem]), sep="\n")

    def _at_exit(self) -> None:
        """The kernel is shut down: the next index makes the page of what had run."""
        if self.run.record.status == "running" and self.written is None:
            self.run.crash("The kernel was shut down before the last cell had run.", "stopped")
