"""What is lost when a process is killed at any of its file operations? Wanted: nothing.

    python benchmarks/kills.py [JOB ...] [--sample N] [--out benchmarks]

A job runs once undisturbed, its file operations counted. Then, for each of them, it is killed
(SIGKILL) before it, and once more after it: what is on disk must be whole, and the same call must
then end as if nothing had happened and leave nothing beside. Every try is forked from this process,
which has imported everything. --sample N: so many of each job's kills, and no file is written.
"""

from __future__ import annotations

import argparse
import builtins
import functools
import itertools
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
import nbformat
import torch

from fresnel import bootstrap, gate
from fresnel.data import dataset
from fresnel.gate.receipts import write_receipt
from fresnel.host import files
from fresnel.models.cvs import CVS, CVSConfig
from fresnel.models.decoder import load_shipped
from fresnel.objects import sources
from fresnel.objects.assets import embedded_assets
from fresnel.objects.render_set import render_set
from fresnel.report import page, run  # noqa: F401
from fresnel.report.record import RunRecord, process
from fresnel.study import runner
from fresnel.training.cvs_task import CVSTask
from fresnel.training.loop import fit
from fresnel.training.task import TrainConfig

WATCHED = "rename replace link symlink mkdir unlink remove rmdir truncate fsync open"


def watch(root: Path, at: int = 0, after: bool = False) -> Callable[[], int]:
    """Count this process's file operations below `root`, by what comes back; end it before or after
    operation `at`."""
    counter, last = itertools.count(1), [0]

    def acted(act: Callable[..., Any], *args: Any, **options: Any) -> Any:
        counts = isinstance(args[0], int) or "dir_fd" in options or str(root) in str(args[0])
        if act.__name__ == "open":
            how = args[1] if len(args) > 1 else options.get("mode", "r")
            writes = (
                set("wax+") & {*how} if isinstance(how, str) else how & (os.O_RDWR | os.O_CREAT)
            )
            counts = counts and bool(writes)
        if not counts:
            return act(*args, **options)
        last[0] = number = next(counter)
        if number == at and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            return act(*args, **options)
        finally:
            if number == at:
                os.kill(os.getpid(), signal.SIGKILL)

    modules = {os: WATCHED, builtins: "open", sys.modules["io"]: "open", files: "exchange flush"}
    for module, name in [(m, name) for m, names in modules.items() for name in names.split()]:
        setattr(module, name, functools.partial(acted, getattr(module, name)))
    return lambda: last[0]


def forked(act: Callable[[], Any]) -> tuple[int, Any]:
    """Exit status (below 0: the signal) of a fork of this process that acts, and what it said."""
    ours, theirs = os.pipe()
    if (child := os.fork()) == 0:
        status, said = 1, None
        for stream in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        try:
            status, said = 0, act()
        except BaseException:
            status, said = 1, traceback.format_exc()
        os.write(theirs, json.dumps(said).encode())
        os._exit(status)
    os.close(theirs)
    with os.fdopen(ours, "rb") as stream:
        said = stream.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), json.loads(said or b"null")


def objects(root: Path, seed: int = 0) -> str:
    how: dict[str, Any] = {"views": 2, "image_size": 16, "samples": 1, "workers": 1, "seed": seed}
    return render_set(embedded_assets()[:2], root / "set", overwrite=True, **how).content_hash


def in_two_steps(root: Path) -> str:
    files.exchange = lambda one, other: False  # as where the system has no such call
    return objects(root)


def bootstrapped(root: Path) -> str:
    inputs, _ = sources.input_images("embedded", images=2, image_size=16, cache=root / "cache")
    config = bootstrap.BootstrapConfig("tiny", "object", views_per_image=2, image_size=16)
    where = root / "set"
    return bootstrap.bootstrap(
        inputs, load_shipped("pixel"), config, where, reuse=True
    ).content_hash


def trained(root: Path) -> Any:
    data, every = dataset.open(root / "set"), {"log_every": 1, "validate_every": 2}
    every |= {"snapshot_every": 1, "keep_every": 2, "preview_every": 2}
    torch.manual_seed(0)
    task = CVSTask(CVS(CVSConfig.preset("tiny", image_size=16)), data.tensors(), batch_size=2)
    made = fit(
        task, config=TrainConfig(steps=4, warmup_steps=1, **every), run_dir=root / "run",
        receipt=write_receipt(data, "gate", True, "of a benchmark"), progress_bar=False,
    )  # fmt: skip
    kept = sorted((root / "run").glob("*/[!.]*"))
    return [{p.name: files.sha256(p) for p in kept}, [[r["step"], r["loss"]] for r in made.history]]


def gated(root: Path) -> Any:
    data = dataset.open(root / "set")
    gate.issue_receipt(data, gate.validate(data))
    return str(gate.read_receipt(data)).replace(gate.read_receipt(data).created_utc, "")  # type: ignore[union-attr]


