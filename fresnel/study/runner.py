"""A study: many runs and their seeds, from one YAML file, shared by as many processes as there are.

    CUDA_VISIBLE_DEVICES=0 python -m fresnel study notebooks/params/study.yaml &
    CUDA_VISIBLE_DEVICES=1 python -m fresnel study notebooks/params/study.yaml

Each process takes the next step that is neither finished nor in another's hands and whose needs
are finished.  Stopped ones are called again and go on: finished steps stay finished, a training
resumes from its checkpoint.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fresnel.host import provenance
from fresnel.host.locks import lock_if_free
from fresnel.report import run as report
from fresnel.report.params import check_parameters, read_parameters
from fresnel.study import profiles
from fresnel.study.profiles import ProfileError, Step

_WAIT_S = 3.0


def load(path: str | Path, *, runs: str | Path = "runs") -> list[Step]:
    """Read a study: a profile whose steps may have "seeds", in stages.

    The file is a list of steps as `profiles.load_profile` reads them, or a mapping with such lists
    under "stages", by name (its other keys hold YAML anchors).  A step with seeds: [0, 1] becomes
    the steps NAME-s0 and NAME-s1 with the parameter `seed`.  A `needs` that names a step with seeds
    means that of the same seed, or all of them.  In texts {seed} is the seed and {runs} the folder
    of data and weights.

    Order is priority: stage by stage, and in a stage all steps of a seed before those of the next,
    so that a study which is stopped has every arm once rather than the first arms three times.

    Raises:
        ProfileError: if the file is no study.
    """
    source = Path(path)
    if not source.is_file():
        raise ProfileError(f"no such study: {source}")
    content = profiles.read_yaml(source)
    named = content.get("stages") if isinstance(content, dict) else {"": content}
    stages: list[Any] = list(named.values()) if isinstance(named, dict) else [None]
    for stage in stages:
        if not isinstance(stage, list) or not all(isinstance(entry, dict) for entry in stage):
            raise ProfileError(f"{source}: must hold a list of steps, or lists of them in 'stages'")
    seeds = {entry.get("name"): entry.get("seeds") or () for stage in stages for entry in stage}
    expanded = []
    for stage in stages:
        turn = dict[str, int]()  # the seed whose turn it is, or a later one's that it needs
        made = []
        for entry in stage:
            needs = entry.get("needs") or ()
            needs = (needs,) if isinstance(needs, str) else tuple(needs)
            for seed in entry.get("seeds") or (None,):
                step = _seeded(entry, seed, str(runs))
                step["needs"] = []
                for need in needs:
                    theirs = seeds.get(need) or ()
                    same = [seed] if seed in theirs else theirs
                    step["needs"] += [f"{need}-s{one}" for one in same] if theirs else [need]
                turns = [turn.get(need, -1) for need in step["needs"]]
                turn[step.get("name", "")] = max([-1 if seed is None else seed, *turns])
                made.append(step)
        expanded += sorted(made, key=lambda step: turn[step.get("name", "")])
    return profiles.parse(expanded, source)


def _seeded(entry: Mapping[str, Any], seed: int | None, runs: str) -> dict[str, Any]:
    def fill(value: Any) -> Any:
        if not isinstance(value, str):
            return value
        return value.replace("{runs}", runs).replace("{seed}", str(seed))

    step = {key: value for key, value in entry.items() if key != "seeds"}
    step["params"] = {key: fill(value) for key, value in (entry.get("params") or {}).items()}
    if seed is not None:
        step["name"] = f"{entry.get('name')}-s{seed}"
        step["params"]["seed"] = seed
    return step


def override(steps: Sequence[Step], values: Mapping[str, str]) -> list[Step]:
    """The steps with other parameters, each in every step whose notebook has it: a rehearsal.

    Args:
        values: name -> text, as on a command line.

    Raises:
        ProfileError: for a name that no step's notebook has, or the seed, which the study sets.
        ParameterError: for a value that it cannot take.
    """
    known = {step.notebook: read_parameters(step.notebook) for step in steps}
    for name in values:
        if name == "seed" or not any(name in parameters for parameters in known.values()):
            raise ProfileError(f"{name}: no notebook of this study has it, or the study sets it")
    return [
        replace(
            step,
            params={
                **step.params,
                **{
                    name: known[step.notebook][name].parse(text)
                    for name, text in values.items()
                    if name in known[step.notebook]
                },
            },
        )
        for step in steps
    ]


def run(
    steps: Sequence[Step],
    reports_dir: str | Path | None = None,
    *,
    only: Sequence[str] = (),
    fresh: bool = False,
    stop_after_s: float | None = None,
) -> list[str]:
    """Run what is to be done of a study, in this process; see the module.

    A step is finished when a run of its name with its very parameters has a verdict (not REFUSED),
    whatever the code was then: GPU hours are not spent again for a changed comment.  A step that
    crashes is tried by one process more, a refused one by none until the next call; all others go
    on, but for what needs it.  An unexpected verdict is a problem to report and stops nothing.
    Where the weights that a step exports are there already (`has_weights`), what needs them goes
    first, and the step itself, for its report, last.

    Args:
        only: names of steps (with or without their seed); what they need must be finished.
        fresh: compute these steps in any case.
        stop_after_s: start nothing later than that, and stop what runs then; a training saves a
            checkpoint, and the next call goes on.

    Returns:
        The problems, a sentence each; steps that time or another process kept are none.
    """
    reports = report.reports_folder(reports_dir)
    chosen = [step for step in steps if not only or {step.name, _stem(step.name)} & set(only)]
    if not chosen:
        raise ProfileError(f"no step named {', '.join(only)}; want one of {_names(steps)}")
    for step in chosen:
        try:
            check_parameters(read_parameters(step.notebook), step.params)
        except (ValueError, OSError) as error:
            raise ProfileError(f"step {step.name}: {error}") from error
    end = None if stop_after_s is None else time.monotonic() + stop_after_s
    by_name, begun = {step.name: step for step in steps}, datetime.now(UTC)
    made = set() if fresh else {step.name for step in steps if has_weights(step)}
    waiting, problems, done = sorted(chosen, key=lambda s: s.name in made), list[str](), set(made)

    def ready(step: Step) -> bool:
        done.update(
            need for need in step.needs if need not in done and finished(by_name[need], reports)
        )
        return done.issuperset(step.needs)

    while waiting:
        taken = busy = False
        left = None if end is None else end - time.monotonic()
        if left is not None and left <= 0:
            unfinished = [step for step in waiting if not finished(step, reports)]
            print(f"time is up; left for the next call: {_names(unfinished)}", flush=True)
            return problems
        for step in filter(ready, list(waiting)):
            with _mine(reports, step.name) as mine:
                busy |= not mine
                if not mine:
                    continue
                taken = True
                waiting.remove(step)
                if fresh or not (finished(step, reports) or _given_up(step, reports, begun)):
                    problems += _one(step, reports, fresh, left)
            break  # what it made ready may come before what follows
        if not taken and not busy:
            problems.append(f"left out, as what they need is not finished: {_names(waiting)}")
            break
        if not taken:
            time.sleep(_WAIT_S)
    report.try_index(reports)
    return problems


def _one(step: Step, reports: Path, fresh: bool, timeout_s: float | None) -> list[str]:
    try:
        done = report.run(
            step.notebook, step.params, step.name, reports,
            fresh=fresh, timeout_s=timeout_s, label=step.name,
        )  # fmt: skip
    except Exception as error:  # such as a full disk: the steps that are left may fare better
        return [f"{step.name}: {type(error).__name__}: {error}"]
    print(f"{step.name:<40} {report.line(done)}", flush=True)
    if done.crashed and (done.record.failure or {}).get("kind") == "timed_out":
        return []
    if done.crashed or done.record.verdict == "REFUSED":
        return [f"{step.name}: {done.record.error or done.record.summary}"]
    if step.expect and done.record.verdict != step.expect:
        return [f"{step.name} ended with {done.record.verdict}, but {step.expect} was expected."]
    return []


def finished(step: Step, reports: Path) -> bool:
    """Whether a run of the step's name and parameters has a verdict."""
    return any(
        record.get("status") == "finished" and record.get("verdict") != "REFUSED"
        for record in _records(step, reports)
    )


