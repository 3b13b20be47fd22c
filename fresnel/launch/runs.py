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
from collections.abc import Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fresnel.host.files import lock_if_free, write_atomic
from fresnel.launch import recipes
from fresnel.launch.plan import Plan
from fresnel.launch.remote import BOX, Box, RemoteError
from fresnel.report.record import slug

LEDGER = ".ledger"
_OVER = ("finished", "failed", "stopped", "interrupted")
_ENVIRONMENT_KB = 6 << 20
"""What .venv takes where there is none yet."""


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
    kind = on.partition(":")[0]
    run = f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{slug(plan.name)}"
    folder = reports / "remote" / LEDGER / run
    box = Box.parse(on, trust_new=trust_new) if kind != "sky" else Box(recipes.cluster(run))
    (folder / "run").mkdir(parents=True)
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
    (folder / "diff.patch").write_text(plan.diff, encoding="utf-8", errors="surrogateescape")
    boxed = plan.boxed() | {"box.sh": BOX.read_text(encoding="utf-8")}
    if kind == "slurm":
        boxed["slurm.sh"] = recipes.sbatch(plan.terms, box.folder, run, options)
    for name, text in boxed.items():
        (folder / "run" / name).write_text(text, encoding="utf-8")
    _write(folder, entry)
    if kind == "sky":
        recipes.stage(plan.root, plan.files, folder)
        (folder / "run.dstack.yml").write_text(recipes.dstack(plan.terms, folder, run, gpu))
        (folder / "sky.yaml").write_text(recipes.sky(plan.terms, folder, run, cloud, gpu))
        _sky(folder / "sky.yaml", run)
        _write(folder, entry | {"state": "queued"})
        return run
    try:
        _check(box, box.probe(plan.terms.python), plan)
        _start(box, entry, folder)
    except BaseException as error:
        _write(folder, entry | {"state": "not started", "why": str(error) or "stopped"})
        raise
    finally:
        box.close()
    return run


def _check(box: Box, found: dict[str, str], plan: Plan) -> None:
    """Refuse a machine on which the run could not end well, before anything is sent."""
    if "missing" in found:
        raise RemoteError(f"{box.host} lacks {found['missing']}; install it there")
    if not found.get("python"):
        raise RemoteError(f"{box.host} has no Python 3.11 or newer; install one, or name --python")
    if "busy" in found:
        holder = found["busy"] or "(unknown)"
        raise RemoteError(f"{box.host}: the run {holder} has the machine; wait, stop it, or choose "
                          "another folder")  # fmt: skip
    built = plan.terms.python or found.get("environment")
    needed_kb = 2 * plan.bytes // 1024 + (1 << 18) + (0 if built else _ENVIRONMENT_KB)
    if int(found["free_kb"]) < needed_kb:
        raise RemoteError(
            f"{box.host}: {int(found['free_kb']) / 2**20:.1f} GB free in {box.folder}, "
            f"{needed_kb / 2**20:.1f} GB are needed"
        )


def _start(box: Box, entry: dict[str, Any], folder: Path) -> None:
    """Arm, upload, verify, go; or into Slurm's queue, where nothing is paid before it starts."""
    run = entry["run"]
    slurm = entry["on"].startswith("slurm")
    box.put(run, folder / "run")
    if not slurm:
        done = box.run(box.command("arm", run), check=False)
        said = done.stdout.decode()
        if "late=" in said:
            raise RemoteError(f"{run}: its deadline is over; a new run needs a new budget")
        if done.returncode or "deadline=" not in said:
            raise RemoteError(f"{box.host}: could not be armed: {said}{done.stderr.decode()}")
        entry["state"] = "armed"
        _write(folder, entry)
    box.upload(run, Path(entry["root"]))
    box.box("submit" if slurm else "go", run)
    entry |= {"state": "queued" if slurm else "started", "why": ""}
    _write(folder, entry)


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


def entries(reports: Path) -> list[dict[str, Any]]:
    """The ledger, oldest first."""
    found = []
    for path in sorted((reports / "remote" / LEDGER).glob("*/launch.json")):
        with contextlib.suppress(OSError, ValueError):
            found.append(json.loads(path.read_text(encoding="utf-8")))
    return found


