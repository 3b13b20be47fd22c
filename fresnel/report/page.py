"""What a person sees of one run: a self-contained HTML page, made from the executed notebook.

`to_html` needs no new run: whatever the template asks for is in the executed notebook and in the
results.json beside it, and what an older one lacks is left out. The index: `fresnel.report.index`.
"""

from __future__ import annotations

import base64
import binascii
import html
import io
import itertools
import re
from pathlib import Path
from typing import Any
from urllib.parse import quote

import nbformat

from fresnel.host.files import write_atomic
from fresnel.report import html as _html
from fresnel.report.index import key_figures
from fresnel.report.params import ParameterError, injected_values, read_parameters
from fresnel.report.record import RecordError, RunRecord

_UNITS = re.compile(
    r"^(pixels|degrees|seconds|hours|dB|USD per hour|steps|images|views|objects|pairs)"
    r"(?=$|[;,\s])[;,]?\s*"
)
_LEAD = re.compile(r"^\*\*(Question|(?:Stopping rule|Rule)[^*.]*)\.\*\*\s*(.+)$", re.DOTALL)
_SHOWN_PROVENANCE = {"git", "python", "packages", "os", "cpu", "gpu", "seed", "datasets"}
_SHOWN_PROVENANCE |= {"process", "identity", "inputs"}
_TAGS = frozenset(
    (
        *("a", "abbr", "b", "blockquote", "br", "code", "dd", "del", "details", "div", "dl", "dt"),
        *("em", "h1", "h2", "h3", "h4", "h5", "h6", "hr", "i", "img", "li", "ol", "p", "pre", "s"),
        *("span", "strong", "sub", "summary", "sup", "table", "tbody", "td", "tfoot", "th"),
        *("thead", "tr", "ul"),
    )
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
    lead = _lead(notebook)
    _tidy(notebook)
    count = itertools.count(1)
    exporter = HTMLExporter(
        template_name="report",
        extra_template_basedirs=[str(_html.TEMPLATES)],
        embed_images=True,
        exclude_anchor_links=True,
        exclude_input_prompt=True,
        exclude_output_prompt=True,
        filters={
            **_html.FILTERS,
            "drawing": lambda svg, alt: _drawing(svg, alt, next(count)),
            "png_size": _png_size,
            "safe_markdown": safe_markdown,
            "region": _region,
        },
    )
    stages = record.stages if record else ()
    page = {
        "title": title,
        "record": record,
        "lead": lead,
        "figures": key_figures(record, 6) if record else [],
        "params": rows,
        "changed": [row for row in rows if row["changed"]],
        "cuda": any(stage.peak_cuda_bytes is not None for stage in stages),
        "longest_s": max([stage.duration_s for stage in stages] + [1e-9]),
        "more": {
            key: value
            for key, value in (record.provenance if record else {}).items()
            if key not in _SHOWN_PROVENANCE and value not in (None, "", [], {})
        },
        "notes": _notes(record) if record else [],
        "policy": _html.policy(viewer=_has_viewer(notebook)),
        "css": _html.style("page.css", "report.css"),
        "js": _html.text("page.js", "report.js"),
    }
    resources = {"page": page, "metadata": {"path": str(source.parent)}}
    body, _ = exporter.from_notebook_node(notebook, resources=resources)
    write_atomic(destination, _smaller_pictures(_with_contents(body)))
    return destination


def notebook_title(notebook: nbformat.NotebookNode) -> str:
    """The text of a notebook's first level-1 heading, or ""."""
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            match = re.search(r"^#\s+(.+?)\s*#*$", cell.source, re.MULTILINE)
            if match:
                return re.sub(r"[*`]", "", match.group(1))
    return ""


def safe_markdown(text: str) -> str:
    """Markdown as HTML in which nothing runs: names and credits from elsewhere are part of it.

    Tags and attributes that prose and tables don't need stand there as text, and links lead to
    the web, the page or a mail address alone."""
    import bleach
    from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath

    renderer = IPythonRenderer(escape=False, exclude_anchor_links=True)
    made = MarkdownWithMath(renderer=renderer).render(text)
    return bleach.clean(
        made, tags=_TAGS, attributes=_allowed, protocols=("http", "https", "mailto", "data")
    )


def _allowed(tag: str, name: str, value: str) -> bool:
    if name == "src":
        return tag == "img" and value.startswith("data:image/")
    if name == "href":
        return tag == "a" and not value.strip().lower().startswith("data:")
    return name in ("class", "alt", "title", "align", "id", "start", "colspan", "rowspan")


def _lead(notebook: nbformat.NotebookNode) -> list[tuple[str, str]]:
    """Take the question and the rule out of the notebook's first text: (name, Markdown) each.

    The page shows them with the answer, above everything else."""
    found: list[tuple[str, str]] = []
    for cell in notebook.cells:
        if cell.cell_type != "markdown":
            continue
        kept = []
        for paragraph in re.split(r"\n\s*\n", cell.source):
            match = _LEAD.match(paragraph.strip())
            if match:
                found.append((match.group(1), match.group(2)))
            else:
                kept.append(paragraph)
        cell.source = "\n\n".join(kept)
        break
    return found


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
        output.text = "\n".join(line for line in lines if not _is_noise(line))
        return output if output.text.strip() else None
    if "application/vnd.jupyter.widget-view+json" in output.get("data", {}):
        return None
    return output


def _is_noise(line: str) -> bool:
    """A progress bar, or tqdm's complaint that it cannot draw a prettier one."""
    return bool(
        re.search(r"\d+%\|.*\|\s*\d|TqdmWarning: IProgress|import tqdm as notebook_tqdm", line)
    )


def _has_viewer(notebook: nbformat.NotebookNode) -> bool:
    outputs = (output for cell in notebook.cells for output in cell.get("outputs", []))
    return any(
        "fresnel-viewer" in output.get("data", {}).get("text/html", "") for output in outputs
    )


def _parameter_rows(
    notebook: nbformat.NotebookNode, record: RunRecord | None
) -> list[dict[str, Any]]:
    try:
        known = read_parameters(notebook)
    except ParameterError:
        known = {}
    try:
        given = injected_values(notebook)
    except ParameterError:
        given = {}
    if record is not None:
        given = {name: value for name, value in record.params.items() if name in known} | given
    rows = []
    for name, parameter in known.items():
        unit = _UNITS.match(parameter.comment)
        rows.append(
            {
                "name": name,
                "value": given.get(name, parameter.default),
                "default": parameter.default,
                "changed": name in given
                and given[name] != parameter.default
                and name != "output_dir",
                "unit": unit.group(1) if unit else "",
                "comment": parameter.comment[unit.end() :] if unit else parameter.comment,
            }
        )
    return rows


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


def _drawing(svg: str, alt: str, number: int) -> str:
    """An SVG picture for the page, with `alt` as what it says.

    What our own code draws becomes part of the page: its lettering takes the page's ink, so that
    it is as dark or as light as the reader wants it. Any other stays a picture on a white plate.
    """
    inner = re.search(r"<svg\b([^>]*)>(.*)</svg>", svg, re.DOTALL)
    if not inner or not re.search(r'id="figure_1"|class="fresnel-', svg):
        data = base64.b64encode(svg.encode()).decode()
        return f'<img src="data:image/svg+xml;base64,{data}" alt="{html.escape(alt)}">'
    content = re.sub(r"<metadata>.*?</metadata>|<style\b.*?</style>", "", inner[2], flags=re.DOTALL)
    content = re.sub(r'\bid="', f'id="d{number}-', content)
    content = re.sub(r"\burl\(#", f"url(#d{number}-", content)
    content = re.sub(r'\bhref="#', f'href="#d{number}-', content)
    content = re.sub(r"fill: #ffffff(?=[;\"])", "fill: none", content)
    for colour, ours in (
        ("#000000", "currentColor"),
        ("#333333", "currentColor"),
        ("#ffffff", "var(--paper)"),
        ("#e4e4e4", "var(--line)"),
        ("#777777", "var(--soft)"),
    ):
        content = re.sub(rf"\b(fill|stroke): {colour}", rf"\1: {ours}", content)
    box = re.search(r'viewBox="([^"]+)"', inner[1])
    size = re.search(r'\bwidth="([\d.]+)(pt|px)?"', inner[1])
    points = float(size[1]) if size else 518.4
    width = points * (96 / 72 if size and size[2] == "pt" else 1)
    return (
        f'<svg role="img" aria-label="{html.escape(alt)}" viewBox="{box[1] if box else ""}" '
        f'xmlns:xlink="http://www.w3.org/1999/xlink" style="max-width:{width:.0f}px">'
        f"{content}</svg>"
    )


def _smaller_pictures(body: str, above: int = 8_000) -> str:
    """`body` with every large PNG in it as lossless WebP where that is smaller."""
    from PIL import Image

    def shrink(match: re.Match[str]) -> str:
        if len(match[1]) < above:
            return match[0]
        stream = io.BytesIO()
        try:
            with Image.open(io.BytesIO(base64.b64decode(match[1]))) as picture:
                picture.save(stream, "WEBP", lossless=True, method=3)
        except (OSError, ValueError):  # not a picture after all: the browser shows its alt text
            return match[0]
        data = base64.b64encode(stream.getvalue()).decode()
        return f"data:image/webp;base64,{data}" if len(data) < len(match[1]) else match[0]

    return re.sub(r"data:image/png;base64,([A-Za-z0-9+/=\s]+)", shrink, body)


def _png_size(data: str) -> tuple[int, int]:
    """Width and height in pixels of a base64 PNG, from its first bytes; (0, 0) if it is none."""
    try:
        head = base64.b64decode("".join(data[:48].split())[:32])
    except binascii.Error:
        return 0, 0
    if head[:8] != b"\x89PNG\r\n\x1a\n":
        return 0, 0
    return int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")


def _region(content: str, label: str, most_rows: int = 14) -> str:
    """Tables of `content` in boxes that scroll on their own, by touch and by keyboard; figures stay
    on one line with their intervals, and a long table is folded."""

    def box(match: re.Match[str]) -> str:
        table = re.sub(
            r"<td>(-?[\d.,]+(?: \[[^\]<]*\])?)</td>", r'<td class="one-line">\1</td>', match[0]
        )
        rows = table.count("<tr") - 1
        name = html.escape(label)
        boxed = f'<div class="scroll" tabindex="0" role="group" aria-label="{name}">{table}</div>'
        if rows <= most_rows:
            return boxed
        return f'<details class="fold"><summary>{name}, {rows} rows</summary>{boxed}</details>'

    return re.sub(r"<table.*?</table>", box, content, flags=re.DOTALL)


def _notes(record: RunRecord) -> list[str]:
    """The record's notes; those about values that JSON cannot hold, in one line."""
    ending = re.compile(r"^(?:metrics\.)?(\S+) was (?:nan|-?inf); stored as null$")
    lost = [match[1] for note in record.notes if (match := ending.match(note))]
    others = [note for note in record.notes if not ending.match(note)]
    return [*others, *([f"not a finite number: {', '.join(lost)}"] if lost else [])]
