"""How long a bootstrap takes: images -> Gaussians -> views -> files with hashes -> the gate.

    python benchmarks/bootstrap.py [--images 500] [--repeat 1] [--views 8] [--size 256] [--gpus 1]
        [--into DIR] [--keep] [--out benchmarks] [--no-parts] [--no-gate] [--limits]

Writes the dataset into a temporary folder (--into DIR to choose where), prints a table, keeps it
in bootstrap_gpu.json or bootstrap_cpu.json and writes bootstrap.md anew from both. Making the input
images does not count. The parts are timed by themselves first, on 32 images, one after another;
the whole overlaps them. While it runs, a thread counts the records that are there and the cores
that are busy, with whatever.

`--limits` makes no dataset, but measures how many images a second each thing allows that processes
share: encoding in memory and writing what is encoded into DIR, by 1, half as many processes as
there are cores, and as many; handing records to processes; drawing. Results: bootstrap_limits.json.

On ext4 without a journal, as some virtual machines have it, files come several times slower for
minutes after many were removed: `--keep` leaves the set where it is, and `--limits` writes once
more after it has removed what it wrote.
"""

import argparse
import contextlib
import fcntl
import json
import os
import platform
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch

from fresnel import bootstrap, gate
from fresnel.data import layout
from fresnel.data.dataset import InputImages
from fresnel.data.records import ObjectViews, encode_object, write_files
from fresnel.host import machine as surroundings
from fresnel.host.machine import core_count
from fresnel.host.pool import processes
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


def busy_s() -> tuple[float, float]:
    """Processor seconds of the whole machine, in programs and in the system."""
    cpu = psutil.cpu_times()
    return cpu.user + cpu.nice, cpu.system + cpu.irq + cpu.softirq


class Watch(threading.Thread):
    """Counts records in a dataset that is being made, and the machine's processor seconds."""

    def __init__(self, folder: Path) -> None:
        super().__init__(daemon=True)
        self.folder, self.samples = folder, list[tuple[float, int, float, float]]()
        self.began, self.over = time.perf_counter(), threading.Event()

    def run(self) -> None:
        over = False
        while not over:
            # the set is made in a hidden folder beside its place
            places = [path for path in self.folder.glob(".*.tmp-*") if path.is_dir()]
            count = max([len(os.listdir(path)) for path in places], default=0)
            self.samples.append((time.perf_counter() - self.began, count, *busy_s()))
            over = self.over.wait(0.1)

    def found(self, images: int) -> dict[str, float]:
        """Seconds until the first record began and until the last had ("first_s", "last_s"); from a
        quarter to three quarters of them images a second, and cores that ran programs and the
        system."""
        self.over.set()
        self.join()

        def reached(share: float) -> tuple[float, int, float, float]:
            enough = (s for s in self.samples if s[1] >= max(1, share * images))
            return next(enough, self.samples[-1])

        first, low, high, last = (reached(share) for share in (0.0, 0.25, 0.75, 1.0))
        s = max(high[0] - low[0], 1e-9)
        rate, busy, system = ((high[k] - low[k]) / s for k in (1, 2, 3))
        return {"first_s": first[0], "last_s": last[0], "images_per_s": rate} | {
            "cores_in_programs": busy, "cores_in_system": system}  # fmt: skip


def encode_for(began: float, seconds: float, views: ObjectViews) -> float:
    """Records a second that one process encodes, from a time of the clock on."""
    return _rate(began, seconds, lambda _: [data for _, data in encode_object(views)])


def write_for(began: float, seconds: float, folder: str, files: list[tuple[str, bytes]]) -> float:
    """Records a second that one process writes, whose files are encoded."""
    own = f"{folder}/image_{os.getpid()}"
    return _rate(began, seconds, lambda k: write_files(Path(f"{own}_{k}"), files), 12)


def took(views: ObjectViews) -> int:
    return len(views.rgb)


def _rate(began: float, seconds: float, act: Callable[[int], Any], most: int = 50) -> float:
    time.sleep(max(0.0, began - time.time()))
    done = 0
    while done < most and time.time() < began + seconds:
        act(done)
        done += 1
    return done / (time.time() - began)


