"""Remote runs from here: launch, status, logs, fetch, resume, stop, and their ledger.

reports/remote/.ledger/RUN/launch.json says what was planned, sent and spent; results lie in
reports/remote/RUN once they are fetched and verified.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fresnel.host.files import locked, write_atomic
from fresnel.launch import recipes
from fresnel.launch.plan import Plan, sbatch
from fresnel.launch.remote import BOX, Box, RemoteError
from fresnel.report.record import slug

Entry = dict[str, Any]
"""What the ledger keeps of a run."""
_OVER = ("finished", "failed", "stopped", "interrupted")


def launch(
    plan: Plan,
    on: str,
    reports: Path,
    *,
    trust_new: bool = False,
    options: str = "",
    cloud: str = "",
    gpu: str = "H100",
) -> str:
    """Send a plan and start it; returns the run's name. The run needs this process no more.

    Args:
        on: ssh://..., slurm://... or "sky".
        options: further lines of a Slurm script ("--partition=gpu"); cloud, gpu: of SkyPilot.

    Raises:
        RemoteError: says what is missing there; nothing goes on running then but the dead man's
            switch, once it is armed.
    """
    run = f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{slug(plan.name)}"
    box = Box(recipes.cluster(run)) if on == "sky" else Box.parse(on, trust_new=trust_new)
    entry = {
        "run": run,
        "on": on,
        "host": box.host,
        "port": box.port,
        "folder": box.folder,
        "words": list(plan.words),
        "terms": asdict(plan.terms),
        "planned": {"duration_s": plan.terms.limit_s, "cost_usd": plan.terms.budget_usd},
        "forecast_s": plan.forecast_s,
        "git": dict(plan.git),
        "root": str(plan.root),
        "bytes": plan.bytes,
        "state": "planned",
        "launched_utc": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    folder = _write(reports, entry)
    boxed = {f"run/{name}": text for name, text in plan.boxed().items()}
    boxed |= {"run/box.sh": BOX.read_text(encoding="utf-8"), "diff.patch": plan.diff}
    if on.startswith("slurm"):
        boxed["run/slurm.sh"] = sbatch(plan.terms, box.folder, run, options)
    for name, text in boxed.items():
        write_atomic(folder / name, text.encode("utf-8", "surrogateescape"))
    if on == "sky":
        recipes.stage(plan.root, plan.files, folder)
        write_atomic(folder / "run.dstack.yml", recipes.dstack(plan.terms, folder, run, gpu))
        write_atomic(folder / "sky.yaml", recipes.sky(plan.terms, folder, run, cloud, gpu))
        _sky(folder / "sky.yaml", run)
        _write(reports, entry | {"state": "queued"})
        return run
    try:
        with box:
            _check(box, plan)
            _start(box, entry, reports)
    except BaseException as error:
        _write(reports, entry | {"state": "not started", "why": str(error) or "stopped"})
        raise
    return run


def _check(box: Box, plan: Plan) -> None:
    """Refuse a machine on which the run could not end well, before anything is sent."""
    found = box.probe(plan.terms.python)
    built = plan.terms.python or found.get("environment")
    free_gb = int(found["free_kb"]) / 2**20
    needed_gb = 2 * plan.bytes / 2**30 + 0.25 + (0 if built else 6)  # .venv takes 6
    for wrong, why in (
        ("missing" in found, f"lacks {found.get('missing')}; install it there"),
        (not found["python"], "has no Python 3.11 or newer; install one, or name --python"),
        ("busy" in found, f"the run {found.get('busy') or '(unknown)'} has the machine; wait, stop "
         "it, or choose another folder"),
        (free_gb < needed_gb, f"{free_gb:.1f} GB free in {box.folder}, {needed_gb:.1f} GB are "
         "needed"),
    ):  # fmt: skip
        if wrong:
            raise RemoteError(f"{box.host}: {why}")


def _start(box: Box, entry: Entry, reports: Path) -> None:
    """Arm, upload, verify, go; or into Slurm's queue, where nothing is paid before it starts."""
    run, slurm = entry["run"], entry["on"].startswith("slurm")
    box.put(run, _write(reports, entry) / "run")
    if not slurm:
        said = box.box("arm", run, statuses=(0, 75, 76))
        if "late" in said:
            raise RemoteError(f"{run}: its deadline is over; a new run needs a new budget")
        if "deadline" not in said:
            raise RemoteError(f"{box.host}: could not be armed: {said}")
        entry["state"] = "armed"
        _write(reports, entry)
    box.upload(run, Path(entry["root"]))
    box.box("submit" if slurm else "go", run)
    entry |= {"state": "queued" if slurm else "started", "why": ""}
    _write(reports, entry)


def _sky(task: Path, run: str) -> None:
    command = shutil.which(os.environ.get("FRESNEL_SKY", "sky"))
    if command is None:
        raise RemoteError(
            "no command sky here: pip install skypilot in an environment of its own; FRESNEL_SKY "
            f"names it. The task is at {task}, one for dstack beside it"
        )
    words = [command, "launch", "-y", "-d", "-c", recipes.cluster(run), str(task)]
    if subprocess.run(words).returncode:
        raise RemoteError(f"{' '.join(words)} failed; see above")


def entries(reports: Path) -> list[Entry]:
    """The ledger, oldest first."""
    found = []
    for path in sorted((reports / "remote/.ledger").glob("*/launch.json")):
        with contextlib.suppress(OSError, ValueError):
            found.append(json.loads(path.read_text(encoding="utf-8")))
    return found


