"""How long a bootstrap takes: images -> Gaussians -> views -> files with hashes -> the gate.

    python benchmarks/bootstrap.py [--images 500] [--repeat 1] [--views 8] [--size 256] [--gpus 1]

Writes the dataset into a temporary folder (--into DIR to choose where), prints a table, keeps it
in bootstrap_gpu.json or bootstrap_cpu.json and writes bootstrap.md anew from both. Making the input
images does not count. The parts are timed by themselves first, on 32 images, one after another;
the whole overlaps them.
"""

import argparse
import json
import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fresnel import bootstrap, gate
from fresnel.data import layout
from fresnel.data.dataset import InputImages
from fresnel.data.records import encode_object
from fresnel.host import machine as surroundings
from fresnel.host.machine import core_count
from fresnel.models.decoder import load_shipped, prune, render_small
from fresnel.objects import sources
from fresnel.report.provenance import git_state
from fresnel.scene.gaussians import Gaussians

TARGETS = {"cuda": 20.0, "cpu": 300.0}  # seconds for 500 images x 8 views at 256 px


def parts(
    inputs: InputImages, config: bootstrap.BootstrapConfig, device: torch.device
) -> dict[str, float]:
    """Milliseconds an image for each part by itself."""
    decoder = load_shipped("pixel", device)
    batches = [inputs[start : start + 8] for start in range(0, len(inputs), 8)]
    cameras = [bootstrap.novel_cameras(batch, config).to(device) for batch in batches]
    found: dict[str, float] = {}

    def timed(name: str, images: int, act: Callable[[], Any]) -> Any:
        if device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        result = act()
        if device.type == "cuda":
            torch.cuda.synchronize()
        found[name] = (time.perf_counter() - began) / images * 1e3
        return result

    def decoded() -> list[Gaussians]:
        return [prune(bootstrap.place(b.to(device), decoder, config)[0]) for b in batches]

    with torch.no_grad():
        put_together = bootstrap._drawn(batches[0], decoder, config, device)  # compiles as well
        scenes = zip(timed("decode", len(inputs), decoded), cameras, strict=True)
        timed(
            "render",
            len(inputs),
            lambda: [render_small(*pair, near=bootstrap.NEAR).rgb.sum() for pair in scenes],
        )
        records = put_together()
    files = timed(
        "encode",
        len(records),
        lambda: [data for record in records for _, data in encode_object(record)],
    )
    timed("hash", len(records), lambda: [layout.sha256(data) for data in files])
    return found


def table(out: Path) -> str:
    lines = ["# Bootstrap speed", ""]
    lines += ["`python benchmarks/bootstrap.py`: decode, render, encode, write, hash, gate."]
    for kind in ("gpu", "gpu2", "gpu4", "gpu8", "cpu", "cpu2"):
        path = out / f"bootstrap_{kind}.json"
        if not path.exists():
            continue
        r = json.loads(path.read_text())
        whole = r["bootstrap_s"] + r["gate_s"]
        speed = f"{r['images'] * r['views'] / whole:.0f} views/s"
        lines += [
            *("", f"## {r['machine']}", ""),
            f"{r['images']} images x {r['views']} views, {r['size']} px, {r['megabytes']:.0f} MB",
            *("", "| part | s | |", "|:--|--:|:--|"),
            f"| decode, render, encode, write, hash (overlapped) | {r['bootstrap_s']:.1f} | |",
            f"| gate | {r['gate_s']:.1f} | {r['gate']} |",
            f"| whole | {whole:.1f} | {speed}; wanted at most {r['target_s']:.0f} s for 500 x 8 |",
            *("", "| by itself, one thread of work at a time | ms an image |", "|:--|--:|"),
            *(f"| {name} | {value:.1f} |" for name, value in r["parts_ms"].items()),
            *("", f"Peak memory {r['peak_gb']:.1f} GB, of the first process."),
        ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--views", type=int, default=8)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--gpus", type=int, default=1, help="that share the batches (default: 1)")
    parser.add_argument("--repeat", type=int, default=1, help="so often the same images")
    parser.add_argument("--into", type=Path, help="where to write (None: a temporary folder)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    asked = parser.parse_args()
    device = torch.device(asked.device)
    # of the size that the shipped decoder sees
    inputs, _ = sources.input_images("embedded", images=asked.images, image_size=sources.INPUT_SIZE)
    config = replace(bootstrap.CORRECTED, views_per_image=asked.views, image_size=asked.size)
    found = parts(inputs[:32], config, device)
    print({name: round(value, 1) for name, value in found.items()}, flush=True)
    many = inputs[torch.arange(len(inputs)).repeat(asked.repeat)]
    numbered = tuple(f"{number:06d}-{name}" for number, name in enumerate(many.names))
    inputs = replace(many, names=numbered) if asked.repeat > 1 else inputs
    decoder = load_shipped("pixel", device)
    surroundings.reset_peak_memory(device)
    with tempfile.TemporaryDirectory(dir=asked.into) as folder:
        began = time.perf_counter()
        target, given = Path(folder) / "set", {"device": device, "gpus": asked.gpus}
        made = bootstrap.bootstrap(inputs, decoder, config, target, **given)
        written = time.perf_counter()
        verdict = gate.validate(made)
        gate.issue_receipt(made, verdict)
        done = time.perf_counter()
        size = sum(p.stat().st_size for p in Path(folder).rglob("*") if p.is_file())
    name = platform.machine()
    if device.type == "cuda":
        name = surroundings.cards("cuda", asked.gpus)
    result = {
        "machine": f"{name}, {core_count()} CPU cores, torch {torch.__version__}",
        "commit": git_state()["commit"],
        "images": len(inputs),
        "views": asked.views,
        "size": asked.size,
        "megabytes": size / 1e6,
        "content_hash": made.content_hash,
        "bootstrap_s": written - began,
        "gate_s": done - written,
        "gate": verdict.summary,
        "target_s": TARGETS[device.type],
        "parts_ms": found,
        "peak_gb": surroundings.peak_memory(device) / 1e9,
    }
    asked.out.mkdir(parents=True, exist_ok=True)
    several = asked.gpus if asked.gpus > 1 else ""
    kind = f"gpu{several}" if device.type == "cuda" else f"cpu{several}"
    (asked.out / f"bootstrap_{kind}.json").write_text(json.dumps(result, indent=1) + "\n")
    (asked.out / "bootstrap.md").write_text(table(asked.out))
    print(table(asked.out))


if __name__ == "__main__":
    main()
