"""How often the gate is right: faults it catches, causes it names, healthy sets it refuses.

    python benchmarks/gate.py --zip furniture.zip [--out reports/gate] [--sets 6] [--quick]

Healthy sets of ten records come from three sources that set no threshold: renders of the zip's test
objects, renders of the embedded objects, and Gaussians that the shipped decoder makes of either.
Every fault is put into some of them, at several strengths and on several backgrounds. Writes
gate.json, gate.md (the tables) and gate.png (recall against strength).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fresnel import bootstrap, dataset, decoder, faults, figures, gate, meshes
from fresnel.dataset import MultiViewDataset, ObjectViews

STRENGTHS = (0.05, 0.1, 0.25, 0.5, 0.75, 1.0)
SCENES: tuple[faults.Scene, ...] = ("black", "white", "photo")
RECORDS = 10
BLACK = (0.0, 0.0, 0.0)


@dataclass
class Sample:
    """As much of a dataset as the gate needs: records in memory."""

    records: Sequence[ObjectViews]
    background: tuple[float, float, float] = BLACK
    meta: dict[str, Any] = field(default_factory=dict)
    content_hash: str = ""

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> ObjectViews:
        return self.records[index]


def make_sources(zip_path: str | None, folder: Path, size: int) -> list[str]:
    """Render and decode the healthy sets; returns their folders."""
    made = []

    def render(name: str, assets: list[meshes.Asset], inputs: int) -> MultiViewDataset:
        made.append(str(folder / name))
        return meshes.render_set(
            assets, made[-1], image_size=size, inputs_per_object=inputs, seed=11, workers=1
        )

    pixel = decoder.load_shipped("pixel")
    config = replace(bootstrap.CORRECTED, image_size=size)
    sets = [render("embedded objects", meshes.embedded_assets(), 2)]
    if zip_path:
        sets.append(render("held-out furniture", meshes.zip_assets(zip_path, "test"), 1))
    for data in sets:
        made.append(f"{data.path}, decoded")
        bootstrap.bootstrap(data.inputs()[:48], pixel, config, made[-1])
    return made


def draw(data: MultiViewDataset, seed: int) -> list[ObjectViews]:
    """Ten records of different objects."""
    order = np.random.default_rng(seed).permutation(len(data))
    chosen: dict[str, int] = {}
    for k in order:
        chosen.setdefault(data.names[k].partition("__")[0], int(k))
    return [data[k] for k in list(chosen.values())[:RECORDS]]


def trial(task: tuple[str, str, float, faults.Scene, int]) -> dict[str, Any]:
    """One set of ten with one fault ("" for none): what the gate said."""
    source, fault, strength, scene, seed = task
    records = draw(dataset.open(source), seed)
    if fault:
        records = list(faults.corrupt(records, fault, strength, seed=seed))
    rng = np.random.default_rng(seed)
    if scene != "black":
        records = [faults.on_background(record, scene, rng, BLACK) for record in records]
    background = (1.0, 1.0, 1.0) if scene == "white" else BLACK
    verdict = gate.validate(Sample(records, background), progress=False, workers=1)
    return {
        "source": Path(source).name,
        "fault": fault,
        "strength": strength,
        "scene": scene,
        "passed": verdict.passed,
        "codes": [reason.code for reason in verdict.reasons],
        "mend": verdict.reasons[0].mend if verdict.reasons else None,
    }


def hard_healthy(name: str, index: int) -> ObjectViews:
    """Objects that are unusual but healthy, as analytic shapes: `name` says which."""
    import trimesh

    from fresnel.cameras import orbit

    rng = np.random.default_rng([len(name), index])
    colour = (rng.uniform(40, 255, 3)).astype(np.uint8)
    if name == "dark on black":
        colour = rng.integers(8, 30, 3).astype(np.uint8)
    elif name == "white on white":
        colour = np.array([250, 250, 250], np.uint8)
    if name == "thin":
        mesh = trimesh.creation.box((0.02 + 0.02 * rng.random(), 1.0, 0.02 + 0.04 * rng.random()))
    elif name == "symmetric":
        height, radius = 1.0, 0.15 + 0.3 * rng.random()
        profile = [[0.0, 0.0], [radius, 0.0], [0.5 * radius, 0.5 * height], [radius, height]]
        mesh = trimesh.creation.revolve([*profile, [0.0, height]], sections=64)
        mesh.apply_transform(trimesh.transformations.rotation_matrix(-np.pi / 2, (1, 0, 0)))
    else:
        mesh = trimesh.util.concatenate(
            [
                trimesh.creation.box(rng.uniform(0.2, 1.0, 3)),
                trimesh.creation.icosphere(radius=0.3).apply_translation(rng.uniform(-0.4, 0.4, 3)),
            ]
        )
    mesh.apply_translation(-mesh.bounds.mean(axis=0))
    mesh.apply_scale(1 / mesh.extents.max())
    mesh.visual.face_colors = np.concatenate([colour, [255]])
    start, size = rng.uniform(0, 360), 64
    azimuth = torch.from_numpy(start + np.concatenate([[0.0], 45.0 * np.arange(8)])).float()
    # A vase on a turntable is seen from one height: the hardest case for "frozen".
    elevation = np.full(9, 15.0) if name == "symmetric" else rng.uniform(-30, 45, 9)
    cameras = orbit(
        azimuth,
        torch.from_numpy(elevation).float(),
        2.2,
        pivot=(0.0, 0.0, 0.0),
        focal_px=1.2 * size,
        width=size,
        height=size,
    )
    views = meshes.render(trimesh.Scene([mesh]), cameras)
    rgb = (views.rgb * 255 + 0.5).to(torch.uint8)
    alpha = (views.alpha[..., 0] * 255 + 0.5).to(torch.uint8)
    record = ObjectViews(
        name=f"{name} {index}",
        input_rgb=rgb[0],
        input_alpha=alpha[0],
        input_camera=cameras[0],
        input_depth=views.depth[0, ..., 0],
        rgb=rgb[1:],
        alpha=alpha[1:],
        depth=views.depth[1:, ..., 0],
        cameras=cameras[1:],
        pivot=torch.zeros(3),
    )
    scene: faults.Scene = "white" if name == "white on white" else "black"
    return faults.on_background(record, scene, rng, BLACK)


HARD = ("dark on black", "white on white", "thin", "symmetric", "single-coloured")


def hard_trial(task: tuple[str, int, bool]) -> dict[str, Any]:
    name, seed, opaque = task
    records = [hard_healthy(name, 100 * seed + k) for k in range(RECORDS)]
    if opaque:
        records = [replace(r, alpha=torch.full_like(r.alpha, 255), depth=None) for r in records]
    background = (1.0, 1.0, 1.0) if name == "white on white" else BLACK
    verdict = gate.validate(Sample(records, background), progress=False, workers=1)
    codes = [reason.code for reason in verdict.reasons]
    return {"name": name, "opaque": opaque, "passed": verdict.passed, "codes": codes}


def faulty_tasks(sources: Sequence[str], sets: int, quick: bool) -> Iterator[Any]:
    for number, (fault, (_, practical)) in enumerate(faults.EXPECTED.items()):
        decoded_only = fault == "identity_mismatch"
        for strength in STRENGTHS:
            if quick and strength != practical:
                continue
            # Whole-view faults below one view, and shares below one record, are no faults.
            count = sets if strength >= practical else max(2, sets // 2)
            for k in range(count):
                source = sources[(number + k) % len(sources)]
                if decoded_only and "decoded" not in source:
                    source = f"{source}, decoded"
                # Only backgrounds that the fault's own arithmetic is blind to: put on afterwards.
                scene = SCENES[k % 3] if fault not in _BLACK_ONLY else "black"
                yield source, fault, strength, scene, 1000 * number + k


_BLACK_ONLY = ("white_views", "constant_views")


def wilson(hits: int, total: int) -> tuple[float, float]:
    """95% interval of a proportion (Wilson, 1927)."""
    if not total:
        return 0.0, 1.0
    z, p = 1.96, hits / total
    middle, spread = (
        p + z * z / (2 * total),
        z * ((p * (1 - p) + z * z / (4 * total)) / total) ** 0.5,
    )
    return max(0.0, (middle - spread) / (1 + z * z / total)), min(
        1.0, (middle + spread) / (1 + z * z / total)
    )


def table(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Recall and correct cause per fault and strength."""
    out = []
    for fault, (code, practical) in faults.EXPECTED.items():
        for strength in STRENGTHS:
            own = [r for r in rows if r["fault"] == fault and r["strength"] == strength]
            if not own:
                continue
            caught = [r for r in own if not r["passed"]]
            right = [r for r in caught if r["codes"][0] == code]
            others = sorted({r["codes"][0] for r in caught if r["codes"][0] != code})
            out.append(
                {
                    "fault": fault,
                    "cause": code,
                    "strength": strength,
                    "practical": strength >= practical,
                    "sets": len(own),
                    "recall": len(caught) / len(own),
                    "correct_cause": len(right) / len(caught) if caught else float("nan"),
                    "other_causes": others,
                }
            )
    return out


