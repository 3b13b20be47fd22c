"""Many runs from one YAML file: notebooks, their parameters, seeds, needs and expected verdicts.

A profile is a small study, run by one process in the order of its file.  Any number of processes
may share a large one: each takes the next step that is in nobody's hands and whose needs are
finished.  Stopped ones are called again and go on; a training resumes from its checkpoint.
"""

import math
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import msgspec
import yaml

from fresnel.host.files import locked, read_json
from fresnel.host.machine import project_root
from fresnel.report import run as report
from fresnel.report.params import check_parameters, read_parameters
from fresnel.report.record import slug

MAIN_DOMAIN = "faces"
"""What the main job is about where nobody says."""
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


class _Entry(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    notebook: str
    params: dict[str, Any] = {}
    expect: str | None = None
    needs: str | list[str] = []
    seeds: list[int] = []
    domain: str = ""


_some = msgspec.Meta(min_length=1)
_Stages = Annotated[dict[str, Annotated[list[_Entry], _some]], _some]
_Domains = dict[str, dict[str, str]]


def load(path: str | Path, *, runs: str | Path = "runs", domain: str = MAIN_DOMAIN) -> list[Step]:
    """Read a study: a list of {name, notebook, params, expect, needs, seeds, domain}, or a mapping
    with such lists under "stages", by name (keys other than these two hold YAML anchors).

    A step with seeds: [0, 1] becomes the steps NAME-s0 and NAME-s1 with the parameter `seed`.  A
    `needs` that names a step with seeds means that of the same seed, or all of them.  In texts
    {seed} is the seed, {runs} the folder of data and weights, {domain} "objects" or "faces", and
    {NAME} what "domains" has by that name for this one.  A step that names the other domain is left
    out, and nothing needs it.  Notebooks are relative to the project.

    Order is priority: stage by stage, and in a stage all steps of a seed before those of the next,
    so that a study which is stopped has every arm once rather than the first arms three times.

    Raises:
        StudyError: if the file is no study.
    """
    source = Path(path)
    content = read_yaml(source)
    named = content.get("domains", {}) if isinstance(content, dict) else {}
    content = content.get("stages") if isinstance(content, dict) else {"": content}
    try:
        every = msgspec.convert(content, _Stages).values()
        texts = dict(msgspec.convert(named, _Domains).get(domain, {}))
    except msgspec.ValidationError as error:
        raise StudyError(
            f"{source}: must hold a list of steps, or lists of them in 'stages' and texts for each "
            f"domain in 'domains': {error}"
        ) from None
    texts |= {"runs": str(runs), "domain": domain}
    stages = [[entry for entry in stage if entry.domain in ("", domain)] for stage in every]
    elsewhere = {e.name for stage in every for e in stage} - {e.name for s in stages for e in s}
    seeds = {entry.name: entry.seeds or (None,) for stage in stages for entry in stage}
    steps, before = list[Step](), set[str]()
    for stage in stages:
        turn, made = dict[str, int](), []  # the seed whose turn it is, or a later one's it needs
        for entry, seed in ((e, seed) for e in stage for seed in seeds[e.name]):
            params = dict(entry.params)
            for key, value in params.items():
                if isinstance(value, str):
                    for name, text in {**texts, "seed": str(seed)}.items():
                        value = value.replace(f"{{{name}}}", text)
                    params[key] = value
            if seed is not None:
                params["seed"] = seed
            needs: list[str] = []
            for need in [entry.needs] if isinstance(entry.needs, str) else entry.needs:
                if need in elsewhere:
                    continue
                theirs = seeds.get(need, (None,))
                needs += [_seeded(need, s) for s in ([seed] if seed in theirs else theirs)]
            name, notebook = _seeded(entry.name, seed), project_root() / entry.notebook
            turn[name] = max(-1 if seed is None else seed, *(turn.get(n, -1) for n in needs), -1)
            made.append(Step(name, notebook, params, entry.expect, (*needs,)))
        steps += sorted(made, key=lambda step: turn[step.name])
    for step in steps:
        missing = [need for need in step.needs if need not in before]
        if missing:
            raise StudyError(f"{source}: {step.name} needs {', '.join(missing)}, no step before it")
        if step.name in before:
            raise StudyError(f"{source}: two steps have the same name, {step.name}")
        before.add(step.name)
    return steps


def _seeded(name: str, seed: int | None) -> str:
    return name if seed is None else f"{name}-s{seed}"


def read_yaml(path: Path) -> Any:
    """The content of a YAML file; raises StudyError if it cannot be read."""
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise StudyError(f"{path}: cannot be read ({error.strerror})") from error
    except yaml.YAMLError as error:
        raise StudyError(f"{path}: is not valid YAML: {error}") from error


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
    new = {
        notebook: {name: has[name].parse(text) for name, text in values.items() if name in has}
        for notebook, has in known.items()
    }
    return [replace(step, params={**step.params, **new[step.notebook]}) for step in steps]


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
    reports, waiting = report.reports_folder(reports_dir), chosen(steps, only)
    by_name, begun = {step.name: step for step in steps}, datetime.now(UTC)
    end = math.inf if stop_after_s is None else time.monotonic() + stop_after_s
    width = max(len(step.name) for step in waiting)
    leads = {
        step.name: f"[{number}/{len(waiting)}] {step.name:<{width}}"
        for number, step in enumerate(waiting, 1)
    }
    problems, folders, done, failed = list[str](), dict[str, Path](), set[str](), set[str]()

    def missing(step: Step) -> list[str]:
        later = done | failed | {other.name for other in waiting}
        done.update(n for n in {*step.needs} - later if finished(by_name[n], reports))
        return [need for need in step.needs if need not in done]

    def take(step: Step) -> None:
        if _given_up(step, reports, f"{begun:%Y-%m-%dT%H:%M:%S}"):
            failed.add(step.name)
            print(f"{leads[step.name]}  failed in another process; see there", flush=True)
            return
        left_s = end - time.monotonic()
        limit_s = min(timeout_s or math.inf, left_s)
        try:
            made = report.run(
                step.notebook, _filled(step.params, folders, reports), step.name, reports,
                fresh=fresh, timeout_s=None if limit_s == math.inf else limit_s,
                label=leads[step.name].rstrip(),
            )  # fmt: skip
        except Exception as error:  # such as a full disk: the steps that are left may fare better
            failed.add(step.name)
            kind = "" if isinstance(error, StudyError) else f"{type(error).__name__}: "
            problems.append(f"{step.name}: {kind}{error}")
            return
        record, folders[step.name] = made.record, made.directory
        print(f"{leads[step.name]}  {report.line(made)}", flush=True)
        if made.problem:
            problems.append(f"{step.name}: {made.problem}")
        if made.crashed or record.verdict == "REFUSED":
            failed.add(step.name)
        if (record.failure or {}).get("kind") == "timed_out" and limit_s == left_s:
            return  # what time stopped goes on in the next call
        if record.status == "crashed":
            problems.append(f"{step.name} crashed: {record.error}")
        elif record.verdict == "REFUSED":
            problems.append(f"{step.name} was refused: {record.summary}")
        elif step.expect and record.verdict != step.expect:
            was = f"{record.verdict}, but {step.expect} was expected"
            problems.append(f"{step.name} ended with {was}.")

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


def chosen(steps: Sequence[Step], only: Sequence[str]) -> list[Step]:
    """The steps named in `only`, or all; their parameters are as their notebooks take them."""
    names = {step.name: {step.name, re.sub(r"-s\d+$", "", step.name)} for step in steps}
    unknown = set(only) - set().union(*names.values())
    if unknown:
        raise StudyError(f"no step named {', '.join(sorted(unknown))}; want {', '.join(names)}")
    chosen = [step for step in steps if not only or names[step.name] & set(only)]
    for step in chosen:
        try:
            check_parameters(read_parameters(step.notebook), step.params)
        except (ValueError, OSError) as error:
            raise StudyError(f"step {step.name}: {error}") from error
    return chosen


def _given_up(step: Step, reports: Path, since: str) -> bool:
    """Whether other processes have tried the step since then in vain: twice, as a crash may come
    of sharing a GPU's memory; once, where the protocol refused it."""
    tries = 0
    for _, record in _runs(reports, step.name, step.params):
        if record.get("started_utc", "") >= since:
            cut_short = (record.get("failure") or {}).get("kind") in (
                "timed_out",
                "stopped",
                "died",
            )
            tries += record.get("status") == "crashed" and not cut_short
            tries += 2 * (record.get("verdict") == "REFUSED")
    return tries > 1


def finished(step: Step, reports: Path) -> bool:
    """Whether a run of the step's name and parameters has a verdict, or its weights are there."""
    return _is_given(step) or any(
        record.get("status") == "finished" and record.get("verdict") != "REFUSED"
        for _, record in _runs(reports, step.name, step.params)
    )


def _is_given(step: Step) -> bool:
    """Whether the file that a step would export was made with its very parameters, elsewhere."""
    place = project_root() / step.params.get("export_to", "")
    if not place.is_file():
        return False
    from fresnel.models.weights import read_header
    from fresnel.study.results import PLACES

    try:
        made = read_header(place).get("params")
    except ValueError:  # damaged: to be made again
        return False
    wanted = {name: value for name, value in step.params.items() if name not in PLACES}
    return isinstance(made, dict) and all(made.get(k) == value for k, value in wanted.items())


def _filled(
    params: Mapping[str, Any], folders: Mapping[str, Path], reports: Path
) -> dict[str, Any]:
    """Parameters with every {run:NAME} replaced by the folder of that step's run."""

    def folder(found: re.Match[str]) -> str:
        older = (at for at, record in _runs(reports, found[1]) if record["status"] == "finished")
        place = folders.get(found[1]) or next(older, None)
        if place is None:
            raise StudyError(f"no finished run of step {found[1]!r} is there yet: run it first")
        return str(place)

    texts = {key: value for key, value in params.items() if isinstance(value, str)}
    return {**params, **{key: re.sub(r"{run:(.*?)}", folder, texts[key]) for key in texts}}


def _runs(
    reports: Path, name: str, params: Mapping[str, Any] | None = None
) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Folder and record of the runs of a step's name and parameters, newest first."""
    wanted = {k: value for k, value in (params or {}).items() if "{run:" not in str(value)}
    for results in sorted(reports.glob(f"runs/*Z-{slug(name)}*/results.json"), reverse=True):
        try:
            record = read_json(results)
        except (OSError, ValueError):
            continue
        if isinstance(record, dict) and record.get("name") == name:
            has = record.get("params", {})
            if all(has.get(key) == value for key, value in wanted.items()):
                yield results.parent.resolve(), record
