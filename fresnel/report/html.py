"""What the pages share: the policy, the style, how values and texts from elsewhere are written.

Neither page asks any host for anything: style and script are inline, and a Content-Security-Policy
has the browser hold us to it.
"""

import json
import re
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any

import jinja2

from fresnel.report.record import VERDICTS, RunRecord

_HASH = re.compile(r"sha256-[A-Za-z0-9+/]{43}=")
TEMPLATES = Path(__file__).parent / "templates"
TONES = {"PASS": "good", "GO": "good", "NOT BETTER": "warn", "CRASHED": "bad"}
TONES |= {"FAIL": "bad", "NO-GO": "bad"}
TONES |= {f"{w}, overridden": "bad" if TONES.get(w) == "bad" else "warn" for w in VERDICTS}
TONES |= {"REFUSED": "warn", "RUNNING": "warn", "STOPPED": "warn", "DIED": "bad"}


def policy(scripts: Iterable[str], *, pictures: str = "", viewer: bool = False) -> str:
    """The Content-Security-Policy of a page: nothing may come from another host.

    scripts: hashes (`show.style.script_hash`) of all that may run; pictures: a further source of
    them; viewer: of splats, which unpacks its script and compiles code."""
    allowed = sorted({f"'{each}'" for each in scripts if _HASH.fullmatch(each)})
    runs = " ".join(["'unsafe-hashes'", *allowed])  # of what a button or a slider does too
    runs += " 'wasm-unsafe-eval' 'unsafe-eval' blob:" if viewer else ""
    return (
        f"default-src 'none'; style-src 'unsafe-inline'; img-src data: blob: {pictures}; "
        f"font-src data:; media-src data: blob:; script-src {runs}; "
        "connect-src data: blob:; worker-src blob: data:; frame-src data: blob:; "
        "base-uri 'none'; form-action 'none'"
    )


def style(*names: str) -> str:
    """The style sheets of these names, one after the other."""
    return jinja2.Template(text(*names)).render()


def text(*names: str) -> str:
    """The templates' files of these names, as they are."""
    return "\n".join((TEMPLATES / name).read_text(encoding="utf-8") for name in names)


def when(stamp: str) -> datetime:
    """An ISO time stamp with its zone; the beginning of time for "". Raises ValueError."""
    moment = datetime.fromisoformat(stamp) if stamp else datetime.min
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def number(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "unknown", True: "yes", False: "no"}[value]
    if isinstance(value, float) and abs(value) < 10_000:
        return f"{value:.3g}"
    return f"{value:,.0f}" if isinstance(value, (int, float)) else str(value)


def words(name: str) -> str:
    """A metric's name for a person: its unit apart, acronyms in capitals."""
    known = {"psnr": "PSNR, dB", "perceptual": "perceptual distance", "duration_s": "time, s"}
    if name in known:
        return known[name]
    plain = re.sub(r"(?<! per) (s|deg)$", r", \1", re.sub(r"[_.]+", " ", name))
    return re.sub(r"\b(psnr|ssim|rms|cvs|usd)\b", lambda m: m.group().upper(), plain)


def _size(count: int | None) -> str:
    if count is None:
        return ""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def _literal(value: Any) -> str:
    plain = json.dumps(value, ensure_ascii=False, default=str)
    return plain if len(plain) <= 200 else plain[:197] + "..."


FILTERS: Mapping[str, Any] = {
    "moment": lambda stamp: f"{when(stamp):%Y-%m-%d %H:%M} UTC" if stamp else "unknown time",
    "duration": duration,
    "usd": lambda amount: f"${amount:.{2 if amount >= 0.01 else 4}f}" if amount else "$0",
    "size": _size,
    "number": number,
    "literal": _literal,
    "tone": lambda record: TONES.get(record.badge, ""),
    "verdict_tone": lambda badge: TONES.get(badge, ""),
    "words": words,
}


def plain_page(record: RunRecord, notebook: Mapping[str, Any], problem: str) -> str:
    """HTML of a run without template, style sheet or exporter that could fail: verdict or error,
    then its cells with their outputs, pictures as their description.

    problem: why there is no better page; said below the error."""
    title = escape(f"{record.title or record.notebook}: {record.badge}")
    parts = [
        *("<!DOCTYPE html>", '<html lang="en"><meta charset="utf-8">'),
        """<meta http-equiv="Content-Security-Policy" content="default-src 'none'">""",
        f"<title>{title}</title><h1>{title}</h1><p>{escape(record.error or record.summary)}</p>",
        *(f"<p>{escape(reason)}</p>" for reason in record.reasons),
        f"<p>This page is a plain one, as the full one could not be made: {escape(problem)} "
        "Nothing of the run is lost: <code>./run_all.sh pages</code> makes it again from "
        "the executed notebook.</p>",
        f"<pre>{escape(json.dumps(record.params, default=str))}</pre>",
    ]
    for cell in notebook["cells"]:
        parts.append(f"<pre>{escape(''.join(cell['source']))}</pre>")
        for output in cell.get("outputs", ()):
            data, about = output.get("data", {}), output.get("metadata", {})
            said = output.get("text") or data.get("text/markdown") or data.get("text/plain") or ""
            if output["output_type"] == "error":
                said = [f"{output['ename']}: {output['evalue']}\n", "\n".join(output["traceback"])]
            for kind in data:
                if kind.startswith("image/"):
                    said = f"[{about.get(kind, about).get('alt') or 'Figure'}]"
            parts.append(f"<pre><b>{escape(''.join(said))}</b></pre>")
    return "\n".join([*parts, "</html>\n"])
