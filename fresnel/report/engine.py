"""Execute a notebook's cells in a kernel of their own, watched: progress, autosave, a told end.

papermill keeps the notebook's state and saves it, nbclient talks to the kernel; what is added is
what an unattended run needs. Whatever ends it, `execute()` returns with everything that ran in the
notebook, and says how it ended. papermill's engine that calls this is `fresnel.report.run.Engine`.
"""

from __future__ import annotations

import asyncio
import contextlib
import html
import math
import os
import re
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import nbformat
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from jupyter_core.utils import ensure_async
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError

from fresnel.report.record import Failure

TICK_S = 0.2
AUTOSAVE_S = 5
STARTUP_S = 300
"""How long a kernel may take to answer: a minute is too short where ten start on busy cores."""
GRACE_S = 20.0
"""How long an interrupted cell may take to end by itself: a training run saves a checkpoint."""


def execute(
    manager: Any, folder: Path, timeout_s: float | None = None, cell_timeout_s: float | None = None
) -> Failure | None:
    """Run the cells of a notebook in place, as far as they go; None if all of them ran.

    manager: papermill's NotebookExecutionManager, which holds the notebook, saves it after every
        cell and while one goes on, and shows progress; the kernel's own bar is shown beside it.
    folder: the kernel's working directory.
    timeout_s: most that the run may take, cell_timeout_s: most that one cell may. The cell is then
        interrupted, and killed if it does not heed that.

    Ctrl-C and SIGTERM stop the run with the failure "stopped".
    """
    run = _Execution(manager, timeout_s, cell_timeout_s)
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(run.supervise(folder))
    with ThreadPoolExecutor(1) as pool:  # called from a notebook, whose loop is running
        return pool.submit(asyncio.run, run.supervise(folder)).result()


