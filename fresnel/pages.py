"""What a person sees: one self-contained HTML page for a run, and one index over all runs.

Neither page asks any host for anything: pictures are data URIs, style and script are inline, and a
Content-Security-Policy has the browser hold us to it.
"""

from __future__ import annotations

import base64
import html
import io
import itertools
import json
import re
from collections import Counter
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

import nbformat

from fresnel.parameters import ParameterError, read_parameters
from fresnel.record import RESULTS_NAME, RecordError, RunRecord, write_atomic

INDEX_NAME = "index.html"
TEMPLATES = Path(__file__).parent / "templates"

_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src data: blob:; font-src data:; "
    "media-src data: blob:; script-src 'unsafe-inline' 'wasm-unsafe-eval' blob: data:; "
    "connect-src data: blob:; worker-src blob: data:; frame-src data: blob:; base-uri 'none'; "
    "form-action 'none'"
)
_TONES = {"PASS": "good", "GO": "good", "FAIL": "bad", "NO-GO": "bad", "CRASHED": "bad"}
_TONES |= {"REFUSED": "warn", "RUNNING": "warn"}
_REQUEST = re.compile(
    r"""<(?:script|img|iframe|video|audio|source|embed|object|link)\b[^>]*?\b
        (?:src|srcset|href|data|poster)\s*=\s*["']?((?:https?:)?//[^"'\s>]+)
      | @import\s+(?:url\()?["']?((?:https?:)?//[^"'\s)]+)
      | url\(\s*["']?((?:https?:)?//[^"'\s)]+)""",
    re.IGNORECASE | re.VERBOSE,
)


def to_html(executed: str | Path, target: str | Path | None = None) -> Path:
    """Write the report of an executed notebook: one HTML file that needs nothing else.

    executed: an .ipynb with its outputs; the results.json beside it, if any, gives verdict,
    parameters and provenance. target: default `executed` with the suffix .html.
    """
    from nbconvert import HTMLExporter

    source = Path(executed)
    destination = Path(target) if target is not None else source.with_suffix(".html")
    notebook = nbformat.read(source, as_version=4)
    try:
        record = RunRecord.read(source.parent)
    except RecordError:
        record = None
    title = notebook_title(notebook) or source.stem
    rows = _parameter_rows(notebook, record)
    _tidy(notebook)
    exporter = HTMLExporter(
        template_name="report",
        extra_template_basedirs=[str(TEMPLATES)],
        embed_images=True,
        exclude_anchor_links=True,
        exclude_input_prompt=True,
        exclude_output_prompt=True,
        filters=_FILTERS,
    )
    page = {
        "title": title,
        "record": record,
        "figures": key_figures(record, 6) if record else [],
        "params": rows,
        "changed": [row for row in rows if row["changed"]],
        "cuda": record is not None and any(s.peak_cuda_bytes is not None for s in record.stages),
        "longest_s": max([s.duration_s for s in record.stages] + [1e-9]) if record else 1.0,
        "policy": _POLICY,
        "css": _style("page.css", "report.css"),
        "js": _text("page.js", "report.js"),
    }
    resources = {"page": page, "metadata": {"path": str(source.parent)}}
    body, _ = exporter.from_notebook_node(notebook, resources=resources)
    write_atomic(destination, _with_contents(body))
    return destination


def index(reports_dir: str | Path) -> Path:
    """Write reports_dir/index.html over every results.json below it, newest first. A damaged file
    is listed as damaged."""
    from jinja2 import Environment, FileSystemLoader

    reports = Path(reports_dir)
    reports.mkdir(parents=True, exist_ok=True)
    runs, damaged = [], []
    for path in sorted(reports.rglob(RESULTS_NAME)):
        try:
            record = RunRecord.read(path)
            when = _when(record.started_utc)
        except (RecordError, ValueError) as error:
            damaged.append(str(error).replace(f"{reports}/", ""))
            continue
        report = path.parent / record.artifacts.get("report", "report.html")
        entry: dict[str, Any] = {
            "record": record,
            "link": quote(str(report.relative_to(reports))) if report.is_file() else None,
            "picture": _thumbnail(path.parent / record.artifacts.get("thumbnail", "?")),
            "figures": key_figures(record, 4),
            "published": "published" in path.relative_to(reports).parts,
        }
        runs.append((when, entry))
    runs.sort(key=lambda pair: pair[0], reverse=True)
    entries = [entry for _, entry in runs]
    records: list[RunRecord] = [entry["record"] for entry in entries]
    counts = Counter(record.badge for record in records)
    environment = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True)
    environment.filters.update(_FILTERS)
    text = environment.get_template("index.html.j2").render(
        runs=entries,
        damaged=damaged,
        page={
            "policy": _POLICY,
            "css": _style("page.css", "index.css"),
            "js": _text("page.js", "index.js"),
            "total_s": sum(record.duration_s for record in records),
            "total_usd": sum(record.cost_usd for record in records),
            "verdicts": [(b, _TONES.get(b, ""), n) for b, n in counts.most_common()],
        },
    )
    target = reports / INDEX_NAME
    write_atomic(target, text)
    return target


def notebook_title(notebook: nbformat.NotebookNode) -> str:
    """The text of a notebook's first level-1 heading, or ""."""
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            match = re.search(r"^#\s+(.+?)\s*#*$", cell.source, re.MULTILINE)
            if match:
                return re.sub(r"[*`]", "", match.group(1))
    return ""


def key_figures(record: RunRecord, count: int) -> list[tuple[str, Any]]:
    """The first `count` scalar metrics, in the order in which the notebook recorded them."""
    scalars = [
        (name, value)
        for name, value in record.metrics.items()
        if isinstance(value, (int, float, bool)) or (isinstance(value, str) and len(value) <= 24)
    ]
    return scalars[:count]


