"""How long the gate takes and how much memory it needs, start-up included.

    python benchmarks/gate_speed.py --work /tmp/speed --zip furniture.zip   # makes the sets, once
    python benchmarks/gate_speed.py DATASET [DATASET ...]

Runs `python -m fresnel validate` on each set and prints wall and processor time, peak memory, exit
status and size on disk.  With --work: 500 x 8 and 125 x 8 views of 256 px (memory must not grow
with the set), and the original experiment's geometry (`bootstrap.ORIGINAL`), which must be refused.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any


def measure(path: str | Path) -> dict[str, Any]:
    """One validation in a process of its own."""
    started = time.monotonic()
    child = os.posix_spawn(
        sys.executable,
        [sys.executable, "-m", "fresnel", "validate", str(path), "--json"],
        dict(os.environ),
        file_actions=[(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)],
    )
    _, status, usage = os.wait4(child, 0)
    wall = time.monotonic() - started
    files = [file for file in Path(path).rglob("*") if file.is_file()]
    return {
        "set": Path(path).name,
        "records": len(list(Path(path).glob("image_*"))),
        "wall s": f"{wall:.1f}",
        "processor s": f"{usage.ru_utime + usage.ru_stime:.1f}",
        "peak MB": f"{usage.ru_maxrss / 1024:.0f}",
        "exit": os.waitstatus_to_exitcode(status),
        "on disk MB": f"{sum(file.stat().st_size for file in files) / 1e6:.0f}",
    }


def make(work: Path, source: str | None, samples: int) -> list[Path]:
    """The three sets, rendered unless they are there."""
    from fresnel import bootstrap
    from fresnel.models import decoder
    from fresnel.objects import sources
    from fresnel.objects.assets import embedded_assets, find_assets
    from fresnel.objects.render_set import render_set

    assets = find_assets(source) if source else embedded_assets()
    made = []
    for count in (500, 125):
        inputs = -(-count // len(assets))
        chosen = assets[: -(-count // inputs)]
        made.append(work / f"{count}x8x256")
        if not made[-1].exists():
            whole = work / f".whole-{count}"
            data = render_set(
                chosen, whole, image_size=256, inputs_per_object=inputs, samples=samples
            )
            _take(data, made[-1], count)
    made.append(work / "original")
    if not made[-1].exists():
        inputs, _ = sources.input_images("embedded", images=32, image_size=64, cache=work)
        config = replace(bootstrap.ORIGINAL, image_size=64)
        bootstrap.bootstrap(inputs, decoder.load_shipped("patch"), config, made[-1])
    return made


def _take(data: Any, path: Path, count: int) -> None:
    import shutil

    from fresnel.data import dataset

    if len(data) == count:
        data.path.rename(path)
        return
    records = (data[k] for k in range(count))
    dataset.write(path, records, background=data.background, meta=data.meta, total=count)
    shutil.rmtree(data.path)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("datasets", nargs="*")
    parser.add_argument("--work", type=Path, help="folder to make sets in")
    parser.add_argument("--zip", help="furniture.zip; without it embedded objects are rendered")
    parser.add_argument("--samples", type=int, default=4, help="rays a pixel (default: 4)")
    parser.add_argument("--out", type=Path, help="write the rows as JSON too")
    arguments = parser.parse_args()
    if bool(arguments.datasets) == bool(arguments.work):
        parser.error("give datasets, or --work")
    paths = arguments.datasets
    if not paths:
        # In a process of its own: a child's peak memory is never below its parent's.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            paths = pool.submit(make, arguments.work, arguments.zip, arguments.samples).result()
    rows = [measure(path) for path in paths]
    from fresnel.evaluation.metrics import format_rows

    cores = len(os.sched_getaffinity(0))
    print(f"{cores} cores, load {os.getloadavg()[0]:.1f}\n\n{format_rows(rows)}")
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
