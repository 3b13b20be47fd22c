"""How long the gate takes and how much memory it needs, start-up included.

    python benchmarks/gate_speed.py DATASET [DATASET ...] [--out reports/gate_speed.json]

Runs `python -m fresnel validate` on each and reports wall time, peak memory and exit status.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path


def measure(path: str) -> dict[str, float | int | str]:
    started = time.monotonic()
    child = os.posix_spawn(
        sys.executable,
        [sys.executable, "-m", "fresnel", "validate", path],
        dict(os.environ),
    )
    _, status, usage = os.wait4(child, 0)
    return {
        "dataset": Path(path).name,
        "wall_s": round(time.monotonic() - started, 2),
        "cpu_s": round(usage.ru_utime + usage.ru_stime, 2),
        "peak_memory_mb": round(usage.ru_maxrss / 1024, 1),
        "exit_status": os.waitstatus_to_exitcode(status),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("datasets", nargs="+")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    text = json.dumps([measure(path) for path in arguments.datasets], indent=1)
    print(text)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
