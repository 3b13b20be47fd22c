"""The front page over all runs: made from their results.json files alone.

What this is, what the newest analysis (04) says, one's own runs, and the published study, an arm a
line. Filter, order, table and the comparison of runs are in the page itself and in its address;
pictures are asked for by their relative path, and only when they come into sight.

Cost avoided by the gate: a FAIL of the gate and a NO-GO of the smoke test forbid one training, that
of their data. (A REFUSED training forbids none: it wants the verdict first.) Avoided is a smoke
test's forecast of it less what reaching the verdict cost, never below 0; nothing where no smoke
test has made a forecast. Over many runs each dataset's training counts once, whoever forbade it;
and not where the data was trained on in spite of it, as a control: that money was spent.
"""

import contextlib
import functools
import json
import math
import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import CodeType
from typing import Any
from urllib.parse import quote

import jinja2
import yaml

from fresnel.evaluation import noise
from fresnel.host.files import from_json, locked, read_bytes, read_json, write_atomic
from fresnel.host.machine import project_root
from fresnel.report import html as _html
from fresnel.report.provenance import RESULTS_NAME
from fresnel.report.record import RecordError, RunRecord
from fresnel.show.style import script_hash

INDEX_NAME = "index.html"
CACHE_NAME = ".cache"
TABLE_NAME = "runs.jsonl"
"""How a study is published: a results.json a line (`fresnel.analysis.runs`)."""
_QUALITY = (
    *("psnr", "ssim", "perceptual", "luminance_ratio", "coverage_ratio", "empty_views"),
    *("target_luminance", "target_coverage", "loss_fall"),
)
"""What a reader wants to know first."""
_COMPARED = ("psnr", "ssim", "luminance_ratio", "coverage_ratio")


def records(reports: Path) -> Iterator[tuple[Path, RunRecord | RecordError]]:
    """Folder and record of every run below `reports`, or what is wrong with it."""
    for path in sorted(reports.rglob(RESULTS_NAME)):
        if any(part.endswith(".partial") for part in path.relative_to(reports).parts):
            continue  # a fetch that goes on, or did not end well
        try:
            record = RunRecord.read(path)
            _html.when(record.started_utc)
            _entry(path.parent, record, reports)  # what it says may be of any type
            yield path.parent, record
        except (ValueError, AttributeError, TypeError) as error:
            said = error if isinstance(error, RecordError) else RecordError(f"{path}: {error}")
            yield path.parent, said


def index(reports: Path) -> Path:
    """Write reports/index.html over every results.json below it, newest first. A damaged file is
    listed as damaged; of a run that was also published, the copy with a page. Calls at once take
    turns, so that the last one sees all."""
    with locked(reports / CACHE_NAME / "index.lock"):
        copies: dict[Any, tuple[Path, RunRecord]] = {}
        damaged = []
        for folder, record in records(reports):
            if isinstance(record, RecordError):
                damaged.append(str(record).replace(f"{reports}/", ""))
                continue
            run = (record.name, record.started_utc, record.duration_s)
            if run not in copies or _page_of(folder, record).exists():
                copies[run] = folder, record
        found = sorted(copies.values(), key=lambda e: _html.when(e[1].started_utc), reverse=True)
        runs = [_entry(folder, record, reports) for folder, record in found]
        for number, entry in enumerate(runs):
            entry["number"] = number
        data = {"runs": [entry.pop("compared") for entry in runs]}
        own = [run["record"] for run in runs if not run["published"]]
        figures = (figure for _, record in found for figure in record.metrics.items())
        measured = {name for name, value in figures if _is_number(value)}
        studies = []
        for table in sorted(reports.rglob(TABLE_NAME), reverse=True):
            within = [run for run in runs if run["published"] and table.parent in run["parents"]]
            studies.append((table.parent.name, study(table, within), within))
        placed = [run["number"] for _, _, within in studies for run in within]
        rest = [run for run in runs if run["published"] and run["number"] not in placed]
        studies += [("other", [], rest)] if rest else []
        told = [run for run in runs if run["record"].notebook.startswith("04")]
        told = [run for run in told if run["record"].status == "finished" and run["link"]]
        script = _html.text("page.js", "index.js")
        page = {
            "policy": _html.policy([script_hash(script)], pictures="'self' file:"),
            "css": _html.style("page.css", "index.css"),
            "js": script,
            "answer": next(iter(sorted(told, key=lambda run: run["published"])), None),
            "studies": studies,
            "own": len(own),
            "of_published": reports.name == "published",
            "total_s": sum(record.duration_s for record in own),
            "total_usd": sum(record.cost_usd for record in own),
            "avoided": total_avoided(own),
            "verdicts": Counter(record.badge for _, record in found).most_common(),
            "notebooks": sorted({record.notebook for _, record in found}),
            "histories": histories(own),
            "remote": _remote(reports),
            "sorts": [name for name in _QUALITY if name in measured],
            # inside a <script>, which it cannot end
            "data": json.dumps(data, separators=(",", ":"), default=str).replace("<", "\\u003c"),
        }
        loader = jinja2.FileSystemLoader(_html.TEMPLATES)
        environment = jinja2.Environment(loader=loader, autoescape=True)
        environment.filters.update(_html.FILTERS)
        template = environment.get_template("index.html.j2")
        write_atomic(reports / INDEX_NAME, template.render(runs=runs, damaged=damaged, page=page))
    return reports / INDEX_NAME


