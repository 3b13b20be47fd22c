"""How long `render_set` takes: objects at 8 views, 128 px, 4 samples, on all cores given.

    python benchmarks/render_set.py furniture.zip            # or a folder of objects, .sh3f ...
    python benchmarks/render_set.py --furniture /usr/share/sweethome3d/furniture

Prints one JSON line: wall time, objects, rays a second, size on disk, the largest memory of one
process, and the same of a second run that was killed half way and resumed.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from fresnel.objects import furniture
from fresnel.objects.assets import Asset, find_assets
from fresnel.objects.render_set import render_set


def _assets(arguments: argparse.Namespace) -> list[Asset]:
    if arguments.furniture:
        return furniture.assets(arguments.furniture)
    return find_assets(arguments.objects)


def _once(arguments: argparse.Namespace, path: Path) -> dict[str, Any]:
    assets = _assets(arguments)
    start = time.perf_counter()
    made = render_set(
        assets, path, views=arguments.views, image_size=arguments.size, workers=arguments.workers
    )
    seconds = time.perf_counter() - start
    rays = len(made) * (arguments.views + 1) * arguments.size**2 * 4
    return {
        "objects": len(made),
        "seconds": round(seconds, 1),
        "million_rays_per_s": round(rays / seconds / 1e6, 2),
        "megabytes": round(sum(p.stat().st_size for p in path.rglob("*") if p.is_file()) / 1e6, 1),
        "content_hash": made.content_hash,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("objects", nargs="?", help="zip, folder, manifest or .sh3f")
    parser.add_argument("--furniture", help="folder with the package's .sh3f files")
    parser.add_argument("--views", type=int, default=8)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--workers", type=int)
    parser.add_argument("--kill-after", type=float, default=0.0, help="seconds; 0: don't try")
    parser.add_argument("--into", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not (arguments.objects or arguments.furniture):
        parser.error("give objects, or --furniture")
    if arguments.into:
        print(json.dumps(_once(arguments, Path(arguments.into))))
        return
    with tempfile.TemporaryDirectory() as folder:
        result = {"cores": len(os.sched_getaffinity(0)), **_once(arguments, Path(folder) / "set")}
        usage = [resource.getrusage(who).ru_maxrss for who in (0, resource.RUSAGE_CHILDREN)]
        result["peak_megabytes_of_a_process"] = round(max(usage) / 1000)
        if arguments.kill_after:
            shutil.rmtree(Path(folder) / "set")
            command = [sys.executable, *sys.argv, "--into", str(Path(folder) / "set")]
            first = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)
            time.sleep(arguments.kill_after)
            os.killpg(first.pid, signal.SIGKILL)  # of the group that this benchmark started
            first.wait()
            done = len(list(Path(folder).glob(".set.rendering-*/image_*")))
            second = _once(arguments, Path(folder) / "set")
            result["killed_after"] = {
                "seconds": arguments.kill_after,
                "objects_done": done,
                "seconds_to_finish": second["seconds"],
                "same_bytes": second["content_hash"] == result["content_hash"],
            }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
