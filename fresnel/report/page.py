"""What a person sees of one run: a self-contained HTML page, made from the executed notebook.

`to_html` needs no new run: whatever the template asks for is in the executed notebook and in the
results.json beside it, and what an older one lacks is left out. The index: `fresnel.report.index`.
"""

import base64
import contextlib
import html
import io
import itertools
import re
from pathlib import Path
from typing import Any
from urllib.parse import quote

import bleach
import nbconvert
import nbformat
from nbconvert import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from PIL import Image

from fresnel.host.files import write_atomic
from fresnel.report import html as _html
from fresnel.report.index import key_figures
from fresnel.report.params import ParameterError, read_parameters
from fresnel.report.record import RecordError, RunRecord
from fresnel.report.terms import Mentions
from fresnel.show.style import script_hash

_UNITS = re.compile(
    r"^(pixels|degrees|seconds|hours|dB|USD per hour|steps|images|views|objects|pairs)"
    r"(?=$|[;,\s])[;,]?\s*"
)
_LEAD = re.compile(r"^\*\*(Question|(?:Stopping rule|Rule)[^*.]*)\.\*\*\s*(.+)$", re.DOTALL)
_TITLE = re.compile(r"^#\s+(.+?)\s*#*$", re.MULTILINE)
_NOISE = re.compile(r"\d+%\|.*\|\s*\d|TqdmWarning: IProgress|import tqdm as notebook_tqdm")
"""A progress bar, or tqdm's complaint that it cannot draw a prettier one."""
_LOST = re.compile(r"^(?:metrics\.)?(\S+) was (?:nan|-?inf); stored as null$")
_INK = {"#000000": "currentColor", "#333333": "currentColor", "#ffffff": "var(--paper)"}
_INK |= {"#e4e4e4": "var(--line)", "#777777": "var(--soft)"}
_DROPPED = {"papermill-error-cell-tag", "injected-parameters", "parameters", "remove"}
_SHOWN_PROVENANCE = {"git", "python", "packages", "os", "cpu", "gpu", "seed", "datasets"}
_SHOWN_PROVENANCE |= {"process", "identity", "inputs", "accelerators"}
_PICTURES = {"image/png", "image/jpeg", "image/svg+xml"}
_TAGS = bleach.ALLOWED_TAGS | {
    *("br", "dd", "del", "details", "div", "dl", "dt", "h1", "h2", "h3", "h4", "h5", "h6", "hr"),
    *("img", "p", "pre", "s", "span", "sub", "summary", "sup", "table", "tbody", "td", "tfoot"),
    *("th", "thead", "tr"),
}