def external_requests(text: str) -> list[str]:
    """Addresses that a browser showing this HTML would ask for. A report must have none.

    Links that a reader may click are no requests."""
    return [next(filter(None, match.groups())) for match in _REQUEST.finditer(text)]


def _tidy(notebook: nbformat.NotebookNode) -> None:
    """Drop what a reader of the page would not miss: the title (it stands above), the parameters
    (a table shows them), progress bars, and all but the last state of lines that were redrawn."""
    titled = False
    kept = []
    for cell in notebook.cells:
        tags = set(cell.metadata.get("tags", []))
        if tags & {"papermill-error-cell-tag", "injected-parameters", "parameters", "remove"}:
            continue
        if cell.cell_type == "markdown" and not titled:
            cell.source, count = re.subn(r"^#\s+.+$", "", cell.source, count=1, flags=re.MULTILINE)
            titled = bool(count)
        if cell.cell_type == "code":
            cell.outputs = [output for output in map(_tidy_output, cell.outputs) if output]
        if cell.source.strip() or cell.get("outputs"):
            kept.append(cell)
    notebook.cells = kept
    notebook.metadata.pop("widgets", None)


def _tidy_output(output: nbformat.NotebookNode) -> nbformat.NotebookNode | None:
    if output.output_type == "stream":
        lines = [line.rstrip("\r").rpartition("\r")[2] for line in output.text.split("\n")]
        output.text = "\n".join(line for line in lines if not _is_progress(line))
        return output if output.text.strip() else None
    if "application/vnd.jupyter.widget-view+json" in output.get("data", {}):
        return None
    return output


def _is_progress(line: str) -> bool:
    return bool(re.search(r"\d+%\|.*\|\s*\d", line))


def _parameter_rows(
    notebook: nbformat.NotebookNode, record: RunRecord | None
) -> list[dict[str, Any]]:
    try:
        known = read_parameters(notebook)
    except ParameterError:
        known = {}
    given: dict[str, Any] = {}
    for cell in notebook.cells:
        if "injected-parameters" in cell.metadata.get("tags", []):
            try:
                injected = read_parameters(
                    nbformat.v4.new_notebook(
                        cells=[
                            nbformat.v4.new_code_cell(
                                cell.source, metadata={"tags": ["parameters"]}
                            )
                        ]
                    )
                )
            except ParameterError:
                continue
            given = {name: parameter.default for name, parameter in injected.items()}
    if record is not None:
        given = {name: value for name, value in record.params.items() if name in known} | given
    return [
        {
            "name": name,
            "value": given.get(name, parameter.default),
            "default": parameter.default,
            "changed": name in given and given[name] != parameter.default and name != "output_dir",
            "comment": parameter.comment,
        }
        for name, parameter in known.items()
    ]


def _with_contents(body: str) -> str:
    """`body` with an id on every section heading, and the list of them where the page wants it."""
    links, used = [], set()

    def mark(match: re.Match[str]) -> str:
        text = re.sub("<[^>]+>", "", match.group(2))
        stem = re.sub(r"[^\w]+", "-", html.unescape(text).lower()).strip("-") or "section"
        tries = itertools.chain([stem], (f"{stem}-{n}" for n in itertools.count(2)))
        key = next(key for key in tries if key not in used)
        used.add(key)
        links.append(f'<li><a href="#{quote(key)}">{text}</a></li>')
        return f'<h2 id="{key}">{match.group(2)}</h2>'

    body = re.sub(r"<h2( [^>]*)?>(.*?)</h2>", mark, body, flags=re.DOTALL)
    return body.replace("<!--toc-->", f"<ol>{''.join(links)}</ol>", 1)


def _thumbnail(path: Path, longest_px: int = 352) -> str | None:
    """A data URI of the picture at `path`, small enough that hundreds of them make one page."""
    from PIL import Image

    try:
        with Image.open(path) as picture:
            small = picture.convert("RGBA" if "A" in picture.getbands() else "RGB")
            small.thumbnail((longest_px, longest_px))
            stream = io.BytesIO()
            small.save(stream, "WEBP", quality=80)
    except OSError:
        return None
    return f"data:image/webp;base64,{base64.b64encode(stream.getvalue()).decode()}"


def _style(*names: str) -> str:
    from jinja2 import Template

    return Template(_text(*names)).render()


def _text(*names: str) -> str:
    return "\n".join((TEMPLATES / name).read_text(encoding="utf-8") for name in names)


def _when(text: str) -> datetime:
    when = datetime.fromisoformat(text) if text else datetime.min
    return when if when.tzinfo else when.replace(tzinfo=UTC)


def _moment(text: str) -> str:
    return f"{_when(text):%Y-%m-%d %H:%M} UTC" if text else "unknown time"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def _usd(amount: float) -> str:
    if amount == 0:
        return "$0"
    return f"${amount:.2f}" if amount >= 0.01 else f"${amount:.4f}"


def _size(count: int | None) -> str:
    if count is None:
        return ""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def _number(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.3g}"
    return str(value)


def _literal(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 200 else text[:197] + "..."


def _tone(record: RunRecord) -> str:
    return _TONES.get(record.badge, "")


def _words(name: str) -> str:
    return name.replace("_", " ").replace(".", " ")


def _base64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


_FILTERS: Mapping[str, Any] = {
    "moment": _moment,
    "duration": _duration,
    "usd": _usd,
    "size": _size,
    "number": _number,
    "literal": _literal,
    "tone": _tone,
    "words": _words,
    "base64": _base64,
}
