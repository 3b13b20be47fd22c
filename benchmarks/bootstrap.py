"""How long a bootstrap takes: images -> Gaussians -> views -> files with hashes -> the gate.

    python benchmarks/bootstrap.py [--images 500] [--views 8] [--size 256] [--out benchmarks]

Writes the dataset into a temporary folder (--into DIR to choose where), prints a table, keeps it
in bootstrap_gpu.json or bootstrap_cpu.json and writes bootstrap.md anew from both. Making the input
images does not count. The parts are timed by themselves first, on 32 images, one after another;
the whole overlaps them.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fresnel import bootstrap, gate
from fresnel.data import layout as _layouts
from fresnel.data.dataset import InputImages
from fresnel.data.records import encode_object
from fresnel.host import machine as surroundings
from fresnel.host.machine import core_count
from fresnel.models.decoder import load_shipped, prune, render_small
from fresnel.objects import sources
from fresnel.report.provenance import git_state
from fresnel.scene.cameras import orbit

TARGETS = {"cuda": 20.0, "cpu": 300.0}  # seconds for 500 images x 8 views at 256 px


def pictures(count: int, size: int) -> InputImages:
    """Renders of the embedded objects, or coloured balls where their renderer isn't installed."""
    try:
        return sources.input_images("embedded", images=count, image_size=size)[0]
    except ImportError:
        print("no ray tracer here: coloured balls for inputs", flush=True)
    grid = (torch.arange(size) + 0.5) / size * 2 - 1
    squared = grid**2 + grid[:, None] ** 2
    inside = squared < 0.25
    shade = (1 - squared * 3).clamp(0.2, 1) * inside
    generator = torch.Generator().manual_seed(0)
    tint = torch.rand(count, 1, 1, 3, generator=generator) * 0.7 + 0.3
    stripes = 0.7 + 0.3 * torch.sign(torch.sin(torch.arange(size) / 5))[:, None, None]
    rgb = (shade[..., None] * tint * stripes * 255).to(torch.uint8)
    alpha = (inside.to(torch.uint8) * 255).expand(count, size, size).contiguous()
    cameras = orbit(
        torch.zeros(count), torch.full((count,), 15.0), 2.2,
        pivot=(0.0, 0.0, 0.0), focal_px=1.2 * size, width=size, height=size,
    )  # fmt: skip
    return InputImages(tuple(f"ball{i}__0" for i in range(count)), rgb, alpha, cameras)


def parts(
    inputs: InputImages, config: bootstrap.BootstrapConfig, device: torch.device
) -> dict[str, float]:
    """Milliseconds an image for each part by itself."""
    decoder = load_shipped("pixel", device)
    batches = [inputs[start : start + 8] for start in range(0, len(inputs), 8)]

    def timed(act: Callable[[], Any]) -> tuple[float, Any]:
        if device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        result = act()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - began) / len(inputs) * 1e3, result

    with torch.no_grad():
        drawn = bootstrap._drawn(batches[0], decoder, config, device)  # compiles the renderer
        decode_ms, scenes = timed(
            lambda: [prune(bootstrap.place(b.to(device), decoder, config)[0]) for b in batches]
        )
        cameras = [bootstrap.novel_cameras(b, config).to(device) for b in batches]
        render_ms, _ = timed(
            lambda: [
                render_small(scene, views, near=bootstrap.NEAR).rgb.sum()
                for scene, views in zip(scenes, cameras, strict=True)
            ]
        )
        records = bootstrap._put_together(batches[0], config, *drawn)
    began = time.perf_counter()
    files = [data for record in records for _, data in encode_object(record)]
    encode_ms = (time.perf_counter() - began) / len(records) * 1e3
    began = time.perf_counter()
    for data in files:
        _layouts.sha256(data)
    hash_ms = (time.perf_counter() - began) / len(records) * 1e3
    return {"decode": decode_ms, "render": render_ms, "encode": encode_ms, "hash": hash_ms}


def machine(device: torch.device) -> str:
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.machine()
    return f"{name}, {core_count()} CPU cores, torch {torch.__version__}"


def table(out: Path) -> Iterator[str]:
    yield "# Bootstrap speed"
    yield ""
    yield "`python benchmarks/bootstrap.py`: decode, render, encode, write, hash, gate."
    for kind in ("gpu", "cpu"):
        path = out / f"bootstrap_{kind}.json"
        if not path.exists():
            continue
        r = json.loads(path.read_text())
        yield from ("", f"## {r['machine']}", "")
        yield f"{r['images']} images x {r['views']} views, {r['size']} px, {r['megabytes']:.0f} MB"
        yield from ("", "| part | s | |", "|:--|--:|:--|")
        yield f"| decode, render, encode, write, hash (overlapped) | {r['bootstrap_s']:.1f} | |"
        yield f"| gate | {r['gate_s']:.1f} | {r['gate']} |"
        whole = r["bootstrap_s"] + r["gate_s"]
        yield (
            f"| whole | {whole:.1f} | {r['images'] * r['views'] / whole:.0f} views/s; wanted "
            f"at most {r['target_s']:.0f} s for 500 x 8 |"
        )
        yield from ("", "| by itself, one thread of work at a time | ms an image |", "|:--|--:|")
        for name, value in r["parts_ms"].items():
            yield f"| {name} | {value:.1f} |"
        yield from ("", f"Peak memory {r['peak_gb']:.1f} GB.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--views", type=int, default=8)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--into", type=Path, help="where to write (None: a temporary folder)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    inputs = pictures(arguments.images, sources.INPUT_SIZE)  # what the shipped decoder sees
    config = replace(
        bootstrap.CORRECTED, views_per_image=arguments.views, image_size=arguments.size
    )
    found = parts(inputs[:32], config, device)
    print({name: round(value, 1) for name, value in found.items()}, flush=True)
    folder = Path(tempfile.mkdtemp(dir=arguments.into))
    try:
        decoder = load_shipped("pixel", device)
        surroundings.reset_peak_memory(device)
        began = time.perf_counter()
        made = bootstrap.bootstrap(inputs, decoder, config, folder / "set", device=device)
        bootstrap_s = time.perf_counter() - began
        began = time.perf_counter()
        verdict = gate.validate(made)
        gate.issue_receipt(made, verdict)
        gate_s = time.perf_counter() - began
        size = sum(p.stat().st_size for p in (folder / "set").rglob("*") if p.is_file())
    finally:
        shutil.rmtree(folder)
    result = {
        "machine": machine(device),
        "commit": git_state()["commit"],
        "images": len(inputs),
        "views": arguments.views,
        "size": arguments.size,
        "megabytes": size / 1e6,
        "bootstrap_s": bootstrap_s,
        "gate_s": gate_s,
        "gate": verdict.summary,
        "target_s": TARGETS[device.type],
        "parts_ms": found,
        "peak_gb": surroundings.peak_memory(device) / 1e9,
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    kind = "gpu" if device.type == "cuda" else "cpu"
    path = arguments.out / f"bootstrap_{kind}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    (arguments.out / "bootstrap.md").write_text("\n".join(table(arguments.out)) + "\n")
    print("\n".join(table(arguments.out)))


if __name__ == "__main__":
    main()