def to_html(executed: str | Path, target: str | Path | None = None) -> Path:
    """Write the report of an executed notebook: one HTML file that needs nothing else.

    executed: an .ipynb with its outputs; the results.json beside it, if any, gives verdict,
    parameters and provenance. target: default `executed` with the suffix .html.
    """
    source = Path(executed)
    destination = Path(target) if target is not None else source.with_suffix(".html")
    notebook = nbformat.read(source, as_version=4)
    record = None
    with contextlib.suppress(RecordError):
        record = RunRecord.read(source.parent)
    rows = _parameter_rows(notebook, record)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    viewer = any("fresnel-viewer" in o.get("data", {}).get("text/html", "") for o in outputs)
    about = [output.get("metadata", {}).get("text/html", {}) for output in outputs]
    shown = [each for said in about for each in said.get("scripts", ())]
    script = _html.text("page.js", "report.js")
    page: dict[str, Any] = {
        "title": notebook_title(notebook) or source.stem,
        "record": record,
        "lead": _tidy(notebook),
        "params": rows,
        "changed": [row for row in rows if row["changed"]],
        "policy": _html.policy([script_hash(script), *shown], viewer=viewer),
        "css": _html.style("page.css", "report.css"),
        "js": script,
    }
    if record is not None:
        known = {k: v for k, v in record.provenance.items() if v not in (None, "", [], {})}
        lost = [match[1] for note in record.notes if (match := _LOST.match(note))]
        page |= {
            "figures": key_figures(record, 6),
            "cuda": any(stage.peak_cuda_bytes is not None for stage in record.stages),
            "longest_s": max([stage.duration_s for stage in record.stages] + [1e-9]),
            "more": {k: v for k, v in known.items() if k not in _SHOWN_PROVENANCE},
            "notes": [note for note in record.notes if not _LOST.match(note)]
            + [f"not a finite number: {', '.join(lost)}"] * bool(lost),
        }
    figures, mentions, count = _number_figures(notebook), Mentions(), itertools.count(1)
    filters = {
        "drawing": lambda svg, alt: _drawing(svg, alt, next(count)),
        "png_size": _png_size,
        "safe_markdown": safe_markdown,
        "region": _region,
        "mention": mentions.link,
        "mentioned": lambda _, what: {"terms": mentions.glossary, "works": mentions.cited}[what](),
    }
    # nbconvert's own, where Jupyter looks for them or where `pip install --target` puts them
    beside = Path(nbconvert.__file__).parents[1] / "share" / "jupyter" / "nbconvert" / "templates"
    exporter = HTMLExporter(
        template_name="report",
        extra_template_basedirs=[str(_html.TEMPLATES), str(beside)],
        extra_template_paths=[str(beside)],
        embed_images=True,
        exclude_anchor_links=True,
        exclude_input_prompt=True,
        exclude_output_prompt=True,
        filters={**_html.FILTERS, **filters},
    )
    resources = {"page": page, "metadata": {"path": str(source.parent)}}
    body, _ = exporter.from_notebook_node(notebook, resources=resources)
    body = _with_references(_with_contents(body), figures)
    write_atomic(destination, _smaller_pictures(body))
    return destination


