"""How often the gate is right: faults it catches, causes it names, healthy sets it refuses.

    python benchmarks/gate.py --zip furniture.zip --out reports/published/gate
    python benchmarks/gate.py --quick --out /tmp/gate        # embedded objects, fewer strengths

Healthy sets of ten records come from three sources: renders of the zip's test objects, renders of
the embedded objects, and Gaussians that the shipped decoder makes of either; and from analytic
shapes that look faulty (`gate_shapes`).  Every fault is put into sets of all sources, at several
strengths and on several backgrounds.  Thresholds were set on training objects; `--seed` decides
about cameras, sets and faults, and the published figures are of a seed that set none.

Writes results.json, report.html, gate.json, gate.md and gate.png; stopped, it goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import gate_report
import numpy as np
import torch
from gate_shapes import HARD, hard_set

from fresnel import bootstrap, faults
from fresnel.data import dataset
from fresnel.data.dataset import MultiViewDataset, ObjectViews
from fresnel import gate
from fresnel.models import decoder
from fresnel.objects.assets import embedded_assets, find_assets
from fresnel.objects.render_set import render_set
from fresnel.report import record

SCENES: tuple[faults.Scene, ...] = ("black", "white", "photo")
RECORDS = 10
BLACK = (0.0, 0.0, 0.0)
_BLACK_ONLY = ("white_views", "constant_views")
"""Faults that make frames opaque: put on another background afterwards they would be undone."""


@dataclass
class Sample:
    """As much of a dataset as the gate needs: records in memory."""

    records: Sequence[ObjectViews]
    background: tuple[float, float, float] = BLACK
    meta: dict[str, Any] = field(default_factory=dict)
    content_hash: str = ""

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> ObjectViews:
        return self.records[index]


def make_sources(arguments: argparse.Namespace, folder: Path) -> list[str]:
    """Render and decode the healthy sets; returns their folders."""
    made: list[str] = []
    objects = {"embedded objects": (embedded_assets(), 2)}
    if arguments.zip:
        objects["held-out furniture"] = (
            [a for a in find_assets(arguments.zip) if a.split == arguments.split],
            1,
        )
    pixel = decoder.load_shipped("pixel")
    config = replace(bootstrap.CORRECTED, image_size=arguments.size, seed=arguments.seed)
    for name, (assets, inputs) in objects.items():
        path, decoded = folder / name, folder / f"{name}, decoded"
        if not path.exists():
            render_set(
                assets,
                path,
                image_size=arguments.size,
                inputs_per_object=inputs,
                seed=arguments.seed,
                workers=1,
            )
        if not decoded.exists():
            bootstrap.bootstrap(dataset.open(path).inputs()[:78], pixel, config, decoded)
        made += [str(path), str(decoded)]
    return made


def draw(data: MultiViewDataset, seed: Sequence[int]) -> list[ObjectViews]:
    """Ten records of different objects."""
    order = np.random.default_rng(seed).permutation(len(data))
    chosen: dict[str, int] = {}
    for k in order:
        chosen.setdefault(data.names[k].partition("__")[0], int(k))
    return [data[k] for k in list(chosen.values())[:RECORDS]]


@dataclass(frozen=True)
class Task:
    """One set of ten: healthy (no fault), faulty, or of shapes (a source that is no folder)."""

    source: str
    number: int
    fault: str = ""
    strength: float = 0.0
    scene: faults.Scene = "black"
    opaque: bool = False
    seed: int = 0

    @property
    def key(self) -> str:
        return repr(replace(self, source=Path(self.source).name))


def trial(task: Task) -> dict[str, Any]:
    """What the gate said of one set."""
    seed = [task.seed, task.number]
    background, meta = BLACK, {}
    if task.source in HARD:
        records = hard_set(task.source, task.seed + task.number, RECORDS, opaque=task.opaque)
        background = (1.0, 1.0, 1.0) if task.source == "white on white" else BLACK
    else:
        records = draw(dataset.open(task.source), seed)
        if task.fault:
            meta = faults.said([r.name for r in records], task.fault, task.strength)
            one = task.seed * 1_000_000 + task.number
            records = list(faults.corrupt(records, task.fault, task.strength, seed=one))
        rng = np.random.default_rng(seed)
        if task.scene != "black":
            records = [faults.on_background(r, task.scene, rng, BLACK) for r in records]
        background = (1.0, 1.0, 1.0) if task.scene == "white" else BLACK
    started = time.perf_counter()
    verdict = gate.validate(Sample(records, background, meta), progress=False, workers=1)
    return {
        "key": task.key,
        "source": Path(task.source).name,
        "fault": task.fault,
        "strength": task.strength,
        "scene": task.scene,
        "opaque": task.opaque,
        "shape": task.source in HARD,
        "passed": verdict.passed,
        "codes": [reason.code for reason in verdict.reasons],
        "mend": verdict.reasons[0].mend if verdict.reasons else None,
        "seconds": round(time.perf_counter() - started, 3),
    }


def faulty_tasks(sources: Sequence[str], arguments: argparse.Namespace) -> Iterator[Task]:
    for number, (fault, (_, practical)) in enumerate(faults.EXPECTED.items()):
        for step, strength in enumerate(gate_report.STRENGTHS):
            if arguments.quick and strength != practical:
                continue
            count = arguments.sets if strength >= practical else max(2, arguments.sets // 2)
            for k in range(count):
                source = sources[(number + k) % len(sources)]
                if fault == "identity_mismatch" and "decoded" not in source:
                    source = f"{source}, decoded"
                # Strengths meet different sources and backgrounds.
                scene = SCENES[(k + round(20 * strength)) % 3]
                scene = "black" if fault in _BLACK_ONLY else scene
                one = 10_000 * number + 1000 * step + k
                yield Task(source, one, fault, strength, scene, seed=arguments.seed)


def healthy_tasks(sources: Sequence[str], arguments: argparse.Namespace) -> Iterator[Task]:
    for s, source in enumerate(sources):
        for k in range(arguments.healthy):
            yield Task(source, 1_000_000 * (s + 1) + k, scene=SCENES[k % 3], seed=arguments.seed)
    for name in HARD:
        for k in range(arguments.hard):
            yield Task(name, k // 2, opaque=bool(k % 2), seed=arguments.seed)


def run_all(tasks: Sequence[Task], log: Path, workers: int) -> list[dict[str, Any]]:
    """A row per task, in the order of the tasks; rows that `log` has already are not made again."""
    from tqdm import tqdm

    done: dict[str, dict[str, Any]] = {}
    if log.is_file():
        done = {row["key"]: row for row in map(json.loads, log.read_text().splitlines())}
    missing = [task for task in tasks if task.key not in done]
    context = multiprocessing.get_context("spawn")
    with (
        log.open("a") as file,
        ProcessPoolExecutor(
            workers, context, initializer=torch.set_num_threads, initargs=(1,)
        ) as pool,
    ):
        for row in tqdm(pool.map(trial, missing, chunksize=2), total=len(missing), desc="sets"):
            done[row["key"]] = row
            file.write(json.dumps(row) + "\n")
            file.flush()
    return [done[task.key] for task in tasks]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--zip", help="furniture.zip; without it only embedded objects are used")
    parser.add_argument("--split", default="test", help="of the zip (default: test)")
    parser.add_argument("--out", type=Path, required=True, help="folder of the report")
    parser.add_argument("--work", type=Path, help="folder for sets and rows (default: temporary)")
    parser.add_argument("--sets", type=int, default=6, help="sets per fault and strength")
    parser.add_argument("--healthy", type=int, default=60, help="healthy sets per source")
    parser.add_argument("--hard", type=int, default=24, help="healthy sets per unusual shape")
    parser.add_argument("--size", type=int, default=64, help="pixels")
    parser.add_argument("--seed", type=int, default=0, help="of cameras, sets and faults")
    parser.add_argument("--quick", action="store_true", help="practical strengths only")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    arguments = parser.parse_args()
    parameters = {
        key: getattr(arguments, key)
        for key in ("split", "sets", "healthy", "hard", "size", "seed", "quick")
    }
    run = record.start("gate_calibration", parameters, arguments.out, seed=arguments.seed)
    with tempfile.TemporaryDirectory() as temporary:
        work = arguments.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        with run.stage("render and decode the healthy sets"):
            sources = make_sources(arguments, work)
        faulty = list(faulty_tasks(sources, arguments))
        healthy = list(healthy_tasks(sources, arguments))
        with run.stage("gate the sets"):
            rows = run_all([*faulty, *healthy], work / "rows.jsonl", arguments.workers)
    result = gate_report.summarise(rows, parameters | {"records": RECORDS})
    print(gate_report.publish(run, result))


if __name__ == "__main__":
    main()
