"""Shared by all tests: one thread each, and small notebooks made on the fly."""

import os
import re
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("NUMBA_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "agg")
if threading.current_thread() is threading.main_thread():
    # a shell's background job begins deaf to Ctrl-C, and so would all that tests start
    signal.signal(signal.SIGINT, signal.default_int_handler)


_REQUEST = re.compile(
    r"""<(?:script|img|image|iframe|video|audio|source|embed|object|link)\b[^>]*?\b
        (?:src|srcset|href|data|poster)\s*=\s*["']?((?:https?:)?//[^"'\s>]+)
      | @import\s+(?:url\()?["']?((?:https?:)?//[^"'\s)]+)
      | url\(\s*["']?((?:https?:)?//[^"'\s)]+)""",
    re.IGNORECASE | re.VERBOSE,
)


def external_requests(text: str) -> list[str]:
    """Addresses that a browser showing this HTML would ask for. A report must have none.

    Links that a reader may click are no requests."""
    return [next(filter(None, match.groups())) for match in _REQUEST.finditer(text)]


Shown = list[tuple[dict[str, Any], dict[str, Any]]]


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> Shown:
    """What was put into the notebook's output: (data, metadata) each."""
    outputs: Shown = []
    monkeypatch.setattr(
        "IPython.display.display",
        lambda data, raw=False, metadata=None: outputs.append((data, metadata or {})),
    )
    return outputs


@pytest.fixture
def make_notebook(tmp_path: Path) -> Callable[..., Path]:
    """make_notebook("name", "code", "# markdown", ..., parameters="a = 1  # unit") -> path.

    A cell whose text begins with "#" is markdown, every other one is code."""
    import nbformat

    def make(name: str, *cells: str, parameters: str | None = None) -> Path:
        notebook = nbformat.v4.new_notebook()
        if parameters is not None:
            cell = nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})
            notebook.cells.append(cell)
        for text in cells:
            new = nbformat.v4.new_markdown_cell if text.startswith("#") else None
            notebook.cells.append((new or nbformat.v4.new_code_cell)(text))
        path = tmp_path / f"{name}.ipynb"
        nbformat.write(notebook, path)
        return path

    return make
