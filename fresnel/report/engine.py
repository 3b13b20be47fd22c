"""Execute a notebook's cells in a kernel of their own, watched: progress, autosave, a told end.

papermill keeps the notebook's state and saves it, nbclient talks to the kernel; what is added is
what an unattended run needs. Whatever ends it, `execute()` returns with everything that ran in the
notebook, and says how it ended. papermill's engine that calls this is `fresnel.report.run.Engine`.
"""

import asyncio
import contextlib
import html
import math
import os
import re
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from jupyter_core.utils import ensure_async, run_sync
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError

from fresnel.report.provenance import child_environment

TICK_S = 0.2
AUTOSAVE_S = 5
STARTUP_S = 300
"""How long a kernel may take to answer: a minute is too short where ten start on busy cores."""
GRACE_S = 20.0
"""How long an interrupted cell may take to end by itself: a training run saves a checkpoint."""


def execute(
    manager: Any,
    folder: Path,
    connection: Path,
    timeout_s: float | None = None,
    cell_timeout_s: float | None = None,
) -> dict[str, Any] | None:
    """Run the cells of a notebook in place, as far as they go; None if all of them ran, else the
    `error` and the `failure` of its record.

    manager: papermill's NotebookExecutionManager, which holds the notebook, saves it after every
        cell and while one goes on, and shows progress; the kernel's own bar is shown beside it.
    folder: the kernel's working directory.
    connection: file that says how the kernel is reached, gone with it.
    timeout_s: most that the run may take, cell_timeout_s: most that one cell may. The cell is then
        interrupted, and killed if it does not heed that.

    Ctrl-C and SIGTERM stop the run with the failure "stopped"; a second one does so at once.
    """
    # without folders of kernels it is the interpreter that runs us, whatever is installed
    kernel = AsyncKernelManager(
        kernel_spec_manager=KernelSpecManager(kernel_dirs=[]),
        transport_encryption="auto",
        connection_file=str(connection),
        **_address(),
    )
    client = _Client(manager.nb, km=kernel, store_widget_state=True, startup_timeout=STARTUP_S)
    client.manager, client.kernel = manager, kernel
    limits = timeout_s or math.inf, cell_timeout_s or math.inf
    return run_sync(client.supervise)(folder, *limits)


def _address() -> dict[str, str]:
    """Where a kernel listens. Linux: names of its own without a file (abstract sockets). Elsewhere,
    ports that are free now; another process may take one before the kernel does."""
    if sys.platform != "linux":
        return {"transport": "tcp"}
    return {"transport": "ipc", "ip": f"@fresnel-{os.getpid()}-{secrets.token_hex(8)}"}


