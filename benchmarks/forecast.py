"""Does 02's forecast come true? Runs 02 and 03 and compares time, memory and samples/s.

    python benchmarks/forecast.py [--images 24] [--pixels 64] [--size small] [--steps 150]
        [--batch 16] [--smoke-steps 60] [--accumulate 1] [--compile] [--precision auto]
        [--device auto] [--name NAME] [--out benchmarks]

Makes a small gated dataset in a temporary folder, runs both notebooks on it, each in a process of
its own (papermill's kernel; where there is no Jupyter, the cells one after another), and prints
every part of the forecast beside what 03 spent on it. The wall time is that of the whole process,
from outside. Results go to forecast_gpu.json or forecast_cpu.json under NAME; forecast.md is
written anew from both.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import types
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
AIM = 0.15


def make_data(folder: Path, images: int, pixels: int, device: str) -> tuple[Path, str]:
    """A gated bootstrap, and where its held-out objects come from."""
    from dataclasses import replace

    from bootstrap import pictures

    from fresnel import bootstrap
    from fresnel.gate import verdict as gate
    from fresnel.models.decoder import load_shipped

    config = replace(bootstrap.CORRECTED, image_size=pixels)
    decoder = load_shipped("pixel", device)
    inputs = pictures(images, max(pixels, 128))
    data = bootstrap.bootstrap(inputs, decoder, config, folder / "data")
    gate.issue_receipt(data, gate.validate(data))
    if not inputs.names[0].startswith("ball"):
        return folder / "data", "embedded"
    balls = replace(inputs[:8], names=tuple(f"held{i}__0" for i in range(8)))
    bootstrap.bootstrap(balls, decoder, config, folder / "truth")
    return folder / "data", str(folder / "truth")


def run(notebook: str, params: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Run a notebook; its results, with "wall_s" of the whole process and "busy", the CPU time of
    it over that."""
    out = folder / notebook
    params = {**params, "output_dir": str(out)}
    (folder / f"{notebook}.json").write_text(json.dumps(params))
    command = [sys.executable, __file__, "--execute", notebook, str(folder / f"{notebook}.json")]
    before, began = os.times(), time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    wall, after = time.perf_counter() - began, os.times()
    if done.returncode:
        raise SystemExit(f"{notebook}:\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}")
    used = sum(after[2:4]) - sum(before[2:4])
    found = json.loads((out / "results.json").read_text())
    return {**found, "wall_s": wall, "busy": used / wall}


def execute(notebook: str, params: dict[str, Any]) -> None:
    """What the child process does."""
    path = ROOT / "notebooks" / f"{notebook}.ipynb"
    if find_spec("papermill") and find_spec("ipykernel"):
        import papermill

        out = str(Path(params["output_dir"]).with_suffix(".ipynb"))
        papermill.execute_notebook(str(path), out, params, cwd=str(ROOT), progress_bar=False)
        return
    shown = types.ModuleType("IPython.display")
    for name in ("display", "HTML", "Markdown", "Image", "SVG"):
        setattr(shown, name, lambda *_, **__: None)
    sys.modules.setdefault("IPython", types.ModuleType("IPython"))
    sys.modules["IPython.display"] = shown
    sys.path.insert(0, str(ROOT))
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for cell in json.loads(path.read_text())["cells"]:
        if cell["cell_type"] != "code":
            continue
        exec(compile("".join(cell["source"]), cell["id"], "exec"), namespace)
        if "parameters" in cell["metadata"].get("tags", []):
            namespace.update(params)


