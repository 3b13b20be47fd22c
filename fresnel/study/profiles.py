"""A profile: the notebooks that one command runs, with their parameters and expected verdicts."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from fresnel.host.provenance import project_root
from fresnel.report.params import check_parameters, read_parameters
from fresnel.report.record import RESULTS_NAME, RecordError, RunRecord
from fresnel.report.run import line, reports_folder, run, try_index


class ProfileError(ValueError):
    """A profile file that does not say what to run."""


@dataclass(frozen=True)
class Step:
    """One notebook of a profile. `expect`: the verdict it must end with; `needs`: the steps that
    must not have crashed before it. A text in `params` may hold {run:NAME}, the folder of the run
    of step NAME."""

    name: str
    notebook: Path
    params: Mapping[str, Any] = field(default_factory=dict)
    expect: str | None = None
    needs: tuple[str, ...] = ()


def load_profile(path: str | Path) -> list[Step]:
    """Read notebooks/params/profile_*.yaml: a list of {name, notebook, params | params_file,
    expect, needs}. Paths are relative to the project, params_file to the profile."""
    source = Path(path)
    if not source.is_file():
        raise ProfileError(f"no such profile: {source}")
    entries = read_yaml(source)
    return parse(entries, source)


def parse(entries: Any, source: Path) -> list[Step]:
    """The steps of a profile's content; `source`: its file, for messages and params_file."""
    if not isinstance(entries, list) or not entries:
        raise ProfileError(f"{source}: must be a list of steps with 'name' and 'notebook'")
    steps: list[Step] = []
    for number, entry in enumerate(entries, 1):
        where = f"{source}, step {number}"
        if not isinstance(entry, dict) or not {"name", "notebook"} <= entry.keys():
            raise ProfileError(f"{where}: needs 'name' and 'notebook'")
        unknown = entry.keys() - {"name", "notebook", "params", "params_file", "expect", "needs"}
        if unknown:
            raise ProfileError(f"{where}: does not know {', '.join(sorted(unknown))}")
        params: dict[str, Any] = {}
        if "params_file" in entry:
            params.update(read_yaml(source.parent / entry["params_file"]) or {})
        params.update(entry.get("params") or {})
        needs = entry.get("needs") or ()
        needs = (needs,) if isinstance(needs, str) else tuple(needs)
        missing = [need for need in needs if need not in {step.name for step in steps}]
        if missing:
            raise ProfileError(f"{where}: needs {', '.join(missing)}, which no step before it is")
        notebook = project_root() / entry["notebook"]
        steps.append(Step(str(entry["name"]), notebook, params, entry.get("expect"), needs))
    names = [step.name for step in steps]
    if len(set(names)) < len(names):
        raise ProfileError(f"{source}: two steps have the same name")
    return steps


def run_profile(
    steps: Sequence[Step],
    reports_dir: str | Path | None = None,
    *,
    only: Sequence[str] = (),
    fresh: bool = False,
    timeout_s: float | None = None,
) -> list[str]:
    """Run the steps in order, one printed line each, and build the index at the end.

    A step that crashes stops only those that need it; a page that can't be made stops none.
    Parameters of all steps are checked before the first one starts. A step of which nothing has
    changed is not computed again, unless `fresh`. only: names of the steps to run; an earlier one
    that they refer to is then looked up among the runs that are there. timeout_s: for each step.

    Returns the problems, a sentence each: crashes, steps left out, verdicts not as expected, pages
    that could not be made.
    """
    reports = reports_folder(reports_dir)
    unknown = [name for name in only if name not in {step.name for step in steps}]
    if unknown:
        known = ", ".join(step.name for step in steps)
        raise ProfileError(f"no step named {', '.join(unknown)} in this profile; it has: {known}")
    chosen = [step for step in steps if not only or step.name in only]
    for step in chosen:
        try:
            check_parameters(read_parameters(step.notebook), step.params)
        except (ValueError, OSError) as error:
            raise ProfileError(f"step {step.name}: {error}") from error

    problems: list[str] = []
    folders: dict[str, Path] = {}
    crashed: set[str] = set()
    width = max(len(step.name) for step in chosen)
    try:
        for number, step in enumerate(chosen, 1):
            lead = f"[{number}/{len(chosen)}] {step.name:<{width}}"
            broken = [need for need in step.needs if need in crashed]
            if broken:
                crashed.add(step.name)
                problems.append(f"{step.name} was left out: it needs {', '.join(broken)}.")
                print(f"{lead}  LEFT OUT  (needs {', '.join(broken)})", flush=True)
                continue
            try:
                params = _fill(step.params, folders, reports)
            except ProfileError as error:
                crashed.add(step.name)
                problems.append(f"{step.name} was left out: {error}")
                print(f"{lead}  LEFT OUT  ({error})", flush=True)
                continue
            done = run(
                *(step.notebook, params, step.name, reports),
                fresh=fresh,
                timeout_s=timeout_s,
                label=lead.rstrip(),
            )
            folders[step.name] = done.directory
            print(f"{lead}  {line(done)}", flush=True)
            if done.problem:
                problems.append(f"{step.name}: {done.problem}")
            if done.crashed:
                crashed.add(step.name)
                problems.append(f"{step.name} crashed: {done.record.error}")
            elif step.expect and done.record.verdict != step.expect:
                problems.append(
                    f"{step.name} ended with {done.record.verdict}, but {step.expect} was expected."
                )
    finally:
        problem = try_index(reports)
    return [*problems, problem] if problem else problems


def _fill(value: Any, folders: Mapping[str, Path], reports: Path) -> Any:
    """`value` with every {run:NAME} replaced by that step's folder."""
    if isinstance(value, Mapping):
        return {key: _fill(item, folders, reports) for key, item in value.items()}
    if isinstance(value, list):
        return [_fill(item, folders, reports) for item in value]
    if not isinstance(value, str):
        return value
    while "{run:" in value:
        before, _, rest = value.partition("{run:")
        name, _, after = rest.partition("}")
        folder = folders.get(name) or _latest(reports, name)
        value = f"{before}{folder}{after}"
    return value


def _latest(reports: Path, name: str) -> Path:
    runs = sorted(reports.glob(f"runs/*Z-{name}*/{RESULTS_NAME}"), reverse=True)
    for results in runs:
        with contextlib.suppress(RecordError):
            if RunRecord.read(results).name == name:
                return results.parent.resolve()
    raise ProfileError(f"no run of step {name!r} is there yet: run it first")


def read_yaml(path: Path) -> Any:
    """The content of a YAML file; raises ProfileError if it cannot be read."""
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ProfileError(f"{path}: cannot be read ({error.strerror})") from error
    except yaml.YAMLError as error:
        raise ProfileError(f"{path}: is not valid YAML: {error}") from error
