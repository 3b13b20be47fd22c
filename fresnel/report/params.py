"""A notebook's parameters: read from its tagged cell, and checked before anything runs.

papermill only warns about a parameter that the notebook does not have, and passes a text where a
number belongs; both then surface after minutes of work, or never. Here both are errors.
"""

from __future__ import annotations

import ast
import contextlib
import difflib
import io
import tokenize
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat

_KINDS: dict[type, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    list: "a list",
    dict: "a mapping",
    type(None): "nothing",
}
_TRUTH = {"true": True, "1": True, "false": False, "0": False}


class ParameterError(ValueError):
    """A parameter that the notebook does not have, or a value that it cannot take."""


@dataclass(frozen=True)
class Parameter:
    """One line of the parameters cell. `comment` is what stands behind it: meaning and unit."""

    name: str
    default: Any
    comment: str = ""

    def check(self, value: Any) -> Any:
        """`value` as this parameter takes it; raises ParameterError if its type does not fit.

        The default's type is the parameter's type; a default of None takes anything, an int is
        welcome where a float is wanted, and None is welcome nowhere else."""
        wanted = type(self.default)
        if self.default is None or (wanted is type(value) and wanted is not list):
            return value
        if wanted is float and type(value) is int:
            return float(value)
        if wanted is list and isinstance(value, (list, tuple)):
            if len({type(item) for item in self.default}) != 1:
                return list(value)
            sample = Parameter(f"{self.name}[...]", self.default[0])
            return [sample.check(item) for item in value]
        hint = ""
        if wanted is float and isinstance(value, str):
            with contextlib.suppress(ValueError):
                hint = f" (YAML reads {float(value):g} as text: write 1.0e-4, with a point)"
        raise ParameterError(
            f"parameter {self.name}: got {value!r} ({_kind(value)}), "
            f"want {_kind(self.default)} such as {self.default!r}{hint}"
        )

    def parse(self, text: str) -> Any:
        """The value that `text`, from a command line, means for this parameter."""
        readers: dict[type, Callable[[str], Any]] = {str: str, int: int, float: float}
        readers[bool] = lambda word: _TRUTH[word.lower()]
        value: Any = text
        with contextlib.suppress(ValueError, SyntaxError, KeyError):
            value = readers.get(type(self.default), ast.literal_eval)(text)
        return self.check(value)


def read_parameters(notebook: str | Path | nbformat.NotebookNode) -> dict[str, Parameter]:
    """The parameters of a notebook, in the order of its cell tagged "parameters"; {} without one.

    Raises ParameterError if the cell holds anything but assignments of literals."""
    is_read = isinstance(notebook, nbformat.NotebookNode)
    content: Any = notebook if is_read else nbformat.read(notebook, as_version=4)
    return _tagged(content, "parameters")


def injected_values(notebook: nbformat.NotebookNode) -> dict[str, Any]:
    """The values that papermill put into a notebook behind its parameters cell, by name."""
    found = _tagged(notebook, "injected-parameters")
    return {name: parameter.default for name, parameter in found.items()}


def parameters_of(namespace: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters cell's values, from a notebook's `globals()` right after it."""
    return {
        name: value
        for name, value in namespace.items()
        if not name.startswith("_") and isinstance(value, (bool, int, float, str))
    }


def check_parameters(known: Mapping[str, Parameter], given: Mapping[str, Any]) -> dict[str, Any]:
    """`given` with every value as its parameter takes it, or a ParameterError naming them all."""
    problems, checked = [], {}
    for name, value in given.items():
        try:
            checked[name] = find_parameter(known, name).check(value)
        except ParameterError as error:
            problems.append(str(error))
    if problems:
        raise ParameterError("; ".join(problems))
    return checked


def find_parameter(known: Mapping[str, Parameter], name: str) -> Parameter:
    if name in known:
        return known[name]
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    advice = f"did you mean {close[0]!r}?" if close else f"it has: {', '.join(known) or 'none'}"
    raise ParameterError(f"the notebook has no parameter {name!r}; {advice}")


def _tagged(notebook: nbformat.NotebookNode, tag: str) -> dict[str, Parameter]:
    for cell in notebook.cells:
        if cell.cell_type == "code" and tag in cell.metadata.get("tags", []):
            return _parse_cell(cell.source)
    return {}


def _parse_cell(source: str) -> dict[str, Parameter]:
    try:
        statements: list[Any] = list(ast.parse(source).body)
    except SyntaxError as error:
        raise ParameterError(f"the parameters cell is not plain Python: {error}") from error
    comments = {
        token.start[0]: token.string.lstrip("# ").strip()
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    found = {}
    for statement in statements:
        if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
            continue  # a docstring
        try:
            annotated = isinstance(statement, ast.AnnAssign)
            (target,) = [statement.target] if annotated else statement.targets
            name, default = target.id, ast.literal_eval(statement.value)
        except (ValueError, AttributeError) as error:
            raise ParameterError(
                "the parameters cell may only assign literals to names; line "
                f"{statement.lineno} does something else: {ast.unparse(statement)}"
            ) from error
        found[name] = Parameter(name, default, comments.get(statement.end_lineno, ""))
    return found


def _kind(value: Any) -> str:
    return _KINDS.get(type(value), type(value).__name__)
