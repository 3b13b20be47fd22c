"""Remote runs from here: launch, status, logs, fetch, resume, stop, and their ledger.

reports/remote/.ledger/RUN/launch.json says what was planned, sent and spent; results lie in
reports/remote/RUN once they are fetched and verified.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fresnel.host.files import locked, read_json, write_atomic
from fresnel.launch.plan import Plan, sbatch, tasks
from fresnel.launch.remote import BOX, Box, RemoteError
from fresnel.report.record import slug

Entry = dict[str, Any]  # what the ledger keeps of a run
_OVER = ("finished", "failed", "stopped", "interrupted")


def launch(plan: Plan, on: str, reports: Path, *, trust_new: bool = False) -> str:
    """Send a plan to `on` (ssh://..., slurm://... or "sky") and start it; returns the run's name.
    RemoteError says what is missing there; nothing goes on running then but the dead man's switch,
    once it is armed."""
    now, terms = datetime.now(UTC), plan.terms
    run = f"{now:%Y%m%dT%H%M%SZ}-{slug(plan.name)}"
    address = f"ssh://fresnel-{run[:16].lower()}" if on == "sky" else on
    box = Box(address, run, trust_new=trust_new)
    entry: Entry = {
        "run": run,
        "on": on,
        "address": address,
        "state": "starting",
        "launched_utc": now.isoformat(timespec="seconds"),
        "root": str(plan.root),
        "terms": asdict(terms),
        "planned": {"duration_s": terms.limit_s, "cost_usd": terms.budget_usd},
        **{name: getattr(plan, name) for name in ("words", "forecast_s", "git")},
        "bytes": sum(plan.files.values()),
    }
    folder = _write(entry, reports)
    texts = {"box.sh": BOX.read_text("utf-8"), "slurm.sh": sbatch(terms, box.folder, run)}
    for name, text in (texts | plan.boxed()).items():
        write_atomic(folder / "run" / name, text.encode("utf-8", "surrogateescape"))
    try:
        if on == "sky":
            _sky(plan, folder, box)
            _write(entry | {"state": "queued"}, reports)
            return run
        with box:
            box.probe(terms.python, 256 + entry["bytes"] // 500_000)  # twice, and some
            _start(box, entry, reports)
    except BaseException as error:
        _write(entry | {"state": "not started", "why": str(error) or "stopped"}, reports)
        raise
    return run


def _start(box: Box, entry: Entry, reports: Path) -> None:
    """Arm, upload, verify, go; or into Slurm's queue, where nothing is paid before it starts."""
    slurm = entry["on"].startswith("slurm")
    box.put(_write(entry, reports) / "run")
    if not slurm:
        box.call("arm")
    box.upload(Path(entry["root"]))
    box.call("submit" if slurm else "go")
    entry |= {"state": "queued" if slurm else "started", "why": ""}
    _write(entry, reports)


def _sky(plan: Plan, folder: Path, box: Box) -> None:
    """Lay out what is to be sent, with SkyPilot's task and one for dstack, and start the former."""
    for name in plan.files:
        target = folder / "tree" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(plan.root / name, target)
    for name, text in tasks(plan.terms, folder, box.run, box.host).items():
        write_atomic(folder / name, text)
    words = [os.environ.get("FRESNEL_SKY", "sky"), "launch", "-y", "-d", "-c", box.host]
    if not shutil.which(words[0]):
        how = "pip install skypilot in an environment of its own; FRESNEL_SKY names it"
        raise RemoteError(f"no command sky here: {how}. Its task, and dstack's, are in {folder}")
    if subprocess.run([*words, str(folder / "sky.yaml")]).returncode:
        raise RemoteError(f"{' '.join(words)} failed; see above")


def entries(reports: Path) -> list[Entry]:
    """The ledger, oldest first."""
    found = []
    for path in sorted((reports / "remote/.ledger").glob("*/launch.json")):
        with contextlib.suppress(OSError, ValueError):
            found.append(read_json(path))
    return found


def find(run: str, reports: Path) -> Entry:
    """The entry of a run, by a part of its name that fits one alone; else ValueError."""
    known = {entry["run"]: entry for entry in entries(reports)}
    fitting = [run] if run in known else [name for name in known if run in name]
    if len(fitting) != 1:
        raise ValueError(f"no remote run {run!r}; there are: {', '.join(known) or 'none'}")
    return known[fitting[0]]


@contextlib.contextmanager
def _reach(run: str, reports: Path) -> Iterator[tuple[Entry, Box]]:
    entry = find(run, reports)
    with Box(entry["address"], entry["run"]) as box:
        yield entry, box


def status(run: str, reports: Path) -> Entry:
    """Ask the machine, and keep what it said in the ledger: the entry with "state", "why", "exit",
    "spent" ({"duration_s", "cost_usd"}), "beat_age_s", "left_s"; as last known if it is gone."""
    with _reach(run, reports) as (entry, box):
        try:
            return _ask(box, entry, reports)
        except RemoteError as error:
            return entry | {"why": f"when it last answered; now: {error}"}


def _ask(box: Box, entry: Entry, reports: Path) -> Entry:
    said = box.call("status", statuses=(0, 2, 127))  # no box.sh there: nothing
    entry |= said | {"state": said.get("state") or "not started"}
    if said:
        entry |= {name: int(said[name]) for name in ("spent_s", "beat_age_s", "left_s")}
        cost = entry["spent_s"] / 3600 * entry["terms"]["rate_usd"]
        entry["spent"] = {"duration_s": entry.pop("spent_s"), "cost_usd": cost}
    _write(entry, reports)
    return entry


def describe(entry: Entry) -> str:
    """A remote run in a few words: state, time and money against plan."""
    spent, planned = entry.get("spent") or {}, entry["planned"]
    text = f"{entry['run']}  {entry['state']}" + (f": {entry['why']}" if entry.get("why") else "")
    if spent:
        text += (
            f"\n  {spent['duration_s'] / 60:.1f} of {planned['duration_s'] / 60:.1f} min, "
            f"{spent['cost_usd']:.2f} of {planned['cost_usd']:.2f} USD"
        )
        if entry["state"] not in _OVER:
            text += f"; heartbeat {entry['beat_age_s']} s ago, {entry['left_s'] / 60:.1f} min left"
    return text


def logs(run: str, reports: Path, *, follow: bool = False) -> int:
    """Show the run's log; with `follow` until Ctrl-C."""
    with _reach(run, reports) as (_, box):
        command = box.command("log", *["-f"] * follow)
        return subprocess.run([*box.ssh(), box.host, command]).returncode


def fetch(run: str, reports: Path, *, wait: bool = False, every_s: float = 20.0) -> Path:
    """Fetch the results of a run that is over, verify every byte, and give them their name; then
    the machine is told that it may end. Receipts and forecasts that were made there are kept where
    there are none here. Nothing that is here is overwritten: FileExistsError if results of that
    name are here, RemoteError if it is not over, or its bytes are not those made there."""
    ledger = _write(find(run, reports), reports)
    target = reports / "remote" / ledger.name
    with _reach(run, reports) as (entry, box), locked(ledger / "lock", wait=False) as mine:
        if not mine:
            raise RemoteError(f"{box.run}: another process is fetching it")
        if target.exists():
            raise FileExistsError(f"{target} is here already; nothing is overwritten")
        while _ask(box, entry, reports)["state"] not in _OVER:
            if not wait:
                raise RemoteError(f"{describe(entry)}\n  not over: fetch --wait, or stop it first")
            time.sleep(every_s)
        box.call("settle")
        partial = target.with_name(f"{target.name}.partial")
        box.download(partial)
        shutil.copy2(ledger / "launch.json", partial)
        partial.rename(target)
        box.call("fetched")
        _write(_ask(box, entry, reports) | {"fetched": f"remote/{box.run}"}, reports)
    for path in sorted(target.glob("runs/**/receipts/**/*.json")):
        place = Path(entry["root"]) / path.relative_to(target)
        known = place.parent.parent.is_dir() or place.parent.parent.name == "receipts"
        if known and not place.exists():
            write_atomic(place, path.read_text(encoding="utf-8"))
            print(f"kept {place}", file=sys.stderr)
    return target


def resume(run: str, reports: Path) -> Entry:
    """Go on with a run that is over or was cut short, where it stopped: uploads, set-up stages and
    trainings that are done are not done again. Its deadline stays what it was; RemoteError if that
    is over, or if it is still at work."""
    with _reach(run, reports) as (entry, box):
        state = _ask(box, entry, reports)["state"]
        if state in ("running", "setting up", "queued", "finished") or entry["on"] == "sky":
            raise RemoteError(f"{box.run} is {state}: nothing to resume")
        _start(box, entry, reports)
    return entry


def stop(run: str, reports: Path) -> None:
    """TERM, so that a checkpoint is written; KILL after that; then results can be fetched."""
    with _reach(run, reports) as (_, box):
        box.call("stop")


def _write(entry: Entry, reports: Path) -> Path:
    """Keep an entry in the ledger; its folder there."""
    folder = reports / "remote/.ledger" / entry["run"]
    write_atomic(folder / "launch.json", json.dumps(entry, indent=2) + "\n")
    return folder
