"""What a remote run is refused for before anything is connected to, and what would be sent."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from boxes import views_of

from fresnel import gate
from fresnel.data import dataset
from fresnel.launch import plan as planning
from fresnel.launch import recipes, runs
from fresnel.launch.plan import PlanError, Terms
from fresnel.launch.remote import Box
from fresnel.report import index
from fresnel.study.runner import Step
from fresnel.training import forecast

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"
TERMS = Terms(6.0, 2.0)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A checkout with an ignored dataset that has its receipts and a forecast of ten minutes."""
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "kept.py").write_text("kept\n")
    (folder / ".gitignore").write_text("runs/\nsecret\n")
    for words in (["init", "-q"], ["add", "."], ["-c", "user.name=a", "-c", "user.email=a@b",
                                                 "commit", "-qm", "first"]):  # fmt: skip
        subprocess.run(["git", "-C", folder, *words], check=True)
    (folder / "new.py").write_text("untracked\n")
    (folder / "secret").write_text("ignored\n")
    views = [views_of(i, size=32, views=4) for i in range(2)]
    data = dataset.write(folder / "runs/data/mine", views, meta={})
    receipts(data)
    settings = forecast.settings_of(
        forecast.full_config(150, precision="fp32"), model="cvs", size="tiny", batch_size=16
    )
    forecast.keep(data, settings, {"duration_s": 600.0, "parts": dict.fromkeys(forecast.PARTS, 0)})
    return folder


def receipts(data: Any, *, passed: bool = True) -> None:
    for kind in ("gate", "smoke-cvs"):
        gate.write_receipt(data, kind, passed, "said so", [] if passed else ["black: all black"])


def made(root: Path, terms: Terms = TERMS, **params: Any) -> planning.Plan:
    step = Step(
        "03", NOTEBOOKS / "03_full_train.ipynb", {"dataset_dir": "runs/data/mine", **params}
    )
    return planning.make("03", [step], ["notebooks/x.ipynb"], terms, root=root, single=True)


def test_what_travels_and_nothing_else(root: Path) -> None:
    plan = made(root)
    sent = set(plan.files)
    assert {"kept.py", "new.py", ".gitignore", "runs/data/mine/receipts/gate.json"} <= sent
    assert not {name for name in sent if name.startswith((".git/", "secret", ".venv"))}
    assert all(n.startswith("runs/data/mine/") for n in sent if n.startswith("runs/"))
    assert plan.forecast_s == 600.0
    said = "\n".join(plan.describe())
    assert "10.0 min, 0.33 USD" in said and "all ends after 3.00 h" in said
    assert "MB of runs/data/mine" in said and "3 files" in said
    boxed = plan.boxed()
    assert json.loads(boxed["params.yaml"])["dataset_dir"] == "runs/data/mine"
    assert "limit_s=10800\n" in boxed["settings"]


def test_a_dataset_elsewhere_travels_by_a_link(root: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    (root / "runs/data/mine").rename(elsewhere)
    with pytest.raises(PlanError, match="link it into the project"):
        made(root, dataset_dir=str(elsewhere))
    (root / "runs/data/mine").symlink_to(elsewhere)
    assert "runs/data/mine/manifest.json" in made(root).files


def _missing(root: Path) -> None:
    (root / "runs/data/mine/receipts/smoke-cvs.json").unlink()


def _stale(root: Path) -> None:
    path = root / "runs/data/mine/receipts/gate.json"
    path.write_text(path.read_text().replace('"gate_version": ', '"gate_version": 9'))


def _other_data(root: Path) -> None:
    path = root / "runs/data/mine/receipts/gate.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"dataset_hash": "sha256:0" * 8}))


def _edited(root: Path) -> None:
    next((root / "runs/data/mine").rglob("input.png")).write_bytes(b"other bytes")


def _failed(root: Path) -> None:
    receipts(dataset.open(root / "runs/data/mine"), passed=False)


def _no_forecast(root: Path) -> None:
    next((root / "runs/data/mine/receipts").glob("forecast-*")).unlink()


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (_missing, "no smoke-cvs receipt"),
        (_stale, "written by gate"),
        (_other_data, "receipt is of other data"),
        (_edited, "input.png"),
        (_failed, "the gate check of .* failed: black"),
        (_no_forecast, "no forecast for 150 steps"),
    ],
)
def test_data_that_training_would_refuse_is_refused_here(root: Path, spoil: Any, said: str) -> None:
    spoil(root)
    with pytest.raises(PlanError, match=f"(?s)nothing was connected to:.*{said}"):
        made(root)


def test_a_control_needs_its_flag(root: Path) -> None:
    _failed(root)
    assert any("is a control" in note for note in made(root, allow_failed_gate=True).notes)
    _missing(root)
    with pytest.raises(PlanError, match="no smoke-cvs receipt"):
        made(root, allow_failed_gate=True)


def test_a_forecast_over_the_budget_is_refused(root: Path) -> None:
    assert made(root, Terms(2.0, 6.0))  # 20 min: ten, five to set up, two to stop
    with pytest.raises(PlanError, match=r"over budget: a forecast of 10 min.*1\.70 USD of 1\.5"):
        made(root, Terms(1.5, 6.0))
    with pytest.raises(PlanError, match="over budget"):
        made(root, Terms(2.0, 6.0, at_end="poweroff", grace_s=600))
    with pytest.raises(PlanError, match="nothing is left"):
        Terms(0.01, 6.0)
    with pytest.raises(PlanError, match="--rate"):
        Terms(1.0, 0.0)


