"""What a page explains and what it rests on: glossary and references, of what it mentions.

The first mention of a term in a page links to its entry (`templates/glossary.yaml`: what it means,
and patterns of how text says it); "[@key]" becomes the number of a work in
`templates/references.bib`.
"""

import html
import re
from functools import cache
from typing import Any

import yaml

from fresnel.report.html import text

_APART = re.compile(
    r"(<(a|code|pre|h[1-6]|svg|button)\b.*?</\2>|<[^>]*>)", re.DOTALL | re.IGNORECASE
)
"""What no link goes into: tags, and all of these elements."""
_CITED = re.compile(r"\[@([\w-]+)\]")
_FIELD = re.compile(r"^\s*(\w+)\s*=\s*\{(.*)\},?$", re.MULTILINE)


class Mentions:
    """The terms and the works that a page mentions, in order of their first mention."""

    def __init__(self) -> None:
        self.terms: dict[str, dict[str, Any]] = {}
        self.works: dict[str, dict[str, str]] = {}

    def link(self, content: str) -> str:
        """HTML with links at first mentions and at citations."""
        parts = _APART.split(content)  # text, what is left alone, its tag, text, ...
        parts[::3] = [self._cite(self._mark(part)) for part in parts[::3]]
        return "".join(part for place, part in enumerate(parts) if place % 3 < 2)

    def glossary(self) -> list[tuple[str, str, str]]:
        """(anchor, term, meaning in HTML) of what was mentioned, by name."""
        said = [(name, self._cite(html.escape(of["means"]))) for name, of in self.terms.items()]
        return sorted((_anchor(name), name, means) for name, means in said)

    def cited(self) -> dict[str, dict[str, str]]:
        """Key -> fields of the works that were cited so far, in the order of their numbers."""
        return self.works

    def _mark(self, content: str) -> str:
        found = []
        for name, entry in _glossary().items():
            if name not in self.terms and (match := entry["pattern"].search(content)):
                found.append((match.start(), match.end(), name))
        done = len(content)
        for start, end, name in sorted(found, reverse=True):
            if end <= done:  # of two that overlap the later one waits for its next mention
                self.terms[name] = _glossary()[name]
                link = f'<a class="term" href="#{_anchor(name)}">{content[start:end]}</a>'
                content, done = content[:start] + link + content[end:], start
        return content

    def _cite(self, content: str) -> str:
        def number(match: re.Match[str]) -> str:
            key = match[1]
            if key not in references():
                return match[0]
            self.works.setdefault(key, references()[key])
            place = list(self.works).index(key) + 1
            return f'<a class="cite" href="#ref-{key}" aria-label="Reference {place}">[{place}]</a>'

        return _CITED.sub(number, content)


@cache
def _glossary() -> dict[str, dict[str, Any]]:
    entries = yaml.safe_load(text("glossary.yaml"))
    for name, entry in entries.items():
        forms = "|".join(entry.get("forms", [re.escape(name)]))
        entry["pattern"] = re.compile(rf"(?<![\w-])(?:{forms})(?![\w-])")
    return entries


@cache
def references() -> dict[str, dict[str, str]]:
    """Key -> the fields of each work, and the entry itself as "bibtex"."""
    entries = re.findall(r"(@\w+\{([\w-]+),\n.*?\n\})", text("references.bib"), re.DOTALL)
    return {key: dict(_FIELD.findall(entry)) | {"bibtex": entry} for entry, key in entries}


def _anchor(name: str) -> str:
    return "term-" + re.sub(r"\W+", "-", name.lower()).strip("-")
