"""What a remote run is: checked, priced and listed before anything is connected to."""

from __future__ import annotations

import json
import math
import shlex
import subprocess
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fresnel import gate
from fresnel.data import dataset
from fresnel.host.files import sha256
from fresnel.report.params import read_parameters
from fresnel.report.provenance import git_state
from fresnel.study.runner import Step
from fresnel.training import forecast

SETUP_S = 300.0
"""Kept beside the forecast for the upload and the environment."""
_MADE = {"output_dir", "export_to", "reports_dir"}
"""Parameters that name what a run makes, not what it reads."""
_STAGE = 'sh "$FRESNEL_HOME/box.sh" {} "$FRESNEL_DIR" "$FRESNEL_RUN"'
STAGES = tuple((name, _STAGE.format(name)) for name in ("verify", "environment", "accelerator"))


class PlanError(ValueError):
    """A run that is refused before it costs anything; says what is missing."""


@dataclass(frozen=True)
class Terms:
    """What may be spent, and how it ends. `at_end`: "stay", "poweroff" or a command of the
    machine's shell; until that `grace_s` are kept for fetching; `kill_s` from TERM to KILL;
    `stall_s`: without any progress the run has failed; `python`: there, used as it is."""

    budget_usd: float
    rate_usd: float
    at_end: str = "stay"
    grace_s: float = 1800.0
    stall_s: float = 1800.0
    gpus: int = 1
    python: str = ""
    kill_s: float = 120.0
    tick_s: float = 1.0

    def __post_init__(self) -> None:
        for name in ("budget_usd", "rate_usd"):
            if not 0 < getattr(self, name) < math.inf:
                raise PlanError(f"--{name[:-4]}: got {getattr(self, name)!r}, want USD above 0")
        if self.at_end == "" or "\n" in self.at_end:
            raise PlanError("--at-end: want stay, poweroff or one line of shell")
        if self.limit_s <= self.reserve_s + 1:
            raise PlanError(
                f"{self.budget_usd:g} USD at {self.rate_usd:g} an hour is {self.limit_s:.0f} s; "
                f"{self.reserve_s:.0f} s of that are kept to stop and to fetch: nothing is left"
            )

    @property
    def limit_s(self) -> float:
        """Seconds until the hard deadline."""
        return self.budget_usd / self.rate_usd * 3600

    @property
    def reserve_s(self) -> float:
        return self.kill_s + (0 if self.at_end == "stay" else self.grace_s)


