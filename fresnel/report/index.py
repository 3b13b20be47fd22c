"""The index over all runs: one page, made from their results.json files alone.

Filter, order, histories and the comparison of two runs are in the page itself; pictures are asked
for by their relative path, and only when they come into sight.
"""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from fresnel.host.files import write_atomic
from fresnel.report import html as _html
from fresnel.report.costs import cost_avoided, total_avoided
from fresnel.report.provenance import RESULTS_NAME
from fresnel.report.record import RecordError, RunRecord

INDEX_NAME = "index.html"
_COMPARED = ("psnr", "ssim", "luminance_ratio", "coverage_ratio")


def index(reports_dir: str | Path) -> Path:
    """Write reports_dir/index.html over every results.json below it, newest first. A damaged file
    is listed as damaged; of a run that was also published, the copy with a page."""
    from jinja2 import Environment, FileSystemLoader

    reports = Path(reports_dir)
    reports.mkdir(parents=True, exist_ok=True)
    copies: dict[tuple[str, str, float], tuple[Any, Path, RunRecord]] = {}
    damaged = []
    for path in sorted(reports.rglob(RESULTS_NAME)):
        try:
            record = RunRecord.read(path)
            entry = (_html.when(record.started_utc), path.parent, record)
        except (RecordError, ValueError) as error:
            damaged.append(str(error).replace(f"{reports}/", ""))
            continue
        run = (record.name, record.started_utc, record.duration_s)
        if run not in copies or _page_of(path.parent, record).exists():
            copies[run] = entry
    found = sorted(copies.values(), key=lambda entry: entry[0], reverse=True)
    records = [record for _, _, record in found]
    # records of an older schema do not say it themselves, and tell enough to work it out
    judged = [r.replace(cost_avoided=r.cost_avoided or cost_avoided(r, records)) for r in records]
    runs = [_entry(folder, record, reports) for _, folder, record in found]
    packages: list[Any] = []
    counts = Counter(record.badge for record in records)
    environment = Environment(loader=FileSystemLoader(_html.TEMPLATES), autoescape=True)
    environment.filters.update(_html.FILTERS)
    text = environment.get_template("index.html.j2").render(
        runs=runs,
        damaged=damaged,
        page={
            "policy": _html.policy(pictures="'self' file:"),
            "css": _html.style("page.css", "index.css"),
            "js": _html.text("page.js", "index.js"),
            "total_s": sum(record.duration_s for record in records),
            "total_usd": sum(record.cost_usd for record in records),
            "avoided": total_avoided(judged),
            "verdicts": [(badge, n) for badge, n in counts.most_common()],
            "notebooks": sorted({record.notebook for record in records}),
            "histories": histories(records),
            "sorts": _sortable(records),
            "data": _for_script([_comparable(run, packages) for run in runs], packages),
        },
    )
    target = reports / INDEX_NAME
    write_atomic(target, text)
    return target


def key_figures(record: RunRecord, count: int) -> list[tuple[str, Any]]:
    """The first `count` scalar metrics, in the order in which the notebook recorded them."""
    scalars = [
        (name, value)
        for name, value in record.metrics.items()
        if isinstance(value, (int, float, bool)) or (isinstance(value, str) and len(value) <= 24)
    ]
    return scalars[:count]


def histories(records: Sequence[RunRecord], most: int = 40) -> list[dict[str, Any]]:
    """For every name that ran at least twice: its key figures over time, oldest first.

    records: newest first. Returns, by name, {"name", "runs", "verdicts", "lines"}; a line is one
    figure: {"name", "values", "points" (of an SVG polyline in a box of 100 x 24), "last"}.
    """
    named: dict[str, list[RunRecord]] = defaultdict(list)
    for record in reversed(records):
        if record.status == "finished" and record.verdict != "REFUSED":
            named[record.name or record.notebook].append(record)
    rows = []
    for name, runs in sorted(named.items()):
        if len(runs) < 2:
            continue
        lines: list[dict[str, Any]] = []
        for figure, value in key_figures(runs[-1], 12):
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                continue
            values = [_finite(run.metrics.get(figure), math.nan) for run in runs[-most:]]
            finite = [v for v in values if math.isfinite(v)]
            if len(finite) > 1 and len(lines) < 4:
                lines.append({"name": figure, "values": finite, **_polyline(finite)})
        # one unit for all: a run without a price would be drawn in seconds among dollars
        priced = all(run.cost_usd > 0 for run in runs[-most:])
        cost = [run.cost_usd if priced else run.duration_s for run in runs[-most:]]
        unit = "cost_usd" if priced else "duration_s"
        lines.append({"name": unit, "values": cost, **_polyline(cost)})
        verdicts = [(run.badge, _html.tone(run.badge)) for run in runs[-12:]]
        rows.append({"name": name, "runs": len(runs), "verdicts": verdicts, "lines": lines})
    return rows