class _Execution:
    def __init__(self, manager: Any, timeout_s: float | None, cell_timeout_s: float | None) -> None:
        self.manager, self.notebook = manager, manager.nb
        self.timeout_s = math.inf if timeout_s is None else timeout_s
        self.cell_timeout_s = math.inf if cell_timeout_s is None else cell_timeout_s
        self.current: Any = None
        self.ended: Failure | None = None  # from outside
        self.begun = self.cell_begun = time.monotonic()

    async def supervise(self, folder: Path) -> Failure | None:
        kernel = _ThisPython()
        client = _Client(
            self.notebook, km=kernel, store_widget_state=False, startup_timeout=STARTUP_S
        )
        client.after_message = self.manager.autosave_cell
        client.reset_execution_trackers()
        kills = _oom_kills()
        with tempfile.TemporaryFile() as errors, _stoppable() as stopping:
            work = asyncio.ensure_future(self._cells(client, folder, errors))
            try:
                await self._watch(work, kernel, client, stopping)
                failure = self._failure(work, client, kills, errors)
            finally:
                await _shut_down(kernel, client)
        self._mark(failure)
        return failure

    async def _cells(self, client: _Client, folder: Path, errors: Any) -> None:
        await client.async_start_new_kernel(cwd=str(folder), env=dict(os.environ), stderr=errors)
        channel = await client.async_start_new_kernel_client()
        info = await client.async_wait_for_reply(channel.kernel_info())
        if info is not None:
            self.notebook.metadata["language_info"] = info["content"]["language_info"]
        for index, cell in enumerate(self.notebook.cells):
            if self.ended is not None:  # the cell before took its interrupt for its own affair
                return
            if cell.cell_type == "code" and cell.source.strip():
                self.current, self.cell_begun, client.bar = cell, time.monotonic(), ""
            self.manager.cell_start(cell, index)
            await client.async_execute_cell(cell, index, client.code_cells_executed + 1)
            self.manager.cell_complete(cell, cell_index=index)

    async def _watch(
        self, work: asyncio.Future, kernel: AsyncKernelManager, client: _Client, stopping: Any
    ) -> None:
        """Wait for the cells, and cut them short where it is time to."""
        while not work.done() and self.ended is None:
            # a Ctrl-C is seen at once, a time-out at the next tick
            await asyncio.wait({work, stopping}, timeout=TICK_S, return_when="FIRST_COMPLETED")
            if self.manager.pbar:
                self.manager.pbar.set_postfix_str(client.bar)
            if stopping.done() and not work.done():
                self.ended = Failure("stopped", "The run was stopped from outside{}.")
            elif (late := self._late()) and not work.done():
                self.ended = Failure("timed_out", f"{late} it was given{{}}.")
        if self.ended is not None:
            with contextlib.suppress(Exception):  # the kernel may be gone, or not yet be there
                await kernel.interrupt_kernel()
            await asyncio.wait({work}, timeout=GRACE_S)
            if not work.done():
                work.cancel()
                await asyncio.wait({work}, timeout=GRACE_S)

    def _late(self) -> str | None:
        """Which limit was passed, in words."""
        now = time.monotonic()
        if now - self.begun > self.timeout_s:
            return f"The run took longer than the {self.timeout_s:g} s"
        if self.current is not None and now - self.cell_begun > self.cell_timeout_s:
            return f"A cell took longer than the {self.cell_timeout_s:g} s"
        return None

    def _number(self) -> int | None:
        """The place of the current cell among the source's code cells, from 1."""
        codes = [cell for cell in self.notebook.cells if cell.cell_type == "code"]
        source = [c for c in codes if "injected-parameters" not in c.metadata.get("tags", [])]
        return next((n for n, cell in enumerate(source, 1) if cell is self.current), None)

    def _failure(
        self, work: asyncio.Future, client: _Client, kills: int, errors: Any
    ) -> Failure | None:
        number = self._number()
        problem = None if work.cancelled() else work.exception() if work.done() else None
        place = f" in code cell {number}" if number else ""
        if self.ended is not None:
            return Failure(self.ended.kind, self.ended.message.format(place), number)
        if problem is None:
            return None
        if isinstance(problem, CellExecutionError):
            return _cell_error(problem, number)
        # nbclient tells a kernel that died while it started by a plain RuntimeError
        if isinstance(problem, DeadKernelError) or "Kernel died" in str(problem):
            self._append_tail(errors)
            how = _how_it_died(client, kills)
            if self.current is None:
                return Failure("not_started", f"The notebook's Python did not start: {how}.")
            text = (
                f"The notebook's Python process ended in the middle of code cell {number}: {how}."
            )
            return Failure("kernel_died", text, number)
        text = f"The notebook could not be run: {type(problem).__name__}: {problem}"
        return Failure("not_started" if self.current is None else "cell_error", text, number)

    def _append_tail(self, errors: Any, lines: int = 30) -> None:
        """Show what the dying process wrote last, such as a segmentation fault's stack."""
        errors.seek(0)
        tail = errors.read().decode("utf-8", "replace").strip().splitlines()[-lines:]
        if tail and self.current is not None:
            text = "\n".join(tail) + "\n"
            self.current.outputs.append(nbformat.v4.new_output("stream", name="stderr", text=text))

    def _mark(self, failure: Failure | None) -> None:
        """Note which cell failed; one cut short without a trace of its own gets one to show."""
        cell = self.current or next((c for c in self.notebook.cells if c.cell_type == "code"), None)
        if failure is None or cell is None:
            return
        self.manager.cell_exception(cell)
        if not any(output.output_type == "error" for output in cell.outputs):
            said = failure.message
            cell.outputs.append(
                nbformat.v4.new_output("error", ename="Stopped", evalue=said, traceback=[said])
            )


