"""What a remote run is refused for before anything is connected to, and what would be sent."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from boxes import views_of

from fresnel import gate
from fresnel.cli import main
from fresnel.data import dataset
from fresnel.launch import plan as planning
from fresnel.launch import runs
from fresnel.launch.plan import PlanError, Terms
from fresnel.launch.remote import Box
from fresnel.report import index
from fresnel.study.runner import Step
from fresnel.training import forecast

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"
TERMS = Terms(6.0, 2.0)
DATA = "runs/data/mine"


def make_root(folder: Path) -> Path:
    """A checkout with an ignored dataset that has its receipts and a forecast of ten minutes."""
    folder.mkdir()
    (folder / "kept.py").write_text("kept\n")
    (folder / ".gitignore").write_text("runs/\nsecret\n")
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "."], [*who, "commit", "-qm", "first"]):
        subprocess.run(["git", "-C", folder, *words], check=True)
    (folder / "new.py").write_text("untracked\n")
    (folder / "secret").write_text("ignored\n")
    views = [views_of(i, size=16, views=2) for i in range(2)]
    data = dataset.write(folder / DATA, views, meta={})
    receipts(data)
    settings = forecast.settings_of(
        forecast.full_config(150, precision="fp32"), model="cvs", size="tiny", batch_size=16
    )
    forecast.keep(data, settings, {"duration_s": 600.0, "parts": dict.fromkeys(forecast.PARTS, 0)})
    return folder


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_root(tmp_path_factory.mktemp("root") / "project")


@pytest.fixture
def root(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "project"))


def receipts(data: Any, *, passed: bool = True) -> None:
    for kind in ("gate", "smoke-cvs"):
        gate.write_receipt(data, kind, passed, "said so", [] if passed else ["black: all black"])


def made(root: Path, terms: Terms = TERMS, **params: Any) -> planning.Plan:
    params = {"dataset_dir": DATA, **params}
    step = Step("03", NOTEBOOKS / "03_full_train.ipynb", params)
    return planning.make("03", [step], ["notebooks/x.ipynb"], terms, root=root)


def test_what_travels_and_nothing_else(root: Path, tmp_path: Path) -> None:
    plan = made(root)
    sent = set(plan.files)
    assert {"kept.py", "new.py", ".gitignore", f"{DATA}/receipts/gate.json"} <= sent
    assert not {name for name in sent if name.startswith((".git/", "secret", ".venv"))}
    assert all(n.startswith(f"{DATA}/") for n in sent if n.startswith("runs/"))
    assert plan.forecast_s == 600.0
    said = "\n".join(plan.describe())
    assert "10.0 min, 0.33 USD" in said and "all ends after 3.00 h" in said
    assert f"MB of {DATA}" in said and "3 files" in said
    boxed = plan.boxed()
    assert json.loads(boxed["params.yaml"])["dataset_dir"] == DATA
    assert "limit_s=10800\n" in boxed["settings"]
    (root / DATA).rename(tmp_path / "elsewhere")
    with pytest.raises(PlanError, match="link it into the project"):
        made(root, dataset_dir=str(tmp_path / "elsewhere"))
    (root / DATA).symlink_to(tmp_path / "elsewhere")
    assert f"{DATA}/manifest.json" in made(root).files


def rewritten(path: Path, old: str, new: str) -> None:
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


SPOILED = {
    "no smoke-cvs receipt": lambda data: (data / "receipts/smoke-cvs.json").unlink(),
    "by gate 9.*, want": lambda data: rewritten(
        data / "receipts/gate.json", '"gate_version": ', '"gate_version": 9'
    ),
    "receipt is of other data": lambda data: rewritten(
        data / "receipts/gate.json", '"dataset_hash": "sha256:', '"dataset_hash": "sha256:0'
    ),
    "input.png": lambda data: next(data.rglob("input.png")).write_bytes(b"other bytes"),
    "the gate check of .* failed: black": lambda data: receipts(dataset.open(data), passed=False),
    "no forecast for 150 steps": lambda data: next(data.glob("receipts/forecast-*")).unlink(),
}


@pytest.mark.parametrize("said", SPOILED)
def test_data_that_training_would_refuse_is_refused_here(root: Path, said: str) -> None:
    SPOILED[said](root / DATA)
    with pytest.raises(PlanError, match=f"(?s)nothing was connected to:.*{said}"):
        made(root)


def test_a_control_needs_its_flag(root: Path) -> None:
    receipts(dataset.open(root / DATA), passed=False)
    assert "(a control" in made(root, allow_failed_gate=True).steps[0]
    (root / DATA / "receipts/smoke-cvs.json").unlink()
    with pytest.raises(PlanError, match="no smoke-cvs receipt"):
        made(root, allow_failed_gate=True)


def test_a_forecast_over_the_budget_is_refused(pristine: Path) -> None:
    assert made(pristine, Terms(2.0, 6.0))  # 20 min: ten, five to set up, two to stop
    with pytest.raises(PlanError, match=r"over budget: .* 15 of 13 min, 1\.50 of 1\.5 USD"):
        made(pristine, Terms(1.5, 6.0))
    with pytest.raises(PlanError, match="over budget"):
        made(pristine, Terms(2.0, 6.0, at_end="poweroff", grace_s=600))
    for terms, said in (
        ((0.01, 6.0), "nothing is left"),
        ((1.0, 0.0), "--rate"),
        ((float("inf"), 1.0), "--budget"),
        ((1.0, 1.0, "a\nb"), "--at-end"),
    ):
        with pytest.raises(PlanError, match=said):
            Terms(*terms)


def test_a_run_on_two_gpus_asks_for_two_and_for_its_own_forecast(root: Path) -> None:
    with pytest.raises(PlanError, match=r"no forecast for 150 steps.* and gpus"):
        made(root, gpus="2")
    config = forecast.full_config(150, precision="fp32", accumulate=2)
    same = {"model": "cvs", "size": "tiny", "batch_size": 16}
    plan = {"duration_s": 400.0, "parts": dict.fromkeys(forecast.PARTS, 0)}
    forecast.keep(dataset.open(root / DATA), forecast.settings_of(config, gpus=2, **same), plan)
    two = made(root, gpus="2")
    assert two.forecast_s == 400.0 and two.terms.gpus == 2 and two.params["gpus"] == "2"
    assert "--gres=gpu:2" in planning.sbatch(two.terms, "work", "run")
    assert json.loads(two.boxed()["params.yaml"])["gpus"] == "2"
    assert made(root, Terms(6.0, 2.0, gpus=2)).forecast_s == 400.0, "auto is all of the machine's"


def test_data_that_the_job_makes_itself_needs_no_receipt(pristine: Path) -> None:
    steps = [
        Step(stem, NOTEBOOKS / f"{stem}.ipynb", {"dataset_dir": "runs/data/new"})
        for stem in ("01_validate_data", "02_smoke_train", "03_full_train")
    ]
    plan = planning.make("profile", steps, ["--profile", "gpu"], TERMS, root=pristine)
    assert plan.forecast_s is None and not [n for n in plan.files if n.startswith("runs/")]
    with pytest.raises(PlanError, match="no such dataset"):
        planning.make("profile", steps[1:], [], TERMS, root=pristine)
    four = Terms(6.0, 2.0, gpus=4, sbatch="--partition=gpu")
    plan = planning.make("profile", steps, [], four, root=pristine)
    assert "CUDA_VISIBLE_DEVICES" not in plan.boxed()["command"], "one run has all of them"
    plan = planning.make("study", steps, ["study"], four, root=pristine)
    assert "CUDA_VISIBLE_DEVICES:-0,1,2,3}" in plan.boxed()["command"]
    script = planning.sbatch(four, "work", "20260102T030405Z-03")
    wanted = ("--time=183", "--signal=B:TERM@120", "--requeue", "--partition=gpu", "--gres=gpu:4")
    assert {f"#SBATCH {line}" for line in wanted} <= set(script.splitlines())


def test_tasks_of_skypilot_and_dstack(pristine: Path, tmp_path: Path, monkeypatch) -> None:
    """Laid out and handed to `sky launch`; dstack's lies beside it."""
    steps = [Step("01", NOTEBOOKS / "01_validate_data.ipynb", {"dataset_dir": "runs/data/new"})]
    plan = planning.make("01", steps, ["--only", "01"], Terms(6.0, 2.0, cloud="aws"), root=pristine)
    monkeypatch.setenv("FRESNEL_SKY", "no-such-command")
    with pytest.raises(OSError, match="no command sky here"):
        runs.launch(plan, "sky", tmp_path)
    fake = tmp_path / "sky"
    fake.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/called\n')
    fake.chmod(0o755)
    monkeypatch.setenv("FRESNEL_SKY", str(fake))
    run = runs.launch(plan, "sky", tmp_path / "second")
    folder = tmp_path / "second/remote/.ledger" / run
    task, other = (yaml.safe_load((folder / n).read_text()) for n in ("sky.yaml", "run.dstack.yml"))
    assert (tmp_path / "called").read_text().split()[:3] == ["launch", "-y", "-d"]
    assert task["resources"]["autostop"] == {"idle_minutes": 5, "down": True}
    assert task["resources"]["max_hourly_cost"] == 2.0 and task["resources"]["infra"] == "aws"
    assert other["max_price"] == 2.0 and other["max_duration"] == "183m"
    assert {n for n in plan.files if not (folder / "tree" / n).is_file()} == set()
    assert (folder / "run/box.sh").exists() and runs.find(run, tmp_path / "second")["on"] == "sky"