def notebook_title(notebook: nbformat.NotebookNode) -> str:
    """The text of a notebook's first level-1 heading, or ""."""
    texts = (cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    titles = (match[1] for text in texts if (match := _TITLE.search(text)))
    return re.sub(r"[*`]", "", next(titles, ""))


def safe_markdown(text: str, links: bool = True) -> str:
    """Markdown as HTML in which nothing runs: names and credits from elsewhere are part of it.

    Tags and attributes that prose and tables don't need stand there as text, and links lead to
    the web, the page or a mail address alone; of what was computed (``links`` False), to the page.
    """

    def allowed(tag: str, name: str, value: str) -> bool:
        if name == "src":
            return tag == "img" and value.startswith("data:image/")
        if name == "href":
            leads = links and not value.strip().lower().startswith("data:")
            return tag == "a" and (leads or value.startswith("#"))
        return name in ("class", "alt", "title", "align", "id", "start", "colspan", "rowspan")

    renderer = IPythonRenderer(escape=False, exclude_anchor_links=True)
    made = MarkdownWithMath(renderer=renderer).render(text)
    schemes = ("http", "https", "mailto", "data")
    return bleach.clean(made, tags=_TAGS, attributes=allowed, protocols=schemes)


def _tidy(notebook: nbformat.NotebookNode) -> list[tuple[str, str]]:
    """Drop what a reader of the page would not miss: the title (it stands above), the parameters
    (a table shows them), progress bars, and all but the last state of lines that were redrawn.

    Returns the question and the rule, which are taken out of the first text, as (name, Markdown).
    The page begins with the picture that shows the answer (`show.style.put`), then has these."""
    lead: list[tuple[str, str]] = []
    texts = [cell for cell in notebook.cells if cell.cell_type == "markdown"]
    if texts:
        parts = re.split(r"\n\s*\n", texts[0].source)
        found = [_LEAD.match(part.strip()) for part in parts]
        texts[0].source = "\n\n".join(p for p, match in zip(parts, found, strict=True) if not match)
        lead = [(match[1], match[2]) for match in found if match]
    if titled := next((cell for cell in texts if _TITLE.search(cell.source)), None):
        titled.source = _TITLE.sub("", titled.source, count=1)
    cells = [c for c in notebook.cells if not _DROPPED & set(c.metadata.get("tags", []))]
    for cell in (cell for cell in cells if cell.cell_type == "code"):
        outputs, cell.outputs = cell.outputs, []
        for output in outputs:
            data = output.get("data", {})
            is_widget = data.pop("application/vnd.jupyter.widget-view+json", None)
            shown = is_widget is None or data.keys() > {"text/plain"}  # what stands for it
            if output.output_type == "stream":
                lines = [line.rstrip("\r").rpartition("\r")[2] for line in output.text.split("\n")]
                output.text = "\n".join(line for line in lines if not _NOISE.search(line))
                shown = output.text.strip()
            cell.outputs += [output] if shown else []
    first = nbformat.v4.new_code_cell("", metadata={"papermill": {}})
    for cell in (cell for cell in cells if cell.cell_type == "code" and not first.outputs):
        shown = [output for output in cell.outputs if _about(output).get("lead")][:1]
        first.outputs += shown
        cell.outputs = [output for output in cell.outputs if output not in shown]
    asked = nbformat.v4.new_markdown_cell("", metadata={"tags": ["lead"]})
    kept = [cell for cell in cells if cell.source.strip() or cell.get("outputs")]
    notebook.cells = [first] * bool(first.outputs) + [asked] * bool(lead) + kept
    notebook.metadata.pop("widgets", None)
    return lead


def _about(output: nbformat.NotebookNode) -> dict[str, Any]:
    """What `show.style.put` said of an output; {} of what is no picture of ours."""
    said = output.get("metadata", {})
    found = [kind for kind in said if kind in output.get("data", {}) and "alt" in said[kind]]
    return dict(said[found[0]]) if found else {}


def _number_figures(notebook: nbformat.NotebookNode) -> dict[str, int]:
    """Number every picture in reading order, under its output's metadata; key -> number of those
    that text may refer to."""
    found, count = dict[str, int](), itertools.count(1)
    for output in (o for cell in notebook.cells for o in cell.get("outputs", [])):
        about = _about(output)
        if about or _PICTURES & set(output.get("data", {})):
            number = next(count)
            caption = about.get("caption") or about.get("alt", "")
            output.metadata["figure"] = {"number": number, "caption": caption}
            found[about.get("key") or str(number)] = number
            output.metadata["figure"]["id"] = f"fig-{about.get('key') or number}"
    return found


def _with_references(body: str, figures: dict[str, int]) -> str:
    """`body` with the number of each figure that text refers to, "[Figure](#fig-views)"."""

    def named(match: re.Match[str]) -> str:
        number = figures.get(match[1])
        return f'<a href="#fig-{match[1]}">Figure {number}</a>' if number else "the figure"

    return re.sub(r'<a href="#fig-([\w-]+)">Figure</a>', named, body)


def _parameter_rows(
    notebook: nbformat.NotebookNode, record: RunRecord | None
) -> list[dict[str, Any]]:
    given, rows = dict(record.params) if record else {}, []
    with contextlib.suppress(ParameterError):
        injected = read_parameters(notebook, "injected-parameters")
        given |= {name: parameter.default for name, parameter in injected.items()}
        for name, parameter in read_parameters(notebook).items():
            unit = _UNITS.match(parameter.comment)
            value = given.get(name, parameter.default)
            row = {"name": name, "value": value, "default": parameter.default}
            row["changed"] = value != parameter.default and name != "output_dir"
            row["unit"] = unit[1] if unit else ""
            row["comment"] = parameter.comment[unit.end() :] if unit else parameter.comment
            rows.append(row)
    return rows


def _with_contents(body: str) -> str:
    """`body` with an id on every section heading, and the list of them where the page wants it."""
    links: dict[str, str] = {}

    def mark(match: re.Match[str]) -> str:
        text = re.sub("<[^>]+>", "", match.group(2))
        stem = re.sub(r"[^\w]+", "-", html.unescape(text).lower()).strip("-") or "section"
        tries = itertools.chain([stem], (f"{stem}-{n}" for n in itertools.count(2)))
        key = next(key for key in tries if key not in links)
        links[key] = f'<li><a href="#{quote(key)}">{text}</a></li>'
        return f'<h2 id="{key}">{match.group(2)}</h2>'

    body = re.sub(r"<h2( [^>]*)?>(.*?)</h2>", mark, body, flags=re.DOTALL)
    return body.replace("<!--toc-->", f"<ol>{''.join(links.values())}</ol>", 1)


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
    content = re.sub(r'\b(id="|url\(#|href="#)', rf"\1d{number}-", content)
    content = re.sub(r"fill: #ffffff(?=[;\"])", "fill: none", content)
    for colour, ours in _INK.items():
        content = re.sub(rf"\b(fill|stroke): {colour}", rf"\1: {ours}", content)
    box = re.search(r'viewBox="([^"]+)"', inner[1])
    size = re.search(r'\bwidth="([\d.]+)(pt|px)?"', inner[1])
    points = float(size[1]) if size else 518.4
    width = points * (96 / 72 if size and size[2] == "pt" else 1)
    # small pictures are no pictures: a sheet scrolls where there is no room for it
    least = f";min-width:{width:.0f}px" if 'class="fresnel-sheet"' in content else ""
    return (
        f'<svg role="img" aria-label="{html.escape(alt)}" viewBox="{box[1] if box else ""}" '
        f'xmlns:xlink="http://www.w3.org/1999/xlink" style="max-width:{width:.0f}px{least}">'
        f"{content}</svg>"
    )


def _smaller_pictures(body: str, above: int = 8_000) -> str:
    """`body` with every large PNG in it as lossless WebP where that is smaller."""

    def shrink(match: re.Match[str]) -> str:
        stream = io.BytesIO()
        if len(match[1]) >= above:
            # one that is no picture after all stays: the browser shows its alt text
            with contextlib.suppress(OSError, ValueError):
                picture = Image.open(io.BytesIO(base64.b64decode(match[1])), formats=["PNG"])
                picture.save(stream, "WEBP", lossless=True, method=3)
        data = base64.b64encode(stream.getvalue()).decode()
        return f"data:image/webp;base64,{data}" if 0 < len(data) < len(match[1]) else match[0]

    return re.sub(r"data:image/png;base64,([A-Za-z0-9+/=\s]+)", shrink, body)


def _png_size(data: str) -> tuple[int, int]:
    """Width and height in pixels of a base64 picture; (0, 0) if it is none."""
    with contextlib.suppress(OSError, ValueError):
        return Image.open(io.BytesIO(base64.b64decode(data)), formats=["PNG", "JPEG"]).size
    return 0, 0


def _region(content: str, label: str, most_rows: int = 14) -> str:
    """Tables of `content` in boxes that scroll on their own, by touch and by keyboard; figures stay
    on one line with their intervals, and a long table is folded."""

    def box(match: re.Match[str]) -> str:
        figure = r"<td>(-?[\d.,]+(?: \[[^\]<]*\])?)</td>"
        table = re.sub(figure, r'<td class="one-line number">\1</td>', match[0])
        rows, name = table.count("<tr") - 1, html.escape(label)
        boxed = f'<div class="scroll" tabindex="0" role="group" aria-label="{name}">{table}</div>'
        if rows <= most_rows:
            return boxed
        return f'<details class="fold"><summary>{name}, {rows} rows</summary>{boxed}</details>'

    return re.sub(r"<table.*?</table>", box, content, flags=re.DOTALL)