def has_weights(step: Step) -> bool:
    """Whether the weights that the step exports are there, made with its very parameters, and of
    its very data where these are there: trained on another machine, or earlier."""
    target = step.params.get("export_to")
    path = provenance.project_root() / (target or "")
    if not path.is_file():  # most often; what reads one takes seconds to import
        return False
    from fresnel.study import arms

    made = arms.exported_with(path)
    if made is None:
        return False
    manifest = provenance.project_root() / step.params.get("dataset_dir", "") / "manifest.json"
    if manifest.is_file():
        content_hash = json.loads(manifest.read_text(encoding="utf-8")).get("content_hash")
        if content_hash not in made["data"]:
            return False
    known = made["params"].keys() & step.params.keys()  # folders are no part of what was made
    return bool(known) and all(made["params"][key] == step.params[key] for key in known)


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
    if tries > 1:
        print(f"{step.name:<40} failed in another process; see there", flush=True)
    return tries > 1


def _records(step: Step, reports: Path) -> Iterator[dict[str, Any]]:
    """What the runs of the step's name and parameters left."""
    for results in reports.glob(f"runs/*Z-{step.name}*/results.json"):
        try:
            record = json.loads(results.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if record.get("name") == step.name and all(
            record.get("params", {}).get(key) == value for key, value in step.params.items()
        ):
            yield record


def _mine(reports: Path, name: str) -> AbstractContextManager[bool]:
    """Whether no other process has the step."""
    return lock_if_free(reports / ".study" / f"{name}.lock")


def _stem(name: str) -> str:
    stem, _, seed = name.rpartition("-s")
    return stem if seed.isdigit() else name


def _names(steps: Sequence[Step]) -> str:
    return ", ".join(step.name for step in steps)
