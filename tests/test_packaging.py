"""pyproject.toml, requirements.lock and environment.yml agree, and the shell script holds up."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from importlib.metadata import distributions
from pathlib import Path

import nbformat
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LOCK_LINES = re.findall(r"^[^#\n].*", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
LOCK = {canonicalize_name(n): Version(v) for n, v in (line.split("==") for line in LOCK_LINES)}
DIRECT = [Requirement(text) for text in PROJECT["project"]["dependencies"]]
DEV = [Requirement(text) for text in PROJECT["project"]["optional-dependencies"]["dev"]]
BUILD = [Requirement(text) for text in PROJECT["build-system"]["requires"]]


@pytest.mark.parametrize("requirement", [*DIRECT, *DEV, *BUILD], ids=str)
def test_every_requirement_is_locked_within_its_bounds(requirement: Requirement) -> None:
    version = LOCK.get(canonicalize_name(requirement.name))
    assert version is not None, f"requirements.lock lacks {requirement.name}: ./run_all.sh lock"
    assert requirement.specifier.contains(version, prereleases=True)


def test_the_lock_is_pinned_free_of_cuda_and_fit_for_the_oldest_python() -> None:
    """Debian 12 has 3.11.2; some releases want 3.11.5."""
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.]*", line) for line in LOCK_LINES)
    assert len(LOCK) == len(LOCK_LINES)
    assert not [n for n in LOCK if re.match(r"nvidia(?!-ml-py)|triton|cuda|pytorch-triton", n)]
    assert {"isal", "zstandard"} <= LOCK.keys()  # gsply's extra "spz"
    found = {canonicalize_name(d.metadata["Name"]): d for d in distributions()}
    here = {n: d for n, d in found.items() if n in LOCK and Version(d.version) == LOCK[n]}
    wanted = {n: d.metadata["Requires-Python"] for n, d in here.items()}
    assert len(wanted) > 100
    too_new = {n: w for n, w in wanted.items() if w and "3.11.2" not in SpecifierSet(w)}
    assert not too_new, "other versions of these, in requirements.lock"


def test_conda_environment_uses_lock_and_project() -> None:
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert environment["name"] == PROJECT["project"]["name"]
    conda = [entry for entry in environment["dependencies"] if isinstance(entry, str)]
    (pip,) = [entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict)]
    assert pip == ["-r requirements.lock", "-e ."]
    python = next(entry for entry in conda if entry.startswith("python"))
    wanted = Requirement("python" + PROJECT["project"]["requires-python"])
    assert wanted.specifier.contains(python.partition("=")[2])


def test_every_data_file_is_in_the_package() -> None:
    patterns = PROJECT["tool"]["setuptools"]["package-data"]["fresnel"]
    files = [path for path in (ROOT / "fresnel").rglob("*") if path.is_file()]
    names = [path.relative_to(ROOT / "fresnel").as_posix() for path in files]
    data = [name for name in names if not re.search(r"\.py$|__pycache__", name)]
    flat = [pattern.replace("/**/", "/") for pattern in patterns]
    assert data and not [name for name in data if not any(fnmatch(name, p) for p in flat)]


def script(*arguments: str, cwd: Path, python: str = sys.executable) -> tuple[int, str, str]:
    command = ["bash", str(ROOT / "run_all.sh"), *arguments]
    env = {**os.environ, "FRESNEL_PYTHON": python}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--nonsense", "unrecognized arguments: --nonsense"),
        ("notebooks/none.ipynb", "no such notebook"),
        ("frobnicate", "invalid choice: 'frobnicate'"),
    ],
)
def test_script_says_what_is_wrong(tmp_path: Path, argument: str, message: str) -> None:
    status, _, errors = script(argument, cwd=tmp_path)
    assert status == 2 and message in errors


def test_script_helps_from_anywhere_and_paths_are_the_callers(tmp_path: Path) -> None:
    status, _, errors = script("setup", cwd=tmp_path, python="no-such-python")
    assert status == 2 and "no-such-python: not found" in errors
    status, said, _ = script("--help", cwd=tmp_path)
    assert status == 0
    assert all(word in said for word in ("--profile", "lab", "test", "FRESNEL_PYTHON"))
    status, _, errors = script("validate", "some/set", cwd=tmp_path)
    assert status == 2 and str(tmp_path / "some" / "set") in errors
    step = "- {name: a, notebook: notebooks/01_validate_data.ipynb, params: {images: 3}}"
    (tmp_path / "study.yaml").write_text(step)
    _, said, errors = script("study", "study.yaml", "--list", "--reports", "r", cwd=tmp_path)
    assert said.split() == ["a", "01_validate_data.ipynb", "to", "do"], errors
    status, _, errors = script("pages", "--reports", "mine", cwd=tmp_path)
    assert status == 0 and (tmp_path / "mine" / "index.html").is_file(), errors


def test_ci_calls_the_one_test_command() -> None:
    assert "./run_all.sh test" in (ROOT / ".ci" / "run").read_text()
    for path in (ROOT / "run_all.sh", ROOT / ".ci" / "run"):
        assert os.access(path, os.X_OK)
        assert subprocess.run(["bash", "-n", str(path)]).returncode == 0


def test_the_commit_hook_takes_outputs_out_of_notebooks(tmp_path: Path) -> None:
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    hooks = {hook["id"]: hook for repo in config["repos"] for hook in repo["hooks"]}
    hook = hooks["nbstripout"]
    assert re.search(hook["files"], "notebooks/01_validate_data.ipynb")
    assert "nbstripout --keep-id --verify" in (ROOT / "run_all.sh").read_text()
    cell = nbformat.v4.new_code_cell("1", outputs=[nbformat.v4.new_output("stream", text="1")])
    path = tmp_path / "n.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), path)
    command = [sys.executable, *hook["entry"].split()[1:], str(path)]
    assert subprocess.run(command, capture_output=True).returncode == 0
    (after,) = nbformat.read(path, as_version=4).cells
    assert after.outputs == [] and after.id == cell.id
