"""What is lost when a process is killed at any of its file operations? Wanted: nothing.

    python benchmarks/kills.py [JOB ...] [--sample N] [--workers N] [--keep]

A job runs once undisturbed, its file operations counted. Then, for each of them, it is killed
(SIGKILL) before it, and once more after it: what is on disk must be whole, and the same call must
then end as if nothing had happened and leave nothing beside. Every try is forked from this process,
which has imported everything.

--sample N: about so many of each job's kills, evenly spread. --keep: note the counts in kills.json,
as they come, in random order, so that those of a run that was cut are a sample.
"""

import argparse
import builtins
import contextlib
import functools
import importlib
import itertools
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
import nbformat
import torch

from fresnel import bootstrap, gate
from fresnel.data import dataset
from fresnel.gate.receipts import write_receipt
from fresnel.host import files
from fresnel.models import cvs, decoder
from fresnel.objects import sources
from fresnel.objects.assets import embedded_assets
from fresnel.objects.render_set import render_set
from fresnel.report import run
from fresnel.report.record import RunRecord, process
from fresnel.study import runner
from fresnel.training.cvs_task import CVSTask
from fresnel.training.loop import fit
from fresnel.training.task import TrainConfig

_WARM = "fresnel.render.cpu fresnel.report.page fresnel.report.engine embreex.mesh_construction"
LIMIT_S = 300
"""What a call may take before it counts as one that never ends."""
WATCHED = "rename replace link symlink mkdir unlink remove rmdir truncate fsync open"


def watch(root: Path, at: int = 0, after: bool = False) -> Callable[[], int]:
    """Count this process's file operations below `root`, by what comes back; end it before or after
    operation `at`."""
    counter, last = itertools.count(1), [0]

    def acted(act: Callable[..., Any], *args: Any, **options: Any) -> Any:
        counts = isinstance(args[0], int) or "dir_fd" in options or str(root) in str(args[0])
        if act.__name__ == "open":
            how = args[1] if len(args) > 1 else options.get("mode", "r")
            writes = {*"wax+"} & {*how} if isinstance(how, str) else how & (os.O_RDWR | os.O_CREAT)
            counts = counts and bool(writes)
        if counts:
            last[0] = next(counter)
        if counts and last[0] == at and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            return act(*args, **options)
        finally:
            if counts and last[0] == at:
                os.kill(os.getpid(), signal.SIGKILL)

    modules = {os: WATCHED, builtins: "open", sys.modules["io"]: "open", files: "exchange flush"}
    for module, name in [(m, name) for m, names in modules.items() for name in names.split()]:
        setattr(module, name, functools.partial(acted, getattr(module, name)))
    return lambda: last[0]


def forked(act: Callable[[], Any]) -> tuple[int | None, Any]:
    """Exit status (below 0: the signal) of a fork of this process that acts, and what it said; what
    takes longer than LIMIT_S is ended and has said so."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(False)

    def inside() -> None:
        sys.stdout = None  # type: ignore[assignment]
        theirs.send(act())

    child = context.Process(target=inside)
    child.start()
    theirs.close()
    said = None
    with contextlib.suppress(EOFError):
        said = ours.recv() if ours.poll(LIMIT_S) else f"not over after {LIMIT_S} s"
    if said == f"not over after {LIMIT_S} s":
        child.kill()
    child.join()
    return child.exitcode, said


def objects(root: Path, seed: int = 0) -> str:
    how: dict[str, Any] = {"views": 2, "image_size": 16, "samples": 1, "workers": 1, "seed": seed}
    return render_set(embedded_assets()[:2], root / "set", overwrite=True, **how).content_hash


def in_two_steps(root: Path) -> str:
    files.exchange = lambda one, other: False  # as where the system has no such call
    return objects(root)


def bootstrapped(root: Path) -> str:
    inputs, _ = sources.input_images("embedded", images=2, image_size=16, cache=root / "cache")
    how = bootstrap.BootstrapConfig("tiny", "object", views_per_image=2, image_size=16)
    shipped = decoder.load_shipped("pixel")
    return bootstrap.bootstrap(inputs, shipped, how, root / "set", reuse=True).content_hash


def trained(root: Path) -> Any:
    data, every = dataset.open(root / "set"), {"log_every": 1, "validate_every": 2}
    every |= {"snapshot_every": 1, "keep_every": 2, "preview_every": 2}
    torch.manual_seed(0)
    network = cvs.CVS(cvs.CVSConfig.preset("tiny", image_size=16))
    made = fit(
        CVSTask(network, data.tensors(), batch_size=2), run_dir=root / "run", progress_bar=False,
        config=TrainConfig(steps=4, warmup_steps=1, **every),
        receipt=write_receipt(data, "gate", True, "of a benchmark"),
    )  # fmt: skip
    kept = sorted((root / "run").glob("*/[!.]*"))
    return [[(p.name, files.sha256(p)) for p in kept], [r["loss"] for r in made.history]]


def gated(root: Path) -> Any:
    data = dataset.open(root / "set")
    gate.issue_receipt(data, gate.validate(data))
    found = gate.read_receipt(data)
    return found and str(found).replace(found.created_utc, "")


def indexed(root: Path) -> list[Any]:
    """Problems, all badges, and how many whole pages there are."""
    problems = [run.try_index(root)]
    while "RUNNING" in (badges := [record.badge for record in records(root)]):
        time.sleep(0.1)  # a kernel ends a moment after its runner
        problems.append(run.try_index(root))
    pages = [page.read_text().count("</html>") for page in root.rglob("index.html")]
    return [{*problems}, {*badges} - {"DIED"}, pages]


def records(root: Path) -> list[RunRecord]:
    """Every run's; RecordError if one is torn."""
    return [RunRecord.read(path) for path in root.rglob("results.json")]