def limits(
    inputs: InputImages, config: bootstrap.BootstrapConfig, device: torch.device, into: Path | None
) -> dict[str, Any]:
    """Images a second, by what is done and in how many processes."""
    import bootstrap as me  # processes know functions by the name of their module

    decoder, cores, seconds = load_shipped("pixel", device), core_count(), 1.2
    asked = decoder, config, device, 8
    views = next(bootstrap.records(inputs[:8], *asked))  # compiles as well
    files = list(encode_object(views))
    places = sorted({str(into or tempfile.gettempdir()), "/dev/shm"})
    found: dict[str, Any] = {"encode": {}, **{f"write into {place}": {} for place in places}}
    with processes(cores) as pool:
        list(pool.map(time.sleep, [0.5] * cores))  # all have started

        def together(count: int, act: Callable[..., float], *given: Any) -> float:
            began = time.time() + 0.3 + 0.03 * count
            jobs = [pool.submit(act, began, seconds, *given) for _ in range(count)]
            return sum(job.result() for job in jobs)

        counts = sorted({1, max(1, cores // 2), cores})
        for count in counts:
            found["encode"][count] = together(count, me.encode_for, views)
        for place in places:
            rates, tries = found[f"write into {place}"], [*counts, f"{cores}, after removing"]
            folders = [Path(tempfile.mkdtemp(dir=place)) for _ in tries]
            for folder, count in zip(folders, counts, strict=False):
                rates[count] = together(count, me.write_for, str(folder), files)
            for folder in folders[:-1]:
                shutil.rmtree(folder)
            rates[tries[-1]] = together(cores, me.write_for, str(folders[-1]), files)
            shutil.rmtree(folders[-1])
        for how in ("hand over", "hand over, pipe of 1 MB"):
            if how != "hand over":
                fcntl.fcntl(pool._call_queue._reader.fileno(), fcntl.F_SETPIPE_SZ, 1 << 20)  # type: ignore[attr-defined]
            began, many = time.perf_counter(), 200
            for job in [pool.submit(me.took, views) for _ in range(many)]:
                job.result()
            found[how] = many / (time.perf_counter() - began)
    began = time.perf_counter()
    drawn = sum(1 for _ in bootstrap.records(inputs, *asked))
    found["draw"] = drawn / (time.perf_counter() - began)
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
            *(
                f"| of which {what} | {r['watched'][key]:.1f} | |"
                for what, key in (
                    ("until the first record", "first_s"),
                    ("until the last", "last_s"),
                )
                if "watched" in r
            ),
            f"| gate | {r['gate_s']:.1f} | {r['gate']} |",
            f"| whole | {whole:.1f} | {speed}; wanted at most {r['target_s']:.0f} s for 500 x 8 |",
            *([said(r["watched"])] if "watched" in r else []),
            *("", "| by itself, one thread of work at a time | ms an image |", "|:--|--:|"),
            *(f"| {name} | {value:.1f} |" for name, value in r["parts_ms"].items()),
            *("", f"Peak memory {r['peak_gb']:.1f} GB, of the first process."),
        ]
    return "\n".join(lines) + "\n"


def said(watched: dict[str, float]) -> str:
    cores = f"{watched['cores_in_programs']:.1f} cores ran programs"
    cores += f", {watched['cores_in_system']:.1f} the system"
    return f"\nIn the middle half {watched['images_per_s']:.0f} images a second; {cores}."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--views", type=int, default=8)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--gpus", type=int, default=1, help="that share the batches (default: 1)")
    parser.add_argument("--repeat", type=int, default=1, help="so often the same images")
    parser.add_argument("--into", type=Path, help="where to write (None: a temporary folder)")
    parser.add_argument("--keep", action="store_true", help="leave the set there")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--parts", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--gate", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--limits", action="store_true", help="only what processes share")
    asked = parser.parse_args()
    device = torch.device(asked.device)
    # of the size that the shipped decoder sees
    inputs, _ = sources.input_images("embedded", images=asked.images, image_size=sources.INPUT_SIZE)
    config = replace(bootstrap.CORRECTED, views_per_image=asked.views, image_size=asked.size)
    asked.out.mkdir(parents=True, exist_ok=True)
    if asked.limits:
        limited = limits(inputs[:96], config, device, asked.into)
        print(limited)
        (asked.out / "bootstrap_limits.json").write_text(json.dumps(limited, indent=1) + "\n")
        return
    found = parts(inputs[:32], config, device) if asked.parts else {}
    print({name: round(value, 1) for name, value in found.items()}, flush=True)
    many = inputs[torch.arange(len(inputs)).repeat(asked.repeat)]
    numbered = tuple(f"{number:06d}-{name}" for number, name in enumerate(many.names))
    inputs = replace(many, names=numbered) if asked.repeat > 1 else inputs
    decoder = load_shipped("pixel", device)
    surroundings.reset_peak_memory(device)
    with contextlib.ExitStack() as stack:
        folder = tempfile.mkdtemp(dir=asked.into)
        if not asked.keep:
            stack.callback(shutil.rmtree, folder)
        began = time.perf_counter()
        target, given = Path(folder) / "set", {"device": device, "gpus": asked.gpus}
        watch = Watch(Path(folder))
        watch.start()
        made = bootstrap.bootstrap(inputs, decoder, config, target, **given)
        written = time.perf_counter()
        watched = watch.found(len(inputs))
        gated, summary, before = time.perf_counter(), "not asked", sum(busy_s())
        if asked.gate:
            verdict = gate.validate(made)
            gate.issue_receipt(made, verdict)
            summary = verdict.summary
        done, gate_cores_s = time.perf_counter(), sum(busy_s()) - before
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
        "watched": watched,
        "gate_s": done - gated,
        "gate_cores_s": gate_cores_s,
        "gate": summary,
        "target_s": TARGETS[device.type],
        "parts_ms": found,
        "peak_gb": surroundings.peak_memory(device) / 1e9,
    }
    several = asked.gpus if asked.gpus > 1 else ""
    kind = f"gpu{several}" if device.type == "cuda" else f"cpu{several}"
    (asked.out / f"bootstrap_{kind}.json").write_text(json.dumps(result, indent=1) + "\n")
    (asked.out / "bootstrap.md").write_text(table(asked.out))
    print(table(asked.out))


if __name__ == "__main__":
    main()
