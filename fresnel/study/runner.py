"""Many runs from one YAML file: notebooks, their parameters, seeds, needs and expected verdicts.

A profile is a small study, run by one process in the order of its file.  Any number of processes
may share a large one: each takes the next step that is in nobody's hands and whose needs are
finished.  Stopped ones are called again and go on; a training resumes from its checkpoint.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from fresnel.host.files import locked
from fresnel.host.machine import project_root
from fresnel.report import run as report
from fresnel.report.params import check_parameters, read_parameters
from fresnel.report.record import RunRecord, slug

_WAIT_S = 3.0


class StudyError(ValueError):
    """A file that does not say what to run."""


@dataclass(frozen=True)
class Step:
    """One notebook of a study. `expect`: the verdict it must end with; `needs`: the steps that must
    be finished before it. A text in `params` may hold {run:NAME}, the folder of step NAME's run."""

    name: str
    notebook: Path
    params: Mapping[str, Any] = field(default_factory=dict)
    expect: str | None = None
    needs: tuple[str, ...] = ()


def load(path: str | Path, *, runs: str | Path = "runs") -> list[Step]:
    """Read a study: a list of {name, notebook, params, expect, needs, seeds}, or a mapping with
    such lists under "stages", by name (its other keys hold YAML anchors).

    A step with seeds: [0, 1] becomes the steps NAME-s0 and NAME-s1 with the parameter `seed`.  A
    `needs` that names a step with seeds means that of the same seed, or all of them.  In texts
    {seed} is the seed and {runs} the folder of data and weights.  Notebooks are relative to the
    project.

    Order is priority: stage by stage, and in a stage all steps of a seed before those of the next,
    so that a study which is stopped has every arm once rather than the first arms three times.

    Raises:
        StudyError: if the file is no study.
    """
    source = Path(path)
    content = read_yaml(source)
    named = content.get("stages") if isinstance(content, dict) else {"": content}
    stages: list[Any] = list(named.values()) if isinstance(named, dict) else [None]
    if not stages or not all(
        stage and isinstance(stage, list) and all(isinstance(entry, dict) for entry in stage)
        for stage in stages
    ):
        raise StudyError(f"{source}: must hold a list of steps, or lists of them in 'stages'")
    seeds = {entry.get("name"): entry.get("seeds") or () for stage in stages for entry in stage}
    steps: list[Step] = []
    for stage in stages:
        turn = dict[str, int]()  # the seed whose turn it is, or a later one's that it needs
        made = []
        for number, entry in enumerate(stage, 1):
            for seed in entry.get("seeds") or (None,):
                step = _step(entry, seed, seeds, str(runs), f"{source}, step {number}")
                turns = [turn.get(need, -1) for need in step.needs]
                turn[step.name] = max([-1 if seed is None else seed, *turns])
                made.append(step)
        steps += sorted(made, key=lambda step: turn[step.name])
    before = set[str]()
    for step in steps:
        missing = [need for need in step.needs if need not in before]
        if missing:
            raise StudyError(f"{source}: {step.name} needs {', '.join(missing)}, no step before it")
        if step.name in before:
            raise StudyError(f"{source}: two steps have the same name, {step.name}")
        before.add(step.name)
    return steps


def _step(
    entry: Mapping[str, Any],
    seed: int | None,
    seeds: Mapping[Any, Sequence[int]],
    runs: str,
    where: str,
) -> Step:
    if not {"name", "notebook"} <= entry.keys():
        raise StudyError(f"{where}: needs 'name' and 'notebook'")
    known = {"name", "notebook", "params", "expect", "needs", "seeds"}
    unknown = entry.keys() - known
    if unknown:
        raise StudyError(f"{where}: does not know {', '.join(sorted(unknown))}")
    params = dict(entry.get("params") or {})
    for key, value in params.items():
        if isinstance(value, str):
            params[key] = value.replace("{runs}", runs).replace("{seed}", str(seed))
    name = str(entry["name"])
    if seed is not None:
        name, params["seed"] = f"{name}-s{seed}", seed
    asked = entry.get("needs") or ()
    needs: list[str] = []
    for need in (asked,) if isinstance(asked, str) else asked:
        theirs = seeds.get(need) or ()
        same = [seed] if seed in theirs else theirs
        needs += [f"{need}-s{one}" for one in same] if theirs else [need]
    return Step(name, project_root() / entry["notebook"], params, entry.get("expect"), (*needs,))


