"""Shared by all tests: one thread each, and small notebooks made on the fly."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("NUMBA_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "agg")


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
