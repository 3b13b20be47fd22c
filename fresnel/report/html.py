"""What the report page and the index share: the policy, the style, and how values are written.

Neither page asks any host for anything: style and script are inline, and a Content-Security-Policy
has the browser hold us to it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fresnel.report.record import RunRecord

TEMPLATES = Path(__file__).parent / "templates"

_TONES = {"PASS": "good", "GO": "good", "FAIL": "bad", "NO-GO": "bad", "CRASHED": "bad"}
_TONES |= {"REFUSED": "warn", "RUNNING": "warn"}
_REQUEST = re.compile(
    r"""<(?:script|img|image|iframe|video|audio|source|embed|object|link)\b[^>]*?\b
        (?:src|srcset|href|data|poster)\s*=\s*["']?((?:https?:)?//[^"'\s>]+)
      | @import\s+(?:url\()?["']?((?:https?:)?//[^"'\s)]+)
      | url\(\s*["']?((?:https?:)?//[^"'\s)]+)""",
    re.IGNORECASE | re.VERBOSE,
)


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


def external_requests(text: str) -> list[str]:
    """Addresses that a browser showing this HTML would ask for. A report must have none.

    Links that a reader may click are no requests."""
    return [next(filter(None, match.groups())) for match in _REQUEST.finditer(text)]


def style(*names: str) -> str:
    """The style sheets of these names, one after the other."""
    from jinja2 import Template

    return Template(text(*names)).render()


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


def _record_tone(record: RunRecord) -> str:
    return tone(record.badge)


FILTERS: Mapping[str, Any] = {
    "moment": _moment,
    "duration": duration,
    "usd": usd,
    "size": _size,
    "number": number,
    "literal": _literal,
    "tone": _record_tone,
    "words": words,
}