@dataclass(frozen=True)
class Plan:
    """A run, ready to be sent. `words`: of ./run_all.sh there; `files`: below `root`, here and
    there; `params`: of a single notebook."""

    name: str
    words: tuple[str, ...]
    terms: Terms
    root: Path
    files: tuple[str, ...]
    params: Mapping[str, Any] | None = None
    forecast_s: float | None = None
    notes: tuple[str, ...] = ()
    git: Mapping[str, Any] = field(default_factory=dict)
    diff: str = ""
    stages: tuple[tuple[str, str], ...] = STAGES

    @property
    def bytes(self) -> int:
        return sum((self.root / name).stat().st_size for name in self.files)

    def boxed(self) -> dict[str, str]:
        """The run's small files there, by name."""
        terms = self.terms
        seconds = ("limit_s", "grace_s", "stall_s", "kill_s")
        shell = {name: max(1, round(getattr(terms, name))) for name in seconds}
        shell |= {name: getattr(terms, name) for name in ("tick_s", "at_end", "python")}
        given = "" if self.params is None else '-f "$FRESNEL_HOME/params.yaml" '
        job = f'./run_all.sh {shlex.join(self.words)} {given}--reports "$FRESNEL_HOME/out"'
        start = f"exec {job}\n"
        if terms.gpus > 1:
            start = (
                f"for gpu in {' '.join(map(str, range(terms.gpus)))}; do\n"
                f'    CUDA_VISIBLE_DEVICES=$gpu {job} &\n    all="${{all:-}} $!"\ndone\n'
                'trap "kill -TERM $all" TERM\n'
                "for one in $all; do wait $one || bad=1; done\nwait\nexit ${bad:-0}\n"
            )
        python = f"export FRESNEL_PYTHON={shlex.quote(terms.python)}\n" if terms.python else ""
        commit = shlex.quote(str(self.git.get("commit") or "unknown"))
        begin = f'cd "$FRESNEL_DIR/tree" || exit 2\nexport FRESNEL_COMMIT={commit}\n{python}'
        return {
            "settings": "".join(f"{k}={shlex.quote(str(v))}\n" for k, v in shell.items()),
            "stages": "".join(f"{name} {command}\n" for name, command in self.stages),
            "command": begin + start,
            "sent.sha256": "".join(f"{sha256(self.root / n)}  {n}\n" for n in self.files),
            "params.yaml": json.dumps(dict(self.params or {}), indent=2) + "\n",  # JSON is YAML
        }

    def describe(self) -> list[str]:
        """Every step and what travels, a line each."""
        terms, sizes = self.terms, dict[str, list[int]]()
        for name in self.files:
            group = "/".join(name.split("/")[:3]) if name.startswith("runs/") else "the project"
            sizes.setdefault(group, []).append((self.root / name).stat().st_size)
        changed = self.git.get("changed") or []
        dirty = f"dirty: {', '.join(changed[:5])}" if changed else "clean"
        minutes = (self.forecast_s or 0) / 60
        known = f"{minutes:.1f} min, {minutes / 60 * terms.rate_usd:.2f} USD"
        known = "none: the job makes its own data" if self.forecast_s is None else known
        waits = "" if terms.at_end == "stay" else f", after {terms.grace_s:.0f} s for a fetch"
        return [
            f"run       {self.name}: ./run_all.sh {shlex.join(self.words)}",
            f"commit    {self.git.get('commit') or 'unknown'}, {dirty}",
            *(f"note      {note}" for note in self.notes),
            f"forecast  {known}",
            f"budget    {terms.budget_usd:g} USD at {terms.rate_usd:g} an hour: "
            f"all ends after {terms.limit_s / 3600:.2f} h",
            *(f"send      {len(s)} files, {sum(s) / 1e6:.1f} MB of {g}" for g, s in sizes.items()),
            f"stages    {', '.join(name for name, _ in self.stages)}, then the run",
            f"at end    {terms.at_end}{waits}",
        ]


def make(
    name: str,
    steps: Sequence[Step],
    words: Sequence[str],
    terms: Terms,
    *,
    root: Path,
    single: bool = False,
    study: bool = False,
) -> Plan:
    """Check everything that can be known here.

    Args:
        steps: of the notebook, profile or study, in order.
        words: what ./run_all.sh is given there; of a single notebook its parameters are added.

    Raises:
        PlanError: names all that is missing: receipts of exactly this data, a forecast, money.
    """
    if terms.gpus > 1 and not study:
        raise PlanError("--gpus: one run uses one GPU; a study uses several")
    listed = _git(root, "ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0")
    never = {".git", ".venv", "runs", ""}
    files = [n for n in listed if n.split("/")[0] not in never and (root / n).is_file()]
    kept = sorted((root / "runs/receipts").rglob("*.json"))  # of captures, which keep none
    if not files:
        raise PlanError(f"{root}: is no git checkout, so what belongs to it is unknown")
    problems, notes, forecasts = list[str](), list[str](), list[float]()
    made: dict[str, set[str]] = {}
    for step in steps:
        full = {k: v.default for k, v in read_parameters(step.notebook).items()} | dict(step.params)
        where, stem = str(full.get("dataset_dir") or ""), step.notebook.stem[:2]
        smoke = f"smoke-{full.get('model', '')}"
        if where and stem in ("01", "02"):
            made.setdefault(where, set()).add("gate" if stem == "01" else smoke)
        theirs = made.get(where, set())
        try:
            for key, value in step.params.items():
                if isinstance(value, str) and value and key not in _MADE:
                    files += [] if "gate" in made.get(value, ()) else _read(root, key, value)
            if where and stem in ("02", "03") and "gate" not in theirs:
                of_cvs = stem == "03" and smoke.startswith("smoke-cvs")
                kinds = {"gate", *(["smoke-cvs"] if of_cvs else [])} - theirs
                forecasts += _checked(root / where, sorted(kinds), full, stem == "03")
        except (gate.GateRefusal, ValueError, OSError) as refusal:
            problems.append(f"{step.name}: {refusal}")
        if full.get("allow_failed_gate"):
            notes.append(f"{step.name} is a control: allow_failed_gate is set")
    needed_s = sum(forecasts) + SETUP_S + terms.reserve_s
    if forecasts and needed_s > terms.limit_s:
        problems.append(
            f"over budget: a forecast of {sum(forecasts) / 60:.0f} min, with time to set up, stop "
            f"and fetch, costs {needed_s / 3600 * terms.rate_usd:.2f} USD of {terms.budget_usd:g}. "
            "A forecast made here says little of a faster machine: run 02 there and fetch it"
        )
    if problems:
        raise PlanError("refused, nothing was connected to:\n  - " + "\n  - ".join(problems))
    git = git_state()
    if git["dirty"]:
        notes.append("the tree is dirty; it is sent as it is")
    return Plan(
        *(name, tuple(words), terms, root),
        tuple(dict.fromkeys([*files, *(str(path.relative_to(root)) for path in kept)])),
        params=steps[0].params if single else None,
        forecast_s=sum(forecasts) if forecasts else None,
        notes=tuple(notes),
        git=git,
        diff=_git(root, "diff", "HEAD", "--binary"),
    )