def override(steps: Sequence[Step], values: Mapping[str, str]) -> list[Step]:
    """The steps with other parameters, each in every step whose notebook has it: a rehearsal.

    Args:
        values: name -> text, as on a command line.

    Raises:
        StudyError: for a name that no step's notebook has, or the seed, which the study sets.
        ParameterError: for a value that it cannot take.
    """
    known = {step.notebook: read_parameters(step.notebook) for step in steps}
    for name in values:
        if name == "seed" or not any(name in parameters for parameters in known.values()):
            raise StudyError(f"{name}: no notebook of this study has it, or the study sets it")

    def new(notebook: Path) -> dict[str, Any]:
        theirs = known[notebook]
        return {name: theirs[name].parse(text) for name, text in values.items() if name in theirs}

    return [replace(step, params={**step.params, **new(step.notebook)}) for step in steps]


def run(
    steps: Sequence[Step],
    reports_dir: str | Path | None = None,
    *,
    only: Sequence[str] = (),
    fresh: bool = False,
    keep_finished: bool = True,
    timeout_s: float | None = None,
    stop_after_s: float | None = None,
) -> list[str]:
    """Run what is to be done of a study, in this process, a printed line each; then make the index.

    A step is finished when a run of its name with its very parameters has a verdict (not REFUSED).
    A step that crashes or is refused stops only those that need it; another process tries a
    crashed one once more, a refused one not before the next call.  An unexpected verdict is a
    problem to report and stops nothing.

    Args:
        only: names of steps (with or without their seed); what they need must be finished.
        fresh: compute these steps in any case.
        keep_finished: leave a finished step alone whatever the code was then, as GPU hours are not
            to be spent again for a changed comment; False: of a profile, whose steps are computed
            again where code or data have changed.
        timeout_s: most that a step may take.
        stop_after_s: start nothing later than that, and stop what runs then; a training saves a
            checkpoint, and the next call goes on.

    Returns:
        The problems, a sentence each; steps that time or another process kept are none.
    """
    reports = report.reports_folder(reports_dir)
    chosen = _chosen(steps, only)
    by_name, begun = {step.name: step for step in steps}, datetime.now(UTC)
    end = math.inf if stop_after_s is None else time.monotonic() + stop_after_s
    width = max(len(step.name) for step in chosen)
    leads = {
        step.name: f"[{number}/{len(chosen)}] {step.name:<{width}}"
        for number, step in enumerate(chosen, 1)
    }
    waiting, problems, folders = list(chosen), list[str](), dict[str, Path]()
    done, failed = set[str](), set[str]()

    def missing(step: Step) -> list[str]:
        later = failed | {other.name for other in waiting}
        new = set(step.needs) - done - later
        done.update(need for need in new if finished(by_name[need], reports))
        return [need for need in step.needs if need not in done]

    def take(step: Step) -> None:
        lead, left_s = leads[step.name], end - time.monotonic()
        if _given_up(step, reports, begun):
            failed.add(step.name)
            print(f"{lead}  failed in another process; see there", flush=True)
            return
        limit_s = min(timeout_s or math.inf, left_s)
        try:
            made = report.run(
                step.notebook, _with_folders(step.params, folders, reports), step.name, reports,
                fresh=fresh, timeout_s=None if limit_s == math.inf else limit_s,
                label=lead.rstrip(),
            )  # fmt: skip
        except Exception as error:  # such as a full disk: the steps that are left may fare better
            failed.add(step.name)
            kind = "" if isinstance(error, StudyError) else f"{type(error).__name__}: "
            problems.append(f"{step.name}: {kind}{error}")
            return
        folders[step.name] = made.directory
        print(f"{lead}  {report.line(made)}", flush=True)
        if made.problem:
            problems.append(f"{step.name}: {made.problem}")
        if made.crashed or made.record.verdict == "REFUSED":
            failed.add(step.name)
        problem = _problem(step, made.record)
        stopped = (made.record.failure or {}).get("kind") == "timed_out" and limit_s == left_s
        if problem and not stopped:  # what time stopped goes on in the next call
            problems.append(problem)

    try:
        while waiting:
            if time.monotonic() >= end:
                names = [step.name for step in waiting if not finished(step, reports)]
                print(f"time is up; left for the next call: {', '.join(names)}", flush=True)
                break
            ready = [step for step in waiting if not missing(step)]
            for step in ready:
                with locked(reports / ".study" / f"{slug(step.name)}.lock", wait=False) as mine:
                    if not mine:
                        continue
                    waiting.remove(step)
                    if fresh or not (keep_finished and finished(step, reports)):
                        take(step)
                break  # what it made ready may come before what follows
            else:
                if ready:  # in other hands
                    time.sleep(_WAIT_S)
                    continue
                for step in waiting:
                    needs = ", ".join(missing(step))
                    print(f"{leads[step.name]}  LEFT OUT  (needs {needs})", flush=True)
                    problems.append(f"{step.name} was left out: it needs {needs}.")
                break
    finally:
        problem = report.try_index(reports)
    return [*problems, problem] if problem else problems


