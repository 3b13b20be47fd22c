"""A study: many runs and their seeds, from one YAML file, shared by as many processes as there are.

    CUDA_VISIBLE_DEVICES=0 python -m fresnel study notebooks/params/study_arms.yaml &
    CUDA_VISIBLE_DEVICES=1 python -m fresnel study notebooks/params/study_arms.yaml

Each process takes the next step that is neither finished nor in another's hands and whose needs
are finished.  Stopped ones are called again and go on: finished steps stay finished, a training
resumes from its checkpoint.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from fresnel import profiles, report
from fresnel.locks import lock_if_free
from fresnel.parameters import check_parameters, read_parameters
from fresnel.profiles import ProfileError, Step

_WAIT_S = 3.0


def load(path: str | Path) -> list[Step]:
    """Read a study: a profile whose steps may have "seeds".

    The file is a list of steps as `profiles.load_profile` reads them, or a mapping with that list
    under "steps" (its other keys hold YAML anchors).  A step with seeds: [0, 1] becomes the steps
    NAME-s0 and NAME-s1 with the parameter `seed`; in its texts {seed} is the seed.  A `needs`
    that names a step with seeds means that of the same seed, or all of them.

    Raises:
        ProfileError: if the file is no study.
    """
    source = Path(path)
    if not source.is_file():
        raise ProfileError(f"no such study: {source}")
    content = profiles.read_yaml(source)
    entries = content.get("steps") if isinstance(content, dict) else content
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ProfileError(f"{source}: must hold a list of steps, or a mapping with 'steps'")
    seeds = {entry.get("name"): entry.get("seeds") or () for entry in entries}
    expanded = []
    for entry in entries:
        own = {key: value for key, value in entry.items() if key != "seeds"}
        needs = own.get("needs") or ()
        needs = (needs,) if isinstance(needs, str) else tuple(needs)
        for seed in entry.get("seeds") or (None,):
            step = _seeded(own, seed) if seed is not None else dict(own)
            step["needs"] = []
            for need in needs:
                theirs = seeds.get(need) or ()
                same = [seed] if seed in theirs else theirs
                step["needs"] += [f"{need}-s{one}" for one in same] if theirs else [need]
            expanded.append(step)
    return profiles.parse(expanded, source)


def _seeded(entry: Mapping[str, Any], seed: int) -> dict[str, Any]:
    def fill(value: Any) -> Any:
        return value.replace("{seed}", str(seed)) if isinstance(value, str) else value

    params = {key: fill(value) for key, value in (entry.get("params") or {}).items()}
    return {**entry, "name": f"{entry['name']}-s{seed}", "params": {**params, "seed": seed}}


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
    whatever the code was then: GPU hours are not spent again for a changed comment.  Each process
    tries a step once.

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
    by_name = {step.name: step for step in steps}
    waiting, problems = list(chosen), list[str]()
    while waiting:
        progress = busy = False
        for step in list(waiting):
            left = None if end is None else end - time.monotonic()
            if left is not None and left <= 0:
                print(f"time is up; left for the next call: {_names(waiting)}", flush=True)
                return problems
            if not all(finished(by_name[need], reports) for need in step.needs):
                continue
            with _mine(reports, step.name) as mine:
                busy |= not mine
                if mine:
                    waiting.remove(step)
                    progress = True
                    if fresh or not finished(step, reports):
                        problems += _one(step, reports, fresh, left)
        if not progress and not busy:
            problems.append(f"left out, as what they need is not finished: {_names(waiting)}")
            break
        if not progress:
            time.sleep(_WAIT_S)
    report.try_index(reports)
    return problems


def _one(step: Step, reports: Path, fresh: bool, timeout_s: float | None) -> list[str]:
    done = report.run(
        step.notebook, step.params, step.name, reports,
        fresh=fresh, timeout_s=timeout_s, label=step.name,
    )  # fmt: skip
    print(f"{step.name:<32} {report.line(done)}", flush=True)
    if done.crashed and (done.record.failure or {}).get("kind") == "timed_out":
        return []
    if done.crashed or done.record.verdict == "REFUSED":
        return [f"{step.name}: {done.record.error or done.record.summary}"]
    if step.expect and done.record.verdict != step.expect:
        return [f"{step.name} ended with {done.record.verdict}, but {step.expect} was expected."]
    return []


def finished(step: Step, reports: Path) -> bool:
    """Whether a run of the step's name and parameters has a verdict."""
    for results in reports.glob(f"runs/*Z-{step.name}*/results.json"):
        try:
            record = json.loads(results.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        same = record.get("name") == step.name and all(
            record.get("params", {}).get(key) == value for key, value in step.params.items()
        )
        if same and record.get("status") == "finished" and record.get("verdict") != "REFUSED":
            return True
    return False


def _mine(reports: Path, name: str) -> AbstractContextManager[bool]:
    """Whether no other process has the step."""
    return lock_if_free(reports / ".study" / f"{name}.lock")


def _stem(name: str) -> str:
    stem, _, seed = name.rpartition("-s")
    return stem if seed.isdigit() else name


def _names(steps: Sequence[Step]) -> str:
    return ", ".join(step.name for step in steps)