class _Client(NotebookClient):
    """nbclient's, which runs cell after cell until something ends it."""

    manager: Any = None
    kernel: Any = None
    cell: Any = None
    cell_begun = math.inf
    bar = ""
    """The progress bar that the kernel shows last."""
    ended: tuple[str, str] | None = None
    """From outside: the failure's kind, and what is to be said."""

    async def supervise(
        self, folder: Path, timeout_s: float, cell_timeout_s: float
    ) -> dict[str, Any] | None:
        begun, given = time.monotonic(), "took longer than the {:g} s it was given"
        with _signals() as (stop, hurry):
            work = asyncio.ensure_future(self.run_cells(folder))
            try:
                while not work.done() and self.ended is None:
                    # a Ctrl-C is seen at once, a time-out at the next tick
                    await asyncio.wait({work, stop}, timeout=TICK_S, return_when="FIRST_COMPLETED")
                    if self.manager.pbar:
                        self.manager.pbar.set_postfix_str(self.bar)
                    now = time.monotonic()
                    if work.done():
                        break
                    if stop.done():
                        self.ended = "stopped", "The run was stopped from outside"
                    elif now - begun > timeout_s:
                        self.ended = "timed_out", f"The run {given.format(timeout_s)}"
                    elif now - self.cell_begun > cell_timeout_s:
                        self.ended = "timed_out", f"A cell {given.format(cell_timeout_s)}"
                if self.ended is not None:
                    with contextlib.suppress(Exception):  # the kernel may be gone, or not yet there
                        await self.kernel.interrupt_kernel()
                    await asyncio.wait(
                        {work, hurry}, timeout=GRACE_S, return_when="FIRST_COMPLETED"
                    )
                    work.cancel()
                    await asyncio.wait({work}, timeout=GRACE_S)
                return self.failure(work)
            finally:
                with contextlib.suppress(Exception):  # it may be dead, or never have been there
                    await self.kernel.shutdown_kernel(now=True)
                with contextlib.suppress(Exception):
                    await ensure_async(self.kernel.cleanup_resources())
                if self.kc is not None:
                    self.kc.stop_channels()

    async def run_cells(self, folder: Path) -> None:
        self.reset_execution_trackers()
        env = child_environment()
        env.pop("JPY_SESSION_NAME", None)  # of the notebook that we were called from
        env["PYDEVD_DISABLE_FILE_VALIDATION"] = "1"  # silences a warning on frozen modules
        await self.async_start_new_kernel(cwd=str(folder), env=env, stderr=subprocess.DEVNULL)
        channel = await self.async_start_new_kernel_client()
        info = await self.async_wait_for_reply(channel.kernel_info())
        if info is not None:
            self.nb.metadata["language_info"] = info["content"]["language_info"]
        for index, cell in enumerate(self.nb.cells):
            if self.ended is not None:  # the cell before took its interrupt for its own affair
                return
            if cell.cell_type == "code" and cell.source.strip():
                self.cell, self.cell_begun, self.bar = cell, time.monotonic(), ""
            self.manager.cell_start(cell, index)
            await self.async_execute_cell(cell, index, self.code_cells_executed + 1)
            self.manager.cell_complete(cell, cell_index=index)

    def failure(self, work: asyncio.Future) -> dict[str, Any] | None:
        """What went wrong, for the record; the cell is marked, and shows it."""
        codes = [cell for cell in self.nb.cells if cell.cell_type == "code"]
        source = [c for c in codes if "injected-parameters" not in c.metadata.get("tags", [])]
        number = next((n for n, cell in enumerate(source, 1) if cell is self.cell), None)
        place = f"code cell {number}" if number else "a cell"
        problem = work.exception() if work.done() and not work.cancelled() else None
        if self.ended is not None:
            kind, text = self.ended
            text += f" in {place}." if number else "."
        elif problem is None:
            return None
        elif isinstance(problem, CellExecutionError):
            # a bare `1 / 0` has a value, a bare `raise KeyError` has none
            said = ": ".join(filter(None, (problem.ename, problem.evalue)))
            kind, text = "cell_error", f"{place.capitalize()} stopped with {said}"
            if problem.ename == "DiskFull" or "No space left on device" in problem.evalue:
                kind, text = "disk_full", f"The disk is full. {text}"
        # nbclient tells a kernel that died while it started by a plain RuntimeError
        elif isinstance(problem, DeadKernelError) or "Kernel died" in str(problem):
            code = self.kernel.provisioner.process.poll() if self.kernel.provisioner else None
            how = f"it left with the exit status {code}"
            if code is None or code == -signal.SIGKILL:
                how = "it ran out of memory, or it was killed from outside"
            elif code < 0:
                how = f"it was ended by the signal {signal.Signals(-code).name}"
            kind, text = "kernel_died", f"ended in the middle of {place}: {how}"
            if self.cell is None:
                kind, text = "not_started", f"did not start: {how}"
            text = f"The notebook's Python{' process' * bool(self.cell)} {text}."
        elif "Kernel didn't respond" in str(problem):
            kind, text = "not_started", "The notebook's Python did not start: it gave no answer"
            text += f" for {STARTUP_S} s. Run it again with fewer processes beside it."
        else:
            kind = "cell_error" if self.cell else "not_started"
            text = f"The notebook could not be run: {type(problem).__name__}: {problem}"
        cell = self.cell or next(iter(codes), None)
        if cell is not None:
            self.manager.cell_exception(cell)
            if not any(output.output_type == "error" for output in cell.outputs):
                stopped = {"ename": "Stopped", "evalue": text, "traceback": [text]}
                cell.outputs.append(nbformat.v4.new_output("error", **stopped))
        return {"error": text, "failure": {"kind": kind, "cell": number}}

    def process_message(self, msg: dict[str, Any], cell: Any, cell_index: int) -> Any:
        content = msg["content"]
        output = super().process_message(msg, cell, cell_index)
        if msg["msg_type"] == "stream":
            last = re.split(r"[\r\n]", content["text"].rstrip("\r\n"))[-1].strip()
            if re.search(r"\d+%\|.*\|\s*\d|\d+(/\d+)? ?\w* \[\d+:\d\d", last):
                self.bar = last
        # tqdm's bar in a notebook is a box of [text, bar, text], each a widget of its own
        for box in self.widget_state.values() if "comm_id" in content else ():
            children = [str(c).removeprefix("IPY_MODEL_") for c in box.get("children") or ()]
            if content["comm_id"] in children:
                texts = [self.widget_state.get(child, {}).get("value") for child in children]
                line = " ".join(text for text in texts if isinstance(text, str))
                line = html.unescape(re.sub("<[^>]+>", "", line))
                self.bar = " ".join(line.split()) or self.bar  # tqdm pads with odd spaces
        self.manager.autosave_cell()
        return output


@contextlib.contextmanager
def _signals() -> Iterator[tuple[asyncio.Future, asyncio.Future]]:
    """Futures that the first and the second Ctrl-C or SIGTERM resolve."""
    loop = asyncio.get_running_loop()
    stop, hurry = loop.create_future(), loop.create_future()

    def heed() -> None:
        future = hurry if stop.done() else stop
        if not future.done():
            future.set_result(None)

    # handlers can only be set in the main thread
    is_main = threading.current_thread() is threading.main_thread()
    numbers = (signal.SIGINT, signal.SIGTERM) if is_main else ()
    before = {number: signal.getsignal(number) for number in numbers}
    for number in before:
        loop.add_signal_handler(number, heed)
    try:
        yield stop, hurry
    finally:
        for number, handler in before.items():
            loop.remove_signal_handler(number)
            signal.signal(number, handler)
