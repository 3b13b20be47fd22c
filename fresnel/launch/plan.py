"""What a remote run is: checked, priced and listed before anything is connected to."""

import json
import math
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fresnel import gate
from fresnel.data import dataset
from fresnel.host.files import sha256
from fresnel.report.params import read_parameters
from fresnel.report.provenance import git_state
from fresnel.study.data import receipts
from fresnel.study.runner import Step
from fresnel.training import forecast

SETUP_S = 300.0  # kept beside the forecast for the upload and the environment
_MADE = {"output_dir", "export_to", "reports_dir"}  # parameters that name what a run makes


class PlanError(ValueError):
    """A run that is refused before it costs anything; says what is missing."""


@dataclass(frozen=True)
class Terms:
    """What may be spent, and how it ends. `at_end`: "stay", "poweroff" or a command of the
    machine's shell; until that `grace_s` are kept for fetching; `kill_s` from TERM to KILL;
    `stall_s`: without any progress the run has failed; `python`: there, used as it is; `sbatch`:
    further options of Slurm ("--partition=gpu"); `cloud` and `gpu`: of SkyPilot."""

    budget_usd: float
    rate_usd: float
    at_end: str = "stay"
    grace_s: float = 1800.0
    stall_s: float = 1800.0
    gpus: int = 1
    python: str = ""
    sbatch: str = ""
    cloud: str = ""
    gpu: str = "H100"
    kill_s: float = 120.0
    tick_s: float = 1.0

    def __post_init__(self) -> None:
        if not (0 < self.budget_usd < math.inf and 0 < self.rate_usd < math.inf):
            raise PlanError("--budget and --rate: want USD above 0")
        if self.at_end == "" or "\n" in self.at_end:
            raise PlanError("--at-end: want stay, poweroff or one line of shell")
        if self.work_s <= 1:
            raise PlanError(
                "--budget: nothing is left of it once time is kept to stop and to fetch"
            )

    @property
    def limit_s(self) -> float:
        """Seconds until the hard deadline."""
        return self.budget_usd / self.rate_usd * 3600

    @property
    def job_s(self) -> float:
        """Seconds after which nothing of the job lives."""
        return self.limit_s - (0 if self.at_end == "stay" else self.grace_s)

    @property
    def work_s(self) -> float:
        """Seconds after which the job is told to stop."""
        return self.job_s - self.kill_s


@dataclass(frozen=True)
class Plan:
    """A run, ready to be sent. `words`: of ./run_all.sh there; `steps`: their names; `files`: below
    `root`, here and there, with their sizes in bytes; `params`: of a single notebook."""

    name: str
    words: Sequence[str]
    steps: Sequence[str]
    terms: Terms
    root: Path
    files: Mapping[str, int]
    params: Mapping[str, Any] | None = None
    forecast_s: float | None = None
    git: Mapping[str, Any] = field(default_factory=dict)
    stages: Sequence[str] = ("verify", "environment", "accelerator")

    def boxed(self) -> dict[str, str]:
        """The run's small files there, by name."""
        terms, given = self.terms, "" if self.params is None else '-f "$FRESNEL_HOME/params.yaml" '
        shell = {name: getattr(terms, name) for name in ("at_end", "python", "tick_s")}
        for name in ("limit_s", "job_s", "stall_s", "kill_s"):
            shell[name] = max(1, round(getattr(terms, name)))
        shell["stages"] = " ".join(self.stages)
        variables = {"COMMIT": self.git.get("commit") or "unknown", "PYTHON": terms.python}
        begin = [f"export FRESNEL_{k}={shlex.quote(v)}\n" for k, v in variables.items() if v]
        job = f'./run_all.sh {shlex.join(self.words)} {given}--reports "$FRESNEL_HOME/out"'
        start = f"exec {job}\n"
        # each process of a study has one of those that Slurm, or the account, gives
        if terms.gpus > 1 and "study" in self.words[:1]:
            count = ",".join(map(str, range(terms.gpus)))
            start = (
                f'for gpu in $(echo "${{CUDA_VISIBLE_DEVICES:-{count}}}" | tr , " "); do\n'
                f'    CUDA_VISIBLE_DEVICES=$gpu {job} &\n    all="${{all:-}} $!"\ndone\n'
                'trap "kill -TERM $all" TERM\n'
                "for one in $all; do wait $one || bad=1; done\nwait\nexit ${bad:-0}\n"
            )
        return {
            "settings": "".join(f"{k}={shlex.quote(str(v))}\n" for k, v in shell.items()),
            "command": "".join(['cd "$FRESNEL_DIR/tree" || exit 2\n', *begin, start]),
            "sent.sha256": "".join(f"{sha256(self.root / n)}  {n}\n" for n in self.files),
            "params.yaml": json.dumps(dict(self.params or {}), indent=2) + "\n",  # JSON is YAML
            "diff.patch": _git(self.root, "diff", "HEAD", "--binary"),
        }

    def describe(self) -> list[str]:
        """Every step and what travels, a line each."""
        terms, sizes = self.terms, dict[str, list[int]]()
        for name, size in self.files.items():
            group = "/".join(name.split("/")[:3]) if name.startswith("runs/") else "the project"
            sizes.setdefault(group, []).append(size)
        changed = ", ".join(self.git.get("changed") or [])
        hours = (self.forecast_s or 0) / 3600
        known = f"{hours * 60:.1f} min, {hours * terms.rate_usd:.2f} USD" if hours else "none"
        waits = f", once results are fetched, or after {terms.grace_s:.0f} s"
        return [
            f"run       {self.name}: ./run_all.sh {shlex.join(self.words)}",
            f"commit    {self.git.get('commit')}",
            *([f"dirty     sent as it is: {changed}"] if changed else []),
            f"budget    {terms.budget_usd:g} USD: all ends after {terms.limit_s / 3600:.2f} h; "
            f"the forecast is {known}",
            "1         look at the machine, start the clock, upload what is not there yet of",
            *(f"          {len(s)} files, {sum(s) / 1e6:.1f} MB of {g}" for g, s in sizes.items()),
            f"2         set up: {', '.join(self.stages)}",
            f"3         run: {', '.join(self.steps)}",
            f"4         at the end: {terms.at_end}{'' if terms.at_end == 'stay' else waits}",
        ]


