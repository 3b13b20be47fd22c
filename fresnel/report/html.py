"""What the pages share: the policy, the style, how values and texts from elsewhere are written.

Neither page asks any host for anything: style and script are inline, and a Content-Security-Policy
has the browser hold us to it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any

import jinja2

from fresnel.report.record import RunRecord

TEMPLATES = Path(__file__).parent / "templates"

_TONES = {"PASS": "good", "GO": "good", "FAIL": "bad", "NO-GO": "bad", "CRASHED": "bad"}
_TONES |= {"REFUSED": "warn", "RUNNING": "warn", "STOPPED": "warn", "DIED": "bad"}


def policy(*, pictures: str = "", viewer: bool = False) -> str:
    """The Content-Security-Policy of a page: nothing may come from another host.

    pictures: a further source of pictures, e.g. "file:" for an index beside its runs.
    viewer: the page holds a splat viewer, whose sorter compiles code.
    """
    scripts = "'unsafe-inline' 'wasm-unsafe-eval'" + (" 'unsafe-eval'" if viewer else "")
    return (
        f"default-src 'none'; style-src 'unsafe-inline'; img-src data: blob: {pictures}; "
        f"font-src data:; media-src data: blob:; script-src {scripts} blob: data:; "
        "connect-src data: blob:; worker-src blob: data:; frame-src data: blob:; "
        "base-uri 'none'; form-action 'none'"
    )


def style(*names: str) -> str:
    """The style sheets of these names, one after the other."""
    return jinja2.Template(text(*names)).render()


def render(name: str, **values: Any) -> str:
    """The template of this name, filled; every value is escaped."""
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True)
    environment.filters.update(FILTERS)
    return environment.get_template(name).render(**values)


def text(*names: str) -> str:
    """The templates' files of these names, as they are."""
    return "\n".join((TEMPLATES / name).read_text(encoding="utf-8") for name in names)


def when(stamp: str) -> datetime:
    """An ISO time stamp with its zone; the beginning of time for "". Raises ValueError."""
    moment = datetime.fromisoformat(stamp) if stamp else datetime.min
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def tone(badge: str) -> str:
    """The class of a verdict's colour."""
    return _TONES.get(badge, "")


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def usd(amount: float) -> str:
    if amount == 0:
        return "$0"
    return f"${amount:.2f}" if amount >= 0.01 else f"${amount:.4f}"


def number(value: Any) -> str:
    if value is None:
        return "unknown"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.3g}"
    return str(value)


def words(name: str) -> str:
    """A metric's name for a person: its unit apart, acronyms in capitals."""
    plain = re.sub(r"(?<! per) (s|deg)$", r", \1", re.sub(r"[_.]+", " ", name))
    return re.sub(r"\b(psnr|ssim|rms|cvs|usd)\b", lambda m: m.group().upper(), plain)


def _moment(stamp: str) -> str:
    return f"{when(stamp):%Y-%m-%d %H:%M} UTC" if stamp else "unknown time"


def _size(count: int | None) -> str:
    if count is None:
        return ""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def _literal(value: Any) -> str:
    plain = json.dumps(value, ensure_ascii=False, default=str)
    return plain if len(plain) <= 200 else plain[:197] + "..."


FILTERS: Mapping[str, Any] = {
    "moment": _moment,
    "duration": duration,
    "usd": usd,
    "size": _size,
    "number": number,
    "literal": _literal,
    "tone": lambda record: tone(record.badge),
    "words": words,
}

_HEAD = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; \
img-src data:">
<link rel="icon" href="data:,"><title>{title}</title>
<style>:root{{color-scheme:light dark}}body{{max-width:50rem;margin:2rem auto;padding:0 1rem;\
font:1rem/1.5 sans-serif}}pre{{overflow-x:auto}}img{{max-width:100%}}</style></head><body><main>
"""


def plain_page(
    record: RunRecord, notebook: Mapping[str, Any], problem: str, *, pictures: bool = True
) -> str:
    """HTML of a run without template, style sheet or exporter that could fail: verdict or error,
    then its cells with their outputs.

    problem: why there is no better page; said below the error."""
    title, badge = record.title or record.notebook, escape(record.badge)
    git = record.provenance.get("git") or {}
    values = {"run": record.name, "begun": record.started_utc, "took": f"{record.duration_s:.1f} s"}
    values |= {"commit": str(git.get("commit")), **{k: repr(v) for k, v in record.params.items()}}
    reasons = "".join(f"<li>{escape(reason)}</li>" for reason in record.reasons)
    parts = [
        _HEAD.format(title=f"{escape(title)}: {badge}"),
        f"<h1>{escape(title)}</h1><p><strong>{badge}</strong> ",
        f"{escape(record.error or record.summary)}</p>",
        f"<ul>{reasons}</ul>" if reasons else "",
        f"<p>This page is a plain one, as the full one could not be made: {escape(problem)} "
        "Nothing of the run is lost: <code>./run_all.sh pages</code> makes it again from "
        "the executed notebook.</p>",
        *(part for cell in notebook["cells"] for part in _plain_cell(cell, pictures)),
        "<h2>The run</h2><table>",
        *(f"<tr><th>{escape(k)}</th><td>{escape(v)}</td></tr>" for k, v in values.items()),
        "</table></main></body></html>\n",
    ]
    return "".join(parts)


def _plain_cell(cell: Mapping[str, Any], pictures: bool) -> Iterator[str]:
    source = escape("".join(cell["source"]))
    if cell["cell_type"] != "code":
        yield f'<pre style="white-space:pre-wrap">{source}</pre>\n'
        return
    ran = cell.get("metadata", {}).get("papermill", {}).get("status") != "pending"
    yield _folded("Code" if ran else "Code, not run", source)
    for output in cell.get("outputs", ()):
        data, about = output.get("data", {}), output.get("metadata", {})
        kind = next((kind for kind in ("image/png", "image/jpeg") if kind in data), "")
        if output["output_type"] == "error":
            yield f"<p><strong>{escape(output['ename'])}: {escape(output['evalue'])}</strong></p>"
            yield _folded("Traceback", escape("\n".join(output["traceback"])))
        elif kind:
            alt = escape(about.get(kind, {}).get("alt") or about.get("alt") or "Figure")
            picture = f'<img src="data:{kind};base64,{escape(data[kind])}" alt="{alt}">\n'
            yield picture if pictures else f"<p>[{alt}]</p>\n"
        else:
            said = output.get("text") or data.get("text/markdown") or data.get("text/plain") or ""
            yield f"<pre>{escape(''.join(said))}</pre>\n"


def _folded(summary: str, text: str) -> str:
    return f"<details><summary>{summary}</summary><pre>{text}</pre></details>\n"
