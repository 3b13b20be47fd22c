"""A notebook's parameters: read from its tagged cell, and checked before anything runs.

papermill only warns about a parameter that the notebook does not have, and passes a text where a
number belongs; both then surface after minutes of work, or never. Here both are errors.
"""

from __future__ import annotations

import ast
import difflib
import io
import tokenize
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat


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
            items = list(value)
            kinds = {type(item) for item in self.default}
            if len(kinds) == 1:
                sample = Parameter(f"{self.name}[...]", self.default[0])
                items = [sample.check(item) for item in items]
            return items
        hint = ""
        if wanted in (int, float) and isinstance(value, str):
            hint = " (YAML reads 1e-4 as text: write 1.0e-4)" if _is_number(value) else ""
        raise ParameterError(
            f"parameter {self.name}: got {value!r} ({_kind(value)}), "
            f"want {_kind(self.default)} such as {self.default!r}{hint}"
        )

    def parse(self, text: str) -> Any:
        """The value that `text`, from a command line, means for this parameter."""
        try:
            if isinstance(self.default, str):
                return text
            if isinstance(self.default, bool):
                return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
            if isinstance(self.default, int):
                return int(text)
            if isinstance(self.default, float):
                return float(text)
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError, KeyError) as error:
            if self.default is None:
                return text
            raise ParameterError(
                f"parameter {self.name}: got {text!r}, want {_kind(self.default)} "
                f"such as {self.default!r}"
            ) from error
        return self.check(value)


def read_parameters(notebook: str | Path | nbformat.NotebookNode) -> dict[str, Parameter]:
    """The parameters of a notebook, in the order of its cell tagged "parameters"; {} without one.

    Raises ParameterError if the cell holds anything but assignments of literals."""
    is_read = isinstance(notebook, nbformat.NotebookNode)
    content: Any = notebook if is_read else nbformat.read(notebook, as_version=4)
    for cell in content.cells:
        if cell.cell_type == "code" and "parameters" in cell.metadata.get("tags", []):
            return _parse_cell(cell.source)
    return {}


def parameters_of(namespace: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters cell's values, from a notebook's `globals()` right after it."""
    return {
        name: value
        for name, value in namespace.items()
        if not name.startswith("_") and isinstance(value, (bool, int, float, str))
    }


def injected_values(notebook: nbformat.NotebookNode) -> dict[str, Any]:
    """The values that papermill put into a notebook behind its parameters cell, by name."""
    given: dict[str, Any] = {}
    for cell in notebook.cells:
        if "injected-parameters" in cell.metadata.get("tags", []):
            given |= {name: found.default for name, found in _parse_cell(cell.source).items()}
    return given


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


def _parse_cell(source: str) -> dict[str, Parameter]:
    try:
        statements = ast.parse(source).body
    except SyntaxError as error:
        raise ParameterError(f"the parameters cell is not plain Python: {error}") from error
    comments = {
        token.start[0]: token.string.lstrip("# ").strip()
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    found = {}
    for statement in statements:
        if isinstance(statement, ast.Assign) and len(statement.targets) == 1:
            target, value = statement.targets[0], statement.value
        elif isinstance(statement, ast.AnnAssign) and statement.value is not None:
            target, value = statement.target, statement.value
        elif isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
            continue  # a docstring
        else:
            raise ParameterError(
                f"the parameters cell may only assign literals to names; line "
                f"{statement.lineno} does something else: {ast.unparse(statement)}"
            )
        if not isinstance(target, ast.Name):
            raise ParameterError(f"the parameters cell assigns to {ast.unparse(target)}, no name")
        try:
            default = ast.literal_eval(value)
        except ValueError as error:
            raise ParameterError(
                f"parameter {target.id}: its default must be a literal, got {ast.unparse(value)}"
            ) from error
        comment = comments.get(statement.end_lineno or statement.lineno, "")
        found[target.id] = Parameter(target.id, default, comment)
    return found


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _kind(value: Any) -> str:
    names: dict[type, str] = {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "a text",
        list: "a list",
        dict: "a mapping",
        type(None): "nothing",
    }
    return names.get(type(value), type(value).__name__)
