"""The page of last resort: what ran, without template, style sheet or exporter that could fail.

It stands in where the real page can't be made, so it needs nothing but the standard library, keeps
text and pictures alone, and can be told to leave the pictures out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

from fresnel.report.record import RunRecord

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
    """HTML of a run: verdict or error first, then its cells with their outputs.

    problem: why there is no better page; said below the error."""
    title = record.title or record.notebook
    parts = [
        _HEAD.format(title=f"{escape(title)}: {escape(record.badge)}"),
        f"<h1>{escape(title)}</h1><p><strong>{escape(record.badge)}</strong> ",
        f"{escape(record.error or record.summary)}</p>",
        "<ul>" + "".join(f"<li>{escape(reason)}</li>" for reason in record.reasons) + "</ul>"
        if record.reasons
        else "",
        f"<p>This page is a plain one, as the full one could not be made: {escape(problem)} "
        "Nothing of the run is lost: <code>python -m fresnel pages</code> makes it again from "
        "the executed notebook.</p>",
    ]
    parts += [part for cell in notebook["cells"] for part in _cell(cell, pictures)]
    values = {"run": record.name, "begun": record.started_utc, "took": f"{record.duration_s:.1f} s"}
    git = record.provenance.get("git") or {}
    values |= {"commit": str(git.get("commit")), **{k: repr(v) for k, v in record.params.items()}}
    rows = (f"<tr><th>{escape(k)}</th><td>{escape(v)}</td></tr>" for k, v in values.items())
    parts.append(f"<h2>The run</h2><table>{''.join(rows)}</table></main></body></html>\n")
    return "".join(parts)


def _cell(cell: Mapping[str, Any], pictures: bool) -> Iterator[str]:
    source = escape("".join(cell["source"]))
    if cell["cell_type"] != "code":
        yield f'<pre style="white-space:pre-wrap">{source}</pre>\n'
        return
    ran = cell.get("metadata", {}).get("fresnel", {}).get("ran", True)
    summary = "Code" if ran else "Code, not run"
    yield f"<details><summary>{summary}</summary><pre>{source}</pre></details>\n"
    for output in cell.get("outputs", ()):
        if output["output_type"] == "stream":
            yield f"<pre>{escape(''.join(output['text']))}</pre>\n"
        elif output["output_type"] == "error":
            trace = escape("\n".join(output["traceback"]))
            yield f"<p><strong>{escape(output['ename'])}: {escape(output['evalue'])}</strong></p>"
            yield f"<details><summary>Traceback</summary><pre>{trace}</pre></details>\n"
        else:
            yield from _shown(output, pictures)


def _shown(output: Mapping[str, Any], pictures: bool) -> Iterator[str]:
    data, about = output.get("data", {}), output.get("metadata", {})
    for kind in ("image/png", "image/jpeg"):
        if kind in data:
            alt = about.get(kind, {}).get("alt") or about.get("alt") or "Figure"
            if pictures:
                yield f'<img src="data:{kind};base64,{escape(data[kind])}" alt="{escape(alt)}">\n'
            else:
                yield f"<p>[{escape(alt)}]</p>\n"
            return
    text = data.get("text/markdown") or data.get("text/plain")
    if text:
        yield f"<pre>{escape(''.join(text))}</pre>\n"
