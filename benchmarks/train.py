"""How fast training is, where a step's time goes, and what every lever gains.

    python benchmarks/train.py [--quick] [--sections cvs,decoder,...] [--out benchmarks]

Each section prints a table as soon as it has one, and one that fails leaves the others alone.
Results go to train_gpu.json or train_cpu.json, and train.md is written anew from both; a section
that is not run keeps what it had. Predictions were written before the measurements.

    cvs        samples/s of the CVS: levers one by one; what a step's time goes to, and whether
               anything in it waits for the device; then the whole loop of `train.fit`
    recording  whole steps as CUDA graphs, by network and batch (on a GPU)
    decoder    views/s of the decoder, through the renderer, and what a step's time goes to
    optimizer  fused AdamW and foreach averages against plain ones
    memory     peak memory and samples/s by size and batch; gradient checkpointing
    agree      losses over 200 steps with each lever off and on; the same bits twice

On a CPU: the small network at 64 px; on a GPU: the large one at 256 px.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from _train_bench import Bench, matrix_rate
from _train_cvs import section_cvs, section_recording
from _train_decoder import section_decoder
from _train_levers import section_agree, section_memory, section_optimizer

from fresnel.report.provenance import git_state

SECTIONS: dict[str, Callable[[Bench], None]] = {
    "cvs": section_cvs,
    "recording": section_recording,
    "decoder": section_decoder,
    "optimizer": section_optimizer,
    "memory": section_memory,
    "agree": section_agree,
}


def machine(device: torch.device) -> str:
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor()
    name = name or platform.machine()
    threads = "" if device.type == "cuda" else f", {torch.get_num_threads()} threads"
    return f"{name}{threads}, torch {torch.__version__}"


def table(out: Path) -> Iterator[str]:
    yield "# Training speed"
    yield ""
    yield "`python benchmarks/train.py`. Predictions were written before the measurements."
    for kind in ("gpu", "cpu"):
        path = out / f"train_{kind}.json"
        if not path.exists():
            continue
        found = json.loads(path.read_text())
        yield from ("", f"## {found['machine']}")
        yield from ("", f"Large matrix product: {found['matrix_flop_per_s'] / 1e12:.1f} TFLOP/s.")
        for name, section in found["sections"].items():
            yield from ("", f"### {name}", "", *section["lines"])
            yield from ("", f"Commit {section['commit'][:7]}, {section['duration_s']:.0f} s.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--sections", default=",".join(SECTIONS))
    parser.add_argument("--quick", action="store_true", help="leave out what takes minutes")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    bench = Bench(device, arguments.quick)
    bench.rate = matrix_rate(bench)
    path = out / f"train_{'gpu' if bench.gpu else 'cpu'}.json"
    kept = json.loads(path.read_text())["sections"] if path.exists() else {}
    print(f"{machine(device)}; matrix product {bench.rate / 1e12:.2f} TFLOP/s", flush=True)
    for name in arguments.sections.split(","):
        bench.lines, bench.figures = [], {}
        print(f"\n## {name}\n", flush=True)
        began = time.perf_counter()
        try:
            SECTIONS[name](bench)
        except Exception as error:  # the other sections are worth having
            traceback.print_exc()
            bench.say(f"\nFailed: {type(error).__name__}: {error}")
        took = time.perf_counter() - began
        print(f"\n({name}: {took:.0f} s)", flush=True)
        if bench.gpu:
            torch.cuda.empty_cache()
        torch.compiler.reset()
        kept[name] = {
            "lines": bench.lines,
            "figures": bench.figures,
            "duration_s": took,
            "commit": git_state()["commit"],
        }
        kept = {key: kept[key] for key in SECTIONS if key in kept}
        record = {
            "machine": machine(device),
            "matrix_flop_per_s": bench.rate,
            "sections": kept,
        }
        path.write_text(json.dumps(record, indent=1) + "\n")
        (out / "train.md").write_text("\n".join(table(out)) + "\n")


if __name__ == "__main__":
    main()