def sbatch(terms: Terms, folder: str, run: str) -> str:
    """A batch script in the run's folder: TERM reaches the supervisor 120 s before Slurm's limit, a
    preempted or lost job is queued again and goes on. The supervisor's deadline comes first."""
    lines = [f"--job-name={run[:60]}", f"--time={math.ceil(terms.limit_s / 60) + 3}"]
    lines += ["--signal=B:TERM@120", "--requeue", "--open-mode=append", "--output=slurm.log"]
    lines += [] if "--gres" in terms.sbatch else [f"--gres=gpu:{terms.gpus}"]
    start = f'cd && exec sh "{folder}/runs/{run}/box.sh" foreground "{folder}" "{run}"\n'
    lines = [f"#SBATCH {line}" for line in (*lines, *terms.sbatch.split())]
    return "\n".join(["#!/bin/sh", *lines, start])


def tasks(terms: Terms, folder: Path, run: str, name: str) -> dict[str, str]:
    """Files for SkyPilot, and for dstack to be applied by hand, of what is in `folder`. `name`: of
    SkyPilot's machine, which goes down once the supervisor, that waits for a fetch, is over."""
    gpu, place = f"{terms.gpu}:{terms.gpus}", "fresnel-box"
    mounts = {f"{place}/tree": f"{folder}/tree", f"{place}/runs/{run}": f"{folder}/run"}
    command = f"sh {place}/runs/{run}/box.sh foreground {place} {run}"
    sky = {
        "name": name,
        "resources": {
            "accelerators": gpu,
            "max_hourly_cost": terms.rate_usd,
            "autostop": {"idle_minutes": 5, "down": True},
            "disk_size": 128,
            **({"infra": terms.cloud} if terms.cloud else {}),
        },
        "file_mounts": {f"~/{there}": here for there, here in mounts.items()},
        "run": f"cd && {command}\n",
    }
    dstack = {
        "type": "task",
        "name": name,
        "files": [f"{here}:{there}" for there, here in mounts.items()],
        "commands": [command],
        "resources": {"gpu": gpu, "disk": "128GB.."},
        "max_price": terms.rate_usd,
        "max_duration": f"{math.ceil(terms.limit_s / 60) + 3}m",
        "stop_duration": f"{math.ceil(terms.kill_s / 60) + 3}m",
    }
    found = {"sky.yaml": sky, "run.dstack.yml": dstack}  # JSON is YAML
    return {file: json.dumps(task, indent=2) + "\n" for file, task in found.items()}