def find(run: str, reports: Path) -> Entry:
    """The entry of a run; a part of its name is enough where it fits one.

    Raises ValueError that names those that there are."""
    known = {entry["run"]: entry for entry in entries(reports)}
    fitting = [run] if run in known else [name for name in known if run in name]
    if len(fitting) != 1:
        raise ValueError(f"no remote run {run!r}; there are: {', '.join(known) or 'none'}")
    return known[fitting[0]]


def _box(entry: Entry) -> Box:
    return Box(entry["host"], entry["folder"], entry["port"])


def status(run: str, reports: Path) -> Entry:
    """Ask the machine, and keep what it said in the ledger: the entry with "state", "why", "beat",
    "exit", "spent" ({"duration_s", "cost_usd"})."""
    entry = find(run, reports)
    with _box(entry) as box:
        return _ask(box, entry, reports)


def _ask(box: Box, entry: Entry, reports: Path) -> Entry:
    said = box.box("status", entry["run"])
    state, now = said["state"] or "unknown", int(said["now"])
    if said["alive"] == "no":
        state, said["why"] = "interrupted", "its machine was restarted, or its system ended it"
    entry |= {"state": state, "why": said["why"], "exit": said["exit"], "asked": now}
    if said["armed"]:
        until = int(said["ended"] or (now if said["alive"] == "yes" else said["beat"] or now))
        spent_s = until - int(said["armed"])
        cost = spent_s / 3600 * entry["terms"]["rate_usd"]
        entry["spent"] = {"duration_s": spent_s, "cost_usd": cost}
        entry["beat_age_s"] = now - int(said["beat"] or now)
        entry["left_s"] = int(said["deadline"] or now) - now
    _write(reports, entry)
    return entry


def describe(entry: Entry) -> str:
    """A remote run in a few words: state, time and money against plan."""
    spent, planned = entry.get("spent") or {}, entry["planned"]
    text = ": ".join(filter(None, (f"{entry['run']}  {entry['state']}", entry.get("why"))))
    if spent:
        text += (
            f"\n  {spent['duration_s'] / 60:.1f} of {planned['duration_s'] / 60:.1f} min, "
            f"{spent['cost_usd']:.2f} of {planned['cost_usd']:.2f} USD"
        )
    if entry["state"] not in _OVER and "beat_age_s" in entry:
        text += f"; heartbeat {entry['beat_age_s']} s ago, {entry['left_s'] / 60:.1f} min left"
    return text


def logs(run: str, reports: Path, *, follow: bool = False) -> int:
    """Show the run's log; with `follow` until Ctrl-C."""
    entry = find(run, reports)
    with _box(entry) as box:
        command = box.command("log", entry["run"], *(["-f"] if follow else []))
        return subprocess.run([*box.ssh(), box.host, command]).returncode


def fetch(run: str, reports: Path, *, wait: bool = False, every_s: float = 20.0) -> Path:
    """Fetch the results of a run that is over, verify every byte, and give them their name; then
    the machine is told that it may end. Receipts and forecasts that were made there are kept where
    there are none here. Nothing that is here is overwritten.

    Raises:
        RemoteError: if it is not over, or the bytes are not those that were made there.
        FileExistsError: if results of that name are here.
    """
    entry = find(run, reports)
    ledger, target = _write(reports, entry), reports / "remote" / entry["run"]
    with locked(ledger / "lock", wait=False) as mine, _box(entry) as box:
        if not mine:
            raise RemoteError(f"{target.name}: another process is fetching it")
        if target.exists():
            raise FileExistsError(f"{target} is here already; nothing is overwritten")
        while (entry := _ask(box, entry, reports))["state"] not in _OVER:
            if not wait:
                raise RemoteError(f"{describe(entry)}\n  not over: fetch --wait, or stop it first")
            time.sleep(every_s)
        box.box("settle", target.name)
        partial = target.with_name(f"{target.name}.partial")
        box.download(target.name, partial)
        for name in ("launch.json", "diff.patch"):
            shutil.copy2(ledger / name, partial / name)
        partial.rename(target)
        box.box("fetched", target.name)
        entry = _ask(box, entry, reports) | {"fetched": str(target.relative_to(reports))}
    _write(reports, entry)
    for path in sorted((target / "receipts").rglob("*.json")):
        place = Path(entry["root"]) / path.relative_to(target / "receipts")
        known = place.parent.parent.is_dir() or place.parent.parent.name == "receipts"
        if known and not place.exists():
            write_atomic(place, path.read_text(encoding="utf-8"))
            print(f"kept {place}", file=sys.stderr)
    return target


def resume(run: str, reports: Path) -> Entry:
    """Go on with a run that is over or was cut short, where it stopped: uploads, set-up stages and
    trainings that are done are not done again. Its deadline stays what it was.

    Raises RemoteError if it is still at work, or its time is over."""
    entry = find(run, reports)
    if entry["on"] == "sky":
        said = f"a SkyPilot machine is gone once it is down; try: sky exec {entry['host']}"
        raise RemoteError(said)
    with _box(entry) as box:
        seen = box.run(f"ls {box.folder}/runs/{entry['run']}/state", statuses=(0, 1, 2))
        state = _ask(box, entry, reports)["state"] if seen else "not started"
        if state in ("running", "setting up", "queued", "finished"):
            raise RemoteError(f"{entry['run']} is {state}: nothing to resume")
        _start(box, entry, reports)
    return entry


def stop(run: str, reports: Path) -> None:
    """TERM, so that a checkpoint is written; KILL after that; then results can be fetched."""
    entry = find(run, reports)
    with _box(entry) as box:
        box.box("stop", entry["run"])


def _write(reports: Path, entry: Entry) -> Path:
    """Keep an entry in the ledger; its folder there."""
    folder = reports / "remote/.ledger" / entry["run"]
    write_atomic(folder / "launch.json", json.dumps(entry, indent=2) + "\n")
    return folder
