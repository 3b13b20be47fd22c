"""How often the gate is right: faults it catches, causes it names, healthy sets it refuses.

    python benchmarks/gate.py --seed 29 --zip furniture.zip --workers 24 --out DIR   # 6 minutes
    python benchmarks/gate.py --seed 29 --share 0.02 --objects 12 --out /tmp/gate
    python benchmarks/gate.py --tables DIR                     # of a run that was cut

The order of work: what every check measures on healthy objects to *calibrate* with (of split
"train") is written down beside its limit; the thresholds are written to `thresholds.json` and are
frozen by that; then objects to *test* with are opened for the first time.  Both are furniture (the
zip's, or what is embedded), heads (made, where their shape data are installed, or embedded) and
what the shipped decoders make of either; besides, ray-cast rooms (opaque photographs,
forward-facing or not, with and without a lens's rim) and analytic shapes that look faulty.

Every fault is put into sets of 1, 2, 10 and 100 records, of 64 views, into half the records and
into one of a hundred.  `--seed` decides about cameras, sets and faults; use one that set no
threshold.  Rows are written as they come, in random order, strengths below the practical ones last.
Writes gate.json and gate.md.
"""

import argparse
import functools
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from operator import itemgetter
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from scipy.stats import binomtest

from fresnel import bootstrap, faults, gate
from fresnel.data import dataset
from fresnel.data.dataset import DatasetError, MultiViewDataset, ObjectViews
from fresnel.data.records import turned_world
from fresnel.gate import checks, faces
from fresnel.gate.measure import measure
from fresnel.gate.thresholds import VERSION
from fresnel.heads import base, make
from fresnel.models.decoder import load_shipped
from fresnel.objects.assets import Asset, embedded_assets, find_assets
from fresnel.objects.render_set import render_set
from fresnel.objects.sources import embedded_heads
from fresnel.poses import transforms
from fresnel.scene.cameras import Cameras, orbit

sys.path.append(str(Path(__file__).parent.parent / "tests"))
from boxes import views_of

SIZE, SHARD = 64, 6
STRENGTHS = (0.05, 0.1, 0.25, 0.5, 0.75, 1.0)
SHAPES: dict[str, dict[str, Any]] = {  # that look faulty
    "dark": {"colors": torch.full((3, 3), 0.08)},
    "white": {"colors": torch.ones(3, 3), "stripes": 0.0},
    "thin": {"extent": (0.04, 1.0, 0.06)},
    "symmetric": {"extent": (0.5, 0.5, 0.5)},
    "single-coloured": {"colors": torch.full((3, 3), 0.5), "stripes": 0.0},
}
ROOMS = ("blotches", "smooth", "photographs")
OF_ROOMS = ("inverted_extrinsics", "opengl_axes", "reversed_azimuth", "shuffled_poses")
CONDITIONS = {  # records, views, healthy sets of a source, sets of a source and fault
    "10 records": (10, 8, 120, 3),
    "1 record": (1, 8, 150, 2),
    "2 records": (2, 8, 150, 2),
    "100 records": (100, 8, 24, 1),
    "64 views": (3, 64, 32, 1),
    "400 views": (1, 400, 4, 0),
    "half of 10": (10, 8, 0, 1),
    "1 of 100": (100, 8, 0, 1),
    "3 views": (10, 3, 40, 1),
    "2 views": (10, 2, 40, 1),
    "1 record, 3 views": (1, 3, 100, 0),
    "photo": (10, 8, 40, 0),
    "opaque_white": (10, 8, 40, 0),
    "Z up": (10, 8, 40, 0),
    "rolled": (10, 8, 40, 0),
    "off centre": (10, 8, 40, 0),
}
OF_SETS = ("duplicated_objects", "split_leak", "class_imbalance", "one_side")
BETWEEN = (*OF_SETS[:3], "mixed_objects", "others_poses")
SOME = ("darken", "opengl_axes", "mirrored_views", "wrong_focal", "shuffled_poses", "empty_views")
_ALL = ("rgb", "alpha", "depth", "cameras")
"""Faults of a set as a whole, those between records, and those tried over other backgrounds."""


@dataclass(frozen=True)
class Task:
    """One set: healthy (no fault) or faulty, under a condition."""

    source: str
    number: int
    condition: str = "10 records"
    fault: str = ""
    strength: float = 0.0
    seed: int = 0
    folder: str = ""