def make(
    name: str, steps: Sequence[Step], words: Sequence[str], terms: Terms, *, root: Path
) -> Plan:
    """Check all that can be known here of the `steps`, in order, of what ./run_all.sh runs there
    when given `words`, and, of a single notebook, its parameters.

    Raises PlanError that names what lacks: receipts of exactly this data, a forecast, money."""
    if "study" not in words[:1]:  # a run that shares its steps among GPUs wants a machine of them
        asked = [str(step.params.get("gpus", "")) for step in steps]
        terms = replace(terms, gpus=max(terms.gpus, *(int(n) for n in asked if n.isdigit()), 1))
    listed = _git(root, "ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0")
    never = {".git", ".venv", "runs", ""}
    files = [n for n in listed if n.split("/")[0] not in never and (root / n).is_file()]
    kept = [str(p.relative_to(root)) for p in root.glob("runs/receipts/**/*.json")]  # of captures
    if not files:
        raise PlanError(f"{root}: is no git checkout, so what belongs to it is unknown")
    problems, names, forecasts = list[str](), list[str](), list[float]()
    gated, smoked = set[str](), set[tuple[str, str]]()  # by the job itself
    for step in steps:
        full = {k: v.default for k, v in read_parameters(step.notebook).items()} | dict(step.params)
        where, model = str(full.get("dataset_dir") or ""), str(full.get("model", ""))
        number = step.notebook.stem[:2]
        try:
            if number == "01":
                gated.add(where)
            files += _read(root, step.params, gated)
            if number in ("02", "03") and where and where not in gated:
                smoke = number == "03" and model.startswith("cvs") and (where, model) not in smoked
                kinds = ["gate", "smoke-cvs"] if smoke else ["gate"]
                gpus = 1 if "study" in words[:1] else terms.gpus
                forecasts += _checked(root / where, kinds, full, number == "03", gpus)
                smoked.add((where, model))
        except (gate.GateRefusal, ValueError, OSError) as refusal:
            problems.append(f"{step.name}: {refusal}")
        if lacking := {*step.needs} - {other.name for other in steps}:
            problems.append(f"{step.name} needs {', '.join(sorted(lacking))}, made there: --only")
        control = " (a control: allow_failed_gate is set)" if full.get("allow_failed_gate") else ""
        names.append(step.name + control)
    needed_s = sum(forecasts) + SETUP_S
    if forecasts and needed_s > terms.work_s:
        problems.append(
            f"over budget: forecast and set-up take {needed_s / 60:.0f} of {terms.work_s / 60:.0f} "
            f"min, {needed_s / 3600 * terms.rate_usd:.2f} of {terms.budget_usd:g} USD. A forecast "
            "made here says little of a faster machine: run 02 there and fetch it"
        )
    if problems:
        raise PlanError("refused, nothing was connected to:\n  - " + "\n  - ".join(problems))
    return Plan(
        *(name, words, names, terms, root),
        files={name: (root / name).stat().st_size for name in [*files, *kept]},
        params=steps[0].params if "".join(words[:1]).endswith(".ipynb") else None,
        forecast_s=sum(forecasts) if forecasts else None,
        git=git_state(),
    )


def there(root: Path, key: str, value: str) -> str:
    """Where the file that `key` names lies in the project, which is what travels, or PlanError."""
    place = root / value
    if not place.is_relative_to(root) or ".." in place.parts:
        raise PlanError(f"{key} is {value}: link it into the project (ln -s) and name that")
    return str(place.relative_to(root))


def _read(root: Path, params: Mapping[str, Any], made: set[str]) -> list[str]:
    """The files that parameters name, but for those that the job makes; links are followed."""
    found = list[Path]()
    for key, value in params.items():
        if not isinstance(value, str) or not value or key in _MADE or value in made:
            continue
        place = root / value
        if place.exists():
            there(root, key, value)
            found += [place] if place.is_file() else filter(Path.is_file, place.rglob("*"))
        elif key == "dataset_dir":
            raise PlanError(f"no such dataset: {value}")
    return [str(path.relative_to(root)) for path in found]


def _checked(
    place: Path, kinds: Sequence[str], full: Mapping[str, Any], training: bool, gpus: int
) -> list[float]:
    """Require the receipts; of a full training its forecast on so many GPUs, in seconds."""
    data = dataset.open(place)
    receipts(data, kinds, bool(full.get("allow_failed_gate")))
    if not training:
        return []
    gpus = int(full["gpus"]) if str(full["gpus"]).isdigit() else gpus
    parts = forecast.parts_of_a_step(full["batch_size"], full["accumulate"], gpus)
    more = {"checkpointing": full["checkpointing"], "compile": full["compile_step"]}
    config = forecast.full_config(full["steps"], accumulate=parts, **more)
    what = {"size": full["size"], "batch_size": full["batch_size"], "gpus": gpus}
    model = str(full["model"]).partition("-")[0]
    for precision in ("bf16", "fp32") if full["precision"] == "auto" else (full["precision"],):
        chosen = replace(config, precision=precision)
        if plan := forecast.kept(data, forecast.settings_of(chosen, model=model, **what)):
            return [float(plan["duration_s"])]
    raise PlanError(
        f"no forecast for {full['steps']} steps; run 02 with -p full_steps {full['steps']} and the "
        "same model, size, batch_size, precision, compile_step, accumulate, checkpointing and gpus"
    )


def _git(root: Path, *words: str) -> str:
    """What git says of the project; nothing where it fails."""
    done = subprocess.run(["git", "-C", str(root), *words], capture_output=True)
    return done.stdout.decode("utf-8", "surrogateescape") if done.returncode == 0 else ""
