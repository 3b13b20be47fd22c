"""A self-contained HTML page that no notebook made: a verdict, and sections of text, pictures and
tables below it, in the look of the reports.

It asks no host for anything: pictures are data URIs, style and script are inline, and a
Content-Security-Policy has the browser hold us to it.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fresnel.report import html as _html
from fresnel.report.record import write_atomic


@dataclass(frozen=True)
class Picture:
    """PNG bytes, and what a reader who cannot see them should know."""

    png: bytes
    alt: str

    @property
    def base64(self) -> str:
        return base64.b64encode(self.png).decode()


@dataclass(frozen=True)
class Section:
    """A heading, a paragraph, pictures, and a table (rows with the same keys; **bold** cells)."""

    heading: str
    text: str = ""
    pictures: Sequence[Picture] = ()
    rows: Sequence[Mapping[str, str]] = ()


def write(
    path: str | Path,
    *,
    title: str,
    badge: str,
    kicker: str,
    summary: str,
    reasons: Sequence[str] = (),
    sections: Sequence[Section] = (),
) -> Path:
    """Write the page to `path`, all of it or nothing; every text is escaped.

    badge: PASS, FAIL or another word of `record.VERDICTS`.
    """
    from jinja2 import Environment, FileSystemLoader

    target = Path(path)
    environment = Environment(loader=FileSystemLoader(_html.TEMPLATES), autoescape=True)
    page = {
        "title": title,
        "badge": badge,
        "tone": _html.tone(badge),
        "kicker": kicker,
        "summary": summary,
        "reasons": reasons,
        "sections": sections,
        "policy": _html.policy(),
        "css": _html.style("page.css", "report.css"),
        "js": _html.text("page.js", "report.js"),
    }
    write_atomic(target, environment.get_template("sheet.html.j2").render(page=page))
    return target