def find(run: str, reports: Path) -> dict[str, Any]:
    """The entry of a run; a part of its name is enough where it fits one.

    Raises ValueError that names those that there are."""
    known = {entry["run"]: entry for entry in entries(reports)}
    fitting = [name for name in known if run in name]
    if run in known or len(fitting) == 1:
        return known[run if run in known else fitting[0]]
    raise ValueError(f"no remote run {run!r}; there are: {', '.join(known) or 'none'}")


@contextlib.contextmanager
def _connected(entry: dict[str, Any]) -> Iterator[Box]:
    box = Box(entry["host"], entry["folder"], entry["port"])
    try:
        yield box
    finally:
        box.close()


def status(run: str, reports: Path) -> dict[str, Any]:
    """Ask the machine, and keep what it said in the ledger: the entry with "state", "why", "beat",
    "exit", "spent" ({"duration_s", "cost_usd"})."""
    entry = find(run, reports)
    with _connected(entry) as box:
        return _ask(box, entry, reports)


def _ask(box: Box, entry: dict[str, Any], reports: Path) -> dict[str, Any]:
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
    _write(reports / "remote" / LEDGER / entry["run"], entry)
    return entry


def describe(entry: dict[str, Any]) -> str:
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
    with _connected(entry) as box:
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
    target = reports / "remote" / entry["run"]
    if target.exists():
        raise FileExistsError(f"{target} is here already; nothing is overwritten")
    with (
        lock_if_free(target.parent / LEDGER / target.name / "lock") as mine,
        _connected(entry) as box,
    ):
        if not mine:
            raise RemoteError(f"{target.name}: another process is fetching it")
        while (entry := _ask(box, entry, reports))["state"] not in _OVER:
            if not wait:
                raise RemoteError(f"{describe(entry)}\n  not over: fetch --wait, or stop it first")
            time.sleep(every_s)
        box.box("settle", entry["run"])
        partial = target.with_name(f"{target.name}.partial")
        box.download(entry["run"], partial)
        for name in ("launch.json", "diff.patch"):
            shutil.copy2(reports / "remote" / LEDGER / target.name / name, partial / name)
        if target.exists():
            raise FileExistsError(f"{target} is here already; the new ones are at {partial}")
        partial.rename(target)
        box.box("fetched", entry["run"])
        entry = _ask(box, entry, reports) | {"fetched": str(target.relative_to(reports))}
    _write(reports / "remote" / LEDGER / target.name, entry)
    for path in sorted((target / "receipts").rglob("*.json")):
        place = Path(entry["root"]) / path.relative_to(target / "receipts")
        if place.parent.parent.is_dir() and not place.exists():
            write_atomic(place, path.read_text(encoding="utf-8"))
            print(f"kept {place}", file=sys.stderr)
    return target


def resume(run: str, reports: Path) -> dict[str, Any]:
    """Go on with a run that is over or was cut short, where it stopped: uploads, set-up stages and
    trainings that are done are not done again. Its deadline stays what it was.

    Raises RemoteError if it is still at work, or its time is over."""
    entry = find(run, reports)
    if entry["on"] == "sky":
        raise RemoteError(
            f"a SkyPilot machine is gone once it is down; try: sky exec {entry['host']}"
        )
    with _connected(entry) as box:
        known = (
            box.run(f"test -e {box.folder}/runs/{entry['run']}/state", check=False).returncode == 0
        )
        state = _ask(box, entry, reports)["state"] if known else "not started"
        if state in ("running", "setting up", "queued", "finished"):
            raise RemoteError(f"{entry['run']} is {state}: nothing to resume")
        _start(box, entry, reports / "remote" / LEDGER / entry["run"])
    return entry


def stop(run: str, reports: Path) -> None:
    """TERM, so that a checkpoint is written; KILL after that; then results can be fetched."""
    entry = find(run, reports)
    with _connected(entry) as box:
        box.box("stop", entry["run"])


def _write(folder: Path, entry: dict[str, Any]) -> None:
    write_atomic(folder / "launch.json", json.dumps(entry, indent=2) + "\n")