def runs(root: Path) -> None:
    """One that finished, and one whose process is gone; a study's notebook."""
    gone = {"process": {**process(), "pid": 2**22 + 1}}
    cells = ['output_dir = ""', "from fresnel.report import record", 'run.finish("DONE", "")']
    cells[1] += '\nrun = record.start("n", {}, output_dir)'
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
    book.cells[0].metadata["tags"] = ["parameters"]
    nbformat.write(book, root / "n.ipynb")
    for name, status in (("x", "finished"), ("y", "running")):
        (folder := root / f"runs/20260101T000000Z-{name}").mkdir(parents=True)
        record = RunRecord(name, status, started_utc="2026-01-01T00:00:00Z", provenance=gone)  # type: ignore[arg-type]
        record.write(folder)
        nbformat.write(book, folder / run.EXECUTED_NAME)


def studied(root: Path) -> list[Any]:
    problems = runner.run([runner.Step(name, root / "n.ipynb") for name in ("a", "b")], root)
    return [problems, {r.name for r in records(root) if r.badge == "DONE"}, *indexed(root)]


def whole(root: Path) -> None:
    """Every set that is there is whole, and one that was to be replaced is there."""
    if (root / "older").exists() or (root / "set").exists():
        dataset.open(root / "set").verify()


def older(root: Path) -> None:
    objects(root, seed=1)
    (root / "older").touch()


JOBS: dict[str, tuple[Callable[..., Any], ...]] = {  # what it does, what holds after a kill, before
    "objects": (objects, whole, Path.exists),
    "overwrite": (objects, whole, older),
    "in two steps": (in_two_steps, whole, older),
    "bootstrap": (bootstrapped, whole, Path.exists),
    "training": (trained, Path.exists, objects),
    "gate": (gated, whole, objects),
    "index": (indexed, records, runs),
    "study": (studied, records, runs),
}


def attempt(name: str, before: Path, at: int, after: bool, wanted: Any) -> str | None:
    """What is lost by this kill, "" if nothing is; None if the job was over before."""
    work, check, _ = JOBS[name]
    with tempfile.TemporaryDirectory(prefix="kills-") as folder:
        root = Path(shutil.copytree(before, Path(folder) / "root"))
        status, said = forked(lambda: [watch(root, at, after), work(root)][1])
        if said is not None:
            return f"unkilled: {said}" if status == -signal.SIGKILL else None
        said = forked(lambda: (check(root), work(root))[1])[1]
        left = [p for p in root.rglob(".*") if re.match(r"\..+(-|\.lock)|\.running|\.k", p.name)]
        return f"{said}, not {wanted}" if said != wanted else f"left: {left}" if left else ""


def tried(
    name: str, sample: int, workers: int, note: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """Every kill of a job, or so many, and what came of it; `note` is told after each.

    Raises:
        SystemExit: if the job fails by itself.
    """
    began, found = time.monotonic(), dict[str, str]()
    with tempfile.TemporaryDirectory(prefix="kills-") as folder:
        before, alone = Path(folder) / "before", Path(folder) / "alone"
        before.mkdir()
        forked(lambda: JOBS[name][2](before) and None)
        shutil.copytree(before, alone)
        counts = forked(lambda: (count := watch(alone), JOBS[name][0](alone), count())[1:])[1]
        if counts is None:
            sys.exit(f"{name}: fails by itself; see above")
        kills = list(itertools.product(range(1, counts[1] + 1), (False, True)))
        kills = kills[:: max(1, len(kills) // sample)] if sample else kills
        random.Random(0).shuffle(kills)
        # Workers are forked at once, before the pool has threads: each forks its own tries.
        with ProcessPoolExecutor(workers, multiprocessing.get_context("fork")) as pool:
            said = {pool.submit(attempt, name, before, *kill, counts[0]): kill for kill in kills}
            row: dict[str, Any] = {"operations": counts[1], "wanted": len(kills)}
            for one in as_completed(said):
                (at, after), lost = said[one], one.result()
                if lost is not None:
                    found[f"{'after' if after else 'before'} {at}"] = lost
                row |= {"tried": len(found), "lost": {k: lost for k, lost in found.items() if lost}}
                row["duration_s"] = round(time.monotonic() - began)
                note(row)
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("jobs", nargs="*", help=f"default: {', '.join(JOBS)}")
    parser.add_argument("--sample", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--keep", action="store_true")
    asked, out, lost = parser.parse_args(), Path(__file__).with_suffix(".json"), 0
    for module in (*_WARM.split(), "torch._dynamo", "papermill.engines"):
        importlib.import_module(module)
    print(
        "| job | file operations | kills | held | lost | s |\n|:--|--:|--:|--:|--:|--:|", flush=True
    )
    kept = json.loads(out.read_text()) if asked.keep and out.exists() else {}

    def note(row: dict[str, Any]) -> None:
        if asked.keep:
            files.write_atomic(out, json.dumps(kept | {name: row}, indent=1) + "\n")

    for name in asked.jobs or JOBS:
        row = tried(name, asked.sample, asked.workers, note)
        kept[name] = row
        lost += len(row["lost"])
        held = row["tried"] - len(row["lost"])
        cells = name, row["operations"], row["tried"], held, len(row["lost"]), row["duration_s"]
        print(f"| {' | '.join(map(str, cells))} |", *row["lost"].items(), sep="\n", flush=True)
    return int(lost > 0)


if __name__ == "__main__":
    sys.exit(main())
