"""The index over all runs: one page, made from their results.json files alone.

Filter, order, histories and the comparison of two runs are in the page itself; pictures are asked
for by their relative path, and only when they come into sight.
"""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from fresnel.host.files import write_atomic
from fresnel.report import html as _html
from fresnel.report.costs import total_avoided
from fresnel.report.provenance import RESULTS_NAME
from fresnel.report.record import RecordError, RunRecord

INDEX_NAME = "index.html"
_COMPARED = ("psnr", "ssim", "luminance_ratio", "coverage_ratio")


def index(reports_dir: str | Path) -> Path:
    """Write reports_dir/index.html over every results.json below it, newest first. A damaged file
    is listed as damaged; of a run that was also published, the copy with a page."""
    reports = Path(reports_dir)
    copies: dict[tuple[str, str, float], tuple[Any, Path, RunRecord]] = {}
    damaged = []
    for path in sorted(reports.rglob(RESULTS_NAME)):
        if any(part.endswith(".partial") for part in path.relative_to(reports).parts):
            continue  # a fetch that goes on, or did not end well
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
    runs = [_entry(folder, record, reports) for _, folder, record in found]
    packages: list[Any] = []
    compared = {"runs": [_comparable(run, packages) for run in runs], "packages": packages}
    text = _html.render(
        "index.html.j2",
        runs=runs,
        damaged=damaged,
        page={
            "policy": _html.policy(pictures="'self' file:"),
            "css": _html.style("page.css", "index.css"),
            "js": _html.text("page.js", "index.js"),
            "total_s": sum(record.duration_s for record in records),
            "total_usd": sum(record.cost_usd for record in records),
            "avoided": total_avoided(records),
            "verdicts": Counter(record.badge for record in records).most_common(),
            "notebooks": sorted({record.notebook for record in records}),
            "histories": histories(records),
            "remote": _remote(reports),
            "sorts": _sortable(records),
            # inside a <script>, which it cannot end
            "data": json.dumps(compared, separators=(",", ":"), default=str).replace(
                "<", "\\u003c"
            ),
        },
    )
    write_atomic(reports / INDEX_NAME, text)
    return reports / INDEX_NAME


def _remote(reports: Path) -> list[dict[str, Any]]:
    """What the ledger of remote runs (`fresnel.launch.runs`) says of each, newest first."""
    rows = []
    for path in sorted(reports.glob("remote/.ledger/*/launch.json"), reverse=True):
        try:
            entry = json.loads(path.read_text(encoding="utf-8"))
            fetched, spent = entry.get("fetched") or "", entry.get("spent") or {}
            row = {name: entry[name] for name in ("run", "on", "state", "planned")}
        except (OSError, ValueError, KeyError, AttributeError):
            continue
        page = Path(fetched, "out", INDEX_NAME)
        link = quote(str(page)) if fetched and (reports / page).is_file() else None
        rows.append({**row, "why": entry.get("why"), "spent": spent, "link": link})
    return rows


def key_figures(record: RunRecord, count: int) -> list[tuple[str, Any]]:
    """The first `count` scalar metrics, in the order in which the notebook recorded them."""
    scalars = [
        (name, value)
        for name, value in record.metrics.items()
        if isinstance(value, (int, float)) or (isinstance(value, str) and len(value) <= 24)
    ]
    return scalars[:count]