def markdown(result: dict[str, Any]) -> str:
    total, rows = result["summary"], result["table"]
    lines = [
        f"Held-out sets of {RECORDS} records, {result['image_size']} px, seen whole: "
        f"recall {total['recall']:.1%} and correct cause first {total['correct_cause']:.1%} over "
        f"{total['faulty_sets']} sets with {total['kinds']} kinds of fault at practical strength; "
        f"{total['false_alarms']} false alarms on {total['healthy_sets']} healthy sets (95% "
        f"interval {total['false_alarm_interval'][0]:.1%} to "
        f"{total['false_alarm_interval'][1]:.1%}).",
        "",
        "| fault | cause that should come first | "
        + " | ".join(f"{s:g}" for s in STRENGTHS)
        + " | cause right |",
        "|---|---|" + "---:|" * (len(STRENGTHS) + 1),
    ]
    for fault, (code, practical) in faults.EXPECTED.items():
        own = {row["strength"]: row for row in rows if row["fault"] == fault}
        cells = []
        for strength in STRENGTHS:
            text = f"{own[strength]['recall']:.0%}" if strength in own else ""
            cells.append(f"**{text}**" if text and strength >= practical else text)
        strong = [r for r in own.values() if r["practical"] and r["recall"] > 0]
        right = np.mean([r["correct_cause"] for r in strong]) if strong else float("nan")
        lines.append(f"| {fault} | {code} | {' | '.join(cells)} | {right:.0%} |")
    lines += [
        "",
        "Share of sets refused, by strength; bold where the fault is of practical strength. The "
        "last column is over those.",
        "",
        "| healthy sets | sets | refused | for |",
        "|---|---:|---:|---|",
    ]
    for row in result["healthy"]:
        reasons = ", ".join(row["codes"]) or "-"
        lines.append(f"| {row['name']} | {row['sets']} | {row['refused']} | {reasons} |")
    return "\n".join(lines) + "\n"


