"""Shared by all tests: one thread each, and small notebooks made on the fly."""

import ast
import contextlib
import io
import os
import re
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from fresnel.report.record import RunRecord

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"

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


def run_notebook(name: str, folder: Path, **params: Any) -> "tuple[RunRecord, str, dict[str, Any]]":
    """A notebook's cells in this process, whose modules are loaded already (a kernel's and the page
    are test_session's and test_report's): its record, which goes into `folder`, all that it showed
    and printed, and its names."""
    import nbformat

    from fresnel.report.record import RunRecord

    printed, space = io.StringIO(), dict[str, Any]()

    class Shown:
        def __init__(self, data: Any, **_: Any) -> None:
            self.update(data)

        def update(self, data: Any) -> None:
            data = getattr(data, "data", data) if not isinstance(data, dict) else data.values()
            html = data._repr_html_() if hasattr(data, "_repr_html_") else data
            print(html if isinstance(html, str) else "\n".join(map(str, html)))

    cells = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4).cells
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr("IPython.display.display", Shown)
        for cell in (cell for cell in cells if cell.cell_type == "code"):
            *body, last = ast.parse(cell.source).body
            value = isinstance(last, ast.Expr)
            exec(compile(ast.Module(body if value else [*body, last], []), name, "exec"), space)
            found = (
                eval(compile(ast.Expression(last.value), name, "eval"), space) if value else None
            )
            if hasattr(found, "_repr_html_"):
                Shown(found)
            if "parameters" in cell.metadata.get("tags", []):
                space |= {**params, "output_dir": str(folder)}
    return RunRecord.read(folder), printed.getvalue(), space


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