@dataclass
class Sample:
    """As much of a dataset as the gate needs; records are made when they are asked for."""

    records: Sequence[ObjectViews] | MultiViewDataset
    meta: dict[str, Any]
    changed: Callable[[int, ObjectViews], ObjectViews] = lambda _, record: record
    content_hash: str = ""

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> ObjectViews:
        return self.changed(index, self.records[index])


# --- sets ----------------------------------------------------------------------------------------


def objects(part: str, zip_path: str | None, count: int) -> dict[str, list[Asset]]:
    """Assets to calibrate or to test with, by domain; no heads where none can be made."""
    split = {"calibration": ("train",), "test": ("test", "held_out")}[part]
    every = find_assets(zip_path) if zip_path else embedded_assets()
    things = [asset for asset in every if asset.split in split]
    found: dict[str, list[Asset]] = {"furniture": things[:: max(1, len(things) // count)][:count]}
    try:
        base.data_folder()
    except DatasetError:
        return found
    heads: list[Asset] = [head for head in make.people(400) if head.split in split]
    return found | {"heads": heads[:count]}


def make_shard(
    domain: str, assets: Sequence[Asset], folder: Path, number: int, seed: int, many: bool
) -> None:
    """Render and decode a few objects: two inputs with 8 views each, one of 64, one of 400."""
    torch.set_num_threads(1)
    looks: dict[str, Any] = make.PORTRAIT if domain == "heads" else {}
    decoder = load_shipped("faces" if domain == "heads" else "pixel")
    for views, count in ((8, SHARD), (64, 2), (400, int(number == 0 and many))):
        if some := assets[:count]:
            many = {"views": views, "samples": 4 if views == 8 else 1, "seed": seed, "workers": 1}
            many |= {"image_size": SIZE, "inputs_per_object": 2 if views == 8 else 1}
            made = render_set(some, folder / domain / f"{views}/{number}", **looks | many)
            how = replace(bootstrap.CORRECTED, image_size=SIZE, seed=seed, views_per_image=views)
            target = folder / f"{domain}, decoded" / f"{views}/{number}"
            bootstrap.bootstrap(made.inputs(), decoder, how, target)


def make_sources(
    part: str, seed: int, work: Path, pool: Any, given: argparse.Namespace
) -> list[str]:
    """All healthy objects of a part; returns the folders of its sources."""
    folder, jobs, many = work / part, [], given.share >= 0.5  # 400 views take long
    if not folder.exists():
        for domain, assets in objects(part, given.zip, given.objects).items():
            for number, at in enumerate(range(0, len(assets), SHARD)):
                some = assets[at : at + SHARD]
                jobs.append(pool.submit(make_shard, domain, some, folder, number, seed, many))
    for job in jobs:
        job.result()
    if not (folder / "heads").exists():
        (folder / "heads").mkdir()
        embedded = embedded_heads("train" if part == "calibration" else "held_out", folder)
        embedded.path.rename(folder / "heads" / "8")
    return sorted(str(path) for path in folder.iterdir())


@functools.cache
def opened(path: str) -> MultiViewDataset:
    return dataset.open(path)


def draw(data: MultiViewDataset, seed: Sequence[int], count: int) -> MultiViewDataset:
    """Records of different objects first, then their other inputs."""
    order = np.random.default_rng(seed).permutation(len(data)).tolist()
    known = dict[str, int]()
    first = {known.setdefault(data.names[k].partition("__")[0], k) for k in order}
    return data.subset(sorted(order, key=lambda k: k not in first)[:count])


def room(
    texture: str, seed: Sequence[int], *, forward: bool, size: int = 128, count: int = 9
) -> ObjectViews:
    """Opaque photographs, ray-cast: six walls and a box, seen by cameras that look inward from all
    sides or, `forward`, that walk sideways and face one way."""
    rng = np.random.default_rng(seed)
    optics: dict[str, Any] = {
        "focal_px": rng.choice([0.6, 0.9, 1.8]) * size, "width": size, "height": size
    }  # fmt: skip
    step = rng.choice([8.0, 15.0])
    azimuth = rng.uniform(0, 360) + step * torch.arange(count).float()
    elevation = torch.from_numpy(10 + rng.uniform(-4, 4, count)).float()
    cameras = orbit(azimuth, elevation, 1.5, pivot=(0.0, 0.0, 0.0), **optics)
    if forward:
        viewmats = cameras.viewmats[4].repeat(count, 1, 1)
        viewmats[:, 0, 3] += 0.02 * step * torch.linspace(-1, 1, count)
        viewmats[:, 1, 3] += 0.1 * torch.from_numpy(rng.uniform(-1, 1, count)).float()
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
    colours = colours.reshape(count, size, 2, size, 2, 3).mean(axis=(2, 4))
    noisy = 255 * colours + rng.normal(0, 2, colours.shape)
    rgb = torch.from_numpy(noisy.clip(0, 255).astype(np.uint8))
    opaque, looks = torch.full(rgb.shape[:3], 255).byte(), cameras[1:]
    first: dict[str, Any] = {"input_rgb": rgb[0], "input_alpha": opaque[0], "pivot": torch.zeros(3)}
    seen: dict[str, Any] = {"rgb": rgb[1:], "alpha": opaque[1:], "cameras": looks}
    return ObjectViews(f"{texture} {seed[-1]}", input_camera=cameras[0], **first, **seen)


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


def rolled(views: ObjectViews, rng: np.random.Generator) -> ObjectViews:
    """Cameras turned about their axes by quarters, each its own, the input not."""
    turns, viewmats = rng.integers(0, 4, len(views.rgb)).tolist(), views.cameras.viewmats
    quarter = torch.tensor([[0.0, 1, 0, 0], [-1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    poses = [quarter.matrix_power(k) @ one for k, one in zip(turns, viewmats, strict=True)]
    views = replace(views, cameras=replace(views.cameras, viewmats=torch.stack(poses)))
    each = lambda part: torch.stack([torch.rot90(p, k) for p, k in zip(part, turns, strict=True)])  # noqa: E731
    return transforms.changed(views, transforms.PICTURES, each)


def off_centre(views: ObjectViews, rng: np.random.Generator) -> ObjectViews:
    """Pictures half as wide again, each with the object elsewhere; principal points follow."""
    size, at = views.rgb.shape[1], rng.integers(0, views.rgb.shape[1] // 2, (len(views.rgb), 2))

    def wider(part: torch.Tensor, corners: np.ndarray = at) -> torch.Tensor:
        out = part.new_zeros(len(part), size + size // 2, size + size // 2, *part.shape[3:])
        for one, own, (y, x) in zip(out, part, corners.tolist(), strict=True):
            one[y : y + size, x : x + size] = own
        return out

    def moved(cameras: Cameras, x: torch.Tensor) -> Cameras:
        Ks = cameras.Ks.clone()
        Ks[..., :2, 2] += x
        return replace(cameras, Ks=Ks, width=size + size // 2, height=size + size // 2)

    views = replace(views, depth=None, identity_rgb=None, identity_alpha=None)
    own = moved(views.input_camera, torch.full((2,), size // 4))
    rgb, alpha = wider(views.rgb), wider(views.alpha)
    middle = np.full((1, 2), size // 4)
    given = {k: wider(getattr(views, k)[None], middle)[0] for k in ("input_rgb", "input_alpha")}
    cameras = moved(views.cameras, torch.from_numpy(at[:, ::-1].copy()))
    return replace(
        views, rgb=rgb, alpha=alpha, cameras=cameras, input_camera=own, input_depth=None, **given
    )


def make_set(task: Task) -> Sample:
    """The records of a task, before anything of them is read."""
    seed, rng = [task.seed, task.number], np.random.default_rng([task.seed, task.number])
    count, views, *_ = CONDITIONS.get(task.condition, (3, 9))
    records: Any
    if task.source in SHAPES:
        many = range(count * task.number, count * (task.number + 1))
        records = [views_of(k, size=SIZE, identity=False, **SHAPES[task.source]) for k in many]
    elif task.source in ROOMS:
        how: dict[str, Any] = {"forward": task.condition == "forward-facing", "count": views}
        records = [room(task.source, [*seed, k], **how) for k in range(min(count, 3))]
    else:
        data = opened(str(Path(task.folder, task.source, str(max(views, 8)))))
        records = draw(data, seed, count)
        if views < 8:
            rows = [torch.from_numpy(rng.permutation(8)[:views]) for _ in records]
            both = zip(records, rows, strict=True)
            records = [transforms.changed(one, _ALL, itemgetter(at)) for one, at in both]
    names = getattr(records, "names", None) or [record.name for record in records]
    bad = set(range(len(records)))
    if task.condition in ("half of 10", "1 of 100"):
        bad = {*rng.permutation(len(records))[: 5 if task.condition == "half of 10" else 1]}

    def changed(index: int, record: ObjectViews) -> ObjectViews:
        own = np.random.default_rng([*seed, index])
        if task.fault and index in bad:
            one = task.seed * 1_000_000 + task.number
            record = faults.broken(records, index, task.fault, task.strength, seed=one)
        match task.condition:
            case "photo" | "opaque_white" as scene:
                record = faults.on_background(record, scene, own)
            case "distorted":
                record = rimmed(record, 0.005 if index % 2 else 0.05)
            case "Z up":
                turn = torch.tensor([[1.0, 0, 0, 0], [0, 0, -1, 0], [0, 1, 0, 0], [0, 0, 0, 1]])
                record = turned_world(record, turn)
            case "rolled":
                record = rolled(record, own)
            case "off centre":
                record = off_centre(record, own)
        return record

    return Sample(records, faults.said(names, task.fault, task.strength), changed)


def trial(task: Task) -> dict[str, Any]:
    """What the gate said of one set."""
    torch.set_num_threads(1)
    started = time.perf_counter()
    verdict = gate.validate(make_set(task), progress=False, workers=1)
    codes = [reason.code for reason in verdict.reasons]
    said = {"passed": verdict.passed, "codes": codes, "notes": len(verdict.notes)}
    row = {key: value for key, value in asdict(task).items() if key != "folder"}
    return row | said | {"seconds": round(time.perf_counter() - started, 3)}


def measured(path: str, rows: Sequence[int]) -> dict[str, Any]:
    """What the checks look at, of healthy records: values by column."""
    torch.set_num_threads(1)
    found = [measure(opened(path)[k]) for k in rows]
    views, records = [row for one in found for row in one[0]], [one[1] for one in found]
    seen = checks.Seen(views, records, gate.GateConfig(), final=False)
    return {column: seen[column].tolist() for column in limits().values()} | {"source": path}


def limits() -> dict[str, str]:
    """Limits of records by name, and the columns that they are of."""
    return {
        name: column
        for check in (*checks.OF_RECORDS, faces.CHECK)
        for column, name in check.limits.items()
        if name and not check.at_once
    }


# --- what is tried -------------------------------------------------------------------------------


def tasks_of(folders: Sequence[str], seed: int, share: float) -> Iterator[Task]:
    """All sets, in random order, those whose fault need not be seen last; of each kind a share, in
    the mean."""
    chosen, plan = np.random.default_rng(seed), list[tuple[int, str, str, str, float]]()
    for path in map(Path, folders):
        for condition, (count, views, healthy, faulty) in CONDITIONS.items():
            if not (path / str(max(views, 8))).is_dir():
                continue
            plan.append((healthy, path.name, condition, "", 0.0))
            for fault, (_, practical) in faults.EXPECTED.items():
                alone = fault in BETWEEN[:2] + BETWEEN[3:] and count == 1
                few = fault == "class_imbalance" and count < 10
                whole = fault in OF_SETS and " of " in condition
                if (
                    alone
                    or few
                    or whole
                    or (fault == "identity_mismatch" and "dec" not in path.name)
                ):
                    continue
                least = 1.0 if condition == "1 of 100" else practical
                number = 2 if not faulty and fault in SOME and views == 8 else faulty
                plan.append((number, path.name, condition, fault, least))
                if condition == "10 records":
                    below = [s for s in STRENGTHS if s != practical]
                    plan += [(0.25, path.name, condition, fault, s) for s in below]
    for name in SHAPES:
        plan += [(8, name, condition, "", 0.0) for condition in ("10 records", "opaque_white")]
    for name in ROOMS:
        plan += [(8, name, c, "", 0.0) for c in ("3 records", "distorted", "forward-facing")]
        plan += [(2, name, c, f, 1.0) for c in ("3 records", "distorted") for f in OF_ROOMS]
        plan += [(1, name, "64 views", f, 1.0) for f in ("", "shuffled_poses")]
    wanted = [one[1:] for one in plan for _ in range(int(share * one[0] + chosen.random()))]

    def is_below(one: tuple[str, str, str, float]) -> bool:
        return bool(one[2]) and one[3] < faults.EXPECTED[one[2]][1]

    order = [wanted[k] for k in chosen.permutation(len(wanted)).tolist()]
    for number, one in enumerate(sorted(order, key=is_below), 1):
        source, condition, fault, strength = one
        yield Task(source, number, condition, fault, strength, seed, str(Path(folders[0]).parent))


# --- what came out -------------------------------------------------------------------------------


def proportion(marks: Sequence[bool]) -> str:
    """Hits of all, and a 95% interval (Wilson)."""
    if not marks:
        return ""
    low, high = binomtest(sum(marks), len(marks)).proportion_ci(method="wilson")
    return f"{sum(marks)}/{len(marks)} ({100 * low:.1f} to {100 * high:.1f} %)"


def right(row: dict[str, Any]) -> bool:
    """Whether a cause that the fault should show came first."""
    wanted = {faults.EXPECTED[row["fault"]][0], *faults.ACCEPTED.get(row["fault"], ())}
    wanted |= {"pose_mismatch"} if row["source"] in ROOMS else set()  # features name no convention
    return bool(row["codes"]) and row["codes"][0] in wanted


def first_codes(rows: Sequence[dict[str, Any]]) -> str:
    codes = [row["codes"][0] for row in rows]
    return ", ".join(f"{code} {codes.count(code)}" for code in sorted({*codes}))


def tables(rows: Sequence[dict[str, Any]]) -> dict[str, list[list[str]]]:
    """By condition and by fault; the first row of each is its head."""
    is_strong = {
        id(r) for r in rows if r["fault"] and r["strength"] >= faults.EXPECTED[r["fault"]][1]
    }
    strong = [r for r in rows if id(r) in is_strong]
    summary = [["sets", "healthy: refused", "for", "faulty: refused", "cause first, of these"]]

    def line(name: str, own: Sequence[dict[str, Any]]) -> None:
        calm, broken = ([r for r in own if bool(r["fault"]) == is_one] for is_one in (False, True))
        broken = [r for r in broken if id(r) in is_strong]
        alarms, caught = ([r for r in some if not r["passed"]] for some in (calm, broken))
        figures = [proportion([not r["passed"] for r in some]) for some in (calm, broken)]
        causes = proportion([*map(right, caught)])
        summary.append([name, figures[0], first_codes(alarms), figures[1], causes])

    domain = {name: "rooms" for name in ROOMS} | {name: "shapes" for name in SHAPES}
    kinds = [(domain.get(r["source"], r["source"]), r["condition"]) for r in rows]
    at = {kind: [r for r, own in zip(rows, kinds, strict=True) if own == kind] for kind in kinds}
    order = [*CONDITIONS, "3 records", "distorted", "forward-facing"]
    line("all", rows)
    for source in sorted({kind[0] for kind in kinds}):
        line(f"**{source}**", [r for k in at if k[0] == source for r in at[k]])
        for condition in order:
            if own := at.get((source, condition)):
                line(f"{source}: {condition}", own)
    paired = [r for r in strong if r["fault"] not in faults.UNPAIRED]
    line("faults whose inverse is a mend, or that need none", paired)
    line("faults that are no mend's inverse", [r for r in strong if r["fault"] in faults.UNPAIRED])
    ten = [r for r in rows if r["condition"] == "10 records"]
    by_fault = [["fault", "cause", *(f"{s:g}" for s in STRENGTHS), "all, refused", "first", "else"]]
    for fault, (code, practical) in faults.EXPECTED.items():
        cells = []
        for strength in STRENGTHS:
            own = [r for r in ten if (r["fault"], r["strength"]) == (fault, strength)]
            text = f"{sum(not r['passed'] for r in own)}/{len(own)}" if own else ""
            cells.append(f"**{text}**" if text and strength >= practical else text)
        own = [r for r in strong if r["fault"] == fault]
        caught = [r for r in own if not r["passed"]]
        hits = f"{sum(map(right, caught))}/{len(caught)}"
        said = " or ".join([code, *faults.ACCEPTED.get(fault, ())])
        others = first_codes([r for r in caught if not right(r)])
        by_fault.append([fault, said, *cells, f"{len(caught)}/{len(own)}", hits, others])
    return {"By condition": summary, "By fault": by_fault}


def of_calibration(found: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Quantiles of what healthy records measure, toward the limit."""
    head = ["limit", "", "of", "records", "median", "95 %", "99 %", "most", "over", "blatant"]
    out, config = [head], asdict(gate.GateConfig())
    for name, column in limits().items():
        low = name.startswith("min")
        for source in sorted({Path(one["source"]).parent.name for one in found}):
            own = [one[column] for one in found if Path(one["source"]).parent.name == source]
            values = np.array([v for part in own for v in part if v is not None and np.isfinite(v)])
            if not len(values):
                continue
            at = np.quantile(values, [0.5, *((0.05, 0.01, 0) if low else (0.95, 0.99, 1))])
            far = checks.is_blatant(values, name)
            over = values < config[name] if low else values > config[name]
            line = [
                column,
                f"{config[name]:g}",
                source,
                str(len(values)),
                *(f"{v:.3g}" for v in at),
            ]
            out.append([*line, str(int(over.sum())), str(int(far.sum()))])
    return out


def markdown(title: str, rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([f"## {title}", "", lines[0], "|" + "---|" * len(rows[0]), *lines[1:], ""])


def write_tables(out: Path) -> None:
    """gate.json and gate.md of the rows that are there, whole ones."""
    rows, seen = (
        [msgspec.json.decode(line) for line in path.read_bytes().splitlines() if line[-1:] == b"}"]
        for path in (out / "rows.jsonl", out / "calibration.jsonl")
    )
    about = json.loads((out / "thresholds.json").read_text()) | {"sets": len(rows)}
    found = (tables(rows) if rows else {}) | {
        "Healthy objects to calibrate with": of_calibration(seen)
    }
    wrong = [r for r in rows if (r["passed"] or not right(r) if r["fault"] else not r["passed"])]
    strong = [r for r in wrong if not r["fault"] or r["strength"] >= faults.EXPECTED[r["fault"]][1]]
    result = {**about, "tables": found, "wrong": strong}
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in result.items()]
    (out / "gate.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")
    said = {key: value for key, value in about.items() if key != "thresholds"}
    text = f"# The gate's calibration\n\n`{json.dumps(said)}`\n\n"
    text += "\n".join(markdown(title, table) for title, table in found.items())
    (out / "gate.md").write_text(text)
    print(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--zip", help="furniture.zip; without it embedded objects are used")
    parser.add_argument("--seed", type=int, default=1, help="of cameras, sets and faults")
    parser.add_argument("--share", type=float, default=1.0, help="of the sets")
    parser.add_argument("--objects", type=int, default=78, help="of a domain, at most")
    parser.add_argument("--calibrated", type=Path, help="folder of a run that has calibrated")
    parser.add_argument("--out", type=Path, default=Path("runs/gate"), help="for what is written")
    parser.add_argument("--work", type=Path, help="folder for healthy sets (default: temporary)")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--tables", type=Path, help="write those of a run's folder, and end")
    arguments = parser.parse_args()
    if arguments.tables:
        return write_tables(arguments.tables)
    from tqdm import tqdm

    started, out, seed = time.monotonic(), arguments.out, arguments.seed
    out.mkdir(parents=True, exist_ok=True)
    spawn = multiprocessing.get_context("spawn")

    def follow(jobs: Sequence[Any], name: str) -> None:
        with open(out / name, "wb", buffering=0) as file:
            for job in tqdm(as_completed(jobs), total=len(jobs), desc=name, mininterval=10):
                file.write(msgspec.json.encode(job.result()) + b"\n")

    with (
        tempfile.TemporaryDirectory() as temporary,
        ProcessPoolExecutor(arguments.workers, spawn) as pool,
    ):
        work = arguments.work or Path(temporary)
        jobs = []
        if arguments.calibrated:
            shutil.copy(arguments.calibrated / "calibration.jsonl", out)
        for source in (
            () if arguments.calibrated else make_sources("calibration", seed, work, pool, arguments)
        ):
            for path in map(str, Path(source).iterdir()):
                rows = np.arange(len(opened(path)))
                parts = np.array_split(rows, max(1, len(rows) // 8))
                jobs += [pool.submit(measured, path, part.tolist()) for part in parts]
        if jobs:
            follow(jobs, "calibration.jsonl")
        frozen = {"version": VERSION, "thresholds": asdict(gate.GateConfig()), "seed": seed}
        frozen |= {"share": arguments.share, "calibrated_s": round(time.monotonic() - started)}
        (out / "thresholds.json").write_text(json.dumps(frozen, indent=1) + "\n")
        sources = make_sources("test", seed, work, pool, arguments)
        print(f"test objects made after {time.monotonic() - started:.0f} s", flush=True)
        tasks = tasks_of(sources, seed, arguments.share)
        follow([pool.submit(trial, task) for task in tasks], "rows.jsonl")
    print(f"done after {time.monotonic() - started:.0f} s", flush=True)
    write_tables(out)


if __name__ == "__main__":
    main()