def curves(result: dict[str, Any]) -> Any:
    """Recall against strength, one small panel per fault."""
    names = list(faults.EXPECTED)
    columns = 6
    height = -(-len(names) // columns)
    figure, axes = figures._figure(
        height, columns, figsize=(11, 1.5 * height), sharex=True, sharey=True, squeeze=False
    )
    for axis in axes.flat[len(names) :]:
        axis.set_visible(False)
    for axis, name in zip(axes.flat, names, strict=False):
        own = [row for row in result["table"] if row["fault"] == name]
        x = [row["strength"] for row in own]
        axis.plot(x, [row["recall"] for row in own], marker="o", ms=3, color=figures.BLUE)
        right = [np.nan_to_num(row["correct_cause"]) * row["recall"] for row in own]
        axis.plot(x, right, ls="--", color=figures.VERMILION)
        axis.axvline(faults.EXPECTED[name][1], color=figures.GREY, lw=0.7)
        axis.set_title(name.replace("_", " "), fontsize=8, fontweight="normal")
        axis.set_ylim(-0.05, 1.05)
    return figure


def healthy_rows(plain: Sequence[dict[str, Any]], hard: Sequence[dict[str, Any]]) -> list[Any]:
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in plain:
        groups.setdefault(f"{row['source']}, {row['scene']}", []).append(row)
    for row in hard:
        groups.setdefault(row["name"] + (", no alpha" if row["opaque"] else ""), []).append(row)
    return [
        {
            "name": name,
            "sets": len(rows),
            "refused": sum(not row["passed"] for row in rows),
            "codes": sorted({row["codes"][0] for row in rows if not row["passed"]}),
        }
        for name, rows in groups.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--zip", help="furniture.zip; without it only embedded objects are used")
    parser.add_argument("--out", type=Path, default=Path("reports/gate"))
    parser.add_argument("--sets", type=int, default=6, help="sets per fault and strength")
    parser.add_argument("--healthy", type=int, default=50, help="healthy sets per source")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--quick", action="store_true", help="practical strengths only")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    arguments = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        sources = make_sources(arguments.zip, Path(folder), arguments.size)
        faulty = list(faulty_tasks(sources, arguments.sets, arguments.quick))
        healthy = [
            (source, "", 0.0, SCENES[k % 3], 9000 + k)
            for source in sources
            for k in range(arguments.healthy)
        ]
        hard = [(name, k, opaque) for name in HARD for k in range(4) for opaque in (False, True)]
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(
            arguments.workers, context, initializer=torch.set_num_threads, initargs=(1,)
        ) as pool:
            rows = list(
                _progress(pool.map(trial, faulty + healthy, chunksize=4), len(faulty + healthy))
            )
            hard_rows = list(pool.map(hard_trial, hard))
    plain, rows = rows[len(faulty) :], rows[: len(faulty)]
    found = table(rows)
    strong = [r for r in rows if r["strength"] >= faults.EXPECTED[r["fault"]][1]]
    caught = [r for r in strong if not r["passed"]]
    right = [r for r in caught if r["codes"][0] == faults.EXPECTED[r["fault"]][0]]
    calm = [*plain, *hard_rows]
    alarms = sum(not row["passed"] for row in calm)
    result = {
        "image_size": arguments.size,
        "records": RECORDS,
        "summary": {
            "kinds": len(faults.EXPECTED),
            "faulty_sets": len(strong),
            "recall": len(caught) / len(strong),
            "recall_interval": wilson(len(caught), len(strong)),
            "correct_cause": len(right) / max(len(caught), 1),
            "healthy_sets": len(calm),
            "false_alarms": alarms,
            "false_alarm_interval": wilson(alarms, len(calm)),
            "duration_s": round(time.monotonic() - started, 1),
            "python": platform.python_version(),
        },
        "table": found,
        "healthy": healthy_rows(plain, hard_rows),
        "thresholds": vars(gate.GateConfig()),
        "missed": [r for r in strong if r["passed"]],
        "miscalled": [r for r in caught if r not in right],
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result, indent=1)
    (arguments.out / "gate.json").write_text(text.replace("NaN", "null") + "\n")
    (arguments.out / "gate.md").write_text(markdown(result))
    (arguments.out / "gate.png").write_bytes(figures.to_png(curves(result), dpi=110))
    print(markdown(result))
    print(json.dumps(result["summary"], indent=1))


def _progress(items: Any, total: int) -> Iterator[Any]:
    from tqdm import tqdm

    return iter(tqdm(items, total=total, desc="sets"))


if __name__ == "__main__":
    main()