def read_table(table: Path) -> Iterator[dict[str, Any]]:
    """The records of a published study (`TABLE_NAME`). ValueError or OSError if unreadable."""
    return map(from_json, read_bytes(table).splitlines())


def study(table: Path, runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The trainings (03) of a published study (`TABLE_NAME`), an arm a row.

    runs: entries of its own pages. Returns {"arm", "what" (as notebooks/params/study.yaml says),
    "seeds", "verdicts", "figures" (name -> (mean, spread over seeds, NaN of one)), "link" (of a
    report that was published)}, best PSNR first."""
    arms: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for record in read_table(table):
        if record["notebook"].startswith("03") and record["status"] == "finished":
            arms[re.sub(r"^03-|-s\d+$", "", record["name"])].append(record)
    links = {run["record"].name: run["link"] for run in runs}
    labels, rows = dict[str, str](), []
    with contextlib.suppress(OSError, LookupError):
        plan = project_root() / "notebooks" / "params" / "study.yaml"
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        analysis = yaml.load(plan.read_bytes(), loader)["analysis"]
        labels = analysis["arms"] | analysis.get("apart", {})
    for arm, made in arms.items():
        figures = {}
        for name in _QUALITY[:5]:
            values = [r["metrics"][name] for r in made if _is_number(r["metrics"].get(name, ""))]
            if values:
                spread = statistics.stdev(values) if len(values) > 1 else math.nan
                figures[name] = (statistics.mean(values), spread)
        row = {"arm": arm, "what": labels.get(arm, ""), "seeds": len(made), "figures": figures}
        now = [
            verdict_today(record["params"], record["metrics"], record["verdict"]) for record in made
        ]
        row["verdicts"] = Counter(now).most_common()
        then = [record["verdict"] for record in made]
        row["then"] = Counter(then).most_common() if then != now else []
        row["link"] = next((links[r["name"]] for r in made if links.get(r["name"])), None)
        rows.append(row)
    return sorted(rows, key=lambda row: -row["figures"].get("psnr", (0.0,))[0])


@functools.cache
def _rule() -> CodeType:
    """Notebook 03's rule, which stands there alone, in the cell with the tag "rule"."""
    notebook = read_json(project_root() / "notebooks" / "03_full_train.ipynb")
    (cell,) = (c for c in notebook["cells"] if "rule" in c["metadata"].get("tags", ()))
    return compile("".join(cell["source"]), "the rule of 03_full_train.ipynb", "exec")


def verdict_today(params: Mapping[str, Any], metrics: Mapping[str, Any], verdict: str) -> str:
    """What notebook 03's rule of today says of a training's figures, as far as they were measured;
    its own verdict where they are not there."""
    given: dict[str, Any] = {"math": math, "model": params.get("model"), "noise": noise}
    given["shares"] = metrics.get("noise_left") or {}
    try:
        given["overall"] = {name: rows[-1] for name, rows in metrics["summaries"].items()}
        exec(_rule(), given)
    except (OSError, LookupError, TypeError, ValueError):
        return verdict
    return str(given["word"])


def _remote(reports: Path) -> list[dict[str, Any]]:
    """What the ledger of remote runs (`fresnel.launch.runs`) says of each, newest first."""
    rows = []
    for path in sorted(reports.glob("remote/.ledger/*/launch.json"), reverse=True):
        try:
            entry = read_json(path)
            row = {name: entry[name] for name in ("run", "on", "state", "planned")}
            fetched, spent = entry.get("fetched") or "", entry.get("spent") or {}
        except (OSError, ValueError, KeyError, AttributeError):
            continue
        page = Path(fetched, "out", INDEX_NAME)
        link = quote(str(page)) if fetched and (reports / page).is_file() else None
        rows.append({**row, "why": entry.get("why"), "spent": spent, "link": link})
    return rows


def key_figures(record: RunRecord, count: int) -> list[tuple[str, Any]]:
    """The first `count` scalar metrics: what says how good it is first, then in the order in which
    the notebook recorded them, and last what it took."""
    scalars = [
        (name, value)
        for name, value in record.metrics.items()
        if isinstance(value, (int, float)) or (isinstance(value, str) and len(value) <= 24)
    ]
    return sorted(scalars, key=lambda figure: _quality_first(figure[0]))[:count]


def _quality_first(name: str) -> tuple[bool, int]:
    costs = name.endswith(("_s", "_bytes")) or name == "gate_overridden"
    return costs, _QUALITY.index(name) if name in _QUALITY else len(_QUALITY)


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
        figures = {
            figure: [v for run in runs[-most:] if _is_number(v := run.metrics.get(figure, ""))]
            for figure, _ in key_figures(runs[-1], 12)
        }
        drawn = [(figure, values) for figure, values in figures.items() if len(values) > 1][:4]
        lines = []
        for figure, values in [*drawn, ("duration_s", [run.duration_s for run in runs[-most:]])]:
            low, span = min(values), max(values) - min(values)
            step = 100.0 / max(1, len(values) - 1)
            heights = [21.0 - 18.0 * ((value - low) / span if span else 0.5) for value in values]
            points = [(place * step, height) for place, height in enumerate(heights)]
            polyline = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
            line = {"name": figure, "values": values, "points": polyline, "last": points[-1]}
            lines.append(line)
        verdicts = [(run.badge, _html.TONES.get(run.badge, "")) for run in runs[-12:]]
        rows.append({"name": name, "runs": len(runs), "verdicts": verdicts, "lines": lines})
    return rows


def _page_of(folder: Path, record: RunRecord) -> Path:
    return folder / record.artifacts.get("report", "report.html")


def _entry(folder: Path, record: RunRecord, reports: Path) -> dict[str, Any]:
    """What the page shows of a run; "compared": what it needs to put it beside another one."""

    def address(path: Path, *endings: str) -> str | None:
        """Of a file in the run's own folder: an index that is copied with its runs stays whole."""
        inside = path.is_relative_to(folder) and ".." not in path.relative_to(folder).parts
        fits = inside and path.suffix in endings and path.is_file()
        return quote(str(path.relative_to(reports))) if fits else None

    files = record.artifacts.items()
    shown = ((name, address(folder / file, ".png", ".webp", ".jpg")) for name, file in files)
    pictures = {name: file for name, file in shown if file}
    picture, link = pictures.pop("thumbnail", None), address(_page_of(folder, record), ".html")
    published = "published" in folder.relative_to(reports.parent).parts
    origin = record.provenance
    git, cpu, data = (origin.get(name) or {} for name in ("git", "cpu", "datasets"))
    compared = {
        "id": str(folder.relative_to(reports)).removeprefix("runs/"),
        "name": record.name or record.notebook,
        "notebook": record.notebook,
        "badge": record.badge,
        "tone": _html.TONES.get(record.badge, ""),
        "when": record.started_utc,
        "duration_s": record.duration_s,
        "cost_usd": record.cost_usd,
        "link": link,
        "published": published,
        "thumbnail": picture,
        "pictures": pictures,
        "params": {k: v for k, v in record.params.items() if k != "output_dir"},
        "metrics": dict(_measured(record.metrics)),
        "data": [[entry.get(key) for key in ("path", "objects", "content_hash")] for entry in data],
        "commit": git.get("commit"),
        "dirty": git.get("dirty"),
        "changed": list(git.get("changed") or [])[:20],
        "hardware": ", ".join(filter(None, (cpu.get("model"), origin.get("gpu")))),
        "seed": origin.get("seed"),
        "software": {"python": origin.get("python"), **(origin.get("packages") or {})},
    }
    figures = key_figures(record, 4)
    now: str = record.verdict or ""
    if published and record.notebook.startswith("03") and record.status == "finished":
        now = verdict_today(record.params, record.metrics, now)
    entry = {
        "parents": folder.parents,
        "today": now if now != record.verdict else "",
        "record": record,
        "link": link,
        "picture": picture,
        "figures": figures,
    }
    return {**entry, "published": published, "compared": compared}


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


def _is_number(value: Any) -> bool:
    whole = isinstance(value, int) and not isinstance(value, bool)
    return whole or (isinstance(value, float) and math.isfinite(value))


def cost_avoided(record: RunRecord, others: Iterable[RunRecord] = ()) -> dict[str, Any] | None:
    """The `cost_avoided` of a run's record; None for a run whose verdict forbids no training.
    "dataset" is its content hash, "basis" where the forecast is from, or why there is none.

    others: runs whose forecast may stand in where the run made none itself; the newest of the same
    data is taken, else the newest of any."""
    of_gate = record.verdict == "FAIL" and "gate_codes" in record.metrics
    if record.status != "finished" or not (of_gate or record.verdict == "NO-GO"):
        return None
    dataset, seconds, basis = _dataset(record), _forecast_s(record), "this run's forecast"
    if seconds is None:
        made = [other for other in others if _forecast_s(other) is not None]
        newest = max(
            made, key=lambda o: (_dataset(o) == (dataset or 0), o.started_utc), default=None
        )
        basis = "no smoke test has made a forecast yet"
        if newest:
            seconds = _forecast_s(newest)
            basis = f"the forecast of {newest.name or newest.notebook}, {newest.started_utc}"
    # at this run's price: the training would have run on this machine
    usd = None if seconds is None else seconds * record.price_per_hour_usd / 3600.0
    return {
        "dataset": dataset,
        "forecast_s": seconds,
        "forecast_usd": usd,
        "spent_s": record.duration_s,
        "spent_usd": record.cost_usd,
        "duration_s": None if seconds is None else max(0.0, seconds - record.duration_s),
        "usd": None if usd is None else max(0.0, usd - record.cost_usd),
        "basis": basis,
    }


def total_avoided(records: Iterable[RunRecord]) -> dict[str, Any]:
    """The sum over runs: {"usd", "duration_s", "trainings"}, and the same in "trained_anyway" for
    what was trained on in spite of the verdict, as a control, and so was not avoided.

    Of several verdicts on one dataset the one that saved most counts: it came first."""
    best: dict[str, dict[str, Any]] = {}
    anyway: set[str | None] = set()
    for place, record in enumerate(records):
        # a smoke test makes a forecast of a training instead
        if record.resources.get("samples_per_s") is not None and _forecast_s(record) is None:
            anyway.add(_dataset(record))
        entry = record.cost_avoided
        if entry is not None and entry.get("duration_s") is not None:
            key = entry["dataset"] or f"run {place}"
            best[key] = max(entry, best.get(key, entry), key=lambda e: e["duration_s"])
    groups: list[list[Any]] = [[], []]
    for key, entry in best.items():
        groups[key in anyway].append(entry)
    avoided, trained = (
        {"usd": sum(e["usd"] for e in group), "duration_s": sum(e["duration_s"] for e in group)}
        | {"trainings": len(group)}
        for group in groups
    )
    return {**avoided, "trained_anyway": trained}


def _dataset(record: RunRecord) -> str | None:
    datasets = record.provenance.get("datasets") or [{}]
    return datasets[0].get("content_hash")


def _forecast_s(record: RunRecord) -> float | None:
    forecast = record.metrics.get("forecast")
    seconds = forecast.get("duration_s") if isinstance(forecast, dict) else None
    return float(seconds) if isinstance(seconds, (int, float)) else None