def histories(records: Sequence[RunRecord], most: int = 40) -> list[dict[str, Any]]:
    """For every name that finished at least twice: four key figures and the time over its runs.

    records: newest first. Returns, by name, {"name", "runs", "verdicts", "lines"}; a line is one
    figure, oldest first: {"name", "values", "points" (of an SVG polyline in a box of 100 x 24),
    "last"}.
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
        for figure, _ in key_figures(runs[-1], 12):
            values: list[Any] = [run.metrics.get(figure) for run in runs[-most:]]
            numbers = [float(v) for v in values if _is_number(v) and math.isfinite(v)]
            if len(numbers) > 1 and len(lines) < 4:
                lines.append(_line(figure, numbers))
        lines.append(_line("duration_s", [run.duration_s for run in runs[-most:]]))
        verdicts = [(run.badge, _html.tone(run.badge)) for run in runs[-12:]]
        rows.append({"name": name, "runs": len(runs), "verdicts": verdicts, "lines": lines})
    return rows


def _line(name: str, values: list[float]) -> dict[str, Any]:
    low, span = min(values), max(values) - min(values)
    step = 100.0 / max(1, len(values) - 1)
    heights = [21.0 - 18.0 * ((value - low) / span if span else 0.5) for value in values]
    points = [(number * step, height) for number, height in enumerate(heights)]
    drawn = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return {"name": name, "values": values, "points": drawn, "last": points[-1]}


def _page_of(folder: Path, record: RunRecord) -> Path:
    return folder / record.artifacts.get("report", "report.html")


def _entry(folder: Path, record: RunRecord, reports: Path) -> dict[str, Any]:
    def address(path: Path, *endings: str) -> str | None:
        """Of a file in the run's own folder: an index that is copied with its runs stays whole."""
        inside = path.is_relative_to(folder) and ".." not in path.relative_to(folder).parts
        fits = inside and path.suffix in endings and path.is_file()
        return quote(str(path.relative_to(reports))) if fits else None

    pictures = {
        name: address(folder / file, ".png", ".webp", ".jpg")
        for name, file in record.artifacts.items()
    }
    return {
        "record": record,
        "link": address(_page_of(folder, record), ".html"),
        "picture": pictures.pop("thumbnail", None),
        "pictures": {name: file for name, file in pictures.items() if file},
        "figures": key_figures(record, 4),
        "published": "published" in folder.relative_to(reports).parts,
    }


def _comparable(run: Mapping[str, Any], packages: list[Any]) -> dict[str, Any]:
    """What the page needs to put this run beside another one."""
    record: RunRecord = run["record"]
    origin = record.provenance
    software = {"python": origin.get("python"), **(origin.get("packages") or {})}
    if software not in packages:
        packages.append(software)
    git, cpu = origin.get("git") or {}, origin.get("cpu") or {}
    data = origin.get("datasets") or []
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
        "data": [[entry[key] for key in ("path", "objects", "content_hash")] for entry in data],
        "commit": git.get("commit"),
        "dirty": git.get("dirty"),
        "changed": list(git.get("changed") or [])[:20],
        "hardware": ", ".join(filter(None, (cpu.get("model"), origin.get("gpu")))),
        "seed": origin.get("seed"),
        "software": packages.index(software),
    }


def _measured(metrics: Mapping[str, Any]) -> Iterator[tuple[str, list[Any]]]:
    """(name, [value, low, high]) of every single number; the interval where one was measured."""
    summaries = metrics.get("summaries")
    overall = {
        model: rows[-1]
        for model, rows in (summaries if isinstance(summaries, dict) else {}).items()
        if isinstance(rows, list) and rows and isinstance(rows[-1], dict)
    }
    # the run's own figures stand in the summary of whatever it trained
    shared = [name for name in _COMPARED if name in metrics]
    own = [m for m, row in overall.items() if all(metrics[n] == row.get(n) for n in shared)]
    ends = overall[min(own)] if shared and own else {}
    for name, value in metrics.items():
        if isinstance(value, dict):
            numbers = {f"{name}: {key}": item for key, item in value.items() if _is_number(item)}
            yield from ((key, [item, None, None]) for key, item in numbers.items())
        elif not isinstance(value, list):
            yield name, [value, ends.get(f"{name}_low"), ends.get(f"{name}_high")]
    for model, row in overall.items():
        for name in _COMPARED if row is not ends else ():
            if _is_number(row.get(name)):
                interval = [row.get(f"{name}_low"), row.get(f"{name}_high")]
                yield f"{model}: {name}", [row[name], *interval]


def _sortable(records: Sequence[RunRecord], most: int = 8) -> list[str]:
    """The key figures that most runs have, to order the list by."""
    figures = (figure for record in records for figure in key_figures(record, 6))
    counts = Counter(name for name, value in figures if _is_number(value))
    return [name for name, _ in counts.most_common(most)]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