def there(root: Path, key: str, value: str) -> str:
    """Where the file that `key` names lies in the project, which is what travels.

    Raises PlanError if it lies elsewhere."""
    place = root / value
    if not place.is_relative_to(root) or ".." in place.parts:
        raise PlanError(f"{key} is {value}: link it into the project (ln -s) and name that")
    return str(place.relative_to(root))


def _read(root: Path, key: str, value: str) -> list[str]:
    """The files that a parameter names, if it names any; links are followed."""
    place = root / value
    if not place.exists():
        if key == "dataset_dir":
            raise PlanError(f"no such dataset: {value}")
        return []
    there(root, key, value)
    found = [place] if place.is_file() else [p for p in place.rglob("*") if p.is_file()]
    return [str(p.relative_to(root)) for p in found]


def _checked(
    place: Path, kinds: Sequence[str], full: Mapping[str, Any], training: bool
) -> list[float]:
    """Require the receipts; of a full training its forecast, in seconds."""
    data: Any = dataset.open(place)
    for kind in kinds:
        gate.require_receipt(data, kind, bool(full.get("allow_failed_gate")))
        # the files were hashed for the first one
        same = ("path", "content_hash", "layout")
        data = types.SimpleNamespace(**{name: getattr(data, name) for name in same})
    if not training:
        return []
    names = ("steps", "checkpointing", "accumulate")
    config = forecast.full_config(**{n: full[n] for n in names}, compile=full["compile_step"])
    what = {name: full[name] for name in ("size", "batch_size")}
    model = str(full["model"]).partition("-")[0]
    for precision in ("bf16", "fp32") if full["precision"] == "auto" else (full["precision"],):
        chosen = replace(config, precision=precision)
        if plan := forecast.kept(data, forecast.settings_of(chosen, model=model, **what)):
            return [float(plan["duration_s"])]
    raise PlanError(
        f"no forecast for {full['steps']} steps with these settings; run: ./run_all.sh "
        f"notebooks/02_smoke_train.ipynb -p dataset_dir {place} -p full_steps {full['steps']} and "
        "the same model, size, batch_size, precision, compile_step, accumulate, checkpointing"
    )


def _git(root: Path, *words: str) -> str:
    """What git says of the project; nothing where it fails."""
    done = subprocess.run(["git", "-C", str(root), *words], capture_output=True)
    return done.stdout.decode("utf-8", "surrogateescape") if done.returncode == 0 else ""


def sbatch(terms: Terms, folder: str, run: str, options: str = "") -> str:
    """A batch script in the run's folder: TERM reaches the supervisor 120 s before Slurm's limit, a
    preempted or lost job is queued again and goes on from its checkpoint. The supervisor's own
    deadline, counted from its first start, comes before Slurm's."""
    lines = [
        f"--job-name={run[:60]}",
        f"--time={math.ceil(terms.limit_s / 60) + 3}",
        *("--signal=B:TERM@120", "--requeue", "--open-mode=append", "--output=slurm.log"),
        *([f"--gres=gpu:{terms.gpus}"] if "--gres" not in options else []),
        *options.split(),
    ]
    # exec: the signal is for the supervisor
    start = f'cd && exec sh "{folder}/runs/{run}/box.sh" foreground "{folder}" "{run}"\n'
    return "#!/bin/sh\n" + "".join(f"#SBATCH {line}\n" for line in lines) + start