def test_data_that_the_job_makes_itself_needs_no_receipt(root: Path) -> None:
    params = {"dataset_dir": "runs/data/new"}
    steps = [
        Step(stem, NOTEBOOKS / f"{stem}.ipynb", params)
        for stem in ("01_validate_data", "02_smoke_train", "03_full_train")
    ]
    plan = planning.make("profile", steps, ["--profile", "gpu"], TERMS, root=root)
    assert plan.forecast_s is None and not [n for n in plan.files if n.startswith("runs/")]
    with pytest.raises(PlanError, match="no such dataset"):
        planning.make("profile", steps[1:], [], TERMS, root=root)
    with pytest.raises(PlanError, match="a study uses several"):
        planning.make("profile", steps, [], Terms(6.0, 2.0, gpus=2), root=root)


@pytest.mark.parametrize("text", ["host", "ssh://-oProxyCommand=x/y", "ssh://h:x", "ssh://h/a;b"])
def test_addresses_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="--on"):
        Box.parse(text)


def test_addresses() -> None:
    box = Box.parse("ssh://me@gpu.example:2222/data/x/")
    assert (box.host, box.port, box.folder) == ("me@gpu.example", 2222, "/data/x")
    assert Box.parse("slurm://login/~/work").folder == "work"
    assert "StrictHostKeyChecking=yes" in box.ssh()


def test_a_dry_run_connects_to_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from fresnel.cli import main

    monkeypatch.setattr(Box, "run", lambda *_, **__: pytest.fail("connected"))
    words = "launch --on ssh://nowhere/x --budget 6 --rate 1.99 --dry-run --profile cpu --only"
    assert main([*words.split(), "01-original"]) == 0
    said = capsys.readouterr().out
    assert "run       profile-cpu: ./run_all.sh --profile cpu --only 01-original" in said
    assert "all ends after 3.02 h" in said and "of the project" in said
    assert main([*words.split(), "01-original", "--reports", "y"]) == 2


def test_a_study_is_named_as_it_lies_in_the_project(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from fresnel.cli import main

    words = [
        "launch",
        "--on",
        "ssh://nowhere/x",
        "--budget",
        "60",
        "--rate",
        "1.99",
        "--dry-run",
        "study",
    ]
    step = ["--only", "01-furniture"]
    monkeypatch.setenv("FRESNEL_CALLER", str(NOTEBOOKS))
    assert main([*words, "params/study.yaml", *step]) == 0
    assert "./run_all.sh study notebooks/params/study.yaml --only" in capsys.readouterr().out
    (tmp_path / "own.yaml").write_text((NOTEBOOKS / "params/study.yaml").read_text())
    assert main([*words, str(tmp_path / "own.yaml"), *step]) == 2
    assert "own.yaml: link it into the project" in capsys.readouterr().err


def test_generated_files(root: Path, tmp_path: Path) -> None:
    terms, run = Terms(6.0, 2.0, gpus=4), "20260102T030405Z-03"
    script = recipes.sbatch(terms, "work", run, "--partition=gpu")
    for line in (
        "--time=183",
        "--signal=B:TERM@120",
        "--requeue",
        "--partition=gpu",
        "--gres=gpu:4",
    ):
        assert f"#SBATCH {line}\n" in script
    recipes.stage(root, made(root).files, tmp_path / "staged")
    assert (tmp_path / "staged/tree/runs/data/mine/manifest.json").exists()
    task = yaml.safe_load(recipes.sky(terms, tmp_path, run, "aws"))
    assert task["resources"]["autostop"] == {"idle_minutes": 5, "down": True}
    assert task["resources"]["max_hourly_cost"] == 2.0 and task["resources"]["infra"] == "aws"
    other = yaml.safe_load(recipes.dstack(terms, tmp_path, run))
    assert other["max_price"] == 2.0 and other["max_duration"] == "183m"


@pytest.mark.parametrize("tool", ["SKY", "DSTACK"])
def test_generated_files_fit_the_schemas_of_their_tools(tmp_path: Path, tool: str) -> None:
    """In an environment of its own: FRESNEL_SKY_PYTHON, FRESNEL_DSTACK_PYTHON."""
    python = os.environ.get(f"FRESNEL_{tool}_PYTHON")
    if not python:
        pytest.skip(f"FRESNEL_{tool}_PYTHON names no Python that has it")
    for name in ("tree", "run"):
        (tmp_path / name).mkdir()
    make = recipes.sky if tool == "SKY" else recipes.dstack
    (tmp_path / "task.yaml").write_text(make(TERMS, tmp_path, "20260102T030405Z-03"))
    code = {
        "SKY": "import sky; print(sky.Task.from_yaml('task.yaml').resources)",
        "DSTACK": "import yaml; from dstack._internal.core.models.configurations import "
        "parse_run_configuration; parse_run_configuration(yaml.safe_load(open('task.yaml')))",
    }[tool]
    done = subprocess.run([python, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_index_lists_remote_runs_with_their_cost(tmp_path: Path) -> None:
    folder = tmp_path / "remote/.ledger/20260102T030405Z-03"
    folder.mkdir(parents=True)
    entry = {
        "run": "20260102T030405Z-03", "on": "ssh://<b>gpu", "state": "failed", "why": "no progress",
        "planned": {"duration_s": 3600, "cost_usd": 6.0},
        "spent": {"duration_s": 600, "cost_usd": 1.25},
    }  # fmt: skip
    (folder / "launch.json").write_text(json.dumps(entry))
    text = index.index(tmp_path).read_text()
    assert "failed: no progress" in text and "ssh://&lt;b&gt;gpu" in text
    assert "1.25" in text and "6.00" in text
    assert [e["run"] for e in runs.entries(tmp_path)] == [entry["run"]]
    with pytest.raises(ValueError, match="no remote run 'x'; there are: 2026"):
        runs.find("x", tmp_path)
    assert SimpleNamespace(**runs.find("-03", tmp_path)).state == "failed"
