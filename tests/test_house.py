"""Arrows between rooms go down, none in a circle; files are small; documents name what is there.

Imports are read from the source, lazy ones and those for types included.
"""

import ast
import html
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "fresnel"
ROOMS = (
    *("host", "scene", "render", "data", "objects", "heads", "models", "bootstrap", "poses"),
    *("gate", "faults", "evaluation", "training", "show", "views", "report", "study", "launch"),
    *("analysis", "arguments", "cli", "__main__"),
)
"""Bottom first: a room may import those before it."""
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@cache
def imports(module: str) -> tuple[tuple[str, str], ...]:
    """(module of this package, name taken from it or "") for every import in `module`."""
    return tuple(_imports(module))


def _imports(module: str) -> Iterator[tuple[str, str]]:
    package = module if MODULES[module].name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom):
            above = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1])
            source = ".".join(filter(None, (above if node.level else "", node.module or "")))
            for alias in node.names if source.split(".")[0] == "fresnel" else ():
                inner = f"{source}.{alias.name}"
                yield (inner, "") if inner in MODULES else (source, alias.name)


def room(module: str) -> str:
    return [*module.split("."), ""][1]


def test_arrows_between_rooms_go_down() -> None:
    found = [(module, target) for module in MODULES for target, _ in imports(module)]
    rooms = {"": len(ROOMS)} | {name: place for place, name in enumerate(ROOMS)}
    assert [
        f"{module} imports {target}, which is above it"
        for module, target in found
        if room(target) and rooms[room(target)] > rooms[room(module)]
    ] == []


def test_no_circle_between_modules() -> None:
    graph = {module: {target for target, _ in imports(module)} - {module} for module in MODULES}
    graph.pop("fresnel")  # its public names are imported when they are asked for
    problems = []
    while True:
        try:
            TopologicalSorter(graph).prepare()
        except CycleError as circle:
            start, following, *_ = found = circle.args[1]
            problems.append(f"circle: {' -> '.join(found)}")
            graph[following].discard(start)
        else:
            break
    assert problems == []


def test_rooms_and_files_stay_small() -> None:
    """And each says what it is for."""
    files = Counter(path.parent for path in MODULES.values() if path.name != "__init__.py")
    texts = {module: path.read_text() for module, path in MODULES.items()}
    assert {folder: count for folder, count in files.items() if count > 10} == {}
    assert {module for module, text in texts.items() if text.count("\n") > 500} == set()
    assert {m for m, text in texts.items() if not ast.get_docstring(ast.parse(text))} == set()


def test_what_begins_with_an_underscore_stays_in_its_room() -> None:
    found = [
        f"{module} imports {target}.{name}"
        for module in MODULES
        for target, name in imports(module)
        if room(module) != room(target)
        and any(re.match(r"_[^_]", part) for part in (*target.split("."), name))
    ]
    assert found == []


def test_the_public_names_can_be_imported() -> None:
    """In a fresh interpreter, as importing a room must not hide the function of the same name."""
    table = re.findall(r"^    ((?:\w+, )*\w+)  ", (PACKAGE / "__init__.py").read_text(), re.M)
    names = [name for line in table for name in line.split(", ")]
    assert {"Decoder", "CVS", "fit", "render", "validate", "Gaussians"} <= set(names)
    code = f"""\
import sys
import fresnel.data.dataset
assert not {{"pycolmap", "trimesh"}} & sys.modules.keys(), "heavy, and not yet needed"
from fresnel import {", ".join(names)}
for name in {[name for name in names if name != "bootstrap"]}:
    assert callable(getattr(fresnel, name)), name
    assert name in dir(fresnel), name
import fresnel.render.cpu
from fresnel import render
assert callable(render)"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


PAGES = [ROOT / "index.html", *sorted((ROOT / "reports" / "published").rglob("*.html"))]


@pytest.mark.parametrize("path", [*DOCUMENTS, *PAGES], ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere_in_a_clone_and_on_github_pages(path: Path) -> None:
    """They are relative, and what they lead to is there: no server, no Jekyll (`.nojekyll`)."""
    text = path.read_text()
    form = r"""\s(?:href|src)="([^"]*)\"""" if path.suffix == ".html" else r"\]\(([^)\s]+)\)"
    for link in map(html.unescape, re.findall(form, text)):
        place, _, part = unquote(link).partition("#")
        if not re.match(r"[a-z]+:", place):
            assert not place.startswith("/"), link
            assert not place or (path.parent / place).is_file(), link
            assert place or not part or f'id="{part}"' in text or path.suffix == ".md", link
    assert (ROOT / ".nojekyll").is_file()


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_documents_name_commands_and_files_that_are_there(path: Path) -> None:
    from fresnel.cli import _parser

    (commands,) = (a for a in _parser()._actions if a.choices and not a.option_strings)
    shell = re.findall(r"^    ([a-z -]+)\) ", (ROOT / "run_all.sh").read_text(), re.M)
    known = {*(commands.choices or ()), *(word for line in shell for word in line.split(" | "))}
    text = path.read_text()
    problems = [
        f"{path.name}: run_all.sh {''.join(command)}"
        for command in re.findall(r"run_all\.sh ([a-z]\w*)\b(?![./])|-m fresnel (\w+)", text)
        if "".join(command) not in known
    ]
    places = "fresnel|notebooks|docs|tests|benchmarks"
    found = re.findall(rf"\b((?:{places})/[\w./-]+\.(?:py|ipynb|yaml|md|json))\b", text)
    problems += [f"{path.name} names {name}" for name in found if not (ROOT / name).exists()]
    assert problems == []
