"""How often the gate is right: faults it catches, causes it names, healthy sets it refuses.

    python benchmarks/gate.py --seed 7                       # about 12 minutes on two cores
    python benchmarks/gate.py --seed 7 --share 0.02 --out /tmp/gate
    python benchmarks/gate.py --zip furniture.zip            # held-out objects as well

Healthy sets come from renders of the embedded objects (and of the zip's test objects), from what
the shipped decoder makes of them, from the embedded held-out heads, from analytic shapes that look
faulty, and from ray-cast rooms (opaque photographs, forward-facing or not, with and without a
lens's rim).  Conditions: one, two, ten or all records, 64 views, photographs behind the object, no
alpha, a world whose Z is up.  Every fault is put
into sets of ten; those that no mend is the inverse of are counted apart.  `--seed` decides about
cameras, sets and faults; use one that set no threshold.  Writes gate.json and gate.md.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import tempfile
import time
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import trimesh
from scipy.stats import binomtest

from fresnel import bootstrap, faults, gate
from fresnel.data import dataset
from fresnel.data.dataset import MultiViewDataset, ObjectViews
from fresnel.data.records import turned_world
from fresnel.models.decoder import load_shipped
from fresnel.objects import gltf, trace
from fresnel.objects.assets import embedded_assets, find_assets
from fresnel.objects.render_set import render_set
from fresnel.objects.sources import embedded_heads
from fresnel.scene.cameras import Cameras, orbit

SIZE, RECORDS = 64, 10
STRENGTHS = (0.05, 0.1, 0.25, 0.5, 0.75, 1.0)
SHAPES = ("dark", "white", "thin", "symmetric", "single-coloured")
ROOMS = ("blotches", "smooth", "photographs")
OF_ROOMS = ("inverted_extrinsics", "opengl_axes", "reversed_azimuth", "shuffled_poses")
HEALTHY = {"": 40, "one record": 72, "two records": 40, "all objects": 4, "64 views": 4}
HEALTHY |= {"photo": 12, "opaque_white": 12, "Z up": 12}
COUNTS = {"one record": 1, "two records": 2, "all objects": 100, "64 views": 3}
BROKEN = (
    *(("64 views", "shuffled_poses"), ("64 views", "darken"), ("one record", "darken")),
    *(("one record", "inverted_extrinsics"), ("photo", "wrong_focal")),
    *(("two records", "darken"), ("two records", "inverted_extrinsics"), ("Z up", "opengl_axes")),
    *(("all objects", "shuffled_poses"), ("64 views", "rolled_poses")),
    ("opaque_white", "mirrored_views"),
)


@dataclass(frozen=True)
class Task:
    """One set: healthy (no fault) or faulty, under a condition ("": ten records over black)."""

    source: str
    number: int
    condition: str = ""
    fault: str = ""
    strength: float = 0.0
    seed: int = 0


@dataclass
class Sample:
    """As much of a dataset as the gate needs: records in memory."""

    records: Sequence[ObjectViews]
    meta: dict[str, Any] = field(default_factory=dict)
    content_hash: str = ""

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> ObjectViews:
        return self.records[index]


# --- sets ----------------------------------------------------------------------------------------


def make_sources(zip_path: str | None, seed: int, folder: Path) -> list[str]:
    """Render and decode the healthy sets once; returns their folders."""
    objects = {"embedded": embedded_assets()}
    if zip_path:
        objects["held-out"] = [asset for asset in find_assets(zip_path) if asset.split == "test"]
    pixel = load_shipped("pixel")
    config = replace(bootstrap.CORRECTED, image_size=SIZE, seed=seed)
    made = []
    for name, assets in objects.items():
        whole, many, decoded = (folder / f"{name}{end}" for end in ("", ", 64 views", ", decoded"))
        common: dict[str, Any] = {"image_size": SIZE, "seed": seed, "workers": 1}
        if not whole.exists():
            render_set(assets, whole, inputs_per_object=2 if name == "embedded" else 1, **common)
        if not many.exists():
            render_set(assets[:RECORDS], many, views=64, samples=1, **common)
        if not decoded.exists():
            bootstrap.bootstrap(dataset.open(whole).inputs()[:78], pixel, config, decoded)
        made += [str(whole), str(decoded)]
    heads = folder / "heads"
    if not heads.exists():
        shutil.copytree(embedded_heads("held_out", folder).path, heads)
    made.append(str(heads))
    return made


def draw(data: MultiViewDataset, seed: Sequence[int], count: int) -> list[ObjectViews]:
    """Records of different objects."""
    chosen: dict[str, int] = {}
    for k in np.random.default_rng(seed).permutation(len(data)):
        chosen.setdefault(data.names[k].partition("__")[0], int(k))
    return [data[k] for k in list(chosen.values())[:count]]


def shape(name: str, seed: Sequence[int]) -> ObjectViews:
    """A healthy record that looks faulty, as an analytic shape with known truth."""
    rng = np.random.default_rng(seed)
    colour = {"dark": rng.integers(8, 30, 3), "white": np.full(3, 250)}.get(name)
    colour = rng.integers(40, 255, 3) if colour is None else colour
    if name == "thin":
        mesh = trimesh.creation.box((0.02 + 0.02 * rng.random(), 1.0, 0.02 + 0.04 * rng.random()))
    elif name == "symmetric":
        radius = 0.15 + 0.3 * rng.random()
        outline = [[0, 0], [radius, 0], [radius / 2, 0.5], [radius, 1], [0, 1]]
        mesh = trimesh.creation.revolve(outline, sections=64)
        mesh.apply_transform(trimesh.transformations.rotation_matrix(-np.pi / 2, (1, 0, 0)))
    else:
        ball = trimesh.creation.icosphere(radius=0.3).apply_translation(rng.uniform(-0.4, 0.4, 3))
        mesh = trimesh.util.concatenate([trimesh.creation.box(rng.uniform(0.2, 1.0, 3)), ball])
    mesh.apply_translation(-mesh.bounds.mean(axis=0))
    mesh.apply_scale(1 / mesh.extents.max())
    mesh.visual.face_colors = np.array([*colour, 255], np.uint8)
    azimuth = rng.uniform(0, 360) + np.concatenate([[0.0], 45.0 * np.arange(8)])
    # A vase on a turntable is seen from one height: the hardest case for "frozen".
    elevation = np.full(9, 15.0) if name == "symmetric" else rng.uniform(-30, 45, 9)
    angles = (torch.from_numpy(angle).float() for angle in (azimuth, elevation))
    optics: dict[str, Any] = {"focal_px": 1.2 * SIZE, "width": SIZE, "height": SIZE}
    cameras = orbit(*angles, 2.2, pivot=(0.0, 0.0, 0.0), **optics)
    glb = trimesh.Scene([mesh]).export(file_type="glb")
    seen = trace.render(gltf.read(glb, lambda name: None), cameras)
    rgb, alpha = (
        (255 * torch.as_tensor(x) + 0.5).to(torch.uint8) for x in (seen.rgb, seen.alpha[..., 0])
    )
    return _record(f"{name} {seed[-1]}", rgb, alpha, cameras, torch.as_tensor(seen.depth[..., 0]))


def _record(
    name: str, rgb: torch.Tensor, alpha: torch.Tensor, cameras: Cameras, depth: Any = None
) -> ObjectViews:
    """The first picture is the input."""
    return ObjectViews(
        name=name,
        input_rgb=rgb[0],
        input_alpha=alpha[0],
        input_camera=cameras[0],
        input_depth=None if depth is None else depth[0],
        rgb=rgb[1:],
        alpha=alpha[1:],
        depth=None if depth is None else depth[1:],
        cameras=cameras[1:],
        pivot=torch.zeros(3),
    )


def room(texture: str, seed: Sequence[int], *, forward: bool, size: int = 160) -> ObjectViews:
    """Opaque photographs, ray-cast: six walls and a box, seen by cameras that look inward from all
    sides or, `forward`, that walk sideways and face one way."""
    rng = np.random.default_rng(seed)
    optics: dict[str, Any] = {
        "focal_px": rng.choice([0.6, 0.9, 1.8]) * size, "width": size, "height": size
    }  # fmt: skip
    step = rng.choice([8.0, 15.0])
    azimuth = rng.uniform(0, 360) + step * torch.arange(9).float()
    elevation = torch.from_numpy(10 + rng.uniform(-4, 4, 9)).float()
    cameras = orbit(azimuth, elevation, 1.5, pivot=(0.0, 0.0, 0.0), **optics)
    if forward:
        viewmats = cameras.viewmats[4].repeat(9, 1, 1)
        viewmats[:, 0, 3] += 0.02 * step * torch.linspace(-1, 1, 9)
        viewmats[:, 1, 3] += 0.1 * torch.from_numpy(rng.uniform(-1, 1, 9)).float()
        cameras = replace(cameras, viewmats=viewmats)
    origins, directions = cameras.resized(2 * size, 2 * size).rays()
    inverse = 1 / torch.where(directions.abs() < 1e-9, 1e-9, directions)
    far = torch.maximum((-2 - origins) * inverse, (2 - origins) * inverse).min(-1)
    box = torch.tensor([0.4, 0.5, 0.3])
    ends = (-box - origins) * inverse, (box - origins) * inverse
    near, leave = torch.minimum(*ends).max(-1), torch.maximum(*ends).min(-1).values
    hit = (near.values < leave) & (near.values > 0)
    t = torch.where(hit, near.values, far.values)
    axis = torch.where(hit, near.indices, far.indices).numpy()
    point = (origins + t[..., None] * directions).numpy()
    half = np.where(hit.numpy()[..., None], box.numpy(), 2.0)
    side = np.take_along_axis(point, axis[..., None], -1)[..., 0] > 0
    others = np.stack([(axis + 1) % 3, (axis + 2) % 3], -1)
    uv = np.take_along_axis((point / half + 1) / 2, others, -1)
    wall = axis + 3 * side + 6 * hit.numpy()
    colours = np.zeros((*wall.shape, 3), np.float32)
    for k in range(12):
        picture = _wall(texture, k, rng)
        at = (np.clip(uv[wall == k], 0, 1) * (len(picture) - 1)).astype(int)
        colours[wall == k] = picture[at[:, 1], at[:, 0]]
    colours = colours.reshape(9, size, 2, size, 2, 3).mean(axis=(2, 4))
    noisy = 255 * colours + rng.normal(0, 2, colours.shape)
    rgb = torch.from_numpy(noisy.clip(0, 255).astype(np.uint8))
    return _record(f"{texture} {seed[-1]}", rgb, torch.full(rgb.shape[:3], 255).byte(), cameras)


def _wall(texture: str, k: int, rng: np.random.Generator) -> np.ndarray:
    """A square picture in [0, 1], (S, S, 3)."""
    if texture == "photographs":
        from skimage import data

        square = (data.astronaut, data.retina, data.chelsea, data.coffee)[k % 4]()[:300, :300]
        return np.rot90(square[..., :3].astype(np.float32) / 255, k // 4)
    cells, mode = (24, "nearest") if texture == "blotches" else (5, "bicubic")
    coarse = torch.from_numpy(rng.random((1, 3, cells, cells))).float()
    fine = torch.nn.functional.interpolate(coarse, (512, 512), mode=mode)
    return fine[0].permute(1, 2, 0).clamp(0, 1).numpy()


def rimmed(views: ObjectViews, k1: float) -> ObjectViews:
    """Photographs after a lens of radial distortion k1 > 0 was undone: what lies beyond the sensor
    is transparent, and the pictures are resampled once."""
    size = views.rgb.shape[1]
    y, x = np.mgrid[:size, :size] / size - 0.5 + 0.5 / size
    bent = 1 + k1 * (x * x + y * y) * 4
    inside = torch.from_numpy(np.maximum(abs(x * bent), abs(y * bent)) <= 0.5)
    return replace(views, rgb=views.rgb * inside[..., None], alpha=views.alpha * inside)


def make_set(task: Task) -> Sample:
    """The records of a task."""
    seed, rng = [task.seed, task.number], np.random.default_rng([task.seed, task.number])
    count = COUNTS.get(task.condition, RECORDS)
    if task.source in SHAPES:
        records = [shape(task.source, [*seed, k]) for k in range(count)]
    elif task.source in ROOMS:
        forward = task.condition == "forward-facing"
        records = [room(task.source, [*seed, k], forward=forward) for k in range(3)]
    else:
        many = task.source.removesuffix(", decoded") + ", 64 views"
        folder = many if task.condition == "64 views" else task.source
        records = draw(dataset.open(folder), seed, count)
        if task.condition == "Z up":
            turn = torch.tensor([[1.0, 0, 0, 0], [0, 0, -1, 0], [0, 1, 0, 0], [0, 0, 0, 1]])
            records = [turned_world(record, turn) for record in records]
    meta = faults.said([r.name for r in records], task.fault, task.strength)
    if task.fault:
        one = task.seed * 1_000_000 + task.number
        records = list(faults.corrupt(records, task.fault, task.strength, seed=one))
    if task.condition in ("photo", "opaque_white"):
        records = [faults.on_background(r, task.condition, rng) for r in records]  # type: ignore[arg-type]
    if task.condition == "distorted":
        records = [rimmed(r, 0.005 if k % 2 else 0.05) for k, r in enumerate(records)]
    return Sample(records, meta)


def trial(task: Task) -> dict[str, Any]:
    """What the gate said of one set."""
    sample, started = make_set(task), time.perf_counter()
    verdict = gate.validate(sample, progress=False, workers=1)
    codes = [reason.code for reason in verdict.reasons]
    seconds = round(time.perf_counter() - started, 3)
    return asdict(replace(task, source=Path(task.source).name)) | {
        "passed": verdict.passed, "codes": codes, "seconds": seconds
    }  # fmt: skip


# --- what is tried -------------------------------------------------------------------------------


def tasks_of(sources: Sequence[str], seed: int, share: float) -> Iterator[Task]:
    """All sets; of each kind a share, in the mean."""
    chosen = np.random.default_rng(seed)
    plan: list[tuple[int, Sequence[str], str, str, float]] = []
    for fault, (_, practical) in faults.EXPECTED.items():
        fit = [s for s in sources if fault != "identity_mismatch" or "decoded" in s]
        at = zlib.crc32(fault.encode()) % len(fit)  # faults meet different sources
        for strength in STRENGTHS:
            count = 4 if strength >= practical else 1
            plan.append((count, fit[at:] + fit[:at], "", fault, strength))
    for source in sources:
        rendered = not source.endswith("heads")  # heads ship with twelve views
        plan += [
            (n, [source], c, "", 0.0) for c, n in HEALTHY.items() if rendered or c != "64 views"
        ]
        plan += [(3, [source], c, f, 1.0) for c, f in BROKEN if rendered or c != "64 views"]
    for name in SHAPES:
        plan += [(5, [name], condition, "", 0.0) for condition in ("", "opaque_white")]
    for name in ROOMS:
        plan += [(3, [name], c, "", 0.0) for c in ("", "distorted", "forward-facing")]
        plan += [(1, [name], c, f, 1.0) for c in ("", "distorted") for f in OF_ROOMS]
    number = 0
    for count, where, condition, fault, strength in plan:
        for k in range(int(share * count + chosen.random())):
            number += 1
            yield Task(where[k % len(where)], number, condition, fault, strength, seed)


# --- what came out -------------------------------------------------------------------------------


def proportion(marks: Sequence[bool]) -> str:
    """Hits of all, and a 95% interval (Wilson)."""
    if not marks:
        return "-"
    low, high = binomtest(sum(marks), len(marks)).proportion_ci(method="wilson")
    return f"{sum(marks)}/{len(marks)} ({100 * low:.1f} to {100 * high:.1f} %)"


def right(row: dict[str, Any]) -> bool:
    """Whether the cause that the fault should show came first."""
    code = faults.EXPECTED[row["fault"]][0]
    code = "pose_mismatch" if row["source"] in ROOMS else code  # features name no convention
    return bool(row["codes"]) and row["codes"][0] == code


def tables(rows: Sequence[dict[str, Any]]) -> dict[str, list[list[str]]]:
    """Totals, faults, and healthy sets by source and condition; the first row is the head."""
    healthy = [row for row in rows if not row["fault"]]
    plain = [r for r in rows if r["fault"] and not r["condition"] and r["source"] not in ROOMS]
    strong = [r for r in plain if r["strength"] >= faults.EXPECTED[r["fault"]][1]]
    groups = {
        "practical faults, a mend is their inverse or needs none": [
            r for r in strong if r["fault"] not in faults.UNPAIRED
        ],
        "practical faults that are no mend's inverse": [
            r for r in strong if r["fault"] in faults.UNPAIRED
        ],
        "faults in photographs of rooms": [r for r in rows if r["fault"] and r["source"] in ROOMS],
    }
    for condition in dict.fromkeys(r["condition"] for r in rows if r["condition"]):
        own = [r for r in rows if r["fault"] and r["condition"] == condition]
        if own := [r for r in own if r["source"] not in ROOMS]:
            groups[f"faults: {condition}"] = own
    total = [["faulty sets", "refused", "cause first, of the refused"]]
    for name, own in groups.items():
        caught = [r for r in own if not r["passed"]]
        total.append(
            [name, proportion([not r["passed"] for r in own]), proportion([*map(right, caught)])]
        )
    by_fault = [["fault", "cause", *(f"{s:g}" for s in STRENGTHS), "cause first", "else"]]
    for fault, (code, practical) in faults.EXPECTED.items():
        line = [fault, code]
        for strength in STRENGTHS:
            own = [r for r in plain if (r["fault"], r["strength"]) == (fault, strength)]
            text = f"{sum(not r['passed'] for r in own)}/{len(own)}" if own else ""
            line.append(f"**{text}**" if text and strength >= practical else text)
        caught = [r for r in strong if r["fault"] == fault and not r["passed"]]
        others = sorted({r["codes"][0] for r in caught if not right(r)})
        by_fault.append([*line, f"{sum(map(right, caught))}/{len(caught)}", ", ".join(others)])
    calm = [["healthy sets", "refused", "for"]]
    calm.append(["all", proportion([not r["passed"] for r in healthy]), ""])
    for kind in dict.fromkeys((r["source"], r["condition"]) for r in healthy):
        own = [r for r in healthy if (r["source"], r["condition"]) == kind]
        codes = sorted({r["codes"][0] for r in own if not r["passed"]})
        calm.append(
            [
                ": ".join(filter(None, kind)),
                proportion([not r["passed"] for r in own]),
                ", ".join(codes),
            ]
        )
    return {"Faults": total, "By fault and strength": by_fault, "Healthy sets": calm}


def markdown(title: str, rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([f"## {title}", "", lines[0], "|" + "---|" * len(rows[0]), *lines[1:], ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--zip", help="furniture.zip; without it embedded objects are used alone")
    parser.add_argument("--seed", type=int, default=1, help="of cameras, sets and faults")
    parser.add_argument("--share", type=float, default=1.0, help="of the sets")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent, help="for gate.json, .md"
    )
    parser.add_argument("--work", type=Path, help="folder for healthy sets (default: temporary)")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    arguments = parser.parse_args()
    from tqdm import tqdm

    started = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        work = arguments.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        sources = make_sources(arguments.zip, arguments.seed, work)
        tasks = list(tasks_of(sources, arguments.seed, arguments.share))
        options: dict[str, Any] = {"initializer": torch.set_num_threads, "initargs": (1,)}
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(arguments.workers, spawn, **options) as pool:
            rows = list(tqdm(pool.map(trial, tasks), total=len(tasks), desc="sets"))
    found = tables(rows)
    about = {"seed": arguments.seed, "share": arguments.share, "sets": len(rows)}
    about |= {"minutes": round((time.monotonic() - started) / 60, 1)}
    wrong = [
        r for r in rows if (not r["passed"] if not r["fault"] else r["passed"] or not right(r))
    ]
    arguments.out.mkdir(parents=True, exist_ok=True)
    result = {**about, "thresholds": asdict(gate.GateConfig()), "tables": found, "wrong": wrong}
    (arguments.out / "gate.json").write_text(json.dumps(result, indent=1) + "\n")
    text = f"# The gate's calibration\n\n`{json.dumps(about)}`\n\n"
    text += "\n".join(markdown(title, table) for title, table in found.items())
    (arguments.out / "gate.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
