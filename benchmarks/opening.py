"""How long a dataset takes to open and to verify, and its memory, before and after a change.

    .venv/bin/python benchmarks/opening.py DATASET --against COMMIT [--rounds 3]

Each in a process of its own, in turns: this tree's `fresnel`, and that of the commit. Writes
benchmarks/opening.json: medians.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WORK = """
import json, resource, sys, time
from fresnel.data import dataset
data, said, start = dataset.open(sys.argv[1]), {}, time.perf_counter()
tensors = data.tensors()
said["open_s"] = time.perf_counter() - start
said["peak_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
start = time.perf_counter()
data.verify()
said["verify_s"] = time.perf_counter() - start
said |= {"records": len(data), "pictures": 1 + data.views_per_object}
print(json.dumps(said | {"checksum": int(tensors.sums.sum())}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--against", required=True, metavar="COMMIT")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    found: dict[str, list[dict[str, float]]] = {"before": [], "now": []}
    with tempfile.TemporaryDirectory() as folder:
        archive = ["git", "-C", ROOT, "archive", given.against, "fresnel"]
        packed = subprocess.run(archive, check=True, capture_output=True).stdout
        subprocess.run(["tar", "x", "-C", folder], input=packed, check=True)
        for _ in range(given.rounds):
            for name, tree in (("before", folder), ("now", str(ROOT))):
                command = [sys.executable, "-P", "-c", WORK, str(given.dataset.resolve())]
                environment = {**os.environ, "PYTHONPATH": tree}
                made = subprocess.run(
                    command, check=True, capture_output=True, env=environment, cwd=folder, text=True
                )
                found[name].append(json.loads(made.stdout))
                print(name, made.stdout.strip(), flush=True)
    same = {entry.pop("checksum") for entries in found.values() for entry in entries}
    assert len(same) == 1, "both read the same"
    medians = {
        name: {key: round(statistics.median(e[key] for e in entries), 2) for key in entries[0]}
        for name, entries in found.items()
    }
    where = {"cores": len(os.sched_getaffinity(0)), "machine": platform.machine()}
    result = {"against": given.against, "rounds": given.rounds, **where, **medians}
    (ROOT / "benchmarks" / "opening.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