def test_addresses() -> None:
    for text in ("host", "ssh://-oProxyCommand=x/y", "ssh://h:x", "ssh://h/a;b"):
        with pytest.raises(ValueError, match="--on"):
            Box(text, "x")
    with Box("ssh://me@gpu.example:2222/data/x/", "x") as box:
        assert (box.host, box.port, box.folder) == ("me@gpu.example", 2222, "/data/x")
        assert "-oStrictHostKeyChecking=yes" in box.ssh()
    assert Box("slurm://login/~/work", "x").folder == "work"


def test_a_dry_run_connects_to_nothing_and_names_a_study_as_it_lies_in_the_project(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(Box, "shell", lambda *_, **__: pytest.fail("connected"))
    words = ["launch", "--on", "ssh://nowhere/x", "--budget", "6", "--rate", "1.99", "--dry-run"]
    profile = [*words, *["--profile", "cpu", "--only", "01-original"]]
    assert main(profile) == 0
    said = capsys.readouterr().out
    assert "run       profile-cpu: ./run_all.sh --profile cpu --only 01-original" in said
    assert "3         run: 01-original\n" in said
    assert "all ends after 3.02 h" in said and "of the project" in said
    assert main([*profile, "--reports", "y"]) == 2
    monkeypatch.setenv("FRESNEL_CALLER", str(NOTEBOOKS))
    step = ["--only", "01-truth"]
    assert main([*words, "study", "params/study.yaml", *step]) == 0
    assert "./run_all.sh study notebooks/params/study.yaml --only" in capsys.readouterr().out
    shutil.copy(NOTEBOOKS / "params/study.yaml", tmp_path / "own.yaml")
    assert main([*words, "study", str(tmp_path / "own.yaml"), *step]) == 2
    assert "own.yaml: link it into the project" in capsys.readouterr().err


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
    assert "10.0 of 60.0 min, 1.25 of 6.00 USD" in runs.describe(entry)
    with pytest.raises(ValueError, match="no remote run 'x'; there are: 2026"):
        runs.find("x", tmp_path)
    assert runs.find("-03", tmp_path) == entry