def runs(root: Path) -> None:
    """A finished run, and one whose process is gone."""
    gone = {"process": {**process(), "pid": 2**22 + 1}}
    for name, status in (("a", "finished"), ("b", "running")):
        folder = root / f"runs/20260101T000000Z-{name}"
        folder.mkdir(parents=True)
        record = RunRecord(name, status, started_utc="2026-01-01T00:00:00Z", provenance=gone)  # type: ignore[arg-type]
        record.write(folder)
        nbformat.write(nbformat.v4.new_notebook(), folder / run.EXECUTED_NAME)


def indexed(root: Path) -> Any:
    """All badges, and how many whole pages there are."""
    while any([run.try_index(root), "RUNNING" in (badges := [r.badge for r in records(root)])]):
        time.sleep(0.1)  # a kernel ends a moment after its runner
    return [sorted({*badges}), sum("</html>" in p.read_text() for p in root.rglob("index.html"))]


def records(root: Path) -> list[RunRecord]:
    """Every run's; RecordError if one is torn."""
    return [RunRecord.read(path) for path in root.rglob("results.json")]


def notebook(root: Path) -> None:
    cells = ['output_dir = ""', "from fresnel.report import record", 'run.finish("DONE", "")']
    cells[1] += '\nrun = record.start("n", {}, output_dir)'
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
    book.cells[0].metadata["tags"] = ["parameters"]
    nbformat.write(book, root / "n.ipynb")


def studied(root: Path) -> Any:
    steps = [runner.Step(name, root / "n.ipynb", expect="DONE") for name in ("a", "b")]
    problems = runner.run(steps, root)
    return [
        problems,
        sorted({r.name for r in records(root) if r.badge == "DONE"}),
        indexed(root)[1],
    ]


def whole(root: Path) -> None:
    """Every set that is there is whole, and one that was to be replaced is there."""
    if (root / "replaced").exists() or (root / "set").exists():
        dataset.open(root / "set").verify()


def older(root: Path) -> None:
    objects(root, seed=1)
    (root / "replaced").touch()


JOBS: dict[str, tuple[Callable[..., Any], ...]] = {  # what it does, what holds after a kill, before
    "objects": (objects, whole, Path.exists),
    "overwrite": (objects, whole, older),
    "in two steps": (in_two_steps, whole, older),
    "bootstrap": (bootstrapped, whole, Path.exists),
    "training": (trained, Path.exists, objects),
    "gate": (gated, whole, objects),
    "index": (indexed, records, runs),
    "study": (studied, records, notebook),
}


def attempt(name: str, before: Path, at: int, after: bool, wanted: Any) -> str | None:
    """What is lost by this kill, "" if nothing is; None if the job was over before."""
    work, check, _ = JOBS[name]
    with tempfile.TemporaryDirectory(prefix="kills-") as folder:
        root = Path(shutil.copytree(before, Path(folder) / "root"))
        status, said = forked(lambda: [watch(root, at, after), work(root)][1])
        if status != -signal.SIGKILL:
            return None if status == 0 else said
        status, said = forked(lambda: (check(root), work(root))[1])
        left = [p for p in root.rglob(".*") if re.match(r"\..+(-|\.lock)|\.running|\.k", p.name)]
        return f"{said}, not {wanted}" if said != wanted else f"left: {left}" if left else ""


def counted(name: str, root: Path) -> list[Any]:
    count = watch(root)
    return [JOBS[name][0](root), count()]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("jobs", nargs="*", help=f"default: all of {', '.join(JOBS)}")
    parser.add_argument("--sample", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    asked, rows = parser.parse_args(), dict[str, Any]()
    print(
        "| job | file operations | kills | held | lost | s |\n|:--|--:|--:|--:|--:|--:|", flush=True
    )
    for name in asked.jobs or JOBS:
        began, found = time.monotonic(), dict[str, str]()
        with tempfile.TemporaryDirectory(prefix="kills-") as folder:
            before, alone = Path(folder) / "before", Path(folder) / "alone"
            before.mkdir()
            forked(lambda: JOBS[name][2](before) and None)  # noqa: B023
            shutil.copytree(before, alone)
            status, said = forked(lambda: counted(name, alone))  # noqa: B023
            if status:
                sys.exit(f"{name}: {said}")
            kills = list(itertools.product(range(1, said[1] + 1), (False, True)))
            for at, after in (
                kills[:: max(1, len(kills) // asked.sample)] if asked.sample else kills
            ):
                lost = attempt(name, before, at, after, said[0])
                if lost is not None:
                    found[f"{'after' if after else 'before'} {at}"] = lost
        row = rows[name] = {"operations": said[1], "kills": len(found)}
        row["lost"] = {key: lost for key, lost in found.items() if lost}
        row["duration_s"] = round(time.monotonic() - began)
        held = len(found) - len(row["lost"])
        cells = (name, said[1], len(found), held, len(row["lost"]), row["duration_s"])
        print(f"| {' | '.join(map(str, cells))} |", *row["lost"].items(), sep="\n", flush=True)
    if not asked.sample and not asked.jobs:
        (asked.out / "kills.json").write_text(json.dumps(rows, indent=1) + "\n")
    return int(any(row["lost"] for row in rows.values()))


if __name__ == "__main__":
    sys.exit(main())