def _chosen(steps: Sequence[Step], only: Sequence[str]) -> list[Step]:
    """The steps named in `only`, or all; their parameters are as their notebooks take them."""
    names = {step.name: {step.name, _stem(step.name)} for step in steps}
    unknown = set(only) - set().union(*names.values())
    if unknown:
        raise StudyError(f"no step named {', '.join(sorted(unknown))} here; it has: "
                         f"{', '.join(names)}")  # fmt: skip
    chosen = [step for step in steps if not only or names[step.name] & set(only)]
    for step in chosen:
        try:
            check_parameters(read_parameters(step.notebook), step.params)
        except (ValueError, OSError) as error:
            raise StudyError(f"step {step.name}: {error}") from error
    return chosen


def _problem(step: Step, record: RunRecord) -> str | None:
    if record.status == "crashed":
        return f"{step.name} crashed: {record.error}"
    if record.verdict == "REFUSED":
        return f"{step.name} was refused: {record.summary}"
    if step.expect and record.verdict != step.expect:
        return f"{step.name} ended with {record.verdict}, but {step.expect} was expected."
    return None


def _given_up(step: Step, reports: Path, since: datetime) -> bool:
    """Whether other processes have tried the step since then in vain: twice, as a crash may come
    of sharing a GPU's memory; once, where the protocol refused it."""
    tries = 0
    for record in _records(step, reports):
        if record.get("started_utc", "") < f"{since:%Y-%m-%dT%H:%M:%S}":
            continue
        cut_short = (record.get("failure") or {}).get("kind") in ("timed_out", "stopped")
        if record.get("verdict") == "REFUSED":
            tries += 2
        elif record.get("status") == "crashed" and not cut_short:
            tries += 1
    return tries > 1


def finished(step: Step, reports: Path) -> bool:
    """Whether a run of the step's name and parameters has a verdict."""
    return any(
        record.get("status") == "finished" and record.get("verdict") != "REFUSED"
        for record in _records(step, reports)
    )


def read_yaml(path: Path) -> Any:
    """The content of a YAML file; raises StudyError if it cannot be read."""
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise StudyError(f"{path}: cannot be read ({error.strerror})") from error
    except yaml.YAMLError as error:
        raise StudyError(f"{path}: is not valid YAML: {error}") from error


def _with_folders(
    params: Mapping[str, Any], folders: Mapping[str, Path], reports: Path
) -> dict[str, Any]:
    """Parameters with every {run:NAME} replaced by the folder of that step's run."""
    filled = dict(params)
    for key, value in filled.items():
        while isinstance(value, str) and "{run:" in value:
            before, _, rest = value.partition("{run:")
            name, _, after = rest.partition("}")
            value = filled[key] = f"{before}{folders.get(name) or _latest(reports, name)}{after}"
    return filled


def _latest(reports: Path, name: str) -> Path:
    for results, record in _runs(reports, name):
        if record.get("status") == "finished":
            return results.parent.resolve()
    raise StudyError(f"no finished run of step {name!r} is there yet: run it first")


def _records(step: Step, reports: Path) -> Iterator[dict[str, Any]]:
    """What the runs of the step's name and parameters left, newest first."""
    wanted = {key: value for key, value in step.params.items() if "{run:" not in str(value)}
    for _, record in _runs(reports, step.name):
        params = record.get("params", {})
        if all(params.get(key) == value for key, value in wanted.items()):
            yield record


def _runs(reports: Path, name: str) -> Iterator[tuple[Path, dict[str, Any]]]:
    for results in sorted(reports.glob(f"runs/*Z-{slug(name)}*/results.json"), reverse=True):
        try:
            record = json.loads(results.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(record, dict) and record.get("name") == name:
            yield results, record


def _stem(name: str) -> str:
    stem, _, seed = name.rpartition("-s")
    return stem if seed.isdigit() else name
