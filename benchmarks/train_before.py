"""How much faster a CVS trains than in the first working version, side by side on one machine.

    python benchmarks/train_before.py [--rounds 5] [--steps 10] [--threads 2] [--size small]
        [--precision fp32] [--compile] [--before 02d657e] [--json FILE]

The first version is taken from git into a temporary folder. Both train the same network on the
same synthetic pairs (64 px, batch 16), each in a process of its own, in turns: old, new, old, new.
A round's rate is that of its median step, early in the run (denoising) and late (with the second
pass); the ratio is of the medians over rounds. CPU seconds are taken beside wall seconds: on a
shared machine only they compare. The new loss does more than the old one: it compares light.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
STAGES = {"denoising": 0.0, "consistency": 0.9}
SIZE, BATCH = 64, 16


def one_round(
    source: str, steps: int, threads: int, size: str, precision: str, compiled: bool
) -> None:
    """In a child process: time `steps` steps of the package in `source`; prints JSON."""
    sys.path.insert(0, source)
    import torch

    from fresnel.models import cvs

    try:
        from fresnel.training.cvs_task import CVSTask
    except ImportError:  # one file, then
        from fresnel.models.cvs import CVSTask  # type: ignore[attr-defined, no-redef]
    from fresnel.data.dataset import InputImages, ViewTensors
    from fresnel.scene.cameras import Cameras, orbit

    torch.set_num_threads(threads)
    m, v = 32, 8

    def cameras(azimuth: torch.Tensor) -> Cameras:
        return orbit(
            azimuth, 15.0, 2.2, pivot=(0.0, 0.0, 0.0), focal_px=1.2 * SIZE, width=SIZE, height=SIZE
        )

    generator = torch.Generator().manual_seed(0)
    rgb = torch.randint(0, 255, (m, v, SIZE, SIZE, 3), generator=generator, dtype=torch.uint8)
    alpha = torch.zeros(m, v, SIZE, SIZE, dtype=torch.uint8)
    alpha[..., SIZE // 4 : -SIZE // 4, SIZE // 4 : -SIZE // 4] = 255
    rgb *= (alpha > 0)[..., None]
    names = tuple(f"ball{i}" for i in range(m))
    inputs = InputImages(names, rgb[:, 0], alpha[:, 0], cameras(torch.zeros(m)))
    around = cameras((torch.arange(v) * 45.0).expand(m, v))
    views = ViewTensors(names, inputs, rgb, alpha, around, torch.zeros(m, 3))
    torch.manual_seed(0)
    config = cvs.CVSConfig.preset(size, image_size=SIZE)
    task: Any = CVSTask(cvs.CVS(config), views, batch_size=BATCH)
    model = task.model
    try:
        from fresnel.training.host import reuse_memory

        reuse_memory()
    except ImportError:  # the first version knew of none
        pass
    if compiled:  # what `fit` compiles
        task.hot = {part: torch.compile(f, dynamic=False) for part, f in task.hot.items()}
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, fused=True)

    def step(k: int, progress: float) -> None:
        drawn = torch.Generator().manual_seed(k)
        batch = task.batch(k, drawn)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = task.loss(batch, progress=progress, generator=drawn, ema=model)["loss"]
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    found = {}
    for name, progress in STAGES.items():
        wall, cpu = [], []
        for k in range(3 + steps):
            began, used = time.perf_counter(), time.process_time()
            step(k, progress)
            wall.append(time.perf_counter() - began)
            cpu.append(time.process_time() - used)
        found[name] = [statistics.median(wall[3:]), statistics.median(cpu[3:])]
    print(json.dumps(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--size", default="small")
    parser.add_argument("--old-size", default="", help="the old one's network, if another")
    parser.add_argument("--precision", default="fp32", help="of this version; the first had fp32")
    parser.add_argument("--compile", action="store_true", help="this version's, as `fit` does")
    parser.add_argument("--before", default="02d657e")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--round", help="for the child: the folder of the package")
    a = parser.parse_args()
    if a.round:
        one_round(a.round, a.steps, a.threads, a.size, a.precision, a.compile)
        return
    rounds: dict[str, list[dict[str, list[float]]]] = {"before": [], "now": []}
    with tempfile.TemporaryDirectory() as folder:
        packed = subprocess.run(
            ["git", "-C", str(ROOT), "archive", a.before, "fresnel"],
            check=True,
            capture_output=True,
        ).stdout
        with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
            archive.extractall(folder, filter="data")
        for _ in range(a.rounds):
            for who, source, size in (
                ("before", folder, a.old_size or a.size),
                ("now", str(ROOT), a.size),
            ):
                command = [sys.executable, __file__, "--round", source, "--steps", str(a.steps)]
                command += ["--threads", str(a.threads), "--size", size]
                command += ["--precision", "fp32" if who == "before" else a.precision]
                command += ["--compile"] if a.compile and who == "now" else []
                environment = {**os.environ, "OMP_NUM_THREADS": str(a.threads)}
                done = subprocess.run(
                    command, check=True, capture_output=True, text=True, env=environment, cwd=folder
                )
                rounds[who].append(json.loads(done.stdout.splitlines()[-1]))
    print(
        f"'{a.size}', {SIZE} px, batch {BATCH}, {a.threads} threads, {a.precision}"
        f"{', compiled' if a.compile else ''}, load {os.getloadavg()[0]:.1f}"
    )
    print("\n| samples/s | before | now | ratio | ratio of CPU seconds |")
    print("|:--|--:|--:|--:|--:|")
    figures = {}
    for name in STAGES:
        (old, old_cpu), (new, new_cpu) = (
            [statistics.median(found[name][k] for found in rounds[who]) for k in (0, 1)]
            for who in rounds
        )
        figures[name] = {
            "before": BATCH / old, "now": BATCH / new, "ratio": old / new,
            "cpu_ratio": old_cpu / new_cpu,
        }  # fmt: skip
        print(
            f"| {name} | {BATCH / old:.1f} | {BATCH / new:.1f} | {old / new:.2f} | "
            f"{old_cpu / new_cpu:.2f} |"
        )
    if a.json:
        a.json.write_text(json.dumps({"figures": figures, "rounds": rounds}, indent=1) + "\n")


if __name__ == "__main__":
    main()
