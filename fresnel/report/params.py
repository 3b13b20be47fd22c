"""A notebook's parameters: read from its tagged cell, and checked before anything runs.

papermill only warns about a parameter that the notebook does not have, and passes a text where a
number belongs; both then surface after minutes of work, or never. Here both are errors.
"""

import ast
import contextlib
import difflib
import io
import tokenize
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import nbformat

_KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
_KINDS |= {list: "a list", dict: "a mapping", type(None): "nothing"}


class ParameterError(ValueError):
    """A parameter that the notebook does not have, or a value that it cannot take."""

    def _render_traceback_(self) -> list[str]:  # what IPython shows in place of the trace
        return [f"ParameterError: {self}"]


@dataclass(frozen=True)
class Parameter:
    """One line of the parameters cell. `comment` is what stands behind it: meaning and unit."""

    name: str
    default: Any
    comment: str = ""

    def check(self, value: Any, *, strict: bool = True) -> Any:
        """`value` as this parameter takes it; raises ParameterError if its type does not fit.

        The default's type is the parameter's type; a default of None takes anything, an int is
        welcome where a float or the text "auto" is wanted, and None is welcome nowhere else. Not
        strict: a text may stand for a number or a truth value."""
        wanted: Any = type(self.default)
        if self.default is None:
            return value
        if self.default == "auto" and type(value) is int:  # as `gpus: 2` in YAML
            return str(value)
        if wanted is list and len(kinds := {type(item) for item in self.default}) == 1:
            wanted = list[kinds.pop()]  # type: ignore[misc]
        try:
            return msgspec.convert(value, wanted, strict=strict)
        except msgspec.ValidationError:
            got, want = (_KINDS.get(type(v), type(v).__name__) for v in (value, self.default))
            is_yaml = strict and wanted is float and isinstance(value, str)
            hint = " (YAML reads 1e-4 as text: write 1.0e-4, with a point)" if is_yaml else ""
            raise ParameterError(
                f"parameter {self.name}: got {value!r} ({got}), "
                f"want {want} such as {self.default!r}{hint}"
            ) from None

    def parse(self, text: str) -> Any:
        """The value that `text`, from a command line, means for this parameter."""
        value: Any = text
        if not isinstance(self.default, (str, bool, int, float)):
            with contextlib.suppress(ValueError, SyntaxError):
                value = ast.literal_eval(text)
        return self.check(value, strict=False)


def read_parameters(
    notebook: str | Path | nbformat.NotebookNode, tag: str = "parameters"
) -> dict[str, Parameter]:
    """The parameters of a notebook, in the order of its cell of this tag; {} without one.

    Raises ParameterError if the cell holds anything but assignments of literals."""
    is_read = isinstance(notebook, nbformat.NotebookNode)
    content: Any = notebook if is_read else nbformat.read(notebook, as_version=4)
    tagged = (cell for cell in content.cells if tag in cell.metadata.get("tags", []))
    source = next((cell.source for cell in tagged if cell.cell_type == "code"), "")
    found: dict[str, Parameter] = {}
    node: Any = None
    try:
        tokens = tokenize.generate_tokens(io.StringIO(source).readline)
        comments = {t.start[0]: t.string for t in tokens if t.type == tokenize.COMMENT}
        for node in ast.parse(source).body:
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                continue  # a docstring
            (target,) = getattr(node, "targets", None) or [node.target]
            comment = comments.get(node.end_lineno, "").lstrip("# ").strip()
            found[target.id] = Parameter(target.id, ast.literal_eval(node.value), comment)
    except (SyntaxError, tokenize.TokenError, ValueError, AttributeError) as error:
        told = f"line {node.lineno}: {ast.unparse(node)}" if node else error
        raise ParameterError(f"a parameters cell only assigns literals to names; {told}") from error
    return found


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