class _Client(NotebookClient):
    """nbclient's, following the progress bar that the kernel shows last."""

    bar = ""
    after_message: Any = None

    def process_message(self, msg: dict[str, Any], cell: Any, cell_index: int) -> Any:
        content = msg["content"]
        if msg["msg_type"] == "stream":
            last = re.split(r"[\r\n]", content["text"].rstrip("\r\n"))[-1]
            self.bar = last.strip() if is_progress(last) else self.bar
        elif msg["msg_type"] in ("comm_open", "comm_msg"):
            self._follow(content["comm_id"], content["data"].get("state") or {})
        output = super().process_message(msg, cell, cell_index)
        self.after_message()
        return output

    def _follow(self, widget: str, state: Mapping[str, Any]) -> None:
        """tqdm's bar in a notebook is a box of [text, bar, text], each a widget of its own."""
        widgets = self.__dict__.setdefault("_widgets", {})
        widgets.setdefault(widget, {}).update(state)
        for box in widgets.values():
            children = [str(c).removeprefix("IPY_MODEL_") for c in box.get("children") or ()]
            if widget in children:
                texts = [widgets.get(child, {}).get("value") for child in children]
                line = " ".join(t.strip() for t in texts if isinstance(t, str) and t.strip())
                line = html.unescape(re.sub("<[^>]+>", "", line))
                self.bar = " ".join(line.split()) or self.bar  # tqdm pads with odd spaces


def is_progress(line: str) -> bool:
    """Whether this line of output is a progress bar of tqdm's."""
    return bool(re.search(r"\d+%\|.*\|\s*\d|\d+(/\d+)? ?\w* \[\d+:\d\d", line))


class _ThisPython(AsyncKernelManager):
    """Starts the kernel with the interpreter that runs us, whatever kernels are installed, and
    with the project importable from a checkout that is not installed."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        if self.has_trait("transport_encryption"):  # jupyter_client 8.9 and newer
            self.transport_encryption = "auto"

    @property
    def kernel_spec(self) -> KernelSpec:
        paths = [str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH", "")]
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


@contextlib.contextmanager
def _stoppable() -> Any:
    """A future that the first Ctrl-C or SIGTERM resolves; the second one acts as it always does."""
    loop = asyncio.get_running_loop()
    stopping = loop.create_future()
    if threading.current_thread() is not threading.main_thread():
        yield stopping  # handlers can only be set in the main thread
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore(stopped: bool = True) -> None:
        if stopped and not stopping.done():
            stopping.set_result(None)
        for number, handler in before.items():
            loop.remove_signal_handler(number)
            signal.signal(number, handler)

    for number in before:
        loop.add_signal_handler(number, restore)
    try:
        yield stopping
    finally:
        restore(stopped=False)


async def _shut_down(manager: AsyncKernelManager, client: _Client) -> None:
    with contextlib.suppress(Exception):  # it may be dead, or never have been there
        await manager.shutdown_kernel(now=True)
    with contextlib.suppress(Exception):
        await ensure_async(manager.cleanup_resources())
    if client.kc is not None:
        client.kc.stop_channels()


def _cell_error(problem: CellExecutionError, number: int | None) -> Failure:
    place = f"Code cell {number}" if number else "A cell"
    # a bare `1 / 0` has a value, a bare `raise KeyError` has none
    said = f"{problem.ename}: {problem.evalue}" if problem.evalue else problem.ename
    if problem.ename == "DiskFull" or "No space left on device" in problem.evalue:
        text = f"The disk is full. {place} stopped with {said}"
        return Failure("disk_full", text, number)
    return Failure("cell_error", f"{place} stopped with {said}", number)


def _how_it_died(client: _Client, kills_before: int) -> str:
    if _oom_kills() > kills_before:
        return "the machine ran out of memory, and the system killed it"
    process = getattr(client.km.provisioner, "process", None) if client.km else None
    code = process.poll() if process is not None else None
    if code is None or code == -signal.SIGKILL:
        return "it ran out of memory, or it was killed from outside"
    if code < 0:
        named = {int(number): number.name for number in signal.Signals}
        return f"it was ended by the signal {named.get(-code, -code)}"
    return f"it left with the exit status {code}"


def _oom_kills() -> int:
    """How often the system has killed for want of memory in this control group; 0 if unknown."""
    try:
        text = Path("/sys/fs/cgroup/memory.events").read_text(encoding="utf-8")
    except OSError:
        return 0
    match = re.search(r"^oom_kill (\d+)", text, re.MULTILINE)
    return int(match.group(1)) if match else 0