def _polyline(
    values: Sequence[float], width: float = 100.0, height: float = 24.0
) -> dict[str, Any]:
    low, high = min(values), max(values)
    span = (high - low) or 1.0
    step = width / max(1, len(values) - 1)
    points = [
        (i * step, height - 3 - (height - 6) * ((v - low) / span if high > low else 0.5))
        for i, v in enumerate(values)
    ]
    return {"points": " ".join(f"{x:.1f},{y:.1f}" for x, y in points), "last": points[-1]}


def _page_of(folder: Path, record: RunRecord) -> Path:
    return folder / record.artifacts.get("report", "report.html")


def _entry(folder: Path, record: RunRecord, reports: Path) -> dict[str, Any]:
    place = folder.relative_to(reports)
    report = _page_of(folder, record)
    return {
        "record": record,
        "link": quote(str(report.relative_to(reports))) if _inside(report, folder) else None,
        "picture": _picture(folder, place, record.artifacts.get("thumbnail", "")),
        "pictures": {
            name: address
            for name, file in record.artifacts.items()
            if name != "thumbnail" and (address := _picture(folder, place, file))
        },
        "figures": key_figures(record, 4),
        "published": "published" in place.parts,
    }


def _picture(folder: Path, place: Path, file: str) -> str | None:
    """The address of a picture from the index, if it is one and is there."""
    if not file.endswith((".png", ".webp", ".jpg")) or not _inside(folder / file, folder):
        return None
    return quote(str(place / file))


def _inside(path: Path, folder: Path) -> bool:
    """A file in the run's own folder: an index that is copied with its runs stays whole."""
    return (
        ".." not in path.relative_to(folder).parts and path.is_file()
        if (path.is_relative_to(folder))
        else False
    )


def _comparable(run: Mapping[str, Any], packages: list[Any]) -> dict[str, Any]:
    """What the page needs to put this run beside another one."""
    record: RunRecord = run["record"]
    origin = record.provenance
    software = {"python": origin.get("python"), **(origin.get("packages") or {})}
    if software not in packages:
        packages.append(software)
    git = origin.get("git") or {}
    return {
        "name": record.name or record.notebook,
        "notebook": record.notebook,
        "badge": record.badge,
        "tone": _html.tone(record.badge),
        "when": record.started_utc,
        "duration_s": record.duration_s,
        "cost_usd": record.cost_usd,
        "link": run["link"],
        "thumbnail": run["picture"],
        "pictures": run["pictures"],
        "params": {k: v for k, v in record.params.items() if k != "output_dir"},
        "metrics": dict(_measured(record.metrics)),
        "data": [
            [d.get("path"), d.get("objects"), d.get("content_hash")]
            for d in origin.get("datasets") or []
            if isinstance(d, dict)
        ],
        "commit": git.get("commit"),
        "dirty": git.get("dirty"),
        "changed": list(git.get("changed") or [])[:20],
        "hardware": ", ".join(
            str(part)
            for part in ((origin.get("cpu") or {}).get("model"), origin.get("gpu"))
            if part
        ),
        "seed": origin.get("seed"),
        "software": packages.index(software),
    }


def _measured(metrics: Mapping[str, Any]) -> Iterable[tuple[str, list[float | str | None]]]:
    """(name, [value, low, high]) of every single number; the interval where one was measured."""
    summaries = metrics.get("summaries")
    overall = {
        name: entries[-1]
        for name, entries in (summaries if isinstance(summaries, dict) else {}).items()
        if isinstance(entries, list) and entries and isinstance(entries[-1], dict)
    }
    # the run's own figures stand in the summary of whatever it trained
    shared = [name for name in _COMPARED if name in metrics]
    own = {
        model
        for model, entry in overall.items()
        if shared and all(metrics[name] == entry.get(name) for name in shared)
    }
    ends = overall[min(own)] if own else {}
    for name, value in metrics.items():
        if isinstance(value, (bool, int, float, str)) or value is None:
            yield name, [value, ends.get(f"{name}_low"), ends.get(f"{name}_high")]
        elif isinstance(value, dict):
            for key, item in value.items():
                if isinstance(item, (int, float)) and not isinstance(item, bool):
                    yield f"{name}: {key}", [item, None, None]
    for model, entry in overall.items():
        for name in _COMPARED:
            if model not in own and isinstance(entry.get(name), (int, float)):
                low, high = entry.get(f"{name}_low"), entry.get(f"{name}_high")
                yield f"{model}: {name}", [entry[name], low, high]


def _sortable(records: Sequence[RunRecord], most: int = 8) -> list[str]:
    """The key figures that most runs have, to order the list by."""
    counts = Counter(
        name
        for record in records
        for name, value in key_figures(record, 6)
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    )
    return [name for name, _ in counts.most_common(most)]


def _for_script(runs: list[dict[str, Any]], packages: list[Any]) -> str:
    """JSON that may stand inside a <script>: it cannot end it."""
    plain = json.dumps({"runs": runs, "packages": packages}, separators=(",", ":"), default=str)
    return plain.replace("<", "\\u003c")


def _finite(value: Any, otherwise: float = 0.0) -> float:
    known = isinstance(value, (int, float)) and math.isfinite(value)
    return float(value) if known else otherwise