def table(rows: dict[str, dict[str, Any]]) -> list[str]:
    """Markdown: one line a run, then the parts of each."""
    lines = [
        "| run | forecast, s | actual, s | error | whole process, s | error | memory forecast, MB "
        "| actual | error | load |",
        "|:--|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name, row in rows.items():
        plan, spent = row["plan"], row["spent"]

        def off(actual: float, forecast: float) -> str:
            error = actual / forecast - 1
            return f"{error:+.0%}" if abs(error) <= AIM else f"**{error:+.0%}**"

        time_s, memory = plan["duration_s"], plan["peak_memory_bytes"]
        lines.append(
            f"| {name} | {time_s:.1f} | {spent['duration_s']:.1f} | "
            f"{off(spent['duration_s'], time_s)} | {row['wall_s']:.1f} | "
            f"{off(row['wall_s'], time_s)} | {memory / 1e6:,.0f} | "
            f"{spent['peak_memory_bytes'] / 1e6:,.0f} | "
            f"{off(spent['peak_memory_bytes'], memory)} | {row['load'][1]:.1f} |"
        )
    for name, row in rows.items():
        parts = row["plan"]["parts"]
        lines += ["", f"{name} (`{row['command']}`), forecast / actual, s: "]
        lines[-1] += ", ".join(
            f"{part} {parts[part]:.1f} / {row['spent']['parts'][part]:.1f}" for part in parts
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--execute", nargs=2, metavar=("NOTEBOOK", "PARAMS"), help="for the child")
    parser.add_argument("--images", type=int, default=24)
    parser.add_argument("--pixels", type=int, default=64)
    parser.add_argument("--size", default="small")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--smoke-steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--name", default="")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    arguments = parser.parse_args()
    if arguments.execute:
        execute(arguments.execute[0], json.loads(Path(arguments.execute[1]).read_text()))
        return
    from fresnel.host.machine import pick_device

    device = pick_device(arguments.device)
    name = arguments.name or (
        f"{arguments.size}, {arguments.pixels} px, {arguments.steps} x {arguments.batch}"
        + (", compiled" if arguments.compile else "")
    )
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        data, truth = make_data(folder, arguments.images, arguments.pixels, device)
        shared = {
            "dataset_dir": str(data), "truth_source": truth, "size": arguments.size,
            "batch_size": arguments.batch, "accumulate": arguments.accumulate, "device": device,
            "compile_step": arguments.compile, "precision": arguments.precision,
            "allow_failed_gate": True,
        }  # fmt: skip
        before = os.getloadavg()[0]
        smoke = {"full_steps": arguments.steps, "max_steps": arguments.smoke_steps}
        planned = run("02_smoke_train", {**shared, **smoke}, folder)
        between = os.getloadavg()[0]
        full = run("03_full_train", {**shared, "steps": arguments.steps, "resume": False}, folder)
    row = {
        "plan": planned["metrics"]["forecast"],
        "acts_s": planned["metrics"]["acts_s"],
        "spent": full["metrics"]["spent"],
        "wall_s": full["wall_s"],
        "smoke_wall_s": planned["wall_s"],
        "busy": [planned["busy"], full["busy"]],
        "load": [before, between],
        "commit": full["provenance"]["git"]["commit"] if "git" in full["provenance"] else "",
        "command": " ".join(["python", "benchmarks/forecast.py", *sys.argv[1:]]),
        "machine": torch.cuda.get_device_name() if device == "cuda" else "cpu",
    }
    path = arguments.out / f"forecast_{'gpu' if device == 'cuda' else 'cpu'}.json"
    rows = json.loads(path.read_text()) if path.exists() else {}
    rows[name] = row
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows, indent=1) + "\n")
    print("\n".join(table({name: row})))
    text = ["# Forecasts of notebook 02 against the runs of 03", "", f"Wanted: within {AIM:.0%}."]
    text += ["", "Forecast and actual are of the notebook's kernel. The whole process also starts"]
    text += ["papermill before it and ends the kernel after it, which takes as long in a long run."]
    for kind in ("gpu", "cpu"):
        kept = arguments.out / f"forecast_{kind}.json"
        if kept.exists():
            text += ["", f"## {kind.upper()}", "", *table(json.loads(kept.read_text()))]
    (arguments.out / "forecast.md").write_text("\n".join(text) + "\n")


if __name__ == "__main__":
    main()
